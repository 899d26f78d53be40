"""One stage of a record held against what was asked: its runs, one by one. What is wrong is raised, and names why."""

from __future__ import annotations

import getopt
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cyclictestdata, irqlatdata, record
from .expectations import JUDGED, Expectations, Expected
from .finding import LIMIT, Findings, WrongError
from .reading import MalformedError, parse_cpulist, shown
from .record import Machine, Run, Stage
from .request import Planned

#: `SCHED_FIFO` in sched(7).
FIFO = 1
#: Clocks may differ by this much between two moments of a record, nanoseconds: reading them takes time, and in an
#: emulated machine a process may be stopped between two. A clock that is set, or a sleep, is more.
CLOCK_STEP_NS = 1_000_000_000
#: cyclictest tells whole seconds of its own beginning and end, and begins after it was started.
WHOLE_S = 1
#: So many broken promises of one kind are told in full.
TOLD = 4

#: What each run must leave, by tool.
_OUTPUT = {"cyclictest": cyclictestdata.FILE, "irqlat": irqlatdata.FILE}

#: Options of cyclictest that make it measure what was asked, and those that change nothing in that.
_SHORT, _LONG = "mqp:i:d:a:t:D:h:", ["policy=", "mainaffinity=", "json="]


@dataclass(frozen=True)
class Ran:
    """One run that the record has: its directory, and what it was planned to be."""

    path: Path
    planned: Planned
    run: Run

    @property
    def elapsed_ns(self) -> int:
        """How long the tool ran, by the clock that nobody sets."""
        return self.run.ended.monotonic - self.run.began.monotonic


#: Latencies of a stage by CPU, and for irqlat by part: `min`, `avg`, `max` in microseconds and `samples`.
Latencies = dict[str, dict[str, Any]]


def check_stage(
    found: Findings,
    stage: Stage,
    runs: Sequence[Ran],
    machine: Machine,
    expected: Expected,
    expectations: Expectations,
    hardware: bool,
) -> Latencies | None:
    """Judge all runs of a stage; its latencies where there are some, all of them and trustworthy, else None."""
    refused = sorted({each.run.refused for each in runs if each.run.refused})
    if refused:
        wanted = "it is measured" if stage.required else "it is measured where that is possible"
        found.tell("measured", wanted, f"not measured: {'; '.join(refused)}", not stage.required, stage.name)
        return None

    fine = True

    def each(name: str, wanted: str, examine: Callable[[Ran], object]) -> None:
        nonlocal fine

        def all_of_them() -> str:
            if not runs:
                raise WrongError("no run")
            wrong = []
            for ran in runs:
                try:
                    examine(ran)
                except (WrongError, MalformedError) as error:
                    wrong.append(f"{ran.path.name}: {error}")
            if wrong:
                more = f"; and {len(wrong) - TOLD} more" if len(wrong) > TOLD else ""
                raise WrongError("; ".join(wrong[:TOLD]) + more)
            return f"{len(runs)} run{'s' if len(runs) > 1 else ''}"

        fine = found.check(name, wanted, all_of_them, stage.name) and fine

    each("status", "0", _status)
    each(
        "files", "all that the tool left, with the digests that run.json has", lambda ran: _files(ran, stage)
    )
    each("clocks", f"no jump of more than {CLOCK_STEP_NS // 1_000_000} ms, no sleep", _clocks)
    each("duration", "at least what was asked, by the monotonic clock", _duration)
    request = expected.request
    if stage.loads:
        shares = expectations.load_shares
        wanted = ", ".join(f"{name} at {shares[name]:g} CPUs or more" for name in stage.loads)
        each(
            "loads",
            f"{wanted}, to the end, on CPUs {shown(request.housekeeping)}",
            lambda ran: _loads(ran, stage, request.housekeeping, shares),
        )
    if stage.tool not in JUDGED:
        return None
    if expectations.load_required:
        found.tell("loaded", "under load", ", ".join(stage.loads) or "no load", bool(stage.loads), stage.name)
        fine = fine and bool(stage.loads)
    each(
        "threads",
        f"SCHED_FIFO {stage.priority}, one on each of CPUs {shown(stage.cpus)}; "
        f"others on CPUs {shown(request.housekeeping)}",
        lambda ran: _threads(ran.run, stage, request.housekeeping),
    )
    each("command", "it asks for what the stage does", lambda ran: _command(ran, stage))
    if stage.tool == "cyclictest":
        least = cyclictestdata.HARDWARE_SHARE if hardware else cyclictestdata.ACCOUNTED_SHARE
        each("origin", "by this command, on this kernel, then", lambda ran: _origin(ran, machine))
        each(
            "measured CPUs",
            shown(stage.cpus),
            lambda ran: cyclictestdata.check_cpus(_cyclictest(ran), stage.cpus),
        )
        each(
            "cycles",
            f"{least:.0%} of those planned" + ("" if hardware else ", measured or slept through"),
            lambda ran: cyclictestdata.check_cycles(
                _cyclictest(ran), ran.planned.seconds, stage.interval_us, ran.elapsed_ns, hardware
            ),
        )
        each(
            "histogram",
            "its sums are those of the threads" + (", nothing lies beyond it" if hardware else ""),
            lambda ran: cyclictestdata.check_histograms(_cyclictest(ran), stage.histogram_us, hardware),
        )
        return _merged(map(_cyclictest_latencies, runs)) if fine else None
    each(
        "asked",
        "irqlat measured what the stage asks for",
        lambda ran: irqlatdata.check_asked(_irqlat(ran), stage),
    )
    each("samples", "every interrupt asked for", lambda ran: _samples(ran, hardware))
    each(
        "histogram",
        "its sums are those told",
        lambda ran: irqlatdata.check_histograms(_irqlat(ran), hardware),
    )
    return _merged(map(_irqlat_latencies, runs)) if fine else None


