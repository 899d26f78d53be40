"""A request as it was handed in: read, held against what can be asked, and cut into runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import loads, record
from .machineinfo import cpulist
from .problems import MeasureError

#: Tools whose measuring threads must have a real-time priority.
REALTIME = ("cyclictest", "irqlat")
#: Tools that measure CPUs; the others make load, or are a user's.
ON_CPUS = ("cyclictest", "irqlat", "timerlat", "osnoise", "hwlat", "oslat")
#: Tools that are not cut into segments: a load without gaps, and a test that decides itself what it does.
WHOLE = ("load", "command")


class Planned(NamedTuple):
    """One run that a request means; `name` is its directory."""

    name: str
    stage: record.Stage
    segment: int
    seconds: int


def load(path: Path) -> record.Request:
    """The request in a file; raises `MeasureError` for what is missing, cut short or cannot be."""
    try:
        request = record.read(path, record.Request)
    except record.RecordError as error:
        raise MeasureError(f"the request {path}: {error}", "docs/measuring.md shows one") from None
    if said := _wrong(request):
        raise MeasureError(f"the request {path}: {said}", "docs/measuring.md says what there may be")
    return request


def planned(request: record.Request) -> list[Planned]:
    """Every run of a request, in order; the same list for the same request."""
    pieces: list[tuple[record.Stage, int, int]] = []
    for stage in request.stages:
        length = stage.duration_s if stage.tool in WHOLE else request.segment_s
        for segment, start in enumerate(range(0, stage.duration_s, length)):
            pieces.append((stage, segment, min(length, stage.duration_s - start)))
    return [
        Planned(f"{number:03}-{stage.tool}", stage, segment, seconds)
        for number, (stage, segment, seconds) in enumerate(pieces, 1)
    ]


def _wrong(request: record.Request) -> str:
    if not re.fullmatch(r"host|guest-[a-z0-9][a-z0-9-]*", request.place):
        return f"place: {request.place} is neither host nor guest-<name>"
    if not request.kernel_release:
        return "kernel_release is empty"
    if not re.fullmatch(r"[0-9a-f]{64}", request.plan_sha256):
        return "plan_sha256 is not 64 hex digits"
    if request.segment_s < 1:
        return f"segment_s: {request.segment_s} is no time"
    for name, cpus in (("isolated", request.isolated), ("housekeeping", request.housekeeping)):
        if said := _wrong_cpus(cpus):
            return f"{name}: {said}"
    if not request.housekeeping:
        return "housekeeping is empty: loads and the tools' own threads need a CPU"
    if both := set(request.isolated) & set(request.housekeeping):
        return f"CPU {min(both)} is isolated and keeps house"
    if not request.stages:
        return "stages is empty: nothing is to be measured"
    names = [stage.name for stage in request.stages]
    for index, stage in enumerate(request.stages):
        if said := _wrong_stage(stage) or ("its name is used twice" if names.count(stage.name) > 1 else ""):
            return f"stages[{index}] {stage.name}: {said}"
    return ""


def _wrong_stage(stage: record.Stage) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", stage.name):
        return "its name is not of lower-case letters, digits and '-'"
    if stage.tool not in record.TOOLS:
        return f"there is no tool {stage.tool}; there are {', '.join(record.TOOLS)}"
    if said := _wrong_cpus(stage.cpus):
        return f"cpus: {said}"
    if (stage.tool in ON_CPUS) != bool(stage.cpus):
        return (
            f"{stage.tool} measures CPUs: name them" if not stage.cpus else f"{stage.tool} measures no CPUs"
        )
    if stage.tool == "irqlat" and len(stage.cpus) != 1:
        return f"irqlat measures one CPU at a time, not {cpulist(stage.cpus)}: write a stage for each"
    if not 0 <= stage.priority <= 99 or (stage.tool in REALTIME and not stage.priority):
        return f"priority: {stage.priority} is no priority for {stage.tool}"
    if stage.duration_s < 1:
        return f"duration_s: {stage.duration_s} is no time"
    if stage.tool in (*REALTIME, "timerlat") and stage.interval_us < 1:
        return f"interval_us: {stage.interval_us} is no period"
    if stage.tool in (*REALTIME, "timerlat") and stage.histogram_us < 1:
        return f"histogram_us: {stage.histogram_us} is no histogram"
    if unknown := [name for name in stage.loads if name not in loads.NAMES]:
        return f"there is no load {unknown[0]}; there are {', '.join(loads.NAMES)}"
    if len(set(stage.loads)) != len(stage.loads):
        return "a load is named twice"
    if stage.tool == "load" and not stage.loads:
        return "no load is named"
    if stage.tool == "command" and not stage.argv:
        return "argv is empty"
    if stage.argv and stage.tool not in ("command", "irqlat"):
        return f"argv is for command and irqlat, not for {stage.tool}"
    return ""


def _wrong_cpus(cpus: Sequence[int]) -> str:
    if any(cpu < 0 for cpu in cpus) or list(cpus) != sorted(set(cpus)):
        return f"{list(cpus)} is not ascending"
    return ""
