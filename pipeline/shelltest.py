"""A user's command as the test of a commit; its exit status means what it means to `git bisect run`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.bisecthistory import Verdict
from pipeline.errors import UserError

SKIP = 125
"""The exit status by which a command says that a commit cannot be tested."""
#: From here on a status is a shell's word for a signal, or no verdict to git.
NO_VERDICT = 128
#: Seconds that a command has to end when it is told to.
PATIENCE_S = 10

Judge = Callable[[str, Path, Path], tuple[Verdict, str]]
"""Tells of a commit, whose products lie in the first directory, what it is and why; logs go into the second."""


@dataclass(frozen=True, slots=True)
class ShellTest:
    """A command for bash, run in the directory `root` with `ARTIFACTS` and `COMMIT` in its environment."""

    command: str
    root: Path

    def __call__(self, commit: str, artifacts: Path, logs: Path) -> tuple[Verdict, str]:
        """Run it; UserError when it ended in a way that says nothing of the commit."""
        log = logs / "command.log"
        status = run_shell(self.command, self.root, commit, artifacts, log)
        if status == 0:
            return "good", ""
        if status == SKIP:
            return "skip", f"the command ended with {SKIP}"
        if status in (126, 127):
            raise UserError(
                f"the test of {commit[:12]} could not be run: it ended with {status}", f"see {log}"
            )
        if 0 < status < NO_VERDICT:
            return "bad", f"the command ended with {status}"
        raise UserError(f"the test of {commit[:12]} ended with {status}, which says nothing", f"see {log}")


def run_shell(command: str, root: Path, commit: str, artifacts: Path, log: Path) -> int:
    """The exit status of a command, negative for a signal; it and all it started end when this is interrupted."""
    environment = os.environ | {"ARTIFACTS": f"{artifacts}", "COMMIT": commit}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=root, env=environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait()
        except BaseException:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(PATIENCE_S)
            raise
