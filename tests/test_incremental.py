"""Build directories that are kept: what make would not see is shown to it, and nothing half-written stays."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline import incremental
from pipeline.incremental import Build
from pipeline.worktree import WorkTree, open_tree
from tests.standin import git

OLD = (946684800, 946684800)


@pytest.fixture
def tree(tmp_path: Path) -> WorkTree:
    root = tmp_path / "linux"
    root.mkdir()
    git(root, "init", "-q")
    (root / "fork.c").write_text("int fork;\n")
    (root / "exit.c").write_text("int exit;\n")
    (tmp_path / "locks").mkdir()
    return open_tree(root, tmp_path / "local")


class Run:
    """One step's use of the build directory."""

    def __init__(self, tree: WorkTree, tmp_path: Path, name: str = "guest") -> None:
        self.notes: list[str] = []
        self.died = 0
        self.build = Build(tree.snapshot(), name, tmp_path / "locks", tmp_path / f"renewed-{time.time_ns()}")

    @contextmanager
    def held(self, check: Callable[[], None] = lambda: None) -> Iterator[Build]:
        with self.build.held(check, self._dead, self.notes.append) as build:
            yield build

    def _dead(self) -> None:
        self.died += 1

    def write(self, *names: str) -> None:
        for name in names:
            (self.build.directory("obj") / name).parent.mkdir(parents=True, exist_ok=True)
            (self.build.directory("obj") / name).write_text("made")

    def made(self) -> set[str]:
        directory = self.build.directory("obj")
        return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def run(tree: WorkTree, tmp_path: Path) -> Callable[[], Run]:
    """Make runs of that tree as it is then."""
    return lambda: Run(tree, tmp_path)


@pytest.fixture
def finished(run: Callable[[], Run]) -> Run:
    """A first run that ended well."""
    first = run()
    with first.held() as build:
        assert (build.changed, build.renewed) == (None, {})
        first.write("fork.o")
        build.succeeded()
    return first


def test_the_next_run_finds_what_was_made_and_is_told_what_changed(
    finished: Run, run: Callable[[], Run], tree: WorkTree
) -> None:
    (tree.path / "fork.c").write_text("int better;\n")
    second = run()
    with second.held() as build:
        assert second.made() == {"fork.o"}
        assert build.changed == frozenset({"fork.c"})
        assert build.renewed == {}  # its date tells
        build.succeeded()
    with run().held() as build:
        assert build.changed == frozenset()
    assert (second.notes, second.died) == ([], 0)


def test_a_changed_file_with_an_old_date_is_shown_with_a_new_one(
    finished: Run, run: Callable[[], Run], tree: WorkTree
) -> None:
    file = tree.path / "fork.c"
    file.write_text("int better;\n")
    file.chmod(0o755)
    os.utime(file, OLD)
    with run().held() as build:
        (shown,) = build.renewed.items()
        assert shown[0] == "fork.c"
        assert shown[1].read_text() == "int better;\n"
        assert shown[1].stat().st_mtime > time.time() - 60
        assert os.access(shown[1], os.X_OK)
        assert file.stat().st_mtime == OLD[1]
        build.succeeded()
    with run().held() as build:
        assert build.renewed == {}


def test_it_is_shown_again_when_the_run_failed(finished: Run, run: Callable[[], Run], tree: WorkTree) -> None:
    (tree.path / "fork.c").write_text("int better;\n")
    os.utime(tree.path / "fork.c", OLD)
    for _ in range(2):
        again = run()
        with again.held() as build:
            assert list(build.renewed) == ["fork.c"]
            again.write("exit.o")
            build.failed(tree.snapshot())
    assert again.made() == {"fork.o", "exit.o"}


def test_a_link_with_an_old_date_and_very_many_files_mean_a_new_start(
    finished: Run, run: Callable[[], Run], tree: WorkTree
) -> None:
    (tree.path / "link").symlink_to("fork.c")
    os.utime(tree.path / "link", OLD, follow_symlinks=False)
    second = run()
    with second.held() as build:
        assert second.made() == set()
        assert build.changed is None
        assert "from scratch" in second.notes[0]
        second.write("fork.o")
        build.succeeded()
    for number in range(incremental.MOST_RENEWED + 1):
        (tree.path / f"{number}.c").touch()
        os.utime(tree.path / f"{number}.c", OLD)
    third = run()
    with third.held():
        assert third.made() == set()


def test_what_a_killed_run_wrote_is_removed(finished: Run, run: Callable[[], Run], tree: WorkTree) -> None:
    os.utime(finished.build.directory("obj") / "fork.o", OLD)
    (tree.path / "exit.c").write_text("int better;\n")
    second = run()
    with second.held():
        second.write("exit.o", "include/config/auto.conf")  # and no word of how it ended
    third = run()
    with third.held() as build:
        assert third.made() == {"fork.o", "include/config/auto.conf"}
        assert build.changed is None
        build.succeeded()
    assert (third.died, second.died) == (1, 0)


def test_what_was_edited_while_it_was_read_is_made_again(
    finished: Run, run: Callable[[], Run], tree: WorkTree
) -> None:
    """Edited, compiled and changed back: no id tells, and the object is newer than the file."""
    second = run()
    with second.held() as build:
        content = (tree.path / "fork.c").read_text()
        (tree.path / "fork.c").write_text("int other;\n")
        (tree.path / "fork.c").write_text(content)
        time.sleep(0.02)
        second.write("fork.o")
        build.failed(tree.snapshot())
    third = run()
    with third.held() as build:
        assert "fork.c" in build.renewed
        build.succeeded()
    with run().held() as build:
        assert build.renewed == {}


def test_one_step_at_a_time_uses_it(finished: Run, run: Callable[[], Run]) -> None:
    order: list[str] = []
    second, third = run(), run()
    inside, done = threading.Event(), threading.Event()

    def use() -> None:
        with second.held() as build:
            inside.set()
            done.wait(20)
            order.append("second")
            build.succeeded()

    thread = threading.Thread(target=use)
    thread.start()
    assert inside.wait(20)

    class Enough(Exception):
        pass

    def give_up() -> None:
        raise Enough

    with pytest.raises(Enough), third.held(give_up):
        pass
    done.set()
    with third.held():
        order.append("third")
    thread.join()
    assert order == ["second", "third"]


def test_other_inputs_have_another_directory() -> None:
    spec = {"inputs": {"source": {"key": "a"}, "headers": {"key": "h"}}, "environment": {"ROLE": "guest"}}
    name = incremental.identity(spec, "source")
    other_tree = {**spec, "inputs": {"source": {"key": "b"}, "headers": {"key": "h"}}}
    other_config = {**spec, "environment": {"ROLE": "host"}}
    other_input = {**spec, "inputs": {"source": {"key": "a"}, "headers": {"key": "i"}}}
    assert incremental.identity(other_tree, "source") == name
    assert len({name, *(incremental.identity(each, "source") for each in (other_config, other_input))}) == 3


def test_a_state_that_cannot_be_read_means_a_new_start(finished: Run, run: Callable[[], Run]) -> None:
    (finished.build.home / incremental.STATE).write_text("{")
    second = run()
    with second.held():
        assert second.made() == set()


def test_what_was_not_used_for_a_while_may_go(finished: Run, tmp_path: Path) -> None:
    assert incremental.unused(tmp_path / "local", time.time() - 60) == []
    assert incremental.unused(tmp_path / "local", time.time() + 60) == [finished.build.home]
