"""What a change of state means for a repository's files: which to write, copy and delete, and in which order.

A pure function but for the signatures, which are the same for the same data, time and key. Only channels whose
packages changed are indexed anew, from the packages' records in the state: no package is read.

Clients never see half of it. apt reads InRelease, which names everything else by digest, and those files are there
before and stay after (by-hash). dnf reads repomd.xml and its signature, two files; so clients are given a mirror
list, one file, which points to a directory of repodata that never changes, a generation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from pipeline import aptindex, dsse, yumindex
from pipeline.errors import UserError
from pipeline.keys import canonical
from pipeline.packagefile import Package
from pipeline.releaserecipe import RepositoryRecipe
from pipeline.repository import POINTER, POINTER_TYPE, Release, State, encoded, pointer
from pipeline.signing import Signer, parameter

#: Seconds for which files that no index lists any more stay, since clients may still be reading.
GRACE = 86_400
KEY_FILE = "key.asc"
#: Raised when the same state would be laid out differently: every channel is then indexed anew.
_LAYOUT = 1


@dataclass(frozen=True, slots=True)
class Publication:
    """What to do to a repository, in this order: packages, copies, indexes, obsolete, entries.

    packages  sha256 of the package to put, by path
    copies    source by path, both in the repository: rpms that another channel has already
    indexes   content by path; nobody reads these before the entries are there
    obsolete  paths to delete: retired by an earlier publication, for longer than the grace time. Before the
              entries, so that a kill between leaves them recorded, and the next publication deletes them.
    entries   path and content, to be put one after the other in this order; the last is the state's pointer
    state     the state afterwards
    """

    packages: Mapping[str, str]
    copies: Mapping[str, str]
    indexes: Mapping[str, bytes]
    obsolete: tuple[str, ...]
    entries: tuple[tuple[str, bytes], ...]
    state: State

    def __bool__(self) -> bool:
        """Whether anything changes."""
        return bool(self.entries)


@dataclass(slots=True)
class _Indexes:
    """The index files of a channel: those that nobody reads before the entries, and these, in order."""

    quiet: dict[str, bytes] = field(default_factory=dict)
    entries: dict[str, bytes] = field(default_factory=dict)


def publication(
    old: State, new: State, recipe: RepositoryRecipe, signer: Signer, date: int, grace: int = GRACE
) -> Publication:
    """What brings a repository from the state `old` to `new`; signatures and indexes bear `date`.

    A channel whose packages did not change keeps its indexes, unless recipe or signer changed, or the recipe limits
    for how long indexes count (`valid_days`): then they are made anew with the later date. Raises `UserError` when
    `date` is before that of indexes that clients have: they would take the new ones for older.
    """
    form = _form(recipe, signer, date)
    reformed = [channel for channel in new.releases if old.form.get(channel) != form]
    stale = [c for c in new.releases if c in reformed or old.listed(c) != new.listed(c)]
    due = [path for path, since in old.retired.items() if since + grace <= date]
    if not stale and not due and old.releases == new.releases:
        return Publication({}, {}, {}, (), (), old)
    _check_date(old, stale, date)
    made = {channel: _channel(new, channel, recipe, signer, date) for channel in stale}
    indexes = {**new.indexes, **{c: tuple(sorted({**m.quiet, **m.entries})) for c, m in made.items()}}
    before, after = package_paths(old), package_paths(new)
    current = after.keys() | {path for paths in indexes.values() for path in paths}
    gone = (
        before.keys() | {path for paths in old.indexes.values() for path in paths} | {old.place}
    ) - current
    obsolete = tuple(sorted(path for path in due if path not in current))
    retired = {p: since for p, since in old.retired.items() if p not in current and p not in obsolete}
    state = replace(
        new,
        retired={path: date for path in sorted(gone - {""})} | retired,
        indexes=indexes,
        form={**new.form, **dict.fromkeys(stale, form)},
        dates={**new.dates, **dict.fromkeys(stale, date)},
        place="",
    )
    place, content = encoded(state)
    there = {digest: path for path, digest in before.items()}
    added = {path: digest for path, digest in after.items() if path not in before}
    entries = {KEY_FILE: signer.trusted} if reformed else {}
    for each in made.values():
        entries |= each.entries
    entries[POINTER] = _pointer(state, place, signer, date)
    return Publication(
        packages={path: digest for path, digest in added.items() if digest not in there},
        copies={path: there[digest] for path, digest in added.items() if digest in there},
        indexes={path: text for each in made.values() for path, text in each.quiet.items()}
        | {place: content},
        obsolete=obsolete,
        entries=tuple(entries.items()),
        state=replace(state, place=place),
    )


def package_paths(state: State) -> dict[str, str]:
    """Where a repository of that state has its packages: sha256 by path."""
    found = {}
    for channel in state.releases:
        debs, rpms = _packages(state, channel)
        found.update({f"apt/{aptindex.pool_path(package)}": package.sha256 for package in debs})
        for arch in yumindex.architectures(rpms):
            for package in yumindex.fitting(rpms, arch):
                found[f"yum/{channel}/{arch}/{yumindex.rpm_path(package)}"] = package.sha256
    return found


def note(signer: Signer) -> str:
    """What every product of a development key says of it; empty for any other key."""
    name = signer.identity.name.partition(" <")[0]
    return f"signed with a {name.removeprefix('virt-rt ')}" if signer.identity.development else ""


def _packages(state: State, channel: str) -> tuple[list[Package], list[Package]]:
    """The debs and the rpms of a channel."""
    listed = [state.packages[digest] for digest in sorted(state.listed(channel))]
    return [p for p in listed if p.format == "deb"], [p for p in listed if p.format == "rpm"]


def _form(recipe: RepositoryRecipe, signer: Signer, date: int) -> str:
    """Digest of all that indexes are made from but packages; the date is, where indexes count for a time only."""
    said = {
        "layout": _LAYOUT,
        "recipe": {
            name: getattr(recipe, name) for name in ("origin", "label", "description", "url", "valid_days")
        },
        "keys": signer.trusted.decode(),
        "signer": signer.identity.fingerprint,
        "date": date if recipe.valid_days else None,
    }
    return hashlib.sha256(canonical(said)).hexdigest()


def _check_date(old: State, channels: list[str], date: int) -> None:
    for channel in channels:
        if date < old.dates.get(channel, 0):
            raise UserError(
                f"{channel} was published later than what this machine's clock says now", "set the clock"
            )


def _channel(state: State, channel: str, recipe: RepositoryRecipe, signer: Signer, date: int) -> _Indexes:
    debs, rpms = _packages(state, channel)
    made = _Indexes()
    if debs:
        _apt(made, channel, debs, recipe, signer, date)
    for arch in yumindex.architectures(rpms):
        _yum(made, channel, arch, yumindex.fitting(rpms, arch), recipe, signer, date)
    if recipe.url and debs:
        made.entries[f"virt-rt-{channel}.sources"] = aptindex.source(
            recipe, channel, signer.trusted, note(signer)
        )
    if recipe.url and rpms:
        made.entries[f"virt-rt-{channel}.repo"] = yumindex.client(recipe, channel, note(signer))
    return made


def _apt(
    made: _Indexes, channel: str, debs: list[Package], recipe: RepositoryRecipe, signer: Signer, date: int
) -> None:
    top, arches = f"apt/dists/{channel}", aptindex.architectures(debs)
    indexes: dict[str, bytes] = {}
    for arch in arches:
        listing = aptindex.listing(debs, arch)
        path = f"{aptindex.COMPONENT}/binary-{arch}/Packages"
        indexes |= {path: listing, f"{path}.xz": aptindex.compressed(listing)}
    made.quiet |= {f"{top}/{aptindex.by_hash(path, text)}": text for path, text in indexes.items()}
    # for clients that do not ask by hash, and for people
    made.entries |= {f"{top}/{path}": text for path, text in indexes.items()}
    release = aptindex.release(recipe, channel, arches, indexes, date, note(signer))
    with ThreadPoolExecutor() as pool:  # signing takes longer than all else of a small change
        detached = pool.submit(signer.detached, release, date)
        clearsigned = pool.submit(signer.clearsigned, release, date)
    made.entries[f"{top}/Release"] = release
    made.entries[f"{top}/Release.gpg"] = detached.result()
    made.entries[f"{top}/InRelease"] = clearsigned.result()


def _yum(
    made: _Indexes,
    channel: str,
    arch: str,
    rpms: list[Package],
    recipe: RepositoryRecipe,
    signer: Signer,
    date: int,
) -> None:
    top = f"yum/{channel}/{arch}"
    repomd, files = yumindex.repodata(rpms, date)
    made.quiet |= {f"{top}/{yumindex.REPODATA}/{name}": content for name, content in files.items()}
    made.entries[f"{top}/{yumindex.REPODATA}/repomd.xml.asc"] = signer.detached(repomd, date)
    made.entries[f"{top}/{yumindex.REPODATA}/repomd.xml"] = repomd
    if not recipe.url:
        return  # without an address a mirror list has nothing to name
    repomd, files = yumindex.repodata(rpms, date, f"{recipe.url}/{top}/")
    files |= {"repomd.xml": repomd, "repomd.xml.asc": signer.detached(repomd, date)}
    named = hashlib.sha256(repomd + files["repomd.xml.asc"]).hexdigest()[:16]
    generation = f"{top}.{named}"
    made.quiet |= {f"{generation}/{yumindex.REPODATA}/{name}": content for name, content in files.items()}
    made.entries[f"{top}/mirrorlist"] = f"{recipe.url}/{generation}/\n".encode()


def _pointer(state: State, place: str, signer: Signer, date: int) -> bytes:
    details = {
        "date": date,
        "signer": parameter(signer.identity),
        "note": note(signer),
        "channels": {
            channel: {release.platform: release.version for release in _newest(state, channel)}
            for channel in sorted(state.releases)
        },
    }
    envelope = dsse.envelope(pointer(place, details), POINTER_TYPE, signer, date)
    return (json.dumps(envelope, indent=1) + "\n").encode()


def _newest(state: State, channel: str) -> Iterator[Release]:
    for platform in sorted({release.platform for release in state.releases[channel]}):
        newest = state.newest(channel, platform)
        if newest is not None:
            yield newest
