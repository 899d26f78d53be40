"""The launch scripts as a person meets them: what they print, what they refuse, what they leave alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.launch import SCRIPTS, Value, render

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
TEMPLATES = {path.name: path.read_text() for path in (ROOT / "recipes" / "templates").glob("*.j2")}
VARIABLES: dict[str, Value] = {
    "guest": "rt-guest",
    "platform": "qemu-q35",
    "vcpus": 4,
    "memory_mib": 1024,
    "ssh_port": 2222,
    "cmdline": "root=PARTLABEL=x rw console=ttyS0 isolcpus=domain,managed_irq,1-3",
}
#: What the scripts look for, below the platform's directory.
FILES = {
    "qemu/bin/qemu-system-x86_64": '#!/bin/sh\nprintf \'%s\\n\' "$@" >"$0.args"\n',
    "qemu/bin/qemu-img": '#!/bin/sh\nfor last; do :; done\n: >"$last"\n',
    "qemu/share/qemu/OVMF_CODE_4M.fd": "code",
    "qemu/share/qemu/OVMF_VARS_4M.fd": "variables",
    "kernel/guest/bzImage": "kernel",
    "image/rt-guest/disk.qcow2": "disk",
}


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A platform's artifacts, with a qemu that only writes down its arguments."""
    platform = tmp_path / "artifacts" / "qemu-q35"
    for name, text in FILES.items():
        path = platform / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if "/bin/" in name else 0o444)
    for script in SCRIPTS:
        path = platform / "launch" / "rt-guest" / script
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(script, VARIABLES, TEMPLATES))
        path.chmod(0o755)
    return platform


