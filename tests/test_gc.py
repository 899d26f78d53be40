"""`doit gc`: frees what nobody needs, and never what somebody uses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import gc
from pipeline.action import Action, Output, Step
from pipeline.engine import Engine, builder_image
from pipeline.errors import UserError
from pipeline.executor import Executor
from pipeline.graph import Graph
from pipeline.store import Store
from tests import standin
from tests.conftest import host_step
from tests.tiny import tiny_rootfs

ROOT = Path(__file__).resolve().parent.parent
DAY_S = 86_400.0
MakeExecutor = Callable[[Graph], Executor]


class NoEngine(Engine):
    """An engine that does not answer."""

    def builder_images(self, store: str) -> list[str]:
        raise UserError("the container engine does not answer", "start it")


def collect(store: Store, graph: Graph, days: float = 30, dry_run: bool = False) -> gc.Freed:
    return gc.collect(store, graph, NoEngine(), time.time() - days * DAY_S, dry_run)


def result_file(store: Store, key: str) -> Path:
    return store.root / "ac" / key[:2] / f"{key}.json"


def grow_old(store: Store, days: float) -> None:
    """Let every result be last used that long ago."""
    then = time.time() - days * DAY_S
    for path, _, _ in store.results():
        os.utime(path, (then, then))


@pytest.fixture
def old(store: Store, executor_of: MakeExecutor) -> Graph:
    """A graph that was built 40 days ago, and of which no process is left."""
    graph = Graph([host_step("a", "shared"), host_step("b", "old", "a")])
    executor_of(graph).result("b")
    store.close()
    grow_old(store, 40)
    return graph


@pytest.fixture
def new() -> Graph:
    """What the checkout asks for now: `a` as before, `b` changed."""
    return Graph([host_step("a", "shared"), host_step("b", "new", "a")])


def test_what_was_not_used_for_long_goes_with_all_it_alone_referred_to(
    store: Store, old: Graph, new: Graph
) -> None:
    gone, kept = store.lookup(old.keys["b"]), store.lookup(old.keys["a"])
    assert gone and gone.log and kept and kept.log
    before = sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file())
    freed = collect(store, new)
    after = sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file())
    assert (freed.results, freed.size) == (1, before - after)
    assert store.lookup(old.keys["b"]) is None
    for blob in (gone.outputs["out"][0], gone.files["own"], gone.log):
        assert not store.has(blob.digest)
    assert store.verified(new.keys["a"]) == kept
    assert all(store.has(blob.digest) for blob in (kept.files["own"], kept.log))


def test_the_checkouts_own_results_stay_however_old(store: Store, old: Graph) -> None:
    assert collect(store, old, days=0).results == 0
    assert store.verified(old.keys["b"]) is not None


def test_use_makes_a_result_young_again(
    store: Store, old: Graph, new: Graph, executor_of: MakeExecutor
) -> None:
    assert store.lookup(old.keys["b"]) is not None  # only looked at, as `doit plan` does
    assert collect(store, new, dry_run=True).results == 1
    executor_of(old).result("b")
    store.close()
    assert collect(store, new).results == 0


def test_a_dry_run_tells_the_same_and_removes_nothing(store: Store, old: Graph, new: Graph) -> None:
    files = sorted(path for path in store.root.rglob("*") if path.is_file())
    told = collect(store, new, dry_run=True)
    assert files == sorted(path for path in store.root.rglob("*") if path.is_file())
    assert told == collect(store, new)
    assert told.note == "builder images were left alone: the container engine does not answer"


def test_what_crashes_left_goes(store: Store, old: Graph, new: Graph) -> None:
    orphan = store.add_bytes(b"a blob whose result was never written")
    store.close()
    half = result_file(store, old.keys["a"]).with_name(f".{old.keys['a']}.json.0123abcd")
    half.write_text("{")
    unreadable = result_file(store, "ab" * 32)
    unreadable.parent.mkdir(exist_ok=True)
    unreadable.write_text("{")
    lock = store.root / "locks" / "forgotten"
    lock.touch()
    assert collect(store, old).results == 2
    assert not any(path.exists() for path in (half, unreadable, lock, store.path(orphan.digest)))


def test_a_download_that_the_graph_names_by_digest_stays(store: Store, old: Graph) -> None:
    blob = store.add_bytes(b"a package")
    store.close()

    def fetch(step: Step) -> None: ...

    packages = Action(
        name="packages:x", kind="packages", version=1, arch="all", summary="", run=fetch,
        parameters={"suite": "x"}, outputs=(Output("x.deb", digest=blob.digest),),
    )  # fmt: skip
    collect(store, Graph([*old, packages]))
    assert store.has(blob.digest)


# Beside a living run --------------------------------------------------------------------------


def test_nothing_is_removed_while_a_run_of_another_process_uses_the_store(
    store: Store, old: Graph, new: Graph
) -> None:
    script = """
        import sys
        from pathlib import Path
        from pipeline.store import Store
        print(Store(Path(sys.argv[1])).verified(sys.argv[2]) is not None, flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(store.root), old.keys["b"]],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdout.readline() == "True\n"
        grow_old(store, 40)
        with pytest.raises(UserError, match="a run is using the cache"):
            collect(store, new)
        assert store.lookup(old.keys["b"]) is not None
        process.kill()  # no matter how a run ends, it is in nobody's way afterwards
    assert collect(store, new).results == 1


