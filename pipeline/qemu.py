"""qemu-kvm-rt: KVM's user-space half, with our patch queue, in a prefix of its own."""

from __future__ import annotations

from pathlib import Path

from pipeline.action import Action, File, Output, Upstream
from pipeline.inputs import TREE, builder_name, source_name
from pipeline.recipes import Platform

BUILDER = "qemu"
PREFIX = "/opt/virt-rt/qemu"
#: The directories of `PREFIX`; together they also run from anywhere else.
DIRECTORIES = ("bin", "libexec", "share")


def qemu_name(platform: str) -> str:
    """Name of the action that builds a platform's qemu."""
    return f"qemu:{platform}"


def qemu(root: Path, name: str, platform: Platform) -> Action:
    """Build qemu for the machines a platform asks for; `root` is the checkout."""
    step = "recipes/steps/qemu.sh"
    return Action(
        name=qemu_name(name),
        kind="qemu",
        version=1,
        arch=platform.arch,
        summary=f"qemu-kvm-rt for {name}",
        builder=builder_name(BUILDER),
        script=File.read(root / step, step),
        inputs={"source": Upstream(source_name(platform.qemu.source), TREE, unpack=True)},
        environment={"TARGETS": " ".join(platform.qemu.targets), "PREFIX": PREFIX},
        outputs=tuple(Output(directory, "directory") for directory in DIRECTORIES),
        resource="heavy",
        ccache=True,
        place=f"{name}/qemu",
    )
