"""Guests of another architecture: by the same steps as others, with what the tables of architectures say."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline import bootproof, gate, guestmachine, libvirt, symbolfile
from pipeline.action import Action
from pipeline.architecture import ARCHITECTURES, BUILD, Architecture
from pipeline.emulator import Emulator
from pipeline.launch import machine_of
from pipeline.plan import State
from pipeline.project import Project
from tests.launching import EMULATED, ROOT, VARIABLES, built, launch, write_scripts

__all__ = ["built"]

FOREIGN = [each for each in ARCHITECTURES.values() if each.crossed]
#: Numbers of machines in ELF headers (elf.h).
ELF_MACHINES = {"amd64": 62, "arm64": 183}
GUESTS = {"amd64": "rt-guest", "arm64": "rt-guest-arm64"}


def named(of: Architecture) -> str:
    return of.debian


@pytest.fixture(scope="module")
def project() -> Project:
    return Project(ROOT)


# Programs ---------------------------------------------------------------------------------------


def header(machine: int, kind: int = 3) -> bytes:
    """The first bytes of a program, as linkers write them."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", kind, machine)


def registration(of: Architecture) -> tuple[str, bytes, bytes, str, str]:
    """Name, magic, mask, interpreter and flags that the kernel is told."""
    lines = (ROOT / f"recipes/binfmt/virt-rt-{of.debian}.conf").read_text().splitlines()
    (line,) = [line for line in lines if not line.startswith("#")]
    _, name, kind, offset, magic, mask, interpreter, flags = line.split(":")
    assert (kind, offset) == ("M", "")
    plain = [text.encode().decode("unicode_escape").encode("latin-1") for text in (magic, mask)]
    return name, plain[0], plain[1], interpreter, flags


@pytest.mark.parametrize("of", FOREIGN, ids=named)
def test_the_kernel_is_told_which_programs_the_builders_qemu_runs(of: Architecture) -> None:
    name, magic, mask, interpreter, flags = registration(of)

    def matches(program: bytes) -> bool:
        return all(a & m == b & m for a, b, m in zip(program, magic, mask, strict=True))

    assert name == f"virt-rt-{of.debian}"
    assert interpreter == f"/usr/bin/{of.runner}"
    # with F it would be a file of this machine, and not that of the locked builder
    assert "F" not in flags
    # C: su and its like get their owner's rights
    assert "C" in flags
    for arch, machine in ELF_MACHINES.items():
        for kind in (2, 3):
            assert matches(header(machine, kind)) == (arch == of.debian)
        assert not matches(header(machine, 1)), "an object file is no program"


def run_foreign(binfmt: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts/run-foreign", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "BINFMT_MISC": str(binfmt)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_is_not_registered_is_registered_once(tmp_path: Path) -> None:
    (tmp_path / "register").touch()
    assert run_foreign(tmp_path, "--check").returncode == 1
    assert (tmp_path / "register").read_text() == ""
    done = run_foreign(tmp_path)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "register").read_text()
    assert said.startswith(":virt-rt-") and "\n" not in said
    for of in FOREIGN:
        (tmp_path / f"virt-rt-{of.debian}").touch()
    (tmp_path / "register").write_text("")
    assert run_foreign(tmp_path, "--check").returncode == 0
    assert run_foreign(tmp_path).returncode == 0
    assert (tmp_path / "register").read_text() == ""
    assert run_foreign(tmp_path, "--remove").returncode == 0
    assert [(tmp_path / f"virt-rt-{of.debian}").read_text() for of in FOREIGN] == ["-1" for _ in FOREIGN]
    wrong = run_foreign(tmp_path, "--chek")
    assert wrong.returncode == 2 and "unknown argument: --chek" in wrong.stderr


# Images -----------------------------------------------------------------------------------------


def steps(project: Project, arch: str) -> tuple[Action, Action]:
    """What bakes a guest and what makes its disk."""
    guest = GUESTS[arch]
    return project.graph[f"rootfs:{guest}"], project.graph[f"image:{guest}"]


def test_guests_of_every_architecture_are_baked_by_the_same_steps(project: Project) -> None:
    (rootfs, disk), *others = (steps(project, arch) for arch in ARCHITECTURES)
    assert others
    for other_rootfs, other_disk in others:
        for one, other in ((rootfs, other_rootfs), (disk, other_disk)):
            assert one.script == other.script
            assert one.files == other.files
            assert set(one.environment) == set(other.environment)
            assert one.capabilities == other.capabilities
            assert one.outputs == other.outputs


