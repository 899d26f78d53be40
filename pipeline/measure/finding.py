"""What was held against a promise, and how that went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .reading import MalformedError
from .record import RecordError

#: A finding is about how something was measured, or about what was measured.
PROTOCOL, LIMIT = "protocol", "limit"


class WrongError(ValueError):
    """Something is not as promised."""


@dataclass(frozen=True)
class Finding:
    """One promise: `place` and `stage` are empty where it is about all of them; `kind` is PROTOCOL or LIMIT."""

    place: str
    stage: str
    name: str
    wanted: str
    got: str
    ok: bool
    kind: str


class Findings:
    """Findings about one place, in the order in which they were made."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.all: list[Finding] = []

    def tell(self, name: str, wanted: str, got: str, ok: bool, stage: str = "", kind: str = PROTOCOL) -> None:
        """Add one."""
        self.all.append(Finding(self.place, stage, name, wanted, got, ok, kind))

    def check(
        self, name: str, wanted: str, examine: Callable[[], str], stage: str = "", kind: str = PROTOCOL
    ) -> bool:
        """Add what `examine` gives; it raises when the promise is broken. Returns whether it was kept."""
        try:
            got, ok = examine(), True
        except (WrongError, MalformedError, RecordError) as error:
            got, ok = str(error), False
        except OSError as error:
            got, ok = f"cannot be read: {error}", False
        self.tell(name, wanted, got, ok, stage, kind)
        return ok
