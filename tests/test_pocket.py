"""A real PREEMPT_RT kernel of a pocket configuration: built from the locked source, booted under emulation.

Source, builder and kernel come from the user's own store when they are there, and are kept in it
when they had to be made.
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import kernel
from pipeline.action import Action, File, Output, Upstream
from pipeline.engine import Engine
from pipeline.executor import Executor, StepFailed
from pipeline.graph import Graph
from pipeline.inputs import TREE, builder_name, source_name
from pipeline.project import Project
from tests.conftest import Recorder

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "tests" / "pocket"
#: Objects that a pocket kernel may have; more would make the tests slow.
MOST_OBJECTS = 1000

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def pocket_kernel(name: str = "kernel:pocket", extra: str = "", local: bool = False) -> Action:
    """The kernel action of the pocket configuration, with more lines if wanted."""
    config = (POCKET / "pocket-config").read_text() + extra
    contract = File.read(POCKET / "contract.toml", "tests/pocket/contract.toml")
    return kernel.compile_kernel(
        ROOT,
        action=name,
        summary="the kernel of the tests",
        arch="amd64",
        source="linux-rt",
        files={
            "kernel-configs/pocket-config": File(config.encode(), origin="tests/pocket/pocket-config"),
            "kernel-configs/contract.toml": contract,
            "contract.py": File.read(ROOT / "pipeline" / "contract.py"),
            "kconfig-why.c": File.read(ROOT / "recipes" / "steps" / "kconfig-why.c"),
        },
        environment={
            "ARCH": "x86_64",
            "ROLE": "guest",
            "FRAGMENTS": "pocket-config",
            "CONTRACT": "contract.toml",
            "KERNEL_TARGETS": "bzImage",
        },
        modules=False,
        place=None,
        local=local,
    )


def initramfs() -> Action:
    """The init of the pocket machine, built with the kernel's own nolibc."""
    return Action(
        name="initramfs:pocket",
        kind="initramfs",
        version=1,
        arch="amd64",
        summary="the initramfs of the tests",
        builder=builder_name(kernel.BUILDER),
        script=File.read(POCKET / "initramfs.sh"),
        files={"init.c": File.read(POCKET / "init.c")},
        inputs={"source": Upstream(source_name("linux-rt"), TREE, unpack=True)},
        outputs=(Output("initramfs.cpio"),),
    )


@pytest.fixture(scope="module")
def project() -> Iterator[Project]:
    """The real project, with its real cache."""
    project = Project(ROOT)
    yield project
    project.store.close()


@pytest.fixture(scope="module")
def executor(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Executor:
    actions = [
        pocket_kernel(),
        pocket_kernel("kernel:refused", "CONFIG_KVM_INTEL=y\nCONFIG_MODULES=y\n"),
        initramfs(),
    ]
    needed = project.graph.closure([source_name("linux-rt"), builder_name(kernel.BUILDER)])
    graph = Graph([*(project.graph[name] for name in needed), *actions])
    executor = Executor(graph, project.store, Engine(), Recorder(), tmp_path_factory.mktemp("log"))
    executor.clean_up_after_crashes()
    return executor


def path_of(executor: Executor, name: str, output: str) -> Path:
    """The blob of an output."""
    return executor.store.path(executor.result(name).outputs[output][0].digest)


def test_the_kernel_has_the_configuration_that_was_asked_for(executor: Executor) -> None:
    config = path_of(executor, "kernel:pocket", "config").read_text()
    assert "CONFIG_PREEMPT_RT=y" in config
    release = path_of(executor, "kernel:pocket", "kernelrelease").read_text().strip()
    key = executor.graph.keys["kernel:pocket"]
    assert re.fullmatch(rf"\d+\.\d+\.\d+.*-rt-virt-pocket-{key[:12]}", release)
    log = executor.result("kernel:pocket").log
    assert log is not None
    lines = executor.store.path(log.digest).read_text().splitlines()
    objects = [line for line in lines if re.match(r"\s+(CC|AS)\s", line)]
    assert 300 < len(objects) < MOST_OBJECTS


def test_the_same_inputs_give_the_same_bytes(executor: Executor) -> None:
    first = {output: blob for output, (blob, _) in executor.result("kernel:pocket").outputs.items()}
    assert executor.repeat("kernel:pocket") == first


def test_the_kernel_boots_and_is_real_time(executor: Executor, tmp_path: Path) -> None:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is not installed: `make test` installs it")
    arguments = ["-accel", "tcg", "-machine", "q35", "-cpu", "max", "-smp", "2", "-m", "256", "-nodefaults"]
    arguments += ["-display", "none", "-no-reboot", "-serial", "stdio"]
    arguments += ["-kernel", str(path_of(executor, "kernel:pocket", "bzImage"))]
    arguments += ["-initrd", str(path_of(executor, "initramfs:pocket", "initramfs.cpio"))]
    done = subprocess.run(
        [qemu, *arguments, "-append", "console=ttyS0 panic=-1"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=240, check=True,
    )  # fmt: skip
    said: dict[str, str] = {}
    for line in done.stdout.replace("\r", "").splitlines():
        found = re.search(r"pocket: (\w+) ?(.*)$", line)
        if found:
            said[found[1]] = said.get(found[1], "") + found[2]
    assert "done" in said, done.stdout[-2000:]
    assert "PREEMPT_RT" in said["version"]
    assert said["release"] == path_of(executor, "kernel:pocket", "kernelrelease").read_text().strip()
    config = gzip.decompress(bytes.fromhex(said["config"])).decode()
    assert config == path_of(executor, "kernel:pocket", "config").read_text()


def test_what_cannot_be_had_and_what_is_forbidden_stop_the_build_and_say_why(executor: Executor) -> None:
    with pytest.raises(StepFailed) as caught:
        executor.result("kernel:refused")
    assert caught.value.exit_status == 2
    said = "\n".join(caught.value.tail)
    assert "CONFIG_KVM_INTEL: wanted y, got n" in said
    assert re.search(r"kconfig: depends on VIRTUALIZATION \[=n\]", said), said
    assert "pocket-config" in said
    assert re.search(r"CONFIG_MODULES: wanted n, got y\n.*everything is built in", said), said
