"""The verdict on an emulated host and the guest it ran under KVM: answers in, findings out; pure.

Standard library only, since it runs inside the step. It fails closed like `gate`, whose form of answers it reads.
Nothing is excused for being emulated: what the check tool finds red in the emulated host is red here, too. What it
only warns of there, since a virtual machine does not have it (turbo, sleep states, a frequency governor), is told
in the finding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

try:
    from pipeline.gate import Answer, Finding, MalformedError, parse_answers
    from pipeline.stackrecords import Received
except ImportError:  # in the step its file lies beside this one
    from gate import (  # type: ignore[import-not-found, no-redef]
        Answer,
        Finding,
        MalformedError,
        parse_answers,
    )
    from stackrecords import Received  # type: ignore[import-not-found, no-redef]

#: What can be broken before it is judged, each with the findings that must then be red.
SABOTAGES: dict[str, tuple[str, ...]] = {
    "unit-unmasked": (
        "guest masked units",
        "kernel inside: guest masked units",
        "service: guest masked units",
    ),
    "isolation-removed": ("host command line", "preflight"),
    "vcpu-unpinned": ("audit",),
    "emulator-on-rt-cpu": ("audit",),
    "vf-not-restored": ("devices after",),
    "cyclictest-missing": ("host measured", "measurement"),
    "clock-wrong": ("measurement",),
    "driver-missing": (
        "device driver loaded",
        "device measured",
        "device interrupts",
        "device interrupts counted",
    ),
}

#: What may be red besides, as a consequence: where the scheduler may put programs it does so now and then, and without
#: a trusted TSC the host's times do not fit the guest's.
CONSEQUENCES: dict[str, tuple[str, ...]] = {
    "isolation-removed": (
        "audit",
        "audit after the move",
        "audit after the move back",
        "kernel inside: audit",
        "measurement",
        "late by hog",
        "late by interrupt",
    ),
}

#: How the guest is made late (`recipes/lab/virt-rt-stack-disturb.sh`).
DISTURBANCES = ("hog", "interrupt")

#: What irqlat measures of each interrupt.
PATHS = ("handler", "thread")

#: What the guest counts of its virtual function.
COUNTERS = ("rx", "tx", "interrupts")

#: The board's devices by vendor and device number: the NIC, a virtual function of it, and `edu`
#: (docs/specs/edu.rst and hw/net/igb_regs.h of qemu).
PHYSICAL_ID, VIRTUAL_ID, FUNCTION_ID = "0x8086:0x10c9", "0x8086:0x10ca", "0x1234:0x11e8"

#: The host's driver of `edu`, which its package brings.
FUNCTION_DRIVER = "irqlat_edu"

#: Whose installed files are compared with what was built.
INSTALLED = ("kernel/guest/", "image/")

#: Exit status of a launch script that refuses before it does anything.
REFUSED = 2


@dataclass(frozen=True, slots=True)
class Expectations:
    """What was promised, and what the host was asked to do.

    guest              its name
    vcpu, cpu          the vCPU that is moved by hand, and its CPU in the plan
    other_cpu          where it is moved to
    machine            qemu's arguments for the host's CPUs and memory
    parameters         the plan's parameters of the host kernel
    physical, function PCI addresses: the function with virtual ones, and the device given whole
    release            `uname -r` of the host; guest_release of the guest
    isolated           the guest's isolated vCPUs, as the kernel lists them
    emulator           the CPUs of qemu's other threads, likewise
    masked             units of the guest that are masked
    boot               which kernel the guest's service boots: `inside` or `outside` of its disk
    echoes             packets that are sent through the virtual function
    interrupts         how many the device that is given whole is asked for
    installed          sha256 of the products that the packages were made of, by path as they are installed
    """

    guest: str
    vcpu: int
    cpu: int
    other_cpu: int
    machine: Sequence[str]
    parameters: Sequence[str]
    physical: str
    function: str
    isolated: str
    emulator: str
    masked: Sequence[str]
    boot: str
    echoes: int
    interrupts: int
    release: str
    guest_release: str
    installed: Mapping[str, str]

    @property
    def idle(self) -> list[str]:
        """The devices while no guest has them."""
        return [
            f"{self.physical} {PHYSICAL_ID} driver=igb override=(null) numvfs=0",
            f"{self.function} {FUNCTION_ID} driver={FUNCTION_DRIVER} override=(null)",
        ]


def judge(raw: bytes, wanted: Expectations, received: Received) -> list[Finding]:
    """Hold everything the host sent over its ports against what was promised.

    Always the same findings in the same order, but for one case: when the answers as a whole cannot be
    trusted (see `gate.parse_answers`), that is the only finding.
    """
    try:
        answers = parse_answers(raw)
    except MalformedError as error:
        return [Finding("answers", "all of the host's, with their checksum", str(error), False)]
    judgement = _Judgement(answers, wanted)
    judgement.findings.append(
        Finding("answers", "all of the host's, with their checksum", f"{len(answers)} answers", True)
    )
    judgement.host()
    judgement.first_start()
    judgement.use()
    judgement.measured()
    judgement.ended()
    judgement.records(received)
    judgement.killed()
    judgement.came_back()
    return judgement.findings


class _Judgement:
    """The findings so far, and the answers that they are about."""

    def __init__(self, answers: Mapping[str, Answer], wanted: Expectations) -> None:
        self.answers, self.wanted = answers, wanted
        self.findings: list[Finding] = []

    # What is told ---------------------------------------------------------------------------------

    def answer(self, name: str) -> Answer:
        if name not in self.answers:
            raise MalformedError(f"no answer named {name}")
        return self.answers[name]

    def text(self, name: str) -> str:
        return str(self.answer(name).text).strip()

    def of_guest(self, source: str, name: str) -> Answer:
        """What the guest answered; `source` is the host's answer that has all of the guest's."""
        try:
            guest = parse_answers(self.answer(source).text.encode())
        except MalformedError as error:
            raise MalformedError(f"from the guest: {error}") from error
        if name not in guest:
            raise MalformedError(f"from the guest: no answer named {name}")
        return guest[name]

    def told(self, source: str, name: str) -> str:
        return str(self.of_guest(source, name).text).strip()

    # Findings of a kind ---------------------------------------------------------------------------

    def check(self, name: str, promise: str, examine: Callable[[], tuple[str, bool]]) -> None:
        try:
            got, ok = examine()
        except MalformedError as error:
            got, ok = str(error), False
        self.findings.append(Finding(name, promise, got, ok))

    def same(self, name: str, told: Callable[[], str], promise: str) -> None:
        self.check(name, promise or "(nothing)", lambda: (told() or "(nothing)", told() == promise))

    def status(self, name: str, source: str, promise: int, meaning: str) -> None:
        def examine() -> tuple[str, bool]:
            found = self.answer(source)
            said = f": {_joined(found.text.strip())}" if found.text.strip() else ""
            return f"status {found.status}{said}", found.status == promise

        self.check(name, f"status {promise}: {meaning}", examine)

    def realtime(self, name: str, told: Callable[[], str]) -> None:
        self.check(name, "PREEMPT_RT", lambda: (told(), "PREEMPT_RT" in told().split()))

    def idle(self, name: str, source: str) -> None:
        promise = self.wanted.idle
        self.check(
            name,
            "; ".join(promise),
            lambda: (_joined(self.text(source)), self.text(source).split("\n") == promise),
        )

    def bound(self, name: str, source: str) -> None:
        self.check(
            name,
            "the guest's two devices driven by vfio-pci",
            lambda: _bound(self.text(source), self.wanted),
        )

    def audit(self, name: str, source: str) -> None:
        self.check(name, "green", lambda: _green(self.answer(source), "audit"))

    def guest(self, prefix: str, source: str, firmware: str) -> None:
        """What a guest says of itself at every start."""
        wanted = self.wanted

        def same(name: str, promise: str) -> None:
            self.same(f"{prefix}guest {name}", lambda: self.told(source, name), promise)

        self.realtime(f"{prefix}guest version", lambda: self.told(source, "version"))
        same("release", wanted.guest_release)
        same("hypervisor", "kvm")
        same("firmware", firmware)
        same("isolated", wanted.isolated)

        def masked() -> tuple[str, bool]:
            found = self.told(source, "masked").split("\n")
            odd = [f"{unit}: {state}" for unit, state in zip(wanted.masked, found, strict=False)]
            odd = [each for each in odd if not each.endswith(": masked")]
            if len(found) != len(wanted.masked):
                raise MalformedError(f"{len(found)} answers for {len(wanted.masked)} units")
            return "; ".join(odd) or f"all {len(found)}", bool(wanted.masked) and not odd

        self.check(f"{prefix}guest masked units", "all of the image's", masked)

        def seen() -> tuple[str, bool]:
            found = self.told(source, "pci").split()
            return " ".join(found), found.count(VIRTUAL_ID) == 1 and found.count(FUNCTION_ID) == 1

        self.check(f"{prefix}guest devices", f"one {VIRTUAL_ID} and one {FUNCTION_ID}", seen)

    # Findings in their order ----------------------------------------------------------------------

    def host(self) -> None:
        """Before any guest."""
        wanted = self.wanted
        self.same("host running", lambda: self.text("running"), "running")
        self.same("host failed units", lambda: self.text("failed"), "")
        self.realtime("host version", lambda: self.text("version"))
        self.same("host release", lambda: self.text("release"), wanted.release)

        def parameters() -> tuple[str, bool]:
            missing = [each for each in wanted.parameters if each not in self.text("cmdline").split()]
            got = f"not there: {' '.join(missing)}" if missing else "all"
            return got, bool(wanted.parameters) and not missing

        self.check("host command line", "every parameter of the plan", parameters)

        def files() -> tuple[str, bool]:
            built = {path: digest for path, digest in wanted.installed.items() if path.startswith(INSTALLED)}
            built = {path: digest for path, digest in built.items() if not path.endswith("kernelrelease")}
            found = [line.split("  ", 1) for line in self.text("installed").split("\n")]
            there = {line[1]: line[0] for line in found if len(line) == 2}
            odd = sorted(path for path, digest in built.items() if there.get(path) != digest)
            return f"others: {', '.join(odd)}" if odd else f"{len(built)} files", bool(built) and not odd

        self.check("installed files", "guest kernel and disk as they were built", files)
        self.check("preflight", "nothing red", lambda: _green(self.answer("preflight"), "preflight"))
        self.idle("devices before", "devices_before")

    def first_start(self) -> None:
        """By kvmqemu.sh: the plan kept, broken by hand, and kept again."""
        wanted = self.wanted
        self.status("guest booted", "booted", 0, "in time")
        self.status("guest finished", "finished", 0, "in time")
        self.guest("", "guest", "none")
        self.bound("devices passed", "devices_running")
        moved = (
            f"{wanted.guest}: vCPU {wanted.vcpu} wanted on CPU {wanted.cpu}, found on CPU {wanted.other_cpu}"
        )
        self.audit("audit", "audit")
        self.status("vCPU moved", "move", 0, "taskset")
        self.check(
            "audit after the move",
            f"red for one reason: {moved}",
            lambda: _red(self.answer("audit_moved"), wanted),
        )
        self.status("vCPU moved back", "move_back", 0, "taskset")
        self.audit("audit after the move back", "audit_back")

    def use(self) -> None:
        """The devices at work in the guest."""
        echoes = self.wanted.echoes
        self.same("VF driver", lambda: self.told("guest", "vf"), "driver=igbvf carrier=1")
        self.status("VF listens", "listens", 0, "in time")
        self.check(
            "VF traffic",
            f"{echoes} of {echoes} came back",
            lambda: (
                self.text("traffic"),
                self.answer("traffic").status == 0
                and self.text("traffic") == f"{echoes} of {echoes} came back",
            ),
        )

        def rose() -> tuple[str, bool]:
            before, after = (_counters(self.told("guest", name)) for name in ("vf_before", "vf_after"))
            more = {name: after[name] - before[name] for name in COUNTERS}
            told = ", ".join(f"{count} {name}" for name, count in more.items())
            return told, more["rx"] >= echoes and more["tx"] >= echoes and more["interrupts"] > 0

        self.check("VF counters", f"at least {echoes} packets in and out, and interrupts", rose)

        interrupts = self.wanted.interrupts

        def well(name: str, meaning: str) -> None:
            def examine() -> tuple[str, bool]:
                found = self.of_guest("guest", name)
                return f"status {found.status}: {_joined(found.text.strip())}", found.status == 0

            self.check(f"device {meaning}", "status 0", examine)

        well("irqlat_loaded", "driver loaded")
        well("irqlat_run", "measured")
        self.check(
            "device interrupts",
            f"{interrupts} asked for, {interrupts} measured, none lost, on the isolated vCPU",
            lambda: _irqlat(self.told("guest", "irqlat"), self.wanted),
        )

        def counted() -> tuple[str, bool]:
            before, after = (_number(self.told("guest", f"irqlat_{name}")) for name in ("before", "after"))
            return f"{before}, then {after}", after - before >= interrupts

        self.check("device interrupts counted", f"at least {interrupts} more", counted)

    def measured(self) -> None:
        """How host and guest were measured, and the guest made late; what came of it is looked at elsewhere."""
        self.status("devices used", "used", 0, "in time")
        self.status("host makes load", "loaded", 0, "before the guest measures")
        self.status("guest has measured", "guest_measured", 0, "in time")
        self.status("host measured", "host_measured", 0, "all stages")
        measured = self.of_guest
        self.check(
            "guest measured",
            "status 0",
            lambda: (
                f"status {measured('guest', 'measured').status}: "
                f"{_joined(measured('guest', 'measured').text.strip())}",
                measured("guest", "measured").status == 0,
            ),
        )
        for kind in DISTURBANCES:
            self.status(f"made late by {kind}", f"late_{kind}", 0, "and attributed")

    def ended(self) -> None:
        """By a signal."""
        self.status("guest ended", "ended", 0, "in time after SIGTERM")
        self.status("guest shut down", "status", 0, "qemu's, after a clean shutdown")
        self.status("qemu gone", "qemu_after", 0, "no process of the guest is left")
        self.idle("devices after", "devices_after")

    def records(self, received: Received) -> None:
        """The directories of host and guest."""
        self.status("records of the host", "records_host", 0, "sent")
        self.status("records of the guest", "records_guest", 0, "sent")
        promise = sorted(["host", f"guest-{self.wanted.guest}"])

        def whole() -> tuple[str, bool]:
            got = received.fault or ", ".join(sorted(received.digests)) or "none"
            told = self.told("guest", "sent")
            if not received.fault and received.digests.get(f"guest-{self.wanted.guest}") != told:
                return f"{got}; the guest's are not those that it sent", False
            return got, not received.fault and sorted(received.digests) == promise

        self.check("records", f"{', '.join(promise)}, whole", whole)

    def killed(self) -> None:
        """Started by kvmqemu-rfs.sh; then script and qemu are killed."""
        self.status("kernel inside: guest booted", "inside_booted", 0, "in time")
        self.status("kernel inside: guest finished", "inside_finished", 0, "in time")
        self.guest("kernel inside: ", "inside_guest", "uefi")
        self.audit("kernel inside: audit", "inside_audit")
        self.bound("kernel inside: devices passed", "inside_devices")
        self.status("cleanup while it runs", "cleanup_running", REFUSED, "refused")
        self.status("qemu killed", "kill_qemu", 0, "it was there")
        self.status("qemu ended", "qemu_killed", 0, "no process of the guest is left")
        self.bound("devices after the kill", "devices_killed")
        self.status("cleanup", "cleanup", 0, "everything undone")
        self.idle("devices after cleanup", "devices_cleaned")
        self.status("second cleanup", "cleanup_again", 0, "nothing to do")
        self.idle("devices after second cleanup", "devices_cleaned_again")

    def came_back(self) -> None:
        """By its service, after the host was booted again; then stopped by systemd."""
        self.status("service enabled", "enable", 0, "systemctl")

        def rebooted() -> tuple[str, bool]:
            before, after = self.text("boot_id"), self.text("again_boot_id")
            return f"{before}, then {after}", bool(before) and bool(after) and before != after

        self.check("host rebooted", "another boot_id", rebooted)
        self.same("host running again", lambda: self.text("again_running"), "running")
        self.same("host failed units again", lambda: self.text("again_failed"), "")
        self.same("service active", lambda: self.text("service_active"), "active")
        self.status("service: guest booted", "service_booted", 0, "in time")
        self.status("service: guest finished", "service_finished", 0, "in time")
        self.guest("service: ", "service_guest", "uefi" if self.wanted.boot == "inside" else "none")
        self.audit("service: audit", "service_audit")
        self.bound("service: devices passed", "service_devices")
        self.status("service stopped", "service_stop", 0, "systemctl")
        self.same(
            "service result",
            lambda: " ".join(sorted(self.text("service_result").split())),
            "ExecMainStatus=0 Result=success",
        )
        self.status("service: qemu gone", "service_qemu", 0, "no process of the guest is left")
        self.idle("service: devices after", "service_devices_after")


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


def _number(text: str) -> int:
    if not text.isdecimal():
        raise MalformedError(f"no number: {text[:80]!r}")
    return int(text)


def _irqlat(text: str, wanted: Expectations) -> tuple[str, bool]:
    """Whether irqlat says that it measured what it was asked to."""
    try:
        said = json.loads(text)
        got = {name: said[name] for name in ("requested", "samples", "lost", "cpu", "irq_cpu")}
        counts = {name: sum(said[name]["histogram"].values()) + said[name]["overflows"] for name in PATHS}
        if (said["schema"], said["tool"]) != (1, "irqlat"):
            raise MalformedError(f"a document of another kind: {text[:80]!r}")
    except MalformedError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedError(f"nothing of irqlat's: {text[:80]!r}") from error
    cpu = wanted.isolated.partition(",")[0].partition("-")[0]
    promise = {"requested": wanted.interrupts, "samples": wanted.interrupts, "lost": 0}
    ok = got == promise | {"cpu": int(cpu), "irq_cpu": int(cpu)}
    told = ", ".join(f"{name} {value}" for name, value in (got | counts).items())
    return told, ok and set(counts.values()) == {wanted.interrupts}


def _counters(text: str) -> dict[str, int]:
    """What the guest counted, by name; MalformedError when that is not all of `COUNTERS`."""
    try:
        counted = {name: int(value) for name, _, value in (word.partition("=") for word in text.split())}
    except ValueError as error:
        raise MalformedError(f"no counters: {text[:80]!r}") from error
    if tuple(counted) != COUNTERS:
        raise MalformedError(f"no counters: {text[:80]!r}")
    return counted


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
