"""The stack proof: its verdict fails closed, it hands over what it promises, and it runs where it can."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import labboard, recipes, settings, stack, stackgate, stackmeasure, stackproof, stackrecords
from pipeline.action import Action
from pipeline.checktool import MEASURE
from pipeline.cpuplan import HostPlan
from pipeline.gate import Answer, Finding, MalformedError
from pipeline.measure import expectations, request
from pipeline.plan import State
from pipeline.project import Project
from pipeline.stackgate import Expectations, judge
from pipeline.stackrecords import Received
from tests import measured
from tests.sabotage import TOGETHER

ROOT = Path(__file__).resolve().parent.parent
HOST_SCRIPT = ROOT / "recipes" / "lab" / "virt-rt-stack-host.sh"

PLAN = Expectations(
    guest="rt-guest",
    vcpu=1,
    cpu=2,
    other_cpu=3,
    machine=("-smp", "4", "-m", "4096M"),
    parameters=["isolcpus=managed_irq,domain,1-3", "intel_iommu=on"],
    physical="0000:01:00.0",
    function="0000:02:00.0",
    isolated="1",
    emulator="0",
    masked=("fstrim.timer", "irqbalance.service"),
    boot="outside",
    echoes=20,
    interrupts=300,
    release="6.12.107-rt-virt-host",
    guest_release="6.12.107-rt-virt-guest",
    installed={
        "image/rt-guest/disk.qcow2": "d15c" * 16,
        "kernel/guest/bzImage": "be11" * 16,
        "kernel/guest/kernelrelease": "4e1e" * 16,
        "qemu/bin/qemu-system-x86_64": "9e30" * 16,
    },
)

Told = dict[str, tuple[int, str]]

# What an emulated host and its guest said ------------------------------------------------------

RT = "#1 SMP PREEMPT_RT Tue Jan  1 00:00:00 UTC 1980\n"
IDLE = """\
0000:01:00.0 0x8086:0x10c9 driver=igb override=(null) numvfs=0
0000:02:00.0 0x1234:0x11e8 driver=irqlat_edu override=(null)
"""
BOUND = """\
0000:01:00.0 0x8086:0x10c9 driver=igb override=(null) numvfs=1
0000:02:00.0 0x1234:0x11e8 driver=vfio-pci override=vfio-pci
0000:01:10.0 0x8086:0x10ca driver=vfio-pci override=vfio-pci
"""
#: As sha256sum prints it in the directory where the packages install.
INSTALLED = f"{'be11' * 16}  kernel/guest/bzImage\n{'d15c' * 16}  image/rt-guest/disk.qcow2\n"
BUSY = "kvmqemu-rfs.sh: guest rt-guest is running: started by process 471\n"


def sent(told: Told) -> bytes:
    """The bytes that come over a port."""
    lines = [
        f"{name} {status} {base64.b64encode(text.encode()).decode()}\n"
        for name, (status, text) in told.items()
    ]
    body = "".join(lines).encode()
    return body + f"end {hashlib.sha256(body).hexdigest()}\n".encode()


IRQLAT: dict[str, Any] = {
    "schema": 1,
    "tool": "irqlat",
    "requested": 300,
    "samples": 300,
    "lost": 0,
    "cpu": 1,
    "irq_cpu": 1,
    "handler": {"overflows": 1, "histogram": {"40": 299}},
    "thread": {"overflows": 2, "histogram": {"80": 200, "90": 98}},
}

#: What a guest says at every start, and what only after it used its devices.
SAYS = {
    "version": RT,
    "release": "6.12.107-rt-virt-guest\n",
    "cmdline": "root=PARTLABEL=virt-rt-root quiet\n",
    "hypervisor": "kvm\n",
    "firmware": "none\n",
    "pci": "0x8086:0x29c0\n0x1af4:0x1001\n0x8086:0x10ca\n0x1234:0x11e8\n",
    "isolated": "1\n",
    "masked": "masked\nmasked\n",
}
USES = {
    "vf": "driver=igbvf carrier=1\n",
    "vf_before": "rx=1 tx=5 interrupts=3\n",
    "vf_served": "",
    "vf_after": "rx=22 tx=26 interrupts=30\n",
    "irqlat_loaded": "",
    "irqlat_before": "0\n",
    "irqlat_run": "",
    "irqlat": json.dumps(IRQLAT),
    "irqlat_after": "302\n",
    "measured": "",
    "sent": "ab12\n",
}


def guest(says: dict[str, str] = SAYS | USES, **changed: str | tuple[int, str] | None) -> str:
    """What the guest told its host."""
    told = says | changed
    answers = {
        name: text if isinstance(text, tuple) else (0, text)
        for name, text in told.items()
        if text is not None
    }
    return sent(answers).decode()


RECEIVED = Received({"host": "cd34", "guest-rt-guest": "ab12"}, "")


def vcpu(cpu: int = 2) -> dict[str, Any]:
    """The check tool's finding on vCPU 1."""
    return finding(
        "rt-guest: vCPU 1",
        "ok" if cpu == 2 else "fail",
        "fifo 1 on CPU 2",
        f"fifo 1 on CPU {cpu} (thread 542)",
    )


def finding(name: str, level: str, wanted: str = "0", got: str = "1", advice: bool = False) -> dict[str, Any]:
    """A finding as the check tool prints it."""
    return {"name": name, "level": level, "wanted": wanted, "got": got, "remedy": "mend it", "advice": advice}


def report(*findings: dict[str, Any], command: str = "audit", ok: bool | None = None) -> tuple[int, str]:
    """Exit status and output of the check tool; by default its verdict is that of its findings."""
    if ok is None:
        ok = all(each["level"] in ("ok", "warn") or each["advice"] for each in findings)
    told = {"schema": 1, "command": command, "platform": "qemu-q35", "plan": "/plan.json", "ok": ok}
    return 0 if ok else 1, json.dumps({**told, "findings": list(findings)})


PROCESS = finding("rt-guest: process", "ok")
NO_TURBO = finding("turbo", "warn")


def good() -> Told:
    """A host and a guest that keep the plan."""
    green = report(PROCESS, vcpu())
    return {
        "running": (0, "running\n"),
        "failed": (0, ""),
        "version": (0, RT),
        "release": (0, "6.12.107-rt-virt-host\n"),
        "cmdline": (0, "root=/dev/vda rw isolcpus=managed_irq,domain,1-3 intel_iommu=on\n"),
        "boot_id": (0, "2bdc\n"),
        "installed": (0, INSTALLED),
        "preflight": report(finding("kernel", "ok"), NO_TURBO, command="preflight"),
        "devices_before": (0, IDLE),
        "booted": (0, ""),
        "devices_running": (0, BOUND),
        "audit": green,
        "move": (0, "pid 542's current affinity list: 2\npid 542's new affinity list: 3\n"),
        "audit_moved": report(PROCESS, vcpu(3)),
        "move_back": (0, "pid 542's current affinity list: 3\npid 542's new affinity list: 2\n"),
        "audit_back": green,
        "listens": (0, ""),
        "traffic": (0, "20 of 20 came back\n"),
        "used": (0, ""),
        "loaded": (0, ""),
        "guest_measured": (0, ""),
        "late_hog": (0, ""),
        "late_interrupt": (0, ""),
        "finished": (0, ""),
        "guest": (0, guest()),
        "host_measured": (0, ""),
        "ended": (0, ""),
        "status": (0, ""),
        "messages": (0, ""),
        "qemu_after": (0, ""),
        "devices_after": (0, IDLE),
        "records_guest": (0, ""),
        "records_host": (0, ""),
        "inside_booted": (0, ""),
        "inside_audit": green,
        "inside_devices": (0, BOUND),
        "inside_finished": (0, ""),
        "inside_guest": (0, guest(SAYS, firmware="uefi\n")),
        "inside_messages": (0, ""),
        "cleanup_running": (2, BUSY),
        "kill_qemu": (0, ""),
        "qemu_killed": (0, ""),
        "devices_killed": (0, BOUND),
        "cleanup": (0, ""),
        "devices_cleaned": (0, IDLE),
        "cleanup_again": (0, ""),
        "devices_cleaned_again": (0, IDLE),
        "enable": (0, ""),
        "again_running": (0, "running\n"),
        "again_failed": (0, ""),
        "again_boot_id": (0, "77ab\n"),
        "service_active": (0, "active\n"),
        "service_booted": (0, ""),
        "service_audit": green,
        "service_devices": (0, BOUND),
        "service_finished": (0, ""),
        "service_guest": (0, guest(SAYS)),
        "service_stop": (0, ""),
        "service_result": (0, "Result=success\nExecMainStatus=0\n"),
        "service_messages": (0, "Started\n"),
        "service_qemu": (0, ""),
        "service_devices_after": (0, IDLE),
    }


