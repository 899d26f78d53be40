"""What a package installs, from its recipe: files and trees of the inputs, filled files, licences, the changelog.

Runs inside steps, beside `bundle.py` and `packagetext.py`, standard library only.
"""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

try:
    from pipeline import bundle, packagetext
except ImportError:  # in the step their files lie beside this one
    import bundle  # type: ignore[import-not-found, no-redef]
    import packagetext  # type: ignore[import-not-found, no-redef]

#: Directories that are there before us on every system that takes packages; all others a package owns, so that an rpm
#: leaves none behind. Those of filesystem (Fedora, RHEL) and of systemd.
SYSTEM = frozenset(
    "/ /boot /etc /etc/default /etc/default/grub.d /etc/grub.d /etc/systemd /etc/systemd/system /etc/sysctl.d"
    " /etc/modprobe.d /opt /usr /usr/bin /usr/lib /usr/lib/kernel /usr/lib/kernel/install.d /usr/lib/modprobe.d"
    " /usr/lib/modules /usr/lib/sysctl.d"
    " /usr/lib/systemd /usr/lib/systemd/system /usr/libexec /usr/sbin /usr/share /usr/share/doc /usr/share/licenses"
    " /usr/share/man /usr/share/man/man1 /usr/share/man/man5 /usr/share/man/man8 /usr/src /var /var/lib".split()
)