def check_limits(found: Findings, stage: Stage, latencies: Latencies, expected: Expected) -> bool:
    """Hold latencies against the limits of their tool; whether there were limits."""
    if stage.tool in expected.unjudged:
        reason = expected.unjudged[stage.tool]
        found.tell("limit", "none", f"recorded, not judged: {reason}", True, stage.name, LIMIT)
        return False
    if stage.tool not in expected.limits:
        found.tell("limit", "a limit for what is measured", "no limit was set", False, stage.name, LIMIT)
        return False
    limit = expected.limits[stage.tool]
    for name, below in (("max", limit.max_us), ("avg", limit.avg_us)):
        # of irqlat, what counts is when the waiting thread runs
        values = {cpu: (parts.get("thread") or parts)[name] for cpu, parts in latencies.items()}
        got = ", ".join(f"CPU {cpu}: {value:g} us" for cpu, value in values.items())
        found.tell(
            name,
            f"below {below:g} us: {limit.source}",
            got or "nothing",
            bool(values) and all(value < below for value in values.values()),
            stage.name,
            LIMIT,
        )
    return True


def _status(ran: Ran) -> None:
    if ran.run.status:
        raise WrongError(f"status {ran.run.status}")


def _files(ran: Ran, stage: Stage) -> None:
    named = set(ran.run.files)
    if odd := sorted(name for name in named if "/" in name or name in ("", ".", "..", record.RUN)):
        raise WrongError(f"{odd[0]!r} is no file of a run")
    for needed in ("stdout", "stderr", _OUTPUT.get(stage.tool, "stdout")):
        if needed not in named:
            raise WrongError(f"run.json does not name {needed}")
    there = {entry.name for entry in os.scandir(ran.path)} - {record.RUN}
    if there != named:
        odd = sorted(there ^ named)
        raise WrongError(f"{odd[0]} is {'not there' if odd[0] in named else 'not named by run.json'}")
    for name, digest in sorted(ran.run.files.items()):
        try:
            if record.sha256(ran.path / name) != digest:
                raise WrongError(f"{name} is not what run.json says")
        except OSError as error:
            raise WrongError(f"{name} cannot be read: {error}") from error


