"""Which kind of place a user's DEST is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.destination import Destination
from pipeline.directory import Directory
from pipeline.errors import UserError
from pipeline.rsyncserver import RsyncServer
from pipeline.webserver import WebServer

#: As rsync has it: a colon before the first slash.
_REMOTE = re.compile(r"[^/:]+::?[^/]*.*", re.DOTALL)


def destination(address: str, environ: Mapping[str, str] = os.environ) -> Destination:
    """The destination of that address.

    `http://` and `https://` are web servers; `rsync://host/module/directory` and `host::module/directory` rsync's
    own servers; `host:directory` is reached by ssh; all else is a directory of this machine. UserError for another
    scheme, and for what ssh or rsync would take for an option.
    """
    if not address or address.startswith("-") or any(ord(c) < 32 for c in address):
        raise UserError(f"{address!r} is no destination", "name a directory, host:directory, or an address")
    scheme, separator, rest = address.partition("://")
    if separator:
        try:
            urlsplit(address)
        except ValueError as error:  # its message has nothing of the address
            raise UserError(f"this {scheme}:// address is none: {error}", "give scheme://host/path") from None
        if scheme in ("http", "https"):
            return WebServer(address, environ)
        if scheme == "rsync":
            if not re.fullmatch(r"[^/]+/[^/].*", rest):
                raise UserError(
                    f"{scheme}://{rest.rpartition('@')[2]} names no module", "rsync://host/module/directory"
                )
            return RsyncServer(address, environ)
        raise UserError(
            f"{scheme}:// is no way to publish", "use a directory, host:directory, rsync:// or https://"
        )
    if _REMOTE.fullmatch(address):
        return RsyncServer(address, environ)
    return Directory(Path(address).absolute())
