"""Recipes: what is refused, and where the error points."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from pipeline.cpuplan import RULES
from pipeline.errors import UserError
from pipeline.image import command_line
from pipeline.recipefile import read
from pipeline.recipes import Builder, Guest, load
from pipeline.recipetext import line_of

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
    assert {"image", "kernel", "lab", "qemu"} <= set(recipes.builders)
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
        ("[image]", '[[networks]]\nkind = "tap"\nhost = "x"\n[image]', "guest.toml:9: unknown key host"),
        (
            "[image]",
            '[[networks]]\nkind = "wifi"\n[image]',
            "guest.toml:8: networks.0.kind: invalid value 'wifi'",
        ),
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
    # without what extends the guest that goes
    ignored = shutil.ignore_patterns("elements", "qemu-virt-arm64.toml", "rt-guest-arm64.toml")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=ignored)
    guest = tmp_path / "recipes" / "guests" / "rt-guest.toml"
    odd = guest.with_name("rt.guest.toml")
    guest.rename(odd)
    with pytest.raises(UserError, match="does not fit into host names"):
        load(tmp_path)
    odd.unlink()
    with pytest.raises(UserError, match="qemu-q35.toml: no guest runs on this platform"):
        load(tmp_path)


def test_lines_are_found_in_every_form_of_toml() -> None:
    text = 'a.b = 1\n\n[c]\nd = { e = 1,\n  f = 2 }\n[[g]]\nh = 1\n[c."i j"]\nk = 1\n[[g]]\nh = 2\n'
    assert line_of(text, ["a", "b"]) == 1
    assert line_of(text, ["c", "d"]) == 4
    assert line_of(text, ["c", "i j", "k"]) == 9
    assert line_of(text, ["c", "missing"]) == 3
    assert [line_of(text, ["g", *keys]) for keys in ((), ("0", "h"), ("1",), ("1", "h"), ("1", "i"))] == [
        6,
        7,
        10,
        11,
        10,
    ]
    assert line_of("", ["x"]) == 1


# The rules of the CPU plan ------------------------------------------------------------------------------

PLATFORM, CANOE = "platforms/canoe-pass.toml", "guests/canoe-guest.toml"
OTHER = "guests/other.toml"  # a second guest like the first
AFTER = 'topology = "canoe-pass"\n'
SMT = (PLATFORM, AFTER, 'topology = "xeon-2s-smt"\n')
PINS = 'pins = "9-12"'


@dataclass(frozen=True)
class Case:
    """Edits of recipes (file, old text, new text) that break a rule, and what is said: where, and what to write."""

    rule: str
    place: str
    said: str
    write: str
    edits: tuple[tuple[str, str, str], ...]


CASES = [
    Case(
        "cpu-list", f"{CANOE}:7", "pins = '9-N': '9-N' is an open range", 'pins = "1-4"',
        ((CANOE, PINS, 'pins = "9-N"'),),
    ),
    Case(
        "cpu-list", f"{CANOE}:7", "pins = '13-16': this machine has no CPU 16, only 0-15", 'pins = "1-4"',
        ((CANOE, PINS, 'pins = "13-16"'),),
    ),
    Case(
        "cpu-list", f"{PLATFORM}:4", "housekeeping_cpus = '0,8-': '8-' is an open range", 'housekeeping_cpus = "0,8"',
        ((PLATFORM, AFTER, AFTER + 'housekeeping_cpus = "0,8-"\n'),),
    ),
    Case(
        "housekeeping-cpu-0", f"{PLATFORM}:4", "housekeeping_cpus = '1,8': CPU 0 would be isolated",
        'housekeeping_cpus = "0-1,8"',
        ((PLATFORM, AFTER, AFTER + 'housekeeping_cpus = "1,8"\n'),),
    ),
    Case(
        "housekeeping-per-socket", f"{PLATFORM}:4", "housekeeping_cpus = '0-2': socket 1 (8-15) has none",
        'housekeeping_cpus = "0-2,8"',
        ((PLATFORM, AFTER, AFTER + 'housekeeping_cpus = "0-2"\n'),),
    ),
    Case(
        "siblings-together", f"{PLATFORM}:4",
        "housekeeping_cpus = '0,8': CPU 16,24 is a sibling of one of them, and would be isolated",
        'housekeeping_cpus = "0,8,16,24"',
        (SMT, (PLATFORM, 'topology = "xeon-2s-smt"\n', 'topology = "xeon-2s-smt"\nhousekeeping_cpus = "0,8"\n')),
    ),
    Case(
        "siblings-together", f"{OTHER}:7", "pins = '25-28': CPU 25 shares a core with guest canoe-guest",
        'pins = "1-4"',
        (SMT, (OTHER, PINS, 'pins = "25-28"')),
    ),
    Case(
        "isolated-enough", f"{CANOE}:3", "vcpus = 8: at most 7 isolated CPUs are free on one socket", "vcpus = 7",
        ((CANOE, "vcpus = 4\nhouse", "vcpus = 8\nhouse"), (CANOE, PINS, "")),
    ),
    Case(
        "isolated-enough", f"{CANOE}:3", "pins = '9-12': 15 vCPUs, but 14 CPUs are isolated", "vcpus = 4",
        ((CANOE, "vcpus = 4\nhouse", "vcpus = 15\nhouse"),),
    ),
    Case(
        "isolated-enough", f"{PLATFORM}:4", "all CPUs (0-15) keep house: none is left to isolate",
        'housekeeping_cpus = "0,8"',
        ((PLATFORM, AFTER, AFTER + 'housekeeping_cpus = "0-15"\n'),),
    ),
    Case(
        "vcpu-on-isolated", f"{CANOE}:7", "pins = '8-11': CPU 8 keeps house", 'pins = "1-4"',
        ((CANOE, PINS, 'pins = "8-11"'),),
    ),
    Case(
        "one-guest-per-cpu", f"{OTHER}:7", "pins = '12-15': CPU 12 is guest canoe-guest's", 'pins = "1-4"',
        ((OTHER, PINS, 'pins = "12-15"'),),
    ),
    Case(
        "one-socket", f"{CANOE}:7", "pins = '6-7,9-10': they are on two sockets", 'pins = "1-4"',
        ((CANOE, PINS, 'pins = "6-7,9-10"'),),
    ),
    Case(
        "one-node", f"{CANOE}:7", "pins = '4-7': they are on two NUMA nodes", 'pins = "1-4"',
        ((PLATFORM, AFTER, 'topology = "epyc-8ccx"\n'), (CANOE, PINS, 'pins = "4-7"')),
    ),
    Case(
        "guest-housekeeping", f"{CANOE}:4", "housekeeping_vcpus = 0: no vCPU is left for the guest's own work",
        "housekeeping_vcpus = 1",
        ((CANOE, "housekeeping_vcpus = 1", "housekeeping_vcpus = 0"),),
    ),
    Case(
        "guest-realtime", f"{CANOE}:4", "vcpus = 4 with housekeeping_vcpus = 4: no vCPU is left to isolate",
        "housekeeping_vcpus = 3",
        ((CANOE, "housekeeping_vcpus = 1", "housekeeping_vcpus = 4"),),
    ),
    Case(
        "one-pin-per-vcpu", f"{CANOE}:7", "pins = '9-11': 3 CPUs for 4 vCPUs", 'pins = "1-4"',
        ((CANOE, PINS, 'pins = "9-11"'),),
    ),
    Case(
        "emulator-on-housekeeping", f"{CANOE}:8", "emulator_cpus = '8-9': CPU 9 runs vCPUs", 'emulator_cpus = "8"',
        ((CANOE, PINS, PINS + '\nemulator_cpus = "8-9"'),),
    ),
    Case(
        "emulator-on-housekeeping", f"{CANOE}:8", "emulator_cpus = '15': CPU 15 is isolated", 'emulator_cpus = "8"',
        ((CANOE, PINS, PINS + '\nemulator_cpus = "15"'),),
    ),
    Case(
        "hugepages-whole", f"{CANOE}:5", "memory_mib = 4100 is not a whole number of huge pages of 1G",
        "memory_mib = 5120",
        ((CANOE, "memory_mib = 4096", "memory_mib = 4100"),),
    ),
    Case(
        "memory-fits", f"{CANOE}:5",
        "memory_mib = 32768 in huge pages of 1G: "
        "node 1 has 32256 MiB left for guests (512 of its 32768 are the host's)",
        "memory_mib = 31744",
        ((CANOE, "memory_mib = 4096", "memory_mib = 32768"),),
    ),
]  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Recipes to edit; the variant goes, since it would break another rule before the one that is broken on purpose."""
    ignored = shutil.ignore_patterns("elements", "canoe-pass-single-socket.toml", "canoe-single-guest.toml")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=ignored)
    return tmp_path


