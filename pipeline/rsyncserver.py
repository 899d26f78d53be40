"""A repository on a server that is reached by rsync: over ssh (`host:directory`) or its own protocol.

rsync writes a file beside its place and renames it, so each appears whole; in which order the files of one
run appear is rsync's own business. So whatever has to be there before something else goes in an earlier run.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.destination import PATIENCE, SETTLE, Content, Renew, checked, leased
from pipeline.errors import UserError

#: Seconds without a byte after which a connection counts as dead, and for making one.
TIMEOUT, CONNECT = 120, 20
#: rsync's status when some files could not be transferred, as when the directory is not there.
PARTIAL = 23
#: Its status when a file went away while it looked, such as another publisher's lock.
VANISHED = 24
_ABSENT = re.compile(r" change_dir .* failed: No such file or directory \(2\)$")
#: Two publishers to a repository that is not there yet make its directory: rsync looks first, and is late then.
_MADE_MEANWHILE = re.compile(r"mkdir .* failed: File exists \(17\)$", re.MULTILINE)


class RsyncServer:
    """Every method is one run of rsync, and one connection."""

    local = False

    def __init__(self, address: str, environ: Mapping[str, str] = os.environ, patience: float = PATIENCE,
                 settle: float = SETTLE) -> None:  # fmt: skip
        """`address` as rsync has it; a password in an `rsync://` address is taken out of it.

        `patience` and `settle`: see `leased`.
        """
        # what is ours, secrets among it, is no business of rsync, ssh or what RSYNC_RSH names
        kept = {name: value for name, value in environ.items() if not name.startswith("VIRT_RT_")}
        self._environ = {**kept, "LC_ALL": "C"}
        if address.startswith("rsync://"):
            parts = urlsplit(address)
            if parts.password is not None:
                self._environ["RSYNC_PASSWORD"] = unquote(parts.password)
                host = parts.netloc.rpartition("@")[2]
                address = parts._replace(netloc=f"{parts.username}@{host}").geturl()
        self.name = address
        self._address = address.rstrip("/") + "/"
        self._daemon = address.startswith("rsync://") or "::" in address.partition("/")[0]
        self._patience, self._settle = patience, settle

    def read(self, path: str) -> bytes | None:
        """See `Destination`."""
        return self.contents([path])[path]

    def contents(self, paths: Iterable[str]) -> dict[str, bytes | None]:
        """See `Destination`."""
        wanted = list(paths)
        with _workshop() as directory:
            self._pull(wanted, directory)
            files = {path: directory / path for path in wanted}
            return {path: file.read_bytes() if file.is_file() else None for path, file in files.items()}

    def holds(self, names: Iterable[str]) -> bool:
        """See `Destination`."""
        listed = self._run("--dirs", "--list-only", self._address, absent_is_fine=True)
        # mode, size, date, time, name
        found = {line.split(maxsplit=4)[-1] for line in listed.splitlines() if line.strip()}
        return not found.isdisjoint(names)

    def put(self, files: Mapping[str, Content]) -> list[str]:
        """See `Destination`; contents are compared by checksum."""
        if not files:
            return []
        with _workshop() as directory:
            for path, content in files.items():
                target = directory / checked(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    target.write_bytes(content)
                    target.chmod(0o644)
                else:
                    target.symlink_to(content.resolve(strict=True))
            out = self._run(
                "-r", "--copy-links", "--checksum", "--out-format=%n", f"{directory}/", self._address
            )
        return [line for line in out.splitlines() if line in files]

    def copy(self, copies: Mapping[str, str]) -> None:
        """See `Destination`; rsync cannot copy on the server, so the files come here and go back."""
        if not copies:
            return
        with _workshop() as directory:
            self._pull(copies.values(), directory)
            missing = [source for source in copies.values() if not (directory / source).is_file()]
            if missing:
                raise UserError(
                    f"{self.name} has lost {missing[0]}", "restore it from a copy of the repository"
                )
            self.put({path: directory / source for path, source in copies.items()})

    def delete(self, paths: Iterable[str]) -> None:
        """See `Destination`: what rsync is told to bring and is not here goes there; the rest is left alone."""
        paths = [checked(path) for path in paths]
        if paths:
            with _workshop() as directory:
                only = _only(paths, directory.parent)
                self._run("-r", "--delete", *only, f"{directory}/", self._address, absent_is_fine=True)

    def locked(self) -> AbstractContextManager[Renew]:
        """See `Destination`."""
        return leased(self, self._patience, self._settle)

    def _pull(self, paths: Iterable[str], directory: Path) -> None:
        """Bring what there is of these files."""
        only = _only([checked(path) for path in paths], directory.parent)
        self._run("-r", *only, self._address, f"{directory}/", absent_is_fine=True)

    def _run(self, *arguments: str, absent_is_fine: bool = False, again: bool = False) -> str:
        """rsync's output; `absent_is_fine` for a directory that is not there yet.

        What fails since another publisher made the same directory in that moment is run once more (`again`).
        """
        command = ["rsync", "--protect-args", f"--timeout={TIMEOUT}"]
        if self._daemon:
            # a greeting would be taken for a listing
            command += [f"--contimeout={CONNECT}", "--no-motd"]
        elif "RSYNC_RSH" not in self._environ:
            # nobody is there to answer a question
            command.append(f"--rsh=ssh -oBatchMode=yes -oConnectTimeout={CONNECT}")
        try:
            done = subprocess.run(
                [*command, *arguments],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except FileNotFoundError:
            raise UserError("rsync is missing here", "install it: apt-get install rsync") from None
        if done.returncode == 0:
            return done.stdout
        said = [line for line in done.stderr.splitlines() if line.strip()]
        failed = [line for line in said if " failed: " in line]
        if _MADE_MEANWHILE.search(done.stderr) and not again:
            return self._run(*arguments, absent_is_fine=absent_is_fine, again=True)
        absent = bool(failed) and all(_ABSENT.search(line) for line in failed)
        if absent_is_fine and (done.returncode == VANISHED or (absent and done.returncode == PARTIAL)):
            return done.stdout
        raise UserError(
            f"rsync to {self.name} ended with {done.returncode}: {said[0] if said else 'it said nothing'}",
            f"try it by hand: rsync --list-only {self.name}",
        )


def _only(paths: Iterable[str], directory: Path) -> list[str]:
    """rsync's options for these files and nothing else; the list of them is written to `directory`."""
    parents = {f"/{parent}/" for path in paths for parent in list(Path(path).parents)[:-1]}
    filters = [f"+ {each}" for each in sorted(parents | {f"/{path}" for path in paths})] + ["- *"]
    (directory / "filters").write_text("\n".join(filters) + "\n")
    return [f"--filter=merge {directory}/filters"]


@contextmanager
def _workshop() -> Iterator[Path]:
    """A directory whose mode may be passed on to a server's new directory."""
    with tempfile.TemporaryDirectory(prefix="virt-rt-publish-") as name:
        directory = Path(name) / "tree"
        directory.mkdir(mode=0o755)
        yield directory
