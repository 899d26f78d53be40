"""Debian's pool: where locked files are fetched from, and fetching them.

A locked file is known by archive, path and sha256. `VIRT_RT_MIRROR` (a directory or a URL) takes the
place of Debian's servers: below it lie `debian/`, `debian-security/` and, for sources from git,
`git/<name>.git`, as `doit mirror` writes them. Whatever the server, a file counts only when its digest
is the locked one.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from pipeline.errors import UserError
from pipeline.files import digest_file
from pipeline.locks import LockedFile, LockedPackage

if TYPE_CHECKING:
    import requests

MIRROR_VARIABLE = "VIRT_RT_MIRROR"
DEBIAN = "http://deb.debian.org"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ARCHIVES = ("debian", "debian-security")
TIMEOUT = (10.0, 60.0)
"""Seconds to connect, and between two packets."""
ATTEMPTS = 4
CHUNK = 1 << 20

Pinned = LockedFile | LockedPackage
Local = Callable[[str], Path | None]
"""Finds a file that is already on this machine by its sha256."""

_thread = threading.local()


class Gone(UserError):
    """A locked file has left the archive (404 or 410); `hint` is the command that moves the lock."""


@dataclass(frozen=True, slots=True)
class Archives:
    """Where the archives are: the base URL that holds `debian/` and `debian-security/`, and their keyring.

    `mirror` is true when the base was chosen by the user, who may then offer git trees below it too.
    """

    base: str = DEBIAN
    keyring: Path = KEYRING
    mirror: bool = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Archives":
        """Return the archives that `VIRT_RT_MIRROR` chooses; UserError when it names nothing usable."""
        value = environ.get(MIRROR_VARIABLE, "").rstrip("/")
        if not value:
            return cls()
        if value.startswith(("http://", "https://", "file:///")):
            return cls(base=value, mirror=True)
        if "://" not in value and Path(value).is_dir():
            return cls(base=Path(value).resolve().as_uri(), mirror=True)
        raise UserError(
            f"{MIRROR_VARIABLE}={value} is neither a directory nor a http, https or file address",
            "set it to the directory that `doit mirror` wrote, or unset it",
        )

    def url(self, pinned: Pinned) -> str:
        """Return the address of a locked file."""
        return f"{self.base}/{pinned.archive}/{quote(pinned.path, safe='/+~:')}"

    def git_url(self, name: str) -> str | None:
        """Return where a mirror keeps the git tree of a source, or None without a mirror."""
        if not self.mirror:
            return None
        return f"{self.base}/git/{name}.git"

    def locate(self, url: str) -> tuple[str, str]:
        """Split an address below the base into archive and path (`url` backwards)."""
        for archive in ARCHIVES:
            prefix = f"{self.base}/{archive}/"
            if url.startswith(prefix):
                return archive, unquote(url.removeprefix(prefix))
        raise UserError(f"apt found {url}, which is not below {self.base}", "check the mirror's sources")


def fetch_all(
    files: Iterable[Pinned],
    directory: Path,
    archives: Archives,
    *,
    owner: str,
    layout: Callable[[Pinned], str] = lambda pinned: pinned.filename,
    local: Local = lambda sha256: None,
    done: Callable[[Pinned], None] = lambda pinned: None,
    threads: int = 8,
) -> list[Path]:
    """Bring locked files into `directory`, each where `layout` says; returns the paths in the same order.

    `owner` is the lock entry they belong to (`builder/kernel`, `linux-rt`). `local` is asked first, `done`
    told about every file that is in place. Raises Gone or UserError for the first file that cannot be had.
    """

    def one(pinned: Pinned) -> Path:
        dest = directory / layout(pinned)
        dest.parent.mkdir(parents=True, exist_ok=True)
        copy = local(pinned.sha256)
        url = archives.url(pinned) if copy is None else copy.as_uri()
        fetch_file(url, dest, pinned.sha256, pinned.size, owner=owner)
        done(pinned)
        return dest

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(one, pinned) for pinned in files]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def fetch_file(url: str, dest: Path, sha256: str, size: int, *, owner: str) -> None:
    """Bring one file to `dest`, verified and whole or not at all; a file that is there and right stays.

    `size` in bytes. Gone when the server no longer has it; UserError when it cannot be reached or sends
    other bytes.
    """
    if dest.is_file() and dest.stat().st_size == size and digest_file(dest) == sha256:
        return
    handle, name = tempfile.mkstemp(prefix=f".{dest.name[:100]}.", dir=dest.parent)
    os.close(handle)
    part = Path(name)
    try:
        if url.startswith("file://"):
            _copy(url, part, owner)
        else:
            _download(url, part, size, owner)
        got = digest_file(part)
        if got != sha256:
            raise UserError(
                f"{url} is not what {owner} locks: expected sha256 {sha256}, got {got}",
                f"try again later or from another mirror; if the lock is wrong: doit lock -u {owner}",
            )
        part.chmod(0o644)
        part.replace(dest)
    finally:
        part.unlink(missing_ok=True)


def answers(url: str) -> bool:
    """Tell whether the server still has a file; UserError when it says neither yes nor no."""
    if url.startswith("file://"):
        return _path(url).is_file()
    import requests

    try:
        response = _session().head(url, timeout=TIMEOUT, allow_redirects=True)
    except requests.RequestException as error:
        raise _unreachable(url, error) from error
    if response.status_code in (404, 410):
        return False
    if not response.ok:
        raise _unreachable(url, f"{response.status_code} {response.reason}")
    return True


def _path(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))


def _gone(url: str, owner: str) -> Gone:
    return Gone(f"{url}, locked for {owner}, has left the archive", f"run: doit lock -u {owner}")


def _unreachable(url: str, why: object) -> UserError:
    host = urlsplit(url).netloc
    return UserError(
        f"{url} cannot be fetched: {why}", f"check the network and proxy to {host}, then try again"
    )


def _copy(url: str, part: Path, owner: str) -> None:
    try:
        shutil.copyfile(_path(url), part)
    except FileNotFoundError:
        raise _gone(url, owner) from None


def _download(url: str, part: Path, size: int, owner: str) -> None:
    import requests

    why: object = ""
    for _ in range(ATTEMPTS):
        try:
            response = _session().get(url, stream=True, timeout=TIMEOUT)
        except requests.RequestException as error:
            raise _unreachable(url, error) from error
        with response:
            if response.status_code in (404, 410):
                raise _gone(url, owner)
            if not response.ok:
                raise _unreachable(url, f"{response.status_code} {response.reason}")
            try:
                with part.open("wb") as file:
                    for chunk in response.iter_content(CHUNK):
                        file.write(chunk)
            except (
                requests.RequestException
            ) as error:  # the connection broke half-way; connecting has its own retries
                why = error
                continue
        if part.stat().st_size >= size:
            return
        why = f"only {part.stat().st_size} of {size} bytes came"
    raise _unreachable(url, why)


def _session() -> "requests.Session":
    """Return this thread's session: `requests` promises no more than one thread per session."""
    import requests

    session: requests.Session | None = getattr(_thread, "session", None)
    if session is None:
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        session = requests.Session()
        # Bytes as they are stored: a server that compresses on the way would hide the locked ones.
        session.headers["Accept-Encoding"] = "identity"
        retry = Retry(
            total=ATTEMPTS,
            backoff_factor=0.5,
            status_forcelist=(429, 500, 502, 503, 504),
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        _thread.session = session
    return session
