"""`virt-rt-measure run`, `status` and `stop`: what is refused, what is left, and how an interrupted run goes on."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline import checktool
from pipeline.gate import parse_cyclictest
from pipeline.measure import __main__ as command
from pipeline.measure import detach, hwlat, loads, machineinfo, progress, record, runner, tools
from pipeline.measure import request as requests
from pipeline.measure.problems import MeasureError
from pipeline.measure.processes import Keeper, members, parse_stat
from tests import measuring_standins
from tests.test_hostcheck_tool import pythons

ROOT = Path(__file__).resolve().parent.parent
needs_priorities = pytest.mark.skipif(
    not measuring_standins.may_be_real_time(), reason="no right to SCHED_FIFO, or fewer than two CPUs"
)
CYCLICTEST = record.Stage("cyclictest", "cyclictest", [1], 80, 1000, 2, 100, ["hackbench"], [])
LOAD = record.Stage("load", "load", [], 0, 0, 1, 0, ["hackbench"], [])
COMMAND = record.Stage("mine", "command", [], 0, 0, 5, 0, [], ["sh", "-c", "echo said; echo wrong >&2"])


def asked(*stages: record.Stage, **changes: Any) -> record.Request:
    request = record.Request(
        place="host",
        platform="qemu-q35",
        kernel_release=os.uname().release,
        plan_sha256="0" * 64,
        isolated=[1],
        housekeeping=[0],
        segment_s=3600,
        stages=list(stages),
    )
    return replace(request, **changes)


class Bench(NamedTuple):
    """A directory with stand-ins in PATH, the shipped program, and a record."""

    directory: Path
    tool: Path

    @property
    def kept(self) -> Path:
        return self.directory / "record"

    def request(self, request: record.Request) -> Path:
        path = self.directory / "request.json"
        record.write(path, request)
        return path

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.tool, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def call(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.tool, *words], capture_output=True, text=True, check=False, timeout=60)

    def measure(self, request: record.Request, *words: str) -> subprocess.CompletedProcess[str]:
        return self.call("run", "--request", self.request(request), "--record", self.kept, *words)

    def run(self, name: str) -> record.Run:
        return record.read(self.kept / name / record.RUN, record.Run)

    def current(self, name: str) -> None:
        until(lambda: name in (self.kept / progress.STATE).read_text())
        until(lambda: (self.kept / name / "stdout").exists())

    def left(self) -> list[str]:
        """Programs of this bench that still run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode(errors="replace")
                place = str((path.parent / "cwd").readlink())
            except OSError:
                continue
            if str(self.directory) in words + place and int(path.parent.name) != os.getpid():
                found.append(words.replace("\0", " "))
        return found


