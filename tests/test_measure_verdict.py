"""The latency gate fails closed: each way a measurement can be wrong is a finding, and none of them passes."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import boot, stack
from pipeline.measure import record, verdict
from pipeline.measure.expectations import Expectations, ExpectationsError, from_json, load, to_json
from pipeline.measure.problems import MeasureError
from pipeline.measure.verdict import NO_EVIDENCE, Verdict, judge, uncovered
from tests import measured
from tests.measured import GUEST, NOW_S, Measured

#: Runs of the made-up measurement that changes are made to.
FIRST, SECOND, LOAD, OTHER = "001-cyclictest", "002-cyclictest", "003-load", "003-irqlat"

Change = Callable[[Measured], object]


def judged(made: Measured, directory: Path, wanted: Expectations | None = None) -> Verdict:
    return judge(made.write(directory / "measurement"), wanted or measured.expectations(), NOW_S)


def wrong(found: Verdict) -> set[str]:
    """Names of the findings that are not fine, with their place; what follows from others is not told."""
    told = {
        " ".join(part for part in (each.place, each.stage, each.name) if part)
        for each in found.findings
        if not each.ok
    }
    follows = {"measured CPUs", "judged CPUs", "judged"}
    return {each for each in told if each.rpartition(" ")[2] != "CPUs" and each not in follows} or told


def test_a_good_measurement_on_hardware_passes(tmp_path: Path) -> None:
    found = judged(Measured(), tmp_path)
    assert wrong(found) == set()
    assert (found.latency, found.evidence, found.protocol_ok) == ("passed", "hardware", True)
    assert found.latencies["host"]["cyclictest"]["3"] == {"min": 1, "avg": 1.0, "max": 9, "samples": 120_000}
    assert found.latencies[GUEST]["irqlat"]["1"]["thread"]["samples"] == 120_000


def test_documents_lie_there_as_the_record_writes_them(tmp_path: Path) -> None:
    measured.put(tmp_path / "put", Measured().machines["host"])
    record.write(tmp_path / "written", record.Machine(**Measured().machines["host"]))
    assert (tmp_path / "put").read_bytes() == (tmp_path / "written").read_bytes()


def test_a_good_emulated_measurement_is_no_evidence(tmp_path: Path) -> None:
    found = judged(Measured(hardware=False), tmp_path)
    assert wrong(found) == set()
    assert (found.latency, found.evidence, found.protocol_ok) == (NO_EVIDENCE, "emulated", True)


# One change of what was recorded, with every digest right -------------------------------------


def run(made: Measured, name: str = SECOND, place: str = GUEST) -> dict[str, Any]:
    return made.runs[place][name]


def tool(made: Measured, name: str = SECOND, place: str = GUEST) -> dict[str, Any]:
    """What cyclictest or irqlat left."""
    files = made.files[place][name]
    return next(content for file, content in files.items() if file.endswith(".json"))


def asked_stage(made: Measured, place: str = GUEST) -> dict[str, Any]:
    return made.requests[place]["stages"][0]  # type: ignore[no-any-return]


def threads(made: Measured) -> list[dict[str, Any]]:
    return run(made)["threads"]  # type: ignore[no-any-return]


def shift(made: Measured, seconds: float, *clocks: str, name: str = SECOND, place: str = GUEST) -> None:
    """Let some clocks of a run's end say something else."""
    for clock in clocks:
        run(made, name, place)["ended"][clock] += int(seconds * 10**9)


def option(made: Measured, before: str, after: str) -> None:
    """Another command, which cyclictest tells as well."""
    words = run(made)["argv"]
    words[words.index(before)] = after
    tool(made)["cmdline:"] = " ".join(words)


def starved(made: Measured) -> None:
    measured.thread(tool(made), {1: 30_000}, "1")


def beyond(made: Measured) -> None:
    """One latency that the histogram has no place for."""
    thread = tool(made)["thread"]["1"]
    thread["histogram"]["1"] -= 1
    thread["max"] = 5000
    thread["avg"] = round(thread["avg"] + 5000 / 60_000, 2)


def text(made: Measured, before: str, after: str, name: str = SECOND, place: str = GUEST) -> None:
    """Another spelling of what the tool left."""
    file = next(file for file in made.files[place][name] if file.endswith(".json"))
    said = json.dumps(made.files[place][name][file])
    assert before in said
    made.files[place][name][file] = said.replace(before, after, 1)


def late(made: Measured, place: str, us: int) -> None:
    name = FIRST
    measured.thread(tool(made, name, place), {1: 59_999, us: 1})


def slow(made: Measured, place: str, us: int) -> None:
    for name in (FIRST, SECOND):
        measured.thread(tool(made, name, place), {us: 60_000})


def rebooted(made: Measured) -> None:
    """The last runs of the guest are of another boot."""
    for name in (SECOND, OTHER, "004-irqlat"):
        run(made, name)["boot_id"] = "another"


def mixed(made: Measured) -> None:
    run(made)["boot_id"] = "another"


def shorter_load(made: Measured) -> None:
    """The host's load ends before the guest's last run does, and nothing else is amiss."""
    for place in made.runs:
        for each in made.runs[place].values():
            if place == GUEST:
                for when in ("began", "ended"):
                    for clock in each[when]:
                        each[when][clock] += 300 * 10**9
    for name in (FIRST, SECOND):
        began = run(made, name)["began"]["realtime"] // 10**9
        for key, seconds in (("start_time", began), ("end_time", began + 60)):
            made.files[GUEST][name]["cyclictest.json"][key] = measured.at(seconds)


