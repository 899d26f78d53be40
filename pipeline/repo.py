"""The signed repository of one release of a platform: what `doit publish` takes from here, and a stick carries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pipeline.action import ALL, Action, Output, Step, Upstream
from pipeline.errors import InternalError, UserError
from pipeline.files import digest_file
from pipeline.releaserecipe import ReleaseRecipe, RepositoryRecipe
from pipeline.signing import PARAMETER, Identity, parameter

#: Seconds since 1970 that the indexes bear instead of the key's first day; the standard's own name.
DATE_VARIABLE = "SOURCE_DATE_EPOCH"
PACKAGES, DOCUMENT = "packages", "package.json"


def repo_name(platform: str) -> str:
    """Name of the action that makes a platform's repository."""
    return f"repo:{platform}"


def repo(
    name: str,
    arch: str,
    packages: Sequence[str],
    checks: Sequence[str],
    release: ReleaseRecipe,
    identity: Identity | None,
    environ: Mapping[str, str],
    config: Path,
) -> Action:
    """Sign the packages of the platform `name`, and index them for apt and dnf.

    `packages` and `checks` are names of actions: those that make its packages, and those that must have passed.
    `environ` and `config` bring the key (`pipeline.signing`); of it the action's key has the fingerprint alone.
    """
    # Indexes count for ever here: how long they do is decided where they are published, at that time.
    recipe = msgspec.structs.replace(release.repository, valid_days=0)
    inputs = {f"{PACKAGES}/{package.rpartition(':')[2]}": Upstream(package, ALL) for package in packages}
    inputs |= {f"checks/{check.partition(':')[0]}": Upstream(check, ALL) for check in checks}
    channel = recipe.channels[0]

    def run(step: Step) -> None:
        make(step, recipe, environ, config)

    configurations = (f"virt-rt-{channel}.sources", f"virt-rt-{channel}.repo") if recipe.url else ()
    return Action(
        name=repo_name(name),
        kind="repo",
        version=1,
        arch=arch,
        summary=f"the signed apt and yum repository of {name}",
        run=run,
        inputs=inputs,
        parameters={
            "platform": name,
            "version": release.version,
            "repository": msgspec.to_builtins(recipe),
            "date": _date(environ, identity),
            PARAMETER: parameter(identity),
        },
        outputs=(
            *(Output(directory, "directory") for directory in ("apt", "yum", "state")),
            *(Output(file) for file in ("key.asc", "repository.json", *configurations)),
        ),
        place=f"{name}/repo",
        given_out="" if identity is None or identity.development else f"{identity.name} signs what is locked",
    )


def make(step: Step, recipe: RepositoryRecipe, environ: Mapping[str, str], config: Path) -> None:
    """Sign copies of the rpms, and write the repository that has this one release."""
    from pipeline import publication, repository  # a run that makes nothing does without
    from pipeline.packagefile import examine
    from pipeline.signing import Signer

    asked = step.action.parameters
    with Signer(environ, config) as signer:
        if parameter(signer.identity) != asked[PARAMETER]:
            raise UserError("the signing key changed while doit ran", "run doit again")
        step.log(f"signed by {signer.identity.name}, {signer.identity.fingerprint}")
        found = _packages(step)
        rpms = [path for path in found if path.suffix == ".rpm"]
        # as of the key's first day, so that an rpm of two releases is one file
        signer.sign_rpms(rpms, signer.identity.created)
        step.check_cancelled()
        examined = {path: examine(path) for path in found}
        packages = list(examined.values())
        release = repository.Release(
            asked["platform"],
            asked["version"],
            repository.release_id(packages),
            asked["date"],
            tuple(sorted(package.sha256 for package in packages)),
        )
        state = repository.with_release(repository.EMPTY, recipe.channels[0], release, packages, recipe.keep)
        made = publication.publication(repository.EMPTY, state, recipe, signer, asked["date"])
    paths = {package.sha256: path for path, package in examined.items()}
    for where, digest in made.packages.items():
        target = step.out / where
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(paths[digest])  # nothing of the stage is changed after this
    for where, content in [*made.indexes.items(), *made.entries]:
        target = step.out / where
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    step.log(f"{len(packages)} packages")


def _packages(step: Step) -> list[Path]:
    """Every package file, rpms as copies that may be signed; each is what its package.json says."""
    found = []
    for document in sorted((step.inputs / PACKAGES).rglob(DOCUMENT)):
        described: dict[str, Any] = json.loads(document.read_text())
        for format_, said in sorted(described["formats"].items()):
            path = document.parent / format_ / said["file"]
            if digest_file(path) != said["sha256"]:
                raise InternalError(f"{path.name} is not what its {DOCUMENT} says", "look at the packager")
            if format_ == "rpm":
                copy = step.scratch / path.name
                if copy.exists():
                    raise InternalError(f"two packages are called {path.name}", "rename one of the recipes")
                shutil.copyfile(path, copy)
                path = copy
            found.append(path)
    return found


def _date(environ: Mapping[str, str], identity: Identity | None) -> int:
    """What the indexes and their signatures bear: no earlier than the key, and the same at every run."""
    said = environ.get(DATE_VARIABLE, "0") or "0"
    if not said.isascii() or not said.isdigit():
        raise UserError(f"{DATE_VARIABLE} is {said!r}", "set it to seconds since 1970, or unset it")
    return max(int(said), identity.created if identity else 0)