def launch(built: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script with a home of its own and nothing else in its environment."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(built.parent.parent / "home")}
    environment |= {"QMP": "/tmp/qmp.sock"} | variables  # noqa: S108 - only a name; pytest's own are too long
    command: list[str | Path] = [built / "launch" / "rt-guest" / script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


def tree(directory: Path) -> dict[str, int]:
    """Every path below, with its time of change."""
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("mode", ["kvm", "emulated"])
def test_dry_run_prints_the_commands_and_touches_nothing(built: Path, script: str, mode: str) -> None:
    """To accept a change of the templates on purpose: VIRT_RT_ACCEPT=1 pytest tests/test_launch.py."""
    top = built.parent.parent
    before = tree(top)
    done = launch(
        built,
        script,
        "--dry-run",
        "--",
        "-device",
        "it's,odd",
        EMULATE="1" if mode == "emulated" else "0",
        CMDLINE_EXTRA="quiet loglevel=3,4",
        KVM_DEVICE="/nowhere/kvm",
    )
    assert done.returncode == 0, done.stderr
    assert tree(top) == before
    text = done.stdout.replace(str(top), "/top")
    golden = GOLDEN / f"{script}.{mode}"
    if os.environ.get("VIRT_RT_ACCEPT"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_dry_run_prints_is_what_runs(built: Path, script: str) -> None:
    printed = launch(built, script, "--dry-run", "--", "-S", "it's $odd", EMULATE="1").stdout
    subprocess.run(["bash", "-e"], input=printed, text=True, check=True)
    log = built / "qemu/bin/qemu-system-x86_64.args"
    pasted = log.read_text()
    shutil.rmtree(built.parent.parent / "home")
    assert launch(built, script, "--", "-S", "it's $odd", EMULATE="1").returncode == 0
    assert log.read_text() == pasted


@pytest.mark.parametrize("script", SCRIPTS)
def test_generated_text_is_clean(built: Path, script: str) -> None:
    for linter in (["shellcheck"], ["shfmt", "-i", "2", "-ci", "-d"]):
        if shutil.which(linter[0]) is None:
            pytest.skip(f"{linter[0]} is not installed")
        done = subprocess.run(
            [*linter, built / "launch" / "rt-guest" / script], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_variable(built: Path, script: str) -> None:
    done = launch(built, script, "--help")
    assert done.returncode == 0
    assert "usage: " + script in done.stdout
    for name in (
        "QEMU",
        "DISK",
        "CMDLINE_EXTRA",
        "MEMORY_MIB",
        "VCPUS",
        "NET",
        "SSH_PORT",
        "CONSOLE",
        "EMULATE",
    ):
        assert f"\n{name}=${{{name}" in done.stdout


def test_refuses_a_machine_without_kvm(built: Path) -> None:
    done = launch(built, "kvmqemu.sh", KVM_DEVICE="/nowhere/kvm")
    assert done.returncode == 2
    assert "KVM is not usable: /nowhere/kvm is missing" in done.stderr
    assert "EMULATE=1" in done.stderr.splitlines()[1]


def test_refuses_kvm_that_runs_nothing(built: Path) -> None:
    """The device is there, but what qemu runs on it does not get to its first instruction."""
    device = built / "kvm"
    device.touch(0o600)
    done = launch(built, "kvmqemu.sh", KVM_DEVICE=str(device))
    assert done.returncode == 2
    assert "a first instruction did not run (status 0)" in done.stderr


@pytest.mark.parametrize(
    ("script", "missing", "variable", "task"),
    [
        ("kvmqemu.sh", "qemu/bin/qemu-system-x86_64", "QEMU", "qemu:qemu-q35"),
        ("kvmqemu.sh", "qemu/bin/qemu-img", "QEMU_IMG", "qemu:qemu-q35"),
        ("kvmqemu.sh", "kernel/guest/bzImage", "KERNEL", "kernel:qemu-q35:guest"),
        ("kvmqemu-rfs.sh", "image/rt-guest/disk.qcow2", "DISK", "image:rt-guest"),
        ("kvmqemu-rfs.sh", "qemu/share/qemu/OVMF_CODE_4M.fd", "OVMF_CODE", "qemu:qemu-q35"),
        ("kvmqemu-rfs.sh", "qemu/share/qemu/OVMF_VARS_4M.fd", "OVMF_VARS", "qemu:qemu-q35"),
    ],
)
def test_names_a_missing_file_and_who_makes_it(
    built: Path, script: str, missing: str, variable: str, task: str
) -> None:
    (built / missing).unlink()
    done = launch(built, script, EMULATE="1")
    assert done.returncode == 2
    assert f"{variable}: no readable file {built}/{missing}" in done.stderr
    assert f"'doit {task}'" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VCPUS", "0"),
        ("VCPUS", "08"),
        ("VCPUS", "two"),
        ("MEMORY_MIB", "1G"),
        ("SSH_PORT", "65536"),
        ("EMULATE", "yes"),
        ("SNAPSHOT", "2"),
        ("MEM_LOCK", "1"),
        ("NET", "bridge"),
        ("QMP", "/" + "x" * 107),
    ],
)
def test_refuses_values_that_mean_nothing(built: Path, variable: str, value: str) -> None:
    done = launch(built, "kvmqemu.sh", **{"EMULATE": "1", variable: value})
    assert done.returncode == 2
    assert f"{variable}: " in done.stderr
    assert not (built / "qemu/bin/qemu-system-x86_64.args").exists()


def test_refuses_unknown_options(built: Path) -> None:
    done = launch(built, "kvmqemu.sh", "--fast")
    assert done.returncode == 2
    assert "unknown option --fast" in done.stderr


def test_the_built_disk_is_never_written(built: Path) -> None:
    """Changes go to an overlay that outlives the run; another image gets another one."""
    home = built.parent.parent / "home"

    def overlays() -> set[Path]:
        return set(home.rglob("disk-*.qcow2"))

    disk = built / "image/rt-guest/disk.qcow2"
    assert launch(built, "kvmqemu-rfs.sh", EMULATE="1").returncode == 0
    (first,) = overlays()
    first.write_text("changes")
    assert launch(built, "kvmqemu-rfs.sh", EMULATE="1").returncode == 0
    assert first.read_text() == "changes"
    assert str(first) in (built / "qemu/bin/qemu-system-x86_64.args").read_text()
    disk.chmod(0o644)
    disk.write_text("rebuilt")
    assert launch(built, "kvmqemu-rfs.sh", EMULATE="1").returncode == 0
    assert len(overlays()) == 2
    assert (built / "qemu/share/qemu/OVMF_VARS_4M.fd").read_text() == "variables"
    assert list(home.rglob("*.new")) == []


def test_snapshot_keeps_nothing(built: Path) -> None:
    assert launch(built, "kvmqemu-rfs.sh", EMULATE="1", SNAPSHOT="1").returncode == 0
    assert [path for path in (built.parent.parent / "home").rglob("*") if path.is_file()] == []
    arguments = (built / "qemu/bin/qemu-system-x86_64.args").read_text().splitlines()
    assert sum("snapshot=on" in argument for argument in arguments) == 2


def test_any_command_line_survives_the_shell(built: Path) -> None:
    odd = "a='b' $HOME `id` \"c\" } \\ end"
    script = built / "launch" / "rt-guest" / "kvmqemu.sh"
    script.write_text(render("kvmqemu.sh", {**VARIABLES, "cmdline": odd}, TEMPLATES))
    assert launch(built, "kvmqemu.sh", EMULATE="1").returncode == 0
    assert f"{odd} no_timer_check" in (built / "qemu/bin/qemu-system-x86_64.args").read_text().splitlines()


@pytest.mark.parametrize("name", ["guest", "platform"])
@pytest.mark.parametrize("value", ["", "Bad", "a b", "a;b", "../x"])
def test_refuses_names_that_need_quoting(name: str, value: str) -> None:
    with pytest.raises(UserError, match=name):
        render("kvmqemu.sh", {**VARIABLES, name: value}, TEMPLATES)


def test_a_variable_that_is_not_given_is_an_error() -> None:
    with pytest.raises(UserError, match="memory_mib"):
        render("kvmqemu.sh", {k: v for k, v in VARIABLES.items() if k != "memory_mib"}, TEMPLATES)
