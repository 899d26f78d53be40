"""A measurement as `virt-rt-measure` left it, read for a report: its places, what ran there, and the latencies.

What is missing, cut short or not as its own sums say is a red finding; nothing of it is left out silently. Whether the
latencies are good enough is the gate's to say.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pipeline.errors import UserError
from pipeline.gate import MalformedError, parse_cyclictest
from pipeline.labrecord import Block, Evidence, Finding, Place, Ran, Series
from pipeline.measure import evidence, record
from pipeline.measure.irqlatdata import PARTS, parse_irqlat

#: Shortest block of a tool that tells the greatest latency of short windows, seconds, and the most of a run.
BLOCK_S, MOST_BLOCKS = 1, 2000
#: Samples that must lie above a block's p99.9 for it to say something.
ABOVE = 10
#: Runs whose length differs by more than this part are blocks of different length.
TOLERANCE = 0.1

#: What an interrupted run left: it was made again, under its own name.
INTERRUPTED = re.compile(r".*\.interrupted-\d+")

What = Literal["timer", "handler", "thread"]
#: Which CPU of the host a vCPU of a guest runs on, by guest.
Pins = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was read; `findings` are about whether it is whole, `absent` names what was asked for and is not there."""

    platform: str
    plan_sha256: str
    evidence: Evidence
    places: tuple[Place, ...]
    runs: tuple[Ran, ...]
    series: tuple[Series, ...]
    findings: tuple[Finding, ...]
    absent: tuple[str, ...]


@dataclass(slots=True)
class _Piece:
    """One thread of one run: counts by microsecond, and what the tool says itself."""

    cpu: int
    histogram: dict[int, int]
    samples: int
    least: float
    average: float
    greatest: float
    blocks: list[Block]


@dataclass(slots=True)
class _Record:
    """A place's record while it is read."""

    name: str
    path: Path
    pins: Sequence[int]
    findings: list[Finding] = field(default_factory=list)
    pieces: dict[tuple[str, What, int], list[_Piece]] = field(default_factory=dict)
    ran: list[Ran] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def finding(self, name: str, wanted: str, got: str, ok: bool, stage: str = "") -> None:
        self.findings.append(Finding(name=name, wanted=wanted, got=got, ok=ok, place=self.name, stage=stage))


def read(directory: Path, pins: Pins | None = None) -> Measurement:
    """Read all places of a measurement; `UserError` when it is none at all.

    A place of which request or machine cannot be read is an error: nothing could be said of it.
    """
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}", "give the directory of a measurement")
    names = sorted(
        path.name
        for path in directory.iterdir()
        if path.is_dir() and (path.name == "host" or path.name.startswith("guest-"))
    )
    if "host" not in names:
        raise UserError(f"{directory} is no measurement: it has no host/", "give what `doit measure` left")
    names.sort(key=lambda name: name != "host")
    records, places, requests = [], [], []
    series: list[Series] = []
    machines: dict[str, record.Machine | None] = {}
    for name in names:
        of_guest = (pins or {}).get(name.removeprefix("guest-"), ()) if name != "host" else ()
        found = _Record(name, directory / name, of_guest)
        try:
            request = record.read(found.path / record.REQUEST, record.Request)
            machine = record.read(found.path / record.MACHINE, record.Machine)
        except record.RecordError as error:
            raise UserError(f"{found.path}: {error}", "measure again: this record says nothing") from None
        if request.place != name:
            raise UserError(f"{found.path} is the record of {request.place}", "put it where it belongs")
        seconds = _read_runs(found, request)
        series += _series(found, request)
        places.append(_place(name, machine, seconds))
        machines[name] = machine
        requests.append(request)
        records.append(found)
    platforms = {request.platform for request in requests}
    if len(platforms) != 1:
        raise UserError(f"{directory} is of several platforms: {', '.join(sorted(platforms))}", "split it")
    return Measurement(
        platform=requests[0].platform,
        plan_sha256=requests[0].plan_sha256,
        evidence="hardware" if evidence.evidence(machines)[0] == evidence.HARDWARE else "emulated",
        places=tuple(places),
        runs=tuple(each for found in records for each in found.ran),
        series=tuple(series),
        findings=tuple(each for found in records for each in found.findings),
        absent=tuple(each for found in records for each in found.absent),
    )


def quantile(histogram: Mapping[int, int], samples: int, share: float) -> float | None:
    """The latency that `share` of all samples do not exceed; None where it lies beyond the histogram."""
    wanted, seen = math.ceil(share * samples), 0
    for latency in sorted(histogram):
        seen += histogram[latency]
        if seen >= wanted:
            return latency
    return None


def _place(name: str, machine: record.Machine, seconds: float) -> Place:
    return Place(
        name=name,
        virtualization=machine.virtualization or "unknown",
        hypervisor=machine.hypervisor,
        kernel_release=machine.kernel_release or "unknown",
        kernel_version=machine.kernel_version,
        cmdline=machine.cmdline,
        isolated=machine.isolated,
        nohz_full=machine.nohz_full,
        config_sha256=machine.config_sha256,
        timer_ns=machine.timer_ns,
        clocksource=machine.clocksource,
        cpu_model=machine.cpu_model,
        hostname=machine.hostname,
        seconds=round(seconds, 1),
    )


