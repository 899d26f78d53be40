"""Who signs, and signatures: OpenPGP, made by GnuPG and checked by gpgv.

The secret key comes from the environment, from a file, or stays in the user's GnuPG agent. Where none is named, a
development key is made on first use; its user id says that it is not for releases. Secrets are only ever in a
private directory of the run (in memory where there is a tmpfs), which is removed at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.errors import UserError
from pipeline.files import file_lock, remove_tree
from pipeline.gnupg import (
    NOT_FOR_RELEASE,
    OPTIONS,
    PASSPHRASE,
    Gpg,
    Identity,
    Key,
    describe,
    private_home,
    run,
)
from pipeline.openpgp import keyring, merged, verify_clearsigned, verify_detached

__all__ = [
    "KEY",
    "KEY_FILE",
    "KEY_ID",
    "OTHER_KEYS",
    "PARAMETER",
    "SECRETS",
    "Identity",
    "Signer",
    "ensure",
    "identity",
    "parameter",
    "verify_clearsigned",
    "verify_detached",
]

#: The three ways to name a key, at most one of which may be used (and `gnupg.PASSPHRASE` for any of them).
KEY, KEY_FILE, KEY_ID = "VIRT_RT_SIGNING_KEY", "VIRT_RT_SIGNING_KEY_FILE", "VIRT_RT_SIGNING_KEY_ID"
#: What no process that is started needs to see.
SECRETS = (KEY, PASSPHRASE)
#: A file of public keys that count beside the signer's: former ones, and one to come (docs/signing.md).
OTHER_KEYS = "VIRT_RT_OTHER_KEYS"

DEVELOPMENT_NAME = f"virt-rt development key, {NOT_FOR_RELEASE} <development@localhost>"
#: Verified by every rpm and apt in use, and signs alike each time. 4096 bits: 3072 is what is advised until 2030.
DEVELOPMENT_ALGORITHM = "rsa4096"
DEVELOPMENT_KEY = "development-key"
#: An action that signs has a parameter of this name: `parameter(identity)`.
PARAMETER = "signer"


def identity(environ: Mapping[str, str], config: Path) -> Identity | None:
    """Who would sign; None when no key is named and no development key was made yet.

    `config` is `$XDG_CONFIG_HOME/virt-rt` (`Project.config`). Raises `UserError` when the named key is no key, cannot
    sign, or when several are named.
    """
    named = _named(environ)
    if named is None:
        known = _development(config)
        return known and _with_others(known, environ)
    with private_home() as home:
        return _with_others(describe(Gpg(environ, home, named), named).identity, environ)


def ensure(environ: Mapping[str, str], config: Path) -> Identity:
    """Who signs; makes the development key when no key is named and there is none yet."""
    known = identity(environ, config)
    if known is not None:
        return known
    try:
        config.mkdir(parents=True, exist_ok=True)
        with file_lock(config / f".{DEVELOPMENT_KEY}.lock"):
            # another process may have made it while this one waited for the lock
            return _with_others(_development(config) or _make_development(config), environ)
    except OSError as error:
        raise UserError(
            f"no development key can be made in {config}: {error.strerror}", f"mend that, or set {KEY_FILE}"
        ) from None


def parameter(identity: Identity | None) -> dict[str, Any] | None:
    """What the key of a signing action has of its signer; None makes `doit run` bring a development key first."""
    if identity is None:
        return None
    return {
        "fingerprint": identity.fingerprint,
        "name": identity.name,
        "development": identity.development,
        "created": identity.created,
        **({"others": identity.others} if identity.others else {}),
    }


class Signer:
    """Signs; a context manager. The same data, time and key give the same signature, byte for byte.

    identity  who signs
    trusted   public keys (ASCII armor) whose signatures count: the signer's own, and those of `VIRT_RT_OTHER_KEYS`
    """

    identity: Identity
    trusted: bytes

    def __init__(self, environ: Mapping[str, str], config: Path) -> None:
        """The arguments are those of `ensure`; nothing happens before the context is entered."""
        self._environ, self._config = environ, config
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Bring the key, making the development key when no other is named; `UserError` when it has expired."""
        ensure(self._environ, self._config)
        key = _named(self._environ) or Key("the development key", _secret_of(self._config))
        with self._open as opened:
            home = opened.enter_context(private_home())
            self._gpg = Gpg(self._environ, home, key)
            described = describe(self._gpg, key)
            self.identity, self._signs = _with_others(described.identity, self._environ), described.signs
            if 0 < described.expires <= time.time():
                raise UserError(
                    f"the signing key {self.identity.name} has expired",
                    "prolong it, or change to another one as docs/signing.md tells",
                )
            self.trusted = merged(self.identity.public, *_other_keys(self._environ))
            if key.secret:
                self._gpg.run("--import", data=key.secret)
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove every secret."""
        self._open.close()

    @property
    def trusts_development(self) -> bool:
        """Whether a development key is among `trusted`."""
        return NOT_FOR_RELEASE.encode() in keyring(self.trusted)  # user ids are plain text in a key

    def detached(self, data: bytes, when: int, *, armor: bool = True) -> bytes:
        """A detached signature over `data` made at `when` (seconds since 1970)."""
        shape = ["--armor"] if armor else []
        return self._gpg.run(*self._signing(when), *shape, "--detach-sign", data=data)

    def clearsigned(self, text: bytes, when: int) -> bytes:
        """`text` with its signature around it."""
        return self._gpg.run(*self._signing(when), "--clear-sign", data=text)

    def sign_rpms(self, paths: Iterable[Path], when: int) -> None:
        """Sign rpm files in place, instead of signatures they had.

        With `identity.created` as `when`, an rpm that is signed for two releases stays the same file.
        """
        asked = [str(path) for path in paths]
        if not asked:
            return
        gpg = shutil.which("gpg", path=self._gpg.environment["PATH"]) or "gpg"
        options = " ".join([*OPTIONS, "--faked-system-time", f"{when}!", *self._gpg.passphrase_options()])
        if " " in str(self._gpg.home):  # rpm splits the macro at spaces
            raise UserError(f"{self._gpg.home} has a space in its name", "set TMPDIR to a directory without")
        macros = {
            "__gpg": gpg,
            "_gpg_name": f"{self._signs}!",
            "_gpg_digest_algo": "sha256",
            "_gpg_sign_cmd_extra_args": options,
        }
        defined = [word for name, value in macros.items() for word in ("--define", f"{name} {value}")]
        self._check_time(when)
        # its own HOME: a user's ~/.rpmmacros is about the user's packages
        environment = self._gpg.environment | {"HOME": str(self._gpg.home)}
        run(["rpmsign", *defined, "--addsign", *asked], environment)

    def _signing(self, when: int) -> list[str]:
        self._check_time(when)
        return [
            *("--faked-system-time", f"{when}!", "--local-user", f"{self._signs}!"),
            *(
                "--trust-model",
                "always",
                "--digest-algo",
                "SHA256",
                "--no-emit-version",
                *self._gpg.passphrase_options(),
            ),
        ]

    def _check_time(self, when: int) -> None:
        if when < self.identity.created:
            raise UserError(
                f"a signature of {_date(when)} is older than its key, {self.identity.name}, "
                f"of {_date(self.identity.created)}",
                "set this machine's clock, or unset SOURCE_DATE_EPOCH",
            )


# Where keys come from -------------------------------------------------------------------------


def _named(environ: Mapping[str, str]) -> Key | None:
    """The key that the environment names, if it names one."""
    set_ = [name for name in (KEY, KEY_FILE, KEY_ID) if environ.get(name)]
    if len(set_) > 1:
        raise UserError(f"{' and '.join(set_)} are set", "set one of them")
    if not set_:
        return None
    (name,) = set_
    if name == KEY_ID:
        _check_name(name, environ[name])
        return Key(f"the key {environ[name]} ({name})", agent_id=environ[name])
    if name == KEY:
        return Key(f"what {name} holds", environ[name].encode())
    secret = _content(name, environ[name], "name a file with a secret key")
    return Key(f"{environ[name]} ({name})", secret or b"\n")


def _other_keys(environ: Mapping[str, str]) -> list[bytes]:
    path = environ.get(OTHER_KEYS, "")
    return [_content(OTHER_KEYS, path, "name a file with public keys")] if path else []


def _check_name(variable: str, value: str) -> None:
    """Refuse a key where its name belongs, without showing it: messages end up in logs, and names in arguments."""
    if "\n" in value or "-----BEGIN" in value:
        raise UserError(f"{variable} holds a text, not a name", f"a secret key itself goes into {KEY}")


def _content(variable: str, path: str, remedy: str) -> bytes:
    """What is in the file that a variable names."""
    _check_name(variable, path)
    try:
        return Path(path).expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # expanduser's own is a RuntimeError
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{variable}: {path}: {reason}", remedy) from None


def _with_others(identity: Identity, environ: Mapping[str, str]) -> Identity:
    others = b"".join(keyring(text) for text in _other_keys(environ))
    return replace(identity, others=hashlib.sha256(others).hexdigest() if others else "")


def _secret_of(config: Path) -> bytes:
    try:
        return (config / DEVELOPMENT_KEY / "secret.asc").read_bytes()
    except OSError:
        raise _damaged(config / DEVELOPMENT_KEY) from None


def _damaged(directory: Path) -> UserError:
    return UserError(
        f"the development key in {directory} is damaged", "delete the directory: a new key is made"
    )


def _development(config: Path) -> Identity | None:
    """The development key that was made before; read without GnuPG, since every `doit` asks."""
    directory = config / DEVELOPMENT_KEY
    if not directory.is_dir():
        return None
    if directory.stat().st_mode & 0o077:
        raise UserError(f"{directory} is open to other users", f"chmod 700 {directory}")
    try:
        known = json.loads((directory / "identity.json").read_bytes())
        public = (directory / "public.asc").read_bytes()
        return Identity(str(known["fingerprint"]), str(known["name"]), True, int(known["created"]), public)
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(directory) from None


def _make_development(config: Path) -> Identity:
    with private_home() as home:
        key = Key("the development key")
        gpg = Gpg({"PATH": os.environ.get("PATH", os.defpath)}, home, key)
        gpg.run(
            "--passphrase",
            "",
            "--quick-gen-key",
            DEVELOPMENT_NAME,
            DEVELOPMENT_ALGORITHM,
            "sign,cert",
            "never",
        )
        secret = gpg.run("--armor", "--export-secret-keys")
        made = describe(gpg, key).identity
    directory = config / DEVELOPMENT_KEY
    new = Path(tempfile.mkdtemp(prefix=f".{DEVELOPMENT_KEY}.", dir=config))  # mode 0700
    try:
        known = {"fingerprint": made.fingerprint, "name": made.name, "created": made.created}
        (new / "identity.json").write_text(json.dumps(known) + "\n")
        (new / "public.asc").write_bytes(made.public)
        (new / "secret.asc").touch(mode=0o600)
        (new / "secret.asc").write_bytes(secret)
        new.rename(directory)
    except BaseException:
        remove_tree(new)
        raise
    return made


def _date(when: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(when))
