"""What `recipes/packages/*.toml` may say: one file describes one package, in both formats.

In every text `{{ name }}` stands for a variable: see `docs/packages.md`, which lists them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from pipeline.architecture import Arch
from pipeline.errors import UserError
from pipeline.recipefile import place_of, read

DIRECTORY = "recipes/packages"

Format = Literal["deb", "rpm"]
Event = Literal["unpacking", "configured", "settled", "removing", "removed", "purged"]
Line = Annotated[str, msgspec.Meta(pattern=r"\A[^\x00-\x1f\x7f]+\Z")]
#: A path of the target machine, or one below the step's inputs, or below `recipes/packages/`.
Place = Annotated[str, msgspec.Meta(pattern=r"\A(/|\{\{ )[^\x00-\x1f\x7f]*\Z")]
Relative = Annotated[
    str, msgspec.Meta(pattern=r"\A(?!\.\./)(?!.*/\.\.(/|\Z))[^/\x00-\x1f\x7f][^\x00-\x1f\x7f]*\Z")
]
Mode = Annotated[str, msgspec.Meta(pattern=r"\A[0-7]{4}\Z")]


class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Outputs of another action, each laid at `<name of this input>/<output>`; all of them unless some are named.

    Of the named ones, `trees` are directories of many files: they are unpacked once and kept, and not for each step.
    """

    action: Line
    outputs: tuple[Line, ...] = ()
    trees: tuple[Line, ...] = ()


class Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is installed at `to`: exactly one of the others says from where.

    `input` is a file or directory of an input (a directory is installed with all it holds, less `without`, paths
    below it); `file` one of `recipes/packages/`, its variables filled in; `link` the target of a symbolic link;
    `directory` makes an empty directory. `mode` is octal, by default what the file has. Files below `/etc` are
    configuration: what an administrator changed is kept on upgrade.
    """

    to: Place
    input: Relative | None = None
    file: Relative | None = None
    link: Line | None = None
    directory: bool = False
    without: tuple[Relative, ...] = ()
    mode: Mode | None = None
    formats: tuple[Format, ...] = ("deb", "rpm")


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Shell of `recipes/packages/` that the package manager runs at an event, its variables filled in.

    `unpacking` before files are installed or replaced; `configured` after that; `settled` when rpm is done with the
    whole transaction (never with dpkg); `removing` before the package's files go for good, `removed` after that;
    `purged` when Debian's configuration files go, too (never with rpm).
    """

    when: Event
    file: Relative
    formats: tuple[Format, ...] = ("deb", "rpm")


