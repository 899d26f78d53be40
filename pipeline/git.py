"""One bare git repository per source, where everything that a build uses of it lies.

Trees come in from a git origin (one commit, no history) or from an unpacked directory, are patched, and
go out as tar archives. All of it happens on objects: no work tree, no attributes or configuration of
user, machine or tree have a say, so the same origin gives the same tree id and the same bytes
everywhere.
"""

import contextlib
import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from pipeline.errors import InternalError, UserError

EPOCH = 946684800
"""The date of every commit and archive made here: 2000-01-01 00:00 UTC."""
NETWORK_TIMEOUT = 1800.0
"""Seconds in which a fetch must end; a stalled one ends sooner (see `_NETWORK`)."""
LIST_TIMEOUT = 30.0
"""Seconds in which an origin must list its refs."""
_NETWORK = ("-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=30")
# Attributes in info/ win over those in the tree: files are what their authors committed, all of them.
_ATTRIBUTES = "* -text -ident -filter !working-tree-encoding -export-ignore -export-subst\n"
_IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "virt-rt"), ("EMAIL", "virt-rt@localhost"), ("DATE", f"{EPOCH} +0000"))
}
_FAILED = re.compile(r"^error: patch failed: (?P<file>.+):(?P<line>\d+)$", re.MULTILINE)


class NoAnswer(Exception):
    """An origin does not answer; the text says why, in one line."""


