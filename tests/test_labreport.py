"""The lab's report: levels are judged by their documents, measurements are read whole, and pages say what they are."""

from __future__ import annotations

import html.parser
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

import jsonschema
import msgspec
import pytest

from pipeline.errors import UserError
from pipeline.junit import junit
from pipeline.labpage import page, rows, templates_of
from pipeline.labrecord import (
    JUNIT,
    LEVELS,
    PAGE,
    RECORD,
    SCHEMA_FILE,
    Finding,
    Limits,
    Report,
    decode,
    encode,
    json_schema,
    load,
)
from pipeline.labreport import Given, red, report
from pipeline.latencychart import scale, svg, ticks
from pipeline.latencystatistics import TooFewError, compare, holm
from pipeline.measure import record
from pipeline.measurement import quantile, read
from pipeline.planpicture import svg as plan_svg
from pipeline.project import Project
from pipeline.releaserecord import EMULATED
from tests.conftest import ROOT
from tests.measuring import ATTRIBUTION, GUEST, PLATFORM, Made, verdict

FINDING = {"name": "running", "wanted": "running", "got": "running", "ok": True}
LIMITS = Limits(source="the board's own", host_max_us=20, host_avg_us=3, guest_max_us=60, guest_avg_us=25)
SMALL = Made(segments=9, segment_s=60, samples=12_000)


def boot(**changes: Any) -> bytes:
    """A boot.json."""
    document = {
        "schema": 1, "platform": PLATFORM, "ok": True, "evidence": "emulated", "latency_verdict": EMULATED,
        "guests": {"canoe-guest": {"boots": {way: {"findings": [FINDING]} for way in ("inside", "outside")}}},
    }  # fmt: skip
    return json.dumps(document | changes).encode()


def stack(**changes: Any) -> bytes:
    """A stack.json."""
    document = {
        "schema": 1, "platform": PLATFORM, "ok": True, "evidence": "emulated", "latency_verdict": EMULATED,
        "findings": [FINDING, {"name": "audit", "wanted": "green", "got": "green", "ok": True}],
    }  # fmt: skip
    return json.dumps(document | changes).encode()


def given(**changes: Any) -> Given:
    """What a platform with all proofs has; nothing was measured."""
    fine = [Finding(name="packages examined", wanted="22", got="22", ok=True)]
    return Given(**({"platform": PLATFORM, "structure": fine, "boot": boot(), "stack": stack()} | changes))


