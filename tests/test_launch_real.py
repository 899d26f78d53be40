"""Launch scripts with a real qemu, emulated, that runs a few bytes in place of the firmware."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launching import (
    built,
    environment,
    is_running,
    launch,
    until,
)

__all__ = ["built"]

# With a real qemu ----------------------------------------------------------------------------------

QEMU = shutil.which("qemu-system-x86_64")
needs_qemu = pytest.mark.skipif(
    not QEMU or not shutil.which("qemu-img"), reason="needs qemu-system-x86_64, qemu-img"
)


def rom(program: bytes) -> bytes:
    """A firmware of 64 KiB: `program`, at most 16 bytes, at the reset vector."""
    return bytes(0xFFF0) + program.ljust(16, b"\xf4")


#: cli; hlt; and again.
SLEEP = rom(b"\xfa\xf4\xeb\xfd")
#: mov al,16; out 0xf4,al: the exit device then ends qemu with 16 * 2 + 1.
LEAVE = rom(b"\xb0\x10\xe6\xf4\xf4")


def real_variables(built: Path, program: bytes) -> dict[str, str]:
    """A real qemu that runs a few bytes in place of the firmware."""
    code, variables = built / "code.fd", built / "variables.fd"
    code.write_bytes(program)
    variables.write_bytes(bytes(4096))
    disk = built / "image/rt-guest/disk.qcow2"
    if disk.read_bytes() == b"disk":
        disk.unlink()
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "1M"], check=True)
    return {
        "EMULATE": "1",
        "QEMU": str(QEMU),
        "QEMU_IMG": str(shutil.which("qemu-img")),
        "OVMF_CODE": str(code),
        "OVMF_VARS": str(variables),
        "MEMORY_MIB": "64",
        "MEM_LOCK": "off",
        "CONSOLE": str(built / "console"),
        "QMP": str(built.parent.parent / "q"),
    }


@needs_qemu
def test_real_qemu_ends_by_itself(built: Path) -> None:
    done = launch(
        built,
        "kvmqemu-rfs.sh",
        "--",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=1",
        **real_variables(built, LEAVE),
    )
    assert done.returncode == 33, done.stderr


@needs_qemu
def test_real_qemu_refuses_an_argument(built: Path) -> None:
    done = launch(built, "kvmqemu-rfs.sh", "--", "-device", "nonsense", **real_variables(built, LEAVE))
    assert done.returncode == 1
    assert "'nonsense' is not a valid device model name" in done.stderr


@needs_qemu
@pytest.mark.skipif(os.cpu_count() == 1, reason="one CPU: nowhere else to pin to")
def test_real_qemu_is_placed_and_ended(built: Path, tmp_path: Path) -> None:
    """Its threads are where they belong; the sleeping guest ignores the power button, so qemu is told to end."""
    asked = environment(built, **real_variables(built, SLEEP), SHUTDOWN_SECONDS="1")
    holder, socket = Path(asked["RUN_DIR"]) / "holder", Path(asked["QMP"])
    with subprocess.Popen(
        [built / "launch/rt-guest/kvmqemu-rfs.sh"],
        env=asked,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as script:
        try:
            until(lambda: status_of(socket) == "running" or script.poll() is not None, "the guest to run")
            assert script.poll() is None, script.stderr and script.stderr.read()
            qemu = int(holder.read_text().split()[-1])
            cpus = {
                (task / "comm").read_text().strip(): os.sched_getaffinity(int(task.name))
                for task in Path(f"/proc/{qemu}/task").iterdir()
            }
            assert cpus.pop("CPU 0/TCG") == {0}
            assert cpus.pop("CPU 1/TCG") == {1}
            assert cpus.pop("IO iothread0") == {0}
            assert set(map(tuple, cpus.values())) == {(0,)}
            script.send_signal(signal.SIGTERM)
            assert script.wait(30) == 0
            assert not is_running(qemu)
        finally:
            if script.poll() is None:
                script.terminate()


def status_of(path: Path) -> str:
    """What qemu says of itself over the user's control socket; nothing while it is not there."""
    import socket

    with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(path))
        with client.makefile("rw") as stream:
            stream.readline()
            for command in ("qmp_capabilities", "query-status"):
                stream.write(json.dumps({"execute": command}) + "\n")
                stream.flush()
                answer = json.loads(stream.readline())
            return str(answer["return"]["status"])
    return ""


@needs_qemu
def test_the_terminal_is_qemu_s_and_given_back(built: Path) -> None:
    """Ctrl-A X reaches qemu, which is in the background of the script; afterwards the terminal is as before."""
    import termios

    near, far = pty.openpty()
    before = termios.tcgetattr(far)
    asked = environment(built, **real_variables(built, SLEEP)) | {"CONSOLE": "stdio"}
    script = subprocess.Popen(
        [built / "launch/rt-guest/kvmqemu-rfs.sh"],
        env=asked,
        stdin=far,
        stdout=far,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: status_of(Path(asked["QMP"])) == "running", "the guest to run")
        assert termios.tcgetattr(far) != before
        os.write(near, b"\x01x")
        assert script.wait(20) == 0
        assert termios.tcgetattr(far) == before
    finally:
        script.terminate()
        script.wait()
        os.close(near)
        os.close(far)
