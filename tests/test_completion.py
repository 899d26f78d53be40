"""Completion: what is offered, how soon, and that three real shells take it."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from pipeline import completion, locks
from pipeline.project import Project

ROOT = Path(__file__).resolve().parent.parent
GUEST = "recipes/guests/rt-guest.toml"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with nothing but what names follow from; in its directory a shell finds `doit`."""
    root = tmp_path / "check out"
    for name in ("pipeline", "recipes", "kernel-configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dodo.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, root)
    (tmp_path / "bin").mkdir()
    doit = tmp_path / "bin/doit"
    doit.write_text(f'#!/bin/sh\nPYTHONPATH="{root}" exec {sys.executable} -m doit "$@"\n')
    doit.chmod(0o755)
    return root


@pytest.fixture(scope="module")
def table() -> completion.Table:
    """What is known of this checkout."""
    found = completion._make(ROOT)
    assert found is not None
    return found


def offered(table: completion.Table, *words: str) -> list[str]:
    return [name for name, _ in completion.candidates(table, list(words))]


def ask(root: Path, *words: str) -> list[str]:
    """What a shell is told."""
    done = subprocess.run(
        [sys.executable, "-IS", str(root / "pipeline/completion.py"), *words],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return [line.partition("\t")[0] for line in done.stdout.splitlines()]


def add_guest(root: Path, name: str) -> None:
    """Another one beside that of canoe-pass."""
    guests = root / "recipes/guests"
    recipe = (guests / "canoe-guest.toml").read_text()
    (guests / f"{name}.toml").write_text(re.sub(r"^pins = .*$", "", recipe, flags=re.MULTILINE))


def lock_guest(root: Path, name: str) -> None:
    """What `doit lock -u guest/NAME` would do, without the archive."""
    lock = locks.load_packages(root / locks.PACKAGES_LOCK)
    both = [
        lock.get("guest/canoe-guest"),
        msgspec.structs.replace(lock.get("guest/canoe-guest"), name=f"guest/{name}"),
    ]
    locks.dump_packages(lock.replace(both), root / locks.PACKAGES_LOCK)


# What is offered -------------------------------------------------------------------------------


def test_the_first_word_is_a_command_or_a_task(table: completion.Table) -> None:
    found = offered(table, "")
    assert {"run", "cpuplan", "completion", "help"} <= set(found)
    assert {"platform:qemu-q35", "measure:canoe-pass", "kernel:qemu-q35:guest", "image:rt-guest"} <= set(
        found
    )
    assert "source:linux-rt" not in found
    assert offered(table, "kernel:qemu-q35:g") == ["kernel:qemu-q35:guest"]
    assert offered(table, "source:li") == ["source:linux-rt"]
    assert offered(table, "nothing") == []


def test_every_task_that_doit_lists_is_offered(table: completion.Table) -> None:
    done = subprocess.run([sys.executable, "-m", "doit", "list"], cwd=ROOT, capture_output=True, text=True)
    listed = {line.split()[0] for line in done.stdout.splitlines()}
    assert listed
    assert listed - set(offered(table, "plan", "")) == set()
    assert {action.name for action in Project(ROOT).graph} - set(offered(table, "log", "")) == {
        action.name for action in Project(ROOT).graph if action.place is None
    }


def test_a_command_is_given_what_its_usage_names(table: completion.Table) -> None:
    platforms, topologies = ["canoe-pass", "qemu-q35"], "canoe-pass-single-socket"
    assert offered(table, "cpuplan", "") == platforms
    assert offered(table, "cpuplan", "canoe-pass", "") == []
    assert topologies in offered(table, "cpuplan", "canoe-pass", "--topology", "")
    assert offered(table, "publish", "--channel", "s") == ["stable"]
    assert offered(table, "publish", "--platform", "q") == ["qemu-q35"]
    assert offered(table, "publish", "--platform", "qemu-q35", "") == [":directories"]
    assert offered(table, "promote", "--from", "") == ["testing", "stable"]
    assert offered(table, "lock", "-u", "guest/") == ["guest/canoe-guest", "guest/rt-guest"]
    assert offered(table, "lock", "--update", "linux") == ["linux-rt"]
    assert offered(table, "verify-release", "x", "--key", "") == [":files"]
    assert offered(table, "report", "") == [":directories"]
    assert offered(table, "completion", "") == ["bash", "fish", "zsh"]
    assert offered(table, "plan", "boot:qemu-q35", "lab:q") == ["lab:qemu-q35"]  # more than one
    assert offered(table, "why", "boot:qemu-q35", "lab:q") == []  # one only
    assert offered(table, "gc", "--days", "") == offered(table, "list", "") == []
    assert offered(table, "help", "cpu") == ["cpuplan"]


def test_options_are_those_of_the_command(table: completion.Table) -> None:
    assert offered(table, "cpuplan", "--") == ["--topology", "--json", "--svg", "--doc", "--help"]
    assert offered(table, "gc", "--d") == ["--days", "--dry-run"]
    assert offered(table, "-") == offered(table, "run", "-")[:-1] == [
        "-c", "--continue", "-n", "--process", "-s", "--single",
    ]  # fmt: skip


def test_a_measurement_is_given_its_variables(table: completion.Table) -> None:
    assert offered(table, "measure:canoe-pass", "T") == ["TARGET="]
    assert offered(table, "run", "measure:canoe-pass", "TARGET=x", "D") == ["DURATION="]
    assert offered(table, "image:rt-guest", "T") == []


# How soon, and how true ------------------------------------------------------------------------


def test_it_is_soon(checkout: Path) -> None:
    ask(checkout, "")
    taken = []
    for _ in range(7):
        began = time.perf_counter()
        assert ask(checkout, "kernel:") == [
            f"kernel:{p}:{r}" for p in ("canoe-pass", "qemu-q35") for r in ("host", "guest")
        ]
        taken.append(time.perf_counter() - began)
    assert min(taken) < 0.15


def test_it_follows_the_recipes(checkout: Path) -> None:
    assert ask(checkout, "image:") == ["image:canoe-guest", "image:rt-guest"]
    kept = (checkout / "artifacts" / completion.FILE).read_text()
    (checkout / "recipes/guests/canoe-guest.toml").rename(checkout / "canoe-guest")
    (checkout / "recipes/platforms/canoe-pass.toml").unlink()
    drivers = checkout / "recipes/drivers"
    for driver in drivers.glob("*.toml"):
        driver.write_text(driver.read_text().replace(', "canoe-pass"', "").replace('"canoe-pass", ', ""))
    assert ask(checkout, "image:") == ["image:rt-guest"]
    assert ask(checkout, "cpuplan", "") == ["qemu-q35"]
    # what is broken leaves the last table, and is not kept
    (checkout / GUEST).write_text("vcpus = ")
    assert ask(checkout, "image:") == ["image:rt-guest"]
    # a state that was there before, to the byte
    assert (checkout / "artifacts" / completion.FILE).read_text() != kept
    assert list((checkout / "artifacts").glob(f"{completion.FILE}.*")) == []


def test_a_table_that_is_damaged_is_made_anew(checkout: Path) -> None:
    ask(checkout, "")
    for damage in ("[]", '{"state": 1, "table": {}}'):
        (checkout / "artifacts" / completion.FILE).write_text(damage)
        assert ask(checkout, "image:") == ["image:canoe-guest", "image:rt-guest"]


def test_an_unknown_shell_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "doit", "completion", "csh"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == "error: there is no completion for csh\n  write one of: bash, fish, zsh\n"


# Three shells ----------------------------------------------------------------------------------

SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "source <(doit completion bash)"),
    "zsh": (
        ["zsh", "-f", "-i"],
        "autoload -Uz compinit; compinit -u -D; bindkey -e; source <(doit completion zsh)",
    ),
    "fish": (["fish", "--no-config", "-i"], "doit completion fish | source"),
}


