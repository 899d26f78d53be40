"""Recording a topology: from this machine, from small trees made here, and what it says where a fact is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.machine import record, to_toml
from pipeline.recipes import load
from pipeline.topology import Node, PciDevice, Topology, parse_cpulist
from tests.machines import topologies

ROOT = Path(__file__).resolve().parent.parent
RECORDED = {"xeon-2s-smt": (2, 16, 32), "epyc-8ccx": (2, 48, 96), "four-core": (1, 4, 8)}


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def mask(*cpus: int) -> str:
    """CPUs as sysfs writes a mask of at most 32."""
    return f"{sum(1 << cpu for cpu in cpus):08x}"


def tree(root: Path, *, nodes: bool = True, memory: bool = True, caches: bool = True) -> Path:
    """The sys/ and proc/ of two sockets, each with two cores of two CPUs, a cache per core, and some PCI functions."""
    system = root / "sys/devices/system"
    cpus = range(8)
    write(root / "proc/cpuinfo", "\n\n".join(f"processor\t: {n}\nmodel name\t: Made  up 1" for n in cpus))
    write(root / "proc/meminfo", "MemTotal:       6000000 kB")
    for name in ("present", "possible", "online"):
        write(system / "cpu" / name, "0-7")
    for cpu in cpus:
        socket, core = cpu % 2, cpu // 2 % 2
        topology = system / f"cpu/cpu{cpu}/topology"
        siblings = [socket + 2 * core, socket + 2 * core + 4]
        write(topology / "physical_package_id", socket)
        write(topology / "core_id", core)
        write(topology / "thread_siblings", mask(*siblings))
        write(topology / "core_siblings", mask(*(n for n in cpus if n % 2 == socket)))
        if caches:
            for level in (1, 2):
                cache = system / f"cpu/cpu{cpu}/cache/index{level - 1}"
                write(cache / "level", level)
                write(cache / "type", "Unified")
                write(cache / "size", "1024K")
                write(cache / "shared_cpu_map", mask(*siblings))
    if nodes:
        for node in (0, 1):
            write(system / f"node/node{node}/cpumap", mask(*(n for n in cpus if n % 2 == node)))
        (system / "node/node3").mkdir()  # memory alone
        write(system / "node/node3/cpumap", mask())
        if memory:
            for node, kib in ((0, 2_000_000), (1, 2_097_152), (3, 1_048_576)):
                write(
                    system / f"node/node{node}/meminfo",
                    f"\nNode {node} MemTotal:       {kib} kB\nNode {node} MemFree: 1 kB",
                )
    for address, kind, node, functions in (
        ("0000:00:01.0", "0x060400", 0, None),  # a bridge
        ("0000:02:00.0", "0x020000", 1, 8),
        ("0000:03:00.0", "0x010802", -1, 4),  # a disk controller with virtual functions
        ("0000:04:00.0", "0x028000", 0, None),
    ):
        device = root / "sys/bus/pci/devices" / address
        write(device / "class", kind)
        write(device / "vendor", "0x8086")
        write(device / "device", "0x1521")
        write(device / "numa_node", node if nodes else -1)
        if functions:
            write(device / "sriov_totalvfs", functions)
    virtual = root / "sys/bus/pci/devices/0000:02:10.0"
    write(virtual / "class", "0x020000")
    (virtual / "physfn").symlink_to("../0000:02:00.0")
    return root


@pytest.fixture
def no_lspci(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH with lscpu alone."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "lscpu").symlink_to("/usr/bin/lscpu")
    monkeypatch.setenv("PATH", str(tools))


@pytest.mark.usefixtures("no_lspci")
def test_a_tree_is_recorded(tmp_path: Path) -> None:
    recording = record(tree(tmp_path / "machine"))
    assert recording.remarks == ()
    assert recording.topology == Topology(
        description="Made up 1, 2 sockets, 4 cores, 8 CPUs",
        sockets=("0,2,4,6", "1,3,5,7"),
        cores=("0,4", "1,5", "2,6", "3,7"),
        caches=("0,4", "1,5", "2,6", "3,7"),
        nodes=(
            Node(id=0, cpus="0,2,4,6", memory_mib=1953),
            Node(id=1, cpus="1,3,5,7", memory_mib=2048),
            Node(id=3, memory_mib=1024),
        ),
        devices=(
            PciDevice(
                address="0000:02:00.0",
                node=1,
                description="Ethernet controller 8086:1521",
                virtual_functions=8,
            ),
            PciDevice(address="0000:03:00.0", description="PCI class 0108 8086:1521", virtual_functions=4),
            PciDevice(address="0000:04:00.0", node=0, description="network controller 8086:1521"),
        ),
    )


def test_lspci_names_devices_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = tree(tmp_path / "machine")
    tool = tmp_path / "tools/lspci"
    write(tool, f"""#!/bin/sh
