"""Run every benchmark and write benchmarks/results.md; exit status 1 when a target is missed.

python -m benchmarks [--quick] [noop] [kernel] [restore] [apt] [yum] [packages]
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.container import kernel_build
from benchmarks.indexes import apt_index, yum_index
from benchmarks.measure import ROOT, Row
from benchmarks.noop import no_op
from benchmarks.packaging import packaging
from benchmarks.restore import restore
from pipeline.errors import UserError, VirtRtError
from pipeline.files import write_atomically

RESULTS = ROOT / "benchmarks" / "results.md"
#: Trees of megabytes are made here and removed again: on the checkout's file system, as products are.
WORK = ROOT / "benchmarks" / ".work"


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="ratios against plain tools")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="BENCHMARK",
        help="noop, kernel, restore, apt, yum, packages; default: all",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run; results.md is left alone")
    asked = parser.parse_args()
    quick: bool = asked.quick
    benchmarks: dict[str, Callable[[Path], Row]] = {
        "noop": lambda work: no_op(work, 3 if quick else 15),
        "restore": lambda work: restore(work, 3 if quick else 15),
        "apt": lambda work: apt_index(work, 3 if quick else 15, 50 if quick else 1000),
        "yum": lambda work: yum_index(work, 3 if quick else 15, 50 if quick else 1000),
        "packages": lambda work: packaging(work, 1 if quick else 3),
        # minutes each: one pair says enough about a ratio of a few percent
        "kernel": lambda work: kernel_build(work, 1, quick),
    }
    if unknown := set(asked.names) - set(benchmarks):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}: {', '.join(benchmarks)}")
    rows: list[Row] = []
    WORK.mkdir(exist_ok=True)
    for name, benchmark in benchmarks.items():
        if asked.names and name not in asked.names:
            rows.append(Row(name, note="not asked for in this run"))
            continue
        with tempfile.TemporaryDirectory(dir=WORK) as work:
            try:
                rows.append(benchmark(Path(work)))
            except UserError as error:
                rows.append(Row(name, note=f"{error.message} ({error.hint})"))
        print(rows[-1], flush=True)
    if not quick:
        write_atomically(RESULTS, _page(rows).encode())
    return int(any(row.met is False for row in rows))


def _page(rows: list[Row]) -> str:
    """The results and what they were measured on; nothing that tells whose machine it was."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    return "\n".join(
        [
            "# Benchmarks",
            "",
            f"`make bench` on {time.strftime('%Y-%m-%d')}: {os.cpu_count()} cores, {memory:.0f} GiB of "
            f"memory, Linux {platform.release()} {platform.machine()}, Python {platform.python_version()}.",
            "Both sides of every ratio were measured in this one run.",
            "",
            "| what | ours | theirs | ratio | target | met | how |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(str(row) for row in rows),
            "",
        ]
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except VirtRtError as error:
        print(f"error: {error.message}\n  {error.hint}", file=sys.stderr)
        sys.exit(error.exit_status)