@pytest.fixture(scope="module")
def hardware(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measurement of hardware; tests that change it take a copy."""
    return SMALL.write(tmp_path_factory.mktemp("hardware") / "measurement")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measurement of an emulation."""
    made = Made(kind="emulated", segments=4, samples=2000)
    return made.write(tmp_path_factory.mktemp("emulated") / "measurement")


@pytest.fixture
def copied(hardware: Path, tmp_path: Path) -> Path:
    """A copy of the measurement, to be changed."""
    return Path(shutil.copytree(hardware, tmp_path / "measurement"))


def of_hardware(directory: Path, **changes: Any) -> Report:
    """The report of a measurement of hardware."""
    return report(given(**({"measurement": directory, "verdict": verdict(), "limits": LIMITS} | changes)))


def rendered(made: Report, picture: str = "") -> str:
    return page(made, picture, "", templates_of(ROOT))


# Levels ---------------------------------------------------------------------------------------


def test_proofs_that_passed_are_green_and_latency_is_not_proven() -> None:
    made = report(given())
    assert {level.name: level.verdict for level in made.levels} == {
        "structure": "passed",
        "boot": "passed",
        "stack": "passed",
        "latency": "not proven",
    }
    assert made.ok and red(made) == [] and made.latency_verdict == "not measured"
    assert len(made.level("boot").findings) == 2 and made.level("boot").findings[0].stage == "kernel inside"
    told = "\n".join(made.not_proven)
    assert "KVM on Intel" in told and "sockets" in told and "latency: nothing was measured" in told


def test_real_proofs_are_read() -> None:
    """Those that this checkout made, where it made any."""
    made = 0
    for name, where in (("boot", "boot"), ("stack", "stack")):
        path = ROOT / f"artifacts/qemu-q35/{where}/{name}.json"
        if path.exists():
            made += 1
            fields: dict[str, Any] = {"platform": "qemu-q35", name: path.read_bytes()}
            level = report(Given(**fields)).level(name)
            assert (level.verdict, len(level.findings) > 10) == ("passed", True), level.reason
    if not made:
        pytest.skip("there are no proofs: doit boot:qemu-q35 stack:qemu-q35")


def test_a_platform_without_a_stack_proof_is_not_green() -> None:
    made = report(given(stack=None, why={"stack": "it has no stack proof"}))
    assert made.level("stack").verdict == "not proven"
    assert "stack: it has no stack proof" in made.not_proven


BAD = {**FINDING, "got": "degraded", "ok": False}


@pytest.mark.parametrize(
    ("level", "changes", "said"),
    [
        ("boot", {"boot": b""}, "empty"),
        ("boot", {"boot": boot()[:100]}, "cut short"),
        ("boot", {"boot": b"[]"}, "list"),
        ("boot", {"boot": boot(guests={})}, "{}"),
        ("boot", {"boot": boot(guests={"g": {}})}, "none"),
        ("boot", {"boot": boot(guests={"g": {"boots": {"inside": {"findings": [FINDING]}}}})}, "inside"),
        (
            "boot",
            {"boot": boot(guests={"g": {"boots": {"inside": {"findings": []}, "outside": {"findings": [FINDING]}}}})},
            "none",
        ),
        ("boot", {"boot": boot(ok=False)}, "ok: False"),
        ("boot", {"boot": boot(schema=2)}, "2"),
        ("boot", {"boot": boot(platform="other")}, "'other'"),
        ("boot", {"boot": boot(latency_verdict="passed")}, "'passed'"),
        ("stack", {"stack": stack(findings=[FINDING, BAD])}, "degraded"),
        ("stack", {"stack": stack(findings=[FINDING, BAD], ok=False)}, "degraded"),
        ("stack", {"stack": stack(findings=[])}, "none"),
        ("stack", {"stack": stack(findings="fine")}, "none"),
        ("stack", {"stack": stack(findings=[{**FINDING, "ok": 1}])}, "not of its form"),
        ("stack", {"stack": stack(findings=[{"name": "a"}])}, "KeyError"),
        ("stack", {"stack": stack(findings=["fine"])}, "not an object"),
        ("stack", {"labhost": b""}, "empty"),
        ("structure", {"structure": []}, "none"),
        ("structure", {"structure": [Finding(name="a", wanted="b", got="broken", ok=False)]}, "broken"),
        ("latency", {"verdict": verdict()}, "none"),
        ("latency", {"attribution": b""}, "empty"),
        ("latency", {"attribution": b'{"schema": 1, "events": [{"place": "host"}]}'}, "not of its form"),
        ("latency", {"attribution": b'{"schema": 2, "events": []}'}, "not of its form"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_red(level: str, changes: dict[str, Any], said: str) -> None:
    made = report(given(**changes))
    assert not made.ok
    assert [each.name for each in made.levels if each.verdict == "failed"] == [level]
    assert said in made.level(level).reason
    assert any(line.startswith(f"{level}: ") and said in line for line in red(made))
    assert f"{level}: it failed" in made.not_proven
    assert not made.level(level).findings[0].ok, "red ones come first"


# Measurements ---------------------------------------------------------------------------------


def test_latencies_are_read_from_all_segments(hardware: Path) -> None:
    made = of_hardware(hardware)
    assert made.ok and made.evidence == "hardware" and made.level("latency").verdict == "passed"
    timers = [each for each in made.series if each.what == "timer"]
    assert [(each.place, each.cpu) for each in timers] == [("host", 2), ("host", 3), (GUEST, 1), (GUEST, 2)]
    raw = [json.loads(path.read_text()) for path in sorted(hardware.glob("host/*/cyclictest.json"))]
    threads = [thread for each in raw for thread in each["thread"].values() if thread["cpu"] == 2]
    assert len(threads) == SMALL.segments
    first = timers[0]
    assert first.samples == sum(thread["cycles"] for thread in threads)
    assert (first.min_us, first.max_us) == (min(t["min"] for t in threads), max(t["max"] for t in threads))
    assert sum(first.histogram.values()) + first.overflows == first.samples
    assert [block.max_us for block in first.blocks] == [thread["max"] for thread in threads]
    assert (
        first.p99_us is not None
        and first.p999_us is not None
        and first.p99_us <= first.p999_us <= first.max_us
    )
    assert [block.at_s for block in first.blocks][:2] == [0.0, 60.4]
    handler = next(each for each in made.series if each.what == "handler" and each.place == "host")
    assert len(handler.blocks) == 120 and {block.seconds for block in handler.blocks} == {1.0}
    windows = json.loads(next(hardware.glob("host/*/irqlat.json")).read_text())["max_over_time"]
    assert handler.blocks[0].max_us == max(window["handler"] for window in windows[:10])
    assert handler.blocks[119].max_us == max(window["handler"] for window in windows[-10:])


def test_quantiles_are_those_of_all_samples() -> None:
    assert quantile({1: 989, 5: 1, 9: 10}, 1000, 0.99) == 5
    assert quantile({1: 989, 5: 1, 9: 10}, 1000, 0.991) == 9
    assert quantile({1: 98}, 100, 0.99) is None, "two lie beyond the histogram"
    assert quantile({1: 99}, 100, 0.99) == 1
    assert quantile({1: 1, 2: 1, 3: 1}, 3, 0.5) == 2, "one and a half samples are two"


def test_emulated_latencies_are_no_evidence(emulated: Path) -> None:
    made = report(given(measurement=emulated, verdict=verdict(emulated=True), limits=LIMITS))
    assert made.ok and made.evidence == "emulated" and made.latency_verdict == EMULATED
    assert made.level("latency").verdict == "not proven"
    text = rendered(made)
    assert (
        text.count("<svg")
        == len(made.series)
        == text.count(f'class="stamp" x="249.0" y="33.0">{EMULATED}</text>')
    )
    assert 'class="red"' not in text, "thresholds do not judge an emulation"
    for words in ("latency on hardware", "KVM on Intel", "sockets", "firmware"):
        assert any(words in each for each in made.not_proven), words


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latency_verdict": "passed"}, "'passed'"),
        ({"evidence": "hardware", "latency_verdict": "passed"}, "'hardware'"),
        ({"protocol_ok": False}, "False"),
        ({"protocol_ok": 1}, "1"),
        ({"findings": []}, "none"),
        ({"findings": [{**FINDING, "ok": False, "got": "too few"}]}, "too few"),
        ({"schema": 0}, "0"),
        ({"evidence": "none"}, "'none'"),
    ],
)
def test_a_verdict_must_follow_from_what_was_found(
    changes: dict[str, Any], said: str, emulated: Path
) -> None:
    made = report(given(measurement=emulated, verdict=verdict(emulated=True) | changes))
    assert made.level("latency").verdict == "failed" and said in made.level("latency").reason
    assert made.evidence == "emulated" and made.latency_verdict == EMULATED
    decode(encode(made), "it")


def test_thresholds_do_not_judge_an_emulation(emulated: Path) -> None:
    late = {**FINDING, "name": "max", "got": "CPU 2: 4000 us", "ok": False, "kind": "limit"}
    made = report(given(measurement=emulated, verdict=verdict(True, late)))
    assert made.level("latency").verdict == "not proven"
    assert "CPU 2: 4000 us (not judged: emulated)" in [each.got for each in made.level("latency").findings]
    asked = report(given(measurement=emulated, verdict=verdict(True, {**late, "kind": "protocol"})))
    assert asked.level("latency").verdict == "failed"


def test_hardware_fails_when_the_gate_says_so(hardware: Path) -> None:
    late = {
        "name": "limit",
        "wanted": "20 us at most",
        "got": "31 us",
        "ok": False,
        "place": "host",
        "stage": "cyclictest",
    }
    made = of_hardware(hardware, verdict=verdict(False, late, ok=False))
    assert made.latency_verdict == "failed" and made.level("latency").reason == "host cyclictest limit: 31 us"
    contradicting = of_hardware(hardware, verdict=verdict(False, late, ok=True))
    assert "verdict.json" in contradicting.level("latency").reason
    nothing = of_hardware(hardware, verdict=None)
    assert nothing.level("latency").verdict == "failed" and nothing.evidence == "emulated"
    said_emulated = of_hardware(hardware, verdict=verdict(emulated=True))
    assert said_emulated.evidence == "emulated"


def runs(directory: Path, pattern: str) -> list[Path]:
    return sorted(directory.glob(pattern))


def reseal(directory: Path) -> None:
    """Make run.json and end.json agree with what lies there, as somebody who made it up would."""
    for place in directory.iterdir():
        ends = {}
        for run in sorted(path for path in place.iterdir() if path.is_dir()):
            said = json.loads((run / record.RUN).read_text())
            said["files"] = {name: record.sha256(run / name) for name in said["files"]}
            (run / record.RUN).write_text(json.dumps(said))
            ends[run.name] = record.sha256(run / record.RUN)
        digests = [record.sha256(place / name) for name in (record.REQUEST, record.MACHINE)]
        record.write(place / record.END, record.End(digests[0], digests[1], ends))


def edit(directory: Path, pattern: str, change: Callable[[Any], object]) -> None:
    path = runs(directory, pattern)[0]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    reseal(directory)


def emptied(directory: Path, pattern: str) -> None:
    runs(directory, pattern)[0].write_text("")
    reseal(directory)


def thread(content: Any) -> Any:
    return content["thread"]["0"]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no end": (lambda d: (d / "host/end.json").unlink(), "end.json"),
    "empty end": (lambda d: (d / "host/end.json").write_text(""), "is empty"),
    "no run": (lambda d: shutil.rmtree(runs(d, "host/0*-cyclictest")[0]), "001-cyclictest"),
    "interrupted": (lambda d: runs(d, "host/*/run.json")[0].unlink(), "cannot be read"),
    "no data": (lambda d: runs(d, "host/*/cyclictest.json")[0].unlink(), "missing"),
    "cut short": (lambda d: runs(d, "host/*/cyclictest.json")[0].write_text("{"), "was changed"),
    "empty, resealed": (
        lambda d: emptied(d, f"{GUEST}/*/cyclictest.json"),
        "empty",
    ),
    "other machine": (
        lambda d: (d / "host/machine.json").write_text((d / "host/machine.json").read_text() + " "),
        "machine.json",
    ),
    "more than there are": (lambda d: edit(d, "host/*/cyclictest.json", lambda c: thread(c).update(cycles=5)), "more"),
    "beyond the maximum": (
        lambda d: edit(d, "host/*/cyclictest.json", lambda c: thread(c)["histogram"].update({"399": 1})),
        "more",
    ),
    "other CPU": (lambda d: edit(d, "host/*/cyclictest.json", lambda c: thread(c).update(cpu=9)), "3,9"),
    "irqlat cut": (lambda d: edit(d, "host/*/irqlat.json", lambda c: c.pop("thread")), "thread"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_measurement_is_red(damage: str, copied: Path) -> None:
    change, said = DAMAGE[damage]
    assert of_hardware(copied).ok
    change(copied)
    made = of_hardware(copied)
    assert not made.ok and made.level("latency").verdict == "failed"
    assert any(said in line for line in red(made)), red(made)


def test_what_an_interrupted_run_left_is_no_run(copied: Path) -> None:
    before = of_hardware(copied)
    for place in ("host", GUEST):
        left = copied / place / "001-cyclictest.interrupted-0"
        left.mkdir()
        (left / "stdout").write_text("# /dev/cpu_dma_la")
        (left / "cyclictest.json").write_text("{")
    after = of_hardware(copied)
    assert after.ok, red(after)
    assert (after.series, after.levels) == (before.series, before.levels)


@pytest.mark.parametrize("name", ["001-cyclictest.interrupted-0", "999-cyclictest"])
def test_a_run_is_missed_under_its_own_name(name: str, copied: Path) -> None:
    (copied / "host/001-cyclictest").rename(copied / "host" / name)
    made = of_hardware(copied)
    assert made.level("latency").verdict == "failed"
    assert any("not as it says: 001-cyclictest/run.json" in line for line in red(made)), red(made)


@pytest.mark.parametrize(
    "name", ["001-cyclictest.interrupted-", "001-cyclictest.interrupted-0.old", "002-interrupted"]
)
def test_a_directory_beside_the_runs_is_not_passed_over(name: str, copied: Path) -> None:
    (copied / "host" / name).mkdir()
    made = of_hardware(copied)
    assert any(f"not as it says: {name}/run.json" in line for line in red(made)), red(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: shutil.rmtree(d / "host"), "has no host/"),
        (lambda d: (d / "host/request.json").unlink(), "request.json cannot be read"),
        (lambda d: (d / GUEST / "machine.json").write_text("{}"), "clocksource is missing|is missing"),
        (lambda d: shutil.copy(d / "host/request.json", d / GUEST), "is the record of host"),
    ],
)
def test_what_is_no_measurement_is_refused(change: Callable[[Path], object], said: str, copied: Path) -> None:
    change(copied)
    with pytest.raises(UserError, match=said):
        read(copied)


def test_a_measurement_of_another_platform_is_refused(hardware: Path) -> None:
    with pytest.raises(UserError, match="is of canoe-pass, not of qemu-q35"):
        report(Given(platform="qemu-q35", measurement=hardware, verdict=verdict()))


def test_tools_that_are_absent_are_told(tmp_path: Path) -> None:
    optional = of_hardware(Made(segments=1, samples=2000, absent="optional").write(tmp_path / "a"))
    assert optional.ok and "not measured: host: oslat (oslat): oslat is not installed" in optional.not_proven
    needed = of_hardware(Made(segments=1, samples=2000, absent="required").write(tmp_path / "b"))
    assert not needed.ok and "oslat is not installed" in needed.level("latency").reason
    bare = of_hardware(Made(segments=1, samples=2000, irqlat=False).write(tmp_path / "c"))
    assert any("irqlat did not run" in each for each in bare.not_proven)


@pytest.mark.parametrize(
    "changes",
    [{"virtualization": "kvm"}, {"hypervisor": True}, {"cpu_model": "QEMU Virtual CPU"}, {"cpu_model": ""}],
)
def test_hardware_needs_a_machine_that_says_so(changes: dict[str, Any], copied: Path) -> None:
    path = copied / "host/machine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    reseal(copied)
    made = of_hardware(copied)
    assert made.evidence == "emulated" and not made.ok and made.latency_verdict == EMULATED


# Comparison -----------------------------------------------------------------------------------


def series_of_blocks(draw: random.Random, count: int, shift: float = 0.0, alike: float = 0.0) -> list[float]:
    """Block maxima as heavy-tailed latencies have them, whole microseconds; `alike` joins neighbours."""
    level, values = 0.0, []
    for _ in range(count):
        level = alike * level + draw.gauss(0, 1)
        values.append(float(round(12 + shift + level + draw.paretovariate(2.5))))
    return values


@pytest.mark.parametrize(("count", "alike"), [(10, 0.0), (30, 0.0), (60, 0.6)])
def test_equal_measurements_show_no_difference_in_most_trials(count: int, alike: float) -> None:
    draw, trials, found = random.Random(7), 300 if count >= 20 else 60, 0
    for _ in range(trials):
        try:
            p = compare(series_of_blocks(draw, count, 0, alike), series_of_blocks(draw, count, 0, alike)).p
        except TooFewError:
            continue
        found += p <= 0.05
    assert found <= trials * 0.085, f"{found} of {trials} differ by chance"


def test_a_shift_is_found_with_its_size() -> None:
    draw, found, held = random.Random(8), 0, 0
    for _ in range(100):
        try:
            said = compare(series_of_blocks(draw, 40, shift=3), series_of_blocks(draw, 40))
        except TooFewError:  # joined by chance, and again
            continue
        found += said.p <= 0.05 and said.shift > 0 and said.superiority > 0.5
        held += said.low <= 3 <= said.high
    assert found >= 95 and held >= 90


def test_the_statistics_are_those_of_the_books() -> None:
    """Mann-Whitney as tables have it, and Holm by hand."""
    now, before = [8.8, 1.1, 7.7, 2.2, 6.6, 3.3, 5.5, 4.4], [14.1, 2.0, 13.1, 3.0, 12.1, 9.1, 11.1, 10.1]
    said = compare(now, before)
    # U is 13, the greatest that is significant with 5 % by the tables for 8 and 8
    assert said.superiority == pytest.approx(13 / 64) and said.p == pytest.approx(0.0499, abs=1e-4)
    assert said.low <= said.shift <= said.high
    with pytest.raises(TooFewError, match="7 blocks now and 8 before: 8 are needed"):
        compare(now[:7], before)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert compare([5.0] * 25, [5.0] * 25).p == 1.0


def test_blocks_that_are_alike_are_joined() -> None:
    draw = random.Random(3)
    now = [float(10 + index // 8 % 2 * 10 + draw.random()) for index in range(256)]
    said = compare(now, list(reversed(now)))
    assert said.joined >= 4 and said.blocks == 256 // said.joined and said.p > 0.05


def test_a_baseline_gives_statements(hardware: Path, tmp_path: Path) -> None:
    before = Made(segments=9, samples=12_000, seed=2, shift_us=-3.0, irqlat=False)
    before.shift_us = 4.0
    made = of_hardware(hardware, baseline=before.write(tmp_path / "before"))
    assert made.baseline is not None
    timers = [each for each in made.baseline.comparisons if each.what == "timer"]
    assert {each.verdict for each in timers if each.statistic == "p99.9"} == {"earlier"}
    assert all("us with 95 %" in each.says and "corrected for" in each.says for each in timers)
    others = [each for each in made.baseline.comparisons if each.what == "handler"]
    assert {each.refused for each in others} == {"the baseline does not have it"}
    (tmp_path / "report.json").write_bytes(encode(made))
    again = of_hardware(hardware, baseline=tmp_path / "report.json")
    assert again.baseline is not None
    assert {each.verdict for each in again.baseline.comparisons} == {"no difference shown"}
    assert all("no proof that there is none" in each.says for each in again.baseline.comparisons)
    assert "no difference shown" in rendered(again)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cpu_model": "Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz"}, "another CPU"),
        ({"interval_us": 500}, "another period"),
        ({"loads": ("disk",)}, "another load"),
        ({"timer_ns": 4_000_000}, "another resolution"),
        ({"kind": "emulated"}, "hardware now and emulated before"),
        ({"segments": 7}, "9 blocks now and 7 before"),
        ({"segment_s": 30}, "blocks of 60 s now and of 30 s before"),
        ({"host": (4, 5), "guest": (5, 6)}, "the baseline does not have it"),
    ],
)
def test_what_is_not_comparable_is_not_compared(
    changes: dict[str, Any], said: str, hardware: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"segments": 9, "samples": 12_000, "irqlat": False} | changes
    made = of_hardware(hardware, baseline=Made(**fields).write(tmp_path / "before"))
    assert made.baseline is not None
    timers = [each for each in made.baseline.comparisons if each.what == "timer"]
    assert timers and {each.verdict for each in timers} == {"not compared"}
    assert any(said in each.says for each in timers), [each.says for each in timers]


def test_a_bad_baseline_is_refused(hardware: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UserError, match="is no report"):
        of_hardware(hardware, baseline=tmp_path / "report.json")
    with pytest.raises(UserError, match="no such file"):
        of_hardware(hardware, baseline=tmp_path / "nothing.json")
    (tmp_path / "report.json").write_bytes(encode(report(given())))
    with pytest.raises(UserError, match="has no latencies"):
        of_hardware(hardware, baseline=tmp_path)
    broken = Made(segments=1, samples=2000).write(tmp_path / "broken")
    (broken / "host/end.json").unlink()
    with pytest.raises(UserError, match="is not whole"):
        of_hardware(hardware, baseline=broken)


# The documents --------------------------------------------------------------------------------


def test_the_published_schema_is_that_of_the_code() -> None:
    published = (ROOT / SCHEMA_FILE).read_bytes()
    assert published == json_schema(), f"write it again: python -m pipeline.labrecord >{SCHEMA_FILE}"
    jsonschema.Draft202012Validator.check_schema(json.loads(published))


def test_reports_hold_the_schema(hardware: Path, emulated: Path, tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(json.loads((ROOT / SCHEMA_FILE).read_text()))
    events = json.dumps(ATTRIBUTION).encode()
    every = [
        report(given()),
        of_hardware(hardware, attribution=events, baseline=hardware),
        report(given(measurement=emulated, verdict=verdict(emulated=True))),
        report(given(boot=b"")),
    ]
    for made in every:
        validator.validate(json.loads(encode(made)))
        assert decode(encode(made), "it") == made
    broken = json.loads(encode(every[1]))
    broken["series"][0]["what"] = "other"
    broken["more"] = 1
    assert len(list(validator.iter_errors(broken))) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(ok=False), "says ok: False"),
        (lambda r: r["levels"].reverse(), "does not have the levels"),
        (lambda r: r["levels"][1]["findings"][0].update(ok=False), "passed with a red finding: boot"),
        (lambda r: r.update(evidence="emulated", latency_verdict="passed"), "takes emulated"),
        (lambda r: r.update(more=1), "unknown field"),
        (lambda r: r.pop("not_proven"), "missing required field"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(
    change: Callable[[Any], object], said: str, hardware: Path, tmp_path: Path
) -> None:
    data = json.loads(encode(of_hardware(hardware)))
    change(data)
    (tmp_path / RECORD).write_text(json.dumps(data))
    with pytest.raises(UserError, match=said):
        load(tmp_path / RECORD)


def test_junit_has_a_suite_for_each_level_and_a_case_for_each_finding(emulated: Path) -> None:
    strange = {**FINDING, "name": 'a "b" <c>', "got": "\x00\x1b[31m <&>", "ok": False}
    made = report(
        given(
            stack=stack(findings=[FINDING, FINDING, strange], ok=False),
            measurement=emulated,
            verdict=verdict(emulated=True),
        )
    )
    root = xml.fromstring(junit(made))  # noqa: S314  # ours
    assert [suite.get("name") for suite in root] == list(LEVELS)
    for suite, level in zip(root, made.levels, strict=True):
        cases = suite.findall("testcase")
        skipped = level.verdict == "not proven"
        assert len(cases) == len(level.findings) + skipped == int(suite.get("tests", ""))
        failures = sum(not each.ok for each in level.findings)
        assert len(suite.findall("testcase/failure")) == failures == int(suite.get("failures", ""))
        assert len(suite.findall("testcase/skipped")) == skipped == int(suite.get("skipped", ""))
        assert len({(case.get("classname"), case.get("name")) for case in cases}) == len(cases)
        for case in cases:
            assert set(case.attrib) == {"name", "classname"} and len(case) <= 1
    assert root.get("failures") == "1" and root.get("skipped") == "1"
    failure = root.find(".//failure")
    assert failure is not None and failure.get("message") == "wanted running; got ??[31m <&>"
    assert (
        EMULATED in (root.find(".//skipped") or failure).get("message", "")
        or EMULATED in junit(made).decode()
    )


# The page -------------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """The page's text, what it refers to, and whether its elements are closed."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not set(self.open) & {"style"}:
            self.text += f" {data}"


@pytest.fixture(scope="module")
def whole(hardware: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report with everything in it."""
    before = Made(segments=9, samples=12_000, seed=2).write(tmp_path_factory.mktemp("before") / "m")
    late = {
        "name": "limit",
        "wanted": "20 us at most",
        "got": "<31> us",
        "ok": False,
        "place": "host",
        "stage": "cyclictest",
    }
    pins = {"canoe-guest": (1, 2, 3)}
    return of_hardware(
        hardware, baseline=before, attribution=json.dumps(ATTRIBUTION).encode(), pins=pins,
        verdict=verdict(False, late, ok=False),
    )  # fmt: skip


def test_the_page_needs_nothing_else_and_says_all(whole: Report) -> None:
    project = Project(ROOT)
    text = rendered(whole, plan_svg(project.recipes.plans[PLATFORM], "plan"))
    found = Reader(text)
    assert not found.tags & {"script", "link", "iframe", "object", "embed"}
    assert "url(" not in text and "@import" not in text and "http" not in text.replace("http-equiv", "")
    assert len(found.ids) == len(set(found.ids))
    for reference in found.references:
        assert reference.startswith("data:image/svg+xml;base64,") or reference.removeprefix("#") in found.ids
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text and "@media print" in text
    words = " ".join(found.text.split())
    for said in (
        "failed: latency", "<31> us", "CPU 3 was taken from vCPU 1 for 210 ms by thread disturb (fifo 50, pid 123)",
        "host max 20 us, avg 3 us", "What was not proven", "Comparison", whole.places[0].cmdline, "c" * 64,
        "6.12.107-rt-virt-host-0123456789ab", "samples by latency",
    ):  # fmt: skip
        assert said in words, said
    listed = [each for each in words[words.index("latency: failed") :].split() if each in ("RED", "fine")]
    assert listed[0] == "RED" and listed.count("RED") == 1 and len(listed) > 5
    assert EMULATED not in words.replace(f"stack: {EMULATED}", "")


def test_every_series_has_a_picture_and_its_numbers(whole: Report) -> None:
    text = rendered(whole)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == len(whole.series) == 8
    for picture, series in zip(pictures[:2], whole.series[:1], strict=False):
        document = xml.fromstring(picture)  # noqa: S314  # ours
        labels = [each.text or "" for each in document.iter("text")]
        assert {"limit: max 20 us", "limit: avg 3 us"} <= set(labels)
        assert document.get("role") == "img" and str(series.samples) in (document.get("aria-label") or "")
    assert "limit: max 60 us" in pictures[1], "beside the host's CPU is the vCPU that runs on it"
    for series in whole.series:
        assert f"<td>{series.samples}</td>" in text
    irq = [picture for picture in pictures if "limit:" not in picture]
    assert len(irq) == 4, "no threshold is about interrupts"


def test_pictures_share_their_axes_and_keep_their_counts(whole: Report) -> None:
    timers = [each for each in whole.series if each.what == "timer"]
    axes = scale(timers, LIMITS)
    assert axes.greatest >= 60 and axes.x(axes.greatest) == 448
    assert axes.y(1) < 208 and axes.y(max(timers[0].histogram.values())) >= 62
    drawn = svg(timers[0], axes, LIMITS, "t", "d", "")
    tops = {match for match in re.findall(r"V([\d.]+)H", drawn)}
    for count in set(timers[0].histogram.values()):
        assert f"{axes.y(count):.1f}" in tops or count not in _seen(timers[0]), count
    assert f"M{axes.x(timers[0].max_us):.1f} 208 l-4 7" in drawn
    beyond = msgspec.structs.replace(timers[0], overflows=3)
    assert "3 beyond 400 us" in svg(beyond, axes, None, "t", "d", "")
    assert EMULATED in svg(timers[0], axes, None, "t", "d", EMULATED)


def _seen(series: Any) -> set[int]:
    """Counts of latencies that have columns of their own."""
    return {count for latency, count in series.histogram.items() if int(latency) < 20}


def test_rows_bring_together_who_runs_on_a_cpu(whole: Report) -> None:
    timers = [each for each in whole.series if each.what == "timer"]
    names = [[each and (each.place, each.cpu) for each in row] for row in rows(timers)]
    assert names == [[("host", 2), (GUEST, 1)], [("host", 3), (GUEST, 2)]]
    alone = rows([each for each in timers if each.place != "host"])
    assert [row[0] for row in alone] == [None, None]


def test_ticks_are_round() -> None:
    assert ticks(1, 66, True) == [1, 2, 5, 10, 20, 50]
    assert ticks(10, 4000, True) == [10, 100, 1000]
    assert ticks(0, 12, False) == [0, 2, 4, 6, 8, 10, 12]
    assert ticks(0, 1, False) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_no_wider_than_the_screen(width: int, whole: Report, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    width_of = "document.documentElement.scrollWidth + ' of ' + window.innerWidth"
    measure = f"<script>parent.document.title = {width_of}</script>"
    text = rendered(whole, plan_svg(Project(ROOT).recipes.plans[PLATFORM], "plan"))
    inner = text.replace("<details>", "<details open>").replace("</body>", f"{measure}</body>")
    quoted = inner.replace("&", "&amp;").replace('"', "&quot;")
    # headless Chromium makes no window that narrow, but a frame may be
    frame = f'<iframe style="border:0" width="{width}" height="900" srcdoc="{quoted}"></iframe>'
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><title></title>{frame}")
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path}/profile",
         f"--window-size={width + 100},900", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    measured = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert measured, done.stderr
    assert int(measured[2]) == width and int(measured[1]) <= width


# The command ----------------------------------------------------------------------------------


def doit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "doit", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )


def test_the_command_makes_the_report_of_a_measurement(copied: Path, hardware: Path, tmp_path: Path) -> None:
    said: Mapping[str, Any] = verdict()
    (copied / "verdict.json").write_text(json.dumps(said))
    done = doit("report", str(copied), "--baseline", str(hardware), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "latency: passed: all of" in done.stdout and "no difference shown" in done.stdout
    made = load(tmp_path / "out" / RECORD)
    assert made.limits is not None and made.limits.host_max_us == 20
    assert {path.name for path in (tmp_path / "out").iterdir()} == {PAGE, RECORD, JUNIT}
    text = (tmp_path / "out" / PAGE).read_text()
    assert "the host that was measured had another one" in text and "data:image/svg+xml" in text
    (copied / "verdict.json").unlink()
    without = doit("report", str(copied))
    assert (
        without.returncode == 1
        and "red: latency: verdict.json: wanted the gate's verdict; got none" in without.stdout
    )
    assert not load(copied / "report" / RECORD).ok


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "doit report takes one DIR"),
        (("/nowhere",), "there is no directory /nowhere"),
        (("/usr",), "/usr is no measurement"),
        (("/usr", "--baseline", "/nowhere"), "there is no /nowhere"),
        (("/usr", "--out="), "--out names nothing"),
    ],
)
def test_the_command_refuses(arguments: tuple[str, ...], reason: str) -> None:
    done = doit("report", *arguments)
    assert done.returncode == 2 and reason in done.stderr + done.stdout, done.stderr