C = f"{GUEST} cyclictest"
I = f"{GUEST} irqlat"  # noqa: E741
#: By what was done: how, and which findings are not fine.
CHANGES: dict[str, tuple[Change, set[str]]] = {
    # what it ran on
    "another kernel": (
        lambda m: m.machines["host"].update(kernel_release="6.1"),
        {"host kernel", "host cyclictest origin"},
    ),
    "another kernel of the guest": (
        lambda m: m.machines[GUEST].update(kernel_release="6.1"),
        {f"{GUEST} kernel", f"{C} origin"},
    ),
    "not real-time": (
        lambda m: m.machines[GUEST].update(kernel_version="#1 SMP PREEMPT_DYNAMIC"),
        {f"{GUEST} real-time", f"{C} origin"},
    ),
    "nearly real-time": (
        lambda m: m.machines[GUEST].update(kernel_version="#1 NOT_PREEMPT_RT"),
        {f"{GUEST} real-time", f"{C} origin"},
    ),
    "another plan": (lambda m: m.machines["host"].update(plan_sha256="b" * 64), {"host plan"}),
    "no plan": (lambda m: m.machines["host"].update(plan_sha256=""), {"host plan"}),
    "a plan in a guest": (lambda m: m.machines[GUEST].update(plan_sha256="a" * 64), {f"{GUEST} plan"}),
    "others isolated": (lambda m: m.machines["host"].update(isolated="2"), {"host isolated"}),
    "more isolated": (lambda m: m.machines["host"].update(isolated="1-3"), {"host isolated"}),
    "isolated unreadable": (lambda m: m.machines["host"].update(isolated="2-"), {"host isolated"}),
    "a list without end": (lambda m: m.machines["host"].update(isolated="0-999999999"), {"host isolated"}),
    "ticks": (lambda m: m.machines["host"].update(nohz_full="(null)"), {"host nohz_full"}),
    "ticks in the guest": (lambda m: m.machines[GUEST].update(nohz_full="1"), {f"{GUEST} nohz_full"}),
    "slow clock in the guest": (
        lambda m: m.machines[GUEST].update(clocksource="acpi_pm"),
        {f"{GUEST} clock source"},
    ),
    "timers of a tick": (lambda m: m.machines[GUEST].update(timer_ns=1_000_000), {f"{GUEST} timers"}),
    "timers of a tick on the host": (
        lambda m: m.machines["host"].update(timer_ns=4_000_000),
        {"host timers"},
    ),
    # what was asked
    "request changed": (lambda m: m.requests["host"].update(kernel_release="6.12-other"), {"host request"}),
    "stage shorter": (lambda m: asked_stage(m).update(duration_s=60), {f"{GUEST} request"}),
    "request of another place": (lambda m: m.requests[GUEST].update(place="guest-h"), {f"{GUEST} request"}),
    "not required any more": (lambda m: asked_stage(m).update(required=False), {f"{GUEST} request"}),
    # which runs there are
    "run missing": (lambda m: m.runs[GUEST].pop(SECOND), {f"{GUEST} end", f"{GUEST} runs", f"{C}"}),
    "one segment twice": (lambda m: run(m).update(segment=0), {f"{GUEST} runs"}),
    "order changed": (
        lambda m: (run(m).update(segment=0), run(m, FIRST).update(segment=1)),
        {f"{GUEST} runs", C},
    ),
    "of another stage": (lambda m: run(m).update(stage="irqlat"), {f"{GUEST} runs"}),
    "of another tool": (lambda m: run(m).update(tool="oslat"), {f"{GUEST} runs"}),
    "host missing": (
        lambda m: m.left_out.add("host"),
        {"places", "host request", "host machine", "host end", "host runs", f"{GUEST} load of the host"},
    ),
    "guest missing": (
        lambda m: m.left_out.add(GUEST),
        {
            "places",
            f"{GUEST} request",
            f"{GUEST} machine",
            f"{GUEST} end",
            f"{GUEST} runs",
            f"{GUEST} load of the host",
        },
    ),
    "refused": (lambda m: run(m).update(refused="no timers"), {f"{C} measured"}),
    # how a run went
    "crashed, with JSON": (lambda m: run(m).update(status=1), {f"{C} status"}),
    "ended by a signal": (lambda m: run(m).update(status=-9), {f"{C} status"}),
    "load of the host failed": (
        lambda m: run(m, LOAD, "host").update(status=1),
        {"host load status", f"{GUEST} load of the host"},
    ),
    "clock set": (lambda m: shift(m, 5, "realtime"), {f"{C} clocks", f"{GUEST} order"}),
    "clock set back": (lambda m: shift(m, -5, "realtime"), {f"{C} clocks", f"{C} origin", f"{GUEST} order"}),
    "slept": (lambda m: shift(m, 5, "boottime"), {f"{C} clocks"}),
    "backwards": (
        lambda m: shift(m, -70, "realtime", "monotonic", "boottime"),
        {f"{C} clocks", f"{C} duration", f"{C} cycles", f"{C} origin"},
    ),
    "a clock that stands": (
        lambda m: [run(m)[when].update(boottime=0) for when in ("began", "ended")],
        {f"{C} clocks"},
    ),
    "too short by the clock": (
        lambda m: shift(m, -3, "realtime", "monotonic", "boottime"),
        {f"{C} duration", f"{C} cycles", f"{C} origin"},
    ),
    "load of the host too short": (
        lambda m: shift(m, -300, "realtime", "monotonic", "boottime", name=LOAD, place="host"),
        {"host load duration", f"{GUEST} load of the host"},
    ),
    "load of the host elsewhere": (shorter_load, {f"{GUEST} load of the host"}),
    "overlapping runs": (lambda m: shift(m, 20, "realtime", "monotonic", "boottime"), {f"{GUEST} order"}),
    "runs that overlap a little": (
        lambda m: shift(m, 0.8, "realtime", "monotonic", "boottime"),
        {f"{GUEST} order"},
    ),
    "boots mixed": (mixed, {f"{GUEST} boot"}),
    "boot of another record": (lambda m: m.machines[GUEST].update(boot_id="other"), {f"{GUEST} boot"}),
    # loads
    "load dead": (lambda m: run(m)["loads"][0].update(alive=False), {f"{C} loads"}),
    "load missing": (lambda m: run(m)["loads"].pop(), {f"{C} loads"}),
    "load twice": (lambda m: run(m)["loads"].append(run(m)["loads"][0]), {f"{C} loads"}),
    "load idle": (lambda m: run(m)["loads"][1].update(cpu_s=5.9), {f"{C} loads"}),
    "load below nothing": (lambda m: run(m)["loads"][1].update(cpu_s=-60.0), {f"{C} loads"}),
    "load on measured CPUs": (lambda m: run(m)["loads"][0].update(cpus=[0, 1]), {f"{C} loads"}),
    "load nowhere": (lambda m: run(m)["loads"][0].update(cpus=[]), {f"{C} loads"}),
    "load without a command": (lambda m: run(m)["loads"][0].update(argv=[]), {f"{C} loads"}),
    "load of the host dead": (
        lambda m: run(m, LOAD, "host")["loads"][0].update(alive=False),
        {"host load loads"},
    ),
    # threads
    "thread missing": (lambda m: threads(m).pop(), {f"{C} threads"}),
    "no threads": (lambda m: threads(m).clear(), {f"{C} threads"}),
    "thread twice": (lambda m: threads(m).append(threads(m)[-1]), {f"{C} threads"}),
    "wrong policy": (lambda m: threads(m)[1].update(policy=2), {f"{C} threads"}),
    "no policy": (lambda m: threads(m)[1].update(policy=0, priority=0), {f"{C} threads"}),
    "wrong priority": (lambda m: threads(m)[1].update(priority=79), {f"{C} threads"}),
    "free to move": (lambda m: threads(m)[1].update(cpus=[1, 2]), {f"{C} threads"}),
    "not on isolated CPUs": (lambda m: threads(m)[1].update(cpus=[0]), {f"{C} threads"}),
    "main thread where it measures": (lambda m: threads(m)[0].update(cpus=[0, 1]), {f"{C} threads"}),
    "main thread elsewhere": (lambda m: threads(m)[0].update(cpus=[0, 7]), {f"{C} threads"}),
    "main thread nowhere": (lambda m: threads(m)[0].update(cpus=[]), {f"{C} threads"}),
    # the command
    "another program": (lambda m: option(m, "cyclictest", "cyclicsham"), {f"{C} command"}),
    "no command": (lambda m: run(m).update(argv=[]), {f"{C} command", f"{C} origin"}),
    "another priority": (lambda m: option(m, "-p80", "-p8"), {f"{C} command"}),
    "another period": (lambda m: option(m, "-i1000", "-i100000"), {f"{C} command"}),
    "another policy": (lambda m: option(m, "--policy=fifo", "--policy=other"), {f"{C} command"}),
    "other CPUs asked for": (lambda m: option(m, "1,2", "0,1"), {f"{C} command"}),
    "shorter by command": (lambda m: option(m, "60", "6"), {f"{C} command"}),
    "nanoseconds": (lambda m: option(m, "-q", "-N"), {f"{C} command"}),
    "a priority given twice": (lambda m: option(m, "-q", "-p80"), {f"{C} command"}),
    "memory not locked": (lambda m: option(m, "-m", "-q"), {f"{C} command"}),
    # cyclictest's own word
    "not its command": (lambda m: run(m)["argv"].append("-q"), {f"{C} command", f"{C} origin"}),
    "made elsewhere": (lambda m: tool(m)["sysinfo"].update(release="6.1"), {f"{C} origin"}),
    "made by another build": (
        lambda m: tool(m)["sysinfo"].update(version="#2 SMP PREEMPT_RT"),
        {f"{C} origin"},
    ),
    "made without PREEMPT_RT": (
        lambda m: tool(m)["sysinfo"].update(version="#1 SMP PREEMPT_DYNAMIC"),
        {f"{C} origin"},
    ),
    "made nobody knows where": (lambda m: tool(m).pop("sysinfo"), {f"{C} origin"}),
    "in nanoseconds": (lambda m: tool(m).update(resolution_in_ns=1), {f"{C} origin"}),
    "an old result": (
        lambda m: tool(m).update(start_time=measured.at(0), end_time=measured.at(60)),
        {f"{C} origin"},
    ),
    "a result to come": (lambda m: tool(m).update(end_time=measured.at(NOW_S + 9999)), {f"{C} origin"}),
    "too short by its own clock": (lambda m: tool(m).update(end_time=tool(m)["start_time"]), {f"{C} origin"}),
    "no time": (lambda m: tool(m).pop("start_time"), {f"{C} origin"}),
    "a number for a time": (lambda m: tool(m).update(end_time=1), {f"{C} origin"}),
    "times that are none": (lambda m: tool(m).update(end_time="yesterday"), {f"{C} origin"}),
    # cyclictest's numbers
    "starved": (starved, {f"{C} cycles"}),
    "too few samples": (lambda m: measured.thread(tool(m), {1: 59_399}), {f"{C} cycles"}),
    "too many samples": (lambda m: measured.thread(tool(m), {1: 60_502}), {f"{C} cycles"}),
    "one beyond the histogram": (beyond, {f"{C} histogram", f"{C}"}),
    "histogram lacks one": (
        lambda m: tool(m)["thread"]["1"]["histogram"].update({"9": 9}),
        {f"{C} histogram"},
    ),
    "histogram has one too many": (
        lambda m: tool(m)["thread"]["1"]["histogram"].update({"9": 11}),
        {f"{C} histogram"},
    ),
    "maximum too small": (lambda m: tool(m)["thread"]["1"].update(max=8), {f"{C} histogram"}),
    "maximum too great": (lambda m: tool(m)["thread"]["1"].update(max=10), {f"{C} histogram"}),
    "minimum wrong": (lambda m: tool(m)["thread"]["1"].update(min=0), {f"{C} histogram"}),
    "average wrong": (lambda m: tool(m)["thread"]["1"].update(avg=1.2), {f"{C} histogram"}),
    "wider than asked": (lambda m: measured.thread(tool(m), {1: 59_999, 1000: 1}), {f"{C} histogram"}),
    # irqlat
    "interrupts lost": (lambda m: tool(m, OTHER).update(lost=1, requested=60_001), {f"{I} samples"}),
    "interrupts unaccounted for": (lambda m: tool(m, OTHER).update(requested=60_001), {f"{I} samples"}),
    "fewer asked for": (
        lambda m: text(m, '"requested": 60000', '"requested": 50000', OTHER),
        {f"{I} samples"},
    ),
    "more than time allows": (
        lambda m: tool(m, OTHER).update(interval_us=2000),
        {f"{I} asked", f"{I} samples"},
    ),
    "interrupt elsewhere": (lambda m: tool(m, OTHER).update(irq_cpu=0), {f"{I} asked"}),
    "measured elsewhere": (lambda m: tool(m, OTHER).update(cpu=2), {f"{I} asked"}),
    "thread's priority": (lambda m: tool(m, OTHER).update(priority=1), {f"{I} asked"}),
    "thread's policy": (lambda m: tool(m, OTHER).update(policy="other"), {f"{I} asked"}),
    "another histogram": (lambda m: tool(m, OTHER).update(histogram_us=10), {f"{I} asked"}),
    "irqlat without a timer": (lambda m: tool(m, OTHER).update(timer_ns=0), {f"{I} asked"}),
    "overflow of a thread": (lambda m: tool(m, OTHER)["thread"].update(overflows=1), {f"{I} histogram"}),
    "overflow of a handler": (
        lambda m: (
            tool(m, OTHER)["handler"].update(overflows=1, max=2000, avg=3.0333),
            tool(m, OTHER)["handler"]["histogram"].update({"9": 0}),
        ),
        {f"{I} histogram"},
    ),
    "irqlat's maximum": (lambda m: tool(m, OTHER)["thread"].update(max=10), {f"{I} histogram"}),
    "irqlat for a shorter time": (
        lambda m: run(m, OTHER)["argv"].__setitem__(5, "--duration=1"),
        {f"{I} command"},
    ),
    # limits
    "late": (lambda m: late(m, "host", 20), {"host cyclictest max"}),
    "late in the guest": (lambda m: late(m, GUEST, 60), {f"{C} max"}),
    "slow": (lambda m: slow(m, "host", 2), {"host cyclictest avg"}),
    "slow in the guest": (lambda m: slow(m, GUEST, 25), {f"{C} avg"}),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_one_change_is_found(name: str, tmp_path: Path) -> None:
    change, findings = CHANGES[name]
    made = Measured()
    change(made)
    found = judged(made, tmp_path)
    assert found.latency == "failed"
    told = wrong(found)
    # a whole stage, where all of its findings fail together
    for stage in {each for each in findings if each in (C, I)}:
        told = {each for each in told if not each.startswith(f"{stage} ")} | {stage}
        findings = {each for each in findings if not each.startswith(f"{stage} ")}
    assert told == findings
    assert found.protocol_ok is all(each.rpartition(" ")[2] in ("max", "avg") for each in findings)


UNREADABLE: dict[str, Callable[[Measured], None]] = {
    "empty": lambda m: m.files[GUEST][SECOND].update({"cyclictest.json": ""}),
    "cut short": lambda m: m.files[GUEST][SECOND].update({"cyclictest.json": json.dumps(tool(m))[:-9]}),
    "a list": lambda m: m.files[GUEST][SECOND].update({"cyclictest.json": "[]"}),
    "deep": lambda m: m.files[GUEST][SECOND].update({"cyclictest.json": "[" * 100_000}),
    "crashed": lambda m: tool(m).update(return_code=1),
    "return code of another kind": lambda m: tool(m).update(return_code=False),
    "no threads": lambda m: tool(m).update(thread={}, num_threads=0),
    "fewer threads than told": lambda m: tool(m)["thread"].pop("1"),
    "NaN": lambda m: tool(m)["thread"]["1"].update(avg=float("nan")),
    "infinite": lambda m: tool(m)["thread"]["1"].update(max=float("inf")),
    "huge": lambda m: tool(m)["thread"]["1"].update(cycles=2**64),
    "huge average": lambda m: text(m, '"avg": 1.0', '"avg": 1e400'),
    "thousands of digits": lambda m: text(m, '"max": 9', f'"max": {"9" * 5000}'),
    "negative": lambda m: tool(m)["thread"]["1"].update(min=-1),
    "negative count": lambda m: tool(m)["thread"]["1"]["histogram"].update({"9": -10}),
    "a truth value": lambda m: tool(m)["thread"]["1"].update(min=True),
    "text": lambda m: tool(m)["thread"]["1"].update(max="9"),
    "average beyond the maximum": lambda m: tool(m)["thread"]["1"].update(avg=9.5),
    "a name twice": lambda m: text(m, '"max": 9', '"max": 9, "max": 9'),
    "a latency twice": lambda m: text(m, '"9": 10', '"9": 5, "09": 5'),
    "latency of another kind": lambda m: text(m, '"9": 10', '"-9": 10'),
}


@pytest.mark.parametrize("name", sorted(UNREADABLE))
def test_a_result_that_is_none(name: str, tmp_path: Path) -> None:
    made = Measured()
    UNREADABLE[name](made)
    found = judged(made, tmp_path)
    assert found.latency == "failed"
    assert wrong(found) == {f"{C} origin", f"{C} cycles", f"{C} histogram"}
    assert "cyclictest" not in found.latencies[GUEST]


IRQLAT: list[Callable[[dict[str, Any]], object]] = [
    lambda data: data.update(schema=2),
    lambda data: data.update(tool="cyclictest"),
    lambda data: data.update(device=""),
    lambda data: data.pop("lost"),
    lambda data: data.update(samples="60000"),
    lambda data: data.update(lost=-1),
    lambda data: data["handler"].update(avg=10),
    lambda data: data["thread"].update(avg=None),
    lambda data: data["thread"].update(min=-1),
    lambda data: data["thread"]["histogram"].update({"x": 0}),
    lambda data: data["thread"]["histogram"].update({"09": 0}),
    lambda data: data["thread"].update(overflows=0.0),
    lambda data: data["max_over_time"].append({"at_s": 1, "handler": 9, "thread": 10}),
    lambda data: data.update(max_over_time=3),
]


@pytest.mark.parametrize("change", IRQLAT)
def test_a_result_of_irqlat_that_is_none(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    made = Measured()
    change(tool(made, OTHER))
    found = judged(made, tmp_path)
    assert found.latency == "failed"
    assert wrong(found) == {f"{I} asked", f"{I} samples", f"{I} histogram"}


def test_cpus_that_are_not_those_asked_for(tmp_path: Path) -> None:
    made = Measured()
    tool(made)["thread"]["1"]["cpu"] = 0
    told = {(each.stage, each.name) for each in judged(made, tmp_path).findings if not each.ok}
    assert ("cyclictest", "measured CPUs") in told


# What is no change of a record, but of what is asked --------------------------------------------


@pytest.mark.parametrize(
    ("changes", "findings"),
    [
        ({"oldest_s": NOW_S - 3000}, {"host age", f"{GUEST} age"}),
        ({"max_age_s": 1800}, {"host age", f"{GUEST} age"}),
        ({"minimum_s": 121}, {"host long enough", f"{GUEST} long enough"}),
        (
            {"load_shares": {"hackbench": 0.1, "stress": 0.31}},
            {f"{each} loads" for each in ("host cyclictest", "host load", C, I)},
        ),
    ],
)
def test_other_expectations(changes: dict[str, Any], findings: set[str], tmp_path: Path) -> None:
    found = judged(Measured(), tmp_path, replace(measured.expectations(), **changes))
    assert (wrong(found), found.latency) == (findings, "failed")


@pytest.mark.parametrize(("seconds", "fine"), [(2900, False), (3600, True)])
def test_a_measurement_from_the_future(seconds: int, fine: bool, tmp_path: Path) -> None:
    wanted = replace(measured.expectations(), max_age_s=0)
    found = judge(Measured().write(tmp_path / "m"), wanted, NOW_S - 3600 + seconds - 2900)
    assert ("host age" not in wrong(found)) is fine


def without_limits(place: str, **unjudged: str) -> Expectations:
    wanted = measured.expectations()
    changed = replace(wanted.places[place], limits={}, unjudged={"irqlat": "nobody", **unjudged})
    return replace(wanted, places={**wanted.places, place: changed})


def test_what_has_no_limit_does_not_pass(tmp_path: Path) -> None:
    found = judged(Measured(), tmp_path, without_limits(GUEST))
    assert (found.latency, found.protocol_ok) == ("failed", True)
    told = {each.name: each.got for each in found.findings if not each.ok}
    assert told == {"limit": "no limit was set", "judged CPUs": "none"}


def test_a_reason_to_have_no_limit_does_not_pass_either(tmp_path: Path) -> None:
    found = judged(Measured(), tmp_path, without_limits(GUEST, cyclictest="the recipe has none"))
    assert (found.latency, found.protocol_ok) == ("failed", True)
    told = {each.name: each.got for each in found.findings if not each.ok}
    assert told == {"judged CPUs": "none"}


def test_without_load_nothing_passes_that_had_to_be_under_load(tmp_path: Path) -> None:
    made, wanted = Measured(), measured.expectations()
    places = {}
    for place, expected in wanted.places.items():
        stages = [
            each if each.tool == "load" else replace(each, loads=[]) for each in expected.request.stages
        ]
        places[place] = replace(expected, request=replace(expected.request, stages=stages))
        for each in made.requests[place]["stages"]:
            each["loads"] = each["loads"] if each["tool"] == "load" else []
        for name, each in made.runs[place].items():
            each["loads"] = each["loads"] if name == LOAD else []
    calm = replace(wanted, places=places)
    assert wrong(judged(made, tmp_path, calm)) == {f"{each} loaded" for each in ("host cyclictest", C, I)}
    found = judge(tmp_path / "measurement", replace(calm, load_required=False), NOW_S)
    assert (wrong(found), found.latency) == (set(), "passed")


def optional(made: Measured, wanted: Expectations, said: str) -> Expectations:
    """The guest's irqlat is asked for where it is possible, and refused."""
    expected = wanted.places[GUEST]
    stages = [replace(each, required=each.tool != "irqlat") for each in expected.request.stages]
    made.requests[GUEST]["stages"][1]["required"] = False
    for name in (OTHER, "004-irqlat"):
        made.runs[GUEST][name].update(refused=said, threads=[], loads=[])
        made.files[GUEST][name].clear()
    request = replace(expected.request, stages=stages)
    return replace(wanted, places={**wanted.places, GUEST: replace(expected, request=request)})


def test_what_was_asked_for_where_possible_is_told(tmp_path: Path) -> None:
    made = Measured()
    wanted = optional(made, measured.expectations(), "irqlat is not installed")
    found = judged(made, tmp_path, wanted)
    assert (wrong(found), found.latency) == (set(), "passed")
    told = [each for each in found.findings if each.name == "measured"]
    assert [(each.stage, each.got, each.ok) for each in told] == [
        ("irqlat", "not measured: irqlat is not installed", True)
    ]
    assert "irqlat" not in found.latencies[GUEST]


def test_a_reboot_is_told(tmp_path: Path) -> None:
    made = Measured()
    rebooted(made)
    found = judged(made, tmp_path)
    assert found.latency == "passed"
    assert [each.got for each in found.findings if (each.place, each.name) == (GUEST, "boot")] == [
        "2 boots: resumed after each"
    ]


def test_what_was_interrupted_is_told_and_made_again(tmp_path: Path) -> None:
    directory = Measured().write(tmp_path / "m")
    (directory / GUEST / f"{FIRST}.interrupted-1").mkdir()
    found = judge(directory, measured.expectations(), NOW_S)
    assert found.latency == "passed"
    assert any(f"{FIRST}.interrupted-1" in each.got for each in found.findings)


# Files, as somebody may find or leave them -------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Measured().write(tmp_path_factory.mktemp("good") / "m")


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


NAMES = [
    f"{place}/{name}"
    for place, runs in (("host", (FIRST, SECOND, LOAD)), (GUEST, (FIRST, SECOND, OTHER, "004-irqlat")))
    for name in (
        "request.json",
        "machine.json",
        "end.json",
        *(
            f"{run}/{file}"
            for run in runs
            for file in (
                "run.json",
                "stdout",
                "stderr",
                *([f"{run[4:]}.json"] if run != LOAD else []),
            )
        ),
    )
]


def test_the_names_of_all_files_are_known(good: Path) -> None:
    assert files(good) == sorted(NAMES)


def spoilt(path: Path, content: bytes | None, directory: Path) -> Verdict:
    """The verdict while a file has another content, or is not there."""
    before = path.read_bytes()
    assert content != before
    try:
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        return judge(directory, measured.expectations(), NOW_S)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_missing_or_spoilt(name: str, good: Path) -> None:
    path = good / name
    size = path.stat().st_size
    whole = path.read_bytes()
    spoils: list[bytes | None] = [None, b"{}\n", whole + b"\n", whole + b" ", b"\xff\xfe"]
    if size:
        spoils += [b"", whole[:-1], whole[: size // 2], whole.replace(b" ", b"  ", 1)]
    for content in spoils:
        if content == whole:
            continue
        found = spoilt(path, content, good)
        assert found.latency == "failed", (name, content and content[:40])
        assert not found.protocol_ok
    assert judge(good, measured.expectations(), NOW_S).latency == "passed"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_byte_can_be_changed(data: st.DataObject, good: Path) -> None:
    name = data.draw(st.sampled_from([name for name in NAMES if not name.endswith(("stdout", "stderr"))]))
    whole = (good / name).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "put", "blank"]))
    changed = {
        "flip": whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :],
        "cut": whole[:at],
        "put": whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at:],
        "blank": whole[:at] + b"\n" + whole[at + 1 :],
    }[how]
    if changed != whole:
        found = spoilt(good / name, changed, good)
        assert found.latency != "passed" and not found.protocol_ok


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("machine.json", b'"hostname": "guest-g"', b'"hostname": "guest-h"'),
        (f"{FIRST}/run.json", b'"cpu_s": 18.0', b'"cpu_s": 18.1'),
        ("end.json", b'"machine": "', b'"machine": "0'),
    ],
)
def test_what_reads_well_and_was_changed(name: str, before: bytes, after: bytes, good: Path) -> None:
    path = good / GUEST / name
    assert before in path.read_bytes()
    found = spoilt(path, path.read_bytes().replace(before, after, 1), good)
    assert (wrong(found), found.latency) == ({f"{GUEST} end"}, "failed")
    assert found.latencies[GUEST] == {}