def _read_runs(found: _Record, request: record.Request) -> float:
    """Take in every run; the seconds from the first one's beginning to the last one's end."""
    stages = {stage.name: stage for stage in request.stages}
    runs: dict[str, list[record.Run]] = {name: [] for name in stages}
    directories = sorted(
        path
        for path in found.path.iterdir()
        if path.is_dir() and path.name[:1].isdigit() and not INTERRUPTED.fullmatch(path.name)
    )
    _check_end(found, directories)
    began = ended = 0
    for path in directories:
        try:
            run = record.read(path / record.RUN, record.Run)
        except record.RecordError as error:
            found.finding("run", "finished, with its run.json", f"{path.name}: {error}", False)
            continue
        if run.stage not in stages:
            found.finding("run", "of a stage of the request", f"{path.name}: {run.stage}", False)
            continue
        runs[run.stage].append(run)
        if run.refused:
            continue
        began = began or run.began.monotonic
        ended = max(ended, run.ended.monotonic)
        if damaged := _damaged(path, run):
            found.finding("files", "as run.json says", f"{path.name}: {damaged}", False, run.stage)
            continue
        try:
            _take(found, stages[run.stage], run, path, (run.began.monotonic - began) / 1e9)
        except (MalformedError, ValueError, KeyError, TypeError, AttributeError) as error:
            found.finding("latencies", "readable", f"{path.name}: {error}", False, run.stage)
    for name, stage in stages.items():
        _account(found, stage, runs[name])
    return (ended - began) / 1e9


def _check_end(found: _Record, directories: Sequence[Path]) -> None:
    """The record was ended, and names its runs by the sha256 of what they say."""
    wanted = "written when all runs were done, with the sha256 of every document"
    try:
        said = record.read(found.path / record.END, record.End)
    except record.RecordError as error:
        found.finding(record.END, wanted, str(error), False)
        return
    listed = {record.REQUEST: said.request, record.MACHINE: said.machine}
    listed |= {f"{name}/{record.RUN}": digest for name, digest in said.runs.items()}
    there = {record.REQUEST, record.MACHINE} | {f"{path.name}/{record.RUN}" for path in directories}
    wrong = sorted(name for name in {*listed, *there} if _digest(found.path / name) != listed.get(name))
    got = f"{len(said.runs)} runs" if not wrong else f"not as it says: {', '.join(wrong)}"
    found.finding(record.END, wanted, got, bool(said.runs) and not wrong)


def _digest(path: Path) -> str:
    return record.sha256(path) if path.is_file() else "missing"


def _damaged(path: Path, run: record.Run) -> str:
    """Which file of a run is not there or not as it was; nothing when all are."""
    for name, digest in sorted(run.files.items()):
        if not (path / name).is_file():
            return f"{name} is missing"
        if record.sha256(path / name) != digest:
            return f"{name} was changed"
    return ""


def _account(found: _Record, stage: record.Stage, runs: Sequence[record.Run]) -> None:
    """Note what became of a stage."""
    done = [run for run in runs if not run.refused]
    refused = "; ".join(dict.fromkeys(run.refused for run in runs if run.refused))
    if not done and not refused:
        refused = "it never ran"
    if refused:
        found.absent.append(f"{found.name}: {stage.name} ({stage.tool}): {refused}")
        if stage.required:
            found.finding("stage", "it runs", refused, False, stage.name)
    found.ran.append(
        Ran(
            place=found.name,
            stage=stage.name,
            tool=stage.tool,
            cpus=tuple(stage.cpus),
            loads=tuple(stage.loads),
            runs=len(done),
            seconds=round(sum(run.ended.monotonic - run.began.monotonic for run in done) / 1e9, 1),
            refused=refused,
        )
    )
    measured = {cpu for (name, _, cpu) in found.pieces if name == stage.name}
    if done and stage.tool in ("cyclictest", "irqlat"):
        got = ",".join(map(str, sorted(measured))) or "none"
        wanted = ",".join(map(str, stage.cpus))
        found.finding("measured CPUs", wanted, got, measured == set(stage.cpus) and got != "none", stage.name)


