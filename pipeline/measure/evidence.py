"""Whether latencies were measured on hardware: only when everything says so, and nothing speaks against it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .expectations import HOST
from .record import Machine

HARDWARE, EMULATED = "hardware", "emulated"

#: Words in the name of a CPU that a virtual machine makes up.
MADE_UP = re.compile(r"qemu|kvm|tcg|virtual|bochs|vmware|hyper-?v|xen\b|emulat", re.IGNORECASE)

#: What a CPU calls itself that was made by these: Intel's have the mark, AMD's a number. Those of qemu's models have
#: neither (`AMD EPYC Processor`, `Intel Xeon Processor (Skylake)`).
REAL = re.compile(r"Intel\(R\)|\AAMD [^(]*\d", re.IGNORECASE)


def doubts(host: Machine) -> list[str]:
    """What speaks against a host being hardware; nothing when all is well."""
    found = []
    if host.virtualization != "none":
        found.append(f"systemd-detect-virt says {host.virtualization or 'nothing'}")
    if host.hypervisor:
        found.append("the CPU has the flag hypervisor")
    if MADE_UP.search(host.cpu_model) or not REAL.search(host.cpu_model):
        found.append(f"the CPU calls itself {host.cpu_model!r}")
    if host.clocksource != "tsc":
        found.append(f"the clock source is {host.clocksource or 'not known'}")
    return found


def guest_doubts(guest: Machine) -> list[str]:
    """What speaks against a guest's CPUs being those of its host."""
    return [] if guest.virtualization == "kvm" else [f"systemd-detect-virt says {guest.virtualization!r}"]


def evidence(machines: Mapping[str, Machine | None]) -> tuple[str, list[str]]:
    """HARDWARE or EMULATED for all places together, and why not HARDWARE; in doubt it is EMULATED."""
    found = []
    for place, machine in sorted({HOST: None, **machines}.items()):
        if machine is None:
            found.append(f"{place}: nothing says what it ran on")
        else:
            found += [f"{place}: {each}" for each in (doubts if place == HOST else guest_doubts)(machine)]
    return (EMULATED if found else HARDWARE), found
