"""The repository of a release, made by its action and read by gpgv, apt, rpm and dnf."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline import signing
from pipeline.action import Action, File, Output, Step
from pipeline.artifacts import Artifacts
from pipeline.errors import InternalError, UserError
from pipeline.executor import Executor
from pipeline.graph import Graph
from pipeline.openpgp import keyring
from pipeline.project import Project
from pipeline.releaserecipe import ReleaseRecipe, RepositoryRecipe
from pipeline.repo import repo, repo_name
from pipeline.repository import read_state
from pipeline.signing import Identity, identity, verify_clearsigned, verify_detached
from pipeline.store import Store
from tests.conftest import ROOT, Recorder
from tests.packaging import make_key, make_package

NAME = "Signer of tests <signer@example.org>"
VERSION = "0.1.0+g0123456789ab"
RECIPE = ReleaseRecipe(
    version="0.1.0",
    maintainer="Tests <tests@example.org>",
    repository=RepositoryRecipe(origin="virt-rt", label="virt-rt", description="Tests", valid_days=9),
)
Clients = Callable[..., subprocess.CompletedProcess[str]]


def packages(name: str, *, lie: bool = False) -> Action:
    """An action that makes a package as `package:*` does."""

    def run(step: Step) -> None:
        formats = {}
        for format_, arch in (("deb", "amd64"), ("rpm", "x86_64")):
            made = make_package(step.out / format_, name, VERSION, format_=format_, content=name * 100)
            digest = hashlib.sha256(made.read_bytes()).hexdigest()
            formats[format_] = {
                "file": made.name, "arch": arch, "size": made.stat().st_size, "sha256": "0" * 64 if lie else digest,
            }  # fmt: skip
        said = {"name": name, "version": VERSION, "formats": formats}
        (step.out / "package.json").write_text(json.dumps(said))

    return Action(
        name=f"package:board:{name}",
        kind="package",
        version=1,
        arch="amd64",
        summary=f"the package {name}",
        run=run,
        files={"own": File(name.encode())},
        outputs=(Output("deb", "directory"), Output("rpm", "directory"), Output("package.json")),
    )


def graph_of(environ: Mapping[str, str], config: Path, recipe: ReleaseRecipe = RECIPE, **lie: bool) -> Graph:
    made = [packages(name, **lie) for name in ("virt-rt-one", "virt-rt-two")]
    signer = identity(environ, config)
    last = repo("board", "amd64", [a.name for a in made], [], recipe, signer, environ, config)
    return Graph([*made, last])


def outputs(executor: Executor, target: Path) -> Path:
    """The repository laid out in `target`, as `doit` does."""
    graph = executor.graph
    action, key = graph[repo_name("board")], graph.keys[repo_name("board")]
    artifacts = Artifacts(target)
    artifacts.place(action, key, executor.result(action.name), executor.store)
    return artifacts.directory(action)


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_key(tmp_path_factory.mktemp("key"), NAME)


@pytest.fixture
def environ(secret: bytes) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], signing.KEY: secret.decode()}


@pytest.fixture
def made(environ: dict[str, str], tmp_path: Path, executor_of: Callable[[Graph], Executor]) -> Path:
    return outputs(executor_of(graph_of(environ, tmp_path / "config")), tmp_path / "artifacts")


def public_of(environ: Mapping[str, str]) -> bytes:
    known = identity(environ, Path("/nonexistent"))
    assert known is not None
    return known.public


# The action -----------------------------------------------------------------------------------


def test_the_repository_is_whole_signed_and_says_what_it_has(made: Path, environ: dict[str, str]) -> None:
    public = (made / "key.asc").read_bytes()
    assert public == public_of(environ)
    state = read_state(lambda path: (made / path).read_bytes(), public)
    assert sorted((p.format, p.name) for p in state.packages.values()) == [
        (format_, name) for format_ in ("deb", "rpm") for name in ("virt-rt-one", "virt-rt-two")
    ]
    (release,) = state.releases["testing"]
    assert (release.platform, release.version) == ("board", "0.1.0")
    text = verify_clearsigned((made / "apt/dists/testing/InRelease").read_bytes(), public)
    assert text == (made / "apt/dists/testing/Release").read_bytes()
    # how long it counts is for whoever publishes it
    assert b"Valid-Until" not in text
    verify_detached(text, (made / "apt/dists/testing/Release.gpg").read_bytes(), public)
    repodata = made / "yum/testing/x86_64/repodata"
    verify_detached(
        (repodata / "repomd.xml").read_bytes(), (repodata / "repomd.xml.asc").read_bytes(), public
    )


def test_the_same_again_is_the_same_to_the_byte(
    environ: dict[str, str], tmp_path: Path, recorder: Recorder
) -> None:
    trees = []
    for where in ("a", "bb"):
        store = Store(tmp_path / where / "cache")
        from pipeline.engine import Engine

        graph = graph_of(environ, tmp_path / "config")
        executor = Executor(graph, store, Engine(), recorder, tmp_path / where / "log")
        trees.append({name: blob for name, (blob, _) in executor.result(repo_name("board")).outputs.items()})
        assert executor.repeat(repo_name("board")) == trees[-1]
    assert trees[0] == trees[1] and set(trees[0]) == {"apt", "yum", "state", "key.asc", "repository.json"}


def test_the_key_of_the_action_is_that_of_the_signer_and_never_the_secret(
    environ: dict[str, str], secret: bytes, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(secret)
    from_file = {"PATH": os.environ["PATH"], signing.KEY_FILE: str(tmp_path / "key")}
    other = {"PATH": os.environ["PATH"], signing.KEY: make_key(tmp_path, "B <b@example.org>").decode()}
    keys = [
        graph_of(each, tmp_path).keys[repo_name("board")]
        for each in (environ, from_file, other, environ | {"SOURCE_DATE_EPOCH": "4000000000"}, {})
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 4
    spec = json.dumps(graph_of(environ, tmp_path).specs[repo_name("board")])
    assert NAME in spec and "PRIVATE" not in spec
    with pytest.raises(UserError, match="SOURCE_DATE_EPOCH is 'today'"):
        graph_of(environ | {"SOURCE_DATE_EPOCH": "today"}, tmp_path)


def test_the_date_is_the_one_that_is_given(
    environ: dict[str, str], tmp_path: Path, executor_of: Callable[[Graph], Executor]
) -> None:
    dated = graph_of(environ | {"SOURCE_DATE_EPOCH": "4000000000"}, tmp_path)
    found = outputs(executor_of(dated), tmp_path / "artifacts")
    assert "Date: Tue, 02 Oct 2096 07:06:40 UTC\n" in (found / "apt/dists/testing/Release").read_text()


def test_a_package_that_is_not_what_it_says_is_refused(
    environ: dict[str, str], tmp_path: Path, executor_of: Callable[[Graph], Executor]
) -> None:
    with pytest.raises(InternalError, match="is not what its package.json says"):
        executor_of(graph_of(environ, tmp_path, lie=True)).result(repo_name("board"))


def test_a_key_that_changed_meanwhile_is_refused(
    environ: dict[str, str], tmp_path: Path, executor_of: Callable[[Graph], Executor]
) -> None:
    executor = executor_of(graph_of(environ, tmp_path))
    environ[signing.KEY] = make_key(tmp_path, "B <b@example.org>").decode()
    with pytest.raises(UserError, match="the signing key changed while doit ran"):
        executor.result(repo_name("board"))


def fragments(secret: bytes) -> list[bytes]:
    """Pieces of a secret key that are in nothing public: of its armor, and of its bytes."""
    armor = [line for line in secret.splitlines() if len(line) == 64]
    block = secret.replace(b"PRIVATE", b"PUBLIC")
    binary = keyring(block)
    pieces = [binary[at : at + 24] for at in range(0, len(binary) - 24, 24)]
    return [b"PRIVATE KEY", *armor, *pieces, *(base64.b64encode(p) for p in pieces)]


def test_no_secret_is_in_store_artifacts_or_logs(
    made: Path, environ: dict[str, str], secret: bytes, tmp_path: Path
) -> None:
    public = public_of(environ)
    known = keyring(public)
    wanted = [f for f in fragments(secret) if f not in public and f not in known]
    wanted = [f for f in wanted if f not in base64.b64encode(known)]
    assert len(wanted) > 40
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"cache", "artifacts", "log"} <= {path.relative_to(tmp_path).parts[0] for path in files}
    assert any("signed by" in path.read_text() for path in (tmp_path / "log").iterdir())
    for path in files:
        content = path.read_bytes()
        assert not [fragment for fragment in wanted if fragment in content], path
    # the search finds what it seeks
    lines = [fragment for fragment in wanted if len(fragment) == 64]
    assert len(lines) > 10 and all(line in secret for line in lines)


# The project ----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing, "DEVELOPMENT_ALGORITHM", "rsa2048")


@pytest.mark.usefixtures("quick")
def test_a_project_makes_the_development_key_when_something_is_to_be_signed(tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "XDG_CONFIG_HOME": str(tmp_path)}
    project = Project(ROOT, environ)
    name = repo_name("qemu-q35")
    before = project.graph.keys[name]
    assert project.graph[name].parameters[signing.PARAMETER] is None
    assert project.bring_signer(["tuning:qemu-q35"]) is None
    assert not list(tmp_path.iterdir())
    made = project.bring_signer(["tuning:qemu-q35", name])
    assert made is not None and made.development
    assert project.graph.keys[name] != before
    assert project.graph[name].parameters[signing.PARAMETER]["name"] == made.name
    assert project.bring_signer([name]) is None
    assert Project(ROOT, environ).graph.keys[name] == project.graph.keys[name]


def test_the_place_for_the_key_is_absolute(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="XDG_CONFIG_HOME is etc, not an absolute path"):
        _ = Project(ROOT, {"XDG_CONFIG_HOME": "etc"}).config
    assert Project(ROOT, {}).config == Path.home() / ".config" / "virt-rt"


def test_no_process_that_is_started_sees_the_secrets(tmp_path: Path) -> None:
    said = (
        "import os; from pipeline.face import session; environ = session().project.environ; "
        "print(*(f'{name} {name in os.environ} {name in environ}' for name in os.environ | environ "
        "if 'SIGNING' in name), sep='\\n')"
    )
    secrets = {name: "secret" for name in signing.SECRETS}
    done = subprocess.run(
        [sys.executable, "-c", said],
        env=os.environ | secrets | {signing.KEY_ID: "A"},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert sorted(done.stdout.splitlines()) == [
        "VIRT_RT_SIGNING_KEY False True",
        "VIRT_RT_SIGNING_KEY_ID True True",
        "VIRT_RT_SIGNING_PASSPHRASE False True",
    ]


# Clients --------------------------------------------------------------------------------------


@pytest.fixture
def apt(tmp_path: Path) -> Clients:
    """apt-get in a root of its own."""
    root = tmp_path / "apt-root"
    for directory in ("etc/apt/sources.list.d", "var/lib/dpkg", "var/lib/apt/lists/partial", "var/cache/apt"):
        (root / directory).mkdir(parents=True)
    (root / "var/lib/dpkg/status").touch()
    (root / "apt.conf").write_text(
        f'Dir "{root}";\nDir::State::status "{root}/var/lib/dpkg/status";\nAPT::Architecture "amd64";\n'
        'APT::Architectures "amd64";\nDir::Etc::parts "/dev/null";\nAPT::Sandbox::User "root";\n'
        'Dir::Bin::methods "/usr/lib/apt/methods";\nAcquire::Languages "none";\n'
    )

    def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["apt-get", "-q", "-o", "Debug::Acquire::Progress=0", *arguments],
            env={"PATH": os.environ["PATH"], "APT_CONFIG": str(root / "apt.conf"), "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=check,
            cwd=root,
        )

    return run


def add_source(tmp_path: Path, repository: Path) -> None:
    key = tmp_path / "apt-root" / "key.asc"
    shutil.copy(repository / "key.asc", key)
    (tmp_path / "apt-root/etc/apt/sources.list.d/virt-rt.sources").write_text(
        f"Types: deb\nURIs: copy:{repository}/apt\nSuites: testing\nComponents: main\nSigned-By: {key}\n"
    )


def test_apt_takes_it_and_refuses_it_tampered_with(made: Path, apt: Clients, tmp_path: Path) -> None:
    add_source(tmp_path, made)
    said = apt("update", "-o", "APT::Update::Error-Mode=any")
    assert "W:" not in said.stderr and "E:" not in said.stderr
    apt("download", "virt-rt-one")
    (deb,) = (tmp_path / "apt-root").glob("virt-rt-one*.deb")
    assert deb.read_bytes() == next((made / "apt").rglob("virt-rt-one*.deb")).read_bytes()
    for path, change in (
        ("main/binary-amd64/by-hash", None),
        ("InRelease", b"Label: virt-rt"),
    ):
        copy = tmp_path / "tampered"
        shutil.copytree(made, copy)
        add_source(tmp_path, copy)
        shutil.rmtree(tmp_path / "apt-root/var/lib/apt/lists")
        target = copy / "apt/dists/testing" / path
        files = [target] if target.is_file() else [p for p in target.rglob("*") if p.is_file()]
        files += list((copy / "apt").rglob("Packages*")) if change is None else []
        for file in files:
            content = file.read_bytes()
            file.write_bytes(content.replace(change, b"Label: Virt-rt") if change else b"x" * len(content))
        for other in ("Release", "Release.gpg"):
            (copy / "apt/dists/testing" / other).unlink()
        refused = apt("update", "-o", "APT::Update::Error-Mode=any", check=False)
        assert refused.returncode and ("Hash Sum mismatch" in refused.stderr or "signature" in refused.stderr)
        shutil.rmtree(copy)


@pytest.fixture
def served(made: Path) -> Iterator[str]:
    handler: Any = partial(Quiet, directory=str(made))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    """A server that says nothing."""

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


def dnf(root: Path, repository: str, key: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """dnf in a root of its own, which checks every signature."""
    root.mkdir(exist_ok=True)
    (root / "virt-rt.repo").write_text(
        f"[virt-rt]\nname=virt-rt\n{repository}\ngpgkey=file://{key}\n"
        "gpgcheck=1\nrepo_gpgcheck=1\nenabled=1\nskip_if_unavailable=0\n"
    )
    return subprocess.run(
        [
            *("dnf", "-q", "-y", f"--installroot={root}", f"--setopt=reposdir={root}", "--releasever=1"),
            *(f"--setopt=cachedir={root}/cache", "--setopt=metadata_expire=0", *arguments),
        ],
        env={"PATH": os.environ["PATH"], "HOME": str(root), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_dnf_takes_it_and_refuses_it_tampered_with(made: Path, tmp_path: Path) -> None:
    where = f"baseurl=file://{made}/yum/testing/x86_64"
    found = dnf(tmp_path / "root", where, made / "key.asc", "repoquery")
    assert sorted(found.stdout.split()) == [f"virt-rt-{n}-0:{VERSION}-1.x86_64" for n in ("one", "two")], (
        found
    )
    done = dnf(tmp_path / "root", where, made / "key.asc", "install", "virt-rt-one")
    assert done.returncode == 0, done
    assert (tmp_path / "root/usr/share/virt-rt-one/file").read_text() == "virt-rt-one" * 100
    repomd = made / "yum/testing/x86_64/repodata/repomd.xml"
    repomd.write_bytes(repomd.read_bytes() + b"\n")
    refused = dnf(tmp_path / "other", where, made / "key.asc", "repoquery")
    assert refused.returncode and "signature" in refused.stderr


def test_dnf_follows_the_mirror_list_to_a_generation(
    environ: dict[str, str], served: str, made: Path, tmp_path: Path, executor_of: Callable[[Graph], Executor]
) -> None:
    at = msgspec.structs.replace(RECIPE.repository, url=served)
    executor = executor_of(graph_of(environ, tmp_path, msgspec.structs.replace(RECIPE, repository=at)))
    again = outputs(executor, tmp_path / "again")
    shutil.rmtree(made)
    shutil.copytree(again, made)
    shutil.rmtree(made / "yum/testing/x86_64/repodata")  # nobody who follows the list needs it
    lines = (made / "virt-rt-testing.repo").read_text().replace("$basearch", "x86_64").splitlines()
    (where,) = [line for line in lines if line.startswith("mirrorlist=")]
    done = dnf(tmp_path / "root", where, made / "key.asc", "install", "virt-rt-two")
    assert done.returncode == 0, done
    assert (tmp_path / "root/usr/share/virt-rt-two/file").is_file()


def test_two_keys_are_in_one_file_for_rotation(
    environ: dict[str, str], tmp_path: Path, executor_of: Callable[[Graph], Executor]
) -> None:
    other = {"PATH": os.environ["PATH"], signing.KEY: make_key(tmp_path, "B <b@example.org>").decode()}
    (tmp_path / "other.asc").write_bytes(public_of(other))
    both = environ | {signing.OTHER_KEYS: str(tmp_path / "other.asc")}
    name = repo_name("board")
    assert graph_of(both, tmp_path).keys[name] != graph_of(environ, tmp_path).keys[name]
    found = outputs(executor_of(graph_of(both, tmp_path)), tmp_path / "artifacts")
    where = f"baseurl=file://{found}/yum/testing/x86_64"
    key = found / "key.asc"
    done = dnf(tmp_path / "root", where, key, "install", "virt-rt-one")
    assert done.returncode == 0, done
    (database,) = (tmp_path / "root").rglob("rpmdb.sqlite")
    query = ["rpm", "--dbpath", str(database.parent), "-q", "gpg-pubkey", "--qf", "%{packager}\n"]
    names = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    assert "Signer of tests" in names and "b@example.org" in names


def test_who_signs_is_shown_with_every_product(made: Path, environ: dict[str, str]) -> None:
    signer = identity(environ, Path("/nonexistent"))
    assert isinstance(signer, Identity)
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["spec"]["parameters"][signing.PARAMETER] == signing.parameter(signer)
