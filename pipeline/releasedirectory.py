"""Writes a release directory: the step of `release:<platform>`.

All of it follows from the step's inputs, parameters and specifications: equal inputs give equal bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from pipeline import keys, signing
from pipeline.action import Step
from pipeline.cpuplan import HostPlan
from pipeline.cyclonebill import cyclonedx
from pipeline.dsse import envelope
from pipeline.errors import InternalError, UserError
from pipeline.files import digest_file, files_below
from pipeline.labrecord import RECORD as REPORT
from pipeline.labrecord import decode as decode_report
from pipeline.labrecord import report_differs
from pipeline.locks import PackageSet, SourceLock
from pipeline.packagefile import Package as PackageFileFound
from pipeline.packagefile import examine
from pipeline.planpicture import svg
from pipeline.provenance import PAYLOAD_TYPE, statement
from pipeline.releasechanges import changes
from pipeline.releasepage import page
from pipeline.releaserecipe import ReleaseRecipe
from pipeline.releaserecord import (
    CYCLONEDX,
    KEY,
    LAB,
    MATERIALS,
    PAGE,
    PROOFS,
    PROVENANCE,
    RECORD,
    REPOSITORY,
    SIGNATURE,
    SPDX,
    SUMS,
    UNSUMMED,
    Builder,
    Digest,
    Distribution,
    Guest,
    Installed,
    Kernel,
    Package,
    PackageFile,
    Proof,
    Record,
    Signer,
    Source,
    config_lines,
    decode,
    encode,
)
from pipeline.sbom import bill
from pipeline.spdxbill import spdx

FORMATS = ("deb", "rpm")


class _Licence(msgspec.Struct, frozen=True, kw_only=True):
    """Under which licence a package holds what."""

    what: str
    licence: str


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    """What is needed of a `package.json`."""

    name: str
    version: str
    requires: tuple[Distribution, ...]
    bundled: tuple[Distribution, ...]
    licences: tuple[_Licence, ...]


def write(step: Step, recipe: ReleaseRecipe, plan: HostPlan, signer: signing.Signer) -> None:
    """Write the directory into `step.out`; inputs and parameters are those of `release.Maker.release`."""
    out, given = step.out, step.action.parameters
    for name in files_below(step.inputs):
        if name.startswith((f"{REPOSITORY}/", "images/", "scripts/", "kernels/", "proof/")):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(step.inputs / name, out / name, follow_symlinks=False)
    shutil.copyfile(step.inputs / REPOSITORY / KEY, out / KEY)
    sets = msgspec.json.decode((step.inputs / "packages.lock").read_bytes(), type=list[PackageSet])
    patches = {
        path.name: {patch.name: patch.read_bytes() for patch in sorted(path.iterdir())}
        for path in sorted((step.inputs / "patches").glob("*"))
    }
    specs = step.specs()
    if sorted(specs) != sorted([*given["closure"], step.action.name]):
        raise InternalError(f"{step.action.name} is made from other actions than it names", "name them all")
    record = _record(step, sets, patches, {name: keys.key(spec) for name, spec in specs.items()})
    _check_report(step.inputs / LAB / REPORT, record)
    (out / RECORD).write_bytes(encode(record))
    (out / MATERIALS).write_bytes(json.dumps(specs, indent=1, sort_keys=True).encode() + b"\n")
    step.log(f"{len(record.packages)} packages of {len(record.sources)} sources")
    contents = bill(record, sets, patches)
    identity = record.actions[step.action.name]
    (out / SPDX).write_bytes(spdx(contents, record.when, identity))
    step.check_cancelled()
    (out / CYCLONEDX).write_bytes(cyclonedx(contents, record.when, identity))
    step.check_cancelled()
    before = step.inputs / "previous.json"
    differences = changes(decode(before.read_bytes(), before.name), record) if before.exists() else None
    templates = {path.name: path.read_text() for path in (step.inputs / "templates").iterdir()}
    picture = svg(plan, f"CPUs of {record.platform}")
    text = page(record, differences, _sums(out), recipe.repository, picture, templates)
    (out / PAGE).write_text(text)
    sums = _sums(out)
    listing = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()
    (out / SUMS).write_bytes(listing)
    with signer:
        if signing.parameter(signer.identity) != given[signing.PARAMETER]:
            raise UserError("the signing key changed while doit ran", "run doit again")
        (out / SIGNATURE).write_bytes(signer.detached(listing, record.date))
        said = envelope(statement(record, contents, sums), PAYLOAD_TYPE, signer, record.date)
        (out / PROVENANCE).write_bytes(json.dumps(said, indent=1).encode() + b"\n")


def _sums(directory: Path) -> dict[str, str]:
    """sha256 (hex) by path of what `SHA256SUMS` has."""
    return {
        name: digest_file(directory / name) for name in sorted(files_below(directory)) if name not in UNSUMMED
    }


def _record(
    step: Step,
    sets: Iterable[PackageSet],
    patches: Mapping[str, Mapping[str, bytes]],
    actions: dict[str, str],
) -> Record:
    given = step.action.parameters
    by_name = {each.name: each for each in sets}
    signer = given[signing.PARAMETER]
    return Record(
        version=given["release"]["version"],
        platform=given["platform"],
        description=given["description"],
        arch=step.action.arch,
        date=given["date"],
        signer=Signer(
            name=signer["name"], fingerprint=signer["fingerprint"], development=signer["development"]
        ),
        sources=tuple(_sources(step.inputs, patches)),
        builders=tuple(
            Builder(
                name=name.partition("/")[2],
                key=actions[name.replace("/", ":", 1)],
                suite=each.suite,
                packages=len(each.packages),
            )
            for name, each in sorted(by_name.items())
            if name.startswith("builder/")
        ),
        kernels={
            path.stem: Kernel(
                release=path.with_suffix(".release").read_text().strip(),
                config=config_lines(path.read_text()),
            )
            for path in sorted((step.inputs / "kernels").glob("*.config"))
        },
        packages=tuple(_packages(step, given["packages"])),
        guests={
            name: _guest(step.inputs, name, description, by_name[f"guest/{name}"])
            for name, description in sorted(given["guests"].items())
        },
        plan=given["plan"],
        proofs=tuple(_proofs(step.inputs)),
        actions=dict(sorted(actions.items())),
    )


def _sources(given: Path, patches: Mapping[str, Mapping[str, bytes]]) -> Iterator[Source]:
    for lock in msgspec.json.decode((given / "sources.lock").read_bytes(), type=list[SourceLock]):
        yield Source(
            name=lock.name,
            origin=lock.origin,
            location=lock.location,
            ref=lock.ref,
            commit=lock.commit,
            tree=lock.tree,
            series=lock.series,
            files=tuple(
                Digest(name=f"{file.archive}/{file.path}", sha256=file.sha256) for file in lock.files
            ),
            patches=tuple(
                Digest(name=name, sha256=digest_file(given / "patches" / lock.name / name))
                for name in sorted(patches.get(lock.name, {}))
            ),
        )


def _packages(step: Step, expected: Mapping[str, list[str]]) -> Iterator[Package]:
    """Every package, as its files in the repository say it: an rpm there is signed, and not the one that was made."""
    found: dict[tuple[str, str], PackageFileFound] = {}
    paths: dict[str, str] = {}
    for name in sorted(files_below(step.inputs / REPOSITORY)):
        if name.endswith((".deb", ".rpm")):
            examined = examine(step.inputs / REPOSITORY / name)
            found[examined.format, examined.name] = examined
            paths.setdefault(examined.sha256, f"{REPOSITORY}/{name}")
            step.check_cancelled()
    documents = {
        what: msgspec.json.decode((step.inputs / "packages" / f"{what}.json").read_bytes(), type=_Document)
        for what in sorted(expected)
    }
    wanted = {(each, document.name) for document in documents.values() for each in FORMATS}
    if differing := wanted ^ found.keys():
        form, name = min(differing)
        raise InternalError(
            f"{name}, as {form}, is in the repository or among the packages of this platform, and not in both",
            "let the repository have exactly these packages",
        )
    for what, document in documents.items():
        yield Package(
            name=document.name,
            version=document.version,
            what=what,
            requires=document.requires,
            sources=tuple(expected[what]),
            bundled=document.bundled,
            licences=tuple(f"{each.what}: {each.licence}" for each in document.licences),
            files={
                each: PackageFile(
                    path=paths[file.sha256],
                    version=file.version,
                    arch=file.arch,
                    size=file.size,
                    sha256=file.sha256,
                )
                for each in FORMATS
                for file in [found[each, document.name]]
            },
        )


def _guest(given: Path, name: str, description: str, locked: PackageSet) -> Guest:
    digests = {(p.name, p.version, p.arch): p.sha256 for p in locked.packages}
    installed = []
    for line in (given / "rootfs" / f"{name}.txt").read_text().splitlines():
        package, version, arch = line.split()
        digest = digests.get((package, version, arch))
        if digest is None:
            raise InternalError(
                f"the image of {name} has {package} {version}, which is not locked", "lock it"
            )
        installed.append(Installed(name=package, version=version, arch=arch, sha256=digest))
    image = f"images/{name}.qcow2"
    return Guest(
        description=description, image=image, sha256=digest_file(given / image), packages=tuple(installed)
    )


def _proofs(given: Path) -> Iterator[Proof]:
    for level, file in PROOFS.items():
        path = given / "proof" / file
        if not path.exists():
            continue
        data: dict[str, Any] = json.loads(path.read_bytes())
        if data["ok"] is not True:
            raise InternalError(f"{file} tells of a failure", "a proof that fails must not have a result")
        yield Proof(
            level=level,
            file=f"proof/{file}",
            sha256=digest_file(path),
            ok=data["ok"],
            evidence=data["evidence"],
            worth=data["latency_verdict"],
        )


def _check_report(path: Path, record: Record) -> None:
    """The lab's report is of this release; it has no result when it is red."""
    found = decode_report(path.read_bytes(), f"{LAB}/{path.name}")
    if difference := report_differs(found, record):
        raise InternalError(
            f"the lab's report is not of this release: {difference}", "make both of the same proofs"
        )
