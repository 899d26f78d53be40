"""Whether a repository is what its key signed: apt's and yum's indexes, the packages they list, and the state.

Each check returns a line for a person, and raises `UserError` on the first thing that is wrong. Nothing of the
project that wrote the repository is used to read its indexes: they are read as a client reads them.
"""

from __future__ import annotations

import lzma
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import digest_file, files_below
from pipeline.openpgp import verify_clearsigned, verify_detached

#: What is said of anything that does not fit.
REMEDY = "get the release again from its source; do not install this one"


def refused(what: str) -> UserError:
    """The error about something that is not as it should be."""
    return UserError(what, REMEDY)


def read(directory: Path, name: str) -> bytes:
    """A file below a directory by a relative path that came from elsewhere; `UserError` when there is none."""
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise refused(f"{name} leads out of {directory.name}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise refused(f"{name}: {(error.strerror or str(error)).lower()}") from None


def expect_file(directory: Path, name: str, size: int, sha256: str, by: str) -> Path:
    """Refuse a file that is not of that size and sha256; `by` is who says how it should be."""
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()) or not path.is_file():
        raise refused(f"{name}: {by} lists it, and it is not there")
    if path.stat().st_size != size or digest_file(path) != sha256:
        raise refused(f"{name} is not what {by} says")
    return path


# apt ------------------------------------------------------------------------------------------


def check_apt(repository: Path, public: bytes) -> str:
    """Every suite below `repository/apt`: signatures, indexes by every name, and packages both ways."""
    from debian.deb822 import Packages, Release  # only this command needs it

    apt = repository / "apt"
    suites = sorted(path.parent for path in apt.glob("dists/*/InRelease"))
    if not suites:
        raise refused("the repository has no apt/dists/*/InRelease")
    listed: set[str] = set()
    for suite in suites:
        text = verify_clearsigned(read(suite, "InRelease"), public)
        plain = read(suite, "Release")
        verify_detached(plain, read(suite, "Release.gpg"), public)
        if plain.splitlines() != text.splitlines():
            raise refused(f"{suite.name}: Release and InRelease differ")
        release = Release(text)
        indexes = {}
        for entry in release.get("SHA256", []):
            name, size, digest = entry["name"], int(entry["size"]), entry["sha256"]
            where = (suite / name).parent.relative_to(suite).as_posix()
            if (suite / name).exists():
                expect_file(suite, name, size, digest, "InRelease")
                indexes[name] = (suite / name).read_bytes()
            expect_file(suite, f"{where}/by-hash/SHA256/{digest}", size, digest, "InRelease")
        _refuse_unlisted(suite, set(indexes))
        packages = {name: text for name, text in indexes.items() if name.endswith("/Packages")}
        if not packages:
            raise refused(f"{suite.name}: InRelease lists no Packages")
        for name, content in packages.items():
            packed = indexes.get(f"{name}.xz")
            if packed is not None and lzma.decompress(packed) != content:
                raise refused(f"{suite.name}: {name} and {name}.xz differ")
            for stanza in Packages.iter_paragraphs(content, use_apt_pkg=False):
                expect_file(
                    apt, stanza["Filename"], int(stanza["Size"]), stanza["SHA256"], f"{name} of {suite.name}"
                )
                listed.add(stanza["Filename"])
    _refuse_extra(apt, ".deb", listed)
    return f"{', '.join(suite.name for suite in suites)}: signed; {len(listed)} packages are what the indexes say"


def _refuse_unlisted(suite: Path, listed: set[str]) -> None:
    """Refuse index files under their plain names that `InRelease` does not list."""
    entries = {"InRelease", "Release", "Release.gpg"}
    for name in sorted(files_below(suite)):
        if name not in listed and name not in entries and "/by-hash/" not in name:
            raise refused(f"{suite.name}: InRelease does not list {name}")


def _refuse_extra(directory: Path, suffix: str, listed: Iterable[str]) -> None:
    extra = {name for name in files_below(directory) if name.endswith(suffix)} - set(listed)
    if extra:
        raise refused(f"{min(extra)}: no index lists it")


