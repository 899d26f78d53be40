"""A machine as it is: its topology, recorded from `lscpu` and sysfs, and written as TOML.

Nothing is made up: what the machine does not tell is an error that says so, a fact that the caller gives, or a
remark in the written file.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.topology import Node, PciDevice, Topology, TopologyError, cpulist

#: PCI classes of network controllers: their names by class and subclass.
#: Source: "Class Code" of the PCI Code and ID Assignment Specification, base class 02h.
NETWORK = {0x0200: "Ethernet controller", 0x0207: "InfiniBand controller", 0x0280: "network controller"}
#: `lscpu`'s columns; the one of caches has a name of its own on each machine, such as `l1d:l1i:l2:l3`.
COLUMNS = "CPU,CORE,SOCKET,NODE,CACHE,ONLINE"
_DASH = re.compile(r"(?<=: )-(?=,?$)", re.MULTILINE)
_HAND = "write the topology by hand: docs/topologies.md"


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded topology; `remarks` are what whoever reads it must know, a line each."""

    topology: Topology
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Cpu:
    """A CPU that is online, by the numbers that `lscpu` gives; `cache` is the last-level one's."""

    number: int
    core: int
    socket: int
    node: int | None
    cache: str | None


def record(root: Path = Path("/"), *, memory_mib: int | None = None, description: str = "") -> Recording:
    """Record the machine whose `/sys` and `/proc` are below `root`.

    `memory_mib` is the memory of each node of which the machine tells none (a copy of sysfs may lack it), in
    MiB; `description` is by default the processor's model and what it has. Raises `UserError` when the machine
    does not tell what a topology needs.
    """
    remarks: list[str] = []
    cpus, offline = _cpus(root)
    if offline:
        remarks.append(f"CPU {cpulist(offline)} was offline, and is left out.")
    if not any(cpu.cache for cpu in cpus):
        remarks.append("The machine does not tell its caches: each socket is taken for one.")
    nodes, unknown = _nodes(root, cpus, memory_mib)
    if unknown:
        remarks.append(
            f"The memory of node {cpulist(unknown)} was not recorded: {memory_mib} MiB was given by hand. "
            "Write what yours has."
        )
    sockets = _lists((cpu.socket, cpu.number) for cpu in cpus)
    caches = _lists((cpu.cache, cpu.number) for cpu in cpus if cpu.cache is not None)
    topology = Topology(
        description=description or _description(root, cpus),
        sockets=sockets,
        cores=tuple(
            core
            for core in _lists(((cpu.socket, cpu.core), cpu.number) for cpu in cpus)
            if not core.isdecimal()
        ),
        caches=() if set(caches) <= set(sockets) else caches,
        nodes=nodes,
        devices=devices(root),
    )
    try:
        topology.check()
    except TopologyError as error:
        raise UserError(f"what this machine tells of itself cannot be: {error.message}", _HAND) from None
    return Recording(topology, tuple(remarks))


def _cpus(root: Path) -> tuple[list[_Cpu], list[int]]:
    """CPUs that are online, ascending, and the numbers of the others."""
    command = ["lscpu", "-J", f"-e={COLUMNS}"] + ([] if root == Path("/") else ["--sysroot", str(root)])
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    except FileNotFoundError:
        raise UserError("there is no lscpu", "apt-get install util-linux") from None
    try:
        # lscpu 2.38 writes a bare dash for a number that it does not have
        rows: list[dict[str, Any]] = json.loads(_DASH.sub("null", done.stdout))["cpus"]
    except (json.JSONDecodeError, KeyError, TypeError):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UserError(
            f"lscpu tells no CPUs: {said}", "name a directory with the sys/ and proc/ of a machine"
        ) from None
    found, offline = [], []
    for row in rows:
        number = row["cpu"]
        if not row.get("online", True):
            offline.append(number)
            continue
        for key in ("core", "socket"):
            if not isinstance(row.get(key), int):
                raise UserError(f"lscpu does not tell the {key} of CPU {number}", _HAND)
        levels = next((str(value) for key, value in row.items() if key.startswith("l1") and value), "")
        last = levels.rpartition(":")[2]
        found.append(
            _Cpu(
                number,
                row["core"],
                row["socket"],
                row.get("node"),
                last if last.isdecimal() else None,
            )
        )
    if not found:
        raise UserError("lscpu tells no CPU that is online", _HAND)
    return sorted(found, key=lambda cpu: cpu.number), sorted(offline)


def _nodes(root: Path, cpus: list[_Cpu], memory_mib: int | None) -> tuple[tuple[Node, ...], list[int]]:
    """NUMA nodes, those without CPUs included, and which of them do not tell their memory.

    A kernel without NUMA has no nodes: then the machine is node 0, with the memory of /proc/meminfo.
    """
    directory = root / "sys" / "devices" / "system" / "node"
    ids = sorted(int(path.name[4:]) for path in directory.glob("node[0-9]*"))
    meminfo = {number: directory / f"node{number}" / "meminfo" for number in ids}
    members: dict[int, list[int]] = {number: [] for number in ids}
    if not ids:
        meminfo, members = {0: root / "proc" / "meminfo"}, {0: [cpu.number for cpu in cpus]}
    else:
        for cpu in cpus:
            if cpu.node not in members:
                raise UserError(f"lscpu does not tell the node of CPU {cpu.number}", _HAND)
            members[cpu.node].append(cpu.number)
    nodes, unknown = [], []
    for number, path in meminfo.items():
        memory = _memory_mib(path)
        if memory is None:
            if memory_mib is None:
                raise UserError(
                    f"node {number} does not tell its memory: {path} is missing",
                    "say how much each such node has, in MiB: doit topology --memory 32768",
                )
            memory = memory_mib
            unknown.append(number)
        nodes.append(Node(id=number, cpus=cpulist(members[number]), memory_mib=memory))
    if memory_mib is not None and not unknown:
        raise UserError("this machine tells the memory of all its nodes", "leave --memory out")
    return tuple(nodes), unknown


