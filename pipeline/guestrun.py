"""A guest that runs at a person's desk: started from the current artifacts, its console on the terminal, and ended.

qemu never outlives doit. It is ended when doit is told to end, and the kernel kills it when doit is killed
(PR_SET_PDEATHSIG, by way of `setpriv`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline import guestrecord
from pipeline.emulator import Emulator
from pipeline.errors import InternalError, RedError, UserError
from pipeline.files import file_lock
from pipeline.guestmachine import Machine, escape
from pipeline.qmp import ClosedError, Control

#: Seconds that a guest whose disk is kept may take to shut down, and that qemu may take to end.
SHUTDOWN, QUIT = 60.0, 5.0
#: Starts what follows, so that it dies with us; `$0` is our process, which may have died before the kernel was asked.
_WITH_US = ("setpriv", "--pdeathsig", "KILL", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"')

Tell = Callable[[str], None]


class GuestRun:
    """One run of a guest."""

    def __init__(self, machine: Machine, emulator: Emulator, checkout: Path, tell: Tell) -> None:
        """Of the guest's `machine` in `emulator`; `checkout` is the one whose artifacts are run."""
        self._machine, self._emulator, self._checkout, self._tell = machine, emulator, checkout, tell
        self._released = False

    def run(self) -> None:
        """Run until the guest powers off, a person leaves the console, or a signal comes."""
        machine, emulator = self._machine, self._emulator
        for program in ("setpriv", "sh"):
            if shutil.which(program) is None:
                raise UserError(f"{program} is not installed", "apt-get install util-linux dash")
        with guestrecord.place(os.environ) as (place, lock), self._disk() as disk:
            machine.make_keys(place)
            for name in (guestrecord.SYSTEM_MAP, guestrecord.VMLINUX):
                if (machine.kernel / name).is_file():  # a build may replace them while the guest runs
                    shutil.copyfile(machine.kernel / name, place / name)
            why = emulator.kvm()
            arguments = [*machine.arguments(emulator, place, kvm=not why), *disk]
            self._say(f"emulated, without KVM: {why}" if why else "with KVM")
            command = [*_WITH_US, str(os.getpid()), *emulator.command, *arguments]
            asleep = subprocess.DEVNULL if machine.asked.console else None
            with _terminal(), subprocess.Popen(command, stdin=asleep, pass_fds=(lock,)) as process:
                try:
                    self._begin(process, place)
                    status = process.wait()
                except BaseException:
                    self._end(process, place)
                    raise
        if status:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise RedError(f"{machine.name}: qemu {how}", "its message, if it left one, is above")

    def _begin(self, process: subprocess.Popen[bytes], place: Path) -> None:
        """Wait for qemu, tell where the guest is found, and let it run."""
        machine = self._machine
        try:
            with Control(place / guestrecord.CONTROL, lambda: process.poll() is None) as control:
                # slirp's own list: a port that the kernel chose stands nowhere else
                said = control.ask("human-monitor-command", **{"command-line": "info usernet"})
                found = re.search(r"\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", said)
                if found is None:
                    raise InternalError(f"qemu does not tell its ports: {said!r}")
                machine.write_ssh_config(place, port := int(found[1]))
                record = guestrecord.Record(
                    guest=machine.name,
                    platform=machine.guest.platform,
                    checkout=str(self._checkout),
                    arch=machine.platform.arch,
                    release=(machine.kernel / "kernelrelease").read_text().strip(),
                    qemu=process.pid,
                    ssh_port=port,
                )
                guestrecord.write(place, record)
                debugger = f"doit gdb:{machine.name}"
                self._say(
                    f"ssh at port {port} of the loopback: doit ssh:{machine.name}; "
                    + (f"waits for {debugger}; " if machine.asked.stopped else f"debugger: {debugger}; ")
                    + f"to end it: {'kill' if machine.asked.console else 'Ctrl-A X'}"
                )
                if not machine.asked.stopped:
                    control.ask("cont")
                    self._released = True
        except ClosedError as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(QUIT)
            raise UserError(
                f"{machine.name} did not start: {error.message}", "qemu's own message is above"
            ) from None

    def _end(self, process: subprocess.Popen[bytes], place: Path) -> None:
        """End qemu; a guest whose disk is kept is asked first."""
        if self._machine.asked.keep and self._released and process.poll() is None:
            self._say(f"shutting down, for {SHUTDOWN:g} s at most; a second signal does not wait")
            with contextlib.suppress(ClosedError, InternalError, subprocess.TimeoutExpired):
                with Control(place / guestrecord.CONTROL, lambda: False) as control:
                    control.ask("system_powerdown")
                process.wait(SHUTDOWN)
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(QUIT)
        if process.poll() is None:
            process.kill()

    @contextlib.contextmanager
    def _disk(self) -> Iterator[list[str]]:
        """qemu's arguments for the disk. What is built is never written, but a file over it."""
        built, keep = escape(self._machine.disk), self._machine.asked.keep
        device = ["-device", "virtio-blk-pci,drive=disk,bootindex=1"]
        if keep is None:  # qemu's own, which has no name
            yield ["-drive", f"if=none,id=disk,format=qcow2,snapshot=on,file={built}", *device]
            return
        keep.parent.mkdir(parents=True, exist_ok=True)
        lock = file_lock(keep.with_name(f"{keep.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            raise UserError(
                f"{keep} is written by another run of {self._machine.name}",
                "end that one, or leave out --keep",
            ) from None
        try:
            if not keep.exists():
                new = keep.with_name(f"{keep.name}.new")
                new.unlink(missing_ok=True)
                make = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(self._machine.disk), str(new)]
                subprocess.run([*self._emulator.image, *make], check=True, stdin=subprocess.DEVNULL)
                new.rename(keep)
            self._say(f"its disk is kept: {keep}")
            # the file below it may lie elsewhere by now, with the same content
            below = f"backing.driver=qcow2,backing.file.driver=file,backing.file.filename={built}"
            yield ["-drive", f"if=none,id=disk,format=qcow2,file={escape(keep)},{below}", *device]
        finally:
            lock.release()

    def _say(self, text: str) -> None:
        self._tell(f"{self._machine.name}: {text}")


@contextlib.contextmanager
def _terminal() -> Iterator[None]:
    """Give the terminal back as it was: a qemu that is killed leaves it raw."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
