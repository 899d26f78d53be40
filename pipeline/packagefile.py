"""One deb or rpm file: what a repository's indexes say of it, read once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import UserError
from pipeline.files import digest_file

Format = Literal["deb", "rpm"]
#: Below the directory of an rpm repository.
RPM_DIRECTORY = "Packages"


@dataclass(frozen=True, slots=True)
class Package:
    """A package file.

    version  as its package manager shows it: `0.1.0+g0123456789ab`, of an rpm with `-<release>`
    arch     in the format's own words: `amd64` or `all`, `x86_64` or `noarch`
    file     the file's name
    size     in bytes
    sha256   of the whole file, hex
    record   what the index says of it. deb: {"control": its control file}; rpm: {"primary", "filelists", "other"},
             an XML element each, in which the file is at `Packages/<file>`
    """

    format: Format
    name: str
    version: str
    arch: str
    file: str
    size: int
    sha256: str
    record: dict[str, str]


def examine(path: Path) -> Package:
    """Read a package file (`*.deb` or `*.rpm`); `UserError` when it is none."""
    readers = {".deb": _deb, ".rpm": _rpm}
    if path.suffix not in readers:
        raise UserError(f"{path} is neither a deb nor an rpm", "leave it out")
    return readers[path.suffix](path)


def _deb(path: Path) -> Package:
    from debian.arfile import ArError  # a run that makes nothing does without
    from debian.deb822 import Deb822
    from debian.debfile import DebError, DebFile

    try:
        with DebFile(str(path)) as opened:
            control = opened.control.get_content("control", encoding="utf-8")
        if not isinstance(control, str):
            raise DebError("no control file")
        fields = Deb822(control)
        name, version, arch = (fields[key] for key in ("Package", "Version", "Architecture"))
    except (ArError, DebError, KeyError, ValueError, EOFError, OSError) as error:
        raise _damaged(path, error) from None
    # without empty fields, which no index may have, and in one form whatever packed it
    lines = [line.rstrip() for line in control.strip().splitlines() if line.strip()]
    stanza = "\n".join(
        line
        for line, following in zip(lines, [*lines[1:], ""], strict=True)
        if not line.endswith(":") or line[0].isspace() or following[:1].isspace()
    )
    size, digest = path.stat().st_size, digest_file(path)
    return Package("deb", name, version, arch, path.name, size, digest, {"control": f"{stanza}\n"})


def _rpm(path: Path) -> Package:
    import createrepo_c  # a run that makes nothing does without

    try:
        package = createrepo_c.package_from_rpm(
            str(path), createrepo_c.SHA256, location_href=f"{RPM_DIRECTORY}/{path.name}"
        )
    except (createrepo_c.CreaterepoCError, OSError) as error:
        raise _damaged(path, error) from None
    package.time_file = package.time_build  # the file's own time is when it was copied here
    primary, filelists, other = createrepo_c.xml_dump(package)
    return Package(
        "rpm",
        package.name,
        f"{package.version}-{package.release}",
        package.arch,
        path.name,
        package.size_package,
        package.pkgId,
        {"primary": primary, "filelists": filelists, "other": other},
    )


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is no whole {path.suffix[1:]}: {error}", "get it again from its source")
