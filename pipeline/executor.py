"""How an action becomes a result: out of the store, or by running its step.

`Executor.result` is the one way to a result. It pulls: whatever an action needs is brought first,
whoever asked and in whichever order a scheduler calls. Nothing here trusts a file because it is
there: hits are hashed, downloads are compared with what was declared, inputs are compared again
after the step has run, and only a complete set of outputs is ever published.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

from pipeline import archive
from pipeline.action import ALL, Action, File, Resource
from pipeline.engine import LABEL, PROJECT, Container, Engine, builder_image
from pipeline.errors import InternalError, UserError, VirtRtError
from pipeline.files import digest_file, remove_tree, tree_digests, write_atomically
from pipeline.graph import Graph
from pipeline.store import Blob, Result, Store

#: Lines of a failed step's log that are shown with the error, and of a step that refused its input:
#: there the lines are the message.
TAIL, REFUSAL = 20, 60
#: Files a failed step left that are kept beside its log, up to this size in bytes.
EVIDENCE = 10_000_000
#: 1980-01-01: the oldest date that every archive and file system format can hold.
SOURCE_DATE_EPOCH = "315532800"
#: How many steps of a sort may run at once. Two heavy ones fill each other's serial stretches
#: (configure, link). An emulated machine has the whole real one: it takes the heavy places too,
#: since a compile beside it makes its clocks stutter.
PLACES: dict[Resource, int] = {"heavy": 2, "lab": 1, "network": 1}


class Observer(Protocol):
    """Who is told what happens; called from several threads."""

    def started(self, action: Action, expected: tuple[float, int] | None) -> None:
        """A step begins; `expected` is (seconds, log lines) of its last run."""

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
        self.tail = tail
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
    writer: _Log

    def log(self, line: str) -> None:
        """Write one line to the step's log."""
        self.writer.write(f"{line}\n".encode())

    def stored(self, digest: str) -> Path | None:
        """A file of that sha256 if the store has it."""
        return self.executor.store.path(digest) if self.executor.store.has(digest) else None

    def check_cancelled(self) -> None:
        """Raise when the run was interrupted."""
        if self.executor.cancelled.is_set():
            raise Cancelled(f"{self.action.name} was interrupted", "")


