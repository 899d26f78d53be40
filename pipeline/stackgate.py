"""The verdict on an emulated host and the guest it ran under KVM: answers in, findings out; pure.

Standard library only, since it runs inside the step. It fails closed like `gate`, whose form of answers it reads.
Nothing is excused for being emulated: what the check tool finds red in the emulated host is red here, too. What it
only warns of there, since a virtual machine does not have it (turbo, sleep states, a frequency governor), is told
in the finding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

try:
    from pipeline.gate import Answer, Finding, MalformedError, parse_answers
except ImportError:  # in the step its file lies beside this one
    from gate import (  # type: ignore[import-not-found, no-redef]
        Answer,
        Finding,
        MalformedError,
        parse_answers,
    )

#: The board's devices by vendor and device number: the NIC, a virtual function of it, and `edu`
#: (docs/specs/edu.rst and hw/net/igb_regs.h of qemu).
PHYSICAL_ID, VIRTUAL_ID, FUNCTION_ID = "0x8086:0x10c9", "0x8086:0x10ca", "0x1234:0x11e8"

#: Exit status of a launch script that refuses before it does anything.
REFUSED = 2


@dataclass(frozen=True, slots=True)
class Expectations:
    """What was promised, and what the host was asked to do.

    guest              its name
    vcpu, cpu          the vCPU that is moved by hand, and its CPU in the plan
    other_cpu          where it is moved to
    cpus, memory_mib   the host's size
    parameters         the plan's parameters of the host kernel
    physical, function PCI addresses: the function with virtual ones, and the device given whole
    release            `uname -r` of the host; guest_release of the guest
    isolated           the guest's isolated vCPUs, as the kernel lists them
    """

    guest: str
    vcpu: int
    cpu: int
    other_cpu: int
    cpus: int
    memory_mib: int
    parameters: Sequence[str]
    physical: str
    function: str
    isolated: str
    release: str
    guest_release: str

    @property
    def idle(self) -> list[str]:
        """The devices while no guest has them."""
        return [
            f"{self.physical} {PHYSICAL_ID} driver=igb override=(null) numvfs=0",
            f"{self.function} {FUNCTION_ID} driver=none override=(null)",
        ]


def judge(raw: bytes, wanted: Expectations) -> list[Finding]:
    """Hold everything the host sent over its port against what was promised.

    Always the same findings in the same order, but for one case: when the answers as a whole cannot be
    trusted (see `gate.parse_answers`), that is the only finding.
    """
    try:
        answers = parse_answers(raw)
    except MalformedError as error:
        return [Finding("answers", "all of the host's, with their checksum", str(error), False)]
    findings = [Finding("answers", "all of the host's, with their checksum", f"{len(answers)} answers", True)]

    def answer(name: str) -> Answer:
        if name not in answers:
            raise MalformedError(f"no answer named {name}")
        return answers[name]

    def text(name: str) -> str:
        return str(answer(name).text).strip()

    def check(name: str, promise: str, examine: Callable[[], tuple[str, bool]]) -> None:
        try:
            got, ok = examine()
        except MalformedError as error:
            got, ok = str(error), False
        findings.append(Finding(name, promise, got, ok))

    def same(name: str, source: str, promise: str) -> None:
        check(name, promise or "(nothing)", lambda: (text(source) or "(nothing)", text(source) == promise))

    def status(name: str, source: str, promise: int, meaning: str) -> None:
        def examine() -> tuple[str, bool]:
            found = answer(source)
            said = f": {_joined(found.text.strip())}" if found.text.strip() else ""
            return f"status {found.status}{said}", found.status == promise

        check(name, f"status {promise}: {meaning}", examine)

    def realtime(name: str, told: Callable[[], str]) -> None:
        check(name, "PREEMPT_RT", lambda: (told(), "PREEMPT_RT" in told().split()))

    def idle(name: str, source: str) -> None:
        check(
            name,
            "; ".join(wanted.idle),
            lambda: (_joined(text(source)), text(source).split("\n") == wanted.idle),
        )

    def bound(name: str, source: str) -> None:
        check(name, "the guest's two devices driven by vfio-pci", lambda: _bound(text(source), wanted))

    # The host.
    same("host running", "running", "running")
    same("host failed units", "failed", "")
    realtime("host version", lambda: text("version"))
    same("host release", "release", wanted.release)

    def parameters() -> tuple[str, bool]:
        missing = [each for each in wanted.parameters if each not in text("cmdline").split()]
        return f"not there: {' '.join(missing)}" if missing else "all", bool(
            wanted.parameters
        ) and not missing

    check("host command line", "every parameter of the plan", parameters)
    check("preflight", "nothing red", lambda: _green(answer("preflight"), "preflight"))
    idle("devices before", "devices_before")

    # The guest.
    def told(name: str) -> str:
        try:
            guest = parse_answers(answer("guest").text.encode())
        except MalformedError as error:
            raise MalformedError(f"from the guest: {error}") from error
        if name not in guest:
            raise MalformedError(f"from the guest: no answer named {name}")
        return str(guest[name].text).strip()

    def of_guest(name: str, promise: str) -> None:
        check(f"guest {name}", promise, lambda: (told(name), told(name) == promise))

    status("guest booted", "booted", 0, "in time")
    realtime("guest version", lambda: told("version"))
    of_guest("release", wanted.guest_release)
    of_guest("hypervisor", "kvm")
    of_guest("isolated", wanted.isolated)

    def seen() -> tuple[str, bool]:
        found = told("pci").split()
        return " ".join(found), found.count(VIRTUAL_ID) == 1 and found.count(FUNCTION_ID) == 1

    check("guest devices", f"one {VIRTUAL_ID} and one {FUNCTION_ID}", seen)
    bound("devices passed", "devices_running")

    # The plan kept, broken by hand, and kept again.
    moved = f"{wanted.guest}: vCPU {wanted.vcpu} wanted on CPU {wanted.cpu}, found on CPU {wanted.other_cpu}"
    check("audit", "green", lambda: _green(answer("audit"), "audit"))
    status("vCPU moved", "move", 0, "taskset")
    check("audit after the move", f"red for one reason: {moved}", lambda: _red(answer("audit_moved"), wanted))
    status("vCPU moved back", "move_back", 0, "taskset")
    check("audit after the move back", "green", lambda: _green(answer("audit_back"), "audit"))

    # Ended by a signal.
    status("guest ended", "ended", 0, "in time after SIGTERM")
    status("guest shut down", "status", 0, "qemu's, after a clean shutdown")
    status("qemu gone", "qemu_after", 0, "no process of the guest is left")
    idle("devices after", "devices_after")

    # Killed.
    status("started again", "again", 0, "placed as planned")
    bound("devices passed again", "devices_again")
    status("cleanup while it runs", "cleanup_running", REFUSED, "refused")
    status("qemu killed", "kill_qemu", 0, "it was there")
    status("qemu ended", "qemu_killed", 0, "no process of the guest is left")
    bound("devices after the kill", "devices_killed")
    status("cleanup", "cleanup", 0, "everything undone")
    idle("devices after cleanup", "devices_cleaned")
    status("second cleanup", "cleanup_again", 0, "nothing to do")
    idle("devices after second cleanup", "devices_cleaned_again")
    return findings


def record(raw: bytes) -> dict[str, Any]:
    """What is kept of the answers beside the verdict, by name: status and text, as JSON where it is JSON."""
    try:
        answers = parse_answers(raw)
    except MalformedError:
        return {}
    kept: dict[str, Any] = {}
    for name, answer in answers.items():
        try:
            said: Any = json.loads(answer.text)
        except ValueError:
            said = answer.text
        kept[name] = {"status": answer.status, "said": said}
    return kept


def _joined(text: str) -> str:
    return "; ".join(text.split("\n"))


def _bound(text: str, wanted: Expectations) -> tuple[str, bool]:
    """Whether the board's devices are the guest's: one virtual function made, it and the other one vfio-pci's."""
    lines = text.split("\n")
    physical, function = (line.partition(" ")[0] for line in wanted.idle)
    there = [
        f"{physical} {PHYSICAL_ID} driver=igb override=(null) numvfs=1",
        f"{function} {FUNCTION_ID} driver=vfio-pci override=vfio-pci",
    ]
    virtual = f" {VIRTUAL_ID} driver=vfio-pci override=vfio-pci"
    return _joined(text), lines[:2] == there and len(lines) == 3 and lines[2].endswith(virtual)


