"""What a person sees while steps run: live lines on a terminal, plain ones elsewhere."""

from __future__ import annotations

import re
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

from pipeline.action import Action
from pipeline.errors import VirtRtError
from pipeline.executor import StepFailed
from pipeline.history import Record

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

#: Seconds between two progress lines of one step where there is no terminal to draw on.
PLAIN_INTERVAL = 30.0
_COUNTED = re.compile(r"^\[\s*(\d+)/(\d+)\]")


def duration(seconds: float) -> str:
    """A length of time for people: `8 s`, `3 min 20 s`, `1 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    return f"{whole // 3600} h" + (f" {whole % 3600 // 60} min" if whole % 3600 // 60 else "")


@dataclass(slots=True)
class Running:
    """A step that runs: since when (monotonic seconds), and how far."""

    name: str
    last: Record | None
    since: float = field(default_factory=time.monotonic)
    lines: int = 0
    counted: tuple[int, int] | None = None
    said: float = field(default_factory=time.monotonic)

    def saw(self, text: str) -> None:
        """Count a line of the log; a build tool's own `[n/m]` is the better measure."""
        self.lines += 1
        found = _COUNTED.match(text)
        if found and int(found[2]):
            self.counted = int(found[1]), int(found[2])

    @property
    def fraction(self) -> float | None:
        """How far it is, 0 to 1, when that can be told."""
        if self.counted:
            return min(self.counted[0] / self.counted[1], 1.0)
        if self.last and self.last.lines > 20:
            return min(self.lines / self.last.lines, 0.99)
        return None

    @property
    def progress(self) -> str:
        """`42 %, 1 min 3 s, about 1 min 30 s to go`."""
        elapsed = time.monotonic() - self.since
        parts = [] if self.fraction is None else [f"{self.fraction:.0%}".replace("%", " %")]
        parts.append(duration(elapsed))
        left = self._left(elapsed)
        if left is not None:
            parts.append(f"about {duration(left)} to go" if left > 1 else "should end soon")
        return ", ".join(parts)

    def _left(self, elapsed: float) -> float | None:
        """Seconds still to go: by the share that is done once that says something, else by the last run."""
        if self.fraction and self.fraction > 0.1:
            return elapsed * (1 / self.fraction - 1)
        return self.last.seconds - elapsed if self.last else None


class Display:
    """Tells what happens; see `pipeline.executor.Observer`. Called from several threads."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        """`stream` is where to write, standard output by default."""
        self._stream = stream or sys.stdout
        self._running: dict[str, Running] = {}
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._console: Console | None = None
        self.built = self.restored = 0

    # Observer ---------------------------------------------------------------------------------

    def started(self, action: Action, last: Record | None) -> None:
        """A step begins."""
        with self._lock:
            self._running[action.name] = Running(action.name, last)
            if not self._terminal:
                before = f" (last time {duration(last.seconds)})" if last else ""
                self.say(f"[{action.name}] started: {action.summary}{before}")
        self._refresh()

    def line(self, action: Action, text: str) -> None:
        """A step wrote to its log."""
        with self._lock:
            running = self._running.get(action.name)
            if running is None:
                return
            running.saw(text)
            if not self._terminal and time.monotonic() - running.said > PLAIN_INTERVAL:
                running.said = time.monotonic()
                self.say(f"[{action.name}] {running.progress}")

    def finished(self, action: Action, how: str, seconds: float) -> None:
        """A result is there."""
        with self._lock:
            self._running.pop(action.name, None)
            self.built += how == "built"
            self.restored += how == "restored"
            self.say(f"[{action.name}] {how}" + (f" in {duration(seconds)}" if how == "built" else ""))
        self._refresh()

    def note(self, text: str) -> None:
        """Something worth knowing."""
        self.say(f"note: {text}")

    # For the face -----------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Print a line, above the live part where there is one."""
        with self._lock:
            if self._console is not None:
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=self._stream, flush=True)

    def failed(self, name: str, error: VirtRtError) -> None:
        """Show an error: what is wrong, a step's last lines, what to do."""
        with self._lock:
            self._running.pop(name, None)
            if isinstance(error, StepFailed):
                for text in error.tail:
                    self.say(f"  | {text}")
            self.say(f"error: {error.message}")
            if error.hint:
                self.say(f"  {error.hint}")

    def open(self) -> None:
        """Begin to draw, on a terminal."""
        if not self._terminal:
            return
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream)
        self._console = console
        live = Live(console=console, get_renderable=self._draw, refresh_per_second=4, transient=True)
        live.start()
        self._live = live

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = self._console = None

    @property
    def _terminal(self) -> bool:
        return self._stream.isatty()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def _draw(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        with self._lock:
            for running in self._running.values():
                bar = ProgressBar(total=1.0, completed=running.fraction or 0.0, width=20)
                table.add_row(Text(running.name, "bold"), bar, running.progress)
        return table
