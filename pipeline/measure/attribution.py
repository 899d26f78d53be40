"""Who kept a guest waiting: a latency that was too long in a guest, looked up in its host's trace.

The guest tells when, by its own TSC, and how long (`breaktrace`); KVM tells the offset of the vCPU's TSC, so
host TSC = guest TSC - offset. In that window the host's trace is replayed: at each moment the vCPU was in guest mode,
or out of it for a reason that KVM names, or an interrupt or another thread had its CPU. Nothing is guessed: where
events are lost, the window is not covered or the clocks cannot be joined, the verdict says that instead.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from . import breaktrace, tracing
from .problems import MeasureError
from .record import RecordError, read_json, sha256, write_json

#: Raised when the meaning of a field of attribution.json changes.
SCHEMA = 1

#: The window begins before the latency did by this share of it, and by this many microseconds at least: between
#: reading the clock and writing the mark some time passes, for which the window would begin too late.
MARGIN, MARGIN_US = 0.1, 20

#: Shares of the window: what is not worth naming; what may be unknown without spoiling the rest; the main cause.
SMALL, UNKNOWN, MOST = 0.01, 0.1, 0.5

#: How far off the measured frequency of the TSC may be: beyond that microseconds would be wrong.
TSC_ERROR = 0.05

_LINE = re.compile(
    r"\s*(?P<comm>\S.*|)-(?P<pid>\d+)\s+\[(?P<cpu>\d{3,})\]\s+\S{4,8}\s+(?P<tsc>\d+): "
    r"(?P<name>\w+): ?(?P<text>.*)"
)
_LOST = re.compile(r"CPU:(?P<cpu>\d+) \[LOST(?: (?P<count>\d+))? EVENTS\]")
_HEADER = re.compile(r"# entries-in-buffer/entries-written: (\d+)/(\d+) ")
_SWITCH = re.compile(
    r"prev_comm=(?P<prev_comm>.*) prev_pid=(?P<prev_pid>\d+) prev_prio=(?P<prev_prio>-?\d+) prev_state=(?P<state>\S+)"
    r" ==> next_comm=(?P<next_comm>.*) next_pid=(?P<next_pid>\d+) next_prio=(?P<next_prio>-?\d+)"
)
_WAKING = re.compile(r"comm=.* pid=(?P<pid>\d+) prio=-?\d+ target_cpu=(?P<cpu>\d+)")
_HANDLER = re.compile(r"irq=(?P<irq>\d+) name=(?P<name>.*)")
_SOFTIRQ = re.compile(r"vec=\d+ \[action=(?P<name>\w+)\]")
_EXIT = re.compile(r"vcpu \d+ reason (?P<reason>\S+)")
#: The thread of an interrupt handler; its name ends after 15 characters.
_IRQ_THREAD = re.compile(r"irq/(?P<irq>\d+)-(?P<name>.*)")


class TraceFormError(ValueError):
    """A trace is not as the kernel writes it, or is cut short."""


class Event(NamedTuple):
    """A line of a trace: who was on which CPU when (`tsc`), and what happened; `text` is the event's own."""

    tsc: int
    cpu: int
    pid: int
    comm: str
    name: str
    text: str


@dataclass(frozen=True)
class Trace:
    """All events in order of time; `gaps` are `(cpu, from, to)` within which events of a CPU were lost."""

    events: list[Event]
    gaps: list[tuple[int, int, int]]


class Culprit(NamedTuple):
    """What had the time of a vCPU: `kind` is `thread`, `interrupt` or `kvm exit`; `key` tells apart two of one name."""

    kind: str
    name: str
    key: int


