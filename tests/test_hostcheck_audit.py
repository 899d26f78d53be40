"""`virt-rt-check audit`: guests, interrupts and programs held against the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.hostcheck import findings
from pipeline.hostcheck.guests import parse_numa_maps
from pipeline.hostcheck.machine import UnreadableError
from tests.hostcheck_machine import PLAIN, RT, Spoil, Tree, assert_complete, bad, memory, only

HUGE = "huge dirty=512 N0=512 kernelpagesize_kB=2048"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A machine on which both guests run as planned."""
    return Tree(tmp_path / "machine")


def vcpu(cpus: str = "2", policy: int = 1, priority: int = 1, name: str = "CPU 1/KVM") -> Spoil:
    """The real-time vCPU of the guest `rt`, otherwise."""
    return lambda tree: tree.thread(RT, RT + 4, name, cpus, policy=policy, priority=priority)


def worker(cpus: str = "0", policy: int = 0, priority: int = 0, pid: int = RT, tid: int = RT + 1) -> Spoil:
    return lambda tree: tree.thread(pid, tid, "IO iothread0", cpus, policy=policy, priority=priority)


def numa(old: str, new: str, pid: int = RT) -> Spoil:
    return lambda tree: tree.replace(f"/proc/{pid}/numa_maps", old, new)


def remove(name: str) -> Spoil:
    return lambda tree: tree.remove(name)


def program(
    cpus: str, policy: int = 0, priority: int = 0, last: int = 0, kernel: bool = False, state: str = "S"
) -> Spoil:
    def spoil(tree: Tree) -> None:
        tree.process(4242, ["stress"])
        tree.thread(
            4242,
            4242,
            "stress (x)",
            cpus,
            policy=policy,
            priority=priority,
            last=last,
            kernel=kernel,
            state=state,
        )

    return spoil


def test_guests_that_keep_the_plan_are_green(tree: Tree) -> None:
    found = tree.audit()
    assert_complete(found)
    assert [finding for finding in found if finding.level != findings.OK] == []
    assert findings.exit_status(found) == 0
    assert {finding.name for finding in found} >= {
        *(f"{guest}: vCPU {number}" for guest in ("rt", "plain") for number in (0, 1)),
        *(f"{guest}: {what}" for guest in ("rt", "plain") for what in ("memory locked", "memory node")),
    }
    assert only(found, "rt: other threads").got == "6 threads, 3 of them the kernel's"
    assert only(found, "plain: memory node").got == "262144 KiB on node 1"
    assert (
        only(found, "interrupts").got
        == "3 on housekeeping CPUs, 1 without a handler, 0 managed by the kernel"
    )


