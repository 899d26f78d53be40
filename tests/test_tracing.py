"""Traces on a host and in a guest: against a pretended tracefs, debugfs and /proc, and a pretended cyclictest."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.measure import breaktrace, tracefs, tracing
from pipeline.measure.problems import EndedError, MeasureError

CLOCKS = "[local] global counter uptime perf mono mono_raw boot tai x86-tsc\n"
TEXT = "# tracer: nop\n#\n# entries-in-buffer/entries-written: 0/0   #P:2\n"
STATS = (
    "entries: {}\noverrun: 1\ncommit overrun: 2\nbytes: 9\noldest event ts: 5\nnow ts: {}\n"
    "dropped events: 3\nread events: 0\n"
)
VECTORS = ("local_timer_entry", "local_timer_exit", "vector_setup", "thermal_apic_entry")


class Machine:
    """A root directory: what an instance of tracefs has appears when it is made, and goes with it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tracefs = root / tracefs.TRACEFS
        self.instance = self.tracefs / "instances" / tracing.INSTANCE
        self.write("proc/sys/kernel/random/boot_id", "boot\n")
        for name, text in (
            ("trace_clock", CLOCKS),
            ("current_tracer", "nop\n"),
            ("tracing_on", "1\n"),
            ("trace", TEXT),
            ("instances/other/keep", ""),
            *((f"events/{event}/enable", "0\n") for event in tracing.EVENTS),
            *((f"events/{tracing.VECTORS}/{event}/enable", "0\n") for event in VECTORS),
            *((f"per_cpu/cpu{cpu}/stats", "") for cpu in (0, 1, 2)),
        ):
            self.write(f"{tracefs.TRACEFS}/{name}", text)
        self.guest(600, "g", (601, 602), {0: {"tsc-offset": "-7"}, 1: {"tsc-offset": "-8"}})

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def guest(self, pid: int, name: str, threads: tuple[int, ...], apics: dict[int, dict[str, str]]) -> None:
        """A qemu with threads of vCPUs from 0 on, and what debugfs has of its vCPUs."""
        self.write(
            f"proc/{pid}/cmdline", f"/x/qemu-system-x86_64\0-name\0{name},debug-threads=on\0-m\x001G\0"
        )
        for number, tid in enumerate(threads):
            self.write(f"proc/{pid}/task/{tid}/comm", f"CPU {number}/KVM\n")
        self.write(f"proc/{pid}/task/{pid}/comm", "qemu-system-x86\n")
        self.write(f"{tracing.DEBUGFS_KVM}/{pid}-19/halt_exits", "1\n")
        for apic, files in apics.items():
            for file, text in files.items():
                self.write(f"{tracing.DEBUGFS_KVM}/{pid}-19/vcpu{apic}/{file}", f"{text}\n")

    def made(self) -> None:
        """The kernel fills a new instance."""
        for name, text in (
            ("trace_clock", CLOCKS),
            ("tracing_on", "1\n"),
            ("buffer_size_kb", "7\n"),
            ("trace", TEXT),
            *((f"per_cpu/cpu{cpu}/{file}", "") for cpu in (0, 1, 2) for file in ("stats", "buffer_size_kb")),
        ):
            self.write(f"{self.instance.relative_to(self.root)}/{name}", text)
        for path in (self.tracefs / "events").glob("*/*"):
            for file in ("enable", "filter"):
                self.write(
                    f"{(self.instance / 'events').relative_to(self.root)}/{path.parent.name}/{path.name}/{file}",
                    "",
                )

    def read(self, name: str) -> str:
        return (self.instance / name).read_text()

    def snapshot(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.root)): path.read_text()
            for path in self.root.rglob("*")
            if path.is_file()
        }


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    pretended = Machine(tmp_path / "root")
    mkdir, rmdir, get = Path.mkdir, Path.rmdir, tracefs.get

    def make(path: Path, *arguments: Any, **keywords: Any) -> None:
        mkdir(path, *arguments, **keywords)
        if path == pretended.instance and not keywords:
            pretended.made()

    def remove(path: Path) -> None:
        if path == pretended.instance:
            shutil.rmtree(path)
        else:
            rmdir(path)

    def told(path: Path) -> str:
        text = get(path)
        # the TSC of this machine counts two ticks in a nanosecond
        return STATS.format(path.parent.name[3:], 2 * time.monotonic_ns()) if path.name == "stats" else text

    monkeypatch.setattr(Path, "mkdir", make)
    monkeypatch.setattr(Path, "rmdir", remove)
    monkeypatch.setattr(tracefs, "get", told)
    monkeypatch.setattr(tracing, "APART_NS", 20_000_000)
    yield pretended


