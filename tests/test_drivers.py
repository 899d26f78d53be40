"""Drivers out of the kernel's tree: what a recipe may say, and modules built against a real kernel's headers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import drivers, modulecheck
from pipeline.action import Action
from pipeline.engine import Engine
from pipeline.errors import UserError
from pipeline.executor import Executor, StepFailed
from pipeline.graph import Graph
from pipeline.inputs import builder_name
from pipeline.kernel import BUILDER, kernel_name
from pipeline.project import Project
from tests import standin
from tests.conftest import Recorder
from tests.tiny import tiny_rootfs

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = "qemu-q35"
RECIPE = """\
description = "A driver that says hello"
platforms = ["qemu-q35"]
role = "guest"
directory = "drivers/hello"
autoload = ["hello"]
licence_files = ["COPYING"]
"""
MODULE = """\
#include <linux/init.h>
#include <linux/module.h>

static int __init hello_init(void)
{
	pr_info("hello\\n");
	return 0;
}

static void __exit hello_exit(void)
{
}

module_init(hello_init);
module_exit(hello_exit);
MODULE_DESCRIPTION("says hello");
MODULE_ALIAS("platform:hello");
MODULE_LICENSE("GPL");
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one driver."""
    root = tmp_path / "checkout"
    for path in ("recipes/steps/driver.sh", "pipeline/modulecheck.py"):
        (root / path).parent.mkdir(parents=True)
        shutil.copy(ROOT / path, root / path)
    write_driver(root)
    return root


def write_driver(root: Path, recipe: str = RECIPE) -> None:
    """The driver hello, its recipe and its sources."""
    (root / "recipes" / "drivers").mkdir(exist_ok=True)
    (root / "recipes" / "drivers" / "hello.toml").write_text(recipe)
    sources = root / "drivers" / "hello"
    sources.mkdir(parents=True)
    (sources / "Makefile").write_text("obj-m += hello.o\n")
    (sources / "hello.c").write_text(MODULE)
    (sources / "COPYING").write_text("Copy it as you like.\n")


def action_of(root: Path, name: str = "hello") -> Action:
    """The action of a driver of that checkout."""
    platforms = Project(ROOT).recipes.platforms
    (build,) = drivers.builds({name: drivers.load(root, platforms)[name]}, PLATFORM)
    return drivers.driver(root, PLATFORM, platforms[PLATFORM], build)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# What a recipe may say -------------------------------------------------------------------------


def test_a_driver_is_built_from_its_directory_against_the_kernels_headers(checkout: Path) -> None:
    action = action_of(checkout)
    assert action.name == "driver:qemu-q35:hello"
    assert action.place == "qemu-q35/driver/hello"
    assert sorted(action.files) == ["modulecheck.py", "source/COPYING", "source/Makefile", "source/hello.c"]
    assert action.inputs["headers"].action == action.inputs["kernelrelease"].action == "kernel:qemu-q35:guest"
    assert action.environment["AUTOLOAD"] == "hello"


def test_a_driver_of_a_source_has_the_whole_tree(checkout: Path) -> None:
    recipe = checkout / "recipes" / "drivers" / "hello.toml"
    edit(recipe, 'directory = "drivers/hello"', 'source = "linux-rt"\nsubdirectory = "samples/hello"')
    action = action_of(checkout)
    assert action.inputs["source"].action == "source:linux-rt"
    assert action.inputs["source"].unpack
    assert action.environment["SUBDIRECTORY"] == "samples/hello"
    assert list(action.files) == ["modulecheck.py"]


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ('"qemu-q35"', '"atari"', "hello.toml:2: there is no platform atari", "write one of: "),
        ('["qemu-q35"]', '["qemu-q35", "qemu-q35"]', "hello.toml:2: a platform is named twice", "once"),
        ('directory = "drivers/hello"', "", "has either a source or a directory", "exactly one"),
        ("directory =", 'source = "linux-rt"\ndirectory =', "has either a source or a directory", "exactly"),
        ('"drivers/hello"', '"../hello"', "hello.toml:4: directory: expected", ""),
        ('"drivers/hello"', '"drivers/hallo"', "hello.toml:4: drivers/hallo has no files", "from the root"),
        ('["COPYING"]', "[]", "hello.toml:6: licence_files: expected `array` of length >= 1", ""),
        ('["hello"]', '["hello world"]', "hello.toml:5: autoload.", ""),
        ("role =", 'make = ["X=$(shell id)"]\nrole =', "hello.toml:3: make.", ""),
        ('"guest"', '"board"', "hello.toml:3: role: invalid enum value", ""),
        (
            '"guest"',
            '"guest"\nroles = ["host"]',
            "hello.toml:3: a driver has either a role or roles",
            "one of them",
        ),
        ('role = "guest"', 'roles = ["host", "host"]', "hello.toml:3: a role is named twice", "once"),
        ("role =", 'programs = ["a/x", "b/x"]\nrole =', "hello.toml:3: two programs have one name", "rename"),
        ("role =", 'programs = ["../x"]\nrole =', "hello.toml:3: programs.", ""),
        (
            "role =",
            'program_target = "all"\nrole =',
            "hello.toml:3: there are no programs to make",
            "in programs",
        ),
        (
            "role =",
            'test = ["hallo"]\nrole =',
            "hello.toml:3: hallo is none of the driver's programs",
            "none;",
        ),
        ("role =", 'test_tool = "irqlat"\nrole =', "hello.toml:3: there is no test", "write the command"),
        ("role =", 'colour = "red"\nrole =', "hello.toml:3: unknown key colour", "known keys here: desc"),
    ],
)
def test_what_a_recipe_may_not_say(checkout: Path, old: str, new: str, message: str, hint: str) -> None:
    edit(checkout / "recipes" / "drivers" / "hello.toml", old, new)
    with pytest.raises(UserError) as caught:
        action_of(checkout)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_one_recipe_builds_for_both_kernels(checkout: Path) -> None:
    recipe = checkout / "recipes" / "drivers" / "hello.toml"
    edit(recipe, 'role = "guest"', 'roles = ["host", "guest"]')
    platforms = Project(ROOT).recipes.platforms
    found = drivers.builds(drivers.load(checkout, platforms), PLATFORM)
    made = {
        action.name: action
        for build in found
        for action in drivers.actions(checkout, PLATFORM, platforms[PLATFORM], build, {})
    }
    assert sorted(made) == ["driver:qemu-q35:hello-guest", "driver:qemu-q35:hello-host"]
    for role in ("host", "guest"):
        action = made[f"driver:qemu-q35:hello-{role}"]
        assert action.place == f"qemu-q35/driver/hello-{role}"
        assert action.inputs["headers"].action == f"kernel:qemu-q35:{role}"
        assert action.environment["DRIVER"] == "hello"
    assert drivers.builds(drivers.load(checkout, platforms), "canoe-pass") == ()
    # the host's alone, where nothing is said
    edit(recipe, 'roles = ["host", "guest"]', "")
    (build,) = drivers.builds(drivers.load(checkout, platforms), PLATFORM)
    assert (build.label, build.role) == ("hello", "host")


def test_two_drivers_do_not_make_the_same_package(checkout: Path) -> None:
    directory = checkout / "recipes" / "drivers"
    (directory / "hello-host.toml").write_text((directory / "hello.toml").read_text())
    edit(directory / "hello.toml", 'role = "guest"', 'roles = ["host", "guest"]')
    with pytest.raises(UserError, match="the drivers hello-host and hello would both make a hello-host"):
        action_of(checkout)


def test_a_drivers_name_is_part_of_a_packages(checkout: Path) -> None:
    directory = checkout / "recipes" / "drivers"
    (directory / "hello.toml").rename(directory / "Hello_World.toml")
    with pytest.raises(UserError, match="Hello_World does not fit into package names"):
        action_of(checkout)


def test_links_among_the_sources_are_refused(checkout: Path) -> None:
    (checkout / "drivers" / "hello" / "more.c").symlink_to("hello.c")
    with pytest.raises(UserError, match="drivers/hello/more.c is neither a file nor a directory"):
        action_of(checkout)


# The verdict on modules ------------------------------------------------------------------------

SYMVERS = (
    "0x00000000\t_printk\tvmlinux\tEXPORT_SYMBOL\t\n0x00000000\tother\tdrivers/other\tEXPORT_SYMBOL_GPL\t\n"
)
MODINFO = (
    "filename:       /x/hello.ko\0license=GPL\0alias=a\0alias=b\0depends=one,two\0vermagic=6.12.1-rt SMP\0"
    "parm:           spin_us:microseconds, x=1 (uint)\0"
)


def test_what_is_read_of_modules() -> None:
    assert modulecheck.exported([SYMVERS, ""]) == {"_printk", "other"}
    assert modulecheck.needed("_printk U         \nmaybe w         \n\n") == {"_printk"}
    assert modulecheck.information(MODINFO) == {
        "alias": ["a", "b"], "depends": ["one", "two"], "firmware": [],
        "parm": ["spin_us:microseconds, x=1 (uint)"],
        "license": "GPL", "vermagic": "6.12.1-rt SMP",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("told", "needs", "message"),
    [
        (
            {"vermagic": "6.12.2-rt SMP", "license": "GPL"},
            set(),
            "built for 6.12.2-rt, this one is 6.12.1-rt",
        ),
        ({"license": "GPL"}, set(), "built for no kernel, this one is 6.12.1-rt"),
        ({"vermagic": "6.12.1-rt SMP"}, set(), "has no MODULE_LICENSE"),
        (
            {"vermagic": "6.12.1-rt SMP", "license": "GPL"},
            {"gone"},
            "needs gone, which this kernel does not export",
        ),
    ],
)
def test_why_a_module_would_not_load(told: dict[str, str], needs: set[str], message: str) -> None:
    found = modulecheck.faults("hello.ko", told, frozenset(needs), frozenset({"_printk"}), "6.12.1-rt")
    assert found == [f"hello.ko: {message}"]


STATIC = "Elf file type is EXEC (Executable file)\n  LOAD  0x0\n"


@pytest.mark.parametrize(
    ("content", "headers", "fault"),
    [
        (b"#!/bin/sh\n", "", ""),
        (b"\x7fELF", STATIC, ""),
        (b"\x7fELF", STATIC.replace("EXEC (Executable", "DYN (Position-Independent Executable"), ""),
        (b"\x7fELF", STATIC + "  INTERP  0x318\n", "needs shared libraries: let its Makefile heed LDFLAGS"),
        (b"\x7fELF", STATIC.replace("EXEC", "REL"), "is an ELF file that cannot be run"),
        (b"", "", "is neither an ELF program nor a script"),
        (b"int main;", "", "is neither an ELF program nor a script"),
    ],
)
def test_programs_run_on_any_distribution(content: bytes, headers: str, fault: str) -> None:
    found = modulecheck.program_fault(content, headers)
    assert found.startswith(fault) and bool(found) == bool(fault)


def test_the_test_runs_what_is_installed() -> None:
    programs = [Path("/usr/libexec/virt-rt/drivers/6.12.1-rt/hello/greet")]
    assert modulecheck.test_of("command", [], programs) is None
    assert modulecheck.test_of("command", ["greet", "-n", "greet"], programs) == {
        "tool": "command",
        "argv": [str(programs[0]), "-n", "greet"],
    }
    assert modulecheck.test_of("irqlat", ["/bin/x"], programs) == {"tool": "irqlat", "argv": ["/bin/x"]}


def test_no_module_is_no_driver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "Module.symvers").write_text(SYMVERS)
    (tmp_path / "modules").mkdir()
    arguments = ["--release", "6.12.1-rt", "--driver", "hello", "--symbols", f"{tmp_path}/Module.symvers"]
    arguments += [
        "--root",
        str(tmp_path),
        "--modules",
        f"{tmp_path}/modules",
        "--document",
        f"{tmp_path}/driver.json",
    ]
    assert modulecheck.main(arguments) == 2
    assert "holds no module" in capsys.readouterr().err
    assert not (tmp_path / "driver.json").exists()


# As a user builds one --------------------------------------------------------------------------

STANDIN_STEP = """\
modules=/build/out/root/usr/lib/modules/$(cat /build/in/kernelrelease)/updates
mkdir -p "$modules"
cat /build/in/source/hello.c /build/in/headers/* >"$modules/hello.ko"
echo "$DRIVER $AUTOLOAD" >/build/out/driver.json
cp /build/in/source/COPYING /build/out/licence
cp /build/in/kernelrelease /build/out/kernelrelease
"""


@pytest.mark.engine
def test_a_driver_is_a_product_of_its_platform(tmp_path: Path) -> None:
    (tmp_path / "rootfs").mkdir()
    rootfs = tiny_rootfs(tmp_path / "rootfs")
    project = standin.make(tmp_path, rootfs)
    step = project.root / "recipes" / "steps" / "kernel.sh"
    if "headers" not in step.read_text():
        project.append(
            "recipes/steps/kernel.sh", "mkdir -p /build/out/headers\necho header >/build/out/headers/h\n"
        )
    write_driver(project.root)
    (project.root / "recipes" / "steps" / "driver.sh").write_text(STANDIN_STEP)
    done = project.doit("driver:qemu-q35:hello")
    assert done.status == 0, done.err
    product = project.root / "artifacts" / "qemu-q35" / "driver" / "hello"
    release = (product / "kernelrelease").read_text().strip()
    assert (
        "int __init hello_init" in (product / f"root/usr/lib/modules/{release}/updates/hello.ko").read_text()
    )
    assert project.plan("driver:qemu-q35:hello")["driver:qemu-q35:hello"] == "current"
    project.append("drivers/hello/hello.c", "/* more */\n")
    assert project.plan("driver:qemu-q35:hello")["driver:qemu-q35:hello"] == "build"
    assert project.plan("kernel:qemu-q35:guest")["kernel:qemu-q35:guest"] == "current"
    assert "driver:qemu-q35:hello" in project.plan("platform:qemu-q35")


