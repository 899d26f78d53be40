"""Drivers out of the kernel's tree: `recipes/drivers/*.toml`, and the actions that build their modules.

A driver is built for each platform it names, against the headers of that platform's host or guest kernel, or of both.
With it come programs that use its device, and the command that tests it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import msgspec

from pipeline.action import ALL, Action, File, Output, Step, Upstream
from pipeline.architecture import architecture
from pipeline.errors import UserError
from pipeline.inputs import TREE, builder_name, source_name
from pipeline.kernel import BUILDER, kernel_name
from pipeline.modulesigning import Certificate, certificate_of, sign_driver
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
#: A word of a command.
Word = Annotated[str, msgspec.Meta(pattern=r"\A[^\x00-\x1f\x7f]+\Z")]
#: A target of make.
Target = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")]
Role = Literal["host", "guest"]
#: A directory below another one.
Below = Annotated[
    str, msgspec.Meta(pattern=r"\A(?!\.\.?(/|\Z))(?!.*/\.\.?(/|\Z))[A-Za-z0-9._+-][A-Za-z0-9._+/-]*\Z")
]


class Driver(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A driver: its sources, and the kernels that it is built for.

    `role` is that of the kernel, `roles` name both; the host's, where there is neither.

    The sources are the tree of `source`, a name of `recipes/sources.toml`, or the `directory` of the checkout;
    `subdirectory` is where in it the Makefile (or Kbuild) with `obj-m` is. `make` are assignments for make.
    Of its modules those in `autoload` are loaded at boot; the others when a device asks for them, or by hand.
    `licence` is an SPDX expression, `licence_files` hold its text, below the sources.

    `programs` are paths below the sources; make is run where each is to be, with its own name as the target unless
    `program_target` names another one. `test` is a command, its first word one of `programs` or an absolute path;
    `test_tool` says whether it is run as it stands, or with the options of irqlat, whose document it then writes.
    """

    description: Line
    platforms: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1)]
    role: Role | None = None
    roles: tuple[Role, ...] = ()
    source: Name | None = None
    directory: Below | None = None
    subdirectory: Below | None = None
    make: tuple[Argument, ...] = ()
    autoload: tuple[Module, ...] = ()
    programs: tuple[Below, ...] = ()
    program_target: Target | None = None
    test: tuple[Word, ...] = ()
    test_tool: Literal["command", "irqlat"] = "command"
    licence: Line = "GPL-2.0-only"
    licence_files: Annotated[tuple[Below, ...], msgspec.Meta(min_length=1)]

    @property
    def kernels(self) -> tuple[Role, ...]:
        """For which of a platform's kernels it is built."""
        return self.roles or (self.role or "host",)


@dataclass(frozen=True, slots=True)
class Build:
    """A driver as it is built for one kernel of each of its platforms."""

    name: str
    recipe: Driver
    role: Role

    @property
    def label(self) -> str:
        """Its name in actions, packages and paths: the driver's, with the role behind it where there are two."""
        return self.name if len(self.recipe.kernels) == 1 else f"{self.name}-{self.role}"


def builds(drivers: Mapping[str, Driver], platform: str, extended: Sequence[str] = ()) -> tuple[Build, ...]:
    """Every build of a platform's drivers: those that name it, or a platform of `extended`, those that it extends."""
    named = {platform, *extended}
    return tuple(
        Build(name, recipe, role)
        for name, recipe in drivers.items()
        if named & set(recipe.platforms)
        for role in recipe.kernels
    )


def load(root: Path, platforms: dict[str, Platform]) -> dict[str, Driver]:
    """Every driver of the checkout `root` by name; `platforms` are those that there are.

    Raises `UserError` with file and line.
    """
    loaded = {}
    for path in sorted((root / DIRECTORY).glob("*.toml")):
        driver = read(path, Driver, root)
        _check(root, path, driver, platforms)
        loaded[path.stem] = driver
    labels: dict[str, str] = {}
    for name, driver in loaded.items():
        for label in (Build(name, driver, role).label for role in driver.kernels):
            if labels.setdefault(label, name) != name:
                raise UserError(
                    f"{DIRECTORY}: the drivers {labels[label]} and {name} would both make a {label}",
                    "rename one",
                )
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
    if driver.role is not None and driver.roles:
        raise UserError(
            f"{place_of(path, root, 'role')}: a driver has either a role or roles", "write one of them"
        )
    if len(set(driver.roles)) != len(driver.roles):
        raise UserError(f"{place_of(path, root, 'roles')}: a role is named twice", "name each once")
    _check_programs(root, path, driver)
    for index, name in enumerate(driver.platforms):
        if name not in platforms:
            raise UserError(
                f"{place_of(path, root, 'platforms', str(index))}: there is no platform {name}",
                f"write one of: {', '.join(platforms)}",
            )
    if len(set(driver.platforms)) != len(driver.platforms):
        raise UserError(f"{place_of(path, root, 'platforms')}: a platform is named twice", "name each once")


