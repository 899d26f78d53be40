"""The plan as the tuning installs it: /usr/share/virt-rt/plan.json, read and checked.

Every field is there and of its type, or `PlanFileError` says which is not: a plan that was cut short must
not pass as one that asks for little.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

#: Where the tuning puts it.
PLAN = "/usr/share/virt-rt/plan.json"
SCHEMA = 1
_REINSTALL = "install the tuning of this platform again, or name its plan with --plan FILE"

Made = TypeVar("Made")


class PlanFileError(Exception):
    """There is no usable plan; `hint` is what to do about it."""

    def __init__(self, message: str, hint: str = _REINSTALL) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Vcpu:
    """A vCPU's host CPU, and how its thread is scheduled: `fifo` with a priority, or `other`."""

    number: int
    cpu: int
    policy: str
    priority: int

    @property
    def schedule(self) -> str:
        """Policy and priority, for a reader."""
        return f"{self.policy} {self.priority}" if self.policy == "fifo" else self.policy


@dataclass(frozen=True)
class Guest:
    """A guest: vCPUs, CPUs of its other threads, NUMA node, memory; hugepage_kib is 0 for normal pages."""

    name: str
    vcpus: tuple[Vcpu, ...]
    emulator: tuple[int, ...]
    node: int
    memory_mib: int
    hugepage_kib: int


@dataclass(frozen=True)
class HugePages:
    """So many huge pages of a size (KiB) on a NUMA node."""

    node: int
    size_kib: int
    count: int


@dataclass(frozen=True)
class Device:
    """A passed-through PCI function; with `number` a virtual function of the one at `address`."""

    guest: str
    address: str
    number: int | None


@dataclass(frozen=True)
class Setting:
    """Something that the tuning sets: where, to what, and why.

    absent   why it is fine where the kernel does not have it; empty where that is not
    witness  a path that must then be there for `absent` to hold; empty for none
    """

    name: str
    value: str
    reason: str
    absent: str = ""
    witness: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything that a machine is held against; lists of CPUs are ascending.

    command_line       kernel options, whole
    sysctl             by its name with dots
    module_parameters  by `module/name`
    files              values in /sys and /proc, by path
    masked_services    units, by name; the value is empty
    choices, bios      what was traded for latency, and what the firmware should be set to
    """

    platform: str
    cpus: tuple[int, ...]
    sockets: tuple[tuple[int, ...], ...]
    smt: bool
    housekeeping: tuple[int, ...]
    isolated: tuple[int, ...]
    hugepages: tuple[HugePages, ...]
    guests: tuple[Guest, ...]
    command_line: tuple[Setting, ...]
    sysctl: tuple[Setting, ...]
    module_parameters: tuple[Setting, ...]
    files: tuple[Setting, ...]
    masked_services: tuple[Setting, ...]
    choices: tuple[Setting, ...]
    bios: tuple[Setting, ...]
    devices: tuple[Device, ...]

    def sysctl_value(self, name: str) -> str | None:
        """What the plan sets a sysctl to, None when it does not."""
        return next((each.value for each in self.sysctl if each.name == name), None)


def load(path: Path) -> Plan:
    """Read a plan; raises `PlanFileError`."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise PlanFileError(f"{path} is not there") from None
    except OSError as error:
        raise PlanFileError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PlanFileError(f"{path} is not JSON: {error}") from None
    try:
        return _plan(_Object(data, ""))
    except _WrongError as error:
        raise PlanFileError(f"{path}: {error}") from None


class _WrongError(Exception):
    """Which field is not of its form."""


