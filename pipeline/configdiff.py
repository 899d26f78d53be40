"""What differs between two final kernel configurations, in words: who asked for it, and what it is called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.contract import Config, Request

_ENTRY = re.compile(r"\s*(?:menu)?config\s+(\w+)\s*(?:#.*)?")
_PROMPT = re.compile(r'\s+(?:bool|tristate|int|hex|string|prompt)\s+"((?:[^"\\]|\\.)*)"')
_SOURCE = re.compile(r'\s*source\s+"([^"]+)"')
_WORDS = {"y": "on", "m": "module", "n": "off"}


@dataclass(frozen=True, slots=True)
class Side:
    """One configuration: what the user called it, and what its fragments ask for, None where that is not known."""

    name: str
    config: Config
    requests: tuple[Request, ...] | None = None

    @property
    def version(self) -> str:
        """The kernel's."""
        return ".".join(map(str, self.config.version))


@dataclass(frozen=True, slots=True)
class Difference:
    """A symbol that is not the same; `asked` are the lines, `file:line`, of either side that ask for it."""

    symbol: str
    prompt: str
    before: str
    after: str
    asked: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """As `doit configdiff --json` has it."""
        return {
            "symbol": self.symbol,
            "prompt": self.prompt or None,
            "from": self.before,
            "to": self.after,
            "asked": list(self.asked),
        }


def differences(a: Side, b: Side, prompts: Mapping[str, str]) -> list[Difference]:
    """Every symbol that differs, sorted; `prompts` are what the kernel's menus call symbols."""
    asked: dict[str, list[str]] = {}
    for request in [*(a.requests or ()), *(b.requests or ())]:
        places = asked.setdefault(request.symbol, [])
        if request.where not in places:
            places.append(request.where)
    symbols = sorted(a.config.values.keys() | b.config.values.keys())
    return [
        Difference(s, prompts.get(s, ""), a.config[s], b.config[s], tuple(asked.get(s, ())))
        for s in symbols
        if a.config[s] != b.config[s]
    ]


def lines(a: Side, b: Side, found: Iterable[Difference]) -> Iterator[str]:
    """The differences as a person reads them, those that a fragment asks for first."""
    versions = f"Linux {a.version}" if a.version == b.version else f"Linux {a.version} -> {b.version}"
    yield f"{a.name} -> {b.name} ({versions})"
    asked, others = [d for d in found if d.asked], [d for d in found if not d.asked]
    known = a.requests is not None and b.requests is not None
    groups = [
        ("asked for by fragments", asked),
        ("follow from others" if known or asked else "changed", others),
    ]
    for title, group in groups:
        if not group:
            continue
        yield f"{title}: {len(group)}"
        width = max(len(d.symbol) for d in group)
        for d in group:
            before, after = word(d.before, d.after), word(d.after, d.before)
            text = f"  {d.symbol:<{width}}  {before} -> {after}"
            yield f"{text}  {d.prompt}".rstrip() + (f"  [{', '.join(d.asked)}]" if d.asked else "")
    if not asked and not others:
        yield "no difference"


def word(value: str, other: str) -> str:
    """A value as a person says it beside its other: on, module, off, none; numbers and texts as they are."""
    if value == "n" and other not in _WORDS:
        return "none"  # numbers and texts are not off, they are not there
    return _WORDS.get(value, value)


def prompts_of(tree: Path, arch: str) -> dict[str, str]:
    """What a kernel tree's menus call its symbols, the first text where there are several.

    `arch` is the name of its directory below arch/. A tree without Kconfig files has none.
    """
    found: dict[str, str] = {}
    pending, seen = ["Kconfig"], set()
    while pending:
        name = pending.pop()
        if name in seen or not (tree / name).is_file():
            continue
        seen.add(name)
        entry = None
        for line in (tree / name).read_text(encoding="utf-8", errors="replace").splitlines():
            if match := _ENTRY.fullmatch(line):
                entry = match[1]
            elif match := _SOURCE.match(line):
                pending.append(match[1].replace("$(SRCARCH)", arch))
            elif entry is not None and entry not in found and (match := _PROMPT.match(line)):
                found[entry] = match[1]
    return found