def failed(raw: bytes, plan: Expectations = PLAN, received: Received = RECEIVED) -> list[str]:
    """Names of the findings that are not fine."""
    return [each.name for each in judge(raw, plan, received) if not each.ok]


# The verdict -----------------------------------------------------------------------------------


def test_a_host_and_a_guest_that_keep_the_plan_pass() -> None:
    findings = judge(sent(good()), PLAN, RECEIVED)
    assert [each for each in findings if not each.ok] == []
    assert Finding("preflight", "nothing red", "1 of 2 findings fine; warned of: turbo", True) in findings


def test_what_is_judged_is_what_the_host_tells() -> None:
    """An answer of the script that nobody judges, or a judged one that it does not give, is a mistake here."""
    told = re.findall(r"^ *answer (\w+) ", HOST_SCRIPT.read_text(), re.MULTILINE)
    assert told == list(good())
    agent = (ROOT / "recipes/lab/virt-rt-stack-guest.sh").read_text()
    asked = re.findall(r"^ *answer (\w+) ", agent, re.MULTILINE)
    assert set(asked) == {*SAYS, *USES}
    assert len(asked) == len({*SAYS, *USES})


#: Answers that are only kept: what scripts said.
KEPT = ("messages", "inside_messages", "service_messages")


@pytest.mark.parametrize("name", [name for name in good() if name not in KEPT])
@pytest.mark.parametrize("answer", [None, (0, "?"), (77, ""), (1, "?")])
def test_a_missing_or_odd_answer_fails(name: str, answer: tuple[int, str] | None) -> None:
    """But for answers of which only the text matters, or only the status."""
    told = good()
    del told[name]
    if answer is not None:
        told[name] = answer
        judged_by_status = {
            *("booted", "move", "move_back", "listens", "finished", "ended", "status", "qemu_after"),
            *(
                "records_guest",
                "records_host",
                "inside_booted",
                "inside_finished",
                "kill_qemu",
                "qemu_killed",
            ),
            *("used", "loaded", "guest_measured", "late_hog", "late_interrupt", "host_measured"),
            *("cleanup", "cleanup_again", "enable", "service_booted", "service_finished", "service_stop"),
            "service_qemu",
        }
        odd_boot = name in ("boot_id", "again_boot_id") and answer[1]
        nothing_failed = name in ("failed", "again_failed") and not answer[1]
        if (name in judged_by_status and answer[0] == 0) or odd_boot or nothing_failed:
            return
    assert failed(sent(told)) != []


IDLE_LINES = IDLE.splitlines()


@pytest.mark.parametrize(
    ("name", "answer", "finding"),
    [
        ("running", (1, "degraded"), "host running"),
        ("failed", (0, "virt-rt-settings.service loaded failed failed"), "host failed units"),
        ("version", (0, RT.replace("PREEMPT_RT", "PREEMPT_DYNAMIC")), "host version"),
        ("release", (0, "6.12.107-rt-virt-guest"), "host release"),
        ("cmdline", (0, "root=/dev/vda isolcpus=managed_irq,domain,1-3"), "host command line"),
        ("cmdline", (0, "isolcpus=managed_irq,domain,1-3 intel_iommu=on,sm_on"), "host command line"),
        ("installed", (0, ""), "installed files"),
        ("installed", (1, "sha256sum: image/rt-guest/disk.qcow2: No such file"), "installed files"),
        ("installed", (0, INSTALLED.splitlines()[0]), "installed files"),
        ("installed", (0, INSTALLED.replace("d15c", "d15d", 1)), "installed files"),
        ("installed", (0, INSTALLED.replace("image/", "artifacts/image/")), "installed files"),
        ("installed", (0, INSTALLED.replace("  ", " ")), "installed files"),
        ("preflight", report(finding("KVM", "fail"), command="preflight"), "preflight"),
        ("preflight", report(finding("KVM", "unknown"), command="preflight"), "preflight"),
        ("devices_before", (0, BOUND), "devices before"),
        ("devices_before", (0, IDLE.replace("irqlat_edu", "none")), "devices before"),
        ("booted", (1, ""), "guest booted"),
        ("devices_running", (0, IDLE), "devices passed"),
        (
            "devices_running",
            (0, BOUND.replace("10ca driver=vfio-pci", "10ca driver=igbvf")),
            "devices passed",
        ),
        ("devices_running", (0, BOUND.replace("11e8 driver=vfio-pci", "11e8 driver=none")), "devices passed"),
        ("devices_running", (0, BOUND.replace("numvfs=1", "numvfs=2")), "devices passed"),
        ("devices_running", (0, BOUND + BOUND.splitlines()[2] + "\n"), "devices passed"),
        ("audit", report(PROCESS, vcpu(3)), "audit"),
        ("audit", report(PROCESS, finding("interrupts", "unknown")), "audit"),
        ("move", (1, "taskset: failed to set pid 542's affinity"), "vCPU moved"),
        ("audit_back", report(PROCESS, vcpu(3)), "audit after the move back"),
        ("ended", (1, ""), "guest ended"),
        ("status", (137, ""), "guest shut down"),
        ("qemu_after", (1, "542"), "qemu gone"),
        ("devices_after", (0, IDLE.replace("numvfs=0", "numvfs=1")), "devices after"),
        (
            "devices_after",
            (0, IDLE.replace("irqlat_edu override=(null)", "irqlat_edu override=vfio-pci")),
            "devices after",
        ),
        ("devices_after", (0, IDLE.replace("driver=igb", "driver=none")), "devices after"),
        ("devices_after", (0, IDLE_LINES[0]), "devices after"),
        ("listens", (1, ""), "VF listens"),
        ("traffic", (1, "20 of 20 came back"), "VF traffic"),
        ("traffic", (0, "19 of 20 came back"), "VF traffic"),
        ("used", (1, ""), "devices used"),
        ("loaded", (1, ""), "host makes load"),
        ("guest_measured", (1, ""), "guest has measured"),
        ("host_measured", (1, "not measured: cyclictest: not installed"), "host measured"),
        ("late_hog", (1, "the guest does not tell late_hog"), "made late by hog"),
        ("late_interrupt", (2, "no trace"), "made late by interrupt"),
        ("finished", (1, ""), "guest finished"),
        ("records_guest", (1, ""), "records of the guest"),
        ("records_host", (1, ""), "records of the host"),
        ("inside_booted", (1, ""), "kernel inside: guest booted"),
        ("inside_audit", report(PROCESS, vcpu(3)), "kernel inside: audit"),
        ("inside_devices", (0, IDLE), "kernel inside: devices passed"),
        ("inside_finished", (1, ""), "kernel inside: guest finished"),
        ("inside_guest", (0, guest(SAYS)), "kernel inside: guest firmware"),
        ("cleanup_running", (0, ""), "cleanup while it runs"),
        ("kill_qemu", (1, ""), "qemu killed"),
        ("devices_killed", (0, IDLE), "devices after the kill"),
        ("cleanup", (1, "not undone: remove_vfs 0000:01:00.0"), "cleanup"),
        ("devices_cleaned", (0, BOUND), "devices after cleanup"),
        ("cleanup_again", (2, "nothing"), "second cleanup"),
        ("devices_cleaned_again", (0, BOUND), "devices after second cleanup"),
        ("enable", (1, ""), "service enabled"),
        ("again_boot_id", (0, "2bdc"), "host rebooted"),
        ("again_boot_id", (0, ""), "host rebooted"),
        ("again_running", (1, "degraded"), "host running again"),
        ("again_failed", (0, "x.service loaded failed failed"), "host failed units again"),
        ("service_active", (3, "inactive"), "service active"),
        ("service_booted", (1, ""), "service: guest booted"),
        ("service_audit", report(PROCESS, vcpu(3)), "service: audit"),
        ("service_devices", (0, IDLE), "service: devices passed"),
        ("service_finished", (1, ""), "service: guest finished"),
        ("service_guest", (0, guest(SAYS, firmware="uefi")), "service: guest firmware"),
        ("service_guest", (0, guest(SAYS, isolated="")), "service: guest isolated"),
        ("service_stop", (1, ""), "service stopped"),
        ("service_result", (0, "Result=signal\nExecMainStatus=9"), "service result"),
        ("service_qemu", (1, "542"), "service: qemu gone"),
        ("service_devices_after", (0, BOUND), "service: devices after"),
    ],
)
def test_a_broken_promise_is_the_finding(name: str, answer: tuple[int, str], finding: str) -> None:
    assert failed(sent(good() | {name: answer})) == [finding]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(report(PROCESS, vcpu()), id="green"),
        pytest.param(report(PROCESS, vcpu(1)), id="found on another CPU than it was moved to"),
        pytest.param(report(PROCESS, vcpu(33)), id="a CPU whose number begins alike"),
        pytest.param(
            report(vcpu() | {"level": "fail", "got": "fifo 2 on CPU 2 (thread 542)"}), id="another reason"
        ),
        pytest.param(report(vcpu(3) | {"name": "rt-guest: vCPU 0"}), id="another vCPU"),
        pytest.param(report(vcpu(3) | {"wanted": "fifo 1 on CPU 12"}), id="another place in the plan"),
        pytest.param(report(vcpu(3), finding("interrupts", "fail")), id="a second reason"),
        pytest.param(report(PROCESS | {"level": "fail"}), id="not running"),
        pytest.param(report(vcpu(3), ok=True), id="red findings in a green report"),
    ],
)
def test_the_audit_after_the_move_is_red_for_the_right_reason_alone(answer: tuple[int, str]) -> None:
    assert failed(sent(good() | {"audit_moved": answer})) == ["audit after the move"]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param((0, ""), id="nothing"),
        pytest.param((0, report(PROCESS, vcpu())[1][:-9]), id="cut short"),
        pytest.param((2, "virt-rt-check: no plan"), id="called wrongly"),
        pytest.param((1, report(PROCESS, vcpu())[1]), id="status that contradicts it"),
        pytest.param(report(ok=True), id="no findings"),
        pytest.param(report(NO_TURBO), id="nothing fine"),
        pytest.param(report(PROCESS, command="preflight"), id="of another command"),
        pytest.param(report(PROCESS | {"level": "fail"}, vcpu(), ok=True), id="green with a red finding"),
        pytest.param(report(PROCESS | {"level": "new"}, vcpu(), ok=True), id="a level that is not known"),
        pytest.param(report(PROCESS | {"advice": None}, vcpu(), ok=True), id="an odd finding"),
        pytest.param(report(PROCESS, ok=False), id="red without a red finding"),
        pytest.param((0, '{"ok": true, "findings": []}'), id="no schema"),
        pytest.param((0, "[]"), id="a list"),
    ],
)
def test_a_report_that_proves_nothing_is_not_green(answer: tuple[int, str]) -> None:
    assert failed(sent(good() | {"audit": answer})) == ["audit"]


