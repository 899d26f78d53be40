"""Signatures of modules, as the kernel checks them: appended to the file, by an X.509 key that the user names.

The same module, key and certificate give the same bytes, which RSA alone does. The key stays where it is: a path in
the environment, read by openssl outside of any container. All that is known of it elsewhere is its certificate's
fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import ssl
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.action import Step
from pipeline.errors import InternalError, UserError

#: Name files: the secret key (PEM, without a passphrase), and its certificate (PEM or DER).
KEY, CERTIFICATE = "VIRT_RT_MODULE_KEY", "VIRT_RT_MODULE_CERT"
#: Every kernel that can check a signature has it.
DIGEST = "sha256"

#: How a signed module ends: a PKCS#7 message, `struct module_signature` about it, and this.
#: Source: scripts/sign-file.c and include/linux/module_signature.h of the kernel.
MAGIC = b"~Module signature appended~\n"
_TRAILER = struct.Struct(">BBBBB3xI")
_PKCS7 = 2


@dataclass(frozen=True, slots=True)
class Certificate:
    """Who signs modules: the certificate (DER) and its sha256, 64 hex digits."""

    der: bytes
    fingerprint: str


def certificate_of(environ: Mapping[str, str]) -> Certificate | None:
    """The certificate that the environment names; None when modules are not to be signed.

    Raises `UserError` when only one of the two is named, or the file is no certificate.
    """
    named = [name for name in (KEY, CERTIFICATE) if environ.get(name)]
    if not named:
        return None
    if len(named) == 1:
        (lacking,) = {KEY, CERTIFICATE} - set(named)
        raise UserError(f"{named[0]} is set, {lacking} is not", "set both to sign modules, or none")
    content = _content(CERTIFICATE, environ[CERTIFICATE])
    try:
        der = ssl.PEM_cert_to_DER_cert(content.decode("ascii")) if b"-----BEGIN" in content else content
    except ValueError:
        der = b""
    if not der.startswith(b"\x30"):  # every certificate is a SEQUENCE
        raise UserError(
            f"{CERTIFICATE}: {environ[CERTIFICATE]} is no certificate", "name an X.509 certificate"
        )
    return Certificate(der, hashlib.sha256(der).hexdigest())


def sign_driver(step: Step, certificate: Certificate, environ: Mapping[str, str]) -> None:
    """Lay out what an unsigned driver is, with its modules signed, and its document saying by whom."""
    if certificate_of(environ) != certificate:
        raise UserError("the certificate for modules changed while doit ran", "run doit again")
    source = step.inputs / "unsigned"
    for path in sorted(source.iterdir()):
        if path.is_dir():
            shutil.copytree(path, step.out / path.name, symlinks=True)
        else:
            shutil.copyfile(path, step.out / path.name)
    signer = Signer(step.scratch, certificate, environ)
    document = json.loads((source / "driver.json").read_text())
    modules = sorted((step.out / "root").rglob("*.ko"))
    if [module.name for module in modules] != sorted(each["file"] for each in document["modules"]):
        raise InternalError("the modules are not those of driver.json", "look at recipes/steps/driver.sh")
    for module in modules:
        signer.sign(module)
        step.log(f"signed {module.name}")
    document["signer"] = {"subject": signer.subject, "certificate_sha256": certificate.fingerprint}
    (step.out / "driver.json").write_text(json.dumps(document, indent=1) + "\n")


class Signer:
    """Signs modules with the key that the environment names, by openssl; works in the directory `scratch`."""

    subject: str

    def __init__(self, scratch: Path, certificate: Certificate, environ: Mapping[str, str]) -> None:
        """Raises `UserError` when there is no such key, it has a passphrase, or is not the certificate's."""
        self._environment = {"PATH": environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
        self._scratch = scratch
        if shutil.which("openssl", path=self._environment["PATH"]) is None:
            raise UserError("openssl is not installed", "install it to sign modules")
        self._certificate = scratch / "certificate.pem"
        self._certificate.write_text(ssl.DER_cert_to_PEM_cert(certificate.der))
        _content(KEY, environ[KEY])  # says what is wrong with it, where openssl would speak of something else
        self._key = str(Path(environ[KEY]).expanduser())
        described = self._openssl("x509", "-in", str(self._certificate), "-noout", "-text").decode()
        if "Public Key Algorithm: rsaEncryption" not in described:
            raise UserError(
                f"{CERTIFICATE} is not for an RSA key", "make an RSA key: others sign differently each time"
            )
        subject = self._openssl(
            "x509", "-in", str(self._certificate), "-noout", "-subject", "-nameopt", "RFC2253"
        )
        self.subject = re.sub(r"\Asubject=\s*", "", subject.decode().strip())

    def sign(self, module: Path) -> None:
        """Append a signature to a module, and check it."""
        content = module.read_bytes()
        if content.endswith(MAGIC):
            raise UserError(
                f"{module.name} is signed already", "take the signing out of the driver's Makefile"
            )
        message = self._openssl(
            *("cms", "-sign", "-binary", "-noattr", "-nocerts", "-nosmimecap", "-md", DIGEST),
            *("-signer", str(self._certificate), "-inkey", self._key, "-passin", "pass:"),
            *("-outform", "DER", "-in", str(module)),
        )
        module.write_bytes(content + message + _TRAILER.pack(0, 0, _PKCS7, 0, 0, len(message)) + MAGIC)
        self.check(module)

    def check(self, module: Path) -> None:
        """Raise `UserError` unless the module ends with a signature by the certificate's key."""
        content, message = signature_of(module.read_bytes())
        if not message:
            raise UserError(f"{module.name} is not signed", "sign it")
        plain, detached = self._scratch / "module", self._scratch / "signature"
        plain.write_bytes(content)
        detached.write_bytes(message)
        self._openssl(
            *("cms", "-verify", "-binary", "-inform", "DER", "-in", str(detached), "-content", str(plain)),
            *("-certfile", str(self._certificate), "-nointern", "-noverify", "-out", os.devnull),
        )

    def _openssl(self, *arguments: str) -> bytes:
        done = subprocess.run(
            ["openssl", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=self._environment,
            check=False,
        )
        if done.returncode:
            told = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
            raise UserError(
                f"openssl {arguments[0]} {arguments[1]}: {told[-1] if told else 'failed'}",
                f"{KEY} must be the key of {CERTIFICATE}, PEM and without a passphrase",
            )
        return done.stdout


def signature_of(content: bytes) -> tuple[bytes, bytes]:
    """A module without its signature, and the signature (PKCS#7, DER), which is empty when it has none."""
    if not content.endswith(MAGIC):
        return content, b""
    end = len(content) - len(MAGIC) - _TRAILER.size
    if end < 0:
        return content, b""
    algorithm, digest, kind, name, key, size = _TRAILER.unpack_from(content, end)
    if (algorithm, digest, kind, name, key) != (0, 0, _PKCS7, 0, 0) or not 0 < size <= end:
        return content, b""
    return content[: end - size], content[end - size : end]


def _content(variable: str, path: str) -> bytes:
    """What is in the file that a variable names; a key that was put there itself is not shown."""
    if "\n" in path or "-----BEGIN" in path:
        raise UserError(
            f"{variable} holds a text, not the name of a file", "write it to a file, and name that"
        )
    try:
        content = Path(path).expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{variable}: {path}: {reason}", "name a file") from None
    if not content:
        raise UserError(f"{variable}: {path} is empty", "name a file with a key or certificate")
    return content
