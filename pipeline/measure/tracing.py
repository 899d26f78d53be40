"""On a host: a trace of what runs on the CPUs of vCPUs, from which `attribution` tells what made a guest late.

An instance of tracefs records what the scheduler, interrupts and KVM do on these CPUs, and who wakes threads there from
other CPUs, with the TSC as its clock; it keeps the latest. `arm` begins, `stop` ends and writes what there is, `disarm`
leaves the machine as it was. All need root, and raise `MeasureError`.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import breaktrace, tracefs
from .problems import MeasureError
from .record import RecordError, read_json, sha256, write_json

#: Raised when the meaning of a field of host.json changes.
SCHEMA = 1

#: What `stop` leaves: facts, and the trace as the kernel told it.
HOST, TRACE = "host.json", "trace.txt"

#: The instance, and the file that says since when it records.
INSTANCE = "virt-rt-measure"
STATE = "run/virt-rt-measure-trace.json"
DEBUGFS_KVM = "sys/kernel/debug/kvm"

#: Without these nothing can be told.
WAKING = "sched/sched_waking"
EVENTS = (
    "sched/sched_switch",
    WAKING,
    "irq/irq_handler_entry",
    "irq/irq_handler_exit",
    "irq/softirq_entry",
    "irq/softirq_exit",
    "kvm/kvm_entry",
    "kvm/kvm_exit",
    "kvm/kvm_write_tsc_offset",
)
#: Interrupts of the processor itself, such as its timer's: recorded where a kernel has them, in pairs.
VECTORS = "irq_vectors"

#: Per CPU. An event takes some 50 bytes, and a vCPU that leaves its guest 10000 times a second makes 30000 of them:
#: five seconds of the busiest. The other CPUs only tell whom they wake.
BUFFER_KIB = 8192
OTHERS_KIB = 64

#: Readings of two clocks of which the tightest counts, and the least time between two such samples.
READINGS, APART_NS = 5, 1_000_000_000

_LOST = ("entries", "overrun", "commit overrun", "dropped events")


def arm(root: Path, cpus: Sequence[int], buffer_kib: int = BUFFER_KIB) -> None:
    """Begin to record on these CPUs; either everything is set, or nothing is left."""
    tracing = tracefs.find(root)
    instance = tracing / "instances" / INSTANCE
    if instance.exists() or (root / STATE).exists():
        raise MeasureError("a trace is armed already", "end it: virt-rt-measure trace disarm")
    if not (root / DEBUGFS_KVM).is_dir():
        raise MeasureError(
            f"/{DEBUGFS_KVM} is not there, where the TSC offsets of vCPUs are",
            "modprobe kvm, and mount debugfs: mount -t debugfs none /sys/kernel/debug",
        )
    for cpu in cpus:
        if not (tracing / f"per_cpu/cpu{cpu}").is_dir():
            raise MeasureError(f"there is no CPU {cpu}", "name CPUs of this machine: --cpus 2-3")
    if not cpus or buffer_kib < 1:
        raise MeasureError(
            "there is nothing to record", "name CPUs and a buffer: --cpus 2-3 --buffer-kib 8192"
        )
    events = _events(tracing)
    try:
        instance.mkdir()
    except OSError as error:
        raise MeasureError(f"{instance} cannot be made: {error.strerror}", "run as root") from error
    try:
        for name, value in (
            ("tracing_on", "0"),
            ("trace_clock", tracefs.CLOCK),
            ("buffer_size_kb", str(OTHERS_KIB)),
            *((f"per_cpu/cpu{cpu}/buffer_size_kb", str(buffer_kib)) for cpu in cpus),
            *((f"events/{event}/filter", _filter(event, cpus)) for event in events),
            *((f"events/{event}/enable", "1") for event in events),
        ):
            tracefs.put(instance / name, value)
        tracefs.put(instance / "tracing_on", "1")
        state = {
            "boot_id": tracefs.boot_id(root),
            "cpus": sorted(set(cpus)),
            "events": sorted(events),
            "began": _sample(instance, cpus[0]),
        }
        (root / STATE).parent.mkdir(parents=True, exist_ok=True)
        write_json(root / STATE, state)
    except BaseException:
        with contextlib.suppress(MeasureError):
            disarm(root)
        raise


def stop(root: Path, out: Path) -> dict[str, Any]:
    """Stop recording and write `HOST` and `TRACE` below `out`; returns what `HOST` has.

    It can be repeated when it could not write: the trace stays as it was, but guests must still run.
    """
    instance = tracefs.find(root) / "instances" / INSTANCE
    state = _state(root)
    if not instance.is_dir():
        raise MeasureError("no trace is armed any more", "virt-rt-measure trace disarm, then arm one")
    if "ended" not in state:
        passed = time.monotonic_ns() - state["began"]["monotonic_ns"]
        time.sleep(max(0, APART_NS - passed) / 1e9)
        state["ended"] = _sample(instance, state["cpus"][0])
        tracefs.put(instance / "tracing_on", "0")
        write_json(root / STATE, state)
    began, ended = state["began"], state["ended"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (instance / "trace").open("rb") as source, (out / TRACE).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except OSError as error:
        raise MeasureError(
            f"the trace cannot be kept in {out}: {error.strerror}", "name another --out"
        ) from error
    elapsed = ended["monotonic_ns"] - began["monotonic_ns"]
    host = {
        "schema": SCHEMA,
        "boot_id": state["boot_id"],
        "clock": tracefs.CLOCK,
        "cpus": state["cpus"],
        "events": state["events"],
        "from_tsc": began["tsc"],
        "to_tsc": ended["tsc"],
        "tsc_khz": round((ended["tsc"] - began["tsc"]) * 1e6 / elapsed),
        "tsc_error": round((began["width_ns"] + ended["width_ns"]) / elapsed, 6),
        "buffers": {path.name[3:]: _statistics(path) for path in sorted(instance.glob("per_cpu/cpu*"))},
        "trace_sha256": sha256(out / TRACE),
        "virtual_machines": _virtual_machines(root),
    }
    write_json(out / HOST, host)
    return host


def disarm(root: Path) -> bool:
    """Remove the instance and what belongs to it; whether there was any."""
    instance = tracefs.find(root) / "instances" / INSTANCE
    was = instance.is_dir() or (root / STATE).exists()
    if instance.is_dir():
        try:
            instance.rmdir()
        except OSError as error:
            raise MeasureError(
                f"{instance} cannot be removed: {error.strerror}", "end whoever reads in there, and repeat"
            ) from error
    with contextlib.suppress(FileNotFoundError):
        (root / STATE).unlink()
    return was


def _events(tracing: Path) -> list[str]:
    """The events to record, as `system/event`."""
    for event in EVENTS:
        if not (tracing / "events" / event / "enable").exists():
            hint = "modprobe kvm" if event.startswith("kvm/") else "use a kernel with CONFIG_FTRACE"
            raise MeasureError(f"this kernel has no event {event.replace('/', ':')}", hint)
    names = {path.name for path in (tracing / "events" / VECTORS).glob("*_e*")}
    pairs = (name[: -len("_entry")] for name in sorted(names) if name.endswith("_entry"))
    both = [pair for pair in pairs if f"{pair}_exit" in names]
    return [*EVENTS, *(f"{VECTORS}/{pair}_{end}" for pair in both for end in ("entry", "exit"))]


def _filter(event: str, cpus: Sequence[int]) -> str:
    """What is recorded of an event: those on the CPUs, or, of wakings on any CPU, those that are about them."""
    field = "target_cpu" if event == WAKING else "CPU"
    return " || ".join(f"{field} == {cpu}" for cpu in cpus)


def _sample(instance: Path, cpu: int) -> dict[str, int]:
    """TSC and CLOCK_MONOTONIC at the same time, give or take half of `width_ns`."""
    taken = []
    for _ in range(READINGS):
        before = time.monotonic_ns()
        told = tracefs.get(instance / f"per_cpu/cpu{cpu}/stats")
        after = time.monotonic_ns()
        now = re.search(r"^now ts: (\d+)$", told, re.MULTILINE)
        if not now:  # with other clocks it is seconds, with a point
            raise MeasureError(
                f"the trace of CPU {cpu} does not count the TSC",
                f"see {instance}/trace_clock for {tracefs.CLOCK}",
            )
        taken.append({"tsc": int(now[1]), "monotonic_ns": (before + after) // 2, "width_ns": after - before})
    return min(taken, key=lambda each: each["width_ns"])


def _statistics(directory: Path) -> dict[str, int]:
    """What the buffer of a CPU says of itself: events in it, and those that were lost in each way."""
    path = directory / "stats"
    told = dict(re.findall(r"^([a-z ]+): (\d+)$", tracefs.get(path), re.MULTILINE))
    if missing := [name for name in _LOST if name not in told]:
        raise MeasureError(f"{path} does not tell {missing[0]}", "use a kernel of 3.7 or later")
    return {name.replace(" ", "_"): int(told[name]) for name in _LOST}


def _virtual_machines(root: Path) -> list[dict[str, Any]]:
    """What KVM runs now: the process, the name that qemu was given, of each vCPU the thread and the TSC's offset.

    debugfs knows vCPUs by the numbers of their APICs, threads are named by qemu's own: both ascend together. Where
    there are not as many of the one as of the other, none is told, for one would have to guess.
    """
    machines = []
    for directory in sorted((root / DEBUGFS_KVM).glob("*-*")):
        process = root / "proc" / directory.name.split("-")[0]
        if not process.name.isdigit() or not process.is_dir():
            continue
        threads: dict[int, int] = {}
        for comm in (process / "task").glob("*/comm"):
            with contextlib.suppress(OSError):
                if matched := re.fullmatch(r"CPU (\d+)/KVM\n?", comm.read_text(errors="replace")):
                    threads[int(matched[1])] = int(comm.parent.name)
        apics = {int(path.name[4:]): path for path in directory.glob("vcpu*") if path.name[4:].isdigit()}
        paired = zip(sorted(threads), sorted(apics)) if len(threads) == len(apics) else ()
        machines.append(
            {
                "pid": int(process.name),
                "name": _guest_name(process / "cmdline"),
                "vcpus": [
                    {"vcpu": number, "tid": threads[number], **_offset(apics[apic])}
                    for number, apic in paired
                ],
            }
        )
    return machines


def _offset(directory: Path) -> dict[str, Any]:
    """`tsc_offset` of a vCPU, None when unknown, and whether its TSC runs at another speed (`tsc_scaled`)."""

    def number(name: str) -> int | None:
        try:
            return int((directory / name).read_text())
        except (OSError, ValueError):
            return None

    ratio, bits = number("tsc-scaling-ratio"), number("tsc-scaling-ratio-frac-bits")
    scaled = ratio is not None and bits is not None and ratio != 1 << bits
    return {"tsc_offset": number("tsc-offset"), "tsc_scaled": scaled}


def _guest_name(cmdline: Path) -> str:
    """Of qemu's option `-name`; empty when it has none."""
    try:
        arguments = cmdline.read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    names = [value for option, value in zip(arguments, arguments[1:]) if option in ("-name", "--name")]
    return re.sub(r"\Aguest=", "", names[-1].split(",")[0]) if names else ""