@pytest.mark.parametrize("of", ARCHITECTURES.values(), ids=named)
def test_a_guest_is_baked_in_the_builder_of_its_architecture(project: Project, of: Architecture) -> None:
    rootfs, disk = steps(project, of.debian)
    assert rootfs.builder == disk.builder == f"builder:image{'' if of.debian == BUILD else f'-{of.debian}'}"
    assert rootfs.environment["RUNNER"] == ("" if of.debian == BUILD else f"qemu-{of.machine}")
    assert (disk.environment["EFI"], disk.environment["KERNEL"]) == {
        "amd64": ("x64", "bzImage"),
        "arm64": ("aa64", "Image"),
    }[of.debian]
    # systemd's table of the Discoverable Partitions Specification
    assert (
        disk.environment["ROOT_TYPE"]
        == {
            "amd64": "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
            "arm64": "b921b045-1df0-41c3-af44-4c6f280d3fae",
        }[of.debian]
    )
    locked = {
        package.filename for package in project.packages_lock.get(rootfs.builder.replace(":", "/")).packages
    }
    assert any(name.startswith("systemd-boot-efi_") and name.endswith(f"_{of.debian}.deb") for name in locked)
    assert any(name.startswith("qemu-user_") for name in locked) == of.crossed


def test_no_step_of_an_image_asks_which_architecture_it_is() -> None:
    paths = [ROOT / "recipes/steps/rootfs.sh", ROOT / "recipes/steps/disk.sh", ROOT / "pipeline/image.py"]
    paths += [path for path in (ROOT / "recipes/elements").rglob("*") if path.is_file()]
    paths += [path for path in (ROOT / "recipes/templates").glob("kvmqemu*.j2")]
    names = {word for of in ARCHITECTURES.values() for word in (of.debian, of.machine, of.board.name, of.efi)}
    for path in paths:
        lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        # virt is the project's name, too
        assert not set(re.findall(r"[a-z0-9_]+", "\n".join(lines))) & names - {"virt"}, path


# Launch scripts ---------------------------------------------------------------------------------


def dry_run(built: Path, script: str) -> str:
    done = launch(built, script, "--dry-run", **EMULATED)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_guest_of_arm64_gets_its_own_board(built: Path) -> None:
    of = ARCHITECTURES["arm64"]
    write_scripts(built, VARIABLES | machine_of("arm64"))
    for name in (of.qemu_system, "qemu-img"):
        (built / "qemu/bin" / name).write_text("")
    for name in (of.board.code, of.board.variables):
        (built / "qemu/share/qemu" / name).write_text("")
    (built / "kernel/guest/Image").write_text("")
    outside, inside = (dry_run(built, script) for script in ("kvmqemu.sh", "kvmqemu-rfs.sh"))
    for said in (outside, inside):
        assert f"{built}/qemu/bin/qemu-system-aarch64 " in said
        assert "-machine virt,gic-version=max,usb=off,mem-merge=off" in " ".join(
            said.replace("\\\n", "").split()
        )
        assert "neoverse-n1" in said
        # a parameter of the other architecture's kernel
        assert "no_timer_check" not in said
    assert f"{built}/kernel/guest/Image" in outside
    assert f"readonly=on,file={built}/qemu/share/qemu/AAVMF_CODE.no-secboot.fd" in inside
    assert f"install -m 600 -- {built}/qemu/share/qemu/AAVMF_VARS.fd" in inside


@pytest.mark.parametrize("of", ARCHITECTURES.values(), ids=named)
def test_libvirt_is_told_of_the_architectures_own_board(
    project: Project, of: Architecture, tmp_path: Path
) -> None:
    action = project.graph[f"libvirt:{GUESTS[of.debian]}"]
    texts = {name: file.content.decode() for name, file in action.files.items()}
    domain = tmp_path / "domain.xml"
    domain.write_text(libvirt.render("domain.xml", action.parameters, texts))
    if shutil.which("virt-xml-validate"):
        subprocess.run(["virt-xml-validate", domain, "domain"], check=True, capture_output=True)
    root = ElementTree.parse(domain).getroot()  # noqa: S314 - our own
    kind = root.find("os/type")
    assert kind is not None and kind.attrib == {"arch": of.machine, "machine": of.board.name}
    assert (root.find("cpu/feature[@name='invtsc']") is not None) == (of.debian == "amd64")
    assert (root.find("features/gic") is not None) == (of.debian == "arm64")
    script = libvirt.render("define.sh", action.parameters, texts)
    assert f"qemu/bin/{of.qemu_system}" in script


