"""Real package managers as clients: fresh Debian machines in containers.

A machine is a container of a root file system that mmdebstrap makes from the Debian archive, once: the tar stays in
the user's cache under a digest of how it was made. Containers share the host's network, since an address of the
loopback interface and the Debian archive are all that they need. They are removed at the end, and end by themselves
where a test run is killed. dnf runs in a Debian container, too, and installs into a directory of it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self

import pytest

from pipeline.engine import Engine

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = "http://deb.debian.org/debian"
SECURITY = "http://deb.debian.org/debian-security"
IMAGES = "virt-rt/client"
#: Seconds after which a container ends, whatever became of the test run.
LIFETIME = 1200
#: What apt says when there is no network, or none to the archive.
UNREACHABLE = re.compile(
    r"Temporary failure resolving|Could not (resolve|connect)|Cannot initiate|Network is unreach"
)


@dataclass(frozen=True, slots=True)
class System:
    """A root file system: a suite of Debian, and what is installed beside its essential packages and apt."""

    suite: str
    packages: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """What writes its tar to standard output."""
        sources = [f"deb {ARCHIVE} {suite} main" for suite in (self.suite, f"{self.suite}-updates")]
        sources.append(f"deb {SECURITY} {self.suite}-security main")
        include = [f"--include={','.join(self.packages)}"] if self.packages else []
        options = ["--variant=minbase", "--format=tar", "--quiet", *include]
        mode = "root" if os.geteuid() == 0 else "unshare"
        return ["mmdebstrap", f"--mode={mode}", *options, self.suite, "-", *sources]

    @property
    def name(self) -> str:
        """A word that changes with how the root file system is made."""
        how = "\n".join(word for word in self.command if not word.startswith("--mode"))
        return f"{self.suite}-{hashlib.sha256(how.encode()).hexdigest()[:12]}"


DEBIAN = {"12": System("bookworm"), "13": System("trixie")}
DNF = System("trixie", ("ca-certificates", "curl", "dnf", "rpm"))


def archives(systems: Sequence[System]) -> list[Path]:
    """The tars of these root file systems, out of the cache or made now, two at a time."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    cache = Path(base) / "virt-rt-tests"
    cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as workers:
        return list(workers.map(lambda system: _archive(cache, system), systems))


def _archive(cache: Path, system: System) -> Path:
    tar = cache / f"{system.name}.tar"
    if tar.exists():
        return tar
    new = cache / f".{system.name}.{os.getpid()}"
    try:
        with new.open("wb") as output:
            done = subprocess.run(
                system.command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=600, check=False
            )
        if done.returncode and UNREACHABLE.search(done.stderr):
            pytest.skip(f"the Debian archive cannot be reached: {ARCHIVE}")
        assert done.returncode == 0, f"{shlex.join(system.command)}\n{done.stderr[-2000:]}"
        new.rename(tar)
    finally:
        new.unlink(missing_ok=True)
    return tar


@contextmanager
def images(systems: Sequence[System]) -> Iterator[dict[System, str]]:
    """Names of images of these systems; the engine forgets those that it did not have before."""
    engine = Engine()
    with ExitStack() as left:
        made = {}
        for system, tar in zip(systems, archives(systems), strict=True):
            made[system] = f"{IMAGES}:{system.name}"
            if not engine.has_image(made[system]):
                engine.import_image(made[system], tar)
                left.callback(engine.client.images.remove, made[system], force=True)
        yield made


@dataclass(frozen=True, slots=True)
class Done:
    """What a command in a machine printed, both streams together, and its exit status."""

    status: int
    out: str


