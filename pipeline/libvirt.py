"""Guests for libvirt: the XML of a domain, and a script that defines it on the machine where it lies.

Everything that names a CPU or a node is the guest's `Placement`. The XML says `/opt/virt-rt/<platform>/` for what
was built and `/var/lib/virt-rt/<platform>/<guest>/` for what the guest writes; `define.sh` puts the places of its
machine there, and the addresses of virtual functions, which are known only where the device is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.action import Action, File, Output, Step
from pipeline.architecture import architecture
from pipeline.cpuplan import HostPlan, Placement
from pipeline.errors import InternalError
from pipeline.image import command_line
from pipeline.launch import mac_address, vf_counts
from pipeline.recipes import Disk, Function, Guest, Platform, TapNetwork, UserNetwork, VirtualFunction
from pipeline.rendering import render_template
from pipeline.topology import cpulist

DOMAIN = "domain.xml"
DEFINE = "define.sh"
#: How templates begin that say what a board is; the domain includes one.
BOARD = "board-"
#: The XML namespace of the element by which `define.sh` knows its own domains: a name, nothing lies there.
NAMESPACE = "urn:virt-rt:libvirt:1"


def libvirt_name(guest: str) -> str:
    """Name of the action that renders a guest's libvirt domain."""
    return f"libvirt:{guest}"


def libvirt(root: Path, name: str, platform: Platform, guests: Mapping[str, Guest], plan: HostPlan) -> Action:
    """Render the domain of the guest `name`; `root` is the checkout, the rest as in `variables`."""
    directory = root / "recipes" / "templates" / "libvirt"
    templates = {
        path.name: File.read(path, f"recipes/templates/libvirt/{path.name}")
        for path in sorted(directory.glob("*.j2"))
        # of the boards the guest's own
        if not path.name.startswith(BOARD)
        or path.name == f"{BOARD}{architecture(platform.arch).board.name}.xml.j2"
    }
    values = variables(name, platform, guests, plan.guests[name])

    def run(step: Step) -> None:
        texts = {template: (step.inputs / template).read_text() for template in templates}
        for output in (DOMAIN, DEFINE):
            (step.out / output).write_text(render(output, values, texts))
        (step.out / DEFINE).chmod(0o755)

    return Action(
        name=libvirt_name(name),
        kind="libvirt",
        version=1,
        arch=platform.arch,
        summary=f"the libvirt domain of {name}",
        run=run,
        files=templates,
        parameters=values,
        outputs=(Output(DOMAIN), Output(DEFINE)),
        place=f"{guests[name].platform}/libvirt/{name}",
    )


def variables(
    name: str, platform: Platform, guests: Mapping[str, Guest], placement: Placement
) -> dict[str, Any]:
    """What the templates say about the guest `name`, as JSON data: memory in MiB, CPUs as libvirt's lists.

    `guests` are all guests of the platform: a device makes the virtual functions of all of them at once.
    Raises `InternalError` when the placement is not one of this guest.
    """
    guest, split = guests[name], placement.split
    if (
        placement.name != name
        or len(placement.pins) != guest.vcpus
        or (*split.housekeeping, *split.isolated) != tuple(range(guest.vcpus))
        or not placement.emulator
    ):
        raise InternalError(f"libvirt domain {name}: {placement} does not place it", "place this very guest")
    arch = architecture(platform.arch)
    counts = vf_counts(guests)
    devices = [_device(device, counts) for device in guest.devices]
    networks = [_network(name, index, network) for index, network in enumerate(guest.networks)]
    state = f"/var/lib/virt-rt/{guest.platform}/{name}"
    return {
        "guest": name,
        "platform": guest.platform,
        "description": guest.description,
        "namespace": NAMESPACE,
        "built": f"/opt/virt-rt/{guest.platform}/",
        "state": f"{state}/",
        "state_directory": state,
        "machine_arch": arch.machine,
        "board": arch.board.name,
        "serial": arch.board.serial,
        "firmware_code": arch.board.code,
        "firmware_variables": arch.board.variables,
        "kernel": arch.image,
        "boot": guest.boot,
        "cmdline": command_line(guest, platform),
        "memory_mib": placement.memory_mib,
        "hugepage_kib": placement.hugepage_kib,
        "node": placement.node,
        "pins": list(placement.pins),
        "emulator": cpulist(placement.emulator),
        "realtime_vcpus": cpulist(split.isolated),
        "priority": placement.priority,
        "disks": [_disk(index, disk) for index, disk in enumerate(guest.disks, start=1)],
        "disk_paths": [disk.path for disk in guest.disks],
        "networks": [net for net in networks if not net.get("ssh_port")],
        "forwards": [net for net in networks if net.get("ssh_port")],
        "devices": devices,
        "functions": [d.address for d in guest.devices if isinstance(d, Function)],
        "virtual_functions": [device for device in devices if device["kind"] != "pci"],
    }


