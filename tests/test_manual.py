"""Manual pages: their macros are right, and they say what the programs say of themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import checktool, launch, packagerecipe, packages, tuning
from pipeline.packagetext import fill
from pipeline.project import Project

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "recipes" / "packages" / "man").iterdir())
GUEST = "rt-guest"


@pytest.fixture(scope="module")
def project() -> Project:
    return Project(ROOT)


@pytest.fixture
def page(project: Project, tmp_path: Path) -> Callable[[str], Path]:
    """A page as it is installed."""
    guest = project.recipes.guests[GUEST]
    platform = project.recipes.platforms[guest.platform]
    variables = packages.platform_variables(guest.platform, platform) | packages.guest_variables(GUEST, guest)

    def filled(name: str) -> Path:
        target = tmp_path / name
        target.write_text(fill((ROOT / "recipes" / "packages" / "man" / name).read_text(), variables))
        return target

    return filled


def shown(page: Path) -> str:
    """A page as a terminal shows it, each run of blanks one."""
    done = subprocess.run(["mandoc", "-T", "ascii", str(page)], capture_output=True, text=True, check=True)
    return " ".join(re.sub(r".\x08", "", done.stdout).split())


def options(text: str) -> set[str]:
    """Long options and what stands for the rest, in a usage text or a page."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed: `make test` installs it")
@pytest.mark.parametrize("name", [page.name for page in PAGES])
def test_mandoc_has_nothing_to_warn_of(page: Callable[[str], Path], name: str) -> None:
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", str(page(name))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed: `make test` installs man-db")
@pytest.mark.parametrize("name", [page.name for page in PAGES])
def test_groff_has_nothing_to_warn_of(page: Callable[[str], Path], name: str) -> None:
    """As lintian asks it."""
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(page(name))],
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANROFFSEQ": "", "MANWIDTH": "80"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_each_page_is_in_a_package() -> None:
    installed = {
        content.file: content.to
        for recipe in packagerecipe.load(ROOT).values()
        for content in recipe.contents
        if content.file and content.file.startswith("man/")
    }
    assert installed == {
        "man/kvmqemu.8": "/usr/share/man/man8/kvmqemu-{{ guest }}.8",
        "man/virt-rt-check.1": "/usr/share/man/man1/virt-rt-check.1",
        "man/virt-rt-measure.1": "/usr/share/man/man1/virt-rt-measure.1",
        "man/virt-rt-tuning.8": "/usr/share/man/man8/virt-rt-tuning.8",
    }
    assert {page.name for page in PAGES} == {file.removeprefix("man/") for file in installed}


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed: `make test` installs it")
def test_virt_rt_check_has_the_options_of_its_page(page: Callable[[str], Path], tmp_path: Path) -> None:
    tool = tmp_path / "virt-rt-check"
    tool.write_bytes(checktool.CHECK.bundle(ROOT))

    def told(*arguments: str) -> str:
        command = [sys.executable, str(tool), *arguments, "--help"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    text = shown(page("virt-rt-check.1"))
    assert options(text) == options(told() + told("preflight") + told("audit"))
    for command in re.findall(r"^    (\w+)\s", told(), re.MULTILINE):
        assert f"virt-rt-check {command} [" in text
    for status in ("0", "1", "2"):
        assert re.search(rf"EXIT STATUS.* {status} ", text)


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed: `make test` installs it")
def test_virt_rt_measure_has_the_commands_and_options_of_its_page(
    page: Callable[[str], Path], tmp_path: Path
) -> None:
    tool = tmp_path / "virt-rt-measure"
    tool.write_bytes(checktool.MEASURE.bundle(ROOT))

    def told(*arguments: str) -> str:
        command = [sys.executable, str(tool), *arguments, "--help"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def commands(of: str) -> list[str]:
        return re.findall(r"^    (\w+)\s", of, re.MULTILINE)

    words = [[command] for command in commands(told()) if command != "trace"]
    words += [["trace", command] for command in commands(told("trace"))]
    assert len(words) >= 9
    text = shown(page("virt-rt-measure.1"))
    assert options(text) == set().union(*(options(told(*each)) for each in words))
    for each in words:
        assert f"virt-rt-measure {' '.join(each)} " in text
    for status in ("0", "1", "2", "3", "4"):
        assert re.search(rf"EXIT STATUS.* {status} ", text)


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed: `make test` installs it")
def test_virt_rt_tuning_has_the_commands_of_its_page(page: Callable[[str], Path]) -> None:
    template = (ROOT / tuning.TEMPLATES / "usr/sbin/virt-rt-tuning.j2").read_text()
    usage = re.search(r"^# usage: virt-rt-tuning (.*)$", template, re.MULTILINE)
    assert usage is not None
    text = shown(page("virt-rt-tuning.8"))
    for command in usage[1].split(" | "):
        assert f"virt-rt-tuning {command}" in text
    assert options(text) == options(usage[1])


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed: `make test` installs it")
def test_launch_scripts_have_the_options_and_variables_of_their_page(
    project: Project, page: Callable[[str], Path], tmp_path: Path
) -> None:
    text = shown(page("kvmqemu.8"))
    named = re.findall(r"^\.It Ev (.*)$", page("kvmqemu.8").read_text(), re.MULTILINE)
    documented = {name for line in named for name in line.split(" , ")}
    offered: set[str] = set()
    recipes = project.recipes
    for name, guest in recipes.guests.items():
        platform = guest.platform
        variables = launch.variables_of(
            name, recipes.platforms[platform], recipes.guests_of(platform), recipes.plans[platform]
        )
        # variables for devices are offered where the recipe names some
        variables |= {"devices": ["0000:03:00.0"], "vf_counts": []}
        templates = {
            path.name: path.read_text() for path in (ROOT / "recipes" / "templates").glob("kvmqemu*.j2")
        }
        for script in launch.SCRIPTS:
            (tmp_path / script).write_text(launch.render(script, variables, templates))
            told = subprocess.run(
                ["bash", str(tmp_path / script), "--help"], capture_output=True, text=True, check=True
            ).stdout
            usage = re.search(r"usage: .*", told)
            assert usage is not None
            assert options(usage[0]) == options(text)
            assert f"{script} [--dry-run | --cleanup | --help] [-- ARGUMENTS FOR QEMU]" in text
            offered |= set(re.findall(r"^([A-Z][A-Z_]+)=\$\{\1", told, re.MULTILINE))
    assert offered == documented
