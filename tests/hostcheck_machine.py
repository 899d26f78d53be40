"""A machine as a tree of files in the forms of Linux 6.12 with PREEMPT_RT, that keeps its plan in everything.

Tests spoil one thing of it and see what `virt-rt-check` says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.cpuplan import GuestRequest
from pipeline.hostcheck import findings
from pipeline.hostcheck.audit import audit
from pipeline.hostcheck.findings import Finding
from pipeline.hostcheck.machine import Machine
from pipeline.hostcheck.planfile import Plan, load
from pipeline.hostcheck.preflight import preflight
from pipeline.placement import host_plan
from pipeline.topology import Node, Topology, cpulist

FLAGS = "fpu tsc msr lm vmx est constant_tsc nonstop_tsc aperfmperf ida"
TOPOLOGY = Topology(
    description="eight cores on two sockets",
    sockets=("0-3", "4-7"),
    nodes=(Node(id=0, cpus="0-3", memory_mib=8192), Node(id=1, cpus="4-7", memory_mib=8192)),
)
#: Process ids of the two guests.
RT, PLAIN = 1200, 1300


def plan_data() -> dict[str, Any]:
    """A plan as the tuning writes it: a guest in huge pages on node 0, and one in normal pages on node 1."""
    plan = host_plan(
        TOPOLOGY,
        {
            "rt": GuestRequest(vcpus=2, housekeeping_vcpus=1, memory_mib=1024, hugepages="2M", pins="1-2"),
            "plain": GuestRequest(vcpus=2, housekeeping_vcpus=1, memory_mib=256, pins="5-6"),
        },
    )
    isolated = cpulist(plan.isolated)
    return {
        "schema": 1,
        "platform": "board",
        "topology": "board",
        **plan.to_json(),
        "command_line": [
            {"parameter": parameter, "reason": "as the tuning says"}
            for parameter in (
                f"isolcpus=managed_irq,domain,{isolated}",
                f"nohz_full={isolated}",
                "nosoftlockup",
                "processor.max_cstate=1",
                "hugepagesz=2M hugepages=512",
            )
        ],
        "sysctl": [{"name": "kernel.sched_rt_runtime_us", "value": "950000", "reason": "the default"}],
        "module_parameters": [
            {"module": "kvm", "name": "halt_poll_ns", "value": "0", "reason": "no polling"},
            {"module": "kvm", "name": "kvmclock_periodic_sync", "value": "N", "reason": "no kick each 5 min"},
            {"module": "kvm_amd", "name": "avic", "value": "1", "reason": "on AMD"},
        ],
        "files": [
            {"path": "/sys/devices/virtual/workqueue/cpumask", "value": "11", "reason": "unbound work"},
            {"path": "/sys/kernel/mm/transparent_hugepage/enabled", "value": "never", "reason": "no merging"},
        ],
        "masked_services": [
            {"unit": "irqbalance.service", "reason": "moves interrupts"},
            {"unit": "ksm.service", "reason": "merges pages"},
        ],
        "choices": [],
        "bios": [{"setting": "Patrol Scrub", "value": "Disabled", "reason": "it takes the memory's time"}],
        "devices": {
            "rt": [
                {"address": "0000:03:00.0"},
                {"physical": "0000:04:00.0", "number": 1, "mac": None},
            ]
        },
    }


class Tree:
    """The machine's files below `root`, and its plan."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = plan_data()
        _boot(self)
        _devices(self)
        _programs(self)

    # Files ------------------------------------------------------------------------------------

    def write(self, name: str, text: str) -> Path:
        """Write a file by its absolute name; a line end is added, as the kernel does."""
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.chmod(0o644)
        path.write_text(f"{text}\n")
        return path

    def read(self, name: str) -> str:
        return (self.root / name.lstrip("/")).read_text()

    def replace(self, name: str, old: str, new: str) -> None:
        text = self.read(name)
        assert old in text, f"{name} has no {old!r}"
        self.write(name, text.replace(old, new).rstrip("\n"))

    def remove(self, name: str) -> None:
        path = self.root / name.lstrip("/")
        if path.is_dir() and not path.is_symlink():
            for each in path.iterdir():
                self.remove(f"{name}/{each.name}")
            path.rmdir()
        else:
            path.unlink()

    # Threads ----------------------------------------------------------------------------------

    def thread(
        self,
        pid: int,
        tid: int,
        name: str,
        cpus: str,
        *,
        policy: int = 0,
        priority: int = 0,
        last: int | None = None,
        kernel: bool = False,
        state: str = "S",
    ) -> None:
        """A thread's stat and status, with the fields of Linux 6.12."""
        last = int(cpus.replace("-", ",").split(",")[0]) if last is None else last
        flags = 0x0020_8040 if kernel else 0x0040_0100
        parent = 2 if kernel else 1
        shown = -1 - priority if policy in (1, 2) else 20
        directory = f"/proc/{pid}/task/{tid}"
        self.write(
            f"{directory}/stat",
            f"{tid} ({name}) {state} {parent} {pid} {pid} 0 -1 {flags} 30954 0 1 0 1 239 0 0 {shown} 0 5 0 1329697 "
            f"1512464384 282823 18446744073709551615 1 1 0 0 0 0 268444224 4102 64 1 0 0 -1 {last} {priority} "
            f"{policy} 0 0 0 0 0 0 0 0 0 0 0",
        )
        mask = f"Cpus_allowed:\tff\nCpus_allowed_list:\t{cpus}\nMems_allowed_list:\t0-1"
        self.write(f"{directory}/status", f"Name:\t{name}\nState:\t{state} (sleeping)\n{mask}")

    def process(self, pid: int, arguments: Sequence[str]) -> None:
        """A process's command line; its threads are added one by one."""
        path = self.write(f"/proc/{pid}/cmdline", "")
        path.write_bytes(b"".join(each.encode() + b"\0" for each in arguments))

    def interrupt(
        self, number: int, handlers: str, effective: str, allowed: str, managed: bool = False
    ) -> None:
        directory = f"/proc/irq/{number}"
        self.write(f"{directory}/effective_affinity_list", effective)
        self.write(f"{directory}/smp_affinity_list", allowed)
        self.write(f"{directory}/smp_affinity", "ff").chmod(0o444 if managed else 0o644)
        self.write(f"/sys/kernel/irq/{number}/actions", handlers)

    # What the tool says -----------------------------------------------------------------------

    def plan(self) -> Plan:
        path = self.write("/usr/share/virt-rt/plan.json", json.dumps(self.data, indent=1))
        return load(path)

    def preflight(self) -> list[Finding]:
        return preflight(Machine(self.root), self.plan())

    def audit(self, *names: str) -> list[Finding]:
        plan = self.plan()
        return audit(
            Machine(self.root), plan, [each for each in plan.guests if not names or each.name in names]
        )


