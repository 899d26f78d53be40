"""`doit run`, `doit ssh` and `doit gdb`: typed into a stand-in project whose qemu runs no guest, and once for real."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import emulator, guestrecord, symbolfile
from pipeline.architecture import ARCHITECTURES
from pipeline.errors import UserError
from pipeline.files import digest_file
from pipeline.guestmachine import SHARE_SYMBOLS
from pipeline.plan import State
from pipeline.project import Project
from pipeline.tasks import guest_needs
from tests import standin
from tests.launching import heed_signals, is_running, until
from tests.standin import Standin
from tests.tiny import tiny_rootfs

ROOT = Path(__file__).resolve().parent.parent
GUEST = "rt-guest"
SYSTEM_MAP = """\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _text
ffffffff81000000 T startup_64
ffffffff81000100 T _stext
ffffffff81000200 T schedule
ffffffff81000280 t helper
ffffffff81001000 T _etext
ffffffff81002000 D jiffies
ffffffff81003000 B _end
"""
#: A package with the emulator in its place, and something that starts it as a loader would.
PACKED = """
mkdir -p /build/work/qemu/lib
if [[ -d /build/in/qemu ]]; then
  cp -r /build/in/qemu/. /build/work/qemu/
  printf '#!/bin/sh\\nexec "$@"\\n' >/build/work/qemu/lib/ld-pretend.so.2
  chmod 755 /build/work/qemu/lib/ld-pretend.so.2
fi
"""


def stand_in(directory: Path) -> Standin:
    """A stand-in project in whose package of qemu lies a program that pretends to be it."""
    (directory / "rootfs").mkdir()
    made = standin.make(directory, tiny_rootfs(directory / "rootfs"))
    steps = made.root / "recipes" / "steps"
    pretend = (ROOT / "tests/pretend_machine.py").read_text()
    (steps / "qemu.sh").write_text(
        "mkdir -p /build/out/{bin,libexec,share}\n"
        f"cat >/build/out/bin/qemu-system-x86_64 <<'PRETEND'\n{pretend}PRETEND\n"
        "printf '#!/bin/sh\\nfor last; do :; done\\necho made >\"$last\"\\n' >/build/out/bin/qemu-img\n"
        "chmod 755 /build/out/bin/*\necho helper >/build/out/libexec/helper\necho bios >/build/out/share/bios\n"
    )
    kernel = (steps / "kernel.sh").read_text()
    assert "echo 0000 >" in kernel
    (steps / "kernel.sh").write_text(kernel.replace("echo 0000 >", f"printf %s '{SYSTEM_MAP}' >"))
    step = (steps / "package.sh").read_text()
    contents = '"contents": [{"src": '
    assert contents in step
    tree = '{"src": "/build/work/qemu", "dst": "/opt/virt-rt/qemu-q35/qemu", "type": "tree"}, {"src": '
    (steps / "package.sh").write_text(PACKED + step.replace(contents, f'"contents": [{tree}'))
    return made


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Standin:
    """One project for all tests, with what a run needs."""
    made = stand_in(tmp_path_factory.mktemp("running"))
    done = made.doit("kernel:qemu-q35:guest", "image:rt-guest", "package:qemu-q35:qemu")
    assert done.status == 0, done
    return made


class Run:
    """A `doit run:rt-guest` on a terminal of its own, or on none."""

    def __init__(self, desk: Desk, *words: str, terminal: bool = True, **variables: str) -> None:
        number = len(desk.runs)
        self.args = desk.directory / f"args-{number}"
        self.near, far = pty.openpty() if terminal else (-1, os.open(os.devnull, os.O_RDWR))
        self.before = termios.tcgetattr(far) if terminal else []
        self.far, self.said = far, ""
        output = desk.directory / f"out-{number}"
        with output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "doit", f"run:{GUEST}", *words],
                cwd=desk.project.root,
                env=desk.environment | {"PRETEND_ARGS": str(self.args)} | variables,
                stdin=far,
                stdout=far if terminal else out,
                stderr=far if terminal else out,
                preexec_fn=heed_signals,
            )
        self.output = None if terminal else output
        desk.runs.append(self)

    def read(self) -> str:
        """All that it has written."""
        if self.output is not None:
            return self.output.read_text()
        while select.select([self.near], [], [], 0)[0]:
            self.said += os.read(self.near, 65536).decode(errors="replace")
        return self.said

    def wait_for(self, text: str, seconds: float = 60) -> Run:
        """Until it has written that."""
        until(lambda: text in self.read() or self.process.poll() is not None, f"{text!r} of {self}", seconds)
        assert text in self.read(), self.read()
        return self

    @property
    def arguments(self) -> list[str]:
        """What qemu was started with."""
        return self.args.read_text().splitlines()[1:]

    @property
    def qemu(self) -> int:
        """qemu's process; 0 when it never ran."""
        return int(self.args.read_text().splitlines()[0]) if self.args.exists() else 0

    def option(self, name: str) -> list[str]:
        """The values of an option of qemu."""
        return [b for a, b in zip(self.arguments, self.arguments[1:], strict=False) if a == name]

    def end(self) -> int:
        """The exit status, once it has ended; qemu has then, too."""
        status = self.process.wait(30)
        self.read()
        assert not is_running(self.qemu)
        return status


