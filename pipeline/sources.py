"""Sources: what the lock pins is brought, checked, patched and packed.

Every source has a bare repository below `mirrors`, whichever kind of origin it comes from, and a tree id
means the same files on every machine. Debian's source packages are unpacked with their patch series and
become one commit.
"""

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import file_lock, remove_tree
from pipeline.git import Mirror, NoAnswer
from pipeline.locks import LockedFile, SourceLock
from pipeline.pool import Archives, Local, fetch_all

RT_QUEUE = Path("debian/patches-rt")
"""Where Debian's kernel keeps the rest of the PREEMPT_RT queue."""


def bring(
    entry: SourceLock,
    patches: Sequence[Path],
    target: Path,
    mirrors: Path,
    scratch: Path,
    archives: Archives,
    log: Callable[[str], None],
    local: Local = lambda sha256: None,
) -> None:
    """Write the tree of a pinned source, with patches applied in order, as a zstd-compressed tar to
    `target`.

    Gone when Debian's files have left the archive, UserError when no origin has the commit, when it is
    not the locked tree, or when a patch does not apply.
    """
    sources = Sources(mirrors, scratch, archives, log, local)
    sources.fetch(entry)
    with sources.mirror(entry.name) as mirror:
        tree = mirror.apply_patches(entry.tree, patches)
        for patch in patches:
            log(f"applied {patch.name}")
        mirror.export(tree, target)


@dataclass(frozen=True, slots=True)
class Sources:
    """The repositories of all sources, and how they are filled.

    mirrors   directory of the bare repositories, `<source>.git`
    scratch   where source packages are unpacked; what is put there is removed again
    archives  where Debian's files come from
    log       is told what happens, a line each
    local     finds a Debian file that is on this machine already, by sha256
    """

    mirrors: Path
    scratch: Path
    archives: Archives
    log: Callable[[str], None]
    local: Local = lambda sha256: None

    @contextlib.contextmanager
    def mirror(self, name: str) -> Iterator[Mirror]:
        """Give the repository of a source, for one process and thread at a time."""
        self.mirrors.mkdir(parents=True, exist_ok=True)
        with file_lock(self.mirrors / f"{name}.lock"):
            mirror = Mirror(self.mirrors / f"{name}.git")
            mirror.sweep()
            yield mirror

    def has(self, entry: SourceLock) -> bool:
        """Tell whether a pinned commit is already here."""
        if not (self.mirrors / f"{entry.name}.git").is_dir():
            return False
        with self.mirror(entry.name) as mirror:
            return mirror.has(entry.commit)

    def holds(self, entry: SourceLock) -> bool:
        """Tell whether a pinned commit is already here, and is the tree that the entry says."""
        if not self.has(entry):
            return False
        with self.mirror(entry.name) as mirror:
            return mirror.tree(entry.commit) == entry.tree

    def fetch(self, entry: SourceLock) -> None:
        """Make sure that a pinned source is here and is the tree that was locked."""
        if not self.has(entry):
            if not self._fetch_git(entry) and entry.origin == "debian":
                imported = self.import_debian(entry.name, entry.ref, entry.series, entry.files)
                if imported != (entry.commit, entry.tree):
                    raise _tampered(entry, imported[1])
        with self.mirror(entry.name) as mirror:
            tree = mirror.tree(entry.commit)
        if tree != entry.tree:
            raise _tampered(entry, tree)

    def _fetch_git(self, entry: SourceLock) -> bool:
        """Fetch a commit from the user's mirror or from its origin; false when a mirror has it not."""
        urls = [url for url in (self.archives.git_url(entry.name),) if url is not None]
        if entry.origin == "git":
            urls.append(entry.location)
        reasons = []
        for url in urls:
            try:
                with self.mirror(entry.name) as mirror:
                    mirror.fetch_commit(
                        url, entry.commit, [f"refs/tags/{entry.ref}", f"refs/heads/{entry.ref}"]
                    )
            except NoAnswer as error:
                reasons.append(f"{url}: {error}")
                continue
            self.log(f"{entry.name}: fetched {entry.commit} from {url}")
            return True
        if entry.origin == "git":
            raise UserError(
                f"source {entry.name} {entry.ref} cannot be fetched: {'; '.join(reasons)}",
                f"check the network; if the origin has moved on, run: doit lock -u {entry.name}",
            )
        return False

    def import_debian(
        self, name: str, version: str, series: str, files: Sequence[LockedFile]
    ) -> tuple[str, str]:
        """Fetch the files of a source package, unpack it with a patch series and import it.

        `series` is `plain`, what Debian builds, or `rt`, the same with the RT queue on top. Returns
        commit and tree, which depend on the files and the series alone.
        """
        directory = Path(tempfile.mkdtemp(prefix="source-", dir=self.scratch))
        try:
            fetch_all(files, directory, self.archives, owner=name, local=self.local)
            self.log(f"{name}: unpacking {version}")
            unpacked = directory / "unpacked"
            _unpack(next(directory / file.filename for file in files if file.path.endswith(".dsc")), unpacked)
            (unpacked / "debian").rename(directory / "debian")
            remove_tree(unpacked / ".pc")
            queue = _queue(directory / RT_QUEUE, f"{name} {version}") if series == "rt" else []
            with self.mirror(name) as mirror:
                self.log(f"{name}: importing {version}")
                tree = mirror.apply_patches(mirror.import_directory(unpacked), queue)
                return mirror.commit(tree, f"{name} {version} ({series})"), tree
        finally:
            remove_tree(directory)


def _unpack(dsc: Path, target: Path) -> None:
    # Signature and checksums are not looked at again: every file has just been compared with the lock.
    command = ["dpkg-source", "--no-check", "--extract", str(dsc), str(target)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, cwd=dsc.parent
        )
    except FileNotFoundError:
        raise UserError("dpkg-source is missing", "run: apt-get install dpkg-dev") from None
    if done.returncode:
        why = [line for line in done.stderr.splitlines() if "error:" in line] or ["no reason given"]
        raise UserError(
            f"{dsc.name} cannot be unpacked: {why[0]}", "if the disk is full make room, then try again"
        )


def _queue(directory: Path, what: str) -> list[Path]:
    """Return the patches of a quilt series in order."""
    series = directory / "series"
    if not series.is_file():
        raise UserError(f"{what} has no {RT_QUEUE}", 'set series = "plain" in recipes/sources.toml')
    names = (line.split("#")[0].split() for line in series.read_text(encoding="utf-8").splitlines())
    return [directory / words[0] for words in names if words]


def _tampered(entry: SourceLock, tree: str) -> UserError:
    return UserError(
        f"recipes/sources.lock says that {entry.name} {entry.ref} is tree {entry.tree}, but it is {tree}",
        f"take the committed one back (git checkout -- recipes/sources.lock), or: doit lock -u {entry.name}",
    )
