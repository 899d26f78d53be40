"""Release patterns: which of many refs is the highest version.

The order is that of releases, not of letters: numbers count as numbers (rt22 above rt9, 3.2.12 above
3.2.4), a further number is above none (6.12.1 above 6.12), a suffix is above none (6.12-rt1 above 6.12),
and candidates are below their release (6.12-rc7 below 6.12).
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

_TOKEN = re.compile(r"\d+|[A-Za-z]+")
_CANDIDATE = re.compile(r"(?<![a-z])(?:rc|alpha|beta|pre)(?![a-z])", re.IGNORECASE)
_END = (1, 0, "")


def highest(pattern: str, names: Iterable[str], exclude: Iterable[str] = ()) -> str | None:
    """Return the name of the highest version that matches `pattern`, or None.

    `pattern` and `exclude` are shell patterns (`release/*-kvm`); candidates (`-rc3`) count only when the
    pattern names them.
    """
    excluded = tuple(exclude)
    candidates_too = _CANDIDATE.search(pattern) is not None
    matching = [
        name
        for name in names
        if fnmatchcase(name, pattern)
        and not any(fnmatchcase(name, other) for other in excluded)
        and (candidates_too or not _CANDIDATE.search(name))
    ]
    return max(matching, key=order, default=None)


def order(name: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Return a sort key: the tokens of the name by kind and value; the name itself breaks ties."""
    return (*map(_rank, _TOKEN.findall(name)), _END), name


def _rank(token: str) -> tuple[int, int, str]:
    if token.isdigit():
        return 3, int(token), ""
    if _CANDIDATE.fullmatch(token):
        return 0, 0, token.lower()
    return 2, 0, token