def test_an_extra_file_or_run_or_place(tmp_path: Path) -> None:
    directory = Measured().write(tmp_path / "m")
    for extra, name in (
        (f"{GUEST}/{FIRST}/notes", f"{C} files"),
        (f"{GUEST}/005-cyclictest/run.json", f"{GUEST} runs"),
        ("guest-other/request.json", "places"),
    ):
        path = directory / extra
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        assert wrong(judge(directory, measured.expectations(), NOW_S)) == {name}
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()


def test_files_outside_of_a_run_are_none_of_it(tmp_path: Path) -> None:
    made = Measured()
    run(made)["files"] = {"stdout": "0" * 64, "stderr": "0" * 64, "../../host/machine.json": "0" * 64}
    assert f"{C} files" in wrong(judged(made, tmp_path))


def test_a_measurement_that_is_not_there(tmp_path: Path) -> None:
    found = judge(tmp_path / "none", measured.expectations(), NOW_S)
    assert (found.latency, found.evidence, found.protocol_ok) == ("failed", "emulated", False)


# Evidence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.machines["host"].update(virtualization="kvm"),
        lambda m: m.machines["host"].update(virtualization="qemu"),
        lambda m: m.machines["host"].update(virtualization=""),
        lambda m: m.machines["host"].update(virtualization="unknown"),
        lambda m: m.machines["host"].update(hypervisor=True),
        *(
            lambda m, model=model: m.machines["host"].update(cpu_model=model)
            for model in (
                "",
                "QEMU Virtual CPU version 2.5+",
                "Common KVM processor",
                "QEMU TCG CPU version 2.5+",
                "AMD EPYC Processor",
                "AMD EPYC-Rome Processor",
                "AMD EPYC Processor (with IBPB) 2",
                "Intel Xeon Processor (Skylake, IBRS)",
                "Intel Xeon E312xx (Sandy Bridge)",
                "Intel(R) Xeon(R) under KVM",
            )
        ),
        lambda m: m.machines["host"].update(clocksource="kvm-clock"),
        lambda m: m.machines[GUEST].update(virtualization="qemu"),
    ],
)
def test_in_doubt_it_is_emulated(change: Change, tmp_path: Path) -> None:
    made = Measured()
    change(made)
    found = judged(made, tmp_path)
    assert (found.evidence, found.latency) == ("emulated", NO_EVIDENCE)
    assert found.doubts