# Against real headers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project() -> Iterator[Project]:
    """The real project, with its real cache."""
    project = Project(ROOT)
    kernel = kernel_name(PLATFORM, "guest")
    for needed in (kernel, builder_name(BUILDER)):
        if project.store.lookup(project.graph.keys[needed]) is None:
            pytest.skip(f"{needed} is not in the store: `doit {kernel}` builds it")
    yield project
    project.store.close()


Build = Callable[[Path], Path]


@pytest.fixture
def build(project: Project, tmp_path: Path) -> Build:
    """Builds the driver of a checkout, for real, and gives its outputs laid out."""

    def build(root: Path) -> Path:
        action = action_of(root)
        needed = project.graph.closure(action.upstreams)
        graph = Graph([*(project.graph[name] for name in needed), action])
        executor = Executor(graph, project.store, Engine(), Recorder(), tmp_path / "log")
        result = executor.repeat(action.name)
        for name, blob in result.items():
            target = tmp_path / "made" / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(project.store.path(blob.digest), target)
        return tmp_path / "made"

    return build


@pytest.mark.engine
@pytest.mark.slow
def test_a_module_is_built_for_exactly_that_kernel(checkout: Path, project: Project, build: Build) -> None:
    # a Makefile may run a program that comes with the sources
    sources = checkout / "drivers" / "hello"
    (sources / "word").write_text("#!/bin/sh\necho good day\n")
    (sources / "word").chmod(0o755)
    edit(sources / "Makefile", "obj-m", "ccflags-y := -DWORD='\"$(shell $(src)/word)\"'\nobj-m")
    edit(sources / "hello.c", '"hello\\n"', 'WORD "\\n"')
    made = build(checkout)
    subprocess.run(["tar", "-xf", made / "root", "-C", made], check=True)
    release = (made / "kernelrelease").read_text().strip()
    assert release.endswith(f"-rt-virt-guest-{project.graph.keys[kernel_name(PLATFORM, 'guest')][:12]}")
    module = made / f"usr/lib/modules/{release}/updates/hello.ko"
    assert f"vermagic={release} SMP preempt_rt".encode() in module.read_bytes()
    assert b"/build/" not in module.read_bytes()
    assert b"good day" in module.read_bytes()
    document = json.loads((made / "driver.json").read_text())
    assert document["kernelrelease"] == release
    assert document["autoload"] == ["hello"]
    assert document["modules"] == [
        {
            "name": "hello", "file": "hello.ko", "alias": ["platform:hello"], "depends": [], "firmware": [], "parm": [],
            "license": "GPL", "description": "says hello", "vermagic": document["modules"][0]["vermagic"],
        }
    ]  # fmt: skip
    assert (made / "licence").read_text() == "Copy it as you like.\n"
    units = made / "usr/lib/systemd/system"
    unit = units / f"virt-rt-driver-hello-{release}.service"
    assert f"ConditionKernelVersion={release}\n" in unit.read_text()
    assert "ExecStart=/usr/sbin/modprobe --all hello\n" in unit.read_text()
    assert (units / "sysinit.target.wants" / unit.name).resolve() == unit.resolve()
    before = {path.name: path.read_bytes() for path in made.iterdir() if path.is_file()}
    build(checkout)
    assert before == {path.name: path.read_bytes() for path in made.iterdir() if path.is_file()}


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "old", "new", "told"),
    [
        ("hello.c", "pr_info(", "no_such_function(", "error: implicit declaration of function"),
        (
            "hello.c",
            'pr_info("hello\\n")',
            "extern void no_such(void); no_such()",
            'modpost: "no_such" [/build/work/driver/hello.ko] undefined!',
        ),
        ("hello.c", 'MODULE_LICENSE("GPL");', "", "missing MODULE_LICENSE()"),
        ("Makefile", "obj-m += hello.o", "all:", "make left no module"),
        ("COPYING", "Copy it as you like.\n", "", "its sources have no COPYING, or an empty one"),
    ],
)
def test_what_no_kernel_would_load_is_refused(
    checkout: Path, build: Build, path: str, old: str, new: str, told: str
) -> None:
    edit(checkout / "drivers" / "hello" / path, old, new)
    with pytest.raises(StepFailed) as caught:
        build(checkout)
    assert any(told in line for line in caught.value.tail), caught.value.tail
    assert caught.value.exit_status == 2


