"""What a place that takes a repository can do, whatever it is reached by; and the lock of one without locks.

A path is relative to the repository's root, its parts joined by `/`. Files appear whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import InternalError, UserError
from pipeline.files import random_word

Content = Path | bytes
"""A file's content, on this machine or in memory."""
Renew = Callable[[], None]
"""Makes sure that the lock is still ours; UserError when it is not."""

#: Neither an empty part nor `.` nor `..`, and nothing that a shell, a URL or rsync's filters give a meaning to.
_PATH = re.compile(r"(?!(?:.*/)?\.{1,2}(?:/|\Z))[A-Za-z0-9._+~^=@-]+(?:/[A-Za-z0-9._+~^=@-]+)*")

LOCK = ".publishing.json"
#: Seconds for which a lock on a server counts without being renewed. Longer than the largest file takes.
LEASE = 3600.0
#: Seconds after which what two publishers wrote at the same moment has settled to what one of them wrote.
SETTLE = 1.0
#: Seconds to wait for another publisher, and between two looks.
PATIENCE, INTERVAL = 60.0, 2.0


class Destination(Protocol):
    """Where a repository is published. Every method raises UserError when the place cannot be reached."""

    name: str
    """For people; without any password."""
    local: bool
    """Whether it is a directory of this machine."""

    def read(self, path: str) -> bytes | None:
        """The content of a file, or None when there is none."""

    def contents(self, paths: Iterable[str]) -> dict[str, bytes | None]:
        """`read` several files."""

    def holds(self, names: Iterable[str]) -> bool:
        """Whether the root has a file or a directory of one of these names."""

    def put(self, files: Mapping[str, Content]) -> list[str]:
        """Write what is not there with the same content, in any order; return the paths that were written."""

    def copy(self, copies: Mapping[str, str]) -> None:
        """Bring files (keys) that have the content of others that are there (values)."""

    def delete(self, paths: Iterable[str]) -> None:
        """Remove files; those that are not there count as removed."""

    def locked(self) -> AbstractContextManager[Renew]:
        """Keep other publishers out; UserError when one does not leave."""


def checked(path: str) -> str:
    """The path, which must be a plain one below the root."""
    if not _PATH.fullmatch(path):
        raise InternalError(f"{path!r} is no path of a repository")
    return path


def busy(name: str, holder: str) -> UserError:
    """The refusal when another publisher is at work."""
    return UserError(f"{holder} is publishing to {name}", "try again when it is done")


@contextmanager
def leased(
    place: Destination, patience: float = PATIENCE, settle: float = SETTLE, system_lock: bool = False
) -> Iterator[Renew]:
    """Lock a place by a file that names its owner and when its claim ends.

    The owner's claim is void when its process has ended on this machine, or its time is over. Who writes looks
    again after `settle` seconds: of two who wrote at once, one finds the other's name. Waits for `patience`
    seconds; UserError when the owner is still at work then. With `system_lock` the caller holds a lock of the
    system's, too, so that whoever claimed the place with one has ended.
    """
    own = {"token": random_word() + random_word(), "system_lock": system_lock, **_process()}
    deadline = time.monotonic() + patience

    def claim() -> None:
        place.put({LOCK: json.dumps(own | {"until": int(time.time() + LEASE)}).encode()})

    def owner() -> dict[str, Any]:
        return _parsed(place.read(LOCK))

    while True:
        held = owner()
        if not _at_work(held) or (system_lock and held.get("system_lock") is True):
            claim()
            time.sleep(settle)
            held = owner()
            if held.get("token") == own["token"]:
                break
        if time.monotonic() >= deadline:
            raise _refused(place, held)
        time.sleep(min(INTERVAL, max(deadline - time.monotonic(), 0.01)))

    def renew() -> None:
        held = owner()
        if held.get("token") != own["token"]:
            raise UserError(
                f"the lock on {place.name} was lost to {_who(held)}",
                "nothing more was written; publish again when it is done",
            )
        if float(held.get("until", 0)) - time.time() < LEASE / 2:
            claim()

    try:
        yield renew
    finally:
        with suppress(UserError):  # else it ends by its time
            if owner().get("token") == own["token"]:
                place.delete([LOCK])


def _parsed(raw: bytes | None) -> dict[str, Any]:
    """A lock's content; a file that is no lock of ours counts as none, as nobody could ever renew it."""
    try:
        data = json.loads(raw or b"{}")
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _process() -> dict[str, Any]:
    """What tells this process from all others, also from those of containers that share this host's name."""
    namespace = Path("/proc/self/ns/pid").readlink()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {
        "host": os.uname().nodename,
        "machine": f"{boot} {namespace}",
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(pid: int) -> str:
    """When a process began, in ticks since boot; empty when there is none of that id."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _at_work(held: Mapping[str, Any]) -> bool:
    """Whether a lock counts."""
    now, until = time.time(), held.get("until")
    # nobody claims a place for a day, be their clock wrong by hours
    if not isinstance(until, int | float) or not now <= until <= now + 24 * LEASE:
        return False
    if held.get("machine") != _process()["machine"]:
        return True
    return isinstance(held.get("pid"), int) and _started(held["pid"]) == held.get("started")


def _who(held: Mapping[str, Any]) -> str:
    return f"process {held.get('pid')} of {held.get('host')}" if held else "nobody"


def _refused(place: Destination, held: Mapping[str, Any]) -> UserError:
    until = time.strftime("%H:%M", time.localtime(float(held.get("until", 0))))
    return UserError(
        f"{_who(held)} is publishing to {place.name}",
        f"try again when it is done; if it was killed: after {until}, or remove {LOCK} there",
    )
