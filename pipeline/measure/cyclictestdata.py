"""cyclictest's JSON: read, and held against what was asked of it. Latencies are microseconds.

It stands alone: `pipeline.gate` takes it into steps, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

try:
    from .reading import MalformedError, loads, shown
except ImportError:  # in a step its file lies beside this one
    from reading import MalformedError, loads, shown  # type: ignore[import-not-found, no-redef]

#: A wake-up that comes later than the next one is due makes cyclictest skip those it slept through. On a
#: shared machine that emulates the vCPUs this happens: with four times as many busy processes as cores, 16 %
#: of the cycles at a period of 10 ms and 65 % at 1 ms were lost so. Being late is a matter of latency, which
#: emulation says nothing about; being absent is not. So of the planned cycles each thread must account for
#: nine tenths, as measured or as slept through by the lateness it recorded itself (the last tenth: threads
#: start after the clock of `-D` does), and, for something to have been measured at all, have measured half.
ACCOUNTED_SHARE, MEASURED_SHARE = 0.9, 0.5

#: On hardware nothing is slept through: what is missing of the planned cycles is what starting the threads takes.
HARDWARE_SHARE = 0.99

#: Averages are printed with two decimals.
ROUNDING_US = 0.011

FILE = "cyclictest.json"


def parse_cyclictest(text: str) -> dict[str, Any]:
    """cyclictest's JSON, with the parts that a verdict needs known to be there and of their types."""
    try:
        data = loads(text)
        if type(data["return_code"]) is not int or data["return_code"] != 0:
            raise MalformedError(f"cyclictest's own return code is {data['return_code']}")
        threads = data["thread"]
        if not threads or data["num_threads"] != len(threads):
            raise MalformedError(f"num_threads is {data['num_threads']}, threads listed: {len(threads)}")
        for thread in threads.values():
            histogram = thread["histogram"]
            counts = [thread[key] for key in ("cpu", "cycles", "min", "max")]
            if not all(type(count) is int and count >= 0 for count in [*counts, *histogram.values()]):
                raise MalformedError("a count is not a number")
            if not all(latency.isascii() and latency.isdecimal() for latency in histogram):
                raise MalformedError("a latency in the histogram is not a number")
            if len({int(latency) for latency in histogram}) != len(histogram):
                raise MalformedError("a latency is in the histogram twice")
            if not thread["min"] <= thread["avg"] <= thread["max"]:
                raise MalformedError("the average is not between minimum and maximum")
    except MalformedError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedError(f"not cyclictest's JSON: {type(error).__name__}: {error}") from error
    return dict(data)


