"""How an action becomes a result: out of the store, or by running its step.

`Executor.result` is the one way to a result. It pulls: whatever an action needs is brought first,
whoever asked and in whichever order a scheduler calls. Nothing here trusts a file because it is
there: hits are hashed, downloads are compared with what was declared, inputs are compared again
after the step has run, and only a complete set of outputs is ever published.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from pipeline import history, incremental
from pipeline.action import Action, File, Resource
from pipeline.engine import LABEL, PROJECT, Container, Engine, builder_image
from pipeline.errors import InternalError, RedError, UserError, VirtRtError
from pipeline.files import remove_tree
from pipeline.graph import Graph
from pipeline.keys import Spec
from pipeline.stage import Moved, Stage
from pipeline.steplog import StepLog
from pipeline.store import Blob, Result, Store

#: 1980-01-01: the oldest date that every archive and file system format can hold.
SOURCE_DATE_EPOCH = "315532800"
#: How many steps of a sort may run at once. Two heavy ones fill each other's serial stretches
#: (configure, link). An emulated machine has the whole real one: it takes the heavy places too,
#: since a compile beside it makes its clocks stutter.
PLACES: dict[Resource, int] = {"heavy": 2, "lab": 1, "network": 1}
#: Below /build/work of a step that builds from a work tree: what has changed since, a path a line.
CHANGED = "changed"
#: What a process's end by SIGKILL looks like.
KILLED = 137


class Observer(Protocol):
    """Who is told what happens; called from several threads."""

    def started(self, action: Action, last: history.Record | None) -> None:
        """A step begins; `last` is its last run here, if there was one."""

    def line(self, action: Action, text: str) -> None:
        """A step wrote a line to its log."""

    def finished(self, action: Action, how: str, seconds: float) -> None:
        """A result is there; `how` is `built` or `restored`."""

    def note(self, text: str) -> None:
        """Something a person should know although nothing failed."""


class Cancelled(VirtRtError):
    """The run was interrupted; nothing of the step is kept."""

    exit_status = 130


class StepFailed(VirtRtError):
    """A step ended with an error; `tail` holds its last lines.

    `status` 2 of a step means what it means for a command: the input is wrong, not the step.
    """

    def __init__(self, message: str, hint: str, tail: list[str], status: int) -> None:
        """Keep the last lines beside the message."""
        super().__init__(message, hint)
        self.tail, self.status = tail, status
        self.exit_status = 2 if status == 2 else 1  # type: ignore[misc]  # decided per failure


def jobs() -> int:
    """Parallel jobs of a compile: twice the CPUs that are not isolated from the scheduler."""
    cpus = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):
        isolated = Path("/sys/devices/system/cpu/isolated").read_text().strip()
        for part in filter(None, isolated.split(",")):
            first, _, last = part.partition("-")
            cpus -= int(last or first) - int(first) + 1
    return 2 * max(cpus, 1)


@dataclass(slots=True)
class _Step:
    """A host step's view of its stage; see `pipeline.action.Step`."""

    action: Action
    inputs: Path
    out: Path
    scratch: Path
    executor: Executor
    writer: StepLog

    def log(self, line: str) -> None:
        """Write one line to the step's log."""
        self.writer.write(f"{line}\n".encode())

    def stored(self, digest: str) -> Path | None:
        """A file of that sha256 if the store has it."""
        return self.executor.store.path(digest) if self.executor.store.has(digest) else None

    def specs(self) -> Mapping[str, Spec]:
        """Specification by name of this action and of all that it is made from."""
        graph = self.executor.graph
        return {name: graph.specs[name] for name in graph.closure([self.action.name])}

    def check_cancelled(self) -> None:
        """Raise when the run was interrupted."""
        self.executor._check_cancelled(self.action)


