"""In a guest: the moment at which a latency was too long, by the TSC.

`cyclictest` measures, and writes a mark into the kernel's trace as soon as a latency exceeds the limit; then it ends.
The trace counts the TSC meanwhile, and is as it was before when this is done.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from . import tracefs
from .problems import EndedError, MeasureError
from .record import write_json

#: Raised when the meaning of a field changes.
SCHEMA = 1

#: What cyclictest writes into the trace.
_MARK = re.compile(
    r"^\s*\S.*-\d+\s+\[(?P<cpu>\d+)\]\s+\S+\s+(?P<tsc>\d+): tracing_mark_write: "
    r"hit latency threshold \((?P<latency>\d+) > (?P<limit>\d+)\)\s*$",
    re.MULTILINE,
)

#: cyclictest looks for tracefs where debugfs has it. A kernel without debugfs gets it there for cyclictest alone: in a
#: mount namespace that ends with it.
_DEBUGFS = "sys/kernel/debug/tracing"
_PRIVATELY = (
    *("unshare", "--mount", "sh", "-ec"),
    f'mount -t tmpfs none /sys/kernel; mkdir -p /{_DEBUGFS}; mount -t tracefs none /{_DEBUGFS}; exec "$@"',
    "sh",
)

#: Seconds that cyclictest may take to begin and to end, beside those it measures.
GRACE_S = 60

#: How often a thread has slept when it measures.
_PERIODS = 5


def measure_break(
    root: Path,
    place: str,
    cpus: Sequence[int],
    limit_us: int,
    seconds: int,
    options: Sequence[str] = (),
    announce: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure until a latency exceeds the limit, or time is up; returns what to write into the guest's file.

    `options` are further ones of cyclictest. `announce` is called once when it measures. Raises `MeasureError`.
    """
    if not cpus or limit_us < 1 or seconds < 1:
        raise MeasureError(
            "nothing to measure", "name CPUs, a limit and a time above 0: --cpus 1 --limit 100 --seconds 60"
        )
    tracing = tracefs.find(root)
    tracer = tracefs.get(tracing / "current_tracer").strip()
    if tracer != "nop":
        raise MeasureError(f"the tracer {tracer} is at work", f"echo nop > /{tracefs.TRACEFS}/current_tracer")
    command = ["cyclictest", "-m", "-q", "--policy=fifo", "-d0", *options]
    command += ["-t", str(len(cpus)), "-a", ",".join(map(str, cpus)), "-D", str(seconds)]
    command += ["-b", str(limit_us), "--tracemark"]
    if not (root / _DEBUGFS / "trace_marker").exists():
        command = [*_PRIVATELY, *command]
    with _counting(tracing):
        said = _cyclictest(root, command, len(cpus), seconds, announce)
        text = tracefs.get(tracing / "trace")
    answer = {
        "schema": SCHEMA,
        "place": place,
        "argv": command,
        "boot_id": tracefs.boot_id(root),
        "clock": tracefs.CLOCK,
        "cpus": sorted(cpus),
        "limit_us": limit_us,
        "seconds": seconds,
    }
    broke = re.search(r"^# Break value: (\d+)", said, re.MULTILINE)
    marks = list(_MARK.finditer(text))
    if len(marks) > 1 or (marks and not broke):
        raise MeasureError("another cyclictest writes into the same trace", "end it, and measure again")
    if not broke or int(broke[1]) == 0:
        return {**answer, "exceeded": False}
    if not marks or int(marks[0]["limit"]) != limit_us or marks[0]["latency"] != broke[1]:
        raise MeasureError(
            f"cyclictest met a latency of {broke[1]} µs, but its mark is not in the trace",
            f"see that nothing else uses /{tracefs.TRACEFS}, and measure again",
        )
    mark = marks[0]
    found = {"cpu": int(mark["cpu"]), "tsc": int(mark["tsc"]), "latency_us": int(mark["latency"])}
    return {**answer, "exceeded": True, **found}


