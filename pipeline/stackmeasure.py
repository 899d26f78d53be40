"""The measurement that host and guest of the stack proof make: what is asked of them, and what came of it.

Runs inside the lab's step, standard library only. What the requests need of the run, kernels and plan, is filled in
here; what they ask is in `measurement.json`: a request of `pipeline.measure.record` for each place.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    from pipeline.gate import Finding
except ImportError:  # in the step its file lies beside this one
    from gate import Finding  # type: ignore[import-not-found, no-redef]

#: Where a record lies in the directory that a place sent; also the directory of the whole measurement.
MEASUREMENT = "measurement"
EXPECTATIONS, VERDICT, ATTRIBUTION = "expectations.json", "verdict.json", "attribution.json"

#: How the guest is made late, and what the host's trace has to name: kind and name of the first culprit.
DISTURBANCES = {"hog": ("thread", "hog"), "interrupt": ("interrupt", "irqlat_edu")}

#: Least CPU time of the load, in CPUs: emulated, on one CPU that has everything else to do, too.
LOAD_SHARES = {"hackbench": 0.01}
#: A stage that is judged lasts so long at least, seconds.
MINIMUM_S = 10
NO_LIMITS = "an emulated machine is held against no limit"


def requests(asked: Mapping[str, Any], releases: Mapping[str, str], plan: bytes) -> dict[str, dict[str, Any]]:
    """The request of each place; `releases` are the kernels', by place, `plan` is the host's plan.json.

    `{release}` in the arguments of a tool stands for the release of the place's kernel. KeyError for a place without.
    """
    made = {}
    for place, request in asked.items():
        stages = [
            {**stage, "argv": [word.replace("{release}", releases[place]) for word in stage["argv"]]}
            for stage in request["stages"]
        ]
        made[place] = {
            **request,
            "kernel_release": releases[place],
            "plan_sha256": hashlib.sha256(plan).hexdigest(),
            "stages": stages,
        }
    return made


def expectations(platform: str, made: Mapping[str, Any], begun_s: int) -> dict[str, Any]:
    """What the verdict holds the measurement against; `begun_s` is when the run began, seconds since 1970."""
    unjudged = {"cyclictest": NO_LIMITS, "irqlat": NO_LIMITS}
    return {
        "schema": 1,
        "platform": platform,
        "places": {
            place: {"request": request, "limits": {}, "unjudged": unjudged} for place, request in made.items()
        },
        "load_required": True,
        "load_shares": LOAD_SHARES,
        "minimum_s": MINIMUM_S,
        "oldest_s": begun_s,
        "max_age_s": 0,
    }


def gather(records: Path, measurement: Path, places: Mapping[str, Any], expected: dict[str, Any]) -> None:
    """Bring the records of all places into one measurement; one that did not come is missing there, too."""
    measurement.mkdir(parents=True, exist_ok=True)
    (measurement / EXPECTATIONS).write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
    for place in places:
        if (records / place / MEASUREMENT).is_dir():
            shutil.move(records / place / MEASUREMENT, measurement / place)


def judge(measurement: Path, program: Path) -> Finding:
    """The finding about how it was measured, by `virt-rt-measure judge`, which leaves its verdict in there."""
    done = subprocess.run(
        [
            sys.executable, str(program), "judge", str(measurement),
            "--expect", str(measurement / EXPECTATIONS), "--json", str(measurement / VERDICT), "--allow-emulated",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    promise = "made as asked, on host and guest, under load on both"
    try:
        verdict = json.loads((measurement / VERDICT).read_text())
        red = [
            f"{each['name']}: wanted {each['wanted']}, got {each['got']}"
            for each in verdict["findings"]
            if not each["ok"]
        ]
        told = f"{len(verdict['findings'])} findings, all fine: {verdict['latency_verdict']}"
        ok = (
            verdict["protocol_ok"] is True
            and verdict["evidence"] == "emulated"
            and len(verdict["findings"]) > 0
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Finding("measurement", promise, f"no verdict ({error}): {done.stdout.strip()[-300:]}", False)
    return Finding("measurement", promise, "; ".join(red) or told, ok and done.returncode == 0 and not red)


def attribute(host: Path, measurement: Path) -> list[Finding]:
    """A finding for each disturbance: whether the host's trace names it first. All events go into the measurement.

    `host` is the directory that the host sent, with `late-<kind>/attribution.json`.
    """
    findings, events = [], []
    for kind, (sort, name) in DISTURBANCES.items():
        path = host / f"late-{kind}" / ATTRIBUTION
        promise = f"by {sort} {name} first"
        try:
            told = json.loads(path.read_text())["events"]
            (event,) = told
            first = event["culprits"][0] if event["culprits"] else None
            events.append(event)
            ok = first is not None and (first["kind"], first["name"]) == (sort, name)
            findings.append(Finding(f"late by {kind}", promise, str(event["verdict"]), ok))
        except (OSError, ValueError, KeyError, TypeError) as error:
            findings.append(Finding(f"late by {kind}", promise, f"{type(error).__name__}: {error}", False))
    measurement.mkdir(parents=True, exist_ok=True)
    (measurement / ATTRIBUTION).write_text(json.dumps({"schema": 1, "events": events}, indent=1) + "\n")
    return findings
