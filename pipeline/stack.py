"""The stack proof: a platform's host, emulated, runs its guest under real KVM with devices passed through.

The lab's board has two devices that the recipes do not speak of, a NIC with virtual functions and qemu's `edu`.
So launch scripts and host tuning are rendered once more, by the same code, for the same guest given these two.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pipeline.action import ALL, Action, File, Output, Upstream
from pipeline.architecture import architecture
from pipeline.boot import BUILDER
from pipeline.cpuplan import HostPlan
from pipeline.drivers import ROOT as DRIVER_ROOT
from pipeline.drivers import driver_name
from pipeline.image import DISK, image_name
from pipeline.inputs import builder_name
from pipeline.kernel import kernel_name
from pipeline.labhost import labhost_name
from pipeline.labtopology import machine_arguments
from pipeline.launch import launch
from pipeline.measure.record import Request, Stage
from pipeline.packages import MEASURE_TOOL
from pipeline.qemu import qemu_name
from pipeline.recipes import Function, Guest, Platform, VirtualFunction
from pipeline.settings import Table, chosen, host_command_line
from pipeline.topology import cpulist
from pipeline.tuning import ROOT, tuning

STEP = "recipes/steps/lab-stack.sh"
HELPERS = (
    "pipeline/bootproof.py",
    "pipeline/gate.py",
    "pipeline/labboard.py",
    "pipeline/measure/cyclictestdata.py",
    "pipeline/measure/reading.py",
    "pipeline/stackgate.py",
    "pipeline/stackmeasure.py",
    "pipeline/stackproof.py",
    "pipeline/stackrecords.py",
    "recipes/lab/virt-rt-stack-alone.service",
    "recipes/lab/virt-rt-stack-disturb.sh",
    "recipes/lab/virt-rt-stack-echo.py",
    "recipes/lab/virt-rt-stack-guest.service",
    "recipes/lab/virt-rt-stack-guest.sh",
    "recipes/lab/virt-rt-stack-host.sh",
    "recipes/lab/virt-rt-stack-lab.service",
    "recipes/lab/virt-rt-stack-late-guest.sh",
    "recipes/lab/virt-rt-stack-late-host.sh",
    "recipes/lab/virt-rt-stack-qemu.sh",
    "recipes/lab/virt-rt-stack-settle.sh",
    "recipes/lab/virt-rt-stack-tools.sh",
    "recipes/lab/virt-rt-stack.service",
)
#: Packets that are sent through the guest's virtual function, and have to come back.
ECHOES = 20
#: The driver of the device that the guest is given whole, and how many interrupts it asks for.
DRIVER, INTERRUPTS = "irqlat-guest", 300
#: How host and guest are measured: seconds, microseconds; long enough to find a thread that was never scheduled. The
#: host makes load for so long that the guest is done meanwhile.
DURATION_S, INTERVAL_US, HISTOGRAM_US, PRIORITY, LOAD_S = 10, 10_000, 100_000, 80, 300
HOST = "host"
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
        # what is booted, with everything installed from packages
        DISK: Upstream(labhost_name(name), DISK),
        "labhost.json": Upstream(labhost_name(name), "labhost.json"),
        "host/kernelrelease": Upstream(kernel_name(name, "host"), "kernelrelease"),
        # what the packages were made of, laid out as they install it
        f"{below}/qemu": Upstream(qemu_name(name), ALL),
        f"{below}/kernel/guest/{boot_image}": Upstream(kernel_name(name, "guest"), boot_image),
        f"{below}/kernel/guest/kernelrelease": Upstream(kernel_name(name, "guest"), "kernelrelease"),
        f"{below}/image/{guest_name}/{DISK}": Upstream(image_name(guest_name), DISK),
        # shown in the host instead of what is installed there
        "launch": Upstream(scripts.name, ALL),
        "tuning/root": Upstream(tuned.name, ROOT),
        "virt-rt-measure": Upstream(MEASURE_TOOL, "virt-rt-measure"),
        # given to the guest as a disk
        "tools": Upstream(driver_name(name, DRIVER), DRIVER_ROOT),
    }
    vcpu = placement.split.isolated[-1]
    expected = {
        "guest": guest_name,
        "vcpu": vcpu,
        "cpu": placement.pins[vcpu],
        "other_cpu": elsewhere[-1],
        "machine": machine_arguments(name, plan.topology),
        "parameters": [
            parameter for parameter, _ in host_command_line(
                plan, table, chosen(root, name, platform, table), platform.arch
            )
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
    asked = {
        HOST: _request(
            name,
            HOST,
            plan.isolated,
            plan.housekeeping,
            [
                _stage("cyclictest", plan.isolated),
                _stage("load", (), duration_s=LOAD_S),
            ],
        ),
        f"guest-{guest_name}": _request(
            name,
            f"guest-{guest_name}",
            placement.split.isolated,
            placement.split.housekeeping,
            [_stage("cyclictest", placement.split.isolated)],
        ),
    }
    proof = Action(
        name=stack_name(name),
        kind="stack-proof",
        version=3,
        arch=platform.arch,
        summary=f"the proof that a host of {name} runs its guest under KVM and gives devices back (emulated)",
        builder=builder_name(BUILDER),
        script=File.read(root / STEP, STEP),
        files={
            **{Path(path).name: File.read(root / path, path) for path in HELPERS},
            "expected.json": File(json.dumps(expected, indent=1).encode(), origin="recipes/guests/*.toml"),
            "measurement.json": File(json.dumps(asked, indent=1).encode(), origin="recipes/guests/*.toml"),
        },
        inputs=inputs,
        environment={"PLATFORM": name, "SABOTAGE": sabotage},
        outputs=(
            Output("stack.json"),
            Output("console-host.log"),
            Output("console-guest.log"),
            Output("records", "directory"),
            Output("measurement", "directory"),
        ),
        resource="lab",
        place=f"{name}/stack",
    )
    return scripts, tuned, proof


def _request(
    platform: str, place: str, isolated: Sequence[int], housekeeping: Sequence[int], stages: list[Stage]
) -> dict[str, Any]:
    """What a place is asked to measure; kernel and plan are filled in where the proof runs."""
    request = Request(
        place=place,
        platform=platform,
        kernel_release="",
        plan_sha256="",
        isolated=list(isolated),
        housekeeping=list(housekeeping),
        segment_s=3600,
        stages=stages,
    )
    return dataclasses.asdict(request)


def _stage(tool: str, cpus: Sequence[int], *, duration_s: int = DURATION_S) -> Stage:
    judged = tool == "cyclictest"
    return Stage(
        name=tool,
        tool=tool,
        cpus=list(cpus),
        priority=PRIORITY if judged else 0,
        interval_us=INTERVAL_US if judged else 0,
        duration_s=duration_s,
        histogram_us=HISTOGRAM_US if judged else 0,
        loads=["hackbench"],
        argv=[],
    )
