"""Sources from git and from Debian: pinned, fetched as pinned, patched, packed and mirrored."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pipeline import archive
from pipeline.errors import UserError
from pipeline.git import EPOCH, Mirror
from pipeline.healing import moved_sources
from pipeline.locking import Locker, Request
from pipeline.locks import PackagesLock, SourceLock, SourcesLock, encode_sources
from pipeline.mirror import write_mirror
from pipeline.pool import Archives, Gone
from pipeline.sourcerecipe import DebianOrigin, GitOrigin, SourceRecipe, load_recipes
from pipeline.sources import Sources, bring
from tests.local_archive import (
    CHANGELOG,
    CONTROL,
    LocalArchive,
    make_key,
    missing_tools,
    quiet_git,
    stop_agent,
)
from tests.standin import git

pytestmark = pytest.mark.skipif(bool(missing_tools()), reason=f"missing: {', '.join(missing_tools())}")

PATCH = """\
From: Somebody <somebody@localhost>
Subject: [PATCH] say more

---
--- a/main.c
+++ b/main.c
@@ -1,3 +1,3 @@
 one
-two
+TWO
 three
"""


def write_tree(directory: Path) -> None:
    """A tree with everything that could go differently on another machine."""
    directory.mkdir()
    (directory / "main.c").write_text("one\ntwo\nthree\n")
    (directory / "crlf.txt").write_bytes(b"a\r\nb\r\n")
    (directory / "version").write_text("$Format:%H$ $Id$\n")
    (directory / ".gitattributes").write_text(
        "* text=auto eol=crlf\nversion export-subst ident\nhidden export-ignore\n"
    )
    (directory / ".gitignore").write_text("ignored\n")
    (directory / "ignored").write_text("not ignored\n")
    (directory / "hidden").write_text("not hidden\n")
    (directory / "run.sh").write_text("#!/bin/sh\n")
    (directory / "run.sh").chmod(0o755)
    (directory / "link").symlink_to("main.c")
    (directory / 'odd "näme"\\').write_text("x")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A git repository with two releases and a candidate."""
    tree = tmp_path / "origin"
    write_tree(tree)
    quiet_git("init", "-q", "-b", "main", cwd=tree)
    (tree / ".git/info/attributes").write_text("* -text -ident\n")
    for tag in ("v6.12.9-rt1", "v6.12.10-rt1", "v6.12.11-rc1-rt1"):
        (tree / "release").write_text(tag)
        quiet_git("-c", "core.autocrlf=false", "add", "--force", ".", cwd=tree)
        quiet_git("commit", "-q", "-m", tag, cwd=tree)
        quiet_git("tag", tag, cwd=tree)
    return tree


