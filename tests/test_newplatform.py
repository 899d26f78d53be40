"""A new platform: what a machine tells of itself, what its drivers need, and the page, followed to the letter."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import driverneeds, inventory, kconfig, newplatform, packager, packagetext
from pipeline.errors import UserError
from pipeline.git import Mirror
from pipeline.inventory import Inventory
from pipeline.newplatform import Asked, Made
from pipeline.project import Project
from tests import standin
from tests.standin import Standin
from tests.test_machine import mask, write
from tests.tiny import tiny_rootfs

ROOT = Path(__file__).resolve().parent.parent
NAME = "my-board"
#: A kernel's source, as small as it can be and still have all kinds of dependencies.
KERNEL = {
    "Kconfig": 'source "arch/$(SRCARCH)/Kconfig"\nsource "drivers/Kconfig"\n',
    "arch/x86/Kconfig": 'config X86\n\tdef_bool y\n\nconfig PCI\n\tbool "PCI"\n',
    "arch/arm64/Kconfig": 'config ARM64\n\tdef_bool y\n\nconfig NIC_ARM\n\ttristate "other"\n',
    "drivers/Kconfig": """\
menu "Drivers"

menuconfig NETDEVICES
    bool "Network"
    help
      config NOT_ONE
        depends on this text

if NETDEVICES
source "drivers/net/Kconfig"
endif # NETDEVICES

config HWMON
    tristate "Sensors"

config GFX
    tristate "Graphics"
    depends on PCI && !PREEMPT_RT

config SENSOR
    tristate "A sensor"
    depends on HWMON && (I_AM_NOT_THERE || \\
        PCI)

config BUS
    tristate "A bus"

config PTP
    tristate "Clocks"

config BUS_OTHER
    tristate "Another driver of the same name"

config FS
    tristate "A file system"
endmenu
""",
    "drivers/net/Kconfig": """\
config VENDOR
    bool "Cards of a vendor" if EXPERT
    depends on PCI
    default y

if VENDOR
config NIC
    tristate "A card"
    depends on PTP || PTP=n
    select NIC_LIB

config NIC_LIB
    tristate

config NIC_EN
    bool "Its Ethernet"
    depends on NIC

config NIC_QUEUES
    bool "Its queues"
    depends on NIC_EN

config NIC_OFF
    bool "Not that"
    depends on NIC

config NIC_MORE
    bool "Needs more than the card"
    depends on NIC && FS

config NIC_VF
    tristate "Its virtual functions"
