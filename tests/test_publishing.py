"""Publishing and promoting: what changes, what is refused, and what a kill leaves."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from pipeline.destination import LOCK, Content, Destination, Renew
from pipeline.directory import Directory
from pipeline.errors import UserError
from pipeline.publishing import UNFINISHED, Publisher, in_use
from pipeline.repository import POINTER, read_state
from pipeline.rsyncserver import RsyncServer
from pipeline.signing import OTHER_KEYS, Signer
from pipeline.webserver import WebServer
from tests import published, servers
from tests.published import RECIPE, repository_files

PLATFORM = "qemu-q35"
PLAIN = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
#: Of publications, in seconds since 1970.
NOW = 1_800_000_000.0


@dataclass(frozen=True)
class Made:
    """What all tests share: an open signer, how it was named, and the directories of releases by version."""

    signer: Signer
    environ: dict[str, str]
    releases: dict[str, Path]
    directory: Path


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is killed here is a process; waiting for the disk would be half of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    directory = tmp_path_factory.mktemp("releases")
    environ = published.secret_key(directory / "key")
    with published.signer(environ) as signer:
        releases = {
            version: published.release(
                directory / version,
                version,
                published.packages(directory / "packages" / version, version),
                signer,
            )
            for version in ("1.0", "1.1", "1.2", "1.3")
        }
        yield Made(signer, environ, releases, directory)


def publisher(made: Made, place: Destination, now: float = NOW) -> Publisher:
    return Publisher(place, RECIPE, made.signer, clock=lambda: now)


def versions(root: Path, signer: Signer, channel: str) -> list[str]:
    """Versions of a channel's releases, as the signed state has them."""
    state = read_state(Directory(root).read, signer.trusted)
    return [release.version for release in state.releases.get(channel, ())]


# What is done -----------------------------------------------------------------------------------


def test_publish_and_promote(made: Made, tmp_path: Path) -> None:
    root = tmp_path / "repo"
    place = Directory(root)
    first = publisher(made, place).publish(made.releases["1.0"], PLATFORM, "testing")
    assert (first.changed, first.sent, first.release.version) == (True, 4, "1.0")
    assert first.size == sum(p.stat().st_size for p in root.rglob("*") if p.suffix in (".deb", ".rpm"))
    assert versions(root, made.signer, "testing") == ["1.0"]
    before = repository_files(root)
    assert UNFINISHED not in before
    again = publisher(made, place, NOW + 9).publish(made.releases["1.0"], PLATFORM, "testing")
    assert (again.changed, again.sent) == (False, 0)
    assert repository_files(root) == before
    moved = publisher(made, place, NOW + 10).promote("testing", "stable", PLATFORM)
    assert (moved.changed, moved.sent, moved.release) == (True, 0, first.release)
    assert versions(root, made.signer, "stable") == ["1.0"]
    after = repository_files(root)
    assert {path: after[path] for path in before if path.startswith("apt/dists/testing/")} == {
        path: before[path] for path in before if path.startswith("apt/dists/testing/")
    }
    rpm = "Packages/rt-all_1.0_amd64.rpm"
    assert after[f"yum/stable/x86_64/{rpm}"] == after[f"yum/testing/x86_64/{rpm}"]
    assert not publisher(made, place, NOW + 11).promote("testing", "stable", PLATFORM).changed
    assert repository_files(root) == after


