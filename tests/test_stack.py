"""The stack proof: its verdict fails closed, its host is laid out as promised, and it runs where it can."""

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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import labboard, recipes, settings, stack, stackgate, stackhost, stackproof, stackrecords
from pipeline.action import Action
from pipeline.cpuplan import HostPlan
from pipeline.gate import Answer, Finding, MalformedError
from pipeline.plan import State
from pipeline.project import Project
from pipeline.stackgate import Expectations, judge, record
from pipeline.stackrecords import Received

ROOT = Path(__file__).resolve().parent.parent
HOST_SCRIPT = ROOT / "recipes" / "lab" / "virt-rt-stack-host.sh"

PLAN = Expectations(
    guest="rt-guest",
    vcpu=1,
    cpu=2,
    other_cpu=3,
    cpus=4,
    memory_mib=4096,
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
)

Told = dict[str, tuple[int, str]]

# What an emulated host and its guest said ------------------------------------------------------

RT = "#1 SMP PREEMPT_RT Tue Jan  1 00:00:00 UTC 1980\n"
IDLE = """\
0000:01:00.0 0x8086:0x10c9 driver=igb override=(null) numvfs=0
0000:02:00.0 0x1234:0x11e8 driver=none override=(null)
"""
BOUND = """\
0000:01:00.0 0x8086:0x10c9 driver=igb override=(null) numvfs=1
0000:02:00.0 0x1234:0x11e8 driver=vfio-pci override=vfio-pci
0000:01:10.0 0x8086:0x10ca driver=vfio-pci override=vfio-pci
"""
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
        "finished": (0, ""),
        "guest": (0, guest()),
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
        ("preflight", report(finding("KVM", "fail"), command="preflight"), "preflight"),
        ("preflight", report(finding("KVM", "unknown"), command="preflight"), "preflight"),
        ("devices_before", (0, BOUND), "devices before"),
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
            (0, IDLE.replace("none override=(null)", "none override=vfio-pci")),
            "devices after",
        ),
        ("devices_after", (0, IDLE.replace("driver=igb", "driver=none")), "devices after"),
        ("devices_after", (0, IDLE_LINES[0]), "devices after"),
        ("listens", (1, ""), "VF listens"),
        ("traffic", (1, "20 of 20 came back"), "VF traffic"),
        ("traffic", (0, "19 of 20 came back"), "VF traffic"),
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
    *("device measured", "device interrupts", "device interrupts counted", "records"),
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
        (guest(sent="ab13"), ["records"]),
        (guest(sent=None), ["records"]),
    ],
)
def test_a_guest_that_is_not_what_was_promised(text: str, findings: list[str]) -> None:
    assert failed(sent(good() | {"guest": (0, text)})) == findings


@pytest.mark.parametrize("size", [0, 1, 40, -1, -2, -66])
def test_answers_cut_short_anywhere_are_no_answers(size: int) -> None:
    assert failed(sent(good())[:size]) == ["answers"]
    assert record(sent(good())[:size]) == {}


def test_a_plan_without_parameters_never_passes() -> None:
    assert failed(sent(good()), replace(PLAN, parameters=[])) == ["host command line"]


def test_everything_told_is_kept_beside_the_verdict() -> None:
    kept = record(sent(good()))
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