def until(condition: Any, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    tool = tmp_path / "virt-rt-measure"
    tool.write_bytes(checktool.MEASURE.bundle(ROOT))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{measuring_standins.tools(tmp_path / 'bin')}:{os.environ['PATH']}")
    bench = Bench(tmp_path, tool)
    yield bench
    until(lambda: bench.left() == [])


# Requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (asked(CYCLICTEST, place="Host"), "Host is neither host nor guest"),
        (asked(CYCLICTEST, kernel_release=""), "kernel_release is empty"),
        (asked(CYCLICTEST, plan_sha256="00"), "plan_sha256 is not 64 hex digits"),
        (asked(CYCLICTEST, segment_s=0), "segment_s: 0"),
        (asked(CYCLICTEST, housekeeping=[]), "housekeeping is empty"),
        (asked(CYCLICTEST, housekeeping=[0, 1]), "CPU 1 is isolated and keeps house"),
        (asked(CYCLICTEST, isolated=[2, 1]), "isolated: [2, 1] is not ascending"),
        (asked(), "stages is empty"),
        (asked(CYCLICTEST, CYCLICTEST), "stages[0] cyclictest: its name is used twice"),
        (asked(replace(CYCLICTEST, name="a b")), "its name is not of lower-case letters"),
        (asked(replace(CYCLICTEST, tool="perf")), "there is no tool perf"),
        (asked(replace(CYCLICTEST, cpus=[])), "cyclictest measures CPUs: name them"),
        (asked(replace(CYCLICTEST, cpus=[1, 1])), "cpus: [1, 1] is not ascending"),
        (asked(replace(CYCLICTEST, priority=0)), "priority: 0 is no priority for cyclictest"),
        (asked(replace(CYCLICTEST, priority=100)), "priority: 100"),
        (asked(replace(CYCLICTEST, duration_s=0)), "duration_s: 0"),
        (asked(replace(CYCLICTEST, interval_us=0)), "interval_us: 0"),
        (asked(replace(CYCLICTEST, histogram_us=0)), "histogram_us: 0"),
        (asked(replace(CYCLICTEST, loads=["fire"])), "there is no load fire"),
        (asked(replace(CYCLICTEST, loads=["disk", "disk"])), "a load is named twice"),
        (asked(replace(CYCLICTEST, argv=["x"])), "argv is for command and irqlat, not for cyclictest"),
        (asked(replace(CYCLICTEST, tool="irqlat", cpus=[1, 2])), "irqlat measures one CPU at a time"),
        (asked(replace(LOAD, loads=[])), "no load is named"),
        (asked(replace(LOAD, cpus=[1])), "load measures no CPUs"),
        (asked(replace(COMMAND, argv=[])), "argv is empty"),
    ],
)
def test_what_cannot_be_asked(tmp_path: Path, request_: record.Request, said: str) -> None:
    record.write(tmp_path / "request.json", request_)
    with pytest.raises(MeasureError) as caught:
        requests.load(tmp_path / "request.json")
    assert said in caught.value.message


def test_stages_are_cut_into_segments_but_for_loads_and_commands() -> None:
    request = asked(replace(CYCLICTEST, duration_s=7), replace(LOAD, duration_s=9), COMMAND, segment_s=3)
    assert [(run.name, run.segment, run.seconds) for run in requests.planned(request)] == [
        ("001-cyclictest", 0, 3),
        ("002-cyclictest", 1, 3),
        ("003-cyclictest", 2, 1),
        ("004-load", 0, 9),
        ("005-command", 0, 5),
    ]


def test_half_a_day_is_twelve_runs() -> None:
    assert len(requests.planned(asked(replace(CYCLICTEST, duration_s=43200)))) == 12


# Tools -----------------------------------------------------------------------------------------


def test_cyclictest_is_called_as_the_boot_proof_calls_it() -> None:
    stage = replace(CYCLICTEST, cpus=[1, 3])
    (run,) = requests.planned(asked(stage))
    assert " ".join(tools.TOOLS["cyclictest"].argv(run, [0, 2])) == (
        "cyclictest -m -p80 -i1000 -d0 --policy=fifo -a 1,3 -t 2 --mainaffinity=0,2 -q -D 2 -h 100 "
        "--json=cyclictest.json"
    )


def test_irqlat_is_called_with_the_options_that_it_has() -> None:
    source = (ROOT / "recipes/drivers/irqlat/irqlat.c").read_text()
    (run,) = requests.planned(asked(replace(CYCLICTEST, name="i", tool="irqlat")))
    options = [word.partition("=")[0] for word in tools.TOOLS["irqlat"].argv(run, [0])[1:]]
    assert options
    for option in options:
        assert f'{{ "{option.removeprefix("--")}", required_argument' in source


def test_coarse_timers_are_refused_to_cyclictest_and_to_nothing_else() -> None:
    said = tools.refusal(replace(CYCLICTEST, loads=[]), 4_000_000)
    assert said == "timers of 4 ms: high-resolution timers are off; use irqlat"
    assert tools.refusal(replace(COMMAND, loads=[]), 4_000_000) == ""


def test_a_tracer_that_the_kernel_lacks_is_named(tmp_path: Path) -> None:
    stage = replace(LOAD, name="hwlat", tool="hwlat", cpus=[1], loads=[])
    assert tools.refusal(stage, 1, tmp_path).startswith("no tracefs: ")
    (tmp_path / "available_tracers").write_text("blk function nop\n")
    assert tools.refusal(stage, 1, tmp_path) == "the kernel has no hwlat tracer"
    (tmp_path / "available_tracers").write_text("hwlat nop\n")
    assert tools.refusal(stage, 1, tmp_path) == ""