def test_many_runs_and_collections_at_once_lose_nothing(store: Store) -> None:
    """Runs build and use results that every collection would like to remove."""
    worker = """
        import sys, time
        from pathlib import Path
        from pipeline.engine import Engine
        from pipeline.errors import UserError
        from pipeline.executor import Executor
        from pipeline.gc import collect
        from pipeline.graph import Graph
        from pipeline.store import Store
        from tests.conftest import Recorder, host_step

        root, role = Path(sys.argv[1]), sys.argv[2]
        collected = 0
        for turn in range(40):
            store = Store(root)
            graph = Graph([host_step("a", f"{turn % 3}"), host_step("b", "b", "a")])
            if role == "gc":
                try:
                    collected += collect(store, Graph([]), Engine(), time.time() + 1, False).blobs
                except UserError as error:
                    assert "using the cache" in error.message, error
                time.sleep(0.005)
                continue
            executor = Executor(graph, store, Engine(), Recorder(), root.parent / f"log-{role}")
            result = executor.result("b")
            time.sleep(0.002)
            for name in ("b", "a"):
                blob, _ = executor.result(name).outputs["out"]
                assert store.path(blob.digest).read_text().endswith(str(turn % 3)), name
            store.close()
            time.sleep(0.02)
        print(collected)
    """
    environment = os.environ | {"DOCKER_HOST": f"unix://{store.root}/none"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(worker), str(store.root), role],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )
        for role in ("one", "two", "gc", "gc")
    ]  # fmt: skip
    outs = [process.communicate(timeout=120) for process in processes]
    assert [(p.returncode, err) for p, (_, err) in zip(processes, outs, strict=True)] == [(0, "")] * 4
    assert sum(int(out) for out, _ in outs) > 0, "no collection ever had the store alone"


# With a real engine ---------------------------------------------------------------------------


def rename_gcc(project: standin.Standin, old: str, new: str) -> None:
    """Let every recipe and lock that asks for a package ask for another."""
    for path in (*project.root.glob("recipes/*/*.toml"), project.root / "recipes/packages.lock"):
        path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))


@pytest.fixture
def project(tmp_path: Path) -> Iterator[standin.Standin]:
    (tmp_path / "rootfs").mkdir()
    rootfs = tiny_rootfs(tmp_path / "rootfs")
    project = standin.make(tmp_path, rootfs)
    # a builder that no other test has, so that its image is this store's
    rename_gcc(project, "gcc", f"gcc-{uuid.uuid4().hex}")
    standin.seed_builders(project, rootfs)
    yield project
    engine = Engine()
    for image in engine.builder_images(project.store().identity):
        engine.remove_image(image)


@pytest.mark.engine
def test_the_command_removes_builder_images_of_results_that_are_gone(project: standin.Standin) -> None:
    assert project.doit("kernel:qemu-q35:guest").status == 0
    store, engine = project.store(), Engine()
    (image,) = engine.builder_images(store.identity)
    found = re.search(r"gcc-[0-9a-f]{32}", (project.root / "recipes/packages.lock").read_text())
    assert found
    rename_gcc(project, found[0], "gcc")
    told = project.doit("gc", "--days", "0", "--dry-run")
    done = project.doit("gc", "--days", "0")
    assert (told.status, done.status) == (0, 0), (told, done)
    assert told.out == done.out.replace("removed", "would remove")
    assert re.fullmatch(rf"removed \d+ results and \d+ blobs, \d+\.\d MB\nand the image {image}\n", done.out)
    assert engine.builder_images(store.identity) == []
    assert project.doit("gc", "--days", "0").out == "removed 0 results and 0 blobs, 0.0 MB\n"


@pytest.mark.engine
def test_images_of_another_store_are_left_alone(store: Store, tmp_path: Path) -> None:
    rootfs, engine = tiny_rootfs(tmp_path), Engine()
    mine, others = builder_image("0" * 64), builder_image("1" * 64)
    engine.import_image(mine, rootfs, store.identity)
    engine.import_image(others, rootfs, "another")
    try:
        freed = gc.collect(store, Graph([]), engine, time.time(), dry_run=False)
        assert (freed.images, freed.note) == ((mine,), "")
        assert engine.has_image(others)
    finally:
        engine.remove_image(others)


@pytest.mark.engine
def test_gc_beside_a_run_is_one_line_and_works_afterwards(project: standin.Standin) -> None:
    project.edit("recipes/steps/kernel.sh", "${SLEEP:-0}", "0.1")
    process = project.start("kernel:qemu-q35:guest")
    assert process.stdout
    for line in process.stdout:
        if "[kernel:qemu-q35:guest] started" in line:
            break
    beside = project.doit("gc", "--days", "0")
    assert beside.status == 2
    assert beside.out.startswith(f"error: a run is using the cache {project.cache}/virt-rt\n")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert project.doit("gc", "--days", "0").status == 0
    assert "everything is current" in project.doit("kernel:qemu-q35:guest").out


@pytest.mark.parametrize("arguments", [["--days", "-1"], ["--days", "many"], ["kernel"]])
def test_what_gc_does_not_take_ends_with_two(tmp_path: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "doit", "gc", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2, done
    assert "Traceback" not in done.stdout + done.stderr
