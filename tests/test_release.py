"""Releases: what the directory holds, and what `doit verify-release` finds when something in it is not so."""

from __future__ import annotations

import base64
import copy
import hashlib
import html.parser
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline import keys, releaserecord, signing
from pipeline.cyclonebill import cyclonedx
from pipeline.dsse import envelope, open_envelope
from pipeline.errors import InternalError, UserError
from pipeline.files import digest_file, files_below, tree_digests
from pipeline.graph import Graph
from pipeline.packagefile import examine
from pipeline.provenance import PAYLOAD_TYPE, Statement
from pipeline.release import release_name
from pipeline.releasechanges import changes
from pipeline.releaserecord import (
    EMULATED,
    KEY,
    PROVENANCE,
    RECORD,
    SIGNATURE,
    SUMS,
    UNSUMMED,
    Record,
    decode,
    encode,
    previous,
    remember,
)
from pipeline.spdxbill import spdx
from pipeline.verifyrelease import BOOKKEEPING, Checkout, Verdict, verify
from pipeline.verifyrepository import check_rpms, expect_file, read
from tests.conftest import ROOT
from tests.packaging import make_key
from tests.releasing import GUEST, PATCH, PLATFORM, SOURCES, Workshop

Environ = dict[str, str]


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> Environ:
    """A machine with a release key."""
    directory = tmp_path_factory.mktemp("key")
    (directory / "secret.asc").write_bytes(make_key(directory, "Release Key <release@example.org>"))
    return {"PATH": os.environ["PATH"], signing.KEY_FILE: str(directory / "secret.asc")}


