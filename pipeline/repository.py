"""A repository as data: which releases its channels have, and which packages these are made of.

Nothing here reads a clock or a package. What the files of a repository are follows from its state:
`pipeline.publication`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pipeline import dsse
from pipeline.errors import InternalError, UserError
from pipeline.packagefile import Package
from pipeline.releaserecipe import RECIPE

#: The signed pointer to the state, at the root of a repository; and the type of its payload.
POINTER = "repository.json"
POINTER_TYPE = "application/vnd.virt-rt.repository+json"
#: Of pointer and state; raised when older code would misread them.
SCHEMA = 1
_PLACE = r"state/([0-9a-f]{64})\.json\.zst"


@dataclass(frozen=True, slots=True)
class Release:
    """A set of packages (sha256 of each) of one platform.

    `id` (hex) names the set, `date` is in seconds since 1970.
    """

    platform: str
    version: str
    id: str
    date: int
    packages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class State:
    """What a repository holds.

    releases  by channel, in the order in which they came
    packages  by sha256: every package of these releases, and no other
    retired   files that no index lists any more, by path, and since when (seconds since 1970)
    indexes   by channel: its index files
    form      by channel: digest of all but the packages from which its indexes were made
    dates     by channel: the date that its indexes bear (seconds since 1970)
    place     where this state was read from, empty when it was not; not part of the state itself
    """

    releases: dict[str, tuple[Release, ...]] = field(default_factory=dict)
    packages: dict[str, Package] = field(default_factory=dict)
    retired: dict[str, int] = field(default_factory=dict)
    indexes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    form: dict[str, str] = field(default_factory=dict)
    dates: dict[str, int] = field(default_factory=dict)
    place: str = field(default="", compare=False)

    def newest(self, channel: str, platform: str) -> Release | None:
        """The release of a platform that came last into a channel."""
        found = [release for release in self.releases.get(channel, ()) if release.platform == platform]
        return found[-1] if found else None

    def listed(self, channel: str) -> set[str]:
        """sha256 of every package of a channel."""
        return {digest for release in self.releases.get(channel, ()) for digest in release.packages}


EMPTY = State()


def release_id(packages: Iterable[Package]) -> str:
    """The name of a set of packages: 64 hex digits."""
    return hashlib.sha256("\n".join(sorted(package.sha256 for package in packages)).encode()).hexdigest()


def with_release(
    state: State, channel: str, release: Release, packages: Iterable[Package], keep: int
) -> State:
    """The state after a release entered a channel; the newest `keep` releases of its platform stay there.

    `packages` are those that the release names. The same release again changes nothing. Raises `UserError` when its
    version is not higher than that of the platform's newest release in the channel (in dpkg's order), and when the
    repository has a package of the same name and version with other bytes.
    """
    brought = {package.sha256: package for package in packages}
    if brought.keys() != set(release.packages) or not brought:
        raise InternalError(f"the release of {release.platform} and its packages differ", "give both alike")
    known = state.packages | brought
    newest = state.newest(channel, release.platform)
    there = state.releases.get(channel, ())
    if newest is None or newest.id != release.id:
        _check_version(newest, release, channel)
        _check_names(known.values())
        there = (*there, release)
    mine = [each for each in there if each.platform == release.platform]
    leaving = {id(each) for each in mine[:-keep]}
    staying = tuple(each for each in there if id(each) not in leaving)
    releases = {**state.releases, channel: staying}
    used = {digest for each in releases.values() for one in each for digest in one.packages}
    return replace(
        state, releases=releases, packages={digest: known[digest] for digest in known if digest in used}
    )


def promoted(state: State, source: str, target: str, platform: str, keep: int) -> State:
    """The state after a platform's newest release of the channel `source` entered `target`, as `with_release`."""
    release = state.newest(source, platform)
    if release is None:
        raise UserError(
            f"the channel {source} has no release of {platform}",
            f"publish one first; {source} has: {', '.join(_platforms(state, source)) or 'nothing'}",
        )
    return with_release(state, target, release, [state.packages[d] for d in release.packages], keep)


