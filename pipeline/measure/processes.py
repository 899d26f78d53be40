"""Programs started in sessions of their own: found again as a whole, and ended as a whole.

A keeper, a process that waits for our end, ends what is left when this program could not do so itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from . import record
from .machineinfo import parse_cpulist

#: What ends this program.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Seconds between the request to end and the order.
PATIENCE = 5.0
_TICKS = os.sysconf("SC_CLK_TCK")

#: Reads `+session` and `-session`; at the end of its input it kills what is in the sessions that are left.
_KEEPER = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
kept = set()
for line in sys.stdin:
    (kept.add if line[0] == "+" else kept.discard)(int(line[1:]))
found = bool(kept)
while found:
    found = False
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = open("/proc/%s/stat" % pid, errors="replace").read().rpartition(") ")[2].split()
            if int(fields[3]) in kept and fields[0] not in "ZX":
                os.kill(int(pid), signal.SIGKILL)
                found = True
        except (OSError, IndexError):
            pass
"""


class Status(NamedTuple):
    """Fields of /proc/PID/stat (proc(5)); times in seconds."""

    pid: int
    name: str
    state: str
    session: int
    cpu_s: float
    reaped_cpu_s: float
    priority: int
    policy: int


def parse_stat(text: str) -> Status:
    """One line of /proc/PID/stat; raises `ValueError` or `IndexError`."""
    head, _, tail = text.rpartition(") ")
    pid, _, name = head.partition(" (")
    fields = tail.split()  # from the third on
    return Status(
        pid=int(pid),
        name=name,
        state=fields[0],
        session=int(fields[3]),
        cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS,
        reaped_cpu_s=(int(fields[13]) + int(fields[14])) / _TICKS,
        priority=int(fields[37]),
        policy=int(fields[38]),
    )


def members(session: int) -> Iterator[Status]:
    """Living processes of a session."""
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
                status = parse_stat((path / "stat").read_text(errors="replace"))
                if status.session == session and status.state not in "ZX":
                    yield status


def threads(session: int) -> list[record.Thread]:
    """All threads of a session, by number, as the kernel schedules them."""
    found = []
    for process in members(session):
        tasks = Path(f"/proc/{process.pid}/task")
        with suppress(OSError):
            for task in tasks.iterdir():
                with suppress(OSError, ValueError, IndexError):
                    found.append(_thread(task))
    return sorted(found, key=lambda thread: thread.tid)


def _thread(task: Path) -> record.Thread:
    status = parse_stat((task / "stat").read_text(errors="replace"))
    for line in (task / "status").read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == "Cpus_allowed_list":
            return record.Thread(
                int(task.name), status.name, status.policy, status.priority, parse_cpulist(value)
            )
    raise ValueError(f"{task}/status has no Cpus_allowed_list")


class Keeper:
    """Ends the sessions that it was told of when this program is gone, however it went."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _KEEPER],
            stdin=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def keep(self, session: int) -> None:
        """From now on that session ends with us."""
        self._tell(f"+{session}\n")

    def release(self, session: int) -> None:
        """That session has ended."""
        self._tell(f"-{session}\n")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None  # noqa: S101  (opened above)
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def close(self) -> None:
        """End it, and what it still keeps."""
        assert self._process.stdin is not None  # noqa: S101
        self._process.stdin.close()
        self._process.wait()


class Program:
    """A program in a session of its own, with its output in files; `end` leaves nothing of it."""

    def __init__(
        self, keeper: Keeper, argv: Sequence[str], cpus: Sequence[int], cwd: Path, out: Path, err: Path
    ) -> None:
        """Start it on `cpus`. Raises `OSError` when it cannot be started."""
        self._keeper = keeper
        self.argv = list(argv)

        def begin() -> None:
            os.sched_setaffinity(0, cpus)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

        # no signal between the start and the moment when the keeper knows of it
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with out.open("ab") as stdout, err.open("ab") as stderr:
                self._process: subprocess.Popen[Any] = subprocess.Popen(
                    self.argv,
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                    preexec_fn=begin,
                )
            self.session = self._process.pid  # a leader of a session gives it its number
            keeper.keep(self.session)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    @property
    def alive(self) -> bool:
        """Whether it has not ended by itself."""
        return self._process.poll() is None

    def wait(self, seconds: float) -> int | None:
        """Its exit status, minus the signal's number; None when it still runs after `seconds`."""
        try:
            return self._process.wait(timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            return None

    def cpu_s(self) -> float:
        """CPU time of all its processes so far, those that ended included."""
        return sum(each.cpu_s + each.reaped_cpu_s for each in members(self.session))

    def end(self) -> int:
        """End whatever is left of it; its exit status."""
        deadline = time.monotonic() + PATIENCE
        number = signal.SIGTERM
        while True:
            left = list(members(self.session))
            if not left and not self.alive:
                break
            if time.monotonic() > deadline:
                number = signal.SIGKILL
            for each in left:
                with suppress(OSError):
                    os.kill(each.pid, number)
            time.sleep(0.05)
        self._keeper.release(self.session)
        return self._process.wait()
