"""Actions as doit tasks: the one place where the two meet.

doit schedules. What is true is decided by keys, manifests and the store, so doit's own record of
earlier runs is kept in memory and forgotten.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from doit import get_var
from doit.exceptions import BaseFail, TaskError, TaskFailed

from pipeline.action import Action
from pipeline.artifacts import MANIFEST
from pipeline.display import Display
from pipeline.engine import Engine
from pipeline.errors import UserError, VirtRtError
from pipeline.executor import Cancelled, Executor
from pipeline.image import image_name
from pipeline.kernel import kernel_name
from pipeline.packages import package_name
from pipeline.plan import State
from pipeline.project import DEFAULT_PLATFORM, Project
from pipeline.store import Result

#: The tasks that measure machines: no actions, since nothing of what they find can be kept for another time.
MEASURE = "measure"
#: The tasks about a guest that runs from this checkout: it is started, logged into, debugged.
RUN, SSH, GDB = "run", "ssh", "gdb"
#: Commands that take what they are about as a task's name does: `doit config:qemu-q35:guest`.
TYPED_LIKE_TASKS = ("bisect", "config")
#: So many products are laid out at once; more get in each other's way on one disk.
PLACED_AT_ONCE = 2


class Memory:
    """A doit database that forgets; doit's record of the last run decides nothing here."""

    desc = "keeps nothing"

    def __init__(self, name: str, codec: object, module_name: object = None) -> None:
        """The arguments are what doit gives every backend."""
        self.name = name
        self._data: dict[str, dict[str, Any]] = {}

    def get(self, task_id: str, dependency: str) -> Any:
        """The value, or None."""
        return self._data.get(task_id, {}).get(dependency)

    def set(self, task_id: str, dependency: str, value: Any) -> None:
        """Keep a value until the process ends."""
        self._data.setdefault(task_id, {})[dependency] = value

    def in_(self, task_id: str) -> bool:
        """Whether anything is kept of a task."""
        return task_id in self._data

    def remove(self, task_id: str) -> None:
        """Forget a task."""
        self._data.pop(task_id, None)

    def remove_all(self) -> None:
        """Forget everything."""
        self._data.clear()

    def dump(self) -> None:
        """Write nothing."""


class Session:
    """One invocation of doit on one project: what is selected, and how it gets done."""

    def __init__(self, project: Project) -> None:
        """Nothing is computed before the first task asks."""
        self.project = project
        self.display = Display()
        self._executor: Executor | None = None
        self.states: dict[str, State] = {}
        self._ending = threading.Event()
        self._places = ThreadPoolExecutor(PLACED_AT_ONCE, "place")
        self._placed: list[Future[int]] = []
        self._guard = threading.Lock()

    @property
    def executor(self) -> Executor:
        """The executor of this invocation."""
        if self._executor is None:
            project = self.project
            self._executor = Executor(
                project.graph, project.store, Engine(), self.display, project.root / "artifacts" / "log"
            )
        return self._executor

    def select(self, names: list[str]) -> None:
        """Fix what this run is for; actions that are not needed for it are left alone."""
        self.states = self.project.plan(names)

    def cancel(self) -> None:
        """Stop what runs."""
        with self._guard:
            self._ending.set()
            self._places.shutdown(wait=False)
        if self._executor is not None:
            self._executor.cancel()

    def close(self) -> None:
        """Drop this run's stages."""
        self.project.store.close()

    # What doit calls --------------------------------------------------------------------------

    def up_to_date(self, name: str) -> bool:
        """Whether nothing has to be done about an action."""
        state = self.states.get(name, State.IDLE)
        return state in (State.CURRENT, State.IDLE)

    def perform(self, name: str) -> BaseFail | None:
        """Bring an action's result, and begin to lay it out when it is a product: see `settle`."""
        action = self.project.graph[name]
        try:
            result = self.executor.result(name)
            with self._guard:
                if action.place is not None and not self._ending.is_set():
                    self._placed.append(self._places.submit(self._place, action, result))
        except Cancelled as error:
            return TaskFailed(error.message, report=False)
        except VirtRtError as error:
            self.display.failed(name, error)
            kind = TaskError if error.exit_status == 2 else TaskFailed
            return kind(error.message, report=False)
        return None

    def settle(self) -> int:
        """Wait until every product is laid out; 0, or the exit status that says that one could not be.

        What is made from a product is made from the store, and need not wait for this.
        """
        self._places.shutdown()
        return max((each.result() for each in self._placed), default=0)

    def _place(self, action: Action, result: Result) -> int:
        """Lay out a product; 0, or the exit status where that failed."""
        project, key = self.project, self.project.graph.keys[action.name]
        try:
            if project.artifacts.current(action, key):
                return 0
            for path in project.artifacts.place(action, key, result, project.store):
                self.display.note(f"{action.name} was edited by hand; your version is now {path}")
        except OSError as error:
            self.display.failed(
                action.name,
                UserError(
                    f"{action.name} could not be laid out: {error}",
                    "mend that, then run doit again: the result is in the store",
                ),
            )
            return UserError.exit_status
        if action.name not in self.executor.built:
            self.display.finished(action, "restored", 0.0)
        return 0

    def measure(self, platform: str) -> BaseFail | None:
        """Measure a real machine of a platform; what is asked for are variables on the command line."""
        from pipeline import measuring  # most runs do without

        given = {name: get_var(name) for name in measuring.VARIABLES}
        variables = {name: value for name, value in given.items() if value is not None}
        try:
            measuring.Measurement(self.project, platform, variables, self.display.say, self._ending).run()
        except VirtRtError as error:
            self.display.failed(f"{MEASURE}:{platform}", error)
            kind = TaskError if error.exit_status == 2 else TaskFailed
            return kind(error.message, report=False)
        return None


