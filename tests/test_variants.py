"""Variants: recipes that extend others, kernels of two branches, and the table that shows what is shared."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from pipeline import locks, matrix
from pipeline.errors import UserError
from pipeline.inheritance import merged, origin
from pipeline.lockcommands import requests_of
from pipeline.project import Project
from pipeline.recipefile import place_of, read
from pipeline.recipes import Platform
from pipeline.signing import PARAMETER
from tests import standin
from tests.standin import Standin
from tests.tiny import tiny_rootfs

ROOT = Path(__file__).resolve().parent.parent
PROJECT = Project(ROOT)
BASE, VARIANT = "canoe-pass", "canoe-pass-single-socket"

BOARD = """\
description = "a board"
arch = "amd64"
topology = "t"
choices = ["one"]

[kernel]
source = "linux"
host = ["common/a", "common/b"]
guest = ["common/a"]

[qemu]
source = "qemu"
targets = ["x86_64-softmmu"]

[[bios]]
setting = "s"
value = "v"
reason = "r"
"""


def write(directory: Path, **recipes: str) -> Path:
    """Recipes by name; the path of the last one."""
    path = directory
    for name, text in recipes.items():
        path = directory / f"{name}.toml"
        path.write_text(text)
    return path


# Merging -----------------------------------------------------------------------------------------------


def test_tables_merge_and_everything_else_takes_the_others_place(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        board=BOARD,
        variant='extends = "board"\ntopology = "other"\nchoices = ["two"]\n[kernel]\nguest = ["g"]\n',
    )
    platform = read(path, Platform, tmp_path)
    assert (platform.extends, platform.description, platform.topology) == ("board", "a board", "other")
    assert platform.choices == ("two",)
    assert (platform.kernel.source, platform.kernel.host, platform.kernel.guest) == (
        "linux",
        ("common/a", "common/b"),
        ("g",),
    )


def test_a_key_that_ends_in_add_appends(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        board=BOARD,
        variant='extends = "board"\nchoices_add = ["two"]\n'
        '[[bios_add]]\nsetting = "s2"\nvalue = "v2"\nreason = "r2"\n[kernel]\nhost_add = ["variant/host"]\n',
        # what replaces a list comes first, wherever it is written
        third='extends = "variant"\n[kernel]\nhost_add = ["third/host"]\nguest_add = ["third/guest"]\nguest = ["g"]\n',
    )
    platform = read(path, Platform, tmp_path)
    assert platform.choices == ("one", "two")
    assert [setting.setting for setting in platform.bios] == ["s", "s2"]
    assert platform.kernel.host == ("common/a", "common/b", "variant/host", "third/host")
    assert platform.kernel.guest == ("g", "third/guest")


def test_a_list_that_was_not_there_may_be_added_to(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        board=BOARD.replace('choices = ["one"]\n', ""),
        variant='extends = "board"\nchoices_add = ["two"]\n',
    )
    assert read(path, Platform, tmp_path).choices == ("two",)


def test_what_is_left_out_is_as_if_it_had_not_been_written(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        board=BOARD,
        variant='extends = "board"\nwithout = ["bios", "choices"]\nchoices_add = ["x"]\n',
    )
    platform = read(path, Platform, tmp_path)
    assert (platform.bios, platform.choices) == ((), ("x",))


def test_what_is_merged_is_the_files_own_afterwards(tmp_path: Path) -> None:
    """A list that was added to is not that of the recipe it came from."""
    path = write(tmp_path, board=BOARD, variant='extends = "board"\nchoices_add = ["two"]\n')
    merged(path, tmp_path)
    assert merged(path, tmp_path).data["choices"] == ["one", "two"]
    assert merged(tmp_path / "board.toml", tmp_path).data["choices"] == ["one"]


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        (("topology",), "variant.toml:2"),
        (("arch",), "board.toml:2: in variant"),
        (("kernel", "host", "1"), "board.toml:8: in variant"),
        (("kernel", "host", "2"), "variant.toml:5"),
        (("kernel", "guest"), "board.toml:9: in variant"),
        (("bios", "0", "value"), "board.toml:17: in variant"),
        (("bios", "1", "value"), "variant.toml:8"),
        (("limits",), "variant.toml:1"),
    ],
)
def test_every_value_is_found_where_it_stands(tmp_path: Path, keys: tuple[str, ...], place: str) -> None:
    path = write(
        tmp_path,
        board=BOARD,
        variant='extends = "board"\ntopology = "other"\n[kernel]\nhost_add = [\n  "c",\n]\n'
        '[[bios_add]]\nvalue = "v"\nsetting = "s"\nreason = "r"\n',
    )
    assert place_of(path, tmp_path, *keys) == place


# Refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('extends = "none"\n', "variant.toml:1: extends: there is no none", "write one of: bad, board, third"),
        ("arch = 1\nextends = 2\n", "variant.toml:2: extends: expected a name, got 2", "write one of: bad, board"),
        ('extends = "variant"\n', "variant.toml:1: extends: variant extends variant", "have one of them"),
        (
            '\nextends = "third"\n',
            "third.toml:1: extends: variant extends third extends variant",
            "have one of them extend none",
        ),
        ('without = ["bios"]\n', "variant.toml:1: without: this recipe extends none", "name one"),
        ('extends = "board"\nwithout = "bios"\n', "variant.toml:2: without: expected a list of keys", "without ="),
        (
            'extends = "board"\nwithout = [\n "bios",\n "kernel.gast",\n]\n',
            "variant.toml:4: without: board has no kernel.gast",
            "take it out of the list",
        ),
        (
            'extends = "board"\n[kernel]\nsource_add = ["x"]\n',
            "variant.toml:3: kernel.source_add: kernel.source is no list",
            "write it as source",
        ),
        ('extends = "board"\nchoices_add = "x"\n', "variant.toml:2: choices_add: choices is no list", "write it"),
        ('extends = "board"\n[kernel]\nhost_add = [1]\n', "variant.toml:3: kernel.host.2: expected `str`", ""),
        ('extends = "board"\n[kernel]\nhots = ["x"]\n', "variant.toml:3: unknown key hots", "known keys here: source"),
        ('extends = "board"\nwithout = ["qemu"]\n', "variant.toml:1: recipe: object missing required field `qemu`", ""),
        ('extends = "bad"\n', "bad.toml:2: in variant: arch: invalid enum value 'vax'", ""),
        ('choices_add = ["x"]\n' + BOARD, "variant.toml:1: unknown key choices_add", "known keys"),
    ],
)  # fmt: skip
def test_a_bad_variant_is_refused_with_its_place(tmp_path: Path, text: str, message: str, hint: str) -> None:
    path = write(
        tmp_path,
        board=BOARD,
        third='extends = "variant"\n',
        bad=BOARD.replace('"amd64"', '"vax"'),
        variant=text,
    )
    with pytest.raises(UserError) as caught:
        read(path, Platform, tmp_path)
    assert caught.value.message.startswith(message)
    assert caught.value.hint.startswith(hint)
    assert caught.value.exit_status == 2


def test_a_place_is_told_also_where_the_chain_is_broken(tmp_path: Path) -> None:
    path = write(tmp_path, variant='extends = "gone"\narch = 1\n')
    assert origin(path, tmp_path, ("arch",)) == (path, ("arch",))


# The recipes that there are ------------------------------------------------------------------------------


def test_a_variant_shares_what_it_does_not_change() -> None:
    keys = PROJECT.graph.keys

    def shared(of: str, guest: str) -> bool:
        name = of.replace(BASE, VARIANT).replace("canoe-guest", guest)
        return keys[of] == keys[name]

    same = (
        "kernel:canoe-pass:host",
        "kernel:canoe-pass:guest",
        "qemu:canoe-pass",
        "packages:guest/canoe-guest",
    )
    assert [name for name in same if not shared(name, "canoe-single-guest")] == []
    other = ("tuning:canoe-pass", "rootfs:canoe-guest", "release:canoe-pass")
    assert [name for name in other if shared(name, "canoe-single-guest")] == []


def test_a_guests_packages_are_locked_once_as_long_as_it_asks_for_the_same() -> None:
    asked = PROJECT.recipes
    assert asked.package_owner("canoe-single-guest") == "canoe-guest"
    assert "guest/canoe-single-guest" not in {request.name for request in requests_of(PROJECT)}
    assert "guest/canoe-single-guest" not in {each.name for each in PROJECT.packages_lock.sets}
    guest = asked.guests["canoe-single-guest"]
    for changed in (
        msgspec.structs.replace(guest.image, packages=(*guest.image.packages, "rsync")),
        msgspec.structs.replace(guest.image, suite="sid"),
    ):
        others = asked.guests | {"canoe-single-guest": msgspec.structs.replace(guest, image=changed)}
        assert (
            msgspec.structs.replace(asked, guests=others).package_owner("canoe-single-guest")
            == "canoe-single-guest"
        )


# Two branches ------------------------------------------------------------------------------------------


@pytest.fixture
def two_branches(tmp_path: Path) -> Project:
    """A checkout with a second kernel source and a variant of qemu-q35 that takes its guest's kernel from it."""
    for name in ("pipeline", "recipes", "kernel-configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", tmp_path)
    lock = PROJECT.sources_lock
    newer = msgspec.structs.replace(lock.get("linux-rt"), name="linux-7", ref="7.2.3-1", tree="7" * 40)
    locks.dump_sources(lock.replace([newer]), tmp_path / locks.SOURCES_LOCK)
    write_two_branches(tmp_path)
    return Project(tmp_path)


