"""What `recipes/sources.toml` may say: each source and its origins in order of preference."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from pipeline.errors import UserError
from pipeline.locks import SourceName, Word

Text = Annotated[str, msgspec.Meta(pattern=r"\A[^-\s]\S*\Z")]
"""One word that no program takes for an option."""


class GitOrigin(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="git"
):
    """A git repository: `url` is anything git fetches from, `ref` an exact tag or branch or a pattern.

    Of the tags and branches that match a pattern the highest version is taken; `exclude` are patterns of
    those to leave out.
    """

    url: Text
    ref: Text
    exclude: tuple[str, ...] = ()


class DebianOrigin(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="debian"
):
    """A source package of a Debian suite, its security archive included.

    `series` chooses the patches: `plain` is what Debian builds, `rt` adds `debian/patches-rt`, the rest
    of the PREEMPT_RT queue. `version` fixes one version; without it the newest is taken.
    """

    package: Word
    suite: Word
    series: Literal["plain", "rt"] = "plain"
    version: str = ""


class SourceRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One source: what it is and where it may come from."""

    description: str
    origins: Annotated[tuple[GitOrigin | DebianOrigin, ...], msgspec.Meta(min_length=1)]


SourceRecipes = dict[SourceName, SourceRecipe]


def load_recipes(path: Path) -> dict[str, SourceRecipe]:
    """Read sources.toml; UserError names the file, the place and what was expected."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), SourceRecipes)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "take the committed file back") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}", "mend the line it names") from error
    except msgspec.ValidationError as error:
        raise UserError(
            f"{path}: {error}", "mend that entry; docs/sources.md lists what it may hold"
        ) from error
