"""The graph of actions: who needs whom, in which order, and under which key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter

from pipeline import keys
from pipeline.action import ALL, Action
from pipeline.errors import InternalError, UserError


class Graph:
    """A closed set of actions whose keys are all known before any of them runs."""

    def __init__(self, actions: Iterable[Action]) -> None:
        """Check the graph (names, outputs, cycles) and compute every key."""
        self._actions: dict[str, Action] = {}
        for action in actions:
            if action.name in self._actions:
                raise InternalError(f"two actions are named {action.name}", "rename one of them")
            self._actions[action.name] = action
        for action in self._actions.values():
            self._check(action)
        sorter = TopologicalSorter({name: a.upstreams for name, a in self._actions.items()})
        try:
            self.order: tuple[str, ...] = tuple(sorter.static_order())
        except CycleError as error:
            raise InternalError(f"actions need each other: {' -> '.join(error.args[1])}", "cut it") from None
        self.keys: dict[str, str] = {}
        self.specs: dict[str, keys.Spec] = {}
        #: Actions whose results are made from a developer's work tree, and the names of the sources it stands for.
        self.tainted: dict[str, frozenset[str]] = {}
        for name in self.order:
            action = self._actions[name]
            local = {each for upstream in action.upstreams for each in self.tainted.get(upstream, ())}
            if local or action.snapshot:
                self.tainted[name] = frozenset(local or {name})
            self.specs[name] = keys.spec(self._actions[name], self.keys)
            self.keys[name] = keys.key(self.specs[name])

    def _check(self, action: Action) -> None:
        for upstream in action.upstreams:
            if upstream not in self._actions:
                raise InternalError(f"{action.name} needs {upstream}, which is not in the graph", "add it")
        for used in action.inputs.values():
            made = {output.name for output in self._actions[used.action].outputs}
            if used.output != ALL and used.output not in made:
                raise InternalError(
                    f"{action.name} needs {used.output} of {used.action}, which makes {sorted(made)}",
                    "declare the output there",
                )

    def __getitem__(self, name: str) -> Action:
        """The action of that name; a name that is not there is the user's error."""
        try:
            return self._actions[name]
        except KeyError:
            raise UserError(f"there is no task {name}", "`doit list --all` names every task") from None

    def __contains__(self, name: str) -> bool:
        """Whether an action has that name."""
        return name in self._actions

    def __iter__(self) -> Iterator[Action]:
        """Actions in an order in which each comes after what it needs."""
        return (self._actions[name] for name in self.order)

    def __len__(self) -> int:
        """The number of actions."""
        return len(self._actions)

    def refuse(self, name: str) -> None:
        """UserError when the result of an action is given out, and would be made from a work tree."""
        if name in self.tainted and self[name].given_out:
            raise UserError(
                f"{name} would be made from the work tree {self.worktrees(name)}: {self[name].given_out}",
                "leave out --source, and what local.toml says: --source NAME= takes NAME from the lock",
            )

    def worktrees(self, name: str) -> str:
        """The work trees that an action's result is made from, for a message: `/home/user/linux (linux-rt)`."""
        found = [self[source] for source in sorted(self.tainted[name])]
        return ", ".join(
            f"{action.snapshot.worktree.path} ({action.name.partition(':')[2]})"
            for action in found
            if action.snapshot
        )

    def remembered_as(self, name: str) -> str:
        """Under which name the history has an action's last run; one from a work tree says little of others."""
        return f"{name} (local)" if name in self.tainted else name

    def closure(self, names: Iterable[str]) -> tuple[str, ...]:
        """`names` and all they need, in build order."""
        wanted: set[str] = set()
        pending = list(names)
        while pending:
            name = pending.pop()
            if name not in wanted:
                wanted.add(name)
                pending.extend(self[name].upstreams)
        return tuple(name for name in self.order if name in wanted)
