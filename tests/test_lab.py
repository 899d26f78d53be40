"""The action that makes a platform's report: what it takes, that it is red when one thing is, and what is kept then."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import labpage, signing
from pipeline.action import Action, Output, Step, Upstream
from pipeline.errors import RedError, VirtRtError
from pipeline.graph import Graph
from pipeline.lab import MEASUREMENT, lab, lab_name
from pipeline.labrecord import JUNIT, PAGE, RECORD, Report, load
from pipeline.labreport import ATTRIBUTION
from pipeline.measure.verdict import FILE as VERDICT
from pipeline.project import Project
from pipeline.releaserecord import EMULATED
from tests.conftest import ROOT
from tests.measuring import ATTRIBUTION as EVENTS
from tests.measuring import Made, verdict
from tests.packaging import make_key
from tests.releasing import GUEST, PLATFORM, Workshop, step

FINDING = {"name": "running", "wanted": "running", "got": "running", "ok": True}
PROOF = {"schema": 1, "platform": PLATFORM, "ok": True, "evidence": "emulated", "latency_verdict": EMULATED}
BOOT = PROOF | {"guests": {GUEST: {"boots": {way: {"findings": [FINDING]} for way in ("inside", "outside")}}}}
STACK = PROOF | {"findings": [FINDING]}
LINT = {
    "schema": 1, "packages": 8, "files": 40, "accepted": [],
    "contracts": [{"role": role, "format": form} for role in ("host", "guest") for form in ("deb", "rpm")],
}  # fmt: skip


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A machine with a release key."""
    directory = tmp_path_factory.mktemp("key")
    (directory / "secret.asc").write_bytes(make_key(directory, "Release Key <release@example.org>"))
    return {"PATH": os.environ["PATH"], signing.KEY_FILE: str(directory / "secret.asc")}


class Lab:
    """A workshop with packages and a signed repository, whose proofs say what they are told to."""

    def __init__(self, directory: Path, environ: Mapping[str, str]) -> None:
        self.workshop = Workshop(directory, environ)
        for path in labpage.templates_of(ROOT):
            (self.workshop.root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, self.workshop.root / path)
        self.reset()

    def reset(self) -> None:
        """Everything green, nothing measured; packages that were made stay in the store."""
        self.documents: dict[str, Any] = {"boot": BOOT, "stack": STACK, "lint": LINT}
        self.measurement: Path | None = None
        self.extra: dict[str, str] = {}
        self.workshop.unpublished = ""
        shutil.rmtree(self.kept, ignore_errors=True)

    def actions(self) -> dict[str, Action]:
        made = self.workshop.actions()
        del made[lab_name(PLATFORM)], made[f"release:{PLATFORM}"]
        for level, document in self.documents.items():
            name = f"{level}:{PLATFORM}"
            made.pop(name, None)
            if document is not None:
                text = document if isinstance(document, str) else json.dumps(document)
                made[name] = step(name, level, {}, **{f"{level}.json": text})
        if self.measurement is not None:
            made[f"stack:{PLATFORM}"] = self._measured(made[f"stack:{PLATFORM}"], self.measurement)
        workshop = self.workshop
        action = lab(workshop.root, PLATFORM, workshop.platform, workshop.plan, made)
        return made | {action.name: action}

    def _measured(self, proof: Action, measurement: Path) -> Action:
        def run(step: Step) -> None:
            assert proof.run is not None
            proof.run(step)
            shutil.copytree(measurement, step.out / MEASUREMENT)
            for name, text in self.extra.items():
                (step.out / name).write_text(text)

        outputs = (*proof.outputs, Output(MEASUREMENT, "directory"), *(Output(name) for name in self.extra))
        return replace(proof, run=run, outputs=outputs, parameters={**proof.parameters, **self.extra})

    def make(self) -> Report:
        """Make the report as doit would; `RedError` when it is red."""
        graph = Graph(self.actions().values())
        with self.workshop.executor(graph) as executor:
            result = executor.result(lab_name(PLATFORM))
            target = self.workshop.directory / "made.json"
            shutil.copy(executor.store.path(result.outputs[RECORD][0].digest), target)
        return load(target)

    @property
    def kept(self) -> Path:
        return self.workshop.directory / f"log/{lab_name(PLATFORM)}.failed"


