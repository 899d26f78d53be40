"""Drivers out of the kernel's tree: `recipes/drivers/*.toml`, and the actions that build their modules.

A driver is built once for each platform it names, against the headers of that platform's host or guest kernel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from pipeline.action import Action, File, Output, Upstream
from pipeline.architecture import architecture
from pipeline.errors import UserError
from pipeline.inputs import TREE, builder_name, source_name
from pipeline.kernel import BUILDER, kernel_name
from pipeline.recipefile import place_of, read
from pipeline.recipes import Name, Platform

DIRECTORY = "recipes/drivers"
#: The tree that is installed: modules below `usr/lib/modules/<release>/updates/`, and units that load them.
ROOT = "root"
#: The text of the driver's licence.
LICENCE = "licence"
#: Says what `ROOT` holds.
DOCUMENT = "driver.json"
#: Whether the kernel will load the modules; runs inside the step.
CHECK = "pipeline/modulecheck.py"
#: The release of the kernel that the modules are for, a line.
RELEASE = "kernelrelease"

Line = Annotated[str, msgspec.Meta(pattern=r"\A[^\x00-\x1f\x7f]+\Z")]
#: A module's name as modprobe takes it.
Module = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_-]*\Z")]
#: One word for make; step scripts split at blanks.
Argument = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z_][A-Za-z0-9_]*=[^\s\"'\\$`*?\[]*\Z")]
#: A directory below another one.
Below = Annotated[
    str, msgspec.Meta(pattern=r"\A(?!\.\.?(/|\Z))(?!.*/\.\.?(/|\Z))[A-Za-z0-9._+-][A-Za-z0-9._+/-]*\Z")
]


class Driver(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A driver: its sources, and the kernels that it is built for.

    The sources are the tree of `source`, a name of `recipes/sources.toml`, or the `directory` of the checkout;
    `subdirectory` is where in it the Makefile (or Kbuild) with `obj-m` is. `make` are assignments for make.
    Of its modules those in `autoload` are loaded at boot; the others when a device asks for them, or by hand.
    `licence` is an SPDX expression, `licence_files` hold its text, below the sources.
    """

    description: Line
    platforms: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1)]
    role: Literal["host", "guest"] = "host"
    source: Name | None = None
    directory: Below | None = None
    subdirectory: Below | None = None
    make: tuple[Argument, ...] = ()
    autoload: tuple[Module, ...] = ()
    licence: Line = "GPL-2.0-only"
    licence_files: Annotated[tuple[Below, ...], msgspec.Meta(min_length=1)]


def load(root: Path, platforms: dict[str, Platform]) -> dict[str, Driver]:
    """Every driver of the checkout `root` by name; `platforms` are those that there are.

    Raises `UserError` with file and line.
    """
    loaded = {}
    for path in sorted((root / DIRECTORY).glob("*.toml")):
        driver = read(path, Driver, root)
        _check(root, path, driver, platforms)
        loaded[path.stem] = driver
    return loaded


def _check(root: Path, path: Path, driver: Driver, platforms: dict[str, Platform]) -> None:
    try:
        msgspec.convert(path.stem, Name)
    except msgspec.ValidationError:
        raise UserError(
            f"{path.relative_to(root)}: {path.stem} does not fit into package names",
            "name the file with lower-case letters, digits, '.' and '-' only",
        ) from None
    if (driver.source is None) == (driver.directory is None):
        raise UserError(
            f"{place_of(path, root)}: a driver has either a source or a directory",
            "write exactly one of them",
        )
    for index, name in enumerate(driver.platforms):
        if name not in platforms:
            raise UserError(
                f"{place_of(path, root, 'platforms', str(index))}: there is no platform {name}",
                f"write one of: {', '.join(platforms)}",
            )
    if len(set(driver.platforms)) != len(driver.platforms):
        raise UserError(f"{place_of(path, root, 'platforms')}: a platform is named twice", "name each once")


def driver_name(platform: str, name: str) -> str:
    """Name of the action that builds a driver for a platform's kernel."""
    return f"driver:{platform}:{name}"


def driver(root: Path, platform: str, recipe: Platform, name: str, driver: Driver) -> Action:
    """Build the driver `name` for the kernel of a platform; `root` is the checkout.

    Raises `UserError` when the recipe's directory is not there, or holds what a step cannot be given.
    """
    step = "recipes/steps/driver.sh"
    files = {"modulecheck.py": File.read(root / CHECK, CHECK)}
    kernel = kernel_name(platform, driver.role)
    inputs = {"headers": Upstream(kernel, "headers", unpack=True), RELEASE: Upstream(kernel, RELEASE)}
    if driver.source is not None:
        inputs["source"] = Upstream(source_name(driver.source), TREE, unpack=True)
    else:
        files |= _files(root, name, driver)
    return Action(
        name=driver_name(platform, name),
        kind="driver",
        version=1,
        arch=recipe.arch,
        summary=f"the driver {name} for the RT {driver.role} kernel of {platform}",
        builder=builder_name(BUILDER),
        script=File.read(root / step, step),
        files=files,
        inputs=inputs,
        environment={
            "ARCH": architecture(recipe.arch).kernel,
            "DRIVER": name,
            "SUBDIRECTORY": driver.subdirectory or ".",
            "MAKE_ARGUMENTS": " ".join(driver.make),
            "AUTOLOAD": " ".join(driver.autoload),
            "LICENCE_FILES": " ".join(driver.licence_files),
        },
        outputs=(
            Output(ROOT, "directory"),
            Output(LICENCE),
            Output(DOCUMENT),
            Output(RELEASE),
        ),
        remedy=f"the driver's sources, {DIRECTORY}/{name}.toml or the kernel's configuration must change",
        place=f"{platform}/driver/{name}",
    )


def _files(root: Path, name: str, driver: Driver) -> dict[str, File]:
    """The sources in a directory of the checkout, by their place among the step's inputs."""
    recipe = root / DIRECTORY / f"{name}.toml"
    directory = root / str(driver.directory)
    files = {}
    for path in sorted(directory.rglob("*")) if directory.is_dir() else []:
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise UserError(
                f"{path.relative_to(root)} is neither a file nor a directory",
                "leave it out of the driver's sources",
            )
        if path.is_file():
            origin = path.relative_to(root).as_posix()
            files[f"source/{path.relative_to(directory).as_posix()}"] = File.read(path, origin)
    if not files:
        raise UserError(
            f"{place_of(recipe, root, 'directory')}: {driver.directory} has no files",
            "name the directory, from the root of the checkout, that holds the driver's sources",
        )
    return files
