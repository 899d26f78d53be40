"""`doit measure`: a host and a guest over a stand-in for ssh, with connections that are lost and runs that end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import measurerequest, measuring
from pipeline.errors import RedError, UserError
from pipeline.latencytest import Bound, LatencyTest
from pipeline.measure import record
from pipeline.measurerequest import ask, seconds
from pipeline.project import Project
from pipeline.remote import LostError, Remote
from tests import measuring_standins

ROOT = Path(__file__).resolve().parent.parent
PLAN = {
    "housekeeping": [0],
    "isolated": [1],
    "guests": {
        "rt-guest": {
            "vcpus": [
                {"vcpu": 0, "cpu": 0, "policy": "other", "priority": 0},
                {"vcpu": 1, "cpu": 1, "policy": "fifo", "priority": 1},
            ]
        }
    },
}
needs_priorities = pytest.mark.skipif(
    not measuring_standins.may_be_real_time(), reason="no right to SCHED_FIFO, or fewer than two CPUs"
)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A checkout of which what a measurement needs was built, for the kernel that runs here."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "recipes", root / "recipes", ignore=shutil.ignore_patterns("*.lock"))
    for name in ("pipeline", "kernel-configs"):
        (root / name).symlink_to(ROOT / name)
    path = root / "recipes/guests/rt-guest.toml"
    path.write_text(
        path.read_text().replace("[image]", 'networks = [{ kind = "user", ssh_port = 2222 }]\n\n[image]', 1)
    )
    products = root / "artifacts/qemu-q35"
    for role in ("host", "guest"):
        (products / "kernel" / role).mkdir(parents=True)
        (products / "kernel" / role / "kernelrelease").write_text(f"{os.uname().release}\n")
    plan = products / "tuning/root/usr/share/virt-rt/plan.json"
    plan.parent.mkdir(parents=True)
    plan.write_text(json.dumps(PLAN))
    return Project(root)


class World:
    """The machines that are measured, as the stand-in has them, and one call of `doit measure` after the other."""

    def __init__(self, project: Project, directory: Path) -> None:
        self.project, self.directory = project, directory
        self.told: list[str] = []
        self.ending = threading.Event()

    def measure(self, **variables: str) -> None:
        asked = {"TARGET": "root@board", "DURATION": "2s", **variables}
        measuring.Measurement(self.project, "qemu-q35", asked, self.told.append, self.ending).run()

    @property
    def here(self) -> list[Path]:
        return sorted((self.project.root / "artifacts/qemu-q35/measure").glob("2*"))

    def there(self, place: str) -> Path:
        (found,) = (self.directory / "there").glob(f"*/{place}")
        return found

    def ran(self, word: str) -> int:
        return sum(word in line for line in (self.directory / "ssh.log").read_text().splitlines())


@pytest.fixture
def world(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = tmp_path / "world"
    tools = measuring_standins.tools(world / "bin")
    measuring_standins.ssh(tools, world)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(measuring, "LOOK", 0.2)
    monkeypatch.setattr(measuring, "LONG_LOOK", 0.2)
    monkeypatch.setattr(measurerequest, "MARGIN_S", 6)
    monkeypatch.setattr(measurerequest, "LOADS", {"hackbench": 0.001})
    yield World(project, world)
    for path in (world / "there").glob("*/*/lock"):
        subprocess.run([path.parent.parent / "virt-rt-measure", "stop", "--record", path.parent], check=False)


# What is asked ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"), [("60", 60), ("60s", 60), ("30m", 1800), ("12h", 43200), ("2d", 172800)]
)
def test_durations(text: str, wanted: int) -> None:
    assert seconds(text) == wanted


@pytest.mark.parametrize("text", ["", "0s", "12 h", "h", "-1s", "1.5h", "1w", "99999999"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UserError, match="DURATION="):
        seconds(text)


def test_host_and_guest_are_asked_by_the_plan_that_was_built(project: Project) -> None:
    asked = ask(project.root / "artifacts/qemu-q35", project.recipes, "qemu-q35", ["rt-guest"], 600)
    assert list(asked.requests) == ["host", "guest-rt-guest"]
    assert asked.ports == {"rt-guest": 2222}
    host, guest = asked.requests.values()
    assert [(stage.tool, stage.duration_s, stage.required) for stage in host.stages] == [
        ("hwlat", 60, False),
        ("cyclictest", 600, True),
        ("load", 600 + 120 + 12, True),
    ]
    assert (host.isolated, host.housekeeping, host.plan_sha256) == ([1], [0], guest.plan_sha256)
    assert [(stage.tool, stage.cpus, stage.priority) for stage in guest.stages] == [("cyclictest", [1], 80)]
    expected = asked.expectations(5)
    assert expected.places["host"].unjudged["cyclictest"] == measurerequest.NO_LIMITS
    assert expected.oldest_s == 5


def test_limits_are_those_of_the_platform(project: Project) -> None:
    asked = ask(project.root / "artifacts/qemu-q35", project.recipes, "qemu-q35", ["rt-guest"], 600)
    limits = project.recipes.platforms["canoe-pass"].limits
    assert limits is not None
    places = replace(asked, limits=limits).expectations(0).places
    assert [
        (each.limits["cyclictest"].max_us, each.limits["cyclictest"].avg_us) for each in places.values()
    ] == [
        (limits.host_max_us, limits.host_avg_us),
        (limits.guest_max_us, limits.guest_avg_us),
    ]
    assert places["host"].unjudged == {"irqlat": measurerequest.NO_IRQLAT}


def test_a_guest_without_fine_timers_is_asked_by_interrupts(project: Project) -> None:
    path = project.root / "recipes/guests/rt-guest.toml"
    path.write_text(path.read_text().replace("[image]", "high_resolution_timers = false\n\n[image]", 1))
    project = Project(project.root)
    asked = ask(project.root / "artifacts/qemu-q35", project.recipes, "qemu-q35", ["rt-guest"], 60)
    assert [(s.tool, s.required) for s in asked.requests["guest-rt-guest"].stages] == [("irqlat", True)]


def test_tests_of_drivers_are_asked_of_the_kernel_that_they_are_for(project: Project) -> None:
    products = project.root / "artifacts/qemu-q35"
    (products / "kernel/guest/kernelrelease").write_text("6-guest\n")
    for name, release, tool in (("irqlat", "6-guest", "irqlat"), ("mine", os.uname().release, "command")):
        (products / "driver" / name).mkdir(parents=True)
        document = {
            "driver": name,
            "kernelrelease": release,
            "test": {"tool": tool, "argv": [f"/bin/{name}", "-x"]},
        }
        (products / "driver" / name / "driver.json").write_text(json.dumps(document))
    asked = ask(products, project.recipes, "qemu-q35", ["rt-guest"], 60)
    by_place = {
        place: {stage.name: (stage.tool, stage.argv, stage.required) for stage in request.stages}
        for place, request in asked.requests.items()
    }
    assert by_place["host"]["test-mine"] == ("command", ["/bin/mine", "-x"], True)
    assert by_place["guest-rt-guest"]["irqlat"] == ("irqlat", ["/bin/irqlat", "-x"], False)
    assert "irqlat" not in by_place["host"] and "test-mine" not in by_place["guest-rt-guest"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"TARGET": ""}, "no TARGET is named"),
        ({"TARGET": "-oProxyCommand=evil"}, "is no destination of ssh"),
        ({"TARGET": "a b"}, "is no destination of ssh"),
        ({"GUESTS": "nobody"}, "qemu-q35 has no guest nobody"),
        ({"DURATION": "soon"}, "DURATION=soon is no duration"),
        ({"BASELINE": "/nowhere"}, "BASELINE=/nowhere is not there"),
        ({"TARGET": "root@elsewhere"}, "Could not resolve hostname"),
        ({"TARGET": "stranger@board"}, "Permission denied"),
    ],
)
def test_what_cannot_be_measured_is_refused(world: World, variables: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        world.measure(**variables)
    assert said in caught.value.message
    assert caught.value.hint


def test_a_guest_without_a_port_is_refused_before_anything_is_measured(project: Project) -> None:
    shutil.copy(ROOT / "recipes/guests/rt-guest.toml", project.root / "recipes/guests/rt-guest.toml")
    project = Project(project.root)
    with pytest.raises(UserError, match="rt-guest cannot be reached: it has no ssh_port"):
        ask(project.root / "artifacts/qemu-q35", project.recipes, "qemu-q35", ["rt-guest"], 60)


def test_what_was_not_built_is_named(project: Project) -> None:
    (project.root / "artifacts/qemu-q35/kernel/host/kernelrelease").unlink()
    with pytest.raises(UserError, match="kernel/host/kernelrelease is not there"):
        ask(project.root / "artifacts/qemu-q35", project.recipes, "qemu-q35", [], 60)


def test_another_kernel_is_refused_before_anything_is_measured(world: World) -> None:
    (world.project.root / "artifacts/qemu-q35/kernel/guest/kernelrelease").write_text("6.0-other\n")
    with pytest.raises(UserError, match="guest rt-guest: its kernel is .*, the one that was built 6.0-other"):
        world.measure()
    assert not (world.directory / "there").exists()


# How it goes -----------------------------------------------------------------------------------


@pytest.mark.slow
@needs_priorities
def test_a_host_and_its_guest_are_measured_judged_and_reported(world: World) -> None:
    with pytest.raises(RedError, match="latency: "):  # nothing that runs in tests is evidence
        world.measure()
    (directory,) = world.here
    verdict = json.loads((directory / "verdict.json").read_text())
    guest = record.read(directory / "guest-rt-guest/001-cyclictest/run.json", record.Run)
    (number,) = [path.name for path in (directory / "host").glob("*-load")]
    load = record.read(directory / "host" / number / "run.json", record.Run)
    assert load.began.monotonic < guest.began.monotonic < guest.ended.monotonic < load.ended.monotonic
    assert (guest.status, [load.alive for load in guest.loads]) == (0, [True])
    wrong = [each for each in verdict["findings"] if each["kind"] == "protocol" and not each["ok"]]
    assert [
        each for each in wrong if each["place"].startswith("guest") and each["name"] == "load of the host"
    ] == []
    for file in ("report.html", "report.json", "junit.xml", "expectations.json"):
        assert (directory / file).stat().st_size
    assert (
        any("hwlat was not measured" in line for line in world.told)
        or (directory / "host/001-hwlat/trace").exists()
    )
    assert json.loads((directory / "measurement.json").read_text())["state"] == "judged"
    with pytest.raises(RedError):  # the next one is another one
        world.measure(GUESTS="none")
    assert len(world.here) == 2


@pytest.mark.parametrize(
    ("current", "ready"), [("002-cyclictest", False), ("001-hwlat", False), ("003-load", True)]
)
def test_guests_wait_until_the_host_only_makes_load(
    world: World, monkeypatch: pytest.MonkeyPatch, current: str, ready: bool
) -> None:
    said = {"state": "running", "current": current, "left_s": 7, "runs": 3, "done": 1}

    def answer(self: Remote, command: str, content: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess([command], 3, json.dumps(said).encode(), b"")

    monkeypatch.setattr(Remote, "call", answer)
    asked = {"TARGET": "root@board"}
    measurement = measuring.Measurement(world.project, "qemu-q35", asked, world.told.append, world.ending)
    place = measuring._Place("host", Remote.host("root@board"), "/there")
    assert (measurement._look(place), place.ready, place.ended) == (7, ready, False)


@needs_priorities
def test_a_lost_connection_loses_nothing(world: World) -> None:
    thread = threading.Thread(target=_red, args=[world], kwargs={"GUESTS": "none", "DURATION": "4s"})
    thread.start()
    _until(lambda: any("001-" in line or "002-" in line for line in world.told))
    (world.directory / "lost").touch()
    _until(lambda: any("trying again" in line for line in world.told))
    time.sleep(4)
    (world.directory / "lost").unlink()
    thread.join(60)
    assert not thread.is_alive()
    assert any("connected again" in line for line in world.told)
    (directory,) = world.here
    assert record.read(directory / "host/002-cyclictest/run.json", record.Run).status == 0
    assert world.ran("--detach") == 1


@needs_priorities
def test_an_interrupted_call_finds_the_running_measurement(world: World) -> None:
    thread = threading.Thread(target=_ended, args=[world])
    thread.start()
    _until(lambda: any("cyclictest, " in line for line in world.told))
    world.ending.set()
    thread.join(20)
    assert not thread.is_alive()
    world.ending.clear()
    _red(world, GUESTS="none", DURATION="4s")
    (directory,) = world.here
    assert world.ran("--detach") == 1
    assert not list((directory / "host").glob("*interrupted*"))


@pytest.mark.slow
@needs_priorities
def test_a_run_that_was_killed_there_goes_on(world: World) -> None:
    thread = threading.Thread(target=_red, args=[world], kwargs={"GUESTS": "none", "DURATION": "3s"})
    thread.start()
    _until(lambda: any("cyclictest, " in line for line in world.told))
    os.kill(int((world.there("host") / "lock").read_text()), signal.SIGKILL)
    thread.join(60)
    assert not thread.is_alive()
    assert any("was interrupted, goes on" in line for line in world.told)
    (directory,) = world.here
    assert (directory / "host/002-cyclictest.interrupted-1").is_dir()
    assert (directory / "host/end.json").is_file()


@needs_priorities
def test_what_virt_rt_measure_refuses_is_told(world: World) -> None:
    plan = json.loads(json.dumps(PLAN)) | {"isolated": [4095]}
    (world.project.root / "artifacts/qemu-q35/tuning/root/usr/share/virt-rt/plan.json").write_text(
        json.dumps(plan)
    )
    with pytest.raises(UserError, match="root@board: CPU 4095 is not there, or not online"):
        world.measure(GUESTS="none")


def _red(world: World, **variables: str) -> None:
    with pytest.raises(RedError):
        world.measure(**variables)


def _ended(world: World) -> None:
    with pytest.raises(measuring.EndedError):
        world.measure(GUESTS="none", DURATION="4s")


def _until(condition: object, timeout: float = 60) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ssh -------------------------------------------------------------------------------------------


def test_what_is_fetched_stays_in_its_directory(world: World, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "link").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="link, which is no file of a record"):
        Remote.host("root@board").fetch(str(outside), tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_a_connection_that_is_lost_is_no_answer(world: World) -> None:
    (world.directory / "lost").touch()
    with pytest.raises(LostError, match="Connection timed out"):
        Remote.host("root@board").call("true")


@pytest.mark.parametrize(
    "words", [["measure:qemu-q35"], ["measure:nowhere", "TARGET=x"], ["measure", "TARGET=x"]]
)
def test_doit_refuses_with_status_2(words: list[str]) -> None:
    done = subprocess.run(
        [ROOT / ".venv/bin/doit", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done
    assert len([line for line in (done.stdout + done.stderr).splitlines() if "rror: " in line]) == 1


@needs_priorities
def test_what_an_emulation_measures_does_not_judge_a_commit(world: World, tmp_path: Path) -> None:
    products = world.project.root / "artifacts"
    elsewhere = tmp_path / "of-a-commit"
    products.rename(elsewhere)
    test = LatencyTest(
        world.project, "qemu-q35", "host", Bound("max", 1), "root@board", "test -d $ARTIFACTS/qemu-q35", "2s",
        tmp_path / "measurements", world.told.append,
    )  # fmt: skip
    with pytest.raises(UserError, match="emulated: not evidence of latency"):
        test("0123456789abcdef", elsewhere, tmp_path / "logs")
    (measured,) = (tmp_path / "measurements").iterdir()
    assert (measured / "host/end.json").is_file()
    assert (measured / "report.json").is_file()
