"""Where a release comes from: an in-toto statement with SLSA provenance, about every file of `SHA256SUMS`.

It names no time and no machine: equal inputs give an equal statement, whoever builds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import UserError
from pipeline.releaserecord import Record
from pipeline.sbom import Bill

#: Of the DSSE envelope that holds the statement.
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
#: Names of what was done and of what did it. URNs, since the project has no address of its own.
BUILD_TYPE = "urn:virt-rt:release:v1"
BUILDER = "urn:virt-rt:builder"


def statement(record: Record, bill: Bill, subjects: Mapping[str, str]) -> bytes:
    """The statement as JSON; `subjects` maps paths in the release directory to sha256 (hex)."""
    data = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": d}} for name, d in sorted(subjects.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"task": f"release:{record.platform}", "version": record.version},
                "internalParameters": {"action_keys": dict(sorted(record.actions.items()))},
                "resolvedDependencies": list(_dependencies(record, bill)),
            },
            "runDetails": {
                "builder": {
                    "id": BUILDER,
                    "builderDependencies": [
                        {
                            "name": builder.name,
                            "uri": f"{BUILDER}:{builder.name}",
                            "annotations": {"action_key": builder.key, "suite": builder.suite},
                        }
                        for builder in record.builders
                    ],
                },
                "metadata": {"invocationId": record.actions[f"release:{record.platform}"]},
                "byproducts": [
                    {
                        "name": proof.file,
                        "digest": {"sha256": proof.sha256},
                        "annotations": {
                            "level": proof.level,
                            "ok": proof.ok,
                            "evidence": proof.evidence,
                            "worth": proof.worth,
                        },
                    }
                    for proof in record.proofs
                ],
            },
        },
    }
    return json.dumps(data, indent=1, sort_keys=True).encode() + b"\n"


def _dependencies(record: Record, bill: Bill) -> Iterator[dict[str, Any]]:
    """What went in: sources with our patches, and every Debian package of builders and guests."""
    addresses = {component.name: component.address for component in bill.components if component.commit}
    for source in record.sources:
        yield {
            "name": source.name,
            "uri": addresses[source.name],
            "digest": {"gitCommit": source.commit, "gitTree": source.tree},
            "annotations": {"origin": source.origin, "location": source.location, "ref": source.ref},
        }
        for kind, digests in (("file", source.files), ("patch", source.patches)):
            for each in digests:
                yield {
                    "name": f"{source.name}/{each.name}",
                    "digest": {"sha256": each.sha256},
                    "annotations": {"kind": kind},
                }
    for component in bill.components:
        if component.kind == "debian":
            yield {"name": component.name, "uri": component.purl, "digest": {"sha256": component.sha256}}


class Statement:
    """A statement that was read: what it is about, and what that was made of and by."""

    def __init__(self, payload: bytes) -> None:
        """Read `payload`; UserError when it is no statement about a release."""
        try:
            data = json.loads(payload)
            if data["_type"] != STATEMENT_TYPE or data["predicateType"] != PREDICATE_TYPE:
                raise ValueError(f"it is a {data['_type']} with {data['predicateType']}")
            definition = data["predicate"]["buildDefinition"]
            if definition["buildType"] != BUILD_TYPE:
                raise ValueError(f"it speaks of a {definition['buildType']}")
            #: sha256 (hex) by path.
            self.subjects: dict[str, str] = {s["name"]: s["digest"]["sha256"] for s in data["subject"]}
            if len(self.subjects) != len(data["subject"]):
                raise ValueError("it names a file twice")
            dependencies = definition["resolvedDependencies"]
            #: (commit, tree) by source.
            self.sources: dict[str, tuple[str, str]] = {
                d["name"]: (d["digest"]["gitCommit"], d["digest"]["gitTree"])
                for d in dependencies
                if "gitCommit" in d["digest"]
            }
            #: sha256 by `<source>/<file>`, of our patches.
            self.patches: dict[str, str] = {
                d["name"]: d["digest"]["sha256"]
                for d in dependencies
                if d.get("annotations", {}).get("kind") == "patch"
            }
            #: sha256 of every Debian package.
            self.packages: set[str] = {
                d["digest"]["sha256"] for d in dependencies if d.get("uri", "").startswith("pkg:deb/")
            }
            self.keys: dict[str, str] = dict(definition["internalParameters"]["action_keys"])
            asked, details = definition["externalParameters"], data["predicate"]["runDetails"]
            #: The task that was run, and the release's version.
            self.release: tuple[str, str] = asked["task"], asked["version"]
            #: Action key by builder.
            self.builders: dict[str, str] = {
                b["name"]: b["annotations"]["action_key"] for b in details["builder"]["builderDependencies"]
            }
            #: What each proof found, as `release.json` has it, by file.
            self.proofs: dict[str, dict[str, Any]] = {
                p["name"]: {**p["annotations"], "sha256": p["digest"]["sha256"]}
                for p in details["byproducts"]
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the provenance is no statement about a release: {type(error).__name__}: {error}",
                "take one that `doit release:<platform>` made",
            ) from None
