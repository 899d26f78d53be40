"""The tables that describe architectures: the only place where their names differ.

What else differs is data of recipes: fragments of a kernel's configuration (`kernel-configs/`), settings of a host
(`recipes/tuning.toml`), builders (`recipes/builders/`), licences of firmware (`recipes/packages/`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.errors import UserError

#: Debian's name of the architecture on which steps run; for every other one they compile across.
BUILD = "amd64"


@dataclass(frozen=True, slots=True)
class Probe:
    """A program that is run as a machine's first instructions, to see whether KVM works.

    position  where it stands in a ROM of 64 KiB, bytes
    code      its instructions, written for printf
    options   of qemu's, for the board and what the program ends qemu with
    status    that qemu then ends with
    """

    position: int
    code: str
    options: str
    status: int

    @property
    def rom(self) -> bytes:
        """The ROM."""
        return (bytes(self.position) + self.code.encode().decode("unicode_escape").encode("latin-1")).ljust(
            1 << 16, b"\0"
        )


@dataclass(frozen=True, slots=True)
class Board:
    """The board of qemu's that stands for a machine of the architecture, and what it needs beside its program.

    name          for `-machine`
    serial        its first serial port, as libvirt calls the kind
    firmware      firmware that is shipped: paths in the builder of qemu
    code          the file among these that is UEFI's code, without its directory; `variables` that of its variables
    option_roms   ROMs that are built from qemu's own tree
    devices       devices that a program for this board must have, beside those that every one has
    machine       what guests get of it, for `-machine`: nothing that they would probe, poll or be interrupted by
    cpu           the CPU of a guest with KVM
    emulated_cpu  and of one without
    parameters    of the kernel of a guest without KVM
    probe         what shows that KVM works
    package       Debian's package with a program for it
    bare          whether a kernel that qemu loads sees SMBIOS strings only with UEFI before it
    """

    name: str
    serial: str
    firmware: tuple[str, ...]
    code: str
    variables: str
    option_roms: tuple[str, ...]
    devices: tuple[str, ...]
    machine: str
    cpu: str
    emulated_cpu: str
    parameters: tuple[str, ...]
    probe: Probe
    package: str
    bare: bool


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one architecture is called by whom.

    debian        Debian's name of it
    machine       what `uname -m`, rpm, libvirt and qemu's programs say
    kernel        the kernel's `ARCH`
    triplet       of the GNU tools, and of Debian's directories of libraries
    image         the boot image that the kernel's make builds and qemu loads
    console       the serial console of qemu's board
    efi           in names of EFI programs: `BOOT<efi>.EFI` in capitals, `linux<efi>.efi.stub`
    root_type     type of a root partition (Discoverable Partitions Specification)
    boot_loaders  Debian packages of boot loaders that start a kernel package's kernel
    qemu_options  of qemu's configure, for programs that run on it
    board         the board of qemu's that stands for a machine of it
    """

    debian: str
    machine: str
    kernel: str
    triplet: str
    image: str
    console: str
    efi: str
    root_type: str
    boot_loaders: str
    qemu_options: tuple[str, ...]
    board: Board

    @property
    def crossed(self) -> bool:
        """Whether steps that compile for it run on another architecture."""
        return self.debian != BUILD

    @property
    def cross_compile(self) -> str:
        """What the names of its compiler and linker begin with where they run on another architecture."""
        return f"{self.triplet}-" if self.crossed else ""

    @property
    def runner(self) -> str:
        """The program of the builder that runs its programs; empty where they run by themselves."""
        return f"qemu-{self.machine}" if self.crossed else ""

    @property
    def qemu_target(self) -> str:
        """The target of qemu's configure that emulates a machine of it."""
        return f"{self.machine}-softmmu"

    @property
    def qemu_system(self) -> str:
        """The program that runs or emulates a machine of it."""
        return f"qemu-system-{self.machine}"

    def builder(self, name: str) -> str:
        """The builder for it: its own beside the one that compiles for the machine on which steps run."""
        return f"{name}-{self.debian}" if self.crossed else name


