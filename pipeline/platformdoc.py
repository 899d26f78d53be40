"""A platform's page in `docs/platforms/`: the parts of it that are generated from recipes and the CPU plan.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`; what is between them is replaced, the rest of the
page is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.cpuplan import HostPlan
from pipeline.errors import UserError
from pipeline.planpicture import svg
from pipeline.planview import draw, text
from pipeline.recipes import Platform

_BEGIN, _END = "<!-- generated:", "<!-- end -->"
_PART = re.compile(rf"({_BEGIN} ([\w-]+) -->\n)(?:(?!{_BEGIN}).)*?({_END})", re.DOTALL)
#: Parts that every page has.
_NEEDED = ("plan", "command-line")


def pages(
    root: Path, name: str, platform: Platform, plan: HostPlan, command_line: Sequence[tuple[str, str]]
) -> dict[Path, str]:
    """What the platform's page and its picture should say, by path.

    `root` is the checkout, `command_line` the host kernel's parameters and their reasons. Raises `UserError` when
    there is no page, or it asks for a part that is not known.
    """
    page = root / "docs" / "platforms" / f"{name}.md"
    shown = page.relative_to(root)
    if not page.is_file():
        raise UserError(
            f"there is no {shown}",
            "write it, with <!-- generated: plan --> and <!-- end --> around what is to be generated",
        )
    title = f"The CPU plan of {name}"
    found = _parts(platform, plan, title, command_line)
    written = page.read_text()
    named = [match[2] for match in _PART.finditer(written)]
    if not len(named) == written.count(_BEGIN) == written.count(_END):
        raise UserError(
            f"{shown}: a generated part has no end, or an end no part", f"write {_END} after each"
        )
    if lacking := [part for part in _NEEDED if part not in named]:
        raise UserError(f"{shown} has no part {lacking[0]}", f"add {_BEGIN} {lacking[0]} --> and {_END}")

    def replaced(match: re.Match[str]) -> str:
        if match[2] not in found:
            raise UserError(f"{shown}: nothing generates {match[2]}", f"there are: {', '.join(found)}")
        return f"{match[1]}\n{found[match[2]]}\n{match[3]}"

    return {page: _PART.sub(replaced, written), page.with_suffix(".svg"): svg(plan, title)}


def _parts(
    platform: Platform, plan: HostPlan, title: str, command_line: Sequence[tuple[str, str]]
) -> Mapping[str, str]:
    """Each part's Markdown, by name."""
    limits = platform.limits
    parts = {
        "plan": f"```text\n{text(draw(plan, title))}```\n",
        "command-line": (
            f"```text\n{' '.join(parameter for parameter, _ in command_line)}\n```\n\n"
            + _table(("parameter", "why"), [(f"`{parameter}`", why) for parameter, why in command_line])
        ),
        "bios": _table(("setting", "value", "why"), [(b.setting, b.value, b.reason) for b in platform.bios]),
    }
    if limits is not None:
        parts["limits"] = (
            _table(
                ("measured in", "maximum", "average"),
                [
                    ("host", f"{limits.host_max_us} us", f"{limits.host_avg_us} us"),
                    ("guest", f"{limits.guest_max_us} us", f"{limits.guest_avg_us} us"),
                ],
            )
            + f"\nThey are {limits.source}.\n"
        )
    return parts


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