def _platforms(state: State, channel: str) -> list[str]:
    return sorted({release.platform for release in state.releases.get(channel, ())})


def _check_version(newest: Release | None, release: Release, channel: str) -> None:
    from debian.debian_support import version_compare  # a run that makes nothing does without

    if newest is not None and version_compare(release.version, newest.version) <= 0:
        raise UserError(
            f"{channel} has {release.platform} {newest.version} already; {release.version} is not higher, "
            "and no machine would install it",
            f"raise `version` in {RECIPE}, then make the release again",
        )


def _check_names(packages: Iterable[Package]) -> None:
    """Refuse two packages that a package manager, or a directory, could not tell apart."""
    seen: dict[tuple[str, ...], Package] = {}
    for package in packages:
        for name in (
            (package.format, package.name, package.version, package.arch),
            (package.format, package.name, package.file),
        ):
            other = seen.setdefault(name, package)
            if other.sha256 != package.sha256:
                raise UserError(
                    f"there are two {package.format}s {package.name} {package.version} with different content: "
                    f"{other.sha256[:12]} and {package.sha256[:12]}",
                    f"raise `version` in {RECIPE}, then make the release again",
                )


# The state as a file --------------------------------------------------------------------------


def encoded(state: State) -> tuple[str, bytes]:
    """Where a state goes in its repository, and its content there (JSON, compressed with zstd)."""
    import msgspec  # these two are not for a run that makes nothing
    import zstandard

    document = {f.name: getattr(state, f.name) for f in fields(state) if f.name != "place"}
    content = zstandard.compress(msgspec.json.encode(document, order="deterministic"))
    return f"state/{hashlib.sha256(content).hexdigest()}.json.zst", content


def pointer(place: str, details: dict[str, Any]) -> bytes:
    """The payload of a repository's pointer: where the state is, and `details` for people and tools."""
    return (json.dumps({"schema": SCHEMA, "state": place, **details}, indent=1) + "\n").encode()


def read_state(read: Callable[[str], bytes | None], public: bytes) -> State:
    """The state of a repository; `EMPTY` when it has no pointer.

    `read` brings a file of the repository by path, or None when there is none. Nothing is trusted before a key of
    `public` (ASCII armor, one or several) is seen to have signed it. Raises `UserError` when the pointer or the
    state is damaged, missing or not signed by these keys.
    """
    import msgspec
    import zstandard

    envelope = read(POINTER)
    if envelope is None:
        return EMPTY
    try:
        parsed = json.loads(envelope)
    except (ValueError, RecursionError):
        raise _damaged(POINTER) from None
    try:
        payload = json.loads(dsse.open_envelope(parsed, public, POINTER_TYPE))
    except UserError as error:
        raise UserError(
            f"{POINTER} of the repository: {error.message}",
            "name the repository's key; after a change of keys, docs/signing.md tells how to trust the former one",
        ) from None
    if payload.get("schema") != SCHEMA:
        raise UserError(
            f"the repository has schema {payload.get('schema')}, not {SCHEMA}",
            "use the version that wrote it",
        )
    place = str(payload.get("state"))
    match = re.fullmatch(_PLACE, place)
    content = read(place) if match else None
    if match is None or content is None or hashlib.sha256(content).hexdigest() != match[1]:
        raise _damaged(place)
    try:
        # a signature covers the digest, the digest the content: what is wrong now was written by us
        state = msgspec.json.decode(zstandard.decompress(content), type=State)
    except (msgspec.DecodeError, zstandard.ZstdError):
        raise _damaged(place) from None
    return replace(state, place=place)


def _damaged(path: str) -> UserError:
    return UserError(
        f"{path} of the repository is missing or damaged", "restore it from a copy, or publish to a new place"
    )
