"""The commands of `doit` about platforms beside each other, and about new ones."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from pipeline import matrix
from pipeline.commands import Run
from pipeline.errors import UserError
from pipeline.face import JSON_OPTION, Face, session


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