def test_a_guest_that_claims_to_be_hardware(tmp_path: Path) -> None:
    made = Measured()
    made.machines[GUEST].update(virtualization="none", hypervisor=False)
    found = judged(made, tmp_path)
    assert (found.evidence, found.latency, found.protocol_ok) == ("emulated", NO_EVIDENCE, False)
    assert wrong(found) == {f"{GUEST} virtual machine"}


@pytest.mark.parametrize(
    "model",
    ["Intel(R) Xeon(R) CPU E5-2680", "INTEL(R) XEON(R) GOLD 6548Y+", "AMD EPYC 7551 32-Core Processor"],
)
def test_processors_that_there_are(model: str, tmp_path: Path) -> None:
    made = Measured()
    made.machines["host"].update(cpu_model=model)
    assert judged(made, tmp_path).latency == "passed"


def leaves(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value that is neither object nor list, and to each of those."""
    yield path
    if isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from leaves(value, (*path, key))


EMULATED = Measured(hardware=False)
DOCUMENTS = [
    *(("machines", place) for place in EMULATED.machines),
    *(("requests", place) for place in EMULATED.requests),
    *(("runs", place, name) for place in EMULATED.runs for name in EMULATED.runs[place]),
    *(("files", place, name) for place in EMULATED.files for name in EMULATED.files[place]),
]
FIELDS = [
    (document, path)
    for document in DOCUMENTS
    for content in [getattr(EMULATED, document[0])]
    for path in leaves(functools.reduce(lambda part, key: part[key], document[1:], content))
    if path
]
OTHERS = ["none", "", "tsc", "Intel(R) Xeon(R) CPU E5-2680", False, 0, 1, -1, 10**6, 1.5, None, []]


#: What cyclictest tells and nothing is made of.
IGNORED = ("file_version", "rt_test_version:", "node", "sysname")


def put(made: Measured, document: tuple[str, ...], path: tuple[Any, ...], value: Any) -> None:
    part = getattr(made, document[0])
    for key in (*document[1:], *path[:-1]):
        part = part[key]
    part[path[-1]] = value


def test_each_field_of_a_machine_alone_leaves_it_emulated(tmp_path: Path) -> None:
    number = 0
    for document, path in FIELDS:
        if document[0] == "machines":
            for value in OTHERS[:5]:
                made = Measured(hardware=False)
                put(made, document, path, value)
                number += 1
                assert judged(made, tmp_path / str(number)).latency != "passed", (document, path, value)
    assert number > 100


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(FIELDS), value=st.sampled_from(OTHERS), seed=st.integers(0, 2**32))
def test_no_edit_makes_an_emulated_measurement_pass(
    field: tuple[tuple[str, ...], tuple[Any, ...]],
    value: Any,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    made = Measured(hardware=False)
    put(made, *field, copy.deepcopy(value))
    directory = tmp_path_factory.mktemp("edited")
    assert judged(made, directory).latency != "passed"


def test_no_edit_of_a_good_measurement_makes_the_gate_fall(tmp_path: Path) -> None:
    read = [field for field in FIELDS if field[0][0] != "files" or field[1][0].endswith(".json")]
    chosen = random.Random(1).sample([field for field in read if field[1][-1] not in IGNORED], 100)
    for number, field in enumerate(chosen):
        made = Measured()
        put(made, *field, None)
        assert judged(made, tmp_path / str(number)).latency != "passed", field


# Emulated measurements are judged for how they were made ------------------------------------------


def test_overflow_is_no_matter_under_emulation(tmp_path: Path) -> None:
    made = Measured(hardware=False)
    thread = tool(made)["thread"]["1"]
    thread["histogram"]["900"] -= 1
    thread.update(max=4000, avg=round(thread["avg"] + (4000 - 900) / 60_000, 2))
    tool(made, OTHER)["thread"].update(overflows=1, max=2000, avg=3 + 1997 / 60_000)
    tool(made, OTHER)["thread"]["histogram"] = {"3": 59_999}
    found = judged(made, tmp_path)
    assert (wrong(found), found.latency) == (set(), NO_EVIDENCE)


@pytest.mark.parametrize(
    ("change", "findings"),
    [
        (lambda m: measured.thread(tool(m), {100: 53_999}), {f"{C} cycles"}),
        (lambda m: measured.thread(tool(m), {100: 29_999}), {f"{C} cycles"}),
        (lambda m: tool(m)["thread"]["1"].update(max=901), {f"{C} histogram"}),
        (lambda m: tool(m)["thread"]["1"]["histogram"].pop("900"), {f"{C} histogram"}),
        (lambda m: run(m).update(status=1), {f"{C} status"}),
        (lambda m: m.machines["host"].update(plan_sha256="b" * 64), {"host plan"}),
        (lambda m: tool(m, OTHER).update(samples=29_999, lost=30_001), {f"{I} samples", f"{I} histogram"}),
    ],
)
def test_what_is_wrong_is_found_under_emulation_too(
    change: Change, findings: set[str], tmp_path: Path
) -> None:
    made = Measured(hardware=False)
    change(made)
    found = judged(made, tmp_path)
    assert (wrong(found), found.latency, found.protocol_ok) == (findings, NO_EVIDENCE, False)


# Time under load -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "bare"),
    [
        ([], 100),
        ([(0, 300)], 0),
        ([(100, 200)], 0),
        ([(0, 150)], 50),
        ([(150, 300)], 50),
        ([(120, 130), (125, 140), (190, 500)], 70),
        ([(0, 100), (200, 300)], 100),
        ([(120, 160), (130, 140)], 60),
    ],
)
def test_time_that_no_load_covers(spans: list[tuple[int, int]], bare: int) -> None:
    assert uncovered(100, 200, spans) == bare


# Expectations --------------------------------------------------------------------------------------


def test_expectations_are_read_as_written(tmp_path: Path) -> None:
    wanted = measured.expectations()
    path = tmp_path / "expected.json"
    path.write_text(json.dumps(to_json(wanted)))
    assert load(path) == wanted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("places"), "places is missing"),
        (lambda d: d.update(more=1), "more is not known"),
        (lambda d: d.update(schema=2), "schema 2"),
        (lambda d: d.update(load_required=1), "load_required is 1"),
        (lambda d: d.update(minimum_s=0), "minimum_s is 1 or more"),
        (lambda d: d.update(platform=""), "platform"),
        (lambda d: d["places"].pop("host"), "the host is not among the places"),
        (lambda d: d["places"].update({"guest_x": d["places"].pop(GUEST)}), "guest_x is no place"),
        (lambda d: d["places"]["host"]["request"].update(place="guest-g"), "its request is for guest-g"),
        (lambda d: d["places"]["host"]["request"].pop("stages"), "stages is missing"),
        (lambda d: d["places"]["host"]["request"].update(stages=[]), "nothing is to be measured"),
        (lambda d: d["places"]["host"]["request"].update(isolated=[]), "host: isolated"),
        (lambda d: d["places"]["host"]["request"].update(isolated=[3, 2]), "ascending"),
        (
            lambda d: d["places"]["host"]["request"].update(isolated=[0, 2, 3]),
            "both isolated and housekeeping",
        ),
        (lambda d: d["places"]["host"]["request"].update(plan_sha256=""), "not 64 hex digits"),
        (lambda d: d["places"][GUEST]["request"].update(plan_sha256="b" * 64), "not the host's"),
        (lambda d: d["places"][GUEST]["request"].update(kernel_release=""), "kernel_release is empty"),
        (lambda d: d["places"][GUEST]["request"]["stages"][0].update(tool="ping"), "no tool ping"),
        (
            lambda d: d["places"][GUEST]["request"]["stages"][0].update(name="irqlat"),
            "two stages have one name",
        ),
        (lambda d: d["places"][GUEST]["request"]["stages"][0].update(cpus=[0]), "a CPU is not isolated"),
        (lambda d: d["places"][GUEST]["request"]["stages"][0].update(cpus=[]), "are not CPU numbers"),
        (lambda d: d["places"][GUEST]["request"]["stages"][0].update(priority=0), "are 1 or more"),
        (lambda d: d["places"][GUEST]["request"]["stages"][0].update(interval_us=0), "are 1 or more"),
        (lambda d: d["places"][GUEST]["request"]["stages"][0].update(duration_s=0), "less than 1"),
        (lambda d: d["places"][GUEST]["request"]["stages"][0].update(loads=["stress", "stress"]), "twice"),
        (lambda d: d["places"][GUEST]["request"]["stages"][1].update(cpus=[1, 2]), "irqlat measures one CPU"),
        (lambda d: d["places"]["host"]["request"]["stages"][1].update(loads=[]), "names no load"),
        (lambda d: d["load_shares"].pop("stress"), "how much CPU time stress takes"),
        (lambda d: d["load_shares"].update(stress=0), "not a number above 0"),
        (lambda d: d["load_shares"].update(stress=True), "not a number above 0"),
        (lambda d: d["places"][GUEST]["limits"]["cyclictest"].update(max_us=-1), "not a number above 0"),
        (lambda d: d["places"][GUEST]["limits"]["cyclictest"].update(max_us="60"), "max_us is '60'"),
        (lambda d: d["places"][GUEST]["limits"]["cyclictest"].update(source=" "), "who says so"),
        (lambda d: d["places"][GUEST]["limits"]["cyclictest"].pop("avg_us"), "avg_us is missing"),
        (
            lambda d: d["places"][GUEST]["limits"].update(hwlat=d["places"][GUEST]["limits"]["cyclictest"]),
            "nothing judges hwlat",
        ),
        (lambda d: d["places"][GUEST]["unjudged"].update(cyclictest="why not"), "a reason to have none"),
        (lambda d: d["places"][GUEST]["unjudged"].update(irqlat=""), "does not say why"),
    ],
)
def test_expectations_that_contradict_themselves(change: Callable[[Any], object], said: str) -> None:
    content = json.loads(json.dumps(to_json(measured.expectations())))
    change(content)
    with pytest.raises(ExpectationsError, match=said):
        from_json(content)


def test_limits_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "expected.json"
    path.write_text(json.dumps(to_json(measured.expectations())).replace("20.0", "NaN", 1))
    with pytest.raises(ExpectationsError, match="NaN is no number"):
        load(path)


# The command -----------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    verdict.add_parser(parser.add_subparsers(required=True))
    options = parser.parse_args(["judge", *arguments])
    return options.run(options)  # type: ignore[no-any-return]


@pytest.fixture
def expected(tmp_path: Path) -> str:
    path = tmp_path / "expected.json"
    path.write_text(json.dumps(to_json(replace(measured.expectations(), max_age_s=0))))
    return str(path)


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: float(NOW_S))


@pytest.mark.parametrize(
    ("hardware", "spoil", "options", "status"),
    [
        (True, False, (), 0),
        (True, False, ("--allow-emulated",), 0),
        (True, True, (), 1),
        (True, True, ("--allow-emulated",), 1),
        (False, False, (), 1),
        (False, False, ("--allow-emulated",), 0),
        (False, True, ("--allow-emulated",), 1),
    ],
)
def test_the_exit_status_follows_from_the_verdict(
    hardware: bool,
    spoil: bool,
    options: tuple[str, ...],
    status: int,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = Measured(hardware)
    if spoil:
        run(made)["status"] = 1
    directory, report = made.write(tmp_path / "m"), tmp_path / "verdict.json"
    assert command(str(directory), "--expect", expected, "--json", str(report), *options) == status
    said = json.loads(report.read_text())
    assert said["latency_verdict"] == (NO_EVIDENCE if not hardware else "failed" if spoil else "passed")
    assert said["protocol_ok"] is not spoil
    assert said["evidence"] == ("hardware" if hardware else "emulated")
    assert said["thresholds"]["host"]["limits"]["cyclictest"]["source"] == measured.SOURCE
    out = capsys.readouterr().out
    assert out.endswith(f"latency: {said['latency_verdict']}\n")
    assert (f"{C} status: 002-cyclictest: status 1\n  wanted: 0\n" in out) is spoil


def test_a_wrong_call_is_refused(expected: str, tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match="is not a directory"):
        command(str(tmp_path / "none"), "--expect", expected)
    for content in ("", "{", "[]"):
        (tmp_path / "odd.json").write_text(content)
        with pytest.raises(MeasureError, match="odd.json"):
            command(str(tmp_path), "--expect", str(tmp_path / "odd.json"))
    with pytest.raises(MeasureError, match="cannot be read"):
        command(str(tmp_path), "--expect", str(tmp_path / "none.json"))


@pytest.mark.parametrize("helpers", [boot.HELPERS, stack.HELPERS])
def test_the_gate_of_the_boot_proof_stands_alone_with_its_files(
    helpers: tuple[str, ...], tmp_path: Path
) -> None:
    """In a step its files lie beside each other, outside of any package."""
    root = Path(__file__).resolve().parent.parent
    for helper in helpers:
        if helper.endswith(".py"):
            (tmp_path / Path(helper).name).symlink_to(root / helper)
    code = (
        "import sys; sys.modules['pipeline'] = None; import gate; "
        "print(gate.parse_cpulist('0,2-3'), gate.parse_cyclictest.__module__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("(0, 2, 3) cyclictestdata\n", 0), done.stderr
