"""The command about reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.face import Face, session


class ReportCommand(Face):
    """`doit report`."""

    name = "report"
    doc_purpose = "make the report of a measurement: verdicts, pictures, comparison with another one"
    doc_usage = "DIR [--baseline FILE|DIR] [--out DIR]"
    cmd_options = (
        {
            "name": "baseline",
            "short": "",
            "long": "baseline",
            "type": str,
            "default": None,
            "help": "a report.json, or the directory of a report or a measurement: what to compare with",
        },
        {
            "name": "out",
            "short": "",
            "long": "out",
            "type": str,
            "default": None,
            "help": "where the report goes, by default DIR/report",
        },
    )

    def parse_execute(self, in_args: list[str]) -> int:
        """Options may follow the directory, too."""
        if in_args and not in_args[0].startswith("-"):
            in_args = [*in_args[1:], in_args[0]]
        return super().parse_execute(in_args)

    def perform(self, params: dict[str, Any], args: list[str]) -> int:
        """Write the report and print a line per level; status 1 when one is red."""
        from pipeline.labrecord import PAGE  # most commands do without
        from pipeline.labreport import red
        from pipeline.measurementreport import measurement_report, verdict_of

        measurement = Path(self.one(args, "DIR"))
        for option in ("baseline", "out"):
            if params[option] == "":
                raise UserError(f"--{option} names nothing", f"doit report {self.doc_usage}")
        if not measurement.is_dir():
            raise UserError(f"there is no directory {measurement}", "give the directory of a measurement")
        baseline = Path(params["baseline"]) if params["baseline"] is not None else None
        if baseline is not None and not baseline.exists():
            raise UserError(
                f"there is no {baseline}",
                "name a report.json or the directory of a measurement for --baseline",
            )
        out = Path(params["out"]) if params["out"] is not None else measurement / "report"
        made = measurement_report(session().project, measurement, verdict_of(measurement), baseline, out)
        for level in made.levels:
            print(f"{level.name}: {level.verdict}: {level.reason}")
        for line in red(made):
            print(f"red: {line}")
        for each in made.baseline.comparisons if made.baseline else ():
            print(f"{each.place} {each.cpu}, {each.stage} {each.what}: {each.says}")
        print(out / PAGE)
        return 0 if made.ok else 1
