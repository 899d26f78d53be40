"""The commands of `doit` that build and that read: run, list, plan, why, log, shell and the rest."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import Any

from doit.cmd_run import Run as DoitRun
from doit.cmd_run import opt_continue, opt_num_process, opt_single

from pipeline.display import duration
from pipeline.errors import UserError
from pipeline.face import (
    JSON_OPTION,
    SOURCE_OPTION,
    Face,
    action_names,
    guarded,
    one_action,
    session,
    without_sources,
)
from pipeline.guesttasks import guest_task
from pipeline.inputs import patches_of, source_name
from pipeline.plan import State
from pipeline.reporter import Reporter
from pipeline.tasks import (
    MEASURE,
    TYPED_LIKE_TASKS,
    Session,
    guest_tasks,
    measure_summary,
    measured_platforms,
)

#: How many steps may be under way; the executor's own limits decide what really runs side by side.
PARALLEL = 4


class Run(DoitRun):  # type: ignore[misc]  # doit has no types
    """`doit run`: doit's own, with our display, signals and exit status."""

    name = "run"
    doc_purpose = "make products (only what is stale)"
    doc_usage = "[--source NAME=DIR]... [TASK...]"

    def __init__(self, cmds: Any = None, **others: Any) -> None:
        """Keep what doit makes a command with: another one may be meant."""
        super().__init__(cmds=cmds, **others)
        self._commands, self._others = cmds, others

    def parse_execute(self, in_args: list[str]) -> int:
        """Everything, the loading of dodo.py included, under one guard."""
        return guarded(lambda: self._parsed(in_args))

    def _parsed(self, in_args: list[str]) -> int:
        args = without_sources(in_args)
        verb, _, about = args[0].partition(":") if args else ("", "", "")
        if about and verb in TYPED_LIKE_TASKS:
            return self._command(verb, [about, *args[1:]])
        # doit looks for the command in the first word, where `--source` may stand
        if args != in_args and args and args[0] in (self._commands or ()):
            return self._command(args[0], args[1:])
        task = guest_task(args, self._make)
        return self._make(args) if task is None else task.parse_execute(task.words)

    def _command(self, name: str, args: list[str]) -> int:
        command = self._commands.get_plugin(name)(cmds=self._commands, **self._others)
        return int(command.parse_execute(args))

    def _make(self, args: list[str]) -> int:
        return int(super().parse_execute(args))

    cmd_options = (opt_continue, opt_num_process, opt_single, SOURCE_OPTION)

    def _execute(self, continue_: bool = False, num_process: int = 0, single: bool = False) -> int:
        current = session()
        asked = list(self.sel_tasks or [])
        measured = measured_platforms(asked, current.project.recipes.platforms)
        others = [name for name in asked if name.partition(":")[0] != MEASURE]
        names = action_names(current.project, others) if others or not measured else []
        _tell_local(current)
        current.project.refuse_tainted(names)
        _bring_signer(current, names)
        current.select(names)
        _tell_warnings(current, names)
        # threads: steps run elsewhere, and what they share (locks, the display) lives in this process
        options = {"par_type": "thread", "num_process": num_process or PARALLEL, "verbosity": 2}
        work = [name for name, state in current.states.items() if state in (State.BUILD, State.LOCAL)]
        finished = False
        current.display.open()
        try:
            if work:
                current.executor.clean_up_after_crashes()
            status = int(
                super()._execute(
                    sys.stdout, continue_=continue_, single=single, reporter=Reporter(current), **options
                )
            )
            status = max(status, current.settle())
            finished = True
            return status
        finally:
            if not finished:
                current.cancel()
                _wait_for_threads()
            current.display.close()
            if work:
                current.close()
            if not finished:
                current.display.say("interrupted: what had finished is kept; run doit again to go on")


def _bring_signer(current: Session, names: list[str]) -> None:
    """Make the development key when something of this will be signed and no key is there, and say so."""
    made = current.project.bring_signer(names)
    if made is not None:
        current.display.note(
            f"made a {made.name.partition(' <')[0].removeprefix('virt-rt ')}: docs/signing.md"
        )


def _tell_local(current: Session, *, as_json: bool = False) -> None:
    """Say which sources are not what is locked, a note each; on standard error where the output is for a program."""
    project = current.project
    for name, local in project.local_sources.items():
        action = project.graph[source_name(name)] if source_name(name) in project.graph else None
        if action is None or action.snapshot is None:
            text = f"nothing is made from {name} ({local.said_by})"
        else:
            text = f"{name} is the work tree {action.snapshot.worktree.path} ({local.said_by}), and not what is locked"
            if patches_of(project.root, name):
                text += f"; without recipes/patches/{name}"
        if as_json:
            print(f"note: {text}", file=sys.stderr)
        else:
            current.display.note(text)


