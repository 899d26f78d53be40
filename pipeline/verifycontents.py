"""Whether what a release says of its contents is so: packages, bills of materials, keys, proofs, sources.

Each check returns a line for a person, and raises `UserError` on the first thing that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import keys
from pipeline.errors import UserError
from pipeline.files import digest_file, files_below
from pipeline.labrecord import RECORD as REPORT
from pipeline.labrecord import decode, report_differs
from pipeline.locks import PackagesLock, SourcesLock
from pipeline.packagefile import examine
from pipeline.provenance import Statement
from pipeline.releaserecord import CYCLONEDX, LAB, MATERIALS, SPDX, Record
from pipeline.verifyrepository import read, refused


class _Thing(NamedTuple):
    """What both kinds of SBOM say of something: `sha256` is empty for a source, which has `commit`."""

    name: str
    version: str
    sha256: str
    file: str = ""
    commit: str = ""


def check_packages(directory: Path, record: Record) -> str:
    """Every deb and rpm is listed in `release.json` as its own metadata says, and nothing else is."""
    listed = {file.path: (package, file) for package in record.packages for file in package.files.values()}
    there = {name for name in files_below(directory / "repository") if name.endswith((".deb", ".rpm"))}
    there = {f"repository/{name}" for name in there}
    by_digest = {file.sha256 for _, file in listed.values()}
    for name in sorted(there - listed.keys()):
        # the repository has rpms of any machine once for each kind of machine
        if digest_file(directory / name) not in by_digest:
            raise refused(f"{name}: release.json does not list it")
    for path, (package, file) in sorted(listed.items()):
        if path not in there:
            raise refused(f"{path}: release.json lists it, and it is not there")
        found = examine(directory / path)
        said = (package.name, file.version, file.arch, file.size, file.sha256)
        if (found.name, found.version, found.arch, found.size, found.sha256) != said:
            raise refused(
                f"{path} is {found.name} {found.version} ({found.arch}), not what release.json says"
            )
    return f"{len(listed)} files of {len(record.packages)} packages are what release.json says"


def check_sboms(directory: Path, record: Record, statement: Statement) -> str:
    """Both SBOMs list exactly what is here, what is inside guests, the sources, and what builders are made of."""
    files = {
        _Thing(package.name, file.version, file.sha256, file.path)
        for package in record.packages
        for file in package.files.values()
    }
    files |= {
        _Thing(f"guest image {name}", record.version, guest.sha256, guest.image)
        for name, guest in record.guests.items()
    }
    sources = {_Thing(s.name, s.ref, "", "", s.commit) for s in record.sources}
    inside = {_Thing(p.name, p.version, p.sha256) for guest in record.guests.values() for p in guest.packages}
    for name, things in ((SPDX, _spdx(directory)), (CYCLONEDX, _cyclonedx(directory))):
        _refuse_difference(name, "files", {t for t in things if t.file}, files)
        _refuse_difference(name, "sources", {t for t in things if t.commit}, sources)
        others = {t for t in things if t.sha256 and not t.file}
        if missing := inside - others:
            raise refused(f"{name} lacks {min(missing).name}, which is inside a guest's image")
        if {t.sha256 for t in others} != statement.packages:
            raise refused(f"{name} and the provenance list different Debian packages")
    counts = f"{len(files)} files, {len(sources)} sources, {len(statement.packages)} Debian packages"
    return f"SPDX and CycloneDX list what is here: {counts}"


def _refuse_difference(name: str, what: str, found: set[_Thing], wanted: set[_Thing]) -> None:
    if missing := wanted - found:
        raise refused(
            f"{name}: {what}: {min(missing).name} {min(missing).version} is not there as release.json has it"
        )
    if extra := found - wanted:
        raise refused(f"{name}: {what}: {min(extra).name} {min(extra).version} is not in release.json")


def _spdx(directory: Path) -> set[_Thing]:
    data = load(directory, SPDX)
    try:
        if data["spdxVersion"] != "SPDX-2.3":
            raise refused(f"{SPDX} is {data['spdxVersion']}, not SPDX-2.3")
        return {
            _Thing(
                package["name"],
                package.get("versionInfo", ""),
                next(
                    (c["checksumValue"] for c in package.get("checksums", ()) if c["algorithm"] == "SHA256"),
                    "",
                ),
                package.get("packageFileName", ""),
                next(
                    (
                        reference["referenceLocator"].rpartition(":")[2]
                        for reference in package.get("externalRefs", ())
                        if reference["referenceLocator"].startswith("gitoid:commit:")
                    ),
                    "",
                ),
            )
            for package in data["packages"]
        }
    except (KeyError, TypeError, AttributeError):
        raise refused(f"{SPDX} is no SPDX document") from None


def _cyclonedx(directory: Path) -> set[_Thing]:
    data = load(directory, CYCLONEDX)
    try:
        if (data["bomFormat"], data["specVersion"]) != ("CycloneDX", "1.6"):
            raise refused(f"{CYCLONEDX} is {data['bomFormat']} {data['specVersion']}, not CycloneDX 1.6")
        return {
            _Thing(
                component["name"],
                component.get("version", ""),
                next((h["content"] for h in component.get("hashes", ()) if h["alg"] == "SHA-256"), ""),
                next(
                    (p["value"] for p in component.get("properties", ()) if p["name"] == "virt-rt:file"), ""
                ),
                next((c["uid"] for c in component.get("pedigree", {}).get("commits", ())), ""),
            )
            for component in data["components"]
        }
    except (KeyError, TypeError, AttributeError):
        raise refused(f"{CYCLONEDX} is no CycloneDX document") from None


def load(directory: Path, name: str) -> Any:
    """A JSON file of the release."""
    try:
        return json.loads(read(directory, name))
    except ValueError:
        raise refused(f"{name} is not JSON") from None


def check_keys(directory: Path, record: Record, statement: Statement) -> str:
    """Every action key is the digest of its specification in `materials.json`, and names only keys that are there."""
    specs = load(directory, MATERIALS)
    try:
        found = {name: keys.key(spec) for name, spec in specs.items()}
        known = set(found.values())
        needed = {each["key"] for spec in specs.values() for each in spec["inputs"].values()}
        needed |= {spec["builder"] for spec in specs.values() if spec["builder"]}
    except (KeyError, TypeError, AttributeError):
        raise refused(f"{MATERIALS} holds no specifications") from None
    for what, said in (("release.json", record.actions), ("the provenance", statement.keys)):
        if said != found:
            name = min(name for name in {*said, *found} if said.get(name) != found.get(name))
            raise refused(f"the key of {name} in {what} is not that of its specification")
    if needed - known:
        raise refused(f"{MATERIALS} lacks the action of key {min(needed - known)[:12]}")
    for source in record.sources:
        if found_tree(specs, source.name) != source.tree:
            raise refused(f"source {source.name}: the tree of {MATERIALS} is not that of release.json")
    for builder in record.builders:
        if found.get(f"builder:{builder.name}") != builder.key:
            raise refused(f"builder {builder.name}: release.json has another key than {MATERIALS}")
    return f"{len(found)} action keys follow from their specifications"


def found_tree(specs: Mapping[str, Any], source: str) -> str:
    """The git tree that a source's specification names, or nothing."""
    return str(specs.get(f"source:{source}", {}).get("parameters", {}).get("tree", ""))


