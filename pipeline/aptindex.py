"""What apt reads of a repository: Packages and Release, as text."""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Iterable, Mapping, Sequence
from email.utils import formatdate

from pipeline.packagefile import Package
from pipeline.releaserecipe import RepositoryRecipe

COMPONENT = "main"
#: Debian's word for packages that fit every architecture.
ALL = "all"
#: xz's strength: of a thousand packages, 0 takes a tenth of the default's time and makes a file a tenth larger.
STRENGTH = 0


def pool_path(package: Package) -> str:
    """Where a deb is, relative to the repository's `apt` directory; channels share it."""
    return f"pool/{package.name}/{package.file}"


def architectures(packages: Iterable[Package]) -> list[str]:
    """The architectures that have an index: those of the packages, and `all` only where there is no other."""
    found = {package.arch for package in packages}
    return sorted(found - {ALL} or found)


def listing(packages: Iterable[Package], arch: str) -> bytes:
    """The Packages file of an architecture, those that fit every one included; the same set gives the same bytes."""
    fitting = [package for package in packages if package.arch in (arch, ALL)]
    stanzas = [
        f"{package.record['control']}Filename: {pool_path(package)}\n"
        f"Size: {package.size}\nSHA256: {package.sha256}\n"
        for package in sorted(fitting, key=lambda p: (p.name, p.version, p.arch, p.sha256))
    ]
    return "\n".join(stanzas).encode()


def compressed(content: bytes) -> bytes:
    """As xz."""
    return lzma.compress(content, preset=STRENGTH, check=lzma.CHECK_CRC32)


def release(
    recipe: RepositoryRecipe,
    channel: str,
    arches: Sequence[str],
    indexes: Mapping[str, bytes],
    date: int,
    note: str = "",
) -> bytes:
    """The Release file of a channel.

    `indexes` are contents by path relative to the Release file; `date` is in seconds since 1970, `note` is added to
    the description.
    """
    fields = {
        "Origin": recipe.origin,
        "Label": recipe.label,
        "Suite": channel,
        "Codename": channel,
        "Date": _date(date),
        "Valid-Until": _date(date + recipe.valid_days * 86_400) if recipe.valid_days else "",
        "Acquire-By-Hash": "yes",
        # of packages that fit every architecture: they are in each architecture's index
        "No-Support-for-Architecture-all": "Packages" if ALL not in arches else "",
        "Architectures": " ".join(arches),
        "Components": COMPONENT,
        "Description": f"{recipe.description}{f' ({note})' if note else ''}",
    }
    sums = [
        f" {hashlib.sha256(content).hexdigest()} {len(content):>10} {path}"
        for path, content in sorted(indexes.items())
    ]
    lines = [f"{name}: {value}" for name, value in fields.items() if value] + ["SHA256:", *sums]
    return ("\n".join(lines) + "\n").encode()


def by_hash(path: str, content: bytes) -> str:
    """The path under which an index stays as long as a client may be reading it."""
    directory = path.rpartition("/")[0]
    return f"{directory}/by-hash/SHA256/{hashlib.sha256(content).hexdigest()}"


def source(recipe: RepositoryRecipe, channel: str, public: bytes, note: str = "") -> bytes:
    """A client's `.sources` file; it holds the keys, so that one file sets up a machine (apt 2.3.10 or later)."""
    # in deb822 an empty line of a value is a dot
    keys = "".join(f" {line or '.'}\n" for line in public.decode().strip().splitlines())
    comment = f"# {note}\n" if note else ""
    return (
        f"{comment}Types: deb\nURIs: {recipe.url}/apt\nSuites: {channel}\nComponents: {COMPONENT}\nSigned-By:\n{keys}"
    ).encode()


def _date(when: int) -> str:
    return formatdate(when, usegmt=True).replace("GMT", "UTC")
