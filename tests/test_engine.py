"""The run contract, on a real engine: what a step can see and do, and what is left when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import archive
from pipeline.action import Action, File, Output, Upstream
from pipeline.engine import LABEL, Container, Engine
from pipeline.errors import InternalError, UserError
from pipeline.executor import Cancelled, Executor, StepFailed
from pipeline.graph import Graph
from pipeline.store import Store
from tests.conftest import Recorder, host_step
from tests.tiny import tiny_rootfs

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rootfs(tmp_path_factory.mktemp("rootfs"))


@pytest.fixture
def builder(rootfs: Path) -> Action:
    def run(step: object) -> None:
        target = step.out / "rootfs.tar"  # type: ignore[attr-defined]
        target.write_bytes(rootfs.read_bytes())

    return replace(host_step("builder:tiny", "1", run=run), outputs=(Output("rootfs.tar"),))


def step(script: str, **changes: object) -> Action:
    action = Action(
        name="step",
        kind="test",
        version=1,
        arch="amd64",
        summary="a test step",
        builder="builder:tiny",
        script=File(script.encode()),
        parameters={"test": True},
        outputs=(Output("out"),),
    )
    return replace(action, **changes)  # type: ignore[arg-type]


Run = Callable[[Action], str]


@pytest.fixture
def run(builder: Action, store: Store, executor_of: Callable[[Graph], Executor]) -> Iterator[Run]:
    def run(action: Action) -> str:
        executor = executor_of(Graph([builder, action]))
        blob, _ = executor.result("step").outputs["out"]
        return store.path(blob.digest).read_text()

    yield run
    assert Engine().client.containers.list(all=True, filters={"label": f"{LABEL}.run={store.run}"}) == []
    assert list((store.root / "runs" / store.run).glob("*-*")) == []


def test_a_step_sees_its_inputs_and_an_environment_from_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "of the caller")
    script = "{ cat /build/in/sub/file; env | sort; pwd; umask; } >/build/out/out"
    seen = run(
        step(script, files={"sub/file": File(b"content\n")}, environment={"ASKED": "for"})
    ).splitlines()
    names = {line.partition("=")[0] for line in seen if "=" in line}
    assert seen[0] == "content"
    assert names == {
        "ACTION_KEY",
        "ASKED",
        "HOME",
        "HOSTNAME",
        "JOBS",
        "LC_ALL",
        "PATH",
        "PWD",
        "SHLVL",
        "SOURCE_DATE_EPOCH",
        "TZ",
        "_",
    }
    assert seen[-2:] == ["/build/work", "0022"]


def test_a_step_has_no_network(run: Run) -> None:
    interfaces, routes = run(
        step("{ ls /sys/class/net; tail -n +2 /proc/net/route | wc -l; } >/build/out/out")
    ).split()
    assert (interfaces, routes) == ("lo", "0")


@pytest.mark.parametrize(
    ("what", "attempt"),
    [
        ("the root file system", "echo x >/etc/x"),
        ("its inputs", "echo x >/build/in/own"),
        ("its script", "echo x >/build/step"),
    ],
)
def test_a_step_cannot_change_or_reach(run: Run, what: str, attempt: str) -> None:
    script = f"if ( {attempt} ) 2>/dev/null; then echo yes; else echo no; fi >/build/out/out"
    assert run(step(script, files={"own": File(b"x")})) == "no\n", what


def test_a_step_has_no_capabilities_and_the_callers_uid(run: Run) -> None:
    status = "grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status | tr -s '[:space:]' ' '"
    script = f"{{ id -u; {status}; }} >/build/out/out"
    assert run(step(script)) == f"{os.getuid()}\nCapEff: {0:016x} CapBnd: {0:016x} NoNewPrivs: 1 "


def test_asked_for_capabilities_are_given_and_no_others(run: Run) -> None:
    script = "grep CapEff /proc/self/status | tr -s '[:space:]' ' ' >/build/out/out"
    assert run(step(script, capabilities=("CHOWN", "FOWNER"))) == f"CapEff: {0b1001:016x} "


def test_a_failing_step_shows_its_last_lines_and_the_way_in(run: Run, recorder: Recorder) -> None:
    with pytest.raises(StepFailed, match="step ended with 3") as caught:
        run(step("for n in {1..50}; do echo line $n; done; echo last words >&2; exit 3"))
    assert caught.value.tail[-1] == "last words"
    assert len(caught.value.tail) == 20
    assert "doit shell step" in caught.value.hint
    assert "log: " in caught.value.hint
    assert caught.value.exit_status == 1
    assert "line 1" in recorder.lines


def test_status_two_means_the_input_is_wrong(run: Run) -> None:
    with pytest.raises(StepFailed) as caught:
        run(step("exit 2", remedy="write it otherwise"))
    assert caught.value.exit_status == 2
    assert caught.value.hint.startswith("write it otherwise; ")


def test_a_command_that_fails_in_the_middle_fails_the_step(run: Run) -> None:
    with pytest.raises(StepFailed):
        run(step("false | true\necho reached >/build/out/out"))


def test_a_full_disk_is_told_as_such(run: Run) -> None:
    with pytest.raises(UserError, match="is full"):
        run(step("echo 'cp: error writing x: No space left on device' >&2; exit 1"))


def test_a_killed_step_is_told_as_such(run: Run) -> None:
    with pytest.raises(StepFailed, match=r"was killed \(out of memory, or the engine stopped\)"):
        run(step("kill -9 $$"))


def test_cancelling_stops_the_container_at_once(
    builder: Action, store: Store, executor_of: Callable[[Graph], Executor], recorder: Recorder
) -> None:
    executor = executor_of(Graph([builder, step("echo ready; sleep 600; echo x >/build/out/out")]))
    caught: list[BaseException] = []

    def work() -> None:
        try:
            executor.result("step")
        except Cancelled as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: "ready" in recorder.lines)
    began = time.monotonic()
    executor.cancel()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert len(caught) == 1
    assert time.monotonic() - began < 15
    assert Engine().client.containers.list(all=True, filters={"label": f"{LABEL}.run={store.run}"}) == []
    assert list((store.root / "runs" / store.run).glob("test-*")) == []


def test_an_engine_that_is_not_there_is_one_line_and_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(UserError, match=r"does not answer \(no such file or directory\)") as caught:
        Engine().has_image("x")
    assert "make setup" in caught.value.hint


def test_an_engine_that_dies_in_the_middle_is_the_environments_fault(
    tmp_path: Path, rootfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy stands for the engine, so that only this test loses it."""
    engine = Engine()
    engine.import_image("virt-rt/builder:tiny-test", rootfs)
    real = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
    socket = tmp_path / "proxy.sock"
    proxy = subprocess.Popen(
        ["socat", f"UNIX-LISTEN:{socket},fork", f"UNIX-CONNECT:{real}"], start_new_session=True
    )
    try:
        wait_for(socket.exists)
        monkeypatch.setenv("DOCKER_HOST", f"unix://{socket}")
        for name in ("in", "out", "work"):
            (tmp_path / name).mkdir()
        (tmp_path / "step").write_text("echo ready; sleep 600")
        container = Container(
            name="virt-rt-dying-engine",
            image="virt-rt/builder:tiny-test",
            script="/build/step",
            mounts={"/build/step": (tmp_path / "step", False), "/build/work": (tmp_path / "work", True)},
            environment={},
            labels={},
        )

        def log(chunk: bytes) -> None:
            if b"ready" in chunk:
                os.killpg(proxy.pid, signal.SIGKILL)

        with pytest.raises(UserError, match="the container engine"):
            Engine().run(container, log)
    finally:
        proxy.kill()
        proxy.wait()
        engine.client.containers.get("virt-rt-dying-engine").remove(force=True)


