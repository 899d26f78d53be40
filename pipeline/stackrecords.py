"""Directories that host and guest sent over a port, unpacked. Runs inside the lab's step, standard library only.

Each comes as a line "NAME BYTES SHA256" and a tar of that size.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_HEADER = re.compile(rb"([a-z0-9][a-z0-9.-]*) ([0-9]+) ([0-9a-f]{64})\n")


@dataclass(frozen=True, slots=True)
class Received:
    """What came: sha256 of each directory's tar by name, and what is wrong with the rest; empty when all is whole."""

    digests: dict[str, str]
    fault: str


def receive(stream: Path, target: Path) -> Received:
    """Unpack what came in the file `stream` to directories below `target`, which is made."""
    target.mkdir(parents=True)
    digests: dict[str, str] = {}
    try:
        raw = stream.read_bytes()
    except OSError as error:
        return Received({}, f"nothing came: {error}")
    while raw:
        header = _HEADER.match(raw)
        if not header:
            return Received(digests, f"not the head of a directory: {raw[:40]!r}")
        name, size, digest = header[1].decode(), int(header[2]), header[3].decode()
        content, raw = raw[header.end() : header.end() + size], raw[header.end() + size :]
        if len(content) != size:
            return Received(digests, f"{name} is cut short after {len(content)} of {size} bytes")
        if hashlib.sha256(content).hexdigest() != digest:
            return Received(digests, f"{name} does not match its checksum")
        if name in digests:
            return Received(digests, f"{name} came twice")
        try:
            _unpack(content, target / name)
        except (tarfile.TarError, OSError) as error:
            return Received(digests, f"{name} cannot be unpacked: {error}")
        if not (target / name).is_dir():
            return Received(digests, f"{name} has no files")
        digests[name] = digest
    return Received(digests, "")


def _unpack(content: bytes, target: Path) -> None:
    """Write the files of a tar below `target`; TarError for what is neither a file nor a directory of it."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            file = tar.extractfile(member) if member.isreg() else None
            if path.is_absolute() or ".." in path.parts or (file is None and not member.isdir()):
                raise tarfile.TarError(f"what is {member.name}?")
            if file is not None:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                (target / path).write_bytes(file.read())