def _check_programs(root: Path, path: Path, driver: Driver) -> None:
    """Refuse programs that would be in each other's place, and a test of something else."""
    names = [PurePosixPath(program).name for program in driver.programs]
    if len(set(names)) != len(names):
        raise UserError(f"{place_of(path, root, 'programs')}: two programs have one name", "rename one")
    if driver.program_target is not None and not driver.programs:
        raise UserError(
            f"{place_of(path, root, 'program_target')}: there are no programs to make",
            "name them in programs",
        )
    if driver.test and not (driver.test[0].startswith("/") or driver.test[0] in names):
        raise UserError(
            f"{place_of(path, root, 'test')}: {driver.test[0]} is none of the driver's programs",
            f"begin it with one of: {', '.join(names) or 'none'}; or with the path of a program on the machine",
        )
    if driver.test_tool != "command" and not driver.test:
        raise UserError(f"{place_of(path, root, 'test_tool')}: there is no test", "write the command in test")


def driver_name(platform: str, label: str) -> str:
    """Name of the action that makes a driver for a platform's kernel; `label` is `Build.label`."""
    return f"driver:{platform}:{label}"


def unsigned_name(platform: str, label: str) -> str:
    """Name of the action that builds a driver whose modules are signed afterwards."""
    return f"driver-unsigned:{platform}:{label}"


def actions(
    root: Path, platform: str, recipe: Platform, build: Build, environ: Mapping[str, str]
) -> tuple[Action, ...]:
    """What makes a driver: its build and, where `environ` names a key, the signing of its modules.

    Raises `UserError` like `driver`, and when half of a key is named, or a certificate that is none.
    """
    built = driver(root, platform, recipe, build)
    certificate = certificate_of(environ)
    if certificate is None:
        return (built,)
    unsigned = replace(
        built, name=unsigned_name(platform, build.label), summary=f"{built.summary}, unsigned", place=None
    )
    return unsigned, _signed(built, unsigned, certificate, environ)


def _signed(built: Action, unsigned: Action, certificate: Certificate, environ: Mapping[str, str]) -> Action:
    """Sign what `unsigned` built, outside of any container: no step that runs a driver's Makefile sees the key."""

    def run(step: Step) -> None:
        sign_driver(step, certificate, environ)

    return Action(
        name=built.name,
        kind="driver-signed",
        version=1,
        arch=built.arch,
        summary=f"{built.summary}, signed",
        run=run,
        inputs={"unsigned": Upstream(unsigned.name, ALL)},
        parameters={"certificate": certificate.fingerprint},
        outputs=built.outputs,
        place=built.place,
    )


def driver(root: Path, platform: str, recipe: Platform, build: Build) -> Action:
    """Build a driver for a kernel of a platform; `root` is the checkout.

    Raises `UserError` when the recipe's directory is not there, holds what a step cannot be given, or when
    the platform is of another architecture than the machine that builds.
    """
    name, driver, label = build.name, build.recipe, build.label
    if architecture(recipe.arch).crossed:
        raise UserError(
            f"{DIRECTORY}/{name}.toml: {platform} is for {recipe.arch}, for which no drivers are compiled here: the "
            "programs that come with its kernel's headers run there only",
            f"take {platform} out of its platforms, and build it on such a machine against the headers' package",
        )
    step = "recipes/steps/driver.sh"
    files = {"modulecheck.py": File.read(root / CHECK, CHECK)}
    kernel = kernel_name(platform, build.role)
    inputs = {"headers": Upstream(kernel, "headers", unpack=True), RELEASE: Upstream(kernel, RELEASE)}
    if driver.source is not None:
        inputs["source"] = Upstream(source_name(driver.source), TREE, unpack=True)
    else:
        files |= _files(root, name, driver)
    return Action(
        name=driver_name(platform, label),
        kind="driver",
        version=1,
        arch=recipe.arch,
        summary=f"the driver {name} for the RT {build.role} kernel of {platform}",
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
            "PROGRAMS": " ".join(driver.programs),
            "PROGRAM_TARGET": driver.program_target or "",
            "TEST": "\n".join(driver.test),
            "TEST_TOOL": driver.test_tool,
            "LICENCE_FILES": " ".join(driver.licence_files),
        },
        outputs=(
            Output(ROOT, "directory"),
            Output(LICENCE),
            Output(DOCUMENT),
            Output(RELEASE),
        ),
        remedy=f"the driver's sources, {DIRECTORY}/{name}.toml or the kernel's configuration must change",
        place=f"{platform}/driver/{label}",
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
