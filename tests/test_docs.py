"""What the documentation shows is what happens.

Samples marked `console` are typed into a stand-in project of which everything is made, page by page and in
order; TOML and kernel-configuration samples are read by the code that reads the real files; every path, link,
module, command and message that a page names is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec
import pytest
from doit.doit_cmd import DoitMain

from pipeline import (
    bootproof,
    contract,
    drivers,
    gate,
    recipefile,
    recipes,
    reference,
    sourcerecipe,
    topology,
)
from pipeline.cpuplan import guest_plan
from pipeline.helpcommands import HelpFace
from pipeline.project import Project
from tests import standin
from tests.standin import Standin
from tests.tiny import tiny_rootfs

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
LANGUAGES = {"console", "toml", "config", "sh", "text", "json"}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
#: Times, digests and sizes differ from run to run; a page shows some of them as they once were.
_STEADY = (
    (re.compile(r"\b\d+ (?:h|min|s)(?: \d+ (?:min|s))?\b"), "N s"),
    (re.compile(r"\b[0-9a-f]{40,64}\b"), "DIGEST"),
    (re.compile(r"\b\d{8}T\d{6}\b"), "TIME"),
    (re.compile(r'"expected_seconds": \d+\.\d+'), '"expected_seconds": N'),
    (re.compile(r"\b\d+\.\d MB\b"), "N MB"),
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page; `line` is that of its first line of text."""

    language: str
    text: str
    line: int


def blocks(page: Path, language: str) -> list[Block]:
    """The page's fenced blocks in that language."""
    text = page.read_text()
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start(2)) + 1)
        for found in _FENCE.finditer(text)
        if found[1] == language
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def with_block(language: str) -> list[str]:
    """Names of the pages that have such a block."""
    return [name for name, page in zip(NAMES, PAGES, strict=True) if blocks(page, language)]


# Samples that are typed ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Standin:
    """A stand-in project under git, of which everything is made."""
    directory = tmp_path_factory.mktemp("documented")
    (directory / "rootfs").mkdir()
    made = standin.make(directory, tiny_rootfs(directory / "rootfs"))
    shutil.copy(ROOT / ".gitignore", made.root)
    standin.git(made.root, "init", "-q")
    standin.git(made.root, "add", ".")
    standin.git(made.root, "commit", "-qm", "a checkout")
    assert made.doit().status == 0
    linux = directory / "linux"
    for number in range(1, 13):
        (linux / "main.c").write_text(f"int linux{number};\n" + "SYNTAX\n" * (number >= 7))
        standin.git(linux, "commit", "-qam", f"change {number}")
    return made


@pytest.fixture
def project(template: Standin, tmp_path: Path) -> Standin:
    """A copy for one page, its cache and its artifacts included, and beside it the user's own clone of linux."""
    standin.make_repository(tmp_path / "linux", "mine", main="int linux;\n")
    shutil.copytree(template.cache, tmp_path / "cache")
    shutil.copytree(template.root, tmp_path / "checkout", symlinks=True)
    return Standin(tmp_path / "checkout", tmp_path / "cache")


def steady(text: str) -> str:
    """The text without what differs from run to run."""
    for pattern, placeholder in _STEADY:
        text = pattern.sub(placeholder, text)
    return text


def shown(text: str) -> re.Pattern[str]:
    """What a page shows, as a pattern: a line `...` is any number of lines, elsewhere any text of a line."""
    parts = [
        r"(?:.*\n)*?" if line == "..." else ".*".join(map(re.escape, line.split("..."))) + r"\n"
        for line in steady(text).splitlines()
    ]
    return re.compile("".join(parts))


