"""Results: built once, found again, never half, never of other inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.action import ALL, Action, File, Output, Step, Upstream
from pipeline.artifacts import Artifacts
from pipeline.engine import Engine
from pipeline.errors import InternalError, UserError, VirtRtError
from pipeline.executor import Cancelled, Executor
from pipeline.graph import Graph
from pipeline.plan import State, plan
from pipeline.store import Store
from tests.conftest import Recorder, host_step

MakeExecutor = Callable[[Graph], Executor]


def text(store: Store, executor: Executor, name: str) -> str:
    blob, _ = executor.result(name).outputs["out"]
    return store.path(blob.digest).read_text()


def test_what_is_needed_is_built_first_and_only_once(
    store: Store, executor_of: MakeExecutor, recorder: Recorder
) -> None:
    graph = Graph([host_step("a", "A"), host_step("b", "B", "a"), host_step("c", "C", "a", "b")])
    assert text(store, executor_of(graph), "c") == "C+A+B+A"
    assert recorder.built() == ["a", "b", "c"]
    executor_of(graph).result("c")
    assert recorder.built() == ["a", "b", "c"]


def test_only_what_depends_on_a_change_is_built_again(
    store: Store, executor_of: MakeExecutor, recorder: Recorder
) -> None:
    def graph(b: str) -> Graph:
        return Graph([host_step("a"), host_step("b", b), host_step("c", "C", "a", "b")])

    executor_of(graph("1")).result("c")
    recorder.events.clear()
    assert text(store, executor_of(graph("2")), "c") == "C+x+2"
    assert recorder.built() == ["b", "c"]


def test_failures_are_not_stored(executor_of: MakeExecutor, recorder: Recorder) -> None:
    fail = True

    def run(step: Step) -> None:
        if fail:
            raise InternalError("broke", "mend it")
        (step.out / "out").write_text("fine")

    graph = Graph([host_step("a", run=run)])
    with pytest.raises(InternalError, match="broke"):
        executor_of(graph).result("a")
    fail = False
    executor_of(graph).result("a")
    assert recorder.built() == ["a"]


@pytest.mark.parametrize("made", ["nothing", "empty", "link", "directory"])
def test_a_missing_or_empty_output_is_an_error_that_names_it(executor_of: MakeExecutor, made: str) -> None:
    def run(step: Step) -> None:
        if made == "empty":
            (step.out / "out").write_text("")
        elif made == "link":
            (step.out / "out").symlink_to("/etc/hostname")
        elif made == "directory":
            (step.out / "out").mkdir()

    with pytest.raises(InternalError, match="a made no out"):
        executor_of(Graph([host_step("a", run=run)])).result("a")


def test_an_empty_directory_output_is_an_error(executor_of: MakeExecutor) -> None:
    def run(step: Step) -> None:
        (step.out / "out").mkdir()

    action = replace(host_step("a", run=run), outputs=(Output("out", "directory"),))
    with pytest.raises(InternalError, match="made no directory out"):
        executor_of(Graph([action])).result("a")


def test_content_that_is_not_what_was_locked_is_refused(executor_of: MakeExecutor) -> None:
    action = replace(host_step("a"), outputs=(Output("out", digest="0" * 64),))
    with pytest.raises(UserError, match="the lock says 000"):
        executor_of(Graph([action])).result("a")


def test_what_the_store_has_need_not_be_fetched_again(store: Store, executor_of: MakeExecutor) -> None:
    blob = store.add_bytes(b"package")

    def run(step: Step) -> None:
        assert step.stored(blob.digest) is not None

    action = replace(host_step("a", run=run), outputs=(Output("out", digest=blob.digest),))
    assert executor_of(Graph([action])).result("a").outputs["out"] == (blob, "file")


def test_inputs_that_change_while_the_step_runs_spoil_the_result(
    store: Store, executor_of: MakeExecutor
) -> None:
    def run(step: Step) -> None:
        (step.out / "out").write_text("made of the old input")
        (step.inputs / "own").write_text("edited meanwhile")

    graph = Graph([host_step("a", run=run)])
    with pytest.raises(InternalError, match="its input own changed while it ran"):
        executor_of(graph).result("a")
    assert store.lookup(graph.keys["a"]) is None


def test_a_file_edited_during_the_run_is_built_as_the_key_says(
    tmp_path: Path, executor_of: MakeExecutor, store: Store
) -> None:
    """The key is computed from the bytes that are built: an edit in between belongs to the next run."""
    source = tmp_path / "source"
    source.write_text("before")
    action = replace(host_step("a"), files={"own": File.read(source)})
    source.write_text("after")
    assert text(store, executor_of(Graph([action])), "a") == "before"
    edited = replace(action, files={"own": File.read(source)})
    assert Graph([edited]).keys != Graph([action]).keys


def test_a_damaged_blob_is_made_again(store: Store, executor_of: MakeExecutor, recorder: Recorder) -> None:
    graph = Graph([host_step("a", "A"), host_step("b", "B", "a")])
    blob, _ = executor_of(graph).result("a").outputs["out"]
    store.path(blob.digest).chmod(0o644)
    store.path(blob.digest).write_text("X")
    assert text(store, executor_of(graph), "b") == "B+A"
    assert recorder.built() == ["a", "a", "b"]


def test_all_outputs_of_a_step_can_be_one_input_directory(store: Store, executor_of: MakeExecutor) -> None:
    def make(step: Step) -> None:
        (step.out / "one").write_text("1")
        (step.out / "one").chmod(0o755)
        (step.out / "tree").mkdir()
        (step.out / "tree" / "leaf").write_text("2")

    def use(step: Step) -> None:
        assert (step.inputs / "all" / "one").stat().st_mode & 0o100
        (step.out / "out").write_text((step.inputs / "all" / "tree" / "leaf").read_text())

    first = replace(host_step("a", run=make), outputs=(Output("one"), Output("tree", "directory")))
    second = replace(host_step("b", run=use), inputs={"all": Upstream("a", ALL)})
    assert text(store, executor_of(Graph([first, second])), "b") == "2"


def test_two_processes_that_share_a_store_build_once(store: Store, tmp_path: Path) -> None:
    """Two executors stand for two processes: nothing but the store is common to them."""
    running, most, guard = 0, 0, threading.Lock()

    def run(step: Step) -> None:
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.2)
        (step.out / "out").write_text("made")
        with guard:
            running -= 1

    graph = Graph([host_step("a", run=run)])
    recorders = [Recorder(), Recorder()]
    threads = [
        threading.Thread(
            target=Executor(graph, Store(store.root), Engine(), recorder, tmp_path / str(n)).result,
            args=("a",),
        )
        for n, recorder in enumerate(recorders)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert sorted(len(recorder.built()) for recorder in recorders) == [0, 1]


def test_a_cancelled_run_starts_nothing_more(
    store: Store, executor_of: MakeExecutor, recorder: Recorder
) -> None:
    graph = Graph([host_step("a"), host_step("b", "x", "a")])
    executor = executor_of(graph)
    executor.cancelled.set()
    with pytest.raises(Cancelled):
        executor.result("b")
    assert recorder.events == []
    assert list((store.root / "runs").glob("*/test-*")) == []


def test_a_step_learns_that_it_should_stop(executor_of: MakeExecutor, store: Store) -> None:
    def run(step: Step) -> None:
        executor.cancelled.set()
        step.check_cancelled()

    graph = Graph([host_step("a", run=run)])
    executor = executor_of(graph)
    with pytest.raises(Cancelled) as caught:
        executor.result("a")
    assert caught.value.exit_status == 130
    assert store.lookup(graph.keys["a"]) is None


def test_a_full_disk_is_one_clear_line(executor_of: MakeExecutor) -> None:
    def run(step: Step) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"a: the disk of .* is full") as caught:
        executor_of(Graph([host_step("a", run=run)])).result("a")
    assert "free space" in caught.value.hint


def test_a_repeated_step_shows_whether_it_is_reproducible(executor_of: MakeExecutor, store: Store) -> None:
    count = 0

    def run(step: Step) -> None:
        nonlocal count
        count += 1
        (step.out / "out").write_text(f"run {count}")

    executor = executor_of(Graph([host_step("a"), host_step("b", run=run)]))
    first = executor.result("a").outputs["out"][0]
    assert executor.repeat("a")["out"] == first
    first = executor.result("b").outputs["out"][0]
    assert executor.repeat("b")["out"] != first


# The plan -------------------------------------------------------------------------------------


def plan_of(graph: Graph, names: list[str], placed: set[str], stored: set[str]) -> dict[str, State]:
    return plan(graph, names, lambda action: action.name in placed, lambda action: action.name in stored)


CHAIN = [
    host_step("source"),
    host_step("kernel", "x", "source", place="p/kernel"),
    host_step("image", "x", "kernel", place="p/image"),
]


def test_nothing_known_means_everything_is_built() -> None:
    states = plan_of(Graph(CHAIN), ["image"], set(), set())
    assert states == {"source": State.BUILD, "kernel": State.BUILD, "image": State.BUILD}


def test_when_all_products_are_placed_their_sources_are_left_alone() -> None:
    states = plan_of(Graph(CHAIN), ["image"], {"kernel", "image"}, set())
    assert states == {"source": State.IDLE, "kernel": State.CURRENT, "image": State.CURRENT}


def test_what_the_store_has_is_laid_out() -> None:
    states = plan_of(Graph(CHAIN), ["image"], set(), {"kernel", "image"})
    assert states == {"source": State.IDLE, "kernel": State.LOCAL, "image": State.LOCAL}


def test_artifacts_are_no_input_of_a_build() -> None:
    """The kernel lies in artifacts/, yet the image needs it from the store: it is made again."""
    states = plan_of(Graph(CHAIN), ["image"], {"kernel"}, set())
    assert states == {"source": State.BUILD, "kernel": State.BUILD, "image": State.BUILD}


def test_an_intermediate_result_that_is_asked_for_is_made() -> None:
    states = plan_of(Graph(CHAIN), ["source"], {"kernel", "image"}, set())
    assert states == {"source": State.BUILD}


# Products -------------------------------------------------------------------------------------


@pytest.fixture
def product(executor_of: MakeExecutor) -> tuple[Action, Executor]:
    action = host_step("kernel", place="p/kernel")
    return action, executor_of(Graph([action]))


def place(root: Path, product: tuple[Action, Executor]) -> tuple[Artifacts, list[Path]]:
    action, executor = product
    artifacts = Artifacts(root)
    aside = artifacts.place(action, executor.graph.keys["kernel"], executor.result("kernel"), executor.store)
    return artifacts, aside


def test_a_placed_product_is_current_until_touched(tmp_path: Path, product: tuple[Action, Executor]) -> None:
    action, executor = product
    key = executor.graph.keys["kernel"]
    artifacts, _ = place(tmp_path / "artifacts", product)
    assert artifacts.current(action, key)
    assert not artifacts.current(action, "0" * 64)
    assert artifacts.verify(action) == []
    path = tmp_path / "artifacts" / "p" / "kernel" / "out"
    path.write_text("y")
    assert not artifacts.current(action, key)
    assert [(d.path, d.reason) for d in artifacts.verify(action)] == [(path, "edited")]
    path.unlink()
    assert [(d.path, d.reason) for d in artifacts.verify(action)] == [(path, "missing")]


def test_what_a_person_edited_or_added_is_set_aside(tmp_path: Path, product: tuple[Action, Executor]) -> None:
    action, executor = product
    artifacts, aside = place(tmp_path / "artifacts", product)
    assert aside == []
    directory = tmp_path / "artifacts" / "p" / "kernel"
    (directory / "out").write_text("my own")
    (directory / "notes").write_text("my notes")
    _, aside = place(tmp_path / "artifacts", product)
    assert {path.name: path.read_text() for path in aside} == {"out": "my own", "notes": "my notes"}
    assert (directory / "out").read_text() == "x"
    assert artifacts.current(action, executor.graph.keys["kernel"])


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_manifest_that_cannot_be_read_is_none(
    tmp_path: Path, product: tuple[Action, Executor], text: str
) -> None:
    action, executor = product
    artifacts, _ = place(tmp_path / "artifacts", product)
    (tmp_path / "artifacts" / "p" / "kernel" / "manifest.json").write_text(text)
    assert not artifacts.current(action, executor.graph.keys["kernel"])
    place(tmp_path / "artifacts", product)
    assert artifacts.current(action, executor.graph.keys["kernel"])


def test_errors_carry_a_status() -> None:
    statuses = (UserError("x").exit_status, InternalError("x").exit_status, Cancelled("x").exit_status)
    assert statuses == (2, 1, 130)
    assert issubclass(Cancelled, VirtRtError)
