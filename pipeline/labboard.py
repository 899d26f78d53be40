"""The lab's emulated board: what it is made of, how the host on its disk is started, and how its run is watched.

Runs inside the lab's steps, standard library only. The host's disk boots as on a machine: firmware, GRUB from the EFI
system partition, the entry that GRUB's menu says. A step never writes the disk that it was given, but one laid over it.
"""

from __future__ import annotations

import base64
import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: What qemu says of each feature of the CPU model that it does not emulate, for each CPU.
NOISE = "warning: TCG doesn't support requested feature"

#: Size of the file in which GRUB keeps what it starts the next time, bytes; GRUB knows no other.
ENVIRONMENT = 1024


@dataclass(frozen=True, slots=True)
class Run:
    """How a run of the board went.

    answers  all that came over the host's port
    ended    how, and empty when the host powered itself off
    total    seconds
    at       when each answer came, seconds since the start
    """

    answers: bytes
    ended: str
    total: float
    at: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Host:
    """The host's disk for one run: qemu's programs and firmware, and what is written instead of the disk itself.

    `built` is where the product `qemu` lies; `disk` is never written; `work` is a directory of this run's own.
    """

    built: Path
    disk: Path
    work: Path

    @property
    def written(self) -> Path:
        """The disk that is laid over the other, and written."""
        return self.work / "host.qcow2"

    @property
    def qemu(self) -> Path:
        """The emulator."""
        return self.built / "bin" / "qemu-system-x86_64"

    def lay_over(self) -> None:
        """Make what this run writes: the disk as it was given, and firmware that has nothing saved."""
        with self.disk.open("rb"):  # qemu-img would name its own file, not this one
            pass
        make = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(self.disk), str(self.written)]
        self._image(*make)
        shutil.copyfile(self.built / "share/qemu/OVMF_VARS_4M.fd", self.work / "firmware-variables.fd")

    def choose(self, entry: str, offset: int) -> None:
        """Have GRUB start another entry than its default, once, as `grub-reboot` does.

        `entry` is an id, that of an entry in a submenu behind the submenu's and `>`; `offset` is where the file
        of GRUB's environment lies on the disk, in bytes. ValueError when no such file is there.
        """
        block = self.work / "grub-environment"
        self._io(f"read -v {offset} 512", expect=b"# GRUB Environment Block\n")
        text = f"# GRUB Environment Block\nnext_entry={entry}\n".encode()
        if len(text) > ENVIRONMENT:
            raise ValueError(f"no boot entry has an id of {len(entry)} characters")
        block.write_bytes(text.ljust(ENVIRONMENT, b"#"))
        self._io(f"write -s {block} {offset} {ENVIRONMENT}")

    def arguments(self) -> list[str]:
        """qemu's arguments for firmware and disk."""
        code = self.built / "share/qemu/OVMF_CODE_4M.fd"
        return [
            *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}"),
            *("-drive", f"if=pflash,unit=1,format=raw,file={self.work / 'firmware-variables.fd'}"),
            *("-drive", f"if=none,id=disk,format=qcow2,cache=unsafe,discard=unmap,file={self.written}"),
            *("-device", "virtio-blk-pci,drive=disk,bootindex=1"),
        ]

    def flatten(self, target: Path) -> None:
        """Write one compressed disk of what this run left."""
        options = ["-c", "-O", "qcow2", "-o", "compression_type=zstd"]
        self._image("convert", *options, str(self.written), str(target))

    def _image(self, *arguments: str) -> None:
        subprocess.run([self.built / "bin/qemu-img", *arguments], check=True, stdin=subprocess.DEVNULL)

    def _io(self, command: str, expect: bytes = b"") -> None:
        """One command of qemu-io, which tells of failures in its text alone."""
        program = [str(self.built / "bin/qemu-io"), "-f", "qcow2", "-c", command, str(self.written)]
        said = subprocess.run(
            program, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        ).stdout
        # Each line of a dump: where, 16 bytes in hexadecimal digits, and as characters where they are letters.
        dump = [
            line.partition(":")[2].split()[:16]
            for line in said.splitlines()
            if re.match("[0-9a-f]{8,}:", line)
        ]
        found = bytes.fromhex("".join(digits for line in dump for digits in line))
        if not found.startswith(expect) or " bytes at offset " not in said:
            raise ValueError(f"GRUB's environment is not where it should be: qemu-io {command}: {said[:200]}")