@pytest.fixture(scope="module")
def shared(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """One workshop for all tests: making its packages takes most of the time."""
    return Lab(tmp_path_factory.mktemp("lab"), environ)


@pytest.fixture
def made(shared: Lab) -> Lab:
    """It, with everything green."""
    shared.reset()
    return shared


def test_a_green_report_names_kernels_packages_and_what_is_not_proven(made: Lab) -> None:
    report = made.make()
    assert {each.name: each.verdict for each in report.levels} == {
        "structure": "passed",
        "boot": "passed",
        "stack": "passed",
        "latency": "not proven",
    }
    assert {each.name: each.got for each in report.level("structure").findings} == {
        "packages examined": "8, with 40 files; 0 sorts of findings are accepted, each with its reason",
        "kernel contract": "4 hold it",
        "repository": "signed; 8 package files",
    }
    keys = Graph(made.actions().values()).keys
    assert {(each.role, each.release, each.key) for each in report.kernels} == {
        (role, f"6.12.1-{role}", keys[f"kernel:{PLATFORM}:{role}"]) for role in ("host", "guest")
    }
    assert len({each.config_sha256 for each in report.kernels}) == 2
    assert "held in its packages (deb, rpm)" in report.kernels[0].contract
    assert [each.name for each in report.packages] == sorted(
        ["virt-rt-kernel", f"qemu-kvm-rt-{PLATFORM}", f"virt-rt-image-{GUEST}", f"virt-rt-host-{PLATFORM}"]
    )
    assert any("doit measure:qemu-q35 measures hardware" in each for each in report.not_proven)
    assert not made.kept.exists()


def test_how_the_host_was_installed_is_part_of_the_stack(made: Lab) -> None:
    document = {name: value for name, value in STACK.items() if name != "latency_verdict"}
    made.documents["labhost"] = document
    level = made.make().level("stack")
    assert (level.verdict, [each.stage for each in level.findings]) == ("passed", ["installed", ""])


def test_a_platform_without_a_stack_proof_says_so(made: Lab) -> None:
    made.documents["stack"] = None
    report = made.make()
    assert report.ok and report.level("stack").verdict == "not proven"
    assert any("has no stack proof" in each for each in report.not_proven)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"boot": BOOT | {"guests": {}}}, "boot.json"),
        ({"boot": '{"schema": 1,'}, "cut short"),
        ({"stack": STACK | {"ok": False, "findings": [{**FINDING, "ok": False, "got": "degraded"}]}}, "got degraded"),
        ({"lint": LINT | {"packages": 7}}, "packages examined"),
        ({"lint": LINT | {"files": 0}}, "packages examined"),
        ({"lint": LINT | {"contracts": LINT["contracts"][:3]}}, "not examined: guest as rpm"),  # type: ignore[index]
        ({"lint": LINT | {"contracts": [{"role": "host", "format": "deb", "broken": "no KVM"}]}}, "no KVM"),
        ({"labhost": PROOF | {"findings": [{**FINDING, "ok": False, "got": "unsigned"}], "ok": False}}, "got unsigned"),
    ],
)  # fmt: skip
def test_a_red_level_fails_the_action_and_keeps_the_report(
    changes: dict[str, Any], said: str, made: Lab
) -> None:
    made.documents |= changes
    with pytest.raises(RedError, match=f"lab:{PLATFORM} is red") as caught:
        made.make()
    assert caught.value.exit_status == 1 and said in caught.value.message
    assert str(made.kept) in caught.value.hint
    assert {path.name for path in made.kept.iterdir()} == {PAGE, RECORD, JUNIT}
    assert not load(made.kept / RECORD).ok and said.removeprefix("got ") in (made.kept / PAGE).read_text()