def test_advice_to_a_person_is_not_red() -> None:
    answer = report(PROCESS, finding("BIOS", "unknown", advice=True))
    assert failed(sent(good() | {"audit": answer})) == []


GUEST = [
    *("guest version", "guest release", "guest hypervisor", "guest firmware", "guest isolated"),
    *(
        "guest masked units",
        "guest devices",
        "VF driver",
        "VF counters",
        "device driver loaded",
    ),
    *("device measured", "device interrupts", "device interrupts counted", "guest measured", "records"),
]


def irqlat(**changed: Any) -> str:
    """What irqlat wrote, with some of it changed."""
    return json.dumps(IRQLAT | changed)


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        (guest()[:-9], GUEST),
        (guest().replace("release 0", "release 1"), GUEST),
        ("", GUEST),
        (guest(version=None), ["guest version"]),
        (guest(version="#1 SMP PREEMPT_DYNAMIC"), ["guest version"]),
        (guest(release="6.12.107-rt-virt-host"), ["guest release"]),
        (guest(hypervisor="qemu"), ["guest hypervisor"]),
        (guest(hypervisor=None), ["guest hypervisor"]),
        (guest(isolated=""), ["guest isolated"]),
        (guest(pci="0x8086:0x29c0\n0x1234:0x11e8"), ["guest devices"]),
        (guest(pci="0x8086:0x10ca\n0x8086:0x10ca\n0x1234:0x11e8"), ["guest devices"]),
        (guest(pci="0x8086:0x10ca"), ["guest devices"]),
        (guest(firmware="uefi"), ["guest firmware"]),
        (guest(masked="masked\nenabled"), ["guest masked units"]),
        (guest(masked="masked"), ["guest masked units"]),
        (guest(masked=""), ["guest masked units"]),
        (guest(vf="driver=igbvf carrier=0"), ["VF driver"]),
        (guest(vf="driver=none carrier=1"), ["VF driver"]),
        (guest(vf=None), ["VF driver"]),
        (guest(vf_after="rx=20 tx=26 interrupts=30"), ["VF counters"]),
        (guest(vf_after="rx=22 tx=24 interrupts=30"), ["VF counters"]),
        (guest(vf_after="rx=22 tx=26 interrupts=3"), ["VF counters"]),
        (guest(vf_after="rx=22 tx=26"), ["VF counters"]),
        (guest(vf_before=None), ["VF counters"]),
        (guest(vf_before=""), ["VF counters"]),
        (guest(irqlat_loaded=(1, "insmod")), ["device driver loaded"]),
        (guest(irqlat_run=(1, "lost")), ["device measured"]),
        (guest(irqlat=""), ["device interrupts"]),
        (guest(irqlat=None), ["device interrupts"]),
        (guest(irqlat="[]"), ["device interrupts"]),
        (guest(irqlat=irqlat(samples=299)), ["device interrupts"]),
        (guest(irqlat=irqlat(lost=1)), ["device interrupts"]),
        (guest(irqlat=irqlat(requested=10, samples=10)), ["device interrupts"]),
        (guest(irqlat=irqlat(irq_cpu=0)), ["device interrupts"]),
        (guest(irqlat=irqlat(cpu=0)), ["device interrupts"]),
        (guest(irqlat=irqlat(tool="cyclictest")), ["device interrupts"]),
        (guest(irqlat=irqlat(thread={"overflows": 0, "histogram": {"80": 299}})), ["device interrupts"]),
        (guest(irqlat=irqlat(handler={"overflows": 0, "histogram": []})), ["device interrupts"]),
        (guest(irqlat_after="299"), ["device interrupts counted"]),
        (guest(irqlat_after="many"), ["device interrupts counted"]),
        (guest(irqlat_before=None), ["device interrupts counted"]),
        (guest(measured=(1, "failed: 001-cyclictest")), ["guest measured"]),
        (guest(measured=None), ["guest measured"]),
        (guest(sent="ab13"), ["records"]),
        (guest(sent=None), ["records"]),
    ],
)
def test_a_guest_that_is_not_what_was_promised(text: str, findings: list[str]) -> None:
    assert failed(sent(good() | {"guest": (0, text)})) == findings


@pytest.mark.parametrize("size", [0, 1, 40, -1, -2, -66])
def test_answers_cut_short_anywhere_are_no_answers(size: int) -> None:
    assert failed(sent(good())[:size]) == ["answers"]
    assert stackgate.record(sent(good())[:size]) == {}


def test_a_plan_without_parameters_never_passes() -> None:
    assert failed(sent(good()), replace(PLAN, parameters=[])) == ["host command line"]


@pytest.mark.parametrize(
    "installed", [{}, {name: PLAN.installed[name] for name in PLAN.installed if name.startswith("qemu")}]
)
def test_without_a_file_to_compare_nothing_is_installed(installed: dict[str, str]) -> None:
    assert failed(sent(good()), replace(PLAN, installed=installed)) == ["installed files"]


def test_each_file_that_was_built_is_compared() -> None:
    more = {**PLAN.installed, "image/rt-guest/other.qcow2": "f" * 64}
    assert failed(sent(good()), replace(PLAN, installed=more)) == ["installed files"]


def test_everything_told_is_kept_beside_the_verdict() -> None:
    kept = stackgate.record(sent(good()))
    assert list(kept) == list(good())
    assert kept["cleanup_running"] == {"status": 2, "said": BUSY}
    assert kept["audit"]["said"]["findings"][1]["name"] == "rt-guest: vCPU 1"


def test_reports_are_checked_by_one_reader() -> None:
    with pytest.raises(MalformedError, match="without findings"):
        stackgate._report(Answer(0, report(ok=True)[1]), "audit")


