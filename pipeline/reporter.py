"""doit's reporter: passes on what doit knows and our display does not."""

from __future__ import annotations

from typing import Any

from doit.exceptions import UnmetDependency

from pipeline.plan import State
from pipeline.tasks import Session


class Reporter:
    """Says at the start what a run will do, and at the end what it did."""

    desc = "what runs, how far, how long still"

    def __init__(self, session: Session) -> None:
        """Report to the session's display."""
        self._session = session
        self._failed = False

    def initialize(self, tasks: dict[str, Any], selected_tasks: list[str]) -> None:
        """Count what is to be done."""
        states = list(self._session.states.values())
        build, local = states.count(State.BUILD), states.count(State.LOCAL)
        if build or local:
            known = [
                seconds
                for name, state in self._session.states.items()
                if state is State.BUILD
                and (seconds := self._session.project.expected_seconds(name)) is not None
            ]
            from pipeline.display import duration

            about = f" (about {duration(sum(known))} of work)" if len(known) == build and known else ""
            current = states.count(State.CURRENT)
            self._session.display.say(f"{build} to build{about}, {local} from the store, {current} current")

    def add_failure(self, task: Any, fail: Any) -> None:
        """Show what the display was not told: faults in the scheduling itself."""
        self._failed = True
        if isinstance(fail, UnmetDependency):
            self._session.display.say(f"[{task.name}] not tried, since {fail.message} failed")
        elif fail.report:
            self._session.display.say(f"error: {task.name}: {fail.get_msg()}")

    def runtime_error(self, msg: str) -> None:
        """Show doit's own complaint."""
        self._failed = True
        self._session.display.say(f"error: {msg}")

    def cleanup_error(self, exception: Any) -> None:
        """Show a failure at the end of a run."""
        self._session.display.say(f"error: {exception.get_msg()}")

    def complete_run(self) -> None:
        """Say what was done."""
        display, states = self._session.display, self._session.states
        placed = not self._session.settle()
        # where nothing was to be made, what ran has told of itself
        if not placed or self._failed or not states:
            return
        if any(state is State.BUILD for state in states.values()) and not display.built:
            return
        if display.built or display.restored:
            display.say(f"done: {display.built} built, {display.restored} from the store")
        else:
            display.say(f"everything is current ({sum(s is not State.IDLE for s in states.values())} tasks)")

    def get_status(self, task: Any) -> None:
        """Nothing to say."""

    def execute_task(self, task: Any) -> None:
        """Nothing to say: the step itself does."""

    def add_success(self, task: Any) -> None:
        """Nothing to say: the step itself does."""

    def skip_uptodate(self, task: Any) -> None:
        """Nothing to say."""

    def skip_ignore(self, task: Any) -> None:
        """Nothing to say."""

    def teardown_task(self, task: Any) -> None:
        """Nothing to say."""
