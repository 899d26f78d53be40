"""Launch scripts at work: threads in their places, what a machine lacks, ends of all kinds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launching import (
    EMULATED,
    KVM,
    VARIABLES,
    Run,
    built,
    environment,
    host,
    is_running,
    launch,
    may_be_realtime,
    qemu_arguments,
    started,
    until,
    write_scripts,
)

__all__ = ["built", "host", "started"]

from tests.pretend_sysfs import PretendSysfs

# Threads ------------------------------------------------------------------------------------------


def threads(built: Path) -> dict[str, list[dict[str, Any]]]:
    """How qemu's threads were placed when the guest was released, by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (built / "qemu/bin/qemu-system-x86_64.threads").read_text().splitlines():
        thread = json.loads(line)
        found.setdefault(thread.pop("name"), []).append(thread)
    return found


@pytest.mark.skipif(os.cpu_count() == 1, reason="one CPU: nowhere else to pin to")
@pytest.mark.skipif(not may_be_realtime, reason="no right to real-time priorities")
def test_every_thread_is_in_its_place_before_the_guest_runs(built: Path, host: PretendSysfs) -> None:
    write_scripts(built, VARIABLES | {"priority": 3})
    full = KVM | {
        "HOST_ROOT": str(host.root),
        "PRIORITY": "",
        "MEM_LOCK": "on" if os.geteuid() == 0 else "off",
    }
    done = launch(built, "kvmqemu.sh", **full)
    assert (done.returncode, done.stderr) == (0, "")
    normal = {"cpus": [0], "policy": os.SCHED_OTHER, "priority": 0}
    placed = threads(built)
    assert placed.pop("vcpu0") == [normal]
    assert placed.pop("vcpu1") == [{"cpus": [1], "policy": os.SCHED_FIFO, "priority": 3}]
    assert placed.pop("iothread") == [normal]
    assert placed == {"other": [normal]}
    pages = "memory-backend-memfd,hugetlb=on,hugetlbsize=2M,share=on"
    where = "id=memory,size=1024M,prealloc=on,host-nodes=0,policy=bind"
    assert f"{pages},{where}" in qemu_arguments(built)


@pytest.mark.skipif(os.cpu_count() == 1, reason="one CPU: nowhere else to pin to")
@pytest.mark.skipif(not may_be_realtime, reason="no right to real-time priorities")
def test_a_thread_that_ends_while_threads_are_placed_is_no_failure(built: Path, host: PretendSysfs) -> None:
    write_scripts(built, VARIABLES)
    (script,) = built.rglob("kvmqemu.sh")
    listed = 'others+=("${task##*/}"); done\n  for thread'
    text = script.read_text()
    assert listed in text
    nobody = 2**22  # one more than the highest thread id that Linux gives: proc(5), pid_max
    script.write_text(text.replace(listed, listed.replace("done", f"done; others+=({nobody})")))
    done = launch(built, "kvmqemu.sh", **KVM | {"HOST_ROOT": str(host.root), "MEM_LOCK": "off"})
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not may_be_realtime, reason="no right to real-time priorities")
def test_cpus_that_are_not_isolated_are_used_with_a_loud_warning(built: Path, host: PretendSysfs) -> None:
    host.write("sys/devices/system/cpu/isolated", "")
    done = launch(built, "kvmqemu.sh", **KVM | {"HOST_ROOT": str(host.root), "PRIORITY": "1"})
    assert done.returncode == 0
    assert "WARNING: vCPU 1: CPU 1 is not isolated" in done.stderr
    assert threads(built)["vcpu1"][0]["policy"] == os.SCHED_FIFO


@pytest.mark.skipif(os.cpu_count() == 1, reason="one CPU: nowhere else to pin to")
@pytest.mark.skipif(not may_be_realtime, reason="no right to real-time priorities")
def test_a_thread_that_a_vcpu_makes_later_is_moved(
    built: Path, host: PretendSysfs, started: Callable[..., Run]
) -> None:
    """Its real-time priority would keep it on the vCPU's CPU, in front of the guest."""
    run = started(**KVM | {"HOST_ROOT": str(host.root), "PRIORITY": "1", "PRETEND_LATE": "1"})
    late = built / "qemu/bin/qemu-system-x86_64.late"
    until(lambda: late.exists() and late.read_text().endswith("\n"), "the late thread")
    thread = int(late.read_text())
    until(lambda: os.sched_getaffinity(thread) == {0}, "the late thread to be moved")
    until(lambda: os.sched_getscheduler(thread) == os.SCHED_OTHER, "its priority to be taken")
    (vcpu1,) = threads(built)["vcpu1"]
    assert (vcpu1["cpus"], vcpu1["policy"]) == ([1], os.SCHED_FIFO)
    assert run.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("broken", [{"PRETEND_REFUSE": "cont"}, {"PRETEND_REFUSE": "query-cpus-fast"}])
