"""What the machine itself must offer: virtualization, an IOMMU, CPUs as in the plan, and CPUs that stay awake.

Each check is a generator of findings over a machine and a plan. In a virtual machine much of this belongs
to somebody else: what is not offered there is said, and never called fine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from . import findings
from .findings import Finding
from .machine import Machine, UnreadableError, cpulist, parse_cpulist
from .planfile import Plan

#: A sleep state from which waking takes this long, in microseconds, is too deep for a real-time CPU: it is
#: half of what a wake-up may take in all on a tuned host (20 us). Intel's C1 takes 1 or 2, C1E 10 before Ice
#: Lake, C3 and C6 from 30 to 200 (drivers/idle/intel_idle.c).
MAX_EXIT_US = 10
#: KVM_GET_API_VERSION and KVM_CREATE_VM (include/uapi/linux/kvm.h); the version has been 12 since 2007.
_KVM_GET_API_VERSION, _KVM_CREATE_VM, _KVM_API = 0xAE00, 0xAE01, 12
_CPU = "/sys/devices/system/cpu"
_RECORD = "make the plan from this machine: `doit topology` records it"
_PCI = "/sys/bus/pci/devices"
_NOIOMMU = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"


def _not_offered(machine: Machine, name: str, wanted: str, what: str, remedy: str) -> Finding:
    """The finding on something that is not there: in a virtual machine that is known, elsewhere it is not."""
    if machine.virtual:
        return findings.warn(
            name, wanted, f"not offered here (virtual machine): {what}", "see to it on the physical machine"
        )
    return findings.unknown(name, wanted, what, remedy)


def word_size(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """64-bit CPU and kernel."""
    arch = machine.optional("/proc/sys/kernel/arch")  # since Linux 6.1
    if arch is None:
        if not machine.live:
            raise UnreadableError("/proc/sys/kernel/arch is not there")
        arch = os.uname().machine
    got = f"{arch}, a CPU {'with' if 'lm' in machine.flags else 'without'} long mode"
    good = arch == "x86_64" and "lm" in machine.flags
    yield findings.judge("64-bit", good, "x86_64", got, "install a 64-bit kernel on a 64-bit CPU")


def virtualization(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """VT-x or AMD-V, the KVM module of that kind, and a /dev/kvm that answers."""
    found = [name for flag, name in (("vmx", "VT-x"), ("svm", "AMD-V")) if flag in machine.flags]
    yield findings.judge(
        "VT-x/AMD-V",
        bool(found),
        "vmx or svm among the CPU's flags",
        " ".join(found) or "neither",
        "enable nested virtualization on the physical machine"
        if machine.virtual
        else "enable Intel Virtualization Technology (VT-x) or SVM in the firmware",
    )
    module = {"VT-x": "kvm_intel", "AMD-V": "kvm_amd"}[found[0]] if found else "kvm_intel or kvm_amd"
    loaded = any(machine.exists(f"/sys/module/{each}") for each in module.split(" or "))
    device = machine.exists("/dev/kvm")
    got = f"{module} is {'' if loaded else 'not '}loaded, /dev/kvm is {'' if device else 'not '}there"
    good = loaded and device
    if device and machine.live:
        trouble = _try_kvm(machine)
        good, got = good and not trouble, f"{got}, {trouble or 'and makes virtual machines'}"
    remedy = (
        f"modprobe {module.split()[0] if found else 'the one of your CPU'}; where that fails, dmesg says why"
    )
    yield findings.judge("KVM", good, f"{module} loaded, /dev/kvm usable", got, remedy)
    clock = {"constant_tsc", "nonstop_tsc"}
    yield findings.judge(
        "invariant TSC",
        clock <= machine.flags,
        "constant_tsc and nonstop_tsc: KVM refuses to run on a real-time kernel without",
        " ".join(sorted(clock & machine.flags)) or "neither constant_tsc nor nonstop_tsc",
        "give the virtual machine an invariant TSC (qemu: -cpu ...,+invtsc)"
        if machine.virtual
        else "take a CPU whose clock runs at one rate in all states",
    )


def _try_kvm(machine: Machine) -> str:
    """What keeps KVM from making a virtual machine; empty for nothing. The device alone proves little."""
    import fcntl

    try:
        kvm = os.open(machine.path("/dev/kvm"), os.O_RDWR | os.O_CLOEXEC)
        try:
            version = fcntl.ioctl(kvm, _KVM_GET_API_VERSION, 0)
            if version != _KVM_API:
                return f"but speaks version {version} of its interface, not {_KVM_API}"
            os.close(fcntl.ioctl(kvm, _KVM_CREATE_VM, 0))
        finally:
            os.close(kvm)
    except OSError as error:
        return f"but makes no virtual machine: {error.strerror}"
    return ""


def iommu(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """VT-d or AMD-Vi with interrupt remapping, and VFIO that insists on them.

    Without guests that are given devices, an IOMMU is not needed and its absence only said.
    """
    needed = bool(plan.devices)
    groups = len(machine.numbered("/sys/kernel/iommu_groups"))
    units = machine.names("/sys/class/iommu")
    tables = [name for name in ("DMAR", "IVRS") if machine.exists(f"/sys/firmware/acpi/tables/{name}")]
    got = f"ACPI table {' '.join(tables) or 'DMAR or IVRS is not there'}; {len(units)} units; {groups} groups"
    remedy = (
        "enable VT-d or AMD-Vi (IOMMU) in the firmware"
        if not tables
        else "boot with intel_iommu=on (Intel), or without amd_iommu=off (AMD)"
    )
    yield _needed(needed, "VT-d/AMD-Vi", bool(groups and units), "IOMMU groups", got, remedy)
    # Interrupt chips behind a remapping unit are named so, Intel's and AMD's: IR-PCI-MSIX-..., IR-IO-APIC.
    chips = [line for line in machine.text("/proc/interrupts").splitlines() if " IR-" in line]
    yield _needed(
        needed,
        "interrupt remapping",
        bool(chips),
        "interrupt chips named IR-*",
        f"{len(chips)} interrupts are remapped",
        "enable VT-d interrupt remapping in the firmware, and boot without intremap=off",
    )
    yield from _strict_vfio(machine)


def _needed(needed: bool, name: str, good: bool, wanted: str, got: str, remedy: str) -> Finding:
    if good or needed:
        return findings.judge(name, good, wanted, got, remedy)
    return findings.warn(name, wanted, f"{got} (no guest of the plan is given a device)", remedy)


def _strict_vfio(machine: Machine) -> Iterator[Finding]:
    name, wanted = "VFIO without IOMMU", "off: a device could write to all memory"
    mode = machine.optional(_NOIOMMU)
    nodes = [each for each in machine.names("/dev/vfio") if each.startswith("noiommu-")]
    options = machine.text("/proc/cmdline").replace("-", "_").split()
    asked = [each for each in options if each.startswith("vfio.enable_unsafe_noiommu_mode=")]
    on = mode not in (None, "N", "0") or bool(nodes)
    if on or (asked and asked[-1].partition("=")[2].lower() not in ("0", "n", "off")):
        got = f"on{': ' + ' '.join(nodes) if nodes else ''}"
    else:
        got = (
            "off"
            if mode is not None
            else "off (this kernel's VFIO, as far as it is loaded, has no such mode)"
        )
    yield findings.judge(
        name, got.startswith("off"), wanted, got, f"echo N >{_NOIOMMU}, and take it out of /etc/modprobe.d"
    )
    unsafe = machine.optional("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")
    if unsafe not in (None, "N", "0"):
        yield findings.fail(
            "VFIO interrupts",
            "remapped: else a device can raise any interrupt of the host",
            f"allow_unsafe_interrupts is {unsafe}",
            "take vfio_iommu_type1.allow_unsafe_interrupts out of the command line and /etc/modprobe.d",
        )


def devices(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Each device that the plan passes through: there, in an IOMMU group, with enough virtual functions."""
    for device in plan.devices:
        name = f"device {device.address} of {device.guest}"
        directory = f"{_PCI}/{device.address}"
        if not machine.exists(directory):
            yield findings.fail(
                name, "there", "there is no such device", "look for it with lspci -D, and mend the recipe"
            )
            continue
        if device.number is None:
            group = machine.exists(f"{directory}/iommu_group")
            got = "in an IOMMU group" if group else "in no IOMMU group"
            yield findings.judge(name, group, "in an IOMMU group", got, "see VT-d/AMD-Vi")
            continue
        wanted = f"SR-IOV with {device.number + 1} virtual functions or more"
        if machine.optional(f"{directory}/sriov_totalvfs") is None:
            remedy = "enable SR-IOV in the firmware and in the device's own setup, or take another device"
            yield findings.fail(name, wanted, "no SR-IOV", remedy)
            continue
        total = machine.number(f"{directory}/sriov_totalvfs")
        yield findings.judge(
            name,
            total > device.number,
            wanted,
            f"SR-IOV with up to {total}",
            "name a lower virtual function, or raise their number in the device's own setup",
        )


