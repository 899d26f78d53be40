"""What is asked of a host and its guests when they are measured, and what they are held against.

The CPUs are those of the plan that was built, which the host's package has installed; the kernels likewise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.measure import record
from pipeline.measure.expectations import Expectations, Expected, Limit
from pipeline.recipes import Guest, Limits, Platform, Recipes, UserNetwork

#: cyclictest's and irqlat's: priority of the measuring threads, their period and the histogram's length, microseconds.
PRIORITY, INTERVAL_US, HISTOGRAM_US = 80, 1000, 1000
#: A window of the hwlat tracer, microseconds, and the longest time that it is asked, seconds.
WINDOW_US, HWLAT_S = 1_000_000, 60
#: Longest run of a tool, seconds: what an interruption costs at most.
SEGMENT_S = 3600
#: Seconds that a driver's own test may take.
TEST_S = 600
#: The host makes load for so much longer than its guests are measured: seconds, and part of the duration.
MARGIN_S, MARGIN_SHARE = 120, 0.02
#: Least CPU time of each load, in CPUs: all run on the housekeeping CPUs, of which there may be one.
LOADS = {"hackbench": 0.05, "stress": 0.05, "disk": 0.01}
#: What is shorter is not judged, seconds.
MINIMUM_S = 60
HOST = "host"
#: Why there is no limit.
NO_LIMITS = "the platform's recipe has no limits"
NO_IRQLAT = "no limit for device interrupts was ever given"
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Asked:
    """A measurement: `requests` by place, the host's first; `ports` of the guests' ssh; what is expected."""

    requests: dict[str, record.Request]
    ports: dict[str, int]
    limits: Limits | None

    def expectations(self, begun_s: int) -> Expectations:
        """What the verdict holds a measurement against that began then, seconds since 1970."""
        return Expectations(
            platform=self.requests[HOST].platform,
            places={place: self._expected(place, request) for place, request in self.requests.items()},
            load_required=True,
            load_shares=dict(LOADS),
            minimum_s=MINIMUM_S,
            oldest_s=begun_s,
            max_age_s=0,
        )

    def _expected(self, place: str, request: record.Request) -> Expected:
        if self.limits is None:
            return Expected(request, {}, {"cyclictest": NO_LIMITS, "irqlat": NO_LIMITS})
        known = self.limits
        of_host = (known.host_max_us, known.host_avg_us)
        most, average = of_host if place == HOST else (known.guest_max_us, known.guest_avg_us)
        return Expected(request, {"cyclictest": Limit(most, average, known.source)}, {"irqlat": NO_IRQLAT})


def seconds(text: str) -> int:
    """A duration such as `60s`, `90m`, `12h`."""
    found = re.fullmatch(r"([0-9]{1,7})([smhd]?)", text)
    if found is None or not int(found[1]):
        raise UserError(f"DURATION={text} is no duration", "write one such as 60s, 30m or 12h")
    return int(found[1]) * _UNITS[found[2]]


def ask(artifacts: Path, recipes: Recipes, name: str, guests: Sequence[str], duration_s: int) -> Asked:
    """What to ask of the platform `name` and these guests; `artifacts` is the directory of its products.

    Raises `UserError` for what was not built, and for guests that cannot be reached.
    """
    platform = recipes.platform(name)
    content = _product(artifacts / "tuning/root/usr/share/virt-rt/plan.json", name)
    plan = json.loads(content)
    known = recipes.guests_of(name)
    for guest in guests:
        if guest not in known or guest not in plan["guests"]:
            raise UserError(
                f"GUESTS: {name} has no guest {guest}",
                f"write some of {','.join(known) or 'no guests'}, or GUESTS=none",
            )
    asked = _Asker(artifacts, name, platform, plan, record_digest(content), duration_s)
    requests = {HOST: asked.host(bool(guests))}
    ports = {}
    for guest in guests:
        ports[guest] = port_of(guest, known[guest])
        requests[f"guest-{guest}"] = asked.guest(guest, known[guest])
    return Asked(requests, ports, platform.limits)


def port_of(name: str, guest: Guest) -> int:
    """The port of the host's loopback that leads to a guest's ssh."""
    for network in guest.networks:
        if isinstance(network, UserNetwork) and network.ssh_port is not None:
            return network.ssh_port
    raise UserError(
        f"the guest {name} cannot be reached: it has no ssh_port",
        f'write one in recipes/guests/{name}.toml: networks = [{{ kind = "user", ssh_port = 2222 }}]; or GUESTS=none',
    )


def record_digest(content: bytes) -> str:
    """sha256 of a plan as records have it."""
    import hashlib

    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, slots=True)
class _Asker:
    """Makes the requests of one measurement."""

    artifacts: Path
    name: str
    platform: Platform
    plan: Mapping[str, Any]
    plan_sha256: str
    duration_s: int

    def host(self, with_guests: bool) -> record.Request:
        isolated: list[int] = self.plan["isolated"]
        stages = [
            self._stage("hwlat", isolated, required=False, duration_s=min(HWLAT_S, self.duration_s)),
            self._stage("cyclictest", isolated, loads=list(LOADS)),
            *self._tests(self._release("host"), isolated[0]),
        ]
        if with_guests:
            margin = MARGIN_S + round(MARGIN_SHARE * self.duration_s)
            stages.append(self._stage("load", [], loads=list(LOADS), duration_s=self.duration_s + margin))
        return self._request(HOST, "host", isolated, self.plan["housekeeping"], stages)

    def guest(self, guest: str, recipe: Guest) -> record.Request:
        vcpus = self.plan["guests"][guest]["vcpus"]
        isolated = [each["vcpu"] for each in vcpus if each["policy"] == "fifo"]
        housekeeping = [each["vcpu"] for each in vcpus if each["policy"] != "fifo"]
        release = self._release("guest")
        if recipe.high_resolution_timers:
            stages = [self._stage("cyclictest", isolated, loads=list(LOADS))]
        else:  # its timers are those of ticks
            stages = [self._stage("irqlat", isolated[:1], loads=list(LOADS))]
        names = {stage.name for stage in stages}
        stages += [test for test in self._tests(release, isolated[0]) if test.name not in names]
        return self._request(f"guest-{guest}", "guest", isolated, housekeeping, stages)

    def _request(
        self, place: str, role: str, isolated: list[int], housekeeping: list[int], stages: list[record.Stage]
    ) -> record.Request:
        return record.Request(
            place=place,
            platform=self.name,
            kernel_release=self._release(role),
            plan_sha256=self.plan_sha256,
            isolated=isolated,
            housekeeping=housekeeping,
            segment_s=SEGMENT_S,
            stages=stages,
        )

    def _stage(
        self,
        tool: str,
        cpus: list[int],
        *,
        name: str = "",
        loads: Sequence[str] = (),
        argv: Sequence[str] = (),
        duration_s: int = 0,
        required: bool = True,
    ) -> record.Stage:
        judged = tool in ("cyclictest", "irqlat")
        return record.Stage(
            name=name or tool,
            tool=tool,
            cpus=cpus,
            priority=PRIORITY if judged else 0,
            interval_us=INTERVAL_US if judged else WINDOW_US if tool == "hwlat" else 0,
            duration_s=duration_s or self.duration_s,
            histogram_us=HISTOGRAM_US if judged else 0,
            loads=list(loads),
            argv=list(argv),
            required=required,
        )

    def _tests(self, release: str, cpu: int) -> list[record.Stage]:
        """A stage for each test of the platform's drivers for that kernel."""
        stages = []
        for path in sorted((self.artifacts / "driver").glob("*/driver.json")):
            driver = json.loads(path.read_bytes())
            test = driver.get("test")
            if driver["kernelrelease"] != release or test is None:
                continue
            name = re.sub(r"[^a-z0-9-]", "-", driver["driver"])
            if test["tool"] == "irqlat":  # of a device that only this driver's own machine has
                stages.append(
                    self._stage(
                        "irqlat", [cpu], name=name, loads=list(LOADS), argv=test["argv"], required=False
                    )
                )
            else:
                stages.append(
                    self._stage("command", [], name=f"test-{name}", argv=test["argv"], duration_s=TEST_S)
                )
        return stages

    def _release(self, role: str) -> str:
        return _product(self.artifacts / "kernel" / role / "kernelrelease", self.name).decode().strip()


def _product(path: Path, platform: str) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there: what is measured must have been built",
            f"doit platform:{platform} builds it",
        ) from None
    if not content.strip():
        raise UserError(f"{path} is empty", f"doit platform:{platform} builds it anew")
    return content
