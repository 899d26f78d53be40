"""What a place says of itself: `machine.json`, and the clocks."""

from __future__ import annotations

import gzip
import hashlib
import os
import platform
import subprocess
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

from . import record
from .problems import MeasureError

#: The host's plan as installed.
PLAN = "usr/share/virt-rt/plan.json"
#: Said where nothing can tell.
UNKNOWN = "unknown"


def parse_cpulist(text: str) -> list[int]:
    """CPU numbers, ascending, of the kernel's lists (`0,2-3`); raises `ValueError`. `(null)` is none."""
    cpus: set[int] = set()
    for part in text.strip().split(",") if text.strip() not in ("", "(null)") else ():
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return sorted(cpus)


def cpulist(cpus: Iterable[int]) -> str:
    """CPU numbers as tools take them: `1,2,3`."""
    return ",".join(map(str, sorted(cpus)))


def moment() -> record.Moment:
    """Now, by three clocks."""
    clocks = (time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME)
    realtime, monotonic, boottime = (time.clock_gettime_ns(clock) for clock in clocks)
    return record.Moment(realtime, monotonic, boottime)


def boot_id() -> str:
    """Another one after each boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def kernel_release() -> str:
    """`uname -r`."""
    return os.uname().release


def timer_ns() -> int:
    """Resolution of CLOCK_MONOTONIC timers: 1 with high-resolution timers, a tick without."""
    return round(time.clock_getres(time.CLOCK_MONOTONIC) * 1e9)


def online() -> list[int]:
    """CPUs that can be measured."""
    return parse_cpulist(Path("/sys/devices/system/cpu/online").read_text())


def machine(root: Path = Path("/")) -> record.Machine:
    """What this machine is; files are read below `root`."""
    cpuinfo = _text(root / "proc/cpuinfo")
    plan = root / PLAN
    return record.Machine(
        virtualization=virtualization(),
        hypervisor="hypervisor" in _value(cpuinfo, "flags").split(),
        kernel_release=kernel_release(),
        kernel_version=os.uname().version,
        cmdline=_text(root / "proc/cmdline"),
        isolated=_text(root / "sys/devices/system/cpu/isolated"),
        nohz_full=_text(root / "sys/devices/system/cpu/nohz_full"),
        plan_sha256=record.sha256(plan) if plan.is_file() else "",
        config_sha256=_config(root / "proc/config.gz"),
        timer_ns=timer_ns(),
        clocksource=_text(root / "sys/devices/system/clocksource/clocksource0/current_clocksource"),
        cpu_model=_value(cpuinfo, "model name"),
        boot_id=boot_id(),
        hostname=platform.node(),
    )


def virtualization() -> str:
    """What systemd-detect-virt says; `unknown` when it cannot be asked."""
    try:
        done = subprocess.run(
            ["systemd-detect-virt"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
        )
    except OSError:
        return UNKNOWN
    return done.stdout.strip() or UNKNOWN  # its status is 1 for none


def different(first: record.Machine, now: record.Machine) -> str:
    """What a machine has now that it had not when its record began, but for another boot; empty when it is the same."""
    for name, was in vars(first).items():
        if name != "boot_id" and (has := vars(now)[name]) != was:
            return f"{name} was {was or 'empty'}, is {has or 'empty'}"
    return ""


def may_be_fifo(priority: int) -> bool:
    """Whether this process has the right to SCHED_FIFO; asked of a child, so that it stays as it is."""
    child = os.fork()
    if not child:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def _text(path: Path) -> str:
    """A file of one line, or of many; empty when it is not there, which those who judge hold against the machine."""
    try:
        return path.read_text(errors="replace").strip("\n\0 ")
    except OSError:
        return ""


def _value(cpuinfo: str, key: str) -> str:
    for line in cpuinfo.splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == key:
            return value.strip()
    return ""


def _config(path: Path) -> str:
    """sha256 of the running kernel's configuration; empty when the kernel does not tell."""
    try:
        packed = path.read_bytes()
    except OSError:
        return ""
    try:
        return hashlib.sha256(gzip.decompress(packed)).hexdigest()
    except (OSError, EOFError, zlib.error) as error:
        raise MeasureError(
            f"{path} cannot be unpacked: {error}", "look at the kernel's CONFIG_IKCONFIG"
        ) from None
