"""A program for target machines as one executable file: a zip of its package that Python runs.

Same sources, same bytes: entries are sorted, their dates fixed, nothing is compressed, so that no version of
zlib has a say.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InternalError

_SHEBANG = b"#!/usr/bin/env python3\n"
#: The earliest date that a zip can have.
_DATE = (1980, 1, 1, 0, 0, 0)
_START = '''"""Starts {package} from the zip."""

import sys

if sys.version_info < (3, 9):
    sys.stderr.write("{program}: this is Python %d.%d\\n" % sys.version_info[:2])
    sys.stderr.write("  run it with Python 3.9 or later\\n")
    sys.exit(2)

from {package}.__main__ import main

sys.exit(main())
'''


@dataclass(frozen=True, slots=True)
class Tool:
    """A program: what it is called, and the directory of its package in a checkout."""

    program: str
    directory: str

    @property
    def package(self) -> str:
        """What the package is called inside the file."""
        return self.program.replace("-", "_")

    def sources(self, root: Path) -> list[Path]:
        """The files that make up the tool, in a checkout at `root`, sorted."""
        found = sorted((root / self.directory).glob("*.py"))
        if not found:
            raise InternalError(f"{root} has no {self.directory}", "check out the project again")
        return found

    def bundle(self, root: Path) -> bytes:
        """The tool's file, from a checkout at `root`; to be installed with mode 755."""
        entries = {f"{self.package}/{path.name}": path.read_bytes() for path in self.sources(root)}
        entries["__main__.py"] = _START.format(program=self.program, package=self.package).encode()
        packed = io.BytesIO()
        packed.write(_SHEBANG)
        with zipfile.ZipFile(packed, "a") as archive:
            for name, content in sorted(entries.items()):
                entry = zipfile.ZipInfo(name, _DATE)
                entry.create_system = 3  # Unix, whatever this runs on
                entry.external_attr = 0o100644 << 16
                archive.writestr(entry, content)
        return packed.getvalue()


#: Whether a machine keeps its plan.
CHECK = Tool("virt-rt-check", "pipeline/hostcheck")
#: What latencies a machine has, and whether they are good enough.
MEASURE = Tool("virt-rt-measure", "pipeline/measure")
