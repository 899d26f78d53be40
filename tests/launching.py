"""What tests of the launch scripts share: a platform's artifacts, a machine, and ways to start a script."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.launch import SCRIPTS, machine_of, render
from tests.pretend_sysfs import PretendSysfs

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
TEMPLATES = {path.name: path.read_text() for path in (ROOT / "recipes" / "templates").glob("kvmqemu*.j2")}
VARIABLES: dict[str, Any] = {
    "guest": "rt-guest",
    "platform": "qemu-q35",
    "vcpus": 2,
    "memory_mib": 1024,
    "hugepages": "2M",
    "node": 0,
    "pins": [0, 1],
    "realtime": "1",
    "priority": 1,
    "emulator": "0",
    "housekeeping": "0",
    "networks": [{"kind": "user", "first": True, "ssh_port": 2222, "mac": ""}],
    "disks": [],
    "devices": [],
    "vf_counts": [],
    "ssh_port": 2222,
    "cmdline": "root=PARTLABEL=x rw console=ttyS0 isolcpus=domain,managed_irq,1",
    **machine_of("amd64"),
}
TAP = {"kind": "tap", "name": "tap0", "bridge": "br0", "vhost": "on", "mac": "52:54:00:11:22:33"}
DISK = {"path": "/dev/vg0/it's data", "format": "raw", "readonly": False}
#: A guest with everything that a recipe can ask for.
FULL: dict[str, Any] = VARIABLES | {
    "networks": [*VARIABLES["networks"], TAP],
    "disks": [DISK, {"path": "/srv/tools.qcow2", "format": "qcow2", "readonly": True}],
    "devices": ["0000:03:00.0", "0000:01:00.0/1,mac=52:54:00:aa:bb:cc,vlan=7"],
    "vf_counts": ["0000:01:00.0=2"],
}
#: What the scripts look for, below the platform's directory.
FILES = {
    "qemu/bin/qemu-system-x86_64": (ROOT / "tests/pretend_qemu.py").read_text(),
    "qemu/bin/qemu-img": '#!/bin/sh\nfor last; do :; done\n: >"$last"\n',
    "qemu/share/qemu/OVMF_CODE_4M.fd": "code",
    "qemu/share/qemu/OVMF_VARS_4M.fd": "variables",
    "kernel/guest/bzImage": "kernel",
    "image/rt-guest/disk.qcow2": "disk",
}


def write_scripts(platform: Path, variables: dict[str, Any]) -> None:
    """Both launch scripts where they belong below a platform's artifacts."""
    for script in SCRIPTS:
        path = platform / "launch" / "rt-guest" / script
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(script, variables, TEMPLATES))
        path.chmod(0o755)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A platform's artifacts, with a qemu that runs no guest: see `pretend_qemu.py`."""
    platform = tmp_path / "artifacts" / "qemu-q35"
    for name, text in FILES.items():
        path = platform / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if "/bin/" in name else 0o444)
    write_scripts(platform, VARIABLES)
    return platform


@pytest.fixture
def host(tmp_path: Path) -> Iterator[PretendSysfs]:
    """A machine with all that a guest may want, as far as sysfs tells."""
    with PretendSysfs(tmp_path / "host", isolated="1") as machine:
        yield machine


def environment(built: Path, **variables: str) -> dict[str, str]:
    """A home of its own, a qemu that ends as soon as the guest runs, and nothing else."""
    top = built.parent.parent
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(top / "home"),
        "RUN_DIR": str(top / "run"),
        "QMP": "/tmp/qmp.sock",  # noqa: S108 - only a name; pytest's own are too long
        "PRETEND_STATUS": "0",
    } | variables


def launch(built: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    command: list[str | Path] = [built / "launch" / "rt-guest" / script, *arguments]
    return subprocess.run(
        command,
        env=environment(built, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def qemu_arguments(built: Path) -> list[str]:
    """What qemu was started with."""
    return (built / "qemu/bin/qemu-system-x86_64.args").read_text().splitlines()


def tree(directory: Path) -> dict[str, int]:
    """Every path below, with its time of change."""
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*")}


#: As with working KVM and no rights beyond a normal user's.
KVM = {"PRETEND_KVM": "1", "KVM_DEVICE": "/dev/null", "PRIORITY": "0", "MEM_LOCK": "off"}
#: Emulated, and without a word about what is left out for that.
EMULATED = {"EMULATE": "1", "HUGEPAGES": "none"}

may_be_realtime = (
    subprocess.run(["chrt", "-f", "1", "true"], check=False, capture_output=True).returncode == 0
)


def until(condition: Callable[[], object], what: str, seconds: float = 20) -> None:
    """Wait for a condition, and fail with what was waited for."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s: {what}"
        time.sleep(0.02)


def is_running(process: int) -> bool:
    """Whether a process runs; one that nobody waits for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def heed_signals() -> None:
    """Undo what nohup and background jobs pass on: a shell cannot trap a signal that it was told to ignore."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def is_free(lock: Path) -> bool:
    """Whether nobody holds a lock: a killed qemu does until the last of its threads is gone."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class Run:
    """A script that runs until it is told to end."""

    def __init__(self, built: Path, script: str = "kvmqemu.sh", **variables: str) -> None:
        self.run_dir = Path(environment(built, **variables)["RUN_DIR"])
        self.threads = built / "qemu/bin/qemu-system-x86_64.threads"
        self.threads.unlink(missing_ok=True)
        self.messages = built / "messages"
        asked = environment(built, **variables)
        del asked["PRETEND_STATUS"]
        with self.messages.open("wb") as messages:
            self.process = subprocess.Popen(
                [built / "launch" / "rt-guest" / script],
                env=asked,
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                preexec_fn=heed_signals,
            )
        until(lambda: self.threads.exists() or self.process.poll() is not None, "the guest to be released")
        self.qemu = int((self.run_dir / "holder").read_text().split()[-1]) if self.threads.exists() else 0

    def end(self, number: signal.Signals) -> int:
        """Send the script a signal, and wait for its end."""
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def started(built: Path) -> Iterator[Callable[..., Run]]:
    """Start scripts; nothing that they started outlives the test."""
    runs: list[Run] = []

    def start(script: str = "kvmqemu.sh", **variables: str) -> Run:
        runs.append(Run(built, script, **variables))
        assert runs[-1].threads.exists(), runs[-1].messages.read_text()
        return runs[-1]

    yield start
    for run in runs:
        for process in (run.process.pid, run.qemu):
            if process and is_running(process):
                os.kill(process, signal.SIGKILL)
        run.process.wait()
