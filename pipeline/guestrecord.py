"""Guests that run from a checkout: how others find them.

Each run has a directory of its own below `$XDG_RUNTIME_DIR/virt-rt/run/` (where that is not set, below
`/tmp/virt-rt-<uid>/run/`), readable by its user alone:

  lock          held by doit and by qemu: a run whose lock can be had is over, however it ended
  run.json      the record
  key, ...      what ssh needs: the key pair, known_hosts, ssh_config
  control, gdb  qemu's sockets
  System.map    of the kernel that runs

What a run that was killed left behind is removed when the next one begins, or is looked for.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import file_lock, random_word, remove_tree, write_atomically
from pipeline.qmp import LONGEST

RECORD, LOCK = "run.json", "lock"
SSH_CONFIG, CONTROL, GDB, SYSTEM_MAP, VMLINUX = "ssh_config", "control", "gdb", "System.map", "vmlinux"


@dataclass(frozen=True, slots=True)
class Record:
    """What is told of a run.

    checkout  the checkout whose artifacts it runs
    arch      Debian's name of the guest's architecture
    release   of the guest's kernel, as `uname -r` says it
    qemu      qemu's process
    ssh_port  the port of this machine's loopback that leads to the guest's ssh
    """

    guest: str
    platform: str
    checkout: str
    arch: str
    release: str
    qemu: int
    ssh_port: int


@dataclass(frozen=True, slots=True)
class Running:
    """A run that is not over, and its directory; the directory's name tells it apart."""

    directory: Path
    record: Record

    @property
    def name(self) -> str:
        """What tells it apart from others of the same guest."""
        return self.directory.name

    def ended(self) -> bool:
        """Whether it is over by now."""
        return _over(self.directory)


def above(environ: Mapping[str, str]) -> Path:
    """Where runs have their directories; nobody else may look into it, or have made it."""
    base = environ.get("XDG_RUNTIME_DIR", "")
    # sticky, and checked below
    top = Path(base) / "virt-rt" if base else Path(f"/tmp/virt-rt-{os.getuid()}")  # noqa: S108
    directory = top / "run"
    if len(os.fsencode(directory / random_word() / CONTROL)) > LONGEST:
        raise UserError(
            f"{directory} is too long for the path of a socket", "set XDG_RUNTIME_DIR to a shorter one"
        )
    try:
        for each in (top, directory):
            each.mkdir(mode=0o700, exist_ok=True)
            status = each.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise UserError(f"{each} is not a directory of yours alone", "remove it, or chmod 700 it")
    except OSError as error:
        raise UserError(
            f"{directory} cannot be made: {error.strerror}", "set XDG_RUNTIME_DIR to a directory of yours"
        ) from None
    return directory


@contextmanager
def place(environ: Mapping[str, str]) -> Iterator[tuple[Path, int]]:
    """A directory for a run, and the descriptor that holds its lock, for qemu to inherit; removed at the end."""
    directory = above(environ)
    with file_lock(directory / ".lock"):
        _sweep(directory)
        mine = directory / random_word()
        mine.mkdir(mode=0o700)
        lock = os.open(mine / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield mine, lock
    finally:
        remove_tree(mine)
        os.close(lock)


def write(directory: Path, record: Record) -> None:
    """Tell others of a run."""
    write_atomically(directory / RECORD, (json.dumps(asdict(record), indent=1) + "\n").encode())


def running(environ: Mapping[str, str], checkout: Path, guest: str) -> list[Running]:
    """The runs of a checkout's guest that are not over, the oldest first."""
    directory = above(environ)
    with file_lock(directory / ".lock"):
        _sweep(directory)
        found = []
        for each in sorted(directory.glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime):
            record = Record(**json.loads(each.read_bytes()))
            if (record.guest, record.checkout) == (guest, str(checkout)):
                found.append(Running(each.parent, record))
    return found


def one(environ: Mapping[str, str], checkout: Path, guest: str, name: str = "") -> Running:
    """The run of a checkout's guest, by `name` where there are several; a `UserError` tells what to write."""
    found = [each for each in running(environ, checkout, guest) if name in ("", each.name)]
    if not found:
        which = f"{guest} {name}" if name else guest
        raise UserError(f"{which} does not run from this checkout", f"doit run:{guest} starts it")
    if len(found) > 1:
        known = ", ".join(f"--run {each.name} (ssh port {each.record.ssh_port})" for each in found)
        raise UserError(f"{guest} runs {len(found)} times", f"say which: {known}")
    return found[0]


def _sweep(directory: Path) -> None:
    """Remove what is left of runs that are over."""
    for each in directory.iterdir():
        if each.is_dir() and _over(each):
            remove_tree(each)


def _over(directory: Path) -> bool:
    """Whether nobody holds a run's lock."""
    try:
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
