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

from pipeline import recipes, settings, stack, stackgate, stackproof
from pipeline.action import Action
from pipeline.cpuplan import HostPlan
from pipeline.gate import Answer, Finding, MalformedError
from pipeline.plan import State
from pipeline.project import Project
from pipeline.stackgate import Expectations, judge, record

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
BUSY = "kvmqemu.sh: guest rt-guest is running: started by process 471\n"


def sent(told: Told) -> bytes:
    """The bytes that come over a port."""
    lines = [
        f"{name} {status} {base64.b64encode(text.encode()).decode()}\n"
        for name, (status, text) in told.items()
    ]
    body = "".join(lines).encode()
    return body + f"end {hashlib.sha256(body).hexdigest()}\n".encode()


def guest(**changed: str | None) -> str:
    """What the guest told its host."""
    told = {
        "version": RT,
        "release": "6.12.107-rt-virt-guest\n",
        "cmdline": "root=PARTLABEL=virt-rt-root quiet\n",
        "hypervisor": "kvm\n",
        "pci": "0x8086:0x29c0\n0x1af4:0x1001\n0x8086:0x10ca\n0x1234:0x11e8\n",
        "isolated": "1\n",
    } | changed
    return sent({name: (0, text) for name, text in told.items() if text is not None}).decode()


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
        "preflight": report(finding("kernel", "ok"), NO_TURBO, command="preflight"),
        "devices_before": (0, IDLE),
        "booted": (0, ""),
        "guest": (0, guest()),
        "devices_running": (0, BOUND),
        "audit": green,
        "move": (0, "pid 542's current affinity list: 2\npid 542's new affinity list: 3\n"),
        "audit_moved": report(PROCESS, vcpu(3)),
        "move_back": (0, "pid 542's current affinity list: 3\npid 542's new affinity list: 2\n"),
        "audit_back": green,
        "ended": (0, ""),
        "status": (0, ""),
        "messages": (0, ""),
        "qemu_after": (0, ""),
        "devices_after": (0, IDLE),
        "again": (0, ""),
        "devices_again": (0, BOUND),
        "cleanup_running": (2, BUSY),
        "kill_qemu": (0, ""),
        "qemu_killed": (0, ""),
        "devices_killed": (0, BOUND),
        "cleanup": (0, ""),
        "devices_cleaned": (0, IDLE),
        "cleanup_again": (0, ""),
        "devices_cleaned_again": (0, IDLE),
    }


def failed(raw: bytes, plan: Expectations = PLAN) -> list[str]:
    """Names of the findings that are not fine."""
    return [each.name for each in judge(raw, plan) if not each.ok]


# The verdict -----------------------------------------------------------------------------------


def test_a_host_and_a_guest_that_keep_the_plan_pass() -> None:
    findings = judge(sent(good()), PLAN)
    assert [each for each in findings if not each.ok] == []
    assert Finding("preflight", "nothing red", "1 of 2 findings fine; warned of: turbo", True) in findings


def test_what_is_judged_is_what_the_host_tells() -> None:
    """An answer of the script that nobody judges, or a judged one that it does not give, is a mistake here."""
    told = re.findall(r"^answer (\w+) ", HOST_SCRIPT.read_text(), re.MULTILINE)
    assert told == list(good())
    agent = (ROOT / "recipes/lab/virt-rt-stack-guest.sh").read_text()
    assert re.findall(r"^answer (\w+) ", agent, re.MULTILINE) == [
        "version", "release", "cmdline", "hypervisor", "pci", "isolated",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in good() if name != "messages"])
@pytest.mark.parametrize("answer", [None, (0, "?"), (77, ""), (1, "?")])
def test_a_missing_or_odd_answer_fails(name: str, answer: tuple[int, str] | None) -> None:
    """But for answers of which only the text matters, or only the status."""
    told = good()
    del told[name]
    if answer is not None:
        told[name] = answer
        judged_by_status = {
            "booted",
            "move",
            "move_back",
            "ended",
            "status",
            "qemu_after",
            "again",
            "kill_qemu",
        }
        judged_by_status |= {"qemu_killed", "cleanup", "cleanup_again"}
        if (name in judged_by_status and answer[0] == 0) or (name == "failed" and not answer[1]):
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
        ("again", (1, ""), "started again"),
        ("devices_again", (0, IDLE), "devices passed again"),
        ("cleanup_running", (0, ""), "cleanup while it runs"),
        ("kill_qemu", (1, ""), "qemu killed"),
        ("devices_killed", (0, IDLE), "devices after the kill"),
        ("cleanup", (1, "not undone: remove_vfs 0000:01:00.0"), "cleanup"),
        ("devices_cleaned", (0, BOUND), "devices after cleanup"),
        ("cleanup_again", (2, "nothing"), "second cleanup"),
        ("devices_cleaned_again", (0, BOUND), "devices after second cleanup"),
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


GUEST = ["guest version", "guest release", "guest hypervisor", "guest isolated", "guest devices"]


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