def test_gaps_are_read_from_the_tracers_lines() -> None:
    text = (
        "# tracer: hwlat\n"
        "           <...>-1729    [002] d....   678.473449: #1     inner/outer(us):   11/12    ts:1581527483.343962693"
        " count:6\n"
        "CPU:1 [LOST 2 EVENTS]\n"
        "          hwlatd/1-10    [001] .....   680.5: #2 inner/outer(us): 0/7 ts:1.2 count:1 nmi-total:4 nmi-count:1\n"
    )
    assert hwlat.parse(text) == [
        {"cpu": 2, "at_s": 678.473449, "inner_us": 11, "outer_us": 12},
        {"cpu": 1, "at_s": 680.5, "inner_us": 0, "outer_us": 7},
    ]
    with pytest.raises(MeasureError, match="not of its form"):
        hwlat.parse("hwlatd-1 [001]: #1 inner/outer(us): broken")


def test_stress_runs_without_stress_ng(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    nice, *argv = loads.command("stress", [0, 2])[2:]
    assert nice == "19", "what measures comes first"
    assert argv[0] == sys.executable and argv[-1] == "2"
    running = subprocess.Popen(argv, start_new_session=True)
    try:
        until(
            lambda: (
                sum(each.cpu_s for each in members(running.pid)) > 0.05
                and len(list(members(running.pid))) == 2
            )
        )
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def test_processes_with_any_name_are_read() -> None:
    line = "7 (a) (b c) S 1 7 9 0 -1 0 0 0 0 0 100 50 200 0 20 0 1 0 5 0 0 " + "0 " * 15 + "80 1 0\n"
    found = parse_stat(line)
    assert (found.name, found.state, found.session, found.priority, found.policy) == (
        "a) (b c",
        "S",
        9,
        80,
        1,
    )
    assert (found.cpu_s, found.reaped_cpu_s) == (1.5, 2.0)


# What is left ----------------------------------------------------------------------------------


@needs_priorities
def test_a_record_is_whole(bench: Bench) -> None:
    done = bench.measure(asked(CYCLICTEST, LOAD, COMMAND))
    assert (done.returncode, done.stdout) == (0, ""), done
    run = bench.run("001-cyclictest")
    assert (run.status, run.refused, run.segment, run.stage) == (0, "", 0, "cyclictest")
    assert [(t.policy, t.priority, t.cpus) for t in run.threads] == [(0, 0, [0]), (1, 80, [1])]
    (load,) = run.loads
    assert (load.name, load.alive, load.cpus) == ("hackbench", True, [0])
    assert load.cpu_s > 0
    assert 2e9 <= run.ended.monotonic - run.began.monotonic < 20e9
    assert abs((run.ended.realtime - run.began.realtime) - (run.ended.boottime - run.began.boottime)) < 1e9
    assert set(run.files) == {"stdout", "stderr", "cyclictest.json", "load-hackbench.log"}
    for name, digest in run.files.items():
        assert record.sha256(bench.kept / "001-cyclictest" / name) == digest
    assert parse_cyclictest((bench.kept / "001-cyclictest/cyclictest.json").read_text())["num_threads"] == 1
    assert (bench.run("002-load").argv, bench.run("002-load").loads[0].alive) == ([], True)
    assert (bench.kept / "003-command/stdout").read_text() == "said\n"
    assert (bench.kept / "003-command/stderr").read_text() == "wrong\n"
    end = record.read(bench.kept / record.END, record.End)
    assert list(end.runs) == ["001-cyclictest", "002-load", "003-command"]
    assert end.runs["002-load"] == record.sha256(bench.kept / "002-load/run.json")
    machine = record.read(bench.kept / record.MACHINE, record.Machine)
    assert (machine.kernel_release, machine.boot_id) == (os.uname().release, run.boot_id)
    assert machine.hypervisor == ("hypervisor" in Path("/proc/cpuinfo").read_text())
    again = bench.measure(asked(CYCLICTEST, LOAD, COMMAND))
    assert (again.returncode, again.stderr) == (0, "")
    assert record.read(bench.kept / record.END, record.End) == end


@pytest.mark.skipif(
    shutil.which("cyclictest") is None or shutil.which("hackbench") is None,
    reason="rt-tests are not installed: `make test` installs them",
)
@needs_priorities
def test_real_cyclictest_and_hackbench_are_recorded(bench: Bench) -> None:
    for name in ("cyclictest", "hackbench"):
        (bench.directory / "bin" / name).unlink()
    done = bench.measure(asked(replace(CYCLICTEST, loads=["hackbench", "disk"])))
    assert done.returncode == 0, done
    run = bench.run("001-cyclictest")
    assert [(t.policy, t.priority, t.cpus) for t in run.threads if t.policy] == [(1, 80, [1])]
    assert [(load.name, load.alive, load.cpu_s > 0.01) for load in run.loads] == [
        ("hackbench", True, True),
        ("disk", True, True),
    ]
    data = parse_cyclictest((bench.kept / "001-cyclictest/cyclictest.json").read_text())
    assert data["thread"]["0"]["cpu"] == 1
    assert not (bench.kept / "001-cyclictest/disk-load").exists()


def test_a_tool_that_fails_is_recorded_and_makes_the_run_fail(bench: Bench) -> None:
    done = bench.measure(asked(replace(COMMAND, argv=["sh", "-c", "exit 7"])))
    assert done.returncode == 1
    assert bench.run("001-command").status == 7
    assert (
        bench.call("status", "--record", bench.kept).stdout.splitlines()[1].startswith("failed: 001-command")
    )


def test_a_tool_that_does_not_end_is_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "GRACE_S", 1)
    request = asked(replace(COMMAND, duration_s=1, argv=["sh", "-c", "sleep 600 & sleep 600"]))
    bench.kept.mkdir()
    affinity = os.sched_getaffinity(0)
    try:
        assert runner.run(request, bench.kept, lambda: None) == 1
    finally:
        os.sched_setaffinity(0, affinity)
    assert bench.run("001-command").status == -signal.SIGTERM


