"""The stack proof: a platform's host, emulated, runs its guest under real KVM with devices passed through.

The lab's board has two devices that the recipes do not speak of, a NIC with virtual functions and qemu's `edu`.
So launch scripts and host tuning are rendered once more, by the same code, for the same guest given these two.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import msgspec

from pipeline.action import ALL, Action, File, Output, Upstream
from pipeline.architecture import architecture
from pipeline.boot import BUILDER
from pipeline.cpuplan import HostPlan
from pipeline.drivers import ROOT as DRIVER_ROOT
from pipeline.drivers import driver_name
from pipeline.image import DISK, image_name
from pipeline.inputs import ROOTFS, builder_name
from pipeline.kernel import kernel_name
from pipeline.launch import launch
from pipeline.packages import guest_variables, platform_variables
from pipeline.qemu import qemu_name
from pipeline.recipes import Function, Guest, Platform, VirtualFunction
from pipeline.rendering import render_template
from pipeline.settings import Table, chosen, host_command_line
from pipeline.topology import cpulist
from pipeline.tuning import ROOT, tuning

#: The userland of the emulated host.
HOST_BUILDER = "lab-host"
STEP = "recipes/steps/lab-stack.sh"
HELPERS = (
    "pipeline/bootproof.py",
    "pipeline/gate.py",
    "pipeline/labboard.py",
    "pipeline/measure/cyclictestdata.py",
    "pipeline/measure/reading.py",
    "pipeline/stackgate.py",
    "pipeline/stackhost.py",
    "pipeline/stackproof.py",
    "pipeline/stackrecords.py",
    "recipes/lab/virt-rt-stack-alone.service",
    "recipes/lab/virt-rt-stack-echo.py",
    "recipes/lab/virt-rt-stack-guest.service",
    "recipes/lab/virt-rt-stack-guest.sh",
    "recipes/lab/virt-rt-stack-host.sh",
    "recipes/lab/virt-rt-stack-lab.service",
    "recipes/lab/virt-rt-stack-qemu.sh",
    "recipes/lab/virt-rt-stack-settle.sh",
    "recipes/lab/virt-rt-stack-tools.sh",
    "recipes/lab/virt-rt-stack.service",
)
#: Packets that are sent through the guest's virtual function, and have to come back.
ECHOES = 20
#: The driver of the device that the guest is given whole, and how many interrupts it asks for.
DRIVER, INTERRUPTS = "irqlat-guest", 300
#: Where the board has them: see `pipeline.stackproof.board`.
PHYSICAL, FUNCTION = "0000:01:00.0", "0000:02:00.0"


def stack_name(platform: str) -> str:
    """Name of the action that proves a platform's host and guest together."""
    return f"stack:{platform}"