@pytest.fixture(scope="module")
def other_key(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The public key of somebody else."""
    directory = tmp_path_factory.mktemp("other")
    (directory / "secret.asc").write_bytes(make_key(directory, "Other <other@example.org>"))
    environ = {"PATH": os.environ["PATH"], signing.KEY_FILE: str(directory / "secret.asc")}
    identity = signing.identity(environ, directory)
    assert identity is not None
    return identity.public


@dataclass(frozen=True, slots=True)
class Made:
    """A release that was made, and the workshop it comes from."""

    workshop: Workshop
    directory: Path

    @property
    def record(self) -> Record:
        return decode((self.directory / RECORD).read_bytes(), RECORD)

    @property
    def checkout(self) -> Checkout:
        patch = self.workshop.root / "recipes/patches/qemu-kvm-rt" / PATCH
        patches = {"qemu-kvm-rt": {PATCH: digest_file(patch)}}
        return Checkout(self.workshop.sources, self.workshop.packages, patches)


@pytest.fixture(scope="module")
def pristine(environ: Environ, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A release; tests that change it take a copy."""
    workshop = Workshop(tmp_path_factory.mktemp("release"), environ)
    return Made(workshop, workshop.make())


@pytest.fixture
def made(pristine: Made, tmp_path: Path) -> Made:
    """A copy of the release, as a receiver has it."""
    directory = tmp_path / "release"
    shutil.copytree(pristine.directory, directory)
    return replace(pristine, directory=directory)


def verdicts(made: Made, key: bytes | None = None) -> dict[str, Verdict]:
    return {verdict.check: verdict for verdict in verify(made.directory, key, made.checkout)}


def failed(made: Made, key: bytes | None = None) -> dict[str, str]:
    return {name: v.detail for name, v in verdicts(made, key).items() if v.verdict == "failed"}


# What is made ---------------------------------------------------------------------------------


def test_a_release_passes_every_check(pristine: Made) -> None:
    found = verdicts(pristine)
    assert [str(v) for v in found.values() if v.verdict == "failed"] == []
    assert found.keys() >= {
        "key",
        "signature",
        "files",
        "provenance",
        "packages",
        "SBOM",
        "apt",
        "yum",
        "lock",
    }
    assert found["trust"].verdict == "note"
    fingerprint = pristine.record.signer.fingerprint
    assert fingerprint in found["trust"].detail and "not who made them" in found["trust"].detail


def test_the_key_that_the_receiver_has_gives_trust(pristine: Made, other_key: bytes) -> None:
    own = (pristine.directory / KEY).read_bytes()
    found = verdicts(pristine, own)
    assert "trust" not in found
    assert found["key"].detail.endswith("which you gave")
    wrong = failed(pristine, other_key)
    assert wrong.keys() >= {
        "key",
        "signature",
        "provenance",
        "apt",
        "yum",
        "rpm signatures",
        "repository state",
    }
    assert "another key" in wrong["key"]


def test_equal_inputs_give_equal_bytes(pristine: Made, environ: Environ, tmp_path: Path) -> None:
    again = Workshop(tmp_path, environ).make()
    first, second = tree_digests(pristine.directory), tree_digests(again)
    del first[BOOKKEEPING], second[BOOKKEEPING]
    assert first == second


def test_sums_have_every_file_but_what_is_made_of_them(pristine: Made) -> None:
    listed = {line[66:] for line in (pristine.directory / SUMS).read_text().splitlines()}
    assert listed == set(files_below(pristine.directory)) - {*UNSUMMED, BOOKKEEPING}


def test_receivers_can_check_by_hand(made: Made) -> None:
    """The page's own commands."""
    page = (made.directory / "index.html").read_text()
    commands = re.search(r"gpg --dearmor.*?(?=</pre>)", page, re.DOTALL)
    assert commands
    script = commands[0].replace("&lt;", "<").replace("&gt;", ">")
    environment = {"PATH": os.environ["PATH"], "HOME": str(made.directory.parent), "LC_ALL": "C"}
    done = subprocess.run(
        ["sh", "-ec", script], cwd=made.directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Good signature from" in done.stderr
    (made.directory / "kernels/host.config").write_text("CONFIG_OTHER=y\n")
    done = subprocess.run(
        ["sh", "-ec", script], cwd=made.directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "kernels/host.config: FAILED" in done.stdout


def test_the_description_says_what_is_there(pristine: Made) -> None:
    record = pristine.record
    assert {p.name for p in record.packages} == {
        "virt-rt-kernel",
        f"qemu-kvm-rt-{PLATFORM}",
        f"virt-rt-image-{GUEST}",
        f"virt-rt-host-{PLATFORM}",
    }
    for package in record.packages:
        for form, file in package.files.items():
            found = examine(pristine.directory / file.path)
            assert (found.format, found.sha256, found.version) == (form, file.sha256, file.version)
    sources = {package.what: package.sources for package in record.packages}
    assert sources == {"kernel": ("linux-rt",), "qemu": ("qemu-kvm-rt",), "image": ("linux-rt",), "host": ()}
    assert record.kernels["host"].config == {"KVM": "y"}
    assert [p.name for p in record.guests[GUEST].packages] == ["bash", "libc6", "libstdc++6"]
    assert {(p.level, p.ok, p.worth) for p in record.proofs} == {
        ("boot", True, EMULATED),
        ("stack", True, EMULATED),
    }
    assert not record.signer.development
    assert (
        record.actions[release_name(PLATFORM)]
        == json.loads((pristine.directory / BOOKKEEPING).read_bytes())["key"]
    )


def test_both_sboms_name_sources_patches_builders_guests_and_libraries(pristine: Made) -> None:
    spdx_text = (pristine.directory / "sbom.spdx.json").read_text()
    document = json.loads(spdx_text)
    by_id = {package["SPDXID"]: package for package in document["packages"]}
    related = {
        (r["spdxElementId"], r["relationshipType"], r["relatedSpdxElement"])
        for r in document["relationships"]
    }
    names = {
        (by_id[a]["name"], kind, by_id[b]["name"]) for a, kind, b in related if a in by_id and b in by_id
    }
    assert (f"qemu-kvm-rt-{PLATFORM}", "GENERATED_FROM", "qemu-kvm-rt") in names
    assert (f"qemu-kvm-rt-{PLATFORM}", "CONTAINS", "libfdt1") in names
    assert (f"virt-rt-image-{GUEST}", "CONTAINS", f"guest image {GUEST}") in names
    assert (f"guest image {GUEST}", "CONTAINS", "libstdc++6") in names
    assert ("builder kernel", "CONTAINS", "gcc") in names
    assert ("builder kernel", "BUILD_TOOL_OF", f"virt-rt {PLATFORM}") in names
    (patch,) = document["files"]
    assert patch["fileName"] == f"./qemu-kvm-rt/{PATCH}"
    assert (patch["SPDXID"], "PATCH_FOR", "SPDXRef-source-qemu-kvm-rt") in related
    linux = by_id["SPDXRef-source-linux-rt"]
    assert linux["downloadLocation"] == f"git+https://git.example.org/linux.git@{'1' * 40}"
    cyclone = json.loads((pristine.directory / "sbom.cdx.json").read_text())
    components = {component["bom-ref"]: component for component in cyclone["components"]}
    pedigree = components["source-qemu-kvm-rt"]["pedigree"]
    assert pedigree["commits"] == [{"uid": "3" * 40}]
    assert "+42" in pedigree["patches"][0]["diff"]["text"]["content"]
    assert components["builder-kernel"]["scope"] == "excluded"
    purls = {component.get("purl") for component in components.values()}
    assert "pkg:deb/debian/qemu@1:10.0.1%2Bds-1?arch=source&distro=trixie" in purls
    assert "pkg:deb/debian/libstdc%2B%2B6@14?arch=amd64&distro=trixie" in purls


def test_the_provenance_is_slsa(pristine: Made) -> None:
    public = (pristine.directory / KEY).read_bytes()
    payload = open_envelope(json.loads((pristine.directory / PROVENANCE).read_bytes()), public, PAYLOAD_TYPE)
    data = json.loads(payload)
    assert (data["_type"], data["predicateType"]) == (
        "https://in-toto.io/Statement/v1",
        "https://slsa.dev/provenance/v1",
    )
    definition, details = data["predicate"]["buildDefinition"], data["predicate"]["runDetails"]
    assert definition["externalParameters"] == {"task": f"release:{PLATFORM}", "version": "0.1.0"}
    named = {each["name"]: each["digest"] for each in definition["resolvedDependencies"]}
    assert named["linux-rt"] == {"gitCommit": "1" * 40, "gitTree": "2" * 40}
    assert named["libfdt1"].keys() == {"sha256"}
    assert {each["name"] for each in details["builder"]["builderDependencies"]} == {"kernel", "package"}
    worth = {each["annotations"]["level"]: each["annotations"]["worth"] for each in details["byproducts"]}
    assert worth == {"boot": EMULATED, "stack": EMULATED}
    with pytest.raises(UserError, match="not signed|signature"):
        open_envelope(
            {**json.loads((pristine.directory / PROVENANCE).read_bytes()), "signatures": []},
            public,
            PAYLOAD_TYPE,
        )


# What a receiver is told when something is not so ---------------------------------------------


def resign(made: Made) -> None:
    """Sums and provenance as a careless or malicious signer would make them for what is there now."""
    directory = made.directory
    sums = {
        n: digest_file(directory / n)
        for n in sorted(files_below(directory))
        if n not in (*UNSUMMED, BOOKKEEPING)
    }
    listing = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()
    (directory / SUMS).write_bytes(listing)

    def subjects(statement: Any) -> None:
        statement["subject"] = [{"name": n, "digest": {"sha256": d}} for n, d in sums.items()]

    with signing.Signer(made.workshop.environ, directory) as signer:
        (directory / SIGNATURE).write_bytes(signer.detached(listing, made.record.date))
    restate(made, subjects)


def restate(made: Made, change: Callable[[Any], None]) -> None:
    """Sign another statement than the release's own."""
    path = made.directory / PROVENANCE
    statement = json.loads(base64.b64decode(json.loads(path.read_bytes())["payload"]))
    change(statement)
    with signing.Signer(made.workshop.environ, made.directory) as signer:
        said = envelope(json.dumps(statement).encode(), PAYLOAD_TYPE, signer, made.record.date)
    path.write_text(json.dumps(said))


def edit(made: Made, path: str, change: Callable[[Any], None]) -> None:
    """Change a JSON file."""
    data = json.loads((made.directory / path).read_bytes())
    change(data)
    (made.directory / path).write_text(json.dumps(data))


def one(made: Made, pattern: str) -> Path:
    """The first file that matches."""
    return min(made.directory.glob(pattern))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path} has no {old}"
    path.write_text(text.replace(old, new, 1))


def link(made: Made) -> None:
    path = made.directory / "kernels/host.config"
    shutil.move(path, made.directory.parent / "elsewhere")
    path.symlink_to(made.directory.parent / "elsewhere")


def swap_packages(made: Made) -> None:
    first, second, *_ = sorted(made.directory.glob("repository/apt/pool/*/*.deb"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def unsign(made: Made) -> None:
    rpm = one(made, "repository/yum/*/*/Packages/*.rpm")
    subprocess.run(["rpmsign", "--delsign", rpm], check=True, capture_output=True)


def tree_of_linux(statement: Any) -> None:
    dependency = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    next(each for each in dependency if each["name"] == "linux-rt")["digest"]["gitTree"] = "f" * 40


def drop_a_package(data: Any) -> None:
    data["packages"] = [p for p in data["packages"] if p["name"] != f"virt-rt-host-{PLATFORM}"]


def without_gcc(listed: str) -> Callable[[Any], None]:
    """Drop a package that is in a builder alone."""
    return lambda data: data.update({listed: [each for each in data[listed] if each["name"] != "gcc"]})


def other_version(data: Any) -> None:
    next(p for p in data["packages"] if p["name"] == "libc6")["versionInfo"] = "2.40"


def other_digest(data: Any) -> None:
    next(c for c in data["components"] if c["name"] == "virt-rt-kernel")["hashes"][0]["content"] = "0" * 64


def more_of_it(data: Any) -> None:
    extra = copy.deepcopy(next(c for c in data["components"] if c["name"] == "virt-rt-kernel"))
    data["components"].append(extra | {"name": "virt-rt-extra", "bom-ref": "extra"})


def other_commit(data: Any) -> None:
    for package in data["packages"]:
        for reference in package.get("externalRefs", ()):
            reference["referenceLocator"] = reference["referenceLocator"].replace("1" * 40, "9" * 40)


def other_spec(data: Any) -> None:
    data["source:linux-rt"]["parameters"]["tree"] = "f" * 40


def false_version(data: Any) -> None:
    data["packages"][0]["files"]["deb"]["version"] = "9.9"


def sign_release(made: Made, text: bytes, *names: str) -> None:
    """Sign text as apt's Release, InRelease or both."""
    suite = one(made, "repository/apt/dists/*")
    with signing.Signer(made.workshop.environ, made.directory) as signer:
        if "Release" in names:
            (suite / "Release").write_bytes(text)
            (suite / "Release.gpg").write_bytes(signer.detached(text, made.record.date))
        if "InRelease" in names:
            (suite / "InRelease").write_bytes(signer.clearsigned(text, made.record.date))


def say_apt(made: Made, change: Callable[[dict[str, bytes]], object]) -> None:
    """Other indexes for apt, signed; `change` takes their contents by name."""
    suite = one(made, "repository/apt/dists/*")
    texts = {path.relative_to(suite).as_posix(): path.read_bytes() for path in suite.glob("main/*/Packages")}
    change(texts)
    lines = []
    for name, text in texts.items():
        digest = hashlib.sha256(text).hexdigest()
        (suite / name).write_bytes(text)
        ((suite / name).parent / "by-hash/SHA256" / digest).write_bytes(text)
        lines.append(f" {digest} {len(text)} {name}\n")
    for path in suite.glob("main/*/Packages*"):
        if path.relative_to(suite).as_posix() not in texts:
            path.unlink()
    sign_release(made, f"Suite: {suite.name}\nSHA256:\n{''.join(lines)}".encode(), "Release", "InRelease")


def say_yum(made: Made, old: str, new: str) -> None:
    """Another repomd.xml, signed."""
    path = one(made, "repository/yum/*/*/repodata/repomd.xml")
    replace_text(path, old, new)
    with signing.Signer(made.workshop.environ, made.directory) as signer:
        path.with_name("repomd.xml.asc").write_bytes(signer.detached(path.read_bytes(), made.record.date))


TAMPERINGS: dict[str, tuple[Callable[[Made], object], str, str]] = {
    "a file changed": (lambda m: flip(m.directory / "images/rt-guest.qcow2"), "files", "was changed"),
    "a file gone": (lambda m: (m.directory / "scripts/rt-guest/kvmqemu.sh").unlink(), "files", "is missing"),
    "a file more": (lambda m: (m.directory / "scripts/extra.sh").touch(), "files", "is not in SHA256SUMS"),
    "a link instead of a file": (link, "files", "was changed"),
    "sums changed": (lambda m: replace_text(m.directory / SUMS, "a", "b"), "signature", "signature is wrong"),
    "sums unsigned": (lambda m: (m.directory / SIGNATURE).unlink(), "signature", "no such file"),
    "nonsense for sums": (lambda m: (m.directory / SUMS).write_text("hello\n"), "files", "no checksum"),
    "a file twice in the sums": (
        lambda m: (m.directory / SUMS).write_text((m.directory / SUMS).read_text() * 2), "files", "a file twice"
    ),
    "no key": (lambda m: (m.directory / KEY).unlink(), "key", "no such file"),
    "no key in the repository": (
        lambda m: (m.directory / "repository" / KEY).write_text("other"), "key", "differ"
    ),
    "no description": (lambda m: (m.directory / RECORD).unlink(), "description", "no such file"),
    "nonsense for a description": (lambda m: (m.directory / RECORD).write_text("{}"), "description", "describes no"),
    "no provenance": (lambda m: (m.directory / PROVENANCE).unlink(), "provenance", "no such file"),
    "provenance changed": (
        lambda m: edit(m, PROVENANCE, lambda d: d.update(payload=base64.b64encode(b"{}").decode())),
        "provenance", "signature is wrong",
    ),
    "InRelease changed": (
        lambda m: replace_text(one(m, "repository/apt/dists/*/InRelease"), "Suite", "suite"),
        "apt", "signature is wrong",
    ),
    "Release changed": (
        lambda m: replace_text(one(m, "repository/apt/dists/*/Release"), "Suite", "suite"),
        "apt", "signature is wrong",
    ),
    "Packages changed": (lambda m: flip(one(m, "repository/apt/dists/*/main/*/Packages")), "apt", "not what InRelease"),
    "Packages by hash gone": (
        lambda m: one(m, "repository/apt/dists/*/main/*/by-hash/SHA256/*").unlink(), "apt", "is not there"
    ),
    "a deb changed": (lambda m: flip(one(m, "repository/apt/pool/*/*.deb")), "apt", "is not what main"),
    "a deb gone": (lambda m: one(m, "repository/apt/pool/*/*.deb").unlink(), "apt", "is not there"),
    "a deb more": (lambda m: shutil.copy(one(m, "repository/apt/pool/*/*.deb"),
                                         m.directory / "repository/apt/pool/x.deb"), "apt", "no index lists it"),
    "two debs swapped": (swap_packages, "packages", "not what release.json says"),
    "repomd.xml changed": (
        lambda m: replace_text(one(m, "repository/yum/*/*/repodata/repomd.xml"), "<revision>", "<revision>1"),
        "yum", "signature is wrong",
    ),
    "repomd.xml unsigned": (
        lambda m: one(m, "repository/yum/*/*/repodata/repomd.xml.asc").unlink(), "yum", "no such file"
    ),
    "yum's index changed": (
        lambda m: flip(one(m, "repository/yum/*/*/repodata/*-primary.xml*")), "yum", "not what repomd.xml"
    ),
    "an rpm changed": (lambda m: flip(one(m, "repository/yum/*/*/Packages/*.rpm")), "yum", "is not what the index"),
    "an rpm changed, asked of rpm": (
        lambda m: flip(one(m, "repository/yum/*/*/Packages/*.rpm")), "rpm signatures", "no good signature"
    ),
    "an rpm unsigned": (unsign, "rpm signatures", "no good signature"),
    "an rpm more": (
        lambda m: shutil.copy(one(m, "repository/yum/*/*/Packages/*.rpm"), m.directory / "repository/yum/x.rpm"),
        "yum", "no index lists it",
    ),
    "pointer changed": (
        lambda m: edit(m, "repository/repository.json", lambda d: d.update(payload="AAAA")),
        "repository state", "signature is wrong",
    ),
    "no apt": (lambda m: shutil.rmtree(m.directory / "repository/apt"), "apt", "has no apt/dists"),
    "no yum": (lambda m: shutil.rmtree(m.directory / "repository/yum"), "yum", "has no yum/"),
    "no rpm": (lambda m: shutil.rmtree(m.directory / "repository/yum"), "rpm signatures", "has no rpm"),
    "an index without packages": (lambda m: say_apt(m, lambda found: found.clear()), "apt", "lists no Packages"),
    "an index that nobody signed": (
        lambda m: shutil.copy(one(m, "repository/apt/dists/*/Release"), one(m, "repository/apt/dists/*") / "More"),
        "apt", "does not list More",
    ),
    "an index that leads elsewhere": (
        lambda m: say_apt(m, lambda found: found.update(
            {n: text.replace(b"Filename: pool/", b"Filename: ../key.asc#") for n, text in found.items()})),
        "apt", "lists it, and it is not there",
    ),
    "two forms of an index that differ": (
        lambda m: say_apt(m, lambda found: found.update(
            {f"{n}.xz": lzma.compress(b"other") for n in list(found) if n.endswith("/Packages")})),
        "apt", "Packages.xz differ",
    ),
    "two Releases": (
        lambda m: sign_release(m, one(m, "repository/apt/dists/*/Release").read_bytes() + b"Codename: x\n", "Release"),
        "apt", "Release and InRelease differ",
    ),
    "metadata without packages": (
        lambda m: say_yum(m, 'type="primary"', 'type="none"'), "yum", "lists no primary metadata"
    ),
    "another kind of checksum": (lambda m: say_yum(m, "<checksum type=\"sha256\">", "<checksum type=\"md5\">0"), "yum",
                                 "is not what repomd.xml"),
    "state changed": (lambda m: flip(one(m, "repository/state/*")), "repository state", ""),
}  # fmt: skip


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_tampering_is_found(tampering: str, made: Made) -> None:
    change, check, reason = TAMPERINGS[tampering]
    change(made)
    found = failed(made)
    assert reason in found[check], found


def forget_a_step(made: Made) -> None:
    name = "packages:builder/kernel"
    edit(made, "materials.json", lambda d: d.pop(name))
    edit(made, RECORD, lambda d: d["actions"].pop(name))
    restate(made, lambda s: s["predicate"]["buildDefinition"]["internalParameters"]["action_keys"].pop(name))


def other_tree(made: Made) -> None:
    edit(
        made, RECORD, lambda d: next(s for s in d["sources"] if s["name"] == "linux-rt").update(tree="f" * 40)
    )
    restate(made, tree_of_linux)


def failed_proof(made: Made) -> None:
    edit(made, "proof/boot.json", lambda d: d.update(ok=False))
    edit(made, RECORD, lambda d: d["proofs"][0].update(ok=False))


def other_builder(made: Made) -> None:
    edit(made, RECORD, lambda d: next(b for b in d["builders"] if b["name"] == "kernel").update(key="f" * 64))
    restate(
        made,
        lambda s: next(
            b for b in s["predicate"]["runDetails"]["builder"]["builderDependencies"] if b["name"] == "kernel"
        )["annotations"].update(action_key="f" * 64),
    )


#: What a signer might get wrong: signatures and sums fit, and yet something is not so.
SLIPS: dict[str, tuple[Callable[[Made], object], str, str]] = {
    "another signer named": (
        lambda m: edit(m, RECORD, lambda d: d["signer"].update(fingerprint="F" * 40)), "description", "names the signer"
    ),
    "a package that was never listed": (
        lambda m: edit(m, RECORD, drop_a_package), "packages", "release.json does not list it"
    ),
    "a version that is not the package's": (
        lambda m: edit(m, RECORD, false_version), "packages", "not what release.json says"
    ),
    "SPDX without a package": (
        lambda m: edit(m, "sbom.spdx.json", drop_a_package), "SBOM", "sbom.spdx.json: files: virt-rt-host-qemu-q35"
    ),
    "SPDX with another version inside a guest": (
        lambda m: edit(m, "sbom.spdx.json", other_version), "SBOM", "lacks libc6"
    ),
    "SPDX with another commit": (
        lambda m: edit(m, "sbom.spdx.json", other_commit), "SBOM", "sbom.spdx.json: sources: linux-rt"
    ),
    "no SPDX": (lambda m: (m.directory / "sbom.spdx.json").write_text("{}"), "SBOM", "no SPDX document"),
    "SPDX without a builder's package": (
        lambda m: edit(m, "sbom.spdx.json", without_gcc("packages")), "SBOM", "different Debian packages"
    ),
    "CycloneDX without a builder's package": (
        lambda m: edit(m, "sbom.cdx.json", without_gcc("components")), "SBOM", "different Debian packages"
    ),
    "CycloneDX with another digest": (
        lambda m: edit(m, "sbom.cdx.json", other_digest), "SBOM", "sbom.cdx.json: files: virt-rt-kernel"
    ),
    "CycloneDX with something more": (
        lambda m: edit(m, "sbom.cdx.json", more_of_it), "SBOM", "virt-rt-extra 0.1.0"
    ),
    "no CycloneDX": (lambda m: (m.directory / "sbom.cdx.json").write_text("[]"), "SBOM", "no CycloneDX document"),
    "a specification changed": (
        lambda m: edit(m, "materials.json", other_spec), "action keys", "the key of source:linux-rt"
    ),
    "a specification gone": (
        lambda m: edit(m, "materials.json", lambda d: d.pop("source:linux-rt")), "action keys", "source:linux-rt"
    ),
    "a specification gone everywhere": (
        forget_a_step, "action keys", "materials.json lacks the action of key"
    ),
    "a tree that is not the specification's": (
        other_tree, "action keys", "source linux-rt: the tree of materials.json is not that of release.json"
    ),
    "a builder that is not the specification's": (
        other_builder, "action keys", "builder kernel: release.json has another key"
    ),
    "another version than the repository's": (
        lambda m: edit(m, RECORD, lambda d: d.update(version="9.9")), "repository state", "not qemu-q35 9.9 alone"
    ),
    "other packages than the repository's": (
        lambda m: edit(m, RECORD, drop_a_package), "repository state", "list different packages"
    ),
    "a proof that failed": (
        lambda m: edit(m, "proof/boot.json", lambda d: d.update(ok=False)), "proofs", "differ about the verdict"
    ),
    "a proof that failed, and is said to": (failed_proof, "proofs", "boot.json: the proof failed"),
    "a proof worth more than it is": (
        lambda m: edit(m, "proof/stack.json", lambda d: d.update(latency_verdict="measured")), "proofs", "differ"
    ),
    "a proof that is none": (
        lambda m: edit(m, "proof/boot.json", lambda d: d.update(booted_sha256=[])), "proofs", "cannot be read: Attr"
    ),
    "no proof": (lambda m: edit(m, RECORD, lambda d: d.update(proofs=[])), "proofs", "names no proof"),
    "nonsense for a proof": (lambda m: (m.directory / "proof/boot.json").write_text("x"), "proofs", "is not JSON"),
    "no specifications": (
        lambda m: (m.directory / "materials.json").write_text("[]"), "action keys", "holds no specifications"
    ),
    "another disk than was booted": (
        lambda m: flip(m.directory / "images/rt-guest.qcow2"), "proofs", "is not the one that release.json describes"
    ),
    "another proof than was described": (
        lambda m: edit(m, "proof/boot.json", lambda d: d.update(more=1)), "proofs", "boot.json is not the one"
    ),
    "another configuration": (
        lambda m: (m.directory / "kernels/guest.config").write_text("CONFIG_VIRTIO=m\n"),
        "description", "guest.config is not the configuration",
    ),
    "a proof of another image": (
        lambda m: edit(m, "proof/boot.json", lambda d: d["booted_sha256"].clear()), "proofs", "was booted"
    ),
}  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_a_signature_does_not_make_it_so(slip: str, made: Made) -> None:
    change, check, reason = SLIPS[slip]
    change(made)
    resign(made)
    found = failed(made)
    assert reason in found.pop(check, "nothing"), found
    assert not found.keys() & {"signature", "files", "apt", "yum"}


STATEMENTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "not about a file": (lambda s: s["subject"].pop(), "differ about"),
    "about something else": (lambda s: s["subject"][0].update(name="other"), "differ about"),
    "a file twice": (lambda s: s["subject"].append(s["subject"][0]), "names a file twice"),
    "from another tree": (tree_of_linux, "different sources"),
    "from another patch": (
        lambda s: next(
            d for d in s["predicate"]["buildDefinition"]["resolvedDependencies"]
            if d.get("annotations", {}).get("kind") == "patch"
        )["digest"].update(sha256="0" * 64),
        "different patches",
    ),
    "of another version": (
        lambda s: s["predicate"]["buildDefinition"]["externalParameters"].update(version="9.9"),
        "is of release:qemu-q35 9.9",
    ),
    "by another builder": (
        lambda s: s["predicate"]["runDetails"]["builder"]["builderDependencies"].pop(), "different builders"
    ),
    "with a proof worth more": (
        lambda s: s["predicate"]["runDetails"]["byproducts"][0]["annotations"].update(worth="measured"),
        "different proofs",
    ),
    "another kind": (lambda s: s.update(predicateType="https://example.org/other"), "no statement about a release"),
    "another build": (
        lambda s: s["predicate"]["buildDefinition"].update(buildType="other"), "no statement about a release"
    ),
    "nothing": (lambda s: s.clear(), "no statement about a release"),
}  # fmt: skip


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_statement_must_be_about_this(statement: str, made: Made) -> None:
    change, reason = STATEMENTS[statement]
    restate(made, lambda data: void(change(data)))
    assert reason in failed(made)["provenance"]


def void(value: object) -> None:
    """Forget a value."""


def test_a_key_of_another_release_is_found(made: Made, other_key: bytes) -> None:
    (made.directory / KEY).write_bytes(other_key)
    assert "another key" in failed(made)["key"]


def test_indexes_lead_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "secret").write_text("x")
    with pytest.raises(UserError, match="is not there"):
        expect_file(tmp_path / "pool", "../secret", 1, digest_file(tmp_path / "secret"), "the index")
    with pytest.raises(UserError, match="leads out of pool"):
        read(tmp_path / "pool", "../secret")


# The lock -------------------------------------------------------------------------------------


def test_another_checkout_is_said_plainly(made: Made) -> None:
    linux, qemu = SOURCES.sources
    moved = SOURCES.replace([msgspec.structs.replace(linux, commit="9" * 40, ref="v6.12.2-rt1")])
    asked = {
        "v6.12.2-rt1 (999999999999)": replace(made.checkout, sources=moved),
        "lock nothing": replace(made.checkout, sources=msgspec.structs.replace(SOURCES, sources=(qemu,))),
        "other patches": replace(made.checkout, patches={}),
        "Debian packages that went into": replace(made.checkout, packages=type(made.checkout.packages)()),
    }
    for reason, checkout in asked.items():
        found = {v.check: v for v in verify(made.directory, None, checkout)}
        assert reason in found["lock"].detail and "--no-lock" in found["lock"].remedy
        assert [name for name, v in found.items() if v.verdict == "failed"] == ["lock"]
    without = {v.check: v for v in verify(made.directory, None, None)}
    assert without["lock"].verdict == "note"


# The command ----------------------------------------------------------------------------------


def doit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "doit", "verify-release", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_says_a_line_per_check(made: Made) -> None:
    done = doit(str(made.directory), "--no-lock", "--key", str(made.directory / KEY))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * (len(lines) - 1) + ["note"]
    flip(made.directory / "images/rt-guest.qcow2")
    done = doit(str(made.directory), "--no-lock")
    assert done.returncode == 2
    assert "failed files: images/rt-guest.qcow2 was changed\n" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 of ")
    as_json = json.loads(doit(str(made.directory), "--no-lock", "--json").stdout)
    assert [row["check"] for row in as_json if row["verdict"] == "failed"] == ["files"]
    # this checkout pins other sources than the made-up ones
    assert "failed lock: source linux-rt" in doit(str(made.directory)).stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "takes one DIR"),
        (("/nonexistent",), "there is no directory /nonexistent"),
        ((str(ROOT / "docs"),), "is no release directory"),
        ((str(ROOT / "docs"), "--key", "/nonexistent"), "--key /nonexistent: no such file"),
        ((str(ROOT / "docs"), "--key="), "--key : is a directory"),
    ],
)
def test_the_command_refuses(arguments: tuple[str, ...], reason: str) -> None:
    done = doit(*arguments)
    assert done.returncode == 2
    assert reason in done.stdout and len(done.stdout.splitlines()) == 2


