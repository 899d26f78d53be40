"""A new platform from what a machine told of itself: recipes, fragments and page, all of them or none.

They are rendered from `recipes/templates/platform/` into a copy of the checkout in which everything is read and planned
as `doit` would do it. Only what passes is put into the checkout, and nothing that is there is replaced.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import machine
from pipeline.architecture import ARCHITECTURES
from pipeline.contract import ContractInputError, Request, parse_fragment
from pipeline.driverneeds import KernelTree, Need, kernel_tree, needs, virtual_needs
from pipeline.errors import UserError
from pipeline.files import remove_tree
from pipeline.git import Mirror
from pipeline.inventory import Inventory
from pipeline.kernel import kernel_name
from pipeline.platformdoc import pages
from pipeline.project import Project
from pipeline.recipefile import read
from pipeline.recipes import Platform
from pipeline.rendering import render_template
from pipeline.settings import chosen, host_command_line
from pipeline.topology import PciDevice

TEMPLATES = "recipes/templates/platform"
#: What is copied before it is added to; all else of a checkout is only looked at.
_CHANGED = ("recipes", "kernel-configs", "docs")
#: The guest of which a new platform's is a variant, where its architecture is the same.
_GUEST = "rt-guest"
#: A longer name leaves no room in the summaries of its packages, which have 79 characters.
LONGEST_NAME = 28
_NAME = re.compile(rf"[a-z0-9][a-z0-9-]{{0,{LONGEST_NAME - 1}}}")
#: Room for CPUs that a kernel has at least; NR_CPUS costs little below that.
_NR_CPUS = 64
VERDICTS = {
    "had": "there already",
    "asked": "asked for",
    "idle": "not asked for, since it drives nothing",
    "unmapped": "**not in it**",
    "refused": "**not in it**",
}


@dataclass(frozen=True, slots=True)
class Made:
    """A platform that was written: its files relative to the checkout, what became of modules, what to know."""

    files: tuple[Path, ...]
    host: tuple[Need, ...]
    guest: tuple[Need, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user asked for: the platform's name, and what is said by hand."""

    name: str
    topology: str = ""
    memory_mib: int | None = None
    description: str = ""


def make(project: Project, asked: Asked, known: Inventory) -> Made:
    """Write the platform of a machine; a `UserError` leaves the checkout as it was."""
    name, root = asked.name, project.root
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name} is no name for a platform",
            f"at most {LONGEST_NAME} lower-case letters, digits and '-', no '-' first",
        )
    debian = next((each.debian for each in ARCHITECTURES.values() if each.machine == known.arch), None)
    if debian is None:
        supported = ", ".join(each.machine for each in ARCHITECTURES.values())
        raise UserError(f"the machine is {known.arch}, for which nothing is built", f"it may be: {supported}")
    targets = _targets(name, asked.topology)
    for path in (*targets.values(), Path(f"kernel-configs/{name}"), Path(f"docs/platforms/{name}.svg")):
        if os.path.lexists(root / path):
            raise UserError(f"{path} is there already", "choose another name, or remove what is there")
    project.recipes  # noqa: B018 - a checkout with a fault gets no new platform
    with _copy_of(root) as copy:
        made = _write(project, copy, asked, known, debian, targets)
        _check(copy, project.environ, name, made.files)
        files = (*made.files, Path(f"docs/platforms/{name}.svg"))
        # what a platform needs comes before it; the guest, which needs it, is last
        _place(copy, root, sorted(files, key=lambda path: path.parts[:2] == ("recipes", "guests")))
    return replace(made, files=files)


def _targets(name: str, topology: str) -> dict[str, Path]:
    """Where each template's text goes; the topology has none, and may be there already."""
    targets = {
        "host-config.j2": Path(f"kernel-configs/{name}/host-config"),
        "guest-config.j2": Path(f"kernel-configs/{name}/guest-config"),
        "page.md.j2": Path(f"docs/platforms/{name}.md"),
        "platform.toml.j2": Path(f"recipes/platforms/{name}.toml"),
        "guest.toml.j2": Path(f"recipes/guests/{name}-guest.toml"),
    }
    return ({} if topology else {"": Path(f"recipes/topologies/{name}.toml")}) | targets