@pytest.mark.parametrize(
    ("spoil", "name", "got", "remedy"),
    [
        # vCPUs
        (vcpu("3"), "rt: vCPU 1", "fifo 1 on CPU 3", f"taskset -cp 2 {RT + 4}"),
        (vcpu("0-7"), "rt: vCPU 1", "fifo 1 on CPU 0-7", f"taskset -cp 2 {RT + 4}"),
        (vcpu(policy=0, priority=0), "rt: vCPU 1", "other on CPU 2", f"chrt --fifo -p 1 {RT + 4}"),
        (vcpu(policy=2), "rt: vCPU 1", "rr 1 on CPU 2", f"chrt --fifo -p 1 {RT + 4}"),
        (vcpu(priority=50), "rt: vCPU 1", "fifo 50 on CPU 2", f"chrt --fifo -p 1 {RT + 4}"),
        (
            lambda tree: tree.thread(RT, RT + 3, "CPU 0/KVM", "1", policy=1, priority=1),
            "rt: vCPU 0",
            "fifo 1 on CPU 1",
            f"chrt --other -p 0 {RT + 3}",
        ),
        (remove(f"/proc/{RT}/task/{RT + 4}"), "rt: vCPU 1", "no thread", "-smp 2"),
        (vcpu(name="CPU 0/KVM"), "rt: vCPU 0", "2 threads of this name", "-smp 2"),
        (
            lambda tree: tree.thread(RT, RT + 5, "CPU 2/KVM", "3"),
            "rt: vCPU 2",
            f"one more, thread {RT + 5}",
            "-smp 2",
        ),
        (vcpu(name="CPU 1/TCG"), "rt: accelerator", "KVM, emulated (TCG)", "-accel kvm"),
        (
            lambda tree: (vcpu(name="qemu-system-x86")(tree), tree.remove(f"/proc/{RT}/task/{RT + 3}")),
            "rt: accelerator",
            "no vCPU threads",
            "debug-threads=on",
        ),
        # threads that are no vCPU
        (worker("2"), "rt: thread IO iothread0", "other on CPUs 2", f"taskset -cp 0 {RT + 1}"),
        (worker("0-1"), "rt: thread IO iothread0", "other on CPUs 0-1", f"taskset -cp 0 {RT + 1}"),
        (worker(policy=1, priority=2), "rt: thread IO iothread0", "fifo 2 on CPUs 0", "chrt --other -p 0"),
        (worker(policy=6), "rt: thread IO iothread0", "deadline on CPUs 0", "chrt --other -p 0"),
        (
            lambda tree: tree.thread(1252, 1252, f"vhost-{RT}", "0-7", kernel=True),
            f"rt: thread vhost-{RT}",
            "other on CPUs 0-7 (thread 1252)",
            "taskset -cp 0 1252",
        ),
        (
            lambda tree: tree.thread(1251, 1251, f"kvm-pit/{RT}", "0-7", kernel=True),
            f"rt: thread kvm-pit/{RT}",
            "other on CPUs 0-7 (thread 1251)",
            "taskset -cp 0,4 1251",
        ),
        (
            lambda tree: tree.thread(RT, RT + 2, f"vhost-{RT}", "1"),
            f"rt: thread vhost-{RT}",
            f"other on CPUs 1 (thread {RT + 2})",
            f"taskset -cp 0 {RT + 2}",
        ),
        # processes
        (remove(f"/proc/{RT}"), "rt: process", "not running", "launch script"),
        (
            lambda tree: tree.process(1400, ["/usr/bin/qemu-system-x86_64", "-name", "guest=rt"]),
            "rt: process",
            f"process {RT}, 1400",
            "end all but one",
        ),
        # memory
        (
            lambda tree: memory(tree, RT, locked=0, huge=1_048_576),
            "rt: memory locked",
            "VmLck 0 KiB, HugetlbPages 1048576 KiB",
            "mem-lock=on",
        ),
        (
            lambda tree: memory(tree, RT, locked=309_732, huge=524_288),
            "rt: memory locked",
            "HugetlbPages 524288 KiB",
            "mem-lock=on",
        ),
        (
            # what VFIO pins is in VmLck without being locked by qemu
            lambda tree: memory(tree, RT, locked=1_048_576, huge=1_048_576, loose=71_448),
            "rt: memory locked",
            "71448 KiB not locked",
            "mem-lock=on",
        ),
        (
            lambda tree: memory(tree, PLAIN, locked=100_000, huge=0),
            "plain: memory locked",
            "VmLck 100000 KiB",
            "mem-lock=on",
        ),
        (remove(f"/proc/{RT}/smaps_rollup"), "rt: memory locked", "smaps_rollup is not there", "as root"),
        (
            lambda tree: tree.replace(f"/proc/{RT}/status", "VmLck", "VmPin"),
            "rt: memory locked",
            f"/proc/{RT}/status: no VmLck",
            "as root",
        ),
        (numa(HUGE, HUGE.replace("512", "511")), "rt: memory pages", "1046528 KiB", "hugetlbfs of 2048 KiB"),
        (numa(HUGE, "anon=9 N0=262144 kernelpagesize_kB=4"), "rt: memory pages", "0 KiB", "hugetlbfs"),
        (
            numa(HUGE, "huge dirty=1 N0=1 kernelpagesize_kB=1048576"),
            "rt: memory pages",
            "0 KiB",
            "hugetlbfs of 2048 KiB",
        ),
        (
            numa(HUGE, HUGE.replace("N0=512", "N0=500 N1=12")),
            "rt: memory node",
            "1024000 KiB on node 0, 24576 KiB on node 1",
            "host-nodes=0,policy=bind",
        ),
        (numa("N1=65536", "N1=60000", PLAIN), "plain: memory node", "on node 0", "host-nodes=1"),
        (numa("N1=65536", "N0=65536", PLAIN), "plain: memory node", "262144 KiB on node 0", "host-nodes=1"),
        (remove(f"/proc/{RT}/numa_maps"), "rt: memory", "numa_maps is not there", "as root"),
        (
            numa("N0=512 kernelpagesize_kB", "N0=512 pagesize"),
            "rt: memory",
            "numa_maps: not of its form",
            "root",
        ),
        # interrupts
        (
            lambda tree: tree.interrupt(24, "eno1", "2", "0-7"),
            "interrupts",
            "24 (eno1) on 2; 2 on housekeeping CPUs",
            "echo 0,4 >/proc/irq/NUMBER/smp_affinity_list",
        ),
        (
            # somebody put it there, and can put it elsewhere
            lambda tree: tree.interrupt(24, "eno1", "2", "2"),
            "interrupts",
            "24 (eno1) on 2; 2 on housekeeping CPUs",
            "smp_affinity_list",
        ),
        (
            # the chip says nothing: it may go wherever it is allowed
            lambda tree: tree.interrupt(24, "eno1", "", "0-7"),
            "interrupts",
            "24 (eno1) on 0-7",
            "smp_affinity_list",
        ),
        (
            # the kernel chose an isolated CPU though it had another: isolcpus=managed_irq is not in force
            lambda tree: tree.interrupt(25, "nvme0q1", "2", "0-3", managed=True),
            "interrupts",
            "25 (nvme0q1) on 2",
            "isolcpus=managed_irq",
        ),
        (
            remove("/proc/irq/24/effective_affinity_list"),
            "interrupts",
            "effective_affinity_list is not there",
            "as root",
        ),
        (
            remove("/proc/irq/24/smp_affinity"),
            "interrupts",
            "/proc/irq/24/smp_affinity is not there",
            "as root",
        ),
        (remove("/proc/irq"), "interrupts", "/proc/irq has no interrupts", "as root"),
        # programs
        (
            program("2"),
            "other programs",
            "stress (x) (thread 4242, other, CPUs 2, last on 0)",
            "taskset -cp 0,4",
        ),
        (program("0-7", last=2), "other programs", "CPUs 0-7", "taskset"),
        (program("1-2", last=3), "other programs", "CPUs 1-2", "taskset"),
        (program("0-7", 1, 50), "real-time programs", "fifo 50, CPUs 0-7", "taskset"),
        (program("0-7", 6), "real-time programs", "deadline, CPUs 0-7", "taskset"),
    ],
)
def test_what_does_not_keep_the_plan_fails_with_its_reason(
    tree: Tree, spoil: Spoil, name: str, got: str, remedy: str
) -> None:
    spoil(tree)
    found = tree.audit()
    assert_complete(found)
    failed = [finding for finding in found if finding.failed and finding.name == name]
    assert failed, f"{name} is not among {list(bad(found))}"
    assert got in failed[0].got
    assert remedy in failed[0].remedy
    assert findings.exit_status(found) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        # not above a vCPU's priority, so it delays none; on its own CPUs
        worker(policy=1, priority=1),
        # the kernel has its own threads on any housekeeping CPU, and others have no part in a guest
        lambda tree: tree.thread(1251, 1251, f"kvm-pit/{RT}", "0,4", policy=1, priority=50, kernel=True),
        lambda tree: tree.thread(27, 27, f"irq/27-ahci-{RT}", "7", policy=1, priority=50, kernel=True),
        # memory that VFIO has pinned as well
        lambda tree: memory(tree, RT, locked=1_358_308, huge=1_048_576),
        # the kernel's own thread of that CPU, and what has ended
        program("2", 1, 99, kernel=True),
        program("2", state="Z"),
        # isolated CPUs that no guest has
        program("3"),
        program("7", 1, 10, last=7),
        # the last CPU of an interrupt that was given back
        lambda tree: tree.interrupt(30, "", "6", "0-7"),
        # qemu's words in another program's command line
        lambda tree: tree.process(1400, ["strace", "/usr/bin/qemu-system-x86_64", "-name", "rt"]),
        # another guest of a similar name
        lambda tree: tree.process(1400, ["/usr/bin/qemu-system-x86_64", "-name", "rt2,debug-threads=on"]),
        # a thread that ends while it is looked at
        lambda tree: (tree.root / f"proc/{RT}/task/1299").symlink_to("gone"),
    ],
)
def test_what_does_no_harm_is_left_alone(tree: Tree, spoil: Spoil) -> None:
    spoil(tree)
    found = tree.audit()
    assert bad(found) == {}


