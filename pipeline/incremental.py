"""Build directories that are kept for a work tree, so that only what changed in it is made again.

    $XDG_CACHE_HOME/virt-rt/local/<id of the work tree>/builds/<id of the build>/
      work/        the directories, as the last build left them
      state.json   of which trees that may be

A build is named by everything that its key has but the tree: another configuration, another compiler, another
directory. One step at a time uses it, over all processes.

Make goes by times, which may deceive. A changed file may be no newer than what was made of it: it was restored with
its old date, came from another machine, or was edited while it was compiled. The step is then shown a copy with the
date of now. And a step may be killed while it writes: all that such a run wrote is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import msgspec

from pipeline.files import file_lock, remove_tree, write_atomically
from pipeline.keys import Spec, canonical
from pipeline.worktree import Snapshot

#: More files than this with old dates are no edit: everything is built anew.
MOST_RENEWED = 100
#: So many builds may fail one after the other before the directory is made anew.
MOST_TREES = 30
#: Times of files come from a clock that ticks more slowly than the one we read, in ns.
_TICK = 1_000_000_000
STATE = "state.json"


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is in a build directory.

    trees   trees that its files were made from
    newest  ns since the epoch: no file of a build that ended is newer
    dirty   ns since the epoch: what is newer was written by a run whose end was not seen; 0 when there was none
    moved   paths that were touched while a step read them
    """

    trees: tuple[str, ...] = ()
    newest: int = 0
    dirty: int = 0
    moved: tuple[str, ...] = ()


def identity(spec: Spec, source: str) -> str:
    """What tells two builds apart that may not share a directory: a key without the tree of the input `source`."""
    inputs = {name: used for name, used in spec["inputs"].items() if name != source}
    return hashlib.sha256(canonical({**spec, "inputs": inputs})).hexdigest()[:32]


def unused(local: Path, since: float) -> list[Path]:
    """Builds that no step has used after `since` (seconds since the epoch), below the directory of all work trees."""
    found: list[Path] = []
    for home in local.glob("*/builds/*"):
        used: list[float] = [path.stat().st_mtime for path in (home, home / STATE) if path.exists()]
        if max(used) <= since:
            found.append(home)
    return found


class Build:
    """One build's directories, used by one step."""

    def __init__(self, snapshot: Snapshot, name: str, locks: Path, scratch: Path) -> None:
        """`name` is the build's `identity`, `scratch` a directory of the step's that is made when it is needed."""
        self._snapshot, self._scratch = snapshot, scratch
        self.home = snapshot.worktree.home / "builds" / name
        self._lock = file_lock(locks / f"build-{snapshot.worktree.home.name}-{name}")
        self._state, self._begun = _State(), 0
        #: Files to be shown in the place of those of the work tree, by path in it.
        self.renewed: dict[str, Path] = {}
        #: Paths that differ from what is in the directories; None when that is not known.
        self.changed: frozenset[str] | None = None

    @contextlib.contextmanager
    def held(
        self, check: Callable[[], None], died: Callable[[], None], note: Callable[[str], None]
    ) -> Iterator[Self]:
        """Have the directories to oneself.

        `check` raises to give up waiting; `died` is called when the last run's end was not seen, whose container may
        still be writing; `note` tells the user.
        """
        waited = False
        while True:
            try:
                self._lock.acquire(timeout=0.5)
                break
            except TimeoutError:
                check()
                if not waited:
                    note(f"waiting for another run that builds from {self._snapshot.worktree.path}")
                waited = True
        try:
            self._begin(died, note)
            yield self
        finally:
            self._lock.release()

    def directory(self, name: str) -> Path:
        """One of the directories, made when it is not there."""
        path = self.home / "work" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def succeeded(self) -> None:
        """Everything in the directories is now of this tree."""
        self._write(_State((self._snapshot.tree,), time.time_ns()))

    def failed(self, after: Snapshot) -> None:
        """Some of it is, and some may be of what the work tree was meanwhile; it is `after` now. Nothing was killed."""
        trees = dict.fromkeys((*self._state.trees, self._snapshot.tree, after.tree))
        moved = set(self._state.moved)
        if after.signature != self._snapshot.signature:
            # their time of change is nobody's to set, and tells of what was changed and changed back, too
            path = after.worktree.path
            moved |= {p for p in after.paths if os.lstat(path / p).st_ctime_ns >= self._begun - _TICK}
        self._write(_State(tuple(trees), time.time_ns(), 0, tuple(sorted(moved))))

    # Before a step ----------------------------------------------------------------------------

    def _begin(self, died: Callable[[], None], note: Callable[[str], None]) -> None:
        state = self._read() or _State()
        if state.dirty:
            died()
            self._remove_since(state.dirty)
        changed = self._changed(state)
        dated = None if changed is None else self._dated_back(changed, state.newest)
        if dated is None:
            if (self.home / "work").exists():
                note(f"building from scratch in {self.home}")
                remove_tree(self.home / "work")
            state, changed, dated = _State(), None, []
        self._state, self.changed = state, None if state.dirty else changed
        self._begun = time.time_ns()
        self._write(msgspec.structs.replace(state, dirty=self._begun))
        for number, path in enumerate(dated):
            self._scratch.mkdir(exist_ok=True)
            copy = self._scratch / f"{number}"
            shutil.copyfile(self._snapshot.worktree.path / path, copy)
            shutil.copymode(self._snapshot.worktree.path / path, copy)
            self.renewed[path] = copy

    def _changed(self, state: _State) -> frozenset[str] | None:
        """Paths that differ from a tree that something in the directories may be made from; None when unknown."""
        if not 0 < len(state.trees) <= MOST_TREES:
            return None
        worktree = self._snapshot.worktree
        differing = [worktree.changed(tree, self._snapshot.tree) for tree in state.trees]
        if None in differing:
            return None
        return frozenset((*state.moved, *(path for paths in differing for path in paths or ())))

    def _dated_back(self, changed: frozenset[str], newest: int) -> list[str] | None:
        """Changed files of which make would not see it; None when only a new start helps."""
        worktree = self._snapshot.worktree
        found: list[str] = []
        for path in sorted(changed & self._snapshot.paths):
            status = os.lstat(worktree.path / path)
            if status.st_mtime_ns > newest:
                continue
            if (worktree.path / path).is_symlink() or len(found) == MOST_RENEWED:
                return None
            found.append(path)
        return found

    def _remove_since(self, moment: int) -> None:
        """Remove every file that was written at or after a moment.

        What kconfig leaves below `include/config` stays: make takes a file that is not there for an option that nothing
        depends on.
        """
        for parent, _, names in os.walk(self.home / "work"):
            if parent.endswith("/include/config") or "/include/config/" in parent:
                continue
            for name in names:
                path = Path(parent, name)
                if path.lstat().st_mtime_ns >= moment - _TICK:
                    path.unlink()

    def _read(self) -> _State | None:
        try:
            return msgspec.json.decode((self.home / STATE).read_bytes(), type=_State)
        except (OSError, msgspec.DecodeError):
            return None

    def _write(self, state: _State) -> None:
        write_atomically(self.home / STATE, msgspec.json.encode(state))
