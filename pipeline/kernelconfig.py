"""A kernel's configuration, edited in the container in which the kernel is built, and written back as a fragment.

What is edited comes from the action that builds the kernel: its tree, its fragments, its contract, its builder.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.action import Action, File, Output, Upstream
from pipeline.contract import ContractInputError, parse_fragment
from pipeline.errors import InternalError, UserError
from pipeline.executor import Executor
from pipeline.files import write_atomically
from pipeline.fragment import line_of
from pipeline.graph import Graph
from pipeline.inputs import builder_name

MENU_BUILDER = "kernel-config"
#: The kernel's own menus, by the name under which its make knows them.
MENUS = {"menuconfig": "mconf", "nconfig": "nconf"}
STEP = "recipes/steps/kernel-config.sh"
HELPERS = (
    "pipeline/configedit.py",
    "pipeline/contract.py",
    "pipeline/fragment.py",
    "recipes/steps/kconfig-trial.c",
    "recipes/steps/kconfig-why.c",
)

#: From and to of a symbol.
Change = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Edit:
    """What editing came to: the fragment's new text, and the symbols that change, by who asks for them.

    `left` is the directory that the step left: `config` and `fragment`.
    """

    left: Path
    fragment: bytes
    asked: tuple[Change, ...]
    implied: tuple[Change, ...]


def settings_of(words: Sequence[str]) -> str:
    """The fragment that settings, each `CONFIG_X=value`, ask for; a UserError names one that is none."""
    try:
        requests = [request for word in words for request in parse_fragment(word, "--set")]
    except ContractInputError as error:
        raise UserError(*str(error).split("\n", 1)) from None
    if len(requests) != len(words):
        raise UserError("--set asks for nothing", "--set CONFIG_X=y; or =m, =n, a number, or a '\"text\"'")
    return "".join(f"{line_of(r.symbol, r.value)}\n" for r in requests)


def fragments_of(kernel: Action) -> list[str]:
    """The fragments of a kernel in order, relative to kernel-configs/."""
    return kernel.environment["FRAGMENTS"].split()


def own_fragment(platform: str, kernel: Action) -> str:
    """The fragment that is edited: the last, which must be the platform's own, or others would change with it."""
    *_, last = fragments_of(kernel)
    if last.partition("/")[0] != platform:
        role = kernel.environment["ROLE"]
        raise UserError(
            f"the last fragment of {kernel.name} is {last}, which is not its own",
            f"write kernel-configs/{platform}/{role}-config and put it last in recipes/platforms/{platform}.toml",
        )
    return last


def menus(root: Path, kernel: Action) -> Action:
    """The kernel's menus, built from the tree that `kernel` is built from."""
    step = "recipes/steps/kernel-menu.sh"
    return Action(
        name=f"menus:{kernel.name.partition(':')[2]}",
        kind="kernel-menus",
        version=1,
        arch=kernel.arch,
        summary="the menus in which the configuration is edited",
        builder=builder_name(MENU_BUILDER),
        script=File.read(root / step, step),
        inputs={"source": kernel.inputs["source"]},
        outputs=tuple(Output(program) for program in MENUS.values()),
    )


def editing(
    root: Path,
    kernel: Action,
    *,
    settings: str = "",
    menu: Upstream | None = None,
    start: bytes | None = None,
) -> Action:
    """The step that edits a kernel's configuration: by `settings`, or in a `menu` that begins with `start`."""
    files = {path: file for path, file in kernel.files.items() if path.startswith("kernel-configs/")}
    files |= {Path(path).name: File.read(root / path, path) for path in HELPERS}
    if settings:
        files["settings"] = File(settings.encode())
    if start is not None:
        files["start"] = File(start)
    return replace(
        kernel,
        name=f"config:{kernel.name.partition(':')[2]}",
        kind="kernel-config",
        version=1,
        summary=f"the configuration of {kernel.name}",
        script=File.read(root / STEP, STEP),
        files=files,
        inputs={"source": kernel.inputs["source"]} | ({"menu": menu} if menu is not None else {}),
        outputs=(Output("config"), Output("fragment"), Output("changes.json")),
        ccache=False,
        place=None,
    )


def edit(
    action: Action,
    executor: Executor,
    terminal: dict[str, str] | None,
    keep: Callable[[Path], Path | None],
) -> Edit:
    """Edit, on the user's terminal when there is one: `terminal` is what its programs must know of it.

    What was edited is handed to `keep` when it cannot be used, as a directory of `config` and perhaps `fragment`; it
    says where they are then.
    """
    stage = executor.stage_for_shell(action)
    container = executor.container(stage)
    container = replace(container, environment={**container.environment, **(terminal or {})})
    command = container.cli("/bin/bash", "-euo", "pipefail", "/build/step")
    if terminal is None:
        command.remove("-it")
    config = stage.out / "config"
    try:
        status = (
            subprocess.run(command, stdout=sys.stderr, check=False).returncode
            if terminal is None
            else (subprocess.run(command, check=False).returncode)
        )
    except BaseException:
        with contextlib.suppress(Exception):
            executor.engine.stop(executor.store.run)
        saved = stage.work / "obj" / ".config"
        if not config.is_file() and terminal is not None and saved.is_file():
            config.write_bytes(saved.read_bytes())
        keep(stage.out)
        raise
    if status:
        kept = keep(stage.out)
        where = f"your edits are kept in {kept}" if kept else "nothing was changed"
        if status == 2:
            raise UserError(f"{action.summary} is refused; nothing is written", where)
        raise InternalError(f"{action.name} ended with {status}", where)
    changes = json.loads((stage.out / "changes.json").read_text())
    asked, implied = (tuple((s, a, b) for s, a, b in changes[kind]) for kind in ("asked", "implied"))
    return Edit(stage.out, (stage.out / "fragment").read_bytes(), asked, implied)


def write(path: Path, read: bytes, edited: Edit, keep: Callable[[Path], Path | None]) -> None:
    """Write an edited fragment, unless the file is no longer what was `read`."""
    if path.read_bytes() != read:
        kept = keep(edited.left)
        raise UserError(f"{path} was changed meanwhile; nothing is written", f"your edits are kept in {kept}")
    write_atomically(path, edited.fragment)


def told(own: str, kernel: str, edited: Edit, others: Sequence[str]) -> Iterator[str]:
    """What an edit came to, a line each; `others` are kernels whose configuration changes with it."""
    yield f"wrote kernel-configs/{own}"
    for symbol, before, after in edited.asked:
        yield f"  CONFIG_{symbol}: {before} -> {after}"
    if edited.implied:
        yield f"follow from these: {len(edited.implied)}"
    for symbol, before, after in edited.implied:
        yield f"  CONFIG_{symbol}: {before} -> {after}"
    if others:
        yield f"note: it is a fragment of {', '.join(others)}, too"
    yield f"to build it: doit {kernel}"


def graph_with(known: Graph, *extra: Action) -> Graph:
    """What actions beside a graph need of it, and these actions."""
    made = {action.name for action in extra}
    needed = [upstream for action in extra for upstream in action.upstreams if upstream not in made]
    return Graph([*(known[name] for name in known.closure(needed)), *extra])
