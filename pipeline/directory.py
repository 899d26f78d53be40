"""A repository in a directory of this machine, perhaps one that a web server serves."""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pipeline.destination import PATIENCE, Content, Renew, busy, checked, leased
from pipeline.errors import UserError
from pipeline.files import file_lock, random_word, remove_tree

#: Beside the repository, hidden from directory listings: the lock, and files that are not whole yet.
OWN = ".publishing"


class Directory:
    """Files are written beside, synced to the disk, and renamed into place."""

    local = True

    def __init__(self, root: Path, patience: float = PATIENCE) -> None:
        """`root` is made when something is written; `patience` is in seconds."""
        self.root = root
        self.name = str(root)
        self._patience = patience

    def read(self, path: str) -> bytes | None:
        """See `Destination`."""
        with self._told():
            try:
                return (self.root / checked(path)).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def contents(self, paths: Iterable[str]) -> dict[str, bytes | None]:
        """See `Destination`."""
        return {path: self.read(path) for path in paths}

    def holds(self, names: Iterable[str]) -> bool:
        """See `Destination`."""
        return any(os.path.lexists(self.root / checked(name)) for name in names)

    def put(self, files: Mapping[str, Content]) -> list[str]:
        """See `Destination`; all of it is on the disk when this returns."""
        written = [path for path, content in files.items() if not self._same(checked(path), content)]
        self._bring({path: files[path] for path in written})
        return written

    def copy(self, copies: Mapping[str, str]) -> None:
        """See `Destination`; a copy takes no room, as content never changes in place."""
        for path, source in copies.items():
            target, origin = self._below(path), self.root / checked(source)
            if not origin.is_file():
                raise UserError(f"{self.name} has lost {source}", "restore it from a copy of the repository")
            if target.exists() and target.samefile(origin):
                continue
            self._bring({path: origin}, link=True)

    def delete(self, paths: Iterable[str]) -> None:
        """See `Destination`; directories that this leaves empty go, too."""
        with self._told():
            for path in paths:
                target = self._below(path)
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    target.unlink()
                for parent in target.relative_to(self.root).parents[:-1]:
                    try:
                        (self.root / parent).rmdir()
                    except FileNotFoundError:
                        continue
                    except OSError:  # something is left in it
                        break

    @contextmanager
    def locked(self) -> Iterator[Renew]:
        """See `Destination`; the system ends the lock with its process.

        Who reaches the same directory as a server sees the claim that is made beside it, as on any server.
        """
        lock = file_lock(self._own() / "lock")
        try:
            with self._told():
                lock.acquire(timeout=self._patience)
        except TimeoutError:
            raise busy(self.name, "another process") from None
        try:
            with self._told():
                for leftover in (self.root / OWN).iterdir():
                    if leftover.name != "lock":
                        remove_tree(leftover) if leftover.is_dir() else leftover.unlink()
            with leased(self, self._patience, settle=0, system_lock=True) as renew:
                yield renew
        finally:
            lock.release()

    def _own(self) -> Path:
        """The publisher's own directory, which is cleared out: never what a link leads to."""
        own = self.root / OWN
        with self._told():
            if own.is_symlink():
                raise UserError(
                    f"{own} is a link, and no publisher made it", "remove it, then run this again"
                )
            own.mkdir(parents=True, exist_ok=True)
        return own

    def _below(self, path: str) -> Path:
        """Where a path is, for what changes it; refused where a link leads out of the repository."""
        target = self.root / checked(path)
        if not target.parent.resolve().is_relative_to(self.root.resolve()):
            raise UserError(
                f"{target} is not in {self.root}: a link leads elsewhere",
                "make it a directory; another disk can be mounted there",
            )
        return target

    def _same(self, path: str, content: Content) -> bool:
        target = self.root / path
        with self._told():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            try:
                if target.stat().st_size != size:
                    return False
            except (FileNotFoundError, NotADirectoryError):
                return False
            if isinstance(content, bytes):
                return target.read_bytes() == content
            return filecmp.cmp(target, content, shallow=False)

    def _bring(self, files: Mapping[str, Content], link: bool = False) -> None:
        touched: set[Path] = set()
        own = self._own()
        with self._told():
            for path, content in files.items():
                target = self._below(path)
                temporary = own / random_word()
                try:
                    if not (link and isinstance(content, Path) and _linked(content, temporary)):
                        _write(temporary, content)
                    touched |= _made(target.parent)
                    temporary.replace(target)
                    touched.add(target.parent)
                finally:
                    temporary.unlink(missing_ok=True)
            for directory in touched:
                _sync(directory)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what the system refuses into a line."""
        try:
            yield
        except TimeoutError:
            raise
        except OSError as error:
            where = error.filename or self.root
            raise UserError(
                f"{where}: {error.strerror or error}", f"check permissions and room of {self.root}"
            ) from error


def _write(path: Path, content: Content) -> None:
    with path.open("wb") as out:
        if isinstance(content, bytes):
            out.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, out, 1 << 20)
        out.flush()
        os.fsync(out.fileno())
    path.chmod(0o644)


def _linked(source: Path, path: Path) -> bool:
    """Make a hard link, where the file system has them."""
    try:
        path.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:
        return False
    return True


def _made(directory: Path) -> set[Path]:
    """Make a directory; return the parents of those that were made."""
    parents = {each.parent for each in (directory, *directory.parents) if not each.exists()}
    directory.mkdir(parents=True, exist_ok=True)
    return parents


def _sync(directory: Path) -> None:
    """Bring renames in a directory to the disk."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