class Relations(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Other packages. `exact` and `named` are names of recipes here: that package of this platform (and guest), in the
    version of this build or in any; `deb` and `rpm` are written as that package manager wants them."""

    exact: tuple[Relative, ...] = ()
    named: tuple[Relative, ...] = ()
    deb: tuple[Line, ...] = ()
    rpm: tuple[Line, ...] = ()


class Licence(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the package holds of whom, under which licence (an SPDX expression where there is one).

    `files` hold its text: in the tree of `source` (a name of `recipes/sources.toml`), in the root file system of
    `builder`, below the directory `input` of the inputs, or, without any of these, in this checkout. With `arch` only
    packages of these architectures (Debian's names) hold it.
    """

    what: Line
    licence: Line
    source: Line | None = None
    builder: Line | None = None
    input: Relative | None = None
    files: Annotated[tuple[Line, ...], msgspec.Meta(min_length=1)]
    arch: tuple[Arch, ...] = ()


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Programs that get the libraries they were linked to: all ELF programs installed at or below `programs`; their
    libraries and the loader go to `libraries`."""

    programs: Annotated[tuple[Place, ...], msgspec.Meta(min_length=1)]
    libraries: Place


class Contract(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a kernel package has its configuration in each format, and which part of the contract that keeps."""

    role: Literal["host", "guest"]
    deb: Place
    rpm: Place


class Override(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A finding of lintian or rpmlint that is accepted, and why. `about` is a pattern (fnmatch) of what it says;
    `optional` that not each package made by this recipe has it, which else is refused; with `arch` it is accepted on
    these architectures (Debian's names) only."""

    tool: Literal["lintian", "rpmlint"]
    tag: Line
    about: Line = "*"
    reason: Line
    optional: bool = False
    arch: tuple[Arch, ...] = ()


class PackageRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One package, made for each platform, each guest, or each driver.

    `kernel` says which of a platform's kernels `{{ kernel_source }}` is the source of.

    `section` is Debian's; `architecture` is `all` where any machine takes the package; `read` gives variables the
    content of a file among the inputs; `description` is prose in paragraphs; `compressed` says that what it installs is
    compressed already, so that no time is spent on it.
    """

    each: Literal["platform", "guest", "driver"]
    kernel: Literal["host", "guest"] = "host"
    name: Line
    summary: Line
    description: str
    architecture: Literal["native", "all"] = "native"
    section: Line = "admin"
    compressed: bool = False
    inputs: dict[str, Input] = {}
    read: dict[str, Relative] = {}
    contents: tuple[Content, ...] = ()
    scripts: tuple[Script, ...] = ()
    licences: Annotated[tuple[Licence, ...], msgspec.Meta(min_length=1)]
    bundle: Bundle | None = None
    contract: Contract | None = None
    depends: Relations = Relations()
    recommends: Relations = Relations()
    suggests: Relations = Relations()
    provides: Relations = Relations()
    conflicts: Relations = Relations()
    replaces: Relations = Relations()
    overrides: tuple[Override, ...] = ()

    def of_architecture(self, arch: str) -> PackageRecipe:
        """What of it counts for packages of that architecture."""
        return msgspec.structs.replace(
            self,
            licences=tuple(each for each in self.licences if not each.arch or arch in each.arch),
            # that it is for others, too, moves no key
            overrides=tuple(
                msgspec.structs.replace(each, arch=())
                for each in self.overrides
                if not each.arch or arch in each.arch
            ),
        )

    @property
    def relations(self) -> tuple[Relations, ...]:
        """All that it says of other packages."""
        return self.depends, self.recommends, self.suggests, self.provides, self.conflicts, self.replaces

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the recipes whose packages this one names, each once."""
        return tuple(dict.fromkeys(name for each in self.relations for name in (*each.exact, *each.named)))


def load(root: Path) -> dict[str, PackageRecipe]:
    """Every recipe of the checkout `root` by its file's name; a `UserError` names file and line."""
    recipes = {
        path.stem: read(path, PackageRecipe, root) for path in sorted((root / DIRECTORY).glob("*.toml"))
    }
    for name, recipe in recipes.items():
        path = root / DIRECTORY / f"{name}.toml"
        for index, content in enumerate(recipe.contents):
            given = [content.input, content.file, content.link, content.directory or None]
            if len([way for way in given if way is not None]) != 1:
                raise UserError(
                    f"{place_of(path, root, 'contents', str(index))}: {content.to} comes from none or two of its ways",
                    "write one of: input, file, link, directory = true",
                )
        for index, licence in enumerate(recipe.licences):
            if len([where for where in (licence.source, licence.builder, licence.input) if where]) > 1:
                raise UserError(
                    f"{place_of(path, root, 'licences', str(index))}: the licence of {licence.what} is in two places",
                    "write one of: source, builder, input; or none for a file of this checkout",
                )
        for needed in recipe.needs:
            if needed not in recipes:
                raise UserError(
                    f"{place_of(path, root, 'depends')}: there is no {DIRECTORY}/{needed}.toml",
                    f"write one of: {', '.join(recipes)}",
                )
            if recipe.each == "platform" and recipes[needed].each != "platform":
                raise UserError(
                    f"{place_of(path, root, 'depends')}: {needed} is made for each {recipes[needed].each},"
                    " this one for each platform",
                    "name packages that are made for the platform",
                )
    return recipes
