"""Runs what a request asks for, in order, and leaves a record; goes on where an earlier attempt ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import machineinfo, progress, record, tools
from .loads import LoadError, Loads
from .machineinfo import cpulist, moment
from .problems import EndedError, MeasureError
from .processes import SIGNALS, Keeper, Program, threads
from .request import Planned, load, planned

#: Bytes that must be free for each run that is left, and for the disk load.
RUN_BYTES, LOAD_BYTES = 1 << 20, 64 << 20
STDOUT, STDERR = "stdout", "stderr"


def prepare(asked: Path, directory: Path) -> record.Request:
    """Make the record's directory, or find it with the same request in it; raises `MeasureError`."""
    request = load(asked)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MeasureError(f"{directory} cannot be made: {error.strerror}", "name another --record") from None
    kept = directory / record.REQUEST
    if kept.exists():
        if load(kept) != request:
            raise MeasureError(f"{directory} is the record of another request", "name another --record")
    elif left := sorted(path.name for path in directory.iterdir() if path.name not in _OURS):
        raise MeasureError(f"{directory} is no record: it has {left[0]}", "name an empty or new directory")
    return request


#: What may lie in a record before its request does.
_OURS = {progress.LOCK, progress.LOG, progress.STATE, record.REQUEST + ".part"}


def examine(request: record.Request, directory: Path) -> record.Machine:
    """What this machine is, before anything is measured; raises `MeasureError` when it is not the one that was meant.

    What it has of tools and timers is asked for each stage.
    """
    here = machineinfo.machine()
    if here.kernel_release != request.kernel_release:
        raise MeasureError(
            f"this kernel is {here.kernel_release}, the one to measure {request.kernel_release}",
            "boot that kernel, or make the request for this one",
        )
    named = {*request.isolated, *request.housekeeping, *(cpu for s in request.stages for cpu in s.cpus)}
    if absent := named - set(machineinfo.online()):
        raise MeasureError(f"CPU {min(absent)} is not there, or not online", "look at the request")
    priority = max(stage.priority for stage in request.stages)
    if priority and not machineinfo.may_be_fifo(priority):
        raise MeasureError(f"no right to SCHED_FIFO with priority {priority}", "run virt-rt-measure as root")
    if (directory / record.MACHINE).exists():
        try:
            first = record.read(directory / record.MACHINE, record.Machine)
        except record.RecordError as error:
            raise MeasureError(f"{directory}: {error}", "begin another record") from None
        if said := machineinfo.different(first, here):
            raise MeasureError(f"{directory} is of another machine: {said}", "begin another record")
    runs = [run for run in planned(request) if progress.finished(directory, run) is None]
    wanted = len(runs) * RUN_BYTES + (LOAD_BYTES if any("disk" in run.stage.loads for run in runs) else 0)
    free = shutil.disk_usage(directory).free
    if free < wanted:
        raise MeasureError(
            f"{directory} has {free >> 20} MiB free, {wanted >> 20} are wanted", "name a --record elsewhere"
        )
    return here


def run(request: record.Request, directory: Path, begun: Callable[[], None]) -> int:
    """Measure; the exit status: 0 everything is there, 1 something required is not.

    `begun` is called when nothing stands against it any more. Raises `MeasureError` before that, `EndedError` when a
    signal came.
    """
    with _signals(), progress.locked(directory):
        here = examine(request, directory)
        if not (directory / record.REQUEST).exists():
            record.write(directory / record.REQUEST, request)
        if not (directory / record.MACHINE).exists():
            record.write(directory / record.MACHINE, here)
        begun()
        refusals = {stage.name: tools.refusal(stage, here.timer_ns) for stage in request.stages}
        for stage in request.stages:
            if refusals[stage.name]:
                word = "required, and " if stage.required else ""
                _say(f"{stage.name}: {word}not measured: {refusals[stage.name]}")
        os.sched_setaffinity(0, request.housekeeping)
        with contextlib.closing(Keeper()) as keeper:
            for each in planned(request):
                if progress.finished(directory, each) is None:
                    record.write_json(directory / progress.STATE, {"pid": os.getpid(), "current": each.name})
                    _one(request, each, directory, refusals[each.stage.name], keeper)
        _end(request, directory)
        return 0 if progress.progress(directory).complete else 1


