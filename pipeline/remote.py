"""Machines that are reached by ssh, as the user's own configuration has it: a host, and its guests through it."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipeline.errors import UserError, VirtRtError
from pipeline.files import remove_tree

#: Seconds until a connection is up, and between signs of life of it; after so many without one it is lost.
CONNECT, ALIVE, MISSED = 15, 15, 4
#: Exit status of ssh when there was no connection, or it was lost.
LOST = 255
#: Words of ssh for what no patience mends.
HOPELESS = (
    "Permission denied",
    "Host key verification failed",
    "Could not resolve",
    "Bad owner",
    "Bad configuration",
)
_TARGET = re.compile(r"(?!-)[A-Za-z0-9_.@:\[\]%-]+")


class LostError(VirtRtError):
    """The connection was lost, or did not come up."""


class Remote:
    """A machine, as root. `name` is what it is called in messages."""

    def __init__(self, name: str, options: Sequence[str], destination: str) -> None:
        """`options` and `destination` are those of ssh."""
        self.name = name
        self._ssh = [
            "ssh",
            "-T",
            "-oBatchMode=yes",
            f"-oConnectTimeout={CONNECT}",
            f"-oServerAliveInterval={ALIVE}",
            f"-oServerAliveCountMax={MISSED}",
            *options,
            "--",
            destination,
        ]
        self._as_root = ""

    @classmethod
    def host(cls, target: str) -> Remote:
        """The host `target`, [user@]name or what the user's ssh calls it."""
        if not _TARGET.fullmatch(target):
            raise UserError(f"TARGET={target!r} is no destination of ssh", "write TARGET=user@host")
        return cls(target, (), target)

    @classmethod
    def guest(cls, target: str, guest: str, port: int) -> Remote:
        """A guest whose ssh is at `port` of the loopback of the host `target`."""
        through = f"ssh -oBatchMode=yes -oConnectTimeout={CONNECT} -W %h:%p -- {shlex.quote(target)}"
        # so that guests, all at 127.0.0.1, are known apart
        alias = f"{guest}.{target.rpartition('@')[2]}"
        options = [f"-oProxyCommand={through}", f"-oHostKeyAlias={alias}", f"-p{port}"]
        return cls(f"guest {guest}", options, "root@127.0.0.1")

    def call(self, command: str, content: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run shell there, with `content` as its input; raises `LostError`, and `UserError` where ssh is refused."""
        if self._as_root:
            command = f"{self._as_root} sh -c {shlex.quote(command)}"
        try:
            done = subprocess.run([*self._ssh, command], input=content, capture_output=True, check=False)
        except FileNotFoundError:
            raise UserError("ssh is not installed", "install openssh-client") from None
        if done.returncode == LOST:
            lines = [
                line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()
            ]
            said = lines[-1] if lines else "the connection was lost"
            if any(word in line for word in HOPELESS for line in lines):
                raise UserError(f"{self.name}: {said}", f"make this work: {shlex.join([*self._ssh, 'true'])}")
            raise LostError(f"{self.name}: {said}", f"make this work: {shlex.join([*self._ssh, 'true'])}")
        return done

    def text(self, command: str, content: bytes = b"") -> str:
        """What a command printed; raises also when it ends with a status."""
        done = self.call(command, content)
        if done.returncode:
            said = " ".join(done.stderr.decode(errors="replace").split()) or f"status {done.returncode}"
            raise UserError(f"{self.name}: {said}", f"there failed: {command}")
        return done.stdout.decode(errors="replace")

    def become_root(self) -> None:
        """Use sudo when the user there is not root."""
        if self.text("id -u").strip() == "0":
            return
        if self.call("sudo -n true").returncode:
            raise UserError(
                f"{self.name}: measuring needs root, and sudo there asks for a password",
                "write TARGET=root@host, or let that user use sudo without one",
            )
        self._as_root = "sudo -n"

    def put(self, content: bytes, place: str, mode: str = "0644") -> None:
        """Write a file there, whole or not at all."""
        part = shlex.quote(f"{place}.part")
        above = shlex.quote(str(PurePosixPath(place).parent))
        self.text(
            f"mkdir -p {above} && cat >{part} && chmod {mode} {part} && mv {part} {shlex.quote(place)}",
            content,
        )

    def fetch(self, directory: str, target: Path, without: Sequence[str] = ()) -> None:
        """Bring a directory as `target`, whole or not at all; `without` names files of it."""
        options = " ".join(f"--exclude={shlex.quote(f'./{name}')}" for name in without)
        done = self.call(f"tar -C {shlex.quote(directory)} {options} -cf - .")
        if done.returncode:
            said = " ".join(done.stderr.decode(errors="replace").split())
            raise UserError(f"{self.name}: {directory} cannot be fetched: {said}", "run it again")
        part = target.with_name(f"{target.name}.part")
        if part.exists():
            remove_tree(part)
        part.mkdir(parents=True)
        _unpack(done.stdout, part)
        if target.exists():
            remove_tree(target)
        part.rename(target)


def _unpack(content: bytes, directory: Path) -> None:
    """Files and directories of a tar; anything else, or a way out of the directory, is refused."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        for member in archive:
            place = PurePosixPath(member.name)
            if place.is_absolute() or ".." in place.parts or not (member.isfile() or member.isdir()):
                raise UserError(
                    f"what was fetched has {member.name}, which is no file of a record", "look at it"
                )
            path = directory / place
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            file = archive.extractfile(member)
            if file is None:
                raise UserError(f"what was fetched has {member.name} without content", "run it again")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read())