ARCHITECTURES = {
    each.debian: each
    for each in (
        Architecture(
            debian="amd64",
            machine="x86_64",
            kernel="x86_64",
            triplet="x86_64-linux-gnu",
            image="bzImage",
            console="ttyS0",
            efi="x64",
            root_type="4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
            boot_loaders="grub-efi-amd64 | grub-pc | systemd-boot",
            qemu_options=("--enable-avx2",),
            board=Board(
                name="q35",
                serial="isa-serial",
                # SeaBIOS, OVMF, the network boot ROMs
                firmware=(
                    "/usr/share/seabios/bios-256k.bin",
                    "/usr/share/OVMF/OVMF_CODE_4M.fd",
                    "/usr/share/OVMF/OVMF_VARS_4M.fd",
                    "/usr/share/qemu/efi-virtio.rom",
                    "/usr/share/qemu/efi-e1000e.rom",
                ),
                code="OVMF_CODE_4M.fd",
                variables="OVMF_VARS_4M.fd",
                # of -kernel, and of KVM without a TPR shadow
                option_roms=(
                    "kvmvapic.bin",
                    "linuxboot.bin",
                    "linuxboot_dma.bin",
                    "multiboot.bin",
                    "multiboot_dma.bin",
                    "pvh.bin",
                ),
                devices=("amd-iommu", "ide-hd", "intel-iommu", "isa-serial"),
                # no HPET, SMM, USB, SATA or legacy ports
                machine="q35,hpet=off,smm=off,vmport=off,usb=off,sata=off,smbus=off",
                cpu="host,migratable=off,+invtsc,+tsc-deadline,pmu=off,kvm-hint-dedicated=on,enforce",
                emulated_cpu="max,+invtsc",
                # At boot the kernel wants several timer interrupts within some 20 ms, or panics. On KVM it leaves that
                # test out; emulated on a busy machine it has to be told to.
                parameters=("no_timer_check",),
                # mov al,16; out 0xf4,al; hlt at the reset vector: the exit device's status is 16 * 2 + 1
                probe=Probe(
                    position=65520,
                    code=r"\xb0\x10\xe6\xf4\xf4",
                    options="-machine q35 -device isa-debug-exit,iobase=0xf4,iosize=1",
                    status=33,
                ),
                package="qemu-system-x86",
                bare=False,
            ),
        ),
        Architecture(
            debian="arm64",
            machine="aarch64",
            kernel="arm64",
            triplet="aarch64-linux-gnu",
            image="Image",
            console="ttyAMA0",
            efi="aa64",
            root_type="b921b045-1df0-41c3-af44-4c6f280d3fae",
            boot_loaders="grub-efi-arm64 | systemd-boot",
            qemu_options=(),
            board=Board(
                name="virt",
                serial="system-serial",
                # UEFI of EDK II, the network boot ROMs
                firmware=(
                    "/usr/share/AAVMF/AAVMF_CODE.no-secboot.fd",
                    "/usr/share/AAVMF/AAVMF_VARS.fd",
                    "/usr/share/qemu/efi-virtio.rom",
                    "/usr/share/qemu/efi-e1000e.rom",
                ),
                code="AAVMF_CODE.no-secboot.fd",
                variables="AAVMF_VARS.fd",
                option_roms=(),
                devices=("virtio-iommu-pci",),
                # the interrupt controller is the newest that KVM, or qemu, has
                machine="virt,gic-version=max,usb=off",
                cpu="host,pmu=off",
                # a server's core without pointer authentication and SVE, which take long to emulate
                emulated_cpu="neoverse-n1",
                parameters=(),
                # movz w0,#0x8400,lsl 16; movk w0,#8; hvc #0 where execution starts: PSCI's SYSTEM_OFF ends qemu
                probe=Probe(
                    position=0,
                    code=r"\x00\x80\xb0\x52\x00\x01\x80\x72\x02\x00\x00\xd4",
                    options="-machine virt,gic-version=max",
                    status=0,
                ),
                package="qemu-system-arm",
                bare=True,
            ),
        ),
    )
}


#: One of them, by Debian's name, in recipes.
if TYPE_CHECKING:
    Arch = str
else:
    Arch = Literal[tuple(ARCHITECTURES)]


def architecture(name: str) -> Architecture:
    """The table's row of that Debian architecture."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        raise UserError(
            f"architecture {name} is not supported", f"use one of: {', '.join(ARCHITECTURES)}"
        ) from None