PROGRAM = """\
#include <stdio.h>

int main(void)
{
	puts(WORD);
	return 0;
}
"""


@pytest.fixture
def with_program(checkout: Path) -> Path:
    """The driver with a program in a directory of its own."""
    tools = checkout / "drivers" / "hello" / "tools"
    tools.mkdir()
    (tools / "greet.c").write_text(PROGRAM)
    (tools / "Makefile").write_text("CFLAGS += -DWORD='\"good day\"'\nall: greet\n")
    edit(
        checkout / "recipes" / "drivers" / "hello.toml",
        "role =",
        'programs = ["tools/greet"]\ntest = ["greet", "two words"]\nrole =',
    )
    return checkout


@pytest.mark.engine
@pytest.mark.slow
def test_a_driver_brings_its_programs_and_its_test(with_program: Path, build: Build) -> None:
    made = build(with_program)
    subprocess.run(["tar", "-xf", made / "root", "-C", made], check=True)
    release = (made / "kernelrelease").read_text().strip()
    place = f"/usr/libexec/virt-rt/drivers/{release}/hello/greet"
    done = subprocess.run([f"{made}{place}"], capture_output=True, text=True, check=True, env={})
    assert done.stdout == "good day\n"
    document = json.loads((made / "driver.json").read_text())
    assert document["programs"] == [place]
    assert document["test"] == {"tool": "command", "argv": [place, "two words"]}
    assert document["signer"] is None


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "old", "new", "told"),
    [
        (
            "drivers/hello/tools/greet.c",
            "puts(WORD)",
            "no_such(WORD)",
            "driver: make did not make tools/greet",
        ),
        (
            "drivers/hello/tools/Makefile",
            "CFLAGS",
            "override LDFLAGS :=\nCFLAGS",
            "greet needs shared libraries",
        ),
        ("recipes/drivers/hello.toml", "role =", 'program_target = "no"\nrole =', "must have the target no"),
        (
            "recipes/drivers/hello.toml",
            "tools/greet",
            "tool/greet",
            "there is no directory tool in its sources",
        ),
    ],
)
def test_programs_that_would_not_run_are_refused(
    with_program: Path, build: Build, path: str, old: str, new: str, told: str
) -> None:
    edit(with_program / path, old, new)
    with pytest.raises(StepFailed) as caught:
        build(with_program)
    assert any(told in line for line in caught.value.tail), caught.value.tail
    assert caught.value.exit_status == 2