@pytest.mark.parametrize("of", ARCHITECTURES.values(), ids=named)
def test_a_guest_is_run_on_its_board_and_hears_of_its_credentials(
    project: Project, of: Architecture, tmp_path: Path
) -> None:
    asked, name = project.recipes, GUESTS[of.debian]
    guest = asked.guests[name]
    for key in (guestmachine.KEY, guestmachine.HOST_KEY):
        (tmp_path / key).write_text("a key")
        (tmp_path / f"{key}.pub").write_text("a key")
    machine = guestmachine.Machine(
        name, guest, asked.platforms[guest.platform], tmp_path, tmp_path, guestmachine.Asked(console=tmp_path)
    )
    emulator = Emulator(of, ("qemu",), ("qemu-img",), of.board.emulated_cpu, tmp_path, distributions=True)
    said = " ".join(machine.arguments(emulator, tmp_path, kvm=False))
    assert f"-machine {of.board.machine} " in said
    assert f"-kernel {tmp_path}/{of.image} " in said
    assert f"console={of.console} " in said
    assert ("no_timer_check" in said) == (of.debian == "amd64")
    # SMBIOS strings: SeaBIOS shows them to a kernel that qemu loads, on arm64 only UEFI does
    assert "-smbios type=11" in said
    firmware = [
        f"readonly=on,file={tmp_path}/{of.board.code}",
        f"snapshot=on,file={tmp_path}/{of.board.variables}",
    ]
    assert [part in said for part in firmware] == [of.debian == "arm64"] * 2


def test_gdb_is_told_of_functions_of_either_architecture(tmp_path: Path) -> None:
    names = ("_text", "_stext", "_etext", "_end")
    (tmp_path / "System.map").write_text(
        "".join(f"ffff80008{number:07x} T {name}\n" for number, name in enumerate(names))
    )
    for arch, machine in ELF_MACHINES.items():
        symbolfile.write(tmp_path / "System.map", arch, tmp_path / arch)
        assert struct.unpack("<H", (tmp_path / arch).read_bytes()[18:20]) == (machine,)


# The boot proof ---------------------------------------------------------------------------------


def test_the_proof_reaches_every_board_by_names_that_fw_cfg_takes(tmp_path: Path) -> None:
    for name in ("virt-rt-proof.service", "virt-rt-proof.sh"):
        (tmp_path / name).write_text((ROOT / "recipes/lab" / name).read_text())
    expected = gate.Expectations((1,), (0,), "6.12", ("ksm.service",), 10, 10_000)
    arguments = bootproof.proof_arguments(expected, tmp_path, tmp_path)
    given = {}
    for option, value in itertools.pairwise(arguments):
        if option == "-fw_cfg":
            name, _, path = value.removeprefix("name=").partition(",file=")
            given[name] = Path(path).read_text()
    # QEMU_FW_CFG of the kernel's interface: 56 bytes with the closing zero
    assert all(len(name) <= 55 for name in given)
    prefix = "opt/io.systemd.credentials/"
    unit = given[f"{prefix}systemd.extra-unit.p.service"]
    assert 'Environment="ISOLATED=1"' in unit
    assert "Wants=p.service" in given[f"{prefix}systemd.unit-dropin.-.mount"]
    assert given[f"{prefix}virt-rt.proof"] == (ROOT / "recipes/lab/virt-rt-proof.sh").read_text()


def test_every_guest_is_booted_by_a_qemu_that_runs_here(project: Project) -> None:
    for name, platform in project.recipes.platforms.items():
        proof = project.graph[f"boot:{name}"]
        (emulator,) = [each for path, each in proof.inputs.items() if path.endswith("/qemu")]
        assert project.graph[emulator.action].arch == BUILD, name
        assert set(proof.files) == set(project.graph["boot:qemu-q35"].files), platform.arch


@pytest.mark.engine
@pytest.mark.slow
def test_the_guest_of_arm64_boots_both_ways() -> None:
    """With what the store has; kernels and qemu are not built for a test."""
    name, project = "boot:qemu-virt-arm64", Project(ROOT)
    try:
        states = project.plan([name])
        cheap = {"launch", "boot-proof"}
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
    verdict = json.loads((ROOT / "artifacts/qemu-virt-arm64/boot/boot.json").read_text())
    boots = verdict["guests"]["rt-guest-arm64"]["boots"]
    assert set(boots) == {"outside", "inside"}
    for way in boots.values():
        assert way["ok"] and len(way["findings"]) == 16
        assert "console=ttyAMA0" in way["cmdline"]
