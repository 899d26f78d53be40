"""What a host gets to run real-time guests: a tree of files laid out from `/`, rendered from the CPU plan.

A template's place below `recipes/templates/host/` is its file's place in the tree; one that renders to nothing
makes no file. With the tree goes `plan.json`, which says the same to tools, and `virt-rt-check`, which reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.action import Action, File, Output, Step
from pipeline.cpuplan import HostPlan
from pipeline.recipes import Function, Guest, Platform, VirtualFunction
from pipeline.rendering import render_template
from pipeline.settings import BOOT_PAGE_KIB, Resolved, Table, chosen, resolve

TEMPLATES = "recipes/templates/host"
#: The check tool's package, which becomes one executable file; and where that and the plan go.
CHECK = "pipeline/hostcheck"
BUNDLER = "pipeline/checktool.py"
CHECK_PLACE = "usr/bin/virt-rt-check"
PLAN = "plan.json"
PLAN_PLACE = f"usr/share/virt-rt/{PLAN}"
#: Every file of the tree, a line each: what removing the tuning removes.
LIST_PLACE = "usr/share/virt-rt/tuning.files"
ROOT = "root"


def tuning_name(platform: str) -> str:
    """Name of the action that renders a platform's host tuning."""
    return f"tuning:{platform}"


def tuning(
    root: Path, name: str, platform: Platform, plan: HostPlan, guests: Mapping[str, Guest], table: Table
) -> Action:
    """Render the tuning of a platform; `root` is the checkout, `guests` are the platform's.

    Raises `UserError` when the platform chooses what the table does not have.
    """
    files = {}
    for origin in (TEMPLATES, CHECK):
        suffix = ".j2" if origin == TEMPLATES else ".py"
        for path in sorted((root / origin).rglob(f"*{suffix}")):
            place = path.relative_to(root).as_posix()
            files[place] = File.read(path, place)
    files[BUNDLER] = File.read(root / BUNDLER, BUNDLER)  # it writes the file's start
    document = plan_json(name, platform, plan, guests, table, chosen(root, name, platform, table))
    # As a file, so that `doit why` shows the lines that changed.
    content = (json.dumps(document, indent=1) + "\n").encode()
    files[PLAN] = File(content, origin=f"the plan of {name}")

    def run(step: Step) -> None:
        from pipeline import checktool  # a run that makes nothing does without

        templates = {
            place.removeprefix(f"{TEMPLATES}/").removesuffix(".j2"): (
                (step.inputs / place).read_text(),
                file.executable,
            )
            for place, file in files.items()
            if place.startswith(TEMPLATES)
        }
        asked = json.loads((step.inputs / PLAN).read_text())
        write(step.out / ROOT, asked, templates, checktool.CHECK.bundle(step.inputs))

    return Action(
        name=tuning_name(name),
        kind="tuning",
        version=1,
        arch=platform.arch,
        summary=f"the host tuning of {name}",
        run=run,
        files=files,
        outputs=(Output(ROOT, "directory"),),
        place=f"{name}/tuning",
    )


def plan_json(
    name: str,
    platform: Platform,
    plan: HostPlan,
    guests: Mapping[str, Guest],
    table: Table,
    choices: Sequence[str],
) -> dict[str, Any]:
    """The plan of a host for tools: CPUs and guests as `HostPlan.to_json`, and every setting with its reason.

    Settings that a kernel may lack have `absent`, which says why that is fine, and perhaps `witness`, the path that
    must exist for it. Keys are in the order in which a person reads them.
    """
    settings = resolve(plan, table, choices, platform.arch)
    return {
        "schema": 1,
        "platform": name,
        "topology": platform.topology,
        **plan.to_json(),
        "command_line": [
            {"parameter": f"{s.name}={s.value}" if s.value else s.name, "reason": s.reason}
            for s in settings["command_line"]
        ],
        "sysctl": [{"name": s.name, "value": s.value} | _why(s) for s in settings["sysctl"]],
        "module_parameters": [
            {"module": module, "name": parameter, "value": s.value} | _why(s)
            for s in settings["module_parameters"]
            for module, _, parameter in [s.name.partition(".")]
        ],
        "files": [{"path": s.name, "value": s.value} | _why(s) for s in settings["files"]],
        "masked_services": [{"unit": s.name} | _why(s) for s in settings["masked_services"]],
        "choices": [
            {"name": choice, "trade": table.choices[choice].trade, "reason": table.choices[choice].reason}
            for choice in choices
        ],
        "bios": [{"setting": b.setting, "value": b.value, "reason": b.reason} for b in platform.bios],
        "devices": {
            guest: [_device(device) for device in recipe.devices] for guest, recipe in sorted(guests.items())
        },
    }


def _why(setting: Resolved) -> dict[str, str]:
    optional = {"absent": setting.absent, "witness": setting.witness}
    return {"reason": setting.reason} | {key: text for key, text in optional.items() if text}


def _device(device: Function | VirtualFunction) -> dict[str, Any]:
    if isinstance(device, Function):
        return {"address": device.address}
    return {"physical": device.physical, "number": device.number}


def write(
    root: Path, document: Mapping[str, Any], templates: Mapping[str, tuple[str, bool]], check: bytes
) -> None:
    """Write the whole tree below `root`.

    `document` is what `plan_json` makes, `templates` the text and execute bit by place, `check` the check tool.
    """
    made: list[str] = []

    def target(place: str) -> Path:
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        made.append(f"/{place}")
        return path

    for place, (text, executable) in sorted(templates.items()):
        rendered = render(place, text, document)
        if rendered:
            path = target(place)
            path.write_text(rendered)
            path.chmod(0o755 if executable else 0o644)
    for service in document["masked_services"]:
        target(f"etc/systemd/system/{service['unit']}").symlink_to("/dev/null")
    # Profiles of tuned before 2.23 are one directory higher.
    target("usr/lib/tuned/virt-rt").symlink_to("profiles/virt-rt")
    target(PLAN_PLACE).write_text(json.dumps(document, indent=1) + "\n")
    tool = target(CHECK_PLACE)
    tool.write_bytes(check)
    tool.chmod(0o755)
    (root / LIST_PLACE).write_text("".join(f"{place}\n" for place in sorted(made)))


def render(place: str, text: str, document: Mapping[str, Any]) -> str:
    """Render the template of a file; `document` is what `plan_json` makes. Empty text is no file.

    Raises `UserError` when the template is wrong.
    """
    name = f"{place}.j2"
    values = {"plan": document, "boot_page_kib": BOOT_PAGE_KIB}
    rendered = render_template(name, {name: text}, values, f"{TEMPLATES}/{name}")
    return rendered if rendered.strip() else ""
