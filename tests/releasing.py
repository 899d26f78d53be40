"""A release made in seconds: the real action of release and repository, over steps that stand in for the rest.

Packages are real and small, signed by a real key; kernels, images and proofs are a few lines each.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from pipeline import locks, release, releaserecipe, repo, signing
from pipeline.action import ALL, Action, File, Output, Step, Upstream
from pipeline.artifacts import Artifacts
from pipeline.cpuplan import HostPlan
from pipeline.engine import Engine
from pipeline.executor import Executor
from pipeline.graph import Graph
from pipeline.labrecord import JUNIT, LEVELS, PAGE, RECORD, Report, encode
from pipeline.locks import LockedFile, LockedPackage, PackageSet, PackagesLock, SourceLock, SourcesLock
from pipeline.project import Project
from pipeline.recipes import Guest, Platform
from pipeline.releaserecord import EMULATED
from pipeline.store import Store
from tests.conftest import ROOT, Recorder
from tests.packaging import make_package

PLATFORM, GUEST = "qemu-q35", "rt-guest"
PATCH = "0001-answer.patch"


def digest(text: str) -> str:
    """sha256 (hex) of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def locked(name: str, *packages: str) -> PackageSet:
    """A locked set of made-up packages, `NAME` or `NAME=VERSION`."""
    made = []
    for package in packages:
        word, _, version = package.partition("=")
        file = f"pool/main/{word}_{version or 1}_amd64.deb"
        made.append(
            LockedPackage(
                name=word, version=version or "1", arch="amd64", archive="debian", path=file,
                sha256=digest(f"{word} {version}"), size=1,
            )
        )  # fmt: skip
    return PackageSet(name=name, arch="amd64", suite="trixie", request=(), packages=tuple(made))


SOURCES = SourcesLock(
    sources=(
        SourceLock(
            name="linux-rt", origin="git", location="https://git.example.org/linux.git", ref="v6.12.1-rt1",
            commit="1" * 40, tree="2" * 40,
        ),
        SourceLock(
            name="qemu-kvm-rt", origin="debian", location="trixie", ref="1:10.0.1+ds-1", commit="3" * 40,
            tree="4" * 40, series="plain",
            files=(
                LockedFile(archive="debian", path="pool/main/q/qemu/qemu_10.0.1+ds-1.dsc", sha256="5" * 64, size=1),
            ),
        ),
    )
)  # fmt: skip
PACKAGES = PackagesLock().replace(
    [
        locked("builder/kernel", "bash", "gcc=14"),
        locked("builder/package", "bash", "libfdt1=1.7"),
        locked(f"guest/{GUEST}", "bash", "libc6=2.41", "libstdc++6=14"),
    ]
)


