"""What a Debian suite offers, as apt sees it.

An `AptRoot` is apt with a state of its own: nothing of this machine's apt configuration or installed
packages counts, only the suite and its security archive, verified against Debian's keyring. It answers
what a set of packages needs and which source packages there are; it never installs or downloads
packages.
"""

import functools
import os
import re
import subprocess
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote

import msgspec

from pipeline.errors import InternalError, UserError
from pipeline.locks import LockedFile, LockedPackage, qualified
from pipeline.pool import Archives

UNSECURED = re.compile(
    r"(sid|unstable|experimental|.+-(backports|backports-sloppy|updates|proposed-updates))"
)
"""Suites without a security archive: those that are never released, and what is added to one that is."""
_URI = re.compile(r"^'(?P<url>[^']+)' (?P<file>\S+) (?P<size>\d+) SHA256:(?P<sha256>[0-9a-f]{64})$")

_CONFIGURATION = """\
Dir "{root}/";
Dir::Etc "etc/";
Dir::Etc::main "none";
Dir::Etc::parts "none.d";
Dir::Etc::sourcelist "sources.list";
Dir::Etc::sourceparts "none.d";
Dir::Etc::preferences "preferences";
Dir::Etc::preferencesparts "none.d";
Dir::Etc::trusted "none";
Dir::Etc::trustedparts "none.d";
Dir::State "state/";
Dir::State::status "{root}/state/status";
Dir::Cache "cache/";
APT::Architecture "{arch}";
APT::Architectures {{ {arches} }};
APT::Install-Recommends "false";
APT::Solver "internal";
APT::Sandbox::User "";
Acquire::ForceHash "SHA256";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::http::Timeout "20";
pkgCacheGen::ForceEssential ",";
"""


class Unresolvable(UserError):
    """apt finds no set of packages for a request; `output` is what it said."""

    def __init__(self, message: str, hint: str, output: str) -> None:
        """Keep apt's own words for whoever can make sense of them."""
        super().__init__(message, hint)
        self.output = output


