"""What changed from one release of a platform to the next: sources, kernel configurations, packages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.releaserecord import Record

#: Something by name, before and now; empty where it was not there.
Move = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Changes:
    """The differences; each list is sorted by name.

    `configs` and `images` are by kernel role and guest. `packages` compares versions, `patches` digests' beginnings.
    """

    since: str
    sources: tuple[Move, ...]
    patches: tuple[Move, ...]
    configs: Mapping[str, tuple[Move, ...]]
    packages: tuple[Move, ...]
    images: Mapping[str, tuple[Move, ...]]

    def __bool__(self) -> bool:
        """Whether anything changed at all."""
        parts = (self.sources, self.patches, self.packages, *self.configs.values(), *self.images.values())
        return any(parts)


def changes(old: Record, new: Record) -> Changes:
    """What changed from `old` to `new`, two releases of one platform."""
    return Changes(
        since=old.version,
        sources=_moves(
            {s.name: f"{s.ref} ({s.commit[:12]}, tree {s.tree[:12]})" for s in old.sources},
            {s.name: f"{s.ref} ({s.commit[:12]}, tree {s.tree[:12]})" for s in new.sources},
        ),
        patches=_moves(
            *({f"{s.name}/{p.name}": p.sha256[:12] for s in r.sources for p in s.patches} for r in (old, new))
        ),
        configs={
            role: _moves(
                old.kernels[role].config if role in old.kernels else {},
                new.kernels[role].config if role in new.kernels else {},
            )
            for role in _names(old.kernels, new.kernels)
        },
        packages=_moves(*({p.name: p.version for p in r.packages} for r in (old, new))),
        images={
            guest: _moves(
                *(
                    {p.name: p.version for p in r.guests[guest].packages} if guest in r.guests else {}
                    for r in (old, new)
                )
            )
            for guest in _names(old.guests, new.guests)
        },
    )


def _names(*parts: Iterable[str]) -> list[str]:
    return sorted({name for part in parts for name in part})


def _moves(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[Move, ...]:
    return tuple(
        (name, old.get(name, ""), new.get(name, ""))
        for name in _names(old, new)
        if old.get(name) != new.get(name)
    )
