"""A platform's topology as qemu's arguments: sockets, cores, SMT siblings, NUMA nodes and their memory.

What is not emulated: which CPUs share a cache, and how far nodes are from each other. qemu numbers CPUs socket by
socket, core by core, siblings side by side, and Linux follows it: a machine that numbers them otherwise is refused.
That the host sees sockets, siblings and nodes as its plan says is for its own preflight check to find.
"""

from __future__ import annotations

from pipeline.errors import UserError
from pipeline.topology import Topology, cpulist, parse_cpulist


def machine_arguments(platform: str, topology: Topology) -> list[str]:
    """qemu's `-smp`, `-m` and, with several nodes, `-numa`; UserError when qemu cannot number the CPUs so."""
    sockets = topology.socket_cpus
    threads = len(topology.siblings[0])
    cores = len(sockets[0]) // threads
    per_socket = cores * threads
    numbered = [tuple(range(at, at + per_socket)) for at in range(0, len(sockets) * per_socket, per_socket)]
    side_by_side = all(
        core == tuple(range(core[0], core[0] + threads)) for core in topology.siblings.values()
    )
    if list(sockets) != numbered or not side_by_side:
        raise _unlike(
            platform, f"{len(sockets)} sockets of {cores} cores, which it would number {_shown(numbered)}"
        )
    memory_mib = sum(node.memory_mib for node in topology.nodes)
    size = f"{len(topology.cpus)},sockets={len(sockets)},cores={cores},threads={threads}"
    arguments = ["-smp", size, "-m", f"{memory_mib}M"]
    if len(topology.nodes) == 1:
        return arguments
    if [node.id for node in topology.nodes] != list(range(len(topology.nodes))):
        raise _unlike(platform, "nodes that are numbered from 0 without gaps")
    if any(not node.memory_mib for node in topology.nodes):
        raise _unlike(platform, "nodes that all have memory")
    for node in topology.nodes:
        runs = cpulist(parse_cpulist(node.cpus)).split(",") if node.cpus else []
        arguments += ["-object", f"memory-backend-ram,id=node{node.id},size={node.memory_mib}M"]
        cpus = "".join(f",cpus={run}" for run in runs)
        arguments += ["-numa", f"node,nodeid={node.id},memdev=node{node.id}{cpus}"]
    return arguments


def _shown(sockets: list[tuple[int, ...]]) -> str:
    return " and ".join(map(cpulist, sockets))


def _unlike(platform: str, able: str) -> UserError:
    return UserError(
        f"recipes/platforms/{platform}.toml: the lab cannot emulate this topology: qemu has {able}",
        "take stack_proof out; boot and structure are proven without it",
    )