@pytest.mark.parametrize("required", [True, False])
def test_what_is_not_installed_is_recorded_as_refused(bench: Bench, required: bool) -> None:
    missing = replace(COMMAND, name="none", argv=["no-such-program"], required=required)
    done = bench.measure(asked(missing, COMMAND))
    assert done.returncode == (1 if required else 0)
    assert bench.run("001-command").refused == "no-such-program is not installed"
    assert bench.run("002-command").refused == ""
    status = json.loads(bench.call("status", "--json", "--record", bench.kept).stdout)
    assert (status["refused"], status["complete"]) == (
        {"none": "no-such-program is not installed"},
        not required,
    )


def test_a_load_that_cannot_live_is_told(bench: Bench) -> None:
    (bench.directory / "bin/hackbench").write_text("#!/bin/sh\necho no sockets here >&2\nexit 3\n")
    done = bench.measure(asked(LOAD))
    assert done.returncode == 1
    assert bench.run("001-load").refused == "the load hackbench ended at once: no sockets here"


def test_a_load_that_dies_meanwhile_is_told(bench: Bench) -> None:
    (bench.directory / "bin/hackbench").write_text("#!/bin/sh\nexec sleep 0.8\n")
    done = bench.measure(asked(LOAD))
    assert done.returncode == 0
    assert [load.alive for load in bench.run("001-load").loads] == [False]


# What is refused -------------------------------------------------------------------------------


def refused(bench: Bench, request: record.Request, said: str, *words: str) -> None:
    done = bench.measure(request, *words)
    assert (done.returncode, done.stdout) == (2, "")
    first, hint = done.stderr.splitlines()
    assert said in first and hint.startswith("  ") and hint.strip()
    assert not list(bench.kept.glob("0*"))


@pytest.mark.parametrize("words", [(), ("--detach",)])
def test_what_is_not_the_machine_that_was_meant_is_refused(bench: Bench, words: Sequence[str]) -> None:
    refused(bench, asked(COMMAND, kernel_release="6.0-other"), "the one to measure 6.0-other", *words)
    refused(bench, asked(replace(CYCLICTEST, cpus=[4095])), "CPU 4095 is not there", *words)