class _Object:
    """A JSON object whose fields are taken with their type checked."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise _WrongError(f"{where or 'the plan'} is not an object")
        self.data = data
        self.where = where

    def _field(self, key: str, kind: type, what: str) -> Any:
        where = f"{self.where}.{key}".lstrip(".")
        if key not in self.data:
            raise _WrongError(f"{where} is missing")
        value = self.data[key]
        # bool is a kind of int in Python, and never a number in a plan.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise _WrongError(f"{where} is not {what}")
        return value

    def text(self, key: str) -> str:
        return str(self._field(key, str, "text"))

    def flag(self, key: str) -> bool:
        return bool(self._field(key, bool, "true or false"))

    def number(self, key: str) -> int:
        value = int(self._field(key, int, "a number"))
        if value < 0:
            raise _WrongError(f"{self.where}.{key} is negative".lstrip("."))
        return value

    def cpus(self, key: str) -> tuple[int, ...]:
        return _cpus(self._field(key, list, "a list"), f"{self.where}.{key}".lstrip("."))

    def each(self, key: str, make: Callable[[_Object], Made]) -> tuple[Made, ...]:
        where = f"{self.where}.{key}".lstrip(".")
        items = self._field(key, list, "a list")
        return tuple(make(_Object(item, f"{where}[{index}]")) for index, item in enumerate(items))

    def named(self, key: str) -> dict[str, Any]:
        return dict(self._field(key, dict, "an object"))


def _cpus(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(cpu) is int and cpu >= 0 for cpu in value):
        raise _WrongError(f"{where} is not a list of CPU numbers")
    return tuple(sorted(value))


def _plan(data: _Object) -> Plan:
    if data.number("schema") != SCHEMA:
        raise _WrongError(f"its schema is {data.number('schema')}, this tool reads {SCHEMA}")
    sockets = data._field("sockets", list, "a list")
    guests = data.named("guests")
    made = Plan(
        platform=data.text("platform"),
        cpus=data.cpus("cpus"),
        sockets=tuple(_cpus(value, f"sockets[{index}]") for index, value in enumerate(sockets)),
        smt=data.flag("smt"),
        housekeeping=data.cpus("housekeeping"),
        isolated=data.cpus("isolated"),
        hugepages=data.each(
            "hugepages",
            lambda each: HugePages(each.number("node"), each.number("size_kib"), each.number("count")),
        ),
        guests=tuple(_guest(name, _Object(each, f"guests.{name}")) for name, each in sorted(guests.items())),
        command_line=data.each(
            "command_line", lambda each: Setting(each.text("parameter"), "", each.text("reason"))
        ),
        sysctl=data.each("sysctl", lambda each: _setting(each, each.text("name"))),
        module_parameters=data.each(
            "module_parameters",
            lambda each: _setting(each, f"{each.text('module')}/{each.text('name')}"),
        ),
        files=data.each("files", lambda each: _setting(each, each.text("path"))),
        masked_services=data.each(
            "masked_services", lambda each: Setting(each.text("unit"), "", each.text("reason"))
        ),
        choices=data.each(
            "choices", lambda each: Setting(each.text("name"), each.text("trade"), each.text("reason"))
        ),
        bios=data.each("bios", lambda each: _setting(each, each.text("setting"))),
        devices=tuple(_devices(data.named("devices"))),
    )
    if not made.cpus or not made.housekeeping or not made.isolated:
        raise _WrongError("cpus, housekeeping or isolated is empty")
    if sorted((*made.housekeeping, *made.isolated)) != list(made.cpus):
        raise _WrongError("housekeeping and isolated are not together cpus")
    if not made.command_line:
        raise _WrongError("command_line is empty: it would isolate nothing")
    for guest in made.guests:
        if not {*guest.emulator, *(vcpu.cpu for vcpu in guest.vcpus)} <= set(made.cpus):
            raise _WrongError(f"guests.{guest.name} has CPUs that are not among cpus")
    return made


def _setting(each: _Object, name: str) -> Setting:
    absent, witness = (each.text(key) if key in each.data else "" for key in ("absent", "witness"))
    return Setting(name, each.text("value"), each.text("reason"), absent, witness)


def _guest(name: str, data: _Object) -> Guest:
    vcpus = data.each("vcpus", _vcpu)
    if not vcpus or not data.cpus("emulator"):
        raise _WrongError(f"{data.where} has no vcpus, or no emulator CPUs")
    return Guest(
        name=name,
        vcpus=vcpus,
        emulator=data.cpus("emulator"),
        node=data.number("node"),
        memory_mib=data.number("memory_mib"),
        hugepage_kib=data.number("hugepage_kib"),
    )


def _vcpu(data: _Object) -> Vcpu:
    policy = data.text("policy")
    if policy not in ("fifo", "other"):
        raise _WrongError(f"{data.where}.policy is neither fifo nor other")
    return Vcpu(data.number("vcpu"), data.number("cpu"), policy, data.number("priority"))


def _devices(guests: dict[str, Any]) -> list[Device]:
    found = []
    for guest, devices in sorted(guests.items()):
        for device in _Object({guest: devices}, "devices").each(guest, lambda each: each):
            if "physical" in device.data:
                found.append(Device(guest, device.text("physical"), device.number("number")))
            else:
                found.append(Device(guest, device.text("address"), None))
    return found