class Machine:
    """A running container; a context manager."""

    def __init__(
        self, image: str, volumes: Sequence[tuple[Path, str]] = (), network: Literal["host", "none"] = "host"
    ) -> None:
        """`volumes` are directories of this machine and where the container sees them, read-only."""
        self._image, self._volumes, self._network = image, volumes, network
        self._name = f"virt-rt-client-{os.getpid()}-{time.monotonic_ns()}"

    def __enter__(self) -> Self:
        """Start it."""
        volumes = [f"--volume={source}:{target}:ro" for source, target in self._volumes]
        options = [
            "--detach",
            "--rm",
            "--init",
            f"--network={self._network}",
            f"--name={self._name}",
            *volumes,
        ]
        _docker("run", *options, self._image, "sleep", str(LIFETIME))
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        _docker("rm", "--force", "--volumes", self._name)

    def run(self, script: str, *, timeout: float = 300) -> Done:
        """Run shell commands as root, and stop at the first that fails."""
        environment = ["--env=DEBIAN_FRONTEND=noninteractive", "--env=LC_ALL=C.UTF-8"]
        command = [*_DOCKER, "exec", "-i", *environment, self._name, "sh", "-eu", "-c", script]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        return Done(done.returncode, done.stdout)

    def sh(self, script: str, *, timeout: float = 300) -> str:
        """What shell commands print, which succeed."""
        done = self.run(script, timeout=timeout)
        assert done.status == 0, f"# {script}\n{done.out}"
        return done.out

    def write(self, path: str, content: bytes | str) -> None:
        """Write a file."""
        data = content.encode() if isinstance(content, str) else content
        target = shlex.quote(path)
        script = f'mkdir -p "$(dirname {target})" && cat >{target}'
        _docker("exec", "-i", self._name, "sh", "-c", script, data=data)

    def files(self, root: str = "/") -> dict[str, str]:
        """Everything on the file system of `root`: kind, mode, owner, link target and sha256 by path."""
        found: dict[str, str] = {}
        listed = self.sh(f"cd {root} && find . -xdev -printf '%y %m %U:%G %l\\t%P\\n'")
        for line in listed.splitlines():
            what, _, path = line.partition("\t")
            found[f"/{path}"] = what
        # NUL at the end of lines: sha256sum then leaves odd names as they are
        script = f"cd {root} && find . -xdev -type f -print0 | xargs -0 sha256sum -z | tr '\\0' '\\n'"
        for line in self.sh(script, timeout=120).splitlines():
            digest, _, path = line.partition("  .")
            found[path] += f" {digest}"
        return found


_DOCKER = ("docker", "--host", os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock")


def _docker(*arguments: str, data: bytes = b"") -> bytes:
    done = subprocess.run([*_DOCKER, *arguments], input=data, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, f"docker {shlex.join(arguments)}: {done.stderr.decode()}"
    return done.stdout


# What the documentation shows --------------------------------------------------------------------


def documented(page: str, heading: str, *, url: str = "", block: int = 0) -> str:
    """The root shell's commands of a block under a heading of a page, for the repository at `url`."""
    text = (ROOT / "docs" / page).read_text()
    section = re.split(r"^##+ ", text.partition(f"\n## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^```text\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    lines = blocks[block].splitlines()
    assert lines and all(line.startswith("# ") for line in lines), lines
    return "\n".join(line.removeprefix("# ") for line in lines).replace("https://packages.example.org", url)


def differences(
    before: Mapping[str, str], after: Mapping[str, str], allowed: Iterable[str]
) -> dict[str, str]:
    """What appeared, went or changed between two answers of `Machine.files`, but for patterns of `allowed` paths."""
    fine = re.compile("|".join(f"(?:{pattern})" for pattern in allowed))
    return {
        path: f"{before.get(path, 'not there')} -> {after.get(path, 'not there')}"
        for path in sorted({**before, **after})
        if before.get(path) != after.get(path) and not fine.fullmatch(path)
    }


# What a client must refuse ------------------------------------------------------------------------


def change(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@contextmanager
def cutting(root: Path, ends: tuple[str, ...]) -> Iterator[str]:
    """A web server that closes the connection halfway through files whose names end so; its address."""

    class Handler(SimpleHTTPRequestHandler):
        def copyfile(self, source: Any, outputfile: Any) -> None:
            content = source.read()
            outputfile.write(content[: len(content) // 2] if self.path.endswith(ends) else content)

        def log_message(self, format: str, *args: Any) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
