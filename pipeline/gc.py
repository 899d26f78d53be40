"""What may leave the cache, and its leaving.

A result goes when no run has used it for some days, unless the checkout's own graph names it; then
go the blobs that no remaining result refers to, locks nobody holds, and builder images whose result
is gone. The store is had alone meanwhile: while any run uses it, nothing is removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline import incremental
from pipeline.engine import Engine, builder_image
from pipeline.errors import UserError
from pipeline.files import remove_tree
from pipeline.graph import Graph
from pipeline.store import Result, Store


@dataclass(frozen=True, slots=True)
class Freed:
    """What was removed, or would be.

    results, blobs  how many files of results and of content
    trees           how many unpacked source trees
    builds          how many build directories of work trees
    size            bytes that results and blobs took in the cache
    images          names of builder images
    note            why images were left alone, or empty
    """

    results: int
    blobs: int
    trees: int
    builds: int
    size: int
    images: tuple[str, ...]
    note: str


def collect(store: Store, graph: Graph, engine: Engine, unused_since: float, dry_run: bool) -> Freed:
    """Remove what was not used after `unused_since` (seconds since the epoch) and is not of `graph`.

    A `dry_run` removes nothing. Raises UserError when a run is using the store.
    """
    current = set(graph.keys.values())
    # what the graph names by digest it would only download again
    referred = {output.digest for action in graph for output in action.outputs}
    kept, unused = set(), []
    with store.alone():
        for path, key, result in store.results():
            if result and (key in current or path.stat().st_mtime > unused_since):
                kept.add(key)
                referred.update(_digests(result))
            else:
                unused.append(path)
        blobs = [path for path in store.blobs() if path.name not in referred]
        size = sum(path.stat().st_size for path in (*unused, *blobs))
        trees = [path for path in store.root.glob("trees/*") if path.name not in referred]
        builds = incremental.unused(store.root / "local", unused_since)
        if not dry_run:
            # results first: after a crash in between, what is left of them is garbage and not a lie
            for path in (*unused, *blobs):
                path.unlink()
            for directory in (*trees, *builds):
                remove_tree(directory)
            store.drop_free_locks()
        images, note = _collect_images(store, engine, {builder_image(key) for key in kept}, dry_run)
    return Freed(len(unused), len(blobs), len(trees), len(builds), size, images, note)


def _digests(result: Result) -> Iterator[str]:
    """Every blob that a result refers to."""
    yield from (blob.digest for blob, _ in result.outputs.values())
    yield from (blob.digest for blob in result.files.values())
    if result.log:
        yield result.log.digest


def _collect_images(
    store: Store, engine: Engine, kept: set[str], dry_run: bool
) -> tuple[tuple[str, ...], str]:
    """Remove this store's builder images but the `kept` ones; their names, and why some stayed."""
    removed = []
    try:
        for image in engine.builder_images(store.identity):
            if image not in kept:
                if not dry_run:
                    engine.remove_image(image)
                removed.append(image)
    except UserError as error:
        return tuple(removed), f"builder images were left alone: {error.message}"
    return tuple(removed), ""
