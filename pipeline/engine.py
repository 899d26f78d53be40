"""The container engine: the only module that speaks to Docker.

Every step runs under one contract: no network, a read-only root, inputs read-only at fixed paths,
no capabilities and no way to gain any, the caller's uid, an environment made from nothing, limits
on memory and processes, and labels by which a later run finds what a killed one left behind.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

PROJECT = "virt-rt"
LABEL = "org.virt-rt"
#: Processes and threads one step may have; a kernel build with 2 x 64 jobs stays below it.
PIDS_LIMIT = 8192
#: Part of the machine's memory that one step may take.
MEMORY_SHARE = 0.9

ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/build/work",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
}


#: The repository of builder images; an image's tag is its key, cut to what a reader can compare.
BUILDERS = f"{PROJECT}/builder"


def builder_image(key: str) -> str:
    """Name of the image of the builder with that action key."""
    return f"{BUILDERS}:{key[:40]}"


@dataclass(frozen=True, slots=True)
class Container:
    """What to run: an image, a bash script and the directories it sees.

    mounts        host directory or file by path in the container, and whether it is writable
    environment   variables beside the fixed ones
    capabilities  Linux capabilities; with any, the step runs as uid 0 and gives its files back
    """

    name: str
    image: str
    script: str
    mounts: Mapping[str, tuple[Path, bool]]
    environment: Mapping[str, str]
    labels: Mapping[str, str]
    capabilities: tuple[str, ...] = ()
    user: tuple[int, int] = field(default_factory=lambda: (os.getuid(), os.getgid()))

    @property
    def command(self) -> list[str]:
        """The process to start: one stream of output, so that lines keep their order.

        A step that had to be root hands its files to the caller at the end.
        """
        run = f"/bin/bash -euo pipefail {shlex.quote(self.script)} 2>&1"
        if self.capabilities and self.user != (0, 0):
            owner = f"{self.user[0]}:{self.user[1]}"
            return ["/bin/bash", "-c", f"trap 'chown -hR {owner} /build/out /build/work' EXIT; {run}"]
        return ["/bin/bash", "-c", f"exec {run}"]

    @property
    def security(self) -> list[str]:
        """Security options; where AppArmor guards containers, its default profile forbids every mount."""
        return ["no-new-privileges", *(["apparmor=unconfined"] if "SYS_ADMIN" in self.capabilities else [])]

    @property
    def uid(self) -> str:
        """`uid:gid` of the process."""
        return "0:0" if self.capabilities else f"{self.user[0]}:{self.user[1]}"

    def cli(self, *command: str) -> list[str]:
        """The docker command that opens the same container by hand, running `command` in a terminal."""
        arguments = [
            "docker",
            "run",
            "--rm",
            "-it",
            "--init",
            "--network=none",
            "--read-only",
            "--tmpfs=/tmp:exec",
        ]
        arguments += ["--cap-drop=ALL", f"--user={self.uid}"]
        arguments.append(f"--hostname={PROJECT}")
        arguments += [f"--security-opt={option}" for option in self.security]
        arguments += ["--workdir=/build/work", *(f"--cap-add={name}" for name in self.capabilities)]
        arguments += [f"--label={name}={value}" for name, value in self.labels.items()]
        arguments += [f"--env={k}={v}" for k, v in (ENVIRONMENT | dict(self.environment)).items()]
        for target, (source, writable) in self.mounts.items():
            arguments.append(f"--volume={source}:{target}" + ("" if writable else ":ro"))
        return [*arguments, self.image, *command]


class Engine:
    """A running Docker engine, reached when it is first needed."""

    def __init__(self) -> None:
        """Nothing is contacted yet: a run in which everything is current needs no engine."""
        self._client: Any = None
        self._guard = threading.Lock()

    @property
    def client(self) -> Any:
        """The Docker client; a UserError tells what to do when no engine answers."""
        with self._guard:
            if self._client is None:
                import docker

                with _engine_errors():
                    client = docker.from_env(version="auto", timeout=120)
                    client.ping()
                    self._client = client
            return self._client

    def has_image(self, tag: str) -> bool:
        """Whether the engine has that image."""
        import docker

        client = self.client
        with _engine_errors():
            try:
                client.images.get(tag)
            except docker.errors.ImageNotFound:
                return False
        return True

    def import_image(self, tag: str, archive: Path, store: str = "") -> None:
        """Make an image from a root file system (a tar) under `repository:tag`.

        `store` is the identity of the store it comes from, whose `doit gc` may remove it again.
        """
        repository, _, name = tag.partition(":")
        client = self.client
        with _engine_errors(), archive.open("rb") as rootfs:
            # in chunks: the SDK sends a file object with a length and as chunks at once
            client.api.import_image_from_stream(
                iter(partial(rootfs.read, 1 << 20), b""),
                repository=repository,
                tag=name,
                changes=[f"LABEL {LABEL}.project={PROJECT} {LABEL}.store={store}"],
            )
        if not self.has_image(tag):
            raise UserError(
                f"the container engine did not keep {tag}", "look at the engine's log and free disk space"
            )

    def builder_images(self, store: str) -> list[str]:
        """Names of the builder images that came from a store."""
        client = self.client
        with _engine_errors():
            images = client.images.list(filters={"label": f"{LABEL}.store={store}"})
        return sorted(tag for image in images for tag in image.tags if tag.startswith(f"{BUILDERS}:"))

    def remove_image(self, tag: str) -> None:
        """Remove an image; the engine refuses while a container uses it."""
        client = self.client
        with _engine_errors():
            client.images.remove(tag)

    def run(self, container: Container, log: Callable[[bytes], None]) -> int:
        """Run a step to its end, handing its output to `log`, and return its exit status (0-255)."""
        import docker

        client = self.client
        mounts = [
            docker.types.Mount(target, str(source), type="bind", read_only=not writable)
            for target, (source, writable) in container.mounts.items()
        ]
        memory = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * MEMORY_SHARE)
        with _engine_errors():
            # by name, since a slow engine may make the container and still let the call time out
            client.containers.create(
                container.image,
                container.command,
                name=container.name,
                labels=dict(container.labels),
                mounts=mounts,
                environment=ENVIRONMENT | dict(container.environment),
                user=container.uid,
                working_dir="/build/work",
                hostname=PROJECT,  # else the container's random id, which a build may write down
                network_mode="none",
                read_only=True,
                tmpfs={"/tmp": "exec,mode=1777"},  # noqa: S108 - inside the container
                init=True,
                cap_drop=["ALL"],
                cap_add=list(container.capabilities),
                security_opt=container.security,
                mem_limit=memory,
                pids_limit=PIDS_LIMIT,
            )
            handle = client.containers.get(container.name)
        try:
            with _engine_errors():
                output = handle.attach(stream=True, stdout=True, stderr=True, logs=True)
                handle.start()
                for chunk in output:
                    log(chunk)
                return int(handle.wait(timeout=None)["StatusCode"])
        finally:
            with contextlib.suppress(Exception):
                handle.remove(force=True)

    def stop(self, run: str) -> None:
        """Kill and remove every container of a run."""
        with _engine_errors():
            for handle in self.client.containers.list(
                all=True, ignore_removed=True, filters={"label": f"{LABEL}.run={run}"}
            ):
                with contextlib.suppress(Exception):
                    handle.remove(force=True)

    def runs(self) -> set[str]:
        """Runs that have containers on this engine, living or dead."""
        with _engine_errors():
            found = self.client.containers.list(
                all=True, ignore_removed=True, filters={"label": f"{LABEL}.project={PROJECT}"}
            )
            return {handle.labels.get(f"{LABEL}.run", "") for handle in found}


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """Turn what the SDK and the sockets below it raise into one line and its remedy."""
    import docker
    import requests
    import urllib3

    try:
        yield
    except docker.errors.APIError as error:
        text = str(error.explanation or error)
        hint = (
            "free disk space where the engine keeps its data" if "no space left" in text else "`make doctor`"
        )
        raise UserError(f"the container engine refused: {text}", hint) from None
    except (
        docker.errors.DockerException,
        requests.RequestException,
        urllib3.exceptions.HTTPError,
        OSError,
    ) as error:
        reason = "permission denied on its socket" if "Permission denied" in str(error) else _brief(error)
        raise UserError(
            f"the container engine does not answer ({reason})",
            "`make setup` starts one, `make doctor` says more",
        ) from None


def _brief(error: BaseException) -> str:
    """The innermost reason of a chain of wrapped connection errors."""
    text = str(error)
    for known in ("No such file or directory", "Connection refused", "Read timed out", "Connection aborted"):
        if known in text:
            return known.lower()
    return text.splitlines()[0] if text else type(error).__name__