def _clocks(ran: Ran) -> None:
    began, ended = ran.run.began, ran.run.ended
    if min(began.realtime, began.monotonic, began.boottime) <= 0:
        raise WrongError("a clock stands at 0")
    if ran.elapsed_ns <= 0:
        raise WrongError("it ended before it began")
    jump = (ended.realtime - began.realtime) - ran.elapsed_ns
    if abs(jump) > CLOCK_STEP_NS:
        raise WrongError(f"the clock was set by {jump / 1e9:.3f} s")
    asleep = (ended.boottime - began.boottime) - ran.elapsed_ns
    if abs(asleep) > CLOCK_STEP_NS:
        raise WrongError(f"the machine slept for {asleep / 1e9:.3f} s")


def _duration(ran: Ran) -> None:
    # a command decides itself when it is done
    if ran.planned.stage.tool != "command" and ran.elapsed_ns < ran.planned.seconds * 1_000_000_000:
        raise WrongError(f"{ran.elapsed_ns / 1e9:.1f} s of {ran.planned.seconds} s")


def _loads(ran: Ran, stage: Stage, housekeeping: Sequence[int], shares: Mapping[str, float]) -> None:
    names = [load.name for load in ran.run.loads]
    if sorted(names) != sorted(stage.loads):
        raise WrongError(f"loads: {', '.join(names) or 'none'}")
    for load in ran.run.loads:
        if not load.alive:
            raise WrongError(f"{load.name} ended before the tool did")
        if not load.argv:
            raise WrongError(f"{load.name} has no command")
        if not load.cpus or not set(load.cpus) <= set(housekeeping):
            raise WrongError(f"{load.name} ran on CPUs {shown(load.cpus)}")
        # Negated, so that what is no number is not enough.
        if not load.cpu_s >= shares[load.name] * ran.elapsed_ns / 1e9:
            raise WrongError(f"{load.name} took {load.cpu_s:.1f} s of CPU in {ran.elapsed_ns / 1e9:.1f} s")


def _threads(run: Run, stage: Stage, housekeeping: Sequence[int]) -> None:
    measuring = [thread for thread in run.threads if set(thread.cpus) & set(stage.cpus)]
    for thread in measuring:
        if thread.policy != FIFO or thread.priority != stage.priority:
            raise WrongError(f"thread {thread.tid} has policy {thread.policy}, priority {thread.priority}")
    if sorted(thread.cpus for thread in measuring) != [[cpu] for cpu in stage.cpus]:
        told = "; ".join(shown(thread.cpus) for thread in measuring)
        raise WrongError(f"threads on CPUs {told or 'none'}")
    for thread in run.threads:
        if thread not in measuring and (not thread.cpus or not set(thread.cpus) <= set(housekeeping)):
            raise WrongError(f"thread {thread.tid} may run on CPUs {shown(thread.cpus)}")


def _command(ran: Ran, stage: Stage) -> None:
    argv = ran.run.argv
    if stage.tool == "irqlat":
        wanted = [
            f"--cpu={stage.cpus[0]}",
            f"--priority={stage.priority}",
            f"--interval={stage.interval_us}",
            f"--duration={ran.planned.seconds}",
            f"--histogram={stage.histogram_us}",
        ]
        if lacking := [each for each in wanted if argv.count(each) != 1]:
            raise WrongError(f"{lacking[0]} is not in the command")
        return
    if not argv or Path(argv[0]).name != "cyclictest":
        raise WrongError(f"it is not cyclictest: {' '.join(argv[:1])}")
    try:
        pairs, rest = getopt.getopt(argv[1:], _SHORT, _LONG)
    except getopt.GetoptError as error:
        raise WrongError(f"an option of cyclictest that is not asked for: {error}") from error
    options = dict(pairs)
    if rest or len(options) != len(pairs):
        raise WrongError(f"cyclictest has an option twice, or an argument: {' '.join(argv)}")
    asked = {
        "-m": "",
        "-p": str(stage.priority),
        "-i": str(stage.interval_us),
        "-d": "0",
        "--policy": "fifo",
        "-t": str(len(stage.cpus)),
        "-D": str(ran.planned.seconds),
        "-h": str(stage.histogram_us),
    }
    for option, value in asked.items():
        if options.get(option) != value:
            raise WrongError(f"{option} is {options.get(option, 'not given')}, not {value or 'given'}")
    if parse_cpulist(options.get("-a", "")) != tuple(stage.cpus):
        raise WrongError(f"-a is {options.get('-a', 'not given')}")