def test_queue_interrupts_with_isolated_cpus_alone_are_told_and_counted(tree: Tree) -> None:
    for number in range(40, 47):
        tree.interrupt(number, f"nvme0q{number}", "2", "2-3", managed=True)
    found = tree.audit()
    assert bad(found) == {}
    finding = only(found, "interrupts of queues")
    assert finding.level == findings.WARN
    assert finding.got.startswith("40 (nvme0q40) on 2, 41 (nvme0q41) on 2")
    assert finding.got.endswith("and 2 more")
    assert only(found, "interrupts").got.endswith("7 managed by the kernel")


def test_handlers_are_found_without_sys_kernel_irq(tree: Tree) -> None:
    tree.remove("/sys/kernel/irq")
    (tree.root / "proc/irq/24/eno1").mkdir()
    tree.interrupt(24, "", "2", "0-7")
    tree.remove("/sys/kernel/irq")
    assert "24 (eno1) on 2" in bad(tree.audit())["interrupts"].got


def test_programs_that_are_only_allowed_there_are_told(tree: Tree) -> None:
    program("0-7", last=0)(tree)
    found = tree.audit()
    assert bad(found) == {}
    finding = only(found, "programs allowed there")
    assert (finding.level, finding.got) == (
        findings.WARN,
        "stress (x) (thread 4242, other, CPUs 0-7, last on 0)",
    )


