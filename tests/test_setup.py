"""The scripts of set-up, on a machine made of stub commands: what is there is what each test says."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# What the scripts may use of the real machine; everything else exists only as a stub.
REAL_COMMANDS = """awk bash cat chmod df dirname env flock id ln ls mkdir mkfifo mktemp nproc paste rm setsid
    sha256sum sleep sort tail timeout touch truncate""".split()

PACKAGES = """\
[base]
python3         python3                          runs it
[make]
wanted-tool     wanted,elsewhere:other           the one that tests let be missing
docker          docker                           talks to the engine
[engine]
dockerd         docker.io                        the engine
[lint]
[test]
"""

# Installing `wanted` brings the command that set-up probes for.
APT_GET = """
echo "apt-get $*" >>"$CALLS"
[ "${!#}" = wanted ] && echo '#!/bin/sh' >"$STUBS/wanted-tool" && chmod +x "$STUBS/wanted-tool"
exit 0
"""

# Answers while the file `answers` exists.
DOCKER = """
echo "docker $*" >>"$CALLS"
[ -e "$STUBS/answers" ] && { echo 20.10.24; exit 0; }
echo "${DOCKER_SAYS-Cannot connect to the Docker daemon}" >&2
exit 1
"""

# Answers soon after its start, as the real one does, and stays until it is told to end.
DOCKERD = """
echo "dockerd $*" >>"$CALLS"
echo $$ >"$2"
ls /proc/$$/fd >"$STUBS/descriptors"
echo "the log of dockerd"
sleep 0.3
touch "$STUBS/answers"
mkfifo "$STUBS/never" && read -rt 60 <>"$STUBS/never"
"""

# Makes a virtual environment whose pip only notes that it was called.
PYTHON = """
case "$*" in
  *"-m venv"*)
    mkdir -p .venv/bin .venv/lib/python3.11/site-packages
    ln -s "$0" .venv/bin/python && echo venv >>"$CALLS" ;;
  *"-m pip"*) echo "pip $*" >>"$CALLS" ;;
  *print*) echo 3.11.2 ;;
