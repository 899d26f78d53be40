"""The command `virt-rt-check`: its options, the file that is shipped, and a real qemu under its eyes."""

from __future__ import annotations

import ast
import json
import os
import pty
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pipeline import checktool, recipes, settings
from pipeline.errors import InternalError
from pipeline.hostcheck.__main__ import main
from pipeline.hostcheck.machine import Machine, Thread
from pipeline.hostcheck.planfile import PlanFileError, load
from pipeline.tuning import plan_json
from tests.hostcheck_machine import RT, Tree

ROOT = Path(__file__).resolve().parent.parent
QEMU = shutil.which("qemu-system-x86_64")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A machine that keeps its plan."""
    made = Tree(tmp_path / "machine")
    made.plan()
    return made


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """The tool as it is shipped, alone in a directory."""
    path = tmp_path / "bin" / "virt-rt-check"
    path.parent.mkdir()
    path.write_bytes(checktool.CHECK.bundle(ROOT))
    path.chmod(0o755)
    return path


def pythons() -> list[str]:
    """The oldest Python that the tool runs on, where there is one, and the one of these tests."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*map(str, sorted(pyenv.glob("3.9.*/bin/python3.9"))), "python3.9"]
    return [*[each for each in candidates if _runs(each)][:1], sys.executable]


def _runs(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


# Options and exit status -----------------------------------------------------------------------


def test_the_exit_status_says_whether_all_is_as_planned(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(tree.root)]
    assert main(["preflight", *root]) == 0
    assert main(["audit", *root]) == 0
    assert main(["audit", "rt", *root]) == 0
    tree.thread(RT, RT + 4, "CPU 1/KVM", "3", policy=1, priority=1)
    capsys.readouterr()
    assert main(["audit", "rt", *root]) == 1
    shown = capsys.readouterr().out
    assert "FAIL     rt: vCPU 1          fifo 1 on CPU 3 (thread 1204)\n" in shown
    assert "wanted: fifo 1 on CPU 2\n" in shown
    assert "do: taskset -cp 2 1204\n" in shown
    assert shown.endswith("10 ok, 1 failed\n")


def test_json_has_every_field(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.write("/proc/version", "Linux version 6.12.1 #1 SMP")
    assert main(["preflight", "--json", "--root", str(tree.root)]) == 1
    told = json.loads(capsys.readouterr().out)
    assert {key: told[key] for key in ("schema", "command", "platform", "ok")} == {
        "schema": 1,
        "command": "preflight",
        "platform": "board",
        "ok": False,
    }
    assert told["findings"][0] == {
        "name": "kernel",
        "level": "fail",
        "wanted": "PREEMPT_RT",
        "got": "6.12.1-rt1, not PREEMPT_RT, configured with it",
        "remedy": "boot the platform's real-time host kernel",
        "advice": False,
    }


def test_a_plan_can_be_elsewhere(tree: Tree, tmp_path: Path) -> None:
    plan = tmp_path / "other.json"
    (tree.root / "usr/share/virt-rt/plan.json").rename(plan)
    assert main(["preflight", "--root", str(tree.root)]) == 2
    assert main(["preflight", "--root", str(tree.root), "--plan", str(plan)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["audit", "nobody"], "the plan has no guest nobody", "its guests are: plain, rt"),
        (["preflight", "--plan", "/nowhere"], "/nowhere is not there", "install the tuning"),
        (["preflight", "--root", "/nowhere"], "--root /nowhere is not a directory", "proc/ and sys/"),
    ],
)
def test_a_wrong_call_is_one_line_and_what_to_do(
    tree: Tree, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str, hint: str
) -> None:
    assert main([arguments[0], "--root", str(tree.root), *arguments[1:]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"virt-rt-check: {message}"
    assert hint in err.splitlines()[1]
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["preflight", "rt"], ["audit", "--nonsense"]])
def test_what_is_no_command_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: virt-rt-check" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "its schema is 2, this tool reads 1"),
        ({"isolated": [1, 2]}, "housekeeping and isolated are not together cpus"),
        ({"cpus": "0-7"}, "cpus is not a list"),
        ({"housekeeping": [0, -4]}, "housekeeping is not a list of CPU numbers"),
        ({"smt": 0}, "smt is not true or false"),
        ({"guests": []}, "guests is not an object"),
        ({"guests": {"rt": {"vcpus": [{"vcpu": 0}]}}}, "guests.rt.vcpus[0].policy is missing"),
        ({"guests": {"rt": {"vcpus": [], "emulator": [0]}}}, "guests.rt has no vcpus, or no emulator CPUs"),
        (
            {"guests": {"rt": {"vcpus": [{"vcpu": 0, "cpu": 1, "policy": "rr", "priority": 1}]}}},
            "guests.rt.vcpus[0].policy is neither fifo nor other",
        ),
        ({"sysctl": [{"name": "a.b", "value": 1, "reason": ""}]}, "sysctl[0].value is not text"),
        ({"hugepages": [{"node": 0, "size_kib": True, "count": 1}]}, "hugepages[0].size_kib is not a number"),
        ({"hugepages": [{"node": -1, "size_kib": 4, "count": 1}]}, "hugepages[0].node is negative"),
        ({"devices": {"rt": [{}]}}, "devices.rt[0].address is missing"),
        ({"devices": {"rt": [{"physical": "0000:04:00.0"}]}}, "devices.rt[0].number is missing"),
    ],
)
def test_a_plan_that_is_not_whole_is_refused(tree: Tree, change: dict[str, object], message: str) -> None:
    tree.data |= change
    with pytest.raises(PlanFileError, match="plan.json: ") as refused:
        tree.plan()
    assert message in str(refused.value)
    assert refused.value.hint


