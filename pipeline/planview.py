"""A host's CPU plan drawn as text: in colour on a terminal, plain elsewhere.

Each CPU has a mark: `H` for housekeeping, a guest's letter and the vCPU's number, `.` for an idle CPU of a guest's
core, `-` for isolated and free.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pipeline.cpuplan import HUGEPAGES, HostPlan, Placement
from pipeline.recipefile import place_of
from pipeline.topology import Node, cpulist

if TYPE_CHECKING:
    from rich.text import Text

#: A piece of a drawn line: its text, and a key of `STYLES` or `guest0`, `guest1`, ...
Piece = tuple[str, str]
Line = list[Piece]
#: Columns where there is no terminal to ask.
PLAIN_WIDTH = 100
#: Cores in a row of a node's box, at most.
ROW = 8
STYLES = {
    "": "",
    "title": "bold",
    "frame": "dim",
    "housekeeping": "yellow",
    "idle": "dim",
    "warning": "bold red",
}
GUEST_STYLES = ("cyan", "magenta", "green", "blue", "bright_red", "bright_cyan")
_ASCII = str.maketrans("┌┐└┘─│", "++++-|")


def letters(plan: HostPlan) -> dict[str, str]:
    """The guests' letters, by name; `H` is taken."""
    free = (letter for letter in string.ascii_uppercase if letter != "H")
    pairs = ("".join(pair) for pair in itertools.product(string.ascii_uppercase, repeat=2))
    return dict(zip(plan.guests, itertools.chain(free, pairs), strict=False))


def marks(plan: HostPlan) -> dict[int, Piece]:
    """Each CPU's mark and its style."""
    found: dict[int, Piece] = dict.fromkeys(plan.isolated, ("-", "idle"))
    found |= dict.fromkeys(plan.housekeeping, ("H", "housekeeping"))
    for index, (name, letter) in enumerate(letters(plan).items()):
        for vcpu, cpu in enumerate(plan.guests[name].pins):
            found |= {
                beside: (".", "idle") for beside in plan.topology.siblings[cpu] if found[beside][0] == "-"
            }
            found[cpu] = (f"{letter}{vcpu}", f"guest{index}")
    return found


def _marked(plan: HostPlan, mark: str) -> str:
    """The CPUs with a mark, as a list."""
    return cpulist(cpu for cpu, (found, _) in marks(plan).items() if found == mark)


# Text -----------------------------------------------------------------------------------------------


def draw(
    plan: HostPlan,
    title: str,
    command_line: Sequence[str] = (),
    notes: Sequence[str] = (),
    width: int = PLAIN_WIDTH,
) -> list[Line]:
    """The plan as lines at most `width` columns wide, where the boxes of its nodes can be that narrow.

    `command_line` are the parameters of the host's kernel, `notes` are shown last, a line each.
    """
    lines: list[Line] = [[(title, "title")], []]
    lines += _sockets(plan, width)
    lines += [[], *_legend(plan)]
    for index, (name, letter) in enumerate(letters(plan).items()):
        lines += [[], *_guest(plan.guests[name], letter, f"guest{index}")]
    if pages := plan.hugepages():
        counts = [f"{count} of {_page(size)} on node {node}" for (node, size), count in pages.items()]
        lines += [[], [("huge pages", "title"), (f"  {', '.join(counts)}", "")]]
    if command_line:
        lines += [[], [("host command line", "title")]]
        lines += [[(line, "")] for line in _filled(command_line, width)]
    if notes:
        lines += [[], *([(note, "warning")] for note in notes)]
    return lines


def text(lines: Sequence[Line], *, ascii_only: bool = False) -> str:
    """Drawn lines without colour."""
    plain = "".join("".join(piece for piece, _ in line).rstrip() + "\n" for line in lines)
    return plain.translate(_ASCII) if ascii_only else plain


def coloured(lines: Sequence[Line]) -> Text:
    """Drawn lines for a terminal."""
    from rich.text import Text

    whole = Text()
    for line in lines:
        for piece, style in line:
            index = style.removeprefix("guest")
            named = GUEST_STYLES[int(index) % len(GUEST_STYLES)] if index.isdecimal() else STYLES[style]
            whole.append(piece, named)
        whole.append("\n")
    return whole


