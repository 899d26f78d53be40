"""Kept source trees: unpacked once, and never used when anything in them was touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import archive, trees
from pipeline.store import Blob, Store


@pytest.fixture
def source(store: Store, tmp_path: Path) -> Blob:
    """An archive in the store: two files, one of them deep, and a link."""
    tree = tmp_path / "source"
    (tree / "kernel").mkdir(parents=True)
    (tree / "Makefile").write_text("all:\n")
    (tree / "kernel" / "fork.c").write_text("int fork;\n")
    (tree / "link").symlink_to("Makefile")
    archive.pack(tree, tmp_path / "source.tar")
    return store.add(tmp_path / "source.tar")


def test_a_tree_is_unpacked_once(store: Store, source: Blob) -> None:
    assert not trees.intact(store, source)
    first = trees.bring(store, source)
    inode = (first / "Makefile").stat().st_ino
    assert trees.bring(store, source) == first
    assert (first / "Makefile").stat().st_ino == inode
    assert (first / "kernel" / "fork.c").read_text() == "int fork;\n"
    assert trees.intact(store, source)


def rewrite(tree: Path) -> None:
    """The same size and times, another content: only the time of change tells."""
    file = tree / "kernel" / "fork.c"
    before = file.stat()
    file.write_text("int exec;\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(tree: Path) -> None:
    """Another file under the same name."""
    other = tree / "kernel" / "new"
    other.write_text("int fork;\n")
    other.replace(tree / "kernel" / "fork.c")


TOUCHES: list[Callable[[Path], object]] = [
    rewrite,
    swap,
    lambda tree: (tree / "kernel" / "more.c").write_text(""),
    lambda tree: (tree / "kernel" / "fork.c").unlink(),
    lambda tree: (tree / "Makefile").chmod(0o600),
    lambda tree: (tree.parent / "signature").unlink(),
    lambda tree: (tree.parent / "signature").write_text("0" * 64),
]


@pytest.mark.parametrize("touch", TOUCHES)
def test_a_tree_that_was_touched_is_unpacked_again(
    store: Store, source: Blob, touch: Callable[[Path], object]
) -> None:
    touch(trees.bring(store, source))
    assert not trees.intact(store, source)
    again = trees.bring(store, source)
    assert sorted(path.name for path in again.rglob("*")) == ["Makefile", "fork.c", "kernel", "link"]
    assert (again / "kernel" / "fork.c").read_text() == "int fork;\n"
    assert trees.intact(store, source)
