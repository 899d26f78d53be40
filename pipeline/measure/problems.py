"""What stops a measurement, in one line and with its remedy; and the signal that ends one."""

from __future__ import annotations


class MeasureError(Exception):
    """Nothing can be measured so: the user's input or the machine is not what it must be; exit status 2."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class EndedError(BaseException):
    """A signal asks this program to end; `number` says which. No handler of ordinary errors takes it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number
