"""The page of a release: one HTML file that needs no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from pipeline.labrecord import PAGE as REPORT
from pipeline.releasechanges import Changes
from pipeline.releaserecipe import RepositoryRecipe
from pipeline.releaserecord import LAB, PAGE, Record
from pipeline.rendering import render_template
from pipeline.topology import cpulist

#: What a proof that passed has seen, by level.
SEEN = {
    "boot": "every guest boots, with the kernel outside and the one inside, and keeps its plan",
    "stack": "the host boots and keeps its plan, and runs a guest under KVM with devices passed through",
}
#: Changes of one sort that are shown at once; the rest is folded away.
SHOWN = 12


def page(
    record: Record,
    changes: Changes | None,
    sums: Mapping[str, str],
    recipe: RepositoryRecipe,
    picture: str,
    templates: Mapping[str, str],
) -> str:
    """Render the page.

    `changes` is None for a platform's first release; `sums` maps paths to sha256 (hex) of all other files;
    `picture` is the CPU plan as SVG; `templates` maps file names of `recipes/templates/release/` to their texts.
    Raises `UserError` when the template is wrong.
    """
    plan = record.plan
    return render_template(
        f"{PAGE}.j2",
        templates,
        {
            "release": record,
            "date": f"{record.when:%Y-%m-%d}",
            "passed": all(proof.ok for proof in record.proofs),
            "emulated": any(proof.evidence == "emulated" for proof in record.proofs),
            "levels": {proof.level: SEEN[proof.level] for proof in record.proofs},
            "report": f"{LAB}/{REPORT}",
            "changes": changes,
            "shown": SHOWN,
            "picture": base64.b64encode(picture.encode()).decode(),
            "housekeeping": cpulist(plan["housekeeping"]),
            "isolated": cpulist(plan["isolated"]),
            "placements": [_placement(name, plan["guests"][name]) for name in sorted(plan["guests"])],
            "repository": recipe,
            "channel": recipe.channels[0],
            "metas": _metas(record),
            "sums": dict(sorted(sums.items())),
        },
        "release page",
    )


def _metas(record: Record) -> list[str]:
    """The packages that a person asks for by name: they bring all others."""
    names = {package.name for package in record.packages}
    asked = [f"virt-rt-host-{record.platform}", *(f"virt-rt-guest-{guest}" for guest in record.guests)]
    return [name for name in asked if name in names]


def _placement(name: str, guest: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, **guest}
