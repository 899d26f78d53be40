"""Which symbols of a kernel's configuration a machine's drivers need: from its modules, by a kernel tree's Makefiles.

Nothing is left out silently: each module of the machine gets a verdict.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline import kconfig
from pipeline.git import Mirror
from pipeline.inventory import Inventory

#: had       the configuration asks for it already
#: asked     a line for it is written
#: idle      it is loaded but drives nothing: not asked for
#: unmapped  no symbol is known to build it
#: refused   its symbol cannot be had with the rest
Verdict = Literal["had", "asked", "idle", "unmapped", "refused"]

_OBJECTS = re.compile(r"obj-\$\(CONFIG_(\w+)\)\s*[+:]?=\s*(.*)")
_MAKEFILES = ("*Makefile", "*Kbuild", "*Makefile.*", "*Kconfig*")


@dataclass(frozen=True, slots=True)
class KernelTree:
    """What a kernel's source says: its symbols, those that build each module, by the module's name, and the options of
    each symbol.
    """

    name: str
    options: Mapping[str, tuple[str, ...]]
    symbols: Mapping[str, kconfig.Symbol]
    builders: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Need:
    """A module of the machine: what it `drives`, its symbol if known, and what becomes of it.

    `lines` are values by symbol to write for it, those that its own symbol depends on first; `reason` says more.
    """

    module: str
    drives: tuple[str, ...]
    verdict: Verdict
    symbol: str = ""
    lines: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


def kernel_tree(mirror: Mirror, tree: str, name: str, arch: str) -> KernelTree:
    """Read a tree; `arch` is the kernel's name of the architecture, such as x86_64, `name` says which kernel it is."""
    texts = mirror.texts(tree, _MAKEFILES)
    makefiles = {path: text for path, text in texts.items() if "Kconfig" not in path.rpartition("/")[2]}
    # x86 is the directory of x86_64, arm64 that of arm64
    directories = {path.split("/")[1] for path in texts if path.startswith("arch/") and path.count("/") > 1}
    own = max((each for each in directories if arch.startswith(each)), key=len, default=arch)
    found: dict[str, list[str]] = {}
    for path, text in makefiles.items():
        if path.startswith(("tools/", "samples/")) or (
            path.startswith("arch/") and not path.startswith(f"arch/{own}/")
        ):
            continue
        for symbol, module in _modules(text):
            found.setdefault(module, []).append(symbol)
    symbols = kconfig.parse(texts, own)
    return KernelTree(
        name=name,
        options=kconfig.options(symbols),
        symbols=symbols,
        builders={module: tuple(dict.fromkeys(symbols)) for module, symbols in found.items()},
    )


def _modules(makefile: str) -> Iterator[tuple[str, str]]:
    """Symbols, and modules that are built with each."""
    for line in makefile.replace("\\\n", " ").splitlines():
        if found := _OBJECTS.match(line.strip()):
            for word in found[2].partition("#")[0].split():
                if word.endswith(".o"):
                    yield found[1], word.removesuffix(".o").rpartition("/")[2].replace("-", "_")


def needs(machine: Inventory, tree: KernelTree | None, known: Mapping[str, str]) -> tuple[Need, ...]:
    """Every module of a machine, and what becomes of it; `known` are values by symbol that are asked for already.

    Without a tree, a module's symbol is its name in capitals, if the machine's own kernel has that.
    """
    drives: dict[str, list[str]] = {}
    for device in machine.devices:
        if device.driver:
            drives.setdefault(device.module, []).append(f"{device.bus} {device.name}")
    solver = kconfig.Solver(tree.symbols if tree else {}, known)
    found = [_need(module, tuple(drives[module]), machine, tree, known, solver) for module in sorted(drives)]
    for module in machine.loaded:
        if module not in drives:
            found.append(_need(module, (), machine, tree, known, solver))
    return tuple(found)


def _need(
    module: str,
    drives: tuple[str, ...],
    machine: Inventory,
    tree: KernelTree | None,
    known: Mapping[str, str],
    solver: kconfig.Solver,
) -> Need:
    symbols = _symbols(module, machine, tree)
    if len(symbols) != 1:
        named = any(device.named for device in machine.devices if device.module == module) or not drives
        what = (
            "no symbol is known to build it" if named else "built into that kernel, as no module of its own"
        )
        if symbols:
            what = f"one of {', '.join(symbols)}"
        return Need(module, drives, "unmapped", reason=what)
    (symbol,) = symbols
    if known.get(symbol, "n") != "n":
        return Need(module, drives, "had", symbol)
    if not drives:
        return Need(module, drives, "idle", symbol)
    if tree is None:
        return Need(
            module, drives, "asked", symbol, {symbol: machine.config[symbol]}, "what it needs is not known"
        )
    try:
        lines = solver.ask(symbol)
    except kconfig.Unmet as unmet:
        return Need(module, drives, "refused", symbol, reason=str(unmet))
    if not lines:  # another driver's lines bring it
        return Need(module, drives, "had", symbol)
    chosen, without = _options(symbol, machine, tree, solver)
    reason = f"without {', '.join(without)}, which need more than it" if without else ""
    return Need(module, drives, "asked", symbol, lines | chosen, reason)


def _options(
    symbol: str, machine: Inventory, tree: KernelTree, solver: kconfig.Solver
) -> tuple[dict[str, str], list[str]]:
    """Options of a driver that the machine's kernel had, by value, and those of them that need more than the driver.

    A driver may be little without them: the core of a network card without its Ethernet.
    """
    chosen: dict[str, str] = {}
    without: list[str] = []
    pending = [symbol]
    while pending:
        for option in tree.options.get(pending.pop(), ()):
            if machine.config.get(option) != "y" or option in chosen or option in without:
                continue
            lines = solver.would_ask(option)
            if lines is not None and set(lines) <= {option}:
                chosen |= solver.ask(option)
                pending.append(option)
            else:
                without.append(option)
    return chosen, without


def _symbols(module: str, machine: Inventory, tree: KernelTree | None) -> Sequence[str]:
    """Symbols that may build a module: those of this architecture, of several those that the machine's kernel has."""
    if tree is None:
        name = module.upper()
        return [name] if name in machine.config else []
    here = [symbol for symbol in tree.builders.get(module, ()) if symbol in tree.symbols]
    on = [symbol for symbol in here if symbol in machine.config]
    return on if len(on) == 1 else here


def virtual_needs(machine: Inventory, tree: KernelTree | None, known: Mapping[str, str]) -> tuple[Need, ...]:
    """What a guest needs to use the virtual functions that the machine can have; as `needs`."""
    drives: dict[str, list[str]] = {}
    for address, modules in machine.virtual.items():
        for module in modules or ("",):
            drives.setdefault(module, []).append(f"virtual functions of {address}")
    solver = kconfig.Solver(tree.symbols if tree else {}, known)
    return tuple(
        _need(module, tuple(drives[module]), machine, tree, known, solver)
        if module
        else Need("", tuple(drives[module]), "unmapped", reason="the machine has no module for them")
        for module in sorted(drives)
    )
