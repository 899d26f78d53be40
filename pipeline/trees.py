"""Source trees unpacked once and kept, for all steps that read them.

    $XDG_CACHE_HOME/virt-rt/trees/<digest>/tree       what the archive of that sha256 holds
    $XDG_CACHE_HOME/virt-rt/trees/<digest>/signature  what the file system said of it then

A kernel tree has 80,000 files: unpacking and removing it for every step would cost more than many a
step. Whether a kept tree is still what was unpacked is asked of the file system before and after
each use: a file cannot be written, replaced, added or removed without a change of some entry's
size, time of change or inode. A tree that differs is set aside and unpacked again.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pipeline import archive
from pipeline.files import file_lock, write_atomically
from pipeline.store import Blob, Store


def bring(store: Store, blob: Blob) -> Path:
    """The tree of a verified archive in the store, unpacked now or before."""
    home = store.root / "trees" / blob.digest
    home.parent.mkdir(exist_ok=True)
    with file_lock(store.root / "locks" / f"tree-{blob.digest}"):
        if not intact(store, blob):
            if home.exists():
                # moved, not removed: another step may be reading it
                home.rename(store.stage("tree") / "damaged")
            new = store.stage("tree") / "new"
            (new / "tree").mkdir(parents=True)
            archive.unpack(store.path(blob.digest), new / "tree")
            os.sync()  # a signature must not survive a power cut that its files did not
            new.rename(home)
            write_atomically(home / "signature", signature(home / "tree").encode())
    return home / "tree"


def intact(store: Store, blob: Blob) -> bool:
    """Whether the tree is there, and nothing in it was touched since it was unpacked."""
    home = store.root / "trees" / blob.digest
    try:
        return (home / "signature").read_text() == signature(home / "tree")
    except OSError:
        return False


def signature(tree: Path) -> str:
    """sha256 (hex) over path, mode, size, times and inode of everything in a tree; OSError if it is not there."""
    found = hashlib.sha256()
    pending = [str(tree)]
    while pending:
        directory = pending.pop()
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                status = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                fields = (
                    status.st_mode,
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_ctime_ns,
                    status.st_ino,
                )
                found.update(os.fsencode(f"{entry.path[len(str(tree)) :]}\0{fields}\n"))
    return found.hexdigest()
