"""What programs printed, read strictly: JSON that can mean one thing only, and CPU lists.

It stands alone: `pipeline.gate` takes it into steps, too.
"""

from __future__ import annotations

import json
import math
from typing import Any

#: No count, time or latency of any tool comes near it; beyond it, sums in other languages wrap around.
GREATEST = 2**63 - 1


class MalformedError(ValueError):
    """Something is missing, cut short or not of its form."""


def loads(text: str) -> Any:
    """JSON as RFC 8259 has it, each name of an object once, numbers finite and within 64 bits.

    Raises `MalformedError` for anything else, NaN and infinity included.
    """
    if not text.strip():
        raise MalformedError("empty")
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
    except MalformedError:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"no JSON, or cut short: {error}") from error


def parse_cpulist(text: str) -> tuple[int, ...]:
    """CPU numbers, ascending, of a list in the kernel's format (`0,2-3`); an empty list for empty text.

    Raises `MalformedError` for anything else, ranges that run backwards included.
    """
    cpus: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        first, dash, last = part.partition("-")
        if not _decimal(first) or (dash and not _decimal(last)):
            raise MalformedError(f"not a CPU list: {text.strip()!r}")
        span = range(int(first), int(last if dash else first) + 1)
        if not span:
            raise MalformedError(f"a range that runs backwards: {text.strip()!r}")
        cpus.update(span)
    return tuple(sorted(cpus))


def shown(cpus: Any) -> str:
    """CPU numbers for a reader: `1,2,3`."""
    return ",".join(map(str, cpus)) or "none"


def _decimal(text: str) -> bool:
    """Digits only, and no more than a CPU number has: a range of billions would take all memory."""
    return text.isascii() and text.isdecimal() and len(text) <= 5


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise MalformedError(f"{name} is there twice")
        content[name] = value
    return content


def _integer(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > GREATEST:
        raise MalformedError(f"a number out of all measure: {text[:30]}")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or abs(value) > GREATEST:
        raise MalformedError(f"a number out of all measure: {text[:30]}")
    return value


def _constant(text: str) -> Any:
    raise MalformedError(f"{text} is no number")