def test_names_of_files_say_nothing_else(made: Made) -> None:
    (made.directory / "a\nok     files: all is well\x1b[2J").touch()
    (made.directory / os.fsdecode(b"\xff")).touch()
    done = doit(str(made.directory), "--no-lock")
    assert done.returncode == 2 and "\x1b" not in done.stdout
    assert not any(line.startswith("ok     files") for line in done.stdout.splitlines())


# What is remembered, and what changed ---------------------------------------------------------


def at(record: Record, version: str, **fields: Any) -> Record:
    return msgspec.structs.replace(record, version=version, **fields)


def test_the_newest_two_releases_are_remembered(pristine: Made, tmp_path: Path) -> None:
    record = pristine.record
    assert previous(tmp_path, PLATFORM, "0.1.0") is None
    for version in ("0.1.0", "0.2.0", "0.2.0", "0.3.0"):
        path = remember(tmp_path, encode(at(record, version)))
    assert path == tmp_path / f"recipes/releases/{PLATFORM}.json"
    assert [r["version"] for r in json.loads(path.read_bytes())["releases"]] == ["0.3.0", "0.2.0"]

    def compared_with(version: str) -> str:
        found = previous(tmp_path, PLATFORM, version)
        return found.version if found else ""

    # a release that was published is still compared with the one before
    assert (compared_with("0.4.0"), compared_with("0.3.0")) == ("0.3.0", "0.2.0")
    path.write_text("{}")
    with pytest.raises(UserError, match="recipes/releases/qemu-q35.json cannot be read") as error:
        previous(tmp_path, PLATFORM, "0.4.0")
    assert "git checkout" in error.value.hint
    with pytest.raises(UserError, match="describes no release"):
        remember(tmp_path, b"[]")


