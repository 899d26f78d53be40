"""Boots the lab's emulated host into Debian's kernel and has its own apt install our packages; the gate judges that.

Runs inside the lab's builder, standard library only. The repository is served over HTTP on the step's loopback, which
the emulated host reaches by qemu's user network; the step's container has no other network. What is typed on the host
is what `docs/deploy-debian.md` says, by a unit that systemd takes from its credentials: nothing of the lab is left on
the disk but the repository's address.

Below `IN`: `disk.qcow2`, the host's disk as Debian left it; `qemu/`, the product; `repo/apt` and `repo/key.asc` of the
signed repository; `kernelrelease` of the RT host kernel; `virt-rt-install.*` of `recipes/lab/`; `expected.json`:
`arch`, `machine` (qemu's arguments for CPUs and memory), `parameters` of the plan, `isolation` (names of parameters),
`packages` (names, in which `{release}` stands for the RT host kernel's). Environment: `PLATFORM`;
`INSTALL_TIMEOUT_SECONDS`, default `LIMIT_S`.

Leaves in `OUT` `labhost.json`, `install.log` and `console.log`, whatever happens in there, and `disk.qcow2`, with all
installed, when every finding is fine. Exit status: 0 when they are, 1 when one is not, each named on stderr; 2 when the
step was called wrongly.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    from pipeline import gate, installgate, labboard
except ImportError:  # in the step their files lie beside this one
    import gate  # type: ignore[import-not-found, no-redef]
    import installgate  # type: ignore[import-not-found, no-redef]
    import labboard  # type: ignore[import-not-found, no-redef]

#: Raised when the meaning of a field of labhost.json changes.
SCHEMA = 1

IN, OUT, WORK = Path("/build/in"), Path("/build/out"), Path("/build/work")

#: Seconds for all of it, of which most is apt's and dpkg's.
LIMIT_S = 1500

#: The TCP port of the repository on the step's loopback; it becomes part of the address on the host's disk.
PORT = 8080

#: The host's address in qemu's user network, and the one under which it sees the step's loopback.
ADDRESS, GATEWAY = "10.0.2.15/24", "10.0.2.2"

#: Lines of the console that are shown when the run ends badly.
TAIL = 20


class Site(http.server.SimpleHTTPRequestHandler):
    """Files of one directory; what was asked for goes into a list."""

    def __init__(self, asked: list[str], *arguments: Any, **options: Any) -> None:
        """Serve one request, and note it in `asked`."""
        self._asked = asked
        super().__init__(*arguments, **options)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Note a request: its status, then its path."""
        status = code.value if isinstance(code, http.HTTPStatus) else code
        self._asked.append(f"{status} {self.path}")

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: requests are noted."""


@contextlib.contextmanager
def serving(directory: Path, port: int = PORT) -> Iterator[tuple[int, list[str]]]:
    """Serve a directory on loopback; the port, any for 0, and the list that what is asked for goes into."""
    asked: list[str] = []
    handler = functools.partial(Site, asked, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address[1], asked
        finally:
            server.shutdown()
            thread.join()


def sources(address: str, channel: str, key: str) -> str:
    """The repository's `.sources` file, as it is published with a repository that has this address."""
    lines = "".join(f" {line or '.'}\n" for line in key.strip().splitlines())
    return f"Types: deb\nURIs: {address}/apt\nSuites: {channel}\nComponents: main\nSigned-By:\n{lines}"


def site(repo: Path, target: Path) -> tuple[str, str]:
    """Lay out what is served: the repository, and the file that adds it. The channel, and the file's address.

    ValueError when the repository has not one channel.
    """
    channels = sorted(path.name for path in (repo / "apt/dists").iterdir())
    if len(channels) != 1:
        raise ValueError(f"the repository has not one channel but {', '.join(channels) or 'none'}")
    target.mkdir()
    (target / "apt").symlink_to(repo / "apt")
    name = f"virt-rt-{channels[0]}.sources"
    address = f"http://{GATEWAY}:{PORT}"
    (target / name).write_text(sources(address, channels[0], (repo / "key.asc").read_text()))
    return channels[0], f"{address}/{name}"


def asked_for(index: str, names: Iterable[str]) -> dict[str, str]:
    """Version by name of the packages `names`, from the text of a `Packages` index.

    ValueError when the repository has not one of each, or nothing is asked for.
    """
    versions: dict[str, str] = {}
    for stanza in index.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if re.match(r"[\w-]+: ", line))
        if fields and versions.setdefault(fields["Package"], fields["Version"]) != fields["Version"]:
            raise ValueError(f"the repository has two versions of {fields['Package']}")
    asked = tuple(names)
    missing = [name for name in asked if name not in versions]
    if missing or not asked:
        raise ValueError(
            f"the repository has no package {', '.join(missing) or 'that is asked for'}; "
            f"it has {', '.join(sorted(versions)) or 'none'}"
        )
    return {name: versions[name] for name in asked}


