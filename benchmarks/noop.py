"""A `doit` that has nothing to do, against plain doit with as many tasks that have nothing to do."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmarks.measure import ROOT, Row, alternate, seconds
from pipeline.errors import UserError
from pipeline.plan import State
from pipeline.project import DEFAULT_PLATFORM, Project
from tests import standin
from tests.tiny import tiny_rootfs

MOST_RATIO, MOST_SECONDS = 1.5, 0.6
DOIT = ROOT / ".venv" / "bin" / "doit"
PLAIN = """\
def task_nothing():
    for number in range({count}):
        yield {{"name": str(number), "actions": ["true"], "uptodate": [True]}}
"""


def no_op(work: Path, rounds: int) -> Row:
    """Measure through the console script that a user types, start of the interpreter included."""
    project, environment, note = _built_project(work)
    count = len(project.graph)
    plain = work / "plain"
    plain.mkdir()
    (plain / "dodo.py").write_text(PLAIN.format(count=count))

    def run(directory: Path, environment: Mapping[str, str]) -> str:
        done = subprocess.run(
            [DOIT], cwd=directory, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    sides = (partial(run, project.root, environment), partial(run, plain, environment))
    if not sides[0]().startswith("everything is current"):
        raise UserError("there is something to do in the project that is to do nothing", "doit plan")
    sides[1]()
    ours, theirs = alternate(partial(seconds, sides[0]), partial(seconds, sides[1]), rounds)
    what = f"no-op of {DEFAULT_PLATFORM}, {count} tasks, against plain doit with {count} do-nothing tasks"
    return Row(
        what,
        f"{ours * 1000:.0f} ms",
        f"{theirs * 1000:.0f} ms",
        f"{ours / theirs:.2f}",
        f"<= {MOST_RATIO}, < {MOST_SECONDS} s",
        ours / theirs <= MOST_RATIO and ours < MOST_SECONDS,
        f"median of {rounds}; {note}",
    )


def built(project: Project) -> bool:
    """Whether every product of the default platform is in place as the recipes ask now."""
    try:
        states = project.plan(project.products(DEFAULT_PLATFORM))
    except UserError:  # a lock is open, so nothing can have been built from it
        return False
    return set(states.values()) <= {State.CURRENT, State.IDLE}


def _built_project(work: Path) -> tuple[Project, Mapping[str, str], str]:
    """The checkout when it is built, else the stand-in of the tests; its environment; which it is."""
    project = Project(ROOT)
    # with compiled modules, as in any checkout that has been used
    ordinary = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    if built(project):
        return project, ordinary, "the built checkout"
    (work / "rootfs").mkdir()
    made = standin.make(work / "standin", tiny_rootfs(work / "rootfs"))
    done = made.doit()
    if done.status:
        raise UserError(f"the stand-in project could not be built: {done.out}{done.err}", "make test")
    environment = {k: v for k, v in made.environment.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return Project(made.root, environment), environment, "stand-in project with the same graph"
