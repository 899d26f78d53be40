"""What all commands of `doit` share: the session, one way to end, options and task names.

Exit status: 0 fine, 1 our fault, 2 the user's input or environment, 130 interrupted.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from doit.cmd_base import Command
from doit.cmdparse import CmdOption, CmdParseError
from doit.exceptions import InvalidCommand, InvalidDodoFile, InvalidTask

from pipeline import localsources
from pipeline.display import Display
from pipeline.errors import UserError, VirtRtError
from pipeline.project import DEFAULT_PLATFORM, Project
from pipeline.signing import SECRETS
from pipeline.tasks import GDB, MEASURE, RUN, SSH, Session, guest_needs

INTERRUPTED = 130

Option = dict[str, Any]
JSON_OPTION: Option = {
    "name": "as_json",
    "short": "",
    "long": "json",
    "type": bool,
    "default": False,
    "help": "print JSON",
}


SOURCE_OPTION: Option = {
    "name": "source",
    "short": "",
    "long": "source",
    "type": list,
    "default": [],
    "help": "NAME=DIR: take the source NAME from the work tree DIR, and not from the lock; docs/local-sources.md",
}


@functools.cache
def given_sources() -> dict[str, str]:
    """What `--source` says on this process's command line, see `pipeline.localsources`.

    Of the command line itself: doit takes `NAME=DIR` for a variable of its own before any command sees it. First
    asked for where the command begins, since DIR is relative to where the user is.
    """
    return localsources.take(sys.argv[1:])[1]


def without_sources(arguments: list[str]) -> list[str]:
    """The arguments that doit hands to a command, without `--source`, wherever it stands."""
    given_sources()
    return [word for word in arguments if word.partition("=")[0] != localsources.OPTION]


def typed_after(name: str, arguments: list[str]) -> list[str]:
    """What follows `name` on this process's command line, of which doit has taken what looks like its own variables
    (NAME=VALUE); of `arguments` where the command was not begun by that line. Without `--source`.
    """
    typed = localsources.take(sys.argv[1:])[0]
    words = typed if name in typed else arguments
    return words[words.index(name) + 1 :]


@functools.cache
def session() -> Session:
    """The one session of this process; the checkout is where the `pipeline` package lies."""
    environ = dict(os.environ)
    for secret in SECRETS:
        os.environ.pop(secret, None)  # of what is started, GnuPG alone gets it, and not in a variable
    return Session(Project(Path(__file__).resolve().parent.parent, environ, given_sources()))


def _display() -> Display:
    """Where errors are shown, also that of a command line from which no session can be made."""
    try:
        return session().display
    except VirtRtError:
        return Display()


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP arrived."""


def guarded(call: Callable[[], Any]) -> int:
    """Run a command; turn every error into its lines and its exit status."""
    try:
        with _signals():
            status = call()
        sys.stdout.flush()  # here, where it matters not that nobody reads
        return int(status or 0)
    except VirtRtError as error:
        _display().failed("", error)
        return error.exit_status
    except (CmdParseError, InvalidCommand, InvalidDodoFile, InvalidTask) as error:
        # doit's parser ends its messages with its own data structures
        text = " ".join(str(error).split()).partition(" (parsing options")[0]
        print(f"error: {text}\n  `doit list` names the tasks, `doit help` the commands", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has seen enough; keep the interpreter from complaining at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("VIRT_RT_DEBUG") == "1":
            traceback.print_exc()
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        print("  this is a fault of virt-rt: VIRT_RT_DEBUG=1 shows where", file=sys.stderr)
        return 1


@contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does: containers stopped, stages dropped."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends us at once
        raise Interrupted(signal.Signals(number).name)

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in watched}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Face(Command):  # type: ignore[misc]  # doit has no types
    """A command of ours: parses its options, then `perform`s."""

    execute_tasks: ClassVar[bool] = False
    cmd_options: ClassVar[tuple[Option, ...]] = ()

    def execute(self, params: dict[str, Any], args: list[str]) -> int:
        """Perform under the guard."""
        return guarded(lambda: self.perform(params, args))

    def parse_execute(self, in_args: list[str]) -> int:
        """Refuse bad options with a line and status 2; `--help` tells what there is."""
        if "--help" in in_args:
            return guarded(lambda: print(self.help(), flush=True))
        return guarded(lambda: super(Face, self).parse_execute(without_sources(in_args)))

    def get_options(self) -> list[CmdOption]:
        """The command's own, and the one that all have."""
        return [*super().get_options(), CmdOption(SOURCE_OPTION)]

    def perform(self, params: dict[str, Any], args: list[str]) -> int | None:
        """Do it; an exit status, or None for success."""
        raise NotImplementedError

    def one(self, args: list[str], what: str = "TASK") -> str:
        """The only argument."""
        if len(args) != 1:
            raise UserError(
                f"doit {self.get_name()} takes one {what}", f"doit {self.get_name()} {self.doc_usage}"
            )
        return args[0]


def typed(verb: str, in_args: list[str]) -> list[str]:
    """What was typed after a command, for one whose words may have a `=`: doit takes those for variables of its own.

    `in_args` is what doit has left of it, which is taken where the command was not typed. Without `--source`.
    """
    for word in localsources.take(sys.argv[1:])[0]:
        name, colon, about = word.partition(":")
        if name == verb:
            return [*([about] if colon else []), *typed_after(word, [])]
    return in_args


def options_first(words: list[str]) -> list[str]:
    """Words with the names that they begin with behind the options, where doit's parser wants them."""
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    return [*words[len(names) :], *names]


def action_names(project: Project, names: list[str]) -> list[str]:
    """Actions meant by task names: `platform:NAME`, a group such as `kernel`, or an action's own name."""
    found: list[str] = []
    for name in names or [f"platform:{DEFAULT_PLATFORM}"]:
        kind, _, rest = name.partition(":")
        if kind == "platform" and rest:
            found += project.products(rest)
        elif kind == "platform":
            found += [
                product for platform in project.recipes.platforms for product in project.products(platform)
            ]
        elif kind == MEASURE:
            raise UserError(f"{name} is no step: it measures a machine", "`doit run` alone takes it")
        elif kind == RUN and rest in project.recipes.guests:
            found += guest_needs(project, rest)
        elif kind in (SSH, GDB) and rest in project.recipes.guests:
            raise UserError(f"{name} is no step: it is about a guest that runs", f"doit {RUN}:{rest} runs it")
        elif name in project.graph:
            found.append(name)
        else:
            group = [action.name for action in project.graph if action.name.startswith(f"{name}:")]
            if not group:
                raise UserError(f"there is no task {name}", "`doit list --all` names every task")
            found += group
    return list(dict.fromkeys(found))


def one_action(project: Project, name: str) -> str:
    """The one action that a task name means; a group of several is refused with their names."""
    found = action_names(project, [name])
    if len(found) > 1:
        raise UserError(f"{name} is a group", f"name one of: {', '.join(found)}")
    return found[0]
