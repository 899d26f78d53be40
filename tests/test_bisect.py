"""A commit that broke something is found in a history, by building and testing it, without touching anybody's tree."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from pipeline.files import tree_digests
from tests import standin
from tests.standin import Standin, git
from tests.tiny import tiny_rootfs

pytestmark = pytest.mark.engine

#: Commits of the history beside the first, which is what the stand-in's lock pins.
COMMITS = 18
#: From the first on the guest does not boot; the others, of which git names one first, do not compile.
PLANTED, BROKEN = 14, (9, 10)


def commit(repository: Path, number: int, *words: str) -> None:
    """One more commit: the words are what the stand-in's steps look at."""
    (repository / "main.c").write_text(f"int linux{number};\n" + "".join(f"// {word}\n" for word in words))
    git(repository, "commit", "-qam", f"change {number}")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Standin:
    """A stand-in project whose kernel has a history: `main` stops booting, `worse` stops compiling."""
    directory = tmp_path_factory.mktemp("bisected")
    (directory / "rootfs").mkdir()
    made = standin.make(directory, tiny_rootfs(directory / "rootfs"))
    linux = directory / "linux"
    for number in range(1, COMMITS + 1):
        words = ["PANIC"] * (number >= PLANTED) + ["SYNTAX"] * (number in BROKEN)
        commit(linux, number, *words)
    git(linux, "checkout", "-q", "-b", "worse", "v6.12.1-rt1")
    for number in range(1, COMMITS + 1):
        commit(linux, number, "worse", *["SYNTAX"] * (number >= 5))
    for word in ("CRASH", "STARVED"):
        git(linux, "checkout", "-q", "-b", word.lower(), "v6.12.1-rt1")
        commit(linux, 1, word)
        commit(linux, 2, word)
    git(linux, "checkout", "-q", "main")
    return made


@pytest.fixture
def project(template: Standin, tmp_path: Path) -> Standin:
    shutil.copytree(template.cache, tmp_path / "cache")
    shutil.copytree(template.root, tmp_path / "checkout", symlinks=True)
    return Standin(tmp_path / "checkout", tmp_path / "cache")


@pytest.fixture
def linux(template: Standin) -> Path:
    """The repository of the stand-in's kernel."""
    return template.root.parent / "linux"


def words(test: str, good: str, bad: str, *more: str) -> list[str]:
    """A command to type."""
    asked = ["--good", good, "--bad", bad, "--test", test]
    return ["bisect:qemu-q35", *asked, *more]


def out(project: Standin) -> Path:
    """Where a bisection is kept."""
    return project.root / "artifacts/bisect/qemu-q35-linux-rt"


def subjects(text: str) -> list[str]:
    """Subjects of the commits that were tested, in order."""
    return re.findall(r"^testing [0-9a-f]{12} ([^,\n]+)", text, re.MULTILINE)


def state(directory: Path) -> dict[str, tuple[str, int]]:
    """Content and time of everything in a tree, what is git's included."""
    digests = tree_digests(directory)
    return {name: (content, (directory / name).lstat().st_mtime_ns) for name, content in digests.items()}


