"""`virt-rt-check` as one executable file: a zip of the package `hostcheck` that Python runs.

Same sources, same bytes: entries are sorted, their dates fixed, nothing is compressed, so that no version of
zlib has a say.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from pipeline.errors import InternalError

#: What the package is called inside.
PACKAGE = "virt_rt_check"
_SHEBANG = b"#!/usr/bin/env python3\n"
#: The earliest date that a zip can have.
_DATE = (1980, 1, 1, 0, 0, 0)
_START = f'''"""Starts {PACKAGE} from the zip."""

import sys

if sys.version_info < (3, 9):
    sys.stderr.write("virt-rt-check: this is Python %d.%d\\n" % sys.version_info[:2])
    sys.stderr.write("  run it with Python 3.9 or later\\n")
    sys.exit(2)

from {PACKAGE}.__main__ import main

sys.exit(main())
'''


def sources(root: Path) -> list[Path]:
    """The files that make up the tool, in a checkout at `root`, sorted."""
    found = sorted((root / "pipeline" / "hostcheck").glob("*.py"))
    if not found:
        raise InternalError(f"{root} has no pipeline/hostcheck", "check out the project again")
    return found


def bundle(root: Path) -> bytes:
    """The tool's file, from a checkout at `root`; to be installed with mode 755."""
    entries = {f"{PACKAGE}/{path.name}": path.read_bytes() for path in sources(root)}
    entries["__main__.py"] = _START.encode()
    packed = io.BytesIO()
    packed.write(_SHEBANG)
    with zipfile.ZipFile(packed, "a") as archive:
        for name, content in sorted(entries.items()):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system = 3  # Unix, whatever this runs on
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content)
    return packed.getvalue()
