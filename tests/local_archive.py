"""A small signed Debian archive in a directory, for tests: made of packages that are one line each."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.pool import Archives

CONTROL = """\
Source: tree
Maintainer: Test <test@localhost>
Standards-Version: 4.7.0

Package: tree
Architecture: all
Description: test
"""
CHANGELOG = """\
tree (1-1) test; urgency=medium

  * Test.

 -- Test <test@localhost>  Sat, 01 Jan 2000 00:00:00 +0000
"""
TOOLS = ("apt-get", "apt-ftparchive", "dpkg-deb", "dpkg-source", "gpg", "git")


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def make_key(directory: Path) -> Path:
    """Make a signing key in the GnuPG home `directory` and return its public keyring."""
    directory.mkdir(mode=0o700, parents=True)
    gpg(
        directory,
        "--passphrase",
        "",
        "--quick-generate-key",
        "Archive <archive@localhost>",
        "ed25519",
        "sign",
        "0",
    )
    keyring = directory.parent / f"{directory.name}.gpg"
    gpg(directory, "--output", str(keyring), "--export")
    keyring.chmod(0o644)
    stop_agent(directory)
    return keyring


def stop_agent(home: Path) -> None:
    """End the agent that gpg leaves behind."""
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=True)


def gpg(home: Path, *command: str) -> None:
    run("gpg", "--homedir", str(home), "--batch", "--yes", "--pinentry-mode", "loopback", *command)


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@dataclass
class LocalArchive:
    """`base` holds `debian/` with the suite `test` and an empty `debian-security/`."""

    base: Path
    home: Path
    keyring: Path
    suite: str = "test"
    arches: Sequence[str] = ("amd64",)

    @property
    def root(self) -> Path:
        return self.base / "debian"

    @property
    def archives(self) -> Archives:
        return Archives(base=self.base.as_uri(), keyring=self.keyring)

    def package(
        self,
        name: str,
        version: str = "1",
        depends: str = "",
        essential: bool = False,
        arch: str = "amd64",
        multi_arch: str = "",
    ) -> Path:
        """Put a package into the pool; `publish` lists it."""
        tree = self.base / "build" / f"{name}-{version}-{arch}"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "usr/share").mkdir(parents=True)
        (tree / "usr/share" / name).write_text(version)
        fields = {
            "Package": name,
            "Version": version,
            "Architecture": arch,
            "Multi-Arch": multi_arch,
            "Maintainer": "Test <test@localhost>",
            "Description": "test",
            "Depends": depends,
            "Essential": "yes" if essential else "",
        }
        control = "".join(f"{key}: {value}\n" for key, value in fields.items() if value)
        (tree / "DEBIAN/control").write_text(control)
        pool = self.root / "pool/main" / name[0] / name
        pool.mkdir(parents=True, exist_ok=True)
        deb = pool / f"{name}_{version}_{arch}.deb"
        run("dpkg-deb", "--root-owner-group", "-Zgzip", "--build", str(tree), str(deb))
        return deb

    def source(self, name: str, version: str, tree: Path) -> list[Path]:
        """Put a source package made of an unpacked tree with a `debian` directory into the pool."""
        pool = self.root / "pool/main" / name[0] / name
        pool.mkdir(parents=True, exist_ok=True)
        upstream = version.rpartition("-")[0]
        work = self.base / "build" / "sources"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(tree, work / f"{name}-{upstream}", symlinks=True)
        unpacked = work / f"{name}-{upstream}"
        orig = f"{name}_{upstream}.orig.tar.gz"
        rename = f"flags=r;s,^.,{name}-{upstream},"
        run("tar", "--exclude=./debian", "-czf", f"../{orig}", "--transform", rename, ".", cwd=unpacked)
        run("dpkg-source", "-Zgzip", "--build", f"{name}-{upstream}", cwd=work)
        made = []
        for file in work.iterdir():
            if file.is_file():
                shutil.move(file, pool / file.name)
                made.append(pool / file.name)
        return made

    def publish(self) -> None:
        """Write and sign the indexes of what the pool holds now."""
        for archive, suite in (("debian", self.suite), ("debian-security", f"{self.suite}-security")):
            root = self.base / archive
            dist = root / "dists" / suite
            shutil.rmtree(dist, ignore_errors=True)
            (dist / "main/source").mkdir(parents=True)
            (root / "pool").mkdir(exist_ok=True)
            for arch in self.arches:
                (dist / f"main/binary-{arch}").mkdir()
                packages = run("apt-ftparchive", "--arch", arch, "packages", "pool", cwd=root)
                (dist / f"main/binary-{arch}/Packages").write_text(packages)
            (dist / "main/source/Sources").write_text(run("apt-ftparchive", "sources", "pool", cwd=root))
            options: Sequence[str] = [
                f"APT::FTPArchive::Release::{key}={value}"
                for key, value in {
                    "Suite": suite, "Codename": suite, "Architectures": " ".join(self.arches), "Components": "main"
                }.items()
            ]  # fmt: skip
            flags = [part for option in options for part in ("-o", option)]
            release = run("apt-ftparchive", *flags, "release", str(dist.relative_to(root)), cwd=root)
            (dist / "Release").write_text(release)
            gpg(self.home, "--clearsign", "--output", str(dist / "InRelease"), str(dist / "Release"))

    def __post_init__(self) -> None:
        for archive in ("debian", "debian-security"):
            (self.base / archive / "pool").mkdir(parents=True, exist_ok=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def quiet_git(*command: str, cwd: Path) -> str:
    """Run git as nobody in particular: no configuration of the user's, fixed names and dates."""
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a"}
    identity |= {"GIT_COMMITTER_EMAIL": "a@b", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        ["git", *command], cwd=cwd, env=os.environ | identity, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
