"""One recipe file, read into the table that it should be; errors name file, line and what was expected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec

from pipeline.errors import UserError
from pipeline.inheritance import merged, origin
from pipeline.recipetext import line_of, table

T = TypeVar("T", bound=msgspec.Struct)


def read(path: Path, kind: type[T], root: Path) -> T:
    """Read one recipe; a UserError names file, line and what was expected.

    A recipe of a kind that has `extends` may extend another one of its directory, see `pipeline.inheritance`.
    """
    heir = "extends" in kind.__struct_fields__
    data = merged(path, root).data if heir else table(path, root)
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at ")
        steps = re.findall(r"\.?([\w-]+)|\[(\d+|\.\.\.)\]", where.strip("`").removeprefix("$"))
        keys = [name or index for name, index in steps]
        unknown = re.search(r"unknown field `(.+)`", reason)
        if unknown:
            keys.append(unknown[1])
            fields = ", ".join(_fields(kind, keys[:-1]))
            raise UserError(
                f"{place_of(path, root, *keys)}: unknown key {unknown[1]}", f"known keys here: {fields}"
            ) from None
        reason = reason[0].lower() + reason[1:]
        # of what is missing, all names help; a value of the wrong kind is told by what was expected
        hint = f"keys here: {', '.join(_fields(kind, keys))}" if "missing required" in reason else ""
        raise UserError(
            f"{place_of(path, root, *keys)}: {'.'.join(keys) or 'recipe'}: {reason}", hint
        ) from None


def _fields(kind: Any, keys: list[str]) -> list[str]:
    """Names that a table of the recipe may have."""
    kinds = [kind]
    for key in keys:
        named = [f.type for k in kinds for f in msgspec.structs.fields(k) if f.encode_name == key]
        kinds = [k for each in named for k in _structs(each)] or kinds
    return list(dict.fromkeys(f.encode_name for k in kinds for f in msgspec.structs.fields(k)))


def _structs(kind: Any) -> list[Any]:
    """The tables that a value of that type is made of: itself, its elements, or any of a union."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    return [struct for each in get_args(kind) for struct in _structs(each)]


def place_of(path: Path, root: Path, *keys: str) -> str:
    """`file:line` of a key; the nearest enclosing table when the key itself is not written.

    What a recipe has from another one is where that has it; then it also says which recipe this is about.
    """
    there, keys = origin(path, root, keys)
    heir = f": in {path.stem}" if there != path else ""
    return f"{there.relative_to(root)}:{line_of(there.read_text(), list(keys))}{heir}"