def test_a_planted_commit_is_found_also_after_an_interruption(project: Standin, linux: Path) -> None:
    (linux / "main.c").write_text("what somebody is working on\n")
    before = state(linux)
    locked = (project.root / "recipes/sources.lock").read_bytes()
    command = words("boots", "v6.12.1-rt1", "main", "--repository", str(linux))
    process = project.start(*command)
    assert process.stdout
    seen = ""
    for line in process.stdout:
        seen += line
        if len(subjects(seen)) == 4 and "started" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    done = project.doit(*command)
    assert done.status == 0, done
    assert "going on after 3 tested commits\n" in done.out
    assert not set(subjects(seen)[:3]) & set(subjects(done.out))
    planted = git(linux, "rev-parse", f"main~{COMMITS - PLANTED}")
    assert f"the first bad commit is\ncommit {planted}\n" in done.out
    assert f"    change {PLANTED}\n" in done.out
    record = json.loads((out(project) / "bisect.json").read_text())
    assert record["first_bad"] == planted
    verdicts = {each["subject"]: each["verdict"] for each in record["tested"]}
    assert verdicts["change 9"] == "skip"
    assert (verdicts["change 13"], verdicts["change 14"], verdicts["change 18"]) == ("good", "bad", "bad")
    assert len(verdicts) < COMMITS / 2 + 1
    assert "is the first bad commit" in subprocess.run(
        ["git", "bisect", "replay", str(out(project) / "log")], cwd=_clone(linux, project.root.parent / "replay"),
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert state(linux) == before
    assert (project.root / "recipes/sources.lock").read_bytes() == locked
    again = project.doit(*command)
    assert (again.status, subjects(again.out)) == (0, [])
    assert f"commit {planted}\n" in again.out


def _clone(repository: Path, target: Path) -> Path:
    subprocess.run(["git", "clone", "-q", "-b", "main", str(repository), str(target)], check=True)
    return target


def test_what_does_not_build_is_bad_when_that_is_the_test(project: Standin, linux: Path) -> None:
    done = project.doit(*words("builds", "v6.12.1-rt1", "worse", "--role", "host"))
    assert done.status == 0, done
    assert f"commit {git(linux, 'rev-parse', f'worse~{COMMITS - 5}')}\n" in done.out
    assert "kernel:qemu-q35:host ended with 1" in done.out
    assert "kernel:qemu-q35:guest" not in done.out
    assert not list((project.cache / "virt-rt/trees").glob("*")), "unpacked trees are left"


def test_a_command_judges_and_what_cannot_be_told_is_said(project: Standin, linux: Path) -> None:
    command = 'n=$(sed -n "s/^int linux//p" $ARTIFACTS/qemu-q35/kernel/guest/bzImage) && n=${n%;} && '
    command += "((${n:-0} < 5)) || ((${n:-0} > 7)) || exit 125; ((${n:-0} < 7))"
    asked = words(command, "v6.12.1-rt1", "main~7", "--repository", str(linux))
    done = project.doit(*asked)
    assert done.status == 1, done
    said = done.out.partition("the first bad commit is one of 4; the others cannot be tested\n")[2]
    assert sorted(re.findall(r"^  [0-9a-f]{12} (change \d+)$", said, re.MULTILINE)) == [
        f"change {number}" for number in (5, 6, 7, 8)
    ]
    assert (out(project) / "verdict.txt").read_text() in done.out
    other = project.doit(*words("builds", "v6.12.1-rt1", "main~7", "--repository", str(linux)))
    assert other.status == 2
    assert "has a bisection of something else: test changed" in other.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (words("builds", "v6.12.1-rt1", "main"), "said to be bad, passes the test"),
        (words("false", "v6.12.1-rt1", "main"), "said to be good, is bad: the command ended with 1"),
        (words("exit 200", "v6.12.1-rt1", "main"), "ended with 200, which says nothing"),
        (words("builds", "v6.12.1-rt1", "nothing"), "there is no commit nothing with a history"),
        (words("builds", "main", "main"), "main and main are the same commit"),
        (words("boots", "main", "v6.12.1-rt1"), "--bad v6.12.1-rt1 comes before --good main"),
        (words("builds", "v6.12.1-rt1", "main", "--target", "root@board"), "--test builds measures nothing"),
        (words("p99.9<40", "v6.12.1-rt1", "main", "--target", "root@board"), "p99.9<40 needs --install"),
        (words("qemu:qemu-q35", "v6.12.1-rt1", "main"), "qemu:qemu-q35 does not depend on linux-rt"),
        (["bisect:qemu-q35", "--bad", "main"], "doit bisect needs --good"),
        (words("builds", "v6.12.1-rt1", "main", "--of", "x"), "nothing is built from x"),
        (words("builds", "v6.12.1-rt1", "main", "--source", "linux-rt=."), "is taken from a work tree"),
    ],
)
def test_what_proves_nothing_is_refused(project: Standin, arguments: list[str], message: str) -> None:
    done = project.doit(*arguments)
    assert done.status == 2, done
    assert message in done.out
    assert "Traceback" not in done.out + done.err


@pytest.mark.parametrize(
    ("test", "bad", "message"),
    [
        ("boots", "crash", "boot:qemu-q35 ended with 1, which says nothing of the commit"),
        ("builds", "starved", "kernel:qemu-q35:guest ended with 1, which says nothing of the commit"),
    ],
)
def test_a_test_that_breaks_down_is_no_verdict(
    project: Standin, linux: Path, test: str, bad: str, message: str
) -> None:
    done = project.doit(*words(test, "v6.12.1-rt1", bad, "--repository", str(linux)))
    assert done.status == 1, done
    assert message in done.out
    record = json.loads((out(project) / "bisect.json").read_text())
    assert [each["verdict"] for each in record["tested"]] == ["good"]