@dataclass
class Workshop:
    """A checkout with what a release needs of one, and steps that stand in for all before it; fields may be changed."""

    directory: Path
    environ: Mapping[str, str]
    version: str = "0.1.0"
    sources: SourcesLock = SOURCES
    packages: PackagesLock = PACKAGES
    config: Mapping[str, str] = field(
        default_factory=lambda: {"host": "CONFIG_KVM=y\n", "guest": "CONFIG_VIRTIO=y\n"}
    )
    proof: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    url: str = ""
    what: tuple[str, ...] = ("kernel", "qemu", "image", "host")
    inside: str = ""
    unpublished: str = ""

    def __post_init__(self) -> None:
        """Lay out the checkout."""
        self.root = self.directory / "checkout"
        shutil.copytree(ROOT / release.TEMPLATES, self.root / release.TEMPLATES)
        patches = self.root / "recipes" / "patches" / "qemu-kvm-rt"
        patches.mkdir(parents=True)
        (patches / PATCH).write_text("--- a/answer\n+++ b/answer\n@@ -1 +1 @@\n-41\n+42\n")

    @property
    def recipe(self) -> releaserecipe.ReleaseRecipe:
        """The real recipe with this version and address."""
        recipe = releaserecipe.load(ROOT, {"VIRT_RT_VERSION": self.version})
        repository = msgspec.structs.replace(recipe.repository, url=self.url)
        return msgspec.structs.replace(recipe, repository=repository)

    @property
    def platform(self) -> Platform:
        """The platform, as its recipe has it."""
        return Project(ROOT).recipes.platform(PLATFORM)

    @property
    def guests(self) -> Mapping[str, Guest]:
        """Its guests."""
        return Project(ROOT).recipes.guests_of(PLATFORM)

    @property
    def plan(self) -> HostPlan:
        """Its CPU plan."""
        return Project(ROOT).recipes.plans[PLATFORM]

    def actions(self) -> dict[str, Action]:
        """Everything up to the release, by name."""
        made: dict[str, Action] = {}
        home = self.directory / "config"
        identity = signing.ensure(self.environ, home)

        def add(action: Action) -> None:
            made[action.name] = action

        for source in self.sources.sources:
            add(step(f"source:{source.name}", "source", {"tree": source.tree}, "source.tar.zst"))
        for each in self.packages.sets:
            add(
                step(
                    f"packages:{each.name}",
                    "packages",
                    {"packages": [p.sha256 for p in each.packages]},
                    "list",
                )
            )
            if each.name.startswith("builder/"):
                add(
                    step(
                        each.name.replace("/", ":"),
                        "builder",
                        {},
                        "rootfs.tar",
                        needs=[f"packages:{each.name}"],
                    )
                )
        for role, config in self.config.items():
            outputs = {"config": config, "kernelrelease": f"6.12.1-{role}\n"}
            add(
                step(
                    f"kernel:{PLATFORM}:{role}",
                    "kernel",
                    {},
                    needs=["source:linux-rt", "builder:kernel"],
                    **outputs,
                )
            )
        add(step(f"qemu:{PLATFORM}", "qemu", {}, "bin", needs=["source:qemu-kvm-rt", "builder:kernel"]))
        (guest,) = (each for each in self.packages.sets if each.name == f"guest/{GUEST}")
        inside = "".join(f"{p.name} {p.version} {p.arch}\n" for p in guest.packages)
        rootfs, disk = {"packages.txt": self.inside or inside}, {"disk.qcow2": "disk"}
        add(step(f"rootfs:{GUEST}", "rootfs", {}, needs=[f"packages:guest/{GUEST}"], **rootfs))
        add(step(f"image:{GUEST}", "disk", {}, needs=[f"rootfs:{GUEST}", f"kernel:{PLATFORM}:guest"], **disk))
        add(step(f"launch:{GUEST}", "launch", {}, "kvmqemu.sh", "kvmqemu-rfs.sh"))
        add(step(f"libvirt:{GUEST}", "libvirt", {}, "domain.xml", "define.sh"))
        verdict = {
            "ok": True,
            "evidence": "emulated",
            "latency_verdict": EMULATED,
            "booted_sha256": {f"image/{GUEST}/disk.qcow2": digest("disk")},
        } | dict(self.proof)
        for level in ("boot", "stack"):
            outputs = {f"{level}.json": json.dumps(verdict)}
            add(
                step(
                    f"{level}:{PLATFORM}", level, {}, needs=[f"image:{GUEST}", f"qemu:{PLATFORM}"], **outputs
                )
            )
        add(self._lab())
        sources = {"kernel": f"kernel:{PLATFORM}:host", "qemu": f"qemu:{PLATFORM}", "image": f"image:{GUEST}"}
        for what in self.what:
            needs = [sources[what]] if what in sources else [f"package:{PLATFORM}:{each}" for each in sources]
            add(package(what, self.version, [*needs, "builder:package"]))
        packed = [
            name for name, action in made.items() if action.kind == "package" and name != self.unpublished
        ]
        add(repo.repo(PLATFORM, "amd64", packed, [], self.recipe, identity, self.environ, home))
        maker = release.Maker(self.root, self.recipe, self.sources, self.packages, self.environ, home)
        add(maker.release(PLATFORM, self.platform, self.guests, self.plan, made))
        return made

    def _lab(self) -> Action:
        """The report that the lab would make of this release."""
        passed = {
            "verdict": "passed",
            "reason": "fine",
            "findings": [{"name": "all", "wanted": "fine", "got": "fine", "ok": True}],
        }
        levels = [{"name": name, **passed} for name in LEVELS[:3]]
        levels.append({"name": "latency", "verdict": "not proven", "reason": "not measured", "findings": []})
        report = {
            "platform": PLATFORM, "ok": True, "evidence": "none", "latency_verdict": "not measured", "levels": levels,
            "limits": None,
            "kernels": [
                {"role": role, "release": f"6.12.1-{role}", "key": "", "config_sha256": "", "contract": "held"}
                for role in self.config
            ],
            "packages": [{"name": name, "version": version} for name, version in map(self._named, self.what)],
            "plan_sha256": "", "places": [], "runs": [], "series": [], "events": [],
            "not_proven": ["latency: not measured"], "baseline": None,
        } | dict(self.report)  # fmt: skip
        texts = {
            RECORD: encode(msgspec.convert(report, Report)).decode(),
            JUNIT: "<testsuites/>",
            PAGE: "<p>fine</p>",
        }
        return step(f"lab:{PLATFORM}", "lab", {}, needs=[f"boot:{PLATFORM}", f"stack:{PLATFORM}"], **texts)

    def _named(self, what: str) -> tuple[str, str]:
        return package_name(what), f"{self.version}+g{digest(what + self.version)[:12]}"

    def make(self) -> Path:
        """Make the release as `doit` would; its directory below the checkout's artifacts."""
        graph = Graph(self.actions().values())
        name = release.release_name(PLATFORM)
        artifacts = Artifacts(self.root / "artifacts")
        with self.executor(graph) as executor:
            artifacts.place(graph[name], graph.keys[name], executor.result(name), executor.store)
        return artifacts.directory(graph[name])

    @contextmanager
    def executor(self, graph: Graph) -> Iterator[Executor]:
        """What brings results, with a store of this workshop."""
        store = Store(self.directory / "cache")
        try:
            yield Executor(graph, store, Engine(), Recorder(), self.directory / "log")
        finally:
            store.close()

    def lock(self) -> None:
        """Write the locks into the checkout."""
        locks.dump_sources(self.sources, self.root / locks.SOURCES_LOCK)
        locks.dump_packages(self.packages, self.root / locks.PACKAGES_LOCK)