@pytest.mark.parametrize(
    "received",
    [
        Received({}, ""),
        Received({"host": "cd34"}, ""),
        Received({"guest-rt-guest": "ab12"}, ""),
        Received({"host": "cd34", "guest-rt-guest": "ab13"}, ""),
        Received({"host": "cd34", "guest-rt-guest": "ab12", "other": "ef56"}, ""),
        Received({"host": "cd34", "guest-rt-guest": "ab12"}, "host came twice"),
    ],
)
def test_records_that_are_not_what_was_sent(received: Received) -> None:
    assert failed(sent(good()), received=received) == ["records"]


def test_each_sabotage_names_findings_that_there_are(tmp_path: Path) -> None:
    names = [each.name for each in judge(sent(good()), PLAN, RECEIVED)]
    names += [stackmeasure.judge(tmp_path, tmp_path / "none").name]
    names += [each.name for each in stackmeasure.attribute(tmp_path, tmp_path)]
    assert len(names) == len(set(names))
    assert all(reds and set(reds) <= set(names) for reds in stackgate.SABOTAGES.values())


def test_what_is_broken_together_is_everything_and_nothing_that_another_hides() -> None:
    runs = [
        [(*stackgate.SABOTAGES[name], *stackgate.CONSEQUENCES.get(name, ())) for name in run.split("+")]
        for run in TOGETHER
    ]
    assert sorted("+".join(TOGETHER).split("+")) == sorted(stackgate.SABOTAGES)
    for reds in runs:
        told = [finding for each in reds for finding in each]
        assert len(told) == len(set(told))


@pytest.mark.parametrize("sabotage", stackgate.SABOTAGES)
def test_each_sabotage_is_done_somewhere_and_documented(sabotage: str) -> None:
    host, agent, driver = (
        (ROOT / place).read_text()
        for place in (
            "recipes/lab/virt-rt-stack-host.sh", "recipes/lab/virt-rt-stack-guest.sh", "pipeline/stackproof.py",
        )
    )  # fmt: skip
    assert f"breaking {sabotage} " in host + agent or f'"{sabotage}" in sabotages' in driver
    row = re.search(
        rf"^\| `{sabotage}` \|.*\| (.*) \|$", (ROOT / "docs/stack-proof.md").read_text(), re.MULTILINE
    )
    assert row, "not in the table"
    reds = stackgate.SABOTAGES[sabotage]
    told = re.findall(r"`(.*?)`", row[1])
    assert set(told) <= set(reds) and (len(told) == len(reds) or "at every start" in row[1])


@pytest.mark.parametrize("kind", stackgate.DISTURBANCES)
def test_each_disturbance_is_made_on_both_sides(kind: str) -> None:
    host, agent, disturb = (
        (ROOT / f"recipes/lab/virt-rt-stack-{name}.sh").read_text() for name in ("host", "guest", "disturb")
    )
    assert f"late {kind} " in host
    assert re.search(rf"be_late {kind} \d+\n", agent)
    assert f"\n{kind}() {{" in disturb
    assert stackmeasure.DISTURBANCES.keys() == set(stackgate.DISTURBANCES)


def test_the_agent_measures_until_it_is_late_by_each(tmp_path: Path) -> None:
    """Its calls are those that the script it sources wants."""
    agent = (ROOT / "recipes/lab/virt-rt-stack-guest.sh").read_text()
    calls = re.findall(r"^ *(be_late .*)$", agent, re.MULTILINE)
    assert [call.split()[1] for call in calls] == list(stackgate.DISTURBANCES)
    (tmp_path / "measure").write_text(
        "import sys\nprint('measuring')\nopen(sys.argv[sys.argv.index('--out') + 1], 'w').write(' '.join(sys.argv))\n"
    )
    lines = [
        f"set -uo pipefail; work={tmp_path} MEASURE={tmp_path}/measure PLACE=guest-g ISOLATED=1",
        'answer() { local name=$1; shift; echo "$name: $("$@")"; }',
        f". {ROOT}/recipes/lab/virt-rt-stack-late-guest.sh",
        *calls,
    ]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(said) == ["measuring_hog", "late_hog", "measuring_interrupt", "late_interrupt"]
    for kind in stackgate.DISTURBANCES:
        limit = re.search(r" --limit ([0-9]+) ", said[f"late_{kind}"])
        assert limit and int(limit[1]) > 0
        assert " trace break --place guest-g --cpus 1 " in said[f"late_{kind}"]


# What is sent at length ------------------------------------------------------------------------


def directory(name: str, *files: tuple[str, str]) -> bytes:
    """A directory as it comes over the port."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path, content in files:
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content.encode()))
    raw = packed.getvalue()
    return f"{name} {len(raw)} {hashlib.sha256(raw).hexdigest()}\n".encode() + raw


HOST = directory("host", ("./dmesg", "Linux"), ("./runs/001/run.json", "{}"))
OTHER = directory("guest-rt-guest", ("dmesg", "too"))


def test_directories_are_unpacked(tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(HOST + OTHER)
    received = stackrecords.receive(tmp_path / "stream", tmp_path / "records")
    assert received.fault == ""
    assert list(received.digests) == ["host", "guest-rt-guest"]
    assert received.digests["host"].encode() in HOST.split(b"\n")[0]
    found = {
        p.relative_to(tmp_path).as_posix(): p.read_text()
        for p in tmp_path.glob("records/**/*")
        if p.is_file()
    }
    assert found == {
        "records/host/dmesg": "Linux",
        "records/host/runs/001/run.json": "{}",
        "records/guest-rt-guest/dmesg": "too",
    }


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (HOST[:-1], "host is cut short"),
        (HOST + OTHER[:9], "not the head of a directory"),
        (HOST + b"X" + OTHER, "not the head of a directory"),
        (HOST.replace(b"Linux", b"Minix"), "host does not match its checksum"),
        (HOST + HOST, "host came twice"),
        (
            b"host 0 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n",
            "host cannot be unpacked",
        ),
        (directory("host"), "host has no files"),
        (directory("host", ("../outside", "x")), "host cannot be unpacked"),
        (directory("../host", ("inside", "x")), "not the head of a directory"),
    ],
)
def test_a_directory_that_is_not_whole_is_a_fault(raw: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(raw)
    assert stackrecords.receive(tmp_path / "stream", tmp_path / "records").fault.startswith(fault)
    assert not (tmp_path / "outside").exists()


def test_nothing_sent_is_a_fault_or_no_directory(tmp_path: Path) -> None:
    assert "nothing came" in stackrecords.receive(tmp_path / "stream", tmp_path / "a").fault
    (tmp_path / "stream").write_bytes(b"")
    assert stackrecords.receive(tmp_path / "stream", tmp_path / "b") == Received({}, "")


# The host --------------------------------------------------------------------------------------


LABHOST: dict[str, Any] = {
    "release": PLAN.release,
    "environment_offset": 4096,
    "entries": [
        {"id": "simple", "release": PLAN.release},
        {"id": f"virt-rt-plain-virt-rt-host-{PLAN.release}", "release": PLAN.release},
        {"id": "virt-rt-plain-virt-rt-host-6.12.1", "release": "6.12.1"},
        {"id": f"virt-rt-plain-other-{PLAN.release}", "release": PLAN.release},
    ],
}
#: Requests to measure as the step is given them.
ASKED: dict[str, dict[str, Any]] = {
    place: {
        "place": place,
        "kernel_release": "",
        "plan_sha256": "",
        "stages": [
            {"name": "a", "argv": []},
            {"name": "b", "argv": ["/x/{release}/y", "--at={release}", "z"]},
        ],
    }
    for place in ("host", "guest-rt-guest")
}


def test_the_entry_without_isolation_is_the_kernels_own() -> None:
    plain = (f"virt-rt-plain-virt-rt-host-{PLAN.release}", 4096)
    assert stackproof.plain_entry(LABHOST) == plain


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (LABHOST["entries"][:1], "without isolation: none"),
        (LABHOST["entries"][2:], "without isolation: none"),
        ([], "without isolation: none"),
        (LABHOST["entries"][1:2] * 2, "virt-rt-host.*, virt-rt-plain-"),
    ],
)
def test_without_one_such_entry_there_is_none(entries: list[dict[str, str]], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        stackproof.plain_entry(LABHOST | {"entries": entries})


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The step's input directory."""
    directory = tmp_path / "in"
    files = {
        "disk.qcow2": "disk",
        "labhost.json": json.dumps(LABHOST),
        "host/kernelrelease": f"{PLAN.release}\n",
        "artifacts/qemu-q35/image/rt-guest/disk.qcow2": "guest",
        "artifacts/qemu-q35/kernel/guest/bzImage": "kernel",
        "artifacts/qemu-q35/kernel/guest/kernelrelease": f"{PLAN.guest_release}\n",
        "artifacts/qemu-q35/qemu/bin/qemu-img": "#!/bin/sh\n",
        "artifacts/qemu-q35/qemu/share/qemu/OVMF_VARS_4M.fd": "variables",
        "launch/kvmqemu.sh": "the lab's",
        "measurement.json": json.dumps(ASKED),
        "tools/usr/lib/modules/6.12/updates/irqlat_edu.ko": "module",
        "tuning/root/usr/share/virt-rt/plan.json": "{}",
        "virt-rt-measure": "program",
    }
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (directory / "artifacts/qemu-q35/qemu/bin/qemu-img").chmod(0o755)
    for path in (ROOT / "recipes" / "lab").glob("virt-rt-stack*"):
        shutil.copy(path, directory)
    monkeypatch.setattr(stackproof, "IN", directory)
    for name in ("OUT", "WORK"):
        (tmp_path / name.lower()).mkdir()
        monkeypatch.setattr(stackproof, name, tmp_path / name.lower())
    return directory


