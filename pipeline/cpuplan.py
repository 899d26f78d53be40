"""Who owns which CPU of a host and its guests: the one plan from which everything that names a CPU is rendered.

On the host, housekeeping CPUs run all that is not real-time work (the emulators' own threads, interrupts,
daemons); the others are isolated, and each vCPU of a guest is pinned to one of them. In a guest, vCPUs are
numbered from 0: the first ones keep house, the others are isolated. `placement.host_plan` makes the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import UserError
from pipeline.topology import Topology, TopologyError, cpulist

#: What a plan keeps, by the word that a refusal begins with.
RULES = {
    "cpu-list": "CPUs are numbers and closed ranges, each CPU once, and all exist",
    "housekeeping-cpu-0": "CPU 0 keeps house: the kernel does work there that cannot be moved",
    "housekeeping-per-socket": "every socket has a housekeeping CPU, for the emulators and interrupts of its guests",
    "siblings-together": "the SMT siblings of a core have one owner: housekeeping, one guest, or nobody",
    "isolated-enough": "every vCPU has an isolated CPU of its own",
    "vcpu-on-isolated": "vCPUs are pinned to isolated CPUs",
    "one-guest-per-cpu": "no CPU runs vCPUs of two guests",
    "one-socket": "a guest's vCPUs are on one socket",
    "one-node": "a guest's vCPUs are on one NUMA node, its memory's",
    "guest-housekeeping": "a guest has a vCPU for its own housekeeping",
    "guest-realtime": "a guest has a vCPU for real-time work",
    "one-pin-per-vcpu": "a guest that names its CPUs names one for each vCPU",
    "emulator-on-housekeeping": "emulator and I/O threads run on housekeeping CPUs",
    "hugepages-whole": "a guest's memory is a whole number of huge pages",
    "memory-fits": "a node's memory holds its guests, and what the host needs",
}
#: What a plan is better with, by the word that a warning begins with.
ADVICE = {
    "device-node": "a passed-through device is on the node of its guest",
    "device-known": "on a machine with several nodes, the topology tells the node of each passed-through device",
    "core-shared": "a real-time vCPU has its core for itself",
    "emulator-near": "emulator threads run on the guest's socket",
}
#: Sizes of huge pages in KiB, by the name that recipes use.
HUGEPAGES = {"none": 0, "2M": 2048, "1G": 1024 * 1024}
#: Memory in MiB that each node with a guest keeps for the host: kernel, page cache, qemu's own.
#: A choice: a Debian host with qemu and sshd uses about 300.
HOST_RESERVE_MIB = 512
#: The least memory of a guest, MiB.
MIN_GUEST_MIB = 128


class PlanError(UserError, ValueError):
    """A plan that breaks a rule.

    `rule` is a key of `RULES`; `subject` is `platform`, or the guest's name; `keys` is where in the subject's
    recipe the cause stands. `alternatives` are lines of TOML, the best first, each of which would mend it; the
    hint is to write the first, `alternative`, or what was given as `hint` where no line mends it.
    """

    def __init__(
        self,
        rule: str,
        message: str,
        hint: str,
        *,
        subject: str = "platform",
        keys: tuple[str, ...] = (),
        alternatives: Sequence[str] = (),
    ) -> None:
        super().__init__(f"{rule}: {message}", hint)
        self.rule = rule
        self.subject = subject
        self.keys = keys
        self._otherwise = hint
        self.choose(alternatives)

    def choose(self, alternatives: Sequence[str]) -> None:
        """Keep these alternatives only."""
        self.alternatives = tuple(alternatives)
        self.hint = f"write {self.alternative}" if self.alternatives else self._otherwise

    @property
    def alternative(self) -> str:
        """The best line to write; empty when none is known."""
        return self.alternatives[0] if self.alternatives else ""


@dataclass(frozen=True, slots=True)
class Advice:
    """What is allowed and will be regretted; fields as those of `PlanError`."""

    advice: str
    message: str
    hint: str
    subject: str
    keys: tuple[str, ...]


def affinity_mask(cpus: Iterable[int]) -> str:
    """The CPUs as the kernel reads bit masks: hexadecimal, in groups of 32 bits joined by commas.

    Source: lib/bitmap-str.c, bitmap_parse(). Raises `TopologyError` for a negative number.
    """
    mask = 0
    for cpu in cpus:
        if cpu < 0:
            raise TopologyError(f"CPU {cpu}: CPUs are numbered from 0", "name CPUs that exist")
        mask |= 1 << cpu
    groups: list[int] = []
    while mask or not groups:
        groups.append(mask & 0xFFFF_FFFF)
        mask >>= 32
    return ",".join([f"{groups[-1]:x}", *(f"{group:08x}" for group in reversed(groups[:-1]))])


@dataclass(frozen=True, slots=True)
class GuestPlan:
    """The split of a guest's vCPUs, as `guest_plan` makes it.

    housekeeping  vCPU numbers, ascending from 0; at least one
    isolated      vCPU numbers, ascending, all the others; at least one
    """

    housekeeping: tuple[int, ...]
    isolated: tuple[int, ...]

    def command_line(self, root: str, console: str, extra: Sequence[str] = ()) -> str:
        """The guest kernel's command line.

        `root` and `console` are the values of the options of these names; `extra` are whole options, last so
        that they win. The options for isolation are those that the Ubuntu real-time documentation gives for
        guests: `isolcpus` keeps load balancing and managed interrupts away, `nohz_full` stops the tick while
        a single task runs, `rcu_nocbs` has RCU callbacks run elsewhere, by threads that poll
        (`rcu_nocb_poll`) so that an isolated vCPU need not wake them, and `irqaffinity` is where interrupts
        go instead.
        """
        isolated = cpulist(self.isolated)
        options = (
            f"root={root}",
            "rw",
            f"console={console}",
            f"isolcpus=domain,managed_irq,{isolated}",
            f"nohz_full={isolated}",
            f"rcu_nocbs={isolated}",
            "rcu_nocb_poll",
            f"irqaffinity={cpulist(self.housekeeping)}",
            *extra,
        )
        return " ".join(options)


def guest_plan(vcpus: int, housekeeping_vcpus: int, subject: str = "guest") -> GuestPlan:
    """Split `vcpus` (count): the first `housekeeping_vcpus` (count) keep house, the rest is isolated.

    Raises `PlanError` when one side would be left without a vCPU.
    """
    if housekeeping_vcpus < 1:
        raise PlanError(
            "guest-housekeeping",
            f"housekeeping_vcpus = {housekeeping_vcpus}: no vCPU is left for the guest's own work",
            "give it a vCPU more, and write housekeeping_vcpus = 1",
            subject=subject,
            keys=("housekeeping_vcpus",),
            alternatives=["housekeeping_vcpus = 1"] if vcpus > 1 else [],
        )
    if vcpus <= housekeeping_vcpus:
        raise PlanError(
            "guest-realtime",
            f"vcpus = {vcpus} with housekeeping_vcpus = {housekeeping_vcpus}: no vCPU is left to isolate",
            f"give it vcpus = {housekeeping_vcpus + 1} or more",
            subject=subject,
            keys=("housekeeping_vcpus",),
            alternatives=[
                *([f"housekeeping_vcpus = {vcpus - 1}"] if vcpus > 1 else []),
                f"vcpus = {housekeeping_vcpus + 1}",
            ],
        )
    return GuestPlan(tuple(range(housekeeping_vcpus)), tuple(range(housekeeping_vcpus, vcpus)))


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRequest:
    """What a guest asks of its host.

    `pins` (one CPU per vCPU, in order) and `emulator_cpus` are CPU lists, None for the plan's choice;
    `hugepages` is a key of `HUGEPAGES`; `priority` is the SCHED_FIFO priority of real-time vCPUs; `devices`
    are the PCI addresses of what is passed through, by their place in the recipe.
    """

    vcpus: int
    housekeeping_vcpus: int
    memory_mib: int
    hugepages: str = "none"
    pins: str | None = None
    emulator_cpus: str | None = None
    priority: int = 1
    devices: Mapping[tuple[str, ...], str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a guest runs.

    pins      the host CPU of each vCPU, by vCPU number
    emulator  the host CPUs of all its other threads
    node      the NUMA node of its CPUs and memory
    """

    name: str
    split: GuestPlan
    pins: tuple[int, ...]
    emulator: tuple[int, ...]
    node: int
    memory_mib: int
    hugepage_kib: int
    priority: int

    @property
    def hugepages(self) -> int:
        """How many huge pages its memory takes."""
        return self.memory_mib * 1024 // self.hugepage_kib if self.hugepage_kib else 0

    def to_json(self) -> dict[str, Any]:
        """As plan.json has it: per vCPU its CPU, policy and priority."""
        return {
            "vcpus": [
                {
                    "vcpu": vcpu,
                    "cpu": cpu,
                    "policy": "fifo" if vcpu in self.split.isolated else "other",
                    "priority": self.priority if vcpu in self.split.isolated else 0,
                }
                for vcpu, cpu in enumerate(self.pins)
            ],
            "emulator": list(self.emulator),
            "node": self.node,
            "memory_mib": self.memory_mib,
            "hugepage_kib": self.hugepage_kib,
            "hugepages": self.hugepages,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlan:
    """Who owns each CPU of a host; `guests` by name, in the order of their names."""

    topology: Topology
    housekeeping: tuple[int, ...]
    isolated: tuple[int, ...]
    guests: Mapping[str, Placement]
    warnings: tuple[Advice, ...]

    def owner(self, cpu: int) -> str:
        """`housekeeping`, `GUEST:VCPU`, or `idle` for an isolated CPU without a vCPU."""
        if cpu in self.housekeeping:
            return "housekeeping"
        for name, guest in self.guests.items():
            if cpu in guest.pins:
                return f"{name}:{guest.pins.index(cpu)}"
        return "idle"

    def hugepages(self) -> dict[tuple[int, int], int]:
        """How many huge pages guests need, by node and size in KiB."""
        found: dict[tuple[int, int], int] = {}
        for guest in self.guests.values():
            if guest.hugepages:
                place = (guest.node, guest.hugepage_kib)
                found[place] = found.get(place, 0) + guest.hugepages
        return dict(sorted(found.items()))

    def to_json(self) -> dict[str, Any]:
        """The plan for tools: lists of CPU numbers, hugepages by node, guests by name."""
        return {
            "cpus": list(self.topology.cpus),
            "sockets": [list(cpus) for cpus in self.topology.socket_cpus],
            "smt": self.topology.smt,
            "housekeeping": list(self.housekeeping),
            "isolated": list(self.isolated),
            "hugepages": [
                {"node": node, "size_kib": size, "count": count}
                for (node, size), count in self.hugepages().items()
            ],
            "guests": {name: guest.to_json() for name, guest in self.guests.items()},
            "warnings": [
                {"advice": w.advice, "message": w.message, "hint": w.hint, "subject": w.subject}
                for w in self.warnings
            ],
        }
