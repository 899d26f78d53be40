"""Makes one package in both formats, from its description and its inputs; nfpm writes them.

Runs inside its step, beside `packagecontents.py`, `packagetext.py` and `bundle.py`, standard library only.

Below `IN`: `description.json` (see `pipeline.packages`), `nfpm`, `recipes/` (files and scripts of the recipe), the
inputs that the recipe names, `packages/<recipe>/package.json` of the packages that it names, and
`licences/<source>/` with licence texts. Environment: `ACTION_KEY`, `SOURCE_DATE_EPOCH`.

Leaves in `OUT` `deb/<file>`, `rpm/<file>` and `package.json`: `name`, `version`, `what`, `platform`, `guest` (or
null), `formats` (by format: `file`, `arch`, `size` in bytes, `sha256`), `requires` (packages needed in exactly one
version: `name`, `version`), `variables` (what was read from the inputs), `contract` (null, or `role` and the place of
the kernel's configuration by format), `bundled` (packages of the distribution of which files went in: `name`,
`version`, `files`) and `licences` (`what`, `licence`, `source`). Exit status: 2 when recipe and inputs do not fit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from pipeline import bundle, packagetext
    from pipeline.packagecontents import Contents, Entry
except ImportError:  # in the step their files lie beside this one
    import bundle  # type: ignore[import-not-found, no-redef]
    import packagetext  # type: ignore[import-not-found, no-redef]
    from packagecontents import Contents, Entry  # type: ignore[import-not-found, no-redef]

SCHEMA = 1
#: What both package managers take as a name (Debian Policy, 5.6.7).
NAME = r"[a-z0-9][a-z0-9+.-]+"
#: What package managers show of a package in one line (Debian Developer's Reference, 6.2.1).
SUMMARY = 79
IN, OUT, WORK = Path("/build/in"), Path("/build/out"), Path("/build/work")
FORMATS = ("deb", "rpm")

#: nfpm's names of maintainer scripts.
NFPM_SCRIPTS = {
    "preinst": "preinstall",
    "postinst": "postinstall",
    "prerm": "preremove",
    "postrm": "postremove",
}
#: Both formats' readers know zstd: dpkg of Debian 12, rpm of RHEL 9, and later ones.
COMPRESSION, LITTLE = "zstd:19", "zstd:1"


class Packager:
    """The making of one package; see the module for what lies where."""

    def __init__(self, inputs: Path, out: Path, work: Path, key: str, epoch: int) -> None:
        """`key` is the step's own, `epoch` the date of everything, seconds since 1970."""
        self.inputs, self.out, self.work, self.epoch = inputs, out, work, epoch
        self.described = json.loads((inputs / "description.json").read_text())
        recipe = self.described["recipe"]
        self.read: dict[str, str] = {}
        for name, path in recipe["read"].items():
            if not (inputs / path).is_file():
                raise packagetext.PackagingError(f"read: there is no file {path} among the inputs")
            self.read[name] = (inputs / path).read_text().strip()
        self.version = f"{self.described['release']}+g{key[:12]}"
        self.needed = {
            name: json.loads((inputs / "packages" / name / "package.json").read_text())
            for name in self.described["documents"]
        }
        #: Names of the packages that the recipe names, by their recipes.
        self.names = self.described["names"] | {name: each["name"] for name, each in self.needed.items()}
        self.variables = {
            **self.described["variables"],
            **self.read,
            "version": self.version,
            "packages": {
                name: {
                    "name": its,
                    **({"version": self.needed[name]["version"]} if name in self.needed else {}),
                }
                for name, its in self.names.items()
            },
        }
        self.recipe = packagetext.fill_all(recipe, self.variables)
        self.name = self.recipe["name"]
        if not re.fullmatch(NAME, self.name):
            raise packagetext.PackagingError(f"name: {self.name} is not a package's name")
        if len(self.recipe["summary"]) > SUMMARY:
            raise packagetext.PackagingError(
                f"summary: longer than {SUMMARY} characters: {self.recipe['summary']}"
            )
        self.variables["name"] = self.name
        native = self.recipe["architecture"] == "native"
        self.arch = {
            "deb": self.described["arch"] if native else "all",
            "rpm": self.described["rpm_arch"] if native else "noarch",
        }
        self.date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))
        self.change = f"Release {self.described['release']} of virt-rt."
        changelog = packagetext.changelog(
            self.name, self.version, self.change, self.described["maintainer"], epoch
        )
        self.contents = Contents(
            inputs, work, self.recipe, self.variables, self.described["sources"], changelog
        )

    def scripts(self, kind: str) -> dict[str, str]:
        """Paths of the maintainer scripts of a format, by file name."""
        bodies: dict[str, list[str]] = {}
        for script in self.recipe["scripts"]:
            if kind in script["formats"]:
                bodies.setdefault(script["when"], []).append(self.contents.filled(script["file"]).read_text())
        made = packagetext.scripts(kind, bodies)
        return {name: str(self.contents.write(f"scripts/{kind}/{name}", text)) for name, text in made.items()}

    def relations(self, kind: str) -> dict[str, list[str]]:
        """What the package says of others, in a format's words."""
        made = {}
        for word in ("depends", "recommends", "suggests", "provides", "conflicts", "replaces"):
            asked = self.recipe[word]
            exact = [(self.needed[name]["name"], self.needed[name]["version"]) for name in asked["exact"]]
            named = [self.names[name] for name in asked["named"]]
            style = "{} (= {})" if kind == "deb" else "{} = {}"
            if found := [*(style.format(*each) for each in exact), *named, *asked[kind]]:
                made[word] = found
        return made

    def config(self, kind: str, entries: list[Entry]) -> dict[str, Any]:
        """nfpm's configuration for one format."""
        compression = LITTLE if self.recipe["compressed"] else COMPRESSION
        summary, text = self.recipe["summary"], packagetext.prose(self.recipe["description"])
        scripts = self.scripts(kind)
        config: dict[str, Any] = {
            "name": self.name,
            "arch": self.arch[kind],
            "version": self.version,
            "version_schema": "none",
            "section": self.recipe["section"],
            "priority": "optional",
            "maintainer": self.described["maintainer"],
            "description": f"{summary}\n{text}" if kind == "deb" else text,
            "license": " AND ".join(dict.fromkeys(each["licence"] for each in self.recipe["licences"])),
            "disable_globbing": True,
            "mtime": self.date,
            "contents": [entry.nfpm(kind) for entry in entries if kind in entry.formats],
            "scripts": {NFPM_SCRIPTS[name]: path for name, path in scripts.items() if name in NFPM_SCRIPTS},
            **self.relations(kind),
        }
        if kind == "deb":
            return {**config, "deb": {"compression": compression}}
        config |= {"release": "1", "changelog": str(self._chglog())}
        if scripts:
            config["depends"] = [*config.get("depends", []), "/bin/sh"]
        rpm = {
            "compression": compression,
            "summary": f"{summary[0].upper()}{summary[1:]}",
            "group": "Unspecified",
            "buildhost": "virt-rt",
            "packager": self.described["maintainer"],
            "scripts": {name: path for name, path in scripts.items() if name not in NFPM_SCRIPTS},
        }
        return {**config, "rpm": rpm}

    def _chglog(self) -> Path:
        """The changelog as nfpm reads it for an rpm."""
        entry = {
            "semver": f"{self.version}-1",
            "date": self.date,
            "packager": self.described["maintainer"],
            "changes": [{"note": self.change}],
        }
        return self.contents.write("changelog.json", json.dumps([entry]))

    def make(self) -> None:
        """Write both packages and `package.json`."""
        entries = self.contents.entries()
        # Before the two are written at the same time: they share what is filled in.
        configs = {
            kind: self.contents.write(f"{kind}.json", json.dumps(self.config(kind, entries)))
            for kind in FORMATS
        }
        with ThreadPoolExecutor(len(FORMATS)) as pool:
            formats = dict(zip(FORMATS, pool.map(self._write, configs, configs.values()), strict=True))
        exact = [self.needed[name] for name in self.recipe["depends"]["exact"]]
        document = {
            "schema": SCHEMA,
            "name": self.name,
            "version": self.version,
            "what": self.described["what"],
            "platform": self.described["variables"]["platform"],
            "guest": self.described["variables"].get("guest"),
            "formats": formats,
            "requires": [{"name": each["name"], "version": each["version"]} for each in exact],
            "variables": self.read,
            "contract": self.recipe["contract"],
            "bundled": self.contents.bundled,
            "licences": [
                {"what": each["what"], "licence": each["licence"], "source": each["source"]}
                for each in self.recipe["licences"]
            ],
        }
        (self.out / "package.json").write_text(json.dumps(document, indent=1) + "\n")

    def _write(self, kind: str, config: Path) -> dict[str, Any]:
        """Have nfpm write one format; its part of `package.json`."""
        arch = self.arch[kind]
        names = {
            "deb": f"{self.name}_{self.version}_{arch}.deb",
            "rpm": f"{self.name}-{self.version}-1.{arch}.rpm",
        }
        target = self.out / kind / names[kind]
        target.parent.mkdir(parents=True)
        began = time.monotonic()
        command = [
            self.inputs / "nfpm",
            "package",
            "--config",
            config,
            "--packager",
            kind,
            "--target",
            target,
        ]
        done = subprocess.run(
            [str(word) for word in command],
            env={"PATH": os.environ["PATH"], "HOME": str(self.work), "SOURCE_DATE_EPOCH": str(self.epoch)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not target.is_file():
            raise packagetext.PackagingError(
                f"nfpm made no {kind}: {done.stderr.strip() or done.stdout.strip()}"
            )
        print(f"{target.name}: {target.stat().st_size} bytes in {time.monotonic() - began:.2f} s")
        with target.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        return {"file": target.name, "arch": arch, "size": target.stat().st_size, "sha256": digest}


def main() -> int:
    """Run the step; its exit status."""
    try:
        Packager(IN, OUT, WORK, os.environ["ACTION_KEY"], int(os.environ["SOURCE_DATE_EPOCH"])).make()
    except (packagetext.PackagingError, bundle.BundleError) as error:
        print(f"package: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
