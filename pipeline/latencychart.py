"""Latencies as SVG pictures for a page: a histogram of one CPU, and below it the greatest latency over time.

Colours and sizes of text come from the page's style sheet, by class, so that the picture follows light and dark. Counts
are on a logarithmic scale, since what matters is rare; latencies are, too, where they span more than a decade or so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from pipeline.labrecord import Limits, Series

#: Sizes in units of the picture: all of it, and where the two plots are.
WIDTH, HEIGHT = 460, 342
_LEFT, _RIGHT = 50, 448
_TOP, _BOTTOM = 62, 208
_TIME_TOP, _TIME_BOTTOM = 252, 314
#: From this ratio of greatest and least on, latencies are drawn on a logarithmic scale.
WIDE = 20
#: Units of time: from how many seconds on, seconds in one, its name.
_UNITS = ((2 * 3600, 3600, "h"), (300, 60, "min"), (0, 1, "s"))


@dataclass(frozen=True, slots=True)
class Scale:
    """The axes that pictures share: latencies from `least` to `greatest`, counts up to `count`, seconds."""

    least: float
    greatest: float
    count: int
    seconds: float

    @property
    def wide(self) -> bool:
        """Whether latencies are on a logarithmic scale."""
        return self.greatest / max(self.least, 1.0) > WIDE

    def x(self, latency: float) -> float:
        """Where a latency is."""
        return _LEFT + self._part(latency) * (_RIGHT - _LEFT)

    def y(self, count: float) -> float:
        """Where a count is: half a sample is at the bottom, so that a single one is seen."""
        return _BOTTOM - math.log(max(count, 0.5) / 0.5) / math.log(self.count / 0.5) * (_BOTTOM - _TOP)

    def time_y(self, latency: float) -> float:
        """Where a latency is in the lower plot."""
        return _TIME_BOTTOM - self._part(latency) * (_TIME_BOTTOM - _TIME_TOP)

    def time_x(self, seconds: float) -> float:
        """Where a moment is in the lower plot."""
        return _LEFT + seconds / self.seconds * (_RIGHT - _LEFT)

    def _part(self, latency: float) -> float:
        if self.wide:
            low = math.log(max(self.least, 0.5))
            part = (math.log(max(latency, self.least, 0.5)) - low) / (math.log(self.greatest) - low)
        else:
            part = (latency - self.least) / (self.greatest - self.least)
        return min(1.0, max(0.0, part))


def scale(every: Sequence[Series], limits: Limits | None) -> Scale:
    """Axes that hold all these series, and their thresholds where they are not far away."""
    least = min(series.min_us for series in every)
    greatest = max(series.max_us for series in every) + 1
    if limits is not None:
        known = [limit for series in every if (limit := limits.of(series)) is not None]
        greatest = max([greatest, *(most * 1.1 for most, _ in known)])
    count = max(max(series.histogram.values(), default=1) for series in every)
    seconds = max([1.0, *(b.at_s + b.seconds - _start(each) for each in every for b in each.blocks)])
    if greatest / max(least, 1.0) > WIDE:
        return Scale(10 ** math.floor(math.log10(max(least, 1.0))), greatest, max(10, 2 * count), seconds)
    return Scale(0.0, greatest, max(10, 2 * count), seconds)


def _start(series: Series) -> float:
    """When a series began; host and guests are measured one after the other, and each is drawn from its own start."""
    return min((block.at_s for block in series.blocks), default=0.0)


def svg(series: Series, axes: Scale, limits: Limits | None, title: str, describes: str, stamp: str) -> str:
    """One CPU's picture; `describes` says the same in words, `stamp` is written across where it is not empty."""
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label={quoteattr(describes)}>',
        f"<title>{escape(describes)}</title>",
        _text(_LEFT, 14, title, "name"),
        *_axes(axes),
        f'<path class="bars" d="{_bars(series, axes)}"/>',
    ]
    if stamp:
        parts.append(
            f'<rect class="stamped" x="{_LEFT}" y="20" width="{_RIGHT - _LEFT}" height="18" rx="3"/>'
        )
        parts.append(_text((_LEFT + _RIGHT) / 2, 33, stamp, "stamp"))
    if series.overflows:
        parts.append(
            f'<rect class="beyond" x="{_RIGHT - 4}" y="{_TOP}" width="4" height="{_BOTTOM - _TOP}"/>'
        )
        parts.append(
            _text(_RIGHT - 8, _TOP + 10, f"{series.overflows} beyond {series.histogram_us} us", "end bad")
        )
    parts += _limits(series, axes, limits)
    at = axes.x(series.max_us)
    parts.append(f'<path class="top" d="M{at:.1f} {_BOTTOM} l-4 7 h8 z"/>')
    parts += _over_time(series, axes)
    parts.append("</svg>")
    return "\n".join(parts)