Spoil = Callable[[Tree], object]


def bad(found: Sequence[Finding]) -> dict[str, Finding]:
    """The findings that fail, by name."""
    return {finding.name: finding for finding in found if finding.failed}


def only(found: Sequence[Finding], name: str) -> Finding:
    """The one finding of a name."""
    same = [finding for finding in found if finding.name == name]
    assert len(same) == 1, f"{name}: {len(same)} of {[finding.name for finding in found]}"
    return same[0]


def assert_complete(found: Sequence[Finding]) -> None:
    """Every finding is told as the tool promises."""
    assert found
    for finding in found:
        assert finding.level in findings.LEVELS
        assert finding.name and finding.got
        assert "\n" not in f"{finding.name}{finding.wanted}{finding.got}{finding.remedy}"
        if finding.failed:
            assert finding.wanted and finding.remedy, finding


def _boot(tree: Tree) -> None:
    """What the kernel shows of itself, CPUs and memory."""
    version = (
        "Linux version 6.12.1-rt1 (build@virt-rt) (gcc 14.2.0, GNU ld 2.44) #1 SMP PREEMPT_RT 2024-11-22"
    )
    tree.write("/proc/version", version)
    tree.write("/proc/sys/kernel/osrelease", "6.12.1-rt1")
    tree.write("/boot/config-6.12.1-rt1", "CONFIG_SMP=y\nCONFIG_PREEMPT_RT=y\n# CONFIG_KASAN is not set")
    tree.write("/proc/sys/kernel/arch", "x86_64")
    tree.write("/proc/sys/kernel/sched_rt_runtime_us", "950000")
    tree.write("/proc/sys/kernel/sched_rt_period_us", "1000000")
    tree.write(
        "/proc/cmdline",
        'BOOT_IMAGE=/boot/vmlinuz-6.12.1-rt1 root=LABEL=host ro dyndbg="file drivers/usb/* +p" '
        "isolcpus=managed_irq,domain,1-3,5-7 nohz_full=1-3,5-7 nosoftlockup processor.max-cstate=1 "
        "hugepagesz=2M hugepages=512 -- single",
    )
    cpu = "/sys/devices/system/cpu"
    tree.write(
        "/proc/cpuinfo",
        "\n\n".join(
            f"processor\t: {number}\nvendor_id\t: GenuineIntel\nmicrocode\t: 0x71a\nflags\t\t: {FLAGS}\nbugs\t\t:"
            for number in range(8)
        ),
    )
    for name, text in (
        ("online", "0-7"),
        ("isolated", "1-3,5-7"),
        ("nohz_full", "1-3,5-7"),
        ("smt/active", "0"),
        ("intel_pstate/no_turbo", "1"),
        ("cpuidle/current_driver", "intel_idle"),
    ):
        tree.write(f"{cpu}/{name}", text)
    for number in range(8):
        tree.write(f"{cpu}/cpu{number}/topology/physical_package_id", str(number // 4))
        tree.write(f"{cpu}/cpufreq/policy{number}/scaling_governor", "performance")
        for state, (name, latency, disable) in enumerate((("POLL", 0, 0), ("C1", 2, 0), ("C6", 104, 1))):
            directory = f"{cpu}/cpu{number}/cpuidle/state{state}"
            tree.write(f"{directory}/name", name)
            tree.write(f"{directory}/latency", str(latency))
            tree.write(f"{directory}/disable", str(disable))
    for node, cpus in ((0, "0-3"), (1, "4-7")):
        tree.write(f"/sys/devices/system/node/node{node}/cpulist", cpus)
        pages = f"/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB"
        tree.write(f"{pages}/nr_hugepages", "512" if node == 0 else "0")
    tree.write("/sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc")
    tree.write("/sys/devices/virtual/workqueue/cpumask", "00000000,00000011")
    tree.write("/sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]")
    tree.write("/sys/module/kvm/parameters/halt_poll_ns", "0")
    tree.write("/sys/module/kvm/parameters/kvmclock_periodic_sync", "N")
    tree.write("/sys/module/kvm_intel/parameters/nested", "Y")
    masked = tree.root / "etc/systemd/system/irqbalance.service"
    masked.parent.mkdir(parents=True)
    masked.symlink_to("/dev/null")


def _devices(tree: Tree) -> None:
    """KVM, IOMMU, devices and interrupts."""
    tree.write("/dev/kvm", "")
    tree.write("/sys/firmware/acpi/tables/DMAR", "DMAR")
    tree.write("/sys/class/iommu/dmar0/devices", "")
    tree.write("/sys/kernel/iommu_groups/0/type", "DMA-FQ")
    tree.write("/sys/kernel/iommu_groups/1/type", "DMA-FQ")
    tree.write("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "N")
    tree.write("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "N")
    device = tree.root / "sys/bus/pci/devices/0000:03:00.0"
    device.mkdir(parents=True)
    (device / "iommu_group").symlink_to("../../../../kernel/iommu_groups/1")
    tree.write("/sys/bus/pci/devices/0000:04:00.0/sriov_totalvfs", "7")
    head = "           " + "".join(f"CPU{number:<8}" for number in range(2))
    tree.write(
        "/proc/interrupts",
        f"{head}\n   0:         44          0  IR-IO-APIC    2-edge      timer\n"
        "  24:     229512          0  IR-PCI-MSIX-0000:04:00.0    0-edge      eno1\n"
        " NMI:          0          0   Non-maskable interrupts",
    )
    tree.write("/proc/irq/default_smp_affinity", "00000000,00000011")
    tree.interrupt(0, "timer", "0", "0,4")
    tree.interrupt(5, "", "1", "0-7")
    tree.interrupt(24, "eno1", "4", "0,4")
    tree.interrupt(25, "nvme0q1", "0", "0-3", managed=True)


def _programs(tree: Tree) -> None:
    """Both guests, vhost and KVM threads of theirs, some programs, and kernel threads of each CPU."""
    tree.process(1, ["/sbin/init"])
    tree.thread(1, 1, "systemd", "0,4")
    tree.process(2, [])
    tree.thread(2, 2, "kthreadd", "0,4", kernel=True)
    for number in range(8):
        pid = 20 + number
        tree.process(pid, [])
        tree.thread(pid, pid, f"migration/{number}", str(number), policy=1, priority=99, kernel=True)
    tree.process(
        700, ["sudo", "/opt/virt-rt/board/qemu/bin/qemu-system-x86_64", "-name", "rt,debug-threads=on"]
    )
    tree.thread(700, 700, "sudo", "0,4")
    _guest(tree, RT, "rt,debug-threads=on", "0", (1, 2))
    _guest(tree, PLAIN, "guest=plain,debug-threads=on", "4", (5, 6))
    huge = (
        "bind:0 file=/memfd:memory-backend-memfd\\040(deleted) huge dirty=512 N0=512 kernelpagesize_kB=2048"
    )
    tree.write(
        f"/proc/{RT}/numa_maps",
        "558ae9180000 default heap anon=3864 dirty=3864 N0=3800 N1=64 kernelpagesize_kB=4\n"
        f"7f7d80000000 {huge}\n7f7df9a00000 default",
    )
    tree.write(
        f"/proc/{PLAIN}/numa_maps",
        "558ae9180000 default heap anon=3864 dirty=3864 N0=3864 kernelpagesize_kB=4\n"
        "7faa5ee00000 bind:1 anon=65536 dirty=65536 N1=65536 kernelpagesize_kB=4",
    )
    memory(tree, RT, locked=309_732, huge=1_048_576)
    memory(tree, PLAIN, locked=590_000, huge=0)
    for pid, name in ((1250, f"kvm-nx-lpage-recovery-{RT}"), (1251, f"kvm-pit/{RT}"), (1252, f"vhost-{RT}")):
        tree.process(pid, [])
        tree.thread(pid, pid, name, "0", kernel=True)


def _guest(tree: Tree, pid: int, name: str, emulator: str, pins: tuple[int, int]) -> None:
    qemu = "/opt/virt-rt/board/qemu/bin/qemu-system-x86_64"
    tree.process(pid, [qemu, "-accel", "kvm", "-name", name, "-overcommit", "mem-lock=on"])
    tree.thread(pid, pid, "qemu-system-x86", emulator)
    tree.thread(pid, pid + 1, "IO iothread0", emulator)
    tree.thread(pid, pid + 2, f"vhost-{pid}", emulator)
    tree.thread(pid, pid + 3, "CPU 0/KVM", str(pins[0]))
    tree.thread(pid, pid + 4, "CPU 1/KVM", str(pins[1]), policy=1, priority=1)


def memory(tree: Tree, pid: int, *, locked: int, huge: int, loose: int = 4) -> None:
    """What a process's status and smaps_rollup say of its memory, KiB; `loose` is not locked."""
    tree.write(
        f"/proc/{pid}/status", f"Name:\tqemu-system-x86\nVmLck:\t{locked:>8} kB\nHugetlbPages:\t{huge:>8} kB"
    )
    tree.write(
        f"/proc/{pid}/smaps_rollup",
        "558ae8fe4000-7ffc6c5fd000 ---p 00000000 00:00 0                          [rollup]\n"
        f"Rss:              {213_452} kB\nPss:              {204_635} kB\nPss_Anon:          71448 kB\n"
        f"Swap:                  0 kB\nLocked:           {204_635 - loose} kB",
    )
