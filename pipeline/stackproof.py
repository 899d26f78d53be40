"""Boots an emulated RT host in which a guest runs under KVM by its launch script, and has the gate judge it.

Runs inside the lab's builder, standard library only. Everything is what ships: the host kernel, the host's
tuning with plan and check tool, qemu, the guest's kernel, disk and launch script. Ours are the board, which
qemu emulates in software, the host's userland, and the script that acts in the host and tells what it sees over
a virtio-serial port.

Below `IN`: `rootfs.tar`, the host's userland; `host/` with the host kernel (`bzImage`, `kernelrelease`) and its
`modules/`; `tuning/root/`; `artifacts/<platform>/` as the products lie there, the launch scripts made for a guest
that is given the board's two devices; `virt-rt-stack*` of `recipes/lab/`; `expected.json`, the fields of
`stackgate.Expectations` but `guest_release` and `release`. Environment: `PLATFORM`; `STACK_TIMEOUT_SECONDS` for the
whole run, default `LIMIT_S`.

Leaves in `OUT` `stack.json`, `console-host.log` and `console-guest.log`, whatever happens in there. Exit status: 0
when every finding is fine, 1 when one is not, each named on stderr; 2 when the step was called wrongly.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    from pipeline import bootproof, gate, stackgate
except ImportError:  # in the step their files lie beside this one
    import bootproof  # type: ignore[import-not-found, no-redef]
    import gate  # type: ignore[import-not-found, no-redef]
    import stackgate  # type: ignore[import-not-found, no-redef]

#: Raised when the meaning of a field of stack.json changes.
SCHEMA = 1

IN, OUT, WORK = Path("/build/in"), Path("/build/out"), Path("/build/work")

#: Where a platform's artifacts are on a host, and where the lab's own files are on this one.
INSTALLED, LAB = "opt/virt-rt", "usr/libexec/virt-rt-stack"

#: Seconds for all of it, and for the boot of the guest within: some 300 and 150 were measured on two cores that had
#: other work, too.
LIMIT_S, BOOT_S = 1500, 600

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

#: What qemu says of each feature of the CPU model that it does not emulate, for each CPU.
NOISE = "warning: TCG doesn't support requested feature"

#: Lines of the host's console that are shown when the run ends badly.
TAIL = 20


@dataclass(frozen=True, slots=True)
class Run:
    """How it went: `answers` over the host's port; `ended`, empty when the host powered itself off; seconds."""

    answers: bytes
    ended: str
    total: float


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


def credential(name: str, text: str) -> bytes:
    """A systemd credential as an SMBIOS string (systemd.system-credentials(7))."""
    return f"io.systemd.credential.binary:{name}={base64.b64encode(text.encode()).decode()}".encode()


def lay_out(target: Path, platform: str, variables: dict[str, object]) -> None:
    """Write the tar of the host's root file system; `variables` are those of its script."""
    with contextlib.closing(Layout(IN / "rootfs.tar", target)) as layout:
        layout.tree(IN / "host" / "modules" / "lib", "usr/lib")
        layout.tree(IN / "artifacts", INSTALLED)
        layout.tree(IN / "tuning" / "root")
        for unit in sorted((IN / "tuning" / "root" / "usr/lib/systemd/system").glob("*.service")):
            layout.enable(unit.name, unit.read_text())
        for unit_name in MASKED:
            layout.link(f"etc/systemd/system/{unit_name}", "/dev/null")
        # Without one systemd would take this for a first boot, and ask.
        layout.file("etc/machine-id", b"6c61620076697274727400000000006c\n")
        layout.file("etc/hostname", f"{platform}-lab\n".encode())
        unit_text = (IN / "virt-rt-stack.service").read_text()
        layout.file("usr/lib/systemd/system/virt-rt-stack.service", unit_text.encode())
        layout.enable("virt-rt-stack.service", unit_text)
        settings = "".join(f"{name}={value}\n" for name, value in variables.items())
        layout.file("etc/virt-rt-stack.env", settings.encode())
        layout.file(f"{LAB}/host", (IN / "virt-rt-stack-host.sh").read_bytes(), executable=True)
        guest_unit = (IN / "virt-rt-stack-guest.service").read_text()
        layout.file(f"{LAB}/unit", credential("systemd.extra-unit.virt-rt-stack.service", guest_unit))
        dropin = "[Unit]\nWants=virt-rt-stack.service\n"
        layout.file(
            f"{LAB}/dropin", credential("systemd.unit-dropin.multi-user.target~virt-rt-stack", dropin)
        )
        agent = (IN / "virt-rt-stack-guest.sh").read_text()
        layout.file(f"{LAB}/guest", credential("virt-rt.stack", agent))


def make_disk(tar: Path, disk: Path) -> None:
    """A disk with nothing but an ext4 file system filled from a tar."""
    with disk.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-d", str(tar), str(disk)]
    subprocess.run(command, check=True, env=os.environ | {"LC_ALL": "C.UTF-8"})


