"""Files on disk: written whole or not at all, read by digest, removed for good."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import FileLock


def digest_file(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def files_below(directory: Path) -> Iterator[str]:
    """Relative path of every file and link below a directory; none when it is not there."""
    for parent, directories, names in os.walk(directory):
        links = [name for name in directories if (Path(parent) / name).is_symlink()]
        below = parent.removeprefix(f"{directory}").lstrip("/")
        yield from (f"{below}/{name}" if below else name for name in (*names, *links))


def content_of(path: Path) -> str:
    """What tells whether two files or links are equal: sha256 (hex), or `-> ` and the link's target."""
    return f"-> {path.readlink()}" if path.is_symlink() else digest_file(path)


def tree_digests(directory: Path) -> dict[str, str]:
    """`content_of` every file and link below a directory, by relative path."""
    return {name: content_of(directory / name) for name in sorted(files_below(directory))}


def random_word() -> str:
    """Eight hex digits that nobody else has, for names of temporary files."""
    return os.urandom(4).hex()


def file_lock(path: Path) -> FileLock:
    """A lock between processes, and between threads where they share it; TimeoutError when it is not had."""
    from filelock import FileLock  # its import takes a tenth of a run that has nothing to do and needs none

    return FileLock(path, thread_local=False)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new content and a crash leaves no half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{random_word()}")
    try:
        with temporary.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Delete a tree, also where a build left directories without write permission."""

    def make_writable(function: Any, name: str, _: Any) -> None:
        with contextlib.suppress(OSError):
            Path(name).parent.chmod(0o700)
            Path(name).chmod(0o700)
            function(name)

    shutil.rmtree(path, onerror=make_writable)