def check_provenance(sums: Mapping[str, str], record: Record, statement: Statement) -> str:
    """The statement is about exactly the files of SHA256SUMS, and says what `release.json` says."""
    if statement.subjects != sums:
        name = min(n for n in {*sums, *statement.subjects} if sums.get(n) != statement.subjects.get(n))
        raise refused(f"the provenance and SHA256SUMS differ about {name}")
    if statement.sources != {s.name: (s.commit, s.tree) for s in record.sources}:
        raise refused("the provenance and release.json name different sources")
    if statement.patches != {f"{s.name}/{p.name}": p.sha256 for s in record.sources for p in s.patches}:
        raise refused("the provenance and release.json name different patches")
    if statement.release != (f"release:{record.platform}", record.version):
        raise refused(f"the provenance is of {' '.join(statement.release)}")
    if statement.builders != {builder.name: builder.key for builder in record.builders}:
        raise refused("the provenance and release.json name different builders")
    found = {
        p.file: {"level": p.level, "ok": p.ok, "evidence": p.evidence, "worth": p.worth, "sha256": p.sha256}
        for p in record.proofs
    }
    if statement.proofs != found:
        raise refused("the provenance and release.json tell of different proofs")
    return f"signed; about {len(statement.subjects)} files and {len(statement.sources)} sources"