# The host --------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The step's input directory, with a userland of two files and a tuning of three."""
    directory = tmp_path / "in"
    files = {
        "host/modules/lib/modules/6.12/kvm.ko": "module",
        "artifacts/qemu-q35/launch/rt-guest/kvmqemu.sh": "script",
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
    return directory


def test_the_host_is_its_userland_and_what_ships(inputs: Path, tmp_path: Path) -> None:
    target = tmp_path / "host.tar"
    stackproof.lay_out(target, "qemu-q35", {"GUEST": "rt-guest", "VCPU": 1})
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
    assert f"{wants}/virt-rt-stack.service" in members
    assert members["usr/libexec/virt-rt-stack/host"].mode == 0o755
    assert read["etc/virt-rt-stack.env"] == b"GUEST=rt-guest\nVCPU=1\n"
    assert all((member.uid, member.gid) == (0, 0) for member in members.values())
    name, _, encoded = read["usr/libexec/virt-rt-stack/guest"].decode().partition("=")
    assert name == "io.systemd.credential.binary:virt-rt.stack"
    assert base64.b64decode(encoded) == (ROOT / "recipes/lab/virt-rt-stack-guest.sh").read_bytes()


def test_two_inputs_may_not_bring_the_same_file(inputs: Path, tmp_path: Path) -> None:
    (inputs / "tuning/root/etc/fstab").write_text("other")
    with pytest.raises(ValueError, match="/etc/fstab is there twice"):
        stackproof.lay_out(tmp_path / "host.tar", "qemu-q35", {})


def test_a_disk_holds_the_tar(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = subprocess.run(["mke2fs", "-V"], capture_output=True, text=True, check=True).stderr
    found = re.search(r"mke2fs (\d+)\.(\d+)\.(\d+)", version)
    if not found or tuple(map(int, found.groups())) < (1, 47, 1):
        pytest.skip("mke2fs here cannot read a tar (before 1.47.1); the lab's builder has one that can")
    monkeypatch.setattr(stackproof, "DISK_MIB", 16)
    stackproof.lay_out(tmp_path / "host.tar", "qemu-q35", {})
    stackproof.make_disk(tmp_path / "host.tar", tmp_path / "disk")
    shown = subprocess.run(
        ["debugfs", "-R", "cat /etc/hostname", str(tmp_path / "disk")], capture_output=True, check=True
    ).stdout
    assert shown == b"qemu-q35-lab\n"


def test_the_board_is_a_host_for_kvm_with_two_devices() -> None:
    arguments = stackproof.board(4, 4096, Path("/disk"), Path("/answers"))
    assert arguments[arguments.index("-smp") + 1] == "4,sockets=1,cores=4,threads=1"
    assert arguments[arguments.index("-m") + 1] == "4096M"
    assert "+invtsc" in arguments[arguments.index("-cpu") + 1]
    devices = [value for option, value in itertools.pairwise(arguments) if option == "-device"]
    ports = [device.split("=")[1].split(",")[0] for device in devices if device.startswith("pcie-root-port")]
    # buses are numbered in the order of the ports, and the proof names addresses on them
    assert ports == ["port1", "port2"]
    assert "igb,bus=port1,romfile=" in devices
    assert "edu,bus=port2" in devices
    assert (stack.PHYSICAL, stack.FUNCTION) == ("0000:01:00.0", "0000:02:00.0")


def test_the_host_boots_with_the_plans_command_line() -> None:
    line = stackproof.command_line(["isolcpus=1-3", "nohz=on"]).split()
    assert line[-2:] == ["isolcpus=1-3", "nohz=on"]
    assert "root=/dev/vda" in line


@pytest.mark.parametrize(
    ("script", "limit", "ended"),
    [
        ("exit 0", 10, ""),
        ("exit 3", 10, "qemu ended with status 3"),
        ("kill -9 $$", 10, "qemu was killed by signal 9"),
        ("sleep 9", 0.5, "not finished after 0.5 s"),
    ],
)
def test_how_the_host_ended_is_told(
    script: str, limit: float, ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(stackproof, "WORK", tmp_path)
    said = f"echo 'answer 0 YQ==' >>{tmp_path}/answers; echo \"{stackproof.NOISE}: x\" >&2; echo odd >&2; {script}"
    run = stackproof.boot(["sh", "-c", said], tmp_path / "answers", limit)
    assert (run.answers, run.ended) == (b"answer 0 YQ==\n", ended)
    assert capfd.readouterr().err == "odd\n"


# The whole driver, with a stand-in for qemu ----------------------------------------------------


@pytest.fixture
def step(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], int]:
    """Run the step; its host answers what it is given."""
    for name in ("OUT", "WORK"):
        (tmp_path / name.lower()).mkdir()
        monkeypatch.setattr(stackproof, name, tmp_path / name.lower())
    monkeypatch.setattr(stackproof, "make_disk", lambda tar, disk: None)
    monkeypatch.setenv("PLATFORM", "qemu-q35")
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
        qemu = built / "qemu/bin/qemu-system-x86_64"
        qemu.write_text(f"#!/bin/sh\ncp {tmp_path}/answered {tmp_path}/work/answers\n")
        qemu.chmod(0o755)
        return stackproof.main()

    return run


def test_a_proof_that_holds(step: Callable[[bytes], int], tmp_path: Path) -> None:
    assert step(sent(good())) == 0
    verdict = json.loads((tmp_path / "out/stack.json").read_text())
    assert (verdict["ok"], verdict["evidence"]) == (True, "emulated")
    assert verdict["latency_verdict"] == "emulated: not evidence of latency"
    assert {each["ok"] for each in verdict["findings"]} == {True}
    assert list(verdict["booted_sha256"]) == sorted(verdict["booted_sha256"])


def test_a_proof_that_does_not_hold_says_what(
    step: Callable[[bytes], int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert step(sent(good() | {"cleanup": (1, "not undone: remove_vfs")})) == 1
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


# The action ------------------------------------------------------------------------------------


def actions(loaded: recipes.Recipes, plan: HostPlan | None = None) -> tuple[Action, ...]:
    """What the proof of qemu-q35 is made of."""
    name = "qemu-q35"
    return stack.stack_proof(
        ROOT,
        name,
        loaded.platforms[name],
        loaded.guests_of(name),
        plan or loaded.plans[name],
        settings.load(ROOT),
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
        "image:rt-guest", scripts.name, tuned.name,
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
        cheap = {"launch", "tuning", "stack-proof"}
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
