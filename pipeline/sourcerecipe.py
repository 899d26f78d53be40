"""What `recipes/sources.toml` may say: each source and its origins in order of preference."""

import re
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


def load_recipes(path: Path) -> dict[str, SourceRecipe]:
    """Read sources.toml; UserError names the file, the line and what was expected."""
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "take the committed file back") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}", "mend the line it names") from None
    recipes = {}
    for name, table in tables.items():
        try:
            msgspec.convert(name, SourceName)
            recipes[name] = msgspec.convert(table, SourceRecipe)
        except msgspec.ValidationError as error:
            reason, _, where = str(error).partition(" - at ")
            line = _line(text, name, f"{reason} {where}")
            raise UserError(f"{path}:{line}: {name}: {error}", "mend that line") from None
    return recipes


def _line(text: str, name: str, complaint: str) -> int:
    """Find the line that msgspec complains about: its key, or else the table that should hold it."""
    index = re.search(r"\.origins\[(\d+)\]", complaint)
    key = re.search(r"unknown field `(.+?)`", complaint) or re.search(r"\.(\w+)`$", complaint)
    headers = [f"[{name}]", *[f"[[{name}.origins]]"] * (int(index[1]) + 1 if index else 0)]
    found = 1
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].replace(" ", "")
        if headers and words == headers[0]:
            headers.pop(0)
            found = number
        elif not headers and words.startswith("["):
            break
        elif not headers and key and words.startswith(f"{key[1]}="):
            return number
    return found
