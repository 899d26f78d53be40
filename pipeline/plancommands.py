"""The commands of `doit` about machines and who owns their CPUs: topology and cpuplan."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from pipeline import machine
from pipeline.cpuplan import HostPlan
from pipeline.errors import UserError
from pipeline.face import JSON_OPTION, Face, Option, session
from pipeline.files import write_atomically
from pipeline.recipes import Guest, Platform, Recipes, plan_of
from pipeline.settings import chosen, host_command_line


def _option(name: str, kind: type, default: object, help_text: str) -> Option:
    return {
        "name": name,
        "short": "",
        "long": name.replace("_", "-"),
        "type": kind,
        "default": default,
        "help": help_text,
    }


class Topology(Face):
    """`doit topology`."""

    name = "topology"
    doc_purpose = "record the topology of this machine, as a recipe on standard output"
    doc_usage = "[--sysroot DIR] [--memory MIB] [--description TEXT]"
    cmd_options = (
        _option("sysroot", str, "/", "the machine whose sys/ and proc/ are in this directory"),
        _option("memory", int, 0, "MiB of each node that does not tell its own"),
        _option("description", str, "", "what the machine is; its processor by default"),
    )

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Print TOML and nothing else; remarks go to standard error, too. Reads no recipes: the shell may just
        have made an empty one to write this into.
        """
        if args:
            raise UserError(
                f"doit topology takes no {args[0]}", f"doit topology > recipes/topologies/{args[0]}.toml"
            )
        root = Path(params["sysroot"])
        if not root.is_dir():
            raise UserError(f"there is no directory {root}", "name one that has sys/ and proc/")
        if not params["description"].isprintable():
            raise UserError("--description has a control character", "write one line of text")
        if params["memory"] < 0:
            raise UserError(f"--memory {params['memory']} is no memory", "write a number of MiB")
        recording = machine.record(
            root, memory_mib=params["memory"] or None, description=params["description"]
        )
        for remark in recording.remarks:
            print(f"note: {remark}", file=sys.stderr)
        print(machine.to_toml(recording.topology, recording.remarks), end="")


class CpuPlan(Face):
    """`doit cpuplan`."""

    name = "cpuplan"
    doc_purpose = "show who owns which CPU of a platform"
    doc_usage = "PLATFORM [--topology NAME] [--json | --svg | --doc]"
    cmd_options = (
        _option(
            "topology", str, "", "as if the platform had this topology; CPUs named in recipes are left out"
        ),
        JSON_OPTION,
        _option("svg", bool, False, "print a picture"),
        _option("doc", bool, False, "write the generated parts of the platform's page in docs/platforms/"),
    )

    def parse_execute(self, in_args: list[str]) -> int:
        """Options may follow the platform; doit by itself wants them first."""
        names = list(itertools.takewhile(lambda word: not word.startswith("-"), in_args))
        return super().parse_execute([*in_args[len(names) :], *names])

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Draw the plan, or print it for tools."""
        from pipeline import planpicture, planview  # most commands do without

        name = self.one(args, "PLATFORM")
        if sum(bool(params[key]) for key in ("as_json", "svg", "doc")) > 1:
            raise UserError("--json, --svg and --doc exclude each other", f"doit cpuplan {self.doc_usage}")
        project = session().project
        platform = project.recipes.platform(name)
        topology = params["topology"] or platform.topology
        plan, guests, notes = plan_on(project.root, project.recipes, name, topology)
        choices = chosen(project.root, name, platform, project.settings)
        command_line = host_command_line(plan, project.settings, choices, platform.arch)
        title = f"{name} on {topology}: {plan.topology.description}"
        if params["as_json"] or params["svg"]:
            for note in notes:
                print(note, file=sys.stderr)
        if params["as_json"]:
            from pipeline.tuning import plan_json

            moved = replace(platform, topology=topology)
            document = plan_json(name, moved, plan, guests, project.settings, choices)
            print(json.dumps(document, indent=1))
        elif params["svg"]:
            print(planpicture.svg(plan, title), end="")
        elif params["doc"]:
            if notes:
                raise UserError("a page shows the platform's own topology", f"doit cpuplan {name} --doc")
            self._write_doc(name, platform, plan, command_line)
        else:
            parameters = [word for word, _ in command_line]
            notes += [f"warning: {line}" for line in planview.warnings(project.root, plan)]
            planview.show(plan, title, sys.stdout, parameters, notes)

    def _write_doc(
        self, name: str, platform: Platform, plan: HostPlan, command_line: Sequence[tuple[str, str]]
    ) -> None:
        from pipeline.platformdoc import pages

        project = session().project
        for path, content in pages(project.root, name, platform, plan, command_line).items():
            if not path.is_file() or path.read_text() != content:
                write_atomically(path, content.encode())
                print(f"wrote {path.relative_to(project.root)}")


def plan_on(
    root: Path, recipes: Recipes, name: str, topology: str
) -> tuple[HostPlan, Mapping[str, Guest], list[str]]:
    """The plan of a platform on a topology, its guests as planned, and what was left out for that, a line each.

    CPU numbers and PCI addresses mean something on the machine for which they were written only. On any other they
    are left out, and the plan chooses.
    """
    platform = recipes.platforms[name]
    if topology == platform.topology:
        return recipes.plans[name], recipes.guests_of(name), []
    if topology not in recipes.topologies:
        raise UserError(f"there is no topology {topology}", f"write one of: {', '.join(recipes.topologies)}")
    notes = []

    def said(recipe: str, named: list[str]) -> None:
        if named:
            notes.append(f"note: {recipe}: {', '.join(named)} left out: for {platform.topology} only")

    said(f"recipes/platforms/{name}.toml", ["housekeeping_cpus"] * (platform.housekeeping_cpus is not None))
    guests = {}
    for guest_name, guest in recipes.guests_of(name).items():
        left_out = {"pins": None, "emulator_cpus": None, "devices": ()}
        named = [key for key, nothing in left_out.items() if getattr(guest, key) != nothing]
        said(f"recipes/guests/{guest_name}.toml", named)
        guests[guest_name] = replace(guest, **left_out)
    platforms = {name: replace(platform, topology=topology, housekeeping_cpus=None)}
    changed = replace(recipes, platforms=platforms, guests=guests)
    return plan_of(root, changed, name, topology), guests, notes
