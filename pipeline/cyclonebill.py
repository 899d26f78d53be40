"""A bill of materials as CycloneDX 1.6 JSON, held against the schema before it is given out."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import TYPE_CHECKING

from pipeline.errors import InternalError
from pipeline.sbom import Bill, Component

if TYPE_CHECKING:
    from cyclonedx.model.component import Component as CycloneComponent

#: CycloneDX's properties of ours begin so.
OURS = "virt-rt"


def cyclonedx(bill: Bill, when: datetime, identity: str) -> bytes:
    """The bill as CycloneDX; `when` is the release's date, `identity` (hex) makes the serial number.

    Raises `InternalError` when the result breaks the schema of CycloneDX 1.6.
    """
    # Imported here, since only a run that makes a release needs it.
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.dependency import Dependency
    from cyclonedx.output.json import JsonV1Dot6
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    made = {component.ref: _component(component) for component in bill.components}
    needs: dict[str, list[str]] = {ref: [] for ref in made}
    for first, relation, second in bill.relations:
        # "builds" runs the other way: what is built depends on the builder
        owner, needed = (second, first) if relation == "builds" else (first, second)
        needs[owner].append(needed)
    document = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"virt-rt:{identity}"),
        metadata=BomMetaData(timestamp=when, component=made[bill.root.ref]),
        components=[made[component.ref] for component in bill.components[1:]],
        dependencies=[
            Dependency(made[ref].bom_ref, [Dependency(made[each].bom_ref) for each in dict.fromkeys(needed)])
            for ref, needed in needs.items()
        ],
    )
    text: str = JsonV1Dot6(document).output_as_string(indent=1)
    if (wrong := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is not None:
        raise InternalError(f"the SBOM breaks CycloneDX 1.6: {wrong}", "mend pipeline/cyclonebill.py")
    return f"{text}\n".encode()


def _component(component: Component) -> CycloneComponent:
    from cyclonedx.model import AttachedText, HashAlgorithm, HashType, Property
    from cyclonedx.model.component import (
        Commit,
        ComponentScope,
        ComponentType,
        Diff,
        Patch,
        PatchClassification,
        Pedigree,
    )
    from cyclonedx.model.component import Component as CycloneComponent
    from packageurl import PackageURL

    types = {
        "release": ComponentType.PLATFORM,
        "image": ComponentType.OPERATING_SYSTEM,
        "builder": ComponentType.CONTAINER,
        "source": ComponentType.LIBRARY,
    }
    said = {
        "kind": component.kind,
        "file": component.file,
        "address": component.address,
        "tree": component.tree,
        "licence": component.licence,
    }
    pedigree = None
    if component.commit:
        pedigree = Pedigree(
            commits=[Commit(uid=component.commit)],
            patches=[
                Patch(
                    type=PatchClassification.UNOFFICIAL, diff=Diff(text=AttachedText(content=text.decode()))
                )
                for text in component.patches.values()
            ],
        )
    return CycloneComponent(
        type=types.get(component.kind, ComponentType.LIBRARY),
        bom_ref=component.ref,
        name=component.name,
        version=component.version,
        description=component.note or None,
        purl=PackageURL.from_string(component.purl) if component.purl else None,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=component.sha256)] if component.sha256 else [],
        # nothing of a builder is in the release
        scope=ComponentScope.EXCLUDED if component.kind == "builder" else None,
        pedigree=pedigree,
        properties=[Property(name=f"{OURS}:{name}", value=value) for name, value in said.items() if value],
    )