def _one(request: record.Request, each: Planned, record_: Path, refused: str, keeper: Keeper) -> None:
    """One run, from an empty directory to its run.json."""
    directory = record_ / each.name
    if directory.exists():
        directory.rename(_aside(directory))
    directory.mkdir()
    began = moment()
    done = record.Run(
        stage=each.stage.name,
        tool=each.stage.tool,
        segment=each.segment,
        argv=tools.TOOLS[each.stage.tool].argv(each, request.housekeeping),
        boot_id=machineinfo.boot_id(),
        began=began,
        ended=began,
        status=0,
        refused=refused,
        threads=[],
        loads=[],
        files={},
    )
    values = dict(vars(done))
    if not refused:
        _say(f"{each.name}: {each.stage.name}, {each.seconds} s")
        try:
            with Loads(keeper, each.stage.loads, request.housekeeping, directory) as loads:
                values.update(_measure(request, each, directory, keeper, done.argv))
                values["loads"] = loads.tell()
        except LoadError as error:
            values["refused"] = str(error)
            _say(f"{each.name}: {error}")
        values["files"] = {path.name: record.sha256(path) for path in sorted(directory.iterdir())}
    record.write(directory / record.RUN, record.Run(**values))
    if values["status"]:
        _say(f"{each.name}: {each.stage.tool} ended with status {values['status']}: {directory}/{STDERR}")


def _measure(
    request: record.Request, each: Planned, directory: Path, keeper: Keeper, argv: Sequence[str]
) -> dict[str, object]:
    """Run the tool of a run; the fields of `record.Run` that come of it."""
    began = moment()
    if not argv:  # the loads are all there is to it
        for name in (STDOUT, STDERR):
            (directory / name).touch()
        time.sleep(each.seconds)
        return {"began": began, "ended": moment()}
    # Tools take their CPUs from those they may run on: the measured ones must be among them.
    cpus = sorted({*request.housekeeping, *each.stage.cpus} or machineinfo.online())
    try:
        program = Program(keeper, argv, cpus, directory, directory / STDOUT, directory / STDERR)
    except OSError as error:
        (directory / STDERR).write_text(f"{argv[0]} cannot be started on CPUs {cpulist(cpus)}: {error}\n")
        return {"began": began, "ended": moment(), "status": 127}
    seen: list[record.Thread] = []
    try:
        status = program.wait(each.seconds / 2)
        if status is None:
            seen = threads(program.session)
            status = program.wait(each.seconds / 2 + tools.GRACE_S)
        if status is None:
            _say(f"{each.name}: {argv[0]} did not end, and was ended")
            status = program.end() or -int(signal.SIGTERM)
        ended = moment()
    finally:
        program.end()
    return {"began": began, "ended": ended, "status": status, "threads": seen}


def _end(request: record.Request, directory: Path) -> None:
    """Write end.json, once all runs are there."""
    if (directory / record.END).exists():
        return
    runs = {each.name: record.sha256(directory / each.name / record.RUN) for each in planned(request)}
    request_, machine = (record.sha256(directory / name) for name in (record.REQUEST, record.MACHINE))
    record.write(directory / record.END, record.End(request_, machine, runs))


def _aside(directory: Path) -> Path:
    """Where what an interrupted run left is kept."""
    number = 1
    while (path := directory.with_name(f"{directory.name}.interrupted-{number}")).exists():
        number += 1
    return path


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let the first signal end this program in order; while it does so, others wait."""

    def end(number: int, frame: object | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise EndedError(number)

    before = {each: signal.signal(each, end) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
