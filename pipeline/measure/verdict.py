"""The verdict on a measurement: whether it was made as asked, and whether its latencies are within the limits.

It reads a measurement and nothing of the machine it runs on. It fails closed: what is missing, empty, cut short,
changed, old or from elsewhere is a finding that is not fine. Latencies of emulated machines neither pass nor fail.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .evidence import EMULATED, evidence
from .expectations import GUEST, HOST, Expectations, ExpectationsError, load
from .finding import LIMIT, PROTOCOL, Finding, Findings
from .placecheck import Place, examine, machine_of
from .problems import MeasureError
from .record import write_json
from .runcheck import Latencies

#: Raised when the meaning of a field of verdict.json changes.
SCHEMA = 1

FILE = "verdict.json"

PASSED, FAILED, NO_EVIDENCE = "passed", "failed", "emulated: not evidence of latency"

#: Of the time in which a guest is measured so much may be without the host's load: clocks of the two differ a little.
UNLOADED_NS, UNLOADED_SHARE = 2_000_000_000, 0.01


@dataclass(frozen=True)
class Verdict:
    """What a measurement shows.

    evidence     HARDWARE or EMULATED; doubts are why not the former
    latency      PASSED, FAILED or NO_EVIDENCE
    protocol_ok  whether it was made as asked, whatever its latencies
    latencies    of stages that can be trusted, by place, stage and CPU
    """

    evidence: str
    doubts: list[str]
    latency: str
    protocol_ok: bool
    findings: list[Finding]
    latencies: dict[str, dict[str, Latencies]]

    def to_json(self, expectations: Expectations) -> dict[str, Any]:
        """As verdict.json has it."""
        return {
            "schema": SCHEMA,
            "platform": expectations.platform,
            "evidence": self.evidence,
            "doubts": self.doubts,
            "latency_verdict": self.latency,
            "protocol_ok": self.protocol_ok,
            "thresholds": {
                name: {
                    "limits": {tool: asdict(limit) for tool, limit in place.limits.items()},
                    "unjudged": place.unjudged,
                }
                for name, place in expectations.places.items()
            },
            "latencies_us": self.latencies,
            "findings": [asdict(finding) for finding in self.findings],
        }


def judge(directory: Path, expectations: Expectations, now_s: int) -> Verdict:
    """Judge a measurement; `now_s` is when, in seconds since 1970."""
    machines = {name: machine_of(directory / name) for name in expectations.places}
    worth, doubts = evidence(machines)
    hardware = worth != EMULATED
    whole = Findings("")
    whole.tell(
        "evidence",
        "told, and in doubt emulated",
        worth if hardware else f"{worth}: {'; '.join(doubts)}",
        True,
    )
    _check_places(whole, directory, expectations)
    places = []
    for name, expected in expectations.places.items():
        place = Place(name, directory / name, expected, machines[name], Findings(name))
        examine(place, expectations, now_s, hardware)
        places.append(place)
    _check_cover(places, expectations)
    if hardware:
        judged = [f"{place.name} {stage}" for place in places for stage in place.judged]
        whole.tell("judged", "something", ", ".join(judged) or "nothing", bool(judged), kind=LIMIT)
    findings = [*whole.all, *(finding for place in places for finding in place.findings.all)]
    protocol_ok = all(finding.ok for finding in findings if finding.kind == PROTOCOL)
    if None in machines.values():
        latency = FAILED  # it is not known what was measured
    elif not hardware:
        latency = NO_EVIDENCE
    else:
        latency = PASSED if all(finding.ok for finding in findings) else FAILED
    return Verdict(
        evidence=worth,
        doubts=doubts,
        latency=latency,
        protocol_ok=protocol_ok,
        findings=findings,
        latencies={place.name: place.latencies for place in places},
    )


def _check_places(found: Findings, directory: Path, expectations: Expectations) -> None:
    try:
        there = {
            path.name
            for path in directory.iterdir()
            if path.is_dir() and (path.name == HOST or path.name.startswith(GUEST))
        }
    except OSError as error:
        found.tell("places", ", ".join(expectations.places), f"{directory}: {error.strerror}", False)
        return
    wanted = set(expectations.places)
    found.tell("places", ", ".join(sorted(wanted)), ", ".join(sorted(there)) or "none", there == wanted)


def _check_cover(places: list[Place], expectations: Expectations) -> None:
    """While a guest was measured, the host was under load."""
    loaded = [
        (ran.run.began.realtime, ran.run.ended.realtime)
        for place in places
        if place.name == HOST
        for ran in place.runs
        if ran.run.tool == "load" and not ran.run.refused and not ran.run.status
    ]
    for place in places:
        if place.name == HOST:
            continue
        if not expectations.load_required:
            place.findings.tell("load of the host", "none was asked for", "not judged", True)
            continue
        bare = {
            ran.path.name: uncovered(ran.run.began.realtime, ran.run.ended.realtime, loaded)
            for ran in place.runs
            if ran.run.tool not in ("load", "command") and not ran.run.refused
        }
        lengths = {ran.path.name: ran.run.ended.realtime - ran.run.began.realtime for ran in place.runs}
        wrong = [
            f"{name}: {nanoseconds / 1e9:.1f} s without"
            for name, nanoseconds in bare.items()
            if nanoseconds > UNLOADED_NS + lengths[name] * UNLOADED_SHARE
        ]
        place.findings.tell(
            "load of the host",
            "while this guest was measured",
            "; ".join(wrong[:4]) or (f"during {len(bare)} runs" if bare else "nothing was measured"),
            bool(bare) and not wrong,
        )


def uncovered(began: int, ended: int, spans: list[tuple[int, int]]) -> int:
    """How much of the time from `began` to `ended` is in none of `spans`; all in one unit."""
    bare, reached = 0, began
    for start, stop in sorted(spans):
        if stop <= reached or start >= ended:
            continue
        bare += max(0, start - reached)
        reached = max(reached, min(stop, ended))
    return bare + max(0, ended - reached)


def add_parser(commands: Any) -> None:
    """Add the command `judge` to those of `virt-rt-measure`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "judge",
        help="hold a measurement against what was asked and the platform's limits",
        epilog="Exit status: 0 passed, 1 failed or no evidence of latency, 2 wrongly called.",
    )
    parser.add_argument("measurement", metavar="MEASUREMENT", type=Path, help="directory with host/")
    parser.add_argument("--expect", metavar="FILE", type=Path, required=True, help="what was asked, as JSON")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the verdict there")
    parser.add_argument(
        "--allow-emulated",
        action="store_true",
        help="exit with 0 for an emulated measurement that was made as asked; the verdict stays what it is",
    )
    parser.set_defaults(run=command)


