"""What comes from outside, as actions: source trees, Debian packages, and the builders made of them.

Only these actions use the network, and what they bring is compared with the locks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pipeline import locks, pool
from pipeline.action import ALL, Action, File, Output, Step, Upstream
from pipeline.errors import UserError
from pipeline.recipes import Builder
from pipeline.worktree import WorkTree

#: The output of a source action: the patched tree.
TREE = "source.tar.zst"
#: The kind of an action whose output is a developer's work tree.
LOCAL = "local-source"
#: The output of a builder action.
ROOTFS = "rootfs.tar"


def source_name(name: str) -> str:
    """Name of the action that brings a source."""
    return f"source:{name}"


def packages_name(set_name: str) -> str:
    """Name of the action that fetches a package set."""
    return f"packages:{set_name}"


def builder_name(name: str) -> str:
    """Name of the action that makes a builder."""
    return f"builder:{name}"


def source(
    entry: locks.SourceLock, patches: Mapping[str, File], mirrors: Path, archives: pool.Archives
) -> Action:
    """Bring a locked source and apply our patches to it.

    `patches` maps file names to patches, which are applied in the order of their names; `mirrors`
    is the directory of bare git mirrors. The key holds the tree, not where it comes from: the same
    tree from another origin is the same input.
    """

    def run(step: Step) -> None:
        from pipeline import sources  # only a run that fetches needs it

        patch_dir = step.inputs / "patches"
        ordered = [patch_dir / name for name in sorted(patches)]
        sources.bring(entry, ordered, step.out / TREE, mirrors, step.scratch, archives, step.log)

    return Action(
        name=source_name(entry.name),
        kind="source",
        version=1,
        arch="all",
        summary=f"the source tree of {entry.name} {entry.ref}",
        run=run,
        files={f"patches/{name}": patch for name, patch in patches.items()},
        parameters={"name": entry.name, "tree": entry.tree},
        outputs=(Output(TREE),),
        resource="network",
    )


def local_source(name: str, worktree: WorkTree, said_by: str) -> Action:
    """Take a source from a developer's work tree, as it is now, without our patches.

    The step only writes down which tree that is: those who use the source see the work tree itself. The kind is another
    one than that of a locked source, so nothing that is made of it has the key of what is made from the lock.
    """
    snapshot = worktree.snapshot()

    def run(step: Step) -> None:
        (step.out / TREE).write_text(f"{snapshot.tree}\n")

    return Action(
        name=source_name(name),
        kind=LOCAL,
        version=1,
        arch="all",
        summary=f"the work tree {worktree.path} in the place of {name} ({said_by})",
        run=run,
        parameters={"name": name, "tree": snapshot.tree},
        outputs=(Output(TREE),),
        snapshot=snapshot,
    )


def packages(locked: locks.PackageSet, archives: pool.Archives) -> Action:
    """Fetch every package of a locked set that the store does not have yet."""

    def run(step: Step) -> None:
        missing = [package for package in locked.packages if not step.stored(package.sha256)]
        step.log(f"{len(locked.packages)} packages, {len(missing)} to fetch")

        def fetched(package: pool.Pinned) -> None:
            step.check_cancelled()
            step.log(f"fetched {package.filename}")

        pool.fetch_all(missing, step.out, archives, owner=locked.name, done=fetched)

    return Action(
        name=packages_name(locked.name),
        kind="packages",
        version=1,
        arch=locked.arch,
        summary=f"the Debian packages of {locked.name}",
        run=run,
        parameters={"suite": locked.suite},
        outputs=tuple(Output(package.filename, digest=package.sha256) for package in locked.packages),
        resource="network",
    )


def builder(name: str, recipe: Builder, locked: locks.PackageSet) -> Action:
    """Make the root file system of a builder, offline, from the packages that were fetched."""
    require_request(locked, recipe.packages, f"recipes/builders/{name}.toml", recipe.suite)

    def run(step: Step) -> None:
        from pipeline import rootfs  # only a run that makes a builder needs it

        rootfs.make_rootfs(
            step.inputs / "debs", locked.packages, locked.arch, locked.suite, step.out / ROOTFS, log=step.log
        )

    return Action(
        name=builder_name(name),
        kind="builder",
        version=1,
        arch=locked.arch,
        summary=f"the container image that {recipe.description}",
        run=run,
        inputs={"debs": Upstream(packages_name(locked.name), ALL)},
        parameters={"suite": locked.suite, "packages": [package.name for package in locked.packages]},
        outputs=(Output(ROOTFS),),
        resource="heavy",
    )


def require_request(locked: locks.PackageSet, asked: tuple[str, ...], recipe: str, suite: str) -> None:
    """Refuse a lock that was made for another list of packages than the recipe has now."""
    if set(locked.request) == set(asked) and locked.suite == suite:
        return
    changed = sorted(set(locked.request) ^ set(asked)) or [suite]
    raise UserError(
        f"{recipe} and {locks.PACKAGES_LOCK} differ: {', '.join(changed)}",
        f"lock what the recipe asks for: doit lock -u {locked.name}",
    )


def patches_of(root: Path, name: str) -> dict[str, File]:
    """Our patches to a source: `recipes/patches/<source>/NNNN-*.patch` of the checkout `root`."""
    directory = root / "recipes" / "patches" / name
    found = {}
    for path in sorted(directory.glob("*")) if directory.is_dir() else []:
        if not re.fullmatch(r"\d{4}-[\w.+-]+\.patch", path.name):
            raise UserError(
                f"{path.relative_to(root)} is not named like a patch", "name it NNNN-what-it-does.patch"
            )
        found[path.name] = File.read(path, path.relative_to(root).as_posix())
    return found
