"""How a host's CPUs are given to its guests: every rule of the CPU plan is kept, or the first one broken is named."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

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

#: CPUs of one socket and one NUMA node, by these two numbers: a guest is within one.
Group = tuple[int, int]


def host_plan(
    topology: Topology, guests: Mapping[str, GuestRequest], housekeeping_cpus: str | None = None
) -> HostPlan:
    """Plan a host; by default the first core of each socket keeps house.

    Guests that name their CPUs are placed first, then the others, the largest first: where vCPUs share no
    cores, on the node of their devices, where the fewest free cores are left over. Raises `PlanError` when a
    rule is broken, or when no place is left for a guest; its alternatives were tried: the first makes the plan
    whole, or at least ends this complaint.
    """
    try:
        return _plan(topology, guests, housekeeping_cpus)
    except PlanError as error:
        error.choose(_tried(error, topology, guests, housekeeping_cpus))
        raise


def _tried(
    error: PlanError, topology: Topology, guests: Mapping[str, GuestRequest], housekeeping_cpus: str | None
) -> list[str]:
    """Those alternatives of a refusal that end it, from the first that makes the plan whole, if one does."""
    ending: list[str] = []
    for line in error.alternatives:
        changed, keeping_house = dict(guests), housekeeping_cpus
        if error.subject == "platform":
            keeping_house = tomllib.loads(line)["housekeeping_cpus"]
        else:
            changed[error.subject] = replace(guests[error.subject], **tomllib.loads(line))
        try:
            _plan(topology, changed, keeping_house)
        except PlanError as other:
            if (other.rule, other.subject) != (error.rule, error.subject):
                ending.append(line)
        else:
            return [line]
    return ending


def _plan(topology: Topology, guests: Mapping[str, GuestRequest], housekeeping_cpus: str | None) -> HostPlan:
    housekeeping = _housekeeping(topology, housekeeping_cpus)
    splits = {
        name: guest_plan(guest.vcpus, guest.housekeeping_vcpus, name)
        for name, guest in sorted(guests.items())
    }
    placing = _Placing(topology, housekeeping, guests)
    order = sorted(guests, key=lambda name: (guests[name].pins is None, -guests[name].vcpus, name))
    for name in order:
        placing.place(name, guests[name], splits[name])
    placed = {name: placing.placed[name] for name in sorted(guests)}
    return HostPlan(
        topology=topology,
        housekeeping=housekeeping,
        isolated=placing.isolated,
        guests=placed,
        warnings=tuple(w for name in placed for w in _advice(topology, placed[name], guests[name])),
    )


def _existing(
    topology: Topology, text: str, subject: str, key: str, alternatives: Callable[[], Sequence[str]]
) -> tuple[int, ...]:
    """CPUs of a list in a recipe, in the order written; all exist."""
    try:
        cpus = parse_cpulist(text)
    except TopologyError as error:
        raise PlanError(
            "cpu-list",
            f"{key} = {error.message}",
            error.hint,
            subject=subject,
            keys=(key,),
            alternatives=alternatives(),
        ) from None
    if unknown := [cpu for cpu in cpus if cpu not in topology.socket_of]:
        raise PlanError(
            "cpu-list",
            f"{key} = {text!r}: this machine has no CPU {cpulist(unknown)}, only {cpulist(topology.cpus)}",
            f"name some of {cpulist(topology.cpus)}",
            subject=subject,
            keys=(key,),
            alternatives=alternatives(),
        )
    return cpus


def _housekeeping(topology: Topology, asked: str | None) -> tuple[int, ...]:
    """The housekeeping CPUs, ascending: those asked for, or the first core of each socket."""
    key = "housekeeping_cpus"
    firsts = {cpu for socket in topology.socket_cpus for cpu in topology.siblings[socket[0]]}
    default = f'{key} = "{cpulist(firsts)}"'
    if asked is None:
        cpus = firsts
    else:
        cpus = set(_existing(topology, asked, "platform", key, lambda: [default]))
        _check_housekeeping(topology, asked, cpus)
    if cpus == set(topology.cpus):
        raise PlanError(
            "isolated-enough",
            f"all CPUs ({cpulist(cpus)}) keep house: none is left to isolate",
            "take a machine with a second core on one of its sockets",
            keys=("topology",) if asked is None else (key,),
            alternatives=[default] if cpus != firsts else [],
        )
    return tuple(sorted(cpus))


def _check_housekeeping(topology: Topology, asked: str, cpus: set[int]) -> None:
    """Refuse housekeeping CPUs that are not whole cores on every socket, CPU 0 among them."""
    key = "housekeeping_cpus"
    whole = {sibling for cpu in cpus for sibling in topology.siblings[cpu]}
    mended = whole | set(topology.siblings[0])
    for socket in topology.socket_cpus:
        if not mended & set(socket):
            mended |= set(topology.siblings[socket[0]])

    def refuse(rule: str, message: str) -> PlanError:
        return PlanError(
            rule,
            f"{key} = {asked!r}: {message}",
            "leave it out for the first core of each socket",
            keys=(key,),
            alternatives=[f'{key} = "{cpulist(mended)}"'],
        )

    if 0 not in cpus:
        raise refuse("housekeeping-cpu-0", "CPU 0 would be isolated")
    for index, socket in enumerate(topology.socket_cpus):
        if not cpus & set(socket):
            raise refuse("housekeeping-per-socket", f"socket {index} ({cpulist(socket)}) has none")
    if cpus != whole:
        split = cpulist(whole - cpus)
        raise refuse("siblings-together", f"CPU {split} is a sibling of one of them, and would be isolated")


class _Placing:
    """Guests placed so far, and what is free."""

    def __init__(
        self, topology: Topology, housekeeping: tuple[int, ...], guests: Mapping[str, GuestRequest]
    ) -> None:
        self.topology = topology
        self.housekeeping = housekeeping
        self.isolated = tuple(cpu for cpu in topology.cpus if cpu not in housekeeping)
        self.guests = guests
        self.placed: dict[str, Placement] = {}
        self.groups: list[Group] = sorted(
            {(topology.socket_of[cpu], topology.node_of[cpu]) for cpu in topology.cpus}
        )

    def place(self, name: str, guest: GuestRequest, split: GuestPlan) -> None:
        """Give a guest its CPUs and its node; raises `PlanError`."""
        self._check_pages(name, guest)
        pins = self._chosen(name, guest) if guest.pins is None else self._named(name, guest, guest.pins)
        node = self.topology.node_of[pins[0]]
        if self._memory_left(node) < guest.memory_mib:
            raise self._no_memory(name, guest, node)
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

    def _free_cores(self, group: Group, spared: frozenset[int] = frozenset()) -> list[tuple[int, ...]]:
        """Isolated cores of a group without a vCPU or a spared CPU, those that share a cache side by side."""
        topology = self.topology
        cores = {
            topology.siblings[cpu]
            for cpu in self.isolated
            if (topology.socket_of[cpu], topology.node_of[cpu]) == group and self._owned(cpu) is None
        }
        return sorted(
            (core for core in cores if not spared & set(core)),
            key=lambda core: (topology.cache_of[core[0]][0], core),
        )

    def _fit(self, group: Group, vcpus: int, spared: frozenset[int] = frozenset()) -> tuple[int, ...] | None:
        """CPUs for so many vCPUs in a group: a core each while there are enough, else with siblings."""
        cores = self._free_cores(group, spared)
        caches: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for core in cores:
            caches.setdefault(self.topology.cache_of[core[0]], []).append(core)
        for per_core in (1, None):
            # in one cache where that is possible, in the one with the fewest cores left over
            for part in [*sorted(caches.values(), key=len), cores]:
                cpus = [cpu for core in part for cpu in core[:per_core]]
                if len(cpus) >= vcpus:
                    return tuple(cpus[:vcpus])
        return None

    def _chosen(self, name: str, guest: GuestRequest) -> tuple[int, ...]:
        """The plan's choice of CPUs, one per vCPU."""
        wanted = {self.topology.device_node(address) for address in guest.devices.values()} - {None}
        fits = {group: cpus for group in self.groups if (cpus := self._fit(group, guest.vcpus))}
        if not fits:
            raise self._no_cpus(name, guest)
        roomy = [group for group in fits if self._memory_left(group[1]) >= guest.memory_mib]
        if not roomy:
            raise self._no_memory(name, guest, max((node for _, node in fits), key=self._memory_left))

        def cost(group: Group) -> tuple[int, bool, int, Group]:
            shared = guest.vcpus - len({self.topology.siblings[cpu] for cpu in fits[group]})
            return shared, group[1] not in wanted, len(self._free_cores(group)), group

        return fits[min(roomy, key=cost)]

    def _most_free(self) -> int:
        """How many CPUs are free where most are."""
        return max(sum(map(len, self._free_cores(group))) for group in self.groups)

    def _no_cpus(self, name: str, guest: GuestRequest) -> PlanError:
        most = self._most_free()
        what = "one socket" if len(self.groups) == len(self.topology.sockets) else "one node"
        return PlanError(
            "isolated-enough",
            f"vcpus = {guest.vcpus}: at most {most} isolated CPUs are free on {what}",
            "put it on another platform, or give other guests fewer vCPUs",
            subject=name,
            keys=("vcpus",),
            alternatives=[f"vcpus = {fewer}" for fewer in range(most, guest.housekeeping_vcpus, -1)],
        )

    def _named(self, name: str, guest: GuestRequest, text: str) -> tuple[int, ...]:
        """The CPUs that a guest names, checked."""
        topology = self.topology
        pins = _existing(topology, text, name, "pins", lambda: self._other_pins(name, guest))

        def refuse(rule: str, message: str, *more: str, key: str = "pins") -> PlanError:
            most = self._most_free()
            fitting = guest.housekeeping_vcpus < most < guest.vcpus
            return PlanError(
                rule,
                f"pins = {text!r}: {message}",
                f"write vcpus = {most} and take pins out"
                if fitting
                else "give it fewer vCPUs, or other guests other CPUs",
                subject=name,
                keys=(key,),
                alternatives=[*self._other_pins(name, guest), *more],
            )

        if guest.vcpus > len(self.isolated):
            fewer = [f"vcpus = {count}" for count in range(len(self.isolated), guest.housekeeping_vcpus, -1)]
            message = f"{guest.vcpus} vCPUs, but {len(self.isolated)} CPUs are isolated"
            raise refuse("isolated-enough", message, *fewer, key="vcpus")
        if len(pins) != guest.vcpus:
            fits = guest.housekeeping_vcpus < len(pins) <= len(self.isolated)
            as_many = [f"vcpus = {len(pins)}"] if fits else []
            raise refuse("one-pin-per-vcpu", f"{len(pins)} CPUs for {guest.vcpus} vCPUs", *as_many)
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

    def _other_pins(self, name: str, guest: GuestRequest) -> list[str]:
        """Lines of pins that would do, those first that no guest names and whose node has the memory."""
        spared: set[int] = set()
        for other, request in self.guests.items():
            if other != name and request.pins is not None:
                try:
                    spared |= set(parse_cpulist(request.pins))
                except TopologyError:  # that guest's own refusal
                    continue
        found = []
        for group in sorted(self.groups, key=lambda each: self._memory_left(each[1]) < guest.memory_mib):
            found += [self._fit(group, guest.vcpus, frozenset(spared)), self._fit(group, guest.vcpus)]
        lines = [f'pins = "{_in_order(cpus)}"' for cpus in found[::2] + found[1::2] if cpus]
        return list(dict.fromkeys(lines))

    def _emulator(self, name: str, guest: GuestRequest, pins: tuple[int, ...]) -> tuple[int, ...]:
        """Housekeeping CPUs for a guest's other threads; by default those of its socket."""
        socket = self.topology.socket_of[pins[0]]
        near = tuple(cpu for cpu in self.housekeeping if self.topology.socket_of[cpu] == socket)
        if guest.emulator_cpus is None:
            return near
        key = "emulator_cpus"
        instead = [f'{key} = "{cpulist(near)}"']
        cpus = _existing(self.topology, guest.emulator_cpus, name, key, lambda: instead)
        if wrong := [cpu for cpu in cpus if cpu not in self.housekeeping]:
            busy = set(pins).union(*(guest.pins for guest in self.placed.values()))
            raise PlanError(
                "emulator-on-housekeeping",
                f"{key} = {guest.emulator_cpus!r}: CPU {cpulist(wrong)} "
                + ("runs vCPUs" if busy & set(wrong) else "is isolated"),
                "leave it out for the housekeeping CPUs of the guest's socket",
                subject=name,
                keys=(key,),
                alternatives=instead,
            )
        return tuple(sorted(cpus))

    # Memory -----------------------------------------------------------------------------------

    def _memory_left(self, node: int) -> int:
        """MiB of a node that no guest has, less what the host keeps."""
        used = sum(guest.memory_mib for guest in self.placed.values() if guest.node == node)
        return self.topology.memory_mib(node) - HOST_RESERVE_MIB - used

    def _check_pages(self, name: str, guest: GuestRequest) -> None:
        page_mib = HUGEPAGES[guest.hugepages] // 1024
        if page_mib and guest.memory_mib % page_mib:
            below = guest.memory_mib // page_mib * page_mib
            raise PlanError(
                "hugepages-whole",
                f"memory_mib = {guest.memory_mib} is not a whole number of huge pages of {guest.hugepages}",
                "give it smaller huge pages",
                subject=name,
                keys=("memory_mib",),
                alternatives=[
                    f"memory_mib = {mib}" for mib in (below + page_mib, below) if mib >= MIN_GUEST_MIB
                ],
            )

    def _no_memory(self, name: str, guest: GuestRequest, node: int) -> PlanError:
        page_mib = max(HUGEPAGES[guest.hugepages] // 1024, 1)
        left = self._memory_left(node) // page_mib * page_mib
        what = f" in huge pages of {guest.hugepages}" if page_mib > 1 else ""
        return PlanError(
            "memory-fits",
            f"memory_mib = {guest.memory_mib}{what}: node {node} has {max(self._memory_left(node), 0)} MiB "
            f"left for guests ({HOST_RESERVE_MIB} of its {self.topology.memory_mib(node)} are the host's)",
            "give other guests less memory, or move this one to another node",
            subject=name,
            keys=("memory_mib",),
            alternatives=[f"memory_mib = {left}"] if left >= MIN_GUEST_MIB else [],
        )


def _in_order(cpus: Sequence[int]) -> str:
    """CPUs as a list that keeps their order."""
    return cpulist(cpus) if list(cpus) == sorted(cpus) else ",".join(map(str, cpus))


def _advice(topology: Topology, placed: Placement, guest: GuestRequest) -> Iterable[Advice]:
    """What a placed guest would be better with."""
    several = len([node for node in topology.nodes if node.cpus]) > 1
    for keys, address in guest.devices.items():
        node = topology.device_node(address)
        if node is None and several:
            yield Advice(
                "device-known",
                f"the topology does not tell the node of {address}: it may not be the guest's",
                "add it to the topology's devices, or record the topology on the machine",
                placed.name,
                keys,
            )
        elif node is not None and node != placed.node:
            yield Advice(
                "device-node",
                f"{address} is on node {node}, the guest on node {placed.node}: each access crosses the nodes",
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
