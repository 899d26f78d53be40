"""What is known of the last time each step ran on this machine: how long it took, and for which key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import write_atomically
from pipeline.store import Store


@dataclass(frozen=True, slots=True)
class Record:
    """One step's last run: wall time in seconds, lines of its log, and the key it was for."""

    seconds: float
    lines: int
    key: str


def remember(store: Store, name: str, record: Record) -> None:
    """Keep the record of an action in the place of the one before."""
    data = {"seconds": round(record.seconds, 3), "lines": record.lines, "key": record.key}
    write_atomically(_path(store, name), json.dumps(data).encode())


def last(store: Store, name: str) -> Record | None:
    """The last run of an action's step, or None when it never ran here."""
    try:
        data = json.loads(_path(store, name).read_bytes())
        return Record(float(data["seconds"]), int(data["lines"]), str(data["key"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _path(store: Store, name: str) -> Path:
    return store.root / "history" / f"{name.replace('/', '_')}.json"
