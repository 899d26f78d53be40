"""The two lock files: which bytes every build uses.

`recipes/sources.lock` pins each source (ref, commit, tree, where it came from), `recipes/packages.lock`
pins every Debian package of every builder and guest image. Both are JSON with one source or package per
line, so that a move reads as a one-line diff, and both are validated as they are read: a lock that was
edited into nonsense is an error, never a guess.

This module is read by every command, the no-op included, so it imports nothing heavy.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from pipeline.architecture import BUILD
from pipeline.errors import UserError
from pipeline.files import write_atomically

T = TypeVar("T")

SCHEMA: Literal[1] = 1
SOURCES_LOCK = Path("recipes/sources.lock")
PACKAGES_LOCK = Path("recipes/packages.lock")

Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
GitId = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{40})?\Z")]
"""A full git object id, or nothing in an open entry."""
ArchivePath = Annotated[
    str, msgspec.Meta(pattern=r"\A(?!.*(?:\A|/)\.{1,2}(?:/|\Z))[A-Za-z0-9][A-Za-z0-9+.:~_%/-]*\Z")
]
"""A path relative to an archive's base address; never absolute, never with `.` or `..` in it."""
Size = Annotated[int, msgspec.Meta(gt=0)]
Word = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9+.:~_-]*\Z")]
SetName = Annotated[str, msgspec.Meta(pattern=r"\A(builder|guest)/[a-z0-9][a-z0-9.-]*\Z")]
SourceName = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9.-]*\Z")]
Archive = Literal["debian", "debian-security"]
Series = Literal["", "plain", "rt"]


class LockedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file of a Debian source package, found at `path` below its archive's base address."""

    archive: Archive
    path: ArchivePath
    sha256: Sha256
    size: Size

    @property
    def filename(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


class SourceLock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One pinned source, or an open entry (`commit` empty) that says why no origin answered.

    `origin` is the kind that answered, `location` its git URL or Debian suite, `ref` the git ref's short
    name or the Debian version, `tree` the id that keys are made of. `files` and `series` belong to
    Debian origins.
    """

    name: SourceName
    origin: Literal["git", "debian", ""] = ""
    location: str = ""
    ref: str = ""
    commit: GitId = ""
    tree: GitId = ""
    series: Series = ""
    files: tuple[LockedFile, ...] = ()
    reason: str = ""

    @property
    def is_open(self) -> bool:
        """True when nothing is pinned."""
        return not self.commit

    def __post_init__(self) -> None:
        """Refuse combinations that no lock run writes."""
        if self.is_open:
            if self.origin or self.location or self.ref or self.tree or self.series or self.files:
                raise ValueError("an open entry pins nothing, yet other fields are filled")
            if not self.reason:
                raise ValueError("an entry without a commit must give its reason")
        else:
            if not (self.tree and self.origin and self.location and self.ref):
                raise ValueError("a pinned entry needs origin, location, ref, commit and tree")
            if self.location.startswith("-") or self.ref.startswith("-"):
                raise ValueError("location and ref must not begin with '-'")
            if self.reason:
                raise ValueError("a pinned entry has no reason for being open")
            if (self.origin == "debian") != bool(self.files) or (self.origin == "debian") != bool(
                self.series
            ):
                raise ValueError("files and series belong to Debian origins, and to all of them")


class LockedPackage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One binary package, found at `path` below the base address of `archive`; `size` in bytes.

    Where it is of another architecture than its set, its name is `libc6:arm64`, as apt and dpkg say it.
    """

    name: Word
    version: Word
    arch: Word
    archive: Archive
    path: ArchivePath
    sha256: Sha256
    size: Size

    @property
    def filename(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def bare_name(self) -> str:
        """The name without an architecture."""
        return self.name.partition(":")[0]


def qualified(name: str, arch: str, native: str) -> str:
    """How a package is called in a set of the architecture `native`."""
    return name if arch in (native, "all") else f"{name}:{arch}"


def foreign(names: Iterable[str]) -> tuple[str, ...]:
    """The architectures that packages are asked of beside those of their set."""
    return tuple(sorted({arch for name in names for _, _, arch in [name.partition(":")] if arch}))


class PackageSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything a builder or guest image is made of: what was asked for and what apt made of it.

    What is asked for as `name:arm64` is of that architecture, beside those of `arch`.
    """

    name: SetName
    arch: Word
    suite: Word
    request: tuple[Word, ...]
    packages: tuple[LockedPackage, ...]

    def __post_init__(self) -> None:
        """Refuse a set that cannot be installed as it stands."""
        names = [package.name for package in self.packages]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"package {twice} is locked twice")
        if missing := sorted(set(self.request) - set(names)):
            raise ValueError(f"requested but not locked: {', '.join(missing)}")
        if wrong := [p.name for p in self.packages if p.name != qualified(p.bare_name, p.arch, self.arch)]:
            raise ValueError(f"package {wrong[0]} is not for {self.arch}")


class SourcesLock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of recipes/sources.lock, sorted by name."""

    schema: Literal[1] = SCHEMA
    sources: tuple[SourceLock, ...] = ()

    def find(self, name: str) -> SourceLock | None:
        """Return the entry of that name, if there is one."""
        return next((entry for entry in self.sources if entry.name == name), None)

    def get(self, name: str) -> SourceLock:
        """Return the pinned entry of that name; UserError when it is absent or open."""
        entry = self.find(name)
        if entry is None:
            raise UserError(f"{SOURCES_LOCK} has no entry for {name}", f"run: doit lock -u {name}")
        if entry.is_open:
            raise UserError(
                f"source {name} is not pinned: {entry.reason}",
                f"when an origin can be reached, run: doit lock -u {name}",
            )
        return entry

    def replace(self, entries: Iterable[SourceLock]) -> "SourcesLock":
        """Return a lock with these entries in the place of those of the same name."""
        by_name = {entry.name: entry for entry in (*self.sources, *entries)}
        return SourcesLock(sources=tuple(by_name[name] for name in sorted(by_name)))


class PackagesLock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of recipes/packages.lock, sorted by name and architecture."""

    schema: Literal[1] = SCHEMA
    sets: tuple[PackageSet, ...] = ()

    def find(self, name: str, arch: str = BUILD) -> PackageSet | None:
        """Return the set of that name and architecture, if there is one."""
        return next((s for s in self.sets if s.name == name and s.arch == arch), None)

    def get(self, name: str, arch: str = BUILD) -> PackageSet:
        """Return the set of that name and architecture; UserError when it is not locked."""
        found = self.find(name, arch)
        if found is None:
            raise UserError(f"{PACKAGES_LOCK} has no set {name} for {arch}", f"run: doit lock -u {name}")
        return found

    def replace(self, sets: Iterable[PackageSet]) -> "PackagesLock":
        """Return a lock with these sets in the place of those of the same name and architecture."""
        by_name = {(s.name, s.arch): s for s in (*self.sets, *sets)}
        return PackagesLock(sets=tuple(by_name[key] for key in sorted(by_name)))


_sources_decoder = msgspec.json.Decoder(SourcesLock)
_packages_decoder = msgspec.json.Decoder(PackagesLock)


def load_sources(path: Path) -> SourcesLock:
    """Read a sources.lock; an absent one is empty. UserError when it is broken."""
    lock = _load(path, _sources_decoder.decode, SourcesLock())
    _refuse_twice(path, [entry.name for entry in lock.sources])
    return lock


def load_packages(path: Path) -> PackagesLock:
    """Read a packages.lock; an absent one is empty. UserError when it is broken."""
    lock = _load(path, _packages_decoder.decode, PackagesLock())
    _refuse_twice(path, [f"{s.name} ({s.arch})" for s in lock.sets])
    return lock


def dump_sources(lock: SourcesLock, path: Path) -> None:
    """Write a sources.lock atomically; the same lock gives the same bytes."""
    write_atomically(path, encode_sources(lock))


def dump_packages(lock: PackagesLock, path: Path) -> None:
    """Write a packages.lock atomically; the same lock gives the same bytes."""
    write_atomically(path, encode_packages(lock))


def encode_sources(lock: SourcesLock) -> bytes:
    """Return the bytes of a sources.lock: one source per line."""
    lines = b",\n".join(msgspec.json.encode(entry) for entry in lock.sources)
    return b'{"schema":%d,"sources":[\n%s\n]}\n' % (lock.schema, lines)


def encode_packages(lock: PackagesLock) -> bytes:
    """Return the bytes of a packages.lock: one package per line below its set's line."""
    blocks = []
    for entry in lock.sets:
        head = {"name": entry.name, "arch": entry.arch, "suite": entry.suite, "request": entry.request}
        lines = b",\n".join(msgspec.json.encode(package) for package in entry.packages)
        blocks.append(msgspec.json.encode(head)[:-1] + b',"packages":[\n' + lines + b"\n]}")
    return b'{"schema":%d,"sets":[\n%s\n]}\n' % (lock.schema, b",\n".join(blocks))


def _load(path: Path, decode: Callable[[bytes], T], empty: T) -> T:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return empty
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "make the file readable") from error
    try:
        return decode(data)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `")
        entry = _entry(data, where.rstrip("`"))
        raise UserError(f"{path}: {entry}: {what}", _remedy(path)) from error
    except msgspec.DecodeError as error:
        raise UserError(f"{path} is not JSON: {error}", _remedy(path)) from error


def _remedy(path: Path) -> str:
    return f"take the committed file back (git checkout -- {path}), or delete it and run: doit lock"


def _entry(data: bytes, where: str) -> str:
    """Turn msgspec's `$.sets[3].packages[1].sha256` into the names a person knows the entries by."""
    names: list[str] = []
    node: Any = msgspec.json.decode(data)
    for key, index in re.findall(r"\.([a-z_0-9]+)|\[(\d+)\]", where):
        if key:
            node = node.get(key)
            if not isinstance(node, list):
                names.append(key)
        else:
            node = node[int(index)]
            label = (node.get("name") or node.get("path")) if isinstance(node, dict) else None
            names.append(str(label or f"entry {int(index) + 1}"))
    return ", ".join(names) or "the file"


def _refuse_twice(path: Path, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: {name} is locked twice", _remedy(path))