def test_one_guest_alone_can_be_audited(tree: Tree) -> None:
    tree.remove(f"/proc/{PLAIN}")
    assert set(bad(tree.audit())) == {"plain: process"}
    found = tree.audit("rt")
    assert bad(found) == {}
    assert not any(finding.name.startswith("plain") for finding in found)


def test_another_guests_thread_on_a_guests_cpu_is_found_from_both_sides(tree: Tree) -> None:
    tree.thread(PLAIN, PLAIN + 4, "CPU 1/KVM", "2", policy=1, priority=1)
    assert (
        "CPU 1/KVM (thread 1304 of 1300, fifo 1, CPUs 2, last on 2)"
        in bad(tree.audit("rt"))["real-time programs"].got
    )
    assert "plain: vCPU 1" in bad(tree.audit("plain"))


def test_a_thread_that_cannot_be_understood_is_unknown(tree: Tree) -> None:
    tree.write(f"/proc/{RT}/task/{RT + 4}/stat", "1204 (CPU 1/KVM) S 1 2")
    found = tree.audit()
    assert bad(found)["rt"].level == findings.UNKNOWN
    assert bad(found)["rt"].got == f"/proc/{RT}/task/{RT + 4}/stat: not of its form"


def test_mappings_without_pages_are_left_out_and_nonsense_is_refused() -> None:
    text = f"7f00 bind:0 file=/a\\040N3=9 {HUGE}\n7f01 default\n7f02 default stack anon=3 N0=3 kernelpagesize_kB=4"
    assert [(each.huge, each.kib, each.nodes) for each in parse_numa_maps(text)] == [
        (True, 1_048_576, {0: 512}),
        (False, 12, {0: 3}),
    ]
    with pytest.raises(UnreadableError):
        parse_numa_maps("7f00 bind:0 N0=x kernelpagesize_kB=4")