class Desk:
    """Someone who types: a project, and a home where nothing is left."""

    def __init__(self, project: Standin, directory: Path) -> None:
        self.project, self.directory, self.runs = project, directory, list[Run]()
        self.environment = project.environment | {
            "XDG_RUNTIME_DIR": str(directory),
            "XDG_STATE_HOME": str(directory / "state"),
        }

    def start(self, *words: str, terminal: bool = True, **variables: str) -> Run:
        """Start the guest."""
        return Run(self, *words, terminal=terminal, **variables)

    def doit(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Another command, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "doit", *words],
            cwd=self.project.root,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def places(self) -> list[Path]:
        """Directories of runs."""
        return list((self.directory / "virt-rt" / "run").glob("[!.]*"))

    def tool(self, name: str, text: str) -> dict[str, str]:
        """An environment in which a program is another."""
        tools = self.directory / "tools"
        tools.mkdir(exist_ok=True)
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
        return {"PATH": f"{tools}:{os.environ['PATH']}"}


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory whose path fits into a socket's."""
    with tempfile.TemporaryDirectory(prefix="run", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def desk(template: Standin, home: Path) -> Iterator[Desk]:
    """Nothing that was started outlives the test."""
    made = Desk(template, home)
    yield made
    for run in made.runs:
        for process in (run.process.pid, run.qemu):
            if process and is_running(process):
                os.kill(process, signal.SIGKILL)
        run.process.wait()
        for descriptor in {run.near, run.far} - {-1}:
            os.close(descriptor)


def error_of(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """The two lines of an error of the user's."""
    assert done.returncode == 2, done
    found = re.search(r"^error: (.*)\n  (.*)$", done.stdout + done.stderr, re.MULTILINE)
    assert found, done
    return found[1], found[2]


# What is run ----------------------------------------------------------------------------------


@pytest.mark.engine
def test_what_is_stale_is_made_and_the_guest_is_booted_from_it(desk: Desk) -> None:
    desk.project.append("kernel-configs/qemu-q35/guest-config", "CONFIG_EXTRA=y\n")
    run = desk.start(terminal=False, PRETEND_ENDS="0")
    assert run.end() == 0
    said = run.read()
    assert said.index("[kernel:qemu-q35:guest] built") < said.index("rt-guest: emulated, without KVM: ")
    built = desk.project.root / "artifacts/qemu-q35"
    assert run.option("-kernel") == [str(built / "kernel/guest/bzImage")]
    assert run.option("-drive") == [
        f"if=none,id=disk,format=qcow2,snapshot=on,file={built}/image/rt-guest/disk.qcow2"
    ]
    (cmdline,) = run.option("-append")
    assert cmdline.startswith("root=PARTLABEL=virt-rt-root rw console=ttyS0 isolcpus=")
    assert cmdline.endswith(" no_timer_check nokaslr")
    assert run.option("-smp") == ["2,sockets=1,cores=2,threads=1"]
    assert run.option("-m") == ["1024M"]
    assert run.option("-accel") == ["tcg,thread=multi"]
    assert "booted" in said
    assert desk.places() == []
    again = desk.start("--append", "quiet loglevel=3", terminal=False, PRETEND_ENDS="0")
    assert again.end() == 0
    assert "everything is current (4 tasks)" in again.read()
    assert again.option("-append") == [f"{cmdline} quiet loglevel=3"]


@pytest.mark.engine
def test_how_qemu_ended_is_told(desk: Desk) -> None:
    run = desk.start(terminal=False, PRETEND_ENDS="3")
    assert run.end() == 1
    assert "error: rt-guest: qemu ended with status 3" in run.read()


@pytest.mark.engine
def test_a_port_is_chosen_or_given_and_told(desk: Desk) -> None:
    chosen = desk.start("--console", str(desk.directory / "log")).wait_for("ssh at port")
    port = re.search(r"ssh at port (\d+) of the loopback: doit ssh:rt-guest", chosen.read())
    assert port
    record = json.loads(next(iter(desk.places())).joinpath("run.json").read_text())
    assert record["ssh_port"] == int(port[1])
    until(lambda: (desk.directory / "log").exists(), "the console")
    with socket.create_connection(("127.0.0.1", int(port[1]))) as connection:
        assert connection.recv(4) == b"SSH-"
    taken = desk.start("--ssh-port", port[1], terminal=False)
    assert taken.end() == 2
    assert re.search(
        r"could not set up host forwarding rule\n(.*\n)*error: rt-guest did not start", taken.read()
    )
    assert len(desk.places()) == 1


@pytest.mark.engine
def test_with_kvm_it_is_not_emulated(desk: Desk) -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is missing, or not ours to open")
    run = desk.start(terminal=False, PRETEND_ENDS="0", PRETEND_KVM="1")
    assert run.end() == 0
    assert "rt-guest: with KVM" in run.read()
    assert (run.option("-accel"), run.option("-cpu")) == (["kvm"], ["host"])
    assert "no_timer_check" not in run.option("-append")[0]


@pytest.mark.engine
def test_the_distribution_s_qemu_stands_in(desk: Desk) -> None:
    text = (ROOT / "tests/pretend_machine.py").read_text().replace('"PRETEND_BROKEN"', '"NEVER"')
    path = desk.tool("qemu-system-x86_64", text) | desk.tool("qemu-img", "#!/bin/sh\n")
    run = desk.start(terminal=False, PRETEND_ENDS="0", PRETEND_BROKEN="1", **path)
    assert run.end() == 0
    assert f"note: {desk.directory}/tools/qemu-system-x86_64 is used, not qemu of qemu-q35" in run.read()
    assert run.option("-cpu") == ["max"]


# How it ends ----------------------------------------------------------------------------------


@pytest.mark.engine
def test_keys_are_the_guest_s_but_ctrl_a_x(desk: Desk) -> None:
    run = desk.start().wait_for("booted")
    assert "end it: Ctrl-A X" in run.read()
    os.write(run.near, b"\x03")
    run.wait_for(repr("\x03"))
    assert is_running(run.qemu)
    os.write(run.near, b"\x01x")
    assert run.end() == 0
    assert termios.tcgetattr(run.far) == run.before
    assert desk.places() == []


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it(desk: Desk, number: signal.Signals) -> None:
    run = desk.start().wait_for("booted")
    run.process.send_signal(number)
    assert run.end() == 130
    assert termios.tcgetattr(run.far) == run.before
    assert desk.places() == []


@pytest.mark.engine
def test_a_qemu_that_does_not_listen_is_killed(desk: Desk) -> None:
    run = desk.start(PRETEND_DEAF="1").wait_for("booted")
    run.process.terminate()
    assert run.end() == 130
    assert termios.tcgetattr(run.far) == run.before


@pytest.mark.engine
def test_kill_9_leaves_no_process_and_the_next_run_tidies_up(desk: Desk) -> None:
    run = desk.start(PRETEND_DEAF="1").wait_for("booted")
    run.process.kill()
    until(lambda: not is_running(run.qemu), "qemu to die with doit")
    assert len(desk.places()) == 1
    assert error_of(desk.doit(f"ssh:{GUEST}"))[0] == "rt-guest does not run from this checkout"
    assert desk.places() == []


@pytest.mark.engine
def test_a_qemu_that_lost_its_doit_before_it_began_does_not_begin(tmp_path: Path) -> None:
    from pipeline.guestrun import _WITH_US

    mark = tmp_path / "mark"
    done = subprocess.run([*_WITH_US, "1", "touch", str(mark)], check=False)
    assert (done.returncode, mark.exists()) == (1, False)
    done = subprocess.run([*_WITH_US, str(os.getpid()), "touch", str(mark)], check=False)
    assert (done.returncode, mark.exists()) == (0, True)


# The disk -------------------------------------------------------------------------------------


@pytest.mark.engine
def test_what_is_kept_lies_over_the_disk_and_the_guest_may_shut_down(desk: Desk) -> None:
    digest = json.loads((desk.project.root / "artifacts/qemu-q35/image/rt-guest/manifest.json").read_text())[
        "outputs"
    ]["disk.qcow2"]
    kept = desk.directory / f"state/virt-rt/qemu-q35/rt-guest/run-{digest[:12]}.qcow2"
    run = desk.start("--keep").wait_for("booted")
    assert kept.read_text() == "made\n"
    built = desk.project.root / "artifacts/qemu-q35/image/rt-guest/disk.qcow2"
    assert run.option("-drive") == [
        f"if=none,id=disk,format=qcow2,file={kept},"
        f"backing.driver=qcow2,backing.file.driver=file,backing.file.filename={built}"
    ]
    other = desk.start("--keep", terminal=False)
    assert other.end() == 2
    assert f"error: {kept} is written by another run of rt-guest" in other.read()
    run.process.terminate()
    assert run.end() == 130
    assert "powered down" in run.read()
    kept.write_text("changed\n")
    assert desk.start("--keep", terminal=False, PRETEND_ENDS="0").end() == 0
    assert kept.read_text() == "changed\n"


# The share ------------------------------------------------------------------------------------


@pytest.mark.engine
def test_a_share_needs_a_kernel_and_a_qemu_that_have_it(desk: Desk, tmp_path: Path) -> None:
    assert error_of(desk.doit(f"run:{GUEST}", "--share", str(tmp_path / "nothing")))[0].endswith(
        "is not a directory"
    )
    fragment = desk.project.root / "kernel-configs/common/guest.config"
    before = fragment.read_text()
    lines = [f"{symbol}=y" for symbol in SHARE_SYMBOLS]
    try:
        fragment.write_text("".join(line for line in before.splitlines(True) if line.strip() not in lines))
        message, remedy = error_of(desk.doit(f"run:{GUEST}", "--share", str(tmp_path)))
        assert message == f"--share: the kernel of rt-guest was built without {', '.join(SHARE_SYMBOLS)}"
        assert remedy == f"add {' '.join(lines)} to kernel-configs/qemu-q35/guest-config"
        fragment.write_text(before)
        without = desk.tool("qemu-system-x86_64", "#!/bin/sh\nexit 1\n") | desk.tool(
            "qemu-img", "#!/bin/sh\n"
        )
        message, _ = error_of(desk.doit(f"run:{GUEST}", "--share", str(tmp_path), **without))
        assert message == "--share: no qemu-system-x86_64 here has virtio-9p-pci"
        shared = tmp_path / "a,b"
        shared.mkdir()
        run = desk.start("--share", str(shared), terminal=False, PRETEND_9P="1").wait_for("booted")
        assert run.option("-fsdev") == [f"local,id=share,security_model=none,path={tmp_path}/a,,b"]
        assert "virtio-9p-pci,fsdev=share,mount_tag=share" in run.option("-device")
        assert credentials(run)["fstab.extra"].startswith("share /share 9p trans=virtio,version=9p2000.L,")
    finally:
        fragment.write_text(before)


def credentials(run: Run) -> dict[str, str]:
    """What the guest's systemd is told."""
    import base64

    found = {}
    for value in run.option("-smbios"):
        text = Path(value.removeprefix("type=11,path=")).read_text()
        name, _, encoded = text.removeprefix("io.systemd.credential.binary:").partition("=")
        found[name] = base64.b64decode(encoded).decode()
    return found


# ssh and gdb ----------------------------------------------------------------------------------


@pytest.mark.engine
def test_ssh_gets_all_words_and_only_this_run_s_keys(desk: Desk) -> None:
    run = desk.start().wait_for("booted")
    told = credentials(run)
    assert re.search(r"^f\+~ /root/.ssh/authorized_keys2 0600 root root - \S+$", told["tmpfiles.extra"], re.M)
    path = desk.tool("ssh", '#!/bin/sh\nfor word; do echo "<$word>"; done\nexit 7\n')
    done = desk.doit(f"ssh:{GUEST}", "env", "A=1", "ls", "-l", "a b", **path)
    config = desk.places()[0] / "ssh_config"
    words = [str(config), "--", "rt-guest", "env", "A=1", "ls", "-l", "a b"]
    assert (done.returncode, done.stdout) == (7, "".join(f"<{word}>\n" for word in ("-F", *words)))
    assert desk.doit(f"ssh:{GUEST}", "--config").stdout == f"{config}\n"
    asked = subprocess.run(
        ["ssh", "-G", "-F", config, GUEST], capture_output=True, text=True, check=True
    ).stdout
    for line in ("user root", "stricthostkeychecking true", f"identityfile {config.parent}/key"):
        assert line in asked.splitlines()
    assert config.parent.stat().st_mode & 0o077 == 0


@pytest.mark.engine
def test_several_run_at_a_time_and_are_told_apart(desk: Desk) -> None:
    desk.start().wait_for("booted")
    desk.start().wait_for("booted")
    path = desk.tool("ssh", '#!/bin/sh\necho "$2"\n')
    message, remedy = error_of(desk.doit(f"ssh:{GUEST}", **path))
    assert message == "rt-guest runs 2 times"
    names = re.findall(r"--run (\w+) \(ssh port \d+\)", remedy)
    assert {desk.directory / "virt-rt/run" / name for name in names} == set(desk.places())
    done = desk.doit(f"ssh:{GUEST}", "--run", names[1], **path)
    assert done.stdout == f"{desk.directory}/virt-rt/run/{names[1]}/ssh_config\n"
    other = error_of(desk.doit("gdb:canoe-guest"))
    assert other == ("canoe-guest does not run from this checkout", "doit run:canoe-guest starts it")


@pytest.mark.engine
def test_gdb_is_given_the_kernel_s_names_and_qemu_s_socket(desk: Desk) -> None:
    run = desk.start("--stopped").wait_for("waits for doit gdb:rt-guest")
    path = desk.tool("gdb", '#!/bin/sh\nfor word; do echo "<$word>"; done\n')
    done = desk.doit(f"gdb:{GUEST}", "--", "-batch", **path)
    (place,) = desk.places()
    words = ["-q", f"{place}/vmlinux", "-ex", f"target remote {place}/gdb", "-batch"]
    assert done.stdout.splitlines() == [f"<{word}>" for word in words]
    (place / "vmlinux").unlink()
    done = desk.doit(f"gdb:{GUEST}", "--", "-batch", **path)
    words[1] = f"{place}/symbols"
    assert done.stdout.splitlines()[1:] == [f"<{word}>" for word in words]
    assert re.match(r"note: 6.12.1-rt-guest-\w+ has no vmlinux: ", done.stdout)
    assert (place / "symbols").read_bytes().startswith(b"\x7fELF")
    assert f"socket,id=gdb,path={place}/gdb,server=on,wait=off" in run.option("-chardev")
    assert run.option("-gdb") == ["chardev:gdb"]
    assert "booted" not in run.read()  # gdb lets it begin


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
def test_gdb_knows_functions_of_a_system_map(tmp_path: Path) -> None:
    (tmp_path / "System.map").write_text(SYSTEM_MAP)
    symbolfile.write(tmp_path / "System.map", "amd64", tmp_path / "symbols")
    asked = ["info symbol 0xffffffff81000210", "info address helper", "info symbol 0xffffffff81002000"]
    done = subprocess.run(
        [
            "gdb",
            "-nx",
            "-q",
            "-batch",
            *(word for each in asked for word in ("-ex", each)),
            tmp_path / "symbols",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "schedule + 16 in section .text",
        'Symbol "helper" is at 0xffffffff81000280 in a file compiled without debugging.',
        "jiffies in section .data",
    ]


def test_what_is_no_system_map_is_refused(tmp_path: Path) -> None:
    for text in ("hello world\n", "0000 T start\n"):
        (tmp_path / "System.map").write_text(text)
        with pytest.raises(UserError, match="is no System.map of a kernel"):
            symbolfile.write(tmp_path / "System.map", "amd64", tmp_path / "symbols")


# What is refused ------------------------------------------------------------------------------


@pytest.mark.engine
def test_what_cannot_be_meant_is_refused(desk: Desk) -> None:
    known = "write one of: run:canoe-guest, run:canoe-single-guest, run:rt-guest, run:rt-guest-arm64"
    assert error_of(desk.doit("run:nobody")) == ("run:nobody names no guest", known)
    assert "stands alone" in error_of(desk.doit("kernel:qemu-q35:guest", f"run:{GUEST}"))[0]
    assert error_of(desk.doit(f"run:{GUEST}", "SHARE=."))[0] == "run:rt-guest takes no SHARE=."
    assert "--nonsense" in error_of(desk.doit(f"run:{GUEST}", "--nonsense"))[0]
    assert error_of(desk.doit(f"run:{GUEST}", "--ssh-port", "70000"))[0] == "--ssh-port 70000 is no port"
    assert error_of(desk.doit("plan", f"ssh:{GUEST}"))[0].startswith("ssh:rt-guest is no step")
    rows = json.loads(desk.doit("plan", "--json", f"run:{GUEST}").stdout)
    assert {row["task"] for row in rows} >= {
        "kernel:qemu-q35:guest",
        "image:rt-guest",
        "package:qemu-q35:qemu",
    }
    assert "--share" in desk.doit(f"run:{GUEST}", "--help").stdout


def test_a_directory_that_others_may_look_into_is_refused(home: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(home)}
    made = guestrecord.above(environ)
    made.chmod(0o755)
    with pytest.raises(UserError, match="is not a directory of yours alone"):
        guestrecord.above(environ)
    made.rmdir()
    made.symlink_to(home)
    with pytest.raises(UserError, match="is not a directory of yours alone"):
        guestrecord.above(environ)
    with pytest.raises(UserError, match="too long for the path of a socket"):
        guestrecord.above({"XDG_RUNTIME_DIR": str(home / ("x" * 80))})


def test_kvm_is_probed_by_running_something(tmp_path: Path) -> None:
    def qemu(status: int) -> emulator.Emulator:
        program = tmp_path / f"qemu-{status}"
        program.write_text(f"#!/bin/sh\nexit {status}\n")
        program.chmod(0o755)
        (of,) = [each for each in ARCHITECTURES.values() if each.machine == os.uname().machine]
        return emulator.Emulator(of, (str(program),), (), "max", tmp_path, distributions=True)

    there = Path(os.devnull)
    assert qemu(33).kvm(there) == ""
    assert qemu(1).kvm(there) == "a first instruction did not run (status 1)"
    assert "is missing, or not yours to open" in qemu(33).kvm(tmp_path / "kvm")


# For real -------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.slow
def test_a_real_guest_is_run_logged_into_debugged_and_killed(home: Path) -> None:
    """The real guest, from the real cache: its kernel, its image and the emulator that was built for it."""
    project = Project(ROOT)
    needs = guest_needs(project, GUEST)
    missing = [name for name, state in project.plan(needs).items() if state is State.BUILD]
    project.store.close()
    if missing:
        pytest.skip(f"{', '.join(missing)} would have to be built: `doit run:{GUEST}` does")
    desk = Desk(Standin(ROOT, Project(ROOT).cache.parent), home)
    desk.environment |= {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(Project(ROOT).config.parent)}
    run = desk.start()
    try:
        run.wait_for("root@rt-guest:", 240)
        disk = ROOT / "artifacts/qemu-q35/image/rt-guest/disk.qcow2"
        digest = digest_file(disk)
        done = desk.doit(f"ssh:{GUEST}", "echo written >/root/it; sync; uname -r; env A=1 printenv A")
        release = (ROOT / "artifacts/qemu-q35/kernel/guest/kernelrelease").read_text()
        assert (done.returncode, done.stdout) == (0, f"{release}1\n"), done
        assert digest_file(disk) == digest
        if shutil.which("gdb"):
            script = ["-nx", "-batch", "-ex", "hbreak schedule", "-ex", "continue", "-ex", "detach"]
            done = desk.doit(f"gdb:{GUEST}", "--", *script)
            assert re.search(r"Breakpoint 1, schedule \(\) at \S+:\d+$", done.stdout, re.MULTILINE), done
        (place,) = desk.places()
        qemu = json.loads((place / "run.json").read_text())["qemu"]
        assert is_running(qemu)
        run.process.kill()
        until(lambda: not is_running(qemu), "qemu to die with doit")
    finally:
        run.process.kill()
        run.process.wait()
        with contextlib.suppress(OSError):
            os.close(run.near)
            os.close(run.far)
