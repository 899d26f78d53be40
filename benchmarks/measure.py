"""What every benchmark gives back, and how two sides are measured fairly."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the results; `met` is None where nothing could be measured, `note` then says why."""

    what: str
    ours: str = ""
    theirs: str = ""
    ratio: str = ""
    target: str = ""
    met: bool | None = None
    note: str = ""

    def __str__(self) -> str:
        """The line of a Markdown table."""
        met = "skipped" if self.met is None else "yes" if self.met else "no"
        cells = (self.what, self.ours, self.theirs, self.ratio, self.target, met, self.note)
        return f"| {' | '.join(cells)} |"


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def alternate(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Medians of two measurements that take turns at going first, so that drift hits both alike."""
    measured: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            measured[side].append((ours, theirs)[side]())
    return statistics.median(measured[0]), statistics.median(measured[1])
