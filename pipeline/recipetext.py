"""The text of one recipe file: the table that it holds, and the line on which a key stands."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


def table(path: Path, root: Path) -> dict[str, Any]:
    """What a file of the checkout `root` holds; a UserError names the file, and the line of bad TOML."""
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
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{shown}: not TOML: {error}", "mend that line") from None


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
