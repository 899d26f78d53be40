"""qemu's control socket: commands and their answers (QMP, one JSON object a line)."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import InternalError, VirtRtError

#: Seconds that an answer may take.
ANSWER = 30.0
#: Length of a socket's path in Linux, bytes (unix(7)), without the closing zero.
LONGEST = 107


class ClosedError(VirtRtError):
    """qemu closed the socket: it has ended, or is about to."""


class Control:
    """A connection to a qemu that listens at a Unix socket; a context manager."""

    def __init__(self, path: Path, alive: Callable[[], bool], patience: float = ANSWER) -> None:
        """Connect, waiting for the socket up to `patience` seconds, and while qemu is `alive`; else `ClosedError`."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER)
        until = time.monotonic() + patience
        while True:
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if not alive() or time.monotonic() > until:
                    self._socket.close()
                    what = f"qemu does not answer at {path}: {error}" if alive() else "qemu ended at once"
                    raise ClosedError(what) from None
                time.sleep(0.02)
        self._lines = self._socket.makefile("rwb")
        self._hear()  # the greeting
        self.ask("qmp_capabilities")

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def ask(self, command: str, **arguments: Any) -> Any:
        """What qemu answers to a command; `ClosedError` when it is gone, `InternalError` when it refuses."""
        asked = {"execute": command, "arguments": arguments, "id": command}
        try:
            self._lines.write(json.dumps(asked).encode() + b"\n")
            self._lines.flush()
        except OSError as error:
            raise ClosedError(f"qemu is gone: {error}") from None
        while (answer := self._hear()).get("id") != command:
            pass  # events come whenever they like
        if "error" in answer:
            raise InternalError(f"qemu refused {command}: {answer['error'].get('desc', answer['error'])}")
        return answer["return"]

    def _hear(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
            heard = json.loads(line) if line else None
        except (OSError, ValueError) as error:
            raise ClosedError(f"qemu is gone: {error}") from None
        if not isinstance(heard, dict):
            raise ClosedError("qemu closed its control socket")
        return heard
