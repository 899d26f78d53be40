"""The lab's emulated host: the disk that it boots from, and how it is booted. Runs inside the lab's step.

The disk is made here: Debian's userland, the host kernel's modules, the tuning, what was built below `/opt/virt-rt/`
and the guest's service, laid out as packages install them. Nothing of the lab is on it.

Below `IN`: `rootfs.tar`, the userland; `host/` with the host kernel (`bzImage`) and its `modules/`; `tuning/root/`;
`artifacts/<platform>/` as the products lie there; `service/`, files of the guest's package laid out from `/`.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

#: Where a platform's artifacts are on a host.
INSTALLED = "opt/virt-rt"

#: Size of the host's disk, MiB, mostly holes.
DISK_MIB = 2048

#: Units of Debian that only take time in a host that lives for minutes.
MASKED = (
    "getty@tty1.service",
    "ldconfig.service",
    "serial-getty@ttyS0.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
)

#: The plan's parameters that keep CPUs to guests: an entry without them boots a host without isolation.
ISOLATION = ("isolcpus", "nohz_full", "rcu_nocbs", "irqaffinity")


def host(inputs: Path, work: Path, platform: str, parameters: Iterable[str], isolated: bool) -> list[str]:
    """qemu's arguments for the host's disk and for what boots from it.

    `work` is where the disk is made; `parameters` are the plan's for the host kernel, left out unless `isolated`
    where they are about isolation. Raises ValueError, OSError or CalledProcessError when the disk cannot be made.
    """
    tar, disk = work / "host.tar", work / "host.raw"
    lay_out(inputs, tar, platform)
    make_disk(tar, disk)
    tar.unlink()
    kept = [each for each in parameters if isolated or each.partition("=")[0] not in ISOLATION]
    return [
        *("-drive", f"if=none,id=disk,format=raw,cache=unsafe,file={disk}"),
        *("-device", "virtio-blk-pci,drive=disk,bootindex=1"),
        *("-kernel", str(inputs / "host" / "bzImage"), "-append", command_line(kept)),
    ]


class Layout:
    """A tar of the host's root file system: the userland's, and what is laid over it."""

    def __init__(self, base: Path, target: Path) -> None:
        """Start with a copy of `base`."""
        shutil.copyfile(base, target)
        self._tar = tarfile.open(target, "a")
        self._names = {member.name.removeprefix("./").rstrip("/") for member in self._tar.getmembers()}

    def _add(self, place: str, entry: tarfile.TarInfo, content: bytes | None = None) -> None:
        if place in self._names:
            raise ValueError(f"/{place} is there twice: in the userland, or in two of the step's inputs")
        self._names.add(place)
        entry.name, entry.uid, entry.gid, entry.uname, entry.gname = f"./{place}", 0, 0, "", ""
        self._tar.addfile(entry, None if content is None else io.BytesIO(content))

    def _directories(self, place: str) -> None:
        parts = place.split("/")[:-1]
        for count in range(1, len(parts) + 1):
            directory = "/".join(parts[:count])
            if directory not in self._names:
                entry = tarfile.TarInfo()
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                self._add(directory, entry)

    def file(self, place: str, content: bytes, executable: bool = False) -> None:
        """A file of root's; `place` is its path without the first slash."""
        self._directories(place)
        entry = tarfile.TarInfo()
        entry.size, entry.mode = len(content), 0o755 if executable else 0o644
        self._add(place, entry, content)

    def link(self, place: str, target: str) -> None:
        """A symbolic link."""
        self._directories(place)
        entry = tarfile.TarInfo()
        entry.type, entry.mode, entry.linkname = tarfile.SYMTYPE, 0o777, target
        self._add(place, entry)

    def tree(self, source: Path, place: str = "") -> None:
        """All files and links below a directory, with their execute bits."""
        for path in sorted(source.rglob("*")):
            target = "/".join(filter(None, (place, path.relative_to(source).as_posix())))
            if path.is_symlink():
                self.link(target, str(path.readlink()))
            elif path.is_file():
                self.file(target, path.read_bytes(), bool(path.stat().st_mode & 0o100))

    def enable(self, unit: str, text: str) -> None:
        """What `systemctl enable` does, for a unit with that text."""
        for line in text.splitlines():
            name, _, value = line.partition("=")
            for wanting in value.split() if name.strip() == "WantedBy" else ():
                self.link(f"etc/systemd/system/{wanting}.wants/{unit}", f"/usr/lib/systemd/system/{unit}")

    def close(self) -> None:
        """Write the end of the tar."""
        self._tar.close()


def lay_out(inputs: Path, target: Path, platform: str) -> None:
    """Write the tar of the host's root file system."""
    with contextlib.closing(Layout(inputs / "rootfs.tar", target)) as layout:
        layout.tree(inputs / "host" / "modules" / "lib", "usr/lib")
        layout.tree(inputs / "artifacts", INSTALLED)
        layout.tree(inputs / "service")
        layout.tree(inputs / "tuning" / "root")
        for unit in sorted((inputs / "tuning" / "root" / "usr/lib/systemd/system").glob("*.service")):
            layout.enable(unit.name, unit.read_text())
        for unit_name in MASKED:
            layout.link(f"etc/systemd/system/{unit_name}", "/dev/null")
        # Without one systemd would take this for a first boot, and ask.
        layout.file("etc/machine-id", b"6c61620076697274727400000000006c\n")
        layout.file("etc/hostname", f"{platform}-lab\n".encode())


def make_disk(tar: Path, disk: Path) -> None:
    """A disk with nothing but an ext4 file system filled from a tar."""
    with disk.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-d", str(tar), str(disk)]
    subprocess.run(command, check=True, env=os.environ | {"LC_ALL": "C.UTF-8"})


def command_line(parameters: Iterable[str]) -> str:
    """The host kernel's: the plan's parameters, and what the board needs.

    `no_timer_check`: at boot the kernel wants several timer interrupts within some 20 ms, or panics; emulated on
    a busy machine they may be later.
    """
    return " ".join(["root=/dev/vda", "rw", "console=ttyS0", "no_timer_check", *parameters])