[ "$1 $2 $3" = "-O sysfs.path={machine}/sys/bus/pci -Dmm" ] || exit 1
echo '0000:02:00.0 "Ethernet controller" "Intel" "I350 \\"quad\\"" -r01 -p00 "" ""'
echo '0000:04:00.0'""")  # fmt: skip
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    described = {device.address: device.description for device in record(machine).topology.devices}
    assert described["0000:02:00.0"] == 'Ethernet controller: Intel I350 "quad"'
    assert described["0000:04:00.0"] == "network controller 8086:1521"


def test_memory_that_is_not_told_is_asked_for_and_remarked(tmp_path: Path) -> None:
    machine = tree(tmp_path, memory=False)
    with pytest.raises(
        UserError, match=r"node 0 does not tell its memory: .*node0/meminfo is missing"
    ) as refusal:
        record(machine)
    assert refusal.value.hint.endswith("doit topology --memory 32768")
    recording = record(machine, memory_mib=4096)
    assert {node.memory_mib for node in recording.topology.nodes} == {4096}
    assert recording.remarks == (
        "The memory of node 0-1,3 was not recorded: 4096 MiB was given by hand. Write what yours has.",
    )
    with pytest.raises(UserError, match="tells the memory of all its nodes"):
        record(tree(tmp_path / "told"), memory_mib=4096)


def test_a_kernel_without_numa_is_one_node(tmp_path: Path) -> None:
    assert record(tree(tmp_path, nodes=False)).topology.nodes == (Node(id=0, cpus="0-7", memory_mib=5859),)


def test_caches_that_are_not_told_are_remarked(tmp_path: Path) -> None:
    recording = record(tree(tmp_path, caches=False))
    assert recording.topology.caches == ()
    assert recording.remarks == ("The machine does not tell its caches: each socket is taken for one.",)


def test_cpus_that_are_offline_are_left_out_and_remarked(tmp_path: Path) -> None:
    machine = tree(tmp_path)
    write(machine / "sys/devices/system/cpu/online", "0-3,5-7")
    recording = record(machine)
    assert recording.topology.sockets == ("0,2,6", "1,3,5,7")
    assert "CPU 4 was offline, and is left out." in recording.remarks
    assert to_toml(recording.topology, recording.remarks).startswith("# CPU 4 was offline")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    machine = tree(tmp_path)
    for cpu in (0, 4):
        write(machine / f"sys/devices/system/cpu/cpu{cpu}/cache/index1/shared_cpu_map", mask(0, 1, 4, 5))
    for cpu in (1, 5):
        write(machine / f"sys/devices/system/cpu/cpu{cpu}/cache/index1/shared_cpu_map", mask(0, 1, 4, 5))
    with pytest.raises(UserError, match=r"cannot be: cache 0-1,4-5 is not within one socket"):
        record(machine)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="lscpu tells no CPUs"):
        record(tmp_path / "empty")


def test_this_machine_is_recorded_as_its_own_tools_see_it() -> None:
    topology = record().topology
    shown = subprocess.run(
        ["lscpu", "-J"], capture_output=True, text=True, check=True, env={"LC_ALL": "C", **os.environ}
    )
    fields = {}

    def collect(rows: list[dict[str, object]]) -> None:
        for row in rows:
            fields[row["field"]] = row["data"]
            children = row.get("children")
            if isinstance(children, list):
                collect(children)

    collect(json.loads(shown.stdout)["lscpu"])
    assert len(topology.sockets) == int(str(fields["Socket(s):"]))
    assert len(topology.cpus) == os.cpu_count()
    assert topology.smt == (int(str(fields["Thread(s) per core:"])) > 1)
    cpus_of = {node.id: node.cpus for node in topology.nodes if node.cpus}
    assert len(cpus_of) == int(str(fields.get("NUMA node(s):", 1)))  # a kernel without NUMA tells none
    for node, cpus in cpus_of.items():
        shown_cpus = fields.get(f"NUMA node{node} CPU(s):", fields["On-line CPU(s) list:"])
        assert parse_cpulist(cpus) == parse_cpulist(str(shown_cpus))
    for each in topology.nodes:
        told = Path(f"/sys/devices/system/node/node{each.id}/meminfo")
        if told.exists():
            kib = re.search(r"MemTotal: +([0-9]+) kB", told.read_text())
            assert kib and each.memory_mib == int(kib[1]) // 1024
    total = re.search(r"^MemTotal: +([0-9]+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert total and 0 < sum(node.memory_mib for node in topology.nodes) <= int(total[1]) // 1024


# Written and read again --------------------------------------------------------------------------------


@given(
    topologies(),
    st.text(
        st.characters(exclude_characters="\x7f", min_codepoint=32, exclude_categories=["Cs"]), min_size=1
    ),
)
@settings(deadline=None)
def test_what_is_written_reads_the_same(topology: Topology, description: str) -> None:
    described = msgspec.structs.replace(topology, description=description)
    text = to_toml(described, ["one remark"])
    assert msgspec.convert(tomllib.loads(text), Topology) == described
    assert text.startswith("# one remark\n")


@pytest.mark.parametrize("name", RECORDED)
def test_the_recorded_machines_are_what_they_are_called(name: str) -> None:
    topology = load(ROOT).topologies[name]
    cores = {topology.siblings[cpu] for cpu in topology.cpus}
    assert (len(topology.sockets), len(cores), len(topology.cpus)) == RECORDED[name]
    text = (ROOT / "recipes/topologies" / f"{name}.toml").read_text()
    remarks = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    assert to_toml(topology, remarks) == text, "as recorded, and not edited since"


def test_the_epyc_has_eight_core_complexes_on_each_socket() -> None:
    topology = load(ROOT).topologies["epyc-8ccx"]
    for socket in topology.socket_cpus:
        assert len({topology.cache_of[cpu] for cpu in socket}) == 8
