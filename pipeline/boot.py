"""The boot proof: every guest boots both ways with our own qemu, emulated, and is held against its plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.action import ALL, Action, File, Output, Upstream
from pipeline.architecture import architecture
from pipeline.cpuplan import guest_plan
from pipeline.image import DISK, image_name
from pipeline.inputs import builder_name
from pipeline.kernel import kernel_name
from pipeline.launch import launch_name
from pipeline.qemu import emulator_of
from pipeline.recipes import Guest, Platform

BUILDER = "lab"
STEP = "recipes/steps/lab-boot.sh"
HELPERS = (
    "pipeline/bootproof.py",
    "pipeline/gate.py",
    "pipeline/measure/cyclictestdata.py",
    "pipeline/measure/reading.py",
    "recipes/lab/virt-rt-proof.service",
    "recipes/lab/virt-rt-proof.sh",
)
#: Seconds that cyclictest runs, and its period in microseconds. Long enough to find a thread that
#: was never scheduled; under emulation a
#: longer run would show nothing more, and a shorter period would find the emulator busy.
DURATION_S, INTERVAL_US = 10, 10_000


def boot_name(platform: str) -> str:
    """Name of the action that boots a platform's guests."""
    return f"boot:{platform}"


def boot_proof(root: Path, name: str, platform: Platform, guests: Mapping[str, Guest]) -> Action:
    """Boot every guest of a platform both ways and assert what its recipes promise; `root` is the checkout."""
    boot_image = architecture(platform.arch).image
    below = f"artifacts/{name}"
    # laid out as in artifacts/, where the launch scripts find their neighbours
    inputs = {
        f"{below}/qemu": Upstream(emulator_of(name, platform), ALL),
        f"{below}/kernel/guest/{boot_image}": Upstream(kernel_name(name, "guest"), boot_image),
        f"{below}/kernel/guest/kernelrelease": Upstream(kernel_name(name, "guest"), "kernelrelease"),
    }
    expected = {}
    for guest_name, guest in guests.items():
        plan = guest_plan(guest.vcpus, guest.housekeeping_vcpus)
        inputs[f"{below}/image/{guest_name}/{DISK}"] = Upstream(image_name(guest_name), DISK)
        inputs[f"{below}/launch/{guest_name}"] = Upstream(launch_name(guest_name), ALL)
        expected[guest_name] = {
            "isolated": plan.isolated,
            "housekeeping": plan.housekeeping,
            "unwanted": guest.image.masked_units,
            "duration_s": DURATION_S,
            "interval_us": INTERVAL_US,
        }
    logs = [f"console-{guest}-{way}.log" for guest in guests for way in ("outside", "inside")]
    return Action(
        name=boot_name(name),
        kind="boot-proof",
        version=1,
        arch=platform.arch,
        summary=f"the proof that the guests of {name} boot both ways and keep their plan (emulated)",
        builder=builder_name(BUILDER),
        script=File.read(root / STEP, STEP),
        files={
            **{Path(path).name: File.read(root / path, path) for path in HELPERS},
            "expected.json": File(json.dumps(expected, indent=1).encode(), origin="recipes/guests/*.toml"),
        },
        inputs=inputs,
        environment={"PLATFORM": name},
        outputs=(Output("boot.json"), *(Output(log) for log in logs)),
        resource="lab",
        place=f"{name}/boot",
    )
