"""Signing of modules: real keys made for the tests, openssl's own word on the signatures, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import drivers, modulesigning
from pipeline.action import ALL, Action, Output, Step, Upstream
from pipeline.engine import Engine
from pipeline.errors import UserError, VirtRtError
from pipeline.executor import Executor
from pipeline.graph import Graph
from pipeline.keys import spec
from pipeline.modulesigning import CERTIFICATE, KEY, MAGIC, certificate_of, signature_of
from pipeline.project import Project
from pipeline.store import Store
from tests.conftest import Recorder

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = "qemu-q35"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def make_key(directory: Path, *options: str, name: str = "Modules") -> dict[str, str]:
    """A key and its certificate, as the environment names them."""
    directory.mkdir(exist_ok=True)
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    command = ["openssl", "req", "-x509", *(options or ("-newkey", "rsa:2048", "-nodes"))]
    command += [
        "-keyout",
        str(key),
        "-out",
        str(certificate),
        "-subj",
        f"/O=Example/CN={name}",
        "-days",
        "30",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return {KEY: str(key), CERTIFICATE: str(certificate)}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_key(tmp_path_factory.mktemp("keys") / "one")


def unsigned(modules: Mapping[str, bytes]) -> Action:
    """What a driver's build leaves, without a container."""

    def run(step: Step) -> None:
        updates = step.out / "root" / "usr" / "lib" / "modules" / "6.12" / "updates"
        updates.mkdir(parents=True)
        for name, content in modules.items():
            (updates / name).write_bytes(content)
        (step.out / "root" / "link").symlink_to("usr")
        document = {"modules": [{"file": name} for name in ("hello.ko", "other.ko")], "signer": None}
        (step.out / "driver.json").write_text(json.dumps(document))
        for name in ("licence", "kernelrelease"):
            (step.out / name).write_text(f"{name}\n")

    outputs = (Output("root", "directory"), Output("licence"), Output("driver.json"), Output("kernelrelease"))
    parameters = {"modules": {name: content.hex() for name, content in modules.items()}}
    return Action(
        name="driver:board:hello", kind="driver", version=1, arch="amd64", summary="a driver", run=run,
        parameters=parameters, outputs=outputs, place="board/driver/hello",
    )  # fmt: skip


MODULES = {"hello.ko": b"\x7fELF hello" * 1000, "other.ko": b"\x7fELF other" * 1000}


def sign(
    tmp_path: Path,
    environ: Mapping[str, str],
    modules: Mapping[str, bytes] = MODULES,
    environ_then: Mapping[str, str] | None = None,
) -> tuple[Path, str]:
    """Run the signing of a driver; what it made, and all that it logged, keyed and stored but the modules."""
    built = unsigned(modules)
    certificate = certificate_of(environ)
    assert certificate is not None
    before = replace(built, name="driver-unsigned:board:hello", place=None)
    action = drivers._signed(built, before, certificate, environ_then or environ)
    assert action.name == built.name and action.place == built.place
    assert action.inputs == {"unsigned": Upstream(before.name, ALL)}
    graph = Graph([before, action])
    store = Store(tmp_path / "cache")
    executor = Executor(graph, store, Engine(), Recorder(), tmp_path / "log")
    try:
        result = executor.result(action.name)
    finally:
        store.close()
    made = tmp_path / "made"
    (made / "root").mkdir(parents=True)
    for name, (blob, kind) in result.outputs.items():
        if kind == "directory":
            subprocess.run(["tar", "-xf", store.path(blob.digest), "-C", made / name], check=True)
        else:
            shutil.copyfile(store.path(blob.digest), made / name)
    told = json.dumps(graph.specs[action.name]) + executor.log_path(action.name).read_text()
    return made, told + (made / "driver.json").read_text()


# Who signs -------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_signed() -> None:
    assert certificate_of({}) is None
    assert certificate_of({KEY: "", CERTIFICATE: ""}) is None