@contextlib.contextmanager
def _counting(tracing: Path) -> Iterator[None]:
    """The trace that trace_marker writes to, empty and counting the TSC; as it was afterwards."""
    was_on = tracefs.get(tracing / "tracing_on").strip()
    was_clock = re.search(r"\[([^\]]+)\]", tracefs.get(tracing / "trace_clock"))

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # one is enough
        raise EndedError(number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        tracefs.put(tracing / "tracing_on", "0")
        tracefs.put(tracing / "trace_clock", tracefs.CLOCK)
        tracefs.put(tracing / "trace", "")
        tracefs.put(tracing / "tracing_on", "1")
        yield
    finally:
        tracefs.put(tracing / "tracing_on", "0")
        if was_clock:
            tracefs.put(tracing / "trace_clock", was_clock[1])
        tracefs.put(tracing / "trace", "")
        tracefs.put(tracing / "tracing_on", was_on)
        signal.signal(signal.SIGTERM, before)


def _cyclictest(
    root: Path, command: Sequence[str], threads: int, seconds: int, announce: Callable[[], None]
) -> str:
    """Run it to its end; what it said."""
    try:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            try:
                if _measures(root, process, threads):
                    announce()
                said = process.communicate(timeout=seconds + GRACE_S)[0].decode(errors="replace")
            finally:
                process.kill()
    except FileNotFoundError as error:
        raise MeasureError(f"{command[0]} is not there", "install rt-tests and util-linux") from error
    except subprocess.TimeoutExpired as error:
        raise MeasureError(
            f"cyclictest did not end in {seconds + GRACE_S} s", "see what it waits for"
        ) from error
    if process.returncode:
        told = (said.strip().splitlines() or ["it said nothing"])[-1]
        raise MeasureError(f"cyclictest ended with status {process.returncode}: {told}", "run as root")
    return said


def _measures(root: Path, process: subprocess.Popen[bytes], count: int) -> bool:
    """Wait until that many SCHED_FIFO threads have slept some periods; False when the program ended before."""
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        ready = 0
        for task in (root / "proc" / str(process.pid) / "task").glob("*"):
            with contextlib.suppress(OSError, IndexError):
                policy = (task / "stat").read_text().rpartition(")")[2].split()[38]
                slept = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", (task / "status").read_text(), re.M)
                ready += policy == "1" and slept is not None and int(slept[1]) >= _PERIODS
        if ready >= count:
            return True
        time.sleep(0.05)
    raise MeasureError(
        f"cyclictest does not measure after {GRACE_S} s", "see that its CPUs are there and free"
    )


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`break`, one of the commands of `trace`."""
    parser = commands.add_parser("break", help="in a guest: measure until a latency is too long")
    parser.add_argument("--root", metavar="DIR", default="/", help=argparse.SUPPRESS)
    parser.add_argument("--place", metavar="guest-NAME", required=True, help="which guest this is")
    parser.add_argument("--cpus", metavar="LIST", required=True, help="the vCPUs that are measured")
    parser.add_argument(
        "--limit", metavar="US", type=int, required=True, help="microseconds that are allowed"
    )
    parser.add_argument("--seconds", metavar="S", type=int, default=60, help="at most (default: 60)")
    parser.add_argument("--interval", metavar="US", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--priority", metavar="N", type=int, default=80, help="(default: 80)")
    parser.add_argument("--housekeeping", metavar="LIST", help="vCPUs for the rest of cyclictest")
    parser.add_argument("--out", metavar="FILE", required=True, help="gets what was found, as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`virt-rt-measure trace break`: 0 when it was measured, whatever was found; raises `MeasureError`.

    Prints `measuring` as soon as it does, so that a caller knows when to begin to disturb it.
    """
    if not re.fullmatch(r"guest-[A-Za-z0-9][A-Za-z0-9._-]*", options.place):
        raise MeasureError(
            f"{options.place!r} is no guest's place", "write guest- and its name: guest-rt-guest"
        )
    further = [f"-i{options.interval}", f"-p{options.priority}"]
    if options.housekeeping:
        further.append(f"--mainaffinity={options.housekeeping}")

    def announce() -> None:
        print("measuring", flush=True)

    cpus = tracefs.cpulist(options.cpus)
    answer = measure_break(
        Path(options.root), options.place, cpus, options.limit, options.seconds, further, announce
    )
    write_json(Path(options.out), answer)
    print(json.dumps(answer) if answer["exceeded"] else f"no latency above {options.limit} µs")
    return 0