def test_several_platforms_and_kept_releases(made: Made, tmp_path: Path) -> None:
    other = published.release(
        tmp_path / "other", "1.0",
        published.packages(tmp_path / "packages", "1.0", ("other-all",)), made.signer, "other"
    )  # fmt: skip
    root = tmp_path / "repo"
    place = Directory(root)
    publisher(made, place).publish(other, "other", "testing")
    for number, version in enumerate(("1.0", "1.1", "1.2")):
        publisher(made, place, NOW + number).publish(made.releases[version], PLATFORM, "testing")
    assert versions(root, made.signer, "testing") == ["1.0", "1.1", "1.2"]
    listed = (root / "apt/dists/testing/main/binary-amd64/Packages").read_text()
    assert [line for line in listed.splitlines() if line.startswith("Version: ")] == [
        f"Version: {version}" for version in ("1.0", "1.1", "1.2", "1.1", "1.2")
    ]
    old = root / "apt/pool/rt-all/rt-all_1.0_amd64.deb"
    assert old.is_file()  # a client may be about to fetch it
    publisher(made, place, NOW + 90_000).publish(made.releases["1.3"], PLATFORM, "testing")
    assert not old.is_file()
    assert (root / "apt/pool/rt-all/rt-all_1.1_amd64.deb").is_file()
    assert (root / "apt/pool/other-all/other-all_1.0_amd64.deb").is_file()


@pytest.mark.parametrize("kind", ["web", "ssh"])
def test_a_server_gets_what_a_directory_gets(kind: str, made: Made, tmp_path: Path) -> None:
    def everything(place: Destination) -> None:
        def act(now: float) -> Publisher:
            return Publisher(place, msgspec.structs.replace(RECIPE, keep=1), made.signer, clock=lambda: now)

        act(NOW).publish(made.releases["1.0"], PLATFORM, "testing")
        act(NOW + 1).publish(made.releases["1.1"], PLATFORM, "testing")
        act(NOW + 2).promote("testing", "stable", PLATFORM)
        act(NOW + 90_000).publish(made.releases["1.2"], PLATFORM, "testing")

    everything(Directory(tmp_path / "wanted"))
    root = tmp_path / "served/repo"
    if kind == "web":
        with servers.nginx(tmp_path / "served", tmp_path / "nginx") as address:
            everything(WebServer(f"{address}/repo", PLAIN, settle=0))
    else:
        (tmp_path / "served").mkdir()
        environ = PLAIN | {"RSYNC_RSH": str(servers.stand_in_ssh(tmp_path))}
        everything(RsyncServer(f"example.test:{root}", environ, settle=0))
    assert repository_files(root) == repository_files(tmp_path / "wanted")
    assert not (root / "apt/pool/rt-all/rt-all_1.0_amd64.deb").exists()


# Kills ------------------------------------------------------------------------------------------


class Dying:
    """A destination whose process is killed before its nth change of a file."""

    local = True

    def __init__(self, place: Destination, at: int) -> None:
        self.place, self.at, self.done = place, at, 0
        self.name = place.name

    def _change(self, call: str, argument: Mapping[str, Content] | Mapping[str, str] | list[str]) -> None:
        self.done += 1
        if self.done == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        getattr(self.place, call)(argument)

    def read(self, path: str) -> bytes | None:
        return self.place.read(path)

    def contents(self, paths: Iterable[str]) -> dict[str, bytes | None]:
        return self.place.contents(paths)

    def holds(self, names: Iterable[str]) -> bool:
        return self.place.holds(names)

    def put(self, files: Mapping[str, Content]) -> list[str]:
        for path, content in files.items():
            self._change("put", {path: content})
        return list(files)

    def copy(self, copies: Mapping[str, str]) -> None:
        for path, source in copies.items():
            self._change("copy", {path: source})

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            self._change("delete", [path])

    def locked(self) -> AbstractContextManager[Renew]:
        return self.place.locked()


