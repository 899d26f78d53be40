"""The page of a report: one HTML file that needs no network and no script."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.labrecord import PAGE, Report, Series
from pipeline.latencychart import number, scale, svg
from pipeline.releaserecord import EMULATED
from pipeline.rendering import render_template

#: Where its templates lie, and the style sheet that it has in common with a release's page.
TEMPLATES, STYLE = "recipes/templates/lab", "recipes/templates/release/style.css.j2"
#: What a level's findings are about.
ABOUT = {
    "structure": "packages, configurations and repository are what they should be",
    "boot": "every guest boots, with the kernel outside and the one inside, and keeps its plan",
    "stack": "the host boots and keeps its plan, and runs a guest under KVM with devices passed through",
    "latency": "what was measured was measured as asked, and holds the thresholds",
}
#: What is measured, by kind of series.
MEASURES = {
    "timer": "from the moment a timer was due to the woken thread",
    "handler": "from the register write that raises the interrupt to its handler in the kernel",
    "thread": "from the register write that raises the interrupt to the woken thread in user space",
}


def page(report: Report, picture: str, picture_note: str, templates: Mapping[str, str]) -> str:
    """Render the page.

    `picture` is the CPU plan as SVG, or empty; `picture_note` says what there is to know of it; `templates` are those
    of `templates_of`, of which only the files' names count. Raises `UserError` when a template is wrong.
    """
    return render_template(
        f"{PAGE}.j2",
        {path.rpartition("/")[2]: text for path, text in templates.items()},
        {
            "report": report,
            "about": ABOUT,
            "measures": MEASURES,
            "emulated": EMULATED if report.emulated else "",
            "picture": base64.b64encode(picture.encode()).decode(),
            "picture_note": picture_note,
            "groups": list(_groups(report)),
            "number": number,
            "beyond": lambda series: _beyond(series, report),
        },
        "lab report",
    )


def templates_of(root: Path) -> dict[str, str]:
    """The page's templates in a checkout, by path in it."""
    paths = [*sorted((root / TEMPLATES).glob("*.j2")), root / STYLE]
    return {path.relative_to(root).as_posix(): path.read_text() for path in paths}


def _groups(report: Report) -> Iterator[dict[str, Any]]:
    """Series of one stage and kind, with their pictures: a row for each CPU of the host and who runs on it."""
    stages: dict[tuple[str, str], list[Series]] = {}
    for series in report.series:
        stages.setdefault((series.stage, series.what), []).append(series)
    for (stage, what), every in stages.items():
        axes = scale(every, report.limits)
        stamp = EMULATED if report.emulated else ""
        yield {
            "id": f"{stage}-{what}",
            "stage": stage,
            "what": what,
            "tool": every[0].tool,
            "loads": sorted({load for series in every for load in series.loads}),
            "every": every,
            "charts": {
                _key(series): svg(
                    series, axes, report.limits, _title(series), describe(series, report), stamp
                )
                for series in every
            },
            "rows": [[(_key(series) if series else "") for series in row] for row in rows(every)],
            "titles": [_title(series) for series in every],
            "table": list(_table(every)),
        }


def rows(every: Sequence[Series]) -> list[list[Series | None]]:
    """Two columns: the host's series, beside each the guest's whose vCPU runs on that CPU; others follow."""
    host = [series for series in every if series.place == "host"]
    guests = [series for series in every if series.place != "host"]
    found: list[list[Series | None]] = []
    for series in [*host]:
        beside = next((guest for guest in guests if guest.runs_on == series.cpu), None)
        if beside is not None:
            found.append([series, beside])
            host.remove(series)
            guests.remove(beside)
    return found + [list(pair) for pair in itertools.zip_longest(host, guests)]


def _key(series: Series) -> str:
    return f"{series.place} {series.cpu}"


def _title(series: Series) -> str:
    if series.place == "host":
        return f"host, CPU {series.cpu}"
    on = "" if series.runs_on is None else f", on CPU {series.runs_on}"
    return f"{series.place.removeprefix('guest-')}, vCPU {series.cpu}{on}"


def _beyond(series: Series, report: Report) -> bool:
    """Whether a series that is evidence breaks a threshold."""
    limit = report.limits.of(series) if report.limits is not None else None
    return (
        not report.emulated and limit is not None and (series.max_us >= limit[0] or series.avg_us >= limit[1])
    )


def describe(series: Series, report: Report) -> str:
    """A picture in words."""
    words = (
        f"{_title(series)}: {series.samples} samples, from {number(series.min_us)} to {number(series.max_us)} us, "
        f"{number(series.avg_us)} us in the mean"
    )
    if series.p999_us is not None:
        words += f", 99.9 % up to {number(series.p999_us)} us"
    if series.overflows:
        words += f", {series.overflows} beyond the histogram of {series.histogram_us} us"
    limit = report.limits.of(series) if report.limits is not None else None
    if limit is not None:
        words += f"; limits: max {limit[0]} us, avg {limit[1]} us"
    return f"{words} ({EMULATED})" if report.emulated else words


def _table(every: Sequence[Series]) -> Iterator[tuple[str, list[int]]]:
    """Counts by ranges of latency, a column for each series: the pictures as numbers."""
    greatest = max((int(each) for series in every for each in series.histogram), default=0)
    edges, step = [0], 1
    while edges[-1] <= greatest:
        for factor in (1, 2, 5):
            edges.append(factor * step)
        step *= 10
    for low, high in itertools.pairwise(edges):
        counts = [
            sum(count for latency, count in series.histogram.items() if low <= int(latency) < high)
            for series in every
        ]
        if any(counts):
            yield f"{low} to {high - 1}" if high - low > 1 else f"{low}", counts
    if any(series.overflows for series in every):
        yield "beyond", [series.overflows for series in every]
