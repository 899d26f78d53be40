"""Preflight: is this machine, as it booted, what the plan needs?"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from . import hardware, settings
from .findings import Finding, guarded
from .machine import Machine
from .planfile import Plan

Check = Callable[[Machine, Plan], Iterable[Finding]]

#: All checks in the order in which they are told, by the name of the finding when one cannot be made.
CHECKS: tuple[tuple[str, Check], ...] = (
    ("kernel", settings.kernel),
    ("64-bit", hardware.word_size),
    ("virtualization", hardware.virtualization),
    ("IOMMU", hardware.iommu),
    ("devices", hardware.devices),
    ("CPUs online", hardware.online),
    ("SMT", hardware.smt),
    ("sockets", hardware.sockets),
    ("nodes", hardware.nodes),
    ("turbo", hardware.turbo),
    ("frequency governor", hardware.governor),
    ("C-states", hardware.sleep_states),
    ("clocksource", hardware.clocksource),
    ("microcode", hardware.microcode),
    ("command line", settings.command_line),
    ("isolated CPUs", settings.isolated),
    ("CPUs without tick", settings.tickless),
    ("new interrupts", settings.new_interrupts),
    ("huge pages", settings.hugepages),
    ("sysctls", settings.sysctls),
    ("real-time throttling", settings.throttling),
    ("module parameters", settings.module_parameters),
    ("files", settings.files),
    ("services", settings.services),
    ("choices", settings.choices),
    ("firmware", hardware.firmware),
)


def preflight(machine: Machine, plan: Plan) -> list[Finding]:
    """Everything that preflight has to say."""
    return [finding for name, check in CHECKS for finding in guarded(name, check(machine, plan))]
