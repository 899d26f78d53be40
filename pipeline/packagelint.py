"""Examines every package of a platform: lintian, rpmlint, the kernels' contract, and how the packages fit together.

Runs inside its step, standard library and the builder's own programs only.

Below `IN`: `packages/<what>/` with `package.json`, `deb/` and `rpm/`; `lint.json`: `overrides` by `what`, and under
`*` for all (each `tool`, `tag`, `about`, `reason`), `fragments` by role, `contract`, `arch` (the kernel's name of it);
`kernel-configs/`; `contract.py` beside this file. Leaves `OUT/lint.json`: `packages` (their number), `files` (in
all of them), `contracts` (each `package`, `format`, `role`, `config`), `accepted` (each `package`, `tool`, `tag`,
`reason`, `count`). Exit status 2 when anything is found that no recipe accepts, each a line.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
IN, OUT, WORK = Path("/build/in"), Path("/build/out"), Path("/build/work")
FORMATS = ("deb", "rpm")
ROLES = ("host", "guest")
#: Where overrides of all packages are.
ALL = "*"

#: `E: package: tag what it says`, and `package.arch: E: tag what it says`.
LINTIAN = re.compile(r"^[EWIP]: (?P<package>\S+): (?P<tag>\S+)(?: (?P<about>.*))?$")
RPMLINT = re.compile(r"^(?P<package>\S+)\.[^.\s]+: [EW]: (?P<tag>\S+)(?: (?P<about>.*))?$")


@dataclass(frozen=True, slots=True)
class Finding:
    """What a linter said of a package; `about` may be empty."""

    package: str
    tool: str
    tag: str
    about: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.package}: {self.tool}: {self.tag} {self.about}".rstrip()


@dataclass(slots=True)
class Package:
    """One package in one format: its file, what its `package.json` says, and what it was found to hold."""

    what: str
    kind: str
    path: Path
    document: Mapping[str, Any]
    files: list[str] = field(default_factory=list)
    unsafe: list[str] = field(default_factory=list)
    config: bytes = b""

    @property
    def name(self) -> str:
        """As both formats call it."""
        return str(self.document["name"])

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.name} ({self.kind})"


def packages(inputs: Path) -> list[Package]:
    """Every package below `inputs`, once for each format."""
    found = []
    for path in sorted((inputs / "packages").glob("*/package.json")):
        document = json.loads(path.read_text())
        for kind in FORMATS:
            file = path.parent / kind / document["formats"][kind]["file"]
            found.append(Package(path.parent.name, kind, file, document))
    return found


# What is in them ----------------------------------------------------------------------------------


def look_into(package: Package) -> None:
    """Note a package's files, those that give rights to whoever runs them, and its kernel's configuration."""
    command = (
        ["dpkg-deb", "--fsys-tarfile", package.path] if package.kind == "deb" else ["rpm2archive", "-n", "-"]
    )
    contract = package.document["contract"]
    wanted = contract[package.kind] if contract else None
    words = [str(word) for word in command]
    with (
        package.path.open("rb") as content,
        subprocess.Popen(words, stdin=content, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            place = "/" + member.name.removeprefix("./").lstrip("/")
            if member.isdir():
                continue
            package.files.append(place)
            if not member.issym() and member.mode & 0o6002:
                package.unsafe.append(f"{place} has mode {member.mode:04o}")
            if place == wanted and (data := tar.extractfile(member)) is not None:
                package.config = data.read()
        # The padding behind the archive's end, too: closing the pipe before would look like a failure.
        while process.stdout is not None and process.stdout.read(1 << 20):
            pass
    if process.returncode:
        raise OSError(f"{package.path.name} cannot be unpacked")


def misfits(found: Iterable[Package]) -> Iterator[str]:
    """What is wrong with packages taken together: shared files, needs that nothing meets, headers that differ."""
    found = list(found)
    versions = {package.name: package.document["version"] for package in found}
    owners: dict[tuple[str, str], Package] = {}
    for package in found:
        yield from (f"{package.label}: {text}" for text in package.unsafe)
        for place in package.files:
            other = owners.setdefault((package.kind, place), package)
            if other is not package:
                yield f"{package.label}: {place} is in {other.name}, too"
        for needed in package.document["requires"]:
            if versions.get(needed["name"]) != needed["version"]:
                yield f"{package.label}: needs {needed['name']} {needed['version']}, which is not in the set"
        headers = read_headers(package)
        said = {"name": package.name, "version": package.document["version"]}
        said["arch"] = package.document["formats"][package.kind]["arch"]
        for key, value in said.items():
            if headers[key] != value:
                yield f"{package.label}: its {key} is {headers[key]}, not {value}"
        for name, version in headers["requires"]:
            if name in versions and version and version != versions[name]:
                yield f"{package.label}: needs {name} {version}, but the set has {versions[name]}"
        exact = {(each["name"], each["version"]) for each in package.document["requires"]}
        if missing := exact - set(headers["requires"]):
            names = ", ".join(sorted(name for name, _ in missing))
            yield f"{package.label}: does not say that it needs {names} in exactly one version"


def read_headers(package: Package) -> dict[str, Any]:
    """`name`, `version`, `arch` and `requires` (name and exact version, or empty text) as the package itself says."""
    if package.kind == "deb":
        names = ("Package", "Version", "Architecture", "Depends")
        shown = "\n".join(f"${{{name}}}" for name in names) + "\n"
        name, version, arch, depends = _output(
            "dpkg-deb", "--show", f"--showformat={shown}", package.path
        ).split("\n")[:4]
        pattern, needs = re.compile(r"(\S+)(?: \(= (\S+)\))?"), depends.split(", ")
    else:
        name, version, arch = _output(
            "rpm", "-qp", "--qf", r"%{NAME}\n%{VERSION}\n%{ARCH}\n", package.path
        ).split()
        pattern, needs = re.compile(r"(\S+)(?: = (\S+))?"), _output("rpm", "-qpR", package.path).splitlines()
    found = [pattern.match(need) for need in needs if need]
    requires = [(match[1], match[2] or "") for match in found if match]
    return {"name": name, "version": version, "arch": arch, "requires": requires}


def contracts(
    found: Iterable[Package], inputs: Path, asked: Mapping[str, Any], work: Path
) -> Iterator[dict[str, str]]:
    """Hold the configuration inside each kernel package against the contract; what is broken has `broken`."""
    for package in found:
        if not package.document["contract"]:
            continue
        role = package.document["contract"]["role"]
        said = {"package": package.name, "format": package.kind, "role": role}
        said["config"] = package.document["contract"][package.kind]
        if not package.config:
            yield {**said, "broken": f"there is no {said['config']} in it"}
            continue
        config = work / f"{package.what}.{package.kind}.config"
        config.write_bytes(package.config)
        command = [
            sys.executable,
            "-B",
            inputs / "contract.py",
            "--config",
            config,
            "--contract",
            asked["contract"],
        ]
        command += ["--role", role, "--arch", asked["arch"], *asked["fragments"][role]]
        done = subprocess.run(
            [str(word) for word in command],
            cwd=inputs / "kernel-configs",
            capture_output=True,
            text=True,
            check=False,
        )
        yield said if done.returncode == 0 else {**said, "broken": done.stderr.strip()}


# Linters ------------------------------------------------------------------------------------------


def lintian(debs: Iterable[Path]) -> list[Finding]:
    """What lintian says; it ends with 0 or, having found errors, 2."""
    command = ["lintian", "--allow-root", "--tag-display-limit", "0", *map(str, debs)]
    return list(_findings("lintian", LINTIAN, command, (0, 2)))


def rpmlint(rpms: Iterable[Path]) -> list[Finding]:
    """What rpmlint says; it ends with 0 or, having found errors, 64 or 66."""
    return list(_findings("rpmlint", RPMLINT, ["rpmlint", *map(str, rpms)], (0, 64, 66)))


def _findings(
    tool: str, pattern: re.Pattern[str], command: list[str], fine: tuple[int, ...]
) -> Iterator[Finding]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in fine:
        raise OSError(
            f"{tool} ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()[-500:]}"
        )
    if done.stderr.strip():
        # Both tell there what they could not read or run, and go on with the rest.
        raise OSError(f"{tool} did not examine everything: {done.stderr.strip()[-500:]}")
    for line in done.stdout.splitlines():
        if match := pattern.match(line):
            yield Finding(match["package"], tool, match["tag"], (match["about"] or "").strip())


def judge(
    findings: Iterable[Finding], overrides: Mapping[str, list[dict[str, Any]]], recipe_of: Mapping[str, str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """What is not accepted, a line for each tag of a package, and what is, counted.

    An override that accepts nothing is not accepted itself, unless it is `optional`.

    `overrides` are by recipe's package (`what`) or `ALL`, `recipe_of` gives that of a package's name.
    """
    refused: dict[tuple[str, str, str], list[Finding]] = {}
    used = Counter[tuple[str, int]]()
    accepted = Counter[tuple[str, str, str, str]]()

    def accepting(finding: Finding) -> tuple[str, int] | None:
        for owner in (recipe_of.get(finding.package, ""), ALL):
            for index, override in enumerate(overrides.get(owner, ())):
                if (override["tool"], override["tag"]) == (finding.tool, finding.tag) and fnmatch.fnmatchcase(
                    finding.about, override["about"]
                ):
                    return owner, index
        return None

    for finding in findings:
        if (place := accepting(finding)) is None:
            refused.setdefault((finding.package, finding.tool, finding.tag), []).append(finding)
        else:
            used[place] += 1
            reason = overrides[place[0]][place[1]]["reason"]
            accepted[finding.package, finding.tool, finding.tag, reason] += 1
    lines = [f"{same[0]}{f' ({len(same)} such)' if len(same) > 1 else ''}" for same in refused.values()]
    for owner, listed in overrides.items():
        for index, override in enumerate(listed):
            if not used[owner, index] and not override.get("optional", False):
                where = "recipes/lint.toml" if owner == ALL else owner
                lines.append(
                    f"{where}: nothing to accept: {override['tool']}: {override['tag']} {override['about']}"
                )
    keys = ("package", "tool", "tag", "reason")
    return lines, [
        {**dict(zip(keys, key, strict=True)), "count": count} for key, count in sorted(accepted.items())
    ]


def _output(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def main(inputs: Path = IN, out: Path = OUT, work: Path = WORK) -> int:
    """Run the step; its exit status."""
    asked = json.loads((inputs / "lint.json").read_text())
    found = packages(inputs)
    with ThreadPoolExecutor(2) as pool:
        by_lintian = pool.submit(lintian, [package.path for package in found if package.kind == "deb"])
        by_rpmlint = pool.submit(rpmlint, [package.path for package in found if package.kind == "rpm"])
        for package in found:
            look_into(package)
        kernels = list(contracts(found, inputs, asked, work))
        wrong = list(misfits(found))
        findings = [*by_lintian.result(), *by_rpmlint.result()]
    wrong += [
        f"{each['package']} ({each['format']}): {each['broken']}" for each in kernels if "broken" in each
    ]
    for role in ROLES:
        for kind in FORMATS:
            if not [each for each in kernels if (each["role"], each["format"]) == (role, kind)]:
                wrong.append(f"no {kind} has a {role} kernel's configuration")
    refused, accepted = judge(findings, asked["overrides"], {package.name: package.what for package in found})
    if wrong or refused:
        print(*wrong, *refused, sep="\n", file=sys.stderr)
        print(f"lint: {len(wrong) + len(refused)} findings", file=sys.stderr)
        return 2
    report = {
        "schema": SCHEMA,
        "packages": len(found),
        "files": sum(len(package.files) for package in found),
        "contracts": kernels,
        "accepted": accepted,
    }
    (out / "lint.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
