"""A platform's topology as the board that the lab emulates."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import recipes
from pipeline.errors import UserError
from pipeline.labtopology import machine_arguments
from pipeline.topology import Node, Topology

ROOT = Path(__file__).resolve().parent.parent


def topology(sockets: tuple[str, ...], nodes: tuple[Node, ...], cores: tuple[str, ...] = ()) -> Topology:
    made = Topology(description="a board", sockets=sockets, nodes=nodes, cores=cores)
    made.check()
    return made


def node(number: int, cpus: str, memory_mib: int = 2048) -> Node:
    return Node(id=number, cpus=cpus, memory_mib=memory_mib)


def test_one_socket_and_one_node() -> None:
    made = machine_arguments("board", topology(("0-3",), (node(0, "0-3", 4096),)))
    assert made == ["-smp", "4,sockets=1,cores=4,threads=1", "-m", "4096M"]


def test_sockets_siblings_and_nodes() -> None:
    board = topology(
        ("0-3", "4-7"), (node(0, "0-3"), node(1, "4-7", 1024)), cores=("0-1", "2-3", "4-5", "6-7")
    )
    assert machine_arguments("board", board) == [
        *("-smp", "8,sockets=2,cores=2,threads=2", "-m", "3072M"),
        *(
            "-object",
            "memory-backend-ram,id=node0,size=2048M",
            "-numa",
            "node,nodeid=0,memdev=node0,cpus=0-3",
        ),
        *(
            "-object",
            "memory-backend-ram,id=node1,size=1024M",
            "-numa",
            "node,nodeid=1,memdev=node1,cpus=4-7",
        ),
    ]


def test_nodes_within_a_socket_and_of_several_runs() -> None:
    board = topology(("0-3",), (node(0, "0,2"), node(1, "1,3")))
    assert machine_arguments("board", board)[-1] == "node,nodeid=1,memdev=node1,cpus=1,cpus=3"
    assert machine_arguments("board", board)[1] == "4,sockets=1,cores=4,threads=1"


def test_the_shipped_board_of_two_sockets() -> None:
    board = recipes.load(ROOT).plans["canoe-pass"].topology
    made = machine_arguments("canoe-pass", board)
    assert made[1] == "16,sockets=2,cores=8,threads=1"
    assert made.count("-numa") == 2


@pytest.mark.parametrize(
    ("board", "able"),
    [
        (topology(("0,2", "1,3"), (node(0, "0-3"),)), "it would number 0-1 and 2-3"),
        (topology(("0-3",), (node(0, "0-3"),), ("0,2", "1,3")), "it would number 0-3"),
        (topology(("0-3",), (node(0, "0-3"),), ("0-1",)), "it would number 0-3"),
        (topology(("0-3", "4-5"), (node(0, "0-5"),)), "it would number 0-3 and 4-7"),
        (topology(("0-2,5",), (node(0, "0-2,5"),)), "it would number 0-3"),
        (topology(("0-1",), (node(0, "0"), node(2, "1"))), "without gaps"),
        (topology(("0-1",), (node(0, "0-1"), node(1, "", 0))), "all have memory"),
    ],
)
def test_what_qemu_would_make_something_else_of(board: Topology, able: str) -> None:
    with pytest.raises(UserError, match="recipes/platforms/board.toml: the lab cannot emulate") as refused:
        machine_arguments("board", board)
    assert able in str(refused.value)
    assert "stack_proof" in refused.value.hint