def test_a_request_that_is_cut_short_is_refused(bench: Bench) -> None:
    path = bench.request(asked(COMMAND))
    path.write_text(path.read_text()[:-20])
    done = bench.call("run", "--request", path, "--record", bench.kept)
    assert done.returncode == 2 and "cut short" in done.stderr


def test_another_records_directory_is_refused(bench: Bench) -> None:
    assert bench.measure(asked(COMMAND)).returncode == 0
    done = bench.measure(asked(replace(COMMAND, duration_s=6)))
    assert done.returncode == 2 and "is the record of another request" in done.stderr
    (bench.kept / record.REQUEST).unlink()
    done = bench.measure(asked(COMMAND))
    assert done.returncode == 2 and "is no record: it has 001-command" in done.stderr


def test_no_right_to_priorities_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machineinfo, "may_be_fifo", lambda priority: False)
    with pytest.raises(MeasureError, match="no right to SCHED_FIFO with priority 80"):
        runner.examine(asked(replace(CYCLICTEST, cpus=[0])), bench.directory)


def test_a_full_disk_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    request = asked(replace(LOAD, loads=["disk"]), isolated=[])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(runner.LOAD_BYTES))
    with pytest.raises(MeasureError, match="has 64 MiB free, 65 are wanted"):
        runner.examine(request, bench.directory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(runner.LOAD_BYTES + runner.RUN_BYTES))
    runner.examine(request, bench.directory)


def test_another_machine_does_not_go_on_with_a_record_but_another_boot_does(bench: Bench) -> None:
    assert bench.measure(asked(COMMAND)).returncode == 0
    path = bench.kept / record.MACHINE
    machine = record.read(path, record.Machine)
    record.write(path, replace(machine, boot_id="another"))
    assert bench.measure(asked(COMMAND)).returncode == 0
    record.write(path, replace(machine, cmdline="isolcpus=9"))
    done = bench.measure(asked(COMMAND))
    assert done.returncode == 2 and "is of another machine: cmdline was isolcpus=9, is " in done.stderr


def test_a_run_that_was_damaged_is_not_taken_for_done(bench: Bench) -> None:
    assert bench.measure(asked(COMMAND)).returncode == 0
    path = bench.kept / "001-command/run.json"
    path.write_text(path.read_text()[:-30])
    done = bench.measure(asked(COMMAND))
    assert done.returncode == 2 and "cut short" in done.stderr


# Interrupted, and gone on with -----------------------------------------------------------------

TWICE = asked(replace(CYCLICTEST, duration_s=4, loads=["hackbench", "stress", "disk"]), segment_s=2)


@needs_priorities
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_an_interrupted_run_leaves_nothing_and_goes_on(bench: Bench, number: int, status: int) -> None:
    running = bench.start("run", "--request", bench.request(TWICE), "--record", bench.kept)
    bench.current("002-cyclictest")
    time.sleep(0.3)
    os.kill(running.pid, number)
    running.communicate(timeout=30)
    assert running.returncode == status
    until(lambda: bench.left() == [])
    assert not (bench.kept / "002-cyclictest/run.json").exists()
    told = bench.call("status", "--record", bench.kept)
    assert told.returncode == 4 and "interrupted, 1 of 2 runs, 2 s left" in told.stdout
    first = (bench.kept / "001-cyclictest/run.json").read_bytes()
    assert bench.measure(TWICE).returncode == 0
    assert (bench.kept / "001-cyclictest/run.json").read_bytes() == first
    assert (bench.kept / "002-cyclictest.interrupted-1/stdout").exists()
    assert bench.run("002-cyclictest").status == 0
    assert len(record.read(bench.kept / record.END, record.End).runs) == 2


@needs_priorities
def test_one_record_is_worked_on_by_one_at_a_time(bench: Bench) -> None:
    request = asked(replace(CYCLICTEST, duration_s=60))
    running = bench.start("run", "--request", bench.request(request), "--record", bench.kept)
    bench.current("001-cyclictest")
    for words in ((), ("--detach",)):
        done = bench.measure(request, *words)
        assert done.returncode == 2 and "another virt-rt-measure works on" in done.stderr
    told = json.loads(bench.call("status", "--json", "--record", bench.kept).stdout)
    assert (told["state"], told["pid"], told["current"]) == ("running", running.pid, "001-cyclictest")
    stopped = bench.call("stop", "--record", bench.kept)
    assert (stopped.returncode, stopped.stdout) == (0, "ended\n")
    running.communicate(timeout=30)
    assert running.returncode == 143
    assert bench.call("stop", "--record", bench.kept).stdout == "it had ended\n"


