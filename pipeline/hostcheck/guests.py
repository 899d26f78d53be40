"""A running guest held against the plan: its process, its threads, its memory.

qemu names its threads when started with `-name NAME,debug-threads=on`: `CPU 0/KVM`, or `CPU 0/TCG` when it
emulates. Workers of vhost-net are threads of qemu since Linux 6.4 and were kernel threads before and are again
since 6.17; KVM has kernel threads of its own. The kernel's are known by the process id that ends their name
(`vhost-1234`, `kvm-pit/1234`, `kvm-nx-lpage-recovery-1234`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from . import findings
from .findings import Finding, guarded
from .machine import REALTIME, Machine, Thread, UnreadableError, cpulist, status_field
from .planfile import Guest, Plan, Vcpu

_VCPU = re.compile(r"CPU (\d+)/(\w+)\Z")
_OF_PROCESS = re.compile(r"(?:vhost|kvm-.+)[-/](\d+)\Z")
#: What a process that is locked in memory may have unlocked, KiB: the vDSO, and what it just mapped.
_UNLOCKED_KIB = 1024


def find(machine: Machine, guest: str) -> list[int]:
    """The processes of qemu whose `-name` is the guest's; programs that start qemu have its words, too."""
    return [pid for pid in machine.processes() if _is_guest(machine.arguments(pid), guest)]


def _is_guest(arguments: list[str], guest: str) -> bool:
    if not arguments or not re.match(r"qemu-|kvm\Z", PurePosixPath(arguments[0]).name):
        return False
    names = [value for option, value in zip(arguments, arguments[1:]) if option in ("-name", "--name")]
    return bool(names) and names[-1].split(",")[0] in (guest, f"guest={guest}")


def kernel_threads(machine: Machine, pid: int) -> list[Thread]:
    """The kernel threads that work for a process."""
    found = []
    for number in machine.processes():
        for thread in machine.threads(number):
            named = _OF_PROCESS.match(thread.name)
            if thread.kernel and named and int(named[1]) == pid:
                found.append(thread)
    return found


def audit(machine: Machine, plan: Plan, guest: Guest) -> Iterator[Finding]:
    """All findings on one guest."""
    pids = find(machine, guest.name)
    yield findings.judge(
        f"{guest.name}: process",
        len(pids) == 1,
        f"one qemu with -name {guest.name}",
        f"process {', '.join(map(str, pids))}" if pids else "not running",
        f"end all but one of {' '.join(map(str, pids))}" if pids else "start it with its launch script",
    )
    for pid in pids if len(pids) == 1 else ():
        threads = list(machine.threads(pid))
        yield from _vcpus(guest, threads)
        yield from _others(plan, guest, threads, kernel_threads(machine, pid))
        yield from guarded(f"{guest.name}: memory locked", _locked(machine, guest, pid))
        yield from guarded(f"{guest.name}: memory", _placed(machine, guest, pid))


# Threads ---------------------------------------------------------------------------------------


def _vcpus(guest: Guest, threads: list[Thread]) -> Iterator[Finding]:
    found: dict[int, list[Thread]] = {}
    kinds: set[str] = set()
    for thread in threads:
        named = _VCPU.match(thread.name)
        if named:
            found.setdefault(int(named[1]), []).append(thread)
            kinds.add(named[2])
    got = {"KVM": "KVM", "TCG": "emulated (TCG)"}
    yield findings.judge(
        f"{guest.name}: accelerator",
        kinds == {"KVM"},
        "KVM",
        ", ".join(got.get(kind, kind) for kind in sorted(kinds)) or "no vCPU threads",
        "start it with -accel kvm; an emulated guest says nothing about latency"
        if kinds
        else "start it with -name GUEST,debug-threads=on",
    )
    for vcpu in guest.vcpus:
        yield _vcpu(guest, vcpu, found.pop(vcpu.number, []))
    for number, extra in sorted(found.items()):
        tids = " ".join(str(thread.tid) for thread in extra)
        yield findings.fail(
            f"{guest.name}: vCPU {number}",
            f"{len(guest.vcpus)} vCPUs",
            f"one more, thread {tids}",
            f"start it with -smp {len(guest.vcpus)}",
        )


def _vcpu(guest: Guest, vcpu: Vcpu, threads: list[Thread]) -> Finding:
    name = f"{guest.name}: vCPU {vcpu.number}"
    wanted = f"{vcpu.schedule} on CPU {vcpu.cpu}"
    if len(threads) != 1:
        got = "no thread" if not threads else f"{len(threads)} threads of this name"
        return findings.fail(name, wanted, got, f"start it with -smp {len(guest.vcpus)} and debug-threads=on")
    thread = threads[0]
    remedies = []
    if thread.cpus != (vcpu.cpu,):
        remedies.append(f"taskset -cp {vcpu.cpu} {thread.tid}")
    if (thread.policy, thread.priority) != (vcpu.policy, vcpu.priority):
        remedies.append(f"chrt --{vcpu.policy} -p {vcpu.priority} {thread.tid}")
    got = f"{thread.schedule} on CPU {cpulist(thread.cpus)} (thread {thread.tid})"
    return findings.judge(name, not remedies, wanted, got, "; ".join(remedies))


