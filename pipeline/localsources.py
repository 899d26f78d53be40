"""Sources that are built from a work tree of the user's instead of from the lock: `--source` and `local.toml`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pipeline.errors import UserError
from pipeline.recipefile import read

#: The user's own settings, not kept in git.
FILE = "local.toml"
OPTION = "--source"


class Local(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`local.toml`: `sources` are directories of work trees by name of source, relative to the checkout."""

    sources: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class LocalSource:
    """One source and the directory that it is taken from; `said_by` is where that was asked for."""

    name: str
    directory: Path
    said_by: str


def load(root: Path, given: Mapping[str, str], known: Iterable[str]) -> dict[str, LocalSource]:
    """The local sources of the checkout `root` by name.

    `given` is what `--source` says, absolute directories by name; it wins over the file, and an empty directory means
    the lock. `known` are the sources that there are. Raises `UserError`.
    """
    known = sorted(known)
    found = {}
    filed = read(root / FILE, Local, root).sources if (root / FILE).exists() else {}
    for name, directory in filed.items():
        _check(f"{FILE}: {name}", name, known)
        if directory:
            found[name] = LocalSource(name, root / Path(directory).expanduser(), FILE)
    for name, directory in given.items():
        _check(f"{OPTION} {name}={directory}", name, known)
        found.pop(name, None)
        if directory:
            found[name] = LocalSource(name, Path(directory), OPTION)
    return found


def _check(where: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UserError(f"{where}: there is no source {name}", f"one of: {', '.join(known)}")


def take(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split a command line into what others read and the directories that `--source NAME=DIR` gives, made absolute.

    Raises `UserError` for one that is not NAME=DIR.
    """
    rest: list[str] = []
    given: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option != OPTION:
            rest.append(word)
            continue
        name, separator, directory = (value if equals else next(words, "")).partition("=")
        if not (name and separator):
            raise UserError(
                f"{OPTION} {value or name} names no work tree".replace("  ", " "),
                f"write {OPTION} NAME=DIR, or {OPTION} NAME= for what is locked",
            )
        given[name] = str(Path(directory).expanduser().absolute()) if directory else ""
    return rest, given
