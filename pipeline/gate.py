"""The verdict on a booted guest: answers in, findings out; pure, standard library only.

It fails closed: a finding is fine only when its answer is there, whole and as planned; what is missing,
empty, cut short or unreadable is a failure that says so.

Latencies are recorded, not judged: under emulation they are no evidence.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

try:
    from pipeline.measure.cyclictestdata import ACCOUNTED_SHARE, MEASURED_SHARE, slept_through
    from pipeline.measure.cyclictestdata import parse_cyclictest as parse_cyclictest
    from pipeline.measure.reading import MalformedError as MalformedError
    from pipeline.measure.reading import parse_cpulist as parse_cpulist
    from pipeline.measure.reading import shown
except ImportError:  # in a step their files lie beside this one
    from cyclictestdata import (  # type: ignore[import-not-found, no-redef]
        ACCOUNTED_SHARE,
        MEASURED_SHARE,
        parse_cyclictest,
        slept_through,
    )
    from reading import (  # type: ignore[import-not-found, no-redef]
        MalformedError,
        parse_cpulist,
        shown,
    )

#: cyclictest is asked for this priority (`-p80`).
PRIORITY = 80

#: `SCHED_FIFO` in field 41 of /proc/PID/stat (sched(7)).
FIFO = 1


@dataclass(frozen=True, slots=True)
class Expectations:
    """What the recipes and the CPU plan promise of the guest.

    isolated       CPU numbers of the isolated vCPUs, ascending; each is measured by a thread of its own
    housekeeping   CPU numbers of the others, ascending
    release        `uname -r`, as `make kernelrelease` gave it when the kernel was built
    unwanted       units that must be inactive, in the order in which the guest was asked
    duration_s     length of the cyclictest run, seconds
    interval_us    its period, microseconds
    """

    isolated: tuple[int, ...]
    housekeeping: tuple[int, ...]
    release: str
    unwanted: tuple[str, ...]
    duration_s: int
    interval_us: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was held against the plan."""

    name: str
    wanted: str
    got: str
    ok: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What one command in the guest printed (stdout and stderr) and its exit status."""

    status: int
    text: str


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread of cyclictest, as the guest's kernel scheduled it during the run."""

    policy: int
    priority: int
    cpus: tuple[int, ...]


def parse_answers(raw: bytes) -> dict[str, Answer]:
    """The guest's answers by name, from all that came over its port.

    Each line is `name status base64`; the last is `end`, with the sha256 (hex) of everything before it.
    Raises `MalformedError` when nothing came, the end is missing, or the checksum is not that of what came.
    """
    if not raw:
        raise MalformedError("the guest never answered")
    body, mark, digest = raw.rpartition(b"end ")
    if not mark or not digest.endswith(b"\n") or not (body.endswith(b"\n")):
        raise MalformedError(f"the answers are cut short after {len(raw)} bytes")
    if hashlib.sha256(body).hexdigest() != digest.decode(errors="replace").strip():
        raise MalformedError("the answers do not match their checksum")
    answers: dict[str, Answer] = {}
    for line in body.decode(errors="replace").splitlines():
        fields = line.split(" ")
        try:
            name, status, text = fields
            answer = Answer(int(status), base64.b64decode(text, validate=True).decode(errors="replace"))
        except (ValueError, binascii.Error) as error:
            raise MalformedError(f"not an answer: {line[:60]!r}") from error
        if name in answers:
            raise MalformedError(f"answered twice: {name}")
        answers[name] = answer
    return answers


def parse_threads(text: str) -> list[Thread]:
    """Threads from pairs of lines: /proc/PID/task/TID/stat, then `Cpus_allowed_list:` of its status file."""
    lines = text.splitlines()
    if not lines or len(lines) % 2:
        raise MalformedError(f"{len(lines)} lines instead of two for each thread")
    threads = []
    for stat, allowed in zip(lines[::2], lines[1::2], strict=True):
        # The command's name, field 2, may hold anything; behind its parenthesis fields 3 and up follow.
        fields = stat.rpartition(")")[2].split()
        label, _, cpus = allowed.partition(":")
        if len(fields) < 39 or label != "Cpus_allowed_list":
            raise MalformedError(f"not a thread: {stat[:40]!r}, {allowed[:40]!r}")
        try:
            threads.append(Thread(int(fields[38]), int(fields[37]), parse_cpulist(cpus)))
        except ValueError as error:
            raise MalformedError(f"not a thread: {stat[:40]!r}") from error
    return threads


