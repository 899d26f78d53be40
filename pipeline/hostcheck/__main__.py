"""The command `virt-rt-check`.

Exit status: 0 when everything is as planned, 1 when a finding failed or could not be told, 2 when the
command was called wrongly or there is no plan to check against.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import findings
from .audit import audit
from .machine import Machine
from .planfile import PLAN, Guest, Plan, PlanFileError, load
from .preflight import preflight


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    root = Path(options.root)
    source = Path(options.plan) if options.plan else root / PLAN.lstrip("/")
    try:
        if not root.is_dir():
            raise PlanFileError(f"--root {root} is not a directory", "name one that has proc/ and sys/")
        plan = load(source)
        machine = Machine(root)
        if options.command == "preflight":
            found = preflight(machine, plan)
        else:
            found = audit(machine, plan, _chosen(plan, options.guest))
    except PlanFileError as error:
        print(f"virt-rt-check: {error}\n  {error.hint}", file=sys.stderr)
        return 2
    if options.json:
        told = {"schema": 1, "command": options.command, "platform": plan.platform, "plan": str(source)}
        text = json.dumps({**told, **findings.to_json(found)}, indent=1) + "\n"
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        text = findings.table(found, colour)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; the verdict stands
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return findings.exit_status(found)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--plan", metavar="FILE", help=f"the plan (default: {PLAN} below the root)")
    common.add_argument("--json", action="store_true", help="print JSON instead of a table")
    common.add_argument("--root", metavar="DIR", default="/", help="read proc/, sys/ and dev/ below DIR")
    parser = argparse.ArgumentParser(
        prog="virt-rt-check",
        description="Check that this machine, and its running guests, keep the plan.",
        epilog="Exit status: 0 all as planned, 1 something is not or cannot be told, 2 cannot be checked.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("preflight", parents=[common], help="the machine as it booted")
    guests = commands.add_parser("audit", parents=[common], help="running guests, interrupts, programs")
    guests.add_argument("guest", nargs="*", metavar="GUEST", help="(default: all guests of the plan)")
    return parser


def _chosen(plan: Plan, names: Sequence[str]) -> list[Guest]:
    known = {guest.name: guest for guest in plan.guests}
    if not known:
        raise PlanFileError("the plan has no guests", "give the platform a guest, and install its tuning")
    if unknown := [name for name in names if name not in known]:
        raise PlanFileError(f"the plan has no guest {unknown[0]}", f"its guests are: {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())


if __name__ == "__main__":
    raise SystemExit(main())
