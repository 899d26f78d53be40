"""One checkout: its recipes and locks, the graph made of them, and where results go."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import msgspec

from pipeline import (
    boot,
    drivers,
    history,
    image,
    inputs,
    kernel,
    lab,
    labhost,
    launch,
    libvirt,
    lint,
    localsources,
    locks,
    packages,
    pool,
    qemu,
    recipes,
    release,
    releaserecipe,
    repo,
    settings,
    signing,
    stack,
    tuning,
    worktree,
)
from pipeline.action import Action
from pipeline.artifacts import Artifacts
from pipeline.errors import UserError
from pipeline.graph import Graph
from pipeline.plan import State, plan
from pipeline.store import Store

DEFAULT_PLATFORM = "qemu-q35"


class Project:
    """A checkout and the cache it uses; everything is read when it is first asked for."""

    def __init__(
        self,
        root: Path,
        environ: Mapping[str, str] = os.environ,
        given_sources: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`root` is the checkout; `environ` decides the cache and the archive mirror.

        `given_sources` are directories of work trees by name of source, see `pipeline.localsources`.
        """
        self.root = root
        self.environ = environ
        self._given_sources = given_sources

    @cached_property
    def cache(self) -> Path:
        """`$XDG_CACHE_HOME/virt-rt`, by default below `~/.cache`."""
        base = self.environ.get("XDG_CACHE_HOME", "")
        if base and not Path(base).is_absolute():
            raise UserError(f"XDG_CACHE_HOME is {base}, not an absolute path", "set it to one, or unset it")
        return (Path(base) if base else Path.home() / ".cache") / "virt-rt"

    @cached_property
    def config(self) -> Path:
        """`$XDG_CONFIG_HOME/virt-rt`, by default below `~/.config`: where the development key is."""
        base = self.environ.get("XDG_CONFIG_HOME", "")
        if base and not Path(base).is_absolute():
            raise UserError(f"XDG_CONFIG_HOME is {base}, not an absolute path", "set it to one, or unset it")
        return (Path(base) if base else Path.home() / ".config") / "virt-rt"

    @cached_property
    def signer(self) -> signing.Identity | None:
        """Who signs; None as long as no key is named and no development key was made."""
        return signing.identity(self.environ, self.config)

    def bring_signer(self, names: Iterable[str]) -> signing.Identity | None:
        """Make the development key when these actions need one that is not there; return what was made.

        The keys of actions that sign change with it, so this comes before anything is planned.
        """
        if self.signer is not None:
            return None
        if not any(signing.PARAMETER in self.graph[name].parameters for name in self.graph.closure(names)):
            return None
        made = signing.ensure(self.environ, self.config)
        del self.signer, self.graph
        return made

    @cached_property
    def archives(self) -> pool.Archives:
        """Debian's archives, or the mirror that stands in for them."""
        return pool.Archives.from_environment(self.environ)

    @cached_property
    def recipes(self) -> recipes.Recipes:
        """What is asked for."""
        return recipes.load(self.root)

    @cached_property
    def settings(self) -> settings.Table:
        """How hosts are set."""
        return settings.load(self.root)

    @cached_property
    def release(self) -> releaserecipe.ReleaseRecipe:
        """What the next release is called, and where it goes."""
        return releaserecipe.load(self.root, self.environ)

    @cached_property
    def sources_lock(self) -> locks.SourcesLock:
        """Which source trees are used."""
        return locks.load_sources(self.root / locks.SOURCES_LOCK)

    @cached_property
    def local_sources(self) -> dict[str, localsources.LocalSource]:
        """Which sources are taken from work trees instead, by name."""
        known = [entry.name for entry in self.sources_lock.sources]
        return localsources.load(self.root, self._given_sources, known)

    @cached_property
    def packages_lock(self) -> locks.PackagesLock:
        """Which Debian packages are used."""
        return locks.load_packages(self.root / locks.PACKAGES_LOCK)

    @cached_property
    def packages(self) -> locks.PackagesLock:
        """`packages_lock`, and in it a set for each guest that has those of another one."""
        lock, asked = self.packages_lock, self.recipes
        shared = []
        for name, guest in asked.guests.items():
            if (owner := asked.package_owner(name)) != name:
                owned = lock.get(f"guest/{owner}", asked.platforms[guest.platform].arch)
                shared.append(msgspec.structs.replace(owned, name=f"guest/{name}"))
        return lock.replace(shared) if shared else lock

    @cached_property
    def store(self) -> Store:
        """The local store."""
        return Store(self.cache)

    @cached_property
    def artifacts(self) -> Artifacts:
        """Where products are laid out."""
        return Artifacts(self.root / "artifacts")

    @cached_property
    def graph(self) -> Graph:
        """Every action of the project, with its key."""
        return Graph(self._actions())

    def products(self, platform: str) -> tuple[str, ...]:
        """Names of all products of a platform, in build order; without those that a work tree may not get into."""
        self.recipes.platform(platform)
        prefix = f"{platform}/"
        return tuple(
            a.name
            for a in self.graph
            if a.place is not None
            and a.place.startswith(prefix)
            and not (a.name in self.graph.tainted and a.kind == "release")
        )

    def refuse_tainted(self, names: Iterable[str]) -> None:
        """UserError when what is given out would be made from a work tree by bringing these actions up to date."""
        for name in self.graph.closure(names):
            self.graph.refuse(name)

    def plan(self, names: Iterable[str]) -> dict[str, State]:
        """What a run of these actions would do."""
        keys = self.graph.keys
        return plan(
            self.graph,
            names,
            placed=lambda action: self.artifacts.current(action, keys[action.name]),
            stored=lambda action: self.store.lookup(keys[action.name]) is not None,
        )

    def expected_seconds(self, name: str) -> float | None:
        """How long that step took the last time on this machine, if it ever ran."""
        known = history.last(self.store, self.graph.remembered_as(name))
        return known.seconds if known else None

    # The graph --------------------------------------------------------------------------------

    def _actions(self) -> list[Action]:
        made: dict[str, Action] = {}

        def add(action: Action) -> None:
            made[action.name] = action

        asked = self.recipes
        asked_drivers = drivers.load(self.root, asked.platforms)
        for name, platform in asked.platforms.items():
            kernels = [platform.kernel.source_of(role) for role in kernel.ROLES]
            for source in (*kernels, platform.qemu.source):
                if inputs.source_name(source) not in made:
                    add(self._source(source))
            for role in kernel.ROLES:
                add(
                    kernel.kernel(
                        self.root, name, platform, role, platform.kernel.source in self.local_sources
                    )
                )
            add(qemu.qemu(self.root, name, platform))
            if (emulator := qemu.emulator(self.root, name, platform)) is not None:
                add(emulator)
        for name, builder in asked.builders.items():
            locked = self.packages.get(f"builder/{name}")
            add(inputs.packages(locked, self.archives))
            add(inputs.builder(name, builder, locked))
        for name, guest in asked.guests.items():
            platform = asked.platforms[guest.platform]
            locked = self.packages.get(f"guest/{name}", platform.arch)
            add(inputs.packages(locked, self.archives))
            add(image.rootfs(self.root, name, guest, platform, locked))
            add(image.disk(self.root, name, guest, platform))
            guests, plan = asked.guests_of(guest.platform), asked.plans[guest.platform]
            add(launch.launch(self.root, name, platform, guests, plan))
            add(libvirt.libvirt(self.root, name, platform, guests, plan))
        for name, platform in asked.platforms.items():
            guests = asked.guests_of(name)
            add(tuning.tuning(self.root, name, platform, asked.plans[name], guests, self.settings))
            add(boot.boot_proof(self.root, name, platform, guests))
            if platform.stack_proof:
                for action in stack.stack_proof(
                    self.root, name, platform, guests, asked.plans[name], self.settings
                ):
                    add(action)
        releases = release.Maker(
            self.root, self.release, self.sources_lock, self.packages, self.environ, self.config
        )
        maker = packages.Maker.of(self.root, self.release, self.sources_lock)
        for action in maker.shared(asked.platforms):
            add(action)
        for name, platform in asked.platforms.items():
            built = drivers.builds(asked_drivers, name, asked.extended(name))
            for build in built:
                brought = build.recipe.source
                if brought is not None and inputs.source_name(brought) not in made:
                    add(self._source(brought))
                for action in drivers.actions(self.root, name, platform, build, self.environ):
                    add(action)
            packed_here = maker.of_platform(name, platform, asked.guests_of(name), built)
            for action in packed_here:
                add(action)
            add(lint.lint(self.root, name, platform, packed_here, maker.recipes))
            placed = [a for a in made.values() if (a.place or "").startswith(f"{name}/packages")]
            packed = [a.name for a in placed if a.kind == "package"]
            checks = [a.name for a in placed if a.kind != "package"]
            add(
                repo.repo(
                    name, platform.arch, packed, checks, self.release, self.signer, self.environ, self.config
                )
            )
            if platform.stack_proof:
                if labhost.disk_name(platform.arch) not in made:
                    add(labhost.disk(self.root, platform.arch))
                installed = labhost.packages_of(name, asked.guests_of(name), built, packed)
                add(labhost.labhost(self.root, name, platform, asked.plans[name], self.settings, installed))
            add(lab.lab(self.root, name, platform, asked.plans[name], made))
            add(releases.release(name, platform, asked.guests_of(name), asked.plans[name], made))
        return list(made.values())

    def _source(self, name: str) -> Action:
        local = self.local_sources.get(name)
        if local is not None:
            tree = worktree.open_tree(local.directory, self.cache / "local")
            return inputs.local_source(name, tree, local.said_by)
        return inputs.source(
            self.sources_lock.get(name),
            inputs.patches_of(self.root, name),
            self.cache / "git",
            self.archives,
        )