class Executor:
    """Brings results of one graph, with one store and one engine."""

    def __init__(self, graph: Graph, store: Store, engine: Engine, observer: Observer, logs: Path) -> None:
        """`logs` is the directory for the steps' logs, one file per action."""
        self.graph, self.store, self.engine, self.observer = graph, store, engine, observer
        self.logs = logs
        self.cancelled = threading.Event()
        self._places = {name: threading.Semaphore(count) for name, count in PLACES.items()}
        self._results: dict[str, Result] = {}
        self.built: set[str] = set()
        self._busy: dict[str, threading.Lock] = {name: threading.Lock() for name in graph.order}
        self._used_engine = False

    # Life of a run ----------------------------------------------------------------------------

    def clean_up_after_crashes(self) -> None:
        """Remove stages and containers of runs that died; called before anything is built."""
        dead = self.store.sweep()
        if not dead:
            return
        # A machine whose engine died with the run has no containers left to stop.
        with contextlib.suppress(UserError):
            for run in self.engine.runs() & set(dead):
                self.engine.stop(run)
        self.observer.note(f"cleaned up after {len(dead)} interrupted run{'s' * (len(dead) > 1)}")

    def cancel(self) -> None:
        """Stop every container of this run; steps end with `Cancelled`."""
        self.cancelled.set()
        if self._used_engine:
            with contextlib.suppress(VirtRtError):
                self.engine.stop(self.store.run)

    # Results ----------------------------------------------------------------------------------

    def log_path(self, name: str) -> Path:
        """Where the log of an action's last run is."""
        return self.logs / f"{name.replace('/', '_')}.log"

    def result(self, name: str) -> Result:
        """The result of an action: known, found in the store, or made now."""
        action, key = self.graph[name], self.graph.keys[name]
        with self._busy[name]:
            if name in self._results:
                return self._results[name]
            self.graph.refuse(name)
            result = self.store.verified(key)
            if result is None:
                for upstream in self._run_time_needs(action):
                    self.result(upstream)
                with self._disk_errors(action), self.store.building(key):
                    # another process may have built it while this one waited for the lock
                    result = self.store.verified(key) or self._build(action)
            self._results[name] = result
            return result

    def _run_time_needs(self, action: Action) -> list[str]:
        """Upstream actions whose outputs the step reads; an imported builder needs no root fs."""
        return [u for u in action.upstreams if u != action.builder or not self._imported(u)]

    def _imported(self, builder: str) -> bool:
        return self.engine.has_image(self._image(builder))

    def _image(self, builder: str) -> str:
        return builder_image(self.graph.keys[builder])

    def repeat(self, name: str) -> dict[str, Blob]:
        """Run a step again whatever the store has, publish nothing, and return its outputs' blobs."""
        action = self.graph[name]
        for upstream in self._run_time_needs(action):
            self.result(upstream)
        with self._disk_errors(action), self._place(action.resource):
            result, _ = self._perform(action, self.log_path(f"{name}.again"), keep=False)
        return {output: blob for output, (blob, _) in result.outputs.items()}

    def stage_for_shell(self, action: Action) -> Stage:
        """Stage a step's inputs and bring its image; the stage lives until the store is closed."""
        for upstream in self._run_time_needs(action):
            self.result(upstream)
        if action.builder:
            self.bring_image(action.builder)
        return self._stage(action, self.log_path(action.name))

    # Building ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _disk_errors(self, action: Action) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"{action.name}: the disk of {self.store.root} is full",
                    "free space or `doit gc`, then run doit again: what had finished is kept",
                ) from None
            raise UserError(f"{action.name}: {error}", "mend that and run doit again") from error

    @contextlib.contextmanager
    def _place(self, resource: Resource) -> Iterator[None]:
        if not resource:
            yield
            return
        wanted = [resource] + (["heavy"] * PLACES["heavy"] if resource == "lab" else [])
        with contextlib.ExitStack() as held:
            for name in wanted:
                while not self._places[name].acquire(timeout=0.5):
                    if self.cancelled.is_set():
                        raise Cancelled("interrupted while waiting", "")
                held.callback(self._places[name].release)
            yield

    def _build(self, action: Action) -> Result:
        with self._place(action.resource):
            result, seconds = self._perform(action, self.log_path(action.name))
            key = self.graph.keys[action.name]
            self.store.commit(key, result)
            record = history.Record(seconds, result.lines, key)
            history.remember(self.store, self.graph.remembered_as(action.name), record)
        self.built.add(action.name)
        self.observer.finished(action, "built", seconds)
        return result

    def _perform(self, action: Action, log_path: Path, keep: bool = True) -> tuple[Result, float]:
        """Run a step in a stage of its own: its result, not yet published, and the seconds it took.

        `keep` lets it find what a build from the same work tree left, if that is what it is made from.
        """
        self._check_cancelled(action)
        self.observer.started(action, history.last(self.store, self.graph.remembered_as(action.name)))
        began = time.monotonic()
        log = StepLog(log_path, lambda text: self.observer.line(action, text))
        try:
            stage = self._stage(action, log_path)
            try:
                with self._kept(stage) if keep else contextlib.nullcontext():
                    self._run(stage, log)
                    stage.compare_inputs()
                seconds = time.monotonic() - began
                result = stage.collect()
            finally:
                remove_tree(stage.path)
        finally:
            log.close()
        result = replace(
            result,
            spec=self.graph.specs[action.name],
            files={path: self.store.add_bytes(file.content) for path, file in _small_inputs(action)},
            log=self.store.add_bytes(log_path.read_bytes()),
            seconds=seconds,
            lines=log.lines,
            tainted=action.name in self.graph.tainted,
        )
        return result, seconds

    def _stage(self, action: Action, log_path: Path) -> Stage:
        path = self.store.stage(action.kind)
        try:
            snapshots = {u: s for u in action.upstreams if (s := self.graph[u].snapshot)}
            return Stage(path, action, self.store, self.result, log_path, snapshots)
        except BaseException:
            remove_tree(path)
            raise

    def _check_cancelled(self, action: Action) -> None:
        if self.cancelled.is_set():
            raise Cancelled(f"{action.name} was interrupted", "")

    def container(self, stage: Stage) -> Container:
        """The container of a staged step."""
        action = stage.action
        if action.builder is None:
            raise UserError(f"{action.name} runs on the host, not in a container", "choose another task")
        mounts = {
            "/build/step": (stage.script, False),
            "/build/in": (stage.inputs, False),
            "/build/out": (stage.out, True),
            "/build/work": (stage.work, True),
            **{f"/build/in/{name}": (tree, False) for name, (tree, _) in stage.trees.items()},
            **stage.mounts,
        }
        environment = {
            "SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH,
            "JOBS": str(jobs()),
            "ACTION_KEY": self.graph.keys[action.name],
            **action.environment,
        }
        if action.ccache:
            ccache = self.store.root / "ccache"
            ccache.mkdir(exist_ok=True)
            mounts["/build/ccache"] = (ccache, True)
            environment["CCACHE_DIR"] = "/build/ccache"
            # headers are taken from the dependency files that make and ninja ask for anyway: a miss
            # then costs one run of the compiler, and not the preprocessor's as well
            environment["CCACHE_DEPEND"] = "1"
            if stage.worktrees:
                # a file may be edited between its being hashed and its being compiled
                environment["CCACHE_READONLY"] = "1"
        return Container(
            name=f"{PROJECT}-{stage.path.name}",
            image=self._image(action.builder),
            script="/build/step",
            mounts=mounts,
            environment=environment,
            labels={
                f"{LABEL}.project": PROJECT,
                f"{LABEL}.run": self.store.run,
                f"{LABEL}.task": action.name,
                f"{LABEL}.key": self.graph.keys[action.name],
            },
            capabilities=action.capabilities,
        )

    @contextlib.contextmanager
    def _kept(self, stage: Stage) -> Iterator[None]:
        """Give a step from a work tree the directories that its last run left, and tell later ones how it ended."""
        action = stage.action
        if not (action.kept and len(stage.worktrees) == 1):
            yield
            return
        ((name, snapshot),) = stage.worktrees.items()
        spec = self.graph.specs[action.name]
        with incremental.Build(
            snapshot, incremental.identity(spec, name), self.store.root / "locks", stage.path / "renewed"
        ).held(
            lambda: self._check_cancelled(action), self.clean_up_after_crashes, self.observer.note
        ) as build:
            for directory in action.kept:
                (stage.work / directory).mkdir(parents=True)
                stage.mounts[f"/build/work/{directory}"] = (build.directory(directory), True)
            if build.changed is not None:
                (stage.work / CHANGED).write_text("".join(f"{path}\n" for path in sorted(build.changed)))
            for path, copy in build.renewed.items():
                stage.mounts[f"/build/in/{name}/{path}"] = (copy, False)
            try:
                yield
            except (StepFailed, Moved) as error:
                if not (isinstance(error, StepFailed) and error.status == KILLED):
                    build.failed(snapshot.worktree.snapshot())
                raise
            build.succeeded()

    def _run(self, stage: Stage, log: StepLog) -> None:
        action = stage.action
        if action.run is not None:
            try:
                action.run(_Step(action, stage.inputs, stage.out, stage.work, self, log))
            except RedError as error:
                if kept := stage.keep_evidence():
                    error.hint = (
                        f"{error.hint}; what it left: {kept}" if error.hint else f"what it left: {kept}"
                    )
                raise
            self._check_cancelled(action)
            return
        if action.builder is None:
            raise InternalError(f"{action.name} has no builder", "give it one")
        self.bring_image(action.builder)
        self._used_engine = True
        try:
            status = self.engine.run(self.container(stage), log.write)
        except UserError:
            self._check_cancelled(action)  # it was we who stopped the container
            raise
        self._check_cancelled(action)
        if status:
            self._fail(stage, log, status)

    def _fail(self, stage: Stage, log: StepLog, status: int) -> None:
        """Raise what a step's exit status means, with its last lines and what to look at."""
        action, tail = stage.action, log.tail(status)
        if any("No space left on device" in line for line in tail):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        killed = "was killed (out of memory, or the engine stopped)"
        hint = f"log: {log.path}; the same container: doit shell {action.name}"
        if action.remedy:
            hint = f"{action.remedy}; {hint}"
        if kept := stage.keep_evidence():
            hint += f"; what it left: {kept}"
        why = killed if status == KILLED else f"ended with {status}"
        raise StepFailed(f"{action.name} {why}", hint, tail, status)

    def bring_image(self, builder: str) -> str:
        """Make sure that the engine has a builder's image, and return its name."""
        tag = self._image(builder)
        if not self.engine.has_image(tag):
            result = self.result(builder)
            with self.store.building(f"image-{self.graph.keys[builder]}"):
                if not self.engine.has_image(tag):
                    blob, _ = result.outputs["rootfs.tar"]
                    self.engine.import_image(tag, self.store.path(blob.digest), self.store.identity)
        return tag


def _small_inputs(action: Action) -> list[tuple[str, File]]:
    script = [("step", action.script)] if action.script else []
    return [*script, *action.files.items()]
