"""What a kernel's symbols need, read from its Kconfig files.

This is to write fragments that will take, and no more: of the language it knows `depends on`, `if`, prompts and types,
which say what must be asked for beside a driver. That the result is right is for the kernel's own kconfig to say, when
the kernel is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: An operator and its operands, which are such tuples again, or names.
Tree = tuple[Any, ...]

_ENTRY = re.compile(r"(config|menuconfig)\s+(\w+)$")
_TYPE = re.compile(r"(?:def_)?(bool|tristate|int|hex|string)\b(.*)")
_SOURCE = re.compile(r'([or]*source)\s+"([^"]+)"')
_TOKEN = re.compile(r'\s*(\$\([^)]*\)|&&|\|\||!=|<=|>=|[!=<>()]|"[^"]*"|\'[^\']*\'|[\w./-]+)')
_WORD = re.compile(r"\b[A-Z0-9_]+\b")
#: How many levels of what needs what are followed; real ones are below ten.
_DEPTH = 32


@dataclass(slots=True)
class Symbol:
    """A symbol: `kind` is its type; `needs` has an expression for each place that defines it, all of whose enclosing
    conditions are in it; `prompt` tells that a fragment may set it.
    """

    kind: str = ""
    prompt: bool = False
    needs: list[str] = field(default_factory=list)


class Unmet(Exception):
    """A symbol cannot be had; the text says why."""


def parse(files: Mapping[str, str], arch: str) -> dict[str, Symbol]:
    """All symbols of a kernel for one architecture, `arch` as the kernel names its directory (`x86`)."""
    symbols: dict[str, Symbol] = {}
    _Reader(files, arch, symbols).read("Kconfig", ())
    return symbols


def options(symbols: Mapping[str, Symbol]) -> dict[str, tuple[str, ...]]:
    """The yes-or-no symbols that a fragment may set and that depend on another one, by that."""
    found: dict[str, list[str]] = {}
    for name, symbol in symbols.items():
        if symbol.prompt and symbol.kind == "bool":
            for word in dict.fromkeys(_WORD.findall(" ".join(symbol.needs))):
                found.setdefault(word, []).append(name)
    return {name: tuple(names) for name, names in found.items()}


class _Reader:
    """Follows the files from the first one, with the conditions that enclose each."""

    def __init__(self, files: Mapping[str, str], arch: str, symbols: dict[str, Symbol]) -> None:
        self._files, self._arch, self._symbols = files, arch, symbols

    def read(self, path: str, above: tuple[str, ...]) -> None:
        """Read one file; `above` are the conditions of what sources it."""
        if path not in self._files:
            return
        stack: list[tuple[str, list[str]]] = [("", list(above))]
        symbol: Symbol | None = None
        own: list[str] = []

        def conditions() -> list[str]:
            return [each for _, level in stack for each in level]

        def close() -> None:
            nonlocal symbol
            if symbol is not None:
                symbol.needs.append(" && ".join(f"({each})" for each in [*conditions(), *own]) or "y")
            symbol = None
            own.clear()

        for line in _statements(self._files[path]):
            word = line.split(None, 1)[0]
            if found := _ENTRY.match(line):
                close()
                symbol = self._symbols.setdefault(found[2], Symbol())
            elif word in ("menu", "choice", "if"):
                close()
                stack.append((word, [line.split(None, 1)[1]] if word == "if" else []))
            elif word in ("endmenu", "endchoice", "endif"):
                close()
                if len(stack) > 1:
                    stack.pop()
            elif found := _SOURCE.match(line):
                close()
                place = found[2].replace("$(SRCARCH)", self._arch).replace("$SRCARCH", self._arch)
                if "r" in found[1].removesuffix("source"):
                    place = f"{path.rpartition('/')[0]}/{place}"
                self.read(place, tuple(conditions()))
            elif word == "comment":
                close()
                symbol = Symbol()  # its own conditions are nobody's
            elif line.startswith("depends on "):
                (own if symbol is not None else stack[-1][1]).append(line.removeprefix("depends on "))
            elif symbol is not None and (found := _TYPE.match(line)):
                symbol.kind = found[1]
                symbol.prompt |= '"' in found[2].partition(" if ")[0] and not word.startswith("def_")
            elif symbol is not None and word == "prompt":
                symbol.prompt = True
        close()


def _statements(text: str) -> Iterator[str]:
    """Lines without indentation, comments and help; what goes on on the next line is joined."""
    help_indent = -1
    in_help = False
    pending = ""
    for raw in text.splitlines():
        line = raw.expandtabs()
        stripped = line.strip()
        if in_help:
            indent = len(line) - len(line.lstrip())
            if not stripped:
                continue
            if help_indent < 0:
                help_indent = indent
            if indent >= help_indent and help_indent > 0:
                continue
            in_help = False
        if pending:
            stripped, pending = f"{pending} {stripped}", ""
        if stripped.endswith("\\"):
            pending = stripped[:-1].strip()
        elif stripped in ("help", "---help---"):
            in_help, help_indent = True, -1
        elif stripped and not stripped.startswith("#"):
            yield stripped


class Solver:
    """Finds what must be asked for beside a symbol, given what is asked for already.

    `known` is the value (y, m, n, or a number or text) by symbol; what it does not have is off.
    """

    def __init__(self, symbols: Mapping[str, Symbol], known: Mapping[str, str]) -> None:
        """`known` is not changed."""
        self._symbols, self._known = symbols, dict(known)

    def ask(self, name: str) -> dict[str, str]:
        """The symbols to ask for so that `name` takes, itself last, by their values; none when it is there already.

        Raises `Unmet`. What is returned counts as asked for from then on.
        """
        added: dict[str, str] = {}
        self._have(name, added, 0)
        self._known |= added
        return added

    def would_ask(self, name: str) -> dict[str, str] | None:
        """What `ask` would return, None where it would raise."""
        added: dict[str, str] = {}
        try:
            self._have(name, added, 0)
        except Unmet:
            return None
        return added

    def _on(self, name: str, added: Mapping[str, str]) -> bool:
        return (added.get(name) or self._known.get(name, "n")) != "n"

    def _have(self, name: str, added: dict[str, str], depth: int) -> None:
        if name in ("y", "m") or name.startswith("$") or self._on(name, added):
            return
        symbol = self._symbols.get(name)
        if name == "n" or symbol is None:
            raise Unmet("it is never on" if name == "n" else f"this kernel has no {name}")
        if depth > _DEPTH:
            raise Unmet(f"{name} needs itself")
        self._any([_parsed(each) for each in symbol.needs], added, depth + 1)
        if symbol.prompt:
            if symbol.kind not in ("bool", "tristate"):
                raise Unmet(f"{name} is a number or a text")
            added[name] = "m" if symbol.kind == "tristate" else "y"
        # what has no prompt is selected by others, or on by itself: nothing to ask for

    def _meet(self, tree: Tree, added: dict[str, str], depth: int) -> None:
        match tree:
            case ("and", left, right):
                self._meet(left, added, depth)
                self._meet(right, added, depth)
            case ("or", left, right):
                if not (self._true(left, added) or self._true(right, added)):
                    self._any((left, right), added, depth)
            case ("symbol", name):
                self._have(name, added, depth)
            case ("=", name, "y" | "m"):
                self._have(name, added, depth)
            case _:
                if not self._true(tree, added):
                    raise Unmet(f"{_written(tree)} does not hold")

    def _any(self, ways: Sequence[Tree], added: dict[str, str], depth: int) -> None:
        """Meet the first that can be met; `Unmet` of the first when there is none."""
        first: Unmet | None = None
        for way in ways:
            given = dict(added)
            try:
                self._meet(way, given, depth)
            except Unmet as unmet:
                first = first or unmet
            else:
                added |= given
                return
        if first is not None:
            raise first

    def _true(self, tree: Tree, added: Mapping[str, str]) -> bool:
        match tree:
            case ("and", left, right):
                return self._true(left, added) and self._true(right, added)
            case ("or", left, right):
                return self._true(left, added) or self._true(right, added)
            case ("not", inner):
                return not self._true(inner, added)
            case ("symbol", name):
                return name.startswith("$") or name in ("y", "m") or (name != "n" and self._on(name, added))
            case ("=", left, right):
                return self._value(left, added) == self._value(right, added)
            case ("!=", left, right):
                return self._value(left, added) != self._value(right, added)
        return True  # comparisons of numbers, of compilers' versions mostly

    def _value(self, name: str, added: Mapping[str, str]) -> str:
        word = name.strip("\"'")
        if name != word or name in ("y", "m", "n") or name not in self._symbols:
            return word
        return added.get(name) or self._known.get(name, "n")


# Expressions: https://docs.kernel.org/kbuild/kconfig-language.html#menu-dependencies


def _parsed(expression: str) -> Tree:
    tree, rest = _either(_TOKEN.findall(expression))
    if rest:
        raise Unmet(f"{expression} is not understood")
    return tree


def _either(tokens: list[str]) -> tuple[Tree, list[str]]:
    left, tokens = _both(tokens)
    while tokens[:1] == ["||"]:
        right, tokens = _both(tokens[1:])
        left = ("or", left, right)
    return left, tokens


def _both(tokens: list[str]) -> tuple[Tree, list[str]]:
    left, tokens = _one(tokens)
    while tokens[:1] == ["&&"]:
        right, tokens = _one(tokens[1:])
        left = ("and", left, right)
    return left, tokens


def _one(tokens: list[str]) -> tuple[Tree, list[str]]:
    if not tokens:
        raise Unmet("an expression ends too early")
    first, *rest = tokens
    if first == "!":
        inner, rest = _one(rest)
        return ("not", inner), rest
    if first == "(":
        inner, rest = _either(rest)
        return inner, rest[1:]
    if rest[:1] and rest[0] in ("=", "!=", "<", ">", "<=", ">=") and len(rest) > 1:
        return (rest[0], first, rest[1]), rest[2:]
    return ("symbol", first), rest


def _written(tree: Tree) -> str:
    match tree:
        case ("not", inner):
            return f"!{_written(inner)}"
        case ("symbol", name):
            return str(name)
        case (operator, left, right) if operator in ("and", "or"):
            return f"({_written(left)} {'&&' if operator == 'and' else '||'} {_written(right)})"
        case (operator, left, right):
            return f"{left}{operator}{right}"
    return str(tree)
