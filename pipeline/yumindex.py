"""What dnf reads of a repository: repodata, made with createrepo_c from records that were taken before."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.sax.saxutils import quoteattr

from pipeline.packagefile import RPM_DIRECTORY, Package
from pipeline.releaserecipe import RepositoryRecipe

REPODATA = "repodata"
#: rpm's word for packages that fit every architecture.
ALL = "noarch"
_LOCATION = '<location href="'


def architectures(packages: Iterable[Package]) -> list[str]:
    """The architectures that have a repository: those of the packages, and `noarch` only where there is no other."""
    found = {package.arch for package in packages}
    return sorted(found - {ALL} or found)


def rpm_path(package: Package) -> str:
    """Where an rpm is, relative to the directory of its channel and architecture."""
    return f"{RPM_DIRECTORY}/{package.file}"


def fitting(packages: Iterable[Package], arch: str) -> list[Package]:
    """The packages of an architecture, those that fit every one included, in the order in which they are listed."""
    found = [package for package in packages if package.arch in (arch, ALL)]
    return sorted(found, key=lambda p: (p.name, p.version, p.arch, p.sha256))


def repodata(packages: Sequence[Package], date: int, base: str = "") -> tuple[bytes, dict[str, bytes]]:
    """`repomd.xml`, and the files it names, by name (each begins with its own sha256).

    `packages` are those of `fitting`; `date` is in seconds since 1970. With `base`, an address, packages are found
    there, and not beside the directory of these files.
    """
    import createrepo_c as cr  # a run that makes nothing does without

    with tempfile.TemporaryDirectory() as directory:
        repomd = cr.Repomd()
        repomd.set_revision(str(date))
        kinds = (
            ("primary", cr.PrimaryXmlFile),
            ("filelists", cr.FilelistsXmlFile),
            ("other", cr.OtherXmlFile),
        )
        files = {}
        for kind, writer in kinds:
            path = Path(directory) / f"{kind}.xml.gz"
            # gzip is what every dnf and yum in use can read
            with_counts = cr.ContentStat(cr.SHA256)
            out = writer(str(path), cr.GZ_COMPRESSION, with_counts)
            out.set_num_of_pkgs(len(packages))
            for package in packages:
                chunk = package.record[kind]
                if base and kind == "primary":
                    chunk = chunk.replace(_LOCATION, f'<location xml:base={quoteattr(base)} href="', 1)
                out.add_chunk(chunk)
            out.close()
            record = cr.RepomdRecord(kind, str(path))
            record.load_contentstat(with_counts)
            os.utime(path, (date, date))  # where the record takes its time from; its own setter ends in 2038
            record.fill(cr.SHA256)
            record.rename_file()
            repomd.set_record(record)
            made = Path(record.location_real)
            files[made.name] = made.read_bytes()
        return repomd.xml_dump().encode(), files


def client(recipe: RepositoryRecipe, channel: str, note: str = "") -> bytes:
    """A client's `.repo` file."""
    comment = f"# {note}\n" if note else ""
    return (
        f"{comment}[virt-rt-{channel}]\n"
        f"name={recipe.description} ({channel})\n"
        f"mirrorlist={recipe.url}/yum/{channel}/$basearch/mirrorlist\n"
        f"gpgkey={recipe.url}/key.asc\n"
        "gpgcheck=1\nrepo_gpgcheck=1\nenabled=1\n"
    ).encode()
