"""Every declared field moves the key; nothing else does."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.action import Action, File, Output, Step, Upstream
from pipeline.errors import InternalError, UserError
from pipeline.graph import Graph
from pipeline.worktree import Snapshot, WorkTree
from tests.conftest import host_step

#: A changed value for every field of Action; a field that is in neither table fails the test below.
MOVES: dict[str, Any] = {
    "kind": "other",
    "version": 2,
    "arch": "arm64",
    "builder": "b2",
    "script": File(b"echo 2\n"),
    "files": {"f": File(b"2")},
    "inputs": {"i": Upstream("u", "second")},
    "environment": {"A": "2"},
    "parameters": {"p": 2},
    "outputs": (Output("o"), Output("p")),
    "capabilities": ("CHOWN",),
}
STAYS: dict[str, Any] = {
    "name": "renamed",
    "summary": "told otherwise",
    "resource": "heavy",
    "ccache": True,
    "kept": ("obj",),
    "given_out": "another reason",
    "snapshot": Snapshot(WorkTree(Path("/a"), Path("/b")), "1" * 40, "2" * 64, frozenset()),
    "place": "platform/product",
    "remedy": "try again",
}


def upstream(name: str, content: str = "x") -> Action:
    return replace(host_step(name, content), outputs=(Output("out"), Output("second")))


def base() -> Action:
    return Action(
        name="a",
        kind="kind",
        version=1,
        arch="amd64",
        summary="a step",
        builder="b1",
        script=File(b"echo 1\n"),
        files={"f": File(b"1", origin="here")},
        inputs={"i": Upstream("u", "out")},
        environment={"A": "1"},
        parameters={"p": 1},
        outputs=(Output("o"),),
    )


def key(action: Action, *others: Action) -> str:
    around = [upstream("u"), upstream("b1"), upstream("b2", "other")]
    mine = {other.name: other for other in [*around, *others]}
    return Graph([*mine.values(), action]).keys[action.name]


def test_every_field_is_either_in_the_key_or_known_not_to_be() -> None:
    assert {f.name for f in fields(Action)} == set(MOVES) | set(STAYS) | {"run"}


@pytest.mark.parametrize("name", MOVES)
def test_a_declared_field_moves_the_key(name: str) -> None:
    assert key(replace(base(), **{name: MOVES[name]})) != key(base())


@pytest.mark.parametrize("name", STAYS)
def test_what_cannot_change_the_outputs_does_not(name: str) -> None:
    assert key(replace(base(), **{name: STAYS[name]})) == key(base())


def test_details_of_inputs_move_the_key() -> None:
    variants = [
        replace(base(), files={"f": File(b"1", executable=True)}),
        replace(base(), files={"g": File(b"1")}),
        replace(base(), inputs={"i": Upstream("u", "out", unpack=True)}),
        replace(base(), inputs={"j": Upstream("u", "out")}),
        replace(base(), outputs=(Output("o", "directory"),)),
        replace(base(), outputs=(Output("o", digest="0" * 64),)),
    ]
    keys = {key(variant) for variant in [base(), *variants]}
    assert len(keys) == len(variants) + 1


def test_where_a_file_lies_does_not_move_the_key() -> None:
    assert key(replace(base(), files={"f": File(b"1", origin="elsewhere")})) == key(base())


def test_a_change_upstream_moves_the_key() -> None:
    assert key(base(), upstream("u", "y")) != key(base())
    assert key(base(), upstream("b1", "y")) != key(base())


def test_order_of_declaration_does_not_matter() -> None:
    one = replace(base(), environment={"A": "1", "B": "2"})
    other = replace(base(), environment={"B": "2", "A": "1"})
    assert key(one) == key(other)


def nothing(step: Step) -> None:
    """Does nothing."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {}, "inputs": {}, "parameters": {}}, "no declared inputs"),
        ({"outputs": ()}, "no declared outputs"),
        ({"outputs": (Output("o"), Output("o"))}, "declared twice"),
        ({"outputs": (Output("../o"),)}, "leaves its directory"),
        ({"files": {"/etc/passwd": File(b"")}}, "leaves its directory"),
        ({"builder": None}, "either a builder and a script, or a function"),
        ({"run": nothing}, "either a builder and a script, or a function"),
    ],
)
def test_an_action_that_cannot_be_keyed_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InternalError, match=message):
        replace(base(), **change)


def test_a_graph_with_a_hole_or_a_circle_is_refused() -> None:
    with pytest.raises(InternalError, match="which is not in the graph"):
        Graph([host_step("a", "x", "nowhere")])
    with pytest.raises(InternalError, match="need each other: "):
        Graph([host_step("a", "x", "b"), host_step("b", "x", "a")])
    with pytest.raises(InternalError, match="two actions are named a"):
        Graph([host_step("a"), host_step("a")])
    with pytest.raises(InternalError, match="needs out of a, which makes"):
        Graph([host_step("a", output="other"), host_step("b", "x", "a")])
    with pytest.raises(UserError, match="there is no task c"):
        Graph([host_step("a")])["c"]
