"""Whether a kernel will load the modules that were built for it. Runs alone, inside the driver step.

A module loads when its vermagic names the kernel's release and every symbol that it needs is exported, by the kernel
or by a module beside it. modpost says the latter, too, but a Makefile can make warnings of its errors. The programs
that come with them run on any distribution when they need no shared library of it.

Exit status: 0 all will load and run, 2 at least one will not, each with a line that says why.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

#: What is kept of `modinfo`: these fields, each as often as it is there.
LISTED = ("alias", "depends", "firmware", "parm")


def exported(texts: Iterable[str]) -> frozenset[str]:
    """Symbols in `Module.symvers` files: a line each of CRC, symbol, module, kind of export, tab-separated."""
    return frozenset(line.split("\t")[1] for text in texts for line in text.splitlines() if "\t" in line)


def needed(text: str) -> frozenset[str]:
    """Symbols that a module needs, of `nm --undefined-only --format=posix`; weak ones it can do without."""
    words = [line.split() for line in text.splitlines()]
    return frozenset(word[0] for word in words if len(word) > 1 and word[1] == "U")


def information(text: str) -> dict[str, Any]:
    """What `modinfo --null` says: `vermagic`, `license`, `description` as text, those of `LISTED` as lists."""
    told: dict[str, Any] = {field: [] for field in LISTED}
    for line in filter(None, text.split("\0")):
        field, _, value = line.partition("=")
        if line.startswith("parm:"):  # told as for people, although the rest is not
            told["parm"].append(line.removeprefix("parm:").strip())
            continue
        if field == "depends":
            told[field] = [name for name in value.split(",") if name]
        elif field in LISTED:
            told[field].append(value)
        elif field in ("vermagic", "license", "description"):
            told[field] = value
    return told


def faults(
    name: str, told: dict[str, Any], needs: frozenset[str], known: frozenset[str], release: str
) -> list[str]:
    """Why the kernel `release`, which with the modules exports `known`, would not load the module: a line each."""
    found = []
    magic = str(told.get("vermagic", "")).split(" ")[0]
    if magic != release:
        found.append(f"{name}: built for {magic or 'no kernel'}, this one is {release}")
    if not told.get("license"):
        found.append(f"{name}: has no MODULE_LICENSE")
    found += [
        f"{name}: needs {symbol}, which this kernel does not export" for symbol in sorted(needs - known)
    ]
    return found


def program_fault(content: bytes, headers: str) -> str:
    """Why a program would not run on any distribution, or nothing; `headers` is what `readelf -l` says of an ELF."""
    if content.startswith(b"#!"):
        return ""
    if not content.startswith(b"\x7fELF"):
        return "is neither an ELF program nor a script"
    if not re.search(r"^Elf file type is (EXEC|DYN) ", headers, re.MULTILINE):
        return "is an ELF file that cannot be run"
    if re.search(r"^\s+INTERP\s", headers, re.MULTILINE):
        return "needs shared libraries: let its Makefile heed LDFLAGS, which has -static"
    return ""


def test_of(tool: str, words: Sequence[str], programs: Sequence[Path]) -> dict[str, Any] | None:
    """The test command as it runs on the machine: its first word may be the name of one of `programs`."""
    if not words:
        return None
    places = {program.name: str(program) for program in programs}
    return {"tool": tool, "argv": [places.get(words[0], words[0]), *words[1:]]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; returns its exit status."""
    parser = argparse.ArgumentParser(prog="modulecheck")
    parser.add_argument("--release", required=True, help="the kernel's release")
    parser.add_argument("--driver", required=True, help="the driver's name")
    parser.add_argument("--symbols", type=Path, nargs="+", required=True, help="Module.symvers files")
    parser.add_argument("--autoload", nargs="*", default=[], help="modules that are loaded at boot")
    parser.add_argument("--root", type=Path, required=True, help="the tree that is installed at /")
    parser.add_argument(
        "--programs", type=Path, nargs="*", default=[], help="programs, as paths in that tree"
    )
    parser.add_argument("--test-tool", default="command", help="what runs the test: command or irqlat")
    parser.add_argument("--test", default="", help="the test command, a word on each line")
    parser.add_argument("--modules", type=Path, required=True, help="the directory that holds the modules")
    parser.add_argument("--document", type=Path, required=True, help="where what is known of them is written")
    options = parser.parse_args(arguments)

    known = exported(path.read_text() for path in options.symbols)
    wrong: list[str] = []
    modules = []
    for path in sorted(options.modules.glob("*.ko")):
        # as modprobe has it: a dash in a file's name is an underscore in the module's
        name = path.stem.replace("-", "_")
        told = information(_run("modinfo", "--null", str(path)))
        wrong += faults(
            path.name,
            told,
            needed(_run("nm", "--undefined-only", "--format=posix", str(path))),
            known,
            options.release,
        )
        modules.append({"name": name, "file": path.name} | told)
    if not modules:
        wrong.append(f"{options.modules} holds no module")
    names = [module["name"] for module in modules]
    wrong += [
        f"autoload names {name}, the driver has {', '.join(sorted(names))}"
        for name in options.autoload
        if name.replace("-", "_") not in names
    ]
    for program in options.programs:
        path = options.root / program.relative_to("/")
        content = path.read_bytes() if path.is_file() else b""
        headers = _run("readelf", "-lW", str(path)) if content.startswith(b"\x7fELF") else ""
        if fault := program_fault(content, headers):
            wrong.append(f"the program {program.name} {fault}")
    for line in wrong:
        print(f"driver: {line}", file=sys.stderr)
    if wrong:
        return 2
    document = {
        "schema": 1,
        "driver": options.driver,
        "kernelrelease": options.release,
        "autoload": [name.replace("-", "_") for name in options.autoload],
        "modules": modules,
        "programs": [str(program) for program in options.programs],
        "test": test_of(options.test_tool, options.test.splitlines(), options.programs),
        "signer": None,
    }
    options.document.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"driver: {' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
