"""qemu-kvm-rt: KVM's user-space half, with our patch queue, in a prefix of its own."""

from __future__ import annotations

from pathlib import Path

from pipeline.action import Action, File, Output, Upstream
from pipeline.architecture import BUILD, architecture
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
    return _compile(root, qemu_name(name), f"qemu-kvm-rt for {name}", platform, platform.arch, f"{name}/qemu")


def emulator_name(platform: str) -> str:
    """Name of the action whose qemu emulates a platform's machines here.

    That is the platform's own qemu where it runs here, and else one that is built beside it.
    """
    return f"emulator:{platform}"


def emulator(root: Path, name: str, platform: Platform) -> Action | None:
    """Build qemu for this machine to emulate those of a platform; None where the platform's own qemu can."""
    if not architecture(platform.arch).crossed:
        return None
    summary = f"qemu that emulates {name} on the machine that builds"
    return _compile(root, emulator_name(name), summary, platform, BUILD, None)


def emulator_of(name: str, platform: Platform) -> str:
    """Name of the action whose qemu runs here and has the platform's machines."""
    return emulator_name(name) if architecture(platform.arch).crossed else qemu_name(name)


def _compile(
    root: Path, action: str, summary: str, platform: Platform, arch: str, place: str | None
) -> Action:
    """Build qemu with programs for `arch`, and the machines of the platform."""
    step = "recipes/steps/qemu.sh"
    runs_on, board = architecture(arch), architecture(platform.arch).board
    # KVM runs guests of the machine's own architecture only
    accelerators = ("kvm", "tcg") if arch == platform.arch else ("tcg",)
    return Action(
        name=action,
        kind="qemu",
        version=1,
        arch=arch,
        summary=summary,
        builder=builder_name(runs_on.builder(BUILDER)),
        script=File.read(root / step, step),
        inputs={"source": Upstream(source_name(platform.qemu.source), TREE, unpack=True)},
        environment={
            "TARGETS": " ".join(platform.qemu.targets),
            "PREFIX": PREFIX,
            "BOARD": board.name,
            "DEVICES": " ".join(board.devices),
            "FIRMWARE": " ".join(board.firmware),
            "OPTION_ROMS": " ".join(board.option_roms),
            "OPTIONS": " ".join(runs_on.qemu_options),
            "CROSS_COMPILE": runs_on.cross_compile,
            "RUNNER": runs_on.runner,
            "ACCELERATORS": " ".join(accelerators),
        },
        outputs=tuple(Output(directory, "directory") for directory in DIRECTORIES),
        resource="heavy",
        ccache=True,
        place=place,
    )
