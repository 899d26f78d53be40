"""Bringing a release to a repository that clients may be reading, and promoting one there.

Packages first, then indexes that nobody names yet, then what names them, file by file. The signed pointer to the
state comes last: while it is the old one, the publication is not done and can be done again. A note in the
repository tells that one is under way, so that after a kill the next one mends what this one left.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.destination import Destination, Renew, checked
from pipeline.directory import Directory
from pipeline.errors import InternalError, UserError
from pipeline.files import digest_file
from pipeline.packagefile import Package
from pipeline.publication import KEY_FILE, Publication, package_paths, publication
from pipeline.releaserecipe import RECIPE, RepositoryRecipe
from pipeline.repository import POINTER, Release, State, promoted, read_state, with_release
from pipeline.signing import OTHER_KEYS, Signer

#: Tells of a publication under way: what it began with, what it will end with, and the files that it brings.
UNFINISHED = ".unfinished.json"
#: What a repository has at its root. Where one of these is, there has been a pointer, too.
SIGNS = (KEY_FILE, "apt", "yum", "state")

#: The files of a repository, by path.
_OURS = re.compile(r"(?:apt|yum|state)/.+|key\.asc|repository\.json|virt-rt-[^/]+\.(?:sources|repo)")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it: whether anything changed, how many package files and bytes were sent, and the state now."""

    changed: bool
    release: Release
    channel: str
    sent: int
    size: int
    state: State


class Publisher:
    """Changes one repository."""

    def __init__(self, place: Destination, recipe: RepositoryRecipe, signer: Signer, say: Say = lambda line: None,
                 clock: Callable[[], float] = time.time) -> None:  # fmt: skip
        """`signer` is open; `say` is told what is being done; `clock` gives seconds since 1970."""
        self._place = place
        self._recipe = recipe
        self._signer = signer
        self._say = say
        self._clock = clock

    def publish(self, made: Path, platform: str, channel: str) -> Outcome:
        """Add the release of a platform that `repo:<platform>` made in the directory `made` to a channel."""
        self._check((channel,))
        theirs = read_state(Directory(made).read, self._signer.trusted)
        found = [each for releases in theirs.releases.values() for each in releases]
        if [release.platform for release in found] != [platform]:
            raise UserError(f"{made} holds no release of {platform}", f"make it: doit repo:{platform}")
        (release,) = found
        packages = [theirs.packages[digest] for digest in release.packages]
        return self.add(release, packages, package_files(made), channel)

    def add(
        self, release: Release, packages: Sequence[Package], files: Mapping[str, Path], channel: str
    ) -> Outcome:
        """Add a release to a channel; its package files are in `files`, by name, their rpms signed."""
        self._check((channel,))

        def find(digest: str, path: str) -> Path:
            name = path.rpartition("/")[2]
            if name not in files or digest_file(files[name]) != digest:
                raise UserError(
                    f"{name} is not as it was made for the release",
                    f"make it again: doit repo:{release.platform}",
                )
            return files[name]

        return self._bring(
            channel,
            release.platform,
            lambda state: with_release(state, channel, release, packages, self._recipe.keep),
            find,
        )

    def promote(self, source: str, target: str, platform: str) -> Outcome:
        """Add the newest release of a platform in the channel `source` to `target`, as it is."""
        self._check((source, target))
        if source == target:
            raise UserError(f"{source} is promoted to itself", "name two channels: --from and --to")

        def find(digest: str, path: str) -> Path:
            raise InternalError(f"{path} is in {source}, but not in the repository", "doit publish mends it")

        return self._bring(
            target,
            platform,
            lambda state: promoted(state, source, target, platform, self._recipe.keep),
            find,
        )

    def _check(self, channels: Iterable[str]) -> None:
        for channel in channels:
            if channel not in self._recipe.channels:
                raise UserError(
                    f"there is no channel {channel}", f"{RECIPE} has {', '.join(self._recipe.channels)}"
                )
        if self._signer.identity.development and not self._place.local:
            raise UserError(
                f"{self._signer.identity.name}: its signatures are for directories of this machine only, "
                f"not for {self._place.name}",
                "name a signing key: docs/signing.md",
            )
        if self._signer.trusts_development and not self._place.local:
            raise UserError(
                f"a development key is among the other keys: clients of {self._place.name} would trust it",
                f"leave it out of {OTHER_KEYS} or --previous-key; publish to an empty place",
            )

    # Getting from one state to the next ---------------------------------------------------------

    def _bring(
        self, channel: str, platform: str, change: Callable[[State], State], find: Callable[[str, str], Path]
    ) -> Outcome:
        with self._place.locked() as renew:
            pointer = self._place.read(POINTER)
            under_way = self._under_way(pointer)
            old = self._state(pointer, under_way)
            new = change(old)
            made = self._publication(old, new, under_way)
            sent: list[Path] = []
            if made:
                packages = {path: find(digest, path) for path, digest in made.packages.items()}
                sent = self._write(made, old, packages, pointer, renew)
            release = new.newest(channel, platform)
            assert release is not None  # noqa: S101  # `change` has just put it there
            size = sum(path.stat().st_size for path in sent)
            return Outcome(bool(made), release, channel, len(sent), size, made.state if made else old)

    def _state(self, pointer: bytes | None, under_way: Mapping[str, Any] | None) -> State:
        """The state that the repository is in; it must say so itself, under our signature."""
        place = self._place
        if pointer is None and not (under_way and under_way["pointer"] is None) and place.holds(SIGNS):
            raise UserError(
                f"{place.name} has a repository, but {POINTER} is missing",
                "restore it from a copy, or use another place",
            )
        known = {POINTER: pointer}
        signers = _signers(pointer)
        try:
            return read_state(
                lambda path: known[path] if path in known else place.read(path), self._signer.trusted
            )
        except UserError:
            own = self._signer.identity
            if signers and own.fingerprint not in signers:
                raise UserError(
                    f"{place.name} is signed by the key {', '.join(signers)}, and you sign with {own.fingerprint}",
                    "sign with that one; if it was replaced, give its public part: --previous-key FILE "
                    "(docs/signing.md)",
                ) from None
            raise

    def _publication(self, old: State, new: State, under_way: Mapping[str, Any] | None) -> Publication:
        """What is to be done; after a kill also what mends the channels that were being written."""
        now = int(self._clock())
        if not under_way:
            return publication(old, new, self._recipe, self._signer, now)

        def mended(state: State, retired: Mapping[str, int]) -> State:
            form = {name: form for name, form in state.form.items() if name not in under_way["channels"]}
            return replace(state, form=form, retired={**state.retired, **retired})

        made = publication(mended(old, {}), mended(new, {}), self._recipe, self._signer, now)
        left = {path: now for path in under_way["files"] if path not in in_use(made.state)}
        if left:
            made = publication(mended(old, left), mended(new, left), self._recipe, self._signer, now)
        return made

    def _write(
        self, made: Publication, old: State, packages: Mapping[str, Path], pointer: bytes | None, renew: Renew
    ) -> list[Path]:
        """Do it, in order; returns the package files that were sent."""
        place, say = self._place, self._say
        place.put({UNFINISHED: _note(made, old, pointer)})
        if packages:
            say(f"{len(packages)} packages")
        sent = place.put(packages)
        if made.copies:
            renew()
            say(f"{len(made.copies)} packages from another channel")
            place.copy(made.copies)
        renew()
        say(f"{len(made.indexes)} index files")
        place.put(made.indexes)
        renew()
        if place.read(POINTER) != pointer:
            raise UserError(f"{place.name} was published to by someone else meanwhile", "run it again")
        place.delete(made.obsolete)
        say(f"{len(made.entries)} files that clients begin with")
        for path, content in made.entries:
            place.put({path: content})
        there = place.contents(path for path, _ in made.entries)
        differing = [path for path, content in made.entries if there[path] != content]
        if differing:
            raise UserError(
                f"{place.name} gives another {differing[0]} than was just written",
                "run it again; look for a cache",
            )
        place.delete([UNFINISHED])
        return [packages[path] for path in sent]

    def _under_way(self, pointer: bytes | None) -> dict[str, Any] | None:
        """The note of a publication that was not finished; one that only lacked the note's removal gets it."""
        raw = self._place.read(UNFINISHED)
        if raw is None:
            return None
        try:
            note = json.loads(raw)
            first, last, channels, files = (note[key] for key in ("pointer", "final", "channels", "files"))
            if not (
                isinstance(first, str | None) and all(isinstance(each, str) for each in [*channels, *files])
            ):
                raise TypeError
            # nobody signs a note, and what it names may be deleted
            if not all(_OURS.fullmatch(checked(path)) for path in files):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError, InternalError):
            raise UserError(
                f"{UNFINISHED} of {self._place.name} is damaged", "delete it, then run this again"
            ) from None
        if _digest(pointer) == last:
            self._place.delete([UNFINISHED])
            return None
        return {"pointer": first, "channels": channels, "files": files}


