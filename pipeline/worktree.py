"""A developer's own git work tree: which tree it is, exactly, and whether it moved. Nothing is written into it.

    $XDG_CACHE_HOME/virt-rt/local/<id>/path     the work tree that this is about
    $XDG_CACHE_HOME/virt-rt/local/<id>/lock     held while the index is brought up to date
    $XDG_CACHE_HOME/virt-rt/local/<id>/git/     an index of our own, and the tree objects made of it
    $XDG_CACHE_HOME/virt-rt/local/<id>/builds/  see `pipeline.incremental`

What counts is what git would add: tracked files as they lie there, and untracked ones that are not ignored. The id is
what `git write-tree` says of them. The index is ours, and its attributes are neutral, so that the id stands for bytes
on the disk: no filter, no line ending and no bit of the user's index has a say. It remembers times of files, so only
what was touched is read again.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InternalError, UserError
from pipeline.files import file_lock

#: Attributes in info/ win over those in the tree: files are what lies on the disk.
_ATTRIBUTES = "* -text -ident -filter !working-tree-encoding\n"
#: A submodule in git's index.
_GITLINK = "160000"
#: What the kernel's Makefile takes for a build in its own tree, and then refuses to build anywhere else.
_BUILT_IN_PLACE = (".config", "include/config", "arch/*/include/generated")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A work tree at one moment.

    worktree   whose
    tree       git's id of its content
    signature  sha256 over what the file system says of every file: also tells of a change that was undone
    paths      files and links that count, relative
    """

    worktree: WorkTree
    tree: str
    signature: str
    paths: frozenset[str]