class Mirror:
    """The bare repository at `path`; made when it is not there."""

    def __init__(self, path: Path) -> None:
        """Make the repository ready."""
        self.path = path.resolve()
        if not (self.path / "HEAD").is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            self._git("init", "-q", "--bare", "--template=", str(self.path))
            # Nothing else points at patched trees, so nothing may be collected; big trees import faster.
            for name, value in (("gc.auto", "0"), ("core.compression", "1"), ("tar.umask", "0022")):
                self._git("config", name, value)
        attributes = self.path / "info/attributes"
        attributes.parent.mkdir(exist_ok=True)
        if not attributes.is_file() or attributes.read_text() != _ATTRIBUTES:
            attributes.write_text(_ATTRIBUTES)

    def sweep(self) -> None:
        """Remove what a killed fetch or import left behind; for whoever has the repository to himself."""
        for left in (*self.path.glob("objects/pack/tmp_*"), *self.path.glob("*.lock")):
            left.unlink()

    def has(self, commit: str) -> bool:
        """Tell whether a commit is here, as something that was fetched completely."""
        return self._ask("rev-parse", "--verify", "-q", f"refs/locked/{commit}^{{commit}}") == commit

    def tree(self, commit: str) -> str:
        """Return the id of a commit's tree."""
        return self._git("rev-parse", "--verify", f"{commit}^{{tree}}").strip()

    def fetch_ref(self, url: str, ref: str) -> str:
        """Fetch the commit that a ref of a remote points at, and return its id; NoAnswer when that fails."""
        refspec = f"+{ref}:refs/incoming"
        self._remote("fetch", "-q", "--depth=1", "--no-tags", "--", url, refspec, timeout=NETWORK_TIMEOUT)
        return self._keep(self._git("rev-parse", "--verify", "refs/incoming^{commit}").strip())

    def fetch_commit(self, url: str, commit: str, refs: Sequence[str]) -> None:
        """Fetch one commit by its id, or by one of `refs` from a server that serves refs only.

        NoAnswer when neither gives that commit.
        """
        try:
            got = self.fetch_ref(url, commit)
        except NoAnswer:
            got = ""
            for ref in refs:
                try:
                    got = self.fetch_ref(url, ref)
                except NoAnswer:
                    continue
                break
            else:
                raise
        if got != commit:
            raise NoAnswer(f"{url} gives {got} where {commit} is locked: the ref was moved")

    def import_directory(self, directory: Path) -> str:
        """Bring in a directory's files and return the id of their tree.

        Only names, contents, symbolic links and the owner's execute bit count. Empty directories vanish, as
        always in git.
        """
        command = ["git", "fast-import", "--quiet", "--force", "--date-format=raw", "--depth=0"]
        with tempfile.TemporaryFile() as errors:
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=errors, stderr=errors, env=self._environment()
            ) as importer:
                assert importer.stdin is not None  # noqa: S101 - Popen's type cannot say so
                # A pipe that breaks is git giving up; its exit status tells.
                with contextlib.suppress(BrokenPipeError):
                    _write_commit(importer.stdin, directory)
            if importer.returncode:
                raise InternalError(f"git could not import {directory}: {_last(_text(errors))}")
        return self.tree("refs/incoming")

    def commit(self, tree: str, message: str) -> str:
        """Make a commit of a tree, the same id for the same message, and keep it."""
        commit = self._git("commit-tree", tree, "-m", message, extra=_IDENTITY).strip()
        return self._keep(commit)

    def _keep(self, commit: str) -> str:
        """Give a commit a name of its own, once all of it is here; what has none may be half."""
        self._git("update-ref", f"refs/locked/{commit}", commit)
        return commit

    def apply_patches(self, tree: str, patches: Sequence[Path]) -> str:
        """Return the tree that a tree becomes when patches are applied in order.

        UserError names the patch, the file and the hunk that does not fit.
        """
        if not patches:
            return tree
        with tempfile.TemporaryDirectory() as scratch:
            index = {"GIT_INDEX_FILE": f"{scratch}/index"}
            self._git("read-tree", tree, extra=index)
            for patch in patches:
                command = ["apply", "--cached", "--whitespace=nowarn", str(patch.resolve())]
                done = self._run(command, extra=index)
                if done.returncode:
                    raise UserError(*_misfit(patch, done.stderr))
            return self._git("write-tree", extra=index).strip()

    def export(self, tree: str, target: Path) -> None:
        """Write a tree as a zstd-compressed tar: entries as git sorts them, root's, dated `EPOCH`."""
        import zstandard

        commit = self._git("commit-tree", tree, "-m", "export", extra=_IDENTITY).strip()
        command = ["git", "archive", "--format=tar", commit]
        with tempfile.TemporaryFile() as errors, target.open("wb") as out:
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=self._environment()
            ) as archive:
                assert archive.stdout is not None  # noqa: S101 - Popen's type cannot say so
                zstandard.ZstdCompressor(level=3, threads=2).copy_stream(archive.stdout, out)
            if archive.returncode:
                raise InternalError(f"git could not export {tree}: {_last(_text(errors))}")

    def texts(self, tree: str, patterns: Sequence[str]) -> dict[str, str]:
        """The text files of a tree whose paths match one of the patterns, by path."""
        found: dict[str, list[str]] = {}
        for line in self._git("grep", "-zIE", "", tree, "--", *patterns).split("\n")[:-1]:
            place, _, text = line.partition("\0")
            found.setdefault(place.partition(":")[2], []).append(text)
        return {path: "\n".join(lines) + "\n" for path, lines in found.items()}

    def clone_to(self, target: Path, commit: str) -> None:
        """Write a plain bare repository that serves a commit."""
        copy = Mirror(target)
        refspec = f"+refs/locked/{commit}:refs/heads/locked/{commit}"
        # --update-shallow: otherwise git fetches the objects of a shallow history and makes no ref to them
        copy._git("fetch", "-q", "--no-tags", "--update-shallow", str(self.path), refspec)
        copy._git("symbolic-ref", "HEAD", f"refs/heads/locked/{commit}")
        # Fetches ask for the commit by its id.
        copy._git("config", "uploadpack.allowAnySHA1InWant", "true")
        copy._git("update-server-info")

    def refs(self, url: str) -> dict[str, str]:
        """Return the tags and branches of a remote, short name to full ref; NoAnswer when it is silent."""
        listed = self._remote(
            "ls-remote", "-q", "--tags", "--heads", "--refs", "--", url, timeout=LIST_TIMEOUT
        )
        found: dict[str, str] = {}
        for line in sorted(listed.splitlines(), key=lambda line: "\trefs/heads/" in line):
            full = line.partition("\t")[2]
            found.setdefault(full.split("/", 2)[2], full)  # a tag wins over a branch of the same name
        return found

    def _remote(self, *command: str, timeout: float) -> str:
        try:
            done = self._run([*_NETWORK, *command], neutral=False, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise NoAnswer(f"no answer within {timeout:.0f} s") from None
        if done.returncode:
            raise NoAnswer(_last(done.stderr))
        return done.stdout

    def _ask(self, *command: str, strip: bool = True) -> str | None:
        done = self._run(command)
        if done.returncode:
            return None
        return done.stdout.strip() if strip else done.stdout

    def _git(self, *command: str, extra: Mapping[str, str] | None = None) -> str:
        done = self._run(command, extra=extra)
        if done.returncode:
            raise InternalError(f"git {command[0]} failed in {self.path}: {_last(done.stderr)}")
        return done.stdout

    def _run(
        self,
        command: Sequence[str],
        *,
        extra: Mapping[str, str] | None = None,
        neutral: bool = True,
        timeout: float | None = None,
    ) -> subprocess.CompletedProcess[str]:
        environment = self._environment(neutral) | dict(extra or {})
        return subprocess.run(
            ["git", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=timeout,
            check=False,
        )

    def _environment(self, neutral: bool = True) -> dict[str, str]:
        """Return git's environment: nobody's configuration, except the user's own to reach remotes with."""
        kept = ("GIT_SSL_CAINFO", "GIT_SSL_CAPATH", "GIT_SSH", "GIT_SSH_COMMAND", "GIT_PROXY_COMMAND")
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in kept
        }
        environment |= {"GIT_DIR": str(self.path), "LC_ALL": "C.UTF-8", "GIT_TERMINAL_PROMPT": "0"}
        if neutral:
            environment |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
            environment |= {"GIT_ATTR_NOSYSTEM": "1", "XDG_CONFIG_HOME": os.devnull}
        else:
            environment |= {"GIT_ASKPASS": "true"}
            environment.setdefault("GIT_SSH_COMMAND", "ssh -o BatchMode=yes -o ConnectTimeout=10")
        return environment


def _write_commit(stream: IO[bytes], directory: Path) -> None:
    who = f"virt-rt <virt-rt@localhost> {EPOCH} +0000"
    # No parent: --force lets the ref move to a commit that does not descend from its last one.
    stream.write(b"reset refs/incoming\ncommit refs/incoming\n")
    stream.write(f"author {who}\ncommitter {who}\ndata 0\n\n".encode())
    for path, mode in _files(directory):
        content = os.fsencode(path.readlink()) if mode == "120000" else path.read_bytes()
        name = os.fsencode(path.relative_to(directory))
        quoted = name.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n")
        stream.write(b'M %s inline "%s"\ndata %d\n' % (mode.encode(), quoted, len(content)) + content + b"\n")
    stream.write(b"done\n")


def _files(directory: Path) -> Iterator[tuple[Path, str]]:
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = Path(entry.path)
            if entry.is_symlink():
                yield path, "120000"
            elif entry.is_dir(follow_symlinks=False):
                yield from _files(path)
            elif entry.is_file(follow_symlinks=False):
                yield path, "100755" if entry.stat(follow_symlinks=False).st_mode & stat.S_IXUSR else "100644"
            else:
                raise UserError(f"{path} is neither file, directory nor link", "take another version")


def _misfit(patch: Path, stderr: str) -> tuple[str, str]:
    hint = f"mend {patch}, or take it out of its directory"
    found = _FAILED.search(stderr)
    if found is None:
        return f"patch {patch.name} does not apply: {_last(stderr)}", hint
    hunk = _hunk(patch, found["file"], found["line"])
    return f"patch {patch.name} does not apply: {found['file']}, {hunk}", hint


def _hunk(patch: Path, target: str, line: str) -> str:
    """Name the hunk of a patch by its number within the target's part, and by its header."""
    number = 0
    inside = False
    for text in patch.read_text(encoding="utf-8", errors="replace").splitlines():
        if text.startswith("+++ ") or text.startswith("--- "):
            named = text[4:].split("\t")[0].partition("/")[2] == target
            inside = named or (inside and text.startswith("+++ "))
            number = 0
        elif inside and text.startswith("@@ "):
            number += 1
            if re.match(rf"@@ -{line}\b", text):
                return f"hunk {number} ({text.strip()})"
    return f"hunk at line {line}"


def _last(text: str) -> str:
    """Return the line of git's output that says most: its own complaint, or else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    complaints = [line for line in lines if line.startswith(("fatal:", "error:"))]
    return re.sub(r"^(fatal|error): ", "", (complaints or lines or ["no reason given"])[0])


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")
