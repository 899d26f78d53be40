"""Which commit of a source broke something: each commit that git bisect names is built and put to one test.

    OUT/bisect.json           what is asked, what was tested, and the verdict; written after each commit
    OUT/repository.git        the bisection's own repository, with git's record of it
    OUT/log                   git's log of it, to be replayed by `git bisect replay`
    OUT/commits/<commit>/     logs of the steps that a commit took, and what they left
    OUT/artifacts/            the products of the commit at work, for a command that tests them

A commit is built as a source whose tree is that commit's: its key, and so what the store knows of it, is the same as if
the lock pinned it. An interrupted bisection goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from pipeline.action import Action, Step
from pipeline.artifacts import Artifacts
from pipeline.bisecthistory import History, Verdict
from pipeline.engine import Engine
from pipeline.errors import InternalError, RedError, UserError
from pipeline.executor import Executor, Observer, StepFailed
from pipeline.files import file_lock, remove_tree, write_atomically
from pipeline.git import Mirror
from pipeline.graph import Graph
from pipeline.inputs import TREE, source_name
from pipeline.shelltest import Judge
from pipeline.store import Store

#: What a compiler, an assembler or a linker says when it is this machine that is at fault.
_STARVED = re.compile(
    rb"Killed signal terminated program|No space left on device|(?:out of|allocate) memory|memory exhausted"
)


class UnpatchedError(UserError):
    """The project's own patches are not for a commit."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a bisection is about; `recipes` stands for everything else that a verdict depends on."""

    platform: str
    source: str
    good: str
    bad: str
    test: str
    targets: tuple[str, ...]
    recipes: str


class Tested(msgspec.Struct, frozen=True, kw_only=True):
    """One commit's verdict and, where it is not good, why."""

    commit: str
    subject: str
    verdict: Verdict
    why: str
    seconds: float


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """`bisect.json`. `first_bad` is the answer; where only skipped commits are left, `candidates` are all it can be."""

    schema: Literal[1] = 1
    asked: Asked
    tested: tuple[Tested, ...] = ()
    first_bad: str | None = None
    candidates: tuple[str, ...] = ()

    @property
    def decided(self) -> bool:
        """Whether there is nothing left to test."""
        return self.first_bad is not None or bool(self.candidates)


