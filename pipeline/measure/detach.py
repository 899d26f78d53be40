"""A run that goes on when the one who started it has gone: a unit of systemd where that is, else a process of its own.

What it says is in the record's `log`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import progress, tools
from .problems import MeasureError

#: It is there when systemd is process 1 (sd_booted(3)).
BOOTED = Path("/run/systemd/system")
#: Seconds until a run that was started must be at work or have ended.
PATIENCE = 60.0
#: The option with the word that a started run writes into its log once nothing refuses it any more.
OPTION = "--begun"


def start(request: Path, directory: Path, booted: Path = BOOTED) -> None:
    """Start a run and return when it is at work; raises `MeasureError` with what it said when it ended before."""
    log = directory / progress.LOG
    size = log.stat().st_size if log.exists() else 0
    token = f"begun-{os.getpid()}-{time.monotonic_ns()}"
    where = ["--request", str(request.resolve()), "--record", str(directory.resolve())]
    command = [*tools.myself(), "run", *where, OPTION, token]
    if booted.is_dir() and os.geteuid() == 0 and shutil.which("systemd-run"):
        alive = _as_unit(command, directory, log)
    else:
        alive = _as_process(command, log)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        lives = alive()  # asked before the log, so that its last words are not missed
        said = log.read_bytes()[size:].decode(errors="replace") if log.exists() else ""
        if token in said.splitlines():
            return
        if not lives:
            break
        time.sleep(0.1)
    lines = said.strip().splitlines() or ["it said nothing"]
    raise MeasureError(lines[0].partition("virt-rt-measure: ")[2] or lines[0], " ".join(lines[1:]).strip())


def begun(token: str) -> None:
    """Tell who started this that it is at work."""
    print(token, file=sys.stderr, flush=True)


def _as_unit(command: list[str], directory: Path, log: Path) -> Callable[[], bool]:
    """A unit lives when a session, and with it all that it started, is ended by logind."""
    digest = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:12]
    unit = f"virt-rt-measure-{digest}.service"
    asked = ["systemd-run", f"--unit={unit}", "--collect", "--quiet", f"--setenv=PATH={os.environ['PATH']}"]
    asked += [f"--property=StandardOutput=append:{log.resolve()}", "--property=StandardError=inherit"]
    done = subprocess.run(
        [*asked, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise MeasureError(
            f"systemd-run ended with status {done.returncode}: {said}", f"systemctl status {unit}"
        )

    def alive() -> bool:
        return subprocess.run(["systemctl", "--quiet", "is-active", unit], check=False).returncode == 0

    return alive


def _as_process(command: list[str], log: Path) -> Callable[[], bool]:
    """In a session of its own, which no terminal hangs up."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )

    def alive() -> bool:
        status: int | None = process.poll()
        return status is None

    return alive