def parse(text: str) -> Trace:
    """The kernel's text of a trace with the TSC as its clock; raises `TraceFormError` that names the line."""
    events: list[Event] = []
    gaps: list[tuple[int, int, int]] = []
    last: dict[int, int] = {}
    open_gaps: dict[int, int] = {}
    wanted: int | None = None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.startswith("#") or not line:
            if header := _HEADER.match(line):
                wanted = int(header[1])
            continue
        if lost := _LOST.fullmatch(line):
            open_gaps[int(lost["cpu"])] = last.get(int(lost["cpu"]), 0)
            continue
        matched = _LINE.fullmatch(line)
        if not matched:
            raise TraceFormError(f"line {number} is no event: {line[:80]!r}")
        cpu, tsc = int(matched["cpu"]), int(matched["tsc"])
        if tsc < last.get(cpu, 0):
            raise TraceFormError(f"line {number} is earlier than what came before it on CPU {cpu}")
        last[cpu] = tsc
        if cpu in open_gaps:
            gaps.append((cpu, open_gaps.pop(cpu), tsc))
        events.append(Event(tsc, cpu, int(matched["pid"]), matched["comm"], matched["name"], matched["text"]))
    if wanted is None:
        raise TraceFormError("the header with the number of events is missing")
    if wanted != len(events):
        raise TraceFormError(f"it has {len(events)} events of {wanted}: cut short")
    events.sort(key=lambda event: event.tsc)
    return Trace(events, gaps)


# Replaying --------------------------------------------------------------------------------------


@dataclass
class _Cpu:
    """A CPU: who is on it, and the interrupts within which it is, innermost last."""

    pid: int
    comm: str
    handlers: list[Culprit] = field(default_factory=list)


@dataclass
class _Vcpu:
    """A vCPU's thread: where it is or was last; whether it wants to run; why it left the guest, empty when in it.

    `reason` is None as long as no event told.
    """

    tid: int
    cpu: int | None = None
    wants: bool | None = None
    reason: str | None = None


