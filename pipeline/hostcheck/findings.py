"""Findings: what was held against the plan, as a table, as JSON, and as an exit status.

What could not be read is `unknown`, and unknown is never fine: it fails the run like `fail`, unless the
finding is advice, which a person has to look at and no program can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .machine import UnreadableError

OK, WARN, FAIL, UNKNOWN = "ok", "warn", "fail", "unknown"
LEVELS = (OK, WARN, FAIL, UNKNOWN)
#: ANSI colours by what the table's first column says.
_COLOURS = {"ok": "32", "warn": "33", "FAIL": "31", "UNKNOWN": "31", "look": "36"}


@dataclass(frozen=True)
class Finding:
    """One thing that was held against the plan.

    level    one of `LEVELS`
    wanted   what the plan asks for, got: what is there; one line each
    remedy   what to do about it; never empty for `fail` and `unknown`
    advice   a person has to look; an unknown finding then fails nothing
    """

    name: str
    level: str
    wanted: str
    got: str
    remedy: str = ""
    advice: bool = False

    @property
    def failed(self) -> bool:
        """Whether this makes the exit status 1."""
        return self.level == FAIL or (self.level == UNKNOWN and not self.advice)


def ok(name: str, got: str, wanted: str = "") -> Finding:
    """It is as planned."""
    return Finding(name, OK, wanted or got, got)


def warn(name: str, wanted: str, got: str, remedy: str = "") -> Finding:
    """It is allowed, and somebody should know."""
    return Finding(name, WARN, wanted, got, remedy)


def fail(name: str, wanted: str, got: str, remedy: str) -> Finding:
    """It is not as planned."""
    return Finding(name, FAIL, wanted, got, remedy)


def unknown(name: str, wanted: str, got: str, remedy: str) -> Finding:
    """It cannot be told; `got` says why."""
    return Finding(name, UNKNOWN, wanted, got, remedy)


def judge(name: str, good: bool, wanted: str, got: str, remedy: str) -> Finding:
    """`ok` or `fail`."""
    return ok(name, got, wanted) if good else fail(name, wanted, got, remedy)


def guarded(name: str, made: Iterable[Finding]) -> Iterator[Finding]:
    """The findings of one check; when something cannot be read, the last of them says so and is unknown."""
    try:
        yield from made
    except UnreadableError as error:
        yield unknown(
            name,
            "to be read",
            str(error),
            "run this as root on the host, booted with the platform's kernel",
        )


def exit_status(findings: Sequence[Finding]) -> int:
    """0 when nothing failed, else 1; having found nothing at all is a failure, too."""
    return 1 if not findings or any(finding.failed for finding in findings) else 0


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """`ok`, and the findings with all their fields."""
    return {
        "ok": exit_status(findings) == 0,
        "findings": [
            {
                "name": finding.name,
                "level": finding.level,
                "wanted": finding.wanted,
                "got": finding.got,
                "remedy": finding.remedy,
                "advice": finding.advice,
            }
            for finding in findings
        ],
    }


def table(findings: Sequence[Finding], colour: bool = False) -> str:
    """A line for each finding, with what was wanted and what to do below those that are not fine."""
    names = max((len(finding.name) for finding in findings), default=0)
    lines: list[str] = []
    for finding in findings:
        label = _label(finding)
        shown = f"\033[{_COLOURS[label]}m{label:<7}\033[0m" if colour else f"{label:<7}"
        lines.append(f"{shown}  {finding.name:<{names}}  {finding.got}")
        if finding.level != OK:
            lines += _below(finding, " " * (names + 11))
    return "\n".join([*lines, _summary(findings)]) + "\n"


def _label(finding: Finding) -> str:
    if finding.level == UNKNOWN and finding.advice:
        return "look"
    return finding.level.upper() if finding.failed else finding.level


def _below(finding: Finding, indent: str) -> Iterable[str]:
    if finding.wanted:
        yield f"{indent}wanted: {finding.wanted}"
    if finding.remedy:
        yield f"{indent}do: {finding.remedy}"


def _summary(findings: Sequence[Finding]) -> str:
    labels = [_label(finding) for finding in findings]
    words = (("ok", "ok"), ("warn", "to know"), ("look", "to look at"), ("FAIL", "failed"))
    counts = [(labels.count(label), word) for label, word in (*words, ("UNKNOWN", "unknown"))]
    return ", ".join(f"{count} {word}" for count, word in counts if count or word == "ok")
