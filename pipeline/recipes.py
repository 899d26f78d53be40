"""What is asked for: builders, platforms and guests, read from `recipes/` and validated.

Unknown keys and wrong types are refused with the file, the line and what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from pipeline.architecture import ARCHITECTURES
from pipeline.cpuplan import MIN_GUEST_MIB, GuestRequest, HostPlan, PlanError
from pipeline.errors import UserError
from pipeline.placement import host_plan
from pipeline.recipefile import place_of, read
from pipeline.topology import CpuList, PciAddress, Topology, TopologyError

Name = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9.-]*\Z", max_length=63)]
Package = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9+.-]+\Z")]
#: A package of a builder: `name:arm64` is that architecture's, beside those of the builder's own.
BuilderPackage = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?\Z")]
Unit = Annotated[
    str, msgspec.Meta(pattern=r"\A[A-Za-z0-9:_.@-]+\.(service|timer|socket|target|mount|path|swap)\Z")
]
#: A name of qemu's for an emulated machine, such as `x86_64-softmmu`.
QemuTarget = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9_]+-softmmu\Z")]
#: Debian's name of an architecture.
Arch = Annotated[str, msgspec.Meta(pattern=rf"\A({'|'.join(ARCHITECTURES)})\Z")]
Line = Annotated[str, msgspec.Meta(pattern=r"\A[^\x00-\x1f\x7f]+\Z")]
Mac = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f][02468ace](:[0-9a-f]{2}){5}\Z")]
#: A network interface's name: what the kernel allows (15 bytes), and no shell would trip over.
Interface = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,14}\Z")]
#: One kernel parameter; quoting inside a command line is not worth the traps it brings.
Parameter = Annotated[str, msgspec.Meta(pattern=r"\A[^\s\"'\\,;][^\s\"'\\]*\Z")]


class Builder(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A container image in which steps run: a Debian suite and the packages asked of it."""

    description: Line
    suite: Name
    packages: Annotated[tuple[BuilderPackage, ...], msgspec.Meta(min_length=1)]


class KernelSources(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The source of a role's kernel, where it is not the platform's."""

    host: Name | None = None
    guest: Name | None = None


class PlatformKernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which source the platform's kernels are built from, and their configuration fragments.

    `sources` names another source for one role or both, so that kernels of two branches are side by side. Fragments
    are paths below `kernel-configs/`; of two lines about one symbol the later one counts.
    """

    source: Name
    sources: KernelSources = KernelSources()
    host: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    guest: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]

    def source_of(self, role: str) -> str:
        """The source of the role's kernel."""
        return (self.sources.host if role == "host" else self.sources.guest) or self.source

    def fragments_of(self, role: str) -> tuple[str, ...]:
        """The fragments of the role's configuration."""
        return self.host if role == "host" else self.guest