@pytest.fixture
def daemon(origin: Path) -> Iterator[str]:
    """The same repository, served by git daemon on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["git", "daemon", "--export-all", "--listen=127.0.0.1", f"--port={port}", "--reuseaddr"]
    environment = os.environ | {
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"
    }  # fmt: skip
    server = subprocess.Popen([*command, f"--base-path={origin.parent}"], env=environment)
    try:
        for _ in range(100):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"git://127.0.0.1:{port}/origin/.git"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    (tmp_path / "scratch").mkdir()
    log: list[str] = []
    return Sources(tmp_path / "mirrors", tmp_path / "scratch", Archives(), log.append)


def git_recipe(url: str, ref: str = "v6.12.*-rt*") -> SourceRecipe:
    return SourceRecipe(description="test", origins=(GitOrigin(url=url, ref=ref),))


def locker(sources: Sources, tmp_path: Path) -> Locker:
    return Locker(sources, tmp_path / "apt")


def elsewhere(sources: Sources, tmp_path: Path) -> Sources:
    """Another machine: the same origins, an empty cache."""
    return dataclasses.replace(sources, mirrors=tmp_path / "elsewhere")


def unpack(packed: Path, target: Path) -> Path:
    target.mkdir()
    archive.unpack(packed, target)
    return target


def put(entry: SourceLock, sources: Sources, target: Path, patches: list[Path] | None = None) -> Path:
    bring(entry, patches or [], target, sources.mirrors, sources.scratch, sources.archives, sources.log)
    return target


@pytest.mark.parametrize("kind", ["daemon", "path", "file"])
def test_the_highest_release_is_pinned_and_brought_from_any_git_address(
    kind: str, origin: Path, daemon: str, sources: Sources, tmp_path: Path
) -> None:
    url = {"daemon": daemon, "path": str(origin), "file": origin.as_uri()}[kind]
    entry = locker(sources, tmp_path).lock_source("linux-rt", git_recipe(url))
    assert (entry.ref, entry.location, entry.origin) == ("v6.12.10-rt1", url, "git")
    assert entry.tree == quiet_git("rev-parse", "v6.12.10-rt1^{tree}", cwd=origin)
    put(entry, elsewhere(sources, tmp_path), tmp_path / "out.tar.zst")


def test_an_archive_holds_every_file_as_it_was_committed_whoever_packs_it(
    origin: Path, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = locker(sources, tmp_path).lock_source("linux-rt", git_recipe(str(origin)))
    first = put(entry, sources, tmp_path / "1.tar.zst").read_bytes()
    tree = unpack(tmp_path / "1.tar.zst", tmp_path / "unpacked")
    committed = quiet_git("ls-tree", "-r", "-z", "--name-only", entry.commit, cwd=origin).split("\0")
    unpacked = [path for path in tree.rglob("*") if path.is_symlink() or path.is_file()]
    assert sorted(name for name in committed if name) == sorted(path.name for path in unpacked)
    assert (tree / "crlf.txt").read_bytes() == b"a\r\nb\r\n"
    assert (tree / "main.c").read_bytes() == b"one\ntwo\nthree\n"
    assert (tree / "version").read_text() == "$Format:%H$ $Id$\n"
    assert (tree / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (tree / "main.c").stat().st_mtime == EPOCH
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.gitconfig").write_text("[core]\n\tautocrlf = true\n[tar]\n\tumask = 0077\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    old = os.umask(0o077)
    try:
        assert put(entry, elsewhere(sources, tmp_path), tmp_path / "2.tar.zst").read_bytes() == first
    finally:
        os.umask(old)


def test_patches_are_applied_in_order(origin: Path, sources: Sources, tmp_path: Path) -> None:
    entry = locker(sources, tmp_path).lock_source("linux-rt", git_recipe(str(origin)))
    first, second = tmp_path / "0001-a.patch", tmp_path / "0002-b.patch"
    first.write_text(PATCH)
    second.write_text(PATCH.replace("-two", "-TWO").replace("+TWO", "+2"))
    target = put(entry, sources, tmp_path / "out.tar.zst", [first, second])
    assert (unpack(target, tmp_path / "unpacked") / "main.c").read_text() == "one\n2\nthree\n"
    assert sources.log.__self__[-2:] == ["applied 0001-a.patch", "applied 0002-b.patch"]  # type: ignore[attr-defined]


def test_a_patch_that_does_not_apply_names_itself_the_file_and_the_hunk(
    origin: Path, sources: Sources, tmp_path: Path
) -> None:
    entry = locker(sources, tmp_path).lock_source("linux-rt", git_recipe(str(origin)))
    patch = tmp_path / "0001-wrong.patch"
    other = "--- a/crlf.txt\n+++ b/crlf.txt\n@@ -1,2 +1,3 @@\n a\r\n b\r\n+c\n"
    patch.write_bytes((other + PATCH.replace("-two", "-deux")).encode())
    with pytest.raises(UserError) as caught:
        put(entry, sources, tmp_path / "out.tar.zst", [patch])
    assert "0001-wrong.patch does not apply: main.c, hunk 1 (@@ -1,3 +1,3 @@)" in caught.value.message
    assert not (tmp_path / "out.tar.zst").exists()


def test_a_file_that_is_no_patch_is_refused(origin: Path, sources: Sources, tmp_path: Path) -> None:
    entry = locker(sources, tmp_path).lock_source("linux-rt", git_recipe(str(origin)))
    patch = tmp_path / "0001-empty.patch"
    patch.write_text("nothing\n")
    with pytest.raises(UserError, match=r"0001-empty\.patch does not apply"):
        put(entry, sources, tmp_path / "out.tar.zst", [patch])


@pytest.mark.parametrize("cached", [True, False])
def test_a_tampered_tree_is_refused(cached: bool, origin: Path, sources: Sources, tmp_path: Path) -> None:
    entry = locker(sources, tmp_path).lock_source("linux-rt", git_recipe(str(origin)))
    tampered = msgspec.structs.replace(entry, tree="0" * 40)
    where = sources if cached else elsewhere(sources, tmp_path)
    with pytest.raises(UserError, match=f"is tree {'0' * 40}, but it is {entry.tree}") as caught:
        put(tampered, where, tmp_path / "out.tar.zst")
    assert "doit lock -u linux-rt" in caught.value.hint


def test_a_commit_that_no_origin_has_is_refused_with_the_remedy(
    origin: Path, sources: Sources, tmp_path: Path
) -> None:
    entry = locker(sources, tmp_path).lock_source("linux-rt", git_recipe(str(origin)))
    tampered = msgspec.structs.replace(entry, commit="1" * 40)
    with pytest.raises(UserError, match="cannot be fetched") as caught:
        put(tampered, sources, tmp_path / "out.tar.zst")
    assert "doit lock -u linux-rt" in caught.value.hint


def test_a_lock_without_a_moved_tag_still_brings_the_old_commit(
    origin: Path, sources: Sources, tmp_path: Path
) -> None:
    entry = locker(sources, tmp_path).lock_source("linux-rt", git_recipe(str(origin)))
    quiet_git("tag", "-f", entry.ref, "v6.12.9-rt1", cwd=origin)
    put(entry, elsewhere(sources, tmp_path), tmp_path / "out.tar.zst")


def test_where_no_origin_answers_the_entry_stays_open_and_says_so(sources: Sources, tmp_path: Path) -> None:
    recipe = SourceRecipe(
        description="test",
        origins=(
            GitOrigin(url=str(tmp_path / "none"), ref="v*"),
            GitOrigin(url="git://127.0.0.1:1/none", ref="v*"),
        ),
    )
    entry = locker(sources, tmp_path).lock_source("rt-tests", recipe)
    assert entry.is_open
    assert str(tmp_path / "none") in entry.reason
    assert "127.0.0.1" in entry.reason
    log = sources.log.__self__  # type: ignore[attr-defined]
    assert len(log) == 3
    assert "stays open" in log[-1]


def test_the_next_origin_is_taken_when_the_first_does_not_answer(
    origin: Path, sources: Sources, tmp_path: Path
) -> None:
    silent = GitOrigin(url="git://127.0.0.1:1/none", ref="v*")
    unmatched = GitOrigin(url=str(origin), ref="release/*")
    recipe = SourceRecipe(
        description="test", origins=(silent, unmatched, GitOrigin(url=str(origin), ref="main"))
    )
    entry = locker(sources, tmp_path).lock_source("linux-rt", recipe)
    assert (entry.ref, entry.location) == ("main", str(origin))


def test_locking_one_name_leaves_the_others_as_they_are(
    origin: Path, sources: Sources, tmp_path: Path
) -> None:
    recipes = {"a": git_recipe(str(origin), "v6.12.9-rt1"), "b": git_recipe(str(origin), "v6.12.9-rt1")}
    lock, _ = locker(sources, tmp_path).lock_all(recipes, [], SourcesLock(), PackagesLock())
    recipes = {name: git_recipe(str(origin)) for name in recipes}
    moved, _ = locker(sources, tmp_path).lock_all(recipes, [], lock, PackagesLock(), "b")
    before, after = encode_sources(lock).splitlines(), encode_sources(moved).splitlines()
    assert before[1] == after[1]
    assert before[2] != after[2]
    with pytest.raises(UserError, match="neither a source nor a package set c") as caught:
        locker(sources, tmp_path).lock_all(recipes, [], lock, PackagesLock(), "c")
    assert "a, b" in caught.value.hint


def test_an_import_that_was_killed_is_not_taken_for_whole(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree")
    mirror = Mirror(tmp_path / "m.git")
    mirror.import_directory(tmp_path / "tree")
    half = mirror._git("rev-parse", "refs/incoming").strip()
    assert not mirror.has(half)
    left = mirror.path / "objects/pack/tmp_pack_x"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    mirror.sweep()
    assert not left.exists()


def test_an_imported_directory_is_the_tree_git_would_make_of_it(origin: Path, tmp_path: Path) -> None:
    write_tree(tmp_path / "tree")
    (tmp_path / "tree/release").write_text("v6.12.9-rt1")
    (tmp_path / "tree/main.c").chmod(0o600)
    (tmp_path / "tree/empty").mkdir()
    tree = Mirror(tmp_path / "m.git").import_directory(tmp_path / "tree")
    assert tree == quiet_git("rev-parse", "v6.12.9-rt1^{tree}", cwd=origin)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    home = tmp_path_factory.mktemp("keys") / "home"
    yield home, make_key(home)
    stop_agent(home)


@pytest.fixture
def debian(tmp_path: Path, key: tuple[Path, Path]) -> LocalArchive:
    """An archive with the source package `tree`, which has a patch and an RT queue."""
    archive = LocalArchive(tmp_path / "archive", *key)
    publish_tree(archive, tmp_path, "1-1")
    return archive


def publish_tree(archive: LocalArchive, tmp_path: Path, version: str) -> list[Path]:
    tree = tmp_path / f"tree-{version}"
    write_tree(tree)
    for name in ("patches", "patches-rt", "source"):
        (tree / "debian" / name).mkdir(parents=True)
    (tree / "debian/source/format").write_text("3.0 (quilt)\n")
    (tree / "debian/control").write_text(CONTROL)
    (tree / "debian/changelog").write_text(CHANGELOG.replace("1-1", version))
    (tree / "debian/patches/series").write_text("a.patch\n")
    (tree / "debian/patches/a.patch").write_text(PATCH)
    (tree / "debian/patches-rt/series").write_text("# the queue\nb.patch\n\n")
    (tree / "debian/patches-rt/b.patch").write_text(PATCH.replace("-two", "-TWO").replace("+TWO", "+RT"))
    made = archive.source("tree", version, tree)
    archive.publish()
    return made


def debian_recipe(series: str, version: str = "") -> SourceRecipe:
    fields = {"kind": "debian", "package": "tree", "suite": "test", "series": series, "version": version}
    origin = msgspec.convert(fields, DebianOrigin)
    return SourceRecipe(description="test", origins=(origin,))


@pytest.mark.parametrize(("series", "text"), [("plain", "one\nTWO\nthree\n"), ("rt", "one\nRT\nthree\n")])
def test_a_debian_source_becomes_the_same_tree_everywhere(
    series: str, text: str, debian: LocalArchive, sources: Sources, tmp_path: Path
) -> None:
    here = dataclasses.replace(sources, archives=debian.archives)
    entry = locker(here, tmp_path).lock_source("linux-rt", debian_recipe(series))
    assert (entry.origin, entry.location, entry.ref, entry.series) == ("debian", "test", "1-1", series)
    old = os.umask(0o077)
    try:
        target = put(entry, elsewhere(here, tmp_path), tmp_path / "out.tar.zst")
    finally:
        os.umask(old)
    tree = unpack(target, tmp_path / "unpacked")
    assert (tree / "main.c").read_text() == text
    assert (tree / "ignored").exists()
    assert not (tree / "debian").exists()
    assert not (tree / ".pc").exists()
    assert list(sources.scratch.iterdir()) == []


def test_locking_again_imports_nothing_that_is_there(
    debian: LocalArchive, sources: Sources, tmp_path: Path
) -> None:
    here = dataclasses.replace(sources, archives=debian.archives)
    recipe = debian_recipe("plain")
    entry = locker(here, tmp_path).lock_source("linux-rt", recipe)
    log = sources.log.__self__  # type: ignore[attr-defined]
    log.clear()
    assert locker(here, tmp_path).lock_source("linux-rt", recipe, entry) == entry
    assert not any("importing" in line for line in log)
    tampered = msgspec.structs.replace(entry, tree="0" * 40)
    assert locker(here, tmp_path).lock_source("linux-rt", recipe, tampered) == entry


def test_a_tampered_debian_source_is_refused(debian: LocalArchive, sources: Sources, tmp_path: Path) -> None:
    here = dataclasses.replace(sources, archives=debian.archives)
    entry = locker(here, tmp_path).lock_source("linux-rt", debian_recipe("plain"))
    path = next(debian.root.glob("pool/main/t/tree/*.orig.tar.gz"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is not what linux-rt locks"):
        put(entry, elsewhere(here, tmp_path), tmp_path / "out.tar.zst")


def test_a_debian_source_that_left_stops_the_build_and_is_moved_by_make(
    debian: LocalArchive, sources: Sources, tmp_path: Path
) -> None:
    here = dataclasses.replace(sources, archives=debian.archives)
    recipes = {"linux-rt": debian_recipe("plain")}
    lock = SourcesLock(sources=(locker(here, tmp_path).lock_source("linux-rt", recipes["linux-rt"]),))
    for path in debian.root.glob("pool/main/t/tree/*"):
        path.unlink()
    publish_tree(debian, tmp_path, "2-1")
    assert moved_sources(lock, recipes, locker(here, tmp_path)) == (lock, [])
    there = elsewhere(here, tmp_path)
    with pytest.raises(Gone) as caught:
        put(lock.sources[0], there, tmp_path / "out.tar.zst")
    assert caught.value.hint == "run: doit lock -u linux-rt"
    moved, changes = moved_sources(lock, recipes, locker(there, tmp_path))
    assert [str(change) for change in changes] == ["linux-rt: tree 1-1 -> 2-1 (left the archive)"]
    put(moved.sources[0], there, tmp_path / "out.tar.zst")


def test_a_mirror_serves_a_machine_without_network(
    debian: LocalArchive, origin: Path, sources: Sources, tmp_path: Path
) -> None:
    here = dataclasses.replace(sources, archives=debian.archives)
    debian.package("base", essential=True)
    debian.publish()
    recipes = {"linux-rt": debian_recipe("rt"), "rt-tests": git_recipe(str(origin))}
    request = Request("builder/x", "amd64", "test", ("base",))
    lock, packages = locker(here, tmp_path).lock_all(recipes, [request], SourcesLock(), PackagesLock())
    write_mirror(tmp_path / "mirror", lock, packages, here)
    debian.base.rename(tmp_path / "away")
    origin.rename(tmp_path / "away/origin")
    archives = Archives.from_environment({"VIRT_RT_MIRROR": str(tmp_path / "mirror")})
    there = dataclasses.replace(elsewhere(here, tmp_path), archives=archives)
    for entry in lock.sources:
        put(entry, there, tmp_path / f"{entry.name}.tar.zst")
    assert (tmp_path / "mirror/debian" / packages.sets[0].packages[0].path).is_file()
    assert (tmp_path / "mirror/sources.lock").read_bytes() == encode_sources(lock)
    for entry in lock.sources:
        refs = git(tmp_path / f"mirror/git/{entry.name}.git", "for-each-ref", "--format=%(objectname)")
        assert refs == entry.commit, "an object without a ref is lost at the next git gc"
    write_mirror(tmp_path / "mirror", lock, packages, there)


def test_the_recipe_that_ships_is_valid() -> None:
    recipes = load_recipes(Path("recipes/sources.toml"))
    assert list(recipes) == ["linux-rt", "qemu-kvm-rt", "rt-tests"]
    assert isinstance(recipes["linux-rt"].origins[0], GitOrigin)


ORIGIN = 'description = "x"\n[[a.origins]]\nkind = "git"\nurl = "u"\nref = "v1"\n'


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("# nothing\n[a]\n", 2, "missing required field"),
        ('[a]\ndescription = "x"\norigins = []\n', 3, "length >= 1"),
        ('[a]\ndescription = "x"\n[[a.origins]]\nkind = "svn"\n', 4, "svn"),
        (
            f'[b]\n{ORIGIN.replace("[a", "[b")}[a]\n{ORIGIN}[[a.origins]]\nkind = "git"\nurl = "--x"\n',
            15,
            "url",
        ),
        (f"[a]\n{ORIGIN}depth = 1\n", 7, "unknown field `depth`"),
        (f"[a]\ncolour = 1\n{ORIGIN}", 2, "unknown field `colour`"),
        ("[A]\n" + ORIGIN.replace("[a", "[A"), 1, "A"),
        ("x = 1\n", 1, "object"),
    ],
)
def test_a_wrong_recipe_is_refused(text: str, line: int, said: str, tmp_path: Path) -> None:
    path = tmp_path / "sources.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"sources\.toml:{line}: ") as caught:
        load_recipes(path)
    assert said in caught.value.message


def test_a_recipe_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sources.toml").write_text("[a\n")
    with pytest.raises(UserError, match="not TOML"):
        load_recipes(tmp_path / "sources.toml")
    with pytest.raises(UserError, match="cannot read"):
        load_recipes(tmp_path / "none.toml")


def test_reading_the_locks_imports_nothing_heavy() -> None:
    code = (
        "import sys, pipeline.locks; print(sorted({'requests', 'zstandard', 'filelock'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
