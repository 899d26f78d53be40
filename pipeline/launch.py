"""The launch scripts of a guest, rendered from `recipes/templates/`.

`kvmqemu.sh` boots the kernel that lies outside the disk, `kvmqemu-rfs.sh` the one inside; both extend
`kvmqemu-base.sh.j2`, which takes in what the guest needs of the other parts. Everything a person may change at
start is a shell variable at the top of the script.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.action import Action, File, Output, Step
from pipeline.architecture import architecture
from pipeline.cpuplan import HUGEPAGES, HostPlan
from pipeline.errors import UserError
from pipeline.image import command_line
from pipeline.recipes import Function, Guest, Platform, TapNetwork, UserNetwork, VirtualFunction
from pipeline.rendering import render_template
from pipeline.topology import cpulist

#: The scripts each guest gets.
SCRIPTS = ("kvmqemu.sh", "kvmqemu-rfs.sh")

#: Variables that become part of paths, unit names and qemu options: words that need no quoting anywhere.
NAMES = ("guest", "platform")


def launch_name(guest: str) -> str:
    """Name of the action that renders a guest's launch scripts."""
    return f"launch:{guest}"


def mac_address(guest: str, index: int) -> str:
    """The MAC address of a guest's network `index` (from 0) when its recipe names none.

    qemu gives every guest the same first address, which two guests in one bridge cannot share. 52:54:00 is the
    prefix that qemu and libvirt use; the rest is from the names.
    """
    digest = hashlib.sha256(f"{guest}/{index}".encode()).hexdigest()
    return ":".join(("52:54:00", digest[0:2], digest[2:4], digest[4:6]))


def vf_counts(guests: Mapping[str, Guest]) -> dict[str, int]:
    """How many virtual functions the guests of a platform need of each physical one, by its PCI address.

    A device makes all its virtual functions at once, so the first guest makes those of the others, too.
    """
    counts: dict[str, int] = {}
    for guest in guests.values():
        for device in guest.devices:
            if isinstance(device, VirtualFunction):
                counts[device.physical] = max(counts.get(device.physical, 0), device.number + 1)
    return dict(sorted(counts.items()))


def _device(device: Function | VirtualFunction) -> str:
    """A word of the script's DEVICES."""
    if isinstance(device, Function):
        return device.address
    options = [f"mac={device.mac}"] * bool(device.mac) + [f"vlan={device.vlan}"] * bool(device.vlan)
    return ",".join([f"{device.physical}/{device.number}", *options])


def _network(name: str, index: int, network: UserNetwork | TapNetwork, first: bool) -> dict[str, Any]:
    """What the templates want to know of a network; `first`: SSH_PORT leads to this one."""
    if isinstance(network, UserNetwork):
        return {
            "kind": "user",
            "first": first,
            "ssh_port": network.ssh_port or "",
            "mac": network.mac or "",
        }
    return {
        "kind": "tap",
        "name": network.name,
        "bridge": network.bridge or "",
        "vhost": "on" if network.vhost else "off",
        "mac": network.mac or mac_address(name, index),
    }


def variables_of(
    name: str, platform: Platform, guests: Mapping[str, Guest], plan: HostPlan
) -> dict[str, Any]:
    """What the templates say of the guest `name`: JSON data, as `render` takes it.

    `guests` are all guests of the platform, `plan` is the platform's.
    """
    guest, placement = guests[name], plan.guests[name]
    sizes = {kib: size for size, kib in HUGEPAGES.items()}
    users = [network for network in guest.networks if isinstance(network, UserNetwork)]
    return {
        "guest": name,
        "platform": guest.platform,
        "vcpus": guest.vcpus,
        "memory_mib": placement.memory_mib,
        "hugepages": sizes[placement.hugepage_kib],
        "node": placement.node,
        "pins": list(placement.pins),
        "realtime": cpulist(placement.split.isolated),
        "priority": placement.priority,
        "emulator": cpulist(placement.emulator),
        "housekeeping": cpulist(plan.housekeeping),
        "networks": [
            _network(name, index, network, network is users[0] if users else False)
            for index, network in enumerate(guest.networks)
        ],
        "disks": [
            {"path": disk.path, "format": disk.format, "readonly": disk.readonly} for disk in guest.disks
        ],
        "devices": [_device(device) for device in guest.devices],
        "vf_counts": [f"{physical}={count}" for physical, count in vf_counts(guests).items()],
        "ssh_port": (users[0].ssh_port or "") if users else "",
        "cmdline": command_line(guest, platform),
        **machine_of(platform.arch),
    }


def machine_of(arch: str) -> dict[str, Any]:
    """What the templates want to know of the machines of an architecture."""
    of = architecture(arch)
    asked = ("machine", "cpu", "emulated_cpu", "parameters", "code", "variables", "probe")
    board = dataclasses.asdict(of.board)
    board["parameters"] = list(of.board.parameters)
    return {"qemu_system": of.qemu_system, "kernel": of.image, "board": {name: board[name] for name in asked}}


def launch(root: Path, name: str, platform: Platform, guests: Mapping[str, Guest], plan: HostPlan) -> Action:
    """Render the launch scripts of the guest `name`; `root` is the checkout, the rest as in `variables_of`."""
    directory = root / "recipes" / "templates"
    templates = {
        path.name: File.read(path, f"recipes/templates/{path.name}") for path in directory.glob("kvmqemu*.j2")
    }
    variables = variables_of(name, platform, guests, plan)

    def run(step: Step) -> None:
        texts = {template: (step.inputs / template).read_text() for template in templates}
        for script in SCRIPTS:
            target = step.out / script
            target.write_text(render(script, variables, texts))
            target.chmod(0o755)

    return Action(
        name=launch_name(name),
        kind="launch",
        version=2,
        arch=platform.arch,
        summary=f"the launch scripts of {name}",
        run=run,
        files=templates,
        parameters=variables,
        outputs=tuple(Output(script) for script in SCRIPTS),
        place=f"{guests[name].platform}/launch/{name}",
    )


def render(script: str, variables: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    """Render one of `SCRIPTS`.

    `variables` are those of `variables_of`: `guest`, `platform` (words of a-z, 0-9 and -); `vcpus` (count),
    `memory_mib` (MiB), `hugepages` (none, 2M, 1G), `node`; `pins` (a host CPU per vCPU), `realtime` (list of
    vCPUs), `priority`; `emulator`, `housekeeping` (lists of host CPUs); `networks`, `disks`, `devices`,
    `vf_counts`; `ssh_port` (TCP port on loopback, empty text for none), `cmdline` (the kernel's command line for
    the boot with the kernel outside); and those of `machine_of`. `texts` maps file names of `recipes/templates/`
    to their text.

    Raises `UserError` when a name is not such a word, a variable is missing, or a template is wrong.
    """
    for name in NAMES:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", str(variables.get(name, ""))):
            raise UserError(
                f"launch script {script}: {name} is {variables.get(name, '')!r}",
                "name it with lower-case letters, digits and '-' only",
            )
    if "networks" not in variables:
        raise UserError(f"launch script {script}: networks is not given", "give all variables")
    taps = [network for network in variables["networks"] if network["kind"] == "tap"]
    return render_template(
        f"{script}.j2", texts, {**variables, "script": script, "taps": taps}, f"launch script {script}"
    )