class Terminal:
    """Types commands into one checkout; `doit` is this interpreter's."""

    def __init__(self, project: Standin, tools: Path) -> None:
        """`tools` gets the `doit` command."""
        tools.mkdir()
        doit = tools / "doit"
        doit.write_text(f'#!/bin/sh\nexec {sys.executable} -m doit "$@"\n')
        doit.chmod(0o755)
        self._project = project
        self._environment = project.environment | {"PATH": f"{tools}:{os.environ['PATH']}"}
        self._status = 0

    def type(self, command: str) -> str:
        """What the command prints, as a user with a checkout in `/home/user/virt-rt` would see it."""
        done = subprocess.run(
            ["bash", "-c", f"(exit {self._status})\n{command}"],
            cwd=self._project.root,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        self._status = done.returncode
        # The stand-in's tiny builder has no locales, of which bash complains.
        out = "".join(line for line in done.stdout.splitlines(keepends=True) if " setlocale: " not in line)
        linux = self._project.root.parent / "linux"
        for path, name in (
            (self._project.root, "virt-rt"),
            (self._project.cache, ".cache"),
            (linux, "linux"),
        ):
            out = out.replace(str(path), f"/home/user/{name}")
        return out


@pytest.mark.engine
@pytest.mark.parametrize("name", with_block("console"))
def test_a_sample_shows_what_happens(name: str, project: Standin, tmp_path: Path) -> None:
    terminal = Terminal(project, tmp_path / "tools")
    for block in blocks(ROOT / name, "console"):
        _, *commands = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
        for sample in commands:
            command, _, expected = sample.partition("\n")
            printed = terminal.type(command)
            where = f"{name}:{block.line}: $ {command}"
            assert shown(expected).fullmatch(steady(printed)), f"{where}\n{printed}"


@pytest.mark.parametrize("name", NAMES)
def test_every_block_says_what_it_is(name: str) -> None:
    text = (ROOT / name).read_text()
    assert {found[1] for found in _FENCE.finditer(text)} <= LANGUAGES
    assert text.count("\n```") == 2 * len(_FENCE.findall(text))
    for block in blocks(ROOT / name, "console"):
        assert block.text.startswith("$ "), f"{name}:{block.line}: a console block begins with a command"


def test_there_are_samples_to_type() -> None:
    assert len(with_block("console")) >= 5


# Samples that are read -------------------------------------------------------------------------


def read_sources(text: str, scratch: Path) -> None:
    """Refuse what is not a sources.toml."""
    path = scratch / "sources.toml"
    path.write_text(text)
    sourcerecipe.load_recipes(path)


def read_guest(text: str, scratch: Path) -> None:
    """Refuse what is no guest, or one whose plan cannot work."""
    guest = msgspec.convert(tomllib.loads(text), recipes.Guest)
    guest_plan(guest.vcpus, guest.housekeeping_vcpus)


def reader_of(kind: type[msgspec.Struct]) -> Callable[[str, Path], None]:
    """A reader of one kind of recipe."""

    def read(text: str, scratch: Path) -> None:
        msgspec.convert(tomllib.loads(text), kind)

    return read


def heir_of(directory: str, kind: type[msgspec.Struct]) -> Callable[[str, Path], None]:
    """A reader of one kind of recipe that may extend one of ours."""

    def read(text: str, scratch: Path) -> None:
        shutil.copytree(ROOT / "recipes" / directory, scratch / directory, dirs_exist_ok=True)
        sample = scratch / directory / "sample.toml"
        sample.write_text(text)
        recipefile.read(sample, kind, scratch)

    return read


def read_topology(text: str, scratch: Path) -> None:
    """Refuse what is no topology, or one that contradicts itself."""
    msgspec.convert(tomllib.loads(text), topology.Topology).check()


def read_contract(text: str, scratch: Path) -> None:
    """Refuse what is not a contract."""
    contract.parse_contract(text, "sample")


READERS: dict[str, Callable[[str, Path], None]] = {
    "recipes/sources.toml": read_sources,
    "recipes/guests/*.toml": read_guest,
    "recipes/platforms/*.toml": heir_of("platforms", recipes.Platform),
    "recipes/drivers/*.toml": reader_of(drivers.Driver),
    "recipes/builders/*.toml": reader_of(recipes.Builder),
    "recipes/topologies/*.toml": read_topology,
    "kernel-configs/common/contract.toml": read_contract,
}


@pytest.mark.parametrize("name", with_block("toml"))
def test_a_recipe_in_a_sample_is_one(name: str, tmp_path: Path) -> None:
    for block in blocks(ROOT / name, "toml"):
        path = block.text.partition("\n")[0].removeprefix("# ")
        readers = [read for pattern, read in READERS.items() if PurePosixPath(path).match(pattern)]
        assert readers, f"{name}:{block.line}: the first line of a TOML sample names its file: # recipes/..."
        readers[0](block.text, tmp_path)


@pytest.mark.parametrize("name", with_block("config"))
def test_a_fragment_in_a_sample_is_one(name: str) -> None:
    for block in blocks(ROOT / name, "config"):
        assert contract.parse_fragment(block.text, f"{name}:{block.line}")


# What pages name -------------------------------------------------------------------------------


def repository_paths(page: Path) -> set[str]:
    """Words in backticks that look like paths of the repository; those with a placeholder are left out."""
    tops = {path.name for path in ROOT.iterdir()} - {"artifacts", ".venv", ".git"}
    words = {word.removesuffix("/") for code in _CODE.findall(prose(page)) for word in code.split()}
    return {
        word
        for word in words
        if word.partition("/")[0] in tops and not re.search(r"[<>{}$:=]|NAME|NNNN|\.\.\.", word)
    }


@pytest.mark.parametrize("name", NAMES)
def test_paths_and_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    dead = [path for path in repository_paths(page) if not any(ROOT.glob(path))]
    for link in _LINK.findall(prose(page)):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = page.parent / target if target else page
        if not file.exists():
            dead.append(link)
        elif anchor and anchor not in anchors(file):
            dead.append(link)
    assert dead == []


def anchors(page: Path) -> set[str]:
    """The names under which headings of a page can be linked to."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, pending = set(), [ROOT / "README.md"]
    while pending:
        page = pending.pop()
        if page in reached:
            continue
        reached.add(page)
        for link in _LINK.findall(prose(page)):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.is_file():
                pending.append(target)
    assert set(PAGES) - reached == set()


def test_every_module_has_its_place_in_the_architecture() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    modules = [path.stem for path in (ROOT / "pipeline").glob("*.py") if path.stem != "__init__"]
    assert [module for module in sorted(modules) if f"`{module}`" not in page] == []


def test_every_command_is_described() -> None:
    page = (ROOT / "docs/commands.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    commands = project["tool"]["doit"]["plugins"]["command"]
    assert [name for name in commands if not re.search(rf"^### `doit {name}\b", page, re.MULTILINE)] == []


def test_the_reference_is_what_commands_and_recipes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """`doit reference` writes it again."""
    monkeypatch.chdir(ROOT)  # doit looks there for its table of commands
    commands = HelpFace(cmds=DoitMain().get_cmds()).described()
    pages = reference.pages(commands)
    assert {path for path, text in pages.items() if (ROOT / path).read_text() != text} == set()
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/reference").iterdir()} == set(pages)
    for name, kind in commands.items():
        assert f"\n## {name}\n" in pages["docs/reference/command-line.md"]
        assert all(
            f"`{flag}" in pages["docs/reference/command-line.md"] for o in kind.options for flag in o.flags
        )


def test_every_kind_of_task_is_described() -> None:
    page = (ROOT / "docs/graph-and-keys.md").read_text()
    described = re.findall(r"^\| `([\w-]+):\S+` \|", page, re.MULTILINE)
    graph = Project(ROOT).graph
    assert sorted(described) == sorted({action.name.partition(":")[0] for action in graph})
    examples = re.findall(r"^\| `([\w-]+:\S+)` \|", page, re.MULTILINE)
    assert [name for name in examples if name not in graph] == []


def test_every_builder_source_and_guest_is_described() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    asked = recipes.load(ROOT)
    names = [
        *asked.builders,
        *asked.platforms,
        *asked.guests,
        *sourcerecipe.load_recipes(ROOT / "recipes/sources.toml"),
    ]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_finding_of_the_boot_proof_is_described() -> None:
    body = b"none 0 bm9uZQ==\n"
    answers = body + f"end {hashlib.sha256(body).hexdigest()}\n".encode()
    expected = gate.Expectations((1,), (0,), "6.12", (), duration_s=1, interval_us=1000)
    run = bootproof.Run(answers, ended="", messages="", to_login=None, total=1.0)
    found = [finding.name for finding in bootproof.judge(run, expected)]
    page = (ROOT / "docs/boot-proof.md").read_text()
    described = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, re.MULTILINE)
    assert [name for cell in described for name in _CODE.findall(cell)] == found


def test_every_variable_of_the_launch_scripts_is_described() -> None:
    scripts = "".join(path.read_text() for path in (ROOT / "recipes/templates").glob("kvmqemu*.j2"))
    variables = set(re.findall(r"^([A-Z_]+)=\$\{\1", scripts, re.MULTILINE))
    page = (ROOT / "docs/launch.md").read_text()
    cells = re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE)
    assert {name for cell in cells for name in _CODE.findall(cell)} == variables


def test_every_key_of_a_guest_and_of_the_contract_is_described() -> None:
    def missing(page: str, keys: list[str]) -> list[str]:
        text = prose(ROOT / page) + prose(ROOT / "docs/cpu-plan.md")
        return [key for key in keys if f"`{key}`" not in text]

    guest = [field.name for field in msgspec.structs.fields(recipes.Guest)]
    guest = [key for key in guest if key not in ("extends", "description", "platform", "image", "cmdline")]
    guest += [f"image.{f.name}" for f in msgspec.structs.fields(recipes.GuestImage) if f.name != "suite"]
    guest += [f"cmdline.{field.name}" for field in msgspec.structs.fields(recipes.GuestCmdline)]
    assert missing("docs/guest-image.md", guest) == []
    rule = contract.parse_contract('[[required]]\nsymbol = "X"\nscope = "both"\nwhy = "y"\n', "")[0]
    keys = [
        field.name for field in dataclasses.fields(rule) if field.name not in ("allowed", "roles", "where")
    ]
    assert missing("docs/kernel-config.md", [*keys, "value", "scope"]) == []


def test_a_message_that_has_a_remedy_is_one_that_we_print() -> None:
    """Headings of the page are messages, `...` for what varies; each fixed part stands in some source."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    files = [path for top in ("pipeline", "scripts", "recipes") for path in (ROOT / top).rglob("*")]
    printers = [
        path for path in files if path.suffix in (".py", ".sh", ".j2") or path.parent.name == "scripts"
    ]
    source = "\n".join(path.read_text() for path in printers if path.is_file())
    headings = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(headings) > 20
    parts = [part.strip() for heading in headings for part in heading.split("...")]
    assert [part for part in parts if part not in source] == []