def board(cpus: int, memory_mib: int, disk: Path, answers: Path) -> list[str]:
    """qemu's arguments for the emulated board.

    AMD-V with an invariant TSC, without which KVM refuses to work on an RT kernel, behind Intel's IOMMU, which
    remaps interrupts under emulation. Each root port gets the bus of its place in the list: the NIC with virtual
    functions is 0000:01:00.0, `edu`, a device that stands for any other, 0000:02:00.0.
    """
    return [
        *("-accel", "tcg,thread=multi", "-machine", "q35,kernel-irqchip=split,hpet=off,smbus=off"),
        *("-cpu", "EPYC-v3,+svm,+npt,+invtsc", "-device", "intel-iommu,intremap=on"),
        *("-smp", f"{cpus},sockets=1,cores={cpus},threads=1", "-m", f"{memory_mib}M"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-drive", f"if=none,id=disk,format=raw,cache=unsafe,file={disk}"),
        *("-device", "virtio-blk-pci,drive=disk"),
        *("-device", "pcie-root-port,id=port1,chassis=1,slot=1", "-device", "igb,bus=port1,romfile="),
        *("-device", "pcie-root-port,id=port2,chassis=2,slot=2", "-device", "edu,bus=port2"),
        *("-serial", f"file:{OUT / 'console-host.log'}", "-device", "virtio-serial-pci"),
        *("-chardev", f"file,id=answers,path={answers}"),
        *("-device", "virtserialport,chardev=answers,name=virt-rt.stack"),
        *("-chardev", f"file,id=guest,path={OUT / 'console-guest.log'}"),
        *("-device", "virtserialport,chardev=guest,name=virt-rt.console"),
    ]


def command_line(parameters: Iterable[str]) -> str:
    """The host kernel's: the plan's parameters, and what the board needs.

    `no_timer_check`: at boot the kernel wants several timer interrupts within some 20 ms, or panics; emulated on
    a busy machine they may be later.
    """
    return " ".join(["root=/dev/vda", "rw", "console=ttyS0", "no_timer_check", *parameters])


def boot(arguments: list[str], answers: Path, limit_s: float) -> Run:
    """Run the host until it powers off or time is up."""
    answers.write_bytes(b"")
    started, ended, told = time.monotonic(), "", 0
    with (
        (WORK / "messages").open("w+b") as messages,
        subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages) as process,
    ):
        while process.poll() is None:
            # A line per answer, so that a reader of the log sees how far it is.
            for line in answers.read_bytes().split(b"\n")[told:-1]:
                told += 1
                print(
                    f"{time.monotonic() - started:4.0f} s: {line[:40].decode(errors='replace').split(' ')[0]}"
                )
            sys.stdout.flush()
            if time.monotonic() - started > limit_s:
                ended = f"not finished after {limit_s:g} s"
                process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        messages.seek(0)
        for text in messages.read().decode(errors="replace").splitlines():
            if NOISE not in text:
                print(text, file=sys.stderr)
    if not ended and process.returncode:
        how = f"was killed by signal {-process.returncode}" if process.returncode < 0 else ""
        ended = f"qemu {how or f'ended with status {process.returncode}'}"
    return Run(answers.read_bytes(), ended, time.monotonic() - started)


def prove(platform: str, limit_s: float) -> tuple[list[gate.Finding], dict[str, Any]]:
    """Lay out the host, run it, judge it: the findings, and what is recorded beside them."""
    expected = stackgate.Expectations(
        **json.loads((IN / "expected.json").read_text()),
        release=(IN / "host" / "kernelrelease").read_text().strip(),
        guest_release=(IN / "artifacts" / platform / "kernel/guest/kernelrelease").read_text().strip(),
    )
    variables: dict[str, object] = {
        "BUILT": f"/{INSTALLED}/{platform}",
        "GUEST": expected.guest,
        "VCPU": expected.vcpu,
        "OTHER_CPU": expected.other_cpu,
        "PHYSICAL": expected.physical,
        "FUNCTION": expected.function,
        "BOOT_SECONDS": BOOT_S,
    }
    tar, disk, answers = WORK / "host.tar", WORK / "host.raw", WORK / "answers"
    lay_out(tar, platform, variables)
    make_disk(tar, disk)
    tar.unlink()
    qemu = IN / "artifacts" / platform / "qemu/bin/qemu-system-x86_64"
    arguments = [str(qemu), *board(expected.cpus, expected.memory_mib, disk, answers)]
    arguments += ["-kernel", str(IN / "host" / "bzImage"), "-append", command_line(expected.parameters)]
    run = boot(arguments, answers, limit_s)
    got = run.ended or "powered off"
    machine = gate.Finding("machine", "the host powers itself off", got, not run.ended)
    return [machine, *stackgate.judge(run.answers, expected)], {
        "seconds_total": round(run.total, 1),
        "told": stackgate.record(run.answers),
    }


def main() -> int:
    """Do it all; see the module for what is read and left."""
    for console in ("console-host.log", "console-guest.log"):
        (OUT / console).touch()
    try:
        platform = os.environ["PLATFORM"]
        limit_s = float(os.environ.get("STACK_TIMEOUT_SECONDS", LIMIT_S))
        findings, recorded = prove(platform, limit_s)
    except (KeyError, TypeError, ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"stack proof: {type(error).__name__}: {error}", file=sys.stderr)
        print("give the step all inputs and variables that its module names", file=sys.stderr)
        return 2
    ok = all(finding.ok for finding in findings)
    verdict = {
        "schema": SCHEMA,
        "platform": platform,
        "evidence": "emulated",
        "latency_verdict": "emulated: not evidence of latency",
        "ok": ok,
        "booted_sha256": bootproof.digests(IN / "artifacts" / platform),
        "findings": [asdict(finding) for finding in findings],
        **recorded,
    }
    (OUT / "stack.json").write_text(json.dumps(verdict, indent=2, sort_keys=True) + "\n")
    failed = [finding for finding in findings if not finding.ok]
    for finding in failed:
        print(f"{finding.name}: wanted {finding.wanted}; got {finding.got}", file=sys.stderr)
    if failed:
        log = (OUT / "console-host.log").read_text(errors="replace")
        for line in log.splitlines()[-TAIL:]:
            print(f"host: | {line}", file=sys.stderr)
    print(f"{len(findings) - len(failed)} of {len(findings)} fine in {recorded['seconds_total']:.0f} s")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
