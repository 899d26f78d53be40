"""The record of one place held against what was asked of it: whole, unchanged, on the machine that was meant."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from . import reading, record
from .evidence import guest_doubts
from .expectations import HOST, JUDGED, Expectations, Expected
from .finding import LIMIT, PROTOCOL, Findings, WrongError
from .record import End, Machine, Request, Run
from .request import planned
from .runcheck import CLOCK_STEP_NS, Latencies, Ran, check_limits, check_stage

#: Clock sources that are neither slow nor known to go wrong: the kernel leaves `tsc` when it finds it unstable.
HOST_CLOCKS, GUEST_CLOCKS = ("tsc",), ("tsc", "kvm-clock")
#: Clocks of two machines may differ by this, seconds.
SKEW_S = 60

Document = TypeVar("Document", Request, Machine, Run, End)


@dataclass
class Place:
    """What is known of one place; `judged` names stages that were held against limits."""

    name: str
    directory: Path
    expected: Expected
    machine: Machine | None
    findings: Findings
    runs: list[Ran] = field(default_factory=list)
    latencies: dict[str, Latencies] = field(default_factory=dict)
    judged: list[str] = field(default_factory=list)


def machine_of(directory: Path) -> Machine | None:
    """What a place says it is; None when nothing can be believed."""
    try:
        return _document(directory / record.MACHINE, Machine)
    except (WrongError, record.RecordError):
        return None


def examine(place: Place, expectations: Expectations, now_s: int, hardware: bool) -> None:
    """Judge a place's record; what is found is left in `place`."""
    found, request = place.findings, place.expected.request
    whole = [
        found.check("request", "there, as asked, and not changed since", lambda: _request(place)),
        found.check("machine", "there, and not changed since", lambda: _machine(place)),
        found.check("end", "written at the end, with the digests of all that it names", lambda: _end(place)),
        found.check("runs", f"{len(planned(request))} runs, each once, in order", lambda: _runs(place)),
    ]
    if place.machine is None:
        return
    _check_machine(place, place.machine, hardware)
    if not place.runs:
        return
    found.check("order", "one after the other", lambda: _order(place.runs))
    found.check("boot", "one boot, or one after the other", lambda: _boots(place.runs, place.machine))
    found.check("age", _window(expectations), lambda: _age(place.runs, expectations, now_s))
    for stage in request.stages:
        runs = [ran for ran in place.runs if ran.planned.stage.name == stage.name]
        latencies = check_stage(found, stage, runs, place.machine, place.expected, expectations, hardware)
        if latencies is not None and all(whole):
            place.latencies[stage.name] = latencies
            if hardware and check_limits(found, stage, latencies, place.expected):
                place.judged.append(stage.name)
    _check_measured(place, expectations, hardware)


