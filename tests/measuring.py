"""Measurements made up: records as `virt-rt-measure` leaves them, latencies like hardware's or an emulation's."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.measure import record
from pipeline.measure.verdict import PASSED
from pipeline.releaserecord import EMULATED

XEON = "Intel(R) Xeon(R) CPU E5-2648L v2 @ 1.90GHz"
PLATFORM, GUEST = "canoe-pass", "guest-canoe-guest"


@dataclass
class Made:
    """A measurement to be made up; `shift_us` is added to every latency, `kind` is hardware or emulated."""

    kind: str = "hardware"
    platform: str = PLATFORM
    shift_us: float = 0.0
    seed: int = 1
    segments: int = 12
    segment_s: int = 60
    samples: int = 60_000
    interval_us: int = 1000
    cpu_model: str = XEON
    loads: tuple[str, ...] = ("hackbench", "disk")
    timer_ns: int = 1
    host: Sequence[int] = (2, 3)
    guest: Sequence[int] = (1, 2)
    irqlat: bool = True
    absent: str = ""
    plan_sha256: str = "a" * 64
    guest_name: str = GUEST
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def emulated(self) -> bool:
        return self.kind == "emulated"

    def write(self, directory: Path) -> Path:
        """Write host's and guest's record below `directory`."""
        for place, cpus in (("host", self.host), (self.guest_name, self.guest)):
            self._place(directory / place, place, cpus)
        return directory

    def _machine(self, place: str, cpus: Sequence[int]) -> record.Machine:
        listed = ",".join(map(str, cpus))
        role = "host" if place == "host" else "guest"
        return record.Machine(
            virtualization=("none" if not self.emulated else "qemu") if place == "host" else "kvm",
            hypervisor=place != "host" or self.emulated,
            kernel_release=f"6.12.107-rt-virt-{role}-0123456789ab",
            kernel_version="#1 SMP PREEMPT_RT Tue Jan  1 00:00:00 UTC 1980",
            cmdline=f"root=/dev/vda1 isolcpus=managed_irq,domain,{listed} nohz_full={listed}",
            isolated=listed,
            nohz_full=listed,
            plan_sha256=self.plan_sha256 if place == "host" else "",
            config_sha256="c" * 64,
            timer_ns=self.timer_ns,
            clocksource="tsc",
            cpu_model="AMD EPYC-v3 (QEMU)" if self.emulated else self.cpu_model,
            boot_id="b" * 32,
            hostname="canoe-7" if place == "host" else "guest",
        )

    def _place(self, path: Path, place: str, cpus: Sequence[int]) -> None:
        path.mkdir(parents=True)
        draw = random.Random(f"{self.seed} {place}")
        duration = self.segments * self.segment_s
        stage = record.Stage(
            "cyclictest", "cyclictest", list(cpus), 80, self.interval_us, duration, 400, list(self.loads), []
        )
        stages = [stage]
        if self.irqlat:
            stages.append(replace(stage, name="irqlat", tool="irqlat", cpus=[cpus[-1]], duration_s=120))
        if self.absent:
            stages.append(replace(stage, name="oslat", tool="oslat", required=self.absent == "required"))
        if self.emulated:
            stages = [replace(each, histogram_us=10_000) for each in stages]
        request = record.Request(
            place, self.platform, "6.12.107-rt-virt-host-0123456789ab", self.plan_sha256, list(cpus), [0],
            self.segment_s, stages,
        )  # fmt: skip
        record.write(path / record.REQUEST, request)
        record.write(path / record.MACHINE, self._machine(place, cpus))
        ends: dict[str, str] = {}
        at = 0.0
        for each in stages:
            count = self.segments if each.tool == "cyclictest" else 1
            seconds = self.segment_s if each.tool == "cyclictest" else each.duration_s
            for segment in range(count):
                name = f"{len(ends) + 1:03}-{each.tool}"
                self._run(path / name, each, segment, at, seconds, place, draw)
                ends[name] = record.sha256(path / name / record.RUN)
                at += seconds + 0.4
        request_sha256, machine_sha256 = (record.sha256(path / n) for n in (record.REQUEST, record.MACHINE))
        record.write(path / record.END, record.End(request_sha256, machine_sha256, ends))

    def _run(
        self, path: Path, stage: record.Stage, segment: int, at: float, seconds: float, place: str,
        draw: random.Random,
    ) -> None:  # fmt: skip
        path.mkdir()
        refused = "oslat is not installed" if stage.tool == "oslat" else ""
        files = {}
        if not refused:
            content = (
                self._cyclictest(stage, place, draw)
                if stage.tool == "cyclictest"
                else self._irqlat(stage, place, draw)
            )
            file = path / f"{stage.tool}.json"
            file.write_text(json.dumps(content))
            files[file.name] = record.sha256(file)
        moment = int(1e12 + at * 1e9)
        end = int(moment + seconds * 1e9)
        run = record.Run(
            stage.name, stage.tool, segment, [stage.tool], "b" * 32, record.Moment(moment, moment, moment),
            record.Moment(end, end, end), 0, refused, [], [], files,
        )  # fmt: skip
        record.write(path / record.RUN, run)

    def latencies(self, place: str, count: int, draw: random.Random) -> tuple[Counter[int], float]:
        """Counts by microsecond, and the greatest latency of all."""
        counts: Counter[int] = Counter()
        base, spread, tail = (2.2, 0.22, 1.6) if place == "host" else (6.0, 0.25, 3.2)
        if self.emulated:
            base, spread, tail = 210.0, 0.5, 900.0
        # a bulk by its shape, a tail by single draws: as many as there are would take seconds
        for latency in range(1, 20_000):
            middle = math.log(latency / (base + self.shift_us)) / spread
            share = math.exp(-middle * middle / 2) / (latency * spread * math.sqrt(2 * math.pi))
            expected = share * count
            if expected >= 0.5:
                counts[latency] += max(1, round(expected * draw.uniform(0.9, 1.1)))
            elif latency > base + self.shift_us:
                break
        for _ in range(max(4, count // 1500)):
            counts[round(2 * base + self.shift_us + draw.expovariate(1 / tail))] += 1
        return counts, float(max(counts))

    def _thread(self, place: str, count: int, histogram_us: int, draw: random.Random) -> dict[str, Any]:
        counts, greatest = self.latencies(place, count, draw)
        total = counts.total()
        return {
            "min": min(counts),
            "max": int(greatest),
            "avg": round(sum(latency * n for latency, n in counts.items()) / total, 2),
            "cycles": total,
            "histogram": {
                str(latency): counts[latency] for latency in sorted(counts) if latency < histogram_us
            },
        }

    def _cyclictest(self, stage: record.Stage, place: str, draw: random.Random) -> dict[str, Any]:
        threads = {
            str(number): {"cpu": cpu, **self._thread(place, self.samples, stage.histogram_us, draw)}
            for number, cpu in enumerate(stage.cpus)
        }
        return {"num_threads": len(threads), "return_code": 0, "thread": threads}

    def _irqlat(self, stage: record.Stage, place: str, draw: random.Random) -> dict[str, Any]:
        handler = self._thread(place, 60_000, stage.histogram_us, draw)
        samples = handler.pop("cycles")
        # the thread is woken by the handler, some time later
        later = 40 if self.emulated else 2
        thread = {
            **handler,
            **{name: round(handler[name] + later, 2) for name in ("min", "max", "avg")},
            "histogram": {
                str(int(latency) + later): count for latency, count in handler["histogram"].items()
            },
        }
        parts = {"handler": handler, "thread": thread}
        for part in parts.values():
            part["histogram"] = {
                latency: count
                for latency, count in part["histogram"].items()
                if int(latency) < stage.histogram_us
            }
            part["overflows"] = samples - sum(part["histogram"].values())
        windows = []
        for number in range(stage.duration_s * 10):
            most = max(handler["min"], int(draw.betavariate(1, 4) * handler["max"]))
            windows.append({"at_s": round((number + 1) / 10, 1), "handler": most, "thread": most + later})
        return {
            "schema": 1, "tool": "irqlat", "device": "0000:02:00.0", "cpu": stage.cpus[0], "irq_cpu": stage.cpus[0],
            "priority": 80, "policy": "fifo", "interval_us": stage.interval_us, "requested": samples,
            "samples": samples, "lost": 0, "timer_ns": 1, "histogram_us": stage.histogram_us,
            "max_over_time": windows, **parts,
        }  # fmt: skip


def verdict(emulated: bool = False, *more: Mapping[str, Any], ok: bool = True) -> dict[str, Any]:
    """What the gate says of a measurement that kept its protocol."""
    where = {"place": "host", "stage": "cyclictest"}
    findings = [
        {"name": "cycles", "wanted": "60000 on each CPU", "got": "60000", "ok": True, **where},
        {"name": "threads", "wanted": "FIFO 80, one on each CPU", "got": "FIFO 80", "ok": True, **where},
        *more,
    ]  # fmt: skip
    return {
        "schema": 1,
        "evidence": "emulated" if emulated else "hardware",
        "latency_verdict": EMULATED if emulated else (PASSED if ok else "failed"),
        "protocol_ok": True,
        "findings": findings,
    }


ATTRIBUTION = {
    "schema": 1,
    "events": [
        {
            "place": GUEST, "vcpu": 1, "cpu": 3, "limit_us": 60, "latency_us": 210_112.0, "at_tsc": 123,
            "window_us": [-210_000, 10],
            "culprits": [
                {"kind": "thread", "name": "disturb", "detail": "fifo 50, pid 123", "us": 209_800.0, "share": 0.998}
            ],
            "verdict": "CPU 3 was taken from vCPU 1 for 210 ms by thread disturb (fifo 50, pid 123)",
        }
    ],
}  # fmt: skip