class Keyboard:
    """A shell on a terminal of its own; what is typed is typed, and Tab is Tab."""

    def __init__(self, shell: str, checkout: Path) -> None:
        """Start it in the checkout, with completion."""
        command, prepare = SHELLS[shell]
        home = checkout.parent / "home"
        home.mkdir()
        environment = {
            "PATH": f"{checkout.parent}/bin:{os.environ['PATH']}",
            "HOME": str(home), "TERM": "dumb", "LANG": "C.UTF-8", "PS1": "$ ", "XDG_CACHE_HOME": str(home),
        }  # fmt: skip
        self._terminal, end = pty.openpty()
        self._shell = subprocess.Popen(
            ["setsid", "--ctty", *command],
            cwd=checkout, env=environment, stdin=end, stdout=end, stderr=end,
        )  # fmt: skip
        os.close(end)
        os.write(self._terminal, f"{prepare}\n".encode())

    def completed(self, typed: str) -> str:
        """The words that a line has after Tab: they are not run, but put out, by Home, echo, End, and Enter."""
        # quotes tell what is typed from what is put out
        os.write(self._terminal, f"{typed}\t\x01echo 'IT ''IS' \x05 'SO'':'\n".encode())
        said, ends = "", time.monotonic() + 30
        while "SO:" not in said.rpartition("IT IS")[2] or "IT IS" not in said:
            assert time.monotonic() < ends, said
            if select.select([self._terminal], [], [], 1)[0]:
                said += os.read(self._terminal, 65536).decode(errors="replace")
        return said.rpartition("IT IS")[2].partition("SO:")[0].strip()

    def end(self) -> None:
        """Hang up, and wait for it."""
        os.close(self._terminal)
        self._shell.kill()
        self._shell.wait(timeout=10)


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
def test_a_real_shell_completes(shell: str, checkout: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}: apt-get install {shell}")
    ask(checkout, "")
    (checkout / "some where").mkdir()
    keyboard = Keyboard(shell, checkout)
    try:
        assert keyboard.completed("doit kernel:qemu-q35:g") == "doit kernel:qemu-q35:guest"
        assert keyboard.completed("doit cpuplan canoe-pass --top") == "doit cpuplan canoe-pass --topology"
        assert keyboard.completed("doit measure:canoe-pass TARG") == "doit measure:canoe-pass TARGET="
        assert keyboard.completed("doit verify-release some").startswith("doit verify-release some where")
        add_guest(checkout, "brand-new")
        assert keyboard.completed("doit lock -u guest/br") == "doit lock -u guest/brand-new"
        assert keyboard.completed("doit image:rt") == "doit image:rt-guest"  # those there were
        lock_guest(checkout, "brand-new")
        assert keyboard.completed("doit image:br") == "doit image:brand-new"
    finally:
        keyboard.end()
