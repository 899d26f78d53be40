"""`doit publish` and `doit promote` as they are typed: with products laid out by an executor, and what they say."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from pipeline import face, publishcommands
from pipeline.action import Action, File, Output, Step, Upstream
from pipeline.artifacts import Artifacts
from pipeline.display import Display
from pipeline.errors import UserError
from pipeline.executor import Executor
from pipeline.graph import Graph
from pipeline.publishcommands import Promote, Publish, channels
from pipeline.releaserecipe import ReleaseRecipe
from pipeline.releaserecord import Record, Signer, encode, previous
from pipeline.signing import OTHER_KEYS
from pipeline.store import Store
from tests import published, servers
from tests.published import repository_files

PLATFORM = "qemu-q35"
NAME = f"repo:{PLATFORM}"
MEMORY = f"recipes/releases/{PLATFORM}.json"
RECORD = Record(
    version="1.0",
    platform=PLATFORM,
    description="Tests",
    arch="amd64",
    date=0,
    signer=Signer(name="Test", fingerprint="0" * 40, development=False),
    sources=(),
    builders=(),
    kernels={},
    packages=(),
    guests={},
    plan={},
    proofs=(),
    actions={},
)
TREES, FILES = ("apt", "yum", "state"), ("key.asc", "repository.json")


@pytest.fixture(scope="module", params=["a key", "a development key"])
def release(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], Path]:
    """The environment that names a key, and the directory of a release that is signed with it."""
    directory = tmp_path_factory.mktemp("release")
    development = "virt-rt development key, not for release <development@localhost>"
    name = development if request.param == "a development key" else "Test <test@localhost>"
    environ = published.secret_key(directory / "key", name)
    with published.signer(environ) as signer:
        made = published.packages(directory / "packages", "1.0")
        return environ, published.release(directory / "made", "1.0", made, signer)


@pytest.fixture
def project(
    release: tuple[dict[str, str], Path],
    tmp_path: Path,
    store: Store,
    executor_of: Callable[[Graph], Executor],
    monkeypatch: pytest.MonkeyPatch,
) -> SimpleNamespace:
    """A checkout whose one product is that release, laid out."""
    environ, made = release

    def run(step: Step) -> None:
        for name in TREES:
            shutil.copytree(made / name, step.out / name)
        for name in FILES:
            shutil.copyfile(made / name, step.out / name)

    action = Action(
        name=NAME,
        kind="repo",
        version=1,
        arch="amd64",
        summary="a test",
        run=run,
        files={"own": File(b"", origin="recipes/test")},
        outputs=(*(Output(name, "directory") for name in TREES), *(Output(name) for name in FILES)),
        place=f"{PLATFORM}/repo",
    )

    def describe(step: Step) -> None:
        (step.out / "release.json").write_bytes(encode(RECORD))

    described = Action(
        name=f"release:{PLATFORM}",
        kind="release",
        version=1,
        arch="amd64",
        summary="a test",
        run=describe,
        inputs={"repo": Upstream(NAME, "apt")},
        outputs=(Output("release.json"),),
        place=f"{PLATFORM}/release",
    )
    graph = Graph([action, described])
    artifacts = Artifacts(tmp_path / "artifacts")
    for each in (action, described):
        artifacts.place(each, graph.keys[each.name], executor_of(graph).result(each.name), store)

    def platform(name: str) -> None:
        if name != PLATFORM:
            raise UserError(f"there is no platform {name}", "there is one")

    asked = SimpleNamespace(
        root=tmp_path,
        environ=environ,
        config=tmp_path / "config",
        graph=graph,
        artifacts=artifacts,
        recipes=SimpleNamespace(platform=platform),
        release=ReleaseRecipe(version="1.0", maintainer="Test <test@localhost>", repository=published.RECIPE),
    )
    for module in (face, publishcommands):
        monkeypatch.setattr(module, "session", lambda: SimpleNamespace(project=asked, display=Display()))
    return asked


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(project: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> Run:
    """Type a command: its status, and what it wrote to both streams."""

    def typed(command: type[Publish] | type[Promote], *words: str) -> tuple[int, str, str]:
        status = command().parse_execute(list(words))
        out, err = capsys.readouterr()
        return status, out, err

    return typed


def marked(project: SimpleNamespace) -> str:
    """What a development key adds to every product."""
    with published.signer(project.environ) as signer:
        return " (signed with a development key, not for release)" if signer.identity.development else ""


def test_publish_and_promote(project: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    root, mark = tmp_path / "repo", marked(project)
    status, out, err = run(Publish, str(root))
    assert (status, out.splitlines()[0].partition(", 0.")[0]) == (
        0, f"qemu-q35 1.0{mark} is in testing of {root}: 4 packages, 4 sent"
    )  # fmt: skip
    assert "url" in out.splitlines()[1]
    assert err.splitlines()[0] == "  4 packages"
    assert (tmp_path / MEMORY).exists() == (f"commit {MEMORY}: " in out) == (not mark)
    if not mark:
        assert previous(tmp_path, PLATFORM, "1.1") == RECORD
    before = repository_files(root)
    status, out, err = run(Publish, "--channel", "testing", str(root))
    assert (status, out, err) == (
        0,
        f"testing of {root} has qemu-q35 1.0{mark} already; nothing was written\n",
        "",
    )
    assert repository_files(root) == before
    status, out, _ = run(Promote, str(root), "--json")
    assert status == 0
    assert json.loads(out) == {
        "destination": str(root),
        "channel": "stable",
        "platform": PLATFORM,
        "version": "1.0",
        "changed": True,
        "packages": 4,
        "sent": 0,
        "bytes": 0,
        "note": mark.strip(" ()"),
    }
    assert (root / "apt/dists/stable/InRelease").is_file()
    assert mark.strip(" ()") in (root / "apt/dists/stable/InRelease").read_text()
    status, out, _ = run(Promote, "--from", "testing", "--to", "stable", str(root))
    assert (status, out) == (0, f"stable of {root} has qemu-q35 1.0{mark} already; nothing was written\n")


def test_clients_are_told_what_to_type(project: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    url = "https://packages.example.org/rt"
    project.release = msgspec.structs.replace(
        project.release, repository=msgspec.structs.replace(published.RECIPE, url=url)
    )
    _, out, _ = run(Publish, str(tmp_path / "repo"))
    lines = out.splitlines()[1:4]
    assert "apt-get update && apt-get upgrade" in lines[0]
    assert f"{url}/virt-rt-testing.sources" in lines[1]
    assert lines[1].endswith("apt-get install virt-rt-host-qemu-q35")
    assert f"{url}/virt-rt-testing.repo" in lines[2]
    for name in ("virt-rt-testing.sources", "virt-rt-testing.repo"):
        assert (tmp_path / "repo" / name).is_file()


def test_a_server_takes_no_development_key(project: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    with servers.nginx(tmp_path / "served", tmp_path / "nginx") as address:
        status, out, _ = run(Publish, address.replace("//", "//me:secret@"))
    assert "secret" not in out
    if marked(project):
        assert status == 2
        assert "not for " + address in out
        assert repository_files(tmp_path / "served") == {}
    else:
        assert status == 0
        assert f"is in testing of {address}: " in out


def test_products_must_be_current_and_untouched(project: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    made = project.artifacts.directory(project.graph[NAME])
    deb = made / "apt/pool/rt-all/rt-all_1.0_amd64.deb"
    content, times = deb.read_bytes(), deb.stat()
    # what sizes and times do not tell
    deb.write_bytes(content[:-1] + b"x")
    os.utime(deb, ns=(times.st_atime_ns, times.st_mtime_ns))
    status, out, _ = run(Publish, str(tmp_path / "repo"))
    assert status == 2
    assert "rt-all_1.0_amd64.deb: edited" in out
    deb.write_bytes(b"short")
    status, out, _ = run(Publish, str(tmp_path / "repo"))
    assert status == 2
    assert "repo:qemu-q35 is not current" in out
    assert "doit release:qemu-q35" in out
    deb.write_bytes(content)
    os.utime(deb, ns=(times.st_atime_ns, times.st_mtime_ns))
    (project.artifacts.root / PLATFORM / "release/release.json").write_text("{}")
    status, out, _ = run(Publish, str(tmp_path / "repo"))
    assert status == 2
    assert "release:qemu-q35 is not current" in out
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize("command", [Publish, Promote])
def test_what_is_typed_wrongly(command: type[Publish] | type[Promote], run: Run, tmp_path: Path) -> None:
    for words, said in (
        ([], "takes one DEST"),
        (["a", "b"], "takes one DEST"),
        (["--platform", "none", str(tmp_path)], "there is no platform none"),
        (["ftp://host/x"], "ftp:// is no way to publish"),
        (["--previous-key", "/absent", str(tmp_path)], "/absent"),
    ):
        status, out, err = run(command, *words)
        assert status == 2, err
        assert said in out
    status, _, err = run(command, "--nonsense", "x")
    assert status == 2
    assert "nonsense" in err
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "--previous-key" in out


def test_previous_key_and_its_variable(project: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    former = Path(project.environ["VIRT_RT_SIGNING_KEY_FILE"]).with_name("public.asc")
    status, out, _ = run(Publish, "--previous-key", str(former), str(tmp_path / "repo"))
    assert status == 0, out
    project.environ = project.environ | {OTHER_KEYS: str(former)}
    status, out, _ = run(Publish, "--previous-key", str(former), str(tmp_path / "repo"))
    assert status == 2
    assert f"{OTHER_KEYS} is set" in out


def test_channels_of_a_promotion() -> None:
    known = ("nightly", "testing", "stable")
    assert channels(known, "", "") == ("testing", "stable")
    assert channels(known, "nightly", "") == ("nightly", "testing")
    assert channels(known, "", "testing") == ("nightly", "testing")
    assert channels(known, "nightly", "stable") == ("nightly", "stable")
    for source, target, said in (
        ("stable", "", "no channel comes after stable"),
        ("", "nightly", "no channel comes before nightly"),
        ("none", "", "there is no channel none"),
        ("", "none", "there is no channel none"),
    ):
        with pytest.raises(UserError, match=said):
            channels(known, source, target)
    with pytest.raises(UserError, match="stable is the only channel"):
        channels(("stable",), "", "")
