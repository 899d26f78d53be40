"""What `recipes/release.toml` may say: a release's version, and the repository that it is published to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from pipeline.errors import UserError
from pipeline.recipefile import place_of, read

RECIPE = "recipes/release.toml"
#: Takes the place of the recipe's version: a nightly build has a version of its own.
VERSION_VARIABLE = "VIRT_RT_VERSION"

VERSION = r"\A[0-9]+(\.[0-9]+)*(~[a-z0-9]+(\.[a-z0-9]+)*)?\Z"
Version = Annotated[str, msgspec.Meta(pattern=VERSION, max_length=40)]
Line = Annotated[str, msgspec.Meta(pattern=r"\A[^\x00-\x1f\x7f]+\Z")]
#: A word of apt's `Origin` and `Label`, a suite name, a part of a path.
Word = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9.-]*\Z", max_length=40)]


class RepositoryRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The repository: how apt and dnf see it, its channels in order of promotion, and how much it keeps.

    `keep` counts releases per platform and channel; `valid_days` is how long an apt index counts, 0 for ever.
    """

    origin: Line
    label: Line
    description: Line
    url: Annotated[str, msgspec.Meta(pattern=r"\A(https?://[^\s?#]*[^\s?#/])?\Z")] = ""
    channels: Annotated[tuple[Word, ...], msgspec.Meta(min_length=1)] = ("testing", "stable")
    keep: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    valid_days: Annotated[int, msgspec.Meta(ge=0, le=3650)] = 0


class ReleaseRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A release: its version, who answers for it (`Name <address>`), and its repository."""

    version: Version
    maintainer: Annotated[str, msgspec.Meta(pattern=r"\A[^<>\x00-\x1f]+ <[^<>@\s]+@[^<>@\s]+>\Z")]
    repository: RepositoryRecipe


def load(root: Path, environ: Mapping[str, str]) -> ReleaseRecipe:
    """Read `recipes/release.toml` below the checkout `root`; `VIRT_RT_VERSION` goes before its version."""
    recipe = read(root / RECIPE, ReleaseRecipe, root)
    channels = recipe.repository.channels
    if len(set(channels)) != len(channels):
        raise UserError(
            f"{place_of(root / RECIPE, root, 'repository', 'channels')}: a channel is named twice",
            "name each once",
        )
    version = environ.get(VERSION_VARIABLE, "")
    if not version:
        return recipe
    if not re.fullmatch(VERSION, version):
        raise UserError(
            f"{VERSION_VARIABLE} is {version!r}, not a version",
            "write digits with dots, as in 1.2.0 or 1.2.0~ci7",
        )
    return msgspec.structs.replace(recipe, version=version)