@pytest.fixture
def lab(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tree of the lab's disk."""
    monkeypatch.setattr(stackproof, "make_disk", lambda tree, disk, mib: None)
    variables: dict[str, object] = {"GUEST": "rt-guest", "RT_VCPU": 1}
    stackproof.lab_disk(tmp_path / "disk", "qemu-q35", "rt-guest", variables, {"MASKED": "a b"}, ASKED)
    return tmp_path / "work/lab"


def test_the_labs_disk_has_what_host_and_guest_are_handed(lab: Path) -> None:
    assert (lab / "environment").read_text() == 'GUEST="rt-guest"\nRT_VCPU="1"\n'
    assert (lab / "state/part").read_text() == "first_boot\n"
    assert all((lab / script).stat().st_mode & 0o111 for script in stackproof.SCRIPTS)
    name, _, encoded = (lab / "credentials/agent").read_text().partition("=")
    assert name == "io.systemd.credential.binary:virt-rt.stack"
    assert base64.b64decode(encoded) == (ROOT / "recipes/lab/virt-rt-stack-tools.sh").read_bytes()
    for name, file in (("late", "virt-rt-stack-late-guest.sh"), ("agent", "virt-rt-stack-guest.sh")):
        assert (lab.parent / "tools" / name).read_bytes() == (ROOT / "recipes/lab" / file).read_bytes()
    assert (lab.parent / "tools/virt-rt-measure").read_text() == "program"
    assert json.loads((lab / "request.json").read_text()) == ASKED["host"]
    assert json.loads((lab.parent / "tools/request.json").read_text()) == ASKED["guest-rt-guest"]
    # systemd before 257 reads one page of what SMBIOS brings
    assert sum(path.stat().st_size for path in (lab / "credentials").iterdir()) < 4096
    for unit, uses in (("unit", "USES=1"), ("alone", "USES=0")):
        text = base64.b64decode((lab / "credentials" / unit).read_text().partition("=")[2]).decode()
        assert f'Environment={uses} "MASKED=a b"\n' in text


def test_what_the_lab_shows_instead_is_the_scripts_the_plan_and_the_settings(lab: Path) -> None:
    shown = {
        path.relative_to(lab / "instead").as_posix(): path.read_text()
        for path in (lab / "instead").rglob("*")
        if path.is_file()
    }
    settings_of_guest = shown.pop("etc/virt-rt/guests/rt-guest.conf")
    assert shown == {
        "opt/virt-rt/qemu-q35/launch/rt-guest/kvmqemu.sh": "the lab's",
        "usr/share/virt-rt/plan.json": "{}",
    }
    assert settings_of_guest == (lab / "guest.conf").read_text()
    assert 'SNAPSHOT="1"\n' in settings_of_guest


def test_no_variable_of_the_labs_is_one_of_the_launch_scripts() -> None:
    """Its environment is that of the scripts it starts: a CPU there is qemu's model."""
    named = set(
        re.findall(r'^        "([A-Z_]+)": ', (ROOT / "pipeline/stackproof.py").read_text(), re.MULTILINE)
    )
    meant = {"QEMU", "CONSOLE", "SNAPSHOT", "SHUTDOWN_SECONDS", "SSH_PORT", "QMP", "CMDLINE_EXTRA"}
    known = set()
    for template in (ROOT / "recipes/templates").glob("kvmqemu*.j2"):
        known |= set(re.findall(r"^([A-Z_]+)=\$\{", template.read_text(), re.MULTILINE))
    assert {"CPU", "EMULATOR_CPUS"} | meant <= known
    assert named & known == meant


@pytest.mark.parametrize("value", ['a"b', "a$b", "a\nb", "a\\b", "a`b"])
def test_a_value_that_shells_and_systemd_read_differently_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="NAME: no value"):
        stackproof.assignments({"NAME": value})


def test_files_are_shown_instead_or_it_is_an_error(tmp_path: Path) -> None:
    """The script mounts over files that are there, and refuses those that are not installed."""
    bin_directory, shown, target = tmp_path / "bin", tmp_path / "instead", tmp_path / "installed"
    bin_directory.mkdir()
    (bin_directory / "mount").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/mounted\n')
    (bin_directory / "mount").chmod(0o755)
    place = shown / str(target).lstrip("/")
    place.parent.mkdir(parents=True)
    place.write_text("x")
    command = ["sh", str(ROOT / "recipes/lab/virt-rt-stack-settle.sh"), str(shown)]
    environment = {"PATH": f"{bin_directory}:/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"not installed: {target}\n")
    assert not (tmp_path / "mounted").exists()
    target.write_text("y")
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "mounted").read_text() == f"--bind .{target} {target}\n"


