"""What several tests share: a store in a temporary directory and small graphs of host steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.action import Action, File, Output, Step, Upstream
from pipeline.engine import BUILDERS, Engine
from pipeline.errors import UserError
from pipeline.executor import Executor
from pipeline.graph import Graph
from pipeline.history import Record
from pipeline.project import Project
from pipeline.store import Store

if TYPE_CHECKING:
    from tests.workshop import Shelf

ROOT = Path(__file__).resolve().parent.parent


class Recorder:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.lines: list[str] = []
        self.notes: list[str] = []

    def started(self, action: Action, last: Record | None) -> None:
        self.events.append(("started", action.name))

    def line(self, action: Action, text: str) -> None:
        self.lines.append(text)

    def finished(self, action: Action, how: str, seconds: float) -> None:
        self.events.append((how, action.name))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def built(self) -> list[str]:
        """Names of what was built, in order."""
        return [name for how, name in self.events if how == "built"]


def host_step(
    name: str,
    content: str = "x",
    *upstreams: str,
    run: Callable[[Step], None] | None = None,
    place: str | None = None,
    output: str = "out",
) -> Action:
    """A step without a container that concatenates its input file and what it needs."""

    def concatenate(step: Step) -> None:
        parts = [(step.inputs / "own").read_text()]
        parts += [(step.inputs / upstream).read_text() for upstream in upstreams]
        step.log(f"making {name}")
        (step.out / output).write_text("+".join(parts))

    return Action(
        name=name,
        kind="test",
        version=1,
        arch="all",
        summary=f"test step {name}",
        run=run or concatenate,
        files={"own": File(content.encode(), origin=f"recipes/{name}")},
        inputs={upstream: Upstream(upstream, "out") for upstream in upstreams},
        outputs=(Output(output),),
        place=place,
    )


@pytest.fixture(scope="session", autouse=True)
def no_images_are_left() -> Iterator[None]:
    """Remove the builder images that tests made from stores of their own; no later run would."""

    def images() -> set[str]:
        return {
            tag for image in engine.client.images.list() for tag in image.tags if tag.startswith(BUILDERS)
        }

    engine = Engine()
    try:
        before = images()
    except UserError:  # tests that need an engine say so themselves
        yield
        return
    yield
    own = set(engine.builder_images(Store(Project(ROOT).cache).identity))
    for tag in images() - before - own:
        engine.client.images.remove(tag, force=True)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Two releases of the real recipes with stand-ins for what is compiled, for tests with real package managers."""
    from tests.workshop import Shelf  # only these tests need what it needs

    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def executor_of(store: Store, recorder: Recorder, tmp_path: Path) -> Callable[[Graph], Executor]:
    """Make executors on the test's store; the engine is only reached by container steps."""
    return lambda graph: Executor(graph, store, Engine(), recorder, tmp_path / "log")