class Shares:
    """Replays a trace up to `end`, and adds up who had the time of a vCPU from `begin` on, in TSC ticks.

    `cpus` are those of which everything is in the trace; others only tell whom they wake there.
    """

    def __init__(self, events: Sequence[Event], cpus: Iterable[int], tid: int, begin: int, end: int) -> None:
        self.begin, self.end, self._traced = begin, end, set(cpus)
        self.guest = self.unknown = 0
        self.ticks: dict[Culprit, int] = {}
        self.times: dict[Culprit, int] = {}
        #: Of the time for a KVM exit, that in which the vCPU's thread slept.
        self.asleep: dict[Culprit, int] = {}
        self.prios: dict[int, int] = {}
        #: Ticks of the window by the CPU that the vCPU had, or waited for.
        self.homes: dict[int, int] = {}
        self._names = _interrupt_names(events)
        self._cpus: dict[int, _Cpu] = {}
        self._vcpu = _Vcpu(tid)
        self._owner: Culprit | None = None
        self._prime(events)
        now = begin
        for event in events:
            if event.tsc > end:
                break
            if event.tsc > now:
                self._spend(event.tsc - now)
                now = event.tsc
            self._take(event)
        self._spend(end - now)

    def _prime(self, events: Sequence[Event]) -> None:
        """What the first event of each CPU, and of the vCPU, tells of the time before it."""
        vcpu, told, mode = self._vcpu, False, False
        for event in events:
            if event.cpu not in self._cpus:
                self._cpus[event.cpu] = _Cpu(event.pid, event.comm)
                if event.name.endswith("_exit") and (handler := self._handler(event)):
                    self._cpus[event.cpu].handlers.append(handler)
            if event.pid == vcpu.tid:
                if not told:
                    vcpu.cpu, vcpu.wants = event.cpu, True
                if event.name == "kvm_exit" and not mode:
                    vcpu.reason = ""
                if event.name in ("kvm_exit", "kvm_entry"):
                    mode = True
            if not told:
                switch = _SWITCH.fullmatch(event.text) if event.name == "sched_switch" else None
                if switch and int(switch["next_pid"]) == vcpu.tid:
                    vcpu.cpu = event.cpu  # it was not on it; whether it wanted to be is not known
                    told = True
            told = told or event.pid == vcpu.tid

    def _spend(self, ticks: int) -> None:
        """Time went by in the state that there is."""
        vcpu = self._vcpu
        if ticks <= 0:
            return
        cpu = self._cpus.get(vcpu.cpu) if vcpu.cpu in self._traced else None
        if cpu is None or vcpu.cpu is None:
            self.unknown += ticks
            return
        self.homes[vcpu.cpu] = self.homes.get(vcpu.cpu, 0) + ticks
        owner: Culprit | None = None
        if cpu.handlers:
            owner = cpu.handlers[-1]
        elif cpu.pid == vcpu.tid and vcpu.reason == "":
            self.guest += ticks
        elif cpu.pid not in (vcpu.tid, 0) and vcpu.wants:
            owner = self._thread(cpu)
        elif vcpu.reason:
            owner = Culprit("kvm exit", vcpu.reason, 0)
            if cpu.pid != vcpu.tid:
                self.asleep[owner] = self.asleep.get(owner, 0) + ticks
        else:
            self.unknown += ticks
        if owner:
            self.ticks[owner] = self.ticks.get(owner, 0) + ticks
            if owner != self._owner:
                self.times[owner] = self.times.get(owner, 0) + 1
        self._owner = owner

    def _thread(self, cpu: _Cpu) -> Culprit:
        if matched := _IRQ_THREAD.fullmatch(cpu.comm):
            number = int(matched["irq"])
            return Culprit("interrupt", self._names.get(number, matched["name"]), number)
        return Culprit("thread", cpu.comm, cpu.pid)

    def _handler(self, event: Event) -> Culprit | None:
        """Whose handler an event of entry or exit is about."""
        name = event.name.rpartition("_")[0]
        if name == "irq_handler":
            number = int(_only(re.match(r"irq=(\d+) ", event.text), event)[1])
            return Culprit("interrupt", self._names.get(number, f"irq {number}"), number)
        if name == "softirq":
            return Culprit("interrupt", f"softirq {_only(_SOFTIRQ.fullmatch(event.text), event)['name']}", -1)
        if name != "kvm":
            return Culprit("interrupt", name.replace("_", " "), -1)
        return None

    def _take(self, event: Event) -> None:
        """An event changes the state."""
        cpu, vcpu = self._cpus[event.cpu], self._vcpu
        if event.name == "sched_switch":
            switch = _only(_SWITCH.fullmatch(event.text), event)
            cpu.pid, cpu.comm, cpu.handlers = int(switch["next_pid"]), switch["next_comm"], []
            # both: a thread may be hastened while it runs
            self.prios[int(switch["prev_pid"])] = int(switch["prev_prio"])
            self.prios[cpu.pid] = int(switch["next_prio"])
            if int(switch["prev_pid"]) == vcpu.tid:
                vcpu.wants = switch["state"].startswith("R")
                vcpu.cpu = event.cpu
            elif cpu.pid == vcpu.tid:
                vcpu.cpu, vcpu.wants = event.cpu, True
        elif event.name == "sched_waking":
            waking = _only(_WAKING.fullmatch(event.text), event)
            if int(waking["pid"]) == vcpu.tid:
                vcpu.cpu, vcpu.wants = int(waking["cpu"]), True
        elif event.name == "kvm_exit":
            if event.pid == vcpu.tid:
                vcpu.reason = _only(_EXIT.match(event.text), event)["reason"]
        elif event.name == "kvm_entry":
            if event.pid == vcpu.tid:
                vcpu.reason = ""
        elif event.name.endswith("_entry"):
            if handler := self._handler(event):
                cpu.handlers.append(handler)
        elif event.name.endswith("_exit"):
            handler = self._handler(event)
            if cpu.handlers and cpu.handlers.pop() != handler:
                cpu.handlers = []  # a switch was in between: what is left is of another thread


def _only(matched: re.Match[str] | None, event: Event) -> re.Match[str]:
    if not matched:
        raise TraceFormError(f"{event.name} is not of its form: {event.text[:80]!r}")
    return matched