def step(
    name: str,
    kind: str,
    parameters: Mapping[str, Any],
    *outputs: str,
    needs: Iterable[str] = (),
    **contents: str,
) -> Action:
    """A host step whose outputs hold the given texts, or their own names."""
    texts = {each: f"{each} of {name}\n" for each in outputs} | contents

    def run(step: Step) -> None:
        for output, text in texts.items():
            (step.out / output).write_text(text)

    return _action(name, kind, {**parameters, "texts": texts}, run, [Output(each) for each in texts], needs)


def package_name(what: str) -> str:
    """What a package is called."""
    names = {
        "qemu": f"qemu-kvm-rt-{PLATFORM}",
        "image": f"virt-rt-image-{GUEST}",
        "host": f"virt-rt-host-{PLATFORM}",
    }
    return names.get(what, f"virt-rt-{what}")


def package(what: str, version: str, needs: Iterable[str]) -> Action:
    """A package in both formats, with its description, as the packager would leave it."""
    name = package_name(what)
    full = f"{version}+g{digest(what + version)[:12]}"

    def run(step: Step) -> None:
        formats = {}
        for form, arch in (("deb", "amd64"), ("rpm", "x86_64")):
            # nfpm has a name of its own for the architecture
            made = make_package(step.out / form, name, full, format_=form, content=f"{what} {version}")
            content = made.read_bytes()
            formats[form] = {
                "file": made.name,
                "arch": arch,
                "size": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        bundled = [{"name": "libfdt1", "version": "1.7", "files": ["libfdt.so.1"]}] if what == "qemu" else []
        document = {
            "name": name,
            "version": full,
            "what": what,
            "formats": formats,
            "requires": [],
            "bundled": bundled,
            "licences": [{"what": "virt-rt", "licence": "MIT", "source": None}],
        }
        (step.out / "package.json").write_text(json.dumps(document))

    outputs = [Output("deb", "directory"), Output("rpm", "directory"), Output("package.json")]
    place = f"{PLATFORM}/packages/{what}"
    return _action(f"package:{PLATFORM}:{what}", "package", {"v": full}, run, outputs, needs, place)


def _action(
    name: str,
    kind: str,
    parameters: Mapping[str, Any],
    run: Callable[[Step], None],
    outputs: Iterable[Output],
    needs: Iterable[str],
    place: str | None = None,
) -> Action:
    return Action(
        name=name,
        kind=kind,
        version=1,
        arch="amd64",
        summary=name,
        run=run,
        files={"own": File(name.encode())},
        inputs={f"needs/{each.replace(':', '/')}": Upstream(each, ALL) for each in needs},
        parameters=parameters,
        outputs=tuple(outputs),
        place=place,
    )
