"""irqlat, for real: its module and program, built for the host kernel, in an emulated machine with the device edu."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline import kernel
from pipeline.action import Action, File, Output
from pipeline.drivers import driver_name
from pipeline.engine import Engine
from pipeline.executor import Executor
from pipeline.graph import Graph
from pipeline.inputs import builder_name
from pipeline.project import Project
from tests.conftest import Recorder

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = "qemu-q35"
EDU = "0000:00:02.0"
PARAMETERS = "/sys/module/irqlat_edu/parameters"

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def init() -> Action:
    """The init of the machine."""
    return Action(
        name="init:irqlat",
        kind="initramfs",
        version=1,
        arch="amd64",
        summary="the init of the tests",
        builder=builder_name(kernel.BUILDER),
        script=File(b"gcc -O2 -Wall -static -o /build/out/init /build/in/init.c\n"),
        files={"init.c": File.read(ROOT / "tests" / "irqlat" / "init.c")},
        outputs=(Output("init"),),
    )


def cpio(files: dict[str, tuple[int, bytes]]) -> bytes:
    """An initramfs (format newc): mode and content by path."""
    packed = b""
    for number, (name, (mode, content)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))], 1):
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        packed += head + b"\0" * (-len(head) % 4) + content + b"\0" * (-len(content) % 4)
    return packed


@dataclass(frozen=True)
class Ran:
    """One line of the machine's: its status, and what the console had before that."""

    status: int
    out: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON among it."""
        found: dict[str, Any] = json.loads(self.out[self.out.index("{") : self.out.rindex("}") + 1])
        return found


@dataclass(frozen=True)
class Machine:
    """What an emulated machine of two CPUs is made of."""

    qemu: str
    image: Path
    files: dict[str, tuple[int, bytes]]
    directory: Path

    def run(self, lines: list[str], command_line: str = "", device: str = "edu,addr=2") -> dict[str, Ran]:
        """Boot it, have it run these lines, each once, and say how each ended."""
        initramfs = self.directory / "initramfs"
        initramfs.write_bytes(cpio({**self.files, "runs": (0o100644, "\n".join([*lines, ""]).encode())}))
        arguments = ["-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max", "-smp", "2", "-m", "512"]
        arguments += ["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"]
        arguments += ["-kernel", str(self.image), "-initrd", str(initramfs)]
        arguments += ["-device", device] if device else []
        words = f"console=ttyS0 quiet panic=-1 isolcpus=managed_irq,domain,1 irqaffinity=0 {command_line}"
        done = subprocess.run(
            [self.qemu, *arguments, "-append", words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=240, check=True,
        )  # fmt: skip
        console = done.stdout.replace("\r", "")
        assert "run: end" in console, console[-2000:]
        parts = re.split(r"^run: (?:(-?\d+) (.*)|end)$", console, flags=re.MULTILINE)
        found = {
            line: Ran(int(status), out)
            for out, status, line in zip(parts[0::3], parts[1::3], parts[2::3], strict=False)
            if line
        }
        assert sorted(found) == sorted(lines), console[-2000:]
        return found


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is not installed: `make test` installs it")
    project = Project(ROOT, {})
    name, image = driver_name(PLATFORM, "irqlat-host"), kernel.kernel_name(PLATFORM, "host")
    for needed in (image, builder_name(kernel.BUILDER)):
        if project.store.lookup(project.graph.keys[needed]) is None:
            pytest.skip(f"{needed} is not in the store: `doit {image}` builds it")
    directory = tmp_path_factory.mktemp("machine")
    needed_by = project.graph.closure([name, builder_name(kernel.BUILDER)])
    graph = Graph([*(project.graph[each] for each in needed_by), init()])
    executor = Executor(graph, project.store, Engine(), Recorder(), directory / "log")

    def path(action: str, output: str) -> Path:
        return project.store.path(executor.result(action).outputs[output][0].digest)

    files = {each: (0o40755, b"") for each in ("dev", "proc", "sys")}
    files["init"] = (0o100755, path("init:irqlat", "init").read_bytes())
    with tarfile.open(path(name, "root")) as tar:
        for member in tar.getmembers():
            for wanted, place in (("updates/irqlat_edu.ko", "irqlat_edu.ko"), ("irqlat/irqlat", "irqlat")):
                if member.name.endswith(wanted) and member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None
                    files[place] = (0o100755, content.read())
    assert {"irqlat_edu.ko", "irqlat"} <= set(files)
    yield Machine(qemu, path(image, "bzImage"), files, directory)
    project.store.close()


def check(document: dict[str, Any], samples: int) -> None:
    """What holds of every result."""
    assert (document["schema"], document["tool"], document["device"]) == (1, "irqlat", EDU)
    assert (document["cpu"], document["irq_cpu"], document["policy"]) == (1, 1, "fifo")
    assert (document["requested"], document["samples"], document["lost"]) == (samples, samples, 0)
    for part in ("handler", "thread"):
        told = document[part]
        counted = {int(us): count for us, count in told["histogram"].items()}
        assert sum(counted.values()) + told["overflows"] == samples
        assert min(counted) == told["min"] <= told["avg"] <= told["max"]
        assert max(counted) < document["histogram_us"]
        if not told["overflows"]:
            assert max(counted) == told["max"]
            mean = sum(us * count for us, count in counted.items()) / samples
            assert told["avg"] == pytest.approx(mean, abs=0.001)
        assert max(each[part] for each in document["max_over_time"]) == told["max"]
    assert document["handler"]["min"] <= document["thread"]["min"]
    assert document["handler"]["avg"] < document["thread"]["avg"]
    times = [each["at_s"] for each in document["max_over_time"]]
    assert times == sorted(set(times)) and times[0] >= 0.1


def test_interrupts_are_measured_to_the_handler_and_to_the_thread(machine: Machine) -> None:
    measure = "/irqlat --cpu 1 --samples 300 --priority 60 --json -"
    spun = "/irqlat --cpu=1 --trigger-cpu=0 --samples=20 --interval=2000 --histogram=500000 --json=-"
    lasting = "/irqlat -c 1 -D 1 -i 5000 --self --json -"
    losing = "/irqlat -c 1 -n 3 -i 1000000"
    lines = [
        "/irqlat --cpu 1",
        "insmod /irqlat_edu.ko",
        measure,
        lasting,
        f"write {PARAMETERS}/spin_us 1000001",
        f"write {PARAMETERS}/spin_us 20000",
        spun,
        f"write {PARAMETERS}/spin_us 0",
        f"write {PARAMETERS}/timeout_ms 50",
        losing,
        f"write {PARAMETERS}/timeout_ms 2000",
        "/irqlat --cpu 7",
        f"/irqlat --cpu 1 --device {EDU} --samples 2",
        "/irqlat --cpu 1 --device /dev/irqlat1",
        "/irqlat --cpu 1 --json /nowhere/x --samples 1",
        "user /irqlat --cpu 1",
        "later /irqlat --cpu 1 --samples 1000000",
        "wait 1000",
        "/irqlat --cpu 1 --samples 1",
        f"write /sys/bus/pci/drivers/irqlat_edu/unbind {EDU}",
        "/irqlat --cpu 1 --samples 4",
    ]
    ran = machine.run(lines)
    assert ran["/irqlat --cpu 1"].status == 2
    assert f"irqlat: the device {EDU} has no driver: modprobe irqlat_edu\n" in ran["/irqlat --cpu 1"].out

    assert ran[measure].status == 0
    check(ran[measure].document, 300)
    assert (ran[measure].document["priority"], ran[measure].document["interval_us"]) == (60, 1000)
    assert ran[measure].document["timer_ns"] == 1
    lasted = ran[lasting].document
    assert ran[lasting].status == 0
    check(lasted, lasted["samples"])
    assert 10 < lasted["samples"] <= 200

    # the driver gives up before they are raised: none is counted as measured
    assert ran[losing].status == 1
    assert "irqlat: 3 of 3 interrupts were lost\n" in ran[losing].out
    # the handler keeps its CPU after it has taken the time: only the thread is late
    assert ran[f"write {PARAMETERS}/spin_us 1000001"].status == 1
    check(ran[spun].document, 20)
    assert ran[spun].document["thread"]["min"] >= 20000 > ran[spun].document["handler"]["min"]

    for line, message in {
        "/irqlat --cpu 7": "cannot be sent to CPU 7: ",
        "/irqlat --cpu 1 --device /dev/irqlat1": "no device /dev/irqlat1 is driven by a driver for irqlat",
        "/irqlat --cpu 1 --json /nowhere/x --samples 1": "/nowhere/x.part cannot be written: No such file",
        "user /irqlat --cpu 1": "/dev/irqlat0 cannot be opened: Permission denied",
        "/irqlat --cpu 1 --samples 1": "Device or resource busy; another irqlat measures with it",
        "/irqlat --cpu 1 --samples 4": f"the device {EDU} has no driver: modprobe irqlat_edu",
    }.items():
        told = [text for text in ran[line].out.splitlines() if text.startswith("irqlat: ")]
        assert (ran[line].status, len(told)) == (2, 1), (line, ran[line])
        assert message in told[0]
    assert ran[f"/irqlat --cpu 1 --device {EDU} --samples 2"].status == 0
    # the device is taken from the program that has it, which says so and ends
    taken = ran[f"write /sys/bus/pci/drivers/irqlat_edu/unbind {EDU}"]
    assert taken.status == 0
    assert (
        f"{EDU} cannot be raised: No such device" in taken.out
        or "cannot be read: No such device" in taken.out
    )


def test_without_high_resolution_timers_it_measures_as_exactly(machine: Machine) -> None:
    measure = "/irqlat --cpu 1 --samples 100 --json -"
    ran = machine.run(["insmod /irqlat_edu.ko", measure], "highres=off")
    assert ran[measure].status == 0
    check(ran[measure].document, 100)
    assert ran[measure].document["timer_ns"] >= 1_000_000
    # microseconds, although timers have ticks
    assert len({us for us in ran[measure].document["handler"]["histogram"] if int(us) % 1000}) > 3


def test_a_machine_without_the_device_says_so(machine: Machine) -> None:
    ran = machine.run(
        ["insmod /irqlat_edu.ko", "/irqlat --cpu 1", "/irqlat", "/irqlat -c 1 -n 1 -D 1"], device=""
    )
    assert ran["/irqlat --cpu 1"].status == 2
    assert "irqlat: there is no device: " in ran["/irqlat --cpu 1"].out
    assert "no edu (1234:11e8) is on the PCI bus" in ran["/irqlat --cpu 1"].out
    assert (ran["/irqlat"].status, "no CPU is named" in ran["/irqlat"].out) == (2, True)
    assert "--samples and --duration: name one of them" in ran["/irqlat -c 1 -n 1 -D 1"].out
