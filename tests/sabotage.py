"""Break things in the lab, and see that the proof is red for just those: `make sabotage`.

Each run is a whole one of the emulated host, some ten minutes: too long for the tests. So things that no finding
shares are broken together in one run; with names (`a`, or `a+b` for one run) others are. What is broken, and
which findings have to tell, is in `pipeline.stackgate.SABOTAGES`. Two sabotages more never reach the lab: a
configuration without real time is refused by the kernel's build (tests/test_pocket.py), a changed package by apt on the
lab's host (tests/test_labhost.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from pipeline import stack
from pipeline.engine import Engine
from pipeline.executor import Executor, StepFailed
from pipeline.graph import Graph
from pipeline.project import DEFAULT_PLATFORM, Project
from pipeline.stackgate import CONSEQUENCES, SABOTAGES
from tests.conftest import Recorder

ROOT = Path(__file__).resolve().parent.parent

#: What goes together: no finding has to tell of two.
TOGETHER = (
    "isolation-removed+unit-unmasked+vf-not-restored",
    "vcpu-unpinned+driver-missing+cyclictest-missing",
    "emulator-on-rt-cpu+clock-wrong",
)


def red(project: Project, name: str, sabotages: list[str], log: Path) -> list[str]:
    """Run the proof of a platform with these things broken; the findings that are red, none when it passed."""
    asked = project.recipes
    *_, proof = stack.stack_proof(
        ROOT,
        name,
        asked.platforms[name],
        asked.guests_of(name),
        asked.plans[name],
        project.settings,
        " ".join(sabotages),
    )
    needed = project.graph.closure([proof.name])
    graph = Graph([*(project.graph[each] for each in needed if each != proof.name), proof])
    executor = Executor(graph, project.store, Engine(), Recorder(), log)
    try:
        executor.repeat(proof.name)
    except StepFailed:
        (left,) = log.rglob("stack.json")
        findings = json.loads(left.read_text())["findings"]
        return [f"{each['name']}: {each['got']}" for each in findings if not each["ok"]]
    return []


def main(names: list[str]) -> int:
    """Make these runs, or those that break everything once; exit status 1 when something was not found, or more was."""
    unknown = {name for run in names for name in run.split("+")} - SABOTAGES.keys()
    if unknown:
        print(f"no sabotage: {', '.join(sorted(unknown))}; there are {', '.join(SABOTAGES)}", file=sys.stderr)
        return 2
    status = 0
    project = Project(ROOT)
    try:
        for run in names or TOGETHER:
            sabotages = run.split("+")
            expected = [finding for sabotage in sabotages for finding in SABOTAGES[sabotage]]
            with tempfile.TemporaryDirectory() as log:
                found = red(project, DEFAULT_PLATFORM, sabotages, Path(log))
            following = [finding for sabotage in sabotages for finding in CONSEQUENCES.get(sabotage, ())]
            missing = [each for each in expected if not any(line.startswith(f"{each}: ") for line in found)]
            more = [
                line
                for line in found
                if not line.startswith(tuple(f"{each}: " for each in (*expected, *following)))
            ]
            print(f"{run}: {'red as it should be' if not missing and not more else 'WRONG'}", flush=True)
            for line in found:
                print(f"  red: {line[:1200]}")
            for each in missing:
                print(f"  not red: {each}")
            status |= bool(missing or more)
    finally:
        project.store.close()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
