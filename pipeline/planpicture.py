"""A host's CPU plan as an SVG picture: one file that needs no other, the same each time."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

from pipeline.cpuplan import HostPlan
from pipeline.planview import by_cache, letters, marks, nodes_of, pages_of
from pipeline.topology import cpulist

#: Cores in a row of a node's box, at most.
PER_ROW = 8
#: Sizes in pixels: a CPU's square, the space around things, the height of a line of text.
_CPU, _PAD, _TEXT = 38, 10, 18
#: Colours by class: on a light page, on a dark one. Variables would be shorter, but not every viewer knows them.
_COLOURS = {
    "page": ("fill: #ffffff", "fill: #15171b"),
    "text": ("fill: #1d1f23", "fill: #eceef1"),
    "faint": ("fill: #5c616a", "fill: #a9afb9"),
    "node": ("fill: #f4f5f7; stroke: #9aa0a9", "fill: #1f2228; stroke: #666c76"),
    "core": ("fill: none; stroke: #9aa0a9", "fill: none; stroke: #666c76"),
    "idle": ("fill: #ffffff; stroke: #9aa0a9", "fill: #15171b; stroke: #666c76"),
    "housekeeping": ("fill: #f3d9a0", "fill: #6d5413"),
    "guest0": ("fill: #a8d2f3", "fill: #17517c"),
    "guest1": ("fill: #c6e6b3", "fill: #315e20"),
    "guest2": ("fill: #e2c6ef", "fill: #5f3474"),
    "guest3": ("fill: #f6bcc6", "fill: #7b2d3f"),
    "guest4": ("fill: #b5e2dc", "fill: #1e605a"),
    "guest5": ("fill: #dcdca6", "fill: #5c5c1f"),
    "realtime": ("stroke: #1d1f23", "stroke: #eceef1"),
}
_SHAPES = """\
text { font-family: system-ui, "DejaVu Sans", sans-serif; font-size: 12px; }
.title { font-size: 15px; font-weight: bold; }
.socket { font-weight: bold; }
.cpu { text-anchor: middle; }
.mark { text-anchor: middle; font-size: 11px; font-weight: bold; }
.idle { stroke-dasharray: 3 2; }
.realtime { stroke-width: 2; }
"""


def _css() -> str:
    """The picture's style sheet."""

    def rules(scheme: int) -> str:
        return "".join(
            f"{'' if name == 'text' else '.'}{name} {{ {colours[scheme]}; }}\n"
            for name, colours in _COLOURS.items()
        )

    return f"{_SHAPES}{rules(0)}@media (prefers-color-scheme: dark) {{\n{rules(1)}}}\n"


def svg(plan: HostPlan, title: str) -> str:
    """The plan as a picture: one file that needs no other, readable on light and dark pages, the same each time."""
    shapes: list[str] = []
    y = _PAD + _TEXT + _PAD
    right = 0
    per_row = min(len(plan.topology.sockets), 2)
    for start in range(0, len(plan.topology.sockets), per_row):
        x, below = _PAD, y
        for socket in range(start, min(start + per_row, len(plan.topology.sockets))):
            wide, high = _svg_socket(shapes, plan, socket, x, y)
            x += wide + 2 * _PAD
            below = max(below, y + high)
        right, y = max(right, x), below + _PAD
    y += _PAD
    for kind, words in _svg_legend(plan):
        shapes.append(f'<rect class="{kind}" x="{_PAD}" y="{y}" width="18" height="14" rx="3"/>')
        shapes.append(_label(_PAD + 26, y + 12, words))
        right = max(right, _PAD + 26 + 7 * len(words))
        y += _TEXT + 2
    right = max(right, _PAD + 9 * len(title))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + _PAD} {y + _PAD}" '
            f'width="{right + _PAD}" height="{y + _PAD}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_css()}</style>",
            f'<rect class="page" width="{right + _PAD}" height="{y + _PAD}"/>',
            _label(_PAD, _PAD + 14, title, "title"),
            *shapes,
            "</svg>\n",
        ]
    )


