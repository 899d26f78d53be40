"""GnuPG with one key, in a private directory of the run, and what it says of that key.

The directory is in memory where there is a tmpfs, and is removed at the end. Secrets reach GnuPG through pipes and
this directory, never as arguments or variables of a process.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import remove_tree

#: The passphrase of a key that has one.
PASSPHRASE = "VIRT_RT_SIGNING_PASSPHRASE"  # noqa: S105  # the name of a variable
#: In the user id of every development key, however it is brought: it decides what the key may do.
NOT_FOR_RELEASE = "not for release"

_HOMES = "virt-rt-signing."
OPTIONS = ("--batch", "--no-options", "--no-tty", "--quiet")
#: What a user's own agent and its pinentry may need; nothing else of the environment reaches GnuPG.
_PASSED_ON = ("PATH", "HOME", "GPG_TTY", "TERM", "DISPLAY", "WAYLAND_DISPLAY", "DBUS_SESSION_BUS_ADDRESS")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who signs.

    fingerprint  of the primary key, 40 hex digits in capitals
    name         the primary user id
    development  whether the user id says that the key is not for releases
    created      seconds since 1970 from which on the key can sign
    public       the public key in ASCII armor
    others       sha256 of the public keys that count beside it; empty when there are none
    """

    fingerprint: str
    name: str
    development: bool
    created: int
    public: bytes
    others: str = ""


@dataclass(frozen=True, slots=True)
class Key:
    """A named key: its secret part, or its id in the user's agent; `origin` is what to call it in an error."""

    origin: str
    secret: bytes = b""
    agent_id: str = ""


@dataclass(frozen=True, slots=True)
class Described:
    """What GnuPG says of a key: who it is, which of its keys signs (fingerprint), and until when (0: for ever)."""

    identity: Identity
    signs: str
    expires: int


class Gpg:
    """GnuPG with one key: in the private directory `home`, or in the user's own one when its agent has the key."""

    def __init__(self, environ: Mapping[str, str], home: Path, key: Key) -> None:
        """Nothing of the environment but what an agent needs reaches GnuPG, the secrets least of all."""
        self.home, self.key = home, key
        kept = {name: environ[name] for name in _PASSED_ON if environ.get(name)}
        self.environment = {"PATH": os.defpath, "HOME": str(home), "LC_ALL": "C.UTF-8", **kept}
        own = environ.get("GNUPGHOME") or f"{Path(self.environment['HOME']).expanduser()}/.gnupg"
        self.environment["GNUPGHOME"] = own if key.agent_id else str(home)
        self._passphrase = home / "passphrase"
        if environ.get(PASSPHRASE):
            self._passphrase.touch(mode=0o600)
            self._passphrase.write_text(environ[PASSPHRASE])

    def passphrase_options(self) -> list[str]:
        """How GnuPG gets the passphrase; a user's own agent asks for one that is not given."""
        if self._passphrase.exists():
            return ["--pinentry-mode", "loopback", "--passphrase-file", str(self._passphrase)]
        return [] if self.key.agent_id else ["--pinentry-mode", "loopback"]

    def run(self, *arguments: str, data: bytes = b"", check: bool = True) -> bytes:
        """What `gpg` prints; `data` is its standard input."""
        return run(["gpg", *OPTIONS, *arguments], self.environment, data, check=check)


def describe(gpg: Gpg, key: Key) -> Described:
    """Who a key is, and which of its keys signs; nothing here needs the secret part."""
    if key.secret:
        # Without an agent GnuPG takes in the public part and then fails: all that is wanted here.
        gpg.run("--no-autostart", "--import", data=key.secret, check=False)
        listing = gpg.run("--with-colons", "--show-keys", data=key.secret, check=False).decode()
    else:
        wanted = ["--", key.agent_id] if key.agent_id else []
        listing = gpg.run("--with-colons", "--list-secret-keys", *wanted, check=False).decode()
    rows = [line.split(":") for line in listing.splitlines()]
    primaries = [row for row in rows if row[0] == "sec"]
    if len(primaries) != 1:
        what = "several keys" if primaries else "no secret key that GnuPG can read"
        raise UserError(f"{key.origin} is {what}", "give one secret key, or the whole fingerprint of one")
    name = next(row[9] for row in rows if row[0] == "uid").replace(r"\x3a", ":").replace(r"\x5c", "\\")
    fingerprints = [row[9] for row in rows if row[0] == "fpr"]
    keys = list(zip((row for row in rows if row[0] in ("sec", "ssb")), fingerprints, strict=True))
    # field 2 is the validity (e: expired, r: revoked, d: disabled, i: invalid), 12 what the key itself can do
    able = [(row, each) for row, each in keys if "s" in row[11] and row[1] not in ("r", "d", "i")]
    if not able:
        raise UserError(f"{key.origin} cannot sign", "give a key that can, and that is not revoked")
    row, signs = max(able, key=lambda k: (k[0][1] != "e", k[0][0] == "ssb", int(k[0][5])))
    expiries = [int(each[6]) for each in (row, primaries[0]) if each[6]]
    public = gpg.run("--armor", "--export-options", "export-minimal", "--export", fingerprints[0])
    created = max(int(row[5]), int(primaries[0][5]))
    described = Identity(fingerprints[0], name, NOT_FOR_RELEASE in name, created, public)
    return Described(described, signs, min(expiries, default=0))


@contextlib.contextmanager
def private_home() -> Iterator[Path]:
    """A private directory for GnuPG, in memory where there is a tmpfs; its agent ends with it."""
    places = (Path(f"/run/user/{os.getuid()}"), Path("/dev/shm"))  # noqa: S108  # a private directory in it
    usable = [place for place in places if os.access(place, os.W_OK | os.X_OK) and _in_memory(place)]
    base = usable[0] if usable else Path(tempfile.gettempdir())
    for left in base.glob(f"{_HOMES}*"):  # of a run that was killed
        with contextlib.suppress(OSError):  # another run removes it at this moment
            status = left.lstat()
            # everybody may write there: never follow a link
            ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            if ours and not Path(f"/proc/{left.name.split('.')[1]}").exists():
                _leave(left)
    home = Path(tempfile.mkdtemp(prefix=f"{_HOMES}{os.getpid()}.", dir=base))
    try:
        yield home
    finally:
        _leave(home)


def _in_memory(place: Path) -> bool:
    """Whether a directory is on a tmpfs; in a container /run often is not."""
    device = place.stat().st_dev
    for mount in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = mount.split(" ")
        with contextlib.suppress(OSError):
            if kind == "tmpfs" and Path(where).stat().st_dev == device:
                return True
    return False


def _leave(home: Path) -> None:
    """End the agent of a private directory, and remove both."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "GNUPGHOME": str(home)}
    for end in (["--kill", "all"], ["--remove-socketdir"]):
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["gpgconf", *end], env=environment, capture_output=True, check=False)
    with contextlib.suppress(FileNotFoundError):  # the agent removes its sockets, too
        remove_tree(home)


def run(
    command: list[str], environment: Mapping[str, str], data: bytes = b"", *, check: bool = True
) -> bytes:
    """What a command prints; `data` is its standard input. Raises `UserError` with its last word when it fails."""
    try:
        done = subprocess.run(command, input=data, env=environment, capture_output=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed", "scripts/setup make installs it") from None
    if check and done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise UserError(
            f"{command[0]} failed: {said[-1]}",
            f"is the key right, and {PASSPHRASE}? gpg --show-keys shows a key",
        )
    return done.stdout
