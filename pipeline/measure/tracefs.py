"""The kernel's tracefs, as far as traces with the TSC as their clock need it."""

from __future__ import annotations

import re
from pathlib import Path

from .problems import MeasureError

TRACEFS = "sys/kernel/tracing"
CLOCK = "x86-tsc"


def find(root: Path) -> Path:
    """tracefs below `root`, when it is there, allowed, and has the clock; raises `MeasureError`."""
    tracefs = root / TRACEFS
    try:
        clocks = (tracefs / "trace_clock").read_text()
    except PermissionError as error:
        raise MeasureError(f"/{TRACEFS} may not be read", "run as root") from error
    except OSError as error:
        raise MeasureError(
            f"tracefs is not at /{TRACEFS}",
            f"mount it: mount -t tracefs none /{TRACEFS}; the kernel needs CONFIG_FTRACE",
        ) from error
    if CLOCK not in re.findall(r"[\w-]+", clocks):
        raise MeasureError(f"the kernel's trace has no clock {CLOCK}", "use a kernel for x86")
    return tracefs


def get(path: Path) -> str:
    """A file's text; raises `MeasureError`."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise MeasureError(f"{path} cannot be read: {error.strerror}", "run as root") from error


def put(path: Path, text: str) -> None:
    """Write a file that the kernel reads; raises `MeasureError`."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise MeasureError(f"{path} does not take {text!r}: {error.strerror}", "run as root") from error


def boot_id(root: Path) -> str:
    """Which boot of the kernel this is."""
    return get(root / "proc/sys/kernel/random/boot_id").strip()


def cpulist(text: str) -> list[int]:
    """CPUs from what a user wrote, such as `0-2,5`, ascending; raises `MeasureError`."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        matched = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        if not matched or int(matched[2] or matched[1]) < int(matched[1]):
            raise MeasureError(f"{text!r} is no list of CPUs", "write numbers and ranges: 2-3,5")
        cpus.update(range(int(matched[1]), int(matched[2] or matched[1]) + 1))
    return sorted(cpus)