@needs_priorities
def test_a_detached_run_outlives_who_started_it(bench: Bench) -> None:
    request = bench.request(asked(CYCLICTEST))
    command_ = f"{bench.tool} run --request {request} --record {bench.kept} --detach; exec sleep 60"
    session = subprocess.Popen(["sh", "-c", command_], start_new_session=True)
    until(lambda: progress.worker(bench.kept) is not None and (bench.kept / progress.STATE).exists())
    os.killpg(session.pid, signal.SIGHUP)
    session.wait()
    assert bench.call("status", "--record", bench.kept).returncode == 3
    done = bench.call("status", "--wait", "--record", bench.kept)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "host: finished, 1 of 1 runs")
    assert "001-cyclictest: cyclictest, 2 s" in (bench.kept / progress.LOG).read_text()


def test_where_systemd_is_a_detached_run_is_a_unit(bench: Bench) -> None:
    """A stand-in: it starts what it is asked to, with the output that it is asked for."""
    if os.geteuid() != 0:
        pytest.skip("units of the system are root's")
    log = bench.directory / "asked"
    (bench.directory / "bin/systemd-run").write_text(
        f'#!/bin/sh\necho "$*" >{log}\nfor word; do case $word in\n'
        "--property=StandardOutput=append:*) out=${word#*append:}; shift ;;\n"
        "--*) shift ;;\n*) break ;;\nesac; done\n"
        'setsid "$@" >>"$out" 2>&1 </dev/null &\n'
    )
    (bench.directory / "bin/systemd-run").chmod(0o755)
    request = bench.request(asked(COMMAND))
    bench.kept.mkdir()
    (bench.directory / "bin/systemctl").write_text("#!/bin/sh\nexit 0\n")
    (bench.directory / "bin/systemctl").chmod(0o755)
    detach.start(request, bench.kept, booted=bench.directory)
    until(lambda: (bench.kept / record.END).exists())
    assert "--unit=virt-rt-measure-" in log.read_text() and "--collect" in log.read_text()
    (bench.directory / "bin/systemd-run").write_text("#!/bin/sh\necho refused >&2\nexit 5\n")
    with pytest.raises(MeasureError, match="systemd-run ended with status 5: refused"):
        detach.start(request, bench.kept, booted=bench.directory)


def test_what_a_detached_run_refuses_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.kept.mkdir()
    request = bench.request(asked(COMMAND, kernel_release="6.0-other"))
    with pytest.raises(MeasureError, match="the one to measure 6.0-other"):
        detach.start(request, bench.kept, booted=bench.directory / "none")


def test_a_directory_without_record_has_no_status(bench: Bench) -> None:
    for words in (["status"], ["status", "--wait"], ["stop"]):
        done = bench.call(*words, "--record", bench.kept)
        assert done.returncode == 2 and "request.json" in done.stderr


def test_the_keeper_kills_what_was_left() -> None:
    keeper = Keeper()
    left = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 600 & wait"], start_new_session=True)
    keeper.keep(left.pid)
    keeper.close()
    assert left.wait(10) == -signal.SIGKILL
    assert list(members(left.pid)) == []


# The file that is shipped ----------------------------------------------------------------------


def test_the_tool_has_its_package_and_nothing_else(bench: Bench) -> None:
    with zipfile.ZipFile(bench.tool) as archive:
        names = archive.namelist()
    wanted = {path.name for path in (ROOT / "pipeline" / "measure").glob("*.py")}
    assert set(names) == {"__main__.py", *(f"virt_rt_measure/{name}" for name in wanted)}