esac
"""


class Machine:
    """A checkout with the real scripts, and a PATH on which only stubs and harmless commands are."""

    def __init__(self, path: Path) -> None:
        self.checkout = path / "checkout"
        self.stubs = path / "stubs"
        self.state = path / "state" / "virt-rt"
        self.calls = path / "calls"
        for directory in (self.stubs, self.checkout / "recipes"):
            directory.mkdir(parents=True)
        shutil.copytree(REPOSITORY / "scripts", self.checkout / "scripts")
        (self.checkout / "scripts" / "apt-packages").write_text(PACKAGES)
        for lock in (
            "requirements.lock",
            "requirements-dev.lock",
            "recipes/sources.lock",
            "recipes/packages.lock",
        ):
            (self.checkout / lock).write_text("a lock\n")
        for command in REAL_COMMANDS:
            real = shutil.which(command)
            assert real, command
            (self.stubs / command).symlink_to(real)
        self.stub("python3", PYTHON)
        self.stub("wanted-tool", "")
        self.stub("docker", DOCKER)
        self.stub("dockerd", DOCKERD)
        self.stub("apt-get", APT_GET)
        self.stub("apt-helper", "exit 1")
        self.stub("systemctl", "echo offline; exit 1")
        self.engine_answers()

    def stub(self, name: str, script: str) -> None:
        """Put the command `name`, a bash script, on PATH."""
        command = self.stubs / name
        command.unlink(missing_ok=True)
        command.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        command.chmod(0o755)

    def lacks(self, *names: str) -> None:
        """Take the commands `names` off PATH."""
        for name in names:
            (self.stubs / name).unlink()

    def engine_answers(self, answers: bool = True) -> None:
        """Let a container engine run, or not."""
        if answers:
            (self.stubs / "answers").touch()
        else:
            (self.stubs / "answers").unlink()

    def user(self) -> None:
        """Be an ordinary user."""
        self.stub("id", 'case "$1" in -u) echo 1000 ;; -un) echo jane ;; esac')

    def run(
        self, script: str, *arguments: str, inherited: tuple[int, ...] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run scripts/`script` with the descriptors `inherited`; waits for whoever holds its output."""
        return subprocess.run(
            [self.checkout / "scripts" / script, *arguments],
            env={
                "PATH": str(self.stubs),
                "HOME": str(self.checkout.parent),
                "XDG_STATE_HOME": str(self.state.parent),
                "PYTHON": str(self.stubs / "python3"),
                "STUBS": str(self.stubs),
                "CALLS": str(self.calls),
                **environment,
            },
            pass_fds=inherited,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def called(self) -> list[str]:
        """Return the calls of stubs since the last time, those to ask the engine left out."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return [line for line in lines if not line.startswith("docker ")]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    pid = machine.state / "dockerd.pid"
    if pid.exists():
        os.kill(int(pid.read_text()), signal.SIGKILL)


def test_a_second_run_does_nothing_and_is_quick(machine: Machine) -> None:
    assert machine.run("setup").returncode == 0
    assert [call.split()[0] for call in machine.called()] == ["venv", "pip"]
    began = time.monotonic()
    again = machine.run("setup")
    assert time.monotonic() - began < 1
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert machine.called() == []


def test_packages_come_from_the_lock_by_hash_alone(machine: Machine) -> None:
    machine.run("setup")
    (pip,) = [call for call in machine.called() if call.startswith("pip")]
    assert "--require-hashes -r requirements.lock" in pip
    assert "--only-binary :all:" in pip


@pytest.mark.parametrize("purpose", ["test", "lint", "docs"])
def test_developers_packages_are_added_to_a_current_venv(machine: Machine, purpose: str) -> None:
    machine.run("setup")
    machine.called()
    assert machine.run("setup", purpose).returncode == 0
    (pip,) = machine.called()
    assert "-r requirements-dev.lock" in pip
    assert machine.run("setup", purpose).returncode == 0
    assert machine.run("setup").returncode == 0
    assert machine.called() == []


@pytest.mark.parametrize("change", ["lock", "checkout", "interpreter gone", "interpreter upgraded"])
def test_the_venv_is_made_anew_when_what_it_depends_on_moved(machine: Machine, change: str) -> None:
    machine.run("setup")
    machine.called()
    match change:
        case "lock":
            (machine.checkout / "requirements.lock").write_text("another lock\n")
        case "checkout":
            machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved"))
        case "interpreter gone":
            (machine.checkout / ".venv/bin/python").unlink()
        case "interpreter upgraded":
            machine.stub("python3", PYTHON.replace("3.11.2", "3.13.5"))
    assert machine.run("setup").returncode == 0
    assert [call.split()[0] for call in machine.called()] == ["venv", "pip"]


def test_an_installation_that_was_cut_short_is_done_again(machine: Machine) -> None:
    machine.stub("python3", PYTHON.replace('*"-m pip"*)', '*"-m pip"*) exit 1;'))
    failed = machine.run("setup")
    assert failed.returncode == 2
    assert "pip could not install requirements.lock" in failed.stderr
    machine.stub("python3", PYTHON)
    machine.called()
    assert machine.run("setup").returncode == 0
    assert [call.split()[0] for call in machine.called()] == ["venv", "pip"]


def test_a_python_that_will_not_do_is_refused_by_name(machine: Machine) -> None:
    machine.stub("python3", "exit 1")
    refused = machine.run("setup")
    assert refused.returncode == 2
    assert "no Python 3.11 or later with venv and ensurepip at PYTHON=" in refused.stderr
    assert "PYTHON=/path/to/python3 make" in refused.stderr


def test_root_installs_what_is_missing(machine: Machine) -> None:
    machine.stub("id", "echo 0")
    machine.lacks("wanted-tool")
    assert machine.run("setup").returncode == 0
    update, install = (call for call in machine.called() if call.startswith("apt-get"))
    assert update == "apt-get -q update"
    assert install.startswith("apt-get install -y --no-install-recommends ")
    assert install.endswith(" wanted")


def test_a_user_installs_through_sudo(machine: Machine) -> None:
    machine.user()
    machine.stub("sudo", '[ "$1" = -n ] && exit 0; echo "sudo $*" >>"$CALLS"; exec "$@"')
    machine.lacks("wanted-tool")
    assert machine.run("setup").returncode == 0
    assert [call.split()[1] for call in machine.called() if call.startswith("sudo")] == ["apt-get", "env"]


def test_neither_root_nor_sudo_prints_the_command_and_stops(machine: Machine) -> None:
    machine.user()
    machine.lacks("wanted-tool")
    stopped = machine.run("setup")
    assert stopped.returncode == 2
    assert "as root: apt-get update && apt-get install -y --no-install-recommends wanted\n" in stopped.stderr
    assert len(stopped.stderr.splitlines()) == 2
    assert machine.called() == []


def test_a_sudo_that_would_have_to_ask_nobody_counts_as_none(machine: Machine) -> None:
    machine.user()
    machine.stub("sudo", "exit 1")
    machine.lacks("wanted-tool")
    assert machine.run("setup").returncode == 2
    assert machine.called() == []


def test_a_package_has_another_name_in_another_release(machine: Machine) -> None:
    codename = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    if not codename:
        pytest.skip("this distribution's release has no code name")
    packages = machine.checkout / "scripts" / "apt-packages"
    packages.write_text(packages.read_text().replace("elsewhere", codename[1]))
    machine.user()
    machine.lacks("wanted-tool")
    assert "--no-install-recommends other\n" in machine.run("setup").stderr


def test_a_package_that_does_not_bring_what_is_probed_for_is_an_error(machine: Machine) -> None:
    machine.stub("id", "echo 0")
    machine.stub("apt-get", "true")
    machine.lacks("wanted-tool")
    stopped = machine.run("setup")
    assert stopped.returncode == 2
    assert "still not there: wanted" in stopped.stderr


def test_every_package_of_the_real_list_has_a_reason(machine: Machine) -> None:
    shutil.copy(REPOSITORY / "scripts" / "apt-packages", machine.checkout / "scripts" / "apt-packages")
    assert "gives no reason" not in machine.run("doctor").stderr
    with (machine.checkout / "scripts" / "apt-packages").open("a") as packages:
        packages.write("tool package\n")
    stopped = machine.run("setup", "test")
    assert stopped.returncode == 2
    assert "'tool package' gives no reason" in stopped.stderr


def test_dockerd_is_started_detached_where_systemd_is_not(machine: Machine) -> None:
    machine.stub("id", "echo 0")
    machine.engine_answers(False)
    began = time.monotonic()
    with (machine.stubs / "jobserver").open("w") as jobserver:
        started = machine.run("setup", inherited=(jobserver.fileno(),))
    assert started.returncode == 0, started.stderr
    assert time.monotonic() - began < 15, "whoever started set-up had to wait for dockerd's end"
    pid = int((machine.state / "dockerd.pid").read_text())
    assert f"kill $(cat {machine.state / 'dockerd.pid'})" in started.stdout
    assert os.getsid(pid) == pid
    assert (machine.state / "dockerd.log").read_text() == "the log of dockerd\n"
    # bash holds the script that plays dockerd open as 255.
    assert set((machine.stubs / "descriptors").read_text().split()) <= {"0", "1", "2", "255"}
    machine.called()
    assert machine.run("setup").returncode == 0
    assert machine.called() == []


def test_a_dockerd_that_ends_at_once_is_reported_with_its_log(machine: Machine) -> None:
    machine.stub("id", "echo 0")
    machine.stub("dockerd", "echo 'failed to mount overlay' >&2; exit 1")
    machine.engine_answers(False)
    failed = machine.run("setup")
    assert failed.returncode == 2
    assert "failed to mount overlay" in failed.stderr
    assert "dockerd did not come up: Cannot connect to the Docker daemon" in failed.stderr


def test_systemd_starts_its_own_service(machine: Machine) -> None:
    machine.stub("id", "echo 0")
    machine.engine_answers(False)
    machine.stub(
        "systemctl",
        'case $1 in is-system-running) echo degraded; exit 1 ;; esac; echo "systemctl $*" >>"$CALLS"; '
        'touch "$STUBS/answers"',
    )
    assert machine.run("setup").returncode == 0
    assert "systemctl start docker" in machine.called()
    assert not (machine.state / "dockerd.pid").exists()


def test_docker_host_is_used_and_nothing_started_beside_it(machine: Machine) -> None:
    machine.stub("id", "echo 0")
    assert machine.run("setup", DOCKER_HOST="tcp://127.0.0.1:1").returncode == 0
    assert "docker --host tcp://127.0.0.1:1 version" in machine.calls.read_text()
    machine.engine_answers(False)
    stopped = machine.run("setup", DOCKER_HOST="tcp://127.0.0.1:1")
    assert stopped.returncode == 2
    assert "DOCKER_HOST=tcp://127.0.0.1:1 does not answer" in stopped.stderr
    assert not [call for call in machine.called() if call.startswith(("dockerd", "apt-get"))]


def test_a_docker_command_alone_is_no_engine(machine: Machine) -> None:
    machine.user()
    packages = machine.checkout / "scripts" / "apt-packages"
    packages.write_text(re.sub(r"^dockerd ", "dockerd-is-nowhere ", packages.read_text(), flags=re.MULTILINE))
    machine.engine_answers(False)
    assert "--no-install-recommends docker.io\n" in machine.run("setup").stderr


def test_missing_rights_on_the_socket_are_named(machine: Machine) -> None:
    machine.user()
    machine.engine_answers(False)
    stopped = machine.run("setup", DOCKER_SAYS="permission denied while trying to connect")
    assert stopped.returncode == 2
    assert "usermod -aG docker jane" in stopped.stderr


@pytest.mark.parametrize("purpose", ["lint", "docs"])
def test_lint_and_docs_need_no_engine(machine: Machine, purpose: str) -> None:
    machine.engine_answers(False)
    assert machine.run("setup", purpose).returncode == 0
    assert "docker" not in machine.calls.read_text()


def test_doctor_works_before_set_up(machine: Machine) -> None:
    machine.stub("id", "echo 0")
    machine.lacks("wanted-tool")
    machine.engine_answers(False)
    told = machine.run("doctor", "--json")
    report = json.loads(told.stdout)
    assert set(report) == {"ok", "checks"}
    assert all(set(check) == {"name", "state", "found", "remedy"} for check in report["checks"])
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert {states[name] for name in ("packages", "venv", "engine")} == {"make"}
    assert states["python"] == "ok"
    assert set(states.values()) <= {"ok", "make", "note", "FAIL"}
    assert all(check["remedy"] for check in report["checks"] if check["state"] in ("make", "FAIL"))
    assert (told.returncode, report["ok"]) == ((2, False) if "FAIL" in states.values() else (0, True))
    assert not (machine.checkout / ".venv").exists()


def test_doctor_fails_where_only_the_user_can_help(machine: Machine) -> None:
    machine.user()
    machine.lacks("wanted-tool")
    told = machine.run("doctor")
    assert told.returncode == 2
    assert re.search(r"^FAIL +packages +missing: wanted$", told.stdout, re.MULTILINE)
    assert "-> as root: apt-get update && apt-get install" in told.stdout


def test_doctor_names_a_missing_lock(machine: Machine) -> None:
    (machine.checkout / "recipes" / "sources.lock").unlink()
    told = machine.run("doctor")
    assert told.returncode == 2
    assert "git checkout -- recipes/sources.lock" in told.stdout


def test_locks_hold_hashes_and_name_no_host() -> None:
    for lock in ("requirements.lock", "requirements-dev.lock"):
        text = (REPOSITORY / lock).read_text()
        pins = re.findall(r"^[a-z0-9-]+==.*\\\n    --hash=sha256:", text, re.MULTILINE)
        assert len(pins) == len(re.findall(r"^\S.*==", text, re.MULTILINE)) > 0
        assert "://" not in text
