"""Releases of the real recipes, made in seconds: what is compiled or baked is a small stand-in.

The graph is the project's own. Of the actions below a platform's repository, those that render or sign run as they
are, and packages are made by the real packager, on this machine instead of in its builder; kernels, qemu, disks and
licence texts are small files, and checks that need a container pass. So descriptions, relations, maintainer scripts,
versions and signatures are what a user gets. The stand-in for qemu is `jq`, a small program with libraries of its own:
given those, it runs where no jq is installed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import msgspec
import pytest

from pipeline.action import Action, Step
from pipeline.artifacts import Artifacts
from pipeline.directory import Directory
from pipeline.engine import Engine
from pipeline.executor import SOURCE_DATE_EPOCH, Executor
from pipeline.graph import Graph
from pipeline.packager import Packager
from pipeline.project import Project
from pipeline.publishing import Publisher
from pipeline.repo import repo_name
from pipeline.repository import POINTER, read_state
from pipeline.signing import Signer
from tests.conftest import Recorder

ROOT = Path(__file__).resolve().parent.parent
PLATFORM, GUEST, CHANNEL = "canoe-pass", "canoe-guest", "stable"
CHECKOUT = ("pipeline", "recipes", "kernel-configs", "LICENSE")
#: A configuration file, and what only the first of two releases has in it.
SETTINGS, FIRST = f"/etc/virt-rt/guests/{GUEST}.conf", "as the first release has it"
#: What the installation of modules writes, depmod's files included.
MODULE_FILES = (
    "alias alias.bin builtin builtin.alias.bin builtin.bin builtin.modinfo dep dep.bin devname order softdep symbols "
    "symbols.bin weakdep"
).split()
#: Of this machine; stands for programs that were compiled.
PROGRAM = "jq"


@dataclass(frozen=True, slots=True)
class Made:
    """A release: its version, the directory that `repo:<platform>` made, and the kernels' releases by role."""

    version: str
    repository: Path
    kernels: dict[str, str]


class Workshop:
    """A checkout that may be edited between releases, with a store and a development key of its own."""

    def __init__(self, directory: Path) -> None:
        """`directory` is empty."""
        self.root = directory / "checkout"
        self.root.mkdir()
        for name in CHECKOUT:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, self.root)
        self._directory = directory
        self.environ = {
            "PATH": os.environ["PATH"],
            "XDG_CACHE_HOME": str(directory / "cache"),
            "XDG_CONFIG_HOME": str(directory / "config"),
        }

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace text in a file of the checkout."""
        file = self.root / path
        text = file.read_text()
        assert old in text, f"{path} has no {old!r}"
        file.write_text(text.replace(old, new))

    def project(self, version: str) -> Project:
        """The checkout as a project that makes releases of that version."""
        return Project(self.root, self.environ | {"VIRT_RT_VERSION": version})

    def release(self, version: str, built: Mapping[str, str] = MappingProxyType({})) -> Made:
        """Make a release; `built` is text by name of action, which goes into its stand-ins and its key."""
        project = self.project(version)
        wanted = repo_name(PLATFORM)
        project.bring_signer([wanted])
        graph = Graph(small(action, built.get(action.name, "")) for action in project.graph)
        executor = Executor(graph, project.store, Engine(), Recorder(), self._directory / "log")
        try:
            result = executor.result(wanted)
            artifacts = Artifacts(self._directory / version)
            artifacts.place(graph[wanted], graph.keys[wanted], result, project.store)
        finally:
            project.store.close()
        kernels = {
            role: kernel_release(graph.keys[f"kernel:{PLATFORM}:{role}"], role) for role in ("host", "guest")
        }
        return Made(version, artifacts.directory(graph[wanted]), kernels)

    def publish(self, made: Path, served: Path, url: str) -> None:
        """Bring what `repo:<platform>` made to the repository that is served, and promote it to `CHANNEL`.

        `made` may be signed by a key that is not the workshop's.
        """
        project = self.project("0")
        recipe = msgspec.structs.replace(project.release.repository, url=url)
        trusted = {"VIRT_RT_OTHER_KEYS": str(made / "key.asc")}
        with Signer(self.environ | trusted, project.config) as signer:
            publisher = Publisher(Directory(served), recipe, signer)
            publisher.publish(made, PLATFORM, recipe.channels[0])
            publisher.promote(recipe.channels[0], CHANNEL, PLATFORM)


class Shelf:
    """Two releases, one after the other, with different host kernels and different settings of the guest."""

    def __init__(self, directory: Path) -> None:
        """`directory` is empty."""
        self.workshop = Workshop(directory)
        settings, said = "recipes/packages/launch/guest.conf", "# Settings of the guest"
        self.workshop.edit(settings, said, f"# {FIRST}\n{said}")
        self.first = self.workshop.release("0.0.1", {f"kernel:{PLATFORM}:host": "first"})
        self.workshop.edit(settings, f"# {FIRST}\n", "")
        self.second = self.workshop.release("0.0.2")

    def real(self) -> Made:
        """The release that the checkout's own `doit repo:canoe-pass` made; skips when there is none."""
        repository = ROOT / "artifacts" / PLATFORM / "repo"
        if not (repository / POINTER).exists():
            pytest.skip(f"there is no real release: doit {repo_name(PLATFORM)}")
        state = read_state(Directory(repository).read, (repository / "key.asc").read_bytes())
        (release,) = (each for releases in state.releases.values() for each in releases)
        found = [
            re.fullmatch(r"linux-image-(\S+-rt-virt-(host|guest)-\S+)", p.name)
            for p in state.packages.values()
        ]
        return Made(release.version, repository, {name[2]: name[1] for name in found if name})


