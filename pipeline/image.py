"""Guest images: a root file system baked by diskimage-builder, and the disk made of it."""

from __future__ import annotations

from pathlib import Path

from pipeline import locks
from pipeline.action import ALL, Action, File, Output, Upstream
from pipeline.architecture import architecture
from pipeline.cpuplan import guest_plan
from pipeline.inputs import builder_name, packages_name, require_request
from pipeline.kernel import kernel_name
from pipeline.recipes import Guest, Platform

BUILDER = "image"
ELEMENTS = ("debian-locked", "virt-rt-guest")
DISK = "disk.qcow2"
#: Where a guest's kernel finds its root, whichever way it was loaded; the disk step names the partition so.
ROOT = "PARTLABEL=virt-rt-root"
#: What the bake may do beyond an ordinary step: mount and chroot, and give files owners and modes.
#: Without FSETID it would succeed with wrong mode bits.
BAKE_CAPABILITIES = (
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "MKNOD",
    "SETGID",
    "SETUID",
    "SYS_ADMIN",
    "SYS_CHROOT",
)


def rootfs_name(guest: str) -> str:
    """Name of the action that bakes a guest's root file system."""
    return f"rootfs:{guest}"


def image_name(guest: str) -> str:
    """Name of the action that makes a guest's disk."""
    return f"image:{guest}"


def command_line(guest: Guest, platform: Platform) -> str:
    """The guest's kernel command line: where its root and console are, then what the CPU plan says."""
    plan = guest_plan(guest.vcpus, guest.housekeeping_vcpus)
    console = architecture(platform.arch).console
    extra = guest.cmdline.extra if guest.high_resolution_timers else ("highres=off", *guest.cmdline.extra)
    return plan.command_line(root=ROOT, console=console, extra=extra)


def rootfs(root: Path, name: str, guest: Guest, platform: Platform, locked: locks.PackageSet) -> Action:
    """Bake a guest's root file system from its locked packages; `root` is the checkout."""
    image, arch = guest.image, architecture(platform.arch)
    require_request(locked, image.packages, f"recipes/guests/{name}.toml", image.suite)
    step = "recipes/steps/rootfs.sh"
    return Action(
        name=rootfs_name(name),
        kind="rootfs",
        version=1,
        arch=platform.arch,
        summary=f"the root file system of {name}",
        builder=builder_name(arch.builder(BUILDER)),
        script=File.read(root / step, step),
        files=_elements(root),
        inputs={"debs": Upstream(packages_name(locked.name), ALL)},
        environment={
            "ARCH": platform.arch,
            "RUNNER": arch.runner,
            "SUITE": image.suite,
            "INCLUDE": " ".join(image.packages),
            "MASKED_UNITS": " ".join(image.masked_units),
            "CONSOLE_LOGIN": str(int(image.console_login)),
            "SSH_AUTHORIZED_KEYS": "\n".join(image.ssh_authorized_keys),
            "HOSTNAME_": name,
        },
        outputs=(Output("rootfs.tar"), Output("packages.txt")),
        capabilities=BAKE_CAPABILITIES,
        resource="heavy",
    )


def disk(root: Path, name: str, guest: Guest, platform: Platform) -> Action:
    """Lay out a guest's disk with the guest kernel inside; `root` is the checkout."""
    step = "recipes/steps/disk.sh"
    arch = architecture(platform.arch)
    of_kernel = kernel_name(guest.platform, "guest")
    return Action(
        name=image_name(name),
        kind="disk",
        version=1,
        arch=platform.arch,
        summary=f"the disk of {name}, its kernel inside",
        builder=builder_name(arch.builder(BUILDER)),
        script=File.read(root / step, step),
        inputs={
            "rootfs.tar": Upstream(rootfs_name(name), "rootfs.tar"),
            arch.image: Upstream(of_kernel, arch.image),
            "modules": Upstream(of_kernel, "modules"),
        },
        environment={
            "KERNEL": arch.image,
            "EFI": arch.efi,
            "ROOT_TYPE": arch.root_type,
            "CMDLINE": command_line(guest, platform),
            "DISK_MIB": str(guest.image.disk_mib),
            "GUEST": name,
        },
        outputs=(Output(DISK),),
        resource="heavy",
        place=f"{guest.platform}/image/{name}",
    )


def _elements(root: Path) -> dict[str, File]:
    files = {}
    for element in ELEMENTS:
        directory = root / "recipes" / "elements" / element
        for path in sorted(directory.rglob("*")):
            if path.is_file() and path.name != "README.md":
                origin = path.relative_to(root).as_posix()
                files[origin.removeprefix("recipes/")] = File.read(path, origin)
    return files
