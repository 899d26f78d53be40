"""Launch scripts and what they change on the host: devices and tap networks, and how that is undone."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launching import (
    EMULATED,
    FULL,
    KVM,
    TAP,
    VARIABLES,
    Run,
    built,
    environment,
    host,
    is_free,
    is_running,
    launch,
    qemu_arguments,
    started,
    until,
    write_scripts,
)

__all__ = ["built", "host", "started"]

from tests.pretend_sysfs import BRIDGE, PretendSysfs

PF, VF, NIC = "0000:01:00.0", "0000:01:10.1", "0000:03:00.0"

# Devices --------------------------------------------------------------------------------------------

IP = r"""#!/bin/sh
echo "$@" >>"$0.log"
case $* in
  "-json link show dev enp1s0")
    echo '[{"vfinfo_list": [{"vf": 0}, {"vf": 1, "address": "52:54:00:00:00:01", "vlan_list": [{"vlan": 5}]}]}]' ;;
esac
"""


@pytest.fixture
def board(built: Path, host: PretendSysfs) -> PretendSysfs:
    """A machine with a network card and one that makes virtual functions, and a guest that wants both."""
    write_scripts(built, VARIABLES | {key: FULL[key] for key in ("devices", "vf_counts")})
    tools = host.root / "bin"
    tools.mkdir()
    (tools / "ip").write_text(IP)
    (tools / "ip").chmod(0o755)
    host.device("0000:00:1c.0", "pcieport", 3, kind=BRIDGE)
    host.device(NIC, "e1000e", 3, irqs=(41, 42))
    host.physical(PF, "igb", 1, "enp1s0", total=7)
    return host


def on(board: PretendSysfs, **variables: str) -> dict[str, str]:
    """Variables for a run on the board."""
    path = f"{board.root}/bin:{os.environ['PATH']}"
    return KVM | {"HOST_ROOT": str(board.root), "PATH": path} | variables


def ip_log(board: PretendSysfs) -> list[str]:
    """What `ip` was asked for, but for mere questions."""
    path = board.root / "bin/ip.log"
    return [line for line in path.read_text().splitlines() if " show " not in line] if path.exists() else []


def is_as_before(board: PretendSysfs) -> None:
    """Drivers, overrides and virtual functions are those of the host again."""
    until(lambda: board.read(f"sys/bus/pci/devices/{PF}/sriov_numvfs") == "0", "the VFs to be removed")
    until(lambda: not (board.root / f"sys/bus/pci/devices/{VF}").exists(), "the VF to be gone")
    assert (board.bound(NIC), board.override(NIC)) == ("e1000e", "(null)")
    assert ip_log(board)[-1] == "link set dev enp1s0 down"


def test_devices_are_taken_and_given_back(
    built: Path, board: PretendSysfs, started: Callable[..., Run]
) -> None:
    run = started(**on(board))
    assert (board.bound(NIC), board.bound(VF)) == ("vfio-pci", "vfio-pci")
    assert board.bound("0000:00:1c.0") == "pcieport"
    arguments = qemu_arguments(built)
    assert [word for word in arguments if word.startswith("vfio")] == [
        f"vfio-pci,host={a}" for a in (NIC, VF)
    ]
    assert ip_log(board) == [
        "link set dev enp1s0 vf 1 mac 52:54:00:aa:bb:cc",
        "link set dev enp1s0 vf 1 vlan 7",
        "link set dev enp1s0 up",
    ]
    assert (run.run_dir / "journal").read_text().splitlines() == [
        f"remove_vfs {PF}",
        f"link_down enp1s0 {PF}",
        f"give_back {NIC} e1000e",
        f"give_back {VF} igbvf",
    ]
    assert run.end(signal.SIGTERM) == 0, run.messages.read_text()
    is_as_before(board)
    # The last that was taken is the first that is given back, and the VFs go last.
    assert board.log[-4:] == [f"{VF} bound igbvf", f"{NIC} unbound", f"{NIC} bound e1000e", f"{PF} vfs 0"]
    assert not (run.run_dir / "journal").exists()


@pytest.mark.parametrize("way", ["--cleanup", "next start"])
def test_what_a_killed_script_left_is_undone(
    built: Path, board: PretendSysfs, started: Callable[..., Run], way: str
) -> None:
    run = started(**on(board))
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    assert is_running(run.qemu)
    refused = launch(built, "kvmqemu.sh", "--cleanup", **on(board))
    assert refused.returncode == 2
    assert f"its qemu is process {run.qemu}" in refused.stderr
    assert board.bound(NIC) == "vfio-pci"
    os.kill(run.qemu, signal.SIGKILL)
    until(lambda: not is_running(run.qemu), "qemu to be gone")
    until(lambda: is_free(run.run_dir / "lock"), "qemu's threads to be gone", seconds=60)
    if way == "--cleanup":
        done = launch(built, "kvmqemu.sh", "--cleanup", **on(board))
        assert "an earlier run was killed; undoing what it changed" in done.stderr
        is_as_before(board)
        until(lambda: board.log[-1] == f"{PF} vfs 0", "the pretended kernel to have put it down")
        before = list(board.log)
        again = launch(built, "kvmqemu.sh", "--cleanup", **on(board))
        assert (again.returncode, again.stderr, board.log) == (0, "", before)
    else:
        done = launch(built, "kvmqemu.sh", **on(board), DEVICES="")
        assert "an earlier run was killed; undoing what it changed" in done.stderr
        assert not [word for word in qemu_arguments(built) if word.startswith("vfio")]
        is_as_before(board)
    assert done.returncode == 0


def test_what_another_guest_uses_is_left_to_it(
    built: Path, board: PretendSysfs, started: Callable[..., Run]
) -> None:
    """Virtual functions and the link are removed by the last guest that has one, whoever made them."""
    first = started(**on(board))
    other = "0000:01:10.0"
    device = f"sys/bus/pci/devices/{other}"
    board.write(f"{device}/driver_override", "vfio-pci")
    board.write(f"{device}/driver/unbind", other)
    until(lambda: board.bound(other) == "", "the other VF to leave its driver")
    board.write("sys/bus/pci/drivers_probe", other)
    until(lambda: board.bound(other) == "vfio-pci", "the other VF to be another guest's")
    assert first.end(signal.SIGTERM) == 0
    assert "the virtual functions of 0000:01:00.0 stay" in first.messages.read_text()
    assert board.read(f"sys/bus/pci/devices/{PF}/sriov_numvfs") == "2"
    assert "link set dev enp1s0 down" not in ip_log(board)
    board.write(f"{device}/driver/unbind", other)
    until(lambda: board.bound(other) == "", "the other guest to end")
    second = started(**on(board))
    journal = (second.run_dir / "journal").read_text().splitlines()
    assert journal[:2] == [f"remove_vfs {PF}", "set_vf enp1s0 1 52:54:00:00:00:01 5"]
    assert f"link_down enp1s0 {PF}" in journal
    assert second.end(signal.SIGTERM) == 0
    until(lambda: board.read(f"sys/bus/pci/devices/{PF}/sriov_numvfs") == "0", "the VFs to be removed")
    assert "link set dev enp1s0 down" in ip_log(board)
    assert not list(second.run_dir.parent.glob("made-*")) + list(second.run_dir.parent.glob("up-*"))


def test_a_start_that_fails_gives_everything_back(built: Path, board: PretendSysfs) -> None:
    done = launch(built, "kvmqemu.sh", **on(board, PRETEND_REFUSE="cont"))
    assert done.returncode == 1
    assert f"{NIC} bound vfio-pci" in board.log
    is_as_before(board)


def test_what_cannot_be_undone_is_said_and_kept_for_later(
    built: Path, board: PretendSysfs, started: Callable[..., Run]
) -> None:
    run = started(**on(board))
    board.stuck.add(NIC)
    assert run.end(signal.SIGTERM) == 1
    assert f"not undone: give_back {NIC} e1000e" in run.messages.read_text()
    assert (run.run_dir / "journal").exists()
    board.stuck.clear()
    assert launch(built, "kvmqemu.sh", "--cleanup", **on(board)).returncode == 0
    is_as_before(board)


def test_virtual_functions_that_are_there_are_used_and_stay(built: Path, board: PretendSysfs) -> None:
    board.write(f"sys/bus/pci/devices/{PF}/sriov_numvfs", "4")
    until(lambda: (board.root / f"sys/bus/pci/devices/{VF}").exists(), "the VFs")
    done = launch(built, "kvmqemu.sh", **on(board))
    assert done.returncode == 0, done.stderr
    assert (board.bound(VF), board.read(f"sys/bus/pci/devices/{PF}/sriov_numvfs")) == ("igbvf", "4")
    assert "link set dev enp1s0 vf 1 mac 52:54:00:00:00:01" in ip_log(board)
    assert "link set dev enp1s0 vf 1 vlan 5" in ip_log(board)


def test_interrupts_of_devices_stay_on_housekeeping_cpus(
    board: PretendSysfs, started: Callable[..., Run]
) -> None:
    run = started(**on(board))
    affinity = "proc/irq/{}/smp_affinity_list"
    assert [board.read(affinity.format(irq)) for irq in (41, 42)] == ["0", "0"]
    # The guest enables one more, and the host opens the physical function's interface.
    board.interrupt(NIC, 43, "0-1")
    board.interrupt(PF, 50, "1")
    for irq in (43, 50):
        until(lambda irq=irq: board.read(affinity.format(irq)) == "0", f"interrupt {irq} to move")  # type: ignore[misc]
    assert run.end(signal.SIGTERM) == 0


def no_iommu_mode(board: PretendSysfs) -> None:
    board.write("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y")


def no_group(board: PretendSysfs) -> None:
    (board.root / f"sys/bus/pci/devices/{NIC}/iommu_group").unlink()


def shared_group(board: PretendSysfs) -> None:
    board.device("0000:03:00.1", "e1000e", 3)
    board.device("0000:03:00.2", "", 3)
    board.device("0000:03:00.3", "snd_hda_intel", 3)


def no_such_device(board: PretendSysfs) -> None:
    (board.root / f"sys/bus/pci/devices/{NIC}").unlink()


def other_count(board: PretendSysfs) -> None:
    board.write(f"sys/bus/pci/devices/{PF}/sriov_numvfs", "1")


def few_vfs(board: PretendSysfs) -> None:
    board.write(f"sys/bus/pci/devices/{PF}/sriov_totalvfs", "1")


def no_sriov(board: PretendSysfs) -> None:
    (board.root / f"sys/bus/pci/devices/{PF}/sriov_numvfs").unlink()


@pytest.mark.parametrize(
    ("broken", "what", "why", "remedy"),
    [
        (
            no_iommu_mode,
            NIC,
            "VFIO is in no-IOMMU mode: the guest could write to all of this machine's memory",
            "echo N >",
        ),
        (no_group, NIC, "it has no IOMMU group", "intel_iommu=on"),
        (
            shared_group,
            NIC,
            "its IOMMU group 3 has members that the host uses: 0000:03:00.1 (e1000e) 0000:03:00.3 (snd_hda_intel)",
            "pass these, too",
        ),
        (no_such_device, NIC, "there is none at this address", "lspci -D"),
        (other_count, PF, "there are 1, and a device makes all of them at once", "echo 0 >"),
        (few_vfs, PF, "it makes at most 1", "VF_COUNTS"),
        (no_sriov, PF, "no such device, or it has no SR-IOV", "lspci"),
    ],
)
def test_devices_that_cannot_be_passed(
    built: Path,
    board: PretendSysfs,
    broken: Callable[[PretendSysfs], None],
    what: str,
    why: str,
    remedy: str,
) -> None:
    """Refused, and whatever was taken before is given back; emulated, that device alone is left out."""
    broken(board)
    name = f"device {NIC}" if what == NIC else f"virtual function 1 of {PF}"
    done = launch(built, "kvmqemu.sh", **on(board))
    assert done.returncode == 2
    said, hint = done.stderr.splitlines()[-2:]
    assert said.startswith(f"kvmqemu.sh: {name}: {why}")
    assert remedy in hint
    if what == NIC:
        is_as_before_but_for = board.read(f"sys/bus/pci/devices/{PF}/sriov_numvfs")
        until(lambda: board.read(f"sys/bus/pci/devices/{PF}/sriov_numvfs") == "0", is_as_before_but_for)
    assert not (built / "qemu/bin/qemu-system-x86_64.args").exists()
    done = launch(built, "kvmqemu.sh", **on(board, EMULATE="1"))
    assert done.returncode == 0, done.stderr
    assert f"emulated: left out: {name}: {why}" in done.stderr
    passed = [word for word in qemu_arguments(built) if word.startswith("vfio")]
    if broken is no_iommu_mode:
        assert passed == []
    else:
        assert passed == [f"vfio-pci,host={VF if what == NIC else NIC}"]


def test_a_group_may_be_passed_as_a_whole(built: Path, board: PretendSysfs) -> None:
    board.device("0000:03:00.1", "e1000e", 3)
    done = launch(built, "kvmqemu.sh", **on(board, DEVICES=f"{NIC} 0000:03:00.1"))
    assert done.returncode == 0, done.stderr
    assert (board.bound(NIC), board.bound("0000:03:00.1")) == ("e1000e", "e1000e")


@pytest.mark.parametrize("devices", ["03:00.0", "0000:03:00.0,vlam=3", "0000:03:00.0/x"])
def test_devices_that_are_not_written_right(built: Path, board: PretendSysfs, devices: str) -> None:
    done = launch(built, "kvmqemu.sh", **on(board, DEVICES=devices))
    assert done.returncode == 2
    assert "DEVICES: " in done.stderr


# Networks, with the kernel's own tap devices ----------------------------------------------------------

may_have_networks = (
    os.geteuid() == 0
    and Path("/dev/net/tun").exists()
    and subprocess.run(
        ["unshare", "-n", "ip", "link", "add", "br0", "type", "bridge"], check=False, capture_output=True
    ).returncode
    == 0
)


def in_network(built: Path, commands: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run shell commands in a network of their own; `$guest` starts the guest."""
    asked = environment(built, **variables) | {"guest": str(built / "launch/rt-guest/kvmqemu.sh")}
    return subprocess.run(
        ["unshare", "-n", "bash", "-euc", commands],
        env=asked,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.skipif(not may_have_networks, reason="needs root, network namespaces and /dev/net/tun")
def test_a_tap_device_is_made_in_its_bridge_and_removed(built: Path) -> None:
    write_scripts(built, VARIABLES | {"networks": [TAP | {"vhost": "off"}]})
    qemu = built / "qemu/bin/qemu-system-x86_64"
    real = qemu.with_name("pretended")
    qemu.rename(real)
    qemu.write_text(f'#!/bin/sh\nip -o link show dev tap0 >>{built}/seen 2>&1\nexec {real} "$@"\n')
    qemu.chmod(0o755)
    done = in_network(built, 'ip link add br0 type bridge; "$guest"; ip -o link', **EMULATED)
    assert done.returncode == 0, done.stderr
    seen = (built / "seen").read_text().splitlines()[-1]
    assert "master br0" in seen
    assert ",UP" in seen
    assert "tap0" not in done.stdout
    assert "br0" in done.stdout
    arguments = (built / "qemu/bin/pretended.args").read_text()
    assert "tap,id=net0,ifname=tap0,script=no,downscript=no,vhost=off\n" in arguments
    assert "virtio-net-pci,netdev=net0,romfile=,mac=52:54:00:11:22:33\n" in arguments


@pytest.mark.skipif(not may_have_networks, reason="needs root, network namespaces and /dev/net/tun")
def test_a_tap_device_that_is_there_is_used_and_stays(built: Path) -> None:
    write_scripts(built, VARIABLES | {"networks": [TAP | {"vhost": "off"}]})
    done = in_network(built, 'ip tuntap add dev tap0 mode tap; "$guest"; ip -o link', **EMULATED)
    assert done.returncode == 0, done.stderr
    assert "tap0" in done.stdout


@pytest.mark.skipif(not may_have_networks, reason="needs root, network namespaces and /dev/net/tun")
def test_a_bridge_that_is_missing(built: Path) -> None:
    write_scripts(built, VARIABLES | {"networks": [TAP]})
    refused = in_network(built, '"$guest"', **KVM, HUGEPAGES="none")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-2:] == [
        "kvmqemu.sh: tap device tap0: there is no bridge br0",
        "ip link add br0 type bridge && ip link set dev br0 up",
    ]
    done = in_network(built, '"$guest"', **EMULATED)
    assert done.returncode == 0
    assert "emulated: left out: tap device tap0: there is no bridge br0" in done.stderr
    assert "-netdev" not in qemu_arguments(built)
