"""The commands of `doit` that help to type and to look up: completion and reference."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.face import Face, Option, session
from pipeline.files import write_atomically
from pipeline.tasks import MEASURE, tasks
from pipeline.usage import Command, command_of

SCRIPTS = Path(__file__).resolve().parent / "completions"
#: Of doit's own commands, the one that is of use here.
HELP = "help"


def _switch(name: str, text: str) -> Option:
    return {"name": name, "short": "", "long": name, "type": bool, "default": False, "help": text}


class HelpFace(Face):
    """A command that is about all commands."""

    def __init__(self, cmds: Any = None, **kwargs: Any) -> None:
        """`cmds` is doit's table of commands."""
        super().__init__(cmds=cmds, **kwargs)
        self._cmds = cmds

    def commands(self) -> dict[str, Command]:
        """The commands of this project by name, without doit's own that decide nothing here."""
        kinds: Mapping[str, Any] = self._cmds.to_dict()
        return {
            name: command_of(name, kind)
            for name, kind in sorted(kinds.items())
            if kind.__module__.partition(".")[0] == __name__.partition(".")[0]
        }


class Completion(HelpFace):
    """`doit completion`."""

    name = "completion"
    doc_purpose = "print what makes a shell complete commands, options, tasks and names: bash, zsh or fish"
    doc_usage = "SHELL"
    cmd_options = (_switch("table", "print what the shells ask for, as JSON"),)

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Print a script for a shell, which then asks `completion.py` of this checkout."""
        if params["table"]:
            print(json.dumps(self._table()))
            return
        shells = self._shells()
        shell = self.one(args, "SHELL")
        if shell not in shells:
            raise UserError(f"there is no completion for {shell}", f"write one of: {', '.join(shells)}")
        text = (SCRIPTS / f"doit.{shell}").read_text()
        places = {"@ROOT@": SCRIPTS.parent.parent, "@PYTHON@": sys.executable}
        for name, place in places.items():
            text = text.replace(name, shlex.quote(str(place)))
        print(text, end="")

    def _table(self) -> dict[str, Any]:
        """Commands with their options, the names of all that they take, and the variables of tasks.

        A new guest has no lock yet, and without it there is no graph: `TASK` and `STEP` are left out then.
        """
        from pipeline import measuring, sourcerecipe  # printing a script does without

        project = session().project
        recipes = project.recipes
        commands = self.commands()
        topic = Command(HELP, "show what a command takes", "doit help COMMAND", (), ("TOPIC",), repeats=False)
        sources = sourcerecipe.load_recipes(project.root / "recipes" / "sources.toml")
        names = {
            **self._tasks(),
            "TOPIC": [(name, each.purpose) for name, each in commands.items()],
            "PLATFORM": [(name, each.description) for name, each in recipes.platforms.items()],
            "GUEST": [(name, each.description) for name, each in recipes.guests.items()],
            "TOPOLOGY": [(name, each.description) for name, each in recipes.topologies.items()],
            "CHANNEL": [(name, "a channel") for name in project.release.repository.channels],
            "LOCKED": [
                *((name, each.description) for name, each in sources.items()),
                *((f"builder/{name}", "packages of a builder") for name in recipes.builders),
                *((f"guest/{name}", "packages of a guest's image") for name in recipes.guests),
            ],
            "SHELL": [(name, f"completion for {name}") for name in self._shells()],
        }
        return {
            "commands": {each.name: dataclasses.asdict(each) for each in (*commands.values(), topic)},
            "names": names,
            "variables": {MEASURE: measuring.VARIABLES},
        }

    def _shells(self) -> list[str]:
        return sorted(path.suffix[1:] for path in SCRIPTS.glob("doit.*"))

    def _tasks(self) -> dict[str, list[tuple[str, str]]]:
        """What can be run, each with what it is: intermediate steps, and all else; nothing without a graph."""
        try:
            graph = session().project.graph
        except UserError:
            return {}
        products: list[tuple[str, str]] = []
        steps: list[tuple[str, str]] = []
        for task in tasks(session()):
            name = f"{task['basename']}:{task['name']}"
            group = steps if name in graph and graph[name].place is None else products
            group.append((name, task["doc"]))
        return {"TASK": products, "STEP": steps}


class Reference(HelpFace):
    """`doit reference`."""

    name = "reference"
    doc_purpose = "write the generated pages of docs/reference/ anew"
    doc_usage = ""

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Write what is not as it should be."""
        from pipeline import reference  # only here

        if args:
            raise UserError("doit reference takes nothing", "doit reference")
        root = session().project.root
        for path, content in reference.pages(self.commands()).items():
            place = root / path
            if not place.is_file() or place.read_text() != content:
                write_atomically(place, content.encode())
                print(f"wrote {path}")