def killed(call: Callable[[], object]) -> bool:
    """Do it in a process of its own; whether that was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            call()
            status = 0
        finally:
            os._exit(status)
    _, result = os.waitpid(child, 0)
    assert result in (0, signal.SIGKILL), result
    return result == signal.SIGKILL


def prepared(made: Made, root: Path, step: str) -> tuple[list[object], bool]:
    """Bring a repository to just before a step; what to do next, and whether that is a promotion."""
    place = Directory(root)
    if step != "first":
        for number, version in enumerate(("1.0", "1.1")):
            publisher(made, place, NOW + number).publish(made.releases[version], PLATFORM, "testing")
    if step == "promote":
        return ["testing", "stable", PLATFORM], True
    if step == "obsolete":
        publisher(made, place, NOW + 2).publish(made.releases["1.2"], PLATFORM, "testing")
        return [made.releases["1.3"], PLATFORM, "testing"], False
    return [made.releases["1.2"], PLATFORM, "testing"], False


@pytest.mark.parametrize("step", ["first", "next", "promote", "obsolete"])
def test_killed_anywhere_and_done_again(step: str, made: Made, tmp_path: Path) -> None:
    later = NOW + 100_000
    before, wanted = tmp_path / "before", tmp_path / "wanted"
    before.mkdir()
    arguments, promote = prepared(made, before, step)

    def act(place: Destination) -> None:
        publishing = publisher(made, place, later)
        (publishing.promote if promote else publishing.publish)(*arguments)  # type: ignore[arg-type]

    shutil.copytree(before, wanted)
    whole = Dying(Directory(wanted), 0)
    act(whole)
    expected = repository_files(wanted)
    assert whole.done > 10
    for at in range(1, whole.done + 1):
        root = tmp_path / f"{at}"
        shutil.copytree(before, root)
        assert killed(lambda at=at, root=root: act(Dying(Directory(root), at)))  # type: ignore[misc]
        act(Directory(root))
        assert repository_files(root) == expected, f"killed before change {at}"


@pytest.mark.parametrize("at", [1, 4, 12])
def test_killed_while_a_server_was_locked(at: int, made: Made, tmp_path: Path) -> None:
    """The lock names a process that is no more."""
    publisher(made, Directory(tmp_path / "wanted")).publish(made.releases["1.0"], PLATFORM, "testing")
    with servers.nginx(tmp_path / "served", tmp_path / "nginx") as address:
        place = WebServer(address, PLAIN, patience=0, settle=0)
        assert killed(
            lambda: publisher(made, Dying(place, at)).publish(made.releases["1.0"], PLATFORM, "testing")
        )
        assert (tmp_path / "served" / LOCK).exists()
        publisher(made, place).publish(made.releases["1.0"], PLATFORM, "testing")
    assert repository_files(tmp_path / "served") == repository_files(tmp_path / "wanted")


def test_what_a_killed_publication_brought_is_retired(made: Made, tmp_path: Path) -> None:
    """The one after it has another date, so other index files; those of the first go after the grace time."""
    root = tmp_path / "repo"
    prepared(made, root, "next")
    arguments = made.releases["1.2"], PLATFORM, "testing"
    counting = tmp_path / "counting"
    shutil.copytree(root, counting)
    whole = Dying(Directory(counting), 0)
    publisher(made, whole, NOW + 50).publish(*arguments)
    # before the removal of the note and the pointer
    at = whole.done - 1
    before = set(repository_files(root))
    assert killed(lambda: publisher(made, Dying(Directory(root), at), NOW + 50).publish(*arguments))
    left = set(repository_files(root)) - before - {UNFINISHED}
    assert any("repodata" in path for path in left)
    publisher(made, Directory(root), NOW + 60).publish(*arguments)
    state = read_state(Directory(root).read, made.signer.trusted)
    lost = left - in_use(state)
    assert lost
    assert lost <= state.retired.keys()
    publisher(made, Directory(root), NOW + 90_000).publish(made.releases["1.3"], PLATFORM, "testing")
    assert not lost & set(repository_files(root))
    state = read_state(Directory(root).read, made.signer.trusted)
    assert set(repository_files(root)) == in_use(state) | state.retired.keys()


def test_another_publication_after_a_kill_mends_the_first_ones_channel(made: Made, tmp_path: Path) -> None:
    root = tmp_path / "repo"
    prepared(made, root, "next")
    before = repository_files(root)
    whole = tmp_path / "whole"
    shutil.copytree(root, whole)
    counting = Dying(Directory(whole), 0)
    publisher(made, counting, NOW + 50).publish(made.releases["1.2"], PLATFORM, "testing")
    dying = Dying(Directory(root), counting.done - 1)
    assert killed(lambda: publisher(made, dying, NOW + 50).publish(made.releases["1.2"], PLATFORM, "testing"))
    changed = {path for path, content in repository_files(root).items() if before.get(path) != content}
    assert "apt/dists/testing/InRelease" in changed
    publisher(made, Directory(root), NOW + 60).promote("testing", "stable", PLATFORM)
    assert versions(root, made.signer, "stable") == versions(root, made.signer, "testing")[-1:] == ["1.1"]
    listed = (root / "apt/dists/testing/main/binary-amd64/Packages").read_text()
    assert "Version: 1.1" in listed
    assert "Version: 1.2" not in listed
    assert (root / "apt/pool/rt-all/rt-all_1.2_amd64.deb").is_file()
    state = read_state(Directory(root).read, made.signer.trusted)
    assert "apt/pool/rt-all/rt-all_1.2_amd64.deb" in state.retired
    assert set(repository_files(root)) == in_use(state) | state.retired.keys()


def test_a_half_written_file_is_cleared_away(made: Made, tmp_path: Path) -> None:
    root = tmp_path / "repo"
    prepared(made, root, "next")
    (root / ".publishing/0badcafe").write_bytes(b"half")
    (root / ".publishing/directory").mkdir()
    publisher(made, Directory(root), NOW + 50).publish(made.releases["1.2"], PLATFORM, "testing")
    assert [path.name for path in (root / ".publishing").iterdir()] == ["lock"]


def test_two_publishers_at_once(made: Made, tmp_path: Path) -> None:
    other = published.release(
        tmp_path / "other", "1.0",
        published.packages(tmp_path / "packages", "1.0", ("other-all",)), made.signer, "other"
    )  # fmt: skip
    root = tmp_path / "repo"
    work = [(made.releases["1.0"], PLATFORM), (other, "other")]
    children = []
    for directory, platform in work:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                publisher(made, Directory(root)).publish(directory, platform, "testing")
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    state = read_state(Directory(root).read, made.signer.trusted)
    assert {release.platform for release in state.releases["testing"]} == {PLATFORM, "other"}
    assert set(repository_files(root)) == in_use(state) | state.retired.keys()


# What is refused --------------------------------------------------------------------------------


def test_a_lower_version(made: Made, tmp_path: Path) -> None:
    root = tmp_path / "repo"
    prepared(made, root, "next")
    before = repository_files(root)
    with pytest.raises(UserError, match=r"testing has qemu-q35 1.1 already; 1.0 is not higher") as refused:
        publisher(made, Directory(root)).publish(made.releases["1.0"], PLATFORM, "testing")
    assert "version" in refused.value.hint
    assert repository_files(root) == before


def test_a_development_key_stays_at_home(made: Made, tmp_path: Path) -> None:
    environ = published.secret_key(tmp_path / "key", "virt-rt development key, not for release <d@localhost>")
    with published.signer(environ) as signer:
        directory = published.release(
            tmp_path / "1.0", "1.0", published.packages(tmp_path / "packages", "1.0"), signer
        )
        with servers.nginx(tmp_path / "served", tmp_path / "nginx") as address:
            away = Publisher(WebServer(address, PLAIN, settle=0), RECIPE, signer)
            with pytest.raises(UserError, match=r"development key.* directories of this machine only"):
                away.publish(directory, PLATFORM, "testing")
            with pytest.raises(UserError, match=r"directories of this machine only"):
                away.promote("testing", "stable", PLATFORM)
        assert repository_files(tmp_path / "served") == {}
        there = Publisher(Directory(tmp_path / "repo"), RECIPE, signer, clock=lambda: NOW)
        assert there.publish(directory, PLATFORM, "testing").changed
    others = made.environ | {OTHER_KEYS: str(tmp_path / "key/public.asc")}
    with published.signer(others) as signer:
        away = Publisher(WebServer("http://host.invalid", PLAIN, settle=0), RECIPE, signer)
        with pytest.raises(UserError, match=r"clients of http://host.invalid would trust it"):
            away.publish(made.releases["1.0"], PLATFORM, "testing")


@pytest.mark.parametrize("left", ["apt", "yum", "state", "key.asc"])
def test_a_repository_without_its_pointer_is_not_begun_anew(left: str, made: Made, tmp_path: Path) -> None:
    root = tmp_path / "repo"
    prepared(made, root, "next")
    for path in root.iterdir():
        if path.name not in (left, ".publishing"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = repository_files(root)
    with pytest.raises(UserError, match=r"has a repository, but repository.json is missing"):
        publisher(made, Directory(root)).publish(made.releases["1.2"], PLATFORM, "testing")
    assert repository_files(root) == before


def test_a_note_of_an_older_kill_does_not_stand_for_the_pointer(made: Made, tmp_path: Path) -> None:
    root = tmp_path / "repo"
    prepared(made, root, "next")
    dying = Dying(Directory(root), 5)
    assert killed(lambda: publisher(made, dying, NOW + 5).publish(made.releases["1.2"], PLATFORM, "testing"))
    (root / POINTER).unlink()
    with pytest.raises(UserError, match=r"repository.json is missing"):
        publisher(made, Directory(root)).publish(made.releases["1.2"], PLATFORM, "testing")


def damage_pointer(root: Path) -> None:
    envelope = json.loads((root / POINTER).read_text())
    envelope["payload"] = base64.b64encode(b"{}").decode()
    (root / POINTER).write_text(json.dumps(envelope))


def damage_json(root: Path) -> None:
    (root / POINTER).write_text("{")


def damage_deeply(root: Path) -> None:
    (root / POINTER).write_text("[" * 100_000)


def damage_signer(root: Path) -> None:
    """Somebody else, with a name that is none and does something to a terminal."""
    envelope = json.loads((root / POINTER).read_text())
    envelope["signatures"] = [{"keyid": "\x1b[2J", "sig": ""}]
    (root / POINTER).write_text(json.dumps(envelope))


def damage_state(root: Path) -> None:
    (state,) = (root / "state").iterdir()
    state.write_bytes(state.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [damage_pointer, damage_json, damage_deeply, damage_signer, damage_state])
def test_a_damaged_state(damage: Callable[[Path], None], made: Made, tmp_path: Path) -> None:
    root = tmp_path / "repo"
    publisher(made, Directory(root)).publish(made.releases["1.0"], PLATFORM, "testing")
    damage(root)
    before = repository_files(root)
    with pytest.raises(UserError, match=r"repository") as refused:
        publisher(made, Directory(root)).publish(made.releases["1.1"], PLATFORM, "testing")
    assert refused.value.message.isprintable()
    assert repository_files(root) == before


def test_another_key_needs_the_previous_one(made: Made, tmp_path: Path) -> None:
    root = tmp_path / "repo"
    prepared(made, root, "next")
    before = repository_files(root)
    environ = published.secret_key(tmp_path / "key")
    with published.signer(environ) as signer:
        release = published.release(
            tmp_path / "2.0", "2.0", published.packages(tmp_path / "packages", "2.0"), signer
        )
        with pytest.raises(UserError, match=made.signer.identity.fingerprint) as refused:
            Publisher(Directory(root), RECIPE, signer).publish(release, PLATFORM, "testing")
        assert "--previous-key" in refused.value.hint
        assert repository_files(root) == before
    former = made.directory / "key/public.asc"
    with published.signer(environ | {OTHER_KEYS: str(former)}) as signer:
        there = Publisher(Directory(root), RECIPE, signer, clock=lambda: NOW + 9)
        assert there.publish(release, PLATFORM, "testing").changed
    with published.signer(environ) as signer:
        assert versions(root, signer, "testing") == ["1.1", "2.0"]
    with pytest.raises(UserError, match=r"is signed by the key"):
        publisher(made, Directory(root)).publish(made.releases["1.2"], PLATFORM, "testing")


def note_of(*files: str) -> str:
    return json.dumps({"pointer": None, "final": "a", "channels": [], "files": files})


@pytest.mark.parametrize(
    "note",
    [
        "{", "[]", "[" * 100_000, '{"pointer": 1, "final": "a", "channels": [], "files": []}',
        # what it names is retired and deleted, so it may name files of a repository only
        note_of("../other"), note_of("apt/../../other"), note_of("index.html"), note_of("link/file"),
    ],
)  # fmt: skip
def test_a_damaged_note(note: str, made: Made, tmp_path: Path) -> None:
    root = tmp_path / "repo"
    prepared(made, root, "next")
    (root / UNFINISHED).write_text(note)
    with pytest.raises(UserError, match=r"\.unfinished\.json of .* is damaged"):
        publisher(made, Directory(root)).publish(made.releases["1.2"], PLATFORM, "testing")


def test_channels_that_are_none(made: Made, tmp_path: Path) -> None:
    place = Directory(tmp_path / "repo")
    with pytest.raises(UserError, match=r"there is no channel nightly") as refused:
        publisher(made, place).publish(made.releases["1.0"], PLATFORM, "nightly")
    assert "testing, stable" in refused.value.hint
    with pytest.raises(UserError, match=r"there is no channel nightly"):
        publisher(made, place).promote("testing", "nightly", PLATFORM)
    with pytest.raises(UserError, match=r"stable is promoted to itself"):
        publisher(made, place).promote("stable", "stable", PLATFORM)
    with pytest.raises(UserError, match=r"testing has no release of qemu-q35"):
        publisher(made, place).promote("testing", "stable", PLATFORM)
    assert repository_files(tmp_path / "repo") == {}


def test_a_release_directory_that_is_not_one(made: Made, tmp_path: Path) -> None:
    act = publisher(made, Directory(tmp_path / "repo"))
    with pytest.raises(UserError, match=r"holds no release of other"):
        act.publish(made.releases["1.0"], "other", "testing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no release of qemu-q35"):
        act.publish(tmp_path / "empty", PLATFORM, "testing")
    for kind in ("edited", "lost"):
        copy = tmp_path / kind
        shutil.copytree(made.releases["1.0"], copy)
        deb = copy / "apt/pool/rt-all/rt-all_1.0_amd64.deb"
        if kind == "edited":
            deb.write_bytes(b"else")
        else:
            deb.unlink()
        with pytest.raises(UserError, match=r"rt-all_1.0_amd64.deb is not as it was made"):
            act.publish(copy, PLATFORM, "testing")
    assert repository_files(tmp_path / "repo") == {}


class Meddled(Dying):
    """A destination where something else happens before the nth change."""

    def __init__(self, place: Directory, at: int, meddle: Callable[[], object]) -> None:
        super().__init__(place, 0)
        self.when, self.meddle = at, meddle

    def _change(self, call: str, argument: Mapping[str, Content] | Mapping[str, str] | list[str]) -> None:
        if self.done + 1 == self.when:
            self.meddle()
        super()._change(call, argument)


def test_someone_who_minds_no_lock(made: Made, tmp_path: Path) -> None:
    root = tmp_path / "repo"
    prepared(made, root, "next")
    place = Meddled(Directory(root), 2, lambda: (root / POINTER).write_text("other"))
    with pytest.raises(UserError, match=r"published to by someone else meanwhile"):
        publisher(made, place, NOW + 9).publish(made.releases["1.2"], PLATFORM, "testing")


def test_entries_are_read_back(made: Made, tmp_path: Path) -> None:
    root = tmp_path / "repo"
    prepared(made, root, "next")

    class Cached(Dying):
        def contents(self, paths: Iterable[str]) -> dict[str, bytes | None]:
            return super().contents(paths) | {"apt/dists/testing/InRelease": b"old"}

    with pytest.raises(UserError, match=r"gives another apt/dists/testing/InRelease than was just written"):
        publisher(made, Cached(Directory(root), 0), NOW + 9).publish(
            made.releases["1.2"], PLATFORM, "testing"
        )
    assert (
        publisher(made, Directory(root), NOW + 9).publish(made.releases["1.2"], PLATFORM, "testing").changed
        is False
    )
    assert not (root / UNFINISHED).exists()
