"""Debian's side of the locks: what apt answers, what is fetched, and what moves when a version is gone."""

import dataclasses
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.debian import AptRoot, compare
from pipeline.errors import UserError
from pipeline.healing import moved_packages
from pipeline.locking import Locker, Request
from pipeline.locks import PackagesLock
from pipeline.pool import Archives, Gone, answers, fetch_all, fetch_file
from pipeline.sources import Sources
from tests.local_archive import CHANGELOG, CONTROL, LocalArchive, make_key, missing_tools, sha256, stop_agent

pytestmark = pytest.mark.skipif(bool(missing_tools()), reason=f"missing: {', '.join(missing_tools())}")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    home = tmp_path_factory.mktemp("keys") / "home"
    yield home, make_key(home)
    stop_agent(home)


@pytest.fixture
def archive(tmp_path: Path, key: tuple[Path, Path]) -> LocalArchive:
    made = LocalArchive(tmp_path / "archive", *key)
    made.package("base", essential=True)
    made.package("libtool", "1", depends="base")
    made.package("libtool-dev", "1", depends="libtool (= 1)")
    made.package("app", "1", depends="libtool-dev")
    made.package("other", "1")
    made.publish()
    return made


@pytest.fixture
def apt(archive: LocalArchive, tmp_path: Path) -> AptRoot:
    root = AptRoot(tmp_path / "apt", "test", "amd64", archive.archives)
    root.update()
    return root


def locker(archive: LocalArchive, tmp_path: Path) -> Locker:
    (tmp_path / "scratch").mkdir(exist_ok=True)
    sources = Sources(tmp_path / "git", tmp_path / "scratch", archive.archives, lambda line: None)
    return Locker(sources, tmp_path / "apt")


@pytest.fixture
def server(archive: LocalArchive) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=archive.base)) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


def test_a_request_brings_its_dependencies_and_the_essential_packages(
    apt: AptRoot, archive: LocalArchive
) -> None:
    packages = {package.name: package for package in apt.resolve(["app"])}
    assert sorted(packages) == ["app", "base", "libtool", "libtool-dev"]
    deb = archive.root / packages["app"].path
    assert (packages["app"].sha256, packages["app"].size) == (sha256(deb), deb.stat().st_size)


def test_an_unknown_package_is_named(apt: AptRoot) -> None:
    with pytest.raises(UserError, match="nonesuch"):
        apt.resolve(["nonesuch"])


def test_versions_are_compared_as_dpkg_does() -> None:
    assert [compare("1:1", "2"), compare("1~rc1", "1"), compare("1", "1")] == [1, -1, 0]


@pytest.mark.parametrize("index", ["main/binary-amd64/Packages", "main/source/Sources", "InRelease"])
def test_a_tampered_index_is_refused(index: str, archive: LocalArchive, tmp_path: Path) -> None:
    (tmp_path / "tree/debian/source").mkdir(parents=True)
    (tmp_path / "tree/debian/source/format").write_text("3.0 (quilt)\n")
    (tmp_path / "tree/debian/control").write_text(CONTROL)
    (tmp_path / "tree/debian/changelog").write_text(CHANGELOG)
    archive.source("tree", "1-1", tmp_path / "tree")
    archive.publish()
    path = archive.root / "dists/test" / index
    text = path.read_text()
    path.write_text(text.replace("Suite: test", "Suite: evil") if index == "InRelease" else text + "\n")
    with pytest.raises(UserError, match="apt refused the indexes of test"):
        AptRoot(tmp_path / "other", "test", "amd64", archive.archives).update()


def test_an_index_that_was_good_before_does_not_stand_in_for_a_tampered_one(
    apt: AptRoot, archive: LocalArchive
) -> None:
    (archive.root / "dists/test/InRelease").write_text("no signature")
    with pytest.raises(UserError, match="apt refused"):
        apt.update()


def test_an_archive_signed_by_another_key_is_refused(archive: LocalArchive, tmp_path: Path) -> None:
    stranger = make_key(tmp_path / "stranger")
    archives = dataclasses.replace(archive.archives, keyring=stranger)
    with pytest.raises(UserError, match="apt refused"):
        AptRoot(tmp_path / "other", "test", "amd64", archives).update()


