"""RT kernels: one action for the host's, one for the guest's, from the platform's fragments."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pipeline.action import Action, File, Output, Upstream
from pipeline.architecture import architecture
from pipeline.errors import UserError
from pipeline.inputs import TREE, builder_name, source_name
from pipeline.recipes import Platform

ROLES = ("host", "guest")
BUILDER = "kernel"
CONTRACT = "common/contract.toml"
#: What a role's kernel leaves for a debugger.
DEBUGGED = {"guest": ("vmlinux",)}


def kernel_name(platform: str, role: str) -> str:
    """Name of the action that builds a platform's host or guest kernel."""
    return f"kernel:{platform}:{role}"


def kernel(root: Path, name: str, platform: Platform, role: str, local: bool = False) -> Action:
    """Build the `role` kernel of a platform; `root` is the checkout, `local` says that its source is a work tree."""
    arch = architecture(platform.arch)
    fragments = platform.kernel.fragments_of(role)
    files = {f"kernel-configs/{path}": _fragment(root, name, path) for path in (*fragments, CONTRACT)}
    for helper in ("contract.py", "kconfig-why.c"):
        origin = f"pipeline/{helper}" if helper.endswith(".py") else f"recipes/steps/{helper}"
        files[helper] = File.read(root / origin, origin)
    return compile_kernel(
        root,
        action=kernel_name(name, role),
        summary=f"the RT {role} kernel of {name}",
        arch=platform.arch,
        source=platform.kernel.source_of(role),
        files=files,
        environment={
            "ARCH": arch.kernel,
            "ROLE": role,
            "FRAGMENTS": " ".join(fragments),
            "CONTRACT": CONTRACT,
            "KERNEL_TARGETS": " ".join((arch.image, "modules", *DEBUGGED.get(role, ()))),
        },
        place=f"{name}/kernel/{role}",
        local=local,
    )


def compile_kernel(
    root: Path,
    *,
    action: str,
    summary: str,
    arch: str,
    source: str,
    files: dict[str, File],
    environment: dict[str, str],
    place: str | None,
    modules: bool = True,
    local: bool = False,
) -> Action:
    """The kernel step itself, for whatever fragments: `files` and `environment` as the step reads them.

    From a work tree (`local`) it is run by one that knows of earlier builds.
    """
    of = architecture(arch)
    debugged = [Output(each) for each in environment["KERNEL_TARGETS"].split() if each == "vmlinux"]
    step = "recipes/steps/kernel.sh"
    if local:
        files = {**files, "kernel.sh": File.read(root / step, step)}
        step = "recipes/steps/kernel-local.sh"
    return Action(
        name=action,
        kind="kernel",
        version=1,
        arch=arch,
        summary=summary,
        builder=builder_name(of.builder(BUILDER)),
        script=File.read(root / step, step),
        files=files,
        inputs={"source": Upstream(source_name(source), TREE, unpack=True)},
        environment={**environment, "CROSS_COMPILE": of.cross_compile},
        outputs=(
            Output(of.image),
            Output("config"),
            Output("System.map"),
            Output("kernelrelease"),
            *debugged,
            *([Output("modules", "directory"), Output("headers", "directory")] if modules else []),
        ),
        remedy="where a symbol is named, mend the fragment that asks for it",
        resource="heavy",
        ccache=True,
        kept=("obj",),
        place=place,
    )


def _fragment(root: Path, platform: str, path: str) -> File:
    where = root / "kernel-configs" / path
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or not where.is_file():
        raise UserError(
            f"recipes/platforms/{platform}.toml: there is no kernel-configs/{path}",
            "write the fragment, or take it out of the recipe",
        )
    return File.read(where, f"kernel-configs/{path}")
