"""The mirror for a machine without network: everything that is locked, in the form it is fetched in.

    DIR/debian/pool/...           packages and source packages by their path in the archive
    DIR/debian-security/pool/...
    DIR/git/<source>.git          every pinned commit
    DIR/sources.lock  DIR/packages.lock

`VIRT_RT_MIRROR=DIR` makes a build use it. A plain web server may serve the directory when no source is
pinned to git: a shallow history cannot be fetched from one.
"""

from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import UserError
from pipeline.locks import PackagesLock, SourcesLock, dump_packages, dump_sources
from pipeline.pool import Pinned, fetch_all
from pipeline.sources import Sources


def write_mirror(
    target: Path, sources_lock: SourcesLock, packages_lock: PackagesLock, sources: Sources
) -> None:
    """Write or complete the mirror in `target`; what is there and right stays.

    Open sources are left out and said. Gone or UserError when something locked cannot be had.
    """

    def layout(pinned: Pinned) -> str:
        return f"{pinned.archive}/{pinned.path}"

    def bring(files: Iterable[Pinned], owner: str) -> None:
        fetch_all(files, target, sources.archives, owner=owner, layout=layout, local=sources.local)

    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is not a directory", "name a directory for the mirror")
    for locked in packages_lock.sets:
        sources.log(f"{locked.name}: {len(locked.packages)} packages")
        bring(locked.packages, locked.name)
    for entry in sources_lock.sources:
        if entry.is_open:
            sources.log(f"{entry.name}: left out, it is not pinned: {entry.reason}")
            continue
        bring(entry.files, entry.name)
        sources.fetch(entry)
        with sources.mirror(entry.name) as mirror:
            mirror.clone_to(target / "git" / f"{entry.name}.git", entry.commit)
        sources.log(f"{entry.name}: {entry.ref}")
    dump_sources(sources_lock, target / "sources.lock")
    dump_packages(packages_lock, target / "packages.lock")
