"""How a host is set for real-time guests: `recipes/tuning.toml`, and what it says for one CPU plan.

The table is data; `resolve` puts a plan's CPUs into it and adds what the platform chose. Nothing here reads or
writes a machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pipeline.cpuplan import HostPlan, affinity_mask
from pipeline.errors import UserError
from pipeline.recipefile import place_of, read
from pipeline.recipes import Arch, Line, Name, Platform, Unit
from pipeline.topology import cpulist

RECIPE = "recipes/tuning.toml"
#: Pages from this size (KiB) are taken on the command line: later no memory is left in one piece of that size.
BOOT_PAGE_KIB = 1024 * 1024

#: The choice of a platform without high-resolution timers.
WITHOUT_TIMERS = "high-resolution-timers-off"

#: What values may name, as `_words` fills it in; `isolated_cpu` in a file's name makes one file for each of them.
PLACEHOLDERS = ("isolated", "housekeeping", "housekeeping_mask")
_EACH = "{isolated_cpu}"
_PLACEHOLDER = re.compile(r"\{([^}]*)\}")

#: A value that needs no quoting in any of the files that it gets into.
Value = Annotated[str, msgspec.Meta(pattern=r"\A[^\s\"'\\$`#%;]+\Z")]
#: Likewise prose, which goes into comments and double-quoted words of shell.
Prose = Annotated[str, msgspec.Meta(pattern=r"\A[^\n\"\\$`]+\Z")]
_NAMES = {
    "command_line": re.compile(r"[a-z][a-z0-9_.]*"),
    "module_parameters": re.compile(r"[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*"),
    "sysctl": re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+"),
    "files": re.compile(r"/(sys|proc)(/[A-Za-z0-9_.{}-]+)+"),
    "masked_services": re.compile(r"[A-Za-z0-9_.@-]+\.(service|timer|socket|target|mount|path|swap)"),
}


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One setting.

    value    what it is set to; only a parameter of the command line may have none
    reason   why; goes as a comment into what is generated
    source   where that is written down
    arch     architectures whose hosts have it (Debian's names); all, when none is named
    absent   why it is fine where the kernel does not have this; None where that is an error
    witness  a path that must exist for `absent` to hold
    """

    value: Value | None = None
    arch: tuple[Arch, ...] = ()
    reason: Prose
    source: Line
    absent: Prose | None = None
    witness: Annotated[str, msgspec.Meta(pattern=r"\A/[A-Za-z0-9_./-]+\Z")] | None = None


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that trade safety: `trade` is what is given up, `reason` what is gained for it."""

    trade: Prose
    reason: Prose
    settings: dict[str, dict[str, Setting]] = {}


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """All of the recipe: settings by kind (a key of `_NAMES`) and name, and the choices by name."""

    settings: dict[str, dict[str, Setting]]
    choices: dict[str, Choice]


class _Kinds(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The recipe's outline: what each kind holds is read entry by entry, so that errors name the line."""

    command_line: dict[str, Any] = {}
    module_parameters: dict[str, Any] = {}
    sysctl: dict[str, Any] = {}
    files: dict[str, Any] = {}
    masked_services: dict[Unit, Any] = {}


class _Outline(_Kinds, frozen=True, forbid_unknown_fields=True, kw_only=True):
    choices: dict[Name, dict[str, Any]] = {}


class _ChoiceOutline(_Kinds, frozen=True, forbid_unknown_fields=True, kw_only=True):
    trade: Prose
    reason: Prose


def load(root: Path) -> Table:
    """Read the recipe below the checkout `root`; a UserError names file, line and what was expected."""
    path = root / RECIPE
    outline = read(path, _Outline, root)

    def refuse(keys: Sequence[str], message: str, hint: str) -> UserError:
        return UserError(f"{place_of(path, root, *keys)}: {'.'.join(keys)}: {message}", hint)

    def convert(data: object, kind: type[Any], keys: Sequence[str]) -> Any:
        try:
            return msgspec.convert(data, kind)
        except msgspec.ValidationError as error:
            reason, _, where = str(error).partition(" - at ")
            inner = re.findall(r"[\w-]+", where)
            inner += re.findall(r"unknown field `(.+)`", reason)
            known = ", ".join(kind.__struct_fields__)
            raise refuse([*keys, *inner], reason[0].lower() + reason[1:], f"known keys: {known}") from None

    def settings(kinds: _Kinds, above: Sequence[str]) -> dict[str, dict[str, Setting]]:
        found: dict[str, dict[str, Setting]] = {}
        for kind, pattern in _NAMES.items():
            found[kind] = {}
            for name, data in getattr(kinds, kind).items():
                keys = [*above, kind, name]
                if not pattern.fullmatch(name):
                    raise refuse(keys, "no name of this kind", f"names here match {pattern.pattern}")
                setting: Setting = convert(data, Setting, keys)
                if kind == "masked_services" and setting.value is not None:
                    raise refuse(
                        [*keys, "value"], "a service is masked, it has no value", "take the line out"
                    )
                if setting.value is None and kind not in ("command_line", "masked_services"):
                    raise refuse(keys, "it has no value", 'write value = "..."')
                if setting.witness is not None and setting.absent is None:
                    raise refuse(
                        [*keys, "witness"], "there is no absent beside it", "say why absence is fine"
                    )
                each = name.replace(_EACH, "")
                unknown = [
                    word
                    for word in _PLACEHOLDER.findall(each + (setting.value or ""))
                    if word not in PLACEHOLDERS
                ]
                if unknown or "{" in each:
                    raise refuse(
                        keys,
                        f"there is no {{{''.join(unknown[:1])}}} to put in",
                        f"values may name {', '.join(f'{{{word}}}' for word in PLACEHOLDERS)}; "
                        f"names of files {_EACH}",
                    )
                found[kind][name] = setting
        return found

    choices: dict[str, Choice] = {}
    for name, data in outline.choices.items():
        choice: _ChoiceOutline = convert(data, _ChoiceOutline, ["choices", name])
        chosen = settings(choice, ["choices", name])
        if not any(chosen.values()):
            raise refuse(["choices", name], "it sets nothing", f"add a table [choices.{name}.KIND.NAME]")
        choices[name] = Choice(trade=choice.trade, reason=choice.reason, settings=chosen)
    return Table(settings=settings(outline, []), choices=choices)