def board(
    machine: Iterable[str],
    host: Iterable[str],
    console: Path,
    ports: Mapping[str, Path],
    credentials: Iterable[Path] = (),
) -> list[str]:
    """qemu's arguments for the emulated board, without the program.

    machine      those of its CPUs and memory
    host         those of the host's own disk, and of what else only this run has
    console      the file that gets what the host writes to its serial console
    ports        virtio-serial ports by name, and the file that gets what the host writes to each
    credentials  files as `credential` makes them, for the host's systemd

    AMD-V with an invariant TSC, without which KVM refuses to work on an RT kernel, behind Intel's IOMMU, which
    remaps interrupts under emulation. Each root port gets the bus of its place in the list: the NIC with virtual
    functions is 0000:01:00.0, `edu`, a device that stands for any other, 0000:02:00.0.
    """
    arguments = [
        *("-accel", "tcg,thread=multi", "-machine", "q35,kernel-irqchip=split,hpet=off,smbus=off"),
        *("-cpu", "EPYC-v3,+svm,+npt,+invtsc", "-device", "intel-iommu,intremap=on"),
        *machine,
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *host,
        *("-device", "pcie-root-port,id=port1,chassis=1,slot=1", "-device", "igb,bus=port1,romfile="),
        *("-device", "pcie-root-port,id=port2,chassis=2,slot=2", "-device", "edu,bus=port2"),
        *("-serial", f"file:{console}", "-device", "virtio-serial-pci"),
    ]
    for path in credentials:
        arguments += ["-smbios", f"type=11,path={path}"]
    for number, (name, path) in enumerate(ports.items()):
        arguments += ["-chardev", f"file,id=port{number}of,path={path}"]
        arguments += ["-device", f"virtserialport,chardev=port{number}of,name={name}"]
    return arguments


def credential(name: str, text: str) -> bytes:
    """A systemd credential as an SMBIOS string (systemd.system-credentials(7))."""
    return f"io.systemd.credential.binary:{name}={base64.b64encode(text.encode()).decode()}".encode()


def run(arguments: list[str], answers: Path, messages: Path, limit_s: float) -> Run:
    """Run the board until its host powers off or `limit_s` seconds are over.

    `answers` is the file of the port on which the host answers, a line each; `messages` gets qemu's own.
    """
    answers.write_bytes(b"")
    started, ended = time.monotonic(), ""
    at: dict[str, float] = {}

    def look() -> None:
        # A line per answer, so that a reader of the log sees how far it is.
        for line in answers.read_bytes().split(b"\n")[len(at) : -1]:
            name = line[:40].decode(errors="replace").split(" ")[0]
            # An answer that comes twice, which is for the verdict to refuse, is a line of its own here.
            at[name if name not in at else f"{name} {len(at)}"] = round(time.monotonic() - started, 1)
            print(f"{time.monotonic() - started:4.0f} s: {name}", flush=True)

    with (
        messages.open("w+b") as said,
        subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=said, stderr=said) as process,
    ):
        while process.poll() is None:
            look()
            if time.monotonic() - started > limit_s:
                ended = f"not finished after {limit_s:g} s"
                process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.3)
        look()
        said.seek(0)
        for text in said.read().decode(errors="replace").splitlines():
            if NOISE not in text:
                print(text, file=sys.stderr)
    if not ended and process.returncode:
        how = f"was killed by signal {-process.returncode}" if process.returncode < 0 else ""
        ended = f"qemu {how or f'ended with status {process.returncode}'}"
    return Run(answers.read_bytes(), ended, time.monotonic() - started, at)