def judge(raw: bytes, wanted: Expectations) -> list[Finding]:
    """Hold everything a guest sent over its port against what was promised.

    Always the same findings in the same order, but for one case: when the answers as a whole cannot be
    trusted (see `parse_answers`), that is the only finding.
    """
    try:
        answers = parse_answers(raw)
    except MalformedError as error:
        return [Finding("answers", "all of them, with their checksum", str(error), False)]
    findings = [Finding("answers", "all of them, with their checksum", f"{len(answers)} answers", True)]

    def text(name: str) -> str:
        if name not in answers:
            raise MalformedError(f"no answer named {name}")
        return answers[name].text.strip()

    def check(name: str, promise: str, examine: Callable[[], tuple[str, bool]]) -> None:
        try:
            got, ok = examine()
        except MalformedError as error:
            got, ok = str(error), False
        findings.append(Finding(name, promise, got, ok))

    def same(name: str, promise: str) -> None:
        check(name, promise or "(nothing)", lambda: (text(name) or "(nothing)", text(name) == promise))

    def cpus(name: str) -> tuple[str, bool]:
        found = parse_cpulist(text(name))
        return shown(found), found == wanted.isolated

    def units() -> tuple[str, bool]:
        states = text("unwanted").split()
        if len(states) != len(wanted.unwanted):
            raise MalformedError(f"{len(states)} states for {len(wanted.unwanted)} units")
        active = [
            f"{unit} {state}"
            for unit, state in zip(wanted.unwanted, states, strict=True)
            if state != "inactive"
        ]
        return ", ".join(active) or "all inactive", not active

    def schedule() -> tuple[str, bool]:
        threads = parse_threads(text("threads"))
        measuring = [thread for thread in threads if thread.policy == FIFO]
        others = [thread for thread in threads if thread.policy != FIFO]
        got = "; ".join(
            f"policy {thread.policy} priority {thread.priority} CPUs {shown(thread.cpus)}"
            for thread in threads
        )
        spread = sorted(thread.cpus for thread in measuring) == [(cpu,) for cpu in wanted.isolated]
        return got, (
            spread
            and all(thread.priority == PRIORITY for thread in measuring)
            and bool(others)
            and all(thread.cpus == wanted.housekeeping for thread in others)
        )

    def measured() -> tuple[str, bool]:
        threads = parse_cyclictest(text("cyclictest"))["thread"]
        found = sorted(thread["cpu"] for thread in threads.values())
        return shown(found), found == list(wanted.isolated)

    planned = wanted.duration_s * 1_000_000 // wanted.interval_us
    least = math.ceil(planned * MEASURED_SHARE)
    least_accounted = math.ceil(planned * ACCOUNTED_SHARE)

    def cycles() -> tuple[str, bool]:
        threads = parse_cyclictest(text("cyclictest"))["thread"].values()
        counts = [
            (thread["cpu"], thread["cycles"], slept_through(thread, wanted.interval_us)) for thread in threads
        ]
        got = ", ".join(f"CPU {cpu}: {count} and {slept}" for cpu, count, slept in sorted(counts))
        return got, all(count >= least and count + slept >= least_accounted for _, count, slept in counts)

    def histogram() -> tuple[str, bool]:
        threads = parse_cyclictest(text("cyclictest"))["thread"].values()
        beyond = [thread["cycles"] - sum(thread["histogram"].values()) for thread in threads]
        return f"{sum(beyond)} cycles beyond the histogram", all(count >= 0 for count in beyond)

    same("running", "running")
    same("failed", "")
    check("unwanted", "all inactive", units)
    check("version", "PREEMPT_RT", lambda: (text("version"), "PREEMPT_RT" in text("version").split()))
    same("release", wanted.release)
    same("config", "CONFIG_PREEMPT_RT=y")
    check("cmdline", "the kernel's command line", lambda: (text("cmdline"), bool(text("cmdline"))))
    check("isolated", shown(wanted.isolated), lambda: cpus("isolated"))
    check("nohz_full", shown(wanted.isolated), lambda: cpus("nohz_full"))
    same("cyclictest_status", "0")
    check(
        "threads",
        f"policy {FIFO} priority {PRIORITY}, one on each of CPUs {shown(wanted.isolated)}; "
        f"the others on CPUs {shown(wanted.housekeeping)}",
        schedule,
    )
    check("measured", shown(wanted.isolated), measured)
    check(
        "cycles",
        f"on each CPU of {planned} at least {least} measured, {least_accounted} with those slept through",
        cycles,
    )
    check("histogram", "no more samples than cycles; overflow is not judged under emulation", histogram)
    return findings


def latencies(raw: bytes) -> dict[str, dict[str, float]]:
    """Per measured CPU (its number as text): `min`, `max`, `avg` in microseconds and `cycles`.

    Raises `MalformedError` where `judge` has a failed finding for it.
    """
    answers = parse_answers(raw)
    if "cyclictest" not in answers:
        raise MalformedError("no answer named cyclictest")
    threads = parse_cyclictest(answers["cyclictest"].text)["thread"].values()
    return {
        str(thread["cpu"]): {key: thread[key] for key in ("min", "max", "avg", "cycles")}
        for thread in threads
    }