def test_only_the_release_that_is_compared_with_is_an_input(
    environ: Environ, pristine: Made, tmp_path: Path
) -> None:
    workshop = Workshop(tmp_path, environ, version="0.3.0")

    def key() -> str:
        return Graph(workshop.actions().values()).keys[release_name(PLATFORM)]

    first = key()
    remember(workshop.root, encode(at(pristine.record, "0.2.0")))
    second = key()
    assert second != first
    remember(workshop.root, encode(at(pristine.record, "0.3.0")))
    assert key() == second


def test_changes_are_named(pristine: Made) -> None:
    new = at(pristine.record, "0.2.0")
    assert not changes(pristine.record, new)
    linux, qemu = new.sources
    kernel, *packages = new.packages
    guest = new.guests[GUEST]
    old = at(
        new,
        "0.1.0",
        sources=(
            msgspec.structs.replace(linux, commit="0" * 40, ref="v6.12.0-rt1"),
            msgspec.structs.replace(qemu, patches=()),
        ),
        kernels={**new.kernels, "host": releaserecord.Kernel(release="x", config={"KVM": "m", "HZ": "250"})},
        packages=(*packages, msgspec.structs.replace(kernel, name="virt-rt-gone")),
        guests={GUEST: msgspec.structs.replace(guest, packages=guest.packages[1:])},
    )
    found = changes(old, new)
    assert found and found.since == "0.1.0"
    assert [(name, before[:11], now[:11]) for name, before, now in found.sources] == [
        ("linux-rt", "v6.12.0-rt1", "v6.12.1-rt1")
    ]
    assert [(name, before) for name, before, _ in found.patches] == [(f"qemu-kvm-rt/{PATCH}", "")]
    assert found.configs == {"guest": (), "host": (("HZ", "250", ""), ("KVM", "m", "y"))}
    assert [(name, bool(before), bool(now)) for name, before, now in found.packages] == [
        ("virt-rt-gone", True, False),
        (kernel.name, False, True),
    ]
    assert found.images == {GUEST: (("bash", "", "1"),)}


