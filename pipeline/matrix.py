"""The kernels of all platforms side by side: which source, which key, what a run would do, and who shares one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pipeline.kernel import ROLES, kernel_name
from pipeline.plan import State
from pipeline.project import Project

#: What a run would do: nothing, lay out what the store has, or build.
Standing = Literal["current", "store", "build"]
_STANDINGS: dict[State, Standing] = {
    State.CURRENT: "current",
    State.LOCAL: "store",
    State.BUILD: "build",
}
#: Digits of a key that are shown, as many as end the kernel's release.
DIGITS = 12


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel; `ref` is the version of its source, `same_as` the first task in the table with that key, if any."""

    platform: str
    role: str
    source: str
    ref: str
    key: str
    state: Standing
    same_as: str = ""

    @property
    def task(self) -> str:
        """The task that builds it."""
        return kernel_name(self.platform, self.role)


def rows(project: Project) -> list[Row]:
    """Every platform's kernels, in the recipes' order; nothing is built."""
    names = [kernel_name(name, role) for name in project.recipes.platforms for role in ROLES]
    states, keys = project.plan(names), project.graph.keys
    first: dict[str, str] = {}
    found = []
    for platform, recipe in project.recipes.platforms.items():
        for role in ROLES:
            task, source = kernel_name(platform, role), recipe.kernel.source_of(role)
            owner = first.setdefault(keys[task], task)
            found.append(
                Row(
                    platform=platform,
                    role=role,
                    source=source,
                    ref=project.sources_lock.get(source).ref,
                    key=keys[task],
                    state=_STANDINGS[states[task]],
                    same_as="" if owner == task else owner,
                )
            )
    return found


def table(found: Iterable[Row]) -> list[str]:
    """The rows as lines of text, a head first."""
    cells = [("platform", "role", "source", "ref", "key", "state")]
    cells += [
        (
            row.platform,
            row.role,
            row.source,
            row.ref,
            row.key[:DIGITS],
            f"{row.state}{f', the same as {row.same_as}' if row.same_as else ''}",
        )
        for row in found
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
