"""The report of a measurement of real machines, or of any that `doit measure` left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.junit import junit
from pipeline.labpage import page, templates_of
from pipeline.labrecord import JUNIT, PAGE, RECORD, Limits, Report, encode
from pipeline.labreport import ATTRIBUTION, Given, report
from pipeline.measure import record
from pipeline.measure.verdict import FILE as VERDICT
from pipeline.planpicture import svg
from pipeline.project import Project
from pipeline.settings import chosen
from pipeline.tuning import plan_json

#: Why a level is not proven by a measurement.
ELSEWHERE = "this is the report of a measurement alone; doit lab:{} reports on the rest"


def measurement_report(
    project: Project,
    measurement: Path,
    verdict: Mapping[str, Any] | None,
    baseline: Path | None,
    out: Path,
) -> Report:
    """Write report.html, report.json and junit.xml about a measurement below `out`; the report, which may be red.

    `verdict` is the gate's; without one the report is red. `baseline` is another report, or the directory of a
    measurement. Raises `UserError` when there is nothing that could be reported.
    """
    try:
        request = record.read(measurement / "host" / record.REQUEST, record.Request)
    except record.RecordError as error:
        raise UserError(
            f"{measurement} is no measurement: {error}", "give the directory that `doit measure` left"
        ) from None
    name = request.platform
    platform = project.recipes.platform(name)
    plan = project.recipes.plans[name]
    attribution = measurement / ATTRIBUTION
    made = report(
        Given(
            platform=name,
            measurement=measurement,
            verdict=verdict,
            attribution=attribution.read_bytes() if attribution.exists() else None,
            limits=msgspec.convert(msgspec.to_builtins(platform.limits), Limits | None),
            pins={guest: placement.pins for guest, placement in plan.guests.items()},
            baseline=baseline,
            why={level: ELSEWHERE.format(name) for level in ("structure", "boot", "stack")},
        )
    )
    picture = svg(plan, f"CPUs of {name}")
    text = page(made, picture, _note(project, name, request.plan_sha256), templates_of(project.root))
    out.mkdir(parents=True, exist_ok=True)
    for file, content in ((PAGE, text.encode()), (RECORD, encode(made)), (JUNIT, junit(made))):
        write_atomically(out / file, content)
    return made


def verdict_of(measurement: Path) -> Mapping[str, Any] | None:
    """The gate's verdict that lies in a measurement; None when there is none. `UserError` when it cannot be read."""
    path = measurement / VERDICT
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", "judge the measurement again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no verdict", "judge the measurement again")
    return content


def _note(project: Project, name: str, measured: str) -> str:
    """Whether the plan of this checkout, which is drawn, is the one that was measured."""
    recipes, platform = project.recipes, project.recipes.platform(name)
    choices = chosen(project.root, name, platform, project.settings)
    guests = recipes.guests_of(name)
    document = plan_json(name, platform, recipes.plans[name], guests, project.settings, choices)
    own = sha256((json.dumps(document, indent=1) + "\n").encode()).hexdigest()
    if own == measured:
        return "This is the plan that was measured."
    return (
        "This is the plan of the checkout that made the report; the host that was measured had another one."
    )
