"""The commands of `doit` about platforms beside each other, and about new ones."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import inventory, matrix
from pipeline.commands import Run
from pipeline.errors import UserError
from pipeline.face import JSON_OPTION, Face, Option, session


class Matrix(Face):
    """`doit matrix`."""

    name = "matrix"
    doc_purpose = "show the kernels of all platforms side by side, or build them"
    doc_usage = "[--build | --json]"
    cmd_options = (
        {
            "name": "build",
            "short": "",
            "long": "build",
            "type": bool,
            "default": False,
            "help": "build them all: what has one key, once",
        },
        JSON_OPTION,
    )

    def __init__(self, **given: Any) -> None:
        """`given` is what doit gives every command; `--build` needs one more of them."""
        super().__init__(**given)
        self._given = given

    def perform(self, params: dict[str, Any], args: list[str]) -> int | None:
        """Print the table, or run its tasks."""
        if args or (params["build"] and params["as_json"]):
            raise UserError(
                "doit matrix takes no task, and either --build or --json", f"doit matrix {self.doc_usage}"
            )
        rows = matrix.rows(session().project)
        if params["build"]:
            return int(Run(**self._given).parse_execute([row.task for row in rows]))
        if params["as_json"]:
            print(json.dumps([{"task": row.task, **asdict(row)} for row in rows], indent=1))
            return None
        print("\n".join(matrix.table(rows)))
        building = len({row.key for row in rows if row.state == "build"})
        print(f"{building} to build: doit matrix --build" if building else "nothing to build")
        return None


def _option(name: str, kind: type, default: object, help_text: str) -> Option:
    return {"name": name, "short": "", "long": name, "type": kind, "default": default, "help": help_text}


class NewPlatform(Face):
    """`doit new-platform`."""

    name = "new-platform"
    doc_purpose = "write a platform for this machine, or for one that was recorded elsewhere"
    doc_usage = "NAME [--from FILE] [--topology NAME] [--memory MIB] [--description TEXT]"
    cmd_options = (
        _option("from", str, "", "what scripts/record-machine said on the other machine"),
        _option("topology", str, "", "plan it on these CPUs, a topology that is there already"),
        _option("memory", int, 0, "MiB of each node that does not tell its own"),
        _option("description", str, "", "what the machine is; its processor by default"),
    )

    def parse_execute(self, in_args: list[str]) -> int:
        """Options may follow the name; doit by itself wants them first."""
        names = list(itertools.takewhile(lambda word: not word.startswith("-"), in_args))
        return super().parse_execute([*in_args[len(names) :], *names])

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Write the files, and say what is in them and what is not."""
        from pipeline import newplatform  # most commands do without

        name = self.one(args, "NAME")
        if not params["description"].isprintable():
            raise UserError("--description has a control character", "write one line of text")
        if params["memory"] < 0:
            raise UserError(f"--memory {params['memory']} is no memory", "write a number of MiB")
        project = session().project
        given = params["from"]
        said = inventory.load(Path(given)) if given else inventory.record(project.root)
        asked = newplatform.Asked(name, params["topology"], params["memory"] or None, params["description"])
        try:
            made = newplatform.make(project, asked, inventory.parse(said, given or "this machine"))
        finally:
            project.store.close()
        for path in made.files:
            print(f"wrote {path}")
        for remark in made.remarks:
            print(f"note: {remark}")
        needs = (*made.host, *made.guest)
        for need in needs:
            if need.verdict in ("unmapped", "refused"):
                drives = ", ".join(need.drives) or "nothing"
                symbol = f", CONFIG_{need.symbol}" if need.symbol else ""
                print(
                    f"note: {need.module or 'a driver'}{symbol} is not asked for: {need.reason}; it drives {drives}"
                )
        counts = {verdict: sum(need.verdict == verdict for need in needs) for verdict in newplatform.VERDICTS}
        print(
            f"of {len(needs)} modules {counts['had']} were there already, {counts['asked']} are asked for, "
            f"{counts['idle']} drive nothing, {counts['unmapped'] + counts['refused']} are not in the configuration"
        )
        print(f"read docs/platforms/{name}.md, then: doit platform:{name}")
