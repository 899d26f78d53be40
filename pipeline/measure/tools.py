"""How each tool is called, what it needs, and what it leaves: one entry of `TOOLS` for each.

A tool runs in its run's directory: files that it writes are named without a path.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import hwlat, loads, record
from .machineinfo import cpulist, kernel_release
from .request import Planned

#: Timers that are coarser than this, nanoseconds, are those of ticks.
FINE_NS = 1000
#: Below it, by kernel release and driver, programs that come with drivers.
DRIVERS = "usr/libexec/virt-rt/drivers"
#: What a tool may take longer than it was asked to, seconds: it starts, writes its results, and the machine is loaded.
GRACE_S = 120


@dataclass(frozen=True)
class Tool:
    """A tool.

    program    what must be installed, by the package `package`; empty for none
    output     the file that it writes beside stdout; empty for none
    tracer     what the kernel must have; empty for none
    argv       its command for one run, on these housekeeping CPUs
    """

    program: str
    package: str
    output: str
    tracer: str
    argv: Callable[[Planned, Sequence[int]], list[str]]


def _cyclictest(run: Planned, housekeeping: Sequence[int]) -> list[str]:
    stage = run.stage
    return [
        "cyclictest",
        "-m",
        f"-p{stage.priority}",
        f"-i{stage.interval_us}",
        "-d0",
        "--policy=fifo",
        "-a",
        cpulist(stage.cpus),
        "-t",
        str(len(stage.cpus)),
        f"--mainaffinity={cpulist(housekeeping)}",
        "-q",
        "-D",
        str(run.seconds),
        "-h",
        str(stage.histogram_us),
        "--json=cyclictest.json",
    ]


def _irqlat(run: Planned, housekeeping: Sequence[int]) -> list[str]:
    stage = run.stage
    return [
        *(stage.argv or [irqlat()]),
        f"--cpu={stage.cpus[0]}",
        f"--trigger-cpu={housekeeping[0]}",
        f"--priority={stage.priority}",
        f"--interval={stage.interval_us}",
        f"--duration={run.seconds}",
        f"--histogram={stage.histogram_us}",
        "--json=irqlat.json",
    ]


def irqlat(root: Path = Path("/")) -> str:
    """The program irqlat of the running kernel's driver, or else the one in PATH."""
    place = root / DRIVERS / kernel_release() / "irqlat" / "irqlat"
    return str(place) if place.is_file() else "irqlat"


def _rtla(run: Planned, housekeeping: Sequence[int], tracer: str) -> list[str]:
    stage = run.stage
    argv = ["rtla", tracer, "hist", "-c", cpulist(stage.cpus), "-H", cpulist(housekeeping)]
    argv += ["-d", f"{run.seconds}s", "-b", "1", "-E", str(max(stage.histogram_us, 10))]
    argv += ["-P", f"f:{stage.priority}"] if stage.priority else []
    return argv + (["-p", str(stage.interval_us)] if stage.interval_us else [])


def _timerlat(run: Planned, housekeeping: Sequence[int]) -> list[str]:
    return _rtla(run, housekeeping, "timerlat")


def _osnoise(run: Planned, housekeeping: Sequence[int]) -> list[str]:
    return _rtla(run, housekeeping, "osnoise")


def _hwlat(run: Planned, housekeeping: Sequence[int]) -> list[str]:
    window = str(run.stage.interval_us or 1_000_000)
    options = ["--cpus", cpulist(run.stage.cpus), "--window-us", window, "--seconds", str(run.seconds)]
    return [*myself(), "hwlat", *options]


def _oslat(run: Planned, housekeeping: Sequence[int]) -> list[str]:
    argv = ["oslat", "-c", cpulist(run.stage.cpus), "-C", str(housekeeping[0]), "-D", str(run.seconds)]
    argv += ["-f", str(run.stage.priority)] if run.stage.priority else []
    return [*argv, "-q", "--json=oslat.json"]


def _load(run: Planned, housekeeping: Sequence[int]) -> list[str]:
    return []


def _command(run: Planned, housekeeping: Sequence[int]) -> list[str]:
    return list(run.stage.argv)


TOOLS = {
    "cyclictest": Tool("cyclictest", "rt-tests", "cyclictest.json", "", _cyclictest),
    "irqlat": Tool("irqlat", "the driver irqlat for this kernel", "irqlat.json", "", _irqlat),
    "timerlat": Tool("rtla", "rtla", "", "timerlat", _timerlat),
    "osnoise": Tool("rtla", "rtla", "", "osnoise", _osnoise),
    "hwlat": Tool("", "", hwlat.OUTPUT, hwlat.TRACER, _hwlat),
    "oslat": Tool("oslat", "rt-tests", "oslat.json", "", _oslat),
    "load": Tool("", "", "", "", _load),
    "command": Tool("", "", "", "", _command),
}


def refusal(stage: record.Stage, timer_ns: int, tracing: Path = hwlat.TRACING) -> str:
    """Why a stage cannot be measured on this machine; empty when it can."""
    tool = TOOLS[stage.tool]
    if stage.tool == "cyclictest" and timer_ns > FINE_NS:
        return f"timers of {timer_ns / 1e6:.3g} ms: high-resolution timers are off; use irqlat"
    program = stage.argv[0] if stage.argv else irqlat() if stage.tool == "irqlat" else tool.program
    if program and shutil.which(program) is None:
        return f"{program} is not installed" + (f": install {tool.package}" if tool.package else "")
    if tool.tracer and (said := hwlat.missing(tool.tracer, tracing)):
        return said
    return loads.missing(stage.loads)


def myself() -> list[str]:
    """This program as a command, wherever it was started from: a file of its own, or a checkout."""
    origin = Path(__file__).resolve()
    package = __name__.rpartition(".")[0]
    above = origin.parents[package.count(".") + 1]
    start = f"import sys; sys.path.insert(0, {str(above)!r}); from {package}.__main__ import main; sys.exit(main())"
    return [sys.executable, "-c", start]
