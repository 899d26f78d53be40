"""A kernel built in our container, against the same script with the same toolchain in a chroot."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import ROOT, Row, alternate, seconds
from pipeline import archive
from pipeline.action import Action, File
from pipeline.display import Display
from pipeline.engine import ENVIRONMENT, Container, Engine
from pipeline.errors import InternalError
from pipeline.executor import Executor, jobs
from pipeline.files import remove_tree
from pipeline.graph import Graph
from pipeline.inputs import source_name
from pipeline.project import Project
from pipeline.stage import Stage
from tests.test_pocket import pocket_kernel

MOST_RATIO = 1.03
BUILD = 'kmake "${targets[@]}"\n'


def kernel_build(work: Path, rounds: int, quick: bool) -> Row:
    """Measure the whole step: start of the container or chroot, configuration, make, end.

    `quick` builds a single directory of the kernel; it shows that the benchmark works.
    """
    what = "kernel build in our container against the same script in a chroot of the same builder"
    what += " (one directory only)" if quick else " (pocket configuration)"
    if os.geteuid() != 0:
        return Row(what, target=f"<= {MOST_RATIO}", note="a chroot needs root")
    action = _action(quick)
    with _staged(work, action) as (executor, stage, root):
        container = executor.container(stage)

        def ours() -> float:
            _empty(stage)
            return seconds(lambda: _check(Engine().run(container, lambda chunk: None), stage))

        def theirs() -> float:
            _empty(stage)
            return seconds(lambda: _check(_in_chroot(container, root), stage))

        if quick:
            theirs()  # reads the tree into the page cache; a whole build is long enough without
        mine, other = alternate(ours, theirs, rounds)
    return Row(
        what,
        f"{mine:.1f} s",
        f"{other:.1f} s",
        f"{mine / other:.3f}",
        f"<= {MOST_RATIO}",
        mine / other <= MOST_RATIO,
        f"{rounds} each, {jobs()} jobs, without ccache; starting and removing the container is in",
    )


def _action(quick: bool) -> Action:
    """The kernel of the tests, without ccache."""
    action = dataclasses.replace(pocket_kernel("kernel:bench"), ccache=False)
    if not quick:
        return action
    if action.script is None or BUILD.encode() not in action.script.content:
        raise InternalError("the kernel step has no line that builds", "mend benchmarks/container.py")
    script = action.script.content.replace(BUILD.encode(), f"{BUILD}exit\n".encode())
    environment = {**action.environment, "KERNEL_TARGETS": "kernel/sched/"}
    return dataclasses.replace(action, script=File(script), environment=environment)


@contextmanager
def _staged(work: Path, action: Action) -> Iterator[tuple[Executor, Stage, Path]]:
    """The step's stage, used by both sides, and the builder's root file system unpacked."""
    project = Project(ROOT)
    builder = action.builder or ""
    needed = project.graph.closure([source_name("linux-rt"), builder])
    graph = Graph([*(project.graph[name] for name in needed), action])
    executor = Executor(graph, project.store, Engine(), Display(), work / "log")
    root = work / "chroot"
    root.mkdir()
    try:
        stage = executor.stage_for_shell(action)
        blob, _ = executor.result(builder).outputs["rootfs.tar"]
        archive.unpack(project.store.path(blob.digest), root)
        yield executor, stage, root
    finally:
        project.store.close()
        remove_tree(root)


def _empty(stage: Stage) -> None:
    for directory in (stage.out, stage.work):
        remove_tree(directory)
        directory.mkdir()
    os.sync()


def _in_chroot(container: Container, root: Path) -> int:
    """Run the container's script with its mounts and environment, and no engine between."""
    lines = ["set -e"]
    for target, (source, writable) in container.mounts.items():
        there = root / target.lstrip("/")
        point = f"mkdir -p {there}" if source.is_dir() else f"mkdir -p {there.parent} && touch {there}"
        lines += [point, f"mount --bind {source} {there}"]
        if not writable:
            lines.append(f"mount -o remount,bind,ro {there}")
    lines += [
        f"mount -t proc proc {root}/proc",
        f"mount --rbind /dev {root}/dev",
        f"mount -t tmpfs tmpfs {root / 'tmp'}",
    ]
    environment = ENVIRONMENT | dict(container.environment)
    variables = shlex.join(f"{name}={value}" for name, value in environment.items())
    command = shlex.join(container.command)
    inner = shlex.quote(f"cd /build/work && exec {command}")
    lines.append(f"exec chroot {root} /usr/bin/env -i {variables} /bin/bash -c {inner}")
    # a mount namespace of its own: nothing is left mounted, however it ends
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", "\n".join(lines)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=False,
    ).returncode


def _check(status: int, stage: Stage) -> None:
    if status or not any(stage.work.iterdir()):
        raise InternalError(f"the kernel step ended with {status}", "run it with `doit shell` to see why")
