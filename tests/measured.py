"""A whole measurement made up: a host and a guest, both measured under load, as `virt-rt-measure` leaves it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from pipeline.measure import record
from pipeline.measure.expectations import Expectations, Expected, Limit
from pipeline.measure.request import Planned, planned

#: When it was judged, seconds since 1970; it began an hour before, on machines that had run for a while.
NOW_S = 1_790_000_000
BEGAN_NS, UP_NS = (NOW_S - 3600) * 10**9, 5000 * 10**9
SECONDS, SEGMENT_S, PERIOD_US, WIDTH_US = 120, 60, 1000, 1000
LOADS = ["hackbench", "stress"]
PLAN = "a" * 64
GUEST = "guest-g"
SOURCE = "the board's howto"

Document = dict[str, Any]


def stage(tool: str, cpus: list[int], **changes: Any) -> record.Stage:
    made = record.Stage(tool, tool, cpus, 80, PERIOD_US, SECONDS, WIDTH_US, list(LOADS), [])
    return replace(made, **changes)


def requests() -> dict[str, record.Request]:
    load = stage("load", [], priority=0, interval_us=0, histogram_us=0, duration_s=500)
    host = record.Request(
        "host", "p", "6.12-host", PLAN, [2, 3], [0, 1], SEGMENT_S, [stage("cyclictest", [2, 3]), load]
    )
    guest = record.Request(
        GUEST, "p", "6.12-guest", PLAN, [1, 2], [0], SEGMENT_S,
        [stage("cyclictest", [1, 2]), stage("irqlat", [1])],
    )  # fmt: skip
    return {"host": host, GUEST: guest}


def expectations(**changes: Any) -> Expectations:
    asked = requests()
    made = Expectations(
        platform="p",
        places={
            "host": Expected(asked["host"], {"cyclictest": Limit(20.0, 2.0, SOURCE)}, {}),
            GUEST: Expected(
                asked[GUEST], {"cyclictest": Limit(60.0, 25.0, SOURCE)}, {"irqlat": "nobody gave one"}
            ),
        },
        load_required=True,
        load_shares={"hackbench": 0.1, "stress": 0.1},
        minimum_s=SECONDS,
        oldest_s=NOW_S - 7200,
        max_age_s=86400,
    )
    return replace(made, **changes)


def machine(place: str, hardware: bool) -> Document:
    host = place == "host"
    return asdict(
        record.Machine(
            virtualization="none" if host and hardware else "kvm",
            hypervisor=not (host and hardware),
            kernel_release=requests()[place].kernel_release,
            kernel_version="#1 SMP PREEMPT_RT Thu Jan  1 00:00:00 UTC 2026",
            cmdline="isolcpus=2-3" if host else "isolcpus=1-2",
            isolated="2-3" if host else "1-2",
            nohz_full="2-3" if host else "1-2",
            plan_sha256=PLAN if host else "",
            config_sha256="c" * 64,
            timer_ns=1,
            clocksource="tsc" if host else "kvm-clock",
            cpu_model="Intel(R) Xeon(R) CPU E5-2680 0 @ 2.70GHz" if hardware else "AMD EPYC Processor",
            boot_id=f"boot-{place}",
            hostname=place,
        )
    )


def at(seconds: int) -> str:
    """A time since 1970 as cyclictest tells it."""
    return format_datetime(datetime.fromtimestamp(seconds, UTC))


def cyclictest(run: Planned, argv: list[str], host: Document, began_ns: int, hardware: bool) -> Document:
    cycles = run.seconds * 1_000_000 // run.stage.interval_us
    lat = {1: cycles - 10, 9: 10} if hardware else {400: cycles - 10, 900: 10}
    thread = {
        "histogram": {str(us): count for us, count in lat.items()},
        "cycles": cycles,
        "min": min(lat),
        "max": max(lat),
        "avg": round(sum(us * count for us, count in lat.items()) / cycles, 2),
        "node": 0,
    }
    return {
        "file_version": 1,
        "cmdline:": " ".join(argv),
        "rt_test_version:": "2.80",
        "start_time": at(began_ns // 10**9),
        "end_time": at(began_ns // 10**9 + run.seconds),
        "return_code": 0,
        "sysinfo": {
            "sysname": "Linux",
            "release": host["kernel_release"],
            "version": host["kernel_version"],
            "realtime": 0,  # as mainline's kernels have it, PREEMPT_RT or not
        },
        "num_threads": len(run.stage.cpus),
        "resolution_in_ns": 0,
        "thread": {
            str(number): {**thread, "histogram": dict(thread["histogram"]), "cpu": cpu}  # type: ignore[call-overload]
            for number, cpu in enumerate(run.stage.cpus)
        },
    }


def irqlat(run: Planned) -> Document:
    samples = run.seconds * 1_000_000 // run.stage.interval_us
    part = {"min": 3, "max": 9, "avg": 3.0, "overflows": 0, "histogram": {"3": samples - 1, "9": 1}}
    part["avg"] = (3 * (samples - 1) + 9) / samples
    return {
        "schema": 1,
        "tool": "irqlat",
        "device": "0000:02:00.0",
        "cpu": 1,
        "irq_cpu": 1,
        "priority": 80,
        "policy": "fifo",
        "interval_us": PERIOD_US,
        "requested": samples,
        "samples": samples,
        "lost": 0,
        "timer_ns": 1,
        "histogram_us": WIDTH_US,
        "handler": dict(part, histogram=dict(part["histogram"])),  # type: ignore[call-overload]
        "thread": dict(part, histogram=dict(part["histogram"])),  # type: ignore[call-overload]
        "max_over_time": [{"at_s": 0.1, "handler": 9, "thread": 9}],
    }


def command(run: Planned) -> list[str]:
    asked = run.stage
    if asked.tool == "irqlat":
        return [
            "irqlat", f"--cpu={asked.cpus[0]}", "--trigger-cpu=0", f"--priority={asked.priority}",
            f"--interval={asked.interval_us}", f"--duration={run.seconds}",
            f"--histogram={asked.histogram_us}", "--json=irqlat.json",
        ]  # fmt: skip
    if asked.tool == "load":
        return []
    cpus = ",".join(map(str, asked.cpus))
    return (
        f"cyclictest -m -p{asked.priority} -i{asked.interval_us} -d0 --policy=fifo -a {cpus} "
        f"-t {len(asked.cpus)} --mainaffinity=0 -q -D {run.seconds} -h {asked.histogram_us} --json=cyclictest.json"
    ).split()


class Measured:
    """A measurement as data, to be changed before it is written; every digest is then right."""

    def __init__(self, hardware: bool = True) -> None:
        self.hardware = hardware
        self.requests = {place: asdict(request) for place, request in requests().items()}
        self.machines = {place: machine(place, hardware) for place in self.requests}
        self.runs: dict[str, dict[str, Document]] = {place: {} for place in self.requests}
        self.files: dict[str, dict[str, dict[str, Any]]] = {place: {} for place in self.requests}
        self.left_out: set[str] = set()
        for place, request in requests().items():
            # the guest is measured while the host only makes load
            at = 0 if place == "host" else 130 * 10**9
            for run in planned(request):
                self._run(place, run, at)
                at += (run.seconds + 1) * 10**9

    def _run(self, place: str, run: Planned, at: int) -> None:
        asked, argv = run.stage, command(run)
        own = requests()[place]
        uptime = UP_NS if place == "host" else UP_NS // 2
        began = {"realtime": BEGAN_NS + at, "monotonic": uptime + at, "boottime": uptime + at}
        ended = {clock: value + run.seconds * 10**9 + 5 * 10**8 for clock, value in began.items()}
        threads = [{"tid": 100, "name": asked.tool, "policy": 0, "priority": 0, "cpus": [0]}] + [
            {"tid": 101 + cpu, "name": asked.tool, "policy": 1, "priority": 80, "cpus": [cpu]}
            for cpu in asked.cpus
        ]
        files: dict[str, Any] = {"stdout": "", "stderr": ""}
        if asked.tool == "cyclictest":
            files["cyclictest.json"] = cyclictest(
                run, argv, self.machines[place], began["realtime"], self.hardware
            )
        if asked.tool == "irqlat":
            files["irqlat.json"] = irqlat(run)
        self.files[place][run.name] = files
        self.runs[place][run.name] = {
            "schema": 1,
            "stage": asked.name,
            "tool": asked.tool,
            "segment": run.segment,
            "argv": argv,
            "boot_id": f"boot-{place}",
            "began": began,
            "ended": ended,
            "status": 0,
            "refused": "",
            "threads": threads if asked.cpus else [],
            "loads": [
                {
                    "name": name,
                    "argv": [name],
                    "cpu_s": 0.3 * run.seconds,
                    "alive": True,
                    "cpus": own.housekeeping,
                }
                for name in asked.loads
            ],
        }

    def write(self, directory: Path) -> Path:
        """Write it; a file whose content is text is written as it is."""
        for place in self.requests:
            if place in self.left_out:
                continue
            below = directory / place
            below.mkdir(parents=True)
            put(below / record.REQUEST, self.requests[place])
            put(below / record.MACHINE, self.machines[place])
            for name, run in self.runs[place].items():
                (below / name).mkdir()
                for file, content in self.files[place][name].items():
                    (below / name / file).write_text(
                        content if isinstance(content, str) else json.dumps(content)
                    )
                digests = {file: digest(below / name / file) for file in self.files[place][name]}
                put(below / name / record.RUN, {"files": digests, **run})
            end(below)
        return directory


def end(below: Path) -> None:
    """Write end.json as it must be for what lies there."""
    runs = {path.parent.name: digest(path) for path in below.glob(f"[0-9][0-9][0-9]-*/{record.RUN}")}
    request, machine = digest(below / record.REQUEST), digest(below / record.MACHINE)
    put(below / record.END, asdict(record.End(request, machine, runs)))


def put(path: Path, document: Document) -> None:
    """As `record.write_json` does, but it need not survive a loss of power."""
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def thread(data: Document, latencies: dict[int, int], number: str = "0") -> None:
    """Give a thread of cyclictest these latencies, with all that follows from them."""
    counts = Counter(latencies)
    cycles = sum(counts.values())
    data["thread"][number].update(
        histogram={str(us): count for us, count in counts.items()},
        cycles=cycles,
        min=min(counts),
        max=max(counts),
        avg=round(sum(us * count for us, count in counts.items()) / cycles, 2),
    )
