"""The local store: what is already known.

    $XDG_CACHE_HOME/virt-rt/
      CACHEDIR.TAG  version
      cas/sha256/ab/<digest>   read-only blobs; a directory is one deterministic tar
      ac/ab/<key>.json         action results: outputs, digests, sizes, what was asked for
      runs/<run>/              one directory per living process: its lock and its stages
      locks/<key>              held while a key is being built
      users                    locked: shared by whoever uses results, alone by `doit gc`
      git/  ccache/  history/  apt/  trees/

A result is written after its blobs, by rename, so that whoever sees it finds them. A result of
which a blob is missing or damaged is no result: never an error, always a miss. Failures are not
stored. A run's directory belongs to the process that holds the lock in it; whatever is found
without a holder was left by a crash and is removed by the next run.

Nothing that is used disappears: before a store hands out or takes in its first blob it locks
`users` together with all others, and keeps that until it is closed or its process ends. Who removes
results takes the same lock alone, so there is no blob that a run relies on and a collection does
not see.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.files import digest_file, file_lock, random_word, remove_tree, write_atomically

if TYPE_CHECKING:
    from filelock import FileLock

VERSION = "1"


@dataclass(frozen=True, slots=True)
class Blob:
    """Content by digest: sha256 (hex) and size in bytes."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Result:
    """What an action made.

    outputs  blob and kind (`file` or `directory`) by output name
    contents what each output that is a directory holds, see `pipeline.files.tree_digests`
    files    blobs of the small inputs by path, so that a later run can show what changed in them
    spec     what was asked for, as the key was computed from it
    log      the step's log
    seconds  wall time the step took
    lines    lines of its log, from which progress of the next run is estimated
    tainted  made incrementally: good for a developer's machine, never for a release
    """

    outputs: dict[str, tuple[Blob, str]]
    spec: dict[str, Any]
    files: dict[str, Blob] = field(default_factory=dict)
    contents: dict[str, dict[str, str]] = field(default_factory=dict)
    executable: frozenset[str] = frozenset()
    log: Blob | None = None
    seconds: float = 0.0
    lines: int = 0
    tainted: bool = False

    def to_json(self) -> dict[str, Any]:
        """The stored form, in the shape of a REAPI ActionResult."""

        def digest(blob: Blob) -> dict[str, Any]:
            return {"hash": blob.digest, "sizeBytes": blob.size}

        return {
            "outputFiles": [
                {"path": name, "digest": digest(blob), "isExecutable": name in self.executable}
                for name, (blob, kind) in sorted(self.outputs.items())
                if kind == "file"
            ],
            "outputDirectories": [
                {"path": name, "tarDigest": digest(blob), "files": self.contents.get(name, {})}
                for name, (blob, kind) in sorted(self.outputs.items())
                if kind == "directory"
            ],
            "exitCode": 0,
            "stdoutDigest": digest(self.log) if self.log else None,
            "spec": self.spec,
            "inputFiles": [
                {"path": path, "digest": digest(blob)} for path, blob in sorted(self.files.items())
            ],
            "seconds": round(self.seconds, 3),
            "lines": self.lines,
            "tainted": self.tainted,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """Read the stored form; KeyError, TypeError or ValueError when it is not one."""

        def blob(digest: dict[str, Any]) -> Blob:
            if len(digest["hash"]) != 64:
                raise ValueError(digest["hash"])
            return Blob(digest["hash"], int(digest["sizeBytes"]))

        outputs = {entry["path"]: (blob(entry["digest"]), "file") for entry in data["outputFiles"]}
        outputs |= {
            entry["path"]: (blob(entry["tarDigest"]), "directory") for entry in data["outputDirectories"]
        }
        return cls(
            outputs=outputs,
            spec=dict(data["spec"]),
            files={entry["path"]: blob(entry["digest"]) for entry in data["inputFiles"]},
            contents={e["path"]: dict(e.get("files", {})) for e in data["outputDirectories"]},
            executable=frozenset(e["path"] for e in data["outputFiles"] if e["isExecutable"]),
            log=blob(data["stdoutDigest"]) if data["stdoutDigest"] else None,
            seconds=float(data["seconds"]),
            lines=int(data["lines"]),
            tainted=bool(data["tainted"]),
        )


class Store:
    """A content-addressed store in one directory, shared by any number of processes."""

    def __init__(self, root: Path) -> None:
        """Open the store, creating it when it is not there."""
        self.root = root
        self._held: FileLock | None = None
        self._run: Path | None = None
        self._users: int | None = None
        self._guard = threading.Lock()
        version = root / "version"
        try:
            if not version.exists():
                root.mkdir(parents=True, exist_ok=True)
                tag = "Signature: 8a477f597d28d172789f06886806bc55\n# Made by virt-rt; may be deleted.\n"
                write_atomically(root / "CACHEDIR.TAG", tag.encode())
                write_atomically(version, VERSION.encode())
            found = version.read_text().strip()
        except OSError as error:
            raise UserError(
                f"the cache {root} cannot be used: {error.strerror}",
                "set XDG_CACHE_HOME to a writable directory",
            ) from None
        if found != VERSION:
            raise UserError(
                f"the cache {root} has layout {found}, this virt-rt reads {VERSION}",
                f"delete {root} or set XDG_CACHE_HOME to another directory",
            )

    @property
    def identity(self) -> str:
        """Tells this store's builder images from those of another store with the same engine."""
        return hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:16]

    # Blobs ------------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Where the blob of that digest is or would be."""
        return self.root / "cas" / "sha256" / digest[:2] / digest

    def has(self, digest: str) -> bool:
        """Whether a blob of that digest is there; its content is verified when it is used."""
        return self.path(digest).is_file()

    def intact(self, blob: Blob) -> bool:
        """Whether the blob is there with the content its name promises; a damaged one is removed."""
        path = self.path(blob.digest)
        try:
            if path.stat().st_size == blob.size and digest_file(path) == blob.digest:
                return True
        except OSError:
            return False
        path.unlink(missing_ok=True)
        return False

    def add(self, source: Path, digest: str = "") -> Blob:
        """Move a file into the store and return its blob; `source` is gone afterwards.

        Raises ValueError when `digest` is given and the content has another one.
        """
        self._use()
        found = digest_file(source)
        if digest and found != digest:
            raise ValueError(found)
        size = source.stat().st_size
        target = self.path(found)
        if not self.intact(Blob(found, size)):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.stage("blob") / found
            shutil.move(source, temporary)
            temporary.chmod(0o444)
            with temporary.open("rb") as content:
                os.fsync(content.fileno())
            temporary.replace(target)
            temporary.parent.rmdir()
        source.unlink(missing_ok=True)
        return Blob(found, size)

    def add_bytes(self, content: bytes) -> Blob:
        """Store a small content and return its blob."""
        stage = self.stage("bytes")
        source = stage / "content"
        source.write_bytes(content)
        try:
            return self.add(source)
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    # Results ----------------------------------------------------------------------------------

    def _result_path(self, key: str) -> Path:
        return self.root / "ac" / key[:2] / f"{key}.json"

    def lookup(self, key: str) -> Result | None:
        """The result of that key if all its outputs are there with the right size, else None."""
        try:
            result = Result.from_json(json.loads(self._result_path(key).read_bytes()))
            for blob, _ in result.outputs.values():
                if self.path(blob.digest).stat().st_size != blob.size:
                    return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return result

    def verified(self, key: str) -> Result | None:
        """Like `lookup`, with the content of every output hashed; damaged blobs are removed.

        This is what counts as use: it refreshes the time that `doit gc` goes by.
        """
        self._use()
        result = self.lookup(key)
        if result and all(self.intact(blob) for blob, _ in result.outputs.values()):
            with contextlib.suppress(OSError):  # a cache shared read-only is still good for hits
                os.utime(self._result_path(key))
            return result
        return None

    def commit(self, key: str, result: Result) -> None:
        """Publish a result whose blobs are all stored."""
        write_atomically(self._result_path(key), json.dumps(result.to_json()).encode())

    @contextlib.contextmanager
    def building(self, key: str) -> Iterator[None]:
        """Hold the key: one build of it at a time, over all processes that share the store."""
        path = self.root / "locks" / key
        path.parent.mkdir(exist_ok=True)
        with file_lock(path):
            yield

    # Use and collection -----------------------------------------------------------------------

    def _use(self) -> None:
        """Keep every `doit gc` away until this store is closed or the process ends."""
        with self._guard:
            if self._users is None:
                users = os.open(self.root / "users", os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(users, fcntl.LOCK_SH)
                self._users = users

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Have the store to oneself; a UserError when anyone uses it."""
        users = os.open(self.root / "users", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise UserError(f"a run is using the cache {self.root}", "try again when it has ended") from None
        finally:
            os.close(users)

    def results(self) -> Iterator[tuple[Path, str, Result | None]]:
        """Every file of a result: its path, key and content; None where there is no readable one.

        The file's modification time is the last time the result was used.
        """
        for path in self.root.glob("ac/*/*"):
            try:
                result = Result.from_json(json.loads(path.read_bytes())) if path.suffix == ".json" else None
            except (ValueError, KeyError, TypeError):
                result = None
            yield path, path.stem, result

    def blobs(self) -> Iterator[Path]:
        """Every blob; its name is its digest."""
        return self.root.glob("cas/sha256/*/*")

    def drop_free_locks(self) -> None:
        """Remove the lock files of keys that nobody is building; only when `alone`."""
        for path in self.root.glob("locks/*"):
            with contextlib.suppress(TimeoutError), file_lock(path).acquire(timeout=0):
                path.unlink(missing_ok=True)

    # Runs -------------------------------------------------------------------------------------

    @property
    def run(self) -> str:
        """This process's run: the name its stages and containers carry while it lives."""
        self._use()
        with self._guard:
            if self._run is None:
                runs = self.root / "runs"
                runs.mkdir(exist_ok=True)
                with file_lock(runs / ".starting"):  # a sweeping process must not see a run without lock
                    run = runs / f"{int(time.time())}-{random_word()}"
                    run.mkdir()
                    self._held = file_lock(run / "lock")
                    self._held.acquire()
                self._run = run
            return self._run.name

    def stage(self, purpose: str) -> Path:
        """A new empty directory of this run, on the same file system as the blobs."""
        path = self.root / "runs" / self.run / f"{purpose}-{random_word()}"
        path.mkdir()
        return path

    def close(self) -> None:
        """Drop this run's stages and its locks."""
        with self._guard:
            if self._run is not None:
                remove_tree(self._run)
                if self._held is not None:
                    self._held.release(force=True)
                self._run, self._held = None, None
            if self._users is not None:
                os.close(self._users)
                self._users = None

    def sweep(self) -> list[str]:
        """Remove what dead runs left behind and return their names, whose containers may still be up."""
        dead: list[str] = []
        runs = self.root / "runs"
        if not runs.is_dir():
            return dead
        with file_lock(runs / ".starting"):
            for run in runs.iterdir():
                if run.name.startswith(".") or (self._run is not None and run == self._run):
                    continue
                lock = file_lock(run / "lock")
                try:
                    with lock.acquire(timeout=0):
                        dead.append(run.name)
                        remove_tree(run)
                except TimeoutError:
                    continue
        return dead