# The page -------------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """The page's text, what it refers to, and whether its elements are closed."""

    VOID = frozenset({"meta", "img", "br", "link", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not set(self.open) & {"style"}:
            self.text += f" {data}"


def test_the_page_needs_nothing_else(pristine: Made) -> None:
    text = (pristine.directory / "index.html").read_text()
    page = Reader(text)
    assert page.tags >= {"header", "main", "nav", "section", "h1", "table"}
    assert not page.tags & {"script", "link", "iframe"}
    for reference in page.references:
        if reference.startswith("#"):
            assert f'id="{reference[1:]}"' in text
        elif not reference.startswith("data:image/svg+xml;base64,"):
            assert (pristine.directory / reference.replace("%2B", "+")).is_file(), reference
    assert "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_the_page_tells_what_the_proof_is_worth(pristine: Made) -> None:
    text = " ".join(Reader((pristine.directory / "index.html").read_text()).text.split())
    assert "Proven, under emulation" in text and EMULATED in text and "no evidence of latency" in text
    assert "This is the first release of qemu-q35." in text
    assert "development key" not in text
    assert "apt-get install virt-rt-host-qemu-q35" in text and "dnf install virt-rt-host-qemu-q35" in text
    assert "file:$PWD/repository/apt" in text and "https://" not in text.replace(
        "https://git.example.org", ""
    )


def test_the_second_release_says_what_changed_and_where_it_is(
    environ: Environ, pristine: Made, tmp_path: Path
) -> None:
    workshop = Workshop(tmp_path, environ, version="0.2.0", url="https://packages.example.org/rt")
    workshop.config = {"host": "CONFIG_KVM=y\nCONFIG_HZ=1000\n", "guest": "CONFIG_VIRTIO=y\n"}
    remember(workshop.root, encode(pristine.record))
    made = Made(workshop, workshop.make())
    assert failed(made) == {}
    text = " ".join(Reader((made.directory / "index.html").read_text()).text.split())
    assert "Since 0.1.0:" in text
    assert re.search(r"Configuration of the host kernel name 0.1.0 0.2.0 HZ \S 1000", text)
    assert "Configuration of the guest kernel" not in text
    assert "once it is promoted, write stable instead" in text
    for name in ("virt-rt-testing.sources", "virt-rt-testing.repo"):
        assert f"https://packages.example.org/rt/{name}" in text
        assert (made.directory / "repository" / name).is_file()


def test_a_development_key_is_marked_everywhere(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, {"PATH": os.environ["PATH"]}, what=("kernel", "qemu", "image"))
    made = Made(workshop, workshop.make())
    assert made.record.signer.development
    text = " ".join(Reader((made.directory / "index.html").read_text()).text.split())
    assert "Signed by a development key: not for release" in text
    assert failed(made) == {}
    assert "not for release" in verdicts(made)["development key"].detail


def test_what_others_wrote_is_escaped(environ: Environ, tmp_path: Path) -> None:
    workshop = Workshop(
        tmp_path,
        environ,
        config={"host": 'CONFIG_X="<b>&"\n', "guest": "CONFIG_Y=y\n"},
        what=("kernel", "qemu", "image"),
    )
    linux = SOURCES.sources[0]
    workshop.sources = SOURCES.replace([msgspec.structs.replace(linux, ref="<script>alert(1)</script>")])
    page = Reader((workshop.make() / "index.html").read_text())
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_no_wider_than_the_screen(width: int, pristine: Made, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    measure = (
        "<script>document.title = document.documentElement.scrollWidth + ' of ' + window.innerWidth</script>"
    )
    text = (pristine.directory / "index.html").read_text()
    # headless Chromium makes no window that narrow, but a frame may be
    inner = text.replace("</body>", f"{measure.replace('document.title', 'parent.document.title')}</body>")
    quoted = inner.replace("&", "&amp;").replace('"', "&quot;")
    frame = f'<iframe style="border:0" width="{width}" height="900" srcdoc="{quoted}"></iframe>'
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><title></title>{frame}")
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path}/profile",
         f"--window-size={width + 100},900", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    measured = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert measured, done.stderr
    assert int(measured[2]) == width
    assert int(measured[1]) <= width


# What cannot be made --------------------------------------------------------------------------


def test_what_is_not_as_said_stops_the_release(environ: Environ, tmp_path: Path) -> None:
    failing = Workshop(tmp_path / "a", environ, proof={"ok": False})
    with pytest.raises(InternalError, match="boot.json tells of a failure"):
        failing.make()

    strange = Workshop(tmp_path / "b", environ, inside="strange 1 amd64\n")
    with pytest.raises(InternalError, match="has strange 1, which is not locked"):
        strange.make()
    lacking = Workshop(tmp_path / "c", environ, unpublished=f"package:{PLATFORM}:kernel")
    with pytest.raises(InternalError, match="virt-rt-kernel, as deb, is in the repository or among"):
        lacking.make()


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ({"platform": "canoe-pass"}, "it is of canoe-pass"),
        ({"kernels": []}, "other kernels"),
        ({"packages": []}, "other packages"),
    ],
)
def test_a_report_of_something_else_stops_the_release(
    report: dict[str, Any], reason: str, environ: Environ, tmp_path: Path
) -> None:
    with pytest.raises(InternalError, match=f"report is not of this release: {reason}|it tells of {reason}"):
        Workshop(tmp_path, environ, report=report).make()


