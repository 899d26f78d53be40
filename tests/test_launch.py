"""The launch scripts as a person meets them: what they print, what they refuse, what they leave alone."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from pipeline import recipes
from pipeline.errors import UserError
from pipeline.launch import SCRIPTS, mac_address, render, variables_of, vf_counts
from tests.launching import (
    FULL,
    GOLDEN,
    ROOT,
    TEMPLATES,
    VARIABLES,
    built,
    host,
    launch,
    qemu_arguments,
    tree,
    write_scripts,
)

__all__ = ["built", "host"]

from tests.pretend_sysfs import PretendSysfs


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("guest", ["plain", "full"])
@pytest.mark.parametrize("mode", ["kvm", "emulated"])
def test_dry_run_prints_the_commands_and_touches_nothing(
    built: Path, host: PretendSysfs, script: str, guest: str, mode: str
) -> None:
    """To accept a change of the templates on purpose: VIRT_RT_ACCEPT=1 pytest tests/test_launch.py."""
    top = built.parent.parent
    write_scripts(built, FULL if guest == "full" else VARIABLES)
    host.device("0000:03:00.0", "e1000e", 3)
    host.physical("0000:01:00.0", "igb", 1, "enp1s0", total=7)
    before = tree(top)
    done = launch(
        built,
        script,
        "--dry-run",
        "--",
        "-device",
        "it's,odd",
        EMULATE="1" if mode == "emulated" else "0",
        CMDLINE_EXTRA="quiet loglevel=3,4",
        KVM_DEVICE="/nowhere/kvm",
        HOST_ROOT=str(host.root),
    )
    assert done.returncode == 0, done.stderr
    assert tree(top) == before
    text = done.stdout.replace(str(top), "/top")
    golden = GOLDEN / f"{script}.{guest}.{mode}"
    if os.environ.get("VIRT_RT_ACCEPT"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_dry_run_prints_is_what_runs(built: Path, script: str) -> None:
    """A person may paste it; then qemu waits to be told over its pipes."""
    odd = ["-device", "it's $odd"]
    without = {"EMULATE": "1", "HUGEPAGES": "none", "MEM_LOCK": "off", "NODE": "0"}
    printed = launch(built, script, "--dry-run", "--", *odd, **without).stdout
    qemu = str(built / "qemu/bin/qemu-system-x86_64")
    before, started, rest = printed.partition(f"\n{qemu} ")
    words, _, after = rest.partition("\n# ")
    (built / "pasted").mkdir()
    pasted = f"{before}\nprintf '%s\\n' {words} >{built}/pasted/args\n"
    subprocess.run(["bash", "-e"], input=pasted, text=True, check=True, stdout=subprocess.DEVNULL)
    assert started
    assert "taskset -pc 1 THREAD-OF-VCPU-1" in after
    shutil.rmtree(built.parent.parent / "home")
    shutil.rmtree(built.parent.parent / "run")
    assert launch(built, script, "--", *odd, **without).returncode == 0
    run = [word for word in qemu_arguments(built) if "memory" not in word]
    assert [word for word in (built / "pasted/args").read_text().splitlines() if "memory" not in word] == run


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("tap", "disk", "device"), list(itertools.product([False, True], repeat=3)))
def test_generated_text_is_clean(built: Path, script: str, tap: bool, disk: bool, device: bool) -> None:
    chosen = {"networks": tap, "disks": disk, "devices": device, "vf_counts": device}
    write_scripts(built, VARIABLES | {key: FULL[key] for key, wanted in chosen.items() if wanted})
    for linter in (["shellcheck"], ["shfmt", "-i", "2", "-ci", "-d"]):
        if shutil.which(linter[0]) is None:
            pytest.skip(f"{linter[0]} is not installed")
        done = subprocess.run(
            [*linter, built / "launch" / "rt-guest" / script], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_variable(built: Path, script: str) -> None:
    done = launch(built, script, "--help")
    assert done.returncode == 0
    assert "usage: " + script in done.stdout
    source = (built / "launch" / "rt-guest" / script).read_text()
    names = re.findall(r"^([A-Z_]+)=\$\{\1", source, re.MULTILINE)
    assert {"QEMU", "PINS", "NET", "RUN_DIR"} <= set(names)
    lines = done.stdout.splitlines()
    for name in names:
        at = next(number for number, line in enumerate(lines) if line.startswith(f"{name}=${{{name}"))
        # Above each, or above the lines that it stands with.
        while not lines[at].startswith("#"):
            assert lines[at], f"{name} is not explained"
            at -= 1


def test_refuses_a_machine_without_kvm(built: Path) -> None:
    done = launch(built, "kvmqemu.sh", KVM_DEVICE="/nowhere/kvm")
    assert done.returncode == 2
    assert "KVM is not usable: /nowhere/kvm is missing" in done.stderr
    assert "EMULATE=1" in done.stderr.splitlines()[1]


def test_refuses_kvm_that_runs_nothing(built: Path) -> None:
    """The device is there, but what qemu runs on it does not get to its first instruction."""
    device = built / "kvm"
    device.touch(0o600)
    done = launch(built, "kvmqemu.sh", KVM_DEVICE=str(device))
    assert done.returncode == 2
    assert "a first instruction did not run (status 0)" in done.stderr


@pytest.mark.parametrize(
    ("script", "missing", "variable", "task"),
    [
        ("kvmqemu.sh", "qemu/bin/qemu-system-x86_64", "QEMU", "qemu:qemu-q35"),
        ("kvmqemu.sh", "qemu/bin/qemu-img", "QEMU_IMG", "qemu:qemu-q35"),
        ("kvmqemu.sh", "kernel/guest/bzImage", "KERNEL", "kernel:qemu-q35:guest"),
        ("kvmqemu-rfs.sh", "image/rt-guest/disk.qcow2", "DISK", "image:rt-guest"),
        ("kvmqemu-rfs.sh", "qemu/share/qemu/OVMF_CODE_4M.fd", "OVMF_CODE", "qemu:qemu-q35"),
        ("kvmqemu-rfs.sh", "qemu/share/qemu/OVMF_VARS_4M.fd", "OVMF_VARS", "qemu:qemu-q35"),
    ],
)
def test_names_a_missing_file_and_who_makes_it(
    built: Path, script: str, missing: str, variable: str, task: str
) -> None:
    (built / missing).unlink()
    done = launch(built, script, EMULATE="1")
    assert done.returncode == 2
    assert f"{variable}: no readable file {built}/{missing}" in done.stderr
    assert f"'doit {task}'" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VCPUS", "0"),
        ("VCPUS", "08"),
        ("VCPUS", "two"),
        ("MEMORY_MIB", "1G"),
        ("SSH_PORT", "65536"),
        ("EMULATE", "yes"),
        ("SNAPSHOT", "2"),
        ("MEM_LOCK", "1"),
        ("NET", "bridge"),
        ("HUGEPAGES", "4M"),
        ("PINS", "1,2"),
        ("PINS", "1"),
        ("EMULATOR_CPUS", "0-"),
        ("REALTIME_VCPUS", "all"),
        ("PRIORITY", "99"),
        ("NODE", "first"),
        ("SHUTDOWN_SECONDS", "1m"),
        ("QMP", "/" + "x" * 107),
    ],
)
def test_refuses_values_that_mean_nothing(built: Path, variable: str, value: str) -> None:
    done = launch(built, "kvmqemu.sh", **{"EMULATE": "1", variable: value})
    assert done.returncode == 2
    assert f"{variable}: " in done.stderr
    assert not (built / "qemu/bin/qemu-system-x86_64.args").exists()


def test_refuses_unknown_options(built: Path) -> None:
    done = launch(built, "kvmqemu.sh", "--fast")
    assert done.returncode == 2
    assert "unknown option --fast" in done.stderr


def test_the_built_disk_is_never_written(built: Path) -> None:
    """Changes go to an overlay that outlives the run; another image gets another one."""
    home = built.parent.parent / "home"

    def overlays() -> set[Path]:
        return set(home.rglob("disk-*.qcow2"))

    disk = built / "image/rt-guest/disk.qcow2"
    assert launch(built, "kvmqemu-rfs.sh", EMULATE="1").returncode == 0
    (first,) = overlays()
    first.write_text("changes")
    assert launch(built, "kvmqemu-rfs.sh", EMULATE="1").returncode == 0
    assert first.read_text() == "changes"
    assert str(first) in (built / "qemu/bin/qemu-system-x86_64.args").read_text()
    disk.chmod(0o644)
    disk.write_text("rebuilt")
    assert launch(built, "kvmqemu-rfs.sh", EMULATE="1").returncode == 0
    assert len(overlays()) == 2
    assert (built / "qemu/share/qemu/OVMF_VARS_4M.fd").read_text() == "variables"
    assert list(home.rglob("*.new")) == []


def test_snapshot_keeps_nothing(built: Path) -> None:
    assert launch(built, "kvmqemu-rfs.sh", EMULATE="1", SNAPSHOT="1").returncode == 0
    assert [path for path in (built.parent.parent / "home").rglob("*") if path.is_file()] == []
    arguments = qemu_arguments(built)
    assert sum("snapshot=on" in argument for argument in arguments) == 2


def test_any_command_line_survives_the_shell(built: Path) -> None:
    odd = "a='b' $HOME `id` \"c\" } \\ end"
    script = built / "launch" / "rt-guest" / "kvmqemu.sh"
    script.write_text(render("kvmqemu.sh", {**VARIABLES, "cmdline": odd}, TEMPLATES))
    assert launch(built, "kvmqemu.sh", EMULATE="1").returncode == 0
    assert f"{odd} no_timer_check" in qemu_arguments(built)


@pytest.mark.parametrize("name", ["guest", "platform"])
@pytest.mark.parametrize("value", ["", "Bad", "a b", "a;b", "../x"])
def test_refuses_names_that_need_quoting(name: str, value: str) -> None:
    with pytest.raises(UserError, match=name):
        render("kvmqemu.sh", {**VARIABLES, name: value}, TEMPLATES)


def test_a_variable_that_is_not_given_is_an_error() -> None:
    with pytest.raises(UserError, match="memory_mib"):
        render("kvmqemu.sh", {k: v for k, v in VARIABLES.items() if k != "memory_mib"}, TEMPLATES)


def test_scripts_say_what_the_plan_says() -> None:
    """Canoe Pass's guest is on the second socket, whose first CPU keeps house."""
    asked = recipes.load(ROOT)
    platform = "canoe-pass"
    said = variables_of(
        "canoe-guest", asked.platforms[platform], asked.guests_of(platform), asked.plans[platform]
    )
    text = render("kvmqemu.sh", said, TEMPLATES)
    for line in (
        "PINS=${PINS:-'9 10 11 12'}",
        "EMULATOR_CPUS=${EMULATOR_CPUS:-8}",
        "REALTIME_VCPUS=${REALTIME_VCPUS:-1-3}",
        "HUGEPAGES=${HUGEPAGES:-1G}",
        "NODE=${NODE:-1}",
    ):
        assert f"\n{line}\n" in text


