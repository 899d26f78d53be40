"""The lab's emulated host: a Debian machine whose own apt installed a platform's packages from their signed repository.

Its disk is made in two steps. The first lays out what Debian's installer would: GRUB, Debian's kernel, and the Debian
packages that ours depend on, so that apt needs no other source than ours. The second boots that, emulated, installs by
the documented commands, and judges the machine that this leaves.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from pipeline.action import ALL, Action, File, Output, Upstream
from pipeline.boot import BUILDER
from pipeline.cpuplan import HostPlan
from pipeline.drivers import Build
from pipeline.image import DISK
from pipeline.inputs import ROOTFS, builder_name
from pipeline.kernel import kernel_name
from pipeline.labtopology import machine_arguments
from pipeline.packages import package_name
from pipeline.qemu import qemu_name
from pipeline.recipes import Platform
from pipeline.repo import repo_name
from pipeline.settings import Table, chosen, host_command_line

#: Makes the disk; the userland on it.
DISK_BUILDER, HOST_BUILDER = "lab-disk", "lab-host"
DISK_STEP, STEP = "recipes/steps/lab-disk.sh", "recipes/steps/lab-host.sh"
HELPERS = (
    "pipeline/gate.py",
    "pipeline/installgate.py",
    "pipeline/labboard.py",
    "pipeline/labinstall.py",
    "pipeline/measure/cyclictestdata.py",
    "pipeline/measure/reading.py",
    "recipes/lab/virt-rt-install.service",
    "recipes/lab/virt-rt-install.sh",
)
#: The host name, from which the disk's UUIDs follow; and the disk's size, MiB, mostly holes.
HOSTNAME, DISK_MIB = "lab-host", 3072
#: Units of Debian that only take time in a host that lives for minutes, or would use apt beside the lab.
MASKED_UNITS = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "getty@tty1.service",
    "ldconfig.service",
    "serial-getty@ttyS0.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
)
#: Parameters that keep CPUs to guests: the fallback entry of the boot menu is without them.
ISOLATION = ("irqaffinity", "isolcpus", "nohz_full", "rcu_nocbs")


def disk_name(arch: str) -> str:
    """Name of the action that makes the disk of an emulated host of that architecture, before anything is installed."""
    return f"lab-disk:{arch}"


def labhost_name(platform: str) -> str:
    """Name of the action that has the emulated host of a platform install its packages."""
    return f"labhost:{platform}"


def packages_of(
    platform: str, guests: Iterable[str], drivers: Iterable[Build], actions: Collection[str]
) -> tuple[str, ...]:
    """Names of the packages that are installed on the emulated host, as a person would ask for them.

    `guests` and `drivers` are the platform's, `actions` are names of those that make its packages. In a name
    `{release}` stands for the release of the RT host kernel.
    """
    tools = f"virt-rt-tools-{platform}"
    return (
        f"virt-rt-host-{platform}",
        *(f"virt-rt-guest-{guest}" for guest in guests),
        *([tools] if package_name(platform, "tools") in actions else []),
        *(f"virt-rt-driver-{build.name}-{{release}}" for build in drivers if build.role == "host"),
    )


def disk(root: Path, arch: str) -> Action:
    """Lay out the disk of a host as Debian leaves it; `root` is the checkout."""
    return Action(
        name=disk_name(arch),
        kind="lab-disk",
        version=1,
        arch=arch,
        summary="the disk of the lab's emulated host, with GRUB and Debian's kernel",
        builder=builder_name(DISK_BUILDER),
        script=File.read(root / DISK_STEP, DISK_STEP),
        inputs={"rootfs.tar": Upstream(builder_name(HOST_BUILDER), ROOTFS)},
        environment={
            "ARCH": arch,
            "DISK_MIB": str(DISK_MIB),
            "HOSTNAME_": HOSTNAME,
            "MASKED_UNITS": " ".join(MASKED_UNITS),
        },
        outputs=(Output(DISK),),
        resource="heavy",
    )


def labhost(
    root: Path, name: str, platform: Platform, plan: HostPlan, table: Table, packages: Sequence[str]
) -> Action:
    """Install `packages` on the emulated host of the platform `name`, and judge what that leaves.

    `packages` are as in `packages_of`; one that the repository does not have ends the step.
    """
    expected = {
        "arch": platform.arch,
        "machine": machine_arguments(name, plan.topology),
        "parameters": [
            parameter for parameter, _ in host_command_line(
                plan, table, chosen(root, name, platform, table), platform.arch
            )
        ],
        "isolation": ISOLATION,
        "packages": packages,
    }
    return Action(
        name=labhost_name(name),
        kind="lab-host",
        version=1,
        arch=platform.arch,
        summary=f"the emulated host of {name}, on which its own apt installed the packages",
        builder=builder_name(BUILDER),
        script=File.read(root / STEP, STEP),
        files={
            **{Path(path).name: File.read(root / path, path) for path in HELPERS},
            "expected.json": File(json.dumps(expected, indent=1).encode(), origin="recipes/platforms/*.toml"),
        },
        inputs={
            DISK: Upstream(disk_name(platform.arch), DISK),
            "qemu": Upstream(qemu_name(name), ALL),
            "repo/apt": Upstream(repo_name(name), "apt"),
            "repo/key.asc": Upstream(repo_name(name), "key.asc"),
            "kernelrelease": Upstream(kernel_name(name, "host"), "kernelrelease"),
        },
        environment={"PLATFORM": name},
        outputs=(Output(DISK), Output("labhost.json"), Output("install.log"), Output("console.log")),
        resource="lab",
        place=f"{name}/labhost",
    )
