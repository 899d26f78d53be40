"""What a measurement is held against: the requests, limits and the rest, as one JSON document.

Whoever asks for a measurement writes it, from recipes and plan; the verdict takes nothing of it from the measurement.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .reading import MalformedError, loads
from .record import TOOLS, RecordError, Request, decode

#: Raised when the meaning of a field changes.
SCHEMA = 1

HOST, GUEST = "host", "guest-"

#: Tools whose latencies are read and judged. What the others tell is recorded.
JUDGED = ("cyclictest", "irqlat")


class ExpectationsError(ValueError):
    """The expectations are missing, cut short or contradict themselves."""


@dataclass(frozen=True)
class Limit:
    """Latencies stay below these, microseconds; `source` is who says so."""

    max_us: float
    avg_us: float
    source: str


@dataclass(frozen=True)
class Expected:
    """What is expected of one place.

    limits    by tool
    unjudged  why a tool of JUDGED has no limit here, by tool
    """

    request: Request
    limits: dict[str, Limit]
    unjudged: dict[str, str]


@dataclass(frozen=True)
class Expectations:
    """What is expected of a measurement.

    places         by name, the host's among them
    load_required  whether every place must have been under load while something was measured
    load_shares    the least CPU time of a load, by its name, in CPUs
    minimum_s      a stage that is to be judged must be as long as this
    oldest_s       seconds since 1970: nothing may have been measured before
    max_age_s      nor longer ago than this, 0 for no such limit
    """

    platform: str
    places: dict[str, Expected]
    load_required: bool
    load_shares: dict[str, float]
    minimum_s: int
    oldest_s: int
    max_age_s: int


def load(path: Path) -> Expectations:
    """Read them; raises `ExpectationsError`."""
    try:
        return from_json(loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ExpectationsError(f"{path} cannot be read: {error}") from error
    except (MalformedError, ExpectationsError) as error:
        raise ExpectationsError(f"{path}: {error}") from error


def to_json(expectations: Expectations) -> dict[str, Any]:
    """As `load` reads them."""
    return {"schema": SCHEMA, **asdict(expectations)}


def from_json(content: Any) -> Expectations:
    """Expectations that do not contradict themselves; raises `ExpectationsError`."""
    fields = _fields(
        content,
        "expectations",
        schema=int,
        platform=str,
        places=dict,
        load_required=bool,
        load_shares=dict,
        minimum_s=int,
        oldest_s=int,
        max_age_s=int,
    )
    if fields.pop("schema") != SCHEMA:
        raise ExpectationsError(f"schema {content['schema']}, this program knows {SCHEMA}")
    fields["places"] = {name: _expected(place, name) for name, place in fields["places"].items()}
    fields["load_shares"] = {
        name: _positive(share, f"load_shares: {name}") for name, share in fields["load_shares"].items()
    }
    found = Expectations(**fields)
    _check(found)
    return found


def _expected(content: Any, place: str) -> Expected:
    fields = _fields(content, place, request=dict, limits=dict, unjudged=dict)
    try:
        request = decode(fields["request"], Request, f"{place}: request")
    except RecordError as error:
        raise ExpectationsError(str(error)) from error
    limits = {}
    for tool, limit in fields["limits"].items():
        where = f"{place}: limits: {tool}"
        said = _fields(limit, where, max_us=(int, float), avg_us=(int, float), source=str)
        limits[tool] = Limit(
            _positive(said["max_us"], where), _positive(said["avg_us"], where), _word(said["source"], where)
        )
    unjudged = {
        tool: _word(reason, f"{place}: unjudged: {tool}") for tool, reason in fields["unjudged"].items()
    }
    for tool in [*limits, *unjudged]:
        if tool not in JUDGED:
            raise ExpectationsError(f"{place}: nothing judges {tool}; what is judged: {', '.join(JUDGED)}")
    if both := sorted(set(limits) & set(unjudged)):
        raise ExpectationsError(f"{place}: {both[0]} has limits, and a reason to have none")
    return Expected(request, limits, unjudged)


def _check(wanted: Expectations) -> None:
    """Refuse what nothing could keep, or anything could."""
    if HOST not in wanted.places:
        raise ExpectationsError("the host is not among the places")
    if not wanted.platform:
        raise ExpectationsError("platform is empty")
    if wanted.minimum_s < 1 or wanted.oldest_s < 0 or wanted.max_age_s < 0:
        raise ExpectationsError("minimum_s is 1 or more, oldest_s and max_age_s are 0 or more")
    for name, place in wanted.places.items():
        request = place.request
        if name != HOST and not re.fullmatch(rf"{GUEST}[a-z0-9][a-z0-9.-]*", name):
            raise ExpectationsError(f"{name} is no place: it is {HOST} or {GUEST}NAME")
        if request.place != name or request.platform != wanted.platform:
            raise ExpectationsError(f"{name}: its request is for {request.place} of {request.platform}")
        if not re.fullmatch(r"[0-9a-f]{64}", request.plan_sha256):
            raise ExpectationsError(f"{name}: plan_sha256 is not 64 hex digits")
        if request.plan_sha256 != wanted.places[HOST].request.plan_sha256:
            raise ExpectationsError(f"{name}: plan_sha256 is not the host's")
        if not request.kernel_release or request.segment_s < 1:
            raise ExpectationsError(f"{name}: kernel_release is empty, or segment_s less than 1")
        for what in ("isolated", "housekeeping"):
            _cpus(getattr(request, what), f"{name}: {what}")
        if set(request.isolated) & set(request.housekeeping):
            raise ExpectationsError(f"{name}: a CPU is both isolated and housekeeping")
        if not request.stages:
            raise ExpectationsError(f"{name}: nothing is to be measured")
        if len({stage.name for stage in request.stages}) != len(request.stages):
            raise ExpectationsError(f"{name}: two stages have one name")
        _check_stages(name, request, wanted.load_shares)


def _check_stages(name: str, request: Request, shares: Mapping[str, float]) -> None:
    for stage in request.stages:
        where = f"{name}: {stage.name}"
        if stage.tool not in TOOLS:
            raise ExpectationsError(f"{where}: there is no tool {stage.tool}")
        if stage.duration_s < 1:
            raise ExpectationsError(f"{where}: duration_s is less than 1")
        if len(set(stage.loads)) != len(stage.loads):
            raise ExpectationsError(f"{where}: a load is there twice")
        for unknown in sorted(set(stage.loads) - set(shares)):
            raise ExpectationsError(f"{where}: load_shares does not say how much CPU time {unknown} takes")
        if stage.tool == "load" and not stage.loads:
            raise ExpectationsError(f"{where}: it names no load")
        if stage.tool in JUDGED:
            _cpus(stage.cpus, f"{where}: cpus")
            if not set(stage.cpus) <= set(request.isolated):
                raise ExpectationsError(f"{where}: a CPU is not isolated")
            if min(stage.priority, stage.interval_us, stage.histogram_us) < 1:
                raise ExpectationsError(f"{where}: priority, interval_us and histogram_us are 1 or more")
        if stage.tool == "irqlat" and len(stage.cpus) != 1:
            raise ExpectationsError(f"{where}: irqlat measures one CPU")


def _fields(content: Any, where: str, **kinds: Any) -> dict[str, Any]:
    """The fields of an object, all there, none else, each of its kind."""
    if not isinstance(content, dict):
        raise ExpectationsError(f"{where}: not an object")
    for missing in sorted(set(kinds) - set(content)):
        raise ExpectationsError(f"{where}: {missing} is missing")
    for unknown in sorted(set(content) - set(kinds)):
        raise ExpectationsError(f"{where}: {unknown} is not known")
    for name, kind in kinds.items():
        if type(content[name]) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise ExpectationsError(f"{where}: {name} is {content[name]!r}")
    return dict(content)


def _positive(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ExpectationsError(f"{where}: {value!r} is not a number above 0")
    return float(value)


def _word(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ExpectationsError(f"{where}: it does not say why, or who says so")
    return value


def _cpus(cpus: list[int], where: str) -> None:
    if not cpus or cpus != sorted(set(cpus)) or cpus[0] < 0:
        raise ExpectationsError(f"{where}: {cpus} are not CPU numbers, ascending")