class PlatformQemu(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which source qemu is built from, and for which machines."""

    source: Name
    targets: Annotated[tuple[QemuTarget, ...], msgspec.Meta(min_length=1)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Latencies that the platform's real hardware must keep, in microseconds; `source` says who says so."""

    source: Line
    host_max_us: Annotated[int, msgspec.Meta(ge=1)]
    host_avg_us: Annotated[int, msgspec.Meta(ge=1)]
    guest_max_us: Annotated[int, msgspec.Meta(ge=1)]
    guest_avg_us: Annotated[int, msgspec.Meta(ge=1)]


class BiosSetting(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A firmware setting that only a person can make, and why."""

    setting: Line
    value: Line
    reason: Line


class Platform(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A machine type we build for.

    `extends` names the platform of which it is a variant: see `pipeline.inheritance`.

    `topology` names a file of `recipes/topologies/`; `housekeeping_cpus` is by default the first core of each
    socket; `choices` are settings of `recipes/tuning.toml` that trade safety for latency, off unless named.
    Without `high_resolution_timers` the host's kernel gets `highres=off`, as a guest's may, see `Guest`.
    `stack_proof` has the lab emulate this machine whole and run a guest in it: every CPU is then a thread of qemu.
    """

    extends: Name | None = None
    description: Line
    arch: Arch
    topology: Name
    housekeeping_cpus: CpuList | None = None
    choices: tuple[Name, ...] = ()
    high_resolution_timers: bool = True
    kernel: PlatformKernel
    qemu: PlatformQemu
    limits: Limits | None = None
    bios: tuple[BiosSetting, ...] = ()
    stack_proof: bool = False


class GuestImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a guest's disk holds. Sizes in MiB; keys as in an `authorized_keys` file."""

    suite: Name
    disk_mib: Annotated[int, msgspec.Meta(ge=128, le=65536)]
    packages: Annotated[tuple[Package, ...], msgspec.Meta(min_length=1)]
    masked_units: tuple[Unit, ...] = ()
    console_login: bool = False
    ssh_authorized_keys: tuple[Annotated[str, msgspec.Meta(pattern=r"\A(ssh-|ecdsa-|sk-)[^\n]+\Z")], ...] = ()


class GuestCmdline(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Kernel parameters beside those that the CPU plan gives."""

    extra: tuple[Parameter, ...] = ()


class UserNetwork(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="user"
):
    """qemu's own network: reaches out, nothing reaches in but the ssh port.

    `ssh_port` is the TCP port on the host's loopback that leads to the guest's ssh; none by default.
    """

    ssh_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    mac: Mac | None = None


class TapNetwork(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="tap"
):
    """A tap device `name` on the host, made at start and put into `bridge`; `vhost` moves packets in the kernel."""

    name: Interface
    bridge: Interface | None = None
    vhost: bool = True
    mac: Mac | None = None


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A disk beside the image: a file or block device of the host."""

    path: Annotated[str, msgspec.Meta(pattern=r"\A/[^\n]+\Z")]
    format: Literal["raw", "qcow2"] = "raw"
    readonly: bool = False


class Function(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="pci"
):
    """A whole PCI function, taken from the host while the guest runs."""

    address: PciAddress


class VirtualFunction(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="vf"
):
    """An SR-IOV virtual function: the physical function's address, and its number, from 0."""

    physical: PciAddress
    number: Annotated[int, msgspec.Meta(ge=0, le=255)]
    mac: Mac | None = None
    vlan: Annotated[int, msgspec.Meta(ge=1, le=4094)] | None = None


class Guest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One virtual machine. Memory in MiB; the first `housekeeping_vcpus` vCPUs are not isolated.

    `extends` names the guest of which it is a variant: see `pipeline.inheritance`.
    `pins` names the host CPU of each vCPU, in order, and `emulator_cpus` those of all other threads; both are
    the plan's choice by default. `vcpu_priority` is the SCHED_FIFO priority of the isolated vCPUs; 1 is
    libvirt's and SEAPATH's. `boot` is how the guest is started as a service: with the kernel outside the
    disk, or the one inside. Without `high_resolution_timers` the guest's kernel gets `highres=off`, which
    suits the latency of message-signalled interrupts.
    """

    extends: Name | None = None
    description: Line
    platform: Name
    vcpus: Annotated[int, msgspec.Meta(ge=2, le=288)]
    housekeeping_vcpus: Annotated[int, msgspec.Meta(ge=0, le=288)]  # what it must be is a rule of the plan
    memory_mib: Annotated[int, msgspec.Meta(ge=MIN_GUEST_MIB)]
    hugepages: Literal["none", "2M", "1G"] = "none"
    pins: CpuList | None = None
    emulator_cpus: CpuList | None = None
    vcpu_priority: Annotated[int, msgspec.Meta(ge=1, le=49)] = 1
    boot: Literal["outside", "inside"] = "outside"
    high_resolution_timers: bool = True
    networks: tuple[UserNetwork | TapNetwork, ...] = (UserNetwork(),)
    disks: tuple[Disk, ...] = ()
    devices: tuple[Function | VirtualFunction, ...] = ()
    image: GuestImage
    cmdline: GuestCmdline = GuestCmdline()

    def request(self) -> GuestRequest:
        """What it asks of the CPU plan."""
        return GuestRequest(
            vcpus=self.vcpus,
            housekeeping_vcpus=self.housekeeping_vcpus,
            memory_mib=self.memory_mib,
            hugepages=self.hugepages,
            pins=self.pins,
            emulator_cpus=self.emulator_cpus,
            priority=self.vcpu_priority,
            devices={
                ("devices", str(index)): device.address if isinstance(device, Function) else device.physical
                for index, device in enumerate(self.devices)
            },
        )


class Recipes(msgspec.Struct, frozen=True, kw_only=True):
    """Everything asked for, by name, and the CPU plan of each platform."""

    builders: dict[str, Builder]
    topologies: dict[str, Topology]
    platforms: dict[str, Platform]
    guests: dict[str, Guest]
    plans: dict[str, HostPlan]

    def platform(self, name: str) -> Platform:
        """The platform of that name; a `UserError` names those that there are."""
        if name not in self.platforms:
            raise UserError(f"there is no platform {name}", f"write one of: {', '.join(self.platforms)}")
        return self.platforms[name]

    def guests_of(self, platform: str) -> dict[str, Guest]:
        """The guests of a platform, by name."""
        return {name: guest for name, guest in self.guests.items() if guest.platform == platform}

    def extended(self, platform: str) -> tuple[str, ...]:
        """The platforms that a platform extends, the nearest first."""
        found: tuple[str, ...] = ()
        while (base := self.platforms[found[-1] if found else platform].extends) is not None:
            found = (*found, base)
        return found

    def package_owner(self, guest: str) -> str:
        """The guest whose locked packages a guest gets: itself, or one that it extends and that asks for the same."""

        def asked(name: str) -> tuple[str, str, frozenset[str]]:
            image = self.guests[name].image
            return self.platforms[self.guests[name].platform].arch, image.suite, frozenset(image.packages)

        owner = guest
        while (base := self.guests[owner].extends) is not None and asked(base) == asked(guest):
            owner = base
        return owner


T = TypeVar("T", bound=msgspec.Struct)


def load(root: Path) -> Recipes:
    """Read `recipes/` below the checkout `root`, and plan every platform."""

    def read_all(directory: str, kind: type[T]) -> dict[str, T]:
        paths = sorted((root / "recipes" / directory).glob("*.toml"), key=lambda path: path.stem)
        return {path.stem: read(path, kind, root) for path in paths}

    loaded = Recipes(
        builders=read_all("builders", Builder),
        topologies=read_all("topologies", Topology),
        platforms=read_all("platforms", Platform),
        guests=read_all("guests", Guest),
        plans={},
    )
    if not loaded.platforms:
        raise UserError(
            f"{root / 'recipes' / 'platforms'} has no platform", "run doit in a checkout of virt-rt"
        )
    for kind, names in (("guests", loaded.guests), ("platforms", loaded.platforms)):
        for name in names:
            if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", name):
                raise UserError(
                    f"recipes/{kind}/{name}.toml: {name} does not fit into host names and paths",
                    "name the file with lower-case letters, digits and '-' only",
                )
    for name, topology in loaded.topologies.items():
        try:
            topology.check()
        except TopologyError as error:
            place = place_of(root / "recipes" / "topologies" / f"{name}.toml", root, *error.keys)
            raise UserError(f"{place}: {error.message}", error.hint) from None
    for name, guest in loaded.guests.items():
        path = root / "recipes" / "guests" / f"{name}.toml"
        if guest.platform not in loaded.platforms:
            raise UserError(
                f"{place_of(path, root, 'platform')}: there is no platform {guest.platform}",
                f"write one of: {', '.join(loaded.platforms)}",
            )
    for name, platform in loaded.platforms.items():
        if not loaded.guests_of(name):
            raise UserError(
                f"recipes/platforms/{name}.toml: no guest runs on this platform",
                f'write a recipes/guests/NAME.toml with platform = "{name}"',
            )
        if platform.topology not in loaded.topologies:
            path = root / "recipes" / "platforms" / f"{name}.toml"
            raise UserError(
                f"{place_of(path, root, 'topology')}: there is no topology {platform.topology}",
                f"write one of: {', '.join(loaded.topologies)}; or record one: "
                f"doit topology > recipes/topologies/{platform.topology}.toml",
            )
        _check_shared(root, loaded.guests_of(name), loaded.topologies[platform.topology])
        loaded.plans[name] = plan_of(root, loaded, name, platform.topology)
    return loaded


def _check_shared(root: Path, guests: Mapping[str, Guest], topology: Topology) -> None:
    """Refuse what two guests of one host, or one twice, would both take: devices, tap devices, ports, addresses."""
    owners: dict[tuple[str, str], str] = {}
    numbers: dict[str, dict[int | None, str]] = {}
    for name, guest in guests.items():
        path = root / "recipes" / "guests" / f"{name}.toml"

        def refuse(what: str, owner: str, *keys: str, path: Path = path) -> UserError:
            return UserError(
                f"{place_of(path, root, *keys)}: {what} is guest {owner}'s already", "give each guest its own"
            )

        for index, network in enumerate(guest.networks):
            for key in ("name", "ssh_port", "mac"):
                if (value := getattr(network, key, None)) is not None:
                    owner = owners.setdefault((key, str(value)), f"{name}/{index}")
                    if owner != f"{name}/{index}":
                        raise refuse(f"{key} = {value}", owner.partition("/")[0], "networks", str(index), key)
        for index, device in enumerate(guest.devices):
            keys = ("devices", str(index))
            whole = isinstance(device, Function)
            address = device.address if isinstance(device, Function) else device.physical
            number = None if isinstance(device, Function) else device.number
            known = next((each for each in topology.devices if each.address == address), None)
            if number is not None and known is not None and number >= known.virtual_functions:
                raise UserError(
                    f"{place_of(path, root, *keys, 'number')}: "
                    f"{address} has {known.virtual_functions} virtual functions",
                    f"write number = {known.virtual_functions - 1} or less"
                    if known.virtual_functions
                    else "name a function that has some, or pass it through as a whole",
                )
            taken = numbers.setdefault(address, {})
            if taken and (whole or None in taken or number in taken):
                what = address if whole or None in taken else f"virtual function {number} of {address}"
                raise refuse(what, next(iter(taken.values())), *keys)
            taken[number] = name


def plan_of(root: Path, loaded: Recipes, platform: str, topology: str) -> HostPlan:
    """The CPU plan of a platform and its guests, on a topology; refusals name the recipe's line."""
    guests = loaded.guests_of(platform)
    try:
        return host_plan(
            loaded.topologies[topology],
            {name: guest.request() for name, guest in guests.items()},
            loaded.platforms[platform].housekeeping_cpus,
        )
    except PlanError as error:
        of_platform = error.subject == "platform"
        recipe = f"platforms/{platform}.toml" if of_platform else f"guests/{error.subject}.toml"
        place = place_of(root / "recipes" / recipe, root, *error.keys)
        raise UserError(f"{place}: {error.message}", error.hint) from None