def _interrupt_names(events: Iterable[Event]) -> dict[int, str]:
    """The names of interrupts as their handlers say them, whole; a line that is shared has all of them."""
    names: dict[int, list[str]] = {}
    for event in events:
        if event.name == "irq_handler_entry":
            handler = _only(_HANDLER.fullmatch(event.text), event)
            found = names.setdefault(int(handler["irq"]), [])
            if handler["name"] not in found:
                found.append(handler["name"])
    return {number: ", ".join(found) for number, found in names.items()}


# Judging ----------------------------------------------------------------------------------------


def attribute(host: dict[str, Any], trace: Trace, guest: dict[str, Any]) -> dict[str, Any]:
    """One event of attribution.json, for a guest's answer that exceeded its limit; raises `MeasureError`."""
    event: dict[str, Any] = {
        "place": guest["place"],
        "vcpu": guest["cpu"],
        "cpu": None,
        "limit_us": guest["limit_us"],
        "latency_us": guest["latency_us"],
        "at_tsc": None,
        "window_us": None,
        "in_guest_us": None,
        "culprits": [],
    }
    try:
        event["verdict"] = _judge(event, host, trace, guest)
    except _Untold as reason:
        event["verdict"] = f"not told: {reason}"
    return event


class _Untold(Exception):
    """Why there is no verdict."""


def _judge(event: dict[str, Any], host: dict[str, Any], trace: Trace, guest: dict[str, Any]) -> str:
    vcpu, tid = guest["cpu"], 0
    thread = _thread(host, guest["place"], vcpu)
    tid = thread["tid"]
    if thread["tsc_offset"] is None:
        raise _Untold(f"the host does not tell the TSC offset of vCPU {vcpu}")
    if thread["tsc_scaled"]:
        raise _Untold(f"the TSC of vCPU {vcpu} runs at another speed than the host's")
    if host["tsc_error"] > TSC_ERROR or host["tsc_khz"] <= 0:
        raise _Untold("the frequency of the host's TSC could not be measured")
    khz = host["tsc_khz"]
    at = guest["tsc"] - thread["tsc_offset"]
    length = guest["latency_us"] + max(MARGIN_US, round(guest["latency_us"] * MARGIN))
    begin = at - length * khz // 1000
    event["at_tsc"], event["window_us"] = at, [-length, 0]
    if begin < host["from_tsc"] or at > host["to_tsc"]:
        side = "began before" if begin < host["from_tsc"] else "ended after"
        raise _Untold(f"the latency {side} the host's trace, or their clocks are not joined by this offset")
    if not any(each.pid == tid or _switches_to(each, tid) for each in trace.events):
        raise _Untold(f"the thread of vCPU {vcpu} ({tid}) is not in the trace of CPUs {_list(host['cpus'])}")
    for cpu, buffer in host["buffers"].items():
        _covered(trace, int(cpu), buffer, begin, at)
    if any(
        each.name == "kvm_write_tsc_offset" and each.pid == tid and each.tsc >= begin for each in trace.events
    ):
        raise _Untold(f"the TSC offset of vCPU {vcpu} was changed meanwhile")
    shares = Shares(trace.events, host["cpus"], tid, begin, at)
    event["in_guest_us"] = shares.guest * 1000 // khz
    if shares.unknown > UNKNOWN * (at - begin):
        raise _Untold(f"for {_time(shares.unknown, khz)} the trace does not say what vCPU {vcpu} did")
    event["cpu"] = cpu = max(shares.homes, key=lambda each: shares.homes[each])
    event["culprits"] = _culprits(shares, khz)
    return _sentence(event, shares, vcpu, cpu, khz)


def _thread(host: dict[str, Any], place: str, vcpu: int) -> dict[str, Any]:
    """What the host knows of a vCPU."""
    name = re.sub(r"\Aguest-", "", place)
    machines = [each for each in host["virtual_machines"] if each["name"] == name]
    if len(machines) != 1:
        running = ", ".join(each["name"] or f"process {each['pid']}" for each in host["virtual_machines"])
        raise _Untold(
            f"{len(machines)} guests {name} ran when the trace was stopped (running: {running or 'none'})"
        )
    found = [each for each in machines[0]["vcpus"] if each["vcpu"] == vcpu]
    if not found:
        raise _Untold(f"the host did not find the thread and the TSC offset of vCPU {vcpu} of {name}")
    return dict(found[0])


