"""A release's bill of materials: what is in it and what it was made with, before it is written in some format.

`bill` says it once; `spdxbill` and `cyclonebill` write the same components and relations as SPDX and CycloneDX.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.architecture import architecture
from pipeline.errors import InternalError
from pipeline.locks import LockedPackage, PackageSet, qualified
from pipeline.releaserecord import Distribution, Guest, Installed, Package, Record, Source

Kind = Literal["release", "package", "image", "source", "builder", "debian"]
#: A line of the bill reads: the first component, this word, the second.
Relation = Literal["contains", "made from", "builds"]

#: The builder of which packages carry libraries.
LIBRARIES = "package"
#: Where the archives of `LockedPackage.archive` are for everybody.
ARCHIVES = "https://deb.debian.org"


@dataclass(frozen=True, slots=True)
class Component:
    """Something that a release has in it or was made with.

    `ref` is unique in the bill and made of letters, digits, dots and dashes. `sha256` is of the file, which is
    `file` below the release directory or `address` elsewhere; a source has `commit` and `tree` instead. `licence`
    is prose, `patches` are texts by name, in the order in which they are applied.
    """

    ref: str
    kind: Kind
    name: str
    version: str
    purl: str = ""
    sha256: str = ""
    file: str = ""
    address: str = ""
    commit: str = ""
    tree: str = ""
    note: str = ""
    licence: str = ""
    patches: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bill:
    """All components, the release itself first, and how they relate: (ref, relation, ref)."""

    components: tuple[Component, ...]
    relations: tuple[tuple[str, Relation, str], ...]

    @property
    def root(self) -> Component:
        """The release."""
        return self.components[0]


def bill(record: Record, sets: Iterable[PackageSet], patches: Mapping[str, Mapping[str, bytes]]) -> Bill:
    """The bill of a release.

    `sets` are the locked packages of its builders and guests, each once; `patches` are our patches' texts by source
    and file name.
    """
    locked = {each.name: each for each in sets}
    found: dict[str, Component] = {}
    relations: list[tuple[str, Relation, str]] = []

    def add(component: Component) -> str:
        known = found.setdefault(component.ref, component)
        # One file may lie at two places: with a point release it comes from debian-security to debian.
        if replace(known, address=component.address) != component:
            raise InternalError(f"two things are named {component.ref} in the SBOM", "name them apart")
        return component.ref

    root = add(
        Component(
            ref=f"release-{record.platform}",
            kind="release",
            name=f"virt-rt {record.platform}",
            version=record.version,
            purl=_purl("generic", "virt-rt", record.platform, record.version),
            note=record.description,
        )
    )
    for source in record.sources:
        texts = patches.get(source.name, {})
        if sorted(texts) != sorted(patch.name for patch in source.patches):
            raise InternalError(
                f"the patches of {source.name} are not those of {record.platform}", "give them"
            )
        add(_source(source, texts))
    known = {
        name: {(p.name, p.version): _debian(p, each.suite) for p in each.packages}
        for name, each in locked.items()
    }

    def debian(of: str, package: Distribution | Installed, arch: str) -> str:
        """Add a package of a locked set; `arch` is its architecture."""
        name = qualified(package.name, arch, locked[of].arch)
        component = known[of].get((name, package.version))
        if component is None:
            raise InternalError(f"{of} has no {package.name} {package.version}", "lock what is used")
        return add(component)

    for builder in record.builders:
        ref = add(_builder(builder.name, builder.key, builder.suite))
        relations.append((ref, "builds", root))
        relations += [(ref, "contains", add(each)) for each in known[f"builder/{builder.name}"].values()]
    libraries = f"builder/{architecture(record.arch).builder(LIBRARIES)}"
    images = {}
    for name, guest in record.guests.items():
        images[name] = add(_image(name, guest, record.version))
        relations.append((root, "contains", images[name]))
        relations += [
            (images[name], "contains", debian(f"guest/{name}", each, each.arch)) for each in guest.packages
        ]
    for package in record.packages:
        for component in _package(package):
            ref = add(component)
            relations.append((root, "contains", ref))
            relations += [(ref, "made from", source_ref(source)) for source in package.sources]
            relations += [(ref, "contains", debian(libraries, each, record.arch)) for each in package.bundled]
            relations += [
                (ref, "contains", images[guest])
                for guest in record.guests
                if package.name == f"virt-rt-image-{guest}"
            ]
    return Bill(tuple(found.values()), tuple(dict.fromkeys(relations)))


def source_ref(name: str) -> str:
    """The ref of a source."""
    return f"source-{name}"


def _source(source: Source, patches: Mapping[str, bytes]) -> Component:
    note = f"{source.ref} from {source.location}: commit {source.commit}, tree {source.tree}"
    if source.series:
        note += f", with the distribution's {source.series} patch series"
    described = next((f.name for f in source.files if f.name.endswith(".dsc")), "")
    if described:
        name = described.rpartition("/")[2].partition("_")[0]
        purl = _purl("deb", "debian", name, source.ref, arch="source", distro=source.location)
        address = f"{ARCHIVES}/{described}"
    else:
        address = f"{source.location}@{source.commit}"
        address = address if address.startswith("git") else f"git+{address}"
        purl = _purl("generic", "", source.name, source.ref, vcs_url=address)
    return Component(
        ref=source_ref(source.name),
        kind="source",
        name=source.name,
        version=source.ref,
        purl=purl,
        address=address,
        commit=source.commit,
        tree=source.tree,
        note=note,
        patches=dict(sorted(patches.items())),
    )


def _builder(name: str, key: str, suite: str) -> Component:
    return Component(
        ref=f"builder-{name}",
        kind="builder",
        name=f"builder {name}",
        version=key[:12],
        note=f"the container image in which steps ran: Debian {suite}, action key {key}",
    )


def _image(name: str, guest: Guest, version: str) -> Component:
    return Component(
        ref=f"image-{name}",
        kind="image",
        name=f"guest image {name}",
        version=version,
        sha256=guest.sha256,
        file=guest.image,
        note=guest.description,
    )


def _debian(package: LockedPackage, suite: str) -> Component:
    return Component(
        ref=f"debian-{word(package.name)}-{package.arch}-{package.sha256[:12]}",
        kind="debian",
        name=package.name,
        version=package.version,
        purl=_purl("deb", "debian", package.bare_name, package.version, arch=package.arch, distro=suite),
        sha256=package.sha256,
        address=f"{ARCHIVES}/{package.archive}/{package.path}",
    )


def _package(package: Package) -> Iterator[Component]:
    for form, file in sorted(package.files.items()):
        yield Component(
            ref=f"{form}-{word(package.name)}-{file.sha256[:12]}",
            kind="package",
            name=package.name,
            version=file.version,
            purl=_purl(form, "virt-rt", package.name, file.version, arch=file.arch),
            sha256=file.sha256,
            file=file.path,
            licence="; ".join(package.licences),
        )


def word(name: str) -> str:
    """The name in letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.-]", "-", name)


def _purl(kind: str, namespace: str, name: str, version: str, **qualifiers: str) -> str:
    from packageurl import PackageURL  # only a run that makes a release needs it

    return PackageURL(kind, namespace or None, name, version, qualifiers or None).to_string()