def slept_through(thread: Mapping[str, Any], interval_us: int) -> int:
    """Cycles that late wake-ups of a thread made it skip, at most; `thread` is cyclictest's, checked.

    A latency in the histogram of n whole intervals skipped n cycles. Of the wake-ups beyond the histogram
    only the sum of latencies is known, as what the average has more than the histogram.
    """
    histogram = {int(latency): count for latency, count in thread["histogram"].items()}
    beyond = thread["avg"] * thread["cycles"] - sum(latency * count for latency, count in histogram.items())
    skipped = sum(latency // interval_us * count for latency, count in histogram.items())
    return int(skipped + max(0, beyond // interval_us))


def check_origin(data: Mapping[str, Any], argv: Sequence[str], release: str, version: str) -> None:
    """It is from this command, on this kernel, in microseconds; raises `MalformedError`."""
    said = data.get("cmdline:", data.get("cmdline"))  # the colon is cyclictest's own
    if said != " ".join(argv):
        raise MalformedError(f"{FILE} is of the command {said!r}")
    system = data.get("sysinfo")
    if not isinstance(system, dict):
        raise MalformedError(f"{FILE} does not say where it was made")
    if (system.get("release"), system.get("version")) != (release, version):
        raise MalformedError(f"{FILE} is from kernel {system.get('release')} {system.get('version')}")
    # Its `realtime` is from a file that only kernels patched for PREEMPT_RT have: mainline's have none.
    if "PREEMPT_RT" not in version.split():
        raise MalformedError(f"{FILE} is from a kernel that is not real-time: {version}")
    if data.get("resolution_in_ns") != 0:
        raise MalformedError(
            f"resolution_in_ns is {data.get('resolution_in_ns')!r}, latencies are no microseconds"
        )


def times(data: Mapping[str, Any]) -> tuple[float, float]:
    """When it began and ended, seconds of the real-time clock, whole ones; raises `MalformedError`."""
    try:
        began, ended = (parsedate_to_datetime(data[name]).timestamp() for name in ("start_time", "end_time"))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
        raise MalformedError(f"{FILE} does not say when it began and ended: {error}") from error
    return began, ended


def check_cycles(
    data: Mapping[str, Any], duration_s: int, interval_us: int, elapsed_ns: int, hardware: bool
) -> None:
    """Of each thread as many cycles as time had room for, and enough of them; raises `MalformedError`."""
    planned = duration_s * 1_000_000 // interval_us
    most = elapsed_ns // (interval_us * 1000) + 1
    for thread in data["thread"].values():
        cpu, cycles = thread["cpu"], thread["cycles"]
        if cycles > most:
            raise MalformedError(f"CPU {cpu}: {cycles} cycles in a time for {most}")
        if hardware:
            if cycles < math.ceil(planned * HARDWARE_SHARE):
                raise MalformedError(f"CPU {cpu}: {cycles} of {planned} cycles")
            continue
        accounted = cycles + slept_through(thread, interval_us)
        if cycles < math.ceil(planned * MEASURED_SHARE) or accounted < math.ceil(planned * ACCOUNTED_SHARE):
            raise MalformedError(f"CPU {cpu}: {cycles} of {planned} cycles, {accounted} accounted for")


def check_histograms(data: Mapping[str, Any], histogram_us: int, hardware: bool) -> None:
    """Sums are those of the thread, and on hardware nothing lies beyond; raises `MalformedError`."""
    for thread in data["thread"].values():
        who = f"CPU {thread['cpu']}"
        histogram = {int(latency): count for latency, count in thread["histogram"].items()}
        beyond = thread["cycles"] - sum(histogram.values())
        if beyond and hardware:
            raise MalformedError(f"{who}: {beyond} cycles are not in the histogram")
        extremes = (thread["min"], thread["avg"], thread["max"])
        check_sums(who, histogram, thread["cycles"], extremes, histogram_us)


def check_sums(
    who: str,
    histogram: Mapping[int, int],
    samples: int,
    extremes: tuple[float, float, float],
    histogram_us: int,
) -> None:
    """Minimum, average and maximum of `samples` are what the histogram allows; raises `MalformedError`.

    Latencies of `histogram_us` and more are not in it.
    """
    least, average, greatest = extremes
    seen = [latency for latency, count in histogram.items() if count]
    beyond = samples - sum(histogram.values())
    total = sum(latency * count for latency, count in histogram.items())
    if beyond < 0:
        raise MalformedError(f"{who}: {-beyond} more in the histogram than samples")
    if not samples:
        raise MalformedError(f"{who}: no samples")
    if any(latency >= histogram_us for latency in seen):
        raise MalformedError(f"{who}: a latency of {max(seen)} us in a histogram of {histogram_us} us")
    if seen and least != min(seen):
        raise MalformedError(f"{who}: minimum {least} us, {min(seen)} us in the histogram")
    if not beyond:
        if greatest != max(seen):
            raise MalformedError(f"{who}: maximum {greatest} us, {max(seen)} us in the histogram")
        if abs(average - total / samples) > ROUNDING_US:
            raise MalformedError(f"{who}: average {average} us, {total / samples:.2f} us in the histogram")
        return
    if greatest < histogram_us:
        raise MalformedError(f"{who}: {beyond} beyond the histogram, and a maximum of {greatest} us within")
    low, high = total + beyond * histogram_us, total + beyond * greatest
    if not low / samples - ROUNDING_US <= average <= high / samples + ROUNDING_US:
        raise MalformedError(f"{who}: average {average} us is not that of histogram and maximum")


def check_cpus(data: Mapping[str, Any], cpus: Sequence[int]) -> None:
    """One thread for each of `cpus`; raises `MalformedError`."""
    found = sorted(thread["cpu"] for thread in data["thread"].values())
    if found != list(cpus):
        raise MalformedError(f"{FILE} is about CPUs {shown(found)}")
