"""The texts of a package: variables filled in, maintainer scripts, copyright and changelog.

Runs inside steps, standard library only.
"""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Iterable, Mapping
from typing import Any

#: Maintainer scripts by file name, and for the first argument of each (a shell pattern) the event that it means.
#: Debian's are told what happens (Debian Policy, 6.5), rpm's how many versions of the package there will be.
SCRIPTS: dict[str, dict[str, dict[str, str]]] = {
    "deb": {
        "preinst": {"install|upgrade": "unpacking"},
        "postinst": {"configure|abort-upgrade|abort-remove|abort-deconfigure": "configured"},
        "prerm": {"remove": "removing"},
        "postrm": {"remove": "removed", "purge": "purged"},
    },
    "rpm": {
        "preinst": {"[1-9]*": "unpacking"},
        "postinst": {"[1-9]*": "configured"},
        "prerm": {"0": "removing"},
        "postrm": {"0": "removed"},
        "posttrans": {"*": "settled"},
    },
}
#: What a description's lines may have, the blank before each included.
WIDTH = 79


class PackagingError(Exception):
    """The recipe asks for what is not there; one line that says what."""


def fill(text: str, variables: Mapping[str, Any]) -> str:
    """Put variables where `{{ name }}` or `{{ name.part }}` stands; `PackagingError` names one that there is not."""

    def value(found: re.Match[str]) -> str:
        here: Any = variables
        for part in found[1].split("."):
            if not isinstance(here, Mapping) or part not in here:
                known = ", ".join(sorted(variables))
                raise PackagingError(f"there is no variable {found[1]}; there are: {known}")
            here = here[part]
        return str(here)

    return re.sub(r"\{\{ ([a-z][A-Za-z0-9_.-]*) \}\}", value, text)


def fill_all(data: Any, variables: Mapping[str, Any]) -> Any:
    """`fill` for every text within JSON data."""
    if isinstance(data, str):
        return fill(data, variables)
    if isinstance(data, list):
        return [fill_all(each, variables) for each in data]
    if isinstance(data, Mapping):
        return {key: fill_all(each, variables) for key, each in data.items()}
    return data


def scripts(kind: str, bodies: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The maintainer scripts of a format by file name; `bodies` has the fragments of shell by event."""
    made = {}
    for name, events in SCRIPTS[kind].items():
        cases = "".join(
            f"{pattern})\n{''.join(bodies[event]).rstrip()}\n;;\n"
            for pattern, event in events.items()
            if event in bodies
        )
        if cases:
            made[name] = f'#!/bin/sh\nset -e\n\ncase "${{1:-}}" in\n{cases}esac\n'
    return made


def prose(text: str) -> str:
    """Paragraphs with their lines filled anew."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]
    return "\n\n".join(
        textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)
        for paragraph in paragraphs
    )


def changelog(name: str, version: str, change: str, maintainer: str, epoch: int) -> str:
    """A changelog of one entry in Debian's form (Debian Policy, 4.4); `epoch` in seconds."""
    date = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(epoch))
    return f"{name} ({version}) stable; urgency=medium\n\n  * {change}\n\n -- {maintainer}  {date}\n"


def copyright_text(
    name: str,
    held: Iterable[tuple[str, str, str]],
    texts: Iterable[tuple[str, str]],
    bundled: Iterable[Mapping[str, Any]],
) -> str:
    """What a package holds, of whom, and under which licences.

    `held` has what, its licence and its origin (or empty text); `texts` a heading and a licence's text; `bundled`
    packages of the distribution (`name`, `version`, `files`), whose licences are files beside this one. The package's
    own version is left out: dnf installs a newer version of a kernel beside the older one, and both then have this
    file.
    """
    lines = [name, "", "This package holds:", ""]
    for what, licence, origin in held:
        lines += [f"  {what}{f', from {origin}' if origin else ''}", f"    licence: {licence}"]
    for each in bundled:
        lines.append(f"  {', '.join(each['files'])} of {each['name']} {each['version']}")
        lines.append(f"    licence: libraries/{each['name']}.copyright beside this file")
    for heading, text in texts:
        lines += ["", "-" * WIDTH, heading, "", text.strip("\n")]
    return "\n".join(lines) + "\n"