def _svg_socket(shapes: list[str], plan: HostPlan, socket: int, x: int, y: int) -> tuple[int, int]:
    """Draw a socket at a place; its width and height."""
    shapes.append(_label(x, y + 13, f"socket {socket}", "socket"))
    threads = max(len(core) for core in plan.topology.siblings.values())
    core_high = threads * (_CPU + 2) + 4
    top, widest = y + _TEXT + 4, 0
    boxes = []
    for node, cpus in nodes_of(plan, socket):
        rows = [
            part[start : start + PER_ROW]
            for part in by_cache(plan, cpus)
            for start in range(0, len(part), PER_ROW)
        ]
        boxes.append((node, rows))
        label = 7 * len(f"node {node.id}: {node.memory_mib} MiB")
        widest = max(widest, label, *(len(row) * (_CPU + 10) - 4 for row in rows))
    wide = widest + 2 * _PAD
    for node, rows in boxes:
        high = _TEXT + 2 + len(rows) * (core_high + 6) + _PAD
        shapes.append(f'<rect class="node" x="{x}" y="{top}" width="{wide}" height="{high}" rx="6"/>')
        shapes.append(_label(x + _PAD, top + 15, f"node {node.id}: {node.memory_mib} MiB", "faint"))
        for number, row in enumerate(rows):
            at = top + _TEXT + 4 + number * (core_high + 6)
            for place, core in enumerate(row):
                _svg_core(shapes, plan, core, x + _PAD + place * (_CPU + 10), at)
        top += high + 6
    return wide, top - y


def _svg_core(shapes: list[str], plan: HostPlan, core: tuple[int, ...], x: int, y: int) -> None:
    every = marks(plan)
    if len(core) > 1:
        high = len(core) * (_CPU + 2) + 2
        shapes.append(f'<rect class="core" x="{x}" y="{y}" width="{_CPU + 4}" height="{high}" rx="5"/>')
    for index, cpu in enumerate(core):
        mark, style = every[cpu]
        style = _class(style)
        at = y + 2 + index * (_CPU + 2)
        kind = f"{style} realtime" if _realtime(plan, cpu) else style
        shapes.append(f'<rect class="{kind}" x="{x + 2}" y="{at}" width="{_CPU}" height="{_CPU}" rx="4"/>')
        shapes.append(_label(x + 2 + _CPU // 2, at + 16, str(cpu), "cpu"))
        shapes.append(_label(x + 2 + _CPU // 2, at + 31, mark, "mark"))


def _class(style: str) -> str:
    """The picture's class of a style: there are six colours for guests."""
    index = style.removeprefix("guest")
    return f"guest{int(index) % 6}" if index.isdecimal() else style


def _realtime(plan: HostPlan, cpu: int) -> bool:
    """Whether a real-time vCPU runs there."""
    return any(
        cpu in guest.pins and guest.pins.index(cpu) in guest.split.isolated for guest in plan.guests.values()
    )


def _svg_legend(plan: HostPlan) -> Iterator[tuple[str, str]]:
    yield "housekeeping", f"H: housekeeping, {cpulist(plan.housekeeping)}"
    yield "idle", f"isolated: {cpulist(plan.isolated)}; dashed: free, or kept idle beside a vCPU (.)"
    for index, (name, letter) in enumerate(letters(plan).items()):
        guest = plan.guests[name]
        yield (
            _class(f"guest{index}"),
            (
                f"{letter}: {name}, vCPU 0-{len(guest.pins) - 1}; framed: real-time, FIFO {guest.priority}; "
                f"emulator on {cpulist(guest.emulator)}; {guest.memory_mib} MiB{pages_of(guest)} on node {guest.node}"
            ),
        )


def _label(x: int, y: int, words: str, kind: str = "") -> str:
    return f'<text{f" class={chr(34)}{kind}{chr(34)}" if kind else ""} x="{x}" y="{y}">{escape(words)}</text>'