def online(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """The CPUs online are the plan's: numbers mean nothing on another machine."""
    found = parse_cpulist(machine.text(f"{_CPU}/online"))
    yield findings.judge(
        "CPUs online",
        found == plan.cpus,
        cpulist(plan.cpus),
        cpulist(found),
        f"bring them online in the firmware and under {_CPU}, or {_RECORD}",
    )


def smt(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Hyperthreading as the plan has it."""
    active = machine.optional(f"{_CPU}/smt/active")
    if active is None:
        yield _not_offered(machine, "SMT", "known", f"{_CPU}/smt/active is not there", _RECORD)
    else:
        yield findings.judge(
            "SMT",
            (active == "1") == plan.smt,
            "on" if plan.smt else "off",
            "on" if active == "1" else "off",
            f"switch it {'on' if plan.smt else 'off'} in the firmware, or {_RECORD}",
        )


def sockets(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """The same CPUs on each socket; many boards number them in turns."""
    packages: dict[int, list[int]] = {}
    for cpu in parse_cpulist(machine.text(f"{_CPU}/online")):
        package = machine.number(f"{_CPU}/cpu{cpu}/topology/physical_package_id")
        packages.setdefault(package, []).append(cpu)
    yield findings.judge(
        "sockets",
        sorted(map(tuple, packages.values())) == sorted(plan.sockets),
        "; ".join(map(cpulist, sorted(plan.sockets))),
        "; ".join(map(cpulist, sorted(packages.values()))),
        _RECORD,
    )


def nodes(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """The CPUs of each guest on the node of its memory."""
    for guest in plan.guests:
        near = parse_cpulist(machine.text(f"/sys/devices/system/node/node{guest.node}/cpulist"))
        pins = [vcpu.cpu for vcpu in guest.vcpus]
        yield findings.judge(
            f"node of {guest.name}",
            set(pins) <= set(near),
            f"CPUs {cpulist(pins)} on node {guest.node}",
            f"node {guest.node} has {cpulist(near)}",
            _RECORD,
        )


def turbo(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Turbo or boost off. Firmware that switches it off takes the flag from the CPU, too."""
    name, wanted = "turbo", "off"
    no_turbo = machine.optional(f"{_CPU}/intel_pstate/no_turbo")
    boost = machine.optional(f"{_CPU}/cpufreq/boost")
    if not {"ida", "cpb"} & machine.flags:
        if machine.virtual:
            yield _not_offered(machine, name, wanted, "the virtual CPU has neither ida nor cpb", "")
        else:
            yield findings.ok(name, "the CPU offers none (neither ida nor cpb)", wanted)
    elif no_turbo is not None:
        got = "off" if no_turbo == "1" else "on"
        remedy = f"echo 1 >{_CPU}/intel_pstate/no_turbo, or switch it off in the firmware"
        yield findings.judge(name, no_turbo == "1", wanted, got, remedy)
    elif boost is not None:
        got = "off" if boost == "0" else "on"
        remedy = f"echo 0 >{_CPU}/cpufreq/boost, or switch it off in the firmware"
        yield findings.judge(name, boost == "0", wanted, got, remedy)
    else:
        what = "the CPU offers it, and no frequency driver says whether it is on"
        yield _not_offered(machine, name, wanted, what, "switch it off in the firmware: the flag then goes")


def governor(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Every frequency policy runs at the highest clock."""
    name, wanted = "frequency governor", "performance"
    policies = machine.numbered(f"{_CPU}/cpufreq", "policy")
    if not policies:
        what = "no frequency driver"
        if machine.virtual:
            yield _not_offered(machine, name, wanted, what, "")
        else:
            yield findings.warn(
                name,
                wanted,
                f"{what}: the kernel never changes the clock, and the firmware may",
                "switch SpeedStep, Cool'n'Quiet and power saving off in the firmware",
            )
        return
    found = {number: machine.text(f"{_CPU}/cpufreq/policy{number}/scaling_governor") for number in policies}
    wrong = [f"policy{number} {value}" for number, value in found.items() if value != wanted]
    remedy = f"echo performance | tee {_CPU}/cpufreq/policy*/scaling_governor"
    got = ", ".join(wrong) or f"performance, {len(found)} policies"
    yield findings.judge(name, not wrong, wanted, got, remedy)


def sleep_states(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """No isolated CPU may fall into a sleep from which it wakes slowly."""
    name, wanted = "C-states", f"none on isolated CPUs that takes {MAX_EXIT_US} us or more to leave"
    driver = machine.optional(f"{_CPU}/cpuidle/current_driver")
    if driver in (None, "none"):
        if machine.virtual:
            yield _not_offered(machine, name, wanted, "no idle driver, its host decides", "")
        else:
            yield findings.ok(name, "no idle driver: CPUs halt (C1) or poll", wanted)
        return
    deep: dict[str, list[int]] = {}
    allowed: set[str] = set()
    for cpu in plan.isolated:
        states = machine.numbered(f"{_CPU}/cpu{cpu}/cpuidle", "state")
        if not states:
            raise UnreadableError(f"{_CPU}/cpu{cpu}/cpuidle has no states, though {driver} is in use")
        for state in states:
            directory = f"{_CPU}/cpu{cpu}/cpuidle/state{state}"
            if machine.number(f"{directory}/disable"):
                continue
            label = machine.text(f"{directory}/name")
            exit_us = machine.number(f"{directory}/latency")
            if exit_us >= MAX_EXIT_US:
                deep.setdefault(f"{label} ({exit_us} us)", []).append(cpu)
            else:
                allowed.add(label)
    got = "; ".join(f"{label} on CPUs {cpulist(found)}" for label, found in deep.items())
    remedy = "boot with intel_idle.max_cstate=1 processor.max_cstate=1, and disable C-states in the firmware"
    yield findings.judge(name, not deep, wanted, got or f"{driver}: {' '.join(sorted(allowed))}", remedy)


def clocksource(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Time is read from the TSC; any other clock takes a microsecond, and some take a lock."""
    directory = "/sys/devices/system/clocksource/clocksource0"
    got = machine.text(f"{directory}/current_clocksource")
    remedy = "boot with tsc=reliable; dmesg says why the TSC was found unstable"
    yield findings.judge("clocksource", got == "tsc", "tsc", got, remedy)


def microcode(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """A microcode revision that is known, and the same on all CPUs."""
    name, wanted = "microcode", "one revision on all CPUs"
    found: dict[str, list[int]] = {}
    for each in machine.cpuinfo:
        found.setdefault(each.get("microcode", ""), []).append(int(each["processor"]))
    if "" in found:
        what = f"CPUs {cpulist(found[''])} name no revision"
        yield _not_offered(machine, name, wanted, what, "install intel-microcode or amd64-microcode")
        return
    got = "; ".join(f"{revision} on CPUs {cpulist(cpus)}" for revision, cpus in sorted(found.items()))
    remedy = "install intel-microcode or amd64-microcode, and boot again"
    yield findings.judge(name, len(found) == 1, wanted, got, remedy)


def firmware(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """The firmware's settings, which no program can read: a person has to look."""
    for each in plan.bios:
        yield Finding(
            f"firmware: {each.name}",
            findings.UNKNOWN,
            each.value,
            "cannot be read from here",
            f"look in the firmware's setup: {each.reason}",
            advice=True,
        )