def test_each_sabotage_names_findings_that_there_are() -> None:
    names = [each.name for each in judge(sent(good()), PLAN, RECEIVED)]
    assert len(names) == len(set(names))
    assert all(reds and set(reds) <= set(names) for reds in stackgate.SABOTAGES.values())
    scripts = HOST_SCRIPT.read_text() + (ROOT / "recipes/lab/virt-rt-stack-guest.sh").read_text()
    scripts += (ROOT / "pipeline/stackproof.py").read_text()
    assert [each for each in stackgate.SABOTAGES if each not in scripts] == []


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


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The step's input directory, with a userland of two files and a tuning of three."""
    directory = tmp_path / "in"
    files = {
        "host/modules/lib/modules/6.12/kvm.ko": "module",
        "artifacts/qemu-q35/launch/rt-guest/kvmqemu.sh": "script",
        "launch/kvmqemu.sh": "the lab's",
        "service/etc/virt-rt/guests/rt-guest.conf": "# SNAPSHOT=1",
        "tools/usr/lib/modules/6.12/updates/irqlat_edu.ko": "module",
        "tuning/root/usr/share/virt-rt/plan.json": "{}",
        "tuning/root/etc/sysctl.d/90-virt-rt.conf": "a = 1",
        "tuning/root/usr/lib/systemd/system/virt-rt-settings.service": "[Install]\nWantedBy=multi-user.target\n",
    }
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (directory / "artifacts/qemu-q35/launch/rt-guest/kvmqemu.sh").chmod(0o755)
    masked = directory / "tuning/root/etc/systemd/system/irqbalance.service"
    masked.parent.mkdir(parents=True)
    masked.symlink_to("/dev/null")
    for path in (ROOT / "recipes" / "lab").glob("virt-rt-stack*"):
        shutil.copy(path, directory)
    with tarfile.open(directory / "rootfs.tar", "w") as tar:
        for name in (".", "./etc", "./usr", "./usr/lib"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        entry = tarfile.TarInfo("./etc/fstab")
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"# x"))
    monkeypatch.setattr(stackproof, "IN", directory)
    for name in ("OUT", "WORK"):
        (tmp_path / name.lower()).mkdir()
        monkeypatch.setattr(stackproof, name, tmp_path / name.lower())
    return directory


def test_the_host_is_its_userland_and_what_ships(inputs: Path, tmp_path: Path) -> None:
    target = tmp_path / "host.tar"
    stackhost.lay_out(inputs, target, "qemu-q35")
    with tarfile.open(target) as tar:
        entries = tar.getmembers()
        members = {member.name.removeprefix("./"): member for member in entries}
        read = {
            name: (tar.extractfile(m) or io.BytesIO()).read() for name, m in members.items() if m.isfile()
        }
    assert len(members) == len(entries), "an entry is there twice"
    assert read["etc/fstab"] == b"# x"
    assert read["usr/lib/modules/6.12/kvm.ko"] == b"module"
    assert read["etc/sysctl.d/90-virt-rt.conf"] == b"a = 1"
    assert members["opt/virt-rt/qemu-q35/launch/rt-guest/kvmqemu.sh"].mode == 0o755
    assert members["etc/sysctl.d/90-virt-rt.conf"].mode == 0o644
    assert members["etc/systemd/system/irqbalance.service"].linkname == "/dev/null"
    wants = "etc/systemd/system/multi-user.target.wants"
    assert members[f"{wants}/virt-rt-settings.service"].linkname.endswith("/virt-rt-settings.service")
    assert all((member.uid, member.gid) == (0, 0) for member in members.values())
    assert read["etc/virt-rt/guests/rt-guest.conf"] == b"# SNAPSHOT=1"
    # what is the lab's is on a disk of its own
    assert [name for name in members if "virt-rt-stack" in name or name.startswith("run/")] == []


def test_two_inputs_may_not_bring_the_same_file(inputs: Path, tmp_path: Path) -> None:
    (inputs / "tuning/root/etc/fstab").write_text("other")
    with pytest.raises(ValueError, match="/etc/fstab is there twice"):
        stackhost.lay_out(inputs, tmp_path / "host.tar", "qemu-q35")


@pytest.mark.parametrize("isolated", [True, False])
def test_a_host_without_isolation_keeps_the_other_parameters(
    isolated: bool, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stackhost, "make_disk", lambda tar, disk: None)
    asked = ["isolcpus=managed_irq,domain,1-3", "nohz_full=1-3", "nohz=on", "rcu_nocbs=1", "irqaffinity=0"]
    arguments = stackhost.host(inputs, tmp_path, "qemu-q35", asked, isolated)
    line = arguments[arguments.index("-append") + 1].split()
    assert [each for each in asked if each in line] == (asked if isolated else ["nohz=on"])


