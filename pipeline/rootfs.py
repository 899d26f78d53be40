"""A root file system made of locked packages, without network and the same every time."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.errors import InternalError, UserError
from pipeline.locks import LockedPackage, foreign

EPOCH = 1767225600
"""What is made on the way is dated 2026-01-01 00:00 UTC, and so is whatever is younger."""

# What packages write while they are installed that differs from run to run or tells of the machine.
_UNSTEADY = (
    "var/cache/ldconfig/aux-cache",
    "var/log/alternatives.log",
    "var/log/apt",
    "var/log/bootstrap.log",
    "var/log/dpkg.log",
    "var/cache/apt/*.bin",
    "var/lib/apt/lists/*",
    "var/lib/dpkg/*-old",
    "var/cache/debconf/*-old",
    "etc/apt/sources.list",
    "etc/apt/apt.conf.d/99mmdebstrap",
    "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
    "etc/hostname",
    "etc/resolv.conf",
    "etc/machine-id",
    "var/lib/dbus/machine-id",
    "etc/*-",
    "etc/ssh/ssh_host_*",
)


def make_rootfs(
    debs: Path,
    packages: Iterable[LockedPackage],
    arch: str,
    suite: str,
    target: Path,
    *,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the tar of a root file system with exactly these packages, whose files are in `debs`.

    The same packages give the same bytes; `log` gets what mmdebstrap says. Needs mmdebstrap and
    apt-ftparchive, no network, and either root or user namespaces. UserError when a program is missing,
    InternalError when the packages do not install.
    """
    for program in ("mmdebstrap", "apt-ftparchive"):
        if shutil.which(program) is None:
            raise UserError(f"{program} is missing", "run: make setup")
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    environment |= {"HOME": "/nonexistent", "SOURCE_DATE_EPOCH": str(EPOCH)}
    with tempfile.TemporaryDirectory(prefix="rootfs-") as scratch:
        repository = Path(scratch) / "repository"
        repository.mkdir()
        packages = list(packages)
        for package in packages:
            _place(debs / package.filename, repository / package.filename)
        write_index(repository)
        Path(scratch).chmod(0o755)  # apt may read as another user
        clean = " ".join(f'"$1"/{pattern}' for pattern in _UNSTEADY)
        command = [
            "mmdebstrap",
            f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
            "--variant=custom",
            f"--architectures={','.join((arch, *foreign(package.name for package in packages)))}",
            f"--include={','.join(sorted(package.name for package in packages))}",
            '--aptopt=APT::Install-Recommends "false"',
            "--dpkgopt=force-unsafe-io",
            f"--customize-hook=rm -rf {clean}",
            # Days since 1970 in shadow come from the clock.
            f'--customize-hook=[ ! -e "$1/etc/shadow" ] || sed -i -E'
            f" 's/^([^:]*:[^:]*:)[0-9]+:/\\1{EPOCH // 86400}:/' \"$1/etc/shadow\"",
            suite,
            str(target),
            f"deb [trusted=yes] copy://{repository} ./",
        ]
        _run(command, environment, Path(scratch), log)


def write_index(repository: Path) -> None:
    """Make a directory of packages one that apt takes packages from."""
    command = ["apt-ftparchive", "packages", "."]
    index = _run(command, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, repository, lambda line: None)
    (repository / "Packages").write_text(index)


def _place(source: Path, target: Path) -> None:
    """Link a file, or copy it where the store is on another file system or read-only to us."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _run(command: list[str], environment: dict[str, str], cwd: Path, log: Callable[[str], None]) -> str:
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    for line in lines:
        log(line)
    if done.returncode:
        said = [line for line in lines if line.startswith(("E:", "dpkg: error"))] or lines[-1:]
        raise InternalError(
            f"{command[0]} failed: {'; '.join(said[:3])}",
            "if the disk is full make room; else the locked packages do not fit together: doit lock",
        )
    return done.stdout