def test_a_repository_that_lacks_a_package_is_red(made: Lab) -> None:
    made.workshop.unpublished = f"package:{PLATFORM}:kernel"
    with pytest.raises(RedError, match="not there: virt-rt-kernel"):
        made.make()


def test_a_repository_of_another_key_is_red(made: Lab, tmp_path: Path) -> None:
    other = Workshop(tmp_path / "other", {"PATH": os.environ["PATH"]})
    signing.ensure(other.environ, tmp_path / "other/config")
    actions = made.actions()
    whole = actions[f"repo:{PLATFORM}"]
    assert whole.run is not None

    def run(step: Step) -> None:
        assert whole.run is not None
        whole.run(step)
        key = signing.identity(other.environ, tmp_path / "other/config")
        assert key is not None
        (step.out / "key.asc").write_bytes(key.public)

    actions[whole.name] = replace(whole, run=run, parameters={**whole.parameters, "other": True})
    graph = Graph(actions.values())
    with made.workshop.executor(graph) as executor, pytest.raises(RedError, match="repository"):
        executor.result(lab_name(PLATFORM))


def measured(made: Lab, directory: Path) -> Path:
    """A measurement of the emulated platform, as a stack proof would leave it."""
    measurement = Made(
        kind="emulated",
        platform=PLATFORM,
        guest_name=f"guest-{GUEST}",
        host=(2,),
        guest=(1,),
        segments=2,
        samples=2000,
    ).write(directory / "measurement")
    made.measurement = measurement
    return measurement


def test_a_measurement_of_the_stack_is_taken(made: Lab, tmp_path: Path) -> None:
    measured(made, tmp_path)
    made.extra = {VERDICT: json.dumps(verdict(emulated=True)), ATTRIBUTION: json.dumps(EVENTS)}
    report = made.make()
    assert report.evidence == "emulated" and report.latency_verdict == EMULATED
    assert report.level("latency").verdict == "not proven" and len(report.level("latency").findings) > 5
    (guest,) = (each for each in report.series if each.what == "timer" and each.place != "host")
    assert guest.runs_on == Project(ROOT).recipes.plans[PLATFORM].guests[GUEST].pins[1]
    assert [event.cpu for event in report.events] == [3]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, "verdict.json: wanted the gate's verdict; got none"),
        ({VERDICT: "{"}, "verdict.json"),
        ({VERDICT: json.dumps(verdict(emulated=True) | {"protocol_ok": False})}, "protocol_ok"),
        ({VERDICT: json.dumps(verdict(emulated=True)), ATTRIBUTION: "["}, "attribution.json"),
    ],
)
def test_a_measurement_without_its_verdict_is_red(
    extra: dict[str, str], said: str, made: Lab, tmp_path: Path
) -> None:
    measured(made, tmp_path)
    made.extra = extra
    with pytest.raises(RedError) as caught:
        made.make()
    assert said in caught.value.message


def test_what_fails_otherwise_keeps_nothing(made: Lab) -> None:
    made.documents["lint"] = "[]"
    with pytest.raises(VirtRtError, match=r"lint.json is no object"):
        made.make()
    assert not made.kept.exists()


def test_every_platform_has_a_report_and_its_release_needs_it() -> None:
    project = Project(ROOT)
    for name, platform in project.recipes.platforms.items():
        action = project.graph[lab_name(name)]
        assert action.place == f"{name}/lab"
        assert ("stack.json" in action.inputs) == platform.stack_proof
        needed = project.graph[f"release:{name}"].inputs
        for output in (PAGE, RECORD, JUNIT):
            assert needed[f"proof/lab/{output}"] == Upstream(action.name, output)
        assert lab_name(name) in project.products(name)
