"""The check of all packages of a platform: linters, the kernels' contract, and how the packages fit together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from pipeline.action import ALL, Action, File, Output, Upstream
from pipeline.architecture import architecture
from pipeline.inputs import builder_name
from pipeline.kernel import CONTRACT, ROLES
from pipeline.packagerecipe import DIRECTORY, Override, PackageRecipe
from pipeline.recipefile import read
from pipeline.recipes import Platform

BUILDER = "package-lint"
STEP = "recipes/steps/package-lint.sh"
HELPERS = ("pipeline/packagelint.py", "pipeline/contract.py")
#: What is accepted of every package.
RECIPE = "recipes/lint.toml"
REPORT = "lint.json"


class LintRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Findings that are accepted of every package."""

    overrides: tuple[Override, ...] = ()


def lint_name(platform: str) -> str:
    """Name of the action that examines a platform's packages."""
    return f"lint:{platform}"


def lint(
    root: Path, name: str, platform: Platform, packed: Iterable[Action], recipes: Mapping[str, PackageRecipe]
) -> Action:
    """Examine the packages `packed` of a platform; `root` is the checkout, `recipes` those of the packages by name."""
    named = {action.name: action.name.rpartition(":")[2] for action in packed}
    common = read(root / RECIPE, LintRecipe, root)
    accepted = {
        what: _recipe_of(what, recipes).of_architecture(platform.arch).overrides for what in named.values()
    } | {"*": common.overrides}
    fragments = {role: platform.kernel.fragments_of(role) for role in ROLES}
    asked = {
        "overrides": msgspec.to_builtins(accepted),
        "fragments": fragments,
        "contract": CONTRACT,
        "arch": architecture(platform.arch).kernel,
    }
    files = {Path(path).name: File.read(root / path, path) for path in HELPERS}
    for path in dict.fromkeys((*fragments["host"], *fragments["guest"], CONTRACT)):
        files[f"kernel-configs/{path}"] = File.read(root / "kernel-configs" / path, f"kernel-configs/{path}")
    files[REPORT] = File(
        (json.dumps(asked, indent=1) + "\n").encode(), origin=f"{RECIPE} and {DIRECTORY}/*.toml"
    )
    return Action(
        name=lint_name(name),
        kind="lint",
        version=1,
        arch=platform.arch,
        summary=f"the examination of the packages of {name}",
        builder=builder_name(BUILDER),
        script=File.read(root / STEP, STEP),
        files=files,
        inputs={f"packages/{what}": Upstream(action, ALL) for action, what in named.items()},
        outputs=(Output(REPORT),),
        remedy=f"mend the package's recipe, or accept the finding there with a reason ({DIRECTORY}, {RECIPE})",
        resource="heavy",
        place=f"{name}/packages/lint",
    )


def _recipe_of(what: str, recipes: Mapping[str, PackageRecipe]) -> PackageRecipe:
    """The recipe of a package: its name is the recipe's, with a guest's or a driver's behind it."""
    return recipes[max((name for name in recipes if f"{what}-".startswith(f"{name}-")), key=len)]
