"""`virt-rt-check preflight`: each thing that a machine can lack, with the reason that is told."""

from __future__ import annotations

import gzip
import os
import stat
from pathlib import Path

import pytest

from pipeline.hostcheck import findings
from pipeline.hostcheck.findings import Finding
from pipeline.hostcheck.machine import Machine, UnreadableError, cpulist, parse_cpulist, parse_mask
from pipeline.hostcheck.preflight import preflight
from pipeline.hostcheck.settings import split_options
from tests.hostcheck_machine import FLAGS, Spoil, Tree, assert_complete, bad, only

CPU = "/sys/devices/system/cpu"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A machine that keeps its plan."""
    return Tree(tmp_path / "machine")


def flags(remove: str = "", add: str = "") -> Spoil:
    """Other flags for all CPUs."""
    kept = " ".join(flag for flag in FLAGS.split() if flag not in remove.split())
    return lambda tree: tree.replace("/proc/cpuinfo", FLAGS, f"{kept} {add}")


def write(name: str, text: str) -> Spoil:
    return lambda tree: tree.write(name, text)


def replace(name: str, old: str, new: str) -> Spoil:
    return lambda tree: tree.replace(name, old, new)


def remove(*names: str) -> Spoil:
    def spoil(tree: Tree) -> None:
        for name in names:
            tree.remove(name)

    return spoil


def planned(key: str, value: object) -> Spoil:
    def spoil(tree: Tree) -> None:
        tree.data[key] = value

    return spoil


def test_a_machine_that_keeps_its_plan_is_green(tree: Tree) -> None:
    found = tree.preflight()
    assert_complete(found)
    assert bad(found) == {}
    assert findings.exit_status(found) == 0
    # What only a person can see is to be looked at.
    assert [finding.name for finding in found if finding.level != findings.OK] == [
        "firmware: Patrol Scrub",
    ]


@pytest.mark.parametrize(
    ("spoil", "name", "got"),
    [
        # kernel
        (replace("/proc/version", "PREEMPT_RT", "PREEMPT_DYNAMIC"), "kernel", "not PREEMPT_RT"),
        (
            replace("/boot/config-6.12.1-rt1", "CONFIG_PREEMPT_RT=y", "# CONFIG_PREEMPT_RT is not set"),
            "kernel",
            "6.12.1-rt1, PREEMPT_RT, configured without",
        ),
        (remove("/proc/version"), "kernel", "/proc/version is not there"),
        (write("/proc/sys/kernel/arch", "i686"), "64-bit", "i686, a CPU with long mode"),
        (flags("lm"), "64-bit", "x86_64, a CPU without long mode"),
        (remove("/proc/sys/kernel/arch"), "64-bit", "/proc/sys/kernel/arch is not there"),
        # virtualization
        (flags("vmx"), "VT-x/AMD-V", "neither"),
        (remove("/sys/module/kvm_intel"), "KVM", "kvm_intel is not loaded"),
        (remove("/dev/kvm"), "KVM", "/dev/kvm is not there"),
        (
            # a flag counts only when all CPUs have it
            replace(
                "/proc/cpuinfo",
                f"0\nvendor_id\t: GenuineIntel\nmicrocode\t: 0x71a\nflags\t\t: {FLAGS}",
                "0\nflags\t\t: fpu",
            ),
            "VT-x/AMD-V",
            "neither",
        ),
        (flags("constant_tsc"), "invariant TSC", "nonstop_tsc"),
        (flags("nonstop_tsc constant_tsc"), "invariant TSC", "neither"),
        # devices
        (remove("/sys/kernel/iommu_groups"), "VT-d/AMD-Vi", "ACPI table DMAR; 1 units; 0 groups"),
        (
            remove("/sys/firmware/acpi/tables/DMAR", "/sys/class/iommu"),
            "VT-d/AMD-Vi",
            "ACPI table DMAR or IVRS is not there; 0 units; 2 groups",
        ),
        (replace("/proc/interrupts", "IR-", ""), "interrupt remapping", "0 interrupts are remapped"),
        (
            write("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y"),
            "VFIO without IOMMU",
            "on",
        ),
        (write("/dev/vfio/noiommu-0", ""), "VFIO without IOMMU", "on: noiommu-0"),
        (
            lambda tree: (
                tree.remove("/sys/module/vfio"),
                tree.replace("/proc/cmdline", "root=", "vfio.enable-unsafe-noiommu-mode=1 root="),
            ),
            "VFIO without IOMMU",
            "on",
        ),
        (
            write("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y"),
            "VFIO interrupts",
            "allow_unsafe_interrupts is Y",
        ),
        (
            remove("/sys/bus/pci/devices/0000:03:00.0"),
            "device 0000:03:00.0 of rt",
            "there is no such device",
        ),
        (
            remove("/sys/bus/pci/devices/0000:03:00.0/iommu_group"),
            "device 0000:03:00.0 of rt",
            "in no IOMMU group",
        ),
        (
            write("/sys/bus/pci/devices/0000:04:00.0/sriov_totalvfs", "1"),
            "device 0000:04:00.0 of rt",
            "SR-IOV with up to 1",
        ),
        (
            remove("/sys/bus/pci/devices/0000:04:00.0/sriov_totalvfs"),
            "device 0000:04:00.0 of rt",
            "no SR-IOV",
        ),
        # CPUs
        (write(f"{CPU}/online", "0-5"), "CPUs online", "0-5"),
        (write(f"{CPU}/online", "zero"), "CPUs online", "not a CPU list: 'zero'"),
        (write(f"{CPU}/smt/active", "1"), "SMT", "on"),
        (remove(f"{CPU}/smt"), "SMT", f"{CPU}/smt/active is not there"),
        (write(f"{CPU}/cpu1/topology/physical_package_id", "1"), "sockets", "0,2-3; 1,4-7"),
        (write("/sys/devices/system/node/node0/cpulist", "0-1"), "node of rt", "node 0 has 0-1"),
        (write(f"{CPU}/intel_pstate/no_turbo", "0"), "turbo", "on"),
        (
            lambda tree: (tree.remove(f"{CPU}/intel_pstate"), tree.write(f"{CPU}/cpufreq/boost", "1")),
            "turbo",
            "on",
        ),
        (remove(f"{CPU}/intel_pstate"), "turbo", "no frequency driver says whether it is on"),
        (
            write(f"{CPU}/cpufreq/policy3/scaling_governor", "schedutil"),
            "frequency governor",
            "policy3 schedutil",
        ),
        (
            remove(f"{CPU}/cpufreq/policy3/scaling_governor"),
            "frequency governor",
            f"{CPU}/cpufreq/policy3/scaling_governor is not there",
        ),
        (write(f"{CPU}/cpu5/cpuidle/state2/disable", "0"), "C-states", "C6 (104 us) on CPUs 5"),
        (
            remove(f"{CPU}/cpu5/cpuidle"),
            "C-states",
            "cpu5/cpuidle has no states, though intel_idle is in use",
        ),
        (
            write("/sys/devices/system/clocksource/clocksource0/current_clocksource", "hpet"),
            "clocksource",
            "hpet",
        ),
        (
            replace(
                "/proc/cpuinfo",
                "processor\t: 3\nvendor_id\t: GenuineIntel\nmicrocode\t: 0x71a",
                "processor\t: 3",
            ),
            "microcode",
            "CPUs 3 name no revision",
        ),
        (
            replace(
                "/proc/cpuinfo",
                "processor\t: 3\nvendor_id\t: GenuineIntel\nmicrocode\t: 0x71a",
                "processor\t: 3\nmicrocode\t: 0x710",
            ),
            "microcode",
            "0x710 on CPUs 3; 0x71a on CPUs 0-2,4-7",
        ),
        # command line and isolation
        (
            replace("/proc/cmdline", "nohz_full=1-3,5-7 ", ""),
            "command line",
            "missing: nohz_full=1-3,5-7",
        ),
        (
            replace("/proc/cmdline", " -- single", " nohz_full=1-3"),
            "command line",
            "contradicted: nohz_full=1-3",
        ),
        (
            # the kernel takes the first isolation, so that a wrong one before the right one counts, too
            replace("/proc/cmdline", "isolcpus=", "isolcpus=2 isolcpus="),
            "command line",
            "contradicted: isolcpus=2",
        ),
        (
            # what the plan does not ask for, and would lose its guests' timers
            replace("/proc/cmdline", "isolcpus=", "highres=off isolcpus="),
            "command line",
            "contradicted: highres=off",
        ),
        (
            replace("/proc/cmdline", "nosoftlockup", "-- nosoftlockup"),
            "command line",
            "missing: nosoftlockup processor.max_cstate=1 hugepagesz=2M hugepages=512",
        ),
        (write(f"{CPU}/isolated", "1-3"), "isolated CPUs", "1-3"),
        (write(f"{CPU}/nohz_full", "(null)"), "CPUs without tick", "none"),
        (remove(f"{CPU}/nohz_full"), "CPUs without tick", f"{CPU}/nohz_full is not there"),
        (write("/proc/irq/default_smp_affinity", "ff"), "new interrupts", "on CPUs 0-7"),
        # settings
        (
            write("/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages", "511"),
            "huge pages of 2048 KiB, node 0",
            "511",
        ),
        (
            remove("/sys/devices/system/node/node0/hugepages"),
            "huge pages of 2048 KiB, node 0",
            "nr_hugepages is not there",
        ),
        (
            write("/proc/sys/kernel/sched_rt_runtime_us", "940000"),
            "sysctl kernel.sched_rt_runtime_us",
            "940000",
        ),
        (write("/proc/sys/kernel/sched_rt_runtime_us", "-1"), "real-time throttling", "off: a real-time"),
        (
            write("/proc/sys/kernel/sched_rt_runtime_us", "500000"),
            "real-time throttling",
            "500000 of 1000000",
        ),
        (write("/proc/sys/kernel/sched_rt_runtime_us", ""), "real-time throttling", "not a number: ''"),
        (write("/sys/module/kvm/parameters/halt_poll_ns", "200000"), "module kvm.halt_poll_ns", "200000"),
        (
            write("/sys/module/kvm/parameters/kvmclock_periodic_sync", "Y"),
            "module kvm.kvmclock_periodic_sync",
            "Y",
        ),
        (remove("/sys/module/kvm"), "module kvm.halt_poll_ns", "kvm is not loaded"),
        (
            remove("/sys/module/kvm/parameters/halt_poll_ns"),
            "module kvm.halt_poll_ns",
            "/sys/module/kvm/parameters/halt_poll_ns is not there",
        ),
        (
            write("/sys/devices/virtual/workqueue/cpumask", "ff"),
            "/sys/devices/virtual/workqueue/cpumask",
            "ff",
        ),
        (
            remove("/sys/devices/virtual/workqueue/cpumask"),
            "/sys/devices/virtual/workqueue/cpumask",
            "is not there",
        ),
        (
            write("/sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never"),
            "/sys/kernel/mm/transparent_hugepage/enabled",
            "[always] madvise never",
        ),
        (
            write("/usr/lib/systemd/system/ksm.service", "[Service]"),
            "service ksm.service",
            "installed in /usr/lib/systemd/system, and not masked",
        ),
        (
            lambda tree: (tree.root / "etc/systemd/system/ksm.service").symlink_to("/usr/local/ksm.service"),
            "service ksm.service",
            "installed in /etc/systemd/system, and not masked",
        ),
    ],
)
def test_what_is_not_as_planned_fails_with_its_reason(tree: Tree, spoil: Spoil, name: str, got: str) -> None:
    spoil(tree)
    found = tree.preflight()
    assert_complete(found)
    assert name in bad(found)
    assert got in bad(found)[name].got
    assert findings.exit_status(found) == 1


@pytest.mark.parametrize(
    ("spoil", "name", "got"),
    [
        (remove("/boot/config-6.12.1-rt1"), "kernel", "its configuration cannot be read"),
        (
            planned(
                "module_parameters",
                [{"module": "kvm", "name": "kvmclock_periodic_sync", "value": "0", "reason": ""}],
            ),
            "module kvm.kvmclock_periodic_sync",
            "N",
        ),
        (flags("ida"), "turbo", "the CPU offers none"),
        (write(f"{CPU}/cpuidle/current_driver", "none"), "C-states", "CPUs halt (C1) or poll"),
        (
            replace("/proc/cmdline", "nosoftlockup", "nosoftlockup nosoftlockup"),
            "command line",
            "all 6 options",
        ),
        (remove("/sys/module/vfio"), "VFIO without IOMMU", "off"),
        (write(f"{CPU}/cpu0/cpuidle/state2/disable", "0"), "C-states", "intel_idle: C1 POLL"),
        (flags("", "hypervisor"), "turbo", "off"),
        (write("/etc/systemd/system/ksm.service", "x"), "service irqbalance.service", "masked"),
    ],
)
def test_what_is_as_planned_in_another_way_is_fine(tree: Tree, spoil: Spoil, name: str, got: str) -> None:
    spoil(tree)
    finding = only(tree.preflight(), name)
    assert finding.level == findings.OK
    assert got in finding.got


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("turbo", remove(f"{CPU}/intel_pstate")),
        ("frequency governor", remove(f"{CPU}/cpufreq")),
        ("C-states", remove(f"{CPU}/cpuidle")),
        ("microcode", replace("/proc/cpuinfo", "microcode\t: 0x71a\n", "")),
        ("SMT", remove(f"{CPU}/smt")),
    ],
)
def test_what_a_virtual_machine_has_not_is_said_and_never_fine(tree: Tree, name: str, spoil: Spoil) -> None:
    flags("", "hypervisor")(tree)
    spoil(tree)
    found = tree.preflight()
    finding = only(found, name)
    assert finding.level == findings.WARN
    assert finding.got.startswith("not offered here (virtual machine)")
    assert bad(found) == {}


def test_without_frequency_driver_the_firmware_decides(tree: Tree) -> None:
    remove(f"{CPU}/cpufreq")(tree)
    finding = only(tree.preflight(), "frequency governor")
    assert (finding.level, finding.failed) == (findings.WARN, False)
    assert "the firmware may" in finding.got


def test_an_iommu_is_wanted_only_for_guests_with_devices(tree: Tree) -> None:
    remove("/sys/kernel/iommu_groups", "/sys/class/iommu")(tree)
    replace("/proc/interrupts", "IR-", "")(tree)
    assert set(bad(tree.preflight())) == {
        "VT-d/AMD-Vi",
        "interrupt remapping",
        "device 0000:03:00.0 of rt",
    }
    planned("devices", {})(tree)
    found = tree.preflight()
    assert bad(found) == {}
    assert only(found, "VT-d/AMD-Vi").level == findings.WARN
    assert "no guest of the plan is given a device" in only(found, "interrupt remapping").got


def test_the_order_of_options_that_belong_together_counts(tree: Tree) -> None:
    sizes = "hugepagesz=1G hugepages=2 hugepagesz=2M hugepages=512"
    planned("command_line", [{"parameter": sizes, "reason": "both sizes"}])(tree)
    replace("/proc/cmdline", "hugepagesz=2M hugepages=512", sizes)(tree)
    assert only(tree.preflight(), "command line").level == findings.OK
    replace("/proc/cmdline", sizes, "hugepagesz=1G hugepages=512 hugepagesz=2M hugepages=2")(tree)
    assert only(tree.preflight(), "command line").got == "contradicted: hugepages in another order"


def test_the_configuration_in_proc_is_read_first(tree: Tree) -> None:
    packed = tree.write("/proc/config.gz", "")
    packed.write_bytes(gzip.compress(b"# CONFIG_PREEMPT_RT is not set\n"))
    assert "configured without" in bad(tree.preflight())["kernel"].got
    packed.write_bytes(gzip.compress(b"CONFIG_PREEMPT_RT=y\n")[:-9])
    assert bad(tree.preflight())["kernel"].level == findings.UNKNOWN


def test_what_a_kernel_may_lack_is_fine_when_its_witness_is_there(tree: Tree) -> None:
    server = "/sys/kernel/debug/sched/fair_server/cpu1/runtime"
    setting = {"path": server, "value": "0", "reason": "as chosen", "absent": "the kernel is older"}
    planned("files", [setting])(tree)
    assert only(tree.preflight(), server).got == "not there: the kernel is older"
    planned("files", [{**setting, "witness": "/sys/kernel/debug/sched"}])(tree)
    assert bad(tree.preflight())[server].level == findings.UNKNOWN  # debugfs may be hidden
    tree.write("/sys/kernel/debug/sched/features", "")
    assert only(tree.preflight(), server).level == findings.OK
    write(server, "50000000")(tree)
    assert bad(tree.preflight())[server].got == "50000000"


def test_the_module_of_another_make_is_not_wanted_and_that_of_this_cpu_always(tree: Tree) -> None:
    vendors = [
        {"module": module, "name": "x", "value": "0", "reason": "", "absent": "the module is for others"}
        for module in ("kvm_intel", "kvm_amd")
    ]
    ksm = {"module": "ksm", "name": "x", "value": "0", "reason": "", "absent": "the kernel has none"}
    planned("module_parameters", [*vendors, ksm])(tree)
    write("/sys/module/kvm_intel/parameters/x", "0")(tree)
    found = tree.preflight()
    assert bad(found) == {}
    assert only(found, "module kvm_amd.x").got == "kvm_amd is for CPUs of another make"
    assert only(found, "module ksm.x").got == "not there: the kernel has none"
    tree.remove("/sys/module/kvm_intel/parameters/x")
    assert "module kvm_intel.x" in bad(tree.preflight())
    tree.remove("/sys/module/kvm_intel")
    assert bad(tree.preflight())["module kvm_intel.x"].got == "kvm_intel is not loaded"


def test_throttling_that_was_chosen_to_be_off_is_told_again(tree: Tree) -> None:
    planned("sysctl", [{"name": "kernel.sched_rt_runtime_us", "value": "-1", "reason": "chosen"}])(tree)
    found = bad(tree.preflight())
    assert found["real-time throttling"].wanted == "off, as chosen"
    assert found["real-time throttling"].remedy == "sysctl -w kernel.sched_rt_runtime_us=-1"
    write("/proc/sys/kernel/sched_rt_runtime_us", "-1")(tree)
    finding = only(tree.preflight(), "real-time throttling")
    assert (finding.level, finding.failed) == (findings.WARN, False)


def test_a_plan_without_throttling_is_held_against_the_kernels_own_share(tree: Tree) -> None:
    planned("sysctl", [])(tree)
    assert only(tree.preflight(), "real-time throttling").level == findings.OK
    write("/proc/sys/kernel/sched_rt_runtime_us", "900000")(tree)
    assert "real-time throttling" in bad(tree.preflight())


def test_choices_that_trade_safety_are_told_every_time(tree: Tree) -> None:
    choice = {"name": "mitigations-off", "trade": "guests may read the host's memory", "reason": "3 us less"}
    planned("choices", [choice])(tree)
    found = tree.preflight()
    finding = only(found, "choice: mitigations-off")
    assert (finding.level, finding.got) == (findings.WARN, "guests may read the host's memory (3 us less)")
    assert findings.exit_status(found) == 0


def test_a_file_that_may_not_be_read_is_unknown_and_hides_no_other(tree: Tree) -> None:
    """A directory where a file should be stands for what cannot be read: root may read everything else."""
    tree.remove("/proc/sys/kernel/sched_rt_runtime_us")
    tree.write("/proc/sys/kernel/sched_rt_runtime_us/x", "")
    entries = [
        *tree.data["sysctl"],
        {"name": "net.ipv4.conf.eth0/1.rp_filter", "value": "1 ", "reason": "dots"},
    ]
    planned("sysctl", entries)(tree)
    write("/proc/sys/net/ipv4/conf/eth0.1/rp_filter", "1")(tree)
    found = tree.preflight()
    assert set(bad(found)) == {"sysctl kernel.sched_rt_runtime_us", "real-time throttling"}
    assert all(finding.level == findings.UNKNOWN for finding in bad(found).values())
    assert "Is a directory" in bad(found)["real-time throttling"].got
    assert only(found, "sysctl net.ipv4.conf.eth0/1.rp_filter").level == findings.OK


# Services as systemd has them ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "active", "got", "good"),
    [
        ("masked", "inactive", "masked", True),
        ("not-found", "inactive", "not installed", True),
        ("masked", "active", "active, though masked", False),
        ("loaded", "active", "active", False),
        ("loaded", "inactive", "inactive, but not masked", False),
        ("loaded", "failed", "failed, but not masked", False),
        ("", "", "systemctl show: no state of irqbalance.service", False),
    ],
)
def test_a_running_systemd_is_asked(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, load: str, active: str, got: str, good: bool
) -> None:
    answer = f"Id=irqbalance.service\\nLoadState={load}\\nActiveState={active}"
    rest = "Id=ksm.service\\nLoadState=masked\\nActiveState=inactive"
    program = tree.write("/usr/bin/systemctl", f"#!/bin/sh\nprintf '%b\\n\\n%b\\n' '{answer}' '{rest}'")
    program.chmod(0o755)
    tree.write("/run/systemd/system/x", "")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    found = [
        finding
        for finding in preflight(Machine(tree.root, live=True), tree.plan())
        if finding.name.startswith("service") and "ksm" not in finding.name
    ]
    assert_complete(found)
    assert got in found[0].got
    assert found[0].failed is not good


def test_a_live_dev_kvm_must_make_a_virtual_machine(tree: Tree) -> None:
    assert stat.S_ISREG((tree.root / "dev/kvm").stat().st_mode)
    finding = only(preflight(Machine(tree.root, live=True), tree.plan()), "KVM")
    assert finding.failed
    assert "makes no virtual machine" in finding.got


# The parts -------------------------------------------------------------------------------------


def test_options_are_split_as_the_kernel_splits_them() -> None:
    assert split_options('a  b="x y" "c=1 2"\td -- e') == ["a", "b=x y", "c=1 2", "d"]
    assert split_options("") == []


def test_cpu_lists_and_masks_are_read_or_refused() -> None:
    assert parse_cpulist("0,2-3\n") == (0, 2, 3)
    assert parse_cpulist("") == parse_cpulist("(null)") == ()
    assert cpulist((3, 2, 0)) == "0,2-3"
    assert cpulist(()) == "none"
    assert parse_mask("00000001,00000003") == (0, 1, 32)
    for text in ("3-1", "1-", "a", "1,,2", "0-99999999"):
        with pytest.raises(UnreadableError):
            parse_cpulist(text)
    with pytest.raises(UnreadableError):
        parse_mask("")


def test_what_may_not_be_seen_is_not_taken_for_absent(tmp_path: Path) -> None:
    """A name that is too long stands for whatever keeps a path from being looked at."""
    machine = Machine(tmp_path)
    assert machine.exists("/") and not machine.exists("/gone")
    hidden = "/" + "x" * 300
    for look in (machine.exists, machine.optional, machine.text, machine.names):
        with pytest.raises(UnreadableError, match="File name too long"):
            look(hidden)


def test_the_table_is_aligned_and_says_what_to_do() -> None:
    found = [
        findings.ok("a", "fine"),
        findings.fail("longer name", "1", "2", "mend it"),
        findings.unknown("b", "to be read", "gone", "look for it"),
        Finding("c", findings.UNKNOWN, "on", "?", "look", advice=True),
        findings.warn("d", "", "so so"),
    ]
    assert findings.table(found).splitlines() == [
        "ok       a            fine",
        "FAIL     longer name  2",
        "                      wanted: 1",
        "                      do: mend it",
        "UNKNOWN  b            gone",
        "                      wanted: to be read",
        "                      do: look for it",
        "look     c            ?",
        "                      wanted: on",
        "                      do: look",
        "warn     d            so so",
        "1 ok, 1 to know, 1 to look at, 1 failed, 1 unknown",
    ]
    assert "\033[31mFAIL   \033[0m  longer name  2" in findings.table(found, colour=True)
    assert findings.exit_status(found) == 1


def test_unknown_fails_unless_it_is_advice_and_nothing_found_fails() -> None:
    assert findings.exit_status([Finding("c", findings.UNKNOWN, "on", "?", "look", advice=True)]) == 0
    assert findings.exit_status([findings.unknown("c", "on", "?", "look")]) == 1
    assert findings.exit_status([]) == 1


def test_the_kernel_that_runs_is_the_one_that_is_meant(tree: Tree) -> None:
    """Another one with PREEMPT_RT is not what the host was proven with."""
    tree.write("/usr/share/virt-rt/kernel", "6.12.1-rt1")
    found = only(tree.preflight(), "kernel")
    assert not found.failed and found.wanted == "6.12.1-rt1, PREEMPT_RT"
    tree.write("/usr/share/virt-rt/kernel", "6.12.1-rt1-0123456789ab")
    found = only(tree.preflight(), "kernel")
    assert found.level == findings.FAIL
    assert found.got.startswith("6.12.1-rt1, PREEMPT_RT") and found.wanted.startswith(
        "6.12.1-rt1-0123456789ab,"
    )
    assert found.remedy.startswith("boot 6.12.1-rt1-0123456789ab; ")
