"""The machine that a guest gets at a person's desk: qemu's arguments, and what is added to the guest for one run.

The board and the memory are the recipe's; the rest of the recipe that is for real hosts (pins, huge pages, tap devices,
devices passed through, further disks) is left out. What a run adds to the image (a shell on the console, keys for ssh,
the share) are credentials for the guest's systemd (systemd.system-credentials(7)): the disk stays as it was built.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pipeline import guestrecord
from pipeline.architecture import architecture
from pipeline.emulator import Emulator
from pipeline.errors import UserError
from pipeline.image import DISK, command_line
from pipeline.labboard import credential
from pipeline.recipes import Guest, Platform, UserNetwork

#: What the guest kernel needs for a share, built in: nothing loads modules before its root is there.
SHARE_SYMBOLS = ("CONFIG_NETWORK_FILESYSTEMS", "CONFIG_NET_9P", "CONFIG_NET_9P_VIRTIO", "CONFIG_9P_FS")
#: qemu's device for it, its name, and where the guest has it.
SHARE_DEVICE, SHARE_TAG, SHARED_AT = "virtio-9p-pci", "share", "/share"
#: Key pairs of a run: the person's, and the guest's own.
KEY, HOST_KEY = "key", "host"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a person asks of a run.

    share     a directory that the guest gets
    ssh_port  a port of the loopback; 0 for any that is free
    keep      the file that keeps what the guest writes to its disk; None throws it away
    console   a file for the console, in place of the terminal
    stopped   do not let the guest begin: a debugger will
    append    more for the kernel's command line
    """

    share: Path | None = None
    ssh_port: int = 0
    keep: Path | None = None
    console: Path | None = None
    stopped: bool = False
    append: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """A guest's machine: its recipes, the directories of its kernel and its disk, and what is asked of this run."""

    name: str
    guest: Guest
    platform: Platform
    kernel: Path
    image: Path
    asked: Asked

    @property
    def disk(self) -> Path:
        """The disk as built."""
        return self.image / DISK

    def left_out(self) -> list[str]:
        """What the recipe asks of a real host, and a run does without."""
        guest, found = self.guest, []
        taps = [network for network in guest.networks if not isinstance(network, UserNetwork)]
        for what, there in (("tap networks", taps), ("devices", guest.devices), ("disks", guest.disks)):
            if there:
                found.append(f"{what} of the recipe")
        return found

    def without(self) -> list[str]:
        """The symbols that a share needs and that the built kernel lacks."""
        lines = set((self.kernel / "config").read_text().splitlines())
        return [symbol for symbol in SHARE_SYMBOLS if f"{symbol}=y" not in lines]

    def arguments(self, emulator: Emulator, place: Path, *, kvm: bool) -> list[str]:
        """qemu's arguments but the disk's; the machine is stopped. Writes the credentials into `place`."""
        asked, guest, board = self.asked, self.guest, emulator.board
        parameters = [command_line(guest, self.platform), *(() if kvm else board.parameters)]
        # a debugger may come at any time, and knows addresses as they were linked
        parameters += ["nokaslr", asked.append]
        arguments = [
            *("-name", f"{self.name},debug-threads=on", "-machine", board.machine),
            *("-nodefaults", "-no-user-config", "-display", "none", "-S"),
            *("-accel", "kvm" if kvm else "tcg,thread=multi", "-cpu", "host" if kvm else emulator.cpu),
            *("-smp", f"{guest.vcpus},sockets=1,cores={guest.vcpus},threads=1", "-m", f"{guest.memory_mib}M"),
            *("-kernel", str(self.kernel / architecture(self.platform.arch).image)),
            *("-append", " ".join(filter(None, parameters))),
            *("-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng"),
            *("-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{asked.ssh_port}-:22"),
            *("-device", "virtio-net-pci,netdev=net,romfile="),
            *("-chardev", _socket("control", place / guestrecord.CONTROL)),
            *("-mon", "chardev=control,mode=control"),
            *("-chardev", _socket("gdb", place / guestrecord.GDB), "-gdb", "chardev:gdb"),
        ]
        if asked.console is not None:
            arguments += ["-chardev", f"file,id=console,path={escape(asked.console)}"]
        else:  # the monitor shares the terminal; Ctrl-C goes to the guest
            arguments += ["-chardev", "stdio,id=console,mux=on,signal=off", "-mon", "chardev=console"]
        arguments += ["-serial", "chardev:console"]
        if asked.share is not None:
            arguments += ["-fsdev", f"local,id=share,security_model=none,path={escape(asked.share)}"]
            arguments += ["-device", f"{SHARE_DEVICE},fsdev=share,mount_tag={SHARE_TAG}"]
        for number, (name, text) in enumerate(self._credentials(place).items()):
            path = place / f"credential-{number}"
            path.write_bytes(credential(name, text))
            arguments += ["-smbios", f"type=11,path={escape(path)}"]
        return arguments

    def make_keys(self, place: Path) -> None:
        """Make keys of this run alone, for the person and for the guest: ssh then trusts this guest and no other."""
        for name in (KEY, HOST_KEY):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"doit run:{self.name}"]
            try:
                subprocess.run([*make, "-f", place / name], check=True, stdin=subprocess.DEVNULL)
            except FileNotFoundError:
                raise UserError("ssh-keygen is not installed", "apt-get install openssh-client") from None
        (place / "known_hosts").write_text(f"{self.name} {(place / f'{HOST_KEY}.pub').read_text()}")

    def write_ssh_config(self, place: Path, port: int) -> None:
        """Write what ssh, scp and others want to know of this run."""
        config = {
            "HostName": "127.0.0.1",
            "Port": port,
            "User": "root",
            "IdentityFile": f'"{place / KEY}"',
            "IdentitiesOnly": "yes",
            "HostKeyAlias": self.name,
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": f'"{place / "known_hosts"}"',
            "LogLevel": "ERROR",
        }
        lines = "".join(f"  {name} {value}\n" for name, value in config.items())
        (place / guestrecord.SSH_CONFIG).write_text(f"Host {self.name}\n{lines}")

    def _credentials(self, place: Path) -> dict[str, str]:
        """What the guest's systemd is told for this run, by the credential's name."""
        # sshd looks there, too, and the keys of the recipe stay
        files = {"/root/.ssh/authorized_keys2": f"{KEY}.pub", "/etc/ssh/ssh_host_ed25519_key": HOST_KEY}
        lines = ["d /root/.ssh 0700 root root -"]
        for path, name in files.items():
            encoded = base64.b64encode((place / name).read_bytes()).decode()
            lines.append(f"f+~ {path} 0600 root root - {encoded}")
        wanted = {
            "tmpfiles.extra": "\n".join(lines) + "\n",
            "systemd.unit-dropin.multi-user.target~run": "[Unit]\nWants=console-shell.service\n",
        }
        if self.asked.console is None and os.isatty(0):
            size, terminal = os.get_terminal_size(0), os.environ.get("TERM", "")
            shell = ["[Service]", f"TTYColumns={size.columns}", f"TTYRows={size.lines}"]
            if re.fullmatch(r"[A-Za-z0-9.+-]+", terminal):
                shell.append(f"Environment=TERM={terminal}")
            wanted["systemd.unit-dropin.console-shell.service~run"] = "\n".join(shell) + "\n"
        if self.asked.share is not None:
            options = "trans=virtio,version=9p2000.L,msize=262144,nofail"
            wanted["fstab.extra"] = f"{SHARE_TAG} {SHARED_AT} 9p {options} 0 0\n"
        return wanted


def escape(path: Path) -> str:
    """A path inside a value of a qemu option: its commas are written twice."""
    return str(path).replace(",", ",,")


def _socket(name: str, path: Path) -> str:
    return f"socket,id={name},path={escape(path)},server=on,wait=off"