def credentials(work: Path, variables: Mapping[str, str]) -> list[Path]:
    """Files with what makes the host's systemd run the installation; `variables` are those of its script."""
    unit = (IN / "virt-rt-install.service").read_text()
    settings = " ".join(f'"{name}={value}"' for name, value in variables.items())
    texts = {
        "systemd.extra-unit.virt-rt-install.service": unit.replace("@ENVIRONMENT@", settings),
        "systemd.unit-dropin.multi-user.target~virt-rt-install": "[Unit]\nWants=virt-rt-install.service\n",
        "virt-rt.install": (IN / "virt-rt-install.sh").read_text(),
    }
    paths = []
    for number, (name, text) in enumerate(texts.items()):
        paths.append(work / f"credential-{number}")
        paths[-1].write_bytes(labboard.credential(name, text))
    return paths


def install(limit_s: float) -> tuple[list[gate.Finding], dict[str, Any]]:
    """Run the host and judge it: the findings, and what is recorded beside them."""
    said = json.loads((IN / "expected.json").read_text())
    channel, address = site(IN / "repo", WORK / "site")
    arch = said["arch"]
    index = (IN / "repo/apt/dists" / channel / "main" / f"binary-{arch}" / "Packages").read_text()
    release = (IN / "kernelrelease").read_text().strip()
    expected = installgate.Expectations(
        release=release,
        parameters=tuple(said["parameters"]),
        isolation=tuple(said["isolation"]),
        packages=asked_for(index, (name.replace("{release}", release) for name in said["packages"])),
    )
    host = labboard.Host(IN / "qemu", IN / "disk.qcow2", WORK)
    host.lay_over()
    variables = {"SOURCES": address, "PACKAGES": " ".join(expected.packages), "ADDRESS": ADDRESS}
    network = ["-netdev", "user,id=repository,ipv6=off"]
    network += ["-device", "virtio-net-pci,netdev=repository,romfile="]
    board = labboard.board(
        said["machine"],
        [*host.arguments(), *network],
        OUT / "console.log",
        {"virt-rt.install": WORK / "answers"},
        credentials(WORK, variables),
    )
    with serving(WORK / "site") as (_, asked):
        run = labboard.run(
            [str(host.qemu), "-no-reboot", *board], WORK / "answers", WORK / "messages", limit_s
        )
    (OUT / "install.log").write_text(
        installgate.log(run.answers)
        + "--- asked of the repository\n"
        + "".join(f"{line}\n" for line in asked)
    )
    machine = gate.Finding("machine", "the host powers itself off", run.ended or "powered off", not run.ended)
    findings = [machine, *installgate.judge(run.answers, expected)]
    began = time.monotonic()
    if all(finding.ok for finding in findings):
        host.flatten(OUT / "disk.qcow2")
    return findings, {
        "release": expected.release,
        "packages": dict(expected.packages),
        "seconds": run.at,
        "seconds_flattened": round(time.monotonic() - began, 1),
        "seconds_total": round(run.total, 1),
        **installgate.record(run.answers),
    }


def main() -> int:
    """Do it all; see the module for what is read and left."""
    for name in ("console.log", "install.log"):
        (OUT / name).touch()
    try:
        platform = os.environ["PLATFORM"]
        limit_s = float(os.environ.get("INSTALL_TIMEOUT_SECONDS", LIMIT_S))
        findings, recorded = install(limit_s)
    except (KeyError, TypeError, ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"lab host: {type(error).__name__}: {error}", file=sys.stderr)
        print("give the step all inputs and variables that its module names", file=sys.stderr)
        return 2
    ok = all(finding.ok for finding in findings)
    verdict = {
        "schema": SCHEMA,
        "platform": platform,
        "evidence": "emulated",
        "ok": ok,
        "findings": [asdict(finding) for finding in findings],
        **recorded,
    }
    (OUT / "labhost.json").write_text(json.dumps(verdict, indent=2, sort_keys=True) + "\n")
    failed = [finding for finding in findings if not finding.ok]
    for finding in failed:
        print(f"{finding.name}: wanted {finding.wanted}; got {finding.got}", file=sys.stderr)
    if any(finding.name in ("machine", "answers") for finding in failed):
        console = (OUT / "console.log").read_text(errors="replace")
        for line in console.splitlines()[-TAIL:]:
            print(f"host: | {line}", file=sys.stderr)
    print(f"{len(findings) - len(failed)} of {len(findings)} fine in {recorded['seconds_total']:.0f} s")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