class _Log:
    """A step's log file; splits what arrives into lines for whoever watches."""

    def __init__(self, path: Path, action: Action, observer: Observer) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("wb")
        self._action, self._observer = action, observer
        self._rest = b""
        self.lines = 0
        self.tail: deque[str] = deque(maxlen=REFUSAL)

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._file.flush()
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        for raw in whole:
            self._line(raw)

    def _line(self, raw: bytes) -> None:
        text = raw.decode(errors="replace").rstrip()
        self.lines += 1
        self.tail.append(text)
        self._observer.line(self._action, text)

    def close(self) -> None:
        if self._rest:
            self._line(self._rest)
            self._rest = b""
        self._file.close()


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
        """Run a step again whatever the store has, keep nothing, and return its outputs' digests."""
        action = self.graph[name]
        for upstream in self._run_time_needs(action):
            self.result(upstream)
        with self._disk_errors(action), self._place(action.resource), self._staged(action) as stage:
            log = _Log(self.log_path(f"{name}.again"), action, self.observer)
            self.observer.started(action, expected(self.store, name))
            try:
                self._run(action, stage, log)
            finally:
                log.close()
            outputs = self._collect(action, stage).outputs
            self.observer.finished(action, "built", 0.0)
            return {output: blob for output, (blob, _) in outputs.items()}

    def stage_for_shell(self, action: Action) -> Path:
        """Stage a step's inputs and bring its image; the stage lives until the store is closed."""
        for upstream in self._run_time_needs(action):
            self.result(upstream)
        if action.builder:
            self.bring_image(action.builder)
        stage = self.store.stage(action.kind)
        self._stage_inputs(action, stage)
        return stage

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
            if self.cancelled.is_set():
                raise Cancelled(f"{action.name} was interrupted", "")
            self.observer.started(action, expected(self.store, action.name))
            began = time.monotonic()
            log = _Log(self.log_path(action.name), action, self.observer)
            with self._staged(action) as stage:
                try:
                    self._run(action, stage, log)
                finally:
                    log.close()
                self._compare_inputs(action, stage)
                seconds = time.monotonic() - began
                result = self._collect(action, stage)
            result = replace(
                result,
                files={path: self.store.add_bytes(file.content) for path, file in _inputs_as_files(action)},
                log=self.store.add_bytes(self.log_path(action.name).read_bytes()),
                seconds=seconds,
                lines=log.lines,
            )
            self.store.commit(self.graph.keys[action.name], result)
            self._remember(action, result)
        self.built.add(action.name)
        self.observer.finished(action, "built", seconds)
        return result

    @contextlib.contextmanager
    def _staged(self, action: Action) -> Iterator[Path]:
        """A stage with the inputs laid out; it is gone afterwards, however the step ended."""
        stage = self.store.stage(action.kind)
        try:
            self._stage_inputs(action, stage)
            yield stage
        finally:
            remove_tree(stage)

    def _stage_inputs(self, action: Action, stage: Path) -> None:
        """Lay out `in/`, `out/`, `work/` and the script; every byte comes from memory or a verified blob."""
        for name in ("in", "out", "work"):
            (stage / name).mkdir()
        if action.script:
            (stage / "step").write_bytes(action.script.content)
        for path, file in action.files.items():
            target = stage / "in" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.content)
            target.chmod(0o755 if file.executable else 0o644)
        for path, used in action.inputs.items():
            upstream = self.result(used.action)
            target = stage / "in" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if used.output == ALL:
                target.mkdir(exist_ok=True)
                for name in upstream.outputs:
                    self._lay(upstream, name, target / name, used.unpack)
            else:
                self._lay(upstream, used.output, target, used.unpack)

    def _lay(self, upstream: Result, name: str, target: Path, unpack: bool) -> None:
        blob, kind = upstream.outputs[name]
        source = self.store.path(blob.digest)
        if unpack or kind == "directory":
            target.mkdir(parents=True, exist_ok=True)
            archive.unpack(source, target)
            return
        # A copy, not a hard link: a step that is root could write through a link into the store.
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755 if name in upstream.executable else 0o644)

    def _compare_inputs(self, action: Action, stage: Path) -> None:
        """Inputs that moved while the step ran would make a result that its key does not describe."""
        staged: dict[str, str] = {path: file.digest for path, file in action.files.items()}
        for path, used in action.inputs.items():
            outputs = self.result(used.action).outputs
            if used.unpack:
                continue  # tens of thousands of files, mounted read-only; too many to hash twice
            names = (
                {f"{path}/{name}": name for name in outputs} if used.output == ALL else {path: used.output}
            )
            for where, name in names.items():
                blob, kind = outputs[name]
                if kind == "file":
                    staged[where] = blob.digest
        for path, digest in staged.items():
            target = stage / "in" / path
            if not target.is_file() or digest_file(target) != digest:
                raise InternalError(
                    f"{action.name}: its input {path} changed while it ran; the result is not kept",
                    "run doit again",
                )

    def container(self, action: Action, stage: Path) -> Container:
        """The container of a staged step."""
        if action.builder is None:
            raise UserError(f"{action.name} runs on the host, not in a container", "choose another task")
        mounts = {
            "/build/step": (stage / "step", False),
            "/build/in": (stage / "in", False),
            "/build/out": (stage / "out", True),
            "/build/work": (stage / "work", True),
        }
        environment = {
            "SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH,
            "JOBS": str(jobs()),
            **action.environment,
        }
        if action.ccache:
            ccache = self.store.root / "ccache"
            ccache.mkdir(exist_ok=True)
            mounts["/build/ccache"] = (ccache, True)
            environment["CCACHE_DIR"] = "/build/ccache"
        return Container(
            name=f"{PROJECT}-{stage.name}",
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

    def _run(self, action: Action, stage: Path, log: _Log) -> None:
        if action.run is not None:
            step = _Step(action, stage / "in", stage / "out", stage / "work", self, log)
            action.run(step)
            return
        if action.builder is None:
            raise InternalError(f"{action.name} has no builder", "give it one")
        self.bring_image(action.builder)
        self._used_engine = True
        container = self.container(action, stage)
        try:
            status = self.engine.run(container, log.write)
        except UserError:
            if self.cancelled.is_set():
                raise Cancelled(f"{action.name} was interrupted", "") from None
            raise
        if self.cancelled.is_set():
            raise Cancelled(f"{action.name} was interrupted", "")
        if status:
            tail = list(log.tail)[-(REFUSAL if status == 2 else TAIL) :]
            if any("No space left on device" in line for line in tail):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            why = (
                "was killed (out of memory, or the engine stopped)"
                if status == 137
                else f"ended with {status}"
            )
            hint = f"log: {self.log_path(action.name)}; the same container: doit shell {action.name}"
            if action.remedy:
                hint = f"{action.remedy}; {hint}"
            if kept := self._keep_evidence(action, stage):
                hint += f"; what it left: {kept}"
            raise StepFailed(f"{action.name} {why}", hint, tail, status)

    def _keep_evidence(self, action: Action, stage: Path) -> Path | None:
        """Save the declared files that a failed step did make: a proof's consoles tell why it failed."""
        target = self.log_path(action.name).with_suffix(".failed")
        if target.exists():
            remove_tree(target)
        for output in action.outputs:
            made = stage / "out" / output.name
            if made.is_file() and not made.is_symlink() and 0 < made.stat().st_size <= EVIDENCE:
                (target / output.name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(made, target / output.name)
        return target if target.exists() else None

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

    def _collect(self, action: Action, stage: Path) -> Result:
        """Move a step's outputs into the store, as a result of which no more than they is known."""
        outputs: dict[str, tuple[Blob, str]] = {}
        contents: dict[str, dict[str, str]] = {}
        executable = set()
        for output in action.outputs:
            made = stage / "out" / output.name
            if output.kind == "directory":
                if not made.is_dir() or not any(made.iterdir()):
                    raise InternalError(
                        f"{action.name} made no directory {output.name}", self._log_hint(action)
                    )
                contents[output.name] = tree_digests(made)
                packed = stage / "packed.tar"
                archive.pack(made, packed)
                outputs[output.name] = (self.store.add(packed), "directory")
            elif output.digest and not made.exists() and self.store.has(output.digest):
                blob = Blob(output.digest, self.store.path(output.digest).stat().st_size)
                if not self.store.intact(blob):
                    raise InternalError(
                        f"{action.name}: {output.name} was damaged in the store", "run doit again"
                    )
                outputs[output.name] = (blob, "file")
            else:
                if made.is_symlink() or not made.is_file() or not made.stat().st_size:
                    raise InternalError(f"{action.name} made no {output.name}", self._log_hint(action))
                if made.stat().st_mode & 0o100:
                    executable.add(output.name)
                try:
                    outputs[output.name] = (self.store.add(made, output.digest), "file")
                except ValueError as error:
                    raise UserError(
                        f"{action.name}: {output.name} has sha256 {error}, the lock says {output.digest}",
                        "a mirror may be damaged: try again, or move the lock with `doit lock -u NAME`",
                    ) from None
        return Result(
            outputs=outputs,
            spec=self.graph.specs[action.name],
            contents=contents,
            executable=frozenset(executable),
        )

    def _log_hint(self, action: Action) -> str:
        return f"log: {self.log_path(action.name)}"

    def _remember(self, action: Action, result: Result) -> None:
        record = {
            "seconds": round(result.seconds, 3),
            "lines": result.lines,
            "key": self.graph.keys[action.name],
        }
        write_atomically(_history(self.store, action.name), json.dumps(record).encode())


def _inputs_as_files(action: Action) -> list[tuple[str, File]]:
    script = [("step", action.script)] if action.script else []
    return [*script, *action.files.items()]


def _history(store: Store, name: str) -> Path:
    return store.root / "history" / f"{name.replace('/', '_')}.json"


def remembered(store: Store, name: str) -> dict[str, Any] | None:
    """What is known of the last step of that name: `seconds`, `lines` and `key`."""
    try:
        record = json.loads(_history(store, name).read_bytes())
        return {"seconds": float(record["seconds"]), "lines": int(record["lines"]), "key": str(record["key"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def expected(store: Store, name: str) -> tuple[float, int] | None:
    """(seconds, log lines) of the last time the step ran on this machine, if it did."""
    record = remembered(store, name)
    return (record["seconds"], record["lines"]) if record else None
