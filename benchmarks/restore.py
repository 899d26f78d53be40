"""Products laid out from the store, hashed and with their manifests, against `cp -r` of the same files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.measure import ROOT, Row, alternate, seconds
from benchmarks.noop import built
from pipeline.action import Action, Output, Step
from pipeline.artifacts import Artifacts
from pipeline.commands import PARALLEL
from pipeline.display import Display
from pipeline.engine import Engine
from pipeline.executor import Executor
from pipeline.files import remove_tree
from pipeline.graph import Graph
from pipeline.project import DEFAULT_PLATFORM, Project
from pipeline.store import Store

LEAST_RATIO = 0.8


def restore(work: Path, rounds: int) -> Row:
    """Measure as `doit` works: as many products side by side, every byte verified, warm page cache."""
    project = Project(ROOT)
    if built(project):
        graph, store, note = project.graph, project.store, "the products of the checkout"
        products = [project.graph[name] for name in project.products(DEFAULT_PLATFORM)]
    else:
        graph, store = Graph(_made_up()), Store(work / "store")
        products, note = list(graph), "made-up products of the usual sizes"
    placed, copy = work / "placed", work / "copy"

    def place() -> None:
        # a new executor and new artifacts know nothing of earlier rounds
        executor, artifacts = Executor(graph, store, Engine(), quiet, work / "log"), Artifacts(placed)

        def bring(action: Action) -> None:
            artifacts.place(action, graph.keys[action.name], executor.result(action.name), store)

        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(bring, products))

    def cp() -> None:
        subprocess.run(["cp", "-r", placed, copy], check=True)

    with (work / "restored.log").open("w") as log:
        quiet = Display(log)
        place()
        size = sum(path.stat().st_size for path in placed.rglob("*") if path.is_file())
        ours, theirs = alternate(
            partial(_afresh, place, placed),
            partial(_afresh, cp, copy),
            rounds,
        )
    store.close()
    return Row(
        f"restore of {len(products)} products, {size / 1e6:.0f} MB, from the store against cp -r",
        f"{size / ours / 1e6:.0f} MB/s",
        f"{size / theirs / 1e6:.0f} MB/s",
        f"{theirs / ours:.2f}",
        f">= {LEAST_RATIO}",
        theirs / ours >= LEAST_RATIO,
        f"median of {rounds}; {note}",
    )


def _afresh(call: Callable[[], None], target: Path) -> float:
    """Wall time of making `target`, with nothing there before and no writes under way."""
    if target.exists():
        remove_tree(target)
    os.sync()
    return seconds(call)


def _made_up() -> list[Action]:
    """Products as large as the default platform's: a disk image, qemu with its firmware, modules."""

    def product(name: str, files: int, size: int) -> Action:
        def run(step: Step) -> None:
            if files == 1:
                (step.out / "made").write_bytes(os.urandom(size))
                return
            (step.out / "made").mkdir()
            for number in range(files):
                (step.out / "made" / f"{number}").write_bytes(os.urandom(size))

        return Action(
            name=name,
            kind="made-up",
            version=1,
            arch="all",
            summary="random bytes",
            run=run,
            parameters={"files": files, "size": size},
            outputs=(Output("made", "file" if files == 1 else "directory"),),
            place=f"made-up/{name}",
        )

    return [
        product("disk", 1, 60_000_000),
        product("tree", 60, 50_000_000 // 60),
        product("modules", 300, 100_000),
    ]
