"""Products laid out for people, below `artifacts/`, each directory with a manifest.

`manifest.json` holds the key, what was asked for, and for every file its size, time and sha256. A
product is current when the manifest has the graph's key and every file still has the recorded size
and time (the digests are compared by `doit verify-artifacts`). A whole directory is replaced at
once; files that a person edited are set aside first, never overwritten.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import archive
from pipeline.action import Action
from pipeline.errors import InternalError
from pipeline.files import content_of, file_lock, files_below, remove_tree
from pipeline.store import Result, Store

MANIFEST = "manifest.json"
#: Inside `artifacts/`: what was edited by hand and set aside, and locks; neither is a product.
EDITED, LOCKS = ".edited", ".locks"


@dataclass(frozen=True, slots=True)
class Difference:
    """A file of a product that is not what the manifest says; `reason` is one or two words."""

    path: Path
    reason: str


class Artifacts:
    """The directory of products of one checkout."""

    def __init__(self, root: Path) -> None:
        """`root` is `artifacts/` of the checkout; it is made when the first product is."""
        self.root = root

    def directory(self, action: Action) -> Path:
        """Where a product is."""
        if action.place is None:
            raise InternalError(f"{action.name} is not a product", "give it a place")
        return self.root / action.place

    def manifest(self, action: Action) -> dict[str, Any] | None:
        """The manifest of a product, or None when there is none that can be read."""
        try:
            data = json.loads((self.directory(action) / MANIFEST).read_bytes())
            return data if isinstance(data, dict) and isinstance(data["files"], dict) else None
        except (OSError, ValueError, KeyError):
            return None

    def current(self, action: Action, key: str) -> bool:
        """Whether the product of that key is in place, by sizes and times."""
        manifest = self.manifest(action)
        return bool(manifest and manifest.get("key") == key and not self._moved(action, manifest))

    def _moved(self, action: Action, manifest: dict[str, Any]) -> list[Difference]:
        """Files that are missing or whose size or time is not the recorded one."""
        directory = self.directory(action)
        found = []
        for name, record in manifest["files"].items():
            try:
                status = os.lstat(directory / name)
            except OSError:
                found.append(Difference(directory / name, "missing"))
                continue
            if [status.st_size, status.st_mtime_ns] != [record["size"], record["mtime"]]:
                found.append(Difference(directory / name, "edited"))
        return found

    def verify(self, action: Action) -> list[Difference]:
        """Files whose content is not what the step made, by digest; also what does not belong there."""
        directory, manifest = self.directory(action), self.manifest(action)
        if manifest is None:
            return [Difference(directory / MANIFEST, "missing")]
        found = []
        for name, record in manifest["files"].items():
            path = directory / name
            if not os.path.lexists(path):
                found.append(Difference(path, "missing"))
            elif content_of(path) != record["sha256"]:
                found.append(Difference(path, "edited"))
        return found + self._added(action, manifest)

    def _added(self, action: Action, manifest: dict[str, Any]) -> list[Difference]:
        """Files that no step has made."""
        directory, known = self.directory(action), {MANIFEST, *manifest["files"]}
        return [
            Difference(directory / name, "not a product")
            for name in sorted(files_below(directory))
            if name not in known
        ]

    def place(self, action: Action, key: str, result: Result, store: Store) -> list[Path]:
        """Lay out a product and its manifest; return the files that were set aside."""
        directory = self.directory(action)
        with self._locked(action):
            if self.current(action, key):
                return []
            new = directory.with_name(f".{directory.name}.new")
            old = directory.with_name(f".{directory.name}.old")
            for leftover in (new, old):
                if leftover.exists():
                    remove_tree(leftover)
            new.mkdir(parents=True)
            # The manifest says what the step made: blobs are verified, their copies are not hashed again.
            contents: dict[str, str] = {}
            for name, (blob, kind) in result.outputs.items():
                target = new / name
                if kind == "directory":
                    target.mkdir(parents=True)
                    contents |= {f"{name}/{path}": c for path, c in result.contents.get(name, {}).items()}
                    archive.unpack(store.path(blob.digest), target)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    contents[name] = blob.digest
                    shutil.copyfile(store.path(blob.digest), target)
                    target.chmod(0o755 if name in result.executable else 0o644)
            manifest = {
                "action": action.name,
                "key": key,
                "spec": result.spec,
                "tainted": result.tainted,
                "seconds": round(result.seconds, 3),
                "outputs": {name: blob.digest for name, (blob, _) in sorted(result.outputs.items())},
                "files": {
                    name: _record(new / name, contents.get(name, "")) for name in sorted(files_below(new))
                },
            }
            # Published by the rename of its directory. On one line: indenting takes as long as a small copy.
            (new / MANIFEST).write_text(json.dumps(manifest))
            aside = self._set_aside(action)
            if directory.exists():
                directory.rename(old)
            new.rename(directory)
            if old.exists():
                remove_tree(old)
            return aside

    def _set_aside(self, action: Action) -> list[Path]:
        """Move what a person changed or added to `artifacts/.edited/<time>/`."""
        directory, manifest = self.directory(action), self.manifest(action)
        if manifest is None:
            # nothing tells what of this was ours: all of it is kept
            touched = [directory / name for name in sorted(files_below(directory))]
        else:
            # what has its size and its time is read by nobody here: a kernel's headers are thousands of files
            moved = [d.path for d in self._moved(action, manifest) if d.reason != "missing"]
            sums = {directory / name: record["sha256"] for name, record in manifest["files"].items()}
            touched = [path for path in moved if content_of(path) != sums[path]]
            touched += [d.path for d in self._added(action, manifest)]
        shelf = self.root / EDITED / time.strftime("%Y%m%dT%H%M%S")
        kept = []
        for path in touched:
            target = shelf / path.relative_to(self.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
            kept.append(target)
        return kept

    @contextlib.contextmanager
    def _locked(self, action: Action) -> Iterator[None]:
        locks = self.root / LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        with file_lock(locks / action.name.replace("/", "_")):
            yield


def _record(path: Path, content: str) -> dict[str, Any]:
    status = path.lstat()
    return {"size": status.st_size, "mtime": status.st_mtime_ns, "sha256": content or content_of(path)}