def test_a_missing_keyring_is_said(archive: LocalArchive, tmp_path: Path) -> None:
    archives = dataclasses.replace(archive.archives, keyring=tmp_path / "none.gpg")
    with pytest.raises(UserError, match="keyring") as caught:
        AptRoot(tmp_path / "other", "test", "amd64", archives).update()
    assert "debian-archive-keyring" in caught.value.hint


def test_files_come_over_http_and_stay_when_they_are_right(apt: AptRoot, server: str, tmp_path: Path) -> None:
    packages = apt.resolve(["app"])
    archives = Archives(base=server)
    paths = fetch_all(packages, tmp_path / "debs", archives, owner="builder/x")
    assert [sha256(path) for path in paths] == [package.sha256 for package in packages]
    before = [path.stat().st_mtime_ns for path in paths]
    fetch_all(packages, tmp_path / "debs", archives, owner="builder/x")
    assert before == [path.stat().st_mtime_ns for path in paths]


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_a_file_that_left_the_archive_names_the_command_that_moves_the_lock(
    scheme: str, archive: LocalArchive, server: str, tmp_path: Path
) -> None:
    base = server if scheme == "http" else archive.base.as_uri()
    url = f"{base}/debian/pool/main/g/gone/gone_1_amd64.deb"
    assert not answers(url)
    with pytest.raises(Gone, match="gone_1_amd64") as caught:
        fetch_file(url, tmp_path / "gone.deb", "0" * 64, 10, owner="builder/kernel")
    assert caught.value.hint == "run: doit lock -u builder/kernel"
    assert list(tmp_path.glob("*gone*")) == []


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_a_file_with_other_bytes_is_refused_and_not_kept(
    scheme: str, archive: LocalArchive, server: str, tmp_path: Path
) -> None:
    base = server if scheme == "http" else archive.base.as_uri()
    deb = archive.root / "pool/main/a/app/app_1_amd64.deb"
    url = f"{base}/debian/{deb.relative_to(archive.root)}"
    with pytest.raises(UserError, match=f"expected sha256 {'0' * 64}, got {sha256(deb)}"):
        fetch_file(url, tmp_path / "app.deb", "0" * 64, deb.stat().st_size, owner="builder/kernel")
    assert list(tmp_path.glob("*app*")) == []


def test_a_server_out_of_reach_is_not_taken_for_a_file_that_left() -> None:
    with pytest.raises(UserError, match="cannot be fetched") as caught:
        answers("http://127.0.0.1:1/debian/x")
    assert not isinstance(caught.value, Gone)


def test_the_mirror_variable_wants_a_directory_or_an_address(tmp_path: Path) -> None:
    assert Archives.from_environment({}).base == "http://deb.debian.org"
    assert Archives.from_environment({"VIRT_RT_MIRROR": str(tmp_path)}).base == tmp_path.as_uri()
    with pytest.raises(UserError, match="VIRT_RT_MIRROR"):
        Archives.from_environment({"VIRT_RT_MIRROR": str(tmp_path / "none")})


def test_what_is_listed_but_not_there_is_not_locked(archive: LocalArchive, tmp_path: Path) -> None:
    newer = archive.package("libtool", "2", depends="base")
    archive.publish()
    newer.unlink()
    locked = locker(archive, tmp_path).lock_packages(Request("builder/x", "amd64", "test", ("libtool",)))
    assert {package.name: package.version for package in locked.packages} == {"base": "1", "libtool": "1"}


def test_a_set_that_cannot_be_had_names_its_recipe(archive: LocalArchive, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"builder/x: .*nonesuch"):
        locker(archive, tmp_path).lock_packages(Request("builder/x", "amd64", "test", ("nonesuch",)))


def test_a_request_that_left_the_archive_for_good_names_the_command(
    archive: LocalArchive, tmp_path: Path
) -> None:
    locked = locker(archive, tmp_path).lock_packages(Request("builder/x", "amd64", "test", ("other",)))
    (archive.root / "pool/main/o/other/other_1_amd64.deb").unlink()
    archive.publish()
    with pytest.raises(UserError, match=r"builder/x: .*other") as caught:
        moved_packages(PackagesLock(sets=(locked,)), locker(archive, tmp_path), lambda digest: False)
    assert caught.value.hint == "run: doit lock -u builder/x"