def test_every_part_of_a_plan_is_needed(tree: Tree) -> None:
    spare = {"topology", "warnings"}
    for key in sorted(set(tree.data) - spare):
        value = tree.data.pop(key)
        with pytest.raises(PlanFileError, match=f"plan.json: {key} is missing"):
            tree.plan()
        tree.data[key] = value
    path = tree.write("/usr/share/virt-rt/plan.json", "{")
    with pytest.raises(PlanFileError, match="is not JSON"):
        load(path)


def test_the_plan_of_every_platform_is_read_with_every_choice(tmp_path: Path) -> None:
    asked, table = recipes.load(ROOT), settings.load(ROOT)
    for name, platform in asked.platforms.items():
        guests = asked.guests_of(name)
        document = plan_json(name, platform, asked.plans[name], guests, table, tuple(table.choices))
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(document))
        plan = load(path)
        assert [guest.name for guest in plan.guests] == sorted(guests)
        assert len(plan.choices) == len(table.choices) > 0
        assert len(plan.bios) == len(platform.bios)
        kept = {each.name: each.absent for each in plan.files}
        assert kept == {each["path"]: each.get("absent", "") for each in document["files"]}


# The file that is shipped ----------------------------------------------------------------------


def test_the_tool_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "pipeline" / "hostcheck", copy / "pipeline" / "hostcheck")
    for path in copy.rglob("*.py"):
        os.utime(path, (0, 1_000_000_000))
        path.chmod(0o600)
    assert checktool.CHECK.bundle(copy) == checktool.CHECK.bundle(ROOT)
    (copy / "pipeline/hostcheck/audit.py").write_text("# changed\n")
    assert checktool.CHECK.bundle(copy) != checktool.CHECK.bundle(ROOT)
    with pytest.raises(InternalError, match="no pipeline/hostcheck"):
        checktool.CHECK.bundle(tmp_path)


def test_the_tool_has_its_package_and_nothing_else(tool: Path) -> None:
    assert tool.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(tool) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
    assert names == sorted(names)
    wanted = {path.name for path in (ROOT / "pipeline" / "hostcheck").glob("*.py")}
    assert set(names) == {"__main__.py", *(f"virt_rt_check/{name}" for name in wanted)}


def test_the_tool_needs_no_more_than_an_old_standard_library() -> None:
    for path in checktool.CHECK.sources(ROOT):
        parsed = ast.parse(path.read_text(), feature_version=(3, 9))
        for node in ast.walk(parsed):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names, path


@pytest.mark.parametrize("python", pythons())
def test_the_tool_runs_alone(tree: Tree, tool: Path, tmp_path: Path, python: str) -> None:
    """An empty directory, no site packages, no environment: as on a target."""
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [python, "-I", "-S", str(tool), *arguments]
        return subprocess.run(command, cwd=empty, env={}, capture_output=True, text=True, check=False)

    done = run("preflight", "--root", str(tree.root))
    assert (done.returncode, done.stderr) == (0, "")
    assert "ok       kernel" in done.stdout
    done = run("audit", "--json", "--root", str(tree.root))
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (0, True)
    tree.remove("/dev/kvm")
    assert run("preflight", "--root", str(tree.root)).returncode == 1
    assert run("audit", "nobody", "--root", str(tree.root)).returncode == 2
    assert run().returncode == 2
    assert list(empty.iterdir()) == []


