"""A recipe that extends another one: what both say together, and where each value of it stands.

    extends = "canoe-pass"        the recipe of that name in the same directory, which may extend a third one
    without = ["limits"]          what is not taken over, by its key; `kernel.sources.guest` inside of tables

Of what else it writes, a table is merged with the other's, key by key, and anything else takes its place: lists, too. A
key that ends in `_add` appends to the list of that name instead.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.recipetext import line_of, table

EXTENDS, WITHOUT, ADD = "extends", "without", "_add"

Keys = tuple[str, ...]
Origin = tuple[Path, Keys]


@dataclass(slots=True)
class Merged:
    """A recipe with what it extends; `origins` has the file and the keys there of every value, by its keys here."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[Keys, Origin] = field(default_factory=dict)

    def put(self, keys: Keys, value: Any, of: Origin) -> None:
        """Set a value in the place of whatever was there."""
        self.drop(keys)
        self._table(keys[:-1])[keys[-1]] = copy.deepcopy(value)
        self._remember(keys, value, of)

    def drop(self, keys: Keys) -> bool:
        """Take a value out; False when there was none."""
        above = self.at(keys[:-1])
        if not isinstance(above, dict) or keys[-1] not in above:
            return False
        del above[keys[-1]]
        self.origins = {each: of for each, of in self.origins.items() if each[: len(keys)] != keys}
        return True

    def append(self, keys: Keys, values: Sequence[Any], of: Origin) -> None:
        """Add to a list, which may be one that was not there."""
        known = self.at(keys)
        if known is None:
            self.put(keys, [], of)
            known = self.at(keys)
        for index, value in enumerate(values):
            place = (of[0], (*of[1], str(index)))
            self._remember((*keys, str(len(known))), value, place)
            known.append(copy.deepcopy(value))

    def at(self, keys: Keys) -> Any:
        """The value of those keys, None when there is none."""
        found: Any = self.data
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def _table(self, keys: Keys) -> dict[str, Any]:
        found = self.data
        for key in keys:
            found = found[key]
        return found

    def _remember(self, keys: Keys, value: Any, of: Origin) -> None:
        self.origins[keys] = of
        inner = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, each in inner:
            self._remember((*keys, str(key)), each, (of[0], (*of[1], str(key))))


def merged(path: Path, root: Path) -> Merged:
    """The recipe `path` of the checkout `root` with all that it extends; UserError with file and line."""
    found = Merged()
    for each, data in reversed(_lineage(path, root)):
        _leave_out(found, each, data, root)
        _merge(found, each, root, (), data)
    return found


def origin(path: Path, root: Path, keys: Sequence[str]) -> Origin:
    """The file in which a key of a recipe stands, and the keys there; of one that is nowhere, of what encloses it."""
    if not isinstance(table(path, root).get(EXTENDS), str):
        return path, tuple(keys)
    try:
        origins = merged(path, root).origins
    except UserError:  # then it is that which is being told
        return path, tuple(keys)
    for length in range(len(keys), 0, -1):
        if (of := origins.get(tuple(keys[:length]))) is not None:
            return of[0], (*of[1], *keys[length:])
    return path, tuple(keys)


def _place(path: Path, root: Path, *keys: str) -> str:
    return f"{path.relative_to(root)}:{line_of(path.read_text(), list(keys))}"


def _lineage(path: Path, root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The recipe, what it extends, and so on; the last one extends nothing."""
    found: list[tuple[Path, dict[str, Any]]] = []
    while True:
        data = table(path, root)
        found.append((path, data))
        if EXTENDS not in data:
            if WITHOUT in data:
                raise UserError(
                    f"{_place(path, root, WITHOUT)}: {WITHOUT}: this recipe extends none",
                    f'name one: {EXTENDS} = "NAME", or take the line out',
                )
            return found
        where, base = _place(path, root, EXTENDS), data[EXTENDS]
        others = sorted(each.stem for each in path.parent.glob("*.toml") if each != path)
        known = f"write one of: {', '.join(others)}"
        if base not in (path.stem, *others):
            what = f"there is no {base}" if isinstance(base, str) else f"expected a name, got {base}"
            raise UserError(f"{where}: {EXTENDS}: {what}", known)
        path = path.with_name(f"{base}.toml")
        if any(path == before for before, _ in found):
            way = " extends ".join(each.stem for each, _ in found)
            raise UserError(f"{where}: {EXTENDS}: {way} extends {base}", "have one of them extend none")


def _leave_out(found: Merged, path: Path, data: Mapping[str, Any], root: Path) -> None:
    names = data.get(WITHOUT, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{_place(path, root, WITHOUT)}: {WITHOUT}: expected a list of keys", f'{WITHOUT} = ["limits"]'
        )
    for index, name in enumerate(names):
        if not found.drop(tuple(name.split("."))):
            raise UserError(
                f"{_place(path, root, WITHOUT, str(index))}: {WITHOUT}: {data[EXTENDS]} has no {name}",
                "take it out of the list",
            )


def _merge(found: Merged, path: Path, root: Path, above: Keys, data: Mapping[str, Any]) -> None:
    """Put `data`, a table of the file `path` that is called `above`, over what was found so far."""
    extends = bool(found.data) or bool(above)
    appended = []
    for key, value in data.items():
        keys = (*above, key)
        if not above and key == WITHOUT:
            continue
        if isinstance(value, dict) and isinstance(found.at(keys), dict):
            _merge(found, path, root, keys, value)
        elif extends and key.endswith(ADD) and key != ADD:
            appended.append((keys, value))
        else:
            found.put(keys, value, (path, keys))
    for keys, value in appended:  # after what may have taken the list's place
        target = (*above, keys[-1].removesuffix(ADD))
        if not isinstance(value, list) or not isinstance(found.at(target), list | None):
            raise UserError(
                f"{_place(path, root, *keys)}: {'.'.join(keys)}: {'.'.join(target)} is no list",
                f"write it as {target[-1]}",
            )
        found.append(target, value, (path, keys))
