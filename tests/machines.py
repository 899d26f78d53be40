"""Random machines and guests for property tests, and an independent reader of CPU lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from hypothesis import strategies as st

from pipeline.cpuplan import HUGEPAGES, GuestRequest
from pipeline.topology import Node, PciDevice, Topology, cpulist

T = TypeVar("T")


def mostly(usual: Sequence[T], odd: Sequence[T]) -> st.SearchStrategy[T]:
    """One of the usual values, and once in a while one that a plan refuses."""
    return st.integers(0, 11).flatmap(lambda n: st.sampled_from(odd if n == 11 else usual))


def expand(text: str) -> list[int]:
    """Independent reader of the kernel's list format, in the order written."""
    found: list[int] = []
    for part in text.split(",") if text else []:
        first, *last = (int(number) for number in part.split("-"))
        found += range(first, last[0] + 1) if last else [first]
    return found


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Machines of 1 to 4 sockets, with SMT or not, nodes within or across sockets, numbered as real ones are."""
    sockets, threads = draw(st.integers(1, 4)), draw(st.sampled_from([1, 1, 2, 4]))
    nodes_per_socket, cores_per_node = draw(st.integers(1, 2)), draw(st.integers(2, 8))
    one_node = draw(st.booleans()) and draw(st.booleans())
    cores = [
        (socket, node, core)
        for socket in range(sockets)
        for node in range(nodes_per_socket)
        for core in range(cores_per_node)
    ]
    # each core's threads side by side; or all first threads first; or the latter, round robin over the sockets
    every = [(core, thread) for core in cores for thread in range(threads)]
    order = draw(st.sampled_from(["beside", "after", "round robin", "any"]))
    if order == "after":
        every.sort(key=lambda cpu: (cpu[1], cpu[0]))
    elif order == "round robin":
        every.sort(key=lambda cpu: (cpu[1], cpu[0][2], cpu[0][1], cpu[0][0]))
    elif order == "any":
        every = draw(st.permutations(every))
    step = draw(st.sampled_from([1, 1, 2]))  # CPUs that are offline leave gaps
    numbers = {cpu: index * step for index, cpu in enumerate(every)}

    def cpus(keep: object, part: slice) -> str:
        return cpulist(number for (core, _), number in numbers.items() if core[part] == keep)

    smt = (
        [cpulist(numbers[core, thread] for thread in range(threads)) for core in cores] if threads > 1 else []
    )
    places = sorted({core[:2] for core in cores})
    nodes = [
        Node(
            id=2 * index if order == "any" else index,
            cpus=cpus(place, slice(0, 2)),
            memory_mib=draw(mostly([4096, 32768], [256, 1024])),
        )
        for index, place in enumerate(places)
    ]
    if one_node:
        nodes = [Node(id=0, cpus=cpulist(numbers.values()), memory_mib=16384)]
    if draw(st.booleans()):
        nodes.append(Node(id=99, memory_mib=1 << 20))
    caches = []
    if draw(st.booleans()):
        size = draw(st.integers(1, cores_per_node))
        for place in places:
            mine = [core for core in cores if core[:2] == place]
            for start in range(0, len(mine), size):
                group = mine[start : start + size]
                caches.append(cpulist(number for (core, _), number in numbers.items() if core in group))
    known = [node.id for node in nodes if node.cpus]
    device = PciDevice(address="0000:01:00.0", node=draw(st.sampled_from([None, *known])), description="card")
    topology = Topology(
        description="made up",
        sockets=tuple(cpus((socket,), slice(0, 1)) for socket in range(sockets)),
        cores=tuple(smt),
        caches=tuple(caches),
        nodes=tuple(nodes),
        devices=(device,),
    )
    topology.check()
    return topology


@st.composite
def requests(draw: st.DrawFn, topology: Topology) -> GuestRequest:
    """A guest that may name its CPUs, sensibly or not."""
    vcpus = draw(mostly([2, 2, 3, 4], [1, 6, 8]))

    def some(least: int, most: int) -> str:
        chosen = draw(st.lists(st.sampled_from(topology.cpus), min_size=least, max_size=most, unique=True))
        return ",".join(map(str, chosen))

    def near() -> str:
        """As many as there are vCPUs, of one node."""
        node = draw(st.sampled_from([node for node in topology.nodes if node.cpus]))
        return ",".join(map(str, sorted(expand(node.cpus))[-vcpus:]))

    pins = draw(mostly(["", "", "near"], ["any", "wrong"]))
    named = {"": None, "near": near(), "any": some(1, 8), "wrong": "4-N"}[pins]
    emulator = draw(mostly(["", "", "0"], ["any"]))
    return GuestRequest(
        vcpus=vcpus,
        housekeeping_vcpus=draw(mostly([1], [0, 2])),
        memory_mib=draw(mostly([128, 512, 1024], [129, 2048, 1 << 20])),
        hugepages=draw(mostly(["none", "2M"], sorted(HUGEPAGES))),
        pins=named,
        emulator_cpus={"": None, "0": "0", "any": some(1, 2)}[emulator],
        devices={("devices", "0"): draw(st.sampled_from(["0000:01:00.0", "0000:02:00.0"]))}
        if draw(st.booleans())
        else {},
    )


@st.composite
def hosts(draw: st.DrawFn) -> tuple[Topology, dict[str, GuestRequest], str | None]:
    """A machine, its guests by name, and perhaps the housekeeping CPUs that its platform names."""
    topology = draw(topologies())
    names = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True))
    guests = {name: draw(requests(topology)) for name in names}
    how = draw(mostly(["", "", "whole cores"], ["any"]))
    asked = None
    if how == "any":
        asked = cpulist(draw(st.sets(st.sampled_from(topology.cpus), min_size=1, max_size=6)))
    elif how == "whole cores":
        some = draw(st.sets(st.sampled_from(topology.cpus), max_size=2)) | {0}
        some |= {expand(socket)[-1] for socket in topology.sockets}
        whole = [set(expand(core)) for core in topology.cores if some & set(expand(core))]
        asked = cpulist(some.union(*whole))
    return topology, guests, asked
