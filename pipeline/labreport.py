"""The report of the lab: what the proofs and a measurement say, judged level by level.

A document that is missing, empty or says something else than its form allows makes its level red, with the reason;
a level that nothing was asked of is *not proven*, which is not green.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from pipeline.errors import UserError
from pipeline.labcomparison import Side, baseline
from pipeline.labrecord import (
    RECORD,
    Baseline,
    Event,
    Evidence,
    Finding,
    Kernel,
    Level,
    Limits,
    Package,
    Report,
    load,
)
from pipeline.measure.finding import LIMIT
from pipeline.measure.verdict import FAILED, PASSED
from pipeline.measure.verdict import FILE as VERDICT
from pipeline.measurement import Measurement, Pins, read
from pipeline.releaserecord import EMULATED

#: What traces say of late vCPUs; kept beside the measurement, as the gate's verdict is.
ATTRIBUTION = "attribution.json"
#: Of the form of all these documents.
SCHEMA = 1
#: How many findings a reason names.
NAMED = 3


class _Events(msgspec.Struct, frozen=True, kw_only=True):
    """What is needed of an attribution.json."""

    schema: Literal[1]
    events: tuple[dict[str, Any], ...]


@dataclass(slots=True)
class Given:
    """All that a report is made of; what is None was not asked for, and is told as not proven, with `why` by level."""

    platform: str
    structure: Sequence[Finding] | None = None
    boot: bytes | None = None
    stack: bytes | None = None
    labhost: bytes | None = None
    measurement: Path | None = None
    verdict: Mapping[str, Any] | None = None
    attribution: bytes | None = None
    limits: Limits | None = None
    pins: Pins | None = None
    kernels: Sequence[Kernel] = ()
    packages: Sequence[Package] = ()
    baseline: Path | None = None
    why: Mapping[str, str] = field(default_factory=dict)
    more_not_proven: Sequence[str] = ()


def report(given: Given) -> Report:
    """Judge everything; `UserError` where there is nothing that could be judged."""
    measured = read(given.measurement, given.pins) if given.measurement is not None else None
    if measured is not None and measured.platform != given.platform:
        raise UserError(
            f"the measurement is of {measured.platform}, not of {given.platform}", "measure this platform"
        )
    evidence: Evidence = "none" if measured is None else _evidence(measured, given.verdict)
    levels = (
        _of("structure", given.structure, given),
        _of("boot", None if given.boot is None else list(_proof("boot", given.boot, given.platform)), given),
        _of("stack", _stack(given), given),
        _latency(measured, evidence, given),
    )
    events, broken = _attribution(given.attribution)
    if broken is not None:
        levels = (*levels[:3], _failed("latency", [*levels[3].findings, broken]))
    verdicts = {"hardware": levels[3].verdict, "emulated": EMULATED, "none": "not measured"}
    made = Report(
        platform=given.platform,
        ok=all(level.verdict != "failed" for level in levels),
        evidence=evidence,
        latency_verdict=verdicts[evidence],
        levels=levels,
        limits=given.limits,
        kernels=tuple(given.kernels),
        packages=tuple(sorted(given.packages, key=lambda package: package.name)),
        plan_sha256=measured.plan_sha256 if measured else "",
        places=measured.places if measured else (),
        runs=measured.runs if measured else (),
        series=measured.series if measured else (),
        events=events,
        not_proven=(),
        baseline=_baseline(given, measured, evidence),
    )
    return msgspec.structs.replace(made, not_proven=tuple(_not_proven(made, given, measured)))


def red(report: Report) -> list[str]:
    """A line for each red finding, level by level."""
    return [
        f"{level.name}: {' '.join(filter(None, (each.place, each.stage, each.name)))}: wanted {each.wanted}; "
        f"got {each.got}"
        for level in report.levels
        for each in level.findings
        if not each.ok
    ]


# Levels ---------------------------------------------------------------------------------------


def _of(
    name: Literal["structure", "boot", "stack"], findings: Sequence[Finding] | None, given: Given
) -> Level:
    if findings is None:
        why = given.why.get(name, "nothing here looks at it")
        return Level(name=name, verdict="not proven", reason=why, findings=())
    if not findings:
        findings = [Finding(name=name, wanted="findings", got="none", ok=False)]
    if any(not each.ok for each in findings):
        return _failed(name, findings)
    return Level(
        name=name,
        verdict="passed",
        reason=f"all of {len(findings)} findings are fine",
        findings=tuple(findings),
    )


def _failed(name: Literal["structure", "boot", "stack", "latency"], findings: Sequence[Finding]) -> Level:
    wrong = [each for each in findings if not each.ok]
    named = "; ".join(
        f"{' '.join(filter(None, (each.place, each.stage, each.name)))}: {each.got}" for each in wrong[:NAMED]
    )
    more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    # red first, otherwise as given
    ordered = sorted(findings, key=lambda each: each.ok)
    return Level(name=name, verdict="failed", reason=f"{named}{more}", findings=tuple(ordered))


def finding(data: object, where: str, place: str = "") -> Finding:
    """A finding of a proof's document; what has another form is a red one that says so."""
    try:
        if not isinstance(data, dict):
            raise TypeError(f"not an object: {data!r}")
        name, wanted, got, ok = (data[key] for key in ("name", "wanted", "got", "ok"))
        if type(ok) is not bool or not all(isinstance(text, str) for text in (name, wanted, got)) or not name:
            raise TypeError(f"not of its form: {data!r}")
        return Finding(
            name=name,
            wanted=wanted,
            got=got,
            ok=ok,
            place=str(data.get("place") or place),
            stage=str(data.get("stage") or ""),
        )
    except (KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"[:200]
        return Finding(name=where, wanted="findings with name, wanted, got and ok", got=got, ok=False)


def _proof(name: str, data: bytes, platform: str) -> Iterator[Finding]:
    """Findings of boot.json or stack.json; its form and its own verdict are findings, too."""
    where = f"{name}.json"

    def wrong(wanted: str, got: str) -> Finding:
        return Finding(name=where, wanted=wanted, got=got, ok=False)

    try:
        document = json.loads(data)
    except ValueError as error:
        yield wrong("JSON", f"{'empty' if not data else 'cut short, or no JSON'}: {error}")
        return
    if not isinstance(document, dict):
        yield wrong("an object", type(document).__name__)
        return
    if document.get("schema") != SCHEMA:
        yield wrong(f"schema {SCHEMA}", f"{document.get('schema')!r}")
    if document.get("platform") != platform:
        yield wrong(f"the proof of {platform}", f"{document.get('platform')!r}")
    # of an installation nothing is measured
    if (
        name != "labhost"
        and document.get("evidence") == "emulated"
        and document.get("latency_verdict") != EMULATED
    ):
        yield wrong(EMULATED, f"{document.get('latency_verdict')!r}")
    found = list(_boots(document) if name == "boot" else _listed(document, where, ""))
    yield from found
    fine = bool(found) and all(each.ok for each in found)
    if document.get("ok") is not fine:
        yield wrong(f"ok: {fine}, as its findings are", f"ok: {document.get('ok')!r}")


def _boots(document: Mapping[str, Any]) -> Iterator[Finding]:
    guests = document.get("guests")
    if not isinstance(guests, dict) or not guests:
        yield Finding(name="boot.json", wanted="guests", got=f"{guests!r}"[:80], ok=False)
        return
    for guest, said in sorted(guests.items()):
        boots = said.get("boots") if isinstance(said, dict) else None
        ways = sorted(boots) if isinstance(boots, dict) else []
        if ways != ["inside", "outside"]:
            got = ", ".join(ways) or "none"
            yield Finding(name="boots", wanted="inside, outside", got=got, ok=False, place=f"guest-{guest}")
        for way in ways:
            for each in _listed(boots[way] if boots else {}, "boot.json", f"guest-{guest}"):
                yield msgspec.structs.replace(each, stage=f"kernel {way}")


def _listed(part: object, where: str, place: str) -> Iterator[Finding]:
    listed = part.get("findings") if isinstance(part, dict) else None
    if not isinstance(listed, list) or not listed:
        yield Finding(name=where, wanted="findings", got="none", ok=False, place=place)
        return
    for each in listed:
        yield finding(each, where, place)


def _stack(given: Given) -> list[Finding] | None:
    """Findings of how the host came to be, where that was told, and of what it did."""
    if given.stack is None:
        return None
    made = [] if given.labhost is None else list(_proof("labhost", given.labhost, given.platform))
    return [
        *(msgspec.structs.replace(each, stage="installed") for each in made),
        *_proof("stack", given.stack, given.platform),
    ]


# Latency --------------------------------------------------------------------------------------


def _evidence(measured: Measurement, verdict: Mapping[str, Any] | None) -> Evidence:
    """The worse of what the machine says of itself and what the gate made of it."""
    said = (verdict or {}).get("evidence")
    return "hardware" if measured.evidence == said == "hardware" else "emulated"


def _latency(measured: Measurement | None, evidence: Evidence, given: Given) -> Level:
    if measured is None:
        if given.verdict is not None:
            wrong = Finding(name=VERDICT, wanted="a measurement that it is about", got="none", ok=False)
            return _failed("latency", [wrong])
        why = given.why.get("latency", "nothing was measured")
        return Level(name="latency", verdict="not proven", reason=why, findings=())
    findings = [*_verdict(measured, given.verdict), *measured.findings]
    if any(not each.ok for each in findings):
        return _failed("latency", findings)
    if evidence == "emulated":
        reason = f"{EMULATED}; the protocol was kept in all of {len(findings)} findings"
        return Level(name="latency", verdict="not proven", reason=reason, findings=tuple(findings))
    reason = f"all of {len(findings)} findings are fine, on real hardware"
    return Level(name="latency", verdict="passed", reason=reason, findings=tuple(findings))


def _verdict(measured: Measurement, verdict: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Findings of the gate, and whether its verdict follows from them."""

    def wrong(wanted: str, got: object) -> Finding:
        return Finding(name=VERDICT, wanted=wanted, got=f"{got!r}"[:200], ok=False)

    if verdict is None:
        yield Finding(name=VERDICT, wanted="the gate's verdict", got="none", ok=False)
        return
    if verdict.get("schema") != SCHEMA:
        yield wrong(f"schema {SCHEMA}", verdict.get("schema"))
    said, worth = verdict.get("evidence"), verdict.get("latency_verdict")
    listed = list(_listed(verdict, VERDICT, ""))
    if said == "emulated":
        listed = [
            _unjudged(each, raw) for each, raw in zip(listed, verdict.get("findings") or [], strict=False)
        ] or listed
    yield from listed
    if said not in ("hardware", "emulated"):
        yield wrong("evidence: hardware or emulated", said)
    if said == "hardware" and measured.evidence != "hardware":
        host = measured.places[0]
        yield wrong(
            f"emulated: the host says {host.virtualization}, {host.cpu_model or 'no CPU model'}", said
        )
    if verdict.get("protocol_ok") is not True:
        yield wrong("protocol_ok: true", verdict.get("protocol_ok"))
    if said == "emulated" and worth != EMULATED:
        yield wrong(EMULATED, worth)
    fine = all(each.ok for each in listed)
    if said == "hardware" and worth != (PASSED if fine else FAILED):
        yield wrong(f"latency_verdict: {PASSED if fine else FAILED}, as its findings are", worth)
    if said == "hardware" and not measured.series:
        yield wrong("latencies", "none")


def _unjudged(found: Finding, raw: object) -> Finding:
    """An emulation breaks no threshold, and keeps none."""
    if isinstance(raw, dict) and raw.get("kind") == LIMIT and not found.ok:
        return msgspec.structs.replace(found, ok=True, got=f"{found.got} (not judged: emulated)")
    return found


def _attribution(data: bytes | None) -> tuple[tuple[Event, ...], Finding | None]:
    """What traces say of late vCPUs; a finding when the document cannot be read."""
    if data is None:
        return (), None
    try:
        told = msgspec.json.decode(data, type=_Events)
        names = Event.__struct_fields__
        kept = [{key: each[key] for key in each if key in names} for each in told.events]
        return tuple(msgspec.convert(each, Event) for each in kept), None
    except msgspec.DecodeError as error:
        got = f"{'empty' if not data else 'not of its form'}: {error}"
        return (), Finding(name=ATTRIBUTION, wanted="events", got=got, ok=False)


def _baseline(given: Given, measured: Measurement | None, evidence: Evidence) -> Baseline | None:
    if given.baseline is None:
        return None
    if measured is None:
        raise UserError("there are no latencies to compare", "leave the baseline out")
    if given.baseline.is_dir() and not (given.baseline / "host").is_dir():
        before_report = load(given.baseline / RECORD)
        before = Side(before_report.evidence, before_report.places, before_report.series)
    elif given.baseline.is_dir():
        other = read(given.baseline, given.pins)
        before = Side(other.evidence, other.places, other.series)
        if unsound := [each for each in other.findings if not each.ok]:
            raise UserError(
                f"the baseline {given.baseline} is not whole: {unsound[0].place}: {unsound[0].got}",
                "give a measurement that ended, or a report of it",
            )
    else:
        before_report = load(given.baseline)
        before = Side(before_report.evidence, before_report.places, before_report.series)
    if not before.series:
        raise UserError(f"the baseline {given.baseline} has no latencies", "give one that does")
    return baseline(Side(evidence, measured.places, measured.series), before, str(given.baseline))


# What was not proven --------------------------------------------------------------------------


def _not_proven(made: Report, given: Given, measured: Measurement | None) -> Iterator[str]:
    for level in made.levels:
        if level.verdict == "failed":
            yield f"{level.name}: it failed"
        elif level.verdict == "not proven":
            yield f"{level.name}: {level.reason}"
    emulated = [name for name in ("boot", "stack") if _emulated(getattr(given, name))]
    if emulated or made.emulated:
        yield (
            "latency on hardware: what ran here was emulated, and its times are those of the emulation, not of any "
            "machine"
        )
        yield (
            "the platform's own CPUs, sockets, caches and NUMA nodes: the emulated board has others, so that placing "
            "is shown by number, and not by its effect"
        )
        yield "firmware settings, system management interrupts, turbo, sleep states, frequency: emulation has none"
        yield "the platform's own devices and their drivers: the emulated board has others"
    if "stack" in emulated or made.emulated:
        yield "KVM on Intel (VMX, posted interrupts): the emulated host has a CPU of AMD"
    if measured is not None:
        yield from (f"not measured: {absent}" for absent in measured.absent)
        measured_tools = {run.tool for run in made.runs if run.runs}
        if "irqlat" not in measured_tools:
            yield "latency of a device's interrupts: irqlat did not run"
        if not any(place.name != "host" for place in made.places):
            yield "latency in a guest: only the host was measured"
    if made.limits is None and made.evidence == "hardware":
        yield "the platform's own thresholds: its recipe has no [limits]"
    yield from given.more_not_proven


def _emulated(data: bytes | None) -> bool:
    try:
        return bool(data) and json.loads(data or b"").get("evidence") == "emulated"
    except (ValueError, AttributeError):
        return False