def test_what_qemu_refuses_ends_it(built: Path, broken: dict[str, str]) -> None:
    done = launch(built, "kvmqemu.sh", **EMULATED, **broken)
    assert done.returncode == 1
    assert f"qemu refused {broken['PRETEND_REFUSE']}: pretended" in done.stderr
    assert not list((built.parent.parent / "run").glob("control*"))


def test_a_vcpu_that_is_missing_is_noticed(built: Path) -> None:
    done = launch(built, "kvmqemu.sh", **EMULATED, PRETEND_VCPUS="1")
    assert done.returncode == 1
    assert "qemu has 1 vCPUs, not 2" in done.stderr


# What the machine lacks -----------------------------------------------------------------------------


def without_rights(built: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script without the rights to real-time priorities and locked memory."""
    fewer = ["prlimit", "--rtprio=0:0", "--memlock=65536:65536"]
    if os.geteuid() == 0:
        fewer += ["setpriv", "--bounding-set=-sys_nice,-ipc_lock,-sys_resource", "--inh-caps=-all"]
    return subprocess.run(
        [*fewer, built / "launch/rt-guest/kvmqemu.sh"],
        env=environment(built, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def lacking(built: Path, what: str, why: str, remedy: str, **variables: str) -> None:
    """Refused with the remedy; emulated, left out with a line, and the guest runs."""
    run = without_rights if "PRIORITY" in variables or variables.get("MEM_LOCK") == "on" else None
    for emulate in ("0", "1"):
        asked = KVM | variables | {"EMULATE": emulate}
        done = run(built, **asked) if run else launch(built, "kvmqemu.sh", **asked)
        if emulate == "0":
            assert done.returncode == 2, done.stderr
            assert done.stderr.splitlines()[-2:] == [f"kvmqemu.sh: {what}: {why}", remedy]
            assert not (built / "qemu/bin/qemu-system-x86_64.args").exists()
        else:
            assert done.returncode == 0, done.stderr
            assert f"emulated: left out: {what}: {why}" in done.stderr.splitlines()


def test_too_few_huge_pages(built: Path, host: PretendSysfs) -> None:
    pages = "sys/devices/system/node/node0/hugepages/hugepages-2048kB"
    host.write(f"{pages}/free_hugepages", "500")
    host.write(f"{pages}/nr_hugepages", "600")
    lacking(
        built,
        "huge pages of 2M on node 0",
        "512 are needed, 500 are free",
        f"as root: echo 612 >{host.root}/{pages}/nr_hugepages; best on the kernel's command line",
        HOST_ROOT=str(host.root),
    )
    assert not [word for word in qemu_arguments(built) if "hugetlb" in word]


def test_a_node_that_is_not_there(built: Path, host: PretendSysfs) -> None:
    lacking(
        built,
        "huge pages of 1G on node 5",
        "this machine has no such node, or no pages of that size",
        f"set NODE and HUGEPAGES; look at: ls -d {host.root}/sys/devices/system/node/node*/hugepages/*",
        HOST_ROOT=str(host.root),
        HUGEPAGES="1G",
        NODE="5",
    )


def test_a_cpu_that_is_not_there(built: Path, host: PretendSysfs) -> None:
    lacking(
        built,
        "CPU 900 for vCPU 1",
        "not there, or not to be used here (there are 0-1)",
        "plan with a topology of this machine: doit topology > recipes/topologies/NAME.toml; "
        "or set PINS and EMULATOR_CPUS",
        PINS="0 900",
        HOST_ROOT=str(host.root),
    )
    assert threads(built)["vcpu1"][0]["cpus"] == sorted(os.sched_getaffinity(0))


def test_a_cpu_that_is_offline(built: Path, host: PretendSysfs) -> None:
    host.write("sys/devices/system/cpu/cpu901/online", "0")
    lacking(
        built,
        "CPU 901 for the emulator",
        "not there, or not to be used here (there are 0-1)",
        f"bring it online: echo 1 >{host.root}/sys/devices/system/cpu/cpu901/online",
        EMULATOR_CPUS="0,901",
        HOST_ROOT=str(host.root),
    )


def test_no_right_to_real_time_priority(built: Path, host: PretendSysfs) -> None:
    lacking(
        built,
        "SCHED_FIFO for vCPUs",
        "you may not give threads the real-time priority 7",
        f"as root, for your shell: prlimit --pid {os.getpid()} --rtprio=7:7",
        PRIORITY="7",
        HOST_ROOT=str(host.root),
    )
    assert threads(built)["vcpu1"][0]["policy"] == os.SCHED_OTHER


def test_no_right_to_lock_memory(built: Path, host: PretendSysfs) -> None:
    lacking(
        built,
        "locked memory",
        "at most 64 KiB may be locked",
        f"as root, for your shell: prlimit --pid {os.getpid()} --memlock=unlimited; or set MEM_LOCK=off",
        MEM_LOCK="on",
        HOST_ROOT=str(host.root),
    )
    assert "-overcommit" not in qemu_arguments(built)


def test_an_emulated_vcpu_starves_nobody(built: Path, host: PretendSysfs) -> None:
    host.write("sys/devices/system/cpu/isolated", "")
    done = launch(built, "kvmqemu.sh", EMULATE="1", HOST_ROOT=str(host.root))
    assert done.returncode == 0
    assert (
        "emulated: left out: SCHED_FIFO for vCPU 1: CPU 1 is not isolated, "
        "and emulated it would starve whatever else runs there"
    ) in done.stderr
    assert threads(built)["vcpu1"][0]["policy"] == os.SCHED_OTHER


def test_names_a_tool_that_is_missing(built: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "env", "readlink", "cat", "flock", "taskset", "chrt", "setsid", "id"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    done = launch(built, "kvmqemu.sh", **EMULATED, PATH=str(tools))
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["kvmqemu.sh: jq is not installed", "apt-get install jq"]


# Lock, signals, ends --------------------------------------------------------------------------------


def test_a_guest_runs_once(built: Path, started: Callable[..., Run]) -> None:
    run = started(**EMULATED)
    for again in (("kvmqemu-rfs.sh",), ("kvmqemu.sh",), ("kvmqemu.sh", "--cleanup")):
        done = launch(built, *again, **EMULATED)
        assert done.returncode == 2
        said = f"guest rt-guest is running: started by process {run.process.pid} ("
        assert said in done.stderr
        assert f"its qemu is process {run.qemu}" in done.stderr
    assert run.end(signal.SIGTERM) == 0
    assert launch(built, "kvmqemu-rfs.sh", **EMULATED).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_shuts_the_guest_down(started: Callable[..., Run], number: signal.Signals) -> None:
    run = started(**EMULATED)
    begun = time.monotonic()
    assert run.end(number) == 0
    assert time.monotonic() - begun < 3
    assert not is_running(run.qemu)
    assert [path.name for path in run.run_dir.iterdir()] == ["lock"]


def test_a_guest_that_does_not_shut_down_is_ended(started: Callable[..., Run]) -> None:
    run = started(**EMULATED, PRETEND_DEAF="1", SHUTDOWN_SECONDS="1")
    begun = time.monotonic()
    assert run.end(signal.SIGTERM) == 0
    assert 1 <= time.monotonic() - begun < 6


def test_a_qemu_that_does_not_end_is_killed(started: Callable[..., Run]) -> None:
    run = started(**EMULATED, PRETEND_DEAF="all")
    for _ in range(2):
        run.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert is_running(run.qemu)
    assert run.end(signal.SIGTERM) == 128 + signal.SIGKILL
    assert not is_running(run.qemu)


@pytest.mark.parametrize("status", ["0", "3"])
def test_ends_with_the_status_of_qemu(built: Path, status: str) -> None:
    assert launch(built, "kvmqemu.sh", **EMULATED, PRETEND_STATUS=status).returncode == int(status)


def test_ends_with_the_status_of_a_qemu_that_does_not_start(built: Path) -> None:
    qemu = built / "qemu/bin/qemu-system-x86_64"
    qemu.write_text("#!/bin/sh\necho 'bad option' >&2\nexit 9\n")
    done = launch(built, "kvmqemu.sh", **EMULATED, NODE="0")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (9, "bad option")