@pytest.mark.engine
@pytest.mark.slow
def test_a_makefile_cannot_wave_an_unresolved_symbol_through(checkout: Path, build: Build) -> None:
    edit(checkout / "drivers" / "hello" / "hello.c", "pr_info(", "extern void no_such(char *); no_such(")
    edit(
        checkout / "recipes" / "drivers" / "hello.toml", "role =", 'make = ["KBUILD_MODPOST_WARN=1"]\nrole ='
    )
    with pytest.raises(StepFailed) as caught:
        build(checkout)
    assert any(
        "hello.ko: needs no_such, which this kernel does not export" in line for line in caught.value.tail
    )


@pytest.mark.engine
@pytest.mark.slow
def test_a_recipe_that_does_not_fit_the_sources_is_refused(checkout: Path, build: Build) -> None:
    recipe = checkout / "recipes" / "drivers" / "hello.toml"
    edit(recipe, 'autoload = ["hello"]', 'autoload = ["hallo"]')
    with pytest.raises(StepFailed) as caught:
        build(checkout)
    assert any("autoload names hallo, the driver has hello" in line for line in caught.value.tail)
    edit(recipe, 'autoload = ["hallo"]', 'subdirectory = "src"')
    with pytest.raises(StepFailed) as caught:
        build(checkout)
    assert any("there is no Makefile and no Kbuild in src" in line for line in caught.value.tail)
