"""The commands of `doit` that change the locks, and the one that exports what they pin."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pipeline import locks
from pipeline.architecture import BUILD
from pipeline.errors import UserError
from pipeline.face import Face, session
from pipeline.healing import moved_packages, moved_sources
from pipeline.inputs import packages_name, source_name
from pipeline.locking import Locker, Request
from pipeline.mirror import write_mirror
from pipeline.plan import State
from pipeline.project import Project
from pipeline.sourcerecipe import SourceRecipe, load_recipes
from pipeline.sources import Sources


def say(line: str) -> None:
    """Tell what locking does while it does it."""
    print(line, file=sys.stderr, flush=True)


def locker_of(project: Project) -> Locker:
    """The locker of a project; what the store has counts as being there."""
    store = project.store

    def local(sha256: str) -> Path | None:
        return store.path(sha256) if store.has(sha256) else None

    sources = Sources(project.cache / "git", store.stage("lock"), project.archives, say, local)
    return Locker(sources, project.cache / "apt")


def requests_of(project: Project) -> list[Request]:
    """The package sets that the recipes ask for."""
    asked = project.recipes
    found = [Request(f"builder/{n}", BUILD, b.suite, b.packages) for n, b in asked.builders.items()]
    for name, guest in asked.guests.items():
        if asked.package_owner(name) != name:
            continue
        arch = asked.platforms[guest.platform].arch
        found.append(Request(f"guest/{name}", arch, guest.image.suite, guest.image.packages))
    return found


def source_recipes(project: Project) -> dict[str, SourceRecipe]:
    """`recipes/sources.toml`."""
    return load_recipes(project.root / "recipes" / "sources.toml")


def write_locks(project: Project, sources: locks.SourcesLock, packages: locks.PackagesLock) -> None:
    """Write both locks, each whole or not at all."""
    locks.dump_sources(sources, project.root / locks.SOURCES_LOCK)
    locks.dump_packages(packages, project.root / locks.PACKAGES_LOCK)


class Lock(Face):
    """`doit lock`."""

    name = "lock"
    doc_purpose = "pin sources and packages at what their origins have now"
    doc_usage = "[-u NAME]..."
    cmd_options = (
        {
            "name": "update",
            "short": "u",
            "long": "update",
            "type": list,
            "default": [],
            "help": "move only this source or package set (may be repeated)",
        },
    )

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Write the locks; what is not named stays as it is, to the byte."""
        if args:
            raise UserError(f"doit lock takes no {args[0]}", f"doit lock -u {args[0]}")
        project = session().project
        sources, packages = project.sources_lock, project.packages_lock
        try:
            locker = locker_of(project)
            for name in params["update"] or [None]:
                sources, packages = locker.lock_all(
                    source_recipes(project), requests_of(project), sources, packages, name
                )
            write_locks(project, sources, packages)
        finally:
            project.store.close()


class Heal(Face):
    """`doit heal`."""

    name = "heal"
    doc_purpose = "move lock entries that have left the archive, and what must move along (`make` does this)"
    doc_usage = ""

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Write the locks only when something had to move; a line for each move."""
        project = session().project
        wanted = self._to_fetch(project)
        if not wanted:
            return
        packages = locks.PackagesLock(
            sets=tuple(s for s in project.packages_lock.sets if packages_name(s.name) in wanted)
        )
        sources = locks.SourcesLock(
            sources=tuple(s for s in project.sources_lock.sources if source_name(s.name) in wanted)
        )
        try:
            locker = locker_of(project)
            packages, moved = moved_packages(packages, locker, project.store.has)
            sources, moved_too = moved_sources(sources, source_recipes(project), locker)
        finally:
            project.store.close()
        if moved or moved_too:
            write_locks(
                project,
                project.sources_lock.replace(sources.sources),
                project.packages_lock.replace(packages.sets),
            )
        for change in [*moved, *moved_too]:
            print(change)

    def _to_fetch(self, project: Project) -> set[str]:
        """Names of the fetches that a build of everything would really do; no others are looked at."""
        states = project.plan(a.name for a in project.graph if a.place is not None)
        return {
            name
            for name, state in states.items()
            if state is State.BUILD and project.graph[name].kind in ("packages", "source")
        }


class Mirror(Face):
    """`doit mirror`."""

    name = "mirror"
    doc_purpose = "export everything that the locks pin, for a machine without network"
    doc_usage = "DIR"

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Write or complete the mirror; `VIRT_RT_MIRROR=DIR` makes a build use it."""
        target = Path(self.one(args, "DIR"))
        project = session().project
        try:
            write_mirror(target, project.sources_lock, project.packages_lock, locker_of(project).sources)
        finally:
            project.store.close()
        print(f"{target} holds all that is locked; use it with VIRT_RT_MIRROR={target.resolve()}")