def _report(answer: Answer, command: str) -> tuple[bool, list[dict[str, Any]]]:
    """What `virt-rt-check COMMAND --json` says: `ok`, and its findings. MalformedError when that is no such report."""
    try:
        report = json.loads(answer.text)
        ok, findings = report["ok"], report["findings"]
        if report["schema"] != 1 or report["command"] != command or not isinstance(ok, bool):
            raise MalformedError(f"a report of another kind: {answer.text[:80]!r}")
        for finding in findings:
            if not all(isinstance(finding[key], str) for key in ("name", "level", "wanted", "got")):
                raise MalformedError(f"not a finding: {finding!r}")
            if not isinstance(finding["advice"], bool):
                raise MalformedError(f"not a finding: {finding!r}")
    except MalformedError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise MalformedError(f"no report (status {answer.status}): {answer.text.strip()[:200]!r}") from error
    if not findings:
        raise MalformedError("a report without findings")
    if answer.status != (0 if ok else 1):
        raise MalformedError(f"status {answer.status} with a report that says ok: {ok}")
    return ok, findings


def _red_ones(findings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Findings that are neither fine nor a word to a person."""
    return [
        finding
        for finding in findings
        if finding["level"] not in ("ok", "warn")
        and not (finding["level"] == "unknown" and finding["advice"])
    ]


def _green(answer: Answer, command: str) -> tuple[str, bool]:
    """Whether a report has nothing red; what it warns of is told."""
    ok, findings = _report(answer, command)
    red = _red_ones(findings)
    fine = sum(finding["level"] == "ok" for finding in findings)
    warned = [finding["name"] for finding in findings if finding["level"] == "warn"]
    told = "; ".join(f"{each['name']}: wanted {each['wanted']}, got {each['got']}" for each in red)
    told = told or f"{fine} of {len(findings)} findings fine"
    return told + (f"; warned of: {', '.join(warned)}" if warned else ""), ok and not red and fine > 0


def _red(answer: Answer, wanted: Expectations) -> tuple[str, bool]:
    """Whether a report is red for the moved vCPU alone, and says where it should be and is."""
    ok, findings = _report(answer, "audit")
    red = _red_ones(findings)
    got = "; ".join(f"{each['name']}: wanted {each['wanted']}, got {each['got']}" for each in red)
    right = len(red) == 1 and (
        red[0]["name"] == f"{wanted.guest}: vCPU {wanted.vcpu}"
        and f"on CPU {wanted.cpu}" == red[0]["wanted"][-len(f"on CPU {wanted.cpu}") :]
        and f"on CPU {wanted.other_cpu} " in red[0]["got"] + " "
    )
    return got or "nothing red", not ok and right
