"""A step's stage: its inputs laid out, and its outputs taken into the store.

    STAGE/step  in/  out/  work/

Every byte in `in/` comes from memory or from a verified blob, and is compared again after the step.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from pipeline import archive, trees
from pipeline.action import ALL, Action, Output
from pipeline.errors import InternalError, UserError
from pipeline.files import digest_file, remove_tree, tree_digests
from pipeline.store import Blob, Result, Store
from pipeline.worktree import Snapshot

#: Files a failed step left that are kept beside its log, up to this size in bytes.
EVIDENCE = 10_000_000


class Moved(UserError):
    """A work tree was edited while a step read it."""


class Stage:
    """The directory in which one step of `action` runs once.

    `results` brings the result of an upstream action, `log` is the step's log: errors name it. `snapshots` are work
    trees that stand for outputs, by name of upstream action.
    """

    def __init__(
        self,
        path: Path,
        action: Action,
        store: Store,
        results: Callable[[str], Result],
        log: Path,
        snapshots: Mapping[str, Snapshot] = MappingProxyType({}),
    ) -> None:
        """Lay out the inputs in the existing, empty directory `path`."""
        self.path, self.action = path, action
        self.script, self.inputs, self.out, self.work = (
            path / name for name in ("step", "in", "out", "work")
        )
        self._store, self._results, self._log = store, results, log
        for directory in (self.inputs, self.out, self.work):
            directory.mkdir()
        if action.script:
            self.script.write_bytes(action.script.content)
        for name, file in action.files.items():
            target = self.inputs / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.content)
            target.chmod(0o755 if file.executable else 0o644)
        #: Kept trees by the path in `inputs` at which a container sees them, and their archives.
        self.trees: dict[str, tuple[Path, Blob]] = {}
        #: Work trees, likewise.
        self.worktrees: dict[str, Snapshot] = {}
        #: What more a container sees: host path by path in it, and whether it is writable.
        self.mounts: dict[str, tuple[Path, bool]] = {}
        for name, used in action.inputs.items():
            upstream = results(used.action)
            target = self.inputs / name
            if used.action in snapshots:
                self._show(name, snapshots[used.action])
            elif used.unpack and action.builder:
                blob, _ = upstream.outputs[used.output]
                self.trees[name] = trees.bring(store, blob), blob
                target.mkdir(parents=True)  # where the tree is mounted
            elif used.output == ALL:
                for output in upstream.outputs:
                    self._lay(upstream, output, target / output)
            else:
                self._lay(upstream, used.output, target)

    def _show(self, name: str, snapshot: Snapshot) -> None:
        """Let a container see a work tree itself, but nothing of git's: a build is not to ask where it is."""
        worktree = snapshot.worktree
        used = self.action.inputs[name]
        if not (used.unpack and self.action.builder):
            raise InternalError(f"{self.action.name} takes {used.action} as a file", "a work tree is none")
        worktree.require_clean()
        self.worktrees[name] = snapshot
        (self.inputs / name).mkdir(parents=True)
        self.mounts[f"/build/in/{name}"] = (worktree.path, False)
        inner, nothing = worktree.path / ".git", self.path / "nothing"
        if inner.is_dir():
            nothing.mkdir(exist_ok=True)
        elif inner.exists():  # of a work tree beside another one
            nothing.touch()
        else:
            return
        self.mounts[f"/build/in/{name}/.git"] = (nothing, False)

    def _lay(self, upstream: Result, output: str, target: Path) -> None:
        blob, kind = upstream.outputs[output]
        source = self._store.path(blob.digest)
        if kind == "directory":
            target.mkdir(parents=True, exist_ok=True)
            archive.unpack(source, target)
            return
        # A copy, not a hard link: a step that is root could write through a link into the store.
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755 if output in upstream.executable else 0o644)

    def compare_inputs(self) -> None:
        """Refuse inputs that moved while the step ran: its key would not describe what it made."""
        for name, digest in self._input_digests().items():
            target = self.inputs / name
            if not target.is_file() or digest_file(target) != digest:
                raise self._changed(name)
        for name, (_, blob) in self.trees.items():
            if not trees.intact(self._store, blob):
                raise self._changed(name)
        for snapshot in self.worktrees.values():
            if snapshot.worktree.snapshot().signature != snapshot.signature:
                raise Moved(
                    f"{self.action.name}: {snapshot.worktree.path} changed while doit ran; the result is not kept",
                    "run doit again",
                )

    def _changed(self, name: str) -> InternalError:
        return InternalError(
            f"{self.action.name}: its input {name} changed while it ran; the result is not kept",
            "run doit again",
        )

    def _input_digests(self) -> dict[str, str]:
        """sha256 by path of every input file but those of trees, which have signatures."""
        digests = {name: file.digest for name, file in self.action.files.items()}
        for name, used in self.action.inputs.items():
            if name in self.trees or name in self.worktrees:
                continue
            outputs = self._results(used.action).outputs
            laid = {f"{name}/{o}": o for o in outputs} if used.output == ALL else {name: used.output}
            for where, output in laid.items():
                blob, kind = outputs[output]
                if kind == "file":
                    digests[where] = blob.digest
        return digests

    def collect(self) -> Result:
        """Move the declared outputs into the store; a missing or empty one is an error that names it."""
        outputs: dict[str, tuple[Blob, str]] = {}
        contents: dict[str, dict[str, str]] = {}
        executable = set()
        for output in self.action.outputs:
            made = self.out / output.name
            if output.kind == "directory":
                if not made.is_dir() or not any(made.iterdir()):
                    raise self._missing(f"directory {output.name}")
                contents[output.name] = tree_digests(made)
                packed = self.path / "packed.tar"
                archive.pack(made, packed)
                outputs[output.name] = (self._store.add(packed), "directory")
            elif output.digest and not made.exists() and self._store.has(output.digest):
                outputs[output.name] = (self._known(output), "file")
            else:
                if made.is_symlink() or not made.is_file() or not made.stat().st_size:
                    raise self._missing(output.name)
                if made.stat().st_mode & 0o100:
                    executable.add(output.name)
                outputs[output.name] = (self._take(made, output), "file")
        return Result(outputs=outputs, spec={}, contents=contents, executable=frozenset(executable))

    def _missing(self, what: str) -> InternalError:
        return InternalError(f"{self.action.name} made no {what}", f"log: {self._log}")

    def _known(self, output: Output) -> Blob:
        """The blob of an output that the store had before, so that the step left it out."""
        blob = Blob(output.digest, self._store.path(output.digest).stat().st_size)
        if not self._store.intact(blob):
            raise InternalError(
                f"{self.action.name}: {output.name} was damaged in the store", "run doit again"
            )
        return blob

    def _take(self, made: Path, output: Output) -> Blob:
        try:
            return self._store.add(made, output.digest)
        except ValueError as error:
            raise UserError(
                f"{self.action.name}: {output.name} has sha256 {error}, the lock says {output.digest}",
                "a mirror may be damaged: try again, or move the lock with `doit lock -u NAME`",
            ) from None

    def keep_evidence(self) -> Path | None:
        """Save what a failed step did make beside its log: a proof's consoles tell why it failed."""
        target = self._log.with_suffix(".failed")
        if target.exists():
            remove_tree(target)
        for output in self.action.outputs:
            made = self.out / output.name
            if made.is_file() and not made.is_symlink() and 0 < made.stat().st_size <= EVIDENCE:
                (target / output.name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(made, target / output.name)
        return target if target.exists() else None