def test_measuring_does_not_wait_for_what_only_judging_needs(bench: Bench) -> None:
    def read(*arguments: str) -> set[str]:
        told = subprocess.run(
            [sys.executable, "-I", "-X", "importtime", bench.tool, *arguments, "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        return set(re.findall(r"virt_rt_measure\.(\w+)", told))

    judging = {"placecheck", "expectations", "evidence", "breaktrace", "tracefs"}
    assert read("run").isdisjoint(judging)
    assert "runner" in read("run")
    assert "placecheck" in read("judge") and "breaktrace" not in read("judge")
    assert judging <= read()


def test_the_tool_needs_no_more_than_an_old_standard_library() -> None:
    beside = {path.stem for path in checktool.MEASURE.sources(ROOT)}  # in a step its files lie side by side
    for path in checktool.MEASURE.sources(ROOT):
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 9))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names | beside, path


@pytest.mark.parametrize("python", pythons())
def test_the_tool_runs_alone(bench: Bench, python: str) -> None:
    words = ["run", "--request", str(bench.request(asked(COMMAND))), "--record", str(bench.kept)]
    done = subprocess.run(
        [python, "-I", "-S", str(bench.tool), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    assert bench.run("001-command").status == 0


def test_a_checkout_is_as_good_as_the_file(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["status", "--record", str(bench.kept)]) == 2
    assert "request.json" in capsys.readouterr().err
    done = subprocess.run([*tools.myself(), "--help"], capture_output=True, text=True, check=True)
    assert "virt-rt-measure" in done.stdout


def test_the_tracer_is_set_read_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory stands in for tracefs, and a pipe for what the kernel would say."""
    tracing, out = tmp_path / "tracing", tmp_path / "out"
    detector, instance = tracing / "hwlat_detector", tracing / "instances" / hwlat.INSTANCE
    for directory in (detector, tracing / "instances", out):
        directory.mkdir(parents=True)
    before = {"width": "500000\n", "window": "1000000\n", "mode": "none [round-robin] per-cpu\n"}
    for name, value in before.items():
        (detector / name).write_text(value)
    (tracing / "tracing_thresh").write_text("0\n")
    make, remove = Path.mkdir, Path.rmdir

    def mkdir(self: Path, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        if self == instance:
            for name in ("trace_clock", "tracing_cpumask", "current_tracer"):
                (self / name).write_text("nop\n")
            make(self / "per_cpu")
            make(self / "per_cpu/cpu1")
            (self / "per_cpu/cpu1/stats").write_text("entries: 1\noverrun: 2\ndropped events: 3\n")
            os.mkfifo(self / "trace_pipe")

    def rmdir(self: Path) -> None:
        if self == instance:
            seen.update({path.name: path.read_text() for path in self.iterdir() if path.is_file()})
            shutil.rmtree(self)
        else:
            remove(self)

    def lines(pipe: int, seconds: float) -> Iterator[bytes]:
        seen["mode"], seen["window"] = (detector / "mode").read_text(), (detector / "window").read_text()
        seen["thresh"], seen["width"] = (
            (tracing / "tracing_thresh").read_text(),
            (detector / "width").read_text(),
        )
        yield b" hwlatd/1-10 [001] ..... 680.5: #1 inner/outer(us): 0/7 ts:1.2 count:1\n"

    seen: dict[str, str] = {}
    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    monkeypatch.setattr(hwlat, "_lines", lines)
    hwlat.measure([1, 34], 2_000_000, 1, tracing, out)
    assert (seen["mode"], seen["window"], seen["width"], seen["thresh"]) == (
        "per-cpu",
        "2000000",
        "1000000",
        "1",
    )
    assert (seen["tracing_cpumask"], seen["trace_clock"], seen["current_tracer"]) == (
        "4,00000002",
        "mono",
        "nop",
    )
    assert not instance.exists()
    assert [(detector / name).read_text() for name in before] == ["500000", "1000000", "round-robin"]
    found = json.loads((out / hwlat.OUTPUT).read_text())
    assert (found["max_us"], found["lost"], found["width_us"]) == (7, 5, 1_000_000)
    assert found["samples"] == [{"cpu": 1, "at_s": 680.5, "inner_us": 0, "outer_us": 7}]
    assert "inner/outer" in (out / hwlat.TRACE).read_text()