def check_proofs(directory: Path, record: Record, sums: Mapping[str, str]) -> str:
    """The proofs passed, are worth what `release.json` says, and booted the image that is here.

    `sums` are those of SHA256SUMS: what is here, once the files were compared with them.
    """
    if not record.proofs:
        raise refused("release.json names no proof")
    said = []
    for proof in record.proofs:
        data = load(directory, proof.file)
        found = (
            (data.get("ok"), data.get("evidence"), data.get("latency_verdict"))
            if isinstance(data, dict)
            else ()
        )
        if found != (proof.ok, proof.evidence, proof.worth):
            raise refused(f"{proof.file} and release.json differ about the verdict")
        if not proof.ok:
            raise refused(f"{proof.file}: the proof failed")
        booted = data.get("booted_sha256", {})
        for name, guest in record.guests.items():
            image = booted.get(f"image/{name}/disk.qcow2")
            # the stack proof runs one guest, the boot proof all of them
            if image != guest.sha256 and (image is not None or proof.level == "boot"):
                raise refused(f"{proof.file}: not the image of {name} that is here was booted")
        said.append(f"{proof.level} passed ({proof.worth})")
    described = {guest.image: guest.sha256 for guest in record.guests.values()}
    for path, digest in (described | {proof.file: proof.sha256 for proof in record.proofs}).items():
        if sums.get(path) != digest:
            raise refused(f"{path} is not the one that release.json describes")
    return "; ".join(said)


def check_report(directory: Path, record: Record) -> str:
    """The lab's report is of this release, and says of its proofs what they say."""
    report = decode(read(directory, f"{LAB}/{REPORT}"), f"{LAB}/{REPORT}")
    if difference := report_differs(report, record):
        raise refused(f"{LAB}/{REPORT} is not of this release: {difference}")
    return ", ".join(f"{level.name} {level.verdict}" for level in report.levels)


def check_lock(
    record: Record,
    statement: Statement,
    sources: SourcesLock,
    packages: PackagesLock,
    patches: Mapping[str, Mapping[str, str]],
) -> str:
    """The release was made of what the locks of this checkout pin; `patches` are its digests by source and name."""
    for source in record.sources:
        entry = sources.find(source.name)
        pinned = (entry.ref, entry.commit, entry.tree) if entry else ("nothing", "", "")
        if pinned != (source.ref, source.commit, source.tree):
            raise UserError(
                f"source {source.name}: the release has {source.ref} ({source.commit[:12]}), "
                f"this checkout's lock {pinned[0]} ({pinned[1][:12]})",
                "check out what it was made from, or leave this check out with --no-lock",
            )
        if {p.name: p.sha256 for p in source.patches} != dict(patches.get(source.name, {})):
            raise UserError(
                f"source {source.name}: the release was made with other patches than this checkout has",
                "check out what it was made from, or leave this check out with --no-lock",
            )
    locked = {package.sha256 for each in packages.sets for package in each.packages}
    if others := statement.packages - locked:
        raise UserError(
            f"{len(others)} Debian packages that went into the release are not in this checkout's lock",
            "check out what it was made from, or leave this check out with --no-lock",
        )
    counts = f"{len(record.sources)} sources and {len(statement.packages)} Debian packages"
    return f"{counts} are those of this checkout's locks"