def write_two_branches(root: Path) -> None:
    recipes = root / "recipes"
    (recipes / "platforms/q35-7.toml").write_text(
        'extends = "qemu-q35"\n[kernel.sources]\nguest = "linux-7"\n'
    )
    (recipes / "guests/guest-7.toml").write_text('extends = "rt-guest"\nplatform = "q35-7"\n')


def test_kernels_of_two_branches_are_side_by_side(two_branches: Project) -> None:
    graph, before = two_branches.graph, PROJECT.graph.keys
    assert graph["kernel:q35-7:host"].inputs["source"].action == "source:linux-rt"
    assert graph["kernel:q35-7:guest"].inputs["source"].action == "source:linux-7"
    assert graph.keys["kernel:q35-7:host"] == before["kernel:qemu-q35:host"]
    assert graph.keys["kernel:q35-7:guest"] != before["kernel:qemu-q35:guest"]
    # nothing of the platform that is extended has moved; what signs depends on who does
    signed = {
        name for name in before if any(PARAMETER in graph[each].parameters for each in graph.closure([name]))
    }
    moved = {name for name in before if graph.keys[name] != before[name]} - signed
    assert moved == set()


def test_each_package_names_the_source_of_its_own_kernel(two_branches: Project) -> None:
    def licences(what: str) -> set[str]:
        needs = two_branches.graph[f"package:q35-7:{what}"].upstreams
        return {name for name in needs if name.startswith("licences:linux")}

    for what in ("guest-kernel", "kernel-image-guest", "kernel-headers-guest", "image-guest-7"):
        assert licences(what) == {"licences:linux-7"}, what
    for what in ("kernel-image-host", "kernel-headers-host"):
        assert licences(what) == {"licences:linux-rt"}, what
    released = two_branches.graph["release:q35-7"].files["sources.lock"].content
    assert {"linux-rt", "linux-7"} <= {each["name"] for each in json.loads(released)}


