"""Recipes: what is refused, and where the error points."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.recipes import Builder, Guest, line_of, load, read

ROOT = Path(__file__).resolve().parent.parent

GUEST = """\
description = "a guest"
platform = "p"
vcpus = 4
housekeeping_vcpus = 1
memory_mib = 512

[image]
suite = "trixie"
disk_mib = 512
packages = [
  "one", "two",
  "three",
]
"""


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "guest.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read(path, Guest, tmp_path)
    return caught.value.message


def test_the_projects_own_recipes_are_fine() -> None:
    recipes = load(ROOT)
    assert set(recipes.builders) == {"image", "kernel", "lab", "qemu"}
    assert recipes.guests["rt-guest"].platform in recipes.platforms


def test_a_good_recipe_is_read(tmp_path: Path) -> None:
    (tmp_path / "guest.toml").write_text(GUEST)
    guest = read(tmp_path / "guest.toml", Guest, tmp_path)
    assert guest.image.packages == ("one", "two", "three")
    assert guest.image.ssh_authorized_keys == ()


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("vcpus = 4\nhouse", "vcpus = 4\nx = 1\nhouse", "guest.toml:4: unknown key x"),
        ("disk_mib = 512", "disk_mib = 5.5", "guest.toml:9: image.disk_mib: expected `int`, got `float`"),
        ('"three"', "3", "guest.toml:12: image.packages.2: expected `str`, got `int`"),
        ('"three"', '"Three"', "guest.toml:12: image.packages.2: expected `str` matching"),
        ("memory_mib = 512\n", "", "guest.toml:1: recipe: object missing required field `memory_mib`"),
        ('suite = "trixie"\n', "", "guest.toml:7: image: object missing required field `suite`"),
        ("[image]", "[imagine]", "guest.toml:7: unknown key imagine"),
        ("vcpus = 4", "vcpus = 4 4", "guest.toml: not TOML: "),
        ("vcpus = 4", "vcpus = 1", "guest.toml:3: vcpus: expected `int` >= 2"),
        ('"a guest"', '"a\\nguest"', "guest.toml:1: description: "),
    ],
)
def test_an_error_names_the_line_and_what_was_expected(
    tmp_path: Path, old: str, new: str, place: str
) -> None:
    assert old in GUEST
    assert refused(tmp_path, GUEST.replace(old, new)).startswith(place)


def test_keys_that_could_be_shell_are_refused(tmp_path: Path) -> None:
    text = GUEST + 'ssh_authorized_keys = ["command=x"]\n'
    assert "ssh_authorized_keys.0" in refused(tmp_path, text)
    assert "cmdline.extra.0" in refused(tmp_path, GUEST + "[cmdline]\nextra = ['a b']\n")


def test_a_missing_or_binary_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml is missing"):
        read(tmp_path / "none.toml", Builder, tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8"):
        read(tmp_path / "binary.toml", Builder, tmp_path)


def test_a_project_without_platforms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no platform"):
        load(tmp_path)


def test_names_that_fit_nowhere_and_platforms_without_guests_are_refused(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("elements"))
    guest = tmp_path / "recipes" / "guests" / "rt-guest.toml"
    odd = guest.with_name("rt.guest.toml")
    guest.rename(odd)
    with pytest.raises(UserError, match="does not fit into host names"):
        load(tmp_path)
    odd.unlink()
    with pytest.raises(UserError, match="qemu-q35.toml: no guest runs on this platform"):
        load(tmp_path)


def test_lines_are_found_in_every_form_of_toml() -> None:
    text = 'a.b = 1\n\n[c]\nd = { e = 1,\n  f = 2 }\n[[g]]\nh = 1\n[c."i j"]\nk = 1\n'
    assert line_of(text, ["a", "b"]) == 1
    assert line_of(text, ["c", "d"]) == 4
    assert line_of(text, ["c", "i j", "k"]) == 9
    assert line_of(text, ["c", "missing"]) == 3
    assert line_of("", ["x"]) == 1