def _switches_to(event: Event, tid: int) -> bool:
    return event.name == "sched_switch" and f" next_pid={tid} " in event.text


def _covered(trace: Trace, cpu: int, buffer: dict[str, int], begin: int, end: int) -> None:
    """Refuse a window in which something of a CPU's may be missing."""
    if buffer["commit_overrun"] or buffer["dropped_events"]:
        lost = buffer["commit_overrun"] + buffer["dropped_events"]
        raise _Untold(f"{lost} events of CPU {cpu} were lost, and nobody knows when")
    if buffer["overrun"]:
        first = next((each.tsc for each in trace.events if each.cpu == cpu), end + 1)
        if first > begin:
            raise _Untold(
                f"the trace of CPU {cpu} begins too late: {buffer['overrun']} earlier events did not fit in its buffer"
            )
    if any(
        where == cpu and lost_from <= end and lost_to >= begin for where, lost_from, lost_to in trace.gaps
    ):
        raise _Untold(f"events of CPU {cpu} were lost during the latency")


def _culprits(shares: Shares, khz: int) -> list[dict[str, Any]]:
    window = shares.end - shares.begin
    found = []
    for culprit, ticks in sorted(shares.ticks.items(), key=lambda each: (-each[1], each[0])):
        if ticks >= SMALL * window:
            found.append(
                {
                    "kind": culprit.kind,
                    "name": culprit.name,
                    "detail": _detail(culprit, shares, khz),
                    "us": ticks * 1000 // khz,
                    "share": round(ticks / window, 3),
                }
            )
    return found


def _detail(culprit: Culprit, shares: Shares, khz: int) -> str:
    if culprit.kind == "thread":
        priority = shares.prios.get(culprit.key)
        return ", ".join(filter(None, (_scheduling(priority), f"pid {culprit.key}")))
    times = shares.times[culprit]
    often = "once" if times == 1 else f"{times} times"
    if culprit.kind == "interrupt":
        return f"irq {culprit.key}, {often}" if culprit.key >= 0 else often
    asleep = shares.asleep.get(culprit, 0)
    return f"{often}, asleep for {_time(asleep, khz)}" if asleep else often


def _scheduling(prio: int | None) -> str:
    """What the kernel's own priority means: below 100 real-time, 99 less the real-time priority; -1 deadline."""
    if prio is None:
        return ""
    if prio < 0:
        return "deadline"
    return f"real-time priority {99 - prio}" if prio < 100 else f"nice {prio - 120}"


def _sentence(event: dict[str, Any], shares: Shares, vcpu: int, cpu: int, khz: int) -> str:
    window = shares.end - shares.begin
    if shares.guest >= MOST * window:
        return (
            f"vCPU {vcpu} was in guest mode for {shares.guest / window:.0%} of the time: "
            f"what made it late is not on the host's CPU {cpu}, look in the guest"
        )
    if not event["culprits"]:
        return f"nothing that took the time of vCPU {vcpu} was seen on CPU {cpu}"
    first = event["culprits"][0]
    lasted, what = _milliseconds(first["us"]), f"{first['name']} ({first['detail']})"
    if first["kind"] == "kvm exit":
        told = f"vCPU {vcpu} was out of guest mode for {lasted} for the KVM exit {what}"
    else:
        told = f"CPU {cpu} was taken from vCPU {vcpu} for {lasted} by {first['kind']} {what}"
    if first["share"] >= MOST:
        return told
    others = ", ".join(f"{each['name']} {_milliseconds(each['us'])}" for each in event["culprits"][1:4])
    return f"{told}, less than half of the time" + (f"; then {others}" if others else "")


