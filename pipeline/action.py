"""One hermetic step: declared inputs, one container (or none), declared outputs.

Actions are plain data. They know nothing of doit, Docker or the store; those layers read them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from pipeline.errors import InternalError
from pipeline.worktree import Snapshot

#: Everything an upstream action made, each output under its own name.
ALL = "*"

#: Scarce things of which a step may need one; the executor hands them out.
Resource = Literal["heavy", "lab", "network", ""]


@dataclass(frozen=True, slots=True)
class File:
    """A small input held in memory, so that what is built is exactly what the key says.

    `origin` is the path in the checkout that a reader would edit; it is not part of the key.
    """

    content: bytes
    executable: bool = False
    origin: str = field(default="", compare=False)

    @property
    def digest(self) -> str:
        """sha256 of the content, 64 hex digits."""
        return hashlib.sha256(self.content).hexdigest()

    @classmethod
    def read(cls, path: Path, origin: str = "") -> File:
        """Read a file of the checkout; the owner's execute bit is kept, the other modes are not."""
        return cls(path.read_bytes(), bool(path.stat().st_mode & 0o100), origin or str(path))


@dataclass(frozen=True, slots=True)
class Upstream:
    """An output of another action, used as an input.

    `unpack` asks for a tar archive to be seen, by a step in a container, as the directory it holds;
    `output` may be `ALL`, which stages every output of that action into one directory.
    """

    action: str
    output: str
    unpack: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """What a step promises to leave in its output directory.

    `digest` (sha256, hex) is set where the content is known beforehand, as for a download; the
    executor refuses anything else under that name.
    """

    name: str
    kind: Literal["file", "directory"] = "file"
    digest: str = ""


class Step(Protocol):
    """What a step without a container is given to work with."""

    action: Action
    inputs: Path
    out: Path
    scratch: Path

    def log(self, line: str) -> None:
        """Write one line to the step's log."""

    def stored(self, digest: str) -> Path | None:
        """A file of that sha256 if the store has it."""

    def specs(self) -> Mapping[str, dict[str, Any]]:
        """Specification by name (`pipeline.keys.spec`) of this action and of all that it is made from.

        This action's key covers the keys of the others, and so what they are; it does not cover their names.
        """

    def check_cancelled(self) -> None:
        """Raise when the run was interrupted."""


@dataclass(frozen=True, slots=True)
class Action:
    """One step of the build.

    name          unique, and the name of the doit task: `kernel:qemu-q35:guest`
    kind, version what sort of step it is; `version` is raised when its meaning changes without
                  its script changing, so that old results are not taken for new ones
    arch          Debian architecture of what is made
    builder       the action whose root file system the step runs in, or None: a host step
    script        what the container executes
    run           what a host step executes instead
    files         small inputs by the path they get below the input directory
    inputs        outputs of other actions, likewise
    environment   variables the script sees, beside the fixed ones
    parameters    JSON data that a host step reads
    outputs       what must be there at the end
    capabilities  Linux capabilities of the container; asking for any makes it run as uid 0

    Out of the key, since they cannot change the outputs: `summary`, `resource`, `ccache`, `place`
    (directory below `artifacts/` for a product, or None for an intermediate result), `remedy`
    (what a user may do when this step fails), and what is about work trees of developers:

    snapshot      the tree that steps see in the place of this action's output; `parameters` hold its id
    kept          directories of /build/work that a build from a work tree finds as the last one left them
    given_out     why nothing of a work tree may be in the result, which is meant for others; empty where it may
    """

    name: str
    kind: str
    version: int
    arch: str
    outputs: tuple[Output, ...]
    summary: str
    builder: str | None = None
    script: File | None = None
    run: Callable[[Step], None] | None = field(default=None, compare=False)
    files: Mapping[str, File] = field(default_factory=dict)
    inputs: Mapping[str, Upstream] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ()
    resource: Resource = ""
    ccache: bool = False
    place: str | None = None
    remedy: str = ""
    snapshot: Snapshot | None = field(default=None, compare=False)
    kept: tuple[str, ...] = ()
    given_out: str = ""

    def __post_init__(self) -> None:
        """Refuse an action that could not be keyed or run."""
        if not (self.files or self.inputs or self.parameters):
            raise InternalError(f"{self.name}: no declared inputs", "declare what the step reads")
        if not self.outputs:
            raise InternalError(f"{self.name}: no declared outputs", "declare what the step makes")
        if (self.script is None) == (self.run is None) or (self.builder is None) != (self.script is None):
            raise InternalError(
                f"{self.name}: a step has either a builder and a script, or a function",
                "give exactly one of them",
            )
        names = [output.name for output in self.outputs]
        if len(set(names)) != len(names):
            raise InternalError(f"{self.name}: an output is declared twice", "rename one")
        for path in [*self.files, *self.inputs, *names]:
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise InternalError(f"{self.name}: {path} leaves its directory", "use a relative path")

    @property
    def upstreams(self) -> tuple[str, ...]:
        """Names of the actions whose results this one needs, without repetition."""
        named = [upstream.action for upstream in self.inputs.values()]
        return tuple(dict.fromkeys(([self.builder] if self.builder else []) + named))
