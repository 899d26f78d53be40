"""What a report of the lab is, as data: `report.json`, its JSON Schema, and what it is read into.

All latencies are microseconds, all times seconds since the measurement began, unless a name says otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from pipeline.errors import UserError
from pipeline.releaserecord import EMULATED, Record

#: Files of a report.
PAGE, RECORD, JUNIT = "report.html", "report.json", "junit.xml"
#: Where the schema lies in the checkout, and what it calls itself.
SCHEMA_FILE = "docs/schemas/lab-report.schema.json"
SCHEMA_ID = "urn:virt-rt:lab-report:v1"
#: What can be proven, from the packages' form to the times that hardware keeps.
LEVELS = ("structure", "boot", "stack", "latency")

Word = Annotated[str, msgspec.Meta(min_length=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Number = Annotated[float, msgspec.Meta(ge=0)]
Evidence = Literal["hardware", "emulated", "none"]


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of `report.json`: unknown and missing fields are errors."""


class Finding(_Data, frozen=True, kw_only=True):
    """One thing that was held against a promise; `place` and `stage` are empty where it is of no one place or stage."""

    name: Word
    wanted: str
    got: str
    ok: bool
    place: str = ""
    stage: str = ""


class Level(_Data, frozen=True, kw_only=True):
    """What is known of one level; `reason` says in words why the verdict is that."""

    name: Literal["structure", "boot", "stack", "latency"]
    verdict: Literal["passed", "failed", "not proven"]
    reason: Word
    findings: tuple[Finding, ...]


class Limits(_Data, frozen=True, kw_only=True):
    """Thresholds of the platform's hardware, for timers; `source` says who demands them."""

    source: Word
    host_max_us: Count
    host_avg_us: Count
    guest_max_us: Count
    guest_avg_us: Count

    def of(self, series: Series) -> tuple[int, int] | None:
        """The greatest and the average latency that a series may have; None where no threshold is about it."""
        if series.what != "timer":
            return None
        if series.place == "host":
            return self.host_max_us, self.host_avg_us
        return self.guest_max_us, self.guest_avg_us


class Block(_Data, frozen=True, kw_only=True):
    """A stretch of a series: when it began, how long it was, its samples, and the greatest of them.

    `p999_us` is None where too few samples lie above it, or where it is not known.
    """

    at_s: Number
    seconds: Number
    samples: Count
    max_us: Number
    p999_us: Number | None = None


class Series(_Data, frozen=True, kw_only=True):
    """The latencies of one CPU, by one measuring thread.

    `what` is timer (cyclictest), handler or thread (irqlat). Quantiles are None where they lie beyond the histogram,
    whose keys are whole microseconds below `histogram_us`; `overflows` counts what is not in it. `runs_on` is the
    host's CPU of a guest's vCPU, None where no plan tells.
    """

    place: Word
    stage: Word
    tool: Word
    what: Literal["timer", "handler", "thread"]
    cpu: Count
    runs_on: int | None
    interval_us: Count
    priority: Count
    loads: tuple[str, ...]
    segment_s: Count
    samples: Annotated[int, msgspec.Meta(ge=1)]
    overflows: Count
    histogram_us: Count
    min_us: Number
    avg_us: Number
    p99_us: Number | None
    p999_us: Number | None
    max_us: Number
    histogram: dict[Annotated[str, msgspec.Meta(pattern=r"\A[0-9]+\Z")], Count]
    blocks: tuple[Block, ...]


class Place(_Data, frozen=True, kw_only=True):
    """A machine that was measured, as it described itself; texts are empty where it did not tell."""

    name: Word
    virtualization: Word
    hypervisor: bool
    kernel_release: Word
    kernel_version: str
    cmdline: str
    isolated: str
    nohz_full: str
    config_sha256: str
    timer_ns: Count
    clocksource: str
    cpu_model: str
    hostname: str
    seconds: Number


class Ran(_Data, frozen=True, kw_only=True):
    """A stage of a measurement: its runs, or the reason why there is none; `seconds` is that of all its runs."""

    place: Word
    stage: Word
    tool: Word
    cpus: tuple[Count, ...]
    loads: tuple[str, ...]
    runs: Count
    seconds: Number
    refused: str


class Kernel(_Data, frozen=True, kw_only=True):
    """A kernel by its identity; `contract` says where its configuration was held against the contract."""

    role: Word
    release: Word
    key: str
    config_sha256: str
    contract: str


class Package(_Data, frozen=True, kw_only=True):
    """A package by name and version."""

    name: Word
    version: Word


class Culprit(_Data, frozen=True, kw_only=True):
    """Who had a CPU while a vCPU should have run; `share` of the time that was looked at."""

    kind: str
    name: str
    detail: str
    us: float
    share: float


class Event(_Data, frozen=True, kw_only=True):
    """A latency above the limit of tracing, and what the host's trace says of it; `cpu` is None where it does not."""

    place: Word
    vcpu: Count
    cpu: Count | None
    limit_us: Number
    latency_us: Number
    culprits: tuple[Culprit, ...]
    verdict: Word


