"""Moving what has left the archive, what must move along, and nothing else.

Debian keeps a version for only so long. `make` calls this so that a newcomer is not stopped by it;
everything that can still be had stays at its locked version.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.debian import AptRoot, Unresolvable
from pipeline.errors import UserError
from pipeline.git import NoAnswer
from pipeline.locking import Locker
from pipeline.locks import (
    LockedPackage,
    PackageSet,
    PackagesLock,
    SourceLock,
    SourcesLock,
    foreign,
    qualified,
)
from pipeline.pool import fetch_all
from pipeline.rootfs import write_index
from pipeline.sourcerecipe import DebianOrigin, SourceRecipe

LEFT = "left the archive"
_UNMET = re.compile(
    r"^ +(?:(?P<left>[^\s:]+(?::(?!any\b)\w+)?)(?::any)? : )?(?:Pre-Depends|Depends|Breaks|Conflicts): "
    r"(?P<right>[^\s:]+(?::(?!any\b)\w+)?).*?(?P<held>but \S+ is to be installed)?$"
)


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of a lock that has moved; `old` or `new` is empty when the entry came or went."""

    owner: str
    name: str
    old: str
    new: str
    reason: str

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.owner}: {self.name} {self.old or '(none)'} -> {self.new or '(none)'} ({self.reason})"


def moved_packages(
    lock: PackagesLock, locker: Locker, have: Callable[[str], bool]
) -> tuple[PackagesLock, list[Change]]:
    """Move the packages that neither `have` (asked by sha256) nor the archive has any more.

    Returns the new lock and one Change per package that moved, came or went. UserError when apt finds no
    answer.
    """
    changes: list[Change] = []
    for locked in lock.sets:
        gone = {p.name for p in locker.unavailable([p for p in locked.packages if not have(p.sha256)])}
        if gone:
            packages, reasons = _resettle(locked, gone, locker)
            changes += _differences(locked, packages, gone, reasons)
            moved = PackageSet(
                name=locked.name,
                arch=locked.arch,
                suite=locked.suite,
                request=locked.request,
                packages=packages,
            )
            lock = lock.replace([moved])
    return lock, changes


def moved_sources(
    lock: SourcesLock, recipes: Mapping[str, SourceRecipe], locker: Locker
) -> tuple[SourcesLock, list[Change]]:
    """Move the Debian sources that neither the cache nor the archive has any more, to the newest of
    their suite.

    Gone versions that the recipe fixes, and sources from git, stay; building them says what is wrong.
    """
    changes = []
    for entry in lock.sources:
        origin = _origin(entry, recipes)
        if origin is None or locker.sources.has(entry) or not locker.unavailable(entry.files):
            continue
        try:
            moved = locker.lock_debian(entry.name, origin)
        except NoAnswer as error:
            raise UserError(
                f"{entry.name} {entry.ref} has left the archive: {error}", "try again later"
            ) from None
        changes.append(Change(entry.name, origin.package, entry.ref, moved.ref, LEFT))
        lock = lock.replace([moved])
    return lock, changes


def _origin(entry: SourceLock, recipes: Mapping[str, SourceRecipe]) -> DebianOrigin | None:
    """Return the origin that an entry was locked from, unless it fixes the version."""
    for origin in recipes[entry.name].origins if entry.name in recipes else ():
        if isinstance(origin, DebianOrigin) and entry.origin == "debian" and not origin.version:
            if (origin.suite, origin.series) == (entry.location, entry.series):
                return origin
    return None


def _resettle(
    locked: PackageSet, gone: set[str], locker: Locker
) -> tuple[tuple[LockedPackage, ...], dict[str, str]]:
    """Resolve a set again with everything pinned that is still there; unpin what apt cannot do without
    moving.

    Returns the packages, and for each that was unpinned the package it moves along with.
    """
    keep = {package.name: package for package in locked.packages if package.name not in gone}
    reasons: dict[str, str] = {}
    with _offering(locked, keep, locker) as apt:
        known = apt.known()
        names = [package.name for package in locked.packages if package.name in known or package.bare_name in known]
        while True:
            try:
                # Asked for by name, each package says itself why it cannot be had; what is no longer
                # needed falls out in the second step.
                locker.settle(apt, names, keep)
                return locker.settle(apt, locked.request, keep), reasons
            except Unresolvable as error:
                unpinned = _must_move(error.output, keep)
                if not unpinned:
                    raise UserError(
                        f"{locked.name}: {error.message}", f"run: doit lock -u {locked.name}"
                    ) from None
                for name, other in unpinned.items():
                    del keep[name]
                    reasons[name] = other


@contextlib.contextmanager
def _offering(locked: PackageSet, keep: Mapping[str, LockedPackage], locker: Locker) -> Iterator[AptRoot]:
    """Give an apt that offers the suite and those kept packages which its indexes no longer list."""
    others = foreign(locked.request)
    suite = locker.apt_root(locked.suite, locked.arch, others)
    listed = {
        (qualified(stanza["Package"], stanza["Architecture"], locked.arch), stanza["Version"])
        for stanza in suite.stanzas(keep)
    }
    unlisted = [package for package in keep.values() if (package.name, package.version) not in listed]
    if not unlisted:
        yield suite
        return
    with tempfile.TemporaryDirectory(prefix="kept-", dir=locker.sources.scratch) as scratch:
        extra = Path(scratch) / "repository"
        fetch_all(unlisted, extra, locker.archives, owner=locked.name, local=locker.sources.local)
        write_index(extra)
        apt = AptRoot(
            Path(scratch) / "apt", locked.suite, locked.arch, locker.archives, foreign=others, extra=extra
        )
        apt.update()
        yield apt


def _must_move(output: str, keep: Mapping[str, LockedPackage]) -> dict[str, str]:
    """Read from apt's complaints which pinned packages stand in the way, each with the package it must
    follow.

    `a : Depends: b (= 2) but 1 is to be installed`: b holds a back and must move. Where b is not pinned
    itself, it is a that only fits the old b.
    """
    found: dict[str, str] = {}
    left = ""
    for line in output.splitlines():
        complaint = _UNMET.match(line)
        if complaint is None:
            continue
        left = complaint["left"] or left
        right = complaint["right"]
        if right in keep and complaint["held"]:
            found[right] = left
        elif left in keep and right not in keep:
            found[left] = right
    return found


def _differences(
    locked: PackageSet, packages: tuple[LockedPackage, ...], gone: set[str], reasons: Mapping[str, str]
) -> Iterator[Change]:
    old = {package.name: package.version for package in locked.packages}
    new = {package.name: package.version for package in packages}
    for name in sorted(old | new):
        if old.get(name) == new.get(name):
            continue
        if name in gone:
            reason = LEFT
        elif name in reasons:
            reason = f"moves along with {reasons[name]}"
        else:
            reason = "needed now" if name in new else "no longer needed"
        yield Change(locked.name, name, old.get(name, ""), new.get(name, ""), reason)