def test_every_rule_is_broken_here() -> None:
    assert {case.rule for case in CASES} == set(RULES)


@pytest.mark.parametrize("case", CASES, ids=[f"{case.rule}: {case.said}" for case in CASES])
def test_a_broken_rule_is_refused_with_its_line_and_what_to_write(checkout: Path, case: Case) -> None:
    recipes = checkout / "recipes"
    for file, old, new in case.edits:
        if file == OTHER and not (recipes / file).exists():
            shutil.copy(recipes / CANOE, recipes / file)
        text = (recipes / file).read_text()
        assert text.count(old) == 1, f"{file}: {old!r}"
        (recipes / file).write_text(text.replace(old, new))
    with pytest.raises(UserError) as refusal:
        load(checkout)
    assert refusal.value.message == f"recipes/{case.place}: {case.rule}: {case.said}"
    assert refusal.value.hint == f"write {case.write}"
    assert refusal.value.exit_status == 2
    apply(checkout, case)


def apply(checkout: Path, case: Case) -> None:
    """Write the line that the refusal gives in the place of its key: this rule is heard of no more."""
    file = checkout / "recipes" / case.place.partition(":")[0]
    key = case.write.partition(" = ")[0]
    lines = file.read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith(f"{key} = "))
    lines[at] = case.write
    file.write_text("\n".join(lines) + "\n")
    try:
        load(checkout)
    except UserError as other:
        assert f" {case.rule}: " not in other.message