class Comparison(_Data, frozen=True, kw_only=True):
    """One series beside the same of a baseline, over block values (`statistic`).

    `refused` says why they are not compared, and then no number is there. `shift_us` is by how much blocks are
    later now (Hodges-Lehmann), between `low_us` and `high_us` with 95 %; `superiority` is the chance that a block of
    now is the later one; `p` is the chance of as much between equals, corrected for the number of comparisons.
    """

    place: Word
    stage: Word
    what: Word
    cpu: Count
    statistic: Literal["max", "p99.9"]
    refused: str
    blocks: Count
    blocks_before: Count
    block_s: Number
    median_us: Number
    median_before_us: Number
    shift_us: float
    low_us: float
    high_us: float
    superiority: Number
    p: Number
    verdict: Literal["later", "earlier", "no difference shown", "not compared"]
    says: Word


class Baseline(_Data, frozen=True, kw_only=True):
    """What was compared with, and how that went."""

    name: Word
    evidence: Evidence
    comparisons: tuple[Comparison, ...]


class Report(_Data, frozen=True, kw_only=True):
    """All of `report.json`; `ok` is false when a level failed. `evidence` is that of the latencies."""

    schema: Literal[1] = 1
    product: Literal["virt-rt"] = "virt-rt"
    platform: Word
    ok: bool
    evidence: Evidence
    latency_verdict: Word
    levels: Annotated[tuple[Level, ...], msgspec.Meta(min_length=4, max_length=4)]
    limits: Limits | None
    kernels: tuple[Kernel, ...]
    packages: tuple[Package, ...]
    plan_sha256: str
    places: tuple[Place, ...]
    runs: tuple[Ran, ...]
    series: tuple[Series, ...]
    events: tuple[Event, ...]
    not_proven: tuple[Word, ...]
    baseline: Baseline | None

    @property
    def emulated(self) -> bool:
        """Whether its latencies are those of an emulation."""
        return self.evidence == "emulated"

    def level(self, name: str) -> Level:
        """The level of that name."""
        return next(level for level in self.levels if level.name == name)


_decoder = msgspec.json.Decoder(Report)


def encode(report: Report) -> bytes:
    """The report as JSON that reads and differs well."""
    return msgspec.json.format(msgspec.json.encode(report, order="sorted"), indent=1) + b"\n"


def decode(data: bytes, where: str) -> Report:
    """Read a `report.json`; `where` is what an error calls it. `UserError` when it is none, or contradicts itself."""
    remedy = "take one that `doit lab:<platform>` or `doit report` made"
    try:
        report = _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise UserError(f"{where} is no report: {error}", remedy) from None
    if tuple(level.name for level in report.levels) != LEVELS:
        raise UserError(f"{where} does not have the levels {', '.join(LEVELS)}, in this order", remedy)
    if report.ok != all(level.verdict != "failed" for level in report.levels):
        raise UserError(f"{where} says ok: {report.ok}, and its levels say otherwise", remedy)
    for level in report.levels:
        if level.verdict == "passed" and not all(finding.ok for finding in level.findings):
            raise UserError(f"{where} has a level that passed with a red finding: {level.name}", remedy)
    if report.emulated and (
        report.latency_verdict != EMULATED or report.level("latency").verdict == "passed"
    ):
        raise UserError(f"{where} takes emulated latencies for evidence", remedy)
    return report


def load(path: Path) -> Report:
    """Read the `report.json` at `path`."""
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(
            f"{path}: {(error.strerror or str(error)).lower()}", "name a report.json that can be read"
        ) from None


def json_schema() -> bytes:
    """The JSON Schema of `report.json`, as it lies in the checkout."""

    def component(name: str) -> Any:
        return defined[name.rpartition("/")[2]]

    (schema,), defined = msgspec.json.schema_components([Report], ref_template="#/$defs/{name}")
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        **component(schema["$ref"]),
        "title": "Report of the lab of virt-rt",
        "$defs": {name: what for name, what in sorted(defined.items()) if name != "Report"},
    }
    # \A and \Z are Python's; in JSON Schema patterns are those of ECMAScript
    return json.dumps(document, indent=1).replace(r"\\A", "^").replace(r"\\Z", "$").encode() + b"\n"


def report_differs(report: Report, record: Record) -> str:
    """In what a report and a release's description contradict each other; nothing when they do not."""
    if report.platform != record.platform:
        return f"it is of {report.platform}"
    if not report.ok:
        return f"{', '.join(level.name for level in report.levels if level.verdict == 'failed')} failed"
    proven = {proof.level: proof.ok for proof in record.proofs}
    for level in ("boot", "stack"):
        if (report.level(level).verdict == "passed") != proven.get(level, False):
            return f"{level}: {report.level(level).verdict}"
    if report.level("structure").verdict != "passed":
        return f"structure: {report.level('structure').verdict}"
    if {each.role: each.release for each in report.kernels} != {
        role: kernel.release for role, kernel in record.kernels.items()
    }:
        return "it tells of other kernels"
    if {(each.name, each.version) for each in report.packages} != {
        (each.name, each.version) for each in record.packages
    }:
        return "it tells of other packages"
    return ""


if __name__ == "__main__":
    print(json_schema().decode(), end="")
