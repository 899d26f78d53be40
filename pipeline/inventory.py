"""What a machine told of itself: a file of `scripts/record-machine`, read strictly.

The file is text. Its first line names the format, its last line is `end`. In between are sections: `F PATH`, then the
lines of that, each behind a tab. Paths that begin with `proc/` or `sys/` are files of the machine; the others are facts
that the script found out: `uname`, `config`, `lspci`, `devices`, `virtual-functions`.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.errors import UserError

FORMAT = "virt-rt-recording 1"
END = "end"
SCRIPT = "scripts/record-machine"
#: Facts, beside the machine's own files; all but the first two may be missing.
FACTS = ("uname", "devices", "config", "lspci", "virtual-functions")
_HINT = f"record the machine again: {SCRIPT}"
_SYMBOL = re.compile(r"CONFIG_(\w+)=([ym])")


@dataclass(frozen=True, slots=True)
class Device:
    """A device with a driver, or one that none drives; `known` are modules of that machine that would take it.

    `module` is the driver's; where the machine names none (`named` is false), since the driver is built in, it is what
    the driver's own name would be as a module's.
    """

    bus: str
    name: str
    driver: str
    module: str
    alias: str
    known: tuple[str, ...]
    named: bool


@dataclass(frozen=True, slots=True)
class Inventory:
    """A machine: its kernel's name of the architecture and release, that kernel's symbols that are y or m, its loaded
    modules, its devices, and for each physical function the modules of its virtual ones.
    """

    arch: str
    release: str
    config: Mapping[str, str]
    loaded: tuple[str, ...]
    devices: tuple[Device, ...]
    virtual: Mapping[str, tuple[str, ...]]
    files: Mapping[str, str]

    def lay_out(self, directory: Path) -> None:
        """Write the machine's files below a directory, as `pipeline.machine` reads them."""
        for name, text in self.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def record(root: Path) -> str:
    """What the script of the checkout `root` says of this machine."""
    done = subprocess.run(["sh", str(root / SCRIPT)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"{SCRIPT} ended with {done.returncode}: {said}", f"run it: sh {SCRIPT}")
    return done.stdout


def load(path: Path) -> str:
    """The text of a recording that was made elsewhere."""
    try:
        return path.read_text()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", _HINT) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a recording of a machine: it is no text", _HINT) from None


def parse(text: str, name: str) -> Inventory:
    """Read a recording; `name` is what errors call it."""
    lines = text.splitlines()
    if not lines or lines[0] != FORMAT:
        raise UserError(f"{name} is not a recording of a machine: its first line is not {FORMAT}", _HINT)
    if lines[-1] != END:
        raise UserError(f"{name} is cut off: its last line is not {END}", _HINT)
    sections: dict[str, list[str]] = {}
    here: list[str] | None = None
    for number, line in enumerate(lines[1:-1], 2):
        if line.startswith("\t") and here is not None:
            here.append(line[1:])
            continue
        kind, _, path = line.partition(" ")
        if kind != "F" or not _is_ours(path) or path in sections:
            raise UserError(f"{name}:{number}: expected a section or a line of one", _HINT)
        here = sections[path] = []
    if lacking := [fact for fact in FACTS[:2] if fact not in sections]:
        raise UserError(f"{name} has no section {lacking[0]}", _HINT)
    uname = [*sections["uname"], "", ""]
    modules = [line.split()[0] for line in sections.get("proc/modules", []) if line.split()]
    return Inventory(
        arch=uname[0],
        release=uname[1],
        config={
            found[1]: found[2] for line in sections.get("config", []) if (found := _SYMBOL.fullmatch(line))
        },
        loaded=tuple(sorted(modules)),
        devices=tuple(_device(line, name) for line in sections["devices"]),
        virtual={
            cells[0]: _names(cells[1])
            for line in sections.get("virtual-functions", [])
            if len(cells := line.split("\t")) == 2
        },
        files={
            path: "".join(f"{line}\n" for line in section)
            for path, section in sections.items()
            if path.startswith(("proc/", "sys/")) or path == "lspci"
        },
    )


def _is_ours(path: str) -> bool:
    """Whether a section may be called so: a fact, or a file that stays below the directory it is laid out in."""
    parts = PurePosixPath(path).parts
    return path in FACTS or (parts[:1] in (("proc",), ("sys",)) and len(parts) > 1 and ".." not in parts)


def _device(line: str, name: str) -> Device:
    cells = ["" if cell == "-" else cell for cell in line.split("\t")]
    if len(cells) != 6:
        raise UserError(f"{name}: not a device: {line[:60]}", _HINT)
    bus, device, driver, module, alias, known = cells
    return Device(
        bus, device, driver, (module or driver).replace("-", "_"), alias, _names(known), bool(module)
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.replace("-", "_") for word in text.split(",") if word and word != "-"))
