"""A latency percentile as the test of a commit: what is asked, what is evidence, and what says nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline import latencytest
from pipeline.errors import RedError, UserError
from pipeline.labrecord import RECORD, Report, encode
from pipeline.labreport import Given, report
from pipeline.latencytest import Bound, LatencyTest
from pipeline.measure.verdict import FILE as VERDICT
from pipeline.project import Project
from tests.measuring import PLATFORM, Made, verdict

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef"


@pytest.fixture(scope="module")
def hardware(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of a measurement of hardware."""
    made = Made(segments=2, samples=20_000).write(tmp_path_factory.mktemp("hardware"))
    return report(Given(platform=PLATFORM, measurement=made, verdict=verdict()))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of a measurement of an emulation."""
    made = Made(kind="emulated", segments=1, samples=2000).write(tmp_path_factory.mktemp("emulated"))
    return report(Given(platform=PLATFORM, measurement=made, verdict=verdict(emulated=True)))


def test_a_test_of_a_latency_is_told_from_a_command() -> None:
    assert Bound.parse("p99.9<40") == Bound("p99.9", 40)
    assert Bound.parse("max < 1500 us") == Bound("max", 1500)
    assert Bound.parse("p99.9 <file") is None
    assert Bound.parse("max") is None
    with pytest.raises(UserError, match="known below 1000 us"):
        Bound.parse("p99<1000")


@pytest.mark.parametrize("role", ["host", "guest"])
@pytest.mark.parametrize("statistic", ["p99", "p99.9", "max"])
def test_the_worst_cpu_of_the_kernels_own_machine_decides(
    hardware: Report, role: str, statistic: Any
) -> None:
    values = {
        (each.place, each.cpu): {"p99": each.p99_us, "p99.9": each.p999_us, "max": each.max_us}[statistic]
        for each in hardware.series
        if (each.place == "host") == (role == "host")
    }
    worst = max(value for value in values.values() if value is not None)
    assert worst > 0
    above, at = Bound(statistic, int(worst) + 1), Bound(statistic, int(worst))
    found, says = above.judge(hardware, True, role)
    assert found == "good"
    assert f"{worst:g} us" in says
    assert at.judge(hardware, True, role)[0] == "bad"


def test_a_percentile_beyond_the_histogram_is_bad(hardware: Report) -> None:
    beyond = tuple(msgspec.structs.replace(each, p999_us=None) for each in hardware.series)
    found, says = Bound("p99.9", 999).judge(msgspec.structs.replace(hardware, series=beyond), True, "host")
    assert (found, "beyond" in says) == ("bad", True)


def test_what_was_not_measured_as_asked_is_skipped_and_an_emulation_refused(
    hardware: Report, emulated: Report
) -> None:
    bound = Bound("max", 1)
    assert bound.judge(hardware, False, "host")[0] == "skip"
    assert bound.judge(msgspec.structs.replace(hardware, series=()), True, "host")[0] == "skip"
    with pytest.raises(UserError, match="emulated: not evidence of latency"):
        bound.judge(emulated, True, "host")


class _Machine:
    """Stands in for a measurement: leaves what `made` is."""

    made: Report
    asked: tuple[dict[str, str], Path]

    def __init__(self, project: object, platform: str, asked: dict[str, str], *more: Any) -> None:
        type(self).asked = asked, more[-1]
        self.out = Path(asked["OUT"])

    def run(self) -> None:
        self.out.mkdir(parents=True)
        (self.out / RECORD).write_bytes(encode(self.made))
        (self.out / VERDICT).write_text(json.dumps(verdict()))
        raise RedError("latency: failed", "by the platform's limits")


def latency_test(tmp_path: Path, install: str, role: str = "host") -> LatencyTest:
    return LatencyTest(
        Project(ROOT), PLATFORM, role, Bound("max", 100_000), "root@board", install, "1m",
        tmp_path / "measurements", print,
    )  # fmt: skip


def test_a_commit_is_installed_measured_and_compared_once(
    tmp_path: Path, hardware: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Machine.made = hardware
    monkeypatch.setattr(latencytest, "Measurement", _Machine)
    seen = tmp_path / "installed"
    test = latency_test(tmp_path, f"echo $COMMIT $ARTIFACTS >>{seen}")
    for _ in range(2):  # the second time nothing is left to do
        assert test(COMMIT, tmp_path / "artifacts", tmp_path / "logs")[0] == "good"
    assert seen.read_text() == f"{COMMIT} {tmp_path / 'artifacts'}\n"
    asked, products = _Machine.asked
    assert asked == {
        "TARGET": "root@board", "DURATION": "1m", "GUESTS": "none", "OUT": str(tmp_path / "measurements" / COMMIT[:12]),
    }  # fmt: skip
    assert products == tmp_path / "artifacts" / PLATFORM


def test_a_measurement_that_goes_on_over_there_is_not_disturbed(
    tmp_path: Path, hardware: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Found(_Machine):
        def run(self) -> None:
            (self.out / RECORD).write_bytes(encode(self.made))
            (self.out / VERDICT).write_text(json.dumps(verdict()))

    Found.made = hardware
    monkeypatch.setattr(latencytest, "Measurement", Found)
    directory = tmp_path / "measurements" / COMMIT[:12]
    directory.mkdir(parents=True)
    (directory / "measurement.json").write_text('{"state": "running"}')
    test = latency_test(tmp_path, f"touch {tmp_path / 'rebooted'}")
    assert test(COMMIT, tmp_path / "artifacts", tmp_path / "logs")[0] == "good"
    assert not (tmp_path / "rebooted").exists()


def test_an_installation_that_fails_says_nothing_of_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latencytest, "Measurement", None)  # nothing is measured
    with pytest.raises(UserError, match="the installation of 0123456789ab ended with 1, which says nothing"):
        latency_test(tmp_path, "false")(COMMIT, tmp_path, tmp_path / "logs")
    assert latency_test(tmp_path, "exit 125")(COMMIT, tmp_path, tmp_path / "logs")[0] == "skip"