def stack_proof(
    root: Path,
    name: str,
    platform: Platform,
    guests: Mapping[str, Guest],
    plan: HostPlan,
    table: Table,
    sabotage: str = "",
) -> tuple[Action, ...]:
    """The proof, and before it what is rendered for it; `root` is the checkout, `guests` are the platform's.

    `sabotage` is one of `stackgate.SABOTAGES`, and makes a proof that must fail. The first guest by name is run. A
    vCPU of it is moved by hand: to an isolated CPU that no guest has, or to a housekeeping CPU where there is none.
    """
    guest_name = min(guests)
    placement = plan.guests[guest_name]
    taken = {cpu for guest in plan.guests.values() for cpu in guest.pins}
    elsewhere = [cpu for cpu in plan.isolated if cpu not in taken] or plan.housekeeping
    devices = (VirtualFunction(physical=PHYSICAL, number=0), Function(address=FUNCTION))
    equipped = {
        each: msgspec.structs.replace(guest, devices=devices if each == guest_name else ())
        for each, guest in guests.items()
    }
    scripts = dataclasses.replace(
        launch(root, guest_name, platform, equipped, plan),
        name=f"stack-launch:{name}",
        summary=f"the launch scripts of {guest_name} with the devices of the lab's board",
        place=None,
    )
    tuned = dataclasses.replace(
        tuning(root, name, platform, plan, equipped, table),
        name=f"stack-tuning:{name}",
        summary=f"the host tuning of {name} with the devices of the lab's board",
        place=None,
    )
    boot_image = architecture(platform.arch).image
    below = f"artifacts/{name}"
    inputs = {
        "rootfs.tar": Upstream(builder_name(HOST_BUILDER), ROOTFS),
        f"host/{boot_image}": Upstream(kernel_name(name, "host"), boot_image),
        "host/kernelrelease": Upstream(kernel_name(name, "host"), "kernelrelease"),
        "host/modules": Upstream(kernel_name(name, "host"), "modules"),
        "tuning/root": Upstream(tuned.name, ROOT),
        # laid out as in artifacts/, where the launch scripts find their neighbours
        f"{below}/qemu": Upstream(qemu_name(name), ALL),
        f"{below}/kernel/guest/{boot_image}": Upstream(kernel_name(name, "guest"), boot_image),
        f"{below}/kernel/guest/kernelrelease": Upstream(kernel_name(name, "guest"), "kernelrelease"),
        f"{below}/image/{guest_name}/{DISK}": Upstream(image_name(guest_name), DISK),
        f"{below}/launch/{guest_name}": Upstream(scripts.name, ALL),
        # shown in the host instead of what is installed there
        "launch": Upstream(scripts.name, ALL),
        # given to the guest as a disk
        "tools": Upstream(driver_name(name, DRIVER), DRIVER_ROOT),
    }
    vcpu = placement.split.isolated[-1]
    expected = {
        "guest": guest_name,
        "vcpu": vcpu,
        "cpu": placement.pins[vcpu],
        "other_cpu": elsewhere[-1],
        "cpus": len(plan.topology.cpus),
        "memory_mib": sum(node.memory_mib for node in plan.topology.nodes),
        "parameters": [
            parameter for parameter, _ in host_command_line(plan, table, chosen(root, name, platform, table))
        ],
        "physical": PHYSICAL,
        "function": FUNCTION,
        "isolated": cpulist(placement.split.isolated),
        "emulator": cpulist(placement.emulator),
        "masked": guests[guest_name].image.masked_units,
        "boot": guests[guest_name].boot,
        "echoes": ECHOES,
        "interrupts": INTERRUPTS,
    }
    proof = Action(
        name=stack_name(name),
        kind="stack-proof",
        version=2,
        arch=platform.arch,
        summary=f"the proof that a host of {name} runs its guest under KVM and gives devices back (emulated)",
        builder=builder_name(BUILDER),
        script=File.read(root / STEP, STEP),
        files={
            **{Path(path).name: File.read(root / path, path) for path in HELPERS},
            "expected.json": File(json.dumps(expected, indent=1).encode(), origin="recipes/guests/*.toml"),
            **_service(root, name, platform, guest_name, guests[guest_name]),
        },
        inputs=inputs,
        environment={"PLATFORM": name, "SABOTAGE": sabotage},
        outputs=(
            Output("stack.json"),
            Output("console-host.log"),
            Output("console-guest.log"),
            Output("records", "directory"),
        ),
        resource="lab",
        place=f"{name}/stack",
    )
    return scripts, tuned, proof


def _service(root: Path, name: str, platform: Platform, guest_name: str, guest: Guest) -> dict[str, File]:
    """The guest's service and its settings, as the package of its launch scripts installs them."""
    variables = platform_variables(name, platform) | guest_variables(guest_name, guest)
    files = {}
    for file, place in (
        ("guest.service", f"usr/lib/systemd/system/virt-rt-guest-{guest_name}.service"),
        ("guest.conf", f"etc/virt-rt/guests/{guest_name}.conf"),
    ):
        path = f"recipes/packages/launch/{file}"
        text = render_template(file, {file: (root / path).read_text()}, variables, path)
        files[f"service/{place}"] = File(text.encode(), origin=path)
    return files
