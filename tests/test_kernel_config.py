"""Kernel configurations edited and compared: by the kernel's own kconfig, and as commands."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import configedit, contract
from pipeline.configdiff import Side, differences, lines, prompts_of
from pipeline.engine import LABEL, PROJECT, Engine
from pipeline.fragment import HEADING, edited
from pipeline.project import Project
from tests import standin
from tests.standin import Standin
from tests.tiny import tiny_rootfs

ROOT = Path(__file__).resolve().parent.parent
OWN = "kernel-configs/qemu-q35/guest-config"

# The text of a fragment ------------------------------------------------------------------------

TEXT = """\
# Why this is so.
CONFIG_B=y
# CONFIG_A is not set

# And this.
CONFIG_N=16
"""


def test_a_line_that_is_there_is_changed_in_its_place() -> None:
    text = edited(TEXT, {"N": "8", "A": "y", "B": "n"})
    assert text == "# Why this is so.\n# CONFIG_B is not set\nCONFIG_A=y\n\n# And this.\nCONFIG_N=8\n"


def test_new_lines_come_sorted_below_a_heading_of_their_own() -> None:
    text = edited(TEXT, {"Z": "y", "C": "n", "M": '"text"'})
    assert text == TEXT + f'\n{HEADING}\n# CONFIG_C is not set\nCONFIG_M="text"\nCONFIG_Z=y\n'
    assert edited(text, {"D": "m"}) == text.replace("CONFIG_M", "CONFIG_D=m\nCONFIG_M")
    assert edited(text + "\n# By hand.\nCONFIG_H=y\n", {"ZZ": "y"}).endswith(
        "CONFIG_Z=y\nCONFIG_ZZ=y\n\n# By hand.\nCONFIG_H=y\n"
    )


def test_what_was_added_and_is_taken_back_leaves_nothing() -> None:
    assert edited(edited(TEXT, {"Z": "y", "C": "n"}), {"Z": None, "C": None}) == TEXT


def test_of_several_lines_about_a_symbol_one_is_left() -> None:
    assert edited("CONFIG_A=y\nCONFIG_B=y\nCONFIG_A=m\n", {"A": "n"}) == "CONFIG_B=y\n# CONFIG_A is not set\n"


def test_the_fewest_lines_are_found() -> None:
    asked: list[int] = []

    def enough(lines: dict[str, str]) -> bool:
        asked.append(len(lines))
        return {"A3", "A40"} <= lines.keys()

    lines = {f"A{n}": "y" for n in range(64)}
    assert configedit.minimal(lines, enough) == {"A3": "y", "A40": "y"}
    assert len(asked) < 64
    assert configedit.minimal({"ON": "y", "OFF": "n"}, lambda left: bool(left)) == {"ON": "y"}
    assert configedit.minimal({"A": "y"}, lambda left: True) == {}


# Differences in words --------------------------------------------------------------------------


def side(name: str, text: str, *fragments: str) -> Side:
    """A configuration with these lines, and what fragments ask for."""
    config = contract.parse_config(f"# Linux/x86 6.12.1 Kernel Configuration\n{text}", name)
    requests = [contract.parse_fragment(fragment, f"{name}-config") for fragment in fragments]
    return Side(name, config, contract.merge_requests(requests) if requests else None)


def test_differences_are_told_by_who_asked_for_them(tmp_path: Path) -> None:
    (tmp_path / "Kconfig").write_text('source "arch/$(SRCARCH)/Kconfig"\n')
    (tmp_path / "arch/x86").mkdir(parents=True)
    (tmp_path / "arch/x86/Kconfig").write_text(
        'config FOO\n\ttristate "The foo driver"\nmenuconfig BAR\n\tbool\n\tprompt "Bars"\n'
    )
    a = side("a", "CONFIG_SAME=y\nCONFIG_FOO=m\nCONFIG_CPUS=4\n", "CONFIG_SAME=y\nCONFIG_FOO=m\n")
    b = side("b", "CONFIG_SAME=y\nCONFIG_BAR=y\n", "CONFIG_SAME=y\nCONFIG_BAR=y\n")
    prompts = prompts_of(tmp_path, "x86")
    found = differences(a, b, prompts)
    assert list(lines(a, b, found)) == [
        "a -> b (Linux 6.12.1)",
        "asked for by fragments: 2",
        "  BAR  off -> on  Bars  [b-config:2]",
        "  FOO  module -> off  The foo driver  [a-config:2]",
        "follow from others: 1",
        "  CPUS  4 -> none",
    ]
    assert found[0].to_json() == {
        "symbol": "BAR", "prompt": "Bars", "from": "n", "to": "y", "asked": ["b-config:2"],
    }  # fmt: skip
    assert list(lines(a, a, differences(a, a, prompts)))[1:] == ["no difference"]


# The commands, with a step that takes no time ----------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Standin:
    directory = tmp_path_factory.mktemp("configured")
    (directory / "rootfs").mkdir()
    return standin.make(directory, tiny_rootfs(directory / "rootfs"))


@pytest.fixture
def project(template: Standin, tmp_path: Path) -> Standin:
    shutil.copytree(template.cache, tmp_path / "cache")
    shutil.copytree(template.root, tmp_path / "checkout", symlinks=True)
    return Standin(tmp_path / "checkout", tmp_path / "cache")


def containers() -> list[str]:
    """Containers of an edit that still run."""
    found = Engine().client.containers.list(all=True, filters={"label": f"{LABEL}.project={PROJECT}"})
    return [each.name for each in found if "config:" in each.labels.get(f"{LABEL}.task", "")]


@pytest.mark.engine
def test_settings_are_written_into_the_platforms_own_fragment(project: Standin) -> None:
    before = (project.root / OWN).read_text()
    done = project.doit("config:qemu-q35:guest", "--set", "CONFIG_X=y", "--set=CONFIG_Y=m")
    assert (done.status, (project.root / OWN).read_text()) == (0, f"{before}CONFIG_X=y\nCONFIG_Y=m\n"), done
    assert done.out.endswith(
        f"wrote {OWN}\n  CONFIG_X: n -> y\n  CONFIG_Y: n -> m\nto build it: doit kernel:qemu-q35:guest\n"
    )
    assert project.plan("kernel:qemu-q35:guest", "kernel:qemu-q35:host")["kernel:qemu-q35:host"] == "build"
    assert project.doit("config", "qemu-q35:guest", "--set", "CONFIG_Z=y").status == 0


@pytest.mark.engine
def test_what_breaks_the_contract_is_refused_and_kept(project: Standin) -> None:
    before = (project.root / OWN).read_text()
    done = project.doit("config:qemu-q35:guest", "--set", "CONFIG_PREEMPT_RT=n")
    assert done.status == 2
    assert "CONFIG_PREEMPT_RT: wanted y, got n\n" in done.err
    assert "nothing is written" in done.out
    kept = re.search(r"your edits are kept in (\S+)", done.out)
    assert kept
    assert (project.root / kept[1] / "fragment").read_text() == f"{before}# CONFIG_PREEMPT_RT is not set\n"
    assert (project.root / kept[1] / "config").is_file()
    assert (project.root / OWN).read_text() == before


@pytest.mark.engine
def test_a_fragment_that_changed_meanwhile_is_left_alone(project: Standin) -> None:
    process = project.start("config:qemu-q35:guest", "--set", "CONFIG_SLOW=y")
    assert process.stderr
    while "merging" not in process.stderr.readline():
        pass
    project.append(OWN, "CONFIG_MINE=y\n")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "was changed meanwhile; nothing is written" in out + err
    kept = re.search(r"your edits are kept in (\S+)", out + err)
    assert kept
    assert "CONFIG_SLOW=y" in (project.root / kept[1] / "fragment").read_text()
    assert (project.root / OWN).read_text().endswith("CONFIG_MINE=y\n")
    assert "SLOW" not in (project.root / OWN).read_text()


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_edit_writes_nothing_and_leaves_no_container(
    project: Standin, number: signal.Signals
) -> None:
    before = (project.root / OWN).read_text()
    process = project.start("config:qemu-q35:guest", "--set", "CONFIG_SLOW=y")
    assert process.stderr
    while "merging" not in process.stderr.readline():
        pass
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert containers() == []
    assert (project.root / OWN).read_text() == before
    kept = project.root / "artifacts/log/config:qemu-q35:guest.edited"
    assert "CONFIG_SLOW=y" in (kept / "fragment").read_text()


@pytest.mark.engine
def test_a_platform_without_a_fragment_of_its_own_is_told_to_write_one(project: Standin) -> None:
    project.edit("recipes/platforms/qemu-q35.toml", '  "qemu-q35/guest-config",\n', "")
    before = (project.root / "kernel-configs/common/x86_64-guest.config").read_text()
    done = project.doit("config:qemu-q35:guest", "--set", "CONFIG_X=y")
    assert done.status == 2
    assert (
        "the last fragment of kernel:qemu-q35:guest is common/x86_64-guest.config, which is not its own"
        in done.out
    )
    assert (project.root / "kernel-configs/common/x86_64-guest.config").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config:qemu-q35"], "qemu-q35 says not which kernel"),
        (["config:nowhere:guest"], "there is no platform nowhere"),
        (["config:qemu-q35:guest"], "the menu needs a terminal"),
        (["config:qemu-q35:guest", "--with", "xconfig"], "there is no menu xconfig"),
        (["config:qemu-q35:guest", "--set", "CONFIG_X=what"], "'CONFIG_X=what' is not a line"),
        (["config:qemu-q35:guest", "--set", "X=y"], "'X=y' is not a line"),
        (["configdiff", "qemu-q35:guest"], "takes two configurations"),
        (["configdiff", "nothing", "qemu-q35:guest"], "nothing is neither a platform nor a file"),
        (["configdiff", "qemu-q35:guest", "qemu-q35:host"], "kernel:qemu-q35:guest is not built"),
    ],
)
def test_words_that_mean_nothing_end_with_two(template: Standin, arguments: list[str], message: str) -> None:
    done = template.doit(*arguments)
    assert done.status == 2, done
    assert message in done.out
    assert "Traceback" not in done.out + done.err


@pytest.mark.engine
def test_configurations_of_roles_releases_and_files_are_compared(project: Standin, tmp_path: Path) -> None:
    assert project.doit("kernel:qemu-q35:guest", "kernel:qemu-q35:host").status == 0
    done = project.doit("configdiff", "qemu-q35:host", "qemu-q35:guest")
    assert done.status == 0, done
    assert (
        "  NR_CPUS                   64 -> 16  [qemu-q35/host-config:3, qemu-q35/guest-config:3]\n"
        in done.out
    )
    release = tmp_path / "release"
    (release / "kernels").mkdir(parents=True)
    for role in ("host", "guest"):
        config = project.root / f"artifacts/qemu-q35/kernel/{role}/config"
        shutil.copy(config, release / f"kernels/{role}.config")
    project.append(OWN, "CONFIG_MORE=y\n")
    assert project.doit("kernel:qemu-q35:guest").status == 0
    done = project.doit("configdiff", str(release), "qemu-q35", "--json")
    host, guest = json.loads(done.out)
    assert (host["b"], host["differences"], guest["a"]) == ("qemu-q35:host", [], f"{release}:guest")
    assert guest["differences"] == [
        {"symbol": "MORE", "prompt": None, "from": "n", "to": "y", "asked": ["qemu-q35/guest-config:4"]}
    ]
    done = project.doit("configdiff", str(release), str(release / "kernels/guest.config"))
    assert done.status == 2
    assert f"{release} has several kernels\n  write {release}:host or {release}:guest" in done.out
    done = project.doit("configdiff", f"{release}:guest", str(release / "kernels/guest.config"))
    assert done.out.splitlines()[1:] == ["no difference"]


# The kernel's own kconfig ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standin]:
    """A copy of the checkout that uses the user's own cache: source and builder are in it, or are made for it."""
    root = tmp_path_factory.mktemp("real") / "checkout"
    root.mkdir()
    for name in ("pipeline", "recipes", "kernel-configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dodo.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, root)
    yield Standin(root, Project(ROOT).cache.parent)


@pytest.mark.engine
@pytest.mark.slow
def test_the_fewest_lines_are_written_and_taken_back(checkout: Standin) -> None:
    own = checkout.root / OWN
    before = own.read_text()
    # CONFIG_INET_DIAG follows from what is asked for; CONFIG_PCI is asked for by an earlier fragment already
    given = [
        "CONFIG_NR_CPUS=8",
        "CONFIG_NET_SCHED=y",
        "CONFIG_TUN=m",
        "CONFIG_PCI=y",
        "CONFIG_PANIC_TIMEOUT=5",
    ]
    done = checkout.doit("config:qemu-q35:guest", *(word for each in given for word in ("--set", each)))
    assert done.status == 0, done
    added = "CONFIG_NET_SCHED=y\nCONFIG_PANIC_TIMEOUT=5\nCONFIG_TUN=m\n"
    assert own.read_text() == before.replace("=16", "=8") + f"\n{HEADING}\n{added}"
    assert "  CONFIG_NR_CPUS: 16 -> 8\n" in done.out
    back = ["CONFIG_NR_CPUS=16", "CONFIG_NET_SCHED=n", "CONFIG_TUN=n", "CONFIG_PANIC_TIMEOUT=10"]
    done = checkout.doit("config:qemu-q35:guest", *(f"--set={each}" for each in back))
    assert (done.status, own.read_text()) == (0, before), done


@pytest.mark.engine
@pytest.mark.slow
def test_what_cannot_be_had_and_what_the_contract_forbids_is_refused(checkout: Standin) -> None:
    own = checkout.root / OWN
    before = own.read_text()
    done = checkout.doit(
        "config:qemu-q35:guest", "--set", "CONFIG_KVM_INTEL=m", "--set", "CONFIG_KVM_GUEST=n"
    )
    assert done.status == 2, done
    assert re.search(
        r"CONFIG_KVM_INTEL: wanted m, got n\n  qemu-q35/guest-config:\d+: this fragment", done.err
    )
    assert "kconfig: depends on VIRTUALIZATION [=n]" in done.err
    assert re.search(r"CONFIG_KVM_GUEST: wanted y, got n\n  common/contract.toml: required", done.err), (
        done.err
    )
    assert own.read_text() == before
    kept = checkout.root / "artifacts/log/config:qemu-q35:guest.edited"
    assert "# CONFIG_KVM_GUEST is not set\n" in (kept / "fragment").read_text()
    assert "CONFIG_KVM_GUEST" in (kept / "config").read_text()


class Screen:
    """A command on a terminal of 100 columns and 30 lines; keys are sent when the screen shows what they are for."""

    def __init__(self, project: Standin, *arguments: str) -> None:
        """Start doit with these arguments."""
        self._leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "doit", *arguments], cwd=project.root, stdin=follower, stdout=follower,
            stderr=follower, env=project.environment | {"TERM": "xterm"}, start_new_session=True,
        )  # fmt: skip
        os.close(follower)

    def wait(self, text: str, seconds: float = 300) -> str:
        """What is shown until the text is there, without control sequences; AssertionError when it never is."""
        seen, end = "", time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self._leader], [], [], 0.2)[0]:
                try:
                    seen += os.read(self._leader, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
            plain = re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|[()][A-Z0-9])", "", seen)
            if text in plain:
                return plain
        raise AssertionError(f"no {text!r} in {seen}")

    def press(self, keys: str) -> None:
        """Send keys, once the program is ready for them."""
        time.sleep(0.5)
        os.write(self._leader, keys.encode())


@pytest.mark.engine
@pytest.mark.slow
def test_what_a_person_sets_in_the_menu_is_written(checkout: Standin) -> None:
    own = checkout.root / OWN
    before = own.read_text()
    screen = Screen(checkout, "config:qemu-q35:guest")
    screen.wait("Linux/x86_64")
    screen.press("/")
    screen.wait("Enter")
    screen.press("PANIC_TIMEOUT\n")
    screen.wait("(1)")
    screen.press("1")
    screen.wait("panic timeout")
    screen.press("\n")
    screen.wait("Please enter a decimal value")
    screen.press("\x7f\x7f7\n")
    for _ in range(3):
        screen.press("\x1b\x1b")
    screen.wait("save your new configuration")
    screen.press("\n")
    screen.wait("to build it")
    assert screen.process.wait(timeout=60) == 0
    assert own.read_text() == f"{before}\n{HEADING}\nCONFIG_PANIC_TIMEOUT=7\n"
    own.write_text(before)