def _disk(index: int, disk: Disk) -> dict[str, Any]:
    """A disk beside the image, which is number 0. What lies in /dev is a block device."""
    block = disk.path.startswith("/dev/")
    return {
        "type": "block" if block else "file",
        "attribute": "dev" if block else "file",
        "path": disk.path,
        "format": disk.format,
        "readonly": disk.readonly,
        "target": disk_target(index),
    }


def disk_target(index: int) -> str:
    """The name of a virtio disk by its number from 0, as Linux counts: vda, ..., vdz, vdaa.

    Source: drivers/block/virtio_blk.c, virtblk_name_format().
    """
    letters = ""
    while index >= 0:
        letters = chr(ord("a") + index % 26) + letters
        index = index // 26 - 1
    return f"vd{letters}"


def _network(name: str, index: int, network: UserNetwork | TapNetwork) -> dict[str, Any]:
    # Without an address libvirt would draw another one each time the guest is defined.
    mac = network.mac or mac_address(name, index)
    if isinstance(network, TapNetwork):
        return {
            "kind": "tap",
            "name": network.name,
            "bridge": network.bridge,
            "vhost": network.vhost,
            "mac": mac,
        }
    return {"kind": "user", "ssh_port": network.ssh_port, "mac": mac}


def _device(device: Function | VirtualFunction, counts: Mapping[str, int]) -> dict[str, Any]:
    """A passed-through function; `address` is XML, for a virtual function the words that stand for it.

    A virtual function with a hardware address or a VLAN is a network card, and libvirt sets both through the
    physical function. Of any other nothing is known, so it is passed as it is.
    """
    if isinstance(device, Function):
        return {"kind": "pci", "address": pci_address(device.address)}
    return {
        "kind": "nic" if device.mac or device.vlan else "vf",
        "physical": device.physical,
        "number": device.number,
        "count": counts[device.physical],
        "mac": device.mac,
        "vlan": device.vlan,
        # An interface's source has a type, and a hostdev's must not have one.
        "attributes": 'type="pci" ' if device.mac or device.vlan else "",
        # A source without an address is refused by libvirt, so that nobody starts what define.sh has not seen.
        "address": f"<!-- define.sh: {device.physical} virtfn{device.number} -->",
    }


def pci_address(address: str) -> str:
    """A PCI function (`0000:05:00.0`) as libvirt writes it in the source of a `hostdev`."""
    domain, bus, rest = address.split(":")
    slot, function = rest.split(".")
    return f'<address domain="0x{domain}" bus="0x{bus}" slot="0x{slot}" function="0x{function}"/>'


def render(output: str, values: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    """Render `DOMAIN` or `DEFINE` with what `variables` gives.

    `texts` maps file names of `recipes/templates/libvirt/` to their text. Raises `UserError` when a template
    asks for what is not given.
    """
    return render_template(f"{output}.j2", texts, values, output)
