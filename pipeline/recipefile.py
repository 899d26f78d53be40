"""One recipe file, read into the table that it should be; errors name file, line and what was expected."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec

from pipeline.errors import UserError

T = TypeVar("T", bound=msgspec.Struct)


def read(path: Path, kind: type[T], root: Path) -> T:
    """Read one recipe; a UserError names file, line and what was expected."""
    shown = path.relative_to(root)
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError(f"{shown} is missing", "restore it with git") from None
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror}", "make it a readable file, or remove it") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown} is not UTF-8 text", "save it as UTF-8") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{shown}: not TOML: {error}", "mend that line") from None
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
    """`file:line` of a key; the nearest enclosing table when the key itself is not written."""
    return f"{path.relative_to(root)}:{line_of(path.read_text(), list(keys))}"


def line_of(text: str, keys: list[str]) -> int:
    """Line (from 1) at which a key path stands in TOML text, or of what encloses it.

    The parser that gives the values keeps no positions, so another one is asked for them, and only
    when there is an error to report.
    """
    import tree_sitter
    import tree_sitter_toml

    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_toml.language()))
    best, depth = 1, 0
    elements: dict[tuple[str, ...], int] = {}

    def consider(found: list[str], line: int) -> None:
        nonlocal best, depth
        shared = 0
        while shared < min(len(found), len(keys)) and found[shared] == keys[shared]:
            shared += 1
        if shared == len(found) and shared > depth:
            best, depth = line, shared

    def key_names(node: Any) -> list[str]:
        if node.type == "dotted_key":
            return [name for child in node.children for name in key_names(child)]
        if node.type in ("bare_key", "quoted_key"):
            return [node.text.decode().strip("\"'")]
        return []

    def visit(node: Any, prefix: list[str]) -> None:
        if node.type == "pair":
            here = prefix + key_names(node.children[0])
            consider(here, node.start_point[0] + 1)
            for child in node.children[1:]:
                visit(child, here)
        elif node.type in ("table", "table_array_element"):
            named = next((key_names(child) for child in node.children if key_names(child)), [])
            if node.type == "table_array_element":
                elements[tuple(named)] = elements.get(tuple(named), -1) + 1
                consider(prefix + named, node.start_point[0] + 1)
                named = [*named, str(elements[tuple(named)])]
            consider(prefix + named, node.start_point[0] + 1)
            for child in node.children:
                if child.type == "pair":
                    visit(child, prefix + named)
        elif node.type == "array":
            items = [child for child in node.children if child.type not in ("[", "]", ",", "comment")]
            for index, child in enumerate(items):
                consider([*prefix, str(index)], child.start_point[0] + 1)
                visit(child, [*prefix, str(index)])
        else:
            for child in node.children:
                visit(child, prefix)

    visit(parser.parse(text.encode()).root_node, [])
    return best