# The matrix ----------------------------------------------------------------------------------------------


def test_the_matrix_tells_what_is_shared(two_branches: Project) -> None:
    rows = {row.task: row for row in matrix.rows(two_branches)}
    assert len(rows) == 2 * len(two_branches.recipes.platforms)
    assert [
        (rows[f"kernel:q35-7:{role}"].source, rows[f"kernel:q35-7:{role}"].ref) for role in ("host", "guest")
    ] == [
        ("linux-rt", PROJECT.sources_lock.get("linux-rt").ref),
        ("linux-7", "7.2.3-1"),
    ]
    shared = {task: row.same_as for task, row in rows.items() if row.same_as}
    # of two tasks with one key the first in the table has it: q35-7 comes before qemu-q35
    assert shared == {
        f"kernel:{VARIANT}:host": f"kernel:{BASE}:host",
        f"kernel:{VARIANT}:guest": f"kernel:{BASE}:guest",
        "kernel:qemu-q35:host": "kernel:q35-7:host",
    }
    head, *lines = matrix.table(rows.values())
    assert head.split() == ["platform", "role", "source", "ref", "key", "state"]
    assert len(lines) == len(rows)


@dataclass(frozen=True, slots=True)
class Matrices:
    """A stand-in project with two branches of the kernel."""

    project: Standin

    def rows(self) -> dict[str, dict[str, str]]:
        done = self.project.doit("matrix", "--json")
        assert done.status == 0, done
        return {row["task"]: row for row in json.loads(done.out)}


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrices]:
    directory = tmp_path_factory.mktemp("matrix")
    (directory / "rootfs").mkdir()
    project = standin.make(directory, tiny_rootfs(directory / "rootfs"))
    newer = standin.make_repository(directory / "newer", "v7.2.3", main="int newer;\n")
    project.append(
        "recipes/sources.toml",
        f'[linux-7]\ndescription = "stand-in"\n[[linux-7.origins]]\nkind = "git"\nurl = "{newer}"\nref = "v*"\n',
    )
    assert project.doit("lock", "-u", "linux-7").status == 0
    write_two_branches(project.root)
    yield Matrices(project)