def _tell_warnings(current: Session, names: list[str]) -> None:
    """What the CPU plans of the platforms asked for would be better without, a note each."""
    project = current.project
    places = {(project.graph[name].place or "").partition("/")[0] for name in names}
    for platform, plan in project.recipes.plans.items():
        if platform in places and plan.warnings:
            from pipeline.planview import warnings  # few plans have any

            for line in warnings(project.root, plan):
                current.display.note(line)


def _wait_for_threads(seconds: float = 20.0) -> None:
    """Let cancelled steps drop their stages; a thread that hangs does not keep us."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(timeout=seconds / max(threading.active_count(), 1))


class List(Face):
    """`doit list`."""

    name = "list"
    doc_purpose = "list the products, the machines to measure and the guests to run, a line each"
    doc_usage = ""
    cmd_options = (
        {
            "name": "all",
            "short": "",
            "long": "all",
            "type": bool,
            "default": False,
            "help": "intermediate results too",
        },
        JSON_OPTION,
    )

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Print names and what they are."""
        project = session().project
        _tell_local(session(), as_json=params["as_json"])
        rows = [
            (f"platform:{name}", f"everything of {name}, proof included")
            for name in project.recipes.platforms
        ]
        rows += [(f"{MEASURE}:{name}", measure_summary(name)) for name in project.recipes.platforms]
        rows += guest_tasks(project.recipes.guests)
        rows += [(a.name, a.summary) for a in project.graph if a.place is not None or params["all"]]
        if params["as_json"]:
            print(json.dumps([{"task": name, "summary": summary} for name, summary in rows], indent=1))
            return
        width = max(len(name) for name, _ in rows)
        for name, summary in rows:
            print(f"{name:<{width}}  {summary}")


class Plan(Face):
    """`doit plan`."""

    name = "plan"
    doc_purpose = "show what a run would do: current, from the store, or build, and how long that takes"
    doc_usage = "[TASK...]"
    cmd_options = (JSON_OPTION,)

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Print the plan; nothing is done."""
        project = session().project
        _tell_local(session(), as_json=params["as_json"])
        states = project.plan(action_names(project, args))
        times = {name: project.expected_seconds(name) for name in states}
        if params["as_json"]:
            rows = [
                {"task": n, "state": s.value, "key": project.graph.keys[n], "expected_seconds": times[n]}
                for n, s in states.items()
            ]
            print(json.dumps(rows, indent=1))
            return
        _tell_warnings(session(), list(states))
        width = max(len(name) for name in states)
        for name, state in states.items():
            seconds = times[name]
            last = f"  about {duration(seconds)}" if state is State.BUILD and seconds is not None else ""
            print(f"{name:<{width}}  {state.value}{last}")
        to_build = [name for name, state in states.items() if state is State.BUILD]
        if not to_build:
            restore = sum(state is State.LOCAL for state in states.values())
            print(f"nothing to build{f', {restore} to lay out' if restore else ''}")
            return
        known = [seconds for name in to_build if (seconds := times[name]) is not None]
        unknown = len(to_build) - len(known)
        work = [f"about {duration(sum(known))} of work"] if known else []
        work += [f"{unknown} never built on this machine"] if unknown else []
        print(f"{len(to_build)} to build, {' and '.join(work)}")


class Why(Face):
    """`doit why`."""

    name = "why"
    doc_purpose = "tell which input changed since the last result"
    doc_usage = "TASK"
    cmd_options = (JSON_OPTION,)

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Print the changes that make a task stale, down to the file and line."""
        from pipeline import changes  # most commands do without

        project = session().project
        name = self.one(args)
        _tell_local(session(), as_json=params["as_json"])
        found = [
            change for each in action_names(project, [name]) for change in changes.since_last(project, each)
        ]
        if params["as_json"]:
            print(json.dumps([change.to_json() for change in dict.fromkeys(found)], indent=1))
            return
        if not found:
            print(f"{name}: nothing changed since the last result")
        for change in dict.fromkeys(found):
            print(change)


class Log(Face):
    """`doit log`."""

    name = "log"
    doc_purpose = "print the log of a task's last step"
    doc_usage = "TASK"

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Print this checkout's log, or the one kept with the result."""
        current = session()
        action = current.project.graph[one_action(current.project, self.one(args))]
        path = current.executor.log_path(action.name)
        if not path.is_file():
            result = current.project.store.lookup(current.project.graph.keys[action.name])
            if result is None or result.log is None or not current.project.store.has(result.log.digest):
                raise UserError(f"{action.name} has no log yet", f"doit {action.name} makes one")
            path = current.project.store.path(result.log.digest)
        print(f"# {path}", file=sys.stderr)
        sys.stdout.write(path.read_text(errors="replace"))