def measured_platforms(names: list[str], platforms: Iterable[str]) -> list[str]:
    """Which of the task names are measurements, by platform; a `UserError` names those that there could be."""
    found = []
    for name in names:
        kind, _, platform = name.partition(":")
        if kind != MEASURE:
            continue
        if platform not in platforms:
            known = ", ".join(f"{MEASURE}:{each}" for each in platforms)
            raise UserError(f"{name} says not which platform's machine to measure", f"write one of: {known}")
        found.append(platform)
    return found


def measure_summary(platform: str) -> str:
    """What the task that measures a machine of a platform does, in a line."""
    return f"measure a real machine of {platform} over ssh: TARGET=user@host"


def guest_needs(project: Project, guest: str) -> list[str]:
    """The products that a run of a guest is made of: kernel, disk, and the emulator with its libraries."""
    platform = project.recipes.guests[guest].platform
    return [kernel_name(platform, "guest"), image_name(guest), package_name(platform, "qemu")]


def guest_tasks(guests: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name and summary of every task about a guest that runs from this checkout."""
    for guest in guests:
        yield f"{RUN}:{guest}", f"boot {guest} from the current artifacts, its console on this terminal"
    for guest in guests:
        yield f"{SSH}:{guest}", f"log into {guest}, which runs, or run a command in it"
    for guest in guests:
        yield f"{GDB}:{guest}", f"debug the kernel of {guest}, which runs"


def tasks(session: Session) -> Iterator[dict[str, Any]]:
    """Every action as a doit task, and one group per platform."""
    project = session.project
    for action in project.graph:
        yield _task(session, action)
    for platform in project.recipes.platforms:
        yield {
            "basename": "platform",
            "name": platform,
            "doc": f"everything of {platform}, proof included",
            "actions": None,
            "task_dep": list(project.products(platform)),
        }
        yield {
            "basename": MEASURE,
            "name": platform,
            "doc": measure_summary(platform),
            "actions": [(_Measure(session, platform),)],
            "uptodate": [False],
            "io": {"capture": False},
        }
    for name, summary in guest_tasks(project.recipes.guests):
        basename, _, guest = name.partition(":")
        # what is done is not doit's: a terminal is handed over
        needed = guest_needs(project, guest) if basename == RUN else []
        yield {
            "basename": basename,
            "name": guest,
            "doc": summary,
            "actions": None,
            "task_dep": needed,
        }


def default_tasks() -> list[str]:
    """What `doit` alone does."""
    return [f"platform:{DEFAULT_PLATFORM}"]


def _task(session: Session, action: Action) -> dict[str, Any]:
    basename, _, name = action.name.partition(":")
    task: dict[str, Any] = {
        "basename": basename,
        "name": name,
        "doc": action.summary,
        "actions": [(_Perform(session, action.name),)],
        "uptodate": [_check(session, action.name)],
        "task_dep": list(action.upstreams),
        "io": {"capture": False},
    }
    if action.place is not None:
        manifest: Path = session.project.artifacts.directory(action) / MANIFEST
        task["targets"] = [str(manifest)]
    return task


class _Perform:
    """A callable that doit can print by name."""

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self.__name__ = name

    def __call__(self) -> BaseFail | None:
        return self._session.perform(self.__name__)


class _Measure:
    """A callable that doit can print by name."""

    def __init__(self, session: Session, platform: str) -> None:
        self._session, self._platform = session, platform
        self.__name__ = f"{MEASURE}:{platform}"

    def __call__(self) -> BaseFail | None:
        return self._session.measure(self._platform)


def _check(session: Session, name: str) -> Callable[[], bool]:
    def up_to_date() -> bool:
        return session.up_to_date(name)

    return up_to_date
