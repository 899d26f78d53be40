"""A fragment of a kernel configuration as text: edited where it must be, left alone elsewhere.

Standard library only and without imports of ours, for it also runs inside a step.
"""

import re
from collections.abc import Mapping

#: The comment above the lines that were added; they are kept sorted below it.
HEADING = "# Added by doit config."

_ABOUT = re.compile(r"CONFIG_(\w+)=.*|# CONFIG_(\w+) is not set")


def line_of(symbol: str, value: str) -> str:
    """The line that asks for a value; `n` as kconfig spells it."""
    return f"# CONFIG_{symbol} is not set" if value == "n" else f"CONFIG_{symbol}={value}"


def symbol_of(line: str) -> str | None:
    """The symbol that a line is about; None for comments and empty lines."""
    found = _ABOUT.fullmatch(line)
    return (found[1] or found[2]) if found else None


def edited(text: str, changes: Mapping[str, str | None]) -> str:
    """A fragment in which each of `changes` is asked for, or, where it is None, no line is left about it.

    A symbol that has a line keeps its place (the last, where it has several), all others come sorted below
    `HEADING`. Comments stay, and so does every line about another symbol.
    """
    lines = text.splitlines()
    last = {symbol: at for at, line in enumerate(lines) if (symbol := symbol_of(line)) is not None}
    kept = []
    for at, line in enumerate(lines):
        symbol = symbol_of(line)
        if symbol is None or symbol not in changes:
            kept.append(line)
        elif (value := changes[symbol]) is not None and last[symbol] == at:
            kept.append(line_of(symbol, value))
    added = {s: v for s, v in changes.items() if v is not None and s not in last}
    before, block, after = _parted(kept)
    block = sorted(
        [*block, *(line_of(s, v) for s, v in added.items())], key=lambda line: symbol_of(line) or ""
    )
    if block and not (before and before[-1] == HEADING):
        while before and not before[-1]:
            before.pop()
        before += [""] * bool(before) + [HEADING]
    elif not block and before and before[-1] == HEADING:
        before.pop()
    result = [*before, *block, *after]
    while result and not result[-1]:
        result.pop()
    return "".join(f"{line}\n" for line in result)


def _parted(lines: list[str]) -> tuple[list[str], list[str], list[str]]:
    """What stands before the added lines (their heading included), these, and what stands after them."""
    if HEADING not in lines:
        return lines, [], []
    start = lines.index(HEADING) + 1
    end = start
    while end < len(lines) and symbol_of(lines[end]) is not None:
        end += 1
    return lines[:start], lines[start:end], lines[end:]
