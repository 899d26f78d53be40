"""How a host's CPUs are given to its guests: every rule of the CPU plan is kept, or the first one broken is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pipeline.cpuplan import (
    HOST_RESERVE_MIB,
    HUGEPAGES,
    MIN_GUEST_MIB,
    Advice,
    GuestPlan,
    GuestRequest,
    HostPlan,
    Placement,
    PlanError,
    guest_plan,
)
from pipeline.topology import Topology, TopologyError, cpulist, parse_cpulist


def host_plan(
    topology: Topology, guests: Mapping[str, GuestRequest], housekeeping_cpus: str | None = None
) -> HostPlan:
    """Plan a host; by default the first core of each socket keeps house.

    Guests that name their CPUs are placed first, then the others, the largest first, each on the node where
    the fewest free cores would be left over. Raises `PlanError` when a rule is broken, or when no place is
    left for a guest.
    """
    housekeeping = _housekeeping(topology, housekeeping_cpus)
    isolated = tuple(cpu for cpu in topology.cpus if cpu not in housekeeping)
    splits = {
        name: guest_plan(guest.vcpus, guest.housekeeping_vcpus, name)
        for name, guest in sorted(guests.items())
    }
    placing = _Placing(topology, housekeeping, isolated)
    order = sorted(guests, key=lambda name: (guests[name].pins is None, -guests[name].vcpus, name))
    for name in order:
        placing.place(name, guests[name], splits[name])
    placed = {name: placing.placed[name] for name in sorted(guests)}
    return HostPlan(
        topology=topology,
        housekeeping=housekeeping,
        isolated=isolated,
        guests=placed,
        warnings=tuple(w for name in placed for w in _advice(topology, placed[name], guests[name])),
    )


def _existing(topology: Topology, text: str, subject: str, key: str) -> tuple[int, ...]:
    """CPUs of a list in a recipe, in the order written; all exist."""
    try:
        cpus = parse_cpulist(text)
    except TopologyError as error:
        raise PlanError("cpu-list", error.message, error.hint, subject=subject, keys=(key,)) from None
    if unknown := [cpu for cpu in cpus if cpu not in topology.socket_of]:
        raise PlanError(
            "cpu-list",
            f"{key} = {text!r}: this machine has no CPU {cpulist(unknown)}",
            f"its CPUs are {cpulist(topology.cpus)}",
            subject=subject,
            keys=(key,),
        )
    return cpus


def _housekeeping(topology: Topology, asked: str | None) -> tuple[int, ...]:
    """The housekeeping CPUs, ascending: those asked for, or the first core of each socket."""
    firsts = {cpu for socket in topology.socket_cpus for cpu in topology.siblings[socket[0]]}
    if asked is None:
        return _some_left(topology, firsts, None)
    key = "housekeeping_cpus"
    cpus = set(_existing(topology, asked, "platform", key))

    def refuse(rule: str, message: str, instead: Iterable[int]) -> PlanError:
        return PlanError(
            rule,
            f"{key} = {asked!r}: {message}",
            "",
            keys=(key,),
            alternative=f'{key} = "{cpulist(instead)}"',
        )

    whole = {sibling for cpu in cpus for sibling in topology.siblings[cpu]}
    mended = whole | set(topology.siblings[0])
    for socket in topology.socket_cpus:
        if not mended & set(socket):
            mended |= set(topology.siblings[socket[0]])
    if 0 not in cpus:
        raise refuse("housekeeping-cpu-0", "CPU 0 would be isolated", mended)
    for index, socket in enumerate(topology.socket_cpus):
        if not cpus & set(socket):
            raise refuse("housekeeping-per-socket", f"socket {index} ({cpulist(socket)}) has none", mended)
    if cpus != whole:
        raise refuse(
            "siblings-together",
            f"CPU {cpulist(whole - cpus)} is a sibling of one of them, and would be isolated",
            mended,
        )
    return _some_left(topology, cpus, asked)


def _some_left(topology: Topology, cpus: set[int], asked: str | None) -> tuple[int, ...]:
    if cpus == set(topology.cpus):
        firsts = {cpu for socket in topology.socket_cpus for cpu in topology.siblings[socket[0]]}
        mended = "" if firsts == cpus else f'housekeeping_cpus = "{cpulist(firsts)}"'
        raise PlanError(
            "isolated-enough",
            f"all CPUs ({cpulist(cpus)}) keep house: none is left to isolate",
            "" if mended else "take a machine with a second core on one of its sockets",
            keys=("housekeeping_cpus",) if asked is not None else ("topology",),
            alternative=mended,
        )
    return tuple(sorted(cpus))


class _Placing:
    """Guests placed so far, and what is free."""

    def __init__(self, topology: Topology, housekeeping: tuple[int, ...], isolated: tuple[int, ...]) -> None:
        self.topology = topology
        self.housekeeping = housekeeping
        self.isolated = isolated
        self.placed: dict[str, Placement] = {}

    def place(self, name: str, guest: GuestRequest, split: GuestPlan) -> None:
        if guest.pins is None:
            self._check_memory(name, guest, None)
            pins = self._chosen(name, guest)
        else:
            pins = self._named(name, guest, guest.pins)
        node = self.topology.node_of[pins[0]]
        self._check_memory(name, guest, node)
        self.placed[name] = Placement(
            name=name,
            split=split,
            pins=pins,
            emulator=self._emulator(name, guest, pins),
            node=node,
            memory_mib=guest.memory_mib,
            hugepage_kib=HUGEPAGES[guest.hugepages],
            priority=guest.priority,
        )

    # CPUs -------------------------------------------------------------------------------------

    def _owned(self, cpu: int) -> str | None:
        """The guest to whose core a CPU belongs."""
        core = self.topology.siblings[cpu]
        return next((g.name for g in self.placed.values() if set(core) & set(g.pins)), None)

    def _free_cores(self, node: int) -> list[tuple[int, ...]]:
        """Isolated cores of a node without a vCPU, those that share a cache side by side."""
        topology = self.topology
        cores = {
            topology.siblings[cpu]
            for cpu in self.isolated
            if topology.node_of[cpu] == node and self._owned(cpu) is None
        }
        return sorted(cores, key=lambda core: (topology.cache_of[core[0]][0], core))

    def _fit(self, node: int, vcpus: int) -> tuple[int, ...] | None:
        """CPUs for so many vCPUs on a node: a core each while there are enough, else with siblings."""
        cores = self._free_cores(node)
        caches: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for core in cores:
            caches.setdefault(self.topology.cache_of[core[0]], []).append(core)
        for per_core in (1, None):
            # in one cache where that is possible, in the one with the fewest cores left over
            groups = [*sorted(caches.values(), key=len), cores]
            for group in groups:
                cpus = [cpu for core in group for cpu in core[:per_core]]
                if len(cpus) >= vcpus:
                    return tuple(cpus[:vcpus])
        return None

    def _chosen(self, name: str, guest: GuestRequest) -> tuple[int, ...]:
        """The plan's choice of CPUs, one per vCPU."""
        wanted = {self.topology.device_node(address) for address in guest.devices.values()} - {None}
        nodes = [node.id for node in self.topology.nodes if node.cpus]
        fits = {node: cpus for node in nodes if (cpus := self._fit(node, guest.vcpus)) is not None}
        with_memory = {
            node: cpus for node, cpus in fits.items() if self._memory_left(node) >= guest.memory_mib
        }
        if fits and not with_memory:
            best = max(fits, key=self._memory_left)
            raise self._no_memory(name, guest, best)
        if with_memory:
            return min(
                (node not in wanted, len(self._free_cores(node)), node, cpus)
                for node, cpus in with_memory.items()
            )[3]
        most = max((sum(len(core) for core in self._free_cores(node)), -node) for node in nodes)[0]
        what = "one socket" if len(nodes) == len(self.topology.sockets) else "one node"
        possible = most > guest.housekeeping_vcpus
        raise PlanError(
            "isolated-enough",
            f"vcpus = {guest.vcpus}: at most {most} isolated CPUs are free on {what}",
            ""
            if possible
            else "put it on another platform, or give other guests fewer vCPUs (`doit cpuplan` shows who has what)",
            subject=name,
            keys=("vcpus",),
            alternative=f"vcpus = {most}" if possible else "",
        )

    def _named(self, name: str, guest: GuestRequest, text: str) -> tuple[int, ...]:
        """The CPUs that a guest names, checked."""
        topology = self.topology
        pins = _existing(topology, text, name, "pins")
        nodes = [node.id for node in topology.nodes if node.cpus]
        near = topology.node_of[pins[0]]
        fits = [cpus for node in [near, *nodes] if (cpus := self._fit(node, guest.vcpus)) is not None]
        alternative = f'pins = "{_in_order(fits[0])}"' if fits else ""

        def refuse(rule: str, message: str) -> PlanError:
            return PlanError(
                rule,
                f"pins = {text!r}: {message}",
                ""
                if alternative
                else "give it fewer vCPUs, or move other guests away (`doit cpuplan` shows who has what)",
                subject=name,
                keys=("pins",),
                alternative=alternative,
            )

        if not fits and guest.vcpus > len(self.isolated):
            raise refuse(
                "isolated-enough", f"{guest.vcpus} vCPUs, but {len(self.isolated)} CPUs are isolated"
            )
        if len(pins) != guest.vcpus:
            raise refuse("one-pin-per-vcpu", f"{len(pins)} CPUs for {guest.vcpus} vCPUs")
        if taken := [cpu for cpu in pins if cpu in self.housekeeping]:
            raise refuse("vcpu-on-isolated", f"CPU {cpulist(taken)} keeps house")
        if len({topology.socket_of[cpu] for cpu in pins}) > 1:
            raise refuse("one-socket", "they are on two sockets")
        if len({topology.node_of[cpu] for cpu in pins}) > 1:
            raise refuse("one-node", "they are on two NUMA nodes")
        for other in self.placed.values():
            if both := set(pins) & set(other.pins):
                raise refuse("one-guest-per-cpu", f"CPU {cpulist(both)} is guest {other.name}'s")
        for cpu in pins:
            if owner := self._owned(cpu):
                raise refuse("siblings-together", f"CPU {cpu} shares a core with guest {owner}")
        return pins

    def _emulator(self, name: str, guest: GuestRequest, pins: tuple[int, ...]) -> tuple[int, ...]:
        """Housekeeping CPUs for a guest's other threads; by default those of its socket."""
        socket = self.topology.socket_of[pins[0]]
        near = tuple(cpu for cpu in self.housekeeping if self.topology.socket_of[cpu] == socket)
        if guest.emulator_cpus is None:
            return near
        key = "emulator_cpus"
        cpus = _existing(self.topology, guest.emulator_cpus, name, key)
        if wrong := [cpu for cpu in cpus if cpu not in self.housekeeping]:
            owner = next(
                (g for g in (pins, *(p.pins for p in self.placed.values())) if set(wrong) & set(g)), None
            )
            what = "runs vCPUs" if owner else "is isolated"
            raise PlanError(
                "emulator-on-housekeeping",
                f"{key} = {guest.emulator_cpus!r}: CPU {cpulist(wrong)} {what}",
                "",
                subject=name,
                keys=(key,),
                alternative=f'{key} = "{cpulist(near)}"',
            )
        return tuple(sorted(cpus))

    # Memory -----------------------------------------------------------------------------------

    def _memory_left(self, node: int) -> int:
        """MiB of a node that no guest has, less what the host keeps."""
        used = sum(guest.memory_mib for guest in self.placed.values() if guest.node == node)
        return self.topology.memory_mib(node) - HOST_RESERVE_MIB - used

    def _check_memory(self, name: str, guest: GuestRequest, node: int | None) -> None:
        page_mib = HUGEPAGES[guest.hugepages] // 1024
        if page_mib and guest.memory_mib % page_mib:
            rounded = -(-guest.memory_mib // page_mib) * page_mib
            raise PlanError(
                "hugepages-whole",
                f"memory_mib = {guest.memory_mib} is not a whole number of huge pages of {guest.hugepages}",
                "",
                subject=name,
                keys=("memory_mib",),
                alternative=f"memory_mib = {rounded}",
            )
        if node is not None and self._memory_left(node) < guest.memory_mib:
            raise self._no_memory(name, guest, node)

    def _no_memory(self, name: str, guest: GuestRequest, node: int) -> PlanError:
        page_mib = max(HUGEPAGES[guest.hugepages] // 1024, 1)
        left = self._memory_left(node) // page_mib * page_mib
        possible = left >= MIN_GUEST_MIB
        what = f" in huge pages of {guest.hugepages}" if page_mib > 1 else ""
        return PlanError(
            "memory-fits",
            f"memory_mib = {guest.memory_mib}{what}: node {node} has {max(self._memory_left(node), 0)} MiB "
            f"left for guests ({HOST_RESERVE_MIB} of its {self.topology.memory_mib(node)} are the host's)",
            "" if possible else "give other guests less memory, or move this one to another node",
            subject=name,
            keys=("memory_mib",),
            alternative=f"memory_mib = {left}" if possible else "",
        )


def _in_order(cpus: Sequence[int]) -> str:
    """CPUs as a list that keeps their order."""
    return cpulist(cpus) if list(cpus) == sorted(cpus) else ",".join(map(str, cpus))


def _advice(topology: Topology, placed: Placement, guest: GuestRequest) -> Iterable[Advice]:
    for keys, address in guest.devices.items():
        node = topology.device_node(address)
        if node is not None and node != placed.node:
            yield Advice(
                "device-node",
                f"{address} is on node {node}, the guest on node {placed.node}: each access crosses the sockets",
                f"pin the guest to isolated CPUs of node {node}",
                placed.name,
                keys,
            )
    shared = [
        cpu
        for vcpu, cpu in enumerate(placed.pins)
        if vcpu in placed.split.isolated and len(set(topology.siblings[cpu]) & set(placed.pins)) > 1
    ]
    if shared:
        yield Advice(
            "core-shared",
            f"real-time vCPUs on CPU {cpulist(shared)} share a core with another vCPU, which delays them",
            "switch SMT off in the firmware, or give the guest fewer vCPUs",
            placed.name,
            ("pins",) if guest.pins is not None else ("vcpus",),
        )
    socket = topology.socket_of[placed.pins[0]]
    if far := [cpu for cpu in placed.emulator if topology.socket_of[cpu] != socket]:
        yield Advice(
            "emulator-near",
            f"emulator threads on CPU {cpulist(far)} are on another socket than the guest",
            "leave emulator_cpus out for the housekeeping CPUs of its socket",
            placed.name,
            ("emulator_cpus",),
        )
