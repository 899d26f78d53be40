"""A report's latencies beside those of another one: where a difference is shown, where none is, what cannot be held
against each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline import latencystatistics
from pipeline.labrecord import Baseline, Comparison, Evidence, Place, Series
from pipeline.latencystatistics import ALPHA, Difference, TooFewError, holm
from pipeline.measurement import TOLERANCE, even

Statistic = Literal["max", "p99.9"]


@dataclass(frozen=True, slots=True)
class Side:
    """What one measurement says: a report, or a measurement that was just read."""

    evidence: Evidence
    places: Sequence[Place]
    series: Sequence[Series]


@dataclass(slots=True)
class _Pair:
    series: Series
    statistic: Statistic
    block_s: float = 0.0
    refused: str = ""
    found: Difference | None = None


def baseline(now: Side, before: Side, name: str) -> Baseline:
    """Compare every series of `now` with its counterpart; `name` is what a reader calls `before`."""
    pairs = list(_pairs(now, before))
    for gone in sorted(_names(before.series) - _names(now.series)):
        counterpart = next(each for each in before.series if _name(each) == gone)
        pairs.append(_Pair(counterpart, "max", refused="only the baseline has it"))
    tested = [pair.found for pair in pairs if pair.found is not None]
    corrected = iter(holm([found.p for found in tested]))
    comparisons = [
        _said(pair, next(corrected) if pair.found is not None else 1.0, len(tested)) for pair in pairs
    ]
    return Baseline(name=name, evidence=before.evidence, comparisons=tuple(comparisons))


def _name(series: Series) -> tuple[str, str, str, int]:
    return (series.place, series.stage, series.what, series.cpu)


def _names(series: Sequence[Series]) -> set[tuple[str, str, str, int]]:
    return {_name(each) for each in series}


def _pairs(now: Side, before: Side) -> Iterator[_Pair]:
    known = {_name(each): each for each in before.series}
    for series in now.series:
        other = known.get(_name(series))
        why = "the baseline does not have it" if other is None else _unlike(now, before, series, other)
        if why or other is None:
            yield _Pair(series, "max", refused=why)
            continue
        length, blocks = even(series.blocks)
        length_before, blocks_before = even(other.blocks)
        if abs(length - length_before) > TOLERANCE * max(length, length_before):
            refused = f"blocks of {length:g} s now and of {length_before:g} s before"
            yield _Pair(series, "max", refused=refused)
            continue
        values: dict[Statistic, tuple[list[float], list[float]]] = {
            "max": ([b.max_us for b in blocks], [b.max_us for b in blocks_before])
        }
        if not any(block.p999_us is None for block in (*blocks, *blocks_before)):
            values["p99.9"] = (
                [b.p999_us for b in blocks if b.p999_us is not None],
                [b.p999_us for b in blocks_before if b.p999_us is not None],
            )
        for statistic, (mine, theirs) in values.items():
            pair = _Pair(series, statistic, length)
            try:
                pair.found = latencystatistics.compare(mine, theirs)
            except TooFewError as error:
                pair.refused = f"{error}, of {length:g} s each: measure longer"
            yield pair


def _unlike(now: Side, before: Side, series: Series, other: Series) -> str:
    """Why two series are not of the same thing; nothing when they are."""
    if now.evidence != before.evidence:
        return f"{now.evidence} now and {before.evidence} before"
    for name in dict.fromkeys(("host", series.place)):
        mine, theirs = (next((p for p in side.places if p.name == name), None) for side in (now, before))
        if mine is None or theirs is None:
            return f"only one of them tells of {name}"
        if mine.cpu_model != theirs.cpu_model or not mine.cpu_model:
            return f"{name} had another CPU: {mine.cpu_model or 'unknown'}, before {theirs.cpu_model or 'unknown'}"
        if mine.timer_ns != theirs.timer_ns:
            return f"{name} had timers of another resolution: {mine.timer_ns} ns, before {theirs.timer_ns} ns"
    for what, mine_is, theirs_is in (
        ("tool", series.tool, other.tool),
        ("period (us)", series.interval_us, other.interval_us),
        ("priority", series.priority, other.priority),
        ("load", " ".join(series.loads) or "none", " ".join(other.loads) or "none"),
        ("histogram (us)", series.histogram_us, other.histogram_us),
    ):
        if mine_is != theirs_is:
            return f"another {what}: {mine_is}, before {theirs_is}"
    return ""


def _said(pair: _Pair, p: float, number: int) -> Comparison:
    found = pair.found
    if found is None:
        verdict: Literal["later", "earlier", "no difference shown", "not compared"] = "not compared"
        says = f"not compared: {pair.refused}"
    else:
        block = f"blocks of {pair.block_s * found.joined:g} s"
        between = f"between {found.low:.4g} and {found.high:.4g} us with 95 %"
        if p > ALPHA:
            verdict = "no difference shown"
            says = (
                f"no difference shown in the {pair.statistic} of {block} (p = {p:.2g}); this is no proof that there is "
                f"none: it lies {between}"
            )
        elif found.superiority == 0.5 or found.shift == 0:
            verdict = "later" if found.superiority > 0.5 else "earlier"
            says = (
                f"the {pair.statistic} of {block} is distributed otherwise than before (p = {p:.2g}), {verdict} in the "
                f"tail: its middle is where it was, {between}"
            )
        else:
            verdict = "later" if found.superiority > 0.5 else "earlier"
            says = (
                f"the {pair.statistic} of {block} is {verdict} by {abs(found.shift):.4g} us (p = {p:.2g}), {between}; "
                f"of two blocks that of now is the later one in {found.superiority:.0%}"
            )
        if number > 1:
            says += f"; corrected for {number} comparisons"
    return Comparison(
        place=pair.series.place,
        stage=pair.series.stage,
        what=pair.series.what,
        cpu=pair.series.cpu,
        statistic=pair.statistic,
        refused=pair.refused,
        blocks=found.blocks if found else 0,
        blocks_before=found.blocks_before if found else 0,
        block_s=pair.block_s * (found.joined if found else 1),
        median_us=found.median if found else 0.0,
        median_before_us=found.median_before if found else 0.0,
        shift_us=round(found.shift, 3) if found else 0.0,
        low_us=round(found.low, 3) if found else 0.0,
        high_us=round(found.high, 3) if found else 0.0,
        superiority=round(found.superiority, 4) if found else 0.5,
        p=round(p, 6),
        verdict=verdict,
        says=says,
    )
