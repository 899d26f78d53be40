"""The history that a bisection goes through, in a bare repository of its own; others are only read."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Literal

from pipeline.errors import InternalError, UserError
from pipeline.files import write_atomically
from pipeline.git import Mirror, NoAnswer

Verdict = Literal["good", "bad", "skip"]


class History(Mirror):
    """The bare repository in which one bisection is recorded."""

    def borrow(self, repository: Path) -> None:
        """See the commits of a repository on this machine, which is only read."""
        git_dir = common_directory(repository)
        (self.path / "objects/info").mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "objects/info/alternates", f"{git_dir / 'objects'}\n".encode())
        if (git_dir / "shallow").is_file():
            write_atomically(self.path / "shallow", (git_dir / "shallow").read_bytes())

    def bring(self, url: str) -> None:
        """Fetch all branches and tags, with their history; NoAnswer when the remote gives none."""
        refspecs = [f"+refs/{kind}/*:refs/{kind}/*" for kind in ("heads", "tags")]
        self._remote("fetch", "-q", "--", url, *refspecs, timeout=6 * 3600)

    def resolve(self, ref: str) -> str | None:
        """The commit that a ref means here."""
        return self._ask("rev-parse", "--verify", "-q", "--end-of-options", f"{ref}^{{commit}}")

    def leads(self, good: str, bad: str) -> bool:
        """Whether there is a history between two commits."""
        return self._ask("merge-base", good, bad) is not None

    def precedes(self, first: str, second: str) -> bool:
        """Whether a commit is an ancestor of another one."""
        return self._ask("merge-base", "--is-ancestor", first, second) is not None

    def start(self, good: str, bad: str) -> None:
        """Begin; nothing is tested yet."""
        self._git("update-ref", "--no-deref", "HEAD", bad)
        self._git("bisect", "start", "--no-checkout", bad, good)

    def started(self) -> bool:
        """Whether a bisection is under way."""
        return (self.path / "BISECT_LOG").is_file()

    def next(self) -> str | None:
        """The commit to test."""
        return self._ask("rev-parse", "--verify", "-q", "BISECT_HEAD")

    def mark(self, verdict: Verdict, commit: str) -> tuple[str | None, tuple[str, ...]]:
        """Tell git a verdict; the first bad commit, or all that it can be, when that is known now."""
        done = self._run(["bisect", verdict, commit])
        if found := re.search(r"^([0-9a-f]{40}) is the first bad commit$", done.stdout, re.MULTILINE):
            return found[1], ()
        if "only 'skip'ped commits left" in done.stdout:
            return None, tuple(re.findall(r"^([0-9a-f]{40})$", done.stdout, re.MULTILINE))
        if "The merge base" in done.stderr + done.stdout and verdict == "bad":
            raise UserError(
                f"{commit[:12]}, where the two histories part, is bad: what is good was mended since",
                "name a --good that --bad has in its history",
            )
        if done.returncode:
            raise InternalError(f"git bisect {verdict} failed: {(done.stderr or done.stdout).strip()}")
        return None, ()

    def left(self) -> str:
        """How many commits are left, as git has it: `about 3`."""
        vars_ = self._ask(
            "rev-list", "--bisect-vars", "refs/bisect/bad", "--not", "--glob=refs/bisect/good-*"
        )
        found = re.search(r"^bisect_steps=(\d+)$", vars_ or "", re.MULTILINE)
        return f"about {int(found[1]) + 1}" if found else "some"

    def subject(self, commit: str) -> str:
        """The first line of a commit's message."""
        return self._git("log", "-1", "--format=%s", commit).strip()

    def about(self, commit: str) -> str:
        """A commit as `git show` has it, without its changes."""
        return self._git("show", "--no-patch", "--format=medium", commit).strip()

    def log(self) -> str:
        """Git's log of the bisection."""
        return (self.path / "BISECT_LOG").read_text() if self.started() else ""


def common_directory(repository: Path) -> Path:
    """Where a repository, or the working tree of one, has its objects; UserError when it is none."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", f"{repository}", "rev-parse", "--path-format=absolute", "--git-common-dir"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().removeprefix("fatal: ") or "git gave no reason"
        raise UserError(f"{repository} is no git repository: {reason}", "name a clone with its history")
    return Path(done.stdout.strip())


def resolved_in(repository: Path, ref: str) -> str | None:
    """The commit that a ref means in a repository of the user's, where HEAD and HEAD~3 mean something, too."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = [
        "git",
        "-C",
        f"{repository}",
        "rev-parse",
        "--verify",
        "-q",
        "--end-of-options",
        f"{ref}^{{commit}}",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def history_between(
    out: Path, good: str, bad: str, repository: str | None, mirror: Path, url: str | None
) -> tuple[History, str, str]:
    """The repository of a bisection, and the commits that two refs mean.

    They are looked for in `repository`, a directory or an address; without one in the project's own `mirror` of the
    source, then at `url`, its origin. UserError when they are not there, or have nothing in common.
    """
    history = History(out / "repository.git")
    ends: tuple[str | None, str | None] = (None, None)
    local = Path(repository) if repository is not None else mirror
    if local.is_dir():
        history.borrow(local)
        ends = resolved_in(local, good), resolved_in(local, bad)
        ends = _joined(history, ends)
    if None in ends and not (repository is not None and local.is_dir()):
        address = repository if repository is not None else url
        if address is not None:
            try:
                history.bring(address)
            except NoAnswer as error:
                raise UserError(
                    f"{address} does not answer: {error}", "give --repository, a clone on this machine"
                ) from None
            ends = _joined(history, (history.resolve(good), history.resolve(bad)))
    if ends[0] is None or ends[1] is None:
        missing = bad if ends[0] is not None else good
        raise UserError(
            f"there is no commit {missing} with a history to the other",
            "give --repository, a clone of the source with its history",
        )
    if ends[0] == ends[1]:
        raise UserError(f"{good} and {bad} are the same commit", "name two")
    if history.precedes(ends[1], ends[0]):
        raise UserError(
            f"--bad {bad} comes before --good {good}",
            "swap them; to find what mended something, give a command as --test that fails when it works",
        )
    return history, ends[0], ends[1]


def _joined(history: History, ends: tuple[str | None, str | None]) -> tuple[str | None, str | None]:
    """Two commits, or neither when nothing leads from one to the other."""
    if ends[0] is not None and ends[1] is not None and not history.leads(ends[0], ends[1]):
        return None, None
    return ends