endif
""",
    "drivers/net/Makefile": "obj-$(CONFIG_NIC) += nic-core.o \\\n\tnothing/\nobj-$(CONFIG_NIC_VF) += nicvf.o\n",
    "drivers/Makefile": (
        "obj-y += net/\nobj-$(CONFIG_SENSOR) += sub/sensor.o # why not\n"
        "obj-$(CONFIG_BUS) += twice.o\nobj-$(CONFIG_BUS_OTHER) += twice.o\n"
        "obj-$(CONFIG_GFX)\t+= gfx.o\nobj-$(CONFIG_FS) += fs.o\nobj-$(CONFIG_PTP) += timer.o\n"
    ),
    "arch/arm64/Makefile": "obj-$(CONFIG_NIC_ARM) += nic-core.o\n",
    "tools/Makefile": "obj-$(CONFIG_TOOL) += sensor.o\n",
}
CONFIG = ("NIC", "NIC_EN", "NIC_QUEUES", "NIC_MORE", "SENSOR", "HWMON", "GFX", "FS", "BUS")
#: What becomes of each module of the board, and the lines that are written for it.
EXPECTED = {
    "nic_core": ("asked", {"VENDOR": "y", "NIC": "m", "NIC_EN": "y", "NIC_QUEUES": "y"}),
    "sensor": ("asked", {"HWMON": "m", "SENSOR": "m"}),
    "gfx": ("refused", {}),
    "twice": ("asked", {"BUS": "m"}),
    "timer": ("had", {}),
    "strange": ("unmapped", {}),
    "built_in": ("unmapped", {}),
    "fs": ("idle", {}),
}


def board(root: Path) -> Path:
    """The sys/ and proc/ of a machine of two sockets with four cores each, and devices with and without drivers."""
    system = root / "sys/devices/system"
    write(root / "proc/cpuinfo", "\n\n".join(f"processor\t: {n}\nmodel name\t: Made  up 2" for n in range(8)))
    write(root / "proc/meminfo", "MemTotal:       6000000 kB")
    write(root / "proc/modules", "fs 4096 0 - Live 0x0\nsensor 4096 1 - Live 0x0\nnic_core 8192 0 - Live 0x0")
    write(root / "uname", "x86_64\n6.1.0-board")
    write(
        root / "config",
        "".join(f"CONFIG_{name}={'y' if name.startswith('NIC_') else 'm'}\n" for name in CONFIG),
    )
    write(root / "modules.for", "pci:v00008086d00001520sv nicvf\nacpi:LOST0001: twice")
    for name in ("present", "possible", "online"):
        write(system / "cpu" / name, "0-7")
    for cpu in range(8):
        topology = system / f"cpu/cpu{cpu}/topology"
        write(topology / "physical_package_id", cpu // 4)
        write(topology / "core_id", cpu % 4)
        write(topology / "thread_siblings", mask(cpu))
        write(topology / "core_siblings", mask(*(n for n in range(8) if n // 4 == cpu // 4)))
    for node in (0, 1):
        write(system / f"node/node{node}/cpumap", mask(*(n for n in range(8) if n // 4 == node)))
        write(system / f"node/node{node}/meminfo", f"Node {node} MemTotal:       8388608 kB")

    def device(bus: str, name: str, driver: str = "", module: str = "", **attributes: str) -> Path:
        real = root / "sys/bus" / bus / "devices" / name
        real.mkdir(parents=True)
        for key, text in attributes.items():
            write(real / key, text)
        if driver:
            place = root / "sys/bus" / bus / "drivers" / driver
            place.mkdir(parents=True, exist_ok=True)
            (real / "driver").symlink_to(f"../../../../bus/{bus}/drivers/{driver}")
            if module and not (place / "module").is_symlink():
                (root / "sys/module" / module).mkdir(parents=True, exist_ok=True)
                (place / "module").symlink_to(f"../../../../module/{module}")
        return real

    pci = {"vendor": "0x8086", "device": "0x1521", "numa_node": "1"}
    nic = device(
        "pci", "0000:02:00.0", "nic", "nic_core", **{"class": "0x020000"}, **pci,
        sriov_totalvfs="8", sriov_vf_device="1520",
    )  # fmt: skip
    assert nic.is_dir()
    virtual = device("pci", "0000:02:10.0", "vf", "nicvf", **{"class": "0x020000"}, **pci)
    (virtual / "physfn").symlink_to("../0000:02:00.0")
    device("pci", "0000:00:00.0", **{"class": "0x060000"}, **pci, modalias="pci:v00008086d00000D57sv")
    device("pci", "0000:03:00.0", "gfx", "gfx", **{"class": "0x030000"}, **pci)
    device("i2c", "0-0048", "sensor", "sensor")
    device("platform", "timer", "timer", "timer")
    device("platform", "one", "twice", "twice")
    device("platform", "two", "strange-driver", "strange")
    device("platform", "three", "built-in")
    device("acpi", "LOST0001:00", modalias="acpi:LOST0001:")
    return root


def recorded(root: Path) -> str:
    """What the script says of the machine below a directory."""
    done = subprocess.run(
        ["sh", str(ROOT / "scripts/record-machine")],
        env=os.environ | {"RECORD_ROOT": str(root)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    return recorded(board(tmp_path_factory.mktemp("board")))


@pytest.fixture(scope="module")
def machine(said: str) -> Inventory:
    return inventory.parse(said, "board.rec")


def kernel_repository(directory: Path) -> str:
    """A git repository with the small kernel; its tree."""
    for name, text in KERNEL.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (directory / "main.c").write_text("int linux;\n")
    if not (directory / ".git").is_dir():
        standin.git(directory, "init", "-q", "-b", "main")
    standin.git(directory, "add", ".")
    standin.git(directory, "commit", "-qm", "a kernel")
    standin.git(directory, "tag", "v6.12.2-rt2")
    done = subprocess.run(
        ["git", "-C", str(directory), "rev-parse", "HEAD^{tree}"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> driverneeds.KernelTree:
    directory = tmp_path_factory.mktemp("kernel")
    identity = kernel_repository(directory / "linux")
    mirror = Mirror(directory / "linux.git")
    mirror.fetch_ref(str(directory / "linux"), "refs/tags/v6.12.2-rt2")
    return driverneeds.kernel_tree(mirror, identity, "small 1", "x86_64")


# What a machine tells ------------------------------------------------------------------------------------


def test_a_recording_tells_every_device_and_its_driver(machine: Inventory) -> None:
    assert (machine.arch, machine.release) == ("x86_64", "6.1.0-board")
    assert set(machine.config) == set(CONFIG)
    assert machine.loaded == ("fs", "nic_core", "sensor")
    assert {(each.bus, each.name): (each.driver, each.module, each.named) for each in machine.devices} == {
        ("pci", "0000:00:00.0"): ("", "", False),
        ("pci", "0000:02:00.0"): ("nic", "nic_core", True),
        ("pci", "0000:02:10.0"): ("vf", "nicvf", True),
        ("pci", "0000:03:00.0"): ("gfx", "gfx", True),
        ("i2c", "0-0048"): ("sensor", "sensor", True),
        ("platform", "timer"): ("timer", "timer", True),
        ("platform", "one"): ("twice", "twice", True),
        ("platform", "two"): ("strange-driver", "strange", True),
        ("platform", "three"): ("built-in", "built_in", False),
        ("acpi", "LOST0001:00"): ("", "", False),
    }
    lost = next(each for each in machine.devices if each.bus == "acpi")
    assert (lost.alias, lost.known) == ("acpi:LOST0001:", ("twice",))
    assert machine.virtual == {"0000:02:00.0": ("nicvf",)}


def test_a_recording_has_the_topology_in_it(machine: Inventory, tmp_path: Path) -> None:
    from pipeline.machine import record

    machine.lay_out(tmp_path)
    topology = record(tmp_path).topology
    assert (topology.sockets, topology.nodes[1].memory_mib) == (("0-3", "4-7"), 8192)
    assert [(each.address, each.node, each.virtual_functions) for each in topology.devices] == [
        ("0000:02:00.0", 1, 8)
    ]


def test_a_recording_names_no_serial_number_and_no_address(said: str) -> None:
    assert not re.search(r"serial|uuid|([0-9a-f]{2}:){5}[0-9a-f]{2}", said, re.IGNORECASE)


def test_this_machine_is_recorded() -> None:
    """Whatever it has: the script's output is read, and each device of each bus that has a driver is in it."""
    text = inventory.record(ROOT)
    here = inventory.parse(text, "this machine")
    assert (here.arch, here.release) == (os.uname().machine, os.uname().release)
    bound = {(path.parts[3], path.parent.name) for path in Path("/sys/bus").glob("*/devices/*/driver")}
    assert bound == {(each.bus, each.name) for each in here.devices if each.driver}
    functions = {path.name for path in Path("/sys/bus/pci/devices").glob("*")}
    assert functions == {each.name for each in here.devices if each.bus == "pci"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("virt-rt-recording 1", "virt-rt-recording 2", "its first line is not virt-rt-recording 1"),
        ("\nend\n", "\n", "board.rec is cut off"),
        ("F devices\n", "F gadgets\n", "expected a section"),
        ("F proc/meminfo\n", "F proc/../../etc/meminfo\n", "expected a section"),
        ("F proc/meminfo\n", "F /proc/meminfo\n", "expected a section"),
        ("F proc/modules\n", "F proc/meminfo\n", "expected a section"),
        ("\tx86_64\n", "x86_64\n", "expected a section"),
        ("F uname\n\tx86_64\n\t6.1.0-board\n", "", "has no section uname"),
        ("i2c\t0-0048\t", "i2c\t", "not a device: i2c"),
    ],
)
def test_a_damaged_recording_is_refused(said: str, old: str, new: str, message: str) -> None:
    assert old in said
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        inventory.parse(said.replace(old, new, 1), "board.rec")
    assert caught.value.hint


