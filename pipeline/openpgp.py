"""OpenPGP keys and signatures as a receiver sees them: armor, and what gpgv says."""

from __future__ import annotations

import base64
import binascii
import re
import subprocess
import tempfile
from pathlib import Path

from pipeline.errors import UserError

_BLOCK = re.compile(
    rb"^-----BEGIN PGP PUBLIC KEY BLOCK-----\s*?\n(?:[^\n]*:[^\n]*\n)*\s*\n(.*?)^-----END PGP PUBLIC KEY BLOCK-----",
    re.DOTALL | re.MULTILINE,
)
#: gpgv's words for a signature that does not count although it is one of the key; it ends with 0 for some.
_BAD = {"BADSIG", "ERRSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG", "NODATA", "FAILURE"}
_REMEDY = "get file and public key again from a source that you trust"


def keyring(public: bytes) -> bytes:
    """The binary form of all public keys in a text with ASCII armor; `UserError` when it has none."""
    blocks = [
        b"".join(line for line in block.split() if not line.startswith(b"="))
        for block in _BLOCK.findall(public.replace(b"\r\n", b"\n"))
    ]
    try:
        keys = b"".join(base64.b64decode(block, validate=True) for block in blocks)
    except binascii.Error:
        keys = b""
    if not keys:
        raise UserError("this is no public key in ASCII armor", "gpg --armor --export FINGERPRINT writes one")
    return keys


def merged(*public: bytes) -> bytes:
    """Several texts with public keys as one block: apt and dnf read one per file."""
    if len(public) == 1:
        return public[0]
    keys = b"".join(keyring(text) for text in public)
    lines = base64.encodebytes(keys).replace(b"\n", b"")
    body = b"\n".join(lines[at : at + 64] for at in range(0, len(lines), 64))
    check = base64.b64encode(_crc24(keys).to_bytes(3, "big"))
    return (
        b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n" + body + b"\n=" + check + b"\n"
        b"-----END PGP PUBLIC KEY BLOCK-----\n"
    )


def verify_detached(data: bytes, signature: bytes, public: bytes) -> str:
    """Fingerprint of the key of `public` (ASCII armor, one or several keys) that signed `data`.

    `signature` is binary or in ASCII armor. Raises `UserError` when none of the keys made it, or one that has
    expired or was revoked.
    """
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "data").write_bytes(data)
        return _gpgv(Path(directory), signature, public, [f"{directory}/data"])


def verify_clearsigned(text: bytes, public: bytes) -> bytes:
    """The signed text, and nothing around it; `UserError` as of `verify_detached`."""
    with tempfile.TemporaryDirectory() as directory:
        signed = Path(directory) / "text"
        _gpgv(Path(directory), text, public, [], ["--output", str(signed)])
        return signed.read_bytes()


def _gpgv(
    directory: Path, signed: bytes, public: bytes, data: list[str], options: list[str] | None = None
) -> str:
    (directory / "keyring").write_bytes(keyring(public))
    (directory / "signed").write_bytes(signed)
    command = [
        "gpgv",
        "--homedir",
        str(directory),
        "--keyring",
        str(directory / "keyring"),
        "--status-fd",
        "1",
    ]
    try:
        done = subprocess.run(
            [*command, *(options or []), str(directory / "signed"), *data], capture_output=True, check=False
        )
    except FileNotFoundError:
        raise UserError("gpgv is not installed", "scripts/setup make installs it") from None
    rows = [line.split() for line in done.stdout.decode(errors="replace").splitlines()]
    said = {row[1]: row for row in rows if row[:1] == ["[GNUPG:]"] and len(row) > 1}
    if done.returncode == 0 and "VALIDSIG" in said and not said.keys() & _BAD:
        return said["VALIDSIG"][-1]  # of the primary key
    if said.keys() & {"EXPKEYSIG", "REVKEYSIG", "EXPSIG"}:
        raise UserError("the signature's key has expired or was revoked", _REMEDY)
    if "NO_PUBKEY" in said:
        raise UserError(f"the signature is of another key, {said['NO_PUBKEY'][-1]}", _REMEDY)
    raise UserError(
        "the signature is wrong" if "BADSIG" in said else "there is no signature that gpgv can read", _REMEDY
    )


def _crc24(data: bytes) -> int:
    """The checksum that ends ASCII armor (RFC 4880, section 6.1)."""
    crc = 0xB704CE
    for byte in data:
        crc ^= byte << 16
        for _ in range(8):
            crc <<= 1
            if crc & 0x1000000:
                crc ^= 0x1864CFB
    return crc