def _take(found: _Record, stage: record.Stage, run: record.Run, path: Path, at_s: float) -> None:
    """Add the latencies of one run; tools without histograms are told of and not drawn."""
    seconds = (run.ended.monotonic - run.began.monotonic) / 1e9
    if stage.tool == "cyclictest":
        data = parse_cyclictest((path / "cyclictest.json").read_text())
        for thread in data["thread"].values():
            histogram = {int(latency): count for latency, count in thread["histogram"].items() if count}
            block_seconds = min(seconds, max(stage.duration_s, 1))
            piece = _piece(thread["cpu"], histogram, thread["cycles"], thread, ())
            piece.blocks.append(_block(piece, at_s, block_seconds))
            found.pieces.setdefault((stage.name, "timer", thread["cpu"]), []).append(piece)
    elif stage.tool == "irqlat":
        data = parse_irqlat((path / "irqlat.json").read_text())
        for what in PARTS:
            part = data[what]
            histogram = {int(latency): count for latency, count in part["histogram"].items() if count}
            windows = [(window["at_s"], window[what]) for window in data["max_over_time"]]
            piece = _piece(data["cpu"], histogram, data["samples"], part, ())
            piece.blocks += _windows(windows, seconds, at_s, stage.interval_us)
            key: tuple[str, What, int] = (
                stage.name,
                "handler" if what == "handler" else "thread",
                data["cpu"],
            )
            found.pieces.setdefault(key, []).append(piece)


def _piece(
    cpu: int, histogram: dict[int, int], samples: int, said: Mapping[str, Any], blocks: Sequence[Block]
) -> _Piece:
    """Counts as a tool gave them, held against what it says of them itself."""
    least, average, greatest = (float(said[key]) for key in ("min", "avg", "max"))
    if type(samples) is not int or samples < 1:
        raise MalformedError(f"CPU {cpu}: {samples} samples")
    if not all(type(count) is int and count > 0 for count in histogram.values()):
        raise MalformedError(f"CPU {cpu}: a count that is none")
    if sum(histogram.values()) > samples:
        raise MalformedError(f"CPU {cpu}: more latencies in the histogram than samples")
    if not 0 <= least <= average <= greatest < math.inf:
        raise MalformedError(f"CPU {cpu}: minimum, average and maximum are {least}, {average}, {greatest}")
    if histogram and (max(histogram) > greatest or min(histogram) < math.floor(least)):
        raise MalformedError(f"CPU {cpu}: the histogram goes beyond minimum and maximum")
    return _Piece(cpu, histogram, samples, least, average, greatest, list(blocks))


def _block(piece: _Piece, at_s: float, seconds: float) -> Block:
    known = piece.samples >= ABOVE * 1000
    return Block(
        at_s=round(at_s, 3),
        seconds=round(seconds, 1),
        samples=piece.samples,
        max_us=piece.greatest,
        p999_us=quantile(piece.histogram, piece.samples, 0.999) if known else None,
    )


def _windows(
    windows: Sequence[tuple[float, float]], seconds: float, at_s: float, interval_us: int
) -> Iterator[Block]:
    """Blocks of whole seconds from the greatest latencies of short windows; what is left at the end is no block."""
    length = max(BLOCK_S, math.ceil(seconds / MOST_BLOCKS))
    greatest: dict[int, float] = {}
    for at, latency in windows:
        block = max(0, math.ceil(at / length - 1e-9) - 1)  # a window is told when it ends
        greatest[block] = max(greatest.get(block, 0.0), float(latency))
    last = max((at for at, _ in windows), default=0.0)
    for block, latency in sorted(greatest.items()):
        if (block + 1) * length <= last + 1e-6:
            yield Block(
                at_s=round(at_s + block * length, 3),
                seconds=float(length),
                samples=length * 1_000_000 // max(interval_us, 1),
                max_us=latency,
            )


def _series(found: _Record, request: record.Request) -> Iterator[Series]:
    stages = {stage.name: stage for stage in request.stages}
    order = {name: number for number, name in enumerate(stages)}
    for (name, what, cpu), pieces in sorted(
        found.pieces.items(), key=lambda item: (order[item[0][0]], item[0][1], item[0][2])
    ):
        stage = stages[name]
        histogram: Counter[int] = Counter()
        for piece in pieces:
            histogram.update(piece.histogram)
        samples = sum(piece.samples for piece in pieces)
        yield Series(
            place=found.name,
            stage=name,
            tool=stage.tool,
            what=what,
            cpu=cpu,
            runs_on=found.pins[cpu] if cpu < len(found.pins) else None,
            interval_us=stage.interval_us,
            priority=stage.priority,
            loads=tuple(stage.loads),
            segment_s=min(request.segment_s, stage.duration_s),
            samples=samples,
            overflows=samples - histogram.total(),
            histogram_us=stage.histogram_us,
            min_us=min(piece.least for piece in pieces),
            avg_us=round(sum(piece.average * piece.samples for piece in pieces) / samples, 3),
            p99_us=quantile(histogram, samples, 0.99),
            p999_us=quantile(histogram, samples, 0.999),
            max_us=max(piece.greatest for piece in pieces),
            histogram={str(latency): histogram[latency] for latency in sorted(histogram)},
            blocks=tuple(block for piece in pieces for block in piece.blocks),
        )


def even(blocks: Sequence[Block]) -> tuple[float, list[Block]]:
    """The middle length of the blocks, in seconds, and those that are about as long."""
    if not blocks:
        return 0.0, []
    length = median(block.seconds for block in blocks)
    near = [block for block in blocks if abs(block.seconds - length) <= TOLERANCE * length]
    return length, near
