"""What a release is, as data: `release.json`, and what is remembered of those that were published.

`recipes/releases/<platform>.json` holds the newest two that `doit publish` has brought to a repository; the next
release's page tells what changed since the newest one of another version.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.locks import Sha256

#: Files of a release directory: the description, specifications of all that was done, bills of materials, the page.
RECORD, MATERIALS, PAGE = "release.json", "materials.json", "index.html"
SPDX, CYCLONEDX = "sbom.spdx.json", "sbom.cdx.json"
#: The public key, checksums with their signature, and the provenance.
KEY, SUMS, SIGNATURE, PROVENANCE = "key.asc", "SHA256SUMS", "SHA256SUMS.asc", "provenance.dsse.json"
#: What `SHA256SUMS` cannot have: it is made of it, or about it.
UNSUMMED = (SUMS, SIGNATURE, PROVENANCE)
#: The directory with what `repo:<platform>` made, and the proofs' files in `proof/`, by level.
REPOSITORY = "repository"
PROOFS = {"boot": "boot.json", "stack": "stack.json"}
#: The directory with the lab's report.
LAB = "proof/lab"
#: Where published releases are remembered, below the checkout, and how many of each platform.
MEMORY = "recipes/releases"
REMEMBERED = 2
#: What the proofs of this project are worth; none of them runs on real-time hardware.
EMULATED = "emulated: not evidence of latency"

#: A path inside the release directory: relative, and never out of it.
Inside = Annotated[
    str, msgspec.Meta(pattern=r"\A(?!.*(?:\A|/)\.{1,2}(?:/|\Z))[A-Za-z0-9][A-Za-z0-9+.:~_@%/-]*\Z")
]
Fingerprint = Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-F]{40,64}\Z")]


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of `release.json`: unknown and missing fields are errors."""


class Digest(_Data, frozen=True, kw_only=True):
    """A named file by content."""

    name: str
    sha256: Sha256


class Source(_Data, frozen=True, kw_only=True):
    """A locked source as it was used: `files` are those of a Debian source package, `patches` are ours."""

    name: str
    origin: str
    location: str
    ref: str
    commit: str
    tree: str
    series: str = ""
    files: tuple[Digest, ...] = ()
    patches: tuple[Digest, ...] = ()


class Builder(_Data, frozen=True, kw_only=True):
    """A container image in which steps ran, by its action key; `packages` counts what it is made of."""

    name: str
    key: str
    suite: str
    packages: int


class Kernel(_Data, frozen=True, kw_only=True):
    """A kernel: what `uname -r` says, and every symbol that is set in its configuration."""

    release: str
    config: dict[str, str]


class PackageFile(_Data, frozen=True, kw_only=True):
    """A package in one format, as its own metadata says; `path` is below the release directory, `size` in bytes."""

    path: Inside
    version: str
    arch: str
    size: int
    sha256: Sha256


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """A package by name and version alone."""

    name: str
    version: str


class Package(_Data, frozen=True, kw_only=True):
    """A package in both formats.

    `sources` are the locked sources that are in it, `requires` the packages that it needs in exactly that version,
    `bundled` the distribution's packages of which it carries files, `licences` says what it holds under which one.
    """

    name: str
    version: str
    what: str
    requires: tuple[Distribution, ...]
    sources: tuple[str, ...]
    bundled: tuple[Distribution, ...]
    licences: tuple[str, ...]
    files: dict[str, PackageFile]


class Installed(_Data, frozen=True, kw_only=True):
    """A Debian package inside a guest image; `sha256` is its file's, from `recipes/packages.lock`."""

    name: str
    version: str
    arch: str
    sha256: Sha256


class Guest(_Data, frozen=True, kw_only=True):
    """A guest and its image."""

    description: str
    image: Inside
    sha256: Sha256
    packages: tuple[Installed, ...]


class Proof(_Data, frozen=True, kw_only=True):
    """What a proof found: `level` is boot or stack, `evidence` how it ran, `worth` what its numbers are good for."""

    level: str
    file: Inside
    sha256: Sha256
    ok: bool
    evidence: str
    worth: str


class Signer(_Data, frozen=True, kw_only=True):
    """Who signed; `development` is true for a key that was made on the spot and that vouches for nobody."""

    name: str
    fingerprint: Fingerprint
    development: bool


class Record(_Data, frozen=True, kw_only=True):
    """All of `release.json`; `date` is in seconds since 1970, `actions` maps every step's name to its key."""

    schema: Literal[1] = 1
    product: Literal["virt-rt"] = "virt-rt"
    version: str
    platform: str
    description: str
    arch: str
    date: int
    signer: Signer
    sources: tuple[Source, ...]
    builders: tuple[Builder, ...]
    kernels: dict[str, Kernel]
    packages: tuple[Package, ...]
    guests: dict[str, Guest]
    plan: dict[str, Any]
    proofs: tuple[Proof, ...]
    actions: dict[str, str]

    @property
    def when(self) -> datetime:
        """The release's date."""
        return datetime.fromtimestamp(self.date, UTC)


class _Memory(_Data, frozen=True, kw_only=True):
    """A file of `recipes/releases/`, the newest first."""

    schema: Literal[1] = 1
    releases: tuple[Record, ...]


_decoder = msgspec.json.Decoder(Record)
_memories = msgspec.json.Decoder(_Memory)


def encode(record: Record | _Memory) -> bytes:
    """The record as JSON that reads and differs well: sorted, a value a line."""
    return msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1) + b"\n"


def decode(data: bytes, where: str) -> Record:
    """Read a `release.json`; `where` is what an error calls it. UserError when it is none."""
    try:
        return _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise UserError(
            f"{where} describes no release: {error}", "take one that `doit release:<platform>` made"
        ) from None


def config_lines(text: str) -> dict[str, str]:
    """The symbols that a kernel's configuration sets, without `CONFIG_`, and their values."""
    return dict(re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.MULTILINE))


def remember(root: Path, release_json: bytes) -> Path:
    """Note a release that was published, below the checkout `root`; the file that was written.

    The newest is first; publishing the same once more, or to a further channel, replaces its own note.
    """
    record = decode(release_json, RECORD)
    path = root / MEMORY / f"{record.platform}.json"
    others = [each for each in _recall(path) if each.version != record.version]
    write_atomically(path, encode(_Memory(releases=(record, *others)[:REMEMBERED])))
    return path


def previous(root: Path, platform: str, version: str) -> Record | None:
    """The newest published release of the platform that has another version, or None before there is one."""
    return next((r for r in _recall(root / MEMORY / f"{platform}.json") if r.version != version), None)


def _recall(path: Path) -> tuple[Record, ...]:
    try:
        return _memories.decode(path.read_bytes()).releases
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(
            f"{MEMORY}/{path.name} cannot be read: {error}",
            f"take the committed file back (git checkout -- {MEMORY}/{path.name}), or delete it",
        ) from None
