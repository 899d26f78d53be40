"""All packages of a platform against nfpm alone: what staging, the container and our own part of it cost.

Theirs packs the same payload with the same compressor and level, from a directory that is ready. Both sides run as many
packages at once as there are CPUs, each package's two formats side by side.
"""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measure import ROOT, Row, alternate, seconds
from pipeline.action import Action
from pipeline.display import Display
from pipeline.engine import Engine
from pipeline.errors import UserError
from pipeline.executor import SOURCE_DATE_EPOCH, Executor
from pipeline.packager import COMPRESSION, FORMATS, LITTLE
from pipeline.packages import DOCUMENT, find_nfpm
from pipeline.project import DEFAULT_PLATFORM, Project

MOST = 1.2


def packaging(work: Path, rounds: int) -> Row:
    """Pack everything of the checkout's default platform again, in turns with nfpm alone.

    Raises `UserError` when its packages are not made yet.
    """
    what = f"all packages of {DEFAULT_PLATFORM}, deb and rpm, against nfpm on the same payload"
    project = Project(ROOT)
    actions = [action for action in project.graph if action.name.startswith(f"package:{DEFAULT_PLATFORM}:")]
    for action in actions:
        if not project.artifacts.current(action, project.graph.keys[action.name]):
            raise UserError(f"{action.name} is not current", f"run: doit lint:{DEFAULT_PLATFORM}")
    executor = Executor(project.graph, project.store, Engine(), Display(), work / "log")
    try:
        for name in dict.fromkeys(each for action in actions for each in action.upstreams):
            if not name.startswith("builder:"):
                executor.result(name)
        nfpm, _ = find_nfpm()
        commands = [_commands(project, action, nfpm, work) for action in actions]

        def ours() -> float:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return seconds(lambda: list(pool.map(lambda action: executor.repeat(action.name), actions)))

        def theirs() -> float:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return seconds(lambda: list(pool.map(_run, commands)))

        mine, bare = alternate(ours, theirs, rounds)
    finally:
        project.store.close()
    ratio = mine / bare
    return Row(
        what,
        ours=f"{mine:.1f} s",
        theirs=f"{bare:.1f} s",
        ratio=f"{ratio:.2f}",
        target=f"<= {MOST}",
        met=ratio <= MOST,
        note=f"median of {rounds}; {len(actions)} packages; containers and staging are in",
    )


def _commands(project: Project, action: Action, nfpm: Path, work: Path) -> list[list[str]]:
    """How nfpm packs the payload of a package that is there, in both formats."""
    place = project.artifacts.directory(action)
    document = json.loads((place / DOCUMENT).read_text())
    tree = work / document["what"]
    subprocess.run(["dpkg-deb", "-x", place / "deb" / document["formats"]["deb"]["file"], tree], check=True)
    level = LITTLE if "image-" in document["what"] and document["guest"] else COMPRESSION
    config = {
        "name": document["name"],
        "arch": "amd64",
        "version": "1",
        "description": document["name"],
        "maintainer": "benchmark <benchmark@example.org>",
        "contents": [{"src": str(tree), "dst": "/", "type": "tree"}],
        **{kind: {"compression": level} for kind in FORMATS},
    }
    described = work / f"{document['what']}.json"
    described.write_text(json.dumps(config))
    common = [
        "env",
        f"SOURCE_DATE_EPOCH={SOURCE_DATE_EPOCH}",
        str(nfpm),
        "package",
        "--config",
        str(described),
    ]
    return [
        [*common, "--packager", kind, "--target", str(work / f"made.{document['what']}.{kind}")]
        for kind in FORMATS
    ]


def _run(commands: list[list[str]]) -> None:
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    for process in running:
        if process.wait():
            raise UserError("nfpm failed", "look at what it says above")
