"""Who owns which CPU: the guest's side of the plan.

A guest's vCPUs are numbered from 0. The first ones keep house: they run everything that is not real-time
work; the others are isolated. Whatever names a vCPU - kernel command line, cyclictest's CPU list, masks -
is rendered from `GuestPlan`, so that no two places can disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.errors import UserError


class PlanError(UserError, ValueError):
    """A plan that cannot work."""


def cpulist(cpus: Iterable[int]) -> str:
    """CPU numbers in the kernel's list format, ascending, runs joined: `1`, `1-3`, `0,2-3`; empty for none.

    Source: "cpu lists" in Documentation/admin-guide/kernel-parameters.rst. Raises `PlanError` for a negative
    number.
    """
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        _require_number(cpu)
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def affinity_mask(cpus: Iterable[int]) -> int:
    """Bit n is set for CPU n; `f"{mask:x}"` is what taskset(1) takes.

    Raises `PlanError` for a negative number.
    """
    mask = 0
    for cpu in cpus:
        _require_number(cpu)
        mask |= 1 << cpu
    return mask


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


def guest_plan(vcpus: int, housekeeping_vcpus: int) -> GuestPlan:
    """Split `vcpus` (count): the first `housekeeping_vcpus` (count) keep house, the rest is isolated.

    Raises `PlanError` when one side would be left without a vCPU.
    """
    if housekeeping_vcpus < 1:
        raise PlanError(
            f"housekeeping_vcpus = {housekeeping_vcpus}: no vCPU is left for the guest's own work",
            "write housekeeping_vcpus = 1 or more",
        )
    if vcpus <= housekeeping_vcpus:
        raise PlanError(
            f"vcpus = {vcpus} with housekeeping_vcpus = {housekeeping_vcpus}: no vCPU is left to isolate",
            f"write vcpus = {housekeeping_vcpus + 1} or more",
        )
    return GuestPlan(tuple(range(housekeeping_vcpus)), tuple(range(housekeeping_vcpus, vcpus)))


def _require_number(cpu: int) -> None:
    if cpu < 0:
        raise PlanError(f"CPU {cpu}: CPUs are numbered from 0", "name CPUs that exist")
