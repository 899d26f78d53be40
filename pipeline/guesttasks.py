"""The tasks about a guest that runs from this checkout: `run:GUEST`, `ssh:GUEST` and `gdb:GUEST`.

They hand the terminal over, so each stands alone, behind doit's own options: what follows its name are its words.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pipeline import guestrecord, symbolfile
from pipeline.emulator import Emulator, board, bring, distributions
from pipeline.errors import UserError
from pipeline.face import Face, Option, session, typed_after
from pipeline.guestmachine import SHARE_DEVICE, SHARED_AT, Asked, Machine
from pipeline.guestrun import GuestRun
from pipeline.image import DISK, image_name
from pipeline.tasks import GDB, RUN, SSH, guest_needs

#: Makes products, as `doit run` does; its exit status.
Make = Callable[[list[str]], int]
#: Seconds that `ssh:` waits for a guest that has just been started, and for one answer of it.
PATIENCE, ANSWER = 300.0, 2.0


def guest_task(args: list[str], make: Make) -> GuestTask | None:
    """The task about a guest that these arguments of `doit run` ask for, if they do."""
    kinds: dict[str, type[GuestTask]] = {RUN: RunGuest, SSH: SshGuest, GDB: GdbGuest}
    for at, name in enumerate(args):
        kind, colon, guest = name.partition(":")
        if not colon or kind not in kinds:
            continue
        known = session().project.recipes.guests
        if guest not in known:
            named = ", ".join(f"{kind}:{each}" for each in known)
            raise UserError(f"{name} names no guest", f"write one of: {named}")
        before = args[:at]
        if any(not each.startswith("-") and not each.isdigit() for each in before):
            raise UserError(f"{name} stands alone: it takes the terminal", f"write: doit {name}")
        return kinds[kind](guest, typed_after(name, args), before, make)
    return None


class GuestTask(Face):
    """A task about one guest; `words` are those behind its name."""

    kind = ""

    def __init__(self, guest: str, words: list[str], options: list[str], make: Make) -> None:
        """`options` are doit's own, for `make`, which makes products before the task begins."""
        super().__init__()
        self.guest, self.words, self.options, self.make = guest, words, options, make
        self.name = f"{self.kind}:{guest}"

    def none(self, args: list[str]) -> None:
        """Refuse words that mean nothing here."""
        if args:
            raise UserError(f"{self.name} takes no {args[0]}", f"doit {self.name} --help")

    def found(self, run: str) -> guestrecord.Running:
        """The run of the guest; `run` is its name, empty for the only one."""
        project = session().project
        return guestrecord.one(project.environ, project.root, self.guest, run)


def _option(name: str, long: str, what: type, default: Any, text: str) -> Option:
    return {"name": name, "short": "", "long": long, "type": what, "default": default, "help": text}


WHICH = _option("run", "run", str, "", "which run, where there are several: the name that is shown then")


