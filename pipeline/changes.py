"""Why a task is stale: the inputs that differ from those of its last result."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import history
from pipeline.action import Action
from pipeline.inputs import LOCAL
from pipeline.keys import Spec
from pipeline.project import Project
from pipeline.store import Result

#: Lines of a file's difference that are shown.
SHOWN = 12


@dataclass(frozen=True, slots=True)
class Change:
    """One input that moved: of which task, what it is, and the old and new value or lines."""

    task: str
    what: str
    detail: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The change for a terminal, its details indented."""
        return "\n".join([f"{self.task}: {self.what}", *(f"    {line}" for line in self.detail)])

    def to_json(self) -> dict[str, Any]:
        """The change as JSON data."""
        return asdict(self)


def since_last(project: Project, name: str, seen: set[str] | None = None) -> list[Change]:
    """Changes between the last result of an action and what it would be made of now.

    Upstream actions are followed: a change is reported once, for the action whose own input moved.
    """
    seen = set() if seen is None else seen
    if name in seen:
        return []
    seen.add(name)
    old = _last_spec(project, name)
    if old is None:
        return [Change(name, "never made here")]
    return list(_compare(project, name, old, seen))


def _last_spec(project: Project, name: str) -> Spec | None:
    action = project.graph[name]
    if action.place is not None and (manifest := project.artifacts.manifest(action)):
        return dict(manifest["spec"])
    result = _last_result(project, name)
    return result.spec if result else None


def _last_result(project: Project, name: str) -> Result | None:
    record = history.last(project.store, name)
    return project.store.lookup(record.key) if record else None


def _compare(project: Project, name: str, old: Spec, seen: set[str]) -> Iterator[Change]:
    action, new = project.graph[name], project.graph.specs[name]
    if old == new:
        yield from _damage(project, name)
        return
    if LOCAL in (old["kind"], new["kind"]):
        yield _other_tree(project, name, old, new)
        return
    for field in ("schema", "kind", "version", "arch", "capabilities", "outputs"):
        if old[field] != new[field]:
            detail = () if field == "outputs" else (f"was {old[field]}", f"is {new[field]}")
            what = "the locked packages" if field == "outputs" and action.kind == "packages" else field
            yield Change(name, f"{what} changed", detail)
    for field in ("environment", "parameters"):
        yield from _values(name, field, old[field], new[field])
    # steps that build from work trees have a script of their own; the work tree is what is told
    switched = _switched(project, action, old)
    if old["script"] != new["script"] and action.script and not switched:
        yield _file(project, name, action.script.origin, old["script"], action.script.content)
    for path in sorted({*old["files"], *new["files"]}):
        before, now = old["files"].get(path), new["files"].get(path)
        if before == now or switched:
            continue
        if now is None or before is None:
            origin = action.files[path].origin if now else path
            yield Change(name, f"{origin} was {'added' if now else 'removed'}")
        else:
            file = action.files[path]
            yield _file(project, name, file.origin, before["digest"], file.content)
    for path in sorted({*old["inputs"], *new["inputs"]}):
        before, now = old["inputs"].get(path), new["inputs"].get(path)
        if before == now:
            continue
        if before is None or now is None:
            yield Change(name, f"input {path} was {'added' if now else 'removed'}")
        elif before["key"] != now["key"]:
            yield from _upstream(project, action.inputs[path].action, before["key"], seen)
        else:
            yield Change(name, f"input {path} changed", (f"was {before}", f"is {now}"))
    if old["builder"] != new["builder"] and action.builder and old["builder"]:
        yield from _upstream(project, action.builder, old["builder"], seen)


def _switched(project: Project, action: Action, old: Spec) -> bool:
    """Whether an input is a work tree now and was none, or the other way round."""
    for path, used in action.inputs.items():
        before = project.store.lookup(old["inputs"].get(path, {}).get("key", ""))
        if before and (before.spec["kind"] == LOCAL) != (project.graph[used.action].kind == LOCAL):
            return True
    return False


def _other_tree(project: Project, name: str, old: Spec, new: Spec) -> Change:
    """A source that is a work tree, or was one; the files that differ, where both trees are known."""
    snapshot = project.graph[name].snapshot
    if snapshot is None:
        return Change(name, "is what is locked, and was a work tree", ())
    worktree, trees = snapshot.worktree, (old["parameters"]["tree"], new["parameters"]["tree"])
    source = new["parameters"]["name"]
    paths = worktree.changed(*trees, objects=project.cache / "git" / f"{source}.git" / "objects")
    what = "changed" if old["kind"] == new["kind"] else "is a work tree, and was what is locked"
    detail = (f"was {trees[0]}", f"is {trees[1]}") if paths is None else tuple(paths[:SHOWN])
    more = (f"... and {len(paths) - SHOWN} files more",) if paths and len(paths) > SHOWN else ()
    return Change(name, f"{worktree.path} {what}", detail + more)


def _upstream(project: Project, name: str, key: str, seen: set[str]) -> Iterator[Change]:
    """Changes of an upstream action since the result of that key."""
    if name in seen:
        return
    seen.add(name)
    result = project.store.lookup(key)
    if result is None:
        yield Change(name, "changed (its earlier result is no longer in the store)")
        return
    yield from _compare(project, name, result.spec, seen)


def _values(name: str, field: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            detail = (f"was {json.dumps(old.get(key))}", f"is {json.dumps(new.get(key))}")
            yield Change(name, f"{field} {key} changed", detail)


def _file(project: Project, name: str, origin: str, old_digest: str, content: bytes) -> Change:
    old = project.store.path(old_digest)
    if not old.is_file():
        return Change(name, f"{origin} changed")
    lines = difflib.unified_diff(
        old.read_text(errors="replace").splitlines(),
        content.decode(errors="replace").splitlines(),
        n=0,
        lineterm="",
    )
    shown = [line for line in list(lines)[2:] if not line.startswith("@@")]
    more = [f"... and {len(shown) - SHOWN} lines more"] if len(shown) > SHOWN else []
    return Change(name, f"{origin} changed", tuple(shown[:SHOWN] + more))


def _damage(project: Project, name: str) -> Iterator[Change]:
    """Nothing was asked for that was not there: has the product itself been touched?"""
    action = project.graph[name]
    if action.place is not None and not project.artifacts.current(action, project.graph.keys[name]):
        for difference in project.artifacts.verify(action):
            yield Change(name, f"{difference.path.relative_to(project.root)}: {difference.reason}")
