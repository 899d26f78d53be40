"""A bill of materials as SPDX 2.3 JSON, held against the specification's rules before it is given out."""

from __future__ import annotations

import hashlib
import io
from datetime import datetime
from typing import TYPE_CHECKING

from pipeline.errors import InternalError
from pipeline.sbom import Bill, Component, Relation, word

if TYPE_CHECKING:
    from spdx_tools.spdx.model import File, Package


def spdx(bill: Bill, when: datetime, identity: str) -> bytes:
    """The bill as SPDX; `when` is the release's date, `identity` (hex) makes the document's name space unique.

    Raises `InternalError` when the result breaks a rule of SPDX 2.3.
    """
    # Imported here: takes half a second, which only a run that makes a release should spend.
    from spdx_tools.spdx.model import (
        Actor,
        ActorType,
        CreationInfo,
        Document,
        Relationship,
        RelationshipType,
    )
    from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document
    from spdx_tools.spdx.writer.json.json_writer import write_document_to_stream

    kinds = {
        "contains": RelationshipType.CONTAINS,
        "made from": RelationshipType.GENERATED_FROM,
        "builds": RelationshipType.BUILD_TOOL_OF,
    }

    def related(first: str, relation: Relation, second: str) -> Relationship:
        return Relationship(_id(first), kinds[relation], _id(second))

    root = bill.root
    patches = [
        (_file(component, name, text), component)
        for component in bill.components
        for name, text in component.patches.items()
    ]
    document = Document(
        CreationInfo(
            spdx_version="SPDX-2.3",
            spdx_id="SPDXRef-DOCUMENT",
            name=f"{root.name} {root.version}",
            document_namespace=f"https://virt-rt.invalid/spdx/{identity}",
            creators=[Actor(ActorType.TOOL, "virt-rt")],
            created=when.replace(tzinfo=None),  # the library takes it for UTC
        ),
        packages=[_package(component) for component in bill.components],
        files=[file for file, _ in patches],
        relationships=[
            Relationship("SPDXRef-DOCUMENT", RelationshipType.DESCRIBES, _id(root.ref)),
            *(related(*relation) for relation in bill.relations),
            *(
                Relationship(file.spdx_id, RelationshipType.PATCH_FOR, _id(component.ref))
                for file, component in patches
            ),
        ],
    )
    if wrong := validate_full_spdx_document(document):
        first = wrong[0]
        raise InternalError(
            f"the SBOM breaks SPDX 2.3: {first.validation_message}",
            f"{len(wrong)} such errors; mend pipeline/spdxbill.py",
        )
    text = io.StringIO()
    write_document_to_stream(document, text, validate=False, drop_duplicates=False)
    return f"{text.getvalue()}\n".encode()


def _id(ref: str) -> str:
    return f"SPDXRef-{word(ref)}"


def _package(component: Component) -> Package:
    from spdx_tools.spdx.model import (
        Checksum,
        ChecksumAlgorithm,
        ExternalPackageRef,
        ExternalPackageRefCategory,
        Package,
        PackagePurpose,
        SpdxNoAssertion,
    )
    from spdx_tools.spdx.validation.uri_validators import validate_download_location

    purposes = {
        "release": PackagePurpose.OTHER,
        "package": PackagePurpose.INSTALL,
        "image": PackagePurpose.OPERATING_SYSTEM,
        "source": PackagePurpose.SOURCE,
        "builder": PackagePurpose.CONTAINER,
        "debian": PackagePurpose.INSTALL,
    }
    references = []
    if component.purl:
        category = ExternalPackageRefCategory.PACKAGE_MANAGER
        references.append(ExternalPackageRef(category, "purl", component.purl))
    for what in ("commit", "tree"):
        if value := getattr(component, what):
            category = ExternalPackageRefCategory.PERSISTENT_ID
            references.append(ExternalPackageRef(category, "gitoid", f"gitoid:{what}:sha1:{value}"))
    known = component.address and not validate_download_location(component.address)
    return Package(
        spdx_id=_id(component.ref),
        name=component.name,
        version=component.version,
        download_location=component.address if known else SpdxNoAssertion(),
        file_name=component.file or None,
        files_analyzed=False,
        checksums=[Checksum(ChecksumAlgorithm.SHA256, component.sha256)] if component.sha256 else [],
        source_info=component.note or None,
        license_concluded=SpdxNoAssertion(),
        license_declared=SpdxNoAssertion(),
        license_comment=component.licence or None,
        copyright_text=SpdxNoAssertion(),
        external_references=references,
        primary_package_purpose=purposes[component.kind],
    )


def _file(component: Component, name: str, text: bytes) -> File:
    from spdx_tools.spdx.model import Checksum, ChecksumAlgorithm, File, FileType, SpdxNoAssertion

    return File(
        name=f"./{component.name}/{name}",
        spdx_id=_id(f"patch-{component.name}-{name}"),
        checksums=[
            # SPDX 2.3 demands SHA-1 of every file; the other one is what to trust
            Checksum(ChecksumAlgorithm.SHA1, hashlib.sha1(text, usedforsecurity=False).hexdigest()),
            Checksum(ChecksumAlgorithm.SHA256, hashlib.sha256(text).hexdigest()),
        ],
        file_types=[FileType.SOURCE],
        license_concluded=SpdxNoAssertion(),
        license_info_in_file=[SpdxNoAssertion()],
        copyright_text=SpdxNoAssertion(),
    )