def _time(ticks: int, khz: int) -> str:
    return _milliseconds(ticks * 1000 // khz)


def _milliseconds(us: int) -> str:
    return f"{us} µs" if us < 1000 else f"{us / 1000:.1f} ms" if us < 100_000 else f"{us / 1000:.0f} ms"


def _list(cpus: Iterable[int]) -> str:
    return ", ".join(map(str, cpus))


# Files ------------------------------------------------------------------------------------------

_HOST_FIELDS: dict[str, Any] = {
    "boot_id": str,
    "cpus": list,
    "from_tsc": int,
    "to_tsc": int,
    "tsc_khz": int,
    "tsc_error": (int, float),
    "buffers": dict,
    "trace_sha256": str,
    "virtual_machines": list,
}
_GUEST_FIELDS: dict[str, Any] = {"place": str, "limit_us": int, "exceeded": bool}
_EXCEEDED_FIELDS: dict[str, Any] = {"cpu": int, "tsc": int, "latency_us": int}


def load_host(directory: Path) -> tuple[dict[str, Any], Trace]:
    """What `trace stop` left; raises `MeasureError`."""
    hint = "make it again: virt-rt-measure trace stop"
    host = _document(directory / tracing.HOST, _HOST_FIELDS, tracing.SCHEMA, hint)
    path = directory / tracing.TRACE
    try:
        if sha256(path) != host["trace_sha256"]:
            raise MeasureError(f"{path} is not the trace that {tracing.HOST} is about", "copy both again")
        return host, parse(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise MeasureError(f"{path} cannot be read: {error.strerror}", "copy the whole directory") from error
    except TraceFormError as error:
        raise MeasureError(f"{path}: {error}", hint) from error


def load_guest(path: Path) -> dict[str, Any]:
    """What `trace break` left; raises `MeasureError`."""
    hint = "make it again: virt-rt-measure trace break"
    guest = _document(path, _GUEST_FIELDS, breaktrace.SCHEMA, hint)
    if guest["exceeded"]:
        _document(path, _EXCEEDED_FIELDS, breaktrace.SCHEMA, hint)
    return guest


def _document(path: Path, wanted: dict[str, Any], schema: int, hint: str) -> dict[str, Any]:
    try:
        content = read_json(path)
    except RecordError as error:
        raise MeasureError(str(error), hint) from error
    if not isinstance(content, dict) or content.get("schema") != schema:
        raise MeasureError(f"{path.name} is not of schema {schema}", hint)
    for name, kind in wanted.items():
        value = content.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise MeasureError(f"{path.name}: {name} is missing, or is not of its kind", hint)
    return content


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`attribute`; sets `run`, which takes the options and returns the exit status, or raises `MeasureError`."""
    parser = subparsers.add_parser("attribute", help="say what on the host made a guest late")
    parser.add_argument("--host", metavar="DIR", required=True, help="what `trace stop` left")
    parser.add_argument(
        "--guest",
        metavar="FILE",
        required=True,
        action="append",
        help="what `trace break` left; can be repeated",
    )
    parser.add_argument("--json", metavar="FILE", required=True, help="gets the verdicts")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`virt-rt-measure attribute`: 0 whatever the verdicts are; raises `MeasureError`."""
    host, trace = load_host(Path(options.host))
    guests = [load_guest(Path(name)) for name in options.guest]
    try:
        events = [attribute(host, trace, guest) for guest in guests if guest["exceeded"]]
    except TraceFormError as error:
        raise MeasureError(str(error), "make the trace again: virt-rt-measure trace stop") from error
    try:
        write_json(Path(options.json), {"schema": SCHEMA, "events": events})
    except OSError as error:
        raise MeasureError(
            f"{options.json} cannot be written: {error.strerror}", "name a writable --json"
        ) from error
    for event in events:
        print(
            f"{event['place']} vCPU {event['vcpu']}, {_milliseconds(event['latency_us'])}: {event['verdict']}"
        )
    for guest in guests:
        if not guest["exceeded"]:
            print(f"{guest['place']}: no latency exceeded {guest['limit_us']} µs")
    return 0