def _others(plan: Plan, guest: Guest, threads: list[Thread], kernel: list[Thread]) -> Iterator[Finding]:
    """Everything of the guest that is no vCPU: on emulator CPUs, and never before a vCPU.

    KVM's own kernel threads are the kernel's to schedule, which puts them on any housekeeping CPU.
    """
    highest = max(vcpu.priority for vcpu in guest.vcpus)
    others = [thread for thread in [*threads, *kernel] if thread.kernel or not _VCPU.match(thread.name)]
    limit = f"no real-time priority above {highest}"
    wrong = 0
    for thread in others:
        kvm = thread.kernel and not thread.name.startswith("vhost-")
        cpus = plan.housekeeping if kvm else guest.emulator
        away = not set(thread.cpus) <= set(cpus)
        ahead = (
            not kvm
            and thread.policy in REALTIME
            and (thread.policy == "deadline" or thread.priority > highest)
        )
        if not (away or ahead):
            continue
        wrong += 1
        remedies = [f"taskset -cp {cpulist(cpus)} {thread.tid}"] if away else []
        remedies += [f"chrt --other -p 0 {thread.tid}"] if ahead else []
        yield findings.fail(
            f"{guest.name}: thread {thread.name}",
            f"within CPUs {cpulist(cpus)}" if kvm else f"within CPUs {cpulist(cpus)}, {limit}",
            f"{thread.schedule} on CPUs {cpulist(thread.cpus)} (thread {thread.tid})",
            "; ".join(remedies),
        )
    if not wrong:
        count = f"{len(others)} threads, {len(kernel)} of them the kernel's"
        wanted = f"within CPUs {cpulist(guest.emulator)}, {limit}"
        yield findings.ok(f"{guest.name}: other threads", count, wanted)


# Memory ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mapping:
    """A line of /proc/PID/numa_maps: pages by node, of `page_kib` each; `huge` for pages of hugetlbfs."""

    huge: bool
    page_kib: int
    nodes: dict[int, int]

    @property
    def kib(self) -> int:
        """How much of it is present."""
        return sum(self.nodes.values()) * self.page_kib


def parse_numa_maps(text: str) -> list[Mapping]:
    """The mappings of which any page is present."""
    found = []
    for line in text.splitlines():
        words = line.split()[2:]
        values = dict(word.partition("=")[::2] for word in words)
        try:
            nodes = {int(key[1:]): int(each) for key, each in values.items() if re.match(r"N\d+\Z", key)}
            if nodes:
                found.append(Mapping("huge" in values, int(values["kernelpagesize_kB"]), nodes))
        except (KeyError, ValueError):
            raise UnreadableError(f"numa_maps: not of its form: {line[:60]!r}") from None
    return found


def _kib(text: str, key: str, where: str) -> int:
    value = status_field(text, key, where)
    number, _, unit = value.partition(" ")
    if not number.isdigit() or unit != "kB":
        raise UnreadableError(f"{where}: {key} is {value!r}")
    return int(number)


def _locked(machine: Machine, guest: Guest, pid: int) -> Iterator[Finding]:
    """All of it stays in memory.

    mlockall() does not count huge pages in VmLck: those of hugetlbfs are never swapped (mlock_fixup(),
    mm/mlock.c), and are in HugetlbPages. VFIO adds what it pins to VmLck, so that the sum alone proves
    nothing: smaps_rollup says how much of what is present is locked.
    """
    wanted_kib = guest.memory_mib * 1024
    where = f"/proc/{pid}/status"
    status = machine.text(where)
    locked, huge = _kib(status, "VmLck", where), _kib(status, "HugetlbPages", where)
    where = f"/proc/{pid}/smaps_rollup"
    rollup = machine.text(where)
    loose = _kib(rollup, "Pss", where) - _kib(rollup, "Locked", where)
    yield findings.judge(
        f"{guest.name}: memory locked",
        locked > 0 and locked + huge >= wanted_kib and loose <= _UNLOCKED_KIB,
        f"{wanted_kib} KiB or more in VmLck and HugetlbPages together, nothing left to be swapped",
        f"VmLck {locked} KiB, HugetlbPages {huge} KiB, {max(loose, 0)} KiB not locked",
        "start it with -overcommit mem-lock=on, and rights to lock so much (ulimit -l, LimitMEMLOCK)",
    )


def _placed(machine: Machine, guest: Guest, pid: int) -> Iterator[Finding]:
    """In pages of the planned size, on the planned node."""
    wanted_kib = guest.memory_mib * 1024
    mappings = parse_numa_maps(machine.text(f"/proc/{pid}/numa_maps"))
    if guest.hugepage_kib:
        mine = [each for each in mappings if each.huge and each.page_kib == guest.hugepage_kib]
        pages = f"huge pages of {guest.hugepage_kib} KiB"
        remedy = f"back it with hugetlbfs of {guest.hugepage_kib} KiB, preallocated (launch script)"
    else:
        mine, pages = _largest(mappings, wanted_kib), "pages"
        remedy = "preallocate it (memory backend with prealloc=on)"
    present = sum(each.kib for each in mine)
    yield findings.judge(
        f"{guest.name}: memory pages",
        present >= wanted_kib,
        f"{wanted_kib} KiB in {pages}",
        f"{present} KiB",
        remedy,
    )
    nodes: dict[int, int] = {}
    for each in mine:
        for node, count in each.nodes.items():
            nodes[node] = nodes.get(node, 0) + count * each.page_kib
    yield findings.judge(
        f"{guest.name}: memory node",
        set(nodes) == {guest.node},
        f"all on node {guest.node}",
        ", ".join(f"{kib} KiB on node {node}" for node, kib in sorted(nodes.items())) or "none",
        f"bind it: memory backend with host-nodes={guest.node},policy=bind",
    )


def _largest(mappings: list[Mapping], wanted_kib: int) -> list[Mapping]:
    """The largest mappings that hold so much together: in normal pages nothing else tells guest memory."""
    found: list[Mapping] = []
    for each in sorted(mappings, key=lambda each: -each.kib):
        if sum(other.kib for other in found) >= wanted_kib:
            break
        found.append(each)
    return found