@contextlib.contextmanager
def _copy_of(root: Path) -> Iterator[Path]:
    """A checkout beside this one that has the same files, and may be added to; gone afterwards."""
    copy = Path(tempfile.mkdtemp(prefix=".new-platform-", dir=root))
    try:
        for path in root.iterdir():
            if path.name in _CHANGED:
                shutil.copytree(path, copy / path.name, symlinks=True)
            elif path != copy and not path.name.startswith("."):
                (copy / path.name).symlink_to(path)
        yield copy
    finally:
        remove_tree(copy)


def _write(
    project: Project, copy: Path, asked: Asked, known: Inventory, debian: str, targets: Mapping[str, Path]
) -> Made:
    """Render everything into the copy."""
    name, remarks = asked.name, []
    with tempfile.TemporaryDirectory() as scratch:
        known.lay_out(Path(scratch))
        devices = machine.devices(Path(scratch))
        recording = (
            None
            if asked.topology
            else machine.record(Path(scratch), memory_mib=asked.memory_mib, description=asked.description)
        )
    if recording is None:
        topologies = project.recipes.topologies
        if asked.topology not in topologies:
            raise UserError(
                f"there is no topology {asked.topology}", f"write one of: {', '.join(topologies)}"
            )
        topology = topologies[asked.topology]
        remarks.append(f"CPUs and memory are those of {asked.topology}, not those of the machine.")
    else:
        topology, remarks = recording.topology, list(recording.remarks)
        _add(copy / targets[""], machine.to_toml(topology, recording.remarks))
    about = asked.description or topology.description
    variables: dict[str, Any] = {
        "platform": name,
        "description": machine.quoted(about),
        "about": about,
        "arch": debian,
        "kernel_arch": ARCHITECTURES[debian].kernel,
        "machine_arch": known.arch,
        "base_guest": _base_guest(project, debian),
        "topology": asked.topology or name,
        "release": known.release,
        "nr_cpus": max(_NR_CPUS, 1 << max(topology.cpus).bit_length()),
        "host": (),
        "guest": (),
    }
    render = _renderer(copy)
    _add(copy / targets["platform.toml.j2"], render("platform.toml.j2", variables))
    platform = read(copy / targets["platform.toml.j2"], Platform, copy)
    tree = _tree(project, platform, ARCHITECTURES[debian].kernel, remarks)
    if not known.config:
        remarks.append(
            "The configuration of that machine's kernel was not told: drivers are asked for without options."
        )
    host_config = render("host-config.j2", variables)  # what it asks for whatever the machine has
    _add(copy / targets["guest.toml.j2"], render("guest.toml.j2", variables))
    host = needs(known, tree, _known(project, platform, "host", host_config))
    guest = virtual_needs(
        known, tree, _known(project, platform, "guest", render("guest-config.j2", variables))
    )
    variables |= {
        "host": host,
        "guest": guest,
        "kernel": tree.name if tree else "that machine's own kernel",
        "verdicts": VERDICTS,
        "remarks": remarks,
        "devices": _network(devices, known),
        "undriven": [device for device in known.devices if not device.driver],
    }
    for template in ("host-config.j2", "guest-config.j2", "page.md.j2"):
        _add(copy / targets[template], render(template, variables))
    return Made(tuple(targets.values()), host, guest, tuple(remarks))


def _base_guest(project: Project, arch: str) -> str:
    """The guest of which the new platform's is a variant: one whose packages are locked for the architecture."""
    asked = project.recipes
    guests = (name for name in (_GUEST, *asked.guests) if name in asked.guests)
    return next(
        (each for each in guests if asked.platforms[asked.guests[each].platform].arch == arch), _GUEST
    )


def _renderer(copy: Path) -> Callable[[str, Mapping[str, Any]], str]:
    templates = {path.name: path.read_text() for path in (copy / TEMPLATES).glob("*.j2")}

    def render(template: str, variables: Mapping[str, Any]) -> str:
        return render_template(template, templates, variables, TEMPLATES)

    return render