# What drivers need -----------------------------------------------------------------------------------------


def test_every_module_gets_a_verdict(machine: Inventory, tree: driverneeds.KernelTree) -> None:
    known = {"PCI": "y", "NETDEVICES": "y", "PREEMPT_RT": "y", "NIC_VF": "m", "PTP": "y"}
    found = {need.module: need for need in driverneeds.needs(machine, tree, known)}
    assert found.keys() == EXPECTED.keys() | {"nicvf"}
    for module, (verdict, lines) in EXPECTED.items():
        assert (found[module].verdict, dict(found[module].lines)) == (verdict, lines), found[module]
    assert found["nic_core"].reason == "without NIC_MORE, which need more than it"
    assert found["gfx"].reason == "!PREEMPT_RT does not hold"
    assert found["strange"].reason == "no symbol is known to build it"
    assert found["built_in"].reason == "built into that kernel, as no module of its own"
    assert (found["nicvf"].verdict, found["nicvf"].symbol) == ("had", "NIC_VF")
    assert (found["fs"].symbol, found["fs"].drives) == ("FS", ())


def test_of_two_symbols_the_machines_own_kernel_decides(
    machine: Inventory, tree: driverneeds.KernelTree
) -> None:
    from dataclasses import replace

    both = replace(machine, config={**machine.config, "BUS_OTHER": "m"})
    found = {need.module: need for need in driverneeds.needs(both, tree, {})}
    assert (found["twice"].verdict, found["twice"].reason) == ("unmapped", "one of BUS, BUS_OTHER")
    found = {need.module: need for need in driverneeds.needs(machine, tree, {})}
    assert (found["twice"].verdict, found["twice"].lines) == ("asked", {"BUS": "m"})


