"""Errors that say what is wrong and what to do about it.

Every error a person may see is a `VirtRtError`: `message` is one line of what is wrong, `hint` one line of
the remedy (empty when there is none). `exit_status` is what the process ends with.
"""

from typing import ClassVar


class VirtRtError(Exception):
    """Base of all errors of this project; not raised itself."""

    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        """Keep both lines for whoever prints them."""
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(VirtRtError):
    """The user's input or environment is wrong; the user can mend it."""

    exit_status: ClassVar[int] = 2


class InternalError(VirtRtError):
    """Our own fault."""

    exit_status: ClassVar[int] = 1


class RedError(VirtRtError):
    """What was proven is red; what the step made tells why, and is kept beside its log."""