def package_files(directory: Path) -> dict[str, Path]:
    """The packages of a repository in a directory, by file name."""
    return {path.name: path for kind in ("deb", "rpm") for path in sorted(directory.rglob(f"*.{kind}"))}


def _note(made: Publication, old: State, pointer: bytes | None) -> bytes:
    """See `UNFINISHED`; the pointer stands for the state before and after, by its digest."""
    now = made.state
    channels = [
        name for name in now.form if (now.form[name], now.dates.get(name), now.indexes.get(name))
        != (old.form.get(name), old.dates.get(name), old.indexes.get(name))
    ]  # fmt: skip
    final = next(content for path, content in made.entries if path == POINTER)
    note = {
        "pointer": _digest(pointer),
        "final": _digest(final),
        "channels": sorted(channels),
        "files": sorted({*made.packages, *made.copies, *made.indexes, *(path for path, _ in made.entries)}),
    }
    return json.dumps(note).encode()


def in_use(state: State) -> set[str]:
    """Every file of a repository of that state."""
    indexes = {path for paths in state.indexes.values() for path in paths}
    return {*package_paths(state), *indexes, state.place, KEY_FILE, POINTER}


def _digest(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def _signers(pointer: bytes | None) -> list[str]:
    """Fingerprints of those who say that they signed the pointer."""
    try:
        said = [str(signature["keyid"]) for signature in json.loads(pointer or b"")["signatures"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    return [each for each in said if re.fullmatch(r"[0-9A-F]{40,64}", each)]