def _read(ran: Ran, name: str) -> str:
    """A file of a run, when it is what run.json says."""
    try:
        content = (ran.path / name).read_bytes()
    except OSError as error:
        raise WrongError(f"{name} cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != ran.run.files.get(name):
        raise WrongError(f"{name} is not what run.json says")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise WrongError(f"{name} is not text") from error


def _cyclictest(ran: Ran) -> dict[str, Any]:
    return cyclictestdata.parse_cyclictest(_read(ran, cyclictestdata.FILE))


def _irqlat(ran: Ran) -> dict[str, Any]:
    return irqlatdata.parse_irqlat(_read(ran, irqlatdata.FILE))


def _origin(ran: Ran, machine: Machine) -> None:
    data = _cyclictest(ran)
    cyclictestdata.check_origin(data, ran.run.argv, machine.kernel_release, machine.kernel_version)
    began, ended = cyclictestdata.times(data)
    if ended - began < ran.planned.seconds - WHOLE_S:
        raise WrongError(f"by cyclictest's own clock {ended - began:.0f} s of {ran.planned.seconds} s")
    if began < ran.run.began.realtime / 1e9 - WHOLE_S or ended > ran.run.ended.realtime / 1e9 + WHOLE_S:
        raise WrongError(f"{cyclictestdata.FILE} is of another time than the run")


def _samples(ran: Ran, hardware: bool) -> None:
    data = _irqlat(ran)
    least = ran.planned.seconds * 1_000_000 // ran.planned.stage.interval_us
    if data["requested"] < math.ceil(least * cyclictestdata.HARDWARE_SHARE):
        raise WrongError(f"{data['requested']} interrupts were asked for, not {least}")
    irqlatdata.check_samples(data, ran.elapsed_ns, hardware)


def _cyclictest_latencies(ran: Ran) -> Latencies:
    return {
        str(thread["cpu"]): {
            **{name: thread[name] for name in ("min", "avg", "max")},
            "samples": thread["cycles"],
        }
        for thread in _cyclictest(ran)["thread"].values()
    }


def _irqlat_latencies(ran: Ran) -> Latencies:
    data = _irqlat(ran)
    return {
        str(data["cpu"]): {
            part: {**{name: data[part][name] for name in ("min", "avg", "max")}, "samples": data["samples"]}
            for part in irqlatdata.PARTS
        }
    }


def _merged(each: Iterable[Latencies]) -> Latencies:
    """Latencies of all runs of a stage as if they were one."""
    whole: Latencies = {}
    for latencies in each:
        for cpu, values in latencies.items():
            if cpu not in whole:
                whole[cpu] = values
            elif "samples" in values:
                whole[cpu] = _joined(whole[cpu], values)
            else:
                whole[cpu] = {part: _joined(whole[cpu][part], values[part]) for part in values}
    return dict(sorted(whole.items(), key=lambda item: int(item[0])))


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    samples = one["samples"] + other["samples"]
    return {
        "min": min(one["min"], other["min"]),
        "avg": round((one["avg"] * one["samples"] + other["avg"] * other["samples"]) / samples, 3),
        "max": max(one["max"], other["max"]),
        "samples": samples,
    }