class AptRoot:
    """apt for one suite and architecture, its state kept in `directory`.

    `foreign` are architectures whose packages can be asked for as `name:arm64`, to be installed beside those of `arch`;
    `extra` is the directory of a local flat repository whose packages are offered too (unsigned: we
    wrote it).
    """

    def __init__(
        self,
        directory: Path,
        suite: str,
        arch: str,
        archives: Archives,
        *,
        foreign: Sequence[str] = (),
        extra: Path | None = None,
    ) -> None:
        """Write apt's configuration; nothing is fetched yet."""
        self.directory = directory.resolve()
        self.suite = suite
        self.arch = arch
        self.arches = (arch, *foreign)
        self.archives = archives
        for name in ("etc/none.d", "state/lists/partial", "cache/archives/partial"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / "state/status").touch()
        (self.directory / "apt.conf").write_text(
            _CONFIGURATION.format(
                root=self.directory, arch=arch, arches=" ".join(f'"{each}";' for each in self.arches)
            )
        )
        (self.directory / "etc/sources.list").write_text("".join(self._sources_list(extra)))
        self.pin([])

    def _sources_list(self, extra: Path | None) -> Iterable[str]:
        signed = f"signed-by={self.archives.keyring}"
        suites = [("debian", self.suite)]
        if not UNSECURED.fullmatch(self.suite):
            suites.append(("debian-security", f"{self.suite}-security"))
        for archive, suite in suites:
            for kind, options in (("deb", f"arch={','.join(self.arches)} {signed}"), ("deb-src", signed)):
                yield f"{kind} [{options}] {self.archives.base}/{archive} {suite} main\n"
        if extra is not None:
            yield f"deb [trusted=yes] {extra.resolve().as_uri()} ./\n"

    def pin(self, keep: Iterable[tuple[str, str]], refuse: Iterable[tuple[str, str]] = ()) -> None:
        """Let some (name, version) pairs win over everything newer and others never be chosen."""
        pins = [*((name, version, 1001) for name, version in keep)]
        pins += [(name, version, -1) for name, version in refuse]
        stanzas = (
            f"Package: {name}\nPin: version {version}\nPin-Priority: {rank}\n" for name, version, rank in pins
        )
        (self.directory / "etc/preferences").write_text("\n".join(stanzas))

    def update(self) -> None:
        """Fetch the signed indexes; UserError when they are out of reach or not what was signed."""
        keyring = self.archives.keyring
        if not keyring.is_file():
            raise UserError(
                f"the keyring {keyring} is missing", "run: apt-get install debian-archive-keyring"
            )
        # Without the option, apt calls an index it could not renew a warning and goes on with the old one.
        done = self._run("apt-get", "update", "-q", "-o", "APT::Update::Error-Mode=any")
        if done.returncode:
            raise UserError(
                f"apt refused the indexes of {self.suite} at {self.archives.base}: {_said(done.stderr)}",
                "check the network, the clock and the mirror, then try again",
            )

    def resolve(self, request: Collection[str]) -> tuple[LockedPackage, ...]:
        """Return everything a root file system with the requested packages needs, sorted by name.

        Essential packages are included, recommended ones are not. Unresolvable (a UserError) when there
        is no answer.
        """
        wanted = [f"?essential?architecture({self.arch})", *sorted(request)]
        # Quieter still, apt would not say which dependencies are in the way.
        done = self._run("apt-get", "install", "--print-uris", "-q", "-y", "--", *wanted)
        if done.returncode:
            raise Unresolvable(
                f"apt cannot install what is asked for from {self.suite}: {_said(done.stderr, done.stdout)}",
                "correct the package list of the recipe, or its suite",
                done.stdout + done.stderr,
            )
        packages = (self._package(line) for line in done.stdout.splitlines() if line.startswith("'"))
        return tuple(sorted(packages, key=lambda package: package.name))

    def _package(self, line: str) -> LockedPackage:
        found = _uri(line)
        # apt's own name for the file, unlike the pool's, carries the epoch.
        name, version, arch = found["file"].removesuffix(".deb").split("_")
        if found["url"].startswith("file:") and not found["url"].startswith(f"{self.archives.base}/"):
            archive, path = "debian", found["url"].rpartition("/")[2]
        else:
            archive, path = self.archives.locate(found["url"])
        return msgspec.convert(
            {
                "name": qualified(name, arch, self.arch),
                "version": unquote(version),
                "arch": arch,
                "archive": archive,
                "path": path,
                "sha256": found["sha256"],
                "size": int(found["size"]),
            },
            LockedPackage,
        )

    def known(self) -> frozenset[str]:
        """Return the names of all packages the suite has."""
        return frozenset(self._query("apt-cache", "pkgnames").split())

    def stanzas(self, names: Iterable[str]) -> list[dict[str, str]]:
        """Return the index entries of all versions of these packages, field by field."""
        wanted = sorted(names)
        return _paragraphs(self._query("apt-cache", "show", "--", *wanted)) if wanted else []

    def sources(self, package: str) -> list[str]:
        """Return the versions of a source package, newest first; UserError when the suite has none."""
        done = self._run("apt-cache", "showsrc", "--only-source", "--", package)
        versions = {entry["Version"] for entry in _paragraphs(done.stdout) if entry.get("Package") == package}
        if not versions:
            raise UserError(
                f"{self.suite} has no source package {package}", "correct the name in recipes/sources.toml"
            )
        return sorted(versions, key=functools.cmp_to_key(compare), reverse=True)

    def source(self, package: str, version: str) -> tuple[LockedFile, ...]:
        """Return the files of one version of a source package: the .dsc and the tarballs."""
        asked = f"{package}={version}"
        done = self._run("apt-get", "source", "--only-source", "--print-uris", "-qq", "--", asked)
        if done.returncode:
            raise UserError(
                f"{self.suite} has no source package {package} {version}: {_said(done.stderr)}",
                "correct the version in recipes/sources.toml, or leave it out",
            )
        files = []
        for line in done.stdout.splitlines():
            if line.startswith("'"):
                found = _uri(line)
                archive, path = self.archives.locate(found["url"])
                fields = {
                    "archive": archive,
                    "path": path,
                    "sha256": found["sha256"],
                    "size": int(found["size"]),
                }
                files.append(msgspec.convert(fields, LockedFile))
        return tuple(files)

    def _query(self, *command: str) -> str:
        done = self._run(*command)
        if done.returncode:
            raise InternalError(f"{' '.join(command[:2])} failed: {_said(done.stderr)}")
        return done.stdout

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
        environment |= {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
        environment["APT_CONFIG"] = str(self.directory / "apt.conf")
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def compare(left: str, right: str) -> int:
    """Order two Debian versions: -1, 0 or 1."""
    if left == right:
        return 0
    done = subprocess.run(["dpkg", "--compare-versions", left, "lt", right], check=False)
    return -1 if done.returncode == 0 else 1


def _uri(line: str) -> dict[str, str]:
    found = _URI.match(line)
    if found is None:
        raise InternalError(f"apt named a file in a way we do not know: {line}")
    # apt shortens file:///x to file:/x.
    return found.groupdict() | {"url": re.sub(r"^file:/(?!/)", "file:///", found["url"])}


def _paragraphs(text: str) -> list[dict[str, str]]:
    """Read deb822 paragraphs; continued lines keep their newlines."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line[:1] in (" ", "\t"):
                fields[name] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            paragraphs.append(fields)
    return paragraphs


def _said(*outputs: str) -> str:
    """Return the first thing apt complained about, in one line."""
    lines: Sequence[str] = [
        line.strip() for output in outputs for line in output.splitlines() if line.strip()
    ]
    errors = [line for line in lines if line.startswith(("E:", "Err:"))]
    unmet = [line for line in lines if re.search(r" : (?:Pre-)?(?:Depends|Conflicts|Breaks): ", line)]
    chosen = unmet[:2] or errors[:2] or list(lines[-1:])
    return "; ".join(line.removeprefix("E: ") for line in chosen) or "no reason given"