class RunGuest(GuestTask):
    """`doit run:GUEST`."""

    kind = RUN
    doc_purpose = "boot the guest from the current artifacts, its console on this terminal"
    doc_usage = "[--share DIR] [--ssh-port N] [--keep] [--console FILE] [--stopped] [--append TEXT]"
    doc_description = (
        "On the terminal, Ctrl-A X ends it and Ctrl-C goes to the guest. SIGINT, SIGTERM or SIGHUP to doit end it too, "
        "as Ctrl-C does while the guest is built, or where the console is a file. qemu does not outlive doit."
    )
    cmd_options = (
        _option("share", "share", str, "", f"a directory that the guest has at {SHARED_AT}"),
        _option(
            "ssh_port", "ssh-port", int, 0, "port of the loopback that leads to its ssh (any that is free)"
        ),
        _option("keep", "keep", bool, False, "keep what the guest writes to its disk, for the next --keep"),
        _option("console", "console", str, "", "a file for its console, in place of this terminal"),
        _option("stopped", "stopped", bool, False, "do not let it begin: doit gdb:GUEST does"),
        _option("append", "append", str, "", "more for the kernel's command line"),
    )

    def perform(self, params: dict[str, Any], args: list[str]) -> int:
        """Make what is stale, then run."""
        self.none(args)
        current = session()
        project, share = current.project, Path(params["share"]) if params["share"] else None
        if share is not None and not share.is_dir():
            raise UserError(f"--share {share} is not a directory", "name one that is there")
        if not 0 <= params["ssh_port"] <= 65535:
            raise UserError(f"--ssh-port {params['ssh_port']} is no port", "name one from 1 to 65535")
        if params["console"] and not Path(params["console"]).resolve().parent.is_dir():
            raise UserError(f"--console {params['console']}: no such directory", "make it")
        if status := self.make([*self.options, *guest_needs(project, self.guest)]):
            return status
        guest = project.recipes.guests[self.guest]
        platform = project.recipes.platforms[guest.platform]
        asked = Asked(
            share=share and share.resolve(),
            ssh_port=params["ssh_port"],
            keep=self._kept() if params["keep"] else None,
            console=Path(params["console"]).resolve() if params["console"] else None,
            stopped=params["stopped"],
            append=params["append"],
        )
        kernel, image = (self._place(name) for name in guest_needs(project, self.guest)[:2])
        machine = Machine(self.guest, guest, platform, kernel, image, asked)
        for what in machine.left_out():
            current.display.note(
                f"{self.guest} runs without the {what}: doit measure and the launch scripts have them"
            )
        GuestRun(machine, self._emulator(machine), project.root, current.display.say).run()
        return 0

    def _place(self, name: str) -> Path:
        project = session().project
        return project.artifacts.directory(project.graph[name])

    def _kept(self) -> Path:
        """Where the disk's changes are kept: by the disk's content, over another they would be garbage."""
        project = session().project
        digest = self._manifest(image_name(self.guest))["outputs"][DISK]
        state = project.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        platform = project.recipes.guests[self.guest].platform
        return Path(state) / "virt-rt" / platform / self.guest / f"run-{digest[:12]}.qcow2"

    def _manifest(self, name: str) -> dict[str, Any]:
        project = session().project
        manifest = project.artifacts.manifest(project.graph[name])
        if manifest is None:
            raise UserError(f"{name} has no manifest", f"doit {name} makes it")
        return manifest

    def _emulator(self, machine: Machine) -> Emulator:
        """The emulator for this machine, the distribution's where only that one has what is asked for."""
        project, platform, arch = session().project, machine.guest.platform, machine.platform.arch
        name = guest_needs(project, self.guest)[2]
        key = self._manifest(name)["key"]
        emulator = bring(platform, arch, self._place(name), key, project.root / "artifacts")
        if machine.asked.share is not None:
            if missing := machine.without():
                raise UserError(
                    f"--share: the kernel of {self.guest} was built without {', '.join(missing)}",
                    f"add {' '.join(f'{symbol}=y' for symbol in missing)} to kernel-configs/{platform}/guest-config",
                )
            if not emulator.has(SHARE_DEVICE):
                others = distributions(board(arch))
                if others is None or not others.has(SHARE_DEVICE):
                    raise UserError(
                        f"--share: no {board(arch).program} here has {SHARE_DEVICE}",
                        f"apt-get install {board(arch).package} qemu-utils",
                    )
                emulator = others
        if emulator.distributions:
            session().display.note(f"{emulator.command[0]} is used, not qemu of {platform}")
        return emulator


class SshGuest(GuestTask):
    """`doit ssh:GUEST`."""

    kind = SSH
    doc_purpose = "log into the guest, which runs, or run a command in it; the status is ssh's"
    doc_usage = "[--run NAME] [--config] [COMMAND...]"
    doc_description = "Waits for a guest that has just been started."
    cmd_options = (
        WHICH,
        _option("config", "config", bool, False, "print the path of its ssh_config: scp -F PATH FILE GUEST:"),
    )

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Become ssh."""
        run = self.found(params["run"])
        config = run.directory / guestrecord.SSH_CONFIG
        if params["config"]:
            print(config)
            return
        self._wait(run)
        become(["ssh", "-F", str(config), "--", self.guest, *args], "openssh-client")

    def _wait(self, run: guestrecord.Running) -> None:
        """Wait until the guest's sshd greets: qemu takes connections before there is one."""
        until, told = time.monotonic() + PATIENCE, False
        while not _greets(run.record.ssh_port):
            if run.ended():
                raise UserError(f"{self.guest} has ended", f"doit {RUN}:{self.guest} starts it")
            if time.monotonic() > until:
                raise UserError(f"{self.guest} has no sshd after {PATIENCE:g} s", "look at its console")
            if not told:
                print(f"{self.guest}: waiting for its sshd", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.3)


class GdbGuest(GuestTask):
    """`doit gdb:GUEST`."""

    kind = GDB
    doc_purpose = "debug the guest's kernel while it runs; the status is gdb's"
    doc_usage = "[--run NAME] [-- ARGUMENTS FOR gdb]"
    doc_description = "The guest is stopped meanwhile, and goes on when gdb quits."
    cmd_options = (WHICH,)

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Become gdb, connected to qemu."""
        run = self.found(params["run"])
        kernel = run.directory / guestrecord.VMLINUX
        if not kernel.is_file():
            kernel = run.directory / "symbols"
            symbolfile.write(run.directory / guestrecord.SYSTEM_MAP, run.record.arch, kernel)
            session().display.note(
                f"{run.record.release} has no vmlinux: functions are known by name, not lines and variables"
            )
        target = f"target remote {run.directory / guestrecord.GDB}"
        become(["gdb", "-q", str(kernel), "-ex", target, *args], "gdb")


def _greets(port: int) -> bool:
    """Whether an sshd answers there."""
    try:
        with socket.create_connection(("127.0.0.1", port), ANSWER) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def become(command: list[str], package: str) -> NoReturn:
    """Be another program from now on: keys and signals are its own, and nothing of ours is left behind."""
    program = shutil.which(command[0])
    if program is None:
        raise UserError(f"{command[0]} is not installed", f"apt-get install {package}")
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and it would stay so
    os.execv(program, command)  # noqa: S606 - our own list, and no shell is between
