"""Topologies: CPU lists are read strictly, and lists that contradict each other are refused with their line."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.recipes import load
from pipeline.topology import Node, PciDevice, Topology, TopologyError, cpulist, parse_cpulist
from tests.machines import expand, topologies

ROOT = Path(__file__).resolve().parent.parent
CPUS = st.sets(st.integers(0, 300))

# CPU lists ---------------------------------------------------------------------------------------------


@given(CPUS)
def test_a_list_names_its_cpus(cpus: set[int]) -> None:
    assert expand(cpulist(cpus)) == sorted(cpus)
    if cpus:
        assert parse_cpulist(cpulist(cpus)) == tuple(sorted(cpus))


@given(CPUS)
def test_a_list_is_the_shortest(cpus: set[int]) -> None:
    """Ascending, and no two parts that could be one."""
    ends = [[int(number) for number in part.split("-")] for part in cpulist(cpus).split(",") if part]
    assert all(later[0] > earlier[-1] + 1 for earlier, later in itertools.pairwise(ends))
    assert all(len(end) == 1 or end[0] < end[1] for end in ends)


@pytest.mark.parametrize(("cpus", "text"), [((), ""), ((1,), "1"), ((1, 2, 3), "1-3"), ((3, 0, 2), "0,2-3")])
def test_a_list_as_the_kernel_writes_it(cpus: tuple[int, ...], text: str) -> None:
    assert cpulist(cpus) == text


def test_the_order_written_is_kept() -> None:
    assert parse_cpulist("9, 3-4,1") == (9, 3, 4, 1)


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("4-N", "'4-N': '4-N' is an open range", "write every range with its last CPU: 1-3,8"),
        ("4-", "'4-': '4-' is an open range", "write every range with its last CPU: 1-3,8"),
        ("", "'': '' is not a CPU number or range", "write every range with its last CPU: 1-3,8"),
        ("-1", "'-1': '-1' is not a CPU number or range", "write every range with its last CPU: 1-3,8"),
        ("1;2", "'1;2': '1;2' is not a CPU number or range", "write every range with its last CPU: 1-3,8"),
        (
            "\u0663",
            "'\u0663': '\u0663' is not a CPU number or range",
            "write every range with its last CPU: 1-3,8",
        ),
        ("3-1", "'3-1': the range 3-1 runs backwards", "write 1-3"),
        ("1-3,2", "'1-3,2': CPU 2 is named twice", "write 1-3"),
        ("0-9999", "'0-9999': there is no CPU 9999", "CPUs are numbered 0-8191 at most"),
    ],
)
def test_what_is_no_list_is_refused(text: str, said: str, hint: str) -> None:
    with pytest.raises(TopologyError) as refusal:
        parse_cpulist(text)
    assert (refusal.value.message, refusal.value.hint) == (said, hint)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(TopologyError, match="CPU -1"):
        cpulist([-1])


# Topologies --------------------------------------------------------------------------------------------

GOOD = Topology(
    description="a machine",
    sockets=("0-1,4-5", "2-3,6-7"),
    cores=("0,4", "1,5", "2,6", "3,7"),
    caches=("0,4", "1,5"),
    nodes=(Node(id=0, cpus="0-1,4-5", memory_mib=100), Node(id=2, cpus="2-3,6-7", memory_mib=200)),
    devices=(PciDevice(address="0000:01:00.0", node=2, description="card"),),
)


def test_what_is_derived() -> None:
    GOOD.check()
    assert GOOD.cpus == tuple(range(8))
    assert GOOD.socket_cpus == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert (GOOD.siblings[4], GOOD.smt) == ((0, 4), True)
    assert (GOOD.cache_of[5], GOOD.cache_of[6]) == ((1, 5), (2, 3, 6, 7))
    assert (GOOD.socket_of[6], GOOD.node_of[6], GOOD.memory_mib(2)) == (1, 2, 200)
    assert GOOD.device_node("0000:01:00.0") == 2
    assert GOOD.device_node("0000:09:00.0") is None


@given(topologies())
@settings(deadline=None)
def test_every_cpu_has_a_socket_a_node_a_core_and_a_cache(topology: Topology) -> None:
    for cpu in topology.cpus:
        assert cpu in expand(topology.sockets[topology.socket_of[cpu]])
        assert any(node.id == topology.node_of[cpu] and cpu in expand(node.cpus) for node in topology.nodes)
        assert cpu in topology.siblings[cpu] and cpu in topology.cache_of[cpu]


CARD = '[[devices]]\naddress = "0000:01:00.0"\ndescription = "card"\n'
WRONG = [
    ('["0-7"', '["1-7"', 2, "no socket has CPU 0"),
    ('"8-15"]', '"7-15"]', 2, "CPU 7 is in two sockets"),
    ('"8-15"]', '"8-N"]', 2, "cpu-list: '8-N': '8-N' is an open range"),
    ('cpus = "8-15"', 'cpus = "8-14"', 5, "CPU 15 is in no node"),
    ('cpus = "8-15"', 'cpus = "7-15"', 12, "node 1: CPU 7 is in node 0, too"),
    ('cpus = "8-15"', 'cpus = "8-16"', 12, "node 1: CPU 16 is in no socket"),
    ("id = 1", "id = 0", 6, "there are two nodes 0"),
    ('"8-15"]\n', '"8-15"]\ncores = ["7-8"]\n', 3, "core 7-8 is not within one socket"),
    ('"8-15"]\n', '"8-15"]\ncores = ["0-1", "1-2"]\n', 3, "CPU 1 is in two cores"),
    ('"8-15"]\n', '"8-15"]\ncaches = ["7-8"]\n', 3, "cache 7-8 is not within one socket"),
    ('"8-15"]', '"8-15"]\nspeed = 1', 3, "unknown key speed"),
    ("id = 1", "id = 1\nspeed = 1", 12, "unknown key speed"),
    ("id = 1", "id = -1", 11, "nodes.1.id: expected `int` >= 0"),
    (
        "[[nodes]]\nid = 1",
        f"{CARD}node = 3\n\n{CARD}node = 0\n\n[[nodes]]\nid = 1",
        13,
        "0000:01:00.0: there is no node 3",
    ),
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Recipes to edit."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("elements"))
    return tmp_path


@pytest.mark.parametrize(("old", "new", "line", "said"), WRONG, ids=[said for *_, said in WRONG])
def test_a_contradiction_is_refused_with_its_line(
    checkout: Path, old: str, new: str, line: int, said: str
) -> None:
    recipe = checkout / "recipes/topologies/canoe-pass.toml"
    assert recipe.read_text().count(old) == 1
    recipe.write_text(recipe.read_text().replace(old, new))
    with pytest.raises(UserError) as refusal:
        load(checkout)
    assert refusal.value.message.startswith(f"recipes/topologies/canoe-pass.toml:{line}: {said}")
    assert refusal.value.exit_status == 2


def test_a_core_is_on_one_node() -> None:
    torn = Topology(
        description="torn",
        sockets=("0-3",),
        cores=("0,2", "1,3"),
        nodes=(Node(id=0, cpus="0-1", memory_mib=1), Node(id=1, cpus="2-3", memory_mib=1)),
    )
    with pytest.raises(TopologyError, match="core 0,2 is on two nodes"):
        torn.check()


def test_a_topology_that_is_not_there_is_refused_with_the_way_to_one(checkout: Path) -> None:
    recipe = checkout / "recipes/platforms/qemu-q35.toml"
    recipe.write_text(recipe.read_text().replace('topology = "qemu-q35"', 'topology = "mine"'))
    with pytest.raises(UserError, match=r"qemu-q35.toml:3: there is no topology mine") as refusal:
        load(checkout)
    assert "doit topology > recipes/topologies/mine.toml" in refusal.value.hint
