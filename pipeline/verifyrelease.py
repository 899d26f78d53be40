"""Everything about a release directory that its receiver can check, a verdict each.

Trust comes from the key: with one that the receiver was given another way, the checks show who made the release;
with the one that lies in the directory they show only that its parts belong together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline import verifycontents, verifyrepository
from pipeline.dsse import open_envelope
from pipeline.errors import UserError
from pipeline.files import content_of, files_below
from pipeline.locks import PackagesLock, SourcesLock
from pipeline.openpgp import verify_detached
from pipeline.provenance import PAYLOAD_TYPE, Statement
from pipeline.releaserecord import (
    KEY,
    PROVENANCE,
    RECORD,
    REPOSITORY,
    SIGNATURE,
    SUMS,
    UNSUMMED,
    Record,
    config_lines,
    decode,
)
from pipeline.verifyrepository import REMEDY, read, refused

#: What `doit` itself leaves beside a product; it goes into no release, and says nothing about one.
BOOKKEEPING = "manifest.json"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check: `ok`; `failed`, and then `remedy` says what to do; or `note`: something to know, or left out."""

    check: str
    verdict: Literal["ok", "failed", "note"]
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        """The verdict in a line, whatever the names of files are."""
        line = f"{self.verdict:<7}{self.check}: {self.detail}"
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)

    def to_json(self) -> dict[str, Any]:
        """The verdict as JSON data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Checkout:
    """What this checkout pins: the locks, and sha256 of our patches by source and file name."""

    sources: SourcesLock
    packages: PackagesLock
    patches: Mapping[str, Mapping[str, str]]


def verify(directory: Path, key: bytes | None, checkout: Checkout | None) -> Iterator[Verdict]:
    """Check the release in `directory`, one verdict after the other.

    `key` holds the public keys (ASCII armor) that are trusted; None takes the one of the directory. `checkout` is
    compared with the provenance, unless it is None. Raises `UserError` when there is no release at all.
    """
    if not (directory / RECORD).is_file() and not (directory / SUMS).is_file():
        raise UserError(
            f"{directory} is no release directory: it has no {SUMS}",
            "give the directory that `doit release:<platform>` made, or a copy of it",
        )
    yield from _Release(directory, key, checkout).verdicts()


class _Release:
    """A release directory under examination; what one check reads, later ones use."""

    def __init__(self, directory: Path, key: bytes | None, checkout: Checkout | None) -> None:
        self.directory, self.checkout = directory, checkout
        self.given = key is not None
        self.public = key or b""
        self.signed_by = ""
        self._sums: dict[str, str] | None = None
        self._record: Record | None = None
        self._statement: Statement | None = None

    def verdicts(self) -> Iterator[Verdict]:
        repository = self.directory / REPOSITORY
        yield from self._checked("key", self.check_key)
        yield from self._checked("signature", self.check_signature)
        yield from self._checked("files", self.check_files)
        yield from self._checked("description", self.check_description)
        yield from self._checked("provenance", self.check_provenance)
        yield from self._checked(
            "action keys", lambda: verifycontents.check_keys(self.directory, self.record, self.statement)
        )
        yield from self._checked(
            "packages", lambda: verifycontents.check_packages(self.directory, self.record)
        )
        yield from self._checked(
            "SBOM", lambda: verifycontents.check_sboms(self.directory, self.record, self.statement)
        )
        yield from self._checked("apt", lambda: verifyrepository.check_apt(repository, self.public))
        yield from self._checked("yum", lambda: verifyrepository.check_yum(repository, self.public))
        yield from self._checked(
            "rpm signatures", lambda: verifyrepository.check_rpms(repository, self.public)
        )
        yield from self._checked("repository state", self.check_state)
        yield from self._checked(
            "proofs", lambda: verifycontents.check_proofs(self.directory, self.record, self.sums)
        )
        yield from self._checked("report", lambda: verifycontents.check_report(self.directory, self.record))
        if self.checkout is None:
            yield Verdict("lock", "note", "not compared with a checkout's locks")
        else:
            yield from self._checked("lock", self.check_lock)
        yield from self._trust()

    def _checked(self, name: str, check: Callable[[], str]) -> Iterator[Verdict]:
        try:
            yield Verdict(name, "ok", check())
        except UserError as error:
            yield Verdict(name, "failed", error.message, error.hint)
        except Exception as error:  # whatever a file that someone made up leads to, it is not fine
            yield Verdict(name, "failed", f"cannot be read: {type(error).__name__}: {error}", REMEDY)

    def _trust(self) -> Iterator[Verdict]:
        """What all of it is worth."""
        if self._record is not None and self._record.signer.development:
            yield Verdict("development key", "note", "signed by a development key: not for release")
        if not self.given:
            yield Verdict(
                "trust",
                "note",
                f"the key {self.signed_by or 'of the directory'} came with the files: this shows that they belong "
                "together, not who made them; --key FILE checks against a key that you trust",
            )

    # What several checks need ------------------------------------------------------------------

    @property
    def record(self) -> Record:
        if self._record is None:
            self._record = decode(read(self.directory, RECORD), RECORD)
        return self._record

    @property
    def statement(self) -> Statement:
        if self._statement is None:
            envelope = verifycontents.load(self.directory, PROVENANCE)
            self._statement = Statement(open_envelope(envelope, self.public, PAYLOAD_TYPE))
        return self._statement

    @property
    def sums(self) -> dict[str, str]:
        if self._sums is None:
            found: dict[str, str] = {}
            for line in read(self.directory, SUMS).decode(errors="replace").splitlines():
                matched = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
                if not matched or matched[2] in found:
                    raise refused(f"{SUMS} has a line that is no checksum, or a file twice: {line[:80]!r}")
                found[matched[2]] = matched[1]
            self._sums = found
        return self._sums

    # Checks ------------------------------------------------------------------------------------

    def check_key(self) -> str:
        own = read(self.directory, KEY)
        if not self.given:
            self.public = own
        # only a signature tells which of the keys counts
        self.signed_by = verify_detached(
            read(self.directory, SUMS), read(self.directory, SIGNATURE), self.public
        )
        by_own = verify_detached(read(self.directory, SUMS), read(self.directory, SIGNATURE), own)
        if by_own != self.signed_by:
            raise refused(f"{KEY} is of another key than {self.signed_by}")
        if read(self.directory, f"{REPOSITORY}/{KEY}") != own:
            raise refused(f"{KEY} and the repository's differ")
        return f"{self.signed_by}{', which you gave' if self.given else ''}"

    def check_signature(self) -> str:
        signed = verify_detached(read(self.directory, SUMS), read(self.directory, SIGNATURE), self.public)
        return f"{SUMS} is signed by {signed}"

    def check_files(self) -> str:
        """Every file is listed and as listed, and every listed one is there."""
        there = set(files_below(self.directory)) - {*UNSUMMED, BOOKKEEPING}
        if missing := self.sums.keys() - there:
            raise refused(f"{min(missing)} is missing")
        if extra := there - self.sums.keys():
            raise refused(f"{min(extra)} is not in {SUMS}")
        for name, digest in sorted(self.sums.items()):
            if content_of(self.directory / name) != digest:
                raise refused(f"{name} was changed")
        return f"{len(self.sums)} files are as {SUMS} says, and there are no others"

    def check_description(self) -> str:
        record = self.record
        if record.signer.fingerprint != self.signed_by:
            raise refused(
                f"{RECORD} names the signer {record.signer.fingerprint}, not {self.signed_by or 'this key'}"
            )
        for role, kernel in record.kernels.items():
            name = f"kernels/{role}.config"
            if config_lines(read(self.directory, name).decode(errors="replace")) != kernel.config:
                raise refused(f"{name} is not the configuration that {RECORD} describes")
        return f"{record.platform} {record.version} of {record.when:%Y-%m-%d}, signed by {record.signer.name}"

    def check_provenance(self) -> str:
        return verifycontents.check_provenance(self.sums, self.record, self.statement)

    def check_state(self) -> str:
        record = self.record
        return verifyrepository.check_state(
            self.directory / REPOSITORY,
            self.public,
            record.version,
            record.platform,
            {file.sha256 for package in record.packages for file in package.files.values()},
        )

    def check_lock(self) -> str:
        if self.checkout is None:
            raise UserError("there is no checkout to compare with", "leave this check out with --no-lock")
        checkout = self.checkout
        return verifycontents.check_lock(
            self.record, self.statement, checkout.sources, checkout.packages, checkout.patches
        )