@pytest.fixture
def lab(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tree of the lab's disk."""
    monkeypatch.setattr(stackproof, "make_disk", lambda tree, disk, mib: None)
    variables: dict[str, object] = {"GUEST": "rt-guest", "RT_VCPU": 1}
    stackproof.lab_disk(tmp_path / "disk", "qemu-q35", "rt-guest", variables, {"MASKED": "a b"})
    return tmp_path / "work/lab"


def test_the_labs_disk_has_what_host_and_guest_are_handed(lab: Path) -> None:
    assert (lab / "environment").read_text() == 'GUEST="rt-guest"\nRT_VCPU="1"\n'
    assert (lab / "state/part").read_text() == "first_boot\n"
    assert all((lab / script).stat().st_mode & 0o111 for script in stackproof.SCRIPTS)
    name, _, encoded = (lab / "credentials/agent").read_text().partition("=")
    assert name == "io.systemd.credential.binary:virt-rt.stack"
    assert base64.b64decode(encoded) == (ROOT / "recipes/lab/virt-rt-stack-tools.sh").read_bytes()
    assert (lab.parent / "tools/agent").read_bytes() == (
        ROOT / "recipes/lab/virt-rt-stack-guest.sh"
    ).read_bytes()
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
    wrapper.write_text(text.replace("/run/virt-rt-lab", str(tmp_path)))

    def got(*arguments: str) -> list[str]:
        done = subprocess.run(["sh", str(wrapper), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    assert got("-machine", "none", "-name", "other") == ["-machine", "none", "-name", "other"]
    started = got("-name", "rt-guest,debug-threads=on", "-append", "a b")
    assert started[:4] == ["-name", "rt-guest,debug-threads=on", "-append", "a b"]
    assert f"type=11,path={tmp_path}/credentials/agent" in started
    assert "virtio-blk-pci,drive=tools,serial=virt-rt-tools" in started


def test_a_disk_holds_the_tar(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = subprocess.run(["mke2fs", "-V"], capture_output=True, text=True, check=True).stderr
    found = re.search(r"mke2fs (\d+)\.(\d+)\.(\d+)", version)
    if not found or tuple(map(int, found.groups())) < (1, 47, 1):
        pytest.skip("mke2fs here cannot read a tar (before 1.47.1); the lab's builder has one that can")
    monkeypatch.setattr(stackhost, "DISK_MIB", 16)
    stackhost.lay_out(inputs, tmp_path / "host.tar", "qemu-q35")
    stackhost.make_disk(tmp_path / "host.tar", tmp_path / "disk")
    shown = subprocess.run(
        ["debugfs", "-R", "cat /etc/hostname", str(tmp_path / "disk")], capture_output=True, check=True
    ).stdout
    assert shown == b"qemu-q35-lab\n"


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
        4, 4096, ["-host"], Path("/console"), {"virt-rt.stack": Path("/answers")}, [Path("/unit")]
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


def test_the_host_boots_with_the_plans_command_line() -> None:
    line = stackhost.command_line(["isolcpus=1-3", "nohz=on"]).split()
    assert line[-2:] == ["isolcpus=1-3", "nohz=on"]
    assert "root=/dev/vda" in line


def test_seconds_are_recorded_by_phase() -> None:
    """Each phase ends with an answer that is given; one that never ended has no seconds."""
    assert set(stackproof.PHASES.values()) <= set(good())
    order = list(good())
    assert [*stackproof.PHASES.values()] == sorted(stackproof.PHASES.values(), key=order.index)
    assert stackproof.phases({"running": 20.0, "devices_before": 25.5, "audit_back": 90.0}, 100.0) == {
        "host boot": 20.0,
        "preflight": 5.5,
        "audits": 64.5,
        "power off": 10.0,
    }


# The whole driver, with a stand-in for qemu ----------------------------------------------------


@pytest.fixture
def step(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], int]:
    """Run the step; its host answers what it is given."""
    monkeypatch.setattr(stackhost, "make_disk", lambda tar, disk: None)
    monkeypatch.setenv("PLATFORM", "qemu-q35")
    monkeypatch.setenv("SABOTAGE", "")
    (inputs / "host/kernelrelease").write_text(PLAN.release + "\n")
    built = inputs / "artifacts/qemu-q35"
    for place, content in (("kernel/guest/kernelrelease", PLAN.guest_release + "\n"), ("qemu/bin/x", "")):
        (built / place).parent.mkdir(parents=True)
        (built / place).write_text(content)
    known = {field: getattr(PLAN, field) for field in Expectations.__dataclass_fields__}
    expected = {key: value for key, value in known.items() if key not in ("release", "guest_release")}
    (inputs / "expected.json").write_text(json.dumps(expected))

    def run(answers: bytes) -> int:
        (tmp_path / "answered").write_bytes(answers)
        (tmp_path / "sent").write_bytes(HOST + OTHER)
        qemu = built / "qemu/bin/qemu-system-x86_64"
        work = tmp_path / "work"
        qemu.write_text(
            f"#!/bin/sh\ncp {tmp_path}/answered {work}/answers\ncp {tmp_path}/sent {work}/records\n"
        )
        qemu.chmod(0o755)
        return stackproof.main()

    return run


#: The digest of what `step` sends for the guest.
PROVEN = {"guest": (0, guest(sent=OTHER.split(b"\n")[0].decode().split()[-1]))}


def test_a_proof_that_holds(step: Callable[[bytes], int], tmp_path: Path) -> None:
    assert step(sent(good() | PROVEN)) == 0
    verdict = json.loads((tmp_path / "out/stack.json").read_text())
    assert (verdict["ok"], verdict["evidence"]) == (True, "emulated")
    assert verdict["latency_verdict"] == "emulated: not evidence of latency"
    assert {each["ok"] for each in verdict["findings"]} == {True}
    assert verdict["sabotage"] == ""
    assert set(verdict["seconds"]) == {*stackproof.PHASES, "power off"}
    assert (tmp_path / "out/records/host/dmesg").read_text() == "Linux"
    assert list(verdict["booted_sha256"]) == sorted(verdict["booted_sha256"])


def test_a_proof_that_does_not_hold_says_what(
    step: Callable[[bytes], int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert step(sent(good() | PROVEN | {"cleanup": (1, "not undone: remove_vfs")})) == 1
    assert "cleanup: wanted status 0: everything undone; got status 1: not undone" in capfd.readouterr().err
    assert json.loads((tmp_path / "out/stack.json").read_text())["ok"] is False


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
    monkeypatch.setenv("SABOTAGE", "vcpu-unpinned")
    assert step(sent(good() | PROVEN | {"audit": report(PROCESS, vcpu(3))})) == 1
    verdict = json.loads((tmp_path / "out/stack.json").read_text())
    assert verdict["sabotage"] == "vcpu-unpinned"
    red = tuple(each["name"] for each in verdict["findings"] if not each["ok"])
    assert red == stackgate.SABOTAGES["vcpu-unpinned"]
    assert 'SABOTAGE="vcpu-unpinned"\n' in (tmp_path / "work/lab/environment").read_text()


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
        "builder:lab-host", "kernel:qemu-q35:host", "kernel:qemu-q35:guest", "qemu:qemu-q35",
        "image:rt-guest", "driver:qemu-q35:irqlat-guest", scripts.name, tuned.name,
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
    assert Expectations(**expected, release="a", guest_release="b").cpus == 4


def test_the_guests_service_is_the_packages(loaded: recipes.Recipes) -> None:
    proof = actions(loaded)[-1]
    unit = proof.files["service/usr/lib/systemd/system/virt-rt-guest-rt-guest.service"].content.decode()
    assert "ExecStart=/opt/virt-rt/qemu-q35/launch/rt-guest/kvmqemu.sh\n" in unit
    assert "{{" not in unit
    assert "service/etc/virt-rt/guests/rt-guest.conf" in proof.files


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
