"""The commands of `doit` about kernel configurations: config, which edits one, and configdiff."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.action import Action, Upstream
from pipeline.configdiff import Side, differences, lines, prompts_of
from pipeline.contract import (
    ROLES,
    Config,
    ContractInputError,
    Request,
    merge_requests,
    parse_config,
    parse_fragment,
)
from pipeline.errors import UserError
from pipeline.executor import Executor
from pipeline.face import JSON_OPTION, Face, options_first, session, typed
from pipeline.files import remove_tree
from pipeline.inputs import TREE
from pipeline.kernel import kernel_name
from pipeline.project import Project

#: What the kernel's menus look at to draw themselves.
TERMINAL = ("TERM", "MENUCONFIG_COLOR", "MENUCONFIG_MODE", "NCONFIG_MODE")


def kernel_of(project: Project, name: str) -> tuple[str, str, Action]:
    """Platform, role and the action of the kernel that `PLATFORM:ROLE` means."""
    platform, _, role = name.partition(":")
    project.recipes.platform(platform)
    if role not in ROLES:
        raise UserError(
            f"{name} says not which kernel", f"write one of: {', '.join(f'{platform}:{r}' for r in ROLES)}"
        )
    return platform, role, project.graph[kernel_name(platform, role)]


class ConfigCommand(Face):
    """`doit config`."""

    name = "config"
    doc_purpose = (
        "edit a kernel's configuration in the kernel's own menu; the difference goes into its fragment"
    )
    doc_usage = "PLATFORM:ROLE [--with MENU] [--from FILE] [--set CONFIG_X=VALUE]..."
    cmd_options = (
        {
            "name": "set",
            "short": "",
            "long": "set",
            "type": list,
            "default": [],
            "help": "ask for this, without a menu (may be repeated)",
        },
        {
            "name": "with",
            "short": "",
            "long": "with",
            "type": str,
            "default": "menuconfig",
            "help": "the menu: menuconfig or nconfig",
        },
        {
            "name": "from",
            "short": "",
            "long": "from",
            "type": str,
            "default": "",
            "help": "begin with this configuration, such as one that was refused",
        },
    )

    def parse_execute(self, in_args: list[str]) -> int:
        """Options may follow the kernel, and a setting has a `=`."""
        return super().parse_execute(options_first(typed(self.name, in_args)))

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Edit, and say what changed."""
        from pipeline import kernelconfig  # most commands do without

        if params["with"] not in kernelconfig.MENUS:
            raise UserError(f"there is no menu {params['with']}", f"one of: {', '.join(kernelconfig.MENUS)}")
        if params["set"] and params["from"]:
            raise UserError("--set and --from exclude each other", f"doit config {self.doc_usage}")
        current = session()
        project = current.project
        platform, role, kernel = kernel_of(project, self.one(args, "PLATFORM:ROLE"))
        name = f"{platform}:{role}"
        own = kernelconfig.own_fragment(platform, kernel)
        settings = kernelconfig.settings_of(params["set"])
        terminal = None
        start = None
        if not settings:
            if not (sys.stdin.isatty() and sys.stdout.isatty()):
                raise UserError(
                    "the menu needs a terminal", f"doit config:{name} --set CONFIG_X=y needs none"
                )
            terminal = {v: os.environ[v] for v in TERMINAL if v in os.environ}
            start = _started(params["from"]) if params["from"] else None
        menus = kernelconfig.menus(project.root, kernel)
        menu = Upstream(menus.name, kernelconfig.MENUS[params["with"]]) if terminal is not None else None
        action = kernelconfig.editing(project.root, kernel, settings=settings, menu=menu, start=start)
        graph = kernelconfig.graph_with(project.graph, action, *([menus] if menu else []))
        log = project.root / "artifacts" / "log"
        executor = Executor(graph, project.store, current.executor.engine, current.display, log)

        def keep(left: Path) -> Path | None:
            found = [left / name for name in ("config", "fragment") if (left / name).is_file()]
            kept = log / f"{action.name}.edited"
            if not found:
                return None
            remove_tree(kept) if kept.exists() else None
            kept.mkdir(parents=True)
            for file in found:
                shutil.copy(file, kept)
            return kept.relative_to(project.root)

        path = project.root / "kernel-configs" / own
        try:
            executor.clean_up_after_crashes()
            edited = kernelconfig.edit(action, executor, terminal, keep)
            before = kernel.files[f"kernel-configs/{own}"].content
            if edited.fragment == before:
                print(f"kernel-configs/{own} stays as it is: it asks for all of this")
                return
            kernelconfig.write(path, before, edited, keep)
        finally:
            current.close()
        others = [
            other.name
            for other in project.graph
            if other.kind == "kernel"
            and other.name != kernel.name
            and own in kernelconfig.fragments_of(other)
        ]
        for line in kernelconfig.told(own, kernel.name, edited, others):
            print(line)


def _started(name: str) -> bytes:
    try:
        content = Path(name).read_bytes()
        parse_config(content.decode(), name)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--from {name} cannot be read: {error}", "name a .config") from None
    except ContractInputError as error:
        raise UserError(*str(error).split("\n", 1)) from None
    return content


