"""Building from a developer's work tree, as a user types it, in the stand-in project."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.project import Project
from tests import standin
from tests.packaging import make_key
from tests.standin import Done, Standin, git, make_repository
from tests.tiny import tiny_rootfs

pytestmark = pytest.mark.engine

GUEST, HOST = "kernel:qemu-q35:guest", "kernel:qemu-q35:host"
#: A kernel of one object that is made when its source is newer; what the container sees and may do is said in the log.
KERNEL = """\
cd /build/work/obj
mkdir -p /build/work/bin
echo "$MAKE" >/build/work/bin/make
chmod +x /build/work/bin/make
export PATH=/build/work/bin:$PATH
echo "$ROLE" >wanted.config
make allnoconfig
make olddefconfig
if [[ ! -e main.o || /build/in/source/main.c -nt main.o ]]; then
  echo "  CC      main.o"
  cp /build/in/source/main.c main.o
fi
echo "changed: $(cat ../changed 2>/dev/null | tr '\\n' ' ')"
echo "git: $(ls -A /build/in/source/.git | wc -l) ccache: ${CCACHE_READONLY-writes}"
if touch /build/in/source/main.c 2>/dev/null; then echo "wrote into the work tree"; fi
for n in {1..200}; do if [[ -e /build/in/source/wait.o ]]; then echo waiting; sleep 0.1; fi; done
if [[ $(cat main.o) == *BROKEN* ]]; then exit 1; fi
for out in bzImage vmlinux config System.map; do cp main.o /build/out/$out; done
echo "6.12.1-$ROLE-${ACTION_KEY:0:12}" >/build/out/kernelrelease
mkdir -p /build/out/modules
cp main.o /build/out/modules/one.ko
cp /build/out/kernelrelease release
make run-command "KBUILD_RUN_COMMAND=/build/in/source/install-extmod-build /build/out/headers"
echo "$ROLE" >/build/out/headers/.config
"""
#: The make of that kernel: its headers are those of the source, and a file that every build makes anew.
MAKE = """\
#!/bin/bash
echo "make: ${!#}"
case ${!#} in
  allnoconfig) echo "$ROLE" >.config; mkdir -p include/config; : >include/config/auto.conf ;;
  KBUILD_RUN_COMMAND=*) mkdir /build/out/headers; cp /build/in/source/*.[chS] release /build/out/headers ;;
esac
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Standin:
    """A stand-in project with both kernels made from the lock."""
    directory = tmp_path_factory.mktemp("local")
    (directory / "rootfs").mkdir()
    made = standin.make(directory, tiny_rootfs(directory / "rootfs"))
    (made.root / "recipes/steps/kernel.sh").write_text(
        f"MAKE={shlex.quote(MAKE)}\n{KERNEL.replace('cd /', 'mkdir -p /build/work/obj; cd /', 1)}"
    )
    done = made.doit(GUEST)
    assert done.status == 0, done
    return made


@pytest.fixture
def linux(tmp_path: Path) -> Path:
    """The user's own clone, with the content that is locked."""
    tree = make_repository(tmp_path / "linux", "mine", main="int linux;\n")
    (tree / ".gitignore").write_text("*.o\n")
    return tree


@pytest.fixture
def project(template: Standin, tmp_path: Path) -> Iterator[Standin]:
    shutil.copytree(template.cache, tmp_path / "cache", symlinks=True)
    shutil.copytree(template.root, tmp_path / "checkout", symlinks=True)
    yield Standin(tmp_path / "checkout", tmp_path / "cache")


def log(project: Standin, task: str = GUEST) -> str:
    return (project.root / "artifacts/log" / f"{task}.log").read_text()


def build(project: Standin, linux: Path, *tasks: str) -> Done:
    """Build from the work tree; fails when that does."""
    done = project.doit(*(tasks or (GUEST,)), "--source", f"linux-rt={linux}")
    assert done.status == 0, done
    return done


def image(project: Standin) -> str:
    return (project.root / "artifacts/qemu-q35/kernel/guest/bzImage").read_text()


def manifest(project: Standin, product: str = "kernel/guest") -> dict[str, object]:
    found: dict[str, object] = json.loads(
        (project.root / f"artifacts/qemu-q35/{product}/manifest.json").read_text()
    )
    return found


def test_only_what_changed_is_made_again_and_the_tree_is_left_alone(project: Standin, linux: Path) -> None:
    pinned = manifest(project)
    done = build(project, linux)
    assert f"note: linux-rt is the work tree {linux} (--source), and not what is locked\n" in done.out
    assert "CC      main.o" in log(project)  # nothing of the locked build is taken
    assert re.search(r"^changed: $", log(project), re.MULTILINE)
    assert "git: 0 ccache: 1" in log(project)
    assert "wrote into" not in log(project)
    assert (manifest(project)["tainted"], pinned["tainted"]) == (True, False)
    assert "everything is current (1 tasks)\n" in build(project, linux).out
    (linux / "other.c").write_text("int other;\n")
    build(project, linux)
    assert "CC      main.o" not in log(project)
    assert re.search(r"^changed: other.c $", log(project), re.MULTILINE)
    (linux / "main.c").write_text("int better;\n")
    build(project, linux)
    assert "CC      main.o" in log(project)
    assert image(project) == "int better;\n"
    assert git(linux, "status", "--porcelain") == "M main.c\n?? .gitignore\n?? other.c"


def headers(project: Standin) -> dict[str, str]:
    directory = project.root / "artifacts/qemu-q35/kernel/guest/headers"
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_headers_are_put_out_as_before_until_one_is_edited(project: Standin, linux: Path) -> None:
    kept, made = "kernel: headers as before", "make: KBUILD_RUN_COMMAND"
    (linux / "api.h").write_text("int api(void);\n")
    build(project, linux)
    assert made in log(project)
    first = headers(project)
    (linux / "main.c").write_text("int better;\n")
    build(project, linux)
    assert kept in log(project)
    assert made not in log(project)
    second = headers(project)
    assert second["release"] == (project.root / "artifacts/qemu-q35/kernel/guest/kernelrelease").read_text()
    assert second["release"] != first["release"]
    assert {**second, "release": ""} == {**first, "release": ""}
    # a build that ends in the middle, with a header of which the next one must know
    (linux / "api.h").write_text("long api(void);\n")
    (linux / "main.c").write_text("BROKEN\n")
    assert project.doit(GUEST, "--source", f"linux-rt={linux}").status == 1
    (linux / "main.c").write_text("int mended;\n")
    build(project, linux)
    assert made in log(project)
    assert headers(project)["api.h"] == "long api(void);\n"
    (linux / "main.c").write_text("int more;\n")
    build(project, linux)
    assert kept in log(project)
    assert headers(project)["api.h"] == "long api(void);\n"


@pytest.mark.parametrize("path", ["api.h", "include/vdso.S", "scripts/modpost.c", "new.awk"])
def test_headers_are_made_again_for_whatever_may_get_into_them(
    project: Standin, linux: Path, path: str
) -> None:
    build(project, linux)
    (linux / path).parent.mkdir(exist_ok=True)
    (linux / path).write_text("new\n")
    build(project, linux)
    assert "make: KBUILD_RUN_COMMAND" in log(project)


def test_a_product_that_cannot_be_laid_out_is_an_error(project: Standin, linux: Path) -> None:
    """It is laid out beside what is made of it, and yet the run tells of it."""
    shutil.rmtree(project.root / "artifacts/qemu-q35/kernel")
    (project.root / "artifacts/qemu-q35/kernel").write_text("in the way")
    done = project.doit(GUEST)
    assert done.status == 2
    assert f"error: {GUEST} could not be laid out: " in done.out
    assert "done: " not in done.out
    (project.root / "artifacts/qemu-q35/kernel").unlink()
    assert "done: 0 built, 1 from the store" in project.doit(GUEST).out
    assert image(project) == "int linux;\n"


def test_a_file_with_an_old_date_is_made_again(project: Standin, linux: Path) -> None:
    build(project, linux)
    (linux / "main.c").write_text("int restored;\n")
    os.utime(linux / "main.c", (0, 946684800))
    build(project, linux)
    assert image(project) == "int restored;\n"


def test_what_is_locked_is_as_it_was(project: Standin, linux: Path) -> None:
    """The same content, and nothing of it is taken for what is locked; nor after it was edited."""
    before = {name: Project(project.root, project.environment).graph.keys[name] for name in (GUEST, HOST)}
    first = image(project)
    build(project, linux)
    done = project.doit(GUEST)
    assert "[kernel:qemu-q35:guest] restored" in done.out
    assert "note:" not in done.out
    (linux / "main.c").write_text("int worse;\n")
    build(project, linux, GUEST, HOST)
    assert {name: Project(project.root, project.environment).graph.keys[name] for name in before} == before
    done = project.doit(GUEST, HOST)
    assert done.status == 0
    assert "[kernel:qemu-q35:host] built" in done.out  # was never made from what is locked
    assert "CC      main.o" in log(project, HOST)
    assert image(project) == first
    assert (manifest(project)["tainted"], manifest(project, "kernel/host")["tainted"]) == (False, False)


def test_what_is_made_of_it_is_tainted_too_and_nothing_is_given_out(
    project: Standin, linux: Path, tmp_path: Path
) -> None:
    build(project, linux, "repo:qemu-q35", "launch:rt-guest")
    assert manifest(project, "repo")["tainted"] is True
    assert manifest(project, "packages/kernel-image-guest")["tainted"] is True
    assert manifest(project, "launch/rt-guest")["tainted"] is False
    (project.root / "local.toml").write_text(f'[sources]\nlinux-rt = "{linux}"\n')
    why = (
        f"error: release:qemu-q35 would be made from the work tree {linux} (linux-rt): "
        "a release is made from what is locked\n"
        "  leave out --source, and what local.toml says: --source NAME= takes NAME from the lock\n"
    )
    for command in (
        ["release:qemu-q35"],
        ["publish", str(tmp_path / "served")],
        ["promote", str(tmp_path / "served")],
    ):
        done = project.doit(*command)
        assert (done.status, (done.out + done.err).removeprefix(note(linux))) == (2, why), command
    assert not (tmp_path / "served").exists()
    assert "release:qemu-q35" not in project.plan()
    assert "release:qemu-q35" in project.plan("--source", "linux-rt=")


def test_a_key_that_is_not_for_trying_out_signs_no_work_tree(
    project: Standin, linux: Path, tmp_path: Path
) -> None:
    key = tmp_path / "key.asc"
    key.write_bytes(make_key(tmp_path, "Release <release@example.org>"))
    done = project.doit("repo:qemu-q35", f"--source=linux-rt={linux}", VIRT_RT_SIGNING_KEY_FILE=str(key))
    assert done.status == 2
    assert "signs what is locked" in done.out


def note(linux: Path, by: str = "local.toml") -> str:
    return f"note: linux-rt is the work tree {linux} ({by}), and not what is locked\n"


def test_reading_commands_say_that_it_is_in_use(project: Standin, linux: Path) -> None:
    (project.root / "local.toml").write_text('[sources]\nlinux-rt = "../linux"\n')
    for command in (["plan", GUEST], ["list"], ["why", GUEST], ["--source", "qemu-kvm-rt=", "plan"]):
        done = project.doit(*command)
        assert done.out.startswith(note(linux)), done
        assert done.status == 0
    for command in (["plan", "--json", GUEST], ["list", "--json"], ["why", "--json", GUEST]):
        done = project.doit(*command)
        json.loads(done.out)
        assert done.err == note(linux)
    off = project.doit("--source", "linux-rt=", "plan", GUEST)
    assert "note:" not in off.out
    assert "nothing to build" in off.out


def test_why_names_the_files(project: Standin, linux: Path) -> None:
    (linux / "main.c").write_text("int better;\n")
    first = project.doit("why", GUEST, "--source", f"linux-rt={linux}")
    assert first.out.partition("\n")[2] == (
        f"source:linux-rt: {linux} is a work tree, and was what is locked\n    .gitignore\n    main.c\n"
    )
    build(project, linux)
    (linux / "main.c").write_text("int best;\n")
    second = project.doit("why", GUEST, "--source", f"linux-rt={linux}")
    assert second.out.partition("\n")[2] == f"source:linux-rt: {linux} changed\n    main.c\n"
    assert project.doit("why", GUEST).out == "source:linux-rt: is what is locked, and was a work tree\n"


def wait_for(project: Standin, text: str, task: str = GUEST) -> None:
    path = project.root / "artifacts/log" / f"{task}.log"
    deadline = time.monotonic() + 60
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_result_of_a_tree_that_moved_is_not_kept(project: Standin, linux: Path) -> None:
    (project.root / "artifacts/log" / f"{GUEST}.log").unlink()
    (linux / "wait.o").touch()
    running = project.start(GUEST, "--source", f"linux-rt={linux}")
    wait_for(project, "waiting")
    (linux / "main.c").write_text("int moved;\n")
    (linux / "wait.o").unlink()
    out, _ = running.communicate(timeout=120)
    assert running.returncode == 2
    assert f"{GUEST}: {linux} changed while doit ran; the result is not kept\n  run doit again\n" in out
    build(project, linux)
    assert image(project) == "int moved;\n"


def test_two_checkouts_build_from_one_tree_one_after_the_other(
    project: Standin, linux: Path, tmp_path: Path
) -> None:
    (project.root / "artifacts/log" / f"{GUEST}.log").unlink()
    (linux / "wait.o").touch()
    first = project.start(GUEST, "--source", f"linux-rt={linux}")
    wait_for(project, "waiting")
    (linux / "main.c").write_text("int second;\n")
    other = project.clone(tmp_path / "other")
    second = other.start(GUEST, "--source", f"linux-rt={linux}")
    assert second.stdout is not None
    waiting = f"note: waiting for another run that builds from {linux}\n"
    assert waiting in iter(second.stdout.readline, "")  # reads on until it is said
    assert not (other.root / "artifacts/log" / f"{GUEST}.log").exists() or not log(other)
    (linux / "wait.o").unlink()
    assert "changed while doit ran" in first.communicate(timeout=120)[0]
    out, _ = second.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (2, 0), out
    assert "CC      main.o" in log(other)
    assert image(other) == "int second;\n"


def test_an_interrupted_run_leaves_nothing_half_made(project: Standin, linux: Path) -> None:
    build(project, linux)
    (project.root / "artifacts/log" / f"{GUEST}.log").unlink()
    (linux / "main.c").write_text("int better;\n")
    (linux / "wait.o").touch()
    running = project.start(GUEST, "--source", f"linux-rt={linux}")
    wait_for(project, "waiting")
    running.terminate()
    running.communicate(timeout=60)
    assert running.returncode == 130
    (linux / "wait.o").unlink()
    (project.root / "artifacts/log" / f"{GUEST}.log").unlink()
    build(project, linux)
    assert "CC      main.o" in log(project)
    assert image(project) == "int better;\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "linux=/tmp"], "--source linux=/tmp: there is no source linux"),
        (["--source", "linux-rt"], "--source linux-rt names no work tree"),
        (["--source"], "--source names no work tree"),
        (["--source=linux-rt=/nowhere"], "there is no directory /nowhere"),
        (["plan", "--source=linux-rt=/nowhere"], "there is no directory /nowhere"),
    ],
)
def test_what_names_no_tree_is_refused_in_a_line(
    project: Standin, arguments: list[str], message: str
) -> None:
    done = project.doit(*arguments)
    assert (done.status, done.err) == (2, "")
    assert re.fullmatch(rf"error: {re.escape(message)}\n  .+\n", done.out), done.out


def test_an_unknown_word_in_local_toml_is_refused(project: Standin) -> None:
    (project.root / "local.toml").write_text("[source]\n")
    done = project.doit("list")
    assert (done.status, done.out) == (
        2,
        "error: local.toml:1: unknown key source\n  known keys here: sources\n",
    )


def test_a_tree_that_was_built_in_place_is_refused(project: Standin, linux: Path) -> None:
    (linux / ".gitignore").write_text(".config\n")
    (linux / ".config").touch()
    done = project.doit(GUEST, "--source", f"linux-rt={linux}")
    assert done.status == 2
    assert f"error: {linux} was built in place: .config is in the way of a build outside\n" in done.out
    assert f"make -C {linux} mrproper\n" in done.out