def _memory_mib(meminfo: Path) -> int | None:
    """`MemTotal` of a node's or the machine's meminfo in MiB, rounded down; None when there is no such file."""
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text().splitlines():
        words = line.split()
        if "MemTotal:" in words:
            return int(words[words.index("MemTotal:") + 1]) // 1024
    raise UserError(f"{meminfo} has no MemTotal", _HAND)


def devices(root: Path) -> tuple[PciDevice, ...]:
    """Network functions and all that can have virtual functions; virtual functions themselves are left out."""
    names = _pci_names(root)
    found = []
    for path in sorted((root / "sys" / "bus" / "pci" / "devices").glob("*")):
        kind = int(_first_line(path / "class") or "0", 16) >> 8
        functions = int(_first_line(path / "sriov_totalvfs") or "0")
        if (kind >> 8 != 0x02 and not functions) or (path / "physfn").exists():
            continue
        node = int(_first_line(path / "numa_node") or "-1")
        ids = ":".join(_first_line(path / key).removeprefix("0x") for key in ("vendor", "device"))
        found.append(
            PciDevice(
                address=path.name,
                node=node if node >= 0 else None,
                description=names.get(path.name) or f"{NETWORK.get(kind, f'PCI class {kind:04x}')} {ids}",
                virtual_functions=functions,
            )
        )
    return tuple(found)


def _pci_names(root: Path) -> Mapping[str, str]:
    """What `lspci` calls each function, by address; nothing where there is no `lspci`.

    A recording has what it said there, in a file of that name.
    """
    command = ["lspci", "-O", f"sysfs.path={root / 'sys' / 'bus' / 'pci'}", "-Dmm"]
    recorded = root / "lspci"
    try:
        said = (
            recorded.read_text()
            if recorded.is_file()
            else subprocess.run(
                command, capture_output=True, text=True, check=False, env=_environment()
            ).stdout
        )
    except FileNotFoundError:
        return {}
    found = {}
    for line in said.splitlines():
        address, *words = shlex.split(line)
        named = [word for word in words if not word.startswith("-")]
        if len(named) >= 3:
            found[address] = f"{named[0]}: {named[1]} {named[2]}"
    return found


def _description(root: Path, cpus: list[_Cpu]) -> str:
    """The processor's model, and how much there is of it."""
    sockets = len({cpu.socket for cpu in cpus})
    cores = len({(cpu.socket, cpu.core) for cpu in cpus})
    info = root / "proc" / "cpuinfo"
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")
    parts = [
        " ".join(model.split()) or "unnamed processor",
        f"{sockets} socket{'s' * (sockets > 1)}",
        f"{cores} core{'s' * (cores > 1)}",
        f"{len(cpus)} CPU{'s' * (len(cpus) > 1)}",
    ]
    return ", ".join(parts)


def _first_line(path: Path) -> str:
    """The text of a sysfs attribute; empty when there is none."""
    return path.read_text().strip() if path.is_file() else ""


def _lists(members: Iterable[tuple[object, int]]) -> tuple[str, ...]:
    """CPU lists of what has the same mark, in the order of their first CPUs."""
    groups: dict[object, list[int]] = {}
    for mark, cpu in members:
        groups.setdefault(mark, []).append(cpu)
    return tuple(cpulist(group) for group in sorted(groups.values(), key=min))


def _environment() -> dict[str, str]:
    """For tools whose output is read: no translations."""
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C"}


# Written --------------------------------------------------------------------------------------------


def to_toml(topology: Topology, remarks: Sequence[str] = ()) -> str:
    """A topology as the text of a recipe, remarks first; reading it gives the same topology again."""
    lines = [f"# {remark}" for remark in remarks]
    lines.append(f"description = {quoted(topology.description)}")
    for key in ("sockets", "cores", "caches"):
        lists: tuple[str, ...] = getattr(topology, key)
        if lists:
            lines += _array(key, lists)
    for node in topology.nodes:
        lines += ["", "[[nodes]]", f"id = {node.id}"]
        lines += [f"cpus = {quoted(node.cpus)}"] if node.cpus else []
        lines += [f"memory_mib = {node.memory_mib}"]
    for device in topology.devices:
        lines += ["", "[[devices]]", f"address = {quoted(device.address)}"]
        lines += [f"node = {device.node}"] if device.node is not None else []
        lines += [f"description = {quoted(device.description)}"]
        lines += [f"virtual_functions = {device.virtual_functions}"] if device.virtual_functions else []
    return "\n".join(lines) + "\n"


def _array(key: str, items: Sequence[str], width: int = 100) -> list[str]:
    """An array of strings: on one line where it fits, else filled line by line."""
    words = [quoted(item) for item in items]
    one = f"{key} = [{', '.join(words)}]"
    if len(one) <= width:
        return [one]
    lines = [f"{key} = [", " "]
    for item in words:
        if len(lines[-1]) + len(item) + 2 > width:
            lines.append(" ")
        lines[-1] += f" {item},"
    return [*lines, "]"]


def quoted(text: str) -> str:
    """A TOML basic string; JSON's escapes are a part of TOML's, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
