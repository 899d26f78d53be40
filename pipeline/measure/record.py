"""The record of a measurement: the directory that `virt-rt-measure` leaves, and its documents.

A measurement is a directory with one record for each place that took part: `host/`, and `guest-<name>/` for each
guest. A record is

    request.json        what was asked for; written first, never changed
    machine.json        what it ran on, asked when it began
    <NNN>-<tool>/       one run of a tool, NNN from 001 in the order of the request
        stdout, stderr  as they came; further files of the tool beside them (cyclictest.json, irqlat.json)
        run.json        what happened; written last, so that a run without it was interrupted
    end.json            sha256 of request.json, machine.json and each run's run.json; written when all are done

All times are nanoseconds, all latencies microseconds, unless a name says otherwise. Nothing here judges.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

#: Raised when the meaning of a field changes.
SCHEMA = 1

REQUEST, MACHINE, RUN, END = "request.json", "machine.json", "run.json", "end.json"

#: What a stage can run. `load` only makes load: for a place that disturbs while another one is measured. `command` is a
#: user's own test of a driver.
TOOLS = ("cyclictest", "irqlat", "timerlat", "osnoise", "hwlat", "oslat", "load", "command")

Document = TypeVar("Document")


class RecordError(ValueError):
    """A document of a record is missing, cut short or not of its form."""


@dataclass(frozen=True)
class Stage:
    """One thing to measure, by one run for each segment of it.

    name          its tool's, or another one where a tool is used twice; unique within a request
    tool          one of TOOLS
    cpus          which CPUs are measured, ascending
    priority      SCHED_FIFO priority of the measuring threads, 0 for tools without one
    interval_us   period of the measuring threads
    duration_s    of the whole stage
    histogram_us  latencies below this are counted one by one; others are overflows
    loads         names of loads that run meanwhile on the housekeeping CPUs (`hackbench`, `stress`, `disk`)
    argv          for `command`: program and arguments
    required      whether the measurement fails without it, or only tells that it is not there
    """

    name: str
    tool: str
    cpus: list[int]
    priority: int
    interval_us: int
    duration_s: int
    histogram_us: int
    loads: list[str]
    argv: list[str]
    required: bool = True


@dataclass(frozen=True)
class Request:
    """What was asked of a place.

    place           `host`, or `guest-<name>`
    kernel_release  the `uname -r` that was proven
    plan_sha256     of the host's plan.json as installed (64 hex digits)
    isolated, housekeeping  CPUs of this place, ascending (a guest's: its vCPUs)
    segment_s       longest run of a tool; a stage of more has several, and loses one at most when interrupted
    """

    place: str
    platform: str
    kernel_release: str
    plan_sha256: str
    isolated: list[int]
    housekeeping: list[int]
    segment_s: int
    stages: list[Stage]
    schema: int = SCHEMA


@dataclass(frozen=True)
class Machine:
    """What a place is, as it said itself.

    virtualization  of systemd-detect-virt: `none` on hardware; `kvm`, `qemu` and others in a machine
    hypervisor      whether /proc/cpuinfo has the flag `hypervisor`
    kernel_version  `uname -v`
    plan_sha256     of the plan it has; empty in a guest, which has none
    config_sha256   of /proc/config.gz, unpacked
    timer_ns        resolution of CLOCK_MONOTONIC timers (clock_getres): 1 with high-resolution timers, a tick without
    clocksource     the kernel's current one
    cpu_model       of /proc/cpuinfo
    tsc_khz         0 when unknown
    """

    virtualization: str
    hypervisor: bool
    kernel_release: str
    kernel_version: str
    cmdline: str
    isolated: str
    nohz_full: str
    plan_sha256: str
    config_sha256: str
    timer_ns: int
    clocksource: str
    cpu_model: str
    boot_id: str
    hostname: str
    schema: int = SCHEMA


@dataclass(frozen=True)
class Moment:
    """When: three clocks, so that a jump of one shows (clock_gettime(2)); `realtime` alone can be set."""

    realtime: int
    monotonic: int
    boottime: int


@dataclass(frozen=True)
class Thread:
    """A thread of a tool while it measured, as the kernel scheduled it; `policy` as in sched(7): 1 is SCHED_FIFO."""

    tid: int
    name: str
    policy: int
    priority: int
    cpus: list[int]


@dataclass(frozen=True)
class Load:
    """A load that ran beside a tool: CPU time it took, and whether it lived until the tool's end."""

    name: str
    argv: list[str]
    cpu_s: float
    alive: bool
    cpus: list[int]


@dataclass(frozen=True)
class Run:
    """One run of a tool.

    stage, segment  which part of the request it was; segments count from 0
    status          exit status of the tool; minus the signal's number when one ended it
    refused         why it was not started, in which case nothing else is there; empty when it was
    threads         the measuring threads, seen in the middle of the run
    loads           one entry for each load of the stage
    files           sha256 of each file beside run.json
    """

    stage: str
    tool: str
    segment: int
    argv: list[str]
    boot_id: str
    began: Moment
    ended: Moment
    status: int
    refused: str
    threads: list[Thread]
    loads: list[Load]
    files: dict[str, str]
    schema: int = SCHEMA


@dataclass(frozen=True)
class End:
    """What a whole record is made of: sha256 of its documents; `runs` those of run.json by the name of its run."""

    request: str
    machine: str
    runs: dict[str, str]
    schema: int = SCHEMA


def write(path: Path, document: object) -> None:
    """Write a document of a record whole or not at all."""
    write_json(path, asdict(document))  # type: ignore[call-overload]


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read(path: Path, kind: type[Document]) -> Document:
    """A document of a record; raises `RecordError` when it is missing, cut short or has other fields."""
    return decode(read_json(path), kind, str(path))


def read_json(path: Path) -> Any:
    """JSON; raises `RecordError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path.name} cannot be read: {error}") from error
    if not text:
        raise RecordError(f"{path.name} is empty")
    try:
        return json.loads(text)
    except ValueError as error:
        raise RecordError(f"{path.name} is no JSON, or cut short: {error}") from error


def decode(content: Any, kind: type[Document], where: str) -> Document:
    """A dataclass of this module from what JSON has; raises `RecordError` that names what is wrong."""
    return kind(**_decode(content, kind, where))


def sha256(path: Path) -> str:
    """64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


#: What is in a field that is neither text, number nor truth value, by class and field.
_NESTED: dict[type, dict[str, Any]] = {
    Request: {"stages": Stage},
    Run: {"began": Moment, "ended": Moment, "threads": Thread, "loads": Load},
}
_PLAIN = {"str": str, "int": int, "float": float, "bool": bool}
_LISTS = {"list[int]": int, "list[str]": str}


def _decode(content: Any, kind: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise RecordError(f"{where}: not an object")
    known = {field.name: field for field in fields(kind)}
    for missing in sorted(set(known) - set(content)):
        raise RecordError(f"{where}: {missing} is missing")
    for unknown in sorted(set(content) - set(known)):
        raise RecordError(f"{where}: {unknown} is not known")
    values = {}
    for name, field in known.items():
        values[name] = _field(
            content[name], str(field.type), _NESTED.get(kind, {}).get(name), f"{where}: {name}"
        )
    if "schema" in values and values["schema"] != SCHEMA:
        raise RecordError(f"{where}: schema {values['schema']}, this program knows {SCHEMA}")
    return values


def _field(value: Any, spelled: str, nested: Any, where: str) -> Any:
    if nested is not None and spelled.startswith("list["):
        if not isinstance(value, list):
            raise RecordError(f"{where} is not a list")
        return [nested(**_decode(each, nested, f"{where}[{index}]")) for index, each in enumerate(value)]
    if nested is not None:
        return nested(**_decode(value, nested, where))
    if spelled in _PLAIN:
        return _plain(value, _PLAIN[spelled], where)
    if spelled in _LISTS:
        if not isinstance(value, list):
            raise RecordError(f"{where} is not a list")
        return [_plain(each, _LISTS[spelled], where) for each in value]
    # what is left is dict[str, str]
    if not isinstance(value, dict):
        raise RecordError(f"{where} is not an object")
    return {name: _plain(each, str, where) for name, each in value.items()}


def _plain(value: Any, kind: type, where: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # a truth value is no number
        raise RecordError(f"{where}: {value!r} is not {kind.__name__}")
    return value