def test_without_a_tree_the_machines_own_kernel_is_asked(machine: Inventory) -> None:
    found = {need.module: need for need in driverneeds.needs(machine, None, {"SENSOR": "m"})}
    assert {module for module, need in found.items() if need.verdict == "asked"} == {"gfx"}
    assert found["sensor"].verdict == "had"
    assert found["nic_core"].verdict == "unmapped"
    assert found["gfx"].reason == "what it needs is not known"


@pytest.mark.parametrize(
    ("needs", "known", "expected"),
    [
        ("A && B", {}, {"A": "y", "B": "y"}),
        ("A && B", {"A": "y"}, {"B": "y"}),
        ("A || B", {"B": "m"}, {}),
        ("NOT_THERE || B", {}, {"B": "y"}),
        ("(A || B) && !A", {"B": "y"}, {}),
        ("!A", {"A": "y"}, None),
        ("A=n", {}, {}),
        ("A!=n && B", {"A": "y"}, {"B": "y"}),
        ("A=y", {}, {"A": "y"}),
        ("NOT_THERE", {}, None),
        ("n", {}, None),
        ("NUMBER", {}, None),
        ("LOOP", {}, None),
        ("$(cc-option,-x) && GCC_VERSION >= 50000 && A", {}, {"A": "y"}),
    ],
)
def test_what_a_symbol_depends_on_is_asked_for_too(
    needs: str, known: dict[str, str], expected: dict[str, str] | None
) -> None:
    text = (
        'config A\n\tbool "a"\n\nconfig B\n\tbool "b"\n\nconfig NUMBER\n\tint "n"\n\n'
        f'config LOOP\n\tbool "l"\n\tdepends on LOOP\n\nconfig X\n\ttristate\n\tprompt "x"\n\tdepends on {needs}\n'
    )
    solver = kconfig.Solver(kconfig.parse({"Kconfig": text}, "x86"), known)
    if expected is None:
        assert solver.would_ask("X") is None
        with pytest.raises(kconfig.Unmet):
            solver.ask("X")
    else:
        assert solver.ask("X") == {**expected, "X": "m"}
        assert solver.ask("X") == {}


# Written, or not -------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name in ("pipeline", "recipes", "kernel-configs", "scripts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "docs/platforms", root / "docs/platforms")
    shutil.copy(ROOT / "LICENSE", root)
    return root


def make(checkout: Path, machine: Inventory, topology: str = "") -> Made:
    environ = {
        "XDG_CACHE_HOME": str(checkout.parent / "cache"),
        "XDG_CONFIG_HOME": str(checkout.parent / "config"),
    }
    return newplatform.make(Project(checkout, environ), Asked(NAME, topology), machine)


