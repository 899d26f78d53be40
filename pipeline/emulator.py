"""The emulator that guests are run with on this machine: the platform's own, else the distribution's.

The platform's own is that of its package, which brings its libraries and its loader: what lies in `artifacts/` is
linked to the libraries of its builder, which this machine need not have.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import random_word, remove_tree

#: Below `artifacts/`: packages' emulators, unpacked.
UNPACKED = ".emulator"
#: Seconds that a question to qemu may take.
PATIENCE = 20
KVM_DEVICE = Path("/dev/kvm")
#: mov al,16; out 0xf4,al: the exit device then ends qemu with status 16 * 2 + 1.
_FIRST_INSTRUCTIONS, _THEIR_STATUS = b"\xb0\x10\xe6\xf4\xf4", 33


@dataclass(frozen=True, slots=True)
class Board:
    """What qemu emulates for the guests of an architecture.

    program    qemu's
    package    Debian's package with it
    machine    its `-machine`: nothing that the guest would probe, poll or be interrupted by
    parameters of the kernel, for a guest without KVM: at boot the kernel wants several timer interrupts within some
               20 ms, or panics; emulated on a busy machine it has to be told not to
    native     what `uname -m` says on machines whose KVM runs such guests
    """

    program: str
    package: str
    machine: str
    parameters: tuple[str, ...]
    native: str


#: By Debian's name of the architecture.
BOARDS = {
    "amd64": Board(
        program="qemu-system-x86_64",
        package="qemu-system-x86",
        machine="q35,hpet=off,smm=off,vmport=off,usb=off,sata=off,smbus=off",
        parameters=("no_timer_check",),
        native="x86_64",
    ),
}


@dataclass(frozen=True, slots=True)
class Emulator:
    """A qemu that runs on this machine.

    command    what starts it
    image      what starts its qemu-img
    cpu        the emulated CPU, when there is no KVM
    distributions   whether it is the distribution's
    """

    board: Board
    command: tuple[str, ...]
    image: tuple[str, ...]
    cpu: str
    distributions: bool

    def has(self, device: str) -> bool:
        """Whether it was built with a device."""
        return _status(*self.command, "-machine", "none", "-device", f"{device},help") == 0

    def kvm(self, device: Path = KVM_DEVICE) -> str:
        """Why guests cannot have KVM here; nothing when they can.

        The device's existence says little, so five bytes are run at the reset vector.
        """
        if platform.machine() != self.board.native:
            return f"this machine is {platform.machine()}"
        if not os.access(device, os.R_OK | os.W_OK):
            return f"{device} is missing, or not yours to open"
        with tempfile.NamedTemporaryFile() as rom:
            rom.write(bytes(0xFFF0) + _FIRST_INSTRUCTIONS.ljust(16, b"\0"))
            rom.flush()
            options = [*("-accel", "kvm", "-cpu", "host", "-machine", "q35", "-m", "16M", "-nodefaults")]
            options += ["-display", "none", "-bios", rom.name]
            options += ["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
            status = _status(*self.command, *options)
        return "" if status == _THEIR_STATUS else f"a first instruction did not run (status {status})"


def board(arch: str) -> Board:
    """The board of an architecture, by Debian's name."""
    try:
        return BOARDS[arch]
    except KeyError:
        raise UserError(f"guests of {arch} are not run", f"run one of: {', '.join(BOARDS)}") from None


def bring(name: str, arch: str, package: Path, key: str, artifacts: Path) -> Emulator:
    """The emulator for guests of the platform `name`.

    `package` is the directory of the product that has the platform's own as a deb, `key` that product's;
    `artifacts` is where it is unpacked, once for each key.
    """
    of = board(arch)
    there = _unpacked(name, package, key, artifacts / UNPACKED)
    loaders = sorted(there.glob("lib/ld-*.so*"))
    if len(loaders) == 1 and (there / "bin" / of.program).is_file():
        start = (str(loaders[0]), str(there / "bin" / of.program), "-L", str(there / "share" / "qemu"))
        image = (str(loaders[0]), str(there / "bin" / "qemu-img"))
        if _status(*start, "--version") == 0:
            return Emulator(of, start, image, "max,+invtsc", distributions=False)
    found = distributions(of)
    if found is None:
        raise UserError(
            f"qemu of {name} does not run on this machine, and there is no {of.program}",
            f"apt-get install {of.package} qemu-utils",
        )
    return found


def distributions(of: Board) -> Emulator | None:
    """The distribution's own emulator, when it is installed."""
    program, image = shutil.which(of.program), shutil.which("qemu-img")
    if program is None or image is None:
        return None
    return Emulator(of, (program,), (image,), "max", distributions=True)


def _unpacked(name: str, package: Path, key: str, above: Path) -> Path:
    """The emulator's directory out of the package; guests that still run keep the files of an earlier one open."""
    target = above / f"{name}-{key[:12]}"
    if not target.is_dir():
        debs = sorted((package / "deb").glob("*.deb"))
        if len(debs) != 1:
            raise UserError(f"{package} has {len(debs)} debs, not one", "remove it, and run doit again")
        above.mkdir(parents=True, exist_ok=True)
        part = above / f".{name}-{random_word()}"
        try:
            done = subprocess.run(
                ["dpkg-deb", "-x", debs[0], part], capture_output=True, text=True, check=False
            )
            found = [path for path in part.glob("opt/virt-rt/*/qemu") if path.is_dir()]
            if done.returncode or len(found) != 1:
                said = " ".join(done.stderr.split()) or "it has no qemu"
                raise UserError(f"{debs[0].name} cannot be unpacked: {said}", "remove it, and run doit again")
            for old in above.glob(f"{name}-*"):
                remove_tree(old)
            found[0].rename(target)
        except FileNotFoundError:
            raise UserError("dpkg-deb is not installed", "apt-get install dpkg") from None
        finally:
            if part.exists():
                remove_tree(part)
    return target


def _status(*command: str) -> int:
    """The exit status of a question to qemu; 127 when there was no answer."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False
        ).returncode
    except (OSError, subprocess.TimeoutExpired):
        return 127
