"""What disturbs while something is measured: programs on the housekeeping CPUs.

`stress` is stress-ng where that is installed, and else a loop of ours; a run's record has the command.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import processes, record
from .machineinfo import cpulist
from .processes import Keeper

NAMES = ("hackbench", "stress", "disk")
#: A load that lives so long, seconds, will not end for a wrong option or a missing right.
SETTLED = 0.5
#: Never reached: a load ends when it is ended.
_ENDLESS = "1000000000"
#: So many groups of hackbench at most: each has 20 processes.
_MOST_GROUPS = 4

#: A process for each CPU that counts and writes over some memory. Argument: how many.
_STRESS = """
import os, sys
for _ in range(int(sys.argv[1]) - 1):
    if not os.fork():
        break
memory, count = bytearray(16 << 20), 0
while True:
    for place in range(0, len(memory), 4096):
        memory[place] = count & 255
        count += place * place % 7
"""

#: Writes, syncs and reads back a file that has no name any more. Argument: where it is.
_DISK = """
import os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
os.unlink(sys.argv[1])
block = os.urandom(1 << 20)
while True:
    for place in range(32):
        os.pwrite(file, block, place << 20)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    for place in range(32):
        if os.pread(file, 1 << 20, place << 20) != block:
            sys.exit("the disk gave back other bytes than were written")
"""


def missing(names: Sequence[str]) -> str:
    """Which load cannot run here, and what it takes; empty when all can."""
    if "hackbench" in names and shutil.which("hackbench") is None:
        return "the load hackbench is not installed: install rt-tests"
    return ""


def command(name: str, cpus: Sequence[int]) -> list[str]:
    """The command of a load on so many CPUs; it may write into the directory in which it is started.

    Its processes take all that nobody else wants, and no more: forty of them would leave a fortieth of a CPU to what
    measures, and to whoever looks after it.
    """
    return ["nice", "-n", "19", *_command(name, cpus)]


def _command(name: str, cpus: Sequence[int]) -> list[str]:
    own = [sys.executable, "-I", "-S", "-c"]
    if name == "hackbench":
        groups = min(2 * len(cpus), _MOST_GROUPS)
        return ["hackbench", "-P", "-g", str(groups), "-f", "10", "-s", "100", "-l", _ENDLESS]
    if name == "stress":
        if shutil.which("stress-ng"):
            workers = str(len(cpus))
            return [
                "stress-ng",
                "--quiet",
                "--cpu",
                workers,
                "--vm",
                "1",
                "--vm-bytes",
                "64M",
                "--timeout",
                "0",
            ]
        return [*own, _STRESS, str(len(cpus))]
    if name == "disk":
        return [*own, _DISK, "disk-load"]
    raise ValueError(f"{name} is no load")


class LoadError(Exception):
    """A load could not be brought up; the text says which and why."""


class Loads:
    """The loads of one run; a context that leaves none of them."""

    def __init__(self, keeper: Keeper, names: Sequence[str], cpus: Sequence[int], directory: Path) -> None:
        self._keeper, self._names, self._cpus, self._directory = keeper, names, list(cpus), directory
        self._running: list[tuple[str, processes.Program]] = []

    def __enter__(self) -> Loads:
        """Start them, and see that they live; raises `LoadError`."""
        try:
            for name in self._names:
                log = self._directory / f"load-{name}.log"
                argv = command(name, self._cpus)
                self._running.append(
                    (name, processes.Program(self._keeper, argv, self._cpus, self._directory, log, log))
                )
            if self._running:
                time.sleep(SETTLED)
            for name, program in self._running:
                if not program.alive:
                    said = (self._directory / f"load-{name}.log").read_text(errors="replace").split("\n")
                    last = next((line for line in reversed(said) if line.strip()), "it said nothing")
                    raise LoadError(f"the load {name} ended at once: {last.strip()[:200]}")
        except OSError as error:
            self._end()
            raise LoadError(f"a load cannot be started on CPUs {cpulist(self._cpus)}: {error}") from error
        except BaseException:
            self._end()
            raise
        return self

    def tell(self) -> list[record.Load]:
        """How each did so far; to be asked when the tool has ended, and before they are."""
        return [
            record.Load(name, program.argv, round(program.cpu_s(), 2), program.alive, self._cpus)
            for name, program in self._running
        ]

    def __exit__(self, *error: object) -> None:
        self._end()

    def _end(self) -> None:
        for _, program in self._running:
            program.end()
        self._running = []