def files(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def test_a_platform_adds_files_and_changes_none(checkout: Path, machine: Inventory) -> None:
    before = files(checkout)
    made = make(checkout, machine)
    after = files(checkout)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {path.as_posix() for path in made.files} == {
        f"recipes/topologies/{NAME}.toml",
        f"recipes/platforms/{NAME}.toml",
        f"recipes/guests/{NAME}-guest.toml",
        f"kernel-configs/{NAME}/host-config",
        f"kernel-configs/{NAME}/guest-config",
        f"docs/platforms/{NAME}.md",
        f"docs/platforms/{NAME}.svg",
    }  # fmt: skip
    page = after[f"docs/platforms/{NAME}.md"].decode()
    assert "The source linux-rt was not there" in page
    for need in (*made.host, *made.guest):
        assert f"| {need.module} |" in page
    assert "| acpi LOST0001:00 | acpi:LOST0001: | twice |" in page
    project = Project(checkout, {"XDG_CACHE_HOME": str(checkout.parent / "cache")})
    assert f"release:{NAME}" in project.graph
    assert project.recipes.package_owner(f"{NAME}-guest") == "rt-guest"


TAKEN = [
    f"recipes/topologies/{NAME}.toml",
    f"recipes/guests/{NAME}-guest.toml",
    f"kernel-configs/{NAME}",
    f"docs/platforms/{NAME}.md",
    f"docs/platforms/{NAME}.svg",
]


@pytest.mark.parametrize("taken", TAKEN)
def test_what_is_there_is_never_replaced(checkout: Path, machine: Inventory, taken: str) -> None:
    (checkout / taken).symlink_to("nowhere")
    before = files(checkout)
    with pytest.raises(UserError, match="is there already"):
        make(checkout, machine)
    (checkout / taken).unlink()
    assert files(checkout) == before


@pytest.mark.parametrize("count", range(7))
def test_when_one_file_cannot_be_placed_none_is_there(
    checkout: Path, machine: Inventory, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    before, link = files(checkout), os.link
    done: list[Path] = []

    def fail(source: Path, target: Path) -> None:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(target)
        link(source, target)

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(KeyboardInterrupt):
        make(checkout, machine)
    assert len(done) == count
    assert files(checkout) == before
    assert not (checkout / "kernel-configs" / NAME).exists()
    assert list(checkout.glob(".new-platform-*")) == []


def test_a_machine_that_leaves_no_cpu_for_a_guest_is_refused(
    checkout: Path, machine: Inventory, tmp_path: Path
) -> None:
    text = recorded(board(tmp_path / "small"))
    for name in ("present", "possible", "online"):
        text = text.replace(
            f"F sys/devices/system/cpu/{name}\n\t0-7\n", f"F sys/devices/system/cpu/{name}\n\t0-1\n"
        )
    small = inventory.parse(text, "small.rec")
    before = files(checkout)
    with pytest.raises(UserError, match="nothing was written: .*isolated-enough") as caught:
        make(checkout, small)
    assert "--topology NAME" in caught.value.hint
    assert files(checkout) == before
    made = make(checkout, small, topology="four-core")
    assert tomllib.loads((checkout / f"recipes/platforms/{NAME}.toml").read_text())["topology"] == "four-core"
    assert not (checkout / f"recipes/topologies/{NAME}.toml").exists()
    # the machine's own network functions are told all the same
    assert "`0000:02:00.0`" in (checkout / f"docs/platforms/{NAME}.md").read_text()
    assert made.remarks[0] == "CPUs and memory are those of four-core, not those of the machine."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "sparc64"}, "the machine is sparc64, for which nothing is built"),
        ({"topology": "none"}, "there is no topology none"),
        ({"name": "My-Board"}, "My-Board is no name for a platform"),
        ({"name": "../x"}, "is no name for a platform"),
        ({"name": "x" * (newplatform.LONGEST_NAME + 1)}, "is no name for a platform"),
        ({"name": "qemu-q35"}, "recipes/topologies/qemu-q35.toml is there already"),
    ],
)
def test_what_makes_no_platform_is_refused(
    checkout: Path, machine: Inventory, change: dict[str, str], message: str
) -> None:
    from dataclasses import replace

    before = files(checkout)
    environ = {"XDG_CACHE_HOME": str(checkout.parent / "cache")}
    known = replace(machine, arch=change.get("arch", machine.arch))
    asked = Asked(change.get("name", NAME), change.get("topology", ""))
    with pytest.raises(UserError, match=message) as caught:
        newplatform.make(Project(checkout, environ), asked, known)
    assert caught.value.hint
    assert files(checkout) == before


