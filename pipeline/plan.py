"""What a run will do, known before it does anything.

A product is wanted in `artifacts/`; an intermediate result is wanted only by a step that will run.
When a product is in the store, its sources and builders are left alone, wherever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

from pipeline.action import Action
from pipeline.graph import Graph


class State(Enum):
    """What a run will do about one action."""

    CURRENT = "current"  # in place, nothing to do
    LOCAL = "local"  # in the store, to be laid out
    BUILD = "build"  # to be made
    IDLE = "not needed"  # an intermediate result that nobody asks for


def plan(
    graph: Graph,
    names: Iterable[str],
    placed: Callable[[Action], bool],
    stored: Callable[[Action], bool],
) -> dict[str, State]:
    """The state of each of `names` and of all they need, in build order.

    `placed` tells that a product lies in `artifacts/` as its key asks, `stored` that the store has
    the result. A product that lies in `artifacts/` is no input of anything: if a step needs it and
    the store has lost it, it is made again.
    """
    named = set(names)
    states: dict[str, State] = {}
    needed: set[str] = set()
    for name in reversed(graph.closure(named)):
        action = graph[name]
        wanted = name in named or action.place is not None
        if name in needed or (wanted and not (action.place is not None and placed(action))):
            if not stored(action):
                states[name] = State.BUILD
                needed.update(action.upstreams)
            elif action.place is None or placed(action):
                states[name] = State.CURRENT
            else:
                states[name] = State.LOCAL
        else:
            states[name] = State.CURRENT if wanted else State.IDLE
    return dict(reversed(states.items()))
