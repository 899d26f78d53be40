"""A developer's work tree: its id is exact, and nothing is written into it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.worktree import Snapshot, WorkTree, open_tree
from tests.standin import git


@pytest.fixture
def linux(tmp_path: Path) -> Path:
    """A repository with one commit."""
    root = tmp_path / "linux"
    (root / "kernel").mkdir(parents=True)
    git(root, "init", "-q", "-b", "main")
    (root / "Makefile").write_text("all:\n")
    (root / "kernel/fork.c").write_text("int fork;\n")
    (root / "kernel/exit.c").write_text("int exit;\n")
    (root / "link").symlink_to("Makefile")
    (root / ".gitignore").write_text("*.o\n")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    git(root, "tag", "first")
    return root


@pytest.fixture
def tree(linux: Path, tmp_path: Path) -> WorkTree:
    return open_tree(linux, tmp_path / "local")


def by_git(root: Path) -> str:
    """The id of what `git add --all` would make of it, in a copy."""
    copy = root.with_name("copy")
    subprocess.run(["rm", "-rf", str(copy)], check=True)
    subprocess.run(["cp", "-a", str(root), str(copy)], check=True)
    git(copy, "add", "--all")
    return git(copy, "write-tree")


def append(path: Path) -> None:
    path.write_text(path.read_text() + "edited\n")


EDITS = {
    "an edit": "echo more >>kernel/fork.c",
    "an edit that is staged": "echo more >>Makefile; git add .",
    "a staged edit that was edited again": "echo more >>Makefile; git add .; echo more >>Makefile",
    "a new file": "echo new >new.c",
    "a file with a strange name": "echo new >$'a \"b\"\n\xe4.c'",
    "a removed file": "rm kernel/exit.c",
    "the execute bit": "chmod +x Makefile",
    "another target": "ln -sfn kernel link",
    "a file that became a directory": "rm Makefile; mkdir Makefile; echo x >Makefile/inner",
    "a directory that became a file": "rm -r kernel; echo x >kernel",
    "an ignored file that git knows": "echo x >blob.o; git add --force blob.o; echo more >>blob.o",
    "a merge that stopped": "git checkout -qb other; echo a >>Makefile; git commit -qam a; git checkout -q main; "
    "echo b >>Makefile; git commit -qam b; git merge -q other || true",
}


@pytest.mark.parametrize("name", EDITS)
def test_the_id_is_that_of_what_git_would_add(name: str, linux: Path, tree: WorkTree) -> None:
    before = tree.snapshot()
    assert before.tree == git(linux, "rev-parse", "HEAD^{tree}")
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a",
    }
    subprocess.run(["bash", "-ec", EDITS[name]], cwd=linux, env=os.environ | identity, check=True)
    after = tree.snapshot()
    assert after.tree == by_git(linux) != before.tree
    git(linux, "reset", "-q", "--hard", "first")
    git(linux, "clean", "-qfd")
    assert tree.snapshot().tree == before.tree


def test_ignored_files_do_not_count(linux: Path, tree: WorkTree) -> None:
    before = tree.snapshot()
    (linux / "kernel/fork.o").write_text("object")
    (linux / ".git/info/exclude").write_text("tags\n")
    (linux / "tags").write_text("tags")
    assert tree.snapshot() == before


def test_bytes_count_and_not_what_filters_make_of_them(linux: Path, tree: WorkTree) -> None:
    """For git both are one file, as that repository is set up; the compiler sees two."""
    git(linux, "config", "core.autocrlf", "true")
    (linux / "kernel/fork.c").write_bytes(b"int fork;\r\n")
    with_returns = tree.snapshot()
    (linux / "kernel/fork.c").write_bytes(b"int fork;\n")
    assert tree.snapshot().tree != with_returns.tree


def test_an_edit_that_was_undone_is_seen_although_the_tree_is_the_same(linux: Path, tree: WorkTree) -> None:
    before = tree.snapshot()
    file = linux / "kernel/fork.c"
    times = file.stat()
    content = file.read_bytes()
    file.write_bytes(b"int kork;\n")
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = tree.snapshot()
    assert after.tree == before.tree
    assert after.signature != before.signature


def everything(root: Path) -> dict[str, tuple[int, ...]]:
    """What the file system says of all that is there, the repository included."""
    return {
        str(path): (s.st_mode, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)
        for path in root.rglob("*")
        for s in [path.lstat()]
    }


def test_nothing_is_written_into_it(linux: Path, tree: WorkTree) -> None:
    append(linux / "kernel/fork.c")
    (linux / "new.c").write_text("new\n")
    os.utime(linux / "Makefile")  # git would like to write that down in its index
    before = everything(linux)
    tree.snapshot()
    tree.snapshot()
    assert everything(linux) == before


def test_which_files_differ(linux: Path, tree: WorkTree) -> None:
    before = tree.snapshot()
    append(linux / "kernel/fork.c")
    (linux / "new.c").write_text("new\n")
    (linux / "kernel/exit.c").unlink()
    after = tree.snapshot()
    assert tree.changed(before.tree, after.tree) == ["kernel/exit.c", "kernel/fork.c", "new.c"]
    assert tree.changed(after.tree, after.tree) == []
    assert tree.changed("0" * 40, after.tree) is None


def test_a_killed_git_is_in_nobodys_way(tree: WorkTree) -> None:
    before = tree.snapshot()
    (tree.home / "git/index.lock").touch()
    assert tree.snapshot() == before


def test_two_work_trees_of_one_repository_are_two(linux: Path, tmp_path: Path, tree: WorkTree) -> None:
    git(linux, "worktree", "add", "-q", str(tmp_path / "other"))
    other = open_tree(tmp_path / "other", tmp_path / "local")
    append(other.path / "Makefile")
    assert other.home != tree.home
    assert other.snapshot().tree == by_git(other.path) != tree.snapshot().tree


# What is refused ------------------------------------------------------------------------------


def refused(call: Callable[[], Snapshot | WorkTree | None]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.hint
    assert "\n" not in f"{caught.value.message}{caught.value.hint}"
    return caught.value.message


def test_what_is_no_work_tree_is_refused(linux: Path, tmp_path: Path) -> None:
    local = tmp_path / "local"
    assert refused(lambda: open_tree(tmp_path / "nowhere", local)).startswith("there is no directory")
    (tmp_path / "plain").mkdir()
    assert "is no git work tree" in refused(lambda: open_tree(tmp_path / "plain", local))
    assert "is a part of the work tree" in refused(lambda: open_tree(linux / "kernel", local))
    git(linux, "clone", "-q", "--bare", ".", str(tmp_path / "bare"))
    assert "is no git work tree" in refused(lambda: open_tree(tmp_path / "bare", local))


def test_a_submodule_counts_for_nothing_while_it_is_empty(
    linux: Path, tree: WorkTree, tmp_path: Path
) -> None:
    git(linux, "clone", "-q", ".", str(tmp_path / "other"))
    git(linux, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(tmp_path / "other"), "roms")
    git(linux, "commit", "-qm", "submodule")
    assert "has the submodule roms checked out" in refused(tree.snapshot)
    git(linux, "submodule", "deinit", "-q", "--force", "roms")
    assert tree.snapshot().paths >= {"Makefile", ".gitmodules"}


def test_a_repository_inside_is_refused(linux: Path, tree: WorkTree, tmp_path: Path) -> None:
    git(linux, "clone", "-q", ".", str(linux / "inner"))
    assert "has another repository in inner/" in refused(tree.snapshot)
    (linux / ".git/info/exclude").write_text("/inner/\n")
    assert "inner/Makefile" not in tree.snapshot().paths


@pytest.mark.parametrize("left", [".config", "include/config/auto.conf", "arch/x86/include/generated/a.h"])
def test_a_build_in_place_is_told(linux: Path, tree: WorkTree, left: str) -> None:
    tree.require_clean()
    (linux / left).parent.mkdir(parents=True, exist_ok=True)
    (linux / left).touch()
    with pytest.raises(UserError, match="was built in place") as caught:
        tree.require_clean()
    assert caught.value.hint.endswith(f"make -C {linux} mrproper")
