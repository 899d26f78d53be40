"""irqlat's JSON: read, and held against what was asked of it. Latencies are microseconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .cyclictestdata import HARDWARE_SHARE, MEASURED_SHARE, check_sums
from .reading import MalformedError, loads
from .record import Stage

FILE = "irqlat.json"

#: The two latencies of an interrupt: until its handler runs, and until the thread that waits for it does.
PARTS = ("handler", "thread")

_COUNTS = (
    "cpu", "irq_cpu", "priority", "interval_us", "requested", "samples", "lost", "timer_ns", "histogram_us",
)  # fmt: skip


def parse_irqlat(text: str) -> dict[str, Any]:
    """irqlat's JSON, with the parts that a verdict needs known to be there and of their types."""
    try:
        data = loads(text)
        if data["schema"] != 1 or data["tool"] != "irqlat":
            raise MalformedError(f"schema {data['schema']} of {data['tool']}")
        for text_field in ("device", "policy"):
            if type(data[text_field]) is not str or not data[text_field]:
                raise MalformedError(f"{text_field} is {data[text_field]!r}")
        for count in _COUNTS:
            if type(data[count]) is not int or data[count] < 0:
                raise MalformedError(f"{count} is {data[count]!r}")
        for part in PARTS:
            measured = data[part]
            numbers = [measured[key] for key in ("min", "avg", "max")]
            if not all(type(each) in (int, float) and each >= 0 for each in numbers):
                raise MalformedError(f"{part}: a latency is not a number")
            if numbers != sorted(numbers):
                raise MalformedError(f"{part}: the average is not between minimum and maximum")
            histogram = measured["histogram"]
            if not all(
                type(count) is int and count >= 0 for count in [measured["overflows"], *histogram.values()]
            ):
                raise MalformedError(f"{part}: a count is not a number")
            if not all(latency.isascii() and latency.isdecimal() for latency in histogram):
                raise MalformedError(f"{part}: a latency in the histogram is not a number")
            if len({int(latency) for latency in histogram}) != len(histogram):
                raise MalformedError(f"{part}: a latency is in the histogram twice")
        for moment in data["max_over_time"]:
            for part in PARTS:
                if not 0 <= moment[part] <= data[part]["max"]:
                    raise MalformedError(
                        f"max_over_time has {moment[part]} us, {part} at most {data[part]['max']}"
                    )
    except MalformedError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedError(f"not irqlat's JSON: {type(error).__name__}: {error}") from error
    return dict(data)


def check_asked(data: Mapping[str, Any], stage: Stage) -> None:
    """It measured what the stage asks for; raises `MalformedError`."""
    asked = {
        "cpu": stage.cpus[0],
        "irq_cpu": stage.cpus[0],
        "priority": stage.priority,
        "policy": "fifo",
        "interval_us": stage.interval_us,
        "histogram_us": stage.histogram_us,
    }
    for name, value in asked.items():
        if data[name] != value:
            raise MalformedError(f"{FILE}: {name} is {data[name]}, not {value}")
    if not data["timer_ns"]:
        raise MalformedError(f"{FILE}: timer_ns is 0")


def check_samples(data: Mapping[str, Any], elapsed_ns: int, hardware: bool) -> None:
    """No interrupt is unaccounted for, and on hardware none lost; raises `MalformedError`."""
    requested, samples, lost = data["requested"], data["samples"], data["lost"]
    if samples + lost != requested:
        raise MalformedError(f"{samples} samples and {lost} lost of {requested} interrupts")
    if samples * data["interval_us"] * 1000 > elapsed_ns + data["interval_us"] * 1000:
        raise MalformedError(f"{samples} samples in a time for {elapsed_ns // (data['interval_us'] * 1000)}")
    if hardware and lost:
        raise MalformedError(f"{lost} interrupts were lost")
    share = HARDWARE_SHARE if hardware else MEASURED_SHARE
    if not samples or samples < math.ceil(requested * share):
        raise MalformedError(f"{samples} of {requested} interrupts were measured")


def check_histograms(data: Mapping[str, Any], hardware: bool) -> None:
    """The sums of both histograms are those told beside them; raises `MalformedError`."""
    for part in PARTS:
        measured = data[part]
        histogram = {int(latency): count for latency, count in measured["histogram"].items()}
        if sum(histogram.values()) + measured["overflows"] != data["samples"]:
            raise MalformedError(f"{part}: histogram and overflows are not the {data['samples']} samples")
        if hardware and measured["overflows"]:
            raise MalformedError(f"{part}: {measured['overflows']} beyond the histogram")
        check_sums(
            part,
            histogram,
            data["samples"],
            (measured["min"], measured["avg"], measured["max"]),
            data["histogram_us"],
        )