def lock_and_lose(archive: LocalArchive, tmp_path: Path, request: tuple[str, ...]) -> PackagesLock:
    """Lock a request, then let libtool 1 leave the archive, with newer versions of everything listed."""
    locked = locker(archive, tmp_path).lock_packages(Request("builder/x", "amd64", "test", request))
    (archive.root / "pool/main/l/libtool/libtool_1_amd64.deb").unlink()
    archive.package("libtool", "2", depends="base")
    archive.package("libtool-dev", "2", depends="libtool (= 2)")
    archive.package("app", "2", depends="libtool-dev")
    archive.package("other", "2")
    archive.publish()
    return PackagesLock(sets=(locked,))


def test_nothing_moves_while_everything_is_there(archive: LocalArchive, tmp_path: Path) -> None:
    locked = locker(archive, tmp_path).lock_packages(Request("builder/x", "amd64", "test", ("app",)))
    archive.package("app", "2", depends="libtool-dev")
    archive.publish()
    lock = PackagesLock(sets=(locked,))
    assert moved_packages(lock, locker(archive, tmp_path), lambda digest: False) == (lock, [])


def test_what_left_the_archive_moves_with_what_must_and_nothing_else(
    archive: LocalArchive, tmp_path: Path
) -> None:
    lock = lock_and_lose(archive, tmp_path, ("app", "other"))
    moved, changes = moved_packages(lock, locker(archive, tmp_path), lambda digest: False)
    assert [str(change) for change in changes] == [
        "builder/x: libtool 1 -> 2 (left the archive)",
        "builder/x: libtool-dev 1 -> 2 (moves along with libtool)",
    ]
    kept = {package.name: package for package in lock.sets[0].packages}
    for package in moved.sets[0].packages:
        if package.name not in ("libtool", "libtool-dev"):
            assert package == kept[package.name]


def test_what_is_no_longer_listed_but_still_there_stays(archive: LocalArchive, tmp_path: Path) -> None:
    lock = lock_and_lose(archive, tmp_path, ("app", "other"))
    old = archive.root / "pool/main/o/other/other_1_amd64.deb"
    old.rename(old.with_suffix(".kept"))
    archive.publish()
    old.with_suffix(".kept").rename(old)
    moved, changes = moved_packages(lock, locker(archive, tmp_path), lambda digest: False)
    assert [change.name for change in changes] == ["libtool", "libtool-dev"]
    assert {package.name: package.version for package in moved.sets[0].packages}["other"] == "1"


def test_what_is_in_the_store_does_not_move(archive: LocalArchive, tmp_path: Path) -> None:
    lock = lock_and_lose(archive, tmp_path, ("app",))
    assert moved_packages(lock, locker(archive, tmp_path), lambda digest: True) == (lock, [])


def test_a_package_that_came_and_one_that_went_are_said(archive: LocalArchive, tmp_path: Path) -> None:
    locked = locker(archive, tmp_path).lock_packages(Request("builder/x", "amd64", "test", ("app",)))
    for deb in archive.root.glob("pool/main/[al]/*/*.deb"):
        deb.unlink()
    archive.package("libtool2", "1")
    archive.package("app", "2", depends="libtool2")
    archive.publish()
    _, changes = moved_packages(PackagesLock(sets=(locked,)), locker(archive, tmp_path), lambda digest: False)
    assert [str(change) for change in changes] == [
        "builder/x: app 1 -> 2 (left the archive)",
        "builder/x: libtool 1 -> (none) (left the archive)",
        "builder/x: libtool-dev 1 -> (none) (left the archive)",
        "builder/x: libtool2 (none) -> 1 (needed now)",
    ]


@pytest.mark.parametrize(
    ("suite", "secured"),
    [("trixie", True), ("trixie-backports", False), ("trixie-updates", False), ("sid", False)],
)
def test_only_a_released_suite_has_a_security_archive(
    archive: LocalArchive, tmp_path: Path, suite: str, secured: bool
) -> None:
    AptRoot(tmp_path / "apt", suite, "amd64", archive.archives)
    listed = (tmp_path / "apt/etc/sources.list").read_text()
    assert f"/debian {suite} main\n" in listed
    assert (f"/debian-security {suite}-security main\n" in listed) is secured