# The page, followed to the letter ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standin]:
    """A stand-in project under git, whose kernel source is the small one."""
    directory = tmp_path_factory.mktemp("walk")
    (directory / "rootfs").mkdir()
    made = standin.make(directory, tiny_rootfs(directory / "rootfs"))
    kernel_repository(directory / "linux")
    assert made.doit("lock", "-u", "linux-rt").status == 0
    shutil.copytree(ROOT / "scripts", made.root / "scripts")
    shutil.copytree(ROOT / "docs/platforms", made.root / "docs/platforms")
    (made.root / ".gitignore").write_text("/artifacts/\n__pycache__/\n")
    standin.git(made.root, "init", "-q", "-b", "main")
    standin.git(made.root, "add", ".")
    standin.git(made.root, "commit", "-qm", "a checkout")
    yield made


def tools(directory: Path, machine: Path) -> Path:
    """A directory with `doit`, and an `ssh` whose other side is a pretended machine."""
    directory.mkdir()
    for name, script in {
        "doit": f'exec {shlex.quote(sys.executable)} -m doit "$@"',
        "ssh": f'test "$1" = root@board || exit 255\nshift\nRECORD_ROOT={shlex.quote(str(machine))} exec "$@"',
    }.items():
        path = directory / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return directory


@pytest.mark.engine
@pytest.mark.slow
def test_the_page_leads_to_a_platform_that_is_built(project: Standin, tmp_path: Path) -> None:
    page = (ROOT / "docs/new-platform.md").read_text()
    commands = [
        line for block in re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S) for line in block.splitlines()
    ]
    assert len(commands) >= 10
    path = tools(tmp_path / "tools", board(tmp_path / "machine"))
    author = {
        f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    environment = project.environment | author | {"PATH": f"{path}:{os.environ['PATH']}"}
    said = {}
    for command in commands:
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=project.root, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        said[command] = done.stdout
    wrote = next(out for command, out in said.items() if command.startswith("doit new-platform"))
    assert (
        "note: gfx, CONFIG_GFX is not asked for: !PREEMPT_RT does not hold; it drives pci 0000:03:00.0\n"
        in wrote
    )
    assert re.search(r"^of 10 modules .* 3 are not in the configuration$", wrote, re.MULTILINE)
    host = (project.root / f"kernel-configs/{NAME}/host-config").read_text()
    assert (
        "\n# nic_core: pci 0000:02:00.0\nCONFIG_VENDOR=y\nCONFIG_NIC=m\nCONFIG_NIC_EN=y\nCONFIG_NIC_QUEUES=y\n"
        in host
    )
    assert "CONFIG_NIC_VF=m" in (project.root / f"kernel-configs/{NAME}/guest-config").read_text()
    report = json.loads((project.root / f"artifacts/{NAME}/lab/report.json").read_text())
    assert {level["name"]: level["verdict"] for level in report["levels"]}["boot"] == "passed"
    assert (project.root / f"artifacts/{NAME}/release/release.json").is_file()
    assert f"release:{NAME} " in project.doit("list").out
    assert project.doit("cpuplan", NAME, "--doc").out == ""


def test_the_longest_name_has_room_in_every_package() -> None:
    name = "x" * newplatform.LONGEST_NAME
    variables = {"platform": name, "guest": f"{name}-guest", "driver": "edu", "driver_role": "guest"}
    recipes = sorted((ROOT / "recipes/packages").glob("*.toml"))
    summaries = [packagetext.fill(tomllib.loads(path.read_text())["summary"], variables) for path in recipes]
    assert max(map(len, summaries)) <= packager.SUMMARY
    assert sum(name in summary for summary in summaries) > 9
