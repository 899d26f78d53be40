"""A latency percentile of a real machine as the test of a commit: installed, booted, measured and compared."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import msgspec

from pipeline.bisecthistory import Verdict
from pipeline.errors import RedError, UserError
from pipeline.files import remove_tree
from pipeline.kernel import ROLES, kernel_name
from pipeline.labrecord import RECORD, Report, Series
from pipeline.measure.verdict import FILE as VERDICT
from pipeline.measurerequest import HISTOGRAM_US, HOST
from pipeline.measuring import DOCUMENT, Measurement
from pipeline.project import Project
from pipeline.shelltest import SKIP, run_shell

Statistic = Literal["p99", "p99.9", "max"]
_ASKED = re.compile(r"(p99|p99\.9|max)\s*<\s*([1-9][0-9]*)(?:\s*us)?")


@dataclass(frozen=True, slots=True)
class Bound:
    """What a latency has to be below: `statistic` of each CPU, microseconds."""

    statistic: Statistic
    below_us: int

    @classmethod
    def parse(cls, test: str) -> Self | None:
        """What a test such as `p99.9<40` says; None for what is none. UserError when it cannot be measured."""
        found = _ASKED.fullmatch(test.strip())
        if found is None:
            return None
        if found[1] != "max" and int(found[2]) >= HISTOGRAM_US:
            raise UserError(
                f"{test}: percentiles are known below {HISTOGRAM_US} us only", "ask for less, or for max"
            )
        return cls(found[1], int(found[2]))  # type: ignore[arg-type]  # one of the words of the expression

    def of(self, series: Series) -> float:
        """A series' value; infinite where it lies beyond the histogram."""
        value = {"p99": series.p99_us, "p99.9": series.p999_us, "max": series.max_us}[self.statistic]
        return float("inf") if value is None else float(value)

    def judge(self, report: Report, protocol_ok: bool, role: str) -> tuple[Verdict, str]:
        """What a measurement says of a kernel. UserError when it was not made on hardware."""
        if report.emulated:
            raise UserError(
                f"what was measured is {report.latency_verdict}", "name a --target that is real hardware"
            )
        series = [each for each in report.series if (each.place == HOST) == (role == HOST)]
        if not protocol_ok or not series:
            return "skip", "it was not measured as asked"
        worst = max(series, key=self.of)
        value = self.of(worst)
        shown = f"beyond {worst.histogram_us}" if value == float("inf") else f"{value:g}"
        says = f"{self.statistic} of {worst.place}, CPU {worst.cpu}: {shown} us"
        return ("good" if value < self.below_us else "bad"), says


def products(project: Project, platform: str, role: str) -> tuple[str, ...]:
    """What is needed to install and measure a kernel, by action."""
    packages = [f"package:{platform}:{name}" for name in (f"kernel-image-{role}", f"{role}-kernel")]
    return (
        *(kernel_name(platform, each) for each in ROLES),
        f"tuning:{platform}",
        *(name for name in packages if name in project.graph),
        *(name for name in project.products(platform) if project.graph[name].kind == "driver"),
    )


@dataclass(frozen=True, slots=True)
class LatencyTest:
    """`install` is a command that brings `$ARTIFACTS` onto the target, boots that kernel and returns when it is up.

    `kept` is where measurements are kept, by commit: one that goes on over there is found again.
    """

    project: Project
    platform: str
    role: str
    bound: Bound
    target: str
    install: str
    duration: str
    kept: Path
    tell: Callable[[str], None]

    def __call__(self, commit: str, artifacts: Path, logs: Path) -> tuple[Verdict, str]:
        """Install, measure and compare; UserError when that did not go as it should: it says nothing."""
        directory = self.kept / commit[:12]
        if not (directory / RECORD).is_file():
            if not _under_way(directory):
                if directory.exists():
                    remove_tree(directory)
                log = logs / "install.log"
                status = run_shell(self.install, self.project.root, commit, artifacts, log)
                if status == SKIP:
                    return "skip", f"the installation ended with {SKIP}"
                if status:
                    raise UserError(
                        f"the installation of {commit[:12]} ended with {status}, which says nothing",
                        f"see {log}",
                    )
            self._measure(artifacts, directory)
        report = msgspec.json.decode((directory / RECORD).read_bytes(), type=Report)
        verdict = json.loads((directory / VERDICT).read_bytes())
        return self.bound.judge(report, verdict["protocol_ok"] is True, self.role)

    def _measure(self, artifacts: Path, directory: Path) -> None:
        asked = {"TARGET": self.target, "DURATION": self.duration, "OUT": f"{directory}"}
        if self.role == HOST:
            asked["GUESTS"] = "none"
        measurement = Measurement(
            self.project, self.platform, asked, self.tell, threading.Event(), artifacts / self.platform
        )
        try:
            measurement.run()
        except RedError:  # by the limits of the platform, which are not the question here
            if not (directory / RECORD).is_file():
                raise


def _under_way(directory: Path) -> bool:
    try:
        state: object = json.loads((directory / DOCUMENT).read_bytes())["state"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return state == "running"