# yum ------------------------------------------------------------------------------------------


def check_yum(repository: Path, public: bytes) -> str:
    """Every `repodata` below `repository/yum`: signature, metadata, and packages both ways."""
    import createrepo_c  # only this command needs it

    yum = repository / "yum"
    found = sorted(path.parent.parent for path in yum.rglob("repodata/repomd.xml"))
    if not found:
        raise refused("the repository has no yum/*/*/repodata/repomd.xml")
    listed: set[str] = set()
    for base in found:
        where = base.relative_to(repository).as_posix()
        verify_detached(read(base, "repodata/repomd.xml"), read(base, "repodata/repomd.xml.asc"), public)
        records = createrepo_c.Repomd(str(base / "repodata/repomd.xml")).records
        metadata = {}
        for record in records:
            metadata[record.type] = expect_file(
                base, record.location_href, record.size, record.checksum, f"repomd.xml of {where}"
            )
        if "primary" not in metadata:
            raise refused(f"{where}: repomd.xml lists no primary metadata")
        packages: list[Any] = []
        createrepo_c.xml_parse_primary(
            str(metadata["primary"]), pkgcb=packages.append, do_files=False, warningcb=lambda *_: True
        )
        # a generation's metadata is about the files of the channel beside it
        home = base.with_name(base.name.partition(".")[0])
        for package in packages:
            path = expect_file(
                home, package.location_href, package.size_package, package.pkgId, f"the index of {where}"
            )
            listed.add(path.relative_to(yum).as_posix())
    _refuse_extra(yum, ".rpm", listed)
    places = ", ".join(base.relative_to(yum).as_posix() for base in found)
    return f"{places}: signed; {len(listed)} packages are what the indexes say"


def check_rpms(repository: Path, public: bytes) -> str:
    """Every rpm has a good signature of the key, asked of rpm itself with a database of its own."""
    rpms = sorted(str(path) for path in repository.rglob("*.rpm"))
    if not rpms:
        raise refused("the repository has no rpm")
    with tempfile.TemporaryDirectory() as home:
        environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": home, "LC_ALL": "C"}

        def rpmkeys(*arguments: str) -> subprocess.CompletedProcess[str]:
            try:
                return subprocess.run(
                    ["rpmkeys", "--dbpath", f"{home}/db", *arguments],
                    env=environment, capture_output=True, text=True, check=False,
                )  # fmt: skip
            except FileNotFoundError:
                raise UserError("rpmkeys is not installed", "scripts/setup make installs it") from None

        (Path(home) / "key").write_bytes(public)
        imported = rpmkeys("--import", f"{home}/key")
        if imported.returncode:
            raise refused(f"rpm does not take the key: {imported.stderr.strip().splitlines()[-1:]}")
        done = rpmkeys("--checksig", *rpms)
    # an unsigned package is fine with rpmkeys: only the words tell
    good = {
        line.removesuffix(": digests signatures OK")
        for line in done.stdout.splitlines()
        if line.endswith(": digests signatures OK")
    }
    for rpm in rpms:
        if rpm not in good:
            raise refused(f"{Path(rpm).name} has no good signature of this key")
    if done.returncode:
        raise refused(f"rpmkeys ended with {done.returncode}")
    return f"{len(rpms)} rpms are signed"


def check_state(repository: Path, public: bytes, version: str, platform: str, packages: set[str]) -> str:
    """The repository's own state is signed, and lists this release with exactly these packages (sha256)."""
    from pipeline.repository import read_state

    def bring(path: str) -> bytes | None:
        return read(repository, path) if (repository / path).exists() else None

    state = read_state(bring, public)
    releases = [(channel, each) for channel, kept in state.releases.items() for each in kept]
    if [(each.platform, each.version) for _, each in releases] != [(platform, version)]:
        said = ", ".join(f"{each.platform} {each.version}" for _, each in releases) or "no release"
        raise refused(f"repository.json lists {said}, not {platform} {version} alone")
    channel, release = releases[0]
    if set(release.packages) != packages:
        raise refused("repository.json and release.json list different packages")
    return f"repository.json is signed and lists {platform} {version} in {channel}"