def number(value: float | None) -> str:
    """A latency for a reader; a dash where it lies beyond the histogram."""
    if value is None:
        return "\N{EN DASH}"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _axes(axes: Scale) -> Iterator[str]:
    for latency in ticks(axes.least, axes.greatest, axes.wide):
        x = axes.x(latency)
        yield f'<path class="grid" d="M{x:.1f} {_TOP} V{_BOTTOM}"/>'
        yield _text(x, _BOTTOM + 18, _short(latency), "middle")
    decade = 1
    while decade <= axes.count:
        y = axes.y(decade)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f} H{_RIGHT}"/>'
        yield _text(_LEFT - 6, y + 4, _short(decade), "end")
        decade *= 10 if axes.count < 10**6 else 100
    yield _text(_RIGHT, 14, "samples by latency, us", "end faint")
    yield f'<path class="axis" d="M{_LEFT} {_TOP} V{_BOTTOM} H{_RIGHT}"/>'


def _bars(series: Series, axes: Scale) -> str:
    """All counts as one path, those of one column joined: the greatest is what is seen."""
    columns: dict[int, int] = {}
    for text, count in series.histogram.items():
        latency = int(text)
        first, last = axes.x(latency), axes.x(latency + 1)
        for column in range(math.floor(first * 2), max(math.floor(first * 2) + 1, math.floor(last * 2))):
            columns[column] = max(columns.get(column, 0), count)
    path, column = [], 0
    order = sorted(columns)
    while column < len(order):
        end = column
        while end + 1 < len(order) and (order[end + 1], columns[order[end + 1]]) == (
            order[end] + 1,
            columns[order[column]],
        ):
            end += 1
        left, right, y = order[column] / 2, (order[end] + 1) / 2, axes.y(columns[order[column]])
        path.append(f"M{left:g} {_BOTTOM}V{y:.1f}H{right:g}V{_BOTTOM}z")
        column = end + 1
    return "".join(path)


def _limits(series: Series, axes: Scale, limits: Limits | None) -> Iterator[str]:
    known = limits.of(series) if limits is not None else None
    if known is None:
        return
    # above the plot, so that no word lies on what was measured; a line each, since they may be near
    for value, what, y in zip(known, ("max", "avg"), (48, 59), strict=True):
        x = axes.x(value)
        side = "end" if x > (_LEFT + _RIGHT) / 2 else "start"
        yield f'<path class="limit" d="M{x:.1f} {y - 8} V{_BOTTOM}"/>'
        yield _text(x + (-4 if side == "end" else 4), y, f"limit: {what} {value} us", f"{side} bad")
    level = axes.time_y(known[0])
    yield f'<path class="limit" d="M{_LEFT} {level:.1f} H{_RIGHT}"/>'


def _over_time(series: Series, axes: Scale) -> Iterator[str]:
    unit, name = next((each, name) for least, each, name in _UNITS if axes.seconds >= least)
    yield _text(_LEFT, _TIME_TOP - 8, f"greatest latency, us, of each stretch of time ({name})", "faint")
    yield f'<path class="axis" d="M{_LEFT} {_TIME_TOP} V{_TIME_BOTTOM} H{_RIGHT}"/>'
    inner = ticks(axes.least, axes.greatest, axes.wide)
    for latency in (inner[0], inner[-1]) if len(inner) > 1 else inner:
        y = axes.time_y(latency)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f} H{_RIGHT}"/>'
        yield _text(_LEFT - 6, y + 4, _short(latency), "end")
    for moment in ticks(0, axes.seconds / unit, False):
        yield _text(axes.time_x(moment * unit), _TIME_BOTTOM + 16, _short(moment), "middle")
    columns: dict[int, tuple[float, float]] = {}
    start = _start(series)
    for block in series.blocks:
        left = axes.time_x(block.at_s - start)
        right = max(left + 0.5, axes.time_x(block.at_s - start + block.seconds) - 0.3)
        key = math.floor(left * 2)
        known = columns.get(key, (0.0, 0.0))
        columns[key] = (max(known[0], right), max(known[1], block.max_us))
    path = "".join(
        f"M{key / 2:g} {_TIME_BOTTOM}V{min(axes.time_y(most), _TIME_BOTTOM - 1):.1f}H{right:.1f}V{_TIME_BOTTOM}z"
        for key, (right, most) in sorted(columns.items())
    )
    yield f'<path class="bars" d="{path}"/>'


def ticks(least: float, greatest: float, wide: bool) -> list[float]:
    """Round numbers between two values, five or so."""
    if wide:
        low, high = math.floor(math.log10(max(least, 0.1))), math.ceil(math.log10(greatest))
        steps: Iterable[int] = (1, 2, 5) if high - low <= 2 else (1,)
        every = [step * 10.0**power for power in range(low, high + 1) for step in steps]
        return [each for each in every if least <= each <= greatest]
    step = 10 ** math.floor(math.log10(max(greatest - least, 1e-9) / 2))
    while (greatest - least) / step > 7:
        step *= 2 if (greatest - least) / step <= 14 else 2.5
    start = math.ceil(least / step)
    return [round(number * step, 6) for number in range(start, math.floor(greatest / step + 1e-9) + 1)]


def _short(value: float) -> str:
    for size, sign in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if value >= size:
            return f"{value / min(size, 10**3 if sign == 'k' else size):g}{sign}"
    return f"{value:g}"


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'