def test_a_receiver_sees_that_the_report_is_of_something_else(made: Made) -> None:
    assert (
        verdicts(made)["report"].detail == "structure passed, boot passed, stack passed, latency not proven"
    )
    edit(made, "proof/lab/report.json", lambda data: data.update(platform="canoe-pass"))
    resign(made)
    assert "it is of canoe-pass" in failed(made)["report"]
    edit(made, "proof/lab/report.json", lambda data: data.update(ok=False))
    resign(made)
    assert "says ok: False" in failed(made)["report"]
    (made.directory / "proof/lab/report.json").write_text("")
    resign(made)
    assert "is no report" in failed(made)["report"]


def test_a_changed_key_stops_the_release(environ: Environ, tmp_path: Path) -> None:
    secret = tmp_path / "secret.asc"
    shutil.copy(environ[signing.KEY_FILE], secret)
    workshop = Workshop(tmp_path, environ | {signing.KEY_FILE: str(secret)})
    graph = Graph(workshop.actions().values())
    with workshop.executor(graph) as executor:
        executor.result(f"repo:{PLATFORM}")
        secret.write_bytes(make_key(tmp_path, "Other <other@example.org>"))
        with pytest.raises(UserError, match="the signing key changed"):
            executor.result(release_name(PLATFORM))
    assert (
        Graph(workshop.actions().values()).keys[release_name(PLATFORM)] != graph.keys[release_name(PLATFORM)]
    )


