"""What a command line of `doit` can go on with: words, each with what it is.

Runs alone, as a file and with the standard library only: a shell asks it at every press of Tab, and has waited too
long after 150 ms. `python -IS completion.py WORD...` gets the words after `doit`, the last of them as far as it is
typed, and prints a line for each candidate: the word, a tab, what it is. A line `:files` or `:directories` says that
paths would do, which the shell knows itself.

What it knows is a table that `doit completion --table` makes of commands and recipes. It is kept in
`artifacts/.completion.json` with a digest of the state of every file that it follows from, so a new guest is known at
the next press. While recipes are broken, the last table serves, and the last tasks while a lock lacks something.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Below `artifacts/`.
FILE = ".completion.json"
#: What names follow from.
_FOLLOWS = ("recipes", "pipeline", "dodo.py", "pyproject.toml")
_TIMEOUT_S = 20.0
#: What is offered for something that has no names of its own.
_PATHS = {
    "FILE": ":files",
    "FILE|DIR": ":files",
    "DIR": ":directories",
    "DEST": ":directories",
    "COMMAND": ":files",
}

Table = dict[str, Any]
Candidate = tuple[str, str]


def state_of(root: Path) -> str:
    """A digest of names, sizes and times of all that a table follows from."""
    digest = hashlib.sha256()
    for top in _FOLLOWS:
        pending = [os.path.join(root, top)]  # noqa: PTH118  # half the time of pathlib, at every press
        while pending:
            path = pending.pop()
            try:
                state = os.stat(path)  # noqa: PTH116
                if os.path.isdir(path):  # noqa: PTH112
                    names = sorted(os.listdir(path))  # noqa: PTH208
                    pending += [f"{path}/{name}" for name in names if name != "__pycache__"]
                    continue  # its own time changes with a __pycache__
            except OSError:
                continue
            digest.update(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ino}\n".encode())
    return digest.hexdigest()


def table_of(root: Path) -> Table | None:
    """The table of a checkout; None when there is none, and none can be made."""
    kept = root / "artifacts" / FILE
    state = state_of(root)
    old: Table | None = None
    try:
        document = json.loads(kept.read_text())
        if document["table"].keys() >= {"commands", "names", "variables"}:
            old = document["table"]
        if document["state"] == state:
            return old
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    made = _make(root)
    if made is None:
        return old
    for kind in ("TASK", "STEP"):  # not there while a lock is not what recipes ask for
        made["names"].setdefault(kind, old["names"].get(kind, []) if old is not None else [])
    try:
        kept.parent.mkdir(exist_ok=True)
        written = kept.with_name(f"{FILE}.{os.getpid()}")
        written.write_text(json.dumps({"state": state, "table": made}))
        written.replace(kept)
    except OSError:
        pass  # a checkout that is not ours to write: slower, and as right
    return made


def _make(root: Path) -> Table | None:
    """Ask doit."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "doit", "completion", "--table"],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        found: Table | None = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return found


def candidates(table: Table, words: list[str]) -> Iterator[Candidate]:
    """What the last of the words can become; the others stand before it."""
    *before, typed = words
    commands, names = table["commands"], table["names"]
    # variables may stand anywhere
    before = [word for word in before if word.startswith("-") or "=" not in word]
    given = before[0] if before and before[0] in commands else None
    command = commands[given or "run"]
    switches = {flag: option for option in command["options"] for flag in option["flags"]}
    if before and (taking := switches.get(before[-1])) is not None and taking["takes"]:
        yield from _named(names, taking["takes"], typed)
        return
    if typed.startswith("-"):
        for option in command["options"]:
            yield from _matching([(flag, option["help"]) for flag in option["flags"]], typed)
        yield from _matching([("--help", "what the command does")] if given else [], typed)
        return
    if not before:
        yield from _matching([(name, each["purpose"]) for name, each in commands.items()], typed)
    arguments = _arguments(before[given is not None :], switches)
    takes = command["takes"]
    if arguments < len(takes) or (takes and command["repeats"]):
        kind = takes[min(arguments, len(takes) - 1)]
        if kind == "TASK" and command is commands["run"]:
            yield from _variables(table, before, typed)
        yield from _named(names, kind, typed)


def _arguments(before: list[str], switches: dict[str, Any]) -> int:
    """How many words are neither options nor what these take."""
    count, taken = 0, False
    for word in before:
        if taken:
            taken = False
        elif word.startswith("-"):
            taken = bool(switches.get(word, {}).get("takes"))
        else:
            count += 1
    return count


def _variables(table: Table, before: list[str], typed: str) -> Iterator[Candidate]:
    """Variables of the tasks that were named, such as `TARGET=`."""
    kinds = {word.partition(":")[0] for word in before}
    for kind, variables in table["variables"].items():
        if kind in kinds:
            yield from _matching([(f"{name}=", f"a variable of {kind}") for name in variables], typed)


def _named(names: dict[str, list[Candidate]], kind: str, typed: str) -> Iterator[Candidate]:
    """Names of a kind; of tasks the intermediate ones only when no product is meant."""
    if kind in _PATHS:
        yield _PATHS[kind], ""
        return
    found = list(_matching(names.get(kind, []), typed))
    if kind == "TASK" and not found:
        found = list(_matching(names["STEP"], typed))
    yield from found


def _matching(all_of_them: list[Candidate], typed: str) -> Iterator[Candidate]:
    return ((name, what) for name, what in all_of_them if name.startswith(typed))


def main(words: list[str]) -> int:
    """Print the candidates for a line; nothing, and status 1, where nothing is known."""
    table = table_of(Path(__file__).resolve().parent.parent)
    if table is None:
        return 1
    for name, what in candidates(table, words or [""]):
        print(f"{name}\t{what}" if what else name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