@dataclass(frozen=True, slots=True)
class WorkTree:
    """The work tree in the directory `path`; what is known of it is kept in `home`."""

    path: Path
    home: Path

    def snapshot(self) -> Snapshot:
        """What it is now; UserError when git does not know or submodules are in use."""
        self.home.mkdir(parents=True, exist_ok=True)
        with file_lock(self.home / "lock"):
            (self.home / "path").write_text(f"{self.path}\n")
            self._prepare()
            (self.home / "git/index.lock").unlink(
                missing_ok=True
            )  # of a git that was killed: the lock is ours
            paths, signature = self._present(sorted({*self._tracked(), *self._untracked()}))
            gone = set(self._own("ls-files", "-z").split("\0")) - set(paths) - {""}
            # what is gone first: a file may have become a directory
            if gone:
                self._own("update-index", "--force-remove", "-z", "--stdin", paths=gone)
            self._own("update-index", "--add", "--replace", "--info-only", "-z", "--stdin", paths=paths)
            # contents stay where they are: nothing but trees is written, and only into our repository
            tree = self._own("write-tree", "--missing-ok").strip()
        return Snapshot(self, tree, signature, frozenset(paths))

    def changed(self, old: str, new: str, *, objects: Path | None = None) -> list[str] | None:
        """Paths that differ between two trees, None when one is not known here; `objects` knows more of them."""
        extra = {"GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects)} if objects else {}
        done = self._run(
            ["diff-tree", "-r", "-z", "--name-only", "--no-renames", old, new], self._ours | extra
        )
        return None if done.returncode else [path for path in done.stdout.split("\0") if path]

    def require_clean(self) -> None:
        """Refuse a tree in which a kernel was built in place: its leftovers would get into other builds."""
        for pattern in _BUILT_IN_PLACE:
            for found in self.path.glob(pattern):
                raise UserError(
                    f"{self.path} was built in place: {found.relative_to(self.path)} is in the way of a build outside",
                    f"keep what you need of it, then: make -C {self.path} mrproper",
                )

    # What counts ------------------------------------------------------------------------------

    def _tracked(self) -> list[str]:
        """Every path of the user's index; a submodule that is checked out is refused, an empty one is nothing."""
        found = []
        for entry in filter(None, self._theirs("ls-files", "--stage", "-z").split("\0")):
            about, _, path = entry.partition("\t")
            if not about.startswith(_GITLINK):
                found.append(path)
            elif (self.path / path).is_dir() and any((self.path / path).iterdir()):
                raise UserError(
                    f"{self.path} has the submodule {path} checked out; what is in it cannot be told from here",
                    f"empty it: git -C {self.path} submodule deinit {path}",
                )
        return found

    def _untracked(self) -> list[str]:
        """Every untracked path that is not ignored; a repository inside is refused."""
        found = [
            path
            for path in self._theirs("ls-files", "--others", "--exclude-standard", "-z").split("\0")
            if path
        ]
        for path in found:
            if path.endswith("/"):
                raise UserError(
                    f"{self.path} has another repository in {path}",
                    "move it, or ignore it in .git/info/exclude",
                )
        return found

    def _present(self, paths: list[str]) -> tuple[list[str], str]:
        """Those of the paths that are files or links, and the signature of them all."""
        found, signature = [], hashlib.sha256()
        for path in paths:
            try:
                status = os.lstat(f"{self.path}/{path}")
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise UserError(f"{self.path}/{path}: {error.strerror}", "make it readable") from None
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
                continue
            fields = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            signature.update(os.fsencode(f"{path}\0{fields}\n"))
            found.append(path)
        return found, signature.hexdigest()

    # git --------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Make our repository, once."""
        repository = self.home / "git"
        if (repository / "info/attributes").is_file():
            return
        neutral = {
            name: value for name, value in self._ours.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")
        }
        done = self._run(["init", "-q", "--bare", "--template=", str(repository)], neutral)
        if done.returncode:
            raise InternalError(f"git init failed in {repository}: {_last(done.stderr)}", "")
        for name, value in (("core.bare", "false"), ("gc.auto", "0"), ("core.compression", "1")):
            self._own("config", name, value)
        (repository / "info").mkdir(exist_ok=True)
        (repository / "info/attributes").write_text(_ATTRIBUTES)

    @property
    def _ours(self) -> dict[str, str]:
        """Nobody's configuration, our repository, their work tree."""
        return {
            "GIT_DIR": str(self.home / "git"),
            "GIT_WORK_TREE": str(self.path),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_ATTR_NOSYSTEM": "1",
        }

    def _own(self, *command: str, paths: Iterable[str] = ()) -> str:
        done = self._run(command, self._ours, "".join(f"{path}\0" for path in paths))
        if done.returncode:
            raise UserError(
                f"{self.path} cannot be read: {_last(done.stderr)}", "mend that and run doit again"
            )
        return done.stdout

    def _theirs(self, *command: str) -> str:
        """Ask the user's repository, with the user's configuration (what is ignored); it is not written to."""
        options = ("-c", "core.fsmonitor=false", "-C", str(self.path))
        done = self._run([*options, *command], {"GIT_OPTIONAL_LOCKS": "0"})
        if done.returncode:
            raise UserError(
                f"git cannot read {self.path}: {_last(done.stderr)}", "mend that and run doit again"
            )
        return done.stdout

    def _run(
        self, command: Iterable[str], extra: Mapping[str, str], stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        return subprocess.run(
            ["git", *command],
            cwd=self.path,
            env=environment | {"LC_ALL": "C.UTF-8"} | dict(extra),
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            check=False,
        )


def open_tree(path: Path, local: Path) -> WorkTree:
    """The work tree at `path`, known below `local`; UserError when there is none, or only a part of one."""
    path = path.resolve()
    if not path.is_dir():
        raise UserError(f"there is no directory {path}", "name a git work tree")
    tree = WorkTree(path, local / hashlib.sha256(os.fsencode(path)).hexdigest()[:16])
    try:
        top = tree._theirs("rev-parse", "--show-toplevel").rstrip("\n")
    except UserError as error:
        raise UserError(
            f"{path} is no git work tree: {error.message.partition(': ')[2]}",
            f"make it one: git init {path}; what is in its .gitignore will not count",
        ) from None
    if Path(top) != path:
        raise UserError(f"{path} is a part of the work tree {top}", "name the whole of it")
    return tree


def _last(text: str) -> str:
    """The line of git's output that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    complaints = [line for line in lines if line.startswith(("fatal:", "error:"))]
    return (complaints or lines or ["no reason given"])[0].partition(": ")[2] or text.strip()
