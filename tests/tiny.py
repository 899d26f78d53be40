"""A root file system of one busy directory: bash and coreutils of this machine and their libraries.

It stands in for builders where a test is about how steps run and not about what is in them; it is
made in a second, from what is here.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

PROGRAMS = (
    "bash cat chmod chown cp cut date dd env find grep head id install ln ls mkdir mv nproc rm sed sha256sum "
    "sleep sort stat tail tar touch tr uname wc"
).split()


def tiny_rootfs(directory: Path) -> Path:
    """Write `directory/rootfs.tar` and return its path."""
    tree = directory / "tree"
    for name in (
        "bin",
        "build/in",
        "build/out",
        "build/work",
        "build/ccache",
        "tmp",
        "etc",
        "proc",
        "sys",
        "dev",
    ):
        (tree / name).mkdir(parents=True)
    (tree / "build" / "step").touch()
    for name in ("usr/bin", "usr/sbin", "sbin"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).symlink_to("/bin")
    libraries: set[Path] = set()
    for program in PROGRAMS:
        found = shutil.which(program, path="/usr/bin:/bin")
        assert found, f"{program} is missing"
        shutil.copy(found, tree / "bin" / program)
        linked = subprocess.run(["ldd", found], capture_output=True, text=True, check=True).stdout
        words = [word for line in linked.splitlines() for word in line.split()]
        libraries |= {Path(word) for word in words if word.startswith("/")}
    for library in libraries:
        target = tree / str(library).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    archive = directory / "rootfs.tar"
    subprocess.run(["tar", "-C", str(tree), "-cf", str(archive), "."], check=True)
    return archive