def show(
    plan: HostPlan, title: str, stream: TextIO, command_line: Sequence[str] = (), notes: Sequence[str] = ()
) -> None:
    """Draw onto a stream: in colour and as wide as it is on a terminal, plain elsewhere."""
    ascii_only = "utf" not in (stream.encoding or "").lower()
    if not stream.isatty():
        stream.write(text(draw(plan, title, command_line, notes), ascii_only=ascii_only))
        return
    from rich.console import Console

    console = Console(file=stream)
    drawn = draw(plan, title, command_line, notes, console.width)
    if ascii_only:
        drawn = [[(piece.translate(_ASCII), style) for piece, style in line] for line in drawn]
    console.print(coloured(drawn), end="", soft_wrap=True, highlight=False)


def warnings(root: Path, plan: HostPlan) -> list[str]:
    """What the plan would be better without, a line each: the recipe's line, what is wrong, what to do.

    `root` is the checkout.
    """
    lines = []
    for each in plan.warnings:
        place = place_of(root / "recipes" / "guests" / f"{each.subject}.toml", root, *each.keys)
        lines.append(f"{place}: {each.advice}: {each.message}; {each.hint}")
    return lines


def _sockets(plan: HostPlan, width: int) -> list[Line]:
    """The sockets, as many side by side as there is room for."""
    gap = 2
    count = len(plan.topology.sockets)
    columns = next(
        (n for n in range(min(count, 4), 0, -1) if (width - gap * (n - 1)) // n >= _least(plan)), 1
    )
    each = max((width - gap * (columns - 1)) // columns, _least(plan))
    blocks = [_socket(plan, index, each) for index in range(count)]
    lines: list[Line] = []
    for start in range(0, count, columns):
        beside = blocks[start : start + columns]
        wide = max(_length(line) for block in blocks for line in block)
        lines += [[]] if lines else []
        for row in itertools.zip_longest(*beside, fillvalue=[]):
            line: Line = []
            for cell in row:
                line += [*cell, (" " * (wide - _length(cell) + gap), "")]
            lines.append(line)
    for node in plan.topology.nodes:
        if not node.cpus:
            lines += [[], [(f"node {node.id}: {node.memory_mib} MiB, no CPUs", "")]]
    return lines


def _least(plan: HostPlan) -> int:
    """Columns that a socket's box needs at the very least: two cores side by side."""
    widest = max(
        _length(cell) for socket in range(len(plan.topology.sockets)) for cell in _cells(plan, socket)
    )
    return 2 * widest + 6


def _socket(plan: HostPlan, index: int, width: int) -> list[Line]:
    """One socket: its number, and a box for each of its nodes."""
    lines: list[Line] = [[(f"socket {index}", "title")]]
    cells = max(map(_length, _cells(plan, index)))
    per_row = max(min((width - 2) // (cells + 2), ROW), 1)
    nodes = nodes_of(plan, index)
    rows_of = {
        node.id: [
            row
            for part in by_cache(plan, cpus)
            for row in _rows([_cell(plan, core) for core in part], per_row)
        ]
        for node, cpus in nodes
    }
    titles = [f" node {node.id}: {node.memory_mib} MiB " for node, _ in nodes]
    inner = max(
        [_length(row) + 2 for rows in rows_of.values() for row in rows] + [len(t) + 1 for t in titles]
    )
    for (node, _), title in zip(nodes, titles, strict=True):
        lines.append([("┌", "frame"), (title, ""), ("─" * (inner - len(title)) + "┐", "frame")])
        for row in rows_of[node.id]:
            lines.append([("│ ", "frame"), *row, (" " * (inner - 1 - _length(row)), ""), ("│", "frame")])
        lines.append([("└" + "─" * inner + "┘", "frame")])
    return lines


def nodes_of(plan: HostPlan, socket: int) -> list[tuple[Node, list[int]]]:
    """The nodes that have CPUs of a socket, and these."""
    topology = plan.topology
    found = []
    for node in topology.nodes:
        if cpus := [cpu for cpu in topology.socket_cpus[socket] if topology.node_of[cpu] == node.id]:
            found.append((node, cpus))
    return found


def by_cache(plan: HostPlan, cpus: Sequence[int]) -> list[list[tuple[int, ...]]]:
    """The cores of some CPUs, ascending, those apart that share no last-level cache."""
    topology = plan.topology
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for core in dict.fromkeys(topology.siblings[cpu] for cpu in cpus):
        found.setdefault(topology.cache_of[core[0]], []).append(core)
    return list(found.values())


def _cells(plan: HostPlan, socket: int) -> list[Line]:
    cores = dict.fromkeys(plan.topology.siblings[cpu] for cpu in plan.topology.socket_cpus[socket])
    return [_cell(plan, core) for core in cores]


def _cell(plan: HostPlan, core: tuple[int, ...]) -> Line:
    """A core: each CPU's number and mark, in brackets where there are several."""
    every = marks(plan)
    number = len(str(plan.topology.cpus[-1]))
    mark = max(len(piece) for piece, _ in every.values())
    cell: Line = []
    for cpu in core:
        piece, style = every[cpu]
        cell += [(" ", "")] if cell else []
        cell.append((f"{cpu:>{number}} {piece:<{mark}}", style))
    if plan.topology.smt:
        return [("[", "frame"), *cell, ("]", "frame")] if len(core) > 1 else [(" ", ""), *cell, (" ", "")]
    return cell


def _rows(cells: Sequence[Line], most: int) -> Iterator[Line]:
    """Rows of about the same length, of so many cells at most."""
    count = -(-len(cells) // most)
    per_row = -(-len(cells) // count)
    for start in range(0, len(cells), per_row):
        row: Line = []
        for cell in cells[start : start + per_row]:
            row += [("  ", "")] * bool(row) + cell
        yield row


def _legend(plan: HostPlan) -> list[Line]:
    lines: list[Line] = [
        [("H", "housekeeping"), (f"  housekeeping  {cpulist(plan.housekeeping)}", "")],
        [
            ("-", "idle"),
            (f"  isolated      {cpulist(plan.isolated)}, free {_marked(plan, '-') or 'none'}", ""),
        ],
    ]
    if beside := _marked(plan, "."):
        lines.append([(".", "idle"), (f"  kept idle     {beside}: a guest has the core", "")])
    return lines


def _guest(guest: Placement, letter: str, style: str) -> list[Line]:
    """A guest: its vCPUs, its other threads, its memory."""
    quiet, busy = guest.split.housekeeping, guest.split.isolated
    rows = [
        (f"vCPU {cpulist(quiet)}", f"CPU {_ordered(guest, quiet)}", "its housekeeping"),
        (f"vCPU {cpulist(busy)}", f"CPU {_ordered(guest, busy)}", f"real-time, SCHED_FIFO {guest.priority}"),
        ("emulator and I/O", f"CPU {cpulist(guest.emulator)}", "all its other threads"),
        ("memory", f"node {guest.node}", f"{guest.memory_mib} MiB{pages_of(guest)}"),
    ]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines: list[Line] = [[(letter, style), (f"  {guest.name}", "title")]]
    return lines + [[(f"   {a:<{first}}  {b:<{second}}  {c}", "")] for a, b, c in rows]


def _ordered(guest: Placement, vcpus: Sequence[int]) -> str:
    """The CPUs of vCPUs, in the order of these; as a list where they ascend."""
    cpus = [guest.pins[vcpu] for vcpu in vcpus]
    return cpulist(cpus) if cpus == sorted(cpus) else ",".join(map(str, cpus))


def pages_of(guest: Placement) -> str:
    """How a guest's memory is made up, to follow its size."""
    if not guest.hugepages:
        return ", no huge pages"
    return f" in {guest.hugepages} huge page{'s' * (guest.hugepages > 1)} of {_page(guest.hugepage_kib)}"


def _page(kib: int) -> str:
    """The name that recipes have for a size of huge pages."""
    return next(name for name, size in HUGEPAGES.items() if size == kib)


def _length(line: Line) -> int:
    return sum(len(piece) for piece, _ in line)


def _filled(words: Sequence[str], width: int) -> list[str]:
    """Words in lines that are not wider than they must be; a word is never broken."""
    lines = [" "]
    for word in words:
        if len(lines[-1]) + 1 + len(word) > width and lines[-1].strip():
            lines.append(" ")
        lines[-1] += f" {word}"
    return lines
