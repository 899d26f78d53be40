"""Gives programs the libraries and the loader that they were linked to, so that they run on any distribution.

Runs inside steps, standard library and patchelf only. Programs are copied and told where their libraries are, by a
path relative to themselves (DT_RPATH, which nothing in a user's environment precedes); the loader can only be named
by an absolute path. Libraries are copied as they are: byte for byte their distribution's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

#: What the C library itself loads when a thread ends by one of these functions, or the program ends there.
UNWINDER = "libgcc_s.so.1"
UNWINDS = re.compile(rb"\0pthread_(?:exit|cancel)\0")


class BundleError(Exception):
    """A program's libraries cannot be brought together; says of which and why."""


@dataclass(slots=True)
class Bundle:
    """What was brought together: copies by the place where they are to be installed, and whose they are.

    owners   files of the distribution by the package that they come from
    versions that package's version
    """

    files: dict[str, Path] = field(default_factory=dict)
    owners: dict[str, list[str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def is_program(path: Path) -> bool:
    """Whether a file is an ELF program that asks for a loader."""
    with path.open("rb") as content:
        if content.read(4) != b"\x7fELF":
            return False
    return _patchelf("--print-interpreter", path, may_fail=True) != ""


def bundle(programs: Mapping[str, Path], libraries: str, work: Path, root: Path = Path("/")) -> Bundle:
    """Copy `programs` (by the place where they are to be installed) and all they are linked to.

    `libraries` is the directory for libraries and loader on the target, `work` an empty directory for the copies,
    `root` the root file system whose libraries are taken. Raises `BundleError`.
    """
    made = Bundle()
    pending: list[tuple[str, Path, Path]] = []
    loaders = set()
    for place, program in sorted(programs.items()):
        copy = work / "programs" / place.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(program, copy)
        copy.chmod(0o755)
        loader = _patchelf("--print-interpreter", copy)
        loaders.add(loader)
        way = os.path.relpath(libraries, PurePosixPath(place).parent)
        _patchelf("--set-interpreter", f"{libraries}/{PurePosixPath(loader).name}", copy)
        _patchelf("--force-rpath", "--set-rpath", f"$ORIGIN/{way}", copy)
        made.files[place] = copy
        pending.append((place, program, _within(root, loader).parent))
    found: dict[str, Path] = {}
    for loader in sorted(loaders):
        found[PurePosixPath(loader).name] = _within(root, loader)
    while pending:
        user, path, beside = pending.pop()
        asked = _patchelf("--print-needed", path).split()
        # the C library has these functions itself
        if not path.name.startswith("libc.so") and UNWINDS.search(path.read_bytes()):
            asked.append(UNWINDER)
        for name in asked:
            if name not in found:
                found[name] = _library(name, root, user, beside)
                pending.append((name, found[name], beside))
    (work / "libraries").mkdir(parents=True, exist_ok=True)
    owners = _owners(root, found.values())
    for name, path in sorted(found.items()):
        copy = work / "libraries" / name
        shutil.copyfile(path, copy)
        copy.chmod(0o755 if name in {PurePosixPath(loader).name for loader in loaders} else 0o644)
        made.files[f"{libraries}/{name}"] = copy
        if path not in owners:
            raise BundleError(f"{path} belongs to no package of the builder")
        made.owners.setdefault(owners[path], []).append(name)
    versions = _versions(root)
    made.versions = {package: versions[package] for package in sorted(made.owners)}
    return made


def licence(package: str, root: Path = Path("/")) -> Path:
    """The copyright file of a package that is installed in `root`; `BundleError` when it is not there."""
    path = root / "usr/share/doc" / package / "copyright"
    if not path.is_file():
        raise BundleError(f"{package} has no copyright file in the builder: {path}")
    return path


def _library(name: str, root: Path, user: str, beside: Path) -> Path:
    """A library by name: beside the program's loader, where those of its architecture are, and no other's."""
    for directory in (beside, root / "usr/lib", root / "usr/lib64"):
        if (directory / name).exists():
            return (directory / name).resolve()
    raise BundleError(f"{user} needs {name}, which is not in the builder: add its package to the recipe")


def _within(root: Path, absolute: str) -> Path:
    path = root / absolute.lstrip("/")
    if not path.exists():
        raise BundleError(f"there is no loader {absolute} in the builder")
    return path.resolve()


def _owners(root: Path, paths: Iterable[Path]) -> dict[Path, str]:
    """Which package each file is of, by dpkg's lists; some of these say /lib where the file is in /usr/lib."""
    wanted = set(paths)
    found = {}
    for listing in sorted((root / "var/lib/dpkg/info").glob("*.list")):
        for line in listing.read_text().splitlines():
            if line.startswith(("/lib", "/usr/lib")) and ".so" in line:
                path = (root / line.lstrip("/")).resolve()
                if path in wanted:
                    found[path] = listing.stem.partition(":")[0]
    return found


def _versions(root: Path) -> dict[str, str]:
    found = {}
    for stanza in (root / "var/lib/dpkg/status").read_text().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
        if "Package" in fields:
            found[fields["Package"]] = fields["Version"]
    return found


def _patchelf(*arguments: str | Path, may_fail: bool = False) -> str:
    done = subprocess.run(["patchelf", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        if may_fail:
            return ""
        raise BundleError(f"patchelf {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout.strip()
