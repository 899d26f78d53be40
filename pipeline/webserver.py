"""A repository on a web server that takes files: PUT and DELETE, and COPY where the server speaks WebDAV.

nginx (`dav_methods PUT DELETE MKCOL COPY`), Apache and most object stores' gateways do. They write
what comes beside its place and rename it once it is whole.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from pipeline.destination import PATIENCE, SETTLE, Content, Renew, checked, leased
from pipeline.errors import UserError
from pipeline.files import digest_file

if TYPE_CHECKING:
    import requests

#: `user:password` for the server; else those in the address, else those in `~/.netrc`.
AUTH_VARIABLE = "VIRT_RT_PUBLISH_AUTH"
TIMEOUT = (10.0, 120.0)
"""Seconds to connect, and between two packets."""
ATTEMPTS, BACKOFF = 4, 0.5
THREADS = 4
CHUNK = 1 << 20
GONE = (404, 410)
METHODS = frozenset({"GET", "HEAD", "PUT", "DELETE", "COPY", "MKCOL"})

T = TypeVar("T")


class WebServer:
    """Every file is a request; those of one call go out side by side."""

    local = False

    def __init__(self, address: str, environ: Mapping[str, str] = os.environ, patience: float = PATIENCE,
                 settle: float = SETTLE) -> None:  # fmt: skip
        """`address` of the repository's root; `patience` and `settle`: see `leased`."""
        parts = urlsplit(address)
        host = parts.netloc.rpartition("@")[2]
        if not host or parts.query or parts.fragment:
            raise UserError(
                f"{parts.scheme}://{host}{parts.path} is not the address of a directory",
                "name a server and a path, and no more",
            )
        self.name = f"{parts.scheme}://{host}{parts.path}".rstrip("/")
        self._auth = _credentials(environ.get(AUTH_VARIABLE, ""))
        if self._auth is None and parts.username is not None:
            self._auth = unquote(parts.username), unquote(parts.password or "")
        self._patience, self._settle = patience, settle
        self._thread = threading.local()

    def read(self, path: str) -> bytes | None:
        """See `Destination`."""
        answer = self._ask("GET", path, accept=GONE)
        return None if answer.status_code in GONE else answer.content

    def contents(self, paths: Iterable[str]) -> dict[str, bytes | None]:
        """See `Destination`."""
        wanted = list(paths)
        return dict(zip(wanted, self._each(self.read, wanted), strict=True))

    def holds(self, names: Iterable[str]) -> bool:
        """See `Destination`: a directory answers to its name with a slash, be it that it may not be listed."""
        return any(
            self._ask("HEAD", path, accept=(301, 302, 307, 308, 403, *GONE)).status_code not in GONE
            for name in names
            for path in (name, f"{name}/")
        )

    def put(self, files: Mapping[str, Content]) -> list[str]:
        """See `Destination`."""

        def one(path: str) -> bool:
            content = files[path]
            if self._same(path, content):
                return False
            self._bring(path, content)
            return True

        written = self._each(one, files)
        return [path for path, new in zip(files, written, strict=True) if new]

    def copy(self, copies: Mapping[str, str]) -> None:
        """See `Destination`; a server without COPY gets the content again."""

        def one(path: str) -> None:
            source = copies[path]
            size = self._size(source)
            if size is None:
                raise UserError(f"{self.name} has lost {source}", "restore it from a copy of the repository")
            headers = {"Destination": self._url(path), "Overwrite": "T"}
            self._make_parents(path)
            answer = self._ask("COPY", source, headers=headers, accept=range(400, 600))
            if not (answer.ok and self._size(path) == size):
                self._bring(path, self._ask("GET", source).content)

        self._each(one, copies)

    def delete(self, paths: Iterable[str]) -> None:
        """See `Destination`."""
        self._each(lambda path: self._ask("DELETE", path, accept=GONE), list(paths))

    def locked(self) -> AbstractContextManager[Renew]:
        """See `Destination`."""
        return leased(self, self._patience, self._settle)

    # Requests -----------------------------------------------------------------------------------

    def _each(self, call: Callable[[str], T], paths: Iterable[str]) -> list[T]:
        """Results in order; the first error ends it all."""
        with ThreadPoolExecutor(THREADS) as pool:
            futures = [pool.submit(call, path) for path in paths]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _url(self, path: str) -> str:
        return f"{self.name}/{quote(checked(path.rstrip('/')), safe='/+~^=@')}" + "/" * path.endswith("/")

    def _ask(self, method: str, path: str, accept: Iterable[int] = (), **options: Any) -> requests.Response:
        """Send a request; statuses other than success and `accept` are refusals.

        Redirections are not followed: a PUT would arrive as a GET.
        """
        import requests

        url = self._url(path)
        try:
            answer = self._session().request(method, url, timeout=TIMEOUT, allow_redirects=False, **options)
        except requests.RequestException as error:
            raise _failed(method, url, error) from error
        if 200 <= answer.status_code < 300 or answer.status_code in accept:
            return answer
        raise _refused(method, url, answer)

    def _size(self, path: str) -> int | None:
        """In bytes; None when there is no such file."""
        answer = self._ask("HEAD", path, accept=GONE)
        length = answer.headers.get("Content-Length", "")
        if answer.status_code in GONE:
            return None
        return int(length) if length.isdigit() else -1

    def _same(self, path: str, content: Content) -> bool:
        """Whether a file is there with that content; read only when at least its size is right."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if self._size(path) != size:
            return False
        from requests import RequestException

        digest = hashlib.sha256()
        with self._ask("GET", path, stream=True) as answer:
            try:
                for chunk in answer.iter_content(CHUNK):
                    digest.update(chunk)
            except RequestException as error:
                raise _failed("GET", self._url(path), error) from error
        own = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else digest_file(content)
        return digest.hexdigest() == own

    def _bring(self, path: str, content: Content) -> None:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        for last in (False, True):
            with ExitStack() as stack:
                # small ones at once: requests would send an empty file in chunks
                whole = isinstance(content, bytes) or size <= CHUNK
                if isinstance(content, Path):
                    data: Any = content.read_bytes() if whole else stack.enter_context(content.open("rb"))
                else:
                    data = content
                answer = self._ask("PUT", path, data=data, accept=() if last else (403, 404, 409))
            if answer.ok:
                break
            self._make_parents(path)  # WebDAV proper makes no directory by itself
        found = self._size(path)
        if found != size:
            raise UserError(
                f"{self._url(path)} has {found} bytes after a PUT of {size}", "look at the server's log"
            )

    def _make_parents(self, path: str) -> None:
        """Make the directories of a file where the server has such; it may well know none."""
        for parent in reversed(PurePosixPath(path).parents[:-1]):
            self._ask("MKCOL", f"{parent}/", accept=range(300, 600))

    def _session(self) -> requests.Session:
        """This thread's session: `requests` promises no more than one thread per session."""
        import requests

        session: requests.Session | None = getattr(self._thread, "session", None)
        if session is None:
            from requests.adapters import HTTPAdapter
            from urllib3.util import Retry

            session = requests.Session()
            session.auth = self._auth
            # what is stored, as it is stored now: neither compressed on the way nor remembered by a proxy
            session.headers.update({"Accept-Encoding": "identity", "Cache-Control": "no-cache"})
            retry = Retry(
                total=ATTEMPTS,
                backoff_factor=BACKOFF,
                status_forcelist=(429, 500, 502, 503, 504),
                allowed_methods=METHODS,  # each of them may be sent twice
                raise_on_status=False,
            )
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            self._thread.session = session
        return session


def _credentials(value: str) -> tuple[str, str] | None:
    """`user:password` as a pair."""
    if not value:
        return None
    user, colon, password = value.partition(":")
    if not (user and colon):
        raise UserError(f"{AUTH_VARIABLE} is not user:password", "set it to both, or unset it")
    return user, password


def _failed(method: str, url: str, error: Exception) -> UserError:
    return UserError(
        f"{method} {url} failed: {error}", "check the network, the address and the server's certificate"
    )


def _refused(method: str, url: str, answer: requests.Response) -> UserError:
    hint = "look at the server's log"
    if answer.status_code in (401, 403):
        hint = (
            f"set {AUTH_VARIABLE} to user:password, or write them to ~/.netrc; and see what the server allows"
        )
    elif answer.status_code in (405, 501):
        hint = "the server takes no files there: nginx needs `dav_methods PUT DELETE MKCOL COPY`"
    elif 300 <= answer.status_code < 400:
        hint = f"use the address that it leads to: {answer.headers.get('Location', 'it names none')}"
    return UserError(f"{method} {url}: {answer.status_code} {answer.reason}", hint)