class ConfigDiff(Face):
    """`doit configdiff`."""

    name = "configdiff"
    doc_purpose = "tell in words what differs between two kernel configurations"
    doc_usage = "A B [--json]"
    doc_takes = ("PLATFORM:ROLE|PLATFORM|FILE",) * 2
    cmd_options = (JSON_OPTION,)

    def parse_execute(self, in_args: list[str]) -> int:
        """Options may follow the names."""
        return super().parse_execute(options_first(in_args))

    def perform(self, params: dict[str, Any], args: list[str]) -> None:
        """Print the differences, role by role where both have several."""
        if len(args) != 2:
            raise UserError("doit configdiff takes two configurations", f"doit configdiff {self.doc_usage}")
        project = session().project
        try:
            first, second = (sides_of(project, name) for name in args)
        finally:
            project.store.close()
        pairs = paired(first, second)
        found = [(a, b, differences(a, b, _prompts(project, args, a.config.arch))) for a, b in pairs]
        if params["as_json"]:
            rows = [
                {
                    "a": a.name,
                    "b": b.name,
                    "kernels": [a.version, b.version],
                    "differences": [d.to_json() for d in each],
                }
                for a, b, each in found
            ]
            print(json.dumps(rows, indent=1))
            return
        for number, (a, b, each) in enumerate(found):
            print(*([""] if number else []), *lines(a, b, each), sep="\n")


def sides_of(project: Project, name: str) -> dict[str, Side]:
    """Configurations by role that a word of the user's means; the role of a file is not known: "".

    A word is PLATFORM, PLATFORM:ROLE, the directory of a release (or of a platform's artifacts), also with :ROLE, or a
    file.
    """
    word, _, role = name.rpartition(":") if name.endswith(tuple(f":{r}" for r in ROLES)) else (name, "", "")
    roles = (role,) if role else ROLES
    if word in project.recipes.platforms:
        return {r: _built(project, word, r) for r in roles}
    path = Path(word)
    if path.is_dir():
        layouts = ("kernels/{}.config", "kernel/{}/config", "release/kernels/{}.config")
        files = {
            r: next((path / each.format(r) for each in layouts if (path / each.format(r)).is_file()), None)
            for r in roles
        }
        found = {r: Side(f"{word}:{r}", _read(file)) for r, file in files.items() if file is not None}
        if not found:
            raise UserError(
                f"{name} has no kernel configuration", "give the directory of a release, or a .config"
            )
        return found
    if path.is_file() and not role:
        return {"": Side(name, _read(path))}
    raise UserError(
        f"{name} is neither a platform nor a file",
        f"a platform ({', '.join(project.recipes.platforms)}), PLATFORM:ROLE, a release's directory or a .config",
    )


def paired(first: Mapping[str, Side], second: Mapping[str, Side]) -> list[tuple[Side, Side]]:
    """Which is compared with which: role by role where both have several, else the only one with its like."""
    if len(first) > 1 or len(second) > 1:
        common = [role for role in first if role in second]
        if not common:
            several = next(iter((first if len(first) > 1 else second).values())).name.rpartition(":")[0]
            raise UserError(
                f"{several} has several kernels", f"write {' or '.join(f'{several}:{r}' for r in ROLES)}"
            )
        return [(first[role], second[role]) for role in common]
    return [(next(iter(first.values())), next(iter(second.values())))]


def _built(project: Project, platform: str, role: str) -> Side:
    """The final configuration of a kernel that was built from the recipes as they are now."""
    kernel = project.graph[kernel_name(platform, role)]
    key = project.graph.keys[kernel.name]
    result = project.store.lookup(key)
    if result is not None and project.store.has(result.outputs["config"][0].digest):
        file = project.store.path(result.outputs["config"][0].digest)
    elif project.artifacts.current(kernel, key):
        file = project.artifacts.directory(kernel) / "config"
    else:
        raise UserError(f"{kernel.name} is not built as its recipes are now", f"doit {kernel.name}")
    name = f"{platform}:{role}"
    return Side(name, _read(file), requests_of(kernel))


def requests_of(kernel: Action) -> tuple[Request, ...]:
    """What the fragments of a kernel ask for: of two lines about one symbol the later."""
    files = [kernel.files[f"kernel-configs/{path}"] for path in kernel.environment["FRAGMENTS"].split()]
    return merge_requests(
        parse_fragment(file.content.decode(), file.origin.removeprefix("kernel-configs/")) for file in files
    )


def _read(path: Path) -> Config:
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
        return parse_config(text, f"{path}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", "name a .config") from None
    except ContractInputError as error:
        raise UserError(*str(error).split("\n", 1)) from None


def _prompts(project: Project, args: list[str], arch: str) -> dict[str, str]:
    """What menus call symbols, where a tree that the kernels are built from is unpacked in the cache."""
    platforms = [name for word in args if (name := word.partition(":")[0]) in project.recipes.platforms]
    for platform in platforms or project.recipes.platforms:
        source = project.graph[kernel_name(platform, "host")].inputs["source"]
        result = project.store.lookup(project.graph.keys[source.action])
        if result is not None:
            tree = project.store.root / "trees" / result.outputs[TREE][0].digest / "tree"
            return prompts_of(tree, arch if (tree / "arch" / arch).is_dir() else "x86")
    return {}