def test_a_guest_without_high_resolution_timers_says_so_to_its_kernel() -> None:
    loaded = load(ROOT)
    guest, platform = loaded.guests["rt-guest"], loaded.platforms["qemu-q35"]
    assert "highres" not in command_line(guest, platform)
    for_msi = msgspec.structs.replace(guest, high_resolution_timers=False)
    assert "highres=off" in command_line(for_msi, platform).split()


TAKEN = [
    ('kind = "pci"\naddress = "0000:60:00.0"', "0000:60:00.0 is guest a's already"),
    ('kind = "vf"\nphysical = "0000:60:00.0"\nnumber = 1', "virtual function 1 of 0000:60:00.0 is guest a's"),
    ('kind = "vf"\nphysical = "0000:60:00.0"\nnumber = 200', "0000:60:00.0 has 64 virtual functions"),
    ('kind = "vf"\nphysical = "0000:1a:00.0"\nnumber = 0', "0000:1a:00.0 has 0 virtual functions"),
]


@pytest.fixture
def two_guests(tmp_path: Path) -> Path:
    """A checkout in which two guests share a machine that is known well; the first has a virtual function."""
    ignored = shutil.ignore_patterns(
        "qemu-virt-arm64.toml", "rt-guest-arm64.toml"
    )  # extends the guest that goes
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=ignored)
    recipes = tmp_path / "recipes"
    platform = recipes / "platforms" / "qemu-q35.toml"
    platform.write_text(platform.read_text().replace('topology = "qemu-q35"', 'topology = "xeon-2s-smt"'))
    guest = (recipes / "guests" / "rt-guest.toml").read_text()
    (recipes / "guests" / "rt-guest.toml").unlink()
    device = '[[devices]]\nkind = "vf"\nphysical = "0000:60:00.0"\nnumber = 1\n\n'
    network = '[[networks]]\nkind = "tap"\nname = "tap0"\n\n'
    (recipes / "guests" / "a.toml").write_text(guest.replace("[image]", device + network + "[image]"))
    (recipes / "guests" / "b.toml").write_text(guest)
    load(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("device", "said"), TAKEN)
def test_a_device_goes_to_one_guest(two_guests: Path, device: str, said: str) -> None:
    recipe = two_guests / "recipes/guests/b.toml"
    recipe.write_text(recipe.read_text().replace("[image]", f"[[devices]]\n{device}\n\n[image]"))
    with pytest.raises(UserError) as caught:
        load(two_guests)
    assert said in caught.value.message
    assert caught.value.message.startswith("recipes/guests/b.toml:")
    assert caught.value.hint


def test_a_tap_device_goes_to_one_guest(two_guests: Path) -> None:
    recipe = two_guests / "recipes/guests/b.toml"
    network = '[[networks]]\nkind = "tap"\nname = "tap0"\n\n'
    recipe.write_text(recipe.read_text().replace("[image]", network + "[image]"))
    with pytest.raises(UserError, match="name = tap0 is guest a's already"):
        load(two_guests)