class Shell(Face):
    """`doit shell`."""

    name = "shell"
    doc_purpose = "open a shell in a step's container, with its inputs mounted"
    doc_usage = "TASK [COMMAND...]"

    def perform(self, params: dict[str, Any], args: list[str]) -> int:
        """Stage the inputs and hand the terminal to the container."""
        if not args:
            raise UserError("doit shell takes a TASK", "doit list --all names them")
        current = session()
        action = current.project.graph[one_action(current.project, args[0])]
        if action.builder is None:
            raise UserError(
                f"{action.name} runs on the host, not in a container", "`doit log` shows what it did"
            )
        executor = current.executor
        try:
            executor.clean_up_after_crashes()
            stage = executor.stage_for_shell(action)
            command = executor.container(stage).cli(*(args[1:] or ["/bin/bash"]))
            if not (sys.stdin.isatty() and sys.stdout.isatty()):
                command.remove("-it")
            else:
                print("the step itself: bash -euo pipefail /build/step", file=sys.stderr)
            return subprocess.run(command, check=False).returncode
        finally:
            current.close()


class VerifyArtifacts(Face):
    """`doit verify-artifacts`."""

    name = "verify-artifacts"
    doc_purpose = "compare every product with its manifest, by content"
    doc_usage = "[TASK...]"
    cmd_options = (JSON_OPTION,)

    def perform(self, params: dict[str, Any], args: list[str]) -> int:
        """Print what differs; status 2 when anything does."""
        project = session().project
        products = [n for n in action_names(project, args) if project.graph[n].place is not None]
        if not products:
            raise UserError("none of these tasks is a product", "`doit list` names the products")
        rows = []
        for name in products:
            action = project.graph[name]
            rows += [
                (name, d.path.relative_to(project.root), d.reason) for d in project.artifacts.verify(action)
            ]
        if params["as_json"]:
            print(json.dumps([{"task": n, "path": str(p), "reason": r} for n, p, r in rows], indent=1))
        else:
            for name, path, reason in rows:
                print(f"{name}: {path}: {reason}")
            print(f"{len(products)} products, {len(rows)} differences")
        return 2 if rows else 0


class Reproduce(Face):
    """`doit reproduce`."""

    name = "reproduce"
    doc_purpose = "run a step again, without its stored result, and compare the outputs"
    doc_usage = "TASK"

    def perform(self, params: dict[str, Any], args: list[str]) -> int:
        """Print each output's verdict; status 1 when one differs."""
        current = session()
        name = one_action(current.project, self.one(args))
        _bring_signer(current, [name])
        executor = current.executor
        try:
            executor.clean_up_after_crashes()
            first = executor.result(name)
            again = executor.repeat(name)
        finally:
            current.close()
        differing = 0
        for output, (blob, _) in sorted(first.outputs.items()):
            same = again[output] == blob
            differing += not same
            print(f"{output}: {'identical' if same else f'{blob.digest} became {again[output].digest}'}")
        return 1 if differing else 0


class Gc(Face):
    """`doit gc`."""

    name = "gc"
    doc_purpose = "remove from the cache what no run has used for a while"
    doc_usage = ""
    cmd_options = (
        {
            "name": "days",
            "short": "",
            "long": "days",
            "type": int,
            "default": 30,
            "help": "results not used for so many days go, unless this checkout's recipes ask for them",
        },
        {
            "name": "dry_run",
            "short": "",
            "long": "dry-run",
            "type": bool,
            "default": False,
            "help": "only tell what would go",
        },
    )

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Free space and say how much."""
        from pipeline import gc  # most commands do without

        days, dry_run = params["days"], params["dry_run"]
        if args or days < 0:
            raise UserError("doit gc takes a number of days and no task", "doit gc --days 30")
        current = session()
        project, executor = current.project, current.executor
        if not dry_run:
            executor.clean_up_after_crashes()
        unused_since = time.time() - days * 86_400
        freed = gc.collect(project.store, project.graph, executor.engine, unused_since, dry_run)
        print(
            f"{'would remove' if dry_run else 'removed'} {freed.results} results and {freed.blobs} blobs, "
            f"{freed.size / 1e6:.1f} MB"
            + (f"; {freed.trees} unpacked source trees" if freed.trees else "")
            + (f"; {freed.builds} build directories of work trees" if freed.builds else "")
            + "".join(f"\nand the image {image}" for image in freed.images)
        )
        if freed.note:
            current.display.note(freed.note)
