"""How far a record is: what lies in it, and whether somebody works on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import record
from .problems import MeasureError
from .request import Planned, load, planned

#: Locked while a record is worked on; has the number of that process.
LOCK = "lock"
LOCK_ATTEMPTS = 10
#: What the program said, when it ran detached.
LOG = "log"
#: What it does now; of no value when the lock is free.
STATE = "state.json"
#: What states there are, and the exit status of `status` for each but `finished`.
STATES = {"running": 3, "interrupted": 4}


@dataclass(frozen=True)
class Progress:
    """How far a record is.

    state      `running`, `interrupted` (not finished, and nobody works on it), `finished`
    current    the run under way; empty when none is
    runs, done numbers of runs
    refused    what was not measured and why, by stage; `failed` names runs whose tool failed
    complete   whether all that is required was measured
    left_s     seconds that the missing runs take
    """

    state: str
    place: str
    pid: int
    current: str
    runs: int
    done: int
    left_s: int
    refused: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    complete: bool = True

    def to_json(self) -> dict[str, Any]:
        """For `status --json`."""
        return {"schema": record.SCHEMA, **asdict(self)}


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Work on a record, alone; raises `MeasureError` when somebody else does."""
    with (directory / LOCK).open("a+", encoding="ascii") as file:
        for attempt in range(LOCK_ATTEMPTS):  # who asks for the status holds it for a moment, too
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if attempt == LOCK_ATTEMPTS - 1:
                    raise MeasureError(
                        f"another virt-rt-measure works on {directory}",
                        f"virt-rt-measure stop --record {directory}",
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def worker(directory: Path) -> int | None:
    """Number of the process that works on a record; None when nobody does, 0 when it has just begun."""
    try:
        with (directory / LOCK).open(encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return int(file.read().strip() or 0)
    except FileNotFoundError:
        pass
    return None


def finished(directory: Path, run: Planned) -> record.Run | None:
    """What a run left, None when it has not finished; raises `MeasureError` when that cannot be read."""
    path = directory / run.name / record.RUN
    if not path.exists():
        return None
    try:
        left = record.read(path, record.Run)
    except record.RecordError as error:
        raise MeasureError(
            f"{path}: {error}", f"to measure that again: mv {path.parent} {path.parent}.interrupted-0"
        ) from None
    if (left.stage, left.tool, left.segment) != (run.stage.name, run.stage.tool, run.segment):
        raise MeasureError(f"{path} is of another request", "begin another record")
    return left


def progress(directory: Path) -> Progress:
    """How far a record is; raises `MeasureError` when there is none."""
    pid = worker(directory)  # first: what is written after this question is only news
    request = load(directory / record.REQUEST)
    runs = planned(request)
    left = {run.name: finished(directory, run) for run in runs}
    current = ""
    if pid is not None:
        with contextlib.suppress(record.RecordError, AttributeError):
            current = str(record.read_json(directory / STATE).get("current", ""))
    ended = (directory / record.END).is_file() and all(left.values())
    done = {run.name: found for run in runs if (found := left[run.name]) is not None}
    state = "running" if pid is not None else "finished" if ended else "interrupted"
    required = {stage.name: stage.required for stage in request.stages}
    return Progress(
        state=state,
        place=request.place,
        pid=pid or 0,
        current=current,
        runs=len(runs),
        done=len(done),
        left_s=sum(run.seconds for run in runs if left[run.name] is None),
        refused={found.stage: found.refused for found in done.values() if found.refused},
        failed=[name for name, found in done.items() if found.status],
        complete=not any(required[f.stage] and (f.refused or f.status) for f in done.values()),
    )