def kernel_release(key: str, role: str) -> str:
    """The release of a stand-in for a kernel, as the real step names it."""
    return f"6.12.107-rt-virt-{role}-{key[:12]}"


def small(action: Action, text: str) -> Action:
    """An action that takes no time instead of one that needs a container; others as they are."""
    if action.builder is None:
        return action
    if action.kind == "package":
        return replace(action, builder=None, script=None, run=_package)
    stand_in = {"licences": _licences, "kernel": _kernel, "qemu": _qemu}.get(action.kind, _anything)
    inputs = action.inputs if action.kind == "driver" else {}
    parameters = {**action.environment, "stand-in": text}
    return replace(action, builder=None, script=None, inputs=inputs, parameters=parameters, run=stand_in)


def _key(step: Step) -> str:
    graph: Graph = step.executor.graph  # type: ignore[attr-defined]  # of what runs host steps
    return graph.keys[step.action.name]


def _package(step: Step) -> None:
    Packager(step.inputs, step.out, step.scratch, _key(step), int(SOURCE_DATE_EPOCH)).make()


def _write(path: Path, text: str, *, executable: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755 if executable else 0o644)


def _program(path: Path) -> None:
    found = shutil.which(PROGRAM)
    assert found, f"{PROGRAM} is missing: make setup installs it"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(found, path)


def _anything(step: Step) -> None:
    """Small files under the names that the action declares."""
    text = f"{step.action.name} {step.action.parameters['stand-in']}\n"
    for output in step.action.outputs:
        target = step.out / output.name
        _write(target / "file" if output.kind == "directory" else target, text)


def _licences(step: Step) -> None:
    for file in str(step.action.parameters["FILES"]).splitlines():
        _write(step.out / "texts" / file.lstrip("/"), f"{file} of {step.action.name}\n")


def _kernel(step: Step) -> None:
    role = str(step.action.parameters["ROLE"])
    release = kernel_release(_key(step), role)
    modules, headers = step.out / "modules/lib/modules" / release, step.out / "headers"
    _anything(step)
    for directory in ("modules", "headers"):
        shutil.rmtree(step.out / directory)
    # What its fragments ask for, above all which initramfs it could unpack.
    fragments = str(step.action.parameters["FRAGMENTS"]).split()
    texts = [(step.inputs / "kernel-configs" / path).read_text() for path in fragments]
    _write(step.out / "config", "".join(texts))
    _write(step.out / "kernelrelease", f"{release}\n")
    for name in MODULE_FILES:
        _write(modules / f"modules.{name}", "")
    _write(modules / "kernel/README", "no module is built in a stand-in\n")
    _write(headers / "Makefile", f"# {release}\n")
    _write(headers / "include/config/kernel.release", f"{release}\n")
    _write(headers / "scripts/mkversion", "#!/bin/sh\n", executable=True)
    _program(headers / "scripts/mod/modpost")


def _qemu(step: Step) -> None:
    for name in ("qemu-system-x86_64", "qemu-img"):
        _program(step.out / "bin" / name)
    for output in step.action.outputs:
        if not (step.out / output.name).exists():
            _write(step.out / output.name / "file", f"{output.name}\n")