def test_tools_that_are_missing_pass_nothing(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = failed(made)
    assert found["rpm signatures"] == "rpmkeys is not installed"
    assert found["signature"] == found["apt"] == found["provenance"] == "gpgv is not installed"


def test_rpm_takes_keys_only(made: Made) -> None:
    with pytest.raises(UserError, match="rpm does not take the key"):
        check_rpms(made.directory / "repository", b"no key")


def test_sboms_that_break_their_rules_are_refused(pristine: Made) -> None:
    from pipeline.sbom import Bill, Component

    root = Component(ref="release", kind="release", name="r", version="1")
    wrong = Component(ref="x", kind="package", name="x", version="1", sha256="no digest")
    bill = Bill((root, wrong), (("release", "contains", "x"),))
    with pytest.raises(InternalError, match="breaks SPDX 2.3"):
        spdx(bill, pristine.record.when, "00")
    with pytest.raises(InternalError, match="breaks CycloneDX 1.6"):
        cyclonedx(bill, pristine.record.when, "00")


def test_every_key_follows_from_its_specification(pristine: Made) -> None:
    specs = json.loads((pristine.directory / "materials.json").read_bytes())
    assert {name: keys.key(spec) for name, spec in specs.items()} == pristine.record.actions
    assert {"source:linux-rt", "builder:kernel", f"repo:{PLATFORM}", release_name(PLATFORM)} <= specs.keys()
    assert (
        Statement(
            open_envelope(
                json.loads((pristine.directory / PROVENANCE).read_bytes()),
                (pristine.directory / KEY).read_bytes(),
                PAYLOAD_TYPE,
            )
        ).keys
        == pristine.record.actions
    )
