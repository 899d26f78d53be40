"""Deterministic tar: the one form in which a directory is stored.

Entries are sorted, times are zero, owners are root, modes are 755 or 644; the same tree gives the
same bytes on every machine.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from pipeline.errors import InternalError


def pack(directory: Path, target: Path) -> None:
    """Write the tree below `directory` as a deterministic tar to `target`."""
    import tarfile  # a run that makes nothing does without

    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(directory.rglob("*"), key=lambda entry: entry.relative_to(directory).as_posix()):
            entry = tar.gettarinfo(path, path.relative_to(directory).as_posix())
            entry.mtime = 0
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            if entry.islnk():  # a hard link inside the tree is stored as the file it is
                entry.type, entry.linkname, entry.size = tarfile.REGTYPE, "", path.stat().st_size
            if entry.isreg():
                entry.mode = 0o755 if entry.mode & 0o100 else 0o644
                with path.open("rb") as content:
                    tar.addfile(entry, content)
            elif entry.isdir() or entry.issym():
                entry.mode = 0o755
                tar.addfile(entry)
            else:
                raise InternalError(
                    f"{path} is neither file, directory nor link", "leave it out of the output"
                )


def unpack(archive: Path, directory: Path) -> None:
    """Unpack a trusted tar (plain or zstd) into an existing directory.

    The tar program does it, in larger records than its usual 10 KiB: a kernel tree has 80,000 files,
    for which Python's module takes twice as long. Archives come out of the store, so their content
    is already verified.
    """
    command = ["tar", "--extract", "--blocking-factor=512", "--no-same-owner"]
    command += ["--file", str(archive), "--directory", str(directory)]
    with archive.open("rb") as head:
        if head.read(4) == b"\x28\xb5\x2f\xfd":
            command.insert(1, "--zstd")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"tar could not unpack {archive.name}: {done.stderr.strip().splitlines()[-1:]}")