@dataclass(frozen=True, slots=True)
class Bisection:
    """One bisection in a directory: `graph` is the project's, `say` is told of each commit, a line.

    `proof` is the action that is the test, if one is, and `judge` tells what the products are worth; without both it is
    whether they can be built.
    """

    out: Path
    root: Path
    graph: Graph
    store: Store
    engine: Engine
    observer: Observer
    say: Callable[[str], None]
    history: History
    asked: Asked
    proof: str | None = None
    judge: Judge | None = None

    def run(self) -> Record:
        """Test commits until one is known to be the first bad one, or nothing else can be told."""
        with self._alone():
            self.history.sweep()
            record = self._recorded()
            if record.decided:
                return record
            if not self.history.started():
                for commit, wanted in ((self.asked.good, "good"), (self.asked.bad, "bad")):
                    record = self._tested(record, commit)
                    last = next(t for t in record.tested if t.commit == commit)
                    if last.verdict != wanted:
                        raise self._wrong_end(last, wanted)
                self.history.start(self.asked.good, self.asked.bad)
                if self.history.next() is None:  # they are neighbours
                    return self._decided(record, self.asked.bad, ())
            while (following := self.history.next()) is not None:
                record = self._tested(record, following)
                verdict = next(t.verdict for t in record.tested if t.commit == following)
                first, candidates = self.history.mark(verdict, following)
                write_atomically(self.out / "log", self.history.log().encode())
                if first is not None or candidates:
                    return self._decided(record, first, candidates)
            raise InternalError("git bisect names no commit to test", f"remove {self.out} and begin anew")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        lock = file_lock(self.out / "lock")
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            raise UserError(
                f"another doit is bisecting in {self.out}", "wait for it, or give another --out"
            ) from None
        with lock:
            yield

    def _recorded(self) -> Record:
        path = self.out / "bisect.json"
        if not path.is_file():
            return self._write(Record(asked=self.asked))
        try:
            record = msgspec.json.decode(path.read_bytes(), type=Record)
        except msgspec.DecodeError as error:
            raise UserError(f"{path} cannot be read: {error}", f"remove {self.out} and begin anew") from None
        if record.asked != self.asked:
            changed = [
                f for f in Asked.__struct_fields__ if getattr(record.asked, f) != getattr(self.asked, f)
            ]
            raise UserError(
                f"{self.out} has a bisection of something else: {', '.join(changed)} changed",
                "give another --out, or remove that directory",
            )
        if record.tested and not record.decided:
            self.say(f"going on after {len(record.tested)} tested commits")
        return record

    def _write(self, record: Record) -> Record:
        content = msgspec.json.format(msgspec.json.encode(record), indent=1)
        write_atomically(self.out / "bisect.json", content + b"\n")
        return record

    def _decided(self, record: Record, first: str | None, candidates: tuple[str, ...]) -> Record:
        return self._write(msgspec.structs.replace(record, first_bad=first, candidates=candidates))

    def _wrong_end(self, last: Tested, wanted: str) -> UserError:
        name = f"{last.commit[:12]} ({last.subject})"
        if wanted == "good":
            return UserError(
                f"{name}, said to be good, is {last.verdict}: {last.why}",
                "name an earlier --good, or mend the test",
            )
        if last.verdict == "skip":
            return UserError(f"{name}, said to be bad, cannot be tested: {last.why}", "name another --bad")
        return UserError(f"{name}, said to be bad, passes the test", "name a later --bad, or mend the test")

    # One commit -------------------------------------------------------------------------------

    def _tested(self, record: Record, commit: str) -> Record:
        """Test a commit, unless that was done before."""
        if any(tested.commit == commit for tested in record.tested):
            return record
        subject = self.history.subject(commit)
        left = f", {self.history.left()} to go" if self.history.started() else ""
        self.say(f"testing {commit[:12]} {subject}{left}")
        began = time.monotonic()
        verdict, why = self._test(commit)
        seconds = round(time.monotonic() - began, 1)
        tested = Tested(commit=commit, subject=subject, verdict=verdict, why=why, seconds=seconds)
        self.say(f"{commit[:12]} is {verdict}{f': {why}' if why else ''}")
        return self._write(msgspec.structs.replace(record, tested=(*record.tested, tested)))

    def _test(self, commit: str) -> tuple[Verdict, str]:
        graph = self.graph_at(commit)
        logs = self.out / "commits" / commit[:12]
        if logs.exists():  # of a test that was interrupted: nothing of it is evidence
            remove_tree(logs)
        executor = Executor(graph, self.store, self.engine, self.observer, logs)
        source = source_name(self.asked.source)
        kept = {path.name for path in self.store.root.glob("trees/*")}
        try:
            executor.result(source)
        except UnpatchedError as error:
            return "skip", error.message
        try:
            if self.proof is not None:
                return self._prove(executor, self.proof)
            try:
                for name in self.asked.targets:
                    executor.result(name)
            except StepFailed as error:
                refuse_starved(error, logs)
                return ("skip" if self.judge else "bad"), error.message
            return self.judge(commit, self._lay_out(executor), logs) if self.judge else ("good", "")
        except BaseException:
            executor.cancel()
            raise
        finally:
            # a kernel's tree takes more than a gigabyte unpacked
            unpacked = executor.result(source).outputs[TREE][0].digest
            if unpacked not in kept:
                remove_tree(self.store.root / "trees" / unpacked)

    def _prove(self, executor: Executor, proof: str) -> tuple[Verdict, str]:
        """Have an action judge the commit: bad is what a verdict calls red, and not whatever goes wrong."""
        graph = executor.graph
        needs = [name for name in graph[proof].upstreams if name != graph[proof].builder]
        try:
            for name in needs:
                executor.result(name)
        except RedError as error:  # a report needs proofs, of which one is red
            return "bad", error.message
        except StepFailed as error:
            if judged_red(executor, proof):
                return "bad", error.message
            refuse_starved(error, executor.logs)
            return "skip", error.message
        try:
            executor.result(proof)
        except RedError as error:
            return "bad", error.message
        except StepFailed as error:
            if judged_red(executor, proof):
                return "bad", error.message
            raise _says_nothing(error) from None
        return "good", ""

    def _lay_out(self, executor: Executor) -> Path:
        """The products of the commit, where its judge finds them."""
        artifacts = Artifacts(self.out / "artifacts")
        for name in self.asked.targets:
            action = executor.graph[name]
            if action.place is not None:
                artifacts.place(action, executor.graph.keys[name], executor.result(name), self.store)
        return self.out / "artifacts"

    def graph_at(self, commit: str) -> Graph:
        """The graph of what is tested, with the source at a commit."""
        source = source_name(self.asked.source)
        needed = self.graph.closure([*self.asked.targets, *([self.proof] if self.proof is not None else [])])
        return Graph(
            at_tree(self.graph[name], self.history.tree(commit), self.history.path)
            if name == source
            else self.graph[name]
            for name in needed
        )


def at_tree(source: Action, tree: str, repository: Path) -> Action:
    """The action that brings a source, for a tree of a repository on this machine."""
    patches = sorted(name for name in source.files if name.startswith("patches/"))

    def run(step: Step) -> None:
        mirror = Mirror(repository)
        try:
            patched = mirror.apply_patches(tree, [step.inputs / name for name in patches])
        except UserError as error:
            raise UnpatchedError(error.message, error.hint) from None
        mirror.export(patched, step.out / TREE)

    return replace(
        source, parameters={**source.parameters, "tree": tree}, run=run, summary=f"tree {tree[:12]}"
    )


def judged_red(executor: Executor, proof: str) -> bool:
    """Whether a proof, or one that it needs, left a verdict that is red; without one it broke down by itself."""
    for name in executor.graph.closure([proof]):
        for path in executor.log_path(name).with_suffix(".failed").glob("*.json"):
            with contextlib.suppress(ValueError):
                verdict = json.loads(path.read_bytes())
                if isinstance(verdict, dict) and verdict.get("ok") is False:
                    return True
    return False


def refuse_starved(error: StepFailed, logs: Path) -> None:
    """Raise when a step, or a compiler in it, ran out of memory or disk: that says nothing about a commit."""
    if "was killed" in error.message or any(
        _STARVED.search(path.read_bytes()) for path in logs.glob("*.log")
    ):
        raise _says_nothing(error) from None


def _says_nothing(error: StepFailed) -> StepFailed:
    message = f"{error.message}, which says nothing of the commit"
    return StepFailed(message, error.hint, error.tail, error.exit_status)