def _add(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _network(devices: Sequence[PciDevice], known: Inventory) -> list[dict[str, Any]]:
    """The machine's network functions and those that can have virtual ones, with their drivers."""
    drivers = {device.name: device.driver for device in known.devices if device.bus == "pci"}
    return [
        {
            "address": each.address,
            "description": each.description,
            "node": "unknown" if each.node is None else each.node,
            "driver": drivers.get(each.address) or "none",
            "virtual_functions": each.virtual_functions or "none",
            "virtual_driver": ", ".join(known.virtual.get(each.address, ()))
            or ("unknown" if each.virtual_functions else ""),
        }
        for each in devices
    ]


def _tree(project: Project, platform: Platform, arch: str, remarks: list[str]) -> KernelTree | None:
    """The tree of the platform's host kernel, if its source was fetched; else a remark."""
    lock = project.sources_lock.get(platform.kernel.source_of("host"))
    path = project.cache / "git" / f"{lock.name}.git"
    if (path / "HEAD").is_file() and Mirror(path).has(lock.commit):
        return kernel_tree(Mirror(path), lock.tree, f"{lock.name} {lock.ref}", arch)
    remarks.append(
        f"The source {lock.name} was not there: symbols are the modules' names in capitals where that machine's kernel "
        f"had them, and what they depend on is not known. To have them read from the source, run doit "
        f"source:{lock.name}, remove the platform, and make it again."
    )
    return None


def _known(project: Project, platform: Platform, role: str, own: str) -> dict[str, str]:
    """Values by symbol that a role's kernel has without a word of the machine's drivers.

    They are what the fragments ask for, `own` the text of the platform's; and all that follows from it, where the store
    has a kernel of the same fragments whose own one says no more.
    """
    *common, _ = platform.kernel.fragments_of(role)
    root = project.root / "kernel-configs"
    plain = {request.symbol for request in _requests(own, "fragment")}
    values = {
        request.symbol: request.value
        for text, path in [*(((root / path).read_text(), path) for path in common), (own, "fragment")]
        for request in _requests(text, path)
    }
    for name, other in project.recipes.platforms.items():
        *its_common, its_own = other.kernel.fragments_of(role)
        alike = its_common == common and other.kernel.source_of(role) == platform.kernel.source_of(role)
        if alike and {each.symbol for each in _requests((root / its_own).read_text(), its_own)} <= plain:
            result = project.store.lookup(project.graph.keys[kernel_name(name, role)])
            if result is not None:
                text = project.store.path(result.outputs["config"][0].digest).read_text()
                return values | {each.symbol: each.value for each in _requests(text, "config")}
    return values


def _requests(text: str, name: str) -> Sequence[Request]:
    try:
        return parse_fragment(text, name)
    except ContractInputError as error:
        raise UserError(str(error).partition("\n")[0], "mend the fragment") from None


def _check(copy: Path, environ: Mapping[str, str], name: str, files: Sequence[Path]) -> None:
    """Read and plan the copy as `doit` would, and write the generated parts of its page."""
    for path in files:
        if path.parts[0] == "kernel-configs":
            _requests((copy / path).read_text(), str(path))
    project = Project(copy, environ)
    try:
        platform, plan = project.recipes.platform(name), project.recipes.plans[name]
        project.graph  # noqa: B018 - every action and key
        choices = chosen(copy, name, platform, project.settings)
        command_line = host_command_line(plan, project.settings, choices, platform.arch)
    except UserError as error:
        raise UserError(
            f"this machine makes no platform, nothing was written: {error.message}",
            f"{error.hint}; or take another machine's CPUs: --topology NAME",
        ) from None
    for path, text in pages(copy, name, platform, plan, command_line).items():
        path.write_text(text)


def _place(copy: Path, root: Path, files: Sequence[Path]) -> None:
    """Put files of the copy into the checkout, each whole; when one cannot be, none is there."""
    placed: list[Path] = []
    made: list[Path] = []
    try:
        for path in files:
            parent = (root / path).parent
            if not parent.exists():
                made.append(parent)
                parent.mkdir(parents=True)
            placed.append(root / path)
            try:
                os.link(copy / path, root / path)  # unlike a rename it never replaces
            except FileExistsError:
                placed.pop()
                raise UserError(f"{path} is there already", "choose another name") from None
    except BaseException:
        for each in reversed(placed):
            each.unlink(missing_ok=True)
        for each in reversed(made):
            with contextlib.suppress(OSError):
                each.rmdir()
        raise