# The host ---------------------------------------------------------------------------------------


def test_arm_records_the_cpus_with_the_tsc_and_what_wakes_threads_there(machine: Machine) -> None:
    tracing.arm(machine.root, [1, 2], 512)
    assert machine.read("trace_clock") == "x86-tsc"
    assert machine.read("tracing_on") == "1"
    sizes = [machine.read(f"per_cpu/cpu{cpu}/buffer_size_kb") for cpu in (0, 1, 2)]
    assert (machine.read("buffer_size_kb"), sizes) == ("64", ["", "512", "512"])
    enabled = {
        path.parent.name
        for path in (machine.instance / "events").glob("*/*/enable")
        if path.read_text() == "1"
    }
    assert enabled == {event.split("/")[1] for event in tracing.EVENTS} | {
        "local_timer_entry",
        "local_timer_exit",
    }
    assert machine.read("events/sched/sched_switch/filter") == "CPU == 1 || CPU == 2"
    assert machine.read("events/sched/sched_waking/filter") == "target_cpu == 1 || target_cpu == 2"
    assert machine.read("events/irq_vectors/local_timer_exit/filter") == "CPU == 1 || CPU == 2"


def test_stop_keeps_the_trace_and_what_joins_the_clocks(machine: Machine, tmp_path: Path) -> None:
    before = 2 * time.monotonic_ns()
    tracing.arm(machine.root, [2, 1])
    (machine.instance / "trace").write_text("the trace\n")
    host = tracing.stop(machine.root, tmp_path / "out")
    assert (tmp_path / "out/trace.txt").read_text() == "the trace\n"
    assert json.loads((tmp_path / "out/host.json").read_text()) == host
    assert machine.read("tracing_on") == "0"
    assert before < host["from_tsc"] < host["to_tsc"] - 30_000_000
    assert host["tsc_khz"] == pytest.approx(2_000_000, rel=0.01)
    assert 0 < host["tsc_error"] < 0.05
    assert host["cpus"] == [1, 2]
    assert host["buffers"]["1"] == {"entries": 1, "overrun": 1, "commit_overrun": 2, "dropped_events": 3}
    assert sorted(host["buffers"]) == ["0", "1", "2"]
    assert host["virtual_machines"] == [
        {
            "pid": 600,
            "name": "g",
            "vcpus": [
                {"vcpu": 0, "tid": 601, "tsc_offset": -7, "tsc_scaled": False},
                {"vcpu": 1, "tid": 602, "tsc_offset": -8, "tsc_scaled": False},
            ],
        }
    ]


def test_nothing_is_left_behind(machine: Machine, tmp_path: Path) -> None:
    before = machine.snapshot()
    tracing.arm(machine.root, [1])
    tracing.stop(machine.root, tmp_path / "out")
    assert tracing.disarm(machine.root)
    assert machine.snapshot() == before
    assert not tracing.disarm(machine.root)


def test_stop_can_be_repeated_and_tells_of_the_same_time(machine: Machine, tmp_path: Path) -> None:
    tracing.arm(machine.root, [1])
    (tmp_path / "file").write_text("")
    with pytest.raises(MeasureError, match="cannot be kept in"):
        tracing.stop(machine.root, tmp_path / "file")
    first, second = (tracing.stop(machine.root, tmp_path / name) for name in ("a", "b"))
    assert (first["from_tsc"], first["to_tsc"]) == (second["from_tsc"], second["to_tsc"])


@pytest.mark.parametrize(
    ("files", "scaled", "offset"),
    [
        (
            {"tsc-offset": "-9", "tsc-scaling-ratio": "4294967296", "tsc-scaling-ratio-frac-bits": "32"},
            False,
            -9,
        ),
        (
            {"tsc-offset": "-9", "tsc-scaling-ratio": "4294967297", "tsc-scaling-ratio-frac-bits": "32"},
            True,
            -9,
        ),
        ({"pid": "1"}, False, None),
        ({"tsc-offset": ""}, False, None),
    ],
)
def test_a_tsc_of_another_speed_and_an_offset_that_is_missing_are_told(
    machine: Machine, tmp_path: Path, files: dict[str, str], scaled: bool, offset: int | None
) -> None:
    machine.guest(700, "guest=h", (701,), {0: files})
    tracing.arm(machine.root, [1])
    host = tracing.stop(machine.root, tmp_path / "out")
    assert host["virtual_machines"][1] == {
        "pid": 700,
        "name": "h",
        "vcpus": [{"vcpu": 0, "tid": 701, "tsc_offset": offset, "tsc_scaled": scaled}],
    }