def _state(root: Path) -> dict[str, Any]:
    if not (root / STATE).exists():
        raise MeasureError("no trace is armed", "arm one: virt-rt-measure trace arm --cpus LIST")
    hint = "begin again: virt-rt-measure trace disarm"
    try:
        state = read_json(root / STATE)
    except RecordError as error:
        raise MeasureError(str(error), hint) from error
    if not isinstance(state, dict) or {"boot_id", "cpus", "events", "began"} - set(state):
        raise MeasureError(f"/{STATE} is not of its form", hint)
    return state


# The command ------------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`trace` with its commands; each sets `run`, which takes the options and returns the exit status."""
    trace = subparsers.add_parser("trace", help="record on a host, and in a guest, what makes the guest late")
    commands = trace.add_subparsers(dest="trace_command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--root", metavar="DIR", default="/", help=argparse.SUPPRESS)
    begin = commands.add_parser("arm", parents=[common], help="on the host: begin to record")
    begin.add_argument("--cpus", metavar="LIST", required=True, help="the CPUs of the guest's vCPUs: 2-3,5")
    begin.add_argument(
        "--buffer-kib", metavar="N", type=int, default=BUFFER_KIB, help=f"per CPU (default: {BUFFER_KIB})"
    )
    begin.set_defaults(run=_arm)
    end = commands.add_parser("stop", parents=[common], help="on the host: stop, and write what there is")
    end.add_argument("--out", metavar="DIR", required=True, help=f"where {HOST} and {TRACE} are written")
    end.set_defaults(run=_stop)
    remove = commands.add_parser("disarm", parents=[common], help="on the host: leave it as it was")
    remove.set_defaults(run=_disarm)
    breaktrace.add_parser(commands)


def _arm(options: argparse.Namespace) -> int:
    arm(Path(options.root), tracefs.cpulist(options.cpus), options.buffer_kib)
    return 0


def _stop(options: argparse.Namespace) -> int:
    stop(Path(options.root), Path(options.out))
    return 0


def _disarm(options: argparse.Namespace) -> int:
    if not disarm(Path(options.root)):
        print("no trace was armed")
    return 0