def command(options: argparse.Namespace) -> int:
    """Judge as the command line says; the exit status. Raises `MeasureError` when wrongly called."""
    try:
        expectations = load(options.expect)
    except ExpectationsError as error:
        raise MeasureError(str(error), "`doit measure` writes one; docs/latency-gate.md says how") from None
    if not options.measurement.is_dir():
        raise MeasureError(f"{options.measurement} is not a directory", "name what was measured into")
    verdict = judge(options.measurement, expectations, int(time.time()))
    if options.json:
        write_json(options.json, verdict.to_json(expectations))
    sys.stdout.write(text(verdict))
    return exit_status(verdict, options.allow_emulated)


def exit_status(verdict: Verdict, allow_emulated: bool) -> int:
    """0 when the verdict is good enough for whoever asks, else 1."""
    if verdict.latency == PASSED:
        return 0
    return 0 if allow_emulated and verdict.latency == NO_EVIDENCE and verdict.protocol_ok else 1


def text(verdict: Verdict) -> str:
    """The verdict for a person: each finding that is not fine, and the verdict itself."""
    lines = []
    for finding in verdict.findings:
        if not finding.ok:
            where = " ".join(part for part in (finding.place, finding.stage, finding.name) if part)
            lines += [f"{where}: {finding.got}", f"  wanted: {finding.wanted}"]
    made = "made as asked" if verdict.protocol_ok else "not made as asked"
    lines += [f"{len(verdict.findings)} findings; {made}", f"latency: {verdict.latency}"]
    return "\n".join(lines) + "\n"
