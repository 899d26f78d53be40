"""The launch scripts of a guest, rendered from `recipes/templates/`.

`kvmqemu.sh` boots the kernel that lies outside the disk, `kvmqemu-rfs.sh` the one inside; both extend
`kvmqemu-base.sh.j2`. Everything a person may change at start is a shell variable at the top of the script.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.action import Action, File, Output, Step
from pipeline.errors import UserError
from pipeline.image import command_line
from pipeline.recipes import Guest, Platform

#: The scripts each guest gets.
SCRIPTS = ("kvmqemu.sh", "kvmqemu-rfs.sh")

#: Variables that become part of paths, unit names and qemu options: words that need no quoting anywhere.
NAMES = ("guest", "platform")

Value = str | int | Sequence[str]


def _quote(value: Value) -> str:
    """One shell word; a list is joined by spaces first."""
    if not isinstance(value, str | int):
        value = " ".join(value)
    return shlex.quote(str(value))


def launch_name(guest: str) -> str:
    """Name of the action that renders a guest's launch scripts."""
    return f"launch:{guest}"


def launch(root: Path, name: str, guest: Guest, platform: Platform) -> Action:
    """Render a guest's launch scripts; `root` is the checkout."""
    directory = root / "recipes" / "templates"
    templates = {
        path.name: File.read(path, f"recipes/templates/{path.name}") for path in directory.glob("*.j2")
    }
    variables: dict[str, Value] = {
        "guest": name,
        "platform": guest.platform,
        "vcpus": guest.vcpus,
        "memory_mib": guest.memory_mib,
        "ssh_port": "",
        "cmdline": command_line(guest, platform),
    }

    def run(step: Step) -> None:
        texts = {template: (step.inputs / template).read_text() for template in templates}
        for script in SCRIPTS:
            target = step.out / script
            target.write_text(render(script, variables, texts))
            target.chmod(0o755)

    return Action(
        name=launch_name(name),
        kind="launch",
        version=1,
        arch=platform.arch,
        summary=f"the launch scripts of {name}",
        run=run,
        files=templates,
        parameters=variables,
        outputs=tuple(Output(script) for script in SCRIPTS),
        place=f"{guest.platform}/launch/{name}",
    )


def render(script: str, variables: Mapping[str, Value], templates: Mapping[str, str]) -> str:
    """Render one of `SCRIPTS`.

    `variables`: `guest`, `platform` (words of a-z, 0-9 and -), `vcpus` (count), `memory_mib` (MiB), `ssh_port`
    (TCP port on loopback, empty text for none), `cmdline` (the kernel's command line for the boot with the kernel
    outside, one text or a list of options). `templates` maps file names of `recipes/templates/` to their text.

    Raises `UserError` when a name is not such a word, a variable is missing, or a template is wrong.
    """
    for name in NAMES:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", str(variables.get(name, ""))):
            raise UserError(
                f"launch script {script}: {name} is {variables.get(name, '')!r}",
                "name it with lower-case letters, digits and '-' only",
            )
    # Imported here, since every run of doit loads this module and few render anything.
    from jinja2 import DictLoader, Environment, StrictUndefined, TemplateError

    # The text is shell, not HTML: quoting is the filter's, and "{#" is how a length begins.
    environment = Environment(
        loader=DictLoader(templates),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",
        comment_end_string="##}",
    )
    environment.filters["sh"] = _quote
    try:
        return environment.get_template(f"{script}.j2").render(variables, script=script)
    except TemplateError as error:
        raise UserError(
            f"launch script {script}: {type(error).__name__}: {error}",
            f"look at recipes/templates/{script}.j2 and what it extends",
        ) from error