def test_only_a_guests_qemu_gets_what_is_the_labs(tmp_path: Path) -> None:
    (tmp_path / "qemu/bin").mkdir(parents=True)
    stand_in = tmp_path / "qemu/bin/qemu-system-x86_64"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/agent").write_text("x")
    (tmp_path / "environment").write_text(f'BUILT="{tmp_path}"\nGUEST="rt-guest"\n')
    wrapper = tmp_path / "wrapper"
    text = (ROOT / "recipes/lab/virt-rt-stack-qemu.sh").read_text()
    wrapper.write_text(
        text.replace("/run/virt-rt-lab", str(tmp_path)).replace("/run/virt-rt-stack", str(tmp_path))
    )

    def got(*arguments: str) -> list[str]:
        done = subprocess.run(["sh", str(wrapper), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    assert got("-machine", "none", "-name", "other") == ["-machine", "none", "-name", "other"]
    started = got("-name", "rt-guest,debug-threads=on", "-append", "a b")
    assert started[:4] == ["-name", "rt-guest,debug-threads=on", "-append", "a b"]
    assert f"type=11,path={tmp_path}/credentials/agent" in started
    assert "virtio-blk-pci,drive=tools,serial=virt-rt-tools" in started
    assert f"pipe,id=go,path={tmp_path}/go" in started
    assert all((tmp_path / name).is_fifo() for name in ("go.in", "go.out"))
    # as it is at the next start
    assert got("-name", "rt-guest,debug-threads=on", "-append", "a b") == started


def test_a_disk_holds_a_directory(inputs: Path, tmp_path: Path) -> None:
    stackproof.make_disk(inputs / "tools", tmp_path / "disk", 8)
    shown = subprocess.run(
        ["debugfs", "-R", "cat /usr/lib/modules/6.12/updates/irqlat_edu.ko", str(tmp_path / "disk")],
        capture_output=True,
        check=True,
    ).stdout
    assert shown == b"module"


def test_the_boards_devices_are_where_the_proof_names_them() -> None:
    arguments = labboard.board(
        ["-smp", "4"], ["-host"], Path("/console"), {"virt-rt.stack": Path("/answers")}, [Path("/unit")]
    )
    devices = [value for option, value in itertools.pairwise(arguments) if option == "-device"]
    ports = [device.split("=")[1].split(",")[0] for device in devices if device.startswith("pcie-root-port")]
    # buses are numbered in the order of the ports, and the proof names addresses on them
    assert ports == ["port1", "port2"]
    assert "igb,bus=port1,romfile=" in devices
    assert "edu,bus=port2" in devices
    assert (stack.PHYSICAL, stack.FUNCTION) == ("0000:01:00.0", "0000:02:00.0")
    # the host is to be booted again by itself
    assert "-no-reboot" not in arguments


def test_seconds_are_recorded_by_phase() -> None:
    """Each phase ends with an answer that is given; one that never ended has no seconds."""
    assert set(stackproof.PHASES.values()) <= set(good())
    order = list(good())
    assert len(set(stackproof.PHASES.values())) == len(stackproof.PHASES)
    assert [*stackproof.PHASES.values()] == sorted(stackproof.PHASES.values(), key=order.index)
    assert stackproof.phases({"running": 20.0, "devices_before": 25.5, "audit_back": 90.0}, 100.0) == {
        "host boot": 20.0,
        "preflight": 5.5,
        "audits": 64.5,
        "power off": 10.0,
    }


# The whole driver, with a stand-in for qemu ----------------------------------------------------


def event(
    kind: str = "thread", name: str = "hog", verdict: str = "CPU 2 was taken", **changed: Any
) -> dict[str, Any]:
    """An event as `virt-rt-measure attribute` writes it, with its first culprit."""
    culprits = [{"kind": kind, "name": name}, {"kind": "kvm exit", "name": "msr"}]
    return {"place": "guest-rt-guest", "culprits": culprits, "verdict": verdict} | changed


def attribution(*events: Any) -> str:
    return json.dumps({"schema": 1, "events": list(events)})


HOG, INTERRUPT = attribution(event()), attribution(event("interrupt", "irqlat_edu"))
SENT_HOST = directory(
    "host",
    ("./dmesg", "Linux"),
    ("./measurement/request.json", "{}"),
    ("./late-hog/attribution.json", HOG),
    ("./late-interrupt/attribution.json", INTERRUPT),
)
SENT_GUEST = directory("guest-rt-guest", ("dmesg", "too"), ("measurement/request.json", "{}"))
#: In place of `virt-rt-measure`: fine when both records are there, and the expectations for them.
PROGRAM = """
import json, sys
from pathlib import Path
command, where, *options = sys.argv[1:]
asked = json.loads(Path(options[options.index("--expect") + 1]).read_text())
ok = command == "judge" and all((Path(where) / place / "request.json").is_file() for place in asked["places"])
finding = {"name": "places", "wanted": "all", "got": "all" if ok else "some", "ok": ok}
Path(options[options.index("--json") + 1]).write_text(json.dumps({
    "protocol_ok": ok, "evidence": "emulated", "latency_verdict": "none", "findings": [finding],
}))
sys.exit(0 if ok else 1)
"""


@pytest.fixture
def step(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], int]:
    """Run the step; its host answers what it is given."""
    monkeypatch.setenv("PLATFORM", "qemu-q35")
    monkeypatch.setenv("SABOTAGE", "")
    built = inputs / "artifacts/qemu-q35"
    (inputs / "virt-rt-measure").write_text(PROGRAM)
    known = {field: getattr(PLAN, field) for field in Expectations.__dataclass_fields__}
    expected = {
        key: value for key, value in known.items() if key not in ("release", "guest_release", "installed")
    }
    (inputs / "expected.json").write_text(json.dumps(expected))

    def run(answers: bytes) -> int:
        (tmp_path / "answered").write_bytes(answers)
        (tmp_path / "sent").write_bytes(SENT_HOST + SENT_GUEST)
        qemu = built / "qemu/bin/qemu-system-x86_64"
        work = tmp_path / "work"
        qemu.write_text(
            f"#!/bin/sh\ncp {tmp_path}/answered {work}/answers\ncp {tmp_path}/sent {work}/records\n"
        )
        qemu.chmod(0o755)
        return stackproof.main()

    return run


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


#: What the host tells of what `step` has installed, and the digest of what `step` sends for the guest.
PROVEN = {
    "installed": (
        0,
        f"{digest('kernel')}  kernel/guest/bzImage\n{digest('guest')}  image/rt-guest/disk.qcow2\n",
    ),
    "guest": (0, guest(sent=SENT_GUEST.split(b"\n")[0].decode().split()[-1])),
}
#: What a stack without its plan's parameters tells.
NO_ISOLATION = {
    "cmdline": (0, "root=LABEL=root\n"),
    "preflight": report(finding("isolcpus", "fail"), command="preflight"),
}


def test_a_proof_that_holds(step: Callable[[bytes], int], tmp_path: Path) -> None:
    assert step(sent(good() | PROVEN)) == 0
    verdict = json.loads((tmp_path / "out/stack.json").read_text())
    assert (verdict["ok"], verdict["evidence"]) == (True, "emulated")
    assert verdict["latency_verdict"] == "emulated: not evidence of latency"
    assert {each["ok"] for each in verdict["findings"]} == {True}
    assert verdict["sabotages"] == []
    assert set(verdict["seconds"]) == {*stackproof.PHASES, "power off"}
    assert (tmp_path / "out/records/host/dmesg").read_text() == "Linux"
    left = sorted(path.name for path in (tmp_path / "out/measurement").iterdir())
    assert left == ["attribution.json", "expectations.json", "guest-rt-guest", "host", "verdict.json"]
    assert not (tmp_path / "out/records/host/measurement").exists()
    asked = json.loads((tmp_path / "work/lab/request.json").read_text())
    assert asked["kernel_release"] == PLAN.release
    assert asked["plan_sha256"] == digest("{}")
    assert (
        json.loads((tmp_path / "work/tools/request.json").read_text())["kernel_release"] == PLAN.guest_release
    )
    assert list(verdict["booted_sha256"]) == sorted(verdict["booted_sha256"])


def test_a_proof_that_does_not_hold_says_what(
    step: Callable[[bytes], int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert step(sent(good() | PROVEN | {"cleanup": (1, "not undone: remove_vfs")})) == 1
    assert "cleanup: wanted status 0: everything undone; got status 1: not undone" in capfd.readouterr().err
    assert json.loads((tmp_path / "out/stack.json").read_text())["ok"] is False


def test_what_was_measured_and_who_made_it_late_count(
    step: Callable[[bytes], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "SENT_HOST", HOST)
    assert step(sent(good() | PROVEN)) == 1
    verdict = json.loads((tmp_path / "out/stack.json").read_text())
    red = [each["name"] for each in verdict["findings"] if not each["ok"]]
    assert red == ["measurement", "late by hog", "late by interrupt"]


@pytest.mark.parametrize("sabotage", ["", *stackgate.SABOTAGES])
def test_only_without_isolation_another_entry_is_booted(
    sabotage: str, step: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[str, int]] = []
    monkeypatch.setattr(labboard.Host, "choose", lambda disk, entry, offset: chosen.append((entry, offset)))
    monkeypatch.setenv("SABOTAGE", sabotage)
    without = sabotage == "isolation-removed"
    step(sent(good() | PROVEN | (NO_ISOLATION if without else {})))
    assert chosen == ([stackproof.plain_entry(LABHOST)] if without else [])


def test_the_host_is_the_one_on_which_apt_installed(
    step: Callable[[bytes], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk is laid over, and the board boots from that; there is a device of the host's own."""
    (tmp_path / "in/artifacts/qemu-q35/qemu/bin/qemu-img").write_text(
        f'#!/bin/sh\necho "$@" >{tmp_path}/made\n'
    )
    started: list[list[str]] = []
    run = labboard.run

    def kept(arguments: list[str], *rest: Any) -> labboard.Run:
        started.append(arguments)
        return run(arguments, *rest)

    monkeypatch.setattr(labboard, "run", kept)
    assert step(sent(good() | PROVEN)) == 0
    over = tmp_path / "work/host.qcow2"
    assert (tmp_path / "made").read_text().split()[-3:] == ["-b", str(tmp_path / "in/disk.qcow2"), str(over)]
    ((program, *arguments),) = started
    assert program == str(tmp_path / "in/artifacts/qemu-q35/qemu/bin/qemu-system-x86_64")
    assert any(f"file={over}" in argument for argument in arguments)
    # the last of three root ports, whose bus the address names
    assert arguments[-2:] == ["-device", "edu,bus=port3"]
    assert stackproof.SPINNING == "0000:03:00.0"
    assert not {"-kernel", "-append"} & set(arguments)


@pytest.mark.parametrize(
    "missing",
    ["disk.qcow2", "host/kernelrelease", "measurement.json", "virt-rt-measure", "expected.json", "tools"],
)
def test_without_an_input_nothing_is_run(
    missing: str,
    step: Callable[[bytes], int],
    inputs: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = inputs / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert step(sent(good() | PROVEN)) == 2
    assert missing in capfd.readouterr().err
    assert not (tmp_path / "out/stack.json").exists()


def test_a_host_that_never_answers_proves_nothing(step: Callable[[bytes], int], tmp_path: Path) -> None:
    assert step(b"") == 1
    verdict = json.loads((tmp_path / "out/stack.json").read_text())
    assert [each["name"] for each in verdict["findings"] if not each["ok"]] == ["answers"]


def test_a_step_that_is_called_wrongly(
    step: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PLATFORM")
    assert step(sent(good())) == 2
    assert "stack proof: KeyError: 'PLATFORM'" in capfd.readouterr().err


def test_a_sabotage_that_is_not_known_is_refused(
    step: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SABOTAGE", "isolation-remove")
    assert step(sent(good())) == 2
    assert "known: unit-unmasked, isolation-removed" in capfd.readouterr().err


def test_a_sabotaged_proof_says_so_and_gives_the_script_its_name(
    step: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SABOTAGE", "vcpu-unpinned unit-unmasked")
    assert step(sent(good() | PROVEN | {"audit": report(PROCESS, vcpu(3))})) == 1
    verdict = json.loads((tmp_path / "out/stack.json").read_text())
    assert verdict["sabotages"] == ["vcpu-unpinned", "unit-unmasked"]
    red = tuple(each["name"] for each in verdict["findings"] if not each["ok"])
    assert red == stackgate.SABOTAGES["vcpu-unpinned"]
    assert 'SABOTAGE="vcpu-unpinned unit-unmasked"\n' in (tmp_path / "work/lab/environment").read_text()


# The measurement, and who made the guest late ---------------------------------------------------


def test_requests_get_what_only_the_run_knows() -> None:
    made = stackmeasure.requests(ASKED, {"host": "6.12-h", "guest-rt-guest": "6.12-g"}, b"plan")
    assert made["host"]["stages"] == [
        {"name": "a", "argv": []},
        {"name": "b", "argv": ["/x/6.12-h/y", "--at=6.12-h", "z"]},
    ]
    assert made["guest-rt-guest"]["stages"][1]["argv"][0] == "/x/6.12-g/y"
    assert [each["kernel_release"] for each in made.values()] == ["6.12-h", "6.12-g"]
    assert {each["plan_sha256"] for each in made.values()} == {digest("plan")}
    assert ASKED["host"]["stages"][1]["argv"][0] == "/x/{release}/y", "changed what was given"
    with pytest.raises(KeyError, match="guest-rt-guest"):
        stackmeasure.requests(ASKED, {"host": "6.12-h"}, b"plan")


def test_what_a_place_did_not_send_is_missing_in_the_measurement(tmp_path: Path) -> None:
    records, measurement = tmp_path / "records", tmp_path / "measurement"
    (records / "host/measurement/001-load").mkdir(parents=True)
    (records / "host/measurement/001-load/run.json").write_text("{}")
    (records / "guest-rt-guest").mkdir()
    stackmeasure.gather(records, measurement, ASKED, {"b": 1, "a": 2})
    assert [path.relative_to(measurement).as_posix() for path in sorted(measurement.rglob("*.json"))] == [
        "expectations.json",
        "host/001-load/run.json",
    ]
    assert json.loads((measurement / "expectations.json").read_text()) == {"a": 2, "b": 1}
    assert not (records / "host/measurement").exists()
    stackmeasure.gather(tmp_path / "nothing", tmp_path / "empty", ASKED, {})
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["expectations.json"]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The program that ships."""
    (tmp_path / "virt-rt-measure").write_bytes(MEASURE.bundle(ROOT))
    return tmp_path / "virt-rt-measure"


def measurement_of(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    hardware: bool = False,
    change: Callable[[Any], object] = id,
) -> Path:
    """A measurement made an hour ago, and what is expected of it: as `gather` leaves it."""
    now = int(time.time())
    monkeypatch.setattr(measured, "BEGAN_NS", (now - 3600) * 10**9)
    made = measured.Measured(hardware)
    change(made)
    made.write(directory)
    asked = {place: asdict(each) for place, each in measured.requests().items()}
    wanted = stackmeasure.expectations("p", asked, now - 4000)
    wanted["load_shares"] = {"hackbench": 0.01, "stress": 0.01}
    stackmeasure.gather(directory / "none", directory, asked, wanted)
    return directory


def test_a_measurement_that_was_made_as_asked(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = measurement_of(tmp_path / "m", monkeypatch)
    found = stackmeasure.judge(directory, program)
    assert found.ok, found.got
    assert found.name == "measurement"
    assert re.fullmatch(r"[1-9][0-9]+ findings, all fine: emulated: not evidence of latency", found.got)
    # it can be judged again where it is left, beside what was found
    stackmeasure.attribute(tmp_path, directory)
    assert stackmeasure.judge(directory, program) == found


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda made: made.runs["host"]["001-cyclictest"].update(status=1), "status: wanted 0"),
        (lambda made: made.left_out.add(measured.GUEST), "places: wanted"),
        (lambda made: made.left_out.add("host"), "places: wanted"),
        (lambda made: made.runs[measured.GUEST].pop("001-cyclictest"), "runs: wanted"),
        (lambda made: made.machines["host"].update(plan_sha256="b" * 64), "wanted aaaa"),
        (
            lambda made: made.runs["host"]["003-load"]["ended"].update(realtime=measured.BEGAN_NS * 2),
            "wanted",
        ),
    ],
)
def test_a_measurement_that_was_not(
    change: Callable[[Any], object], told: str, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stackmeasure.judge(measurement_of(tmp_path / "m", monkeypatch, change=change), program)
    assert not found.ok
    assert told in found.got


def test_a_measurement_that_takes_itself_for_hardware(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here everything is emulated: such a record cannot be right."""
    found = stackmeasure.judge(measurement_of(tmp_path / "m", monkeypatch, hardware=True), program)
    assert not found.ok


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("", "no verdict (.*verdict.json"),
        ("print('it is odd'); sys.exit(2)", "no verdict (.*it is odd"),
        ("put('')", "no verdict"),
        ("put('[]')", "no verdict"),
        ("put(json.dumps(verdict)[:-9])", "no verdict"),
        ("put(json.dumps(verdict | {'findings': None}))", "no verdict"),
        ("put(json.dumps(verdict | {'findings': ['fine']}))", "no verdict"),
        ("verdict.pop('evidence'); put(json.dumps(verdict))", "no verdict (.*evidence"),
        ("put(json.dumps(verdict | {'findings': []}))", "0 findings"),
        ("put(json.dumps(verdict | {'evidence': 'hardware'}))", "1 findings"),
        ("put(json.dumps(verdict | {'protocol_ok': False}))", "1 findings"),
        ("put(json.dumps(verdict | {'protocol_ok': 'yes'}))", "1 findings"),
        ("put(json.dumps(verdict)); sys.exit(1)", "1 findings"),
        ("verdict['findings'][0]['ok'] = False; put(json.dumps(verdict))", "age: wanted new, got old"),
    ],
)
def test_a_verdict_that_proves_nothing(code: str, told: str, tmp_path: Path) -> None:
    found = judged_by(code, tmp_path)
    assert not found.ok
    assert re.search(told.replace("(", r"\("), found.got)


def test_a_verdict_without_any_of_that_passes(tmp_path: Path) -> None:
    found = judged_by("put(json.dumps(verdict))", tmp_path)
    assert (found.got, found.ok) == ("1 findings, all fine: none", True)


def judged_by(code: str, tmp_path: Path) -> Finding:
    """What is found by a program that puts a verdict that way."""
    program = tmp_path / "program"
    program.write_text(
        "import json, sys\n"
        "verdict = {'protocol_ok': True, 'evidence': 'emulated', 'latency_verdict': 'none',\n"
        "           'findings': [{'name': 'age', 'wanted': 'new', 'got': 'old', 'ok': True}]}\n"
        f"def put(text): open({str(tmp_path / 'verdict.json')!r}, 'w').write(text)\n"
        f"{code}\n"
    )
    return stackmeasure.judge(tmp_path, program)


def late(directory: Path, hog: str | None = HOG, interrupt: str | None = INTERRUPT) -> list[Finding]:
    """What is found when the host sent that."""
    for kind, content in (("hog", hog), ("interrupt", interrupt)):
        (directory / f"late-{kind}").mkdir(parents=True)
        if content is not None:
            (directory / f"late-{kind}/attribution.json").write_text(content)
    return stackmeasure.attribute(directory, directory / "measurement")


def test_who_made_the_guest_late_is_named(tmp_path: Path) -> None:
    assert late(tmp_path) == [
        Finding("late by hog", "by thread hog first", "CPU 2 was taken", True),
        Finding("late by interrupt", "by interrupt irqlat_edu first", "CPU 2 was taken", True),
    ]
    left = json.loads((tmp_path / "measurement/attribution.json").read_text())
    assert left == {"schema": 1, "events": [event(), event("interrupt", "irqlat_edu")]}


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (None, "FileNotFoundError"),
        ("", "JSONDecodeError"),
        (HOG[:-5], "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'events'"),
        (attribution(), "ValueError: not enough values"),
        (attribution(event(), event()), "ValueError: too many values"),
        (attribution("late"), "TypeError"),
        (attribution(event(culprits=[], verdict="not told: no event")), "not told: no event"),
        (attribution(event(culprits=None)), "CPU 2 was taken"),
        (attribution(event(culprits={"kind": "thread", "name": "hog"})), "KeyError"),
        (attribution({"culprits": []}), "KeyError: 'verdict'"),
        (attribution(event("thread", "hogs", "by hogs")), "by hogs"),
        (attribution(event("interrupt", "hog")), "CPU 2 was taken"),
        (attribution(event("kvm exit", "msr")), "CPU 2 was taken"),
        (attribution(event(culprits=[{"name": "hog"}])), "KeyError: 'kind'"),
        (
            attribution(
                event(culprits=[{"kind": "kvm exit", "name": "msr"}, {"kind": "thread", "name": "hog"}])
            ),
            "CPU 2 was taken",
        ),
    ],
)
def test_another_culprit_or_none_is_red(content: str | None, got: str, tmp_path: Path) -> None:
    hog, interrupt = late(tmp_path, hog=content)
    assert not hog.ok
    assert hog.got.startswith(got)
    assert interrupt.ok, "one does not spoil the other"
    left = json.loads((tmp_path / "measurement/attribution.json").read_text())
    assert left["events"][-1] == event("interrupt", "irqlat_edu")


def test_the_culprit_of_one_is_not_that_of_the_other(tmp_path: Path) -> None:
    assert [each.ok for each in late(tmp_path, hog=INTERRUPT, interrupt=HOG)] == [False, False]


# The action ------------------------------------------------------------------------------------


def actions(loaded: recipes.Recipes, plan: HostPlan | None = None, sabotage: str = "") -> tuple[Action, ...]:
    """What the proof of qemu-q35 is made of."""
    name = "qemu-q35"
    return stack.stack_proof(
        ROOT,
        name,
        loaded.platforms[name],
        loaded.guests_of(name),
        plan or loaded.plans[name],
        settings.load(ROOT),
        sabotage,
    )


@pytest.fixture(scope="module")
def loaded() -> recipes.Recipes:
    return recipes.load(ROOT)


def test_the_guest_that_ships_is_given_the_boards_devices(loaded: recipes.Recipes) -> None:
    scripts, tuned, proof = actions(loaded)
    assert scripts.parameters["devices"] == ["0000:01:00.0/0", "0000:02:00.0"]
    assert json.loads(tuned.files["plan.json"].content)["devices"] == {
        "rt-guest": [{"physical": "0000:01:00.0", "number": 0}, {"address": "0000:02:00.0"}]
    }
    assert [action.place for action in (scripts, tuned, proof)] == [None, None, "qemu-q35/stack"]
    used = {upstream.action for upstream in proof.inputs.values()}
    assert used == {
        "labhost:qemu-q35", "kernel:qemu-q35:host", "kernel:qemu-q35:guest", "qemu:qemu-q35", "image:rt-guest",
        "driver:qemu-q35:irqlat-guest", "tool:virt-rt-measure", scripts.name, tuned.name,
    }  # fmt: skip
    assert not proof.capabilities


def test_the_expectations_are_the_plans(loaded: recipes.Recipes) -> None:
    proof = actions(loaded)[-1]
    expected = json.loads(proof.files["expected.json"].content)
    plan = loaded.plans["qemu-q35"]
    assert expected["cpu"] == plan.guests["rt-guest"].pins[expected["vcpu"]]
    assert expected["other_cpu"] in plan.isolated
    assert expected["other_cpu"] not in plan.guests["rt-guest"].pins
    assert "isolcpus=managed_irq,domain,1-3" in expected["parameters"]
    assert Expectations(**expected, release="a", guest_release="b", installed={}).machine[1].startswith("4,")


def test_what_is_asked_of_host_and_guest_can_be_measured_and_judged(
    loaded: recipes.Recipes, tmp_path: Path
) -> None:
    asked = json.loads(actions(loaded)[-1].files["measurement.json"].content)
    plan = loaded.plans["qemu-q35"]
    placement = plan.guests["rt-guest"]
    assert list(asked) == ["host", "guest-rt-guest"]
    releases = {"host": PLAN.release, "guest-rt-guest": PLAN.guest_release}
    made = stackmeasure.requests(asked, releases, b"{}")
    for place, content in made.items():
        (tmp_path / place).write_text(json.dumps(content))
        found = request.load(tmp_path / place)
        assert (found.place, found.platform) == (place, "qemu-q35")
    host, other = (request.load(tmp_path / place) for place in made)
    assert (host.isolated, host.housekeeping) == ([*plan.isolated], [*plan.housekeeping])
    assert (other.isolated, other.housekeeping) == (
        [*placement.split.isolated],
        [*placement.split.housekeeping],
    )
    tools = {stage.tool: stage for stage in (*host.stages, *other.stages)}
    assert [stage.tool for stage in host.stages] == ["cyclictest", "load"]
    assert [stage.tool for stage in other.stages] == ["cyclictest"]
    # every CPU that is kept free is measured, under load, for as long as the verdict wants
    assert all(stage.required for stage in tools.values())
    for each in (host, other):
        judged = [stage for stage in each.stages if stage.tool == "cyclictest"]
        assert judged and all(stage.loads and stage.duration_s >= stackmeasure.MINIMUM_S for stage in judged)
        assert judged[0].cpus == each.isolated
    # the host goes on with its load while the guest measures
    assert tools["load"].duration_s >= 2 * sum(stage.duration_s for stage in other.stages)
    wanted = expectations.from_json(stackmeasure.expectations("qemu-q35", made, 1))
    assert list(wanted.places) == list(made)


def test_a_sabotage_is_part_of_the_action(loaded: recipes.Recipes) -> None:
    assert actions(loaded)[-1].environment == {"PLATFORM": "qemu-q35", "SABOTAGE": ""}
    assert actions(loaded, sabotage="vcpu-unpinned")[-1].environment["SABOTAGE"] == "vcpu-unpinned"


def test_without_a_spare_cpu_a_vcpu_is_moved_to_housekeeping(loaded: recipes.Recipes) -> None:
    plan = loaded.plans["qemu-q35"]
    full = replace(plan, isolated=plan.guests["rt-guest"].pins)
    assert json.loads(actions(loaded, full)[-1].files["expected.json"].content)["other_cpu"] == 0


# The proof -------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.slow
def test_the_stack_of_qemu_q35_is_proven() -> None:
    """With what the store has; kernels and qemu are not built for a test."""
    name, project = "stack:qemu-q35", Project(ROOT)
    try:
        states = project.plan([name])
        cheap = {"launch", "tuning", "driver", "stack-proof"}
        missing = [
            each
            for each, state in states.items()
            if state is State.BUILD and project.graph[each].kind not in cheap
        ]
    finally:
        project.store.close()
    if missing:
        pytest.skip(f"not built yet, and not for a test: {', '.join(missing)}; `doit {name}` builds it")
    done = subprocess.run(
        [sys.executable, "-m", "doit", name], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads((ROOT / "artifacts/qemu-q35/stack/stack.json").read_text())
    got = {each["name"]: each["got"] for each in verdict["findings"] if each["ok"]}
    assert got["guest hypervisor"] == "kvm"
    assert "wanted fifo 1 on CPU 2, got fifo 1 on CPU 3" in got["audit after the move"]
    assert len(got) == len(verdict["findings"])