def test_vcpus_and_threads_are_joined_in_order_and_not_where_one_is_missing(
    machine: Machine, tmp_path: Path
) -> None:
    offsets = {apic: {"tsc-offset": str(apic)} for apic in (0, 2, 10)}
    machine.guest(700, "gaps", (701, 702, 703), offsets)
    machine.guest(800, "less", (801, 802), offsets)
    machine.write(f"{tracing.DEBUGFS_KVM}/900-19/vcpu0/tsc-offset", "1")  # its process has ended
    tracing.arm(machine.root, [1])
    found = {
        each["name"]: each["vcpus"] for each in tracing.stop(machine.root, tmp_path / "o")["virtual_machines"]
    }
    assert [(each["vcpu"], each["tid"], each["tsc_offset"]) for each in found["gaps"]] == [
        (0, 701, 0),
        (1, 702, 2),
        (2, 703, 10),
    ]
    assert found["less"] == []
    assert set(found) == {"g", "gaps", "less"}


def without(name: str) -> Callable[[Machine], object]:
    return lambda machine: shutil.rmtree(machine.root / name)


@pytest.mark.parametrize(
    ("spoil", "cpus", "reason", "hint"),
    [
        (without(tracefs.TRACEFS), [1], "tracefs is not at /sys/kernel/tracing", "mount -t tracefs"),
        (without(tracing.DEBUGFS_KVM), [1], "TSC offsets", "mount -t debugfs"),
        (without(f"{tracefs.TRACEFS}/events/kvm"), [1], "no event kvm:kvm_entry", "modprobe kvm"),
        (without(f"{tracefs.TRACEFS}/events/irq"), [1], "no event irq:irq_handler_entry", "CONFIG_FTRACE"),
        (
            lambda machine: machine.write(f"{tracefs.TRACEFS}/trace_clock", "[local]"),
            [1],
            "no clock x86-tsc",
            "x86",
        ),
        (lambda machine: machine.write(tracing.STATE, "{}"), [1], "armed already", "disarm"),
        (lambda machine: machine.instance.mkdir(), [1], "armed already", "disarm"),
        (lambda machine: None, [1, 3], "no CPU 3", "CPUs of this machine"),
        (lambda machine: None, [], "nothing to record", "--cpus"),
    ],
)
def test_what_is_missing_is_told_and_nothing_is_left(
    machine: Machine, spoil: Callable[[Machine], object], cpus: list[int], reason: str, hint: str
) -> None:
    spoil(machine)
    before = machine.snapshot()
    with pytest.raises(MeasureError, match=reason) as refused:
        tracing.arm(machine.root, cpus)
    assert hint in refused.value.hint
    assert machine.snapshot() == before