def test_the_way_in_is_the_same_container(tmp_path: Path) -> None:
    container = Container(
        name="n",
        image="virt-rt/builder:k",
        script="/build/step",
        mounts={"/build/in": (tmp_path, False), "/build/out": (tmp_path, True)},
        environment={"A": "b"},
        labels={"l": "v"},
        capabilities=("CHOWN",),
    )
    command = container.cli("/bin/bash")
    assert command[:3] == ["docker", "run", "--rm"]
    assert {
        "--network=none",
        "--cap-drop=ALL",
        "--read-only",
        "--cap-add=CHOWN",
        "--user=0:0",
        "--env=A=b",
    } <= set(command)
    assert f"--volume={tmp_path}:/build/in:ro" in command
    assert command[-2:] == ["virt-rt/builder:k", "/bin/bash"]


def test_root_in_a_container_gives_the_files_back(tmp_path: Path) -> None:
    def command(user: tuple[int, int], *capabilities: str) -> list[str]:
        return Container("n", "i", "/build/step", {}, {}, {}, capabilities, user).command

    assert "chown" not in command((1000, 1000))[-1]
    assert "chown -hR 1000:1000 /build/out /build/work" in command((1000, 1000), "CHOWN")[-1]
    assert "chown" not in command((0, 0), "CHOWN")[-1]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_tree_is_mounted_and_one_that_is_touched_meanwhile_spoils_the_result(
    builder: Action,
    store: Store,
    executor_of: Callable[[Graph], Executor],
    recorder: Recorder,
    tmp_path: Path,
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "main.c").write_text("int main;\n")
    archive.pack(tmp_path / "source", tmp_path / "source.tar")
    content = (tmp_path / "source.tar").read_bytes()

    def run(given: object) -> None:
        (given.out / "source.tar").write_bytes(content)  # type: ignore[attr-defined]

    source = replace(host_step("source", run=run), outputs=(Output("source.tar"),))
    inputs = {"source": Upstream("source", "source.tar", unpack=True)}
    script = "cp /build/in/source/main.c /build/out/out; ! touch /build/in/source/x 2>/dev/null; echo ready; sleep 2"
    graph = Graph([builder, source, step(script, inputs=inputs)])
    result = executor_of(graph).result("step")
    assert store.path(result.outputs["out"][0].digest).read_text() == "int main;\n"

    graph = Graph([builder, source, step(script + " # again", inputs=inputs)])
    recorder.lines.clear()

    def touch() -> None:
        wait_for(lambda: "ready" in recorder.lines)
        next(store.root.glob("trees/*/tree/main.c")).write_text("int other;\n")

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(InternalError, match="its input source changed while it ran"):
        executor_of(graph).result("step")
    thread.join()
    assert store.lookup(graph.keys["step"]) is None