@pytest.mark.parametrize("name", [KEY, CERTIFICATE])
def test_half_a_key_is_refused(keys: dict[str, str], name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is set, VIRT_RT_MODULE_(KEY|CERT) is not"):
        certificate_of({name: keys[name]})


def test_a_certificate_may_be_text_or_binary(keys: dict[str, str], tmp_path: Path) -> None:
    binary = tmp_path / "certificate.der"
    subprocess.run(
        ["openssl", "x509", "-in", keys[CERTIFICATE], "-outform", "DER", "-out", str(binary)], check=True
    )
    found = certificate_of(keys)
    assert found is not None
    assert found.fingerprint == hashlib.sha256(binary.read_bytes()).hexdigest()
    assert certificate_of(keys | {CERTIFICATE: str(binary)}) == found


@pytest.mark.parametrize(
    ("content", "message"), [("text", "is no certificate"), ("", "is empty"), (None, "No such file")]
)
def test_a_certificate_that_is_none_is_refused(
    keys: dict[str, str], tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "x").write_text(content)
    with pytest.raises(UserError, match=message):
        certificate_of(keys | {CERTIFICATE: str(tmp_path / "x")})


def test_a_key_in_the_place_of_its_name_is_not_shown(keys: dict[str, str]) -> None:
    text = Path(keys[KEY]).read_text()
    with pytest.raises(UserError) as caught:
        certificate_of(keys | {CERTIFICATE: text})
    assert "holds a text, not the name of a file" in caught.value.message
    assert text.splitlines()[1] not in f"{caught.value.message}{caught.value.hint}"


# Signatures ------------------------------------------------------------------------------------


def test_every_module_is_signed_and_says_by_whom(keys: dict[str, str], tmp_path: Path) -> None:
    made, told = sign(tmp_path, keys)
    certificate = certificate_of(keys)
    assert certificate is not None
    found = sorted(made.rglob("*.ko"))
    assert [path.name for path in found] == ["hello.ko", "other.ko"]
    for path in found:
        content, signature = signature_of(path.read_bytes())
        assert content == MODULES[path.name]
        (tmp_path / "signature").write_bytes(signature)
        (tmp_path / "content").write_bytes(content)
        command = [
            "openssl",
            "cms",
            "-verify",
            "-binary",
            "-inform",
            "DER",
            "-in",
            str(tmp_path / "signature"),
        ]
        command += [
            "-content",
            str(tmp_path / "content"),
            "-CAfile",
            keys[CERTIFICATE],
            "-certfile",
            keys[CERTIFICATE],
        ]
        done = subprocess.run([*command, "-purpose", "any"], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        (tmp_path / "content").write_bytes(content + b"x")
        assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    signer = json.loads((made / "driver.json").read_text())["signer"]
    assert signer == {"subject": "CN=Modules,O=Example", "certificate_sha256": certificate.fingerprint}
    assert (made / "root" / "link").is_symlink()
    # nothing of the key, and not even where it is
    secret = Path(keys[KEY]).read_text().splitlines()[1]
    assert certificate.fingerprint in told
    assert secret not in told and keys[KEY] not in told and keys[CERTIFICATE] not in told


def test_the_same_key_gives_the_same_bytes(keys: dict[str, str], tmp_path: Path) -> None:
    first, second = (sign(tmp_path / each, keys)[0] for each in ("a", "b"))
    for path in first.rglob("*.ko"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_the_action_changes_with_the_certificate_only(keys: dict[str, str], tmp_path: Path) -> None:
    other = make_key(tmp_path / "other")
    moved = {KEY: str(tmp_path / "moved"), CERTIFICATE: keys[CERTIFICATE]}
    built = unsigned(MODULES)
    specs = []
    for environ in (keys, moved, other):
        certificate = certificate_of(environ)
        assert certificate is not None
        specs.append(spec(drivers._signed(built, built, certificate, environ), {built.name: "0" * 64}))
    assert specs[0] == specs[1] != specs[2]


def test_the_real_graph_signs_outside_of_containers(keys: dict[str, str]) -> None:
    plain = Project(ROOT, {}).graph
    graph = Project(ROOT, keys).graph
    for role in ("host", "guest"):
        name = f"driver:{PLATFORM}:irqlat-{role}"
        built, signed = graph[f"driver-unsigned:{PLATFORM}:irqlat-{role}"], graph[name]
        # with and without a key the same build, which no secret can reach
        assert graph.keys[built.name] == plain.keys[name]
        assert built.place is None and built.builder is not None
        assert signed.builder is None and signed.place == plain[name].place
        assert graph.keys[name] != plain.keys[name]


def make_encrypted(directory: Path) -> dict[str, str]:
    return make_key(directory, "-newkey", "rsa:2048", "-passout", "pass:secret")


def make_elliptic(directory: Path) -> dict[str, str]:
    return make_key(directory, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def make_mismatched(directory: Path) -> dict[str, str]:
    return make_key(directory) | {KEY: make_key(directory / "other")[KEY]}


def make_missing(directory: Path) -> dict[str, str]:
    return make_key(directory) | {KEY: str(directory / "none")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_encrypted, "openssl cms -sign: "),
        (make_elliptic, "VIRT_RT_MODULE_CERT is not for an RSA key"),
        (make_mismatched, "openssl cms -sign: "),
        (make_missing, "VIRT_RT_MODULE_KEY: .*: No such file"),
    ],
)
def test_keys_that_cannot_sign_are_refused(make: object, message: str, tmp_path: Path) -> None:
    assert callable(make)
    with pytest.raises(VirtRtError, match=message):
        sign(tmp_path, make(tmp_path / "key"))


def test_a_certificate_that_changes_meanwhile_is_noticed(keys: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the certificate for modules changed while doit ran"):
        sign(tmp_path, keys, environ_then=make_key(tmp_path / "other"))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"hello.ko": b"a"}, "the modules are not those of driver.json"),
        (MODULES | {"hello.ko": b"a" + MAGIC}, "hello.ko is signed already"),
    ],
)
def test_modules_that_are_not_what_they_should_be_are_refused(
    keys: dict[str, str], tmp_path: Path, modules: Mapping[str, bytes], message: str
) -> None:
    with pytest.raises(VirtRtError, match=message):
        sign(tmp_path, keys, modules)


@pytest.mark.parametrize("content", [b"", b"plain", MAGIC, b"\0" * 12 + MAGIC, b"\xff" * 40 + MAGIC])
def test_what_has_no_signature_has_none(content: bytes) -> None:
    assert signature_of(content) == (content, b"")


def test_the_check_sees_a_changed_module(keys: dict[str, str], tmp_path: Path) -> None:
    certificate = certificate_of(keys)
    assert certificate is not None
    signer = modulesigning.Signer(tmp_path, certificate, keys)
    module = tmp_path / "x.ko"
    module.write_bytes(b"module")
    with pytest.raises(UserError, match="x.ko is not signed"):
        signer.check(module)
    signer.sign(module)
    signer.check(module)
    module.write_bytes(b"mOdule" + module.read_bytes()[6:])
    with pytest.raises(UserError, match="openssl cms -verify"):
        signer.check(module)
