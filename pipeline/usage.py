"""What a command of `doit` takes, as data, read from the attributes of its class."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

#: Of a usage: an option and what it takes, or what stands by itself; `[TASK...]` may be repeated.
_WORD = re.compile(r"(?P<flag>--?[a-z][\w-]*)?[ =]?\b(?P<takes>[A-Z]{2,}(?:[|/][A-Z]+)*)\b(?P<more>\.\.\.)?")


@dataclass(frozen=True, slots=True)
class Option:
    """An option: how it is written, what it takes (`DIR`, `FILE|DIR`; empty for a switch), and what it does."""

    flags: tuple[str, ...]
    takes: str
    default: str
    help: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command; `takes` has what its arguments are, in order, the last one again and again where it `repeats`."""

    name: str
    purpose: str
    usage: str
    options: tuple[Option, ...]
    takes: tuple[str, ...]
    repeats: bool


def command_of(name: str, kind: Any) -> Command:
    """Read the class of a command: its purpose, its usage and its table of options."""
    usage: str = kind.doc_usage
    words = list(_WORD.finditer(usage))
    by_itself = [word for word in words if word["flag"] is None]
    named = {word["flag"]: word["takes"] for word in words if word["flag"] is not None}
    return Command(
        name=name,
        purpose=kind.doc_purpose,
        usage=" ".join(["doit", name, *usage.split()]),
        options=tuple(_option_of(option, named) for option in kind.cmd_options),
        takes=tuple(word["takes"].partition("/")[0] for word in by_itself),  # doit has TASK/TARGET
        repeats=bool(by_itself) and by_itself[-1]["more"] is not None,
    )


def _option_of(option: dict[str, Any], named: dict[str, str]) -> Option:
    """One entry of a table of options; `named` has what the usage says that each of them takes."""
    short, long = option.get("short", ""), option.get("long", "")
    flags = tuple([f"-{short}"] * bool(short) + [f"--{long}"] * bool(long))
    kind, default = option["type"], option["default"]
    takes = "" if kind is bool else next((named[flag] for flag in flags if flag in named), "")
    if not takes and kind is not bool:
        takes = "NUMBER" if kind is int else "TEXT"
    if takes == "NAME" and long in _NAMES:
        takes = _NAMES[long]
    shown = "" if default in ("", [], None, False) else str(default)
    text = option["help"].partition(" [default:")[0]
    return Option(flags=flags, takes=takes, default=shown, help=text)


#: What is named, where a usage says NAME.
_NAMES = {"topology": "TOPOLOGY", "update": "LOCKED"}