def test_networks_and_devices_of_a_recipe() -> None:
    asked = recipes.load(ROOT)
    virtual = recipes.VirtualFunction(physical="0000:01:00.0", number=1, mac="52:54:00:aa:bb:cc", vlan=7)
    guest = msgspec.structs.replace(
        asked.guests["rt-guest"],
        networks=(recipes.TapNetwork(name="tap0", bridge="br0"), recipes.UserNetwork(ssh_port=2222)),
        devices=(recipes.Function(address="0000:03:00.0"), virtual),
    )
    other = msgspec.structs.replace(guest, devices=(msgspec.structs.replace(virtual, number=4),))
    guests = {"rt-guest": guest, "other": other}
    said = variables_of("rt-guest", asked.platforms["qemu-q35"], guests, asked.plans["qemu-q35"])
    assert said["devices"] == ["0000:03:00.0", "0000:01:00.0/1,mac=52:54:00:aa:bb:cc,vlan=7"]
    assert said["vf_counts"] == ["0000:01:00.0=5"]
    assert vf_counts({"rt-guest": guest}) == {"0000:01:00.0": 2}
    assert [network["kind"] for network in said["networks"]] == ["tap", "user"]
    assert said["networks"][0]["mac"] == mac_address("rt-guest", 0)
    assert said["ssh_port"] == 2222


def test_two_guests_do_not_share_a_mac_address() -> None:
    addresses = {mac_address(guest, index) for guest in ("rt-guest", "other") for index in (0, 1)}
    assert len(addresses) == 4
    assert all(re.fullmatch("52:54:00(:[0-9a-f]{2}){3}", address) for address in addresses)