def of_architecture(settings: Mapping[str, Setting], arch: str) -> dict[str, Setting]:
    """Those settings that hosts of an architecture have."""
    return {name: setting for name, setting in settings.items() if not setting.arch or arch in setting.arch}


def chosen(root: Path, name: str, platform: Platform, table: Table) -> tuple[str, ...]:
    """The choices of a platform, the one that its timers amount to among them.

    A UserError names the line of one that does not exist, or that sets nothing on the platform's architecture.
    """
    for index, choice in enumerate(platform.choices):
        place = place_of(root / "recipes" / "platforms" / f"{name}.toml", root, "choices", str(index))
        if choice not in table.choices:
            raise _unknown(choice, table, f"{place}: ")
        kinds = table.choices[choice].settings.values()
        if not any(of_architecture(settings, platform.arch) for settings in kinds):
            raise UserError(
                f"{place}: {choice} sets nothing on {platform.arch}", "take it out of the platform's choices"
            )
    if platform.high_resolution_timers or WITHOUT_TIMERS in platform.choices:
        return platform.choices
    if WITHOUT_TIMERS not in table.choices:
        raise _unknown(WITHOUT_TIMERS, table, f"recipes/platforms/{name}.toml: high_resolution_timers: ")
    return *platform.choices, WITHOUT_TIMERS


def _unknown(choice: str, table: Table, place: str = "") -> UserError:
    return UserError(
        f"{place}there is no choice {choice}", f"{RECIPE} has: {', '.join(table.choices) or 'none'}"
    )


@dataclass(frozen=True, slots=True)
class Resolved:
    """A setting for one host: its name, its value ("" for none), and the rest as in `Setting`."""

    name: str
    value: str
    reason: str
    absent: str = ""
    witness: str = ""


def resolve(
    plan: HostPlan, table: Table, choices: Iterable[str], arch: str
) -> dict[str, list[Resolved]]:
    """Every setting of a host of the architecture `arch`, by kind and in the recipe's order; what was chosen replaces what it names.

    Raises `UserError` for a choice that the table does not have.
    """
    words = _words(plan)
    asked = list(dict.fromkeys(choices))
    for choice in asked:
        if choice not in table.choices:
            raise _unknown(choice, table)
    found: dict[str, list[Resolved]] = {}
    for kind in _NAMES:
        merged = of_architecture(table.settings.get(kind, {}), arch)
        for choice in asked:
            merged |= of_architecture(table.choices[choice].settings.get(kind, {}), arch)
        found[kind] = [
            Resolved(
                name=expanded,
                value=(setting.value or "").format_map(words),
                reason=setting.reason,
                absent=setting.absent or "",
                witness=setting.witness or "",
            )
            for name, setting in merged.items()
            for expanded in _names(name, plan)
        ]
    found["command_line"] += [
        Resolved(name, value, reason) for name, value, reason in _boot_pages(plan.hugepages())
    ]
    return found


def host_command_line(
    plan: HostPlan, table: Table, choices: Iterable[str], arch: str
) -> list[tuple[str, str]]:
    """The kernel's parameters of a host of the architecture `arch` beside its own root and console, each with its reason.

    Raises `UserError` for a choice that the table does not have.
    """
    return [
        (f"{setting.name}={setting.value}" if setting.value else setting.name, setting.reason)
        for setting in resolve(plan, table, choices, arch)["command_line"]
    ]


def _words(plan: HostPlan) -> Mapping[str, str]:
    return {
        "isolated": cpulist(plan.isolated),
        "housekeeping": cpulist(plan.housekeeping),
        "housekeeping_mask": affinity_mask(plan.housekeeping),
    }


def _names(name: str, plan: HostPlan) -> list[str]:
    """The name, or one for each isolated CPU."""
    return [name.replace(_EACH, str(cpu)) for cpu in plan.isolated] if _EACH in name else [name]


def _boot_pages(pages: Mapping[tuple[int, int], int]) -> list[tuple[str, str, str]]:
    """Name, value and reason of the parameters that take large pages at boot, `pages` by node and size in KiB.

    Source: "hugepages=" in Documentation/admin-guide/kernel-parameters.txt; the size comes first, and each size once.
    """
    found: list[tuple[str, str, str]] = []
    for size in sorted({size for _, size in pages if size >= BOOT_PAGE_KIB}):
        counts = ",".join(f"{node}:{count}" for (node, kib), count in sorted(pages.items()) if kib == size)
        found += [
            ("hugepagesz", f"{size >> 20}G", "the size of the pages that the next parameter counts"),
            ("hugepages", counts, "the guests' memory, by node: at boot it is still in one piece"),
        ]
    return found