#: Licence texts that Debian's copyright files only name, by their place in every Debian and nowhere else.
COMMON = Path("/usr/share/common-licenses")
COMMON_NAME = re.compile(rf"{COMMON}/([A-Z][A-Za-z0-9]*(?:-[0-9]+(?:\.[0-9]+)*)?)")


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that a package installs: a file from `source`, or a link to `link`, or neither: a directory."""

    to: str
    formats: tuple[str, ...]
    source: Path | None = None
    link: str = ""
    mode: int = 0o755

    def nfpm(self, kind: str) -> dict[str, Any]:
        """As nfpm reads it; `kind` is the format."""
        if self.link:
            return {"dst": self.to, "src": self.link, "type": "symlink", "file_info": {"mode": 0o777}}
        if self.source is None:
            return {"dst": self.to, "type": "dir", "file_info": {"mode": self.mode}}
        made = {"dst": self.to, "src": str(self.source), "file_info": {"mode": self.mode}}
        if self.to.startswith("/etc/"):
            made["type"] = "config|noreplace"
        elif kind == "rpm" and self.to.startswith("/usr/share/licenses/"):
            made["type"] = "license"
        elif kind == "rpm" and self.to.startswith(("/usr/share/doc/", "/usr/share/man/")):
            made["type"] = "doc"
        return made


@dataclass(slots=True)
class Contents:
    """The contents of one package.

    `inputs` and `work` are directories, `recipe` is filled, `variables` are for files that are not yet; `sources` says
    which version of each source it is, `changelog` is Debian's. After `entries`, `bundled` has the packages of the
    distribution of which files went in (`name`, `version`, `files`).
    """

    inputs: Path
    work: Path
    recipe: Mapping[str, Any]
    variables: Mapping[str, Any]
    sources: Mapping[str, str]
    changelog: str
    bundled: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The package's."""
        return str(self.recipe["name"])

    def entries(self) -> list[Entry]:
        """Everything that the package installs, sorted by place; no place twice in one format."""
        found = [entry for content in self.recipe["contents"] for entry in self._content(content)]
        if self.recipe["bundle"]:
            found = self._bundled(found, **self.recipe["bundle"])
        found = [*found, *self._papers()]
        taken: dict[tuple[str, str], Entry] = {}
        for entry in found:
            for kind in entry.formats:
                if not self._is_directory(entry) and (kind, entry.to) in taken:
                    raise packagetext.PackagingError(f"{entry.to} is installed twice")
                taken[kind, entry.to] = entry
        owned = {
            (kind, str(parent)): Entry(str(parent), (kind,))
            for kind, place in taken
            for parent in Path(place).parents
            if str(parent) not in SYSTEM
        }
        everything = {**owned, **taken}
        return [
            self._manual(replace(entry, formats=(kind,)))
            for (kind, place), entry in sorted(everything.items())
            if place not in SYSTEM
        ]

    @staticmethod
    def _is_directory(entry: Entry) -> bool:
        return entry.source is None and not entry.link

    def _content(self, content: Mapping[str, Any]) -> Iterator[Entry]:
        to, formats = content["to"].rstrip("/") or "/", tuple(content["formats"])
        if not to.startswith("/"):
            raise packagetext.PackagingError(f"contents: {to} is not a path from /")
        mode = int(content["mode"], 8) if content["mode"] else None
        if content["link"]:
            yield Entry(to, formats, link=content["link"])
        elif content["directory"]:
            yield Entry(to, formats, mode=mode or 0o755)
        elif content["file"]:
            yield Entry(to, formats, self.filled(content["file"]), mode=mode or 0o644)
        else:
            source = self.inputs / content["input"]
            if source.is_dir():
                yield from self._tree(source, to, formats, tuple(content["without"]))
            elif source.is_file():
                yield Entry(to, formats, source, mode=mode or _mode(source))
            else:
                raise packagetext.PackagingError(f"contents: there is no {content['input']} among the inputs")

    @staticmethod
    def _tree(source: Path, to: str, formats: tuple[str, ...], without: tuple[str, ...]) -> Iterator[Entry]:
        met = set()
        for directory, directories, files in os.walk(source):
            below = Path(directory).relative_to(source)
            for name in sorted([*directories, *files]):
                path, relative = Path(directory) / name, (below / name).as_posix()
                if relative in without:
                    met.add(relative)
                    if name in directories:
                        directories.remove(name)
                    continue
                place = f"{to.rstrip('/')}/{relative}"
                if path.is_symlink():
                    yield Entry(place, formats, link=str(path.readlink()))
                elif path.is_dir():
                    yield Entry(place, formats)
                else:
                    yield Entry(place, formats, path, mode=_mode(path))
        if unmet := set(without) - met:
            raise packagetext.PackagingError(
                f"contents: without: there is no {', '.join(sorted(unmet))} below {to}"
            )

    def filled(self, file: str) -> Path:
        """A file of the recipe with its variables filled in."""
        try:
            text = packagetext.fill((self.inputs / "recipes" / file).read_text(), self.variables)
        except packagetext.PackagingError as error:
            raise packagetext.PackagingError(f"{file}: {error}") from None
        return self.write(f"filled/{file}", text)

    def write(self, name: str, text: str) -> Path:
        """A file of the work directory."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def _bundled(self, entries: list[Entry], programs: list[str], libraries: str) -> list[Entry]:
        """`entries` with each program that lies at or below `programs` bundled, and its libraries."""
        chosen = {
            entry.to: entry
            for entry in entries
            if entry.source is not None
            and any(entry.to == place or entry.to.startswith(f"{place}/") for place in programs)
            and bundle.is_program(entry.source)
        }
        if not chosen:
            raise packagetext.PackagingError(f"bundle: no program is installed below {', '.join(programs)}")
        sources = {place: entry.source for place, entry in chosen.items() if entry.source is not None}
        made = bundle.bundle(sources, libraries, self.work / "bundle")
        formats = next(iter(chosen.values())).formats
        others = [entry for entry in entries if entry.to not in chosen]
        for package, files in sorted(made.owners.items()):
            self.bundled.append({"name": package, "version": made.versions[package], "files": sorted(files)})
        return others + [Entry(place, formats, path, mode=_mode(path)) for place, path in made.files.items()]

    def _papers(self) -> Iterator[Entry]:
        """Licences, and the changelog that Debian wants."""
        papers = {"copyright": self.write("copyright", self._copyright())}
        for library in self.bundled:
            papers[f"libraries/{library['name']}.copyright"] = bundle.licence(library["name"])
        for name, path in papers.items():
            yield Entry(f"/usr/share/doc/{self.name}/{name}", ("deb",), path, mode=0o644)
            yield Entry(f"/usr/share/licenses/{self.name}/{name}", ("rpm",), path, mode=0o644)
        named = {
            name for path in papers.values() for name in COMMON_NAME.findall(path.read_text(errors="replace"))
        }
        # GPL is a link to the latest; one copy of that will do.
        for path in sorted({(COMMON / name).resolve() for name in named}):
            if not path.is_file():
                raise packagetext.PackagingError(
                    f"licences: a copyright file names {path}, which is not there"
                )
            place = f"/usr/share/licenses/{self.name}/{COMMON.name}/{path.name}"
            yield Entry(place, ("rpm",), path, mode=0o644)
        log = self.work / "changelog.gz"
        log.write_bytes(_gzip(self.changelog.encode()))
        yield Entry(f"/usr/share/doc/{self.name}/changelog.gz", ("deb",), log, mode=0o644)

    def _copyright(self) -> str:
        held, texts = [], []
        for licence in self.recipe["licences"]:
            source, builder = licence["source"], licence["builder"]
            held.append((licence["what"], licence["licence"], self.sources.get(source, "")))
            below = source or (f"builder/{builder}" if builder else "checkout")
            for file in licence["files"]:
                path = self.inputs / "licences" / below / file.lstrip("/")
                if licence["input"]:
                    path = self.inputs / licence["input"] / file
                if not path.is_file():
                    raise packagetext.PackagingError(
                        f"licences: there is no file {file} of {licence['what']}"
                    )
                texts.append((f"{file} of {licence['what']}:", path.read_text(errors="replace")))
        return packagetext.copyright_text(self.name, held, texts, self.bundled)

    def _manual(self, entry: Entry) -> Entry:
        """A manual page compressed, as both formats want it; anything else as it is."""
        if entry.source is None or not re.match(r"/usr/share/man/(.*/)?man\d/[^/]+\.\d\Z", entry.to):
            return entry
        packed = self.work / "man" / f"{entry.to.rpartition('/')[2]}.gz"
        packed.parent.mkdir(exist_ok=True)
        packed.write_bytes(_gzip(entry.source.read_bytes()))
        return replace(entry, to=f"{entry.to}.gz", source=packed, mode=0o644)


def _mode(path: Path) -> int:
    return 0o755 if path.stat().st_mode & 0o100 else 0o644


def _gzip(content: bytes) -> bytes:
    return gzip.compress(content, 9, mtime=0)
