"""The gate fails closed: each way an answer can be wrong, missing or cut short is a failed finding."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipeline.gate import Expectations, Finding, MalformedError, judge, latencies, parse_cpulist

PLAN = Expectations(
    isolated=(1, 2),
    housekeeping=(0,),
    release="6.12.107-rt-virt-guest",
    unwanted=("irqbalance.service", "ksm.service"),
    duration_s=10,
    interval_us=10_000,
)

Told = dict[str, tuple[int, str]]


def stat(policy: int, priority: int, cpus: str) -> str:
    """Two lines as the guest prints for a thread; a name with a blank and parentheses must not mislead."""
    fields = ["R", *["0"] * 36, str(priority), str(policy), *["0"] * 11]
    return f"77 (cyclic (test) x) {' '.join(fields)}\nCpus_allowed_list:\t{cpus}\n"


def cyclictest() -> dict[str, Any]:
    """What cyclictest 2.60 writes, key with the stray colon included."""
    thread = {"histogram": {"90": 900, "120": 80}, "cycles": 985, "min": 90, "max": 20_011, "avg": 193.1}
    return {
        "file_version": 1,
        "cmdline:": "cyclictest -m -p80",
        "return_code": 0,
        "num_threads": 2,
        "thread": {"0": {**thread, "cpu": 1, "node": 0}, "1": {**thread, "cpu": 2, "node": 0}},
    }


def good() -> Told:
    """A guest that keeps the plan."""
    return {
        "running": (0, "running\n"),
        "failed": (0, ""),
        "unwanted": (3, "inactive\ninactive\n"),
        "version": (0, "#1 SMP PREEMPT_RT Thu Jan  1 00:00:00 UTC 2026\n"),
        "release": (0, PLAN.release + "\n"),
        "cmdline": (0, "root=PARTLABEL=x isolcpus=1-2\n"),
        "isolated": (0, "1-2\n"),
        "nohz_full": (0, "1-2\n"),
        "config": (0, "CONFIG_PREEMPT_RT=y\n"),
        "threads": (0, stat(0, 0, "0") + stat(1, 80, "1") + stat(1, 80, "2")),
        "cyclictest_status": (0, "0\n"),
        "cyclictest": (0, json.dumps(cyclictest())),
    }


def sent(told: Told) -> bytes:
    """The bytes that come over the port."""
    lines = [
        f"{name} {status} {base64.b64encode(text.encode()).decode()}\n"
        for name, (status, text) in told.items()
    ]
    body = "".join(lines).encode()
    return body + f"end {hashlib.sha256(body).hexdigest()}\n".encode()


def failed(raw: bytes, plan: Expectations = PLAN) -> list[str]:
    """Names of the findings that are not fine."""
    return [finding.name for finding in judge(raw, plan) if not finding.ok]


def test_a_guest_that_keeps_the_plan_passes() -> None:
    findings = judge(sent(good()), PLAN)
    assert [finding for finding in findings if not finding.ok] == []
    assert Finding("isolated", "1,2", "1,2", True) in findings
    assert latencies(sent(good()))["2"] == {"min": 90, "max": 20_011, "avg": 193.1, "cycles": 985}


@pytest.mark.parametrize("name", sorted(good()))
@pytest.mark.parametrize("text", [None, "", "?"])
def test_a_missing_empty_or_odd_answer_fails(name: str, text: str | None) -> None:
    told = good()
    del told[name]
    if text is not None:
        told[name] = (1, text)
    if (name, text) in {("failed", ""), ("cmdline", "?")}:
        return  # no failed unit is what is wanted; any command line will do, its effects are judged
    assert set(failed(sent(told))) >= {"cycles" if name == "cyclictest" else name}


@pytest.mark.parametrize(
    ("name", "text", "finding"),
    [
        ("running", "degraded", "running"),
        ("failed", "boot.mount loaded failed failed", "failed"),
        ("unwanted", "inactive\nactive", "unwanted"),
        ("unwanted", "inactive\nactivating", "unwanted"),
        ("unwanted", "inactive", "unwanted"),
        ("version", "#1 SMP PREEMPT_DYNAMIC", "version"),
        ("version", "#1 SMP NOT_PREEMPT_RT", "version"),
        ("release", "6.12.106-rt-virt-guest", "release"),
        ("config", "# CONFIG_PREEMPT_RT is not set", "config"),
        ("isolated", "1", "isolated"),
        ("isolated", "0-2", "isolated"),
        ("isolated", "2-1", "isolated"),
        ("nohz_full", "(null)", "nohz_full"),
        ("cyclictest_status", "137", "cyclictest_status"),
        ("threads", stat(0, 0, "0") + stat(1, 80, "1"), "threads"),
        ("threads", stat(0, 0, "0") + stat(1, 80, "1") + stat(2, 80, "2"), "threads"),
        ("threads", stat(0, 0, "0") + stat(1, 80, "1") + stat(1, 79, "2"), "threads"),
        ("threads", stat(0, 0, "0") + stat(1, 80, "1") + stat(1, 80, "1"), "threads"),
        ("threads", stat(0, 0, "0") + stat(1, 80, "1-2") + stat(1, 80, "1-2"), "threads"),
        ("threads", stat(0, 0, "0-2") + stat(1, 80, "1") + stat(1, 80, "2"), "threads"),
        ("threads", stat(1, 80, "1") + stat(1, 80, "2"), "threads"),
        ("threads", stat(1, 80, "1") + "77 (cyclictest", "threads"),
    ],
)
def test_a_broken_promise_is_the_finding(name: str, text: str, finding: str) -> None:
    assert failed(sent({**good(), name: (0, text)})) == [finding]


CYCLICTEST = ["measured", "cycles", "histogram"]


@pytest.mark.parametrize(
    ("change", "findings"),
    [
        (lambda data: data.update(return_code=1), CYCLICTEST),
        (lambda data: data.pop("return_code"), CYCLICTEST),
        (lambda data: data.pop("thread"), CYCLICTEST),
        (lambda data: data.update(thread={}, num_threads=0), CYCLICTEST),
        (lambda data: data["thread"].pop("1"), CYCLICTEST),
        (lambda data: data["thread"]["1"].pop("cycles"), CYCLICTEST),
        (lambda data: data["thread"]["1"].update(cycles="985"), CYCLICTEST),
        (lambda data: data["thread"]["1"].update(cycles=True), CYCLICTEST),
        (lambda data: data["thread"]["1"].update(avg=None), CYCLICTEST),
        (lambda data: data["thread"]["1"].pop("histogram"), CYCLICTEST),
        (lambda data: data["thread"]["1"].update(cpu=0), ["measured"]),
        (lambda data: data["thread"]["1"].update(cpu=1), ["measured"]),
        (lambda data: data["thread"]["1"].update(avg=float("nan")), CYCLICTEST),
        (lambda data: data["thread"]["1"].update(avg=20_012), CYCLICTEST),
        (lambda data: data["thread"]["1"].update(histogram={"x": 1}), CYCLICTEST),
        (lambda data: data["thread"]["1"].update(cycles=899, avg=90, histogram={"90": 899}), ["cycles"]),
        (lambda data: data["thread"]["0"].update(cycles=0, histogram={}), ["cycles"]),
        # half as long a run, each wake-up late by most of an interval: nothing was slept through
        (lambda data: data["thread"]["0"].update(cycles=500, avg=9000, histogram={"9000": 500}), ["cycles"]),
        # all lateness accounted for, and yet too little was measured
        (lambda data: data["thread"]["0"].update(cycles=499, avg=20_000, histogram={}), ["cycles"]),
        (lambda data: data["thread"]["0"].update(histogram={"90": 986}), ["histogram"]),
    ],
)
def test_a_run_of_cyclictest_that_proves_nothing(
    change: Callable[[dict[str, Any]], object], findings: list[str]
) -> None:
    data = cyclictest()
    change(data)
    assert failed(sent({**good(), "cyclictest": (0, json.dumps(data))})) == findings


@pytest.mark.parametrize(
    "thread",
    [
        {"cycles": 900, "avg": 90, "histogram": {"90": 900}},
        # of 800 wake-ups 50 came 20 ms late and slept through two each: by the histogram, or beyond it
        {"cycles": 800, "avg": 1334.4, "histogram": {"90": 750, "20000": 50}},
        {"cycles": 800, "avg": 1334.4, "histogram": {"90": 750}},
    ],
)
def test_cycles_that_are_accounted_for_are_enough(thread: dict[str, Any]) -> None:
    data = cyclictest()
    data["thread"]["0"].update(thread)
    assert failed(sent({**good(), "cyclictest": (0, json.dumps(data))})) == []


@pytest.mark.parametrize(
    "text", ["[]", "3", '{"return_code": 0, "num_threads": 1, "thread": ["x"]}', '{"retu']
)
def test_what_is_not_the_json_of_cyclictest(text: str) -> None:
    assert failed(sent({**good(), "cyclictest": (0, text)})) == CYCLICTEST


def test_overflow_is_recorded_and_not_judged() -> None:
    data = cyclictest()
    data["thread"]["0"]["histogram"] = {"90": 985 - 40}
    findings = {
        finding.name: finding
        for finding in judge(sent({**good(), "cyclictest": (0, json.dumps(data))}), PLAN)
    }
    assert findings["histogram"].ok
    assert findings["histogram"].got == "45 cycles beyond the histogram"


@pytest.mark.parametrize("size", [0, 1, 40, -1, -2, -66])
def test_answers_cut_short_anywhere_are_no_answers(size: int) -> None:
    assert failed(sent(good())[:size]) == ["answers"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw.replace(b"release 0", b"release 1"),
        lambda raw: raw + b"more 0 \n",
        lambda raw: raw + raw,
        lambda raw: raw[: raw.rindex(b"end ")] + b"end " + b"0" * 64 + b"\n",
        lambda raw: b"\xff" + raw,
    ],
)
def test_answers_that_do_not_match_their_checksum(spoil: Callable[[bytes], bytes]) -> None:
    assert failed(spoil(sent(good()))) == ["answers"]


@pytest.mark.parametrize(
    "line", [b"name\n", b"name x YQ==\n", b"name 0 !\n", b"name 0 YQ== z\n", b"a 0 \na 0 \n"]
)
def test_lines_that_are_not_answers(line: bytes) -> None:
    assert failed(line + f"end {hashlib.sha256(line).hexdigest()}\n".encode()) == ["answers"]


def test_latencies_of_nothing_are_refused() -> None:
    told = good()
    del told["cyclictest"]
    with pytest.raises(MalformedError, match="cyclictest"):
        latencies(sent(told))


def test_a_plan_without_isolated_cpus_never_passes() -> None:
    assert failed(sent(good()), replace(PLAN, isolated=()))


@pytest.mark.parametrize(("text", "cpus"), [("", ()), ("3\n", (3,)), ("0,2-4", (0, 2, 3, 4))])
def test_cpulist(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpulist(text) == cpus


@pytest.mark.parametrize("text", ["a", "1-", "-1", "1,,2", "3-2", "1-2-3", "0x1"])
def test_not_a_cpulist(text: str) -> None:
    with pytest.raises(MalformedError):
        parse_cpulist(text)
