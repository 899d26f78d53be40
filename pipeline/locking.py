"""Writing the locks: what the recipes ask for, pinned to what the origins have now.

Locking one name leaves all other entries as they are, to the byte.
"""

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from pipeline.architecture import BUILD
from pipeline.debian import AptRoot, Unresolvable
from pipeline.errors import UserError
from pipeline.git import NoAnswer
from pipeline.locks import LockedPackage, PackageSet, PackagesLock, SourceLock, SourcesLock, foreign
from pipeline.pool import Archives, Pinned, answers
from pipeline.sourcerecipe import DebianOrigin, GitOrigin, SourceRecipe
from pipeline.sources import Sources
from pipeline.versions import highest

P = TypeVar("P", bound=Pinned)


@dataclass(frozen=True, slots=True)
class Request:
    """What a recipe asks for: the packages of one builder or guest image."""

    name: str
    arch: str
    suite: str
    packages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Locker:
    """Pins sources and packages at what their origins have now.

    sources   the repositories, with the archives and the log to use
    apt       directory in which apt keeps its state, one below it per suite and architectures
    """

    sources: Sources
    apt: Path
    _updated: dict[str, AptRoot] = field(default_factory=dict)

    @property
    def archives(self) -> Archives:
        """Where Debian's files come from."""
        return self.sources.archives

    def lock_all(
        self,
        recipes: Mapping[str, SourceRecipe],
        requests: Iterable[Request],
        sources: SourcesLock,
        packages: PackagesLock,
        name: str | None = None,
    ) -> tuple[SourcesLock, PackagesLock]:
        """Lock everything anew, or only what `name` names: a source or a package set.

        Entries that no recipe asks for any more are dropped when everything is locked. UserError when
        nothing has that name, or when apt has no answer.
        """
        requests = list(requests)
        known = [*sorted(recipes), *sorted({request.name for request in requests})]
        if name is not None and name not in known:
            raise UserError(
                f"there is neither a source nor a package set {name}", f"one of: {', '.join(known)}"
            )
        chosen = [recipe for recipe in sorted(recipes) if name in (None, recipe)]
        entries = [self.lock_source(source, recipes[source], sources.find(source)) for source in chosen]
        sets = [self.lock_packages(request) for request in requests if name in (None, request.name)]
        if name is None:
            sources, packages = SourcesLock(), PackagesLock()
        return sources.replace(entries), packages.replace(sets)

    def lock_source(self, name: str, recipe: SourceRecipe, old: SourceLock | None = None) -> SourceLock:
        """Pin a source at the first of its origins that answers; an open entry when none does.

        Where that is what `old` pins and the cache has it, it is not imported again.
        """
        log = self.sources.log
        reasons = []
        for origin in recipe.origins:
            try:
                if isinstance(origin, GitOrigin):
                    where = origin.url
                    entry = self._lock_git(name, origin)
                else:
                    where = f"Debian {origin.suite}"
                    entry = self.lock_debian(name, origin, old)
            except NoAnswer as error:
                reasons.append(f"{where}: {error}")
                log(f"{name}: {where} does not answer: {error}")
                continue
            log(f"{name}: {entry.ref} from {where}, tree {entry.tree}")
            return entry
        log(f"{name}: stays open, since no origin answers; whoever needs it cannot be built")
        return SourceLock(name=name, reason="; ".join(reasons))

    def _lock_git(self, name: str, origin: GitOrigin) -> SourceLock:
        with self.sources.mirror(name) as mirror:
            refs = mirror.refs(origin.url)
            ref = highest(origin.ref, refs, origin.exclude)
            if ref is None:
                raise NoAnswer(f"no tag or branch matches {origin.ref}")
            commit = mirror.fetch_ref(origin.url, refs[ref])
            tree = mirror.tree(commit)
        return SourceLock(name=name, origin="git", location=origin.url, ref=ref, commit=commit, tree=tree)

    def lock_debian(self, name: str, origin: DebianOrigin, old: SourceLock | None = None) -> SourceLock:
        """Pin the newest version of a source package of which every file can be had; NoAnswer when none
        can.
        """
        try:
            apt = self.apt_root(origin.suite, BUILD)
            for version in [origin.version] if origin.version else apt.sources(origin.package):
                files = apt.source(origin.package, version)
                if self.unavailable(files):
                    self.sources.log(
                        f"{name}: {origin.package} {version} is listed, but its files are not there"
                    )
                    continue
                if old is not None and (old.ref, old.series, old.files) == (version, origin.series, files):
                    if self.sources.holds(old):
                        return msgspec.structs.replace(old, location=origin.suite)
                commit, tree = self.sources.import_debian(name, version, origin.series, files)
                return SourceLock(
                    name=name,
                    origin="debian",
                    location=origin.suite,
                    ref=version,
                    commit=commit,
                    tree=tree,
                    series=origin.series,
                    files=files,
                )
        except UserError as error:
            raise NoAnswer(error.message) from error
        raise NoAnswer(f"of {origin.package} no version that is listed has its files there")

    def lock_packages(self, request: Request) -> PackageSet:
        """Pin everything that a builder or image needs, at the newest versions that can be had."""
        apt = self.apt_root(request.suite, request.arch, foreign(request.packages))
        try:
            packages = self.settle(apt, request.packages, {})
        except Unresolvable as error:
            raise UserError(f"{request.name}: {error.message}", error.hint) from None
        size = sum(package.size for package in packages) / 1e6
        self.sources.log(f"{request.name}: {len(packages)} packages, {size:.0f} MB")
        return PackageSet(
            name=request.name,
            arch=request.arch,
            suite=request.suite,
            request=tuple(sorted(request.packages)),
            packages=packages,
        )

    def apt_root(self, suite: str, arch: str, others: tuple[str, ...] = ()) -> AptRoot:
        """Return apt for a suite, its indexes fetched once per run; `others` are architectures beside `arch`."""
        name = "-".join((suite, arch, *others))
        if name not in self._updated:
            root = AptRoot(self.apt / name, suite, arch, self.archives, foreign=others)
            root.update()
            self._updated[name] = root
        return self._updated[name]

    def settle(
        self, apt: AptRoot, request: Collection[str], keep: Mapping[str, LockedPackage]
    ) -> tuple[LockedPackage, ...]:
        """Resolve a request among the packages that can be had, those of `keep` at their versions.

        An archive may list what its servers do not have; such versions are refused and apt is asked again.
        """
        refused: set[tuple[str, str]] = set()
        while True:
            apt.pin([(package.name, package.version) for package in keep.values()], refused)
            packages = [_kept(package, keep) for package in apt.resolve(request)]
            lost = self.unavailable([package for package in packages if package.name not in keep])
            if not lost:
                return tuple(packages)
            for package in packages:
                if package in lost:
                    self.sources.log(f"{package.name} {package.version} is listed, but its file is not there")
                    refused.add((package.name, package.version))

    def unavailable(self, files: Collection[P]) -> list[P]:
        """Return those files that are neither here nor in the archive any more."""

        def missing(pinned: P) -> bool:
            return self.sources.local(pinned.sha256) is None and not answers(self.archives.url(pinned))

        files = list(files)
        with ThreadPoolExecutor(8) as pool:
            return [pinned for pinned, lost in zip(files, pool.map(missing, files), strict=True) if lost]


def _kept(package: LockedPackage, keep: Mapping[str, LockedPackage]) -> LockedPackage:
    """Prefer the locked entry of a package that stays: its path may be one that no index lists any more."""
    locked = keep.get(package.name)
    return locked if locked is not None and locked.version == package.version else package