def test_the_tool_and_the_package_start_as_programs(tree: Tree, tool: Path) -> None:
    options = ["audit", "--root", str(tree.root)]
    packaged = [sys.executable, "-m", "pipeline.hostcheck", *options]
    outputs = [
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for command in ([str(tool), *options], packaged)
    ]
    assert outputs[0] == outputs[1] != ""


@pytest.mark.parametrize(("variable", "coloured"), [("UNSET", True), ("NO_COLOR", False)])
def test_colour_is_for_terminals_that_want_it(tree: Tree, tool: Path, variable: str, coloured: bool) -> None:
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {variable: "1"}
    command = [str(tool), "audit", "rt", "--root", str(tree.root)]
    subprocess.run(command, env=environment, stdout=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert ("\033[32mok" in shown) is coloured
    assert "rt: vCPU 1" in shown


def test_a_reader_that_leaves_early_does_not_change_the_verdict(tree: Tree, tool: Path) -> None:
    command = f"{tool} preflight --root {tree.root} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# The page --------------------------------------------------------------------------------------


def test_every_finding_is_described(tree: Tree) -> None:
    page = (ROOT / "docs/host-check.md").read_text()
    tree.data["choices"] = [{"name": "x", "trade": "y", "reason": "z"}]
    tree.interrupt(40, "nvme0q1", "2", "2", managed=True)
    tree.process(4242, ["stress"])
    tree.thread(4242, 4242, "stress", "0-7")
    tree.write("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y")
    for finding in [*tree.preflight(), *tree.audit("rt")]:
        name = finding.name.replace("rt: ", "GUEST: ").replace("vCPU 0", "vCPU N").replace("vCPU 1", "vCPU N")
        first = name.split(" ")[0]
        shown = (f"`{name}`", f"`{first} ...`", f"`{first} ... of ...`", f"`{name.rpartition(' ')[0]} ...`")
        known = any(each in page for each in shown) or name.startswith(("/sys/", "/proc/", "huge pages of "))
        assert known, finding.name


# A real qemu -----------------------------------------------------------------------------------


class Paused:
    """A qemu that emulates a guest `live` with two vCPUs and is never let run."""

    def __init__(self, process: subprocess.Popen[bytes], locked: bool) -> None:
        self.process = process
        self.locked = locked

    def threads(self) -> Sequence[Thread]:
        return list(Machine(Path("/")).threads(self.process.pid))

    def thread(self, name: str) -> int:
        return next(thread.tid for thread in self.threads() if thread.name == name)


@pytest.fixture
def paused(tmp_path: Path) -> Iterator[Paused]:
    """qemu, its vCPUs on CPU 1 and all else on CPU 0; locked in memory where the user may."""
    if QEMU is None:
        pytest.skip("no qemu-system-x86_64 on this machine")
    if not os.sched_getaffinity(0) >= {0, 1}:
        pytest.skip("needs CPUs 0 and 1")
    locked = os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY
    command = [QEMU, "-S", "-name", "live,debug-threads=on", "-accel", "tcg,thread=multi,tb-size=16"]
    command += [
        "-machine",
        "q35,memory-backend=ram",
        "-smp",
        "2",
        "-m",
        "64",
        "-nodefaults",
        "-display",
        "none",
    ]
    command += ["-object", "memory-backend-ram,id=ram,size=64M,prealloc=on", "-object", "iothread,id=io"]
    command += ["-overcommit", "mem-lock=on"] if locked else []
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        made = Paused(process, locked)
        deadline = time.monotonic() + 30
        while not {"CPU 0/TCG", "CPU 1/TCG"} <= {thread.name for thread in made.threads()}:
            assert process.poll() is None, "qemu ended"
            assert time.monotonic() < deadline, "qemu made no vCPU threads"
            time.sleep(0.05)
        time.sleep(0.2)  # its last helpers start
        for thread in made.threads():
            os.sched_setaffinity(thread.tid, {1} if thread.name.startswith("CPU ") else {0})
        yield made
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def live_plan(tree: Tree, tmp_path: Path) -> Path:
    """A plan that puts both vCPUs of `live` on CPU 1."""
    guest = {
        "vcpus": [{"vcpu": vcpu, "cpu": 1, "policy": "other", "priority": 0} for vcpu in (0, 1)],
        "emulator": [0],
        "node": 0,
        "memory_mib": 64,
        "hugepage_kib": 0,
        "hugepages": 0,
    }
    cpus = {"cpus": [0, 1], "sockets": [[0, 1]], "housekeeping": [0], "isolated": [1]}
    plan = tmp_path / "live.json"
    plan.write_text(json.dumps({**tree.data, **cpus, "guests": {"live": guest}, "devices": {}}))
    return plan


def _live(tool: Path, plan: Path) -> dict[str, dict[str, str]]:
    """What the tool says of the guest, by the name of the finding."""
    command = [str(tool), "audit", "--json", "--plan", str(plan)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # it emulates, at least
    return {each["name"]: each for each in json.loads(done.stdout)["findings"]}


def test_a_running_qemu_is_seen_as_it_is(tool: Path, paused: Paused, live_plan: Path) -> None:
    found = _live(tool, live_plan)
    levels = {name: each["level"] for name, each in found.items() if name.startswith("live")}
    assert levels == {
        "live: process": "ok",
        "live: accelerator": "fail",
        "live: vCPU 0": "ok",
        "live: vCPU 1": "ok",
        "live: other threads": "ok",
        "live: memory locked": "ok" if paused.locked else "fail",
        "live: memory pages": "ok",
        "live: memory node": "ok",
    }
    assert found["live: accelerator"]["got"] == "emulated (TCG)"
    assert found["interrupts"]["got"]


def test_a_vcpu_that_is_moved_by_hand_is_seen(tool: Path, paused: Paused, live_plan: Path) -> None:
    vcpu, worker = paused.thread("CPU 1/TCG"), paused.thread("IO io")
    subprocess.run(["taskset", "-cp", "0", str(vcpu)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["taskset", "-cp", "0-1", str(worker)], check=True, stdout=subprocess.DEVNULL)
    found = _live(tool, live_plan)
    assert found["live: vCPU 1"]["level"] == "fail"
    assert found["live: vCPU 1"]["got"] == f"other on CPU 0 (thread {vcpu})"
    assert found["live: thread IO io"]["got"] == f"other on CPUs 0-1 (thread {worker})"
    # The remedies that are told are what mends it.
    for name in ("live: vCPU 1", "live: thread IO io"):
        subprocess.run(["sh", "-c", found[name]["remedy"]], check=True, stdout=subprocess.DEVNULL)
    found = _live(tool, live_plan)
    assert found["live: vCPU 1"]["level"] == found["live: other threads"]["level"] == "ok"


@pytest.mark.skipif(os.geteuid() != 0, reason="real-time policies need root")
def test_a_vcpus_policy_is_read_from_the_running_thread(tool: Path, paused: Paused, live_plan: Path) -> None:
    vcpu = paused.thread("CPU 1/TCG")
    plan = json.loads(live_plan.read_text())
    plan["guests"]["live"]["vcpus"][1] |= {"policy": "fifo", "priority": 3}
    live_plan.write_text(json.dumps(plan))
    finding = _live(tool, live_plan)["live: vCPU 1"]
    assert (finding["level"], finding["wanted"]) == ("fail", "fifo 3 on CPU 1")
    assert finding["remedy"] == f"chrt --fifo -p 3 {vcpu}"
    subprocess.run(["sh", "-c", finding["remedy"]], check=True)
    assert _live(tool, live_plan)["live: vCPU 1"]["level"] == "ok"


def test_preflight_reads_this_machine(tool: Path, tree: Tree) -> None:
    """Whatever machine this is: findings are complete, and every file of it was understood or named."""
    command = [str(tool), "preflight", "--json", "--plan", str(tree.root / "usr/share/virt-rt/plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")  # it has not the board's CPUs and devices
    told = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert told["64-bit"]["got"].startswith(os.uname().machine)
    assert told["device 0000:04:00.0 of rt"]["level"] == "fail"
    assert os.uname().release in told["kernel"]["got"]