def _document(path: Path, kind: type[Document]) -> Document:
    """A document of a record, byte for byte as it was written; raises `WrongError` or `RecordError`."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise WrongError(f"{path.name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise WrongError(f"{path.name} is not text") from error
    try:
        content = reading.loads(text)
    except reading.MalformedError as error:
        raise WrongError(f"{path.name}: {error}") from error
    if json.dumps(content, indent=1, sort_keys=True) + "\n" != text:
        raise WrongError(f"{path.name} is not as virt-rt-measure writes it")
    return record.decode(content, kind, path.name)


def _request(place: Place) -> str:
    if _document(place.directory / record.REQUEST, Request) != place.expected.request:
        raise WrongError("it is not what was asked")
    return "as asked"


def _machine(place: Place) -> str:
    return _document(place.directory / record.MACHINE, Machine).hostname or "without a name"


def _end(place: Place) -> str:
    end = _document(place.directory / record.END, End)
    wanted = [each.name for each in planned(place.expected.request)]
    if sorted(end.runs) != sorted(wanted):
        odd = sorted({*end.runs} ^ {*wanted})
        raise WrongError(f"it {'names' if odd[0] in end.runs else 'does not name'} {odd[0]}")
    files = {record.REQUEST: end.request, record.MACHINE: end.machine}
    files.update({f"{name}/{record.RUN}": digest for name, digest in end.runs.items()})
    for name, digest in files.items():
        if not (place.directory / name).is_file():
            raise WrongError(f"{name} is missing")
        if record.sha256(place.directory / name) != digest:
            raise WrongError(f"{name} was changed")
    return f"{len(end.runs)} runs"


def _runs(place: Place) -> str:
    """Take in the runs; all that there should be, and none else."""
    wanted = planned(place.expected.request)
    wrong = []
    for each in wanted:
        path = place.directory / each.name
        try:
            run = _document(path / record.RUN, Run)
        except (WrongError, record.RecordError) as error:
            wrong.append(f"{each.name}: {error}")
            continue
        if (run.stage, run.tool, run.segment) != (each.stage.name, each.stage.tool, each.segment):
            wrong.append(f"{each.name} is {run.stage}, segment {run.segment}, by {run.tool}")
            continue
        place.runs.append(Ran(path, each, run))
    try:
        there = sorted(path.name for path in place.directory.iterdir() if path.is_dir())
    except OSError as error:
        raise WrongError(f"it cannot be read: {error.strerror}") from error
    names = {each.name for each in wanted}
    interrupted = [name for name in there if re.fullmatch(r"(.*)\.interrupted-\d+", name)]
    wrong += [f"{name} was not asked for" for name in there if name not in names and name not in interrupted]
    if wrong:
        raise WrongError("; ".join(wrong[:4]))
    again = f"; interrupted and made again: {', '.join(interrupted)}" if interrupted else ""
    return f"{len(place.runs)} runs{again}"


def _check_machine(place: Place, machine: Machine, hardware: bool) -> None:
    found, request = place.findings, place.expected.request

    def same(name: str, wanted: str, got: str) -> None:
        found.tell(name, wanted or "none", got or "none", got == wanted)

    def cpus(name: str, told: str) -> None:
        def examine() -> str:
            if reading.parse_cpulist(told) != tuple(request.isolated):
                raise WrongError(told or "none")
            return told

        found.check(name, reading.shown(request.isolated), examine)

    same("kernel", request.kernel_release, machine.kernel_release)
    found.tell(
        "real-time",
        "PREEMPT_RT",
        machine.kernel_version or "nothing",
        "PREEMPT_RT" in machine.kernel_version.split(),
    )
    same("plan", request.plan_sha256 if place.name == HOST else "", machine.plan_sha256)
    cpus("isolated", machine.isolated)
    cpus("nohz_full", machine.nohz_full)
    clocks = HOST_CLOCKS if place.name == HOST else GUEST_CLOCKS
    found.tell(
        "clock source", " or ".join(clocks), machine.clocksource or "none", machine.clocksource in clocks
    )
    if any(ran.run.tool == "cyclictest" and not ran.run.refused for ran in place.runs):
        found.tell("timers", "1 ns", f"{machine.timer_ns} ns", machine.timer_ns == 1)
    if place.name != HOST:
        # In a host that is emulated the guest may be, too; in none is it hardware.
        ok = not guest_doubts(machine) if hardware else machine.virtualization in ("kvm", "qemu")
        found.tell("virtual machine", "kvm", machine.virtualization or "nothing", ok)


def _order(runs: Sequence[Ran]) -> str:
    """Runs follow each other in time, and no clock was set between two of one boot."""
    for before, after in zip(runs, runs[1:]):
        one, other = before.run.ended, after.run.began
        if other.realtime < one.realtime - CLOCK_STEP_NS:
            raise WrongError(f"{after.path.name} began before {before.path.name} had ended")
        if before.run.boot_id != after.run.boot_id:
            continue
        if other.monotonic < one.monotonic:
            raise WrongError(f"{after.path.name} began before {before.path.name} had ended")
        jump = (other.realtime - one.realtime) - (other.monotonic - one.monotonic)
        if abs(jump) > CLOCK_STEP_NS:
            raise WrongError(f"the clock was set by {jump / 1e9:.3f} s before {after.path.name}")
    return "one after the other"


def _boots(runs: Sequence[Ran], machine: Machine | None) -> str:
    boots = [ran.run.boot_id for ran in runs]
    order = list(dict.fromkeys(boots))
    if "" in order or machine is None or order[0] != machine.boot_id:
        raise WrongError("the first run is of another boot than the record")
    if boots != sorted(boots, key=order.index):
        raise WrongError("runs of several boots are mixed")
    return "one boot" if len(order) == 1 else f"{len(order)} boots: resumed after each"


def _window(expectations: Expectations) -> str:
    age = f", {expectations.max_age_s} s ago at most" if expectations.max_age_s else ""
    return f"not before what is measured was made{age}, not in the future"


def _age(runs: Sequence[Ran], expectations: Expectations, now_s: int) -> str:
    by_age = now_s - expectations.max_age_s if expectations.max_age_s else 0
    oldest = max(expectations.oldest_s, by_age) - SKEW_S
    for ran in runs:
        if ran.run.began.realtime < oldest * 1_000_000_000:
            raise WrongError(f"{ran.path.name} is {oldest - ran.run.began.realtime / 1e9:.0f} s too old")
        late = ran.run.ended.realtime / 1e9 - now_s
        if late > SKEW_S:
            raise WrongError(f"{ran.path.name} is {late:.0f} s in the future")
    return f"{now_s - runs[-1].run.ended.realtime / 1e9:.0f} s old"


def _check_measured(place: Place, expectations: Expectations, hardware: bool) -> None:
    """Each isolated CPU was measured, and for long enough, unless all that was asked of the place is load."""
    found, request = place.findings, place.expected.request
    if all(stage.tool == "load" for stage in request.stages):
        found.tell("measured CPUs", "none: it only makes load", "none", True)
        return

    def covers(name: str, stages: Collection[str], kind: str) -> None:
        cpus = sorted({cpu for stage in request.stages if stage.name in stages for cpu in stage.cpus})
        wanted = reading.shown(request.isolated)
        found.tell(name, wanted, reading.shown(cpus), cpus == request.isolated, kind=kind)

    covers("measured CPUs", place.latencies, PROTOCOL)
    if hardware:
        covers("judged CPUs", place.judged, LIMIT)
    shortest = min((stage.duration_s for stage in request.stages if stage.tool in JUDGED), default=0)
    wanted = f"{expectations.minimum_s} s or more"
    found.tell("long enough", wanted, f"{shortest} s", shortest >= expectations.minimum_s)