def test_what_fails_halfway_is_taken_back(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    before, put = machine.snapshot(), tracefs.put

    def refuse(path: Path, text: str) -> None:
        if path.parent.name == "kvm_exit":
            raise MeasureError("no", "no")
        put(path, text)

    monkeypatch.setattr(tracefs, "put", refuse)
    with pytest.raises(MeasureError):
        tracing.arm(machine.root, [1])
    assert machine.snapshot() == before


def test_a_clock_that_counts_seconds_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    get = tracefs.get
    monkeypatch.setattr(tracefs, "get", lambda path: get(path).replace("now ts: ", "now ts: 5."))
    with pytest.raises(MeasureError, match="does not count the TSC"):
        tracing.arm(machine.root, [1])
    assert not machine.instance.exists()


def test_a_buffer_that_does_not_tell_its_losses_is_refused(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracing.arm(machine.root, [1])
    get = tracefs.get
    monkeypatch.setattr(tracefs, "get", lambda path: get(path).replace("dropped", "gone"))
    with pytest.raises(MeasureError, match="does not tell dropped events"):
        tracing.stop(machine.root, tmp_path / "out")


@pytest.mark.parametrize(
    ("state", "reason"),
    [(None, "no trace is armed"), ("", "empty"), ("[1]", "not of its form"), ("{}", "form")],
)
def test_stop_wants_a_trace_that_was_armed(
    machine: Machine, tmp_path: Path, state: str | None, reason: str
) -> None:
    tracing.arm(machine.root, [1])
    (machine.root / tracing.STATE).unlink()
    if state is not None:
        machine.write(tracing.STATE, state)
    with pytest.raises(MeasureError, match=reason):
        tracing.stop(machine.root, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "1-", "-1", "1-2-3", " "])
def test_a_list_of_cpus_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(MeasureError, match="no list of CPUs"):
        tracefs.cpulist(text)


def test_a_list_of_cpus_is_read() -> None:
    assert tracefs.cpulist("5,1-3,2") == [1, 2, 3, 5]


# The guest --------------------------------------------------------------------------------------

CYCLICTEST = """\
#!{python}
import os, pathlib, sys, time
root = pathlib.Path({root!r})
task = root / "proc" / str(os.getpid()) / "task" / "1"
task.mkdir(parents=True)
(task / "status").write_text("voluntary_ctxt_switches:\\t9\\n")
fields = ["0"] * 50
fields[38] = "1"
(task / "stat").write_text("1 (a) b) " + " ".join(fields))
tracing = root / {tracefs!r}
told = [(tracing / name).read_text() for name in ("trace_clock", "tracing_on")]
(root / "seen").write_text(repr([sys.argv[1:], *told]))
{body}
"""
MARK = "           <...>-184     [001] ..... 266721488810: tracing_mark_write: hit latency threshold (225225 > 200)\n"
BROKE = f"""\
(tracing / "trace").write_text({TEXT!r} + {MARK!r})
print("# Thread Ids: 00184\\n# Break thread: 184\\n# Break value: 225225")
"""


@pytest.fixture
def cyclictest(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program into the PATH that measures as `body` says."""
    machine.write("sys/kernel/debug/tracing/trace_marker", "")

    def put(body: str) -> None:
        path = tmp_path / "bin" / "cyclictest"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            CYCLICTEST.format(
                python=sys.executable,
                root=str(machine.root),
                tracefs=tracefs.TRACEFS,
                body=textwrap.dedent(body),
            )
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    return put


def options(root: Path, out: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tracing.add_parser(parser.add_subparsers())
    command = ["trace", "break", "--root", str(root), "--place", "guest-g", "--cpus", "1", "--limit", "200"]
    return parser.parse_args([*command, "--seconds", "5", "--out", str(out), *more])


def guest_trace(machine: Machine) -> tuple[str, ...]:
    return tuple((machine.tracefs / name).read_text() for name in ("trace_clock", "tracing_on", "trace"))


def test_the_moment_of_a_latency_is_kept(
    machine: Machine, cyclictest: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cyclictest("time.sleep(0.3)\n" + BROKE)
    chosen = options(machine.root, tmp_path / "out.json", "--housekeeping", "0", "--interval", "500")
    assert chosen.run(chosen) == 0
    answer = json.loads((tmp_path / "out.json").read_text())
    assert {
        name: answer[name] for name in ("cpu", "tsc", "latency_us", "limit_us", "exceeded", "place", "cpus")
    } == {
        "cpu": 1,
        "tsc": 266721488810,
        "latency_us": 225225,
        "limit_us": 200,
        "exceeded": True,
        "place": "guest-g",
        "cpus": [1],
    }
    assert capsys.readouterr().out.splitlines()[0] == "measuring"
    arguments = "-m -q --policy=fifo -d0 -i500 -p80 --mainaffinity=0 -t 1 -a 1 -D 5 -b 200 --tracemark"
    assert (machine.root / "seen").read_text() == repr([arguments.split(), "x86-tsc", "1"])
    assert guest_trace(machine) == ("local", "1", "")


def test_a_guest_that_is_never_late_says_so(
    machine: Machine, cyclictest: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cyclictest("print('T: 0 ...')")
    chosen = options(machine.root, tmp_path / "out.json")
    assert chosen.run(chosen) == 0
    answer = json.loads((tmp_path / "out.json").read_text())
    assert answer["exceeded"] is False
    assert "tsc" not in answer
    assert capsys.readouterr().out.splitlines()[-1] == "no latency above 200 µs"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print('Unable to change scheduling policy!'); sys.exit(1)", "status 1: Unable to change"),
        ("sys.exit(3)", "status 3: it said nothing"),
        ("print('# Break value: 225225')", "a latency of 225225 µs, but its mark is not in the trace"),
        (BROKE.replace("> 200)", "> 100)"), "its mark is not in the trace"),
        (BROKE.replace("value: 225225", "value: 225226"), "its mark is not in the trace"),
        (BROKE.replace("+ ' ", "+ 2 * ' "), "another cyclictest"),
        (BROKE.replace("# Break value: 225225", ""), "another cyclictest"),
    ],
)
def test_what_does_not_fit_together_is_refused_and_the_trace_is_as_it_was(
    machine: Machine, cyclictest: Callable[[str], None], tmp_path: Path, body: str, reason: str
) -> None:
    cyclictest(body)
    chosen = options(machine.root, tmp_path / "out.json")
    with pytest.raises(MeasureError, match=reason):
        chosen.run(chosen)
    assert guest_trace(machine) == ("local", "1", "")
    assert not (tmp_path / "out.json").exists()


def test_cyclictest_that_does_not_end_is_ended(
    machine: Machine, cyclictest: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaktrace, "GRACE_S", 1)
    cyclictest("(root / 'pid').write_text(str(os.getpid()))\ntime.sleep(60)")
    chosen = options(machine.root, tmp_path / "out.json", "--seconds", "1")
    with pytest.raises(MeasureError, match="did not end in 2 s"):
        chosen.run(chosen)
    with pytest.raises(ProcessLookupError):
        os.kill(int((machine.root / "pid").read_text()), 0)


def test_cyclictest_whose_threads_do_not_begin_is_told(
    machine: Machine, cyclictest: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaktrace, "GRACE_S", 1)
    cyclictest("time.sleep(60)")
    chosen = options(machine.root, tmp_path / "out.json", "--cpus", "0-1")
    with pytest.raises(MeasureError, match="does not measure after 1 s"):
        chosen.run(chosen)


def test_a_signal_leaves_the_trace_as_it_was(
    machine: Machine, cyclictest: Callable[[str], None], tmp_path: Path
) -> None:
    cyclictest("os.kill(os.getppid(), 15)\ntime.sleep(60)")
    chosen = options(machine.root, tmp_path / "out.json")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(EndedError) as ended:
        chosen.run(chosen)
    assert ended.value.number == signal.SIGTERM
    assert guest_trace(machine) == ("local", "1", "")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("spoil", "more", "reason"),
    [
        (
            lambda machine: machine.write(f"{tracefs.TRACEFS}/current_tracer", "timerlat\n"),
            [],
            "tracer timerlat",
        ),
        (without(tracefs.TRACEFS), [], "tracefs is not at"),
        (lambda machine: None, ["--limit", "0"], "nothing to measure"),
        (lambda machine: None, ["--seconds", "0"], "nothing to measure"),
        (lambda machine: None, ["--cpus", "x"], "no list of CPUs"),
        (lambda machine: None, ["--place", "host"], "no guest's place"),
    ],
)
def test_a_guest_that_cannot_measure_says_why(
    machine: Machine, tmp_path: Path, spoil: Callable[[Machine], object], more: list[str], reason: str
) -> None:
    spoil(machine)
    chosen = options(machine.root, tmp_path / "out.json", *more)
    with pytest.raises(MeasureError, match=reason) as refused:
        chosen.run(chosen)
    assert refused.value.hint


def test_a_guest_without_cyclictest_is_told_what_to_install(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.write("sys/kernel/debug/tracing/trace_marker", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    chosen = options(machine.root, tmp_path / "out.json")
    with pytest.raises(MeasureError, match="cyclictest is not there") as refused:
        chosen.run(chosen)
    assert "rt-tests" in refused.value.hint


def test_without_debugfs_tracefs_is_put_there_for_cyclictest_alone() -> None:
    # what it does with tracefs needs its kernel; that cyclictest's arguments come through does not
    *wrapping, script, name = breaktrace._PRIVATELY
    assert wrapping == ["unshare", "--mount", "sh", "-ec"]
    commands = script.split("; ")
    assert commands[1:3] == [
        "mkdir -p /sys/kernel/debug/tracing",
        "mount -t tracefs none /sys/kernel/debug/tracing",
    ]
    run = subprocess.run(
        ["sh", "-ec", commands[-1], name, "echo", "-b", "2  3"], capture_output=True, text=True
    )
    assert run.stdout == "-b 2  3\n"
