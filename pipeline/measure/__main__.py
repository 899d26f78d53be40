"""The command `virt-rt-measure`.

Exit status: 0 when everything that is required was measured, 1 when something was not, 2 when the command was called
wrongly or this machine is not the one to measure; 130 and 143 when a signal ended it. `status` has more.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import detach, progress, runner
from .problems import EndedError, MeasureError

#: Commands of other modules. Each is read only when it is asked for: on a slow machine, measuring would wait for what
#: only judging needs.
ELSEWHERE = {"judge": "verdict", "trace": "tracing", "attribute": "attribution", "hwlat": "hwlat"}
#: Seconds between two looks at a record.
LOOK = 1.0
#: Seconds that a run takes at most to end its tools and loads.
ENDING = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser(given[:1]).parse_args(given)
    try:
        status: int = options.run(options)
        return status
    except MeasureError as error:
        print(f"virt-rt-measure: {error.message}\n  {error.hint}", file=sys.stderr)
        return 2
    except EndedError as error:
        print(f"virt-rt-measure: ended by {signal.Signals(error.number).name}", file=sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        hint = (
            "make room, and run it again: it goes on"
            if error.errno == errno.ENOSPC
            else "mend that, and repeat"
        )
        print(f"virt-rt-measure: {error}\n  {hint}", file=sys.stderr)
        return 2


def _parser(asked: Sequence[str]) -> argparse.ArgumentParser:
    """With the commands of all modules, unless `asked` has the name of one."""
    parser = argparse.ArgumentParser(
        prog="virt-rt-measure",
        description="Measure the latencies of this machine, and judge what was measured.",
        epilog="Exit status: 0 all that is required was measured, 1 something was not, 2 nothing can be measured so.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    recorded = argparse.ArgumentParser(add_help=False)
    recorded.add_argument("--record", metavar="DIR", required=True, type=Path, help="directory of the record")

    run = commands.add_parser("run", parents=[recorded], help="measure, or go on where it was interrupted")
    run.add_argument("--request", metavar="FILE", required=True, type=Path, help="what to measure")
    run.add_argument("--detach", action="store_true", help="start it, and let it run when this session ends")
    run.add_argument(detach.OPTION, help=argparse.SUPPRESS)
    run.set_defaults(run=_run)

    status = commands.add_parser(
        "status",
        parents=[recorded],
        help="how far a record is",
        epilog="Exit status: 0 finished, 1 finished without something required, 2 no record, 3 running,"
        " 4 interrupted.",
    )
    status.add_argument("--json", action="store_true", help="print JSON")
    status.add_argument("--wait", action="store_true", help="return when nobody works on it any more")
    status.set_defaults(run=_status)

    stop = commands.add_parser("stop", parents=[recorded], help="end a run; another one goes on there")
    stop.set_defaults(run=_stop)
    known = {*commands.choices, *ELSEWHERE}
    for command, module in ELSEWHERE.items():
        if command in asked or known.isdisjoint(asked):
            importlib.import_module(f".{module}", __package__).add_parser(commands)
    return parser


def _run(options: argparse.Namespace) -> int:
    request = runner.prepare(options.request, options.record)
    if not options.detach:
        token = getattr(options, "begun", None)
        return runner.run(request, options.record, lambda: detach.begun(token) if token else None)
    if progress.worker(options.record) is None:
        runner.examine(request, options.record)  # what stands against it is told here, and not in a log
    detach.start(options.request, options.record)
    print(f"it runs: virt-rt-measure status --record {options.record}")
    return 0


def _status(options: argparse.Namespace) -> int:
    while options.wait and progress.worker(options.record) is not None:
        time.sleep(LOOK)
    found = progress.progress(options.record)
    if options.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        rest = f", {found.left_s} s left" if found.left_s else ""
        print(f"{found.place}: {found.state}, {found.done} of {found.runs} runs{rest}")
        if found.current:
            print(f"now: {found.current}")
        for stage, why in found.refused.items():
            print(f"not measured: {stage}: {why}")
        for name in found.failed:
            print(f"failed: {name}: see {options.record / name / runner.STDERR}")
    return progress.STATES.get(found.state, 0 if found.complete else 1)


def _stop(options: argparse.Namespace) -> int:
    progress.progress(options.record)  # there must be one
    deadline = time.monotonic() + ENDING
    asked: set[int] = set()
    while (pid := progress.worker(options.record)) is not None:
        if time.monotonic() > deadline:
            raise MeasureError(f"process {pid} does not end", f"look at it, or kill -9 {pid}")
        if pid and pid not in asked:
            asked.add(pid)
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
    print("it had ended" if not asked else "ended")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
