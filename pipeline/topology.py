"""What CPUs, memory and devices a machine has: sockets, cores, NUMA nodes, shared caches.

A topology is data, `recipes/topologies/<name>.toml`, written by hand in a few lines or recorded from a
machine by `doit topology`. CPUs are the kernel's logical CPU numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Annotated

import msgspec

from pipeline.errors import UserError

Text = Annotated[str, msgspec.Meta(pattern=r"\A[^\x00-\x1f\x7f]+\Z")]
#: CPU numbers in the kernel's list format: `0-3,8`.
CpuList = Annotated[str, msgspec.Meta(min_length=1)]
#: A PCI function: domain, bus, device, function, as sysfs names it.
PciAddress = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\Z")]
#: CPUs that a kernel can have (CONFIG_NR_CPUS of the largest configuration).
MAX_CPU = 8191


class TopologyError(UserError, ValueError):
    """CPU numbers or a topology that cannot be; `keys` is where in the recipe that stands."""

    def __init__(self, message: str, hint: str = "", keys: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint)
        self.keys = keys


def parse_cpulist(text: str) -> tuple[int, ...]:
    """CPU numbers of a list such as `1-3,8`, in the order written.

    Raises `TopologyError` for anything else: open ranges (`4-N`), ranges that run backwards, a CPU named twice.
    """
    cpus: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isascii() or not first.isdigit() or (dash and not (last.isascii() and last.isdigit())):
            open_range = dash and first.isdigit() and not last.isdigit()
            raise TopologyError(
                f"{text!r}: {part!r} is {'an open range' if open_range else 'not a CPU number or range'}",
                "write every range with its last CPU: 1-3,8",
            )
        if max(len(first), len(last)) > len(str(MAX_CPU)):
            raise TopologyError(
                f"there is no CPU {part.strip()[:40]}", f"CPUs are numbered 0-{MAX_CPU} at most"
            )
        run = range(int(first), int(last or first) + 1)
        if not run:
            raise TopologyError(f"{text!r}: the range {part} runs backwards", f"write {last}-{first}")
        if run[-1] > MAX_CPU:
            raise TopologyError(
                f"{text!r}: there is no CPU {run[-1]}", f"CPUs are numbered 0-{MAX_CPU} at most"
            )
        cpus += run
    if len(set(cpus)) != len(cpus):
        twice = sorted({cpu for cpu in cpus if cpus.count(cpu) > 1})
        raise TopologyError(f"{text!r}: CPU {twice[0]} is named twice", f"write {cpulist(cpus)}")
    return tuple(cpus)


def cpulist(cpus: Iterable[int]) -> str:
    """CPU numbers in the kernel's list format, ascending, runs joined: `1`, `1-3`, `0,2-3`; empty for none.

    Source: "cpu lists" in Documentation/admin-guide/kernel-parameters.rst. Raises `TopologyError` for a
    negative number.
    """
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if cpu < 0:
            raise TopologyError(f"CPU {cpu}: CPUs are numbered from 0", "name CPUs that exist")
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A NUMA node: its CPUs (none for memory alone) and its memory in MiB; `id` is the kernel's number of it."""

    id: Annotated[int, msgspec.Meta(ge=0, le=1023)]
    cpus: str = ""
    memory_mib: Annotated[int, msgspec.Meta(ge=0)]


class PciDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A PCI function worth naming: where it is, and how many SR-IOV virtual functions it can have."""

    address: PciAddress
    node: Annotated[int, msgspec.Meta(ge=0)] | None = None
    description: Text
    virtual_functions: Annotated[int, msgspec.Meta(ge=0)] = 0


class Topology(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """A machine. Lists of CPUs are in the kernel's list format.

    sockets  the CPUs of each socket
    cores    the CPUs of each core that has more than one (SMT siblings); the others are cores of their own
    caches   the CPUs that share a last-level cache, where that is not the whole socket
    nodes    NUMA nodes
    devices  PCI functions, for the plan to know their node

    `check` must have been called before the derived properties mean anything.
    """

    description: Text
    sockets: Annotated[tuple[CpuList, ...], msgspec.Meta(min_length=1)]
    cores: tuple[CpuList, ...] = ()
    caches: tuple[CpuList, ...] = ()
    nodes: Annotated[tuple[Node, ...], msgspec.Meta(min_length=1)]
    devices: tuple[PciDevice, ...] = ()

    def check(self) -> None:
        """Raise `TopologyError` when the lists contradict each other; nothing derived is read before."""
        known = _disjoint("sockets", list(self.sockets), None, "socket")
        if 0 not in known:
            raise TopologyError("no socket has CPU 0", "name all CPUs of the machine", ("sockets",))
        _disjoint("cores", list(self.cores), list(self.sockets), "core")
        _disjoint("caches", list(self.caches), list(self.sockets), "cache")
        seen: dict[int, int] = {}
        for index, node in enumerate(self.nodes):
            keys = ("nodes", str(index), "cpus")
            cpus = _parsed(node.cpus, keys) if node.cpus else ()
            for cpu in cpus:
                if cpu in seen or cpu not in known:
                    what = f"in node {seen[cpu]}, too" if cpu in seen else "in no socket"
                    raise TopologyError(f"node {node.id}: CPU {cpu} is {what}", "name each CPU once", keys)
                seen[cpu] = node.id
            if sum(other.id == node.id for other in self.nodes) > 1:
                raise TopologyError(
                    f"there are two nodes {node.id}", "number them apart", ("nodes", str(index), "id")
                )
        if missing := known - set(seen):
            raise TopologyError(
                f"CPU {cpulist(missing)} is in no node", "add it to its node's cpus", ("nodes",)
            )
        for index, text in enumerate(self.cores):
            if len({seen[cpu] for cpu in parse_cpulist(text)}) > 1:
                raise TopologyError(
                    f"core {text} is on two nodes",
                    "the CPUs of a core are on one node",
                    ("cores", str(index)),
                )
        ids = {node.id for node in self.nodes}
        for index, device in enumerate(self.devices):
            if device.node is not None and device.node not in ids:
                raise TopologyError(
                    f"{device.address}: there is no node {device.node}",
                    f"write one of: {', '.join(map(str, sorted(ids)))}",
                    ("devices", str(index), "node"),
                )

    @cached_property
    def cpus(self) -> tuple[int, ...]:
        """All CPUs, ascending."""
        return tuple(sorted(cpu for socket in self.socket_cpus for cpu in socket))

    @cached_property
    def socket_cpus(self) -> tuple[tuple[int, ...], ...]:
        """CPUs by socket, ascending."""
        return tuple(tuple(sorted(parse_cpulist(text))) for text in self.sockets)

    @cached_property
    def siblings(self) -> dict[int, tuple[int, ...]]:
        """The CPUs of each CPU's core, itself included, ascending."""
        found: dict[int, tuple[int, ...]] = {cpu: (cpu,) for cpu in self.cpus}
        for text in self.cores:
            core = tuple(sorted(parse_cpulist(text)))
            found |= dict.fromkeys(core, core)
        return found

    @cached_property
    def smt(self) -> bool:
        """Whether any core has more than one CPU."""
        return any(len(core) > 1 for core in self.siblings.values())

    @cached_property
    def socket_of(self) -> dict[int, int]:
        """Index into `sockets` by CPU."""
        return {cpu: index for index, socket in enumerate(self.socket_cpus) for cpu in socket}

    @cached_property
    def node_of(self) -> dict[int, int]:
        """Node number by CPU."""
        return {cpu: node.id for node in self.nodes if node.cpus for cpu in parse_cpulist(node.cpus)}

    @cached_property
    def cache_of(self) -> dict[int, tuple[int, ...]]:
        """The CPUs that share a last-level cache with each CPU, itself included, ascending."""
        found = {cpu: socket for socket in self.socket_cpus for cpu in socket}
        for text in self.caches:
            cache = tuple(sorted(parse_cpulist(text)))
            found |= dict.fromkeys(cache, cache)
        return found

    def memory_mib(self, node: int) -> int:
        """Memory of a node in MiB."""
        return next(each.memory_mib for each in self.nodes if each.id == node)

    def device_node(self, address: str) -> int | None:
        """The node of a PCI function, None when that is not known."""
        return next((device.node for device in self.devices if device.address == address), None)


def _parsed(text: str, keys: tuple[str, ...]) -> tuple[int, ...]:
    try:
        return parse_cpulist(text)
    except TopologyError as error:
        raise TopologyError(f"cpu-list: {error.message}", error.hint, keys) from None


def _disjoint(key: str, lists: list[str], within: list[str] | None, what: str) -> set[int]:
    """All CPUs of lists that must not overlap, each of which must lie within one of `within`."""
    seen: set[int] = set()
    outer = [set(parse_cpulist(text)) for text in within or ()]
    for index, text in enumerate(lists):
        keys = (key, str(index))
        cpus = set(_parsed(text, keys))
        if twice := cpus & seen:
            raise TopologyError(f"CPU {cpulist(twice)} is in two {key}", f"name it in one {what}", keys)
        if within is not None and not any(cpus <= each for each in outer):
            raise TopologyError(
                f"{what} {text} is not within one socket", f"sockets are: {' '.join(within)}", keys
            )
        seen |= cpus
    return seen