@pytest.mark.engine
def test_the_matrix_builds_what_differs_and_that_once(matrices: Matrices) -> None:
    project = matrices.project
    assert {row["state"] for row in matrices.rows().values()} == {"build"}
    assert project.doit("matrix").out.endswith("\n7 to build: doit matrix --build\n")
    done = project.doit("matrix", "--build")
    assert done.status == 0, done
    built = re.findall(r"^\[(kernel:\S+)\] built", done.out, re.MULTILINE)
    assert len(built) == 7, built  # of ten: hosts and guests of three pairs, one host of two branches
    rows = matrices.rows()
    assert {row["state"] for row in rows.values()} == {"current"}
    assert project.doit("matrix").out.endswith("\nnothing to build\n")
    for task, text in (("kernel:q35-7:guest", "int newer;"), ("kernel:q35-7:host", "int linux;")):
        _, platform, role = task.split(":")
        assert text in (project.root / f"artifacts/{platform}/kernel/{role}/bzImage").read_text()


@pytest.mark.engine
def test_a_change_of_the_variant_rebuilds_only_that(matrices: Matrices) -> None:
    project = matrices.project
    assert project.doit("matrix", "--build").status == 0
    platform = "recipes/platforms/q35-7.toml"
    project.append(platform, '[kernel]\nhost_add = ["q35-7/host-config"]\n')
    (project.root / "kernel-configs/q35-7").mkdir()
    (project.root / "kernel-configs/q35-7/host-config").write_text("CONFIG_EXTRA=y\n")
    stale = {task for task, row in matrices.rows().items() if row["state"] == "build"}
    assert stale == {"kernel:q35-7:host"}
    done = project.doit("matrix", "--build")
    assert re.findall(r"^\[(\S+)\] built", done.out, re.MULTILINE) == ["kernel:q35-7:host"]
    shutil.rmtree(project.root / "artifacts")
    assert {row["state"] for row in matrices.rows().values()} == {"store"}


@pytest.mark.engine
@pytest.mark.parametrize("arguments", [("kernel",), ("--build", "--json")])
def test_the_matrix_refuses_what_it_cannot_do(matrices: Matrices, arguments: tuple[str, ...]) -> None:
    done = matrices.project.doit("matrix", *arguments)
    assert (done.status, done.err.splitlines()[:1] or done.out.splitlines()[:1]) == (
        2,
        ["error: doit matrix takes no task, and either --build or --json"],
    )
