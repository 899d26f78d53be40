"""A step's log: written as it comes, split into lines for whoever watches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

#: Lines that are shown of a failed step, and of one that refused its input: there they are the message.
TAIL, REFUSAL = 20, 60


class StepLog:
    """An open log file. `lines` counts what was written; `watch` is given each line."""

    def __init__(self, path: Path, watch: Callable[[str], None]) -> None:
        """Begin the file anew."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.lines = 0
        self._file: IO[bytes] = path.open("wb")
        self._watch = watch
        self._rest = b""
        self._last: deque[str] = deque(maxlen=REFUSAL)

    def write(self, chunk: bytes) -> None:
        """Append output as it came, lines or parts of lines."""
        self._file.write(chunk)
        self._file.flush()
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        for raw in whole:
            self._line(raw)

    def _line(self, raw: bytes) -> None:
        text = raw.decode(errors="replace").rstrip()
        self.lines += 1
        self._last.append(text)
        self._watch(text)

    def tail(self, status: int) -> list[str]:
        """The last lines worth showing of a step that ended with `status`."""
        return list(self._last)[-(REFUSAL if status == 2 else TAIL) :]

    def close(self) -> None:
        """End the file; a line without an end counts as one."""
        if self._rest:
            self._line(self._rest)
            self._rest = b""
        self._file.close()
