"""Audit: do the running guests, and everything else on the machine, keep to the plan's CPUs?"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence

from . import findings, guests
from .findings import Finding, guarded
from .machine import REALTIME, Machine, Thread, UnreadableError, cpulist, parse_cpulist
from .planfile import Guest, Plan

#: So many offenders of a kind are named in one finding.
_NAMED = 5


def audit(machine: Machine, plan: Plan, chosen: Sequence[Guest]) -> list[Finding]:
    """Everything that audit has to say about some guests of the plan."""
    made: list[Finding] = []
    for guest in chosen:
        made += guarded(guest.name, guests.audit(machine, plan, guest))
    made += guarded("interrupts", interrupts(machine, plan))
    made += guarded("isolated CPUs", strangers(machine, plan, chosen))
    return made


def interrupts(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Every interrupt that can arrive is delivered to a housekeeping CPU.

    Without a handler an interrupt is switched off and cannot arrive. Those whose CPUs the kernel chooses by
    itself, one for each queue of a device, cannot be moved (their smp_affinity is read-only): isolcpus=managed_irq
    keeps them away from isolated CPUs as long as their set has a housekeeping CPU, and the others arrive only
    when a program on the isolated CPU itself uses the device ("isolcpus" in
    Documentation/admin-guide/kernel-parameters.txt). All are counted.
    """
    numbers = machine.numbered("/proc/irq")
    if not numbers:
        raise UnreadableError("/proc/irq has no interrupts")
    house = set(plan.housekeeping)
    idle = good = 0
    wrong: list[str] = []
    managed: list[str] = []
    for number in numbers:
        directory = f"/proc/irq/{number}"
        try:
            handlers = _handlers(machine, number)
            allowed = set(parse_cpulist(machine.text(f"{directory}/smp_affinity_list")))
            effective = set(parse_cpulist(machine.text(f"{directory}/effective_affinity_list")))
            mode = machine.mode(f"{directory}/smp_affinity")
            if mode is None:
                raise UnreadableError(f"{directory}/smp_affinity is not there")
        except UnreadableError:
            if machine.exists(directory):
                raise
            continue
        # Chips that cannot steer an interrupt report no effective CPUs: it may go wherever it is allowed.
        where = effective or allowed
        if not handlers:
            idle += 1
        elif where and where <= house:
            good += 1
        elif not mode & stat.S_IWUSR and not allowed & house:
            managed.append(f"{number} ({handlers}) on {cpulist(where)}")
        else:
            wrong.append(f"{number} ({handlers}) on {cpulist(where)}")
    counted = f"{good} on housekeeping CPUs, {idle} without a handler, {len(managed)} managed by the kernel"
    yield findings.judge(
        "interrupts",
        not wrong,
        f"within CPUs {cpulist(house)}",
        f"{_some(wrong)}; {counted}" if wrong else counted,
        f"echo {cpulist(house)} >/proc/irq/NUMBER/smp_affinity_list; "
        "where that is refused, boot with isolcpus=managed_irq,...",
    )
    if managed:
        yield findings.warn(
            "interrupts of queues",
            "none on isolated CPUs",
            _some(managed),
            "they arrive only for programs on that CPU that use the device: let none do so",
        )


def _handlers(machine: Machine, number: int) -> str:
    """The names of an interrupt's handlers, empty for none.

    From /sys/kernel/irq; a kernel without it has a directory for each handler with a name that can be one.
    """
    actions = machine.optional(f"/sys/kernel/irq/{number}/actions")
    if actions is not None:
        return actions
    directory = f"/proc/irq/{number}"
    modes = {name: machine.mode(f"{directory}/{name}") for name in machine.names(directory)}
    named = [name for name, mode in modes.items() if mode is not None and stat.S_ISDIR(mode)]
    return ",".join(named)


def strangers(machine: Machine, plan: Plan, chosen: Sequence[Guest]) -> Iterator[Finding]:
    """No program but the guest's vCPU is on a vCPU's CPU.

    Kernel threads are left alone: those of one CPU belong there. A program with a real-time policy must not
    even be allowed there. Others may be allowed and are then told: between isolated CPUs and the others the
    kernel does not balance, so that they come there only when something puts them there.
    """
    owned = {vcpu.cpu for guest in chosen for vcpu in guest.vcpus}
    own = {pid for guest in chosen for pid in guests.find(machine, guest.name)}
    wrong: list[str] = []
    realtime: list[str] = []
    allowed: list[str] = []
    for pid in machine.processes():
        for thread in machine.threads(pid) if pid not in own else ():
            if thread.kernel or thread.state in ("Z", "X") or not set(thread.cpus) & owned:
                continue
            where = f"CPUs {cpulist(thread.cpus)}, last on {thread.last}"
            text = f"{thread.name} ({_process(thread)}, {thread.schedule}, {where})"
            if thread.policy in REALTIME:
                realtime.append(text)
            elif set(thread.cpus) <= owned or thread.last in owned:
                wrong.append(text)
            else:
                allowed.append(text)
    remedy = f"taskset -cp {cpulist(plan.housekeeping)} THREAD, or end it; see CPUAffinity= of its service"
    cpus = cpulist(owned)
    yield findings.judge(
        "real-time programs",
        not realtime,
        f"none may run on CPUs {cpus} but vCPUs",
        _some(realtime) or "none",
        remedy,
    )
    yield findings.judge(
        "other programs", not wrong, f"none on CPUs {cpus} but vCPUs", _some(wrong) or "none", remedy
    )
    if allowed:
        yield findings.warn(
            "programs allowed there", f"none allowed on CPUs {cpus} but vCPUs", _some(allowed), remedy
        )


def _process(thread: Thread) -> str:
    return f"thread {thread.tid}" if thread.tid == thread.pid else f"thread {thread.tid} of {thread.pid}"


def _some(texts: Sequence[str]) -> str:
    """The first of them, and how many more there are; empty for none."""
    more = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return ", ".join(texts[:_NAMED]) + more
