"""A release of a platform: one directory with all that a receiver needs to install it and to check it.

What is in it and where it comes from is in `release.json`, both SBOMs and the provenance; `SHA256SUMS` has every file
but itself, its signature and the provenance, which is about exactly these files and signed on its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pipeline import inputs, releaserecord, signing
from pipeline.action import ALL, Action, File, Output, Step, Upstream
from pipeline.boot import boot_name
from pipeline.cpuplan import HostPlan
from pipeline.image import DISK, image_name, rootfs_name
from pipeline.kernel import ROLES, kernel_name
from pipeline.lab import lab_name
from pipeline.launch import launch_name
from pipeline.libvirt import libvirt_name
from pipeline.locks import PackagesLock, SourcesLock
from pipeline.recipes import Guest, Platform
from pipeline.releaserecipe import ReleaseRecipe
from pipeline.releaserecord import (
    CYCLONEDX,
    KEY,
    LAB,
    MATERIALS,
    PAGE,
    PROOFS,
    RECORD,
    REPOSITORY,
    SPDX,
    UNSUMMED,
)
from pipeline.repo import repo_name
from pipeline.stack import stack_name

TEMPLATES = "recipes/templates/release"


def release_name(platform: str) -> str:
    """Name of the action that makes a platform's release directory."""
    return f"release:{platform}"


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes the releases of a checkout: what all its platforms share; `root` is the checkout.

    `environ` and `config` bring the key that signs (`pipeline.signing`).
    """

    root: Path
    recipe: ReleaseRecipe
    sources: SourcesLock
    packages: PackagesLock
    environ: Mapping[str, str]
    config: Path

    def release(
        self,
        name: str,
        platform: Platform,
        guests: Mapping[str, Guest],
        plan: HostPlan,
        actions: Mapping[str, Action],
    ) -> Action:
        """The release of the platform `name`; `actions` are all others of the project, by name.

        It is signed by who signs the repository, and bears its date.
        """
        repo = actions[repo_name(name)]
        needed = _inputs(name, guests, actions)
        closure = _closure(actions, {used.action for used in needed.values()})
        packages = {each: _sources_in(actions, each) for each in closure if actions[each].kind == "package"}
        needed |= {
            f"packages/{each.rpartition(':')[2]}.json": Upstream(each, "package.json") for each in packages
        }
        sources = sorted({each for found in packages.values() for each in found})
        builders = [each.partition(":")[2] for each in closure if actions[each].kind == "builder"]
        sets = [self.packages.get(f"builder/{each}") for each in builders]
        sets += [self.packages.get(f"guest/{each}", platform.arch) for each in guests]
        before = releaserecord.previous(self.root, name, self.recipe.version)
        files = {
            "sources.lock": self._lock([self.sources.get(each) for each in sources], "sources.lock"),
            "packages.lock": self._lock(sets, "packages.lock"),
            **{
                f"patches/{source}/{patch}": file
                for source in sources
                for patch, file in inputs.patches_of(self.root, source).items()
            },
            **{
                f"templates/{path.name}": File.read(path, f"{TEMPLATES}/{path.name}")
                for path in sorted((self.root / TEMPLATES).glob("*.j2"))
            },
        }
        if before:
            files["previous.json"] = File(
                msgspec.json.encode(before, order="sorted"), origin=f"{releaserecord.MEMORY}/{name}.json"
            )
        parameters: dict[str, Any] = {
            "platform": name,
            "description": platform.description,
            "guests": {guest: asked.description for guest, asked in guests.items()},
            "release": msgspec.to_builtins(self.recipe),
            "date": repo.parameters["date"],
            "plan": plan.to_json(),
            # keys of what is upstream cover what it is, not what it is called
            "closure": closure,
            "packages": {each.rpartition(":")[2]: found for each, found in packages.items()},
            signing.PARAMETER: repo.parameters[signing.PARAMETER],
        }

        def run(step: Step) -> None:
            from pipeline.releasedirectory import write  # a run that makes no release does without

            write(step, self.recipe, plan, signing.Signer(self.environ, self.config))

        kept = [path for path in needed if not path.startswith(("packages/", "rootfs/", f"{REPOSITORY}"))]
        return Action(
            name=release_name(name),
            kind="release",
            version=1,
            arch=platform.arch,
            summary=f"the release of {name}: packages, repository, images, proofs, where all comes from",
            run=run,
            files=files,
            inputs=needed,
            parameters=parameters,
            outputs=(
                *(Output(f"{REPOSITORY}/{output.name}", output.kind) for output in repo.outputs),
                *(Output(path) for path in kept),
                *(Output(each) for each in (RECORD, MATERIALS, SPDX, CYCLONEDX, PAGE, KEY, *UNSUMMED)),
            ),
            place=f"{name}/release",
            given_out="a release is made from what is locked",
        )

    @staticmethod
    def _lock(entries: list[Any], name: str) -> File:
        return File(msgspec.json.encode(entries), origin=f"recipes/{name}")


def _inputs(name: str, guests: Mapping[str, Guest], actions: Mapping[str, Action]) -> dict[str, Upstream]:
    """What the directory is made of, by where it goes in it; package lists lie in `rootfs/` and do not go there."""
    needed = {REPOSITORY: Upstream(repo_name(name), ALL)}
    for role in ROLES:
        of = kernel_name(name, role)
        needed[f"kernels/{role}.config"] = Upstream(of, "config")
        needed[f"kernels/{role}.release"] = Upstream(of, "kernelrelease")
    for guest in guests:
        needed[f"images/{guest}.qcow2"] = Upstream(image_name(guest), DISK)
        needed[f"rootfs/{guest}.txt"] = Upstream(rootfs_name(guest), "packages.txt")
        for of in (launch_name(guest), libvirt_name(guest)):
            needed |= {f"scripts/{guest}/{out.name}": Upstream(of, out.name) for out in actions[of].outputs}
    needed |= {
        f"{LAB}/{output.name}": Upstream(lab_name(name), output.name)
        for output in actions[lab_name(name)].outputs
    }
    for level, of in (("boot", boot_name(name)), ("stack", stack_name(name))):
        if of in actions:
            needed[f"proof/{PROOFS[level]}"] = Upstream(of, PROOFS[level])
    return needed


def _closure(actions: Mapping[str, Action], names: Iterable[str]) -> list[str]:
    """`names` and all they are made from, sorted."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += actions[name].upstreams
    return sorted(found)


def _sources_in(actions: Mapping[str, Action], package: str) -> list[str]:
    """The locked sources that are in a package, and not only in another one that it needs."""
    found: set[str] = set()
    pending = [package]
    while pending:
        action = actions[pending.pop()]
        if action.kind == "source":
            found.add(action.name.partition(":")[2])
        pending += [each for each in action.upstreams if actions[each].kind != "package"]
    return sorted(found)
