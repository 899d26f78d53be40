"""Gaps that hardware makes (firmware, SMIs, a hypervisor), by the kernel's hwlat tracer: the floor of all latencies.

A program of its own, started as the tool of a run: `hwlat.json` has every gap over the threshold, `trace` the
kernel's own lines.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from . import record
from .machineinfo import cpulist, parse_cpulist
from .problems import MeasureError

TRACING = Path("/sys/kernel/tracing")
TRACER = "hwlat"
INSTANCE = "virt-rt-hwlat"
#: The kernel takes no less, microseconds; it tells the greatest gap of each window, so a window is a line at most.
THRESHOLD_US = 1
OUTPUT, TRACE = "hwlat.json", "trace"

_SAMPLE = re.compile(
    r"-\d+\s+\[(?P<cpu>\d+)\].*?\s(?P<at>\d+\.\d+): #\d+\s+inner/outer\(us\):\s*(?P<inner>\d+)/(?P<outer>\d+)"
)


def missing(tracer: str, tracing: Path = TRACING) -> str:
    """Why the kernel cannot trace so; empty when it can."""
    try:
        known = (tracing / "available_tracers").read_text().split()
    except OSError as error:
        return f"no tracefs: {error.strerror}: {tracing}/available_tracers"
    return "" if tracer in known else f"the kernel has no {tracer} tracer"


def parse(text: str) -> list[dict[str, float]]:
    """Every gap in lines of the tracer: CPU, seconds since boot, microseconds within and between two readings."""
    found = []
    for line in text.splitlines():
        sample = _SAMPLE.search(line)
        if sample is not None:
            found.append(
                {
                    "cpu": int(sample["cpu"]),
                    "at_s": float(sample["at"]),
                    "inner_us": int(sample["inner"]),
                    "outer_us": int(sample["outer"]),
                }
            )
        elif "inner/outer" in line:
            raise MeasureError(f"a line of the tracer is not of its form: {line[:200]}", "tell us of it")
    return found


@contextmanager
def _set(path: Path, value: str) -> Iterator[None]:
    """A file of tracefs with another value for a while."""
    before = path.read_text().strip()
    path.write_text(value)
    try:
        yield
    finally:
        path.write_text(before.partition("[")[2].partition("]")[0] or before)


@contextmanager
def _instance(tracing: Path) -> Iterator[Path]:
    """A trace buffer of our own."""
    path = tracing / "instances" / INSTANCE
    if path.is_dir():  # of one that was killed
        (path / "current_tracer").write_text("nop")
        path.rmdir()
    path.mkdir()
    try:
        yield path
    finally:
        (path / "current_tracer").write_text("nop")
        path.rmdir()


def _lines(pipe: int, seconds: float) -> Iterator[bytes]:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([pipe], [], [], left)[0]:
            try:
                yield os.read(pipe, 1 << 16)
            except BlockingIOError:  # the kernel says readable a little early
                time.sleep(0.05)


def measure(cpus: list[int], window_us: int, seconds: int, tracing: Path, out: Path) -> None:
    """Trace and write both files; raises `OSError` and `MeasureError`."""
    detector = tracing / "hwlat_detector"
    mask = 0
    for cpu in cpus:
        mask |= 1 << cpu
    groups = f"{mask:x}"
    groups = ",".join(
        groups[max(0, end - 8) : end] for end in range(len(groups) % 8 or 8, len(groups) + 1, 8)
    )
    with ExitStack() as stack:
        instance = stack.enter_context(_instance(tracing))
        (instance / "trace_clock").write_text("mono")
        (instance / "tracing_cpumask").write_text(groups)
        # the width must never exceed the window
        stack.enter_context(_set(detector / "width", str(min(1000, window_us // 2))))
        stack.enter_context(_set(detector / "window", str(window_us)))
        (detector / "width").write_text(str(window_us // 2))
        stack.callback((detector / "width").write_text, str(min(1000, window_us // 2)))
        stack.enter_context(_set(detector / "mode", "per-cpu"))
        stack.enter_context(_set(tracing / "tracing_thresh", str(THRESHOLD_US)))
        pipe = os.open(instance / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        stack.callback(os.close, pipe)
        stack.callback((instance / "current_tracer").write_text, "nop")  # before its settings change again
        (instance / "current_tracer").write_text(TRACER)
        with (out / TRACE).open("wb") as file:
            for block in _lines(pipe, seconds):
                file.write(block)
        if TRACER not in (instance / "current_tracer").read_text():
            raise MeasureError("the tracer was switched off meanwhile", "let nothing else trace, and repeat")
        overruns = sum(
            int(line.rpartition(":")[2])
            for path in instance.glob("per_cpu/cpu*/stats")
            for line in path.read_text().splitlines()
            if line.startswith(("overrun:", "dropped events:"))
        )
    samples = parse((out / TRACE).read_text(errors="replace"))
    content = {
        "schema": 1,
        "tool": "hwlat",
        "cpus": cpus,
        "window_us": window_us,
        "width_us": window_us // 2,
        "threshold_us": THRESHOLD_US,
        "lost": overruns,
        "max_us": max((max(each["inner_us"], each["outer_us"]) for each in samples), default=0),
        "samples": samples,
    }
    record.write_json(out / OUTPUT, content)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """A command that a run starts, not a person."""
    parser = subparsers.add_parser("hwlat", description="Trace gaps that hardware makes; a run starts this.")
    parser.add_argument("--cpus", required=True)
    parser.add_argument("--window-us", type=int, required=True)
    parser.add_argument("--seconds", type=int, required=True)
    parser.set_defaults(run=_run)


def _leave(number: int, frame: object | None) -> None:
    """Leave the kernel as it was, which the end of a context does and the default action does not."""
    raise SystemExit(128 + number)


def _run(options: argparse.Namespace) -> int:
    cpus = parse_cpulist(options.cpus)
    signal.signal(signal.SIGTERM, _leave)
    try:
        measure(cpus, options.window_us, options.seconds, TRACING, Path.cwd())
    except OSError as error:
        print(f"hwlat: CPUs {cpulist(cpus)}: {error}", file=sys.stderr)
        return 1
    return 0
