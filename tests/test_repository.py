"""Repositories as data: what stays, what goes, and what clients see between any two writes."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InternalError, UserError
from pipeline.packagefile import Package, examine
from pipeline.publication import GRACE, Publication, package_paths, publication
from pipeline.releaserecipe import RepositoryRecipe
from pipeline.repository import (
    EMPTY,
    POINTER,
    POINTER_TYPE,
    Release,
    State,
    encoded,
    pointer,
    promoted,
    read_state,
    release_id,
    with_release,
)
from pipeline.signing import Identity, Signer
from tests.packaging import make_package

URL = "https://packages.example.org/virt-rt"
RECIPE = RepositoryRecipe(origin="virt-rt", label="virt-rt", description="Tests", url=URL)
DAY = 86_400


class Seal(Signer):
    """A signer without GnuPG: its signature is a digest."""

    def __init__(self, name: str = "Tests <tests@example.org>", *, development: bool = False) -> None:
        fingerprint = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest().upper()
        block = f"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n{name}\n-----END PGP PUBLIC KEY BLOCK-----\n"
        self.identity = Identity(fingerprint, name, development, 0, block.encode())
        self.trusted = self.identity.public

    def detached(self, data: bytes, when: int, *, armor: bool = True) -> bytes:
        return hashlib.sha256(f"{self.identity.name} {when} ".encode() + data).hexdigest().encode()

    def clearsigned(self, text: bytes, when: int) -> bytes:
        return b"signed\n" + text + self.detached(text, when)


SEAL = Seal()


def package(format_: str, name: str, version: str, arch: str = "", content: str = "") -> Package:
    """A made-up package; `content` stands for its bytes."""
    arch = arch or {"deb": "amd64", "rpm": "x86_64"}[format_]
    digest = hashlib.sha256(f"{format_} {name} {version} {arch} {content}".encode()).hexdigest()
    file = f"{name}_{version}_{arch}.{format_}"
    start = f'<package pkgid="{digest}" name="{name}" arch="{arch}"><version ver="{version}"/>'
    records = {
        "deb": {"control": f"Package: {name}\nVersion: {version}\nArchitecture: {arch}\n"},
        "rpm": {
            "primary": f'<package type="rpm"><name>{name}</name><arch>{arch}</arch><version ver="{version}"/>'
            f'<checksum type="sha256">{digest}</checksum><location href="Packages/{file}"/></package>\n',
            "filelists": f"{start}</package>\n",
            "other": f"{start}</package>\n",
        },
    }
    return Package(
        "deb" if format_ == "deb" else "rpm", name, version, arch, file, 1, digest, records[format_]
    )


def release(platform: str, version: str, *packages: Package, date: int = 0) -> Release:
    digests = tuple(sorted(each.sha256 for each in packages))
    return Release(platform, version, release_id(packages), date, digests)


def usual(platform: str, version: str) -> list[Package]:
    """Packages of one release: both formats, for one machine and for any."""
    return [
        package("deb", f"host-{platform}", version),
        package("deb", f"tuning-{platform}", version, "all"),
        package("rpm", f"host-{platform}", version),
        package("rpm", f"tuning-{platform}", version, "noarch"),
    ]


def entered(state: State, channel: str, platform: str, version: str, keep: int = 3) -> State:
    packages = usual(platform, version)
    return with_release(state, channel, release(platform, version, *packages), packages, keep)


def versions(state: State, channel: str) -> list[str]:
    return [each.version for each in state.releases[channel]]


# The state ------------------------------------------------------------------------------------


def test_each_channel_keeps_the_newest_releases_of_each_platform() -> None:
    state = EMPTY
    for number in range(1, 6):
        state = entered(state, "testing", "a", f"0.{number}", keep=2)
    state = entered(state, "testing", "b", "0.1", keep=2)
    assert versions(state, "testing") == ["0.4", "0.5", "0.1"]
    assert {p.version for p in state.packages.values()} == {"0.4", "0.5", "0.1"}
    state = promoted(state, "testing", "stable", "a", keep=2)
    for number in (6, 7):
        state = entered(state, "testing", "a", f"0.{number}", keep=2)
    assert versions(state, "testing") == ["0.1", "0.6", "0.7"]
    assert versions(state, "stable") == ["0.5"]
    assert {p.version for p in state.packages.values()} == {"0.1", "0.5", "0.6", "0.7"}


def test_the_same_release_again_changes_nothing_but_what_is_kept() -> None:
    state = entered(entered(EMPTY, "testing", "a", "0.1"), "testing", "a", "0.2")
    assert entered(state, "testing", "a", "0.2") == state
    assert promoted(promoted(state, "testing", "stable", "a", 3), "testing", "stable", "a", 3) == promoted(
        state, "testing", "stable", "a", 3
    )
    assert versions(entered(state, "testing", "a", "0.2", keep=1), "testing") == ["0.2"]


@pytest.mark.parametrize("version", ["0.1", "0.2", "0.2~rc1", "0.1.9"])
def test_a_release_that_nobody_would_install_is_refused(version: str) -> None:
    state = entered(EMPTY, "testing", "a", "0.2")
    other = package("deb", "other", version)
    with pytest.raises(UserError, match=f"testing has a 0.2 already; {version} is not higher") as error:
        with_release(state, "testing", release("a", version, other), [other], 3)
    assert error.value.hint.startswith("raise `version` in recipes/release.toml")
    # for another platform it is the first
    elsewhere = with_release(state, "testing", release("b", version, other), [other], 3)
    assert versions(elsewhere, "testing") == ["0.2", version]


def test_versions_are_in_dpkgs_order() -> None:
    state = EMPTY
    for version in ("0.9~rc1", "0.9", "0.10", "1.0"):
        state = entered(state, "testing", "a", version)
    assert versions(state, "testing") == ["0.9", "0.10", "1.0"]


@pytest.mark.parametrize("format_", ["deb", "rpm"])
def test_one_name_and_version_has_one_content(format_: str) -> None:
    first, second = (package(format_, "host", "0.1", content=content) for content in "xy")
    state = with_release(EMPTY, "testing", release("a", "0.1", first), [first], 3)
    with pytest.raises(UserError, match=f"two {format_}s host 0.1 with different content: ") as error:
        with_release(state, "testing", release("b", "0.1", second), [second], 3)
    assert "recipes/release.toml" in error.value.hint
    with pytest.raises(UserError, match="with different content"):
        with_release(EMPTY, "testing", release("b", "0.1", first, second), [first, second], 3)
    renamed = replace(second, version="0.2", file=first.file)
    with pytest.raises(UserError, match="with different content"):
        with_release(state, "testing", release("b", "0.2", renamed), [renamed], 3)


def test_a_release_comes_with_its_packages() -> None:
    one, two = package("deb", "one", "0.1"), package("deb", "two", "0.1")
    for said, given_ in (([one], [one, two]), ([one, two], [one]), ([], [])):
        with pytest.raises(InternalError):
            with_release(EMPTY, "testing", release("a", "0.1", *said), given_, 3)


def test_only_what_is_there_can_be_promoted() -> None:
    state = entered(EMPTY, "testing", "a", "0.1")
    with pytest.raises(UserError, match="the channel testing has no release of b") as error:
        promoted(state, "testing", "stable", "b", 3)
    assert "testing has: a" in error.value.hint
    with pytest.raises(UserError, match="the channel stable has no release of a") as error:
        promoted(state, "stable", "testing", "a", 3)
    assert "stable has: nothing" in error.value.hint


# What clients see -----------------------------------------------------------------------------


class Server:
    """A repository as clients see it; each write is checked against what they may be doing."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def apply(self, made: Publication, known: State) -> None:
        """Publish one file at a time; `known` has the packages."""
        contents = {digest: digest.encode() for digest in known.packages}
        puts: list[tuple[str, bytes | None]] = [(p, contents[d]) for p, d in made.packages.items()]
        puts += [(path, self.files[source]) for path, source in made.copies.items()]
        puts += made.indexes.items()
        puts += [(path, None) for path in made.obsolete]
        puts += made.entries
        reading = set(self.seen())
        for path, content in puts:
            if content is None:
                assert path in self.files and path not in reading
                del self.files[path]
            else:
                self.files[path] = content
            set(self.seen())  # whoever comes now finds all that the entries name
        assert reading <= self.files.keys(), "what was there before is there for whoever began before"

    def seen(self) -> Iterator[str]:
        """Every file that a client fetches after it has read one entry, each of which must be right."""
        for path in list(self.files):
            if path.endswith("/InRelease"):
                yield from self._apt(path.removesuffix("/InRelease"))
            elif path.endswith("/mirrorlist"):
                yield from self._yum(self.files[path].decode().strip())

    def _apt(self, top: str) -> Iterator[str]:
        text = self.files[f"{top}/InRelease"].decode()
        assert re.search(r"^Acquire-By-Hash: yes$", text, re.MULTILINE)
        listed = re.findall(r"^ ([0-9a-f]{64}) +(\d+) (\S+)$", text, re.MULTILINE)
        assert listed
        for digest, size, path in listed:
            by_hash = f"{top}/{path.rpartition('/')[0]}/by-hash/SHA256/{digest}"
            content = self.files[by_hash]
            assert hashlib.sha256(content).hexdigest() == digest and len(content) == int(size)
            yield by_hash
            packages = (lzma.decompress(content) if path.endswith(".xz") else content).decode()
            for file, digest in re.findall(
                r"^Filename: (\S+)\nSize: \d+\nSHA256: (\S+)$", packages, re.MULTILINE
            ):
                assert self.files[f"apt/{file}"] == digest.encode()
                yield f"apt/{file}"

    def _yum(self, address: str) -> Iterator[str]:
        generation = address.removeprefix(f"{URL}/").removesuffix("/")
        repomd = self.files[f"{generation}/repodata/repomd.xml"].decode()
        yield from (f"{generation}/repodata/{name}" for name in ("repomd.xml", "repomd.xml.asc"))
        names = re.findall(r'<location href="(repodata/([0-9a-f]{64})-\w+\.xml\.gz)"/>', repomd)
        assert len(names) == 3
        for name, digest in names:
            content = self.files[f"{generation}/{name}"]
            assert hashlib.sha256(content).hexdigest() == digest
            yield f"{generation}/{name}"
            if "primary" in name:
                for digest, base, href in re.findall(
                    r'<checksum type="sha256">(\w+)</checksum><location xml:base="(\S+)" href="(\S+)"/>',
                    gzip.decompress(content).decode(),
                ):
                    path = base.removeprefix(f"{URL}/") + href
                    assert self.files[path] == digest.encode()
                    yield path


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["release", "release", "promote", "again", "wait"]),
        st.sampled_from(["a", "b"]),
        st.integers(0, 2 * DAY),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(OPERATIONS, st.integers(1, 3))
def test_clients_never_see_half_a_repository(operations: list[tuple[str, str, int]], keep: int) -> None:
    server, state, date = Server(), EMPTY, 1_000_000
    known: dict[str, Package] = {}
    number = 0
    for what, platform, seconds in operations:
        date += seconds
        new, expected = state, {c: versions(state, c) for c in state.releases}
        if what == "release":
            number += 1
            new = entered(state, "testing", platform, f"0.{number}", keep)
            mine = [r.version for r in new.releases["testing"] if r.platform == platform]
            before = [r.version for r in state.releases.get("testing", ()) if r.platform == platform]
            assert mine == [*before, f"0.{number}"][-keep:]
        elif what == "promote" and state.newest("testing", platform):
            new = promoted(state, "testing", "stable", platform, keep)
            assert new.newest("stable", platform) == state.newest("testing", platform)
            assert new.releases["testing"] == state.releases["testing"]
        elif what == "again" and state.newest("testing", platform):
            latest = state.newest("testing", platform)
            assert latest
            new = with_release(state, "testing", latest, [state.packages[d] for d in latest.packages], keep)
            assert new == state
        elif what != "release":
            assert {c: versions(new, c) for c in new.releases} == expected
        known |= new.packages
        listed = {d for c in new.releases for d in new.listed(c)}
        assert listed == set(new.packages)
        made = publication(state, new, RECIPE, SEAL, date)
        server.apply(made, replace(new, packages=known))
        for path in made.state.retired:
            assert path in server.files
        current = package_paths(made.state).keys() | {p for ps in made.state.indexes.values() for p in ps}
        assert not current & made.state.retired.keys() and not current & set(made.obsolete)
        # nothing is there that is neither in force nor recorded to go
        fixed = {POINTER, "key.asc", made.state.place}
        assert server.files.keys() - {""} <= current | made.state.retired.keys() | fixed
        assert all(path in server.files for path in current)
        again = publication(made.state, made.state, RECIPE, SEAL, date)
        assert not again and again.state == made.state
        state = made.state
    date += 2 * GRACE
    made = publication(state, state, RECIPE, SEAL, date)
    server.apply(made, replace(state, packages=known))
    assert set(made.obsolete) == state.retired.keys()
    assert made.state.retired.keys() <= {state.place}


def test_equal_states_are_laid_out_alike_whatever_the_order() -> None:
    packages = usual("a", "0.1")
    one = with_release(EMPTY, "testing", release("a", "0.1", *packages), packages, 3)
    other = with_release(EMPTY, "testing", release("a", "0.1", *packages), packages[::-1], 3)
    first, second = (publication(EMPTY, state, RECIPE, SEAL, 9) for state in (one, other))
    assert first == second and encoded(first.state) == encoded(second.state)


def test_only_what_changed_is_written() -> None:
    state = publication(EMPTY, entered(EMPTY, "testing", "a", "0.1"), RECIPE, SEAL, 1).state
    made = publication(state, promoted(state, "testing", "stable", "a", 3), RECIPE, SEAL, 2)
    assert not made.packages  # debs are shared, rpms are copied within the repository
    assert made.copies and all(
        target == source.replace("/testing/", "/stable/") for target, source in made.copies.items()
    )
    written = {*made.indexes, *dict(made.entries)}
    assert written and not [path for path in written if "testing" in path]
    assert list(dict(made.entries))[-1] == POINTER


def test_entries_come_in_an_order_that_clients_survive() -> None:
    made = publication(EMPTY, entered(EMPTY, "testing", "a", "0.1"), RECIPE, SEAL, 1)
    order = [path for path, _ in made.entries]
    assert order[0] == "key.asc" and order[-1] == POINTER

    def at(end: str) -> int:
        (found,) = [number for number, path in enumerate(order) if path.endswith(end)]
        return found

    assert at("Packages.xz") < at("/Release") < at("/InRelease")
    assert at("x86_64/repodata/repomd.xml") < at("/mirrorlist")


def test_a_recipe_or_key_that_changed_is_written_out_with_the_same_packages() -> None:
    state = publication(EMPTY, entered(EMPTY, "testing", "a", "0.1"), RECIPE, SEAL, 1).state
    import msgspec

    for recipe, seal in ((msgspec.structs.replace(RECIPE, label="new"), SEAL), (RECIPE, Seal("New <n@n.n>"))):
        made = publication(state, state, recipe, seal, 2)
        assert dict(made.entries)["key.asc"] == seal.trusted and not made.packages and not made.copies
        assert "apt/dists/testing/InRelease" in dict(made.entries)
    # how many releases are kept is not in the indexes
    assert not publication(state, state, msgspec.structs.replace(RECIPE, keep=9), SEAL, 2)


def test_indexes_that_count_for_a_time_are_renewed() -> None:
    import msgspec

    recipe = msgspec.structs.replace(RECIPE, valid_days=7)
    made = publication(EMPTY, entered(EMPTY, "testing", "a", "0.1"), recipe, SEAL, 0)
    text = dict(made.entries)["apt/dists/testing/Release"].decode()
    assert "Date: Thu, 01 Jan 1970 00:00:00 UTC\nValid-Until: Thu, 08 Jan 1970 00:00:00 UTC\n" in text
    assert not publication(made.state, made.state, recipe, SEAL, 0)
    later = publication(made.state, made.state, recipe, SEAL, DAY)
    assert b"Valid-Until: Fri, 09 Jan 1970" in dict(later.entries)["apt/dists/testing/InRelease"]
    assert "Valid-Until" not in str(publication(EMPTY, made.state, RECIPE, SEAL, 0).entries)


def test_a_clock_that_went_back_is_refused() -> None:
    state = publication(EMPTY, entered(EMPTY, "testing", "a", "0.1"), RECIPE, SEAL, 100).state
    with pytest.raises(UserError, match="testing was published later than what this machine's clock says"):
        publication(state, entered(state, "testing", "a", "0.2"), RECIPE, SEAL, 99)


def test_several_architectures_and_formats_in_one_channel() -> None:
    packages = [
        package("deb", "host", "1", "amd64"),
        package("deb", "host-arm", "1", "arm64"),
        package("deb", "tuning", "1", "all"),
        package("rpm", "host", "1", "x86_64"),
        package("rpm", "host-arm", "1", "aarch64"),
        package("rpm", "tuning", "1", "noarch"),
    ]
    state = with_release(EMPTY, "testing", release("a", "1", *packages), packages, 3)
    made = publication(EMPTY, state, RECIPE, SEAL, 0)
    entries = {path: content.decode(errors="replace") for path, content in made.entries}
    text = entries["apt/dists/testing/Release"]
    assert "Architectures: amd64 arm64\n" in text and "No-Support-for-Architecture-all: Packages\n" in text
    for arch, host in (("amd64", "host"), ("arm64", "host-arm")):
        names = re.findall(
            r"^Package: (\S+)", entries[f"apt/dists/testing/main/binary-{arch}/Packages"], re.MULTILINE
        )
        assert names == [host, "tuning"]
    assert sorted(path for path in made.packages if path.startswith("yum/")) == [
        "yum/testing/aarch64/Packages/host-arm_1_aarch64.rpm",
        "yum/testing/aarch64/Packages/tuning_1_noarch.rpm",
        "yum/testing/x86_64/Packages/host_1_x86_64.rpm",
        "yum/testing/x86_64/Packages/tuning_1_noarch.rpm",
    ]


def test_packages_for_any_machine_alone_still_make_a_repository() -> None:
    packages = [package("deb", "tuning", "1", "all"), package("rpm", "tuning", "1", "noarch")]
    state = with_release(EMPTY, "testing", release("a", "1", *packages), packages, 3)
    entries = dict(publication(EMPTY, state, RECIPE, SEAL, 0).entries)
    assert b"Architectures: all\n" in entries["apt/dists/testing/Release"]
    assert b"No-Support" not in entries["apt/dists/testing/Release"]
    assert "yum/testing/noarch/repodata/repomd.xml" in entries


def test_client_files_name_the_address_and_carry_the_key() -> None:
    state = entered(EMPTY, "testing", "a", "0.1")
    entries = dict(publication(EMPTY, state, RECIPE, SEAL, 0).entries)
    assert entries["virt-rt-testing.sources"].decode() == (
        f"Types: deb\nURIs: {URL}/apt\nSuites: testing\nComponents: main\nSigned-By:\n"
        " -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n Tests <tests@example.org>\n"
        " -----END PGP PUBLIC KEY BLOCK-----\n"
    )
    said = entries["virt-rt-testing.repo"].decode()
    assert f"mirrorlist={URL}/yum/testing/$basearch/mirrorlist\n" in said
    assert "\ngpgcheck=1\nrepo_gpgcheck=1\n" in said
    import msgspec

    without = publication(EMPTY, state, msgspec.structs.replace(RECIPE, url=""), SEAL, 0)
    assert not [p for p in dict(without.entries) if p.endswith((".sources", ".repo", "mirrorlist"))]


def test_a_development_key_is_marked_wherever_a_repository_says_who_signed() -> None:
    state = entered(EMPTY, "testing", "a", "0.1")
    seal = Seal("virt-rt development key, not for release <development@localhost>", development=True)
    entries = dict(publication(EMPTY, state, RECIPE, seal, 0).entries)
    for path in ("apt/dists/testing/Release", "virt-rt-testing.sources", "virt-rt-testing.repo"):
        assert b"signed with a development key, not for release" in entries[path]
    payload = decoded(entries[POINTER])
    assert payload["signer"]["development"] is True and "not for release" in payload["note"]
    honest = dict(publication(EMPTY, state, RECIPE, SEAL, 0).entries)
    assert not [path for path, content in honest.items() if b"not for release" in content]


def decoded(envelope: bytes) -> dict[str, dict[str, object]]:
    import base64

    found: dict[str, dict[str, object]] = json.loads(base64.b64decode(json.loads(envelope)["payload"]))
    return found


# The state as a file --------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Envelopes of `Seal` open; real signatures are tested elsewhere."""

    def verify(data: bytes, signature: bytes, public: bytes) -> str:
        for date in range(20):
            if SEAL.detached(data, date) == signature and public == SEAL.trusted:
                return SEAL.identity.fingerprint
        raise UserError("the signature is wrong", "")

    monkeypatch.setattr("pipeline.dsse.verify_detached", verify)


@pytest.mark.usefixtures("opened")
def test_a_state_is_read_back_as_it_was() -> None:
    made = publication(EMPTY, entered(EMPTY, "testing", "a", "0.1"), RECIPE, SEAL, 5)
    files = {**made.indexes, **dict(made.entries)}
    found = read_state(files.get, SEAL.trusted)
    assert found == made.state and found.place == made.state.place
    assert read_state(lambda path: None, SEAL.trusted) is EMPTY
    # the state that was read retires its own file
    then = publication(found, entered(found, "testing", "a", "0.2"), RECIPE, SEAL, 6)
    assert found.place in then.state.retired


@pytest.mark.usefixtures("opened")
def test_a_state_that_is_not_what_was_signed_is_refused() -> None:
    made = publication(EMPTY, entered(EMPTY, "testing", "a", "0.1"), RECIPE, SEAL, 5)
    files = {**made.indexes, **dict(made.entries)}
    place = made.state.place

    def envelope(payload: bytes) -> bytes:
        from pipeline import dsse

        return json.dumps(dsse.envelope(payload, POINTER_TYPE, SEAL, 5)).encode()

    garbage = b"garbage"
    elsewhere = f"state/{hashlib.sha256(garbage).hexdigest()}.json.zst"
    newer = json.dumps({"schema": 2, "state": place}).encode()
    forged = json.loads(files[POINTER])
    forged["payload"] = "e30="
    for change, message in (
        ({POINTER: b"garbage"}, "repository.json of the repository is missing or damaged"),
        ({POINTER: b"{}"}, "repository.json of the repository: this is not a DSSE envelope"),
        ({POINTER: json.dumps(forged).encode()}, "the signature is wrong"),
        ({POINTER: envelope(newer)}, "has schema 2, not 1"),
        (
            {POINTER: envelope(pointer("../../etc/passwd", {}))},
            "../../etc/passwd of the repository is missing",
        ),
        ({POINTER: envelope(pointer(elsewhere, {})), elsewhere: garbage}, "is missing or damaged"),
        ({place: files[place] + b"x"}, "is missing or damaged"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            read_state((files | change).get, SEAL.trusted)
    with pytest.raises(UserError, match="is missing or damaged"):
        read_state({POINTER: files[POINTER]}.get, SEAL.trusted)
    with pytest.raises(UserError, match="the signature is wrong"):
        read_state(files.get, Seal("Other <o@o.o>").trusted)


# Package files --------------------------------------------------------------------------------


def test_a_package_is_read_as_its_own_tools_read_it(tmp_path: Path) -> None:
    deb = examine(make_package(tmp_path, "one", depends=("bash (>= 5)",)))
    rpm = examine(make_package(tmp_path, "one", format_="rpm", arch="all"))
    assert (deb.format, deb.name, deb.version, deb.arch) == ("deb", "one", "0.1.0+g0123456789ab", "amd64")
    assert (rpm.format, rpm.name, rpm.version, rpm.arch) == (
        "rpm", "one", "0.1.0+g0123456789ab-1", "noarch",
    )  # fmt: skip
    assert "Depends: bash (>= 5)\n" in deb.record["control"]
    assert f'<location href="Packages/{rpm.file}"/>' in rpm.record["primary"]
    assert "<file>/usr/share/one/file</file>" in rpm.record["filelists"]
    for each in (deb, rpm):
        path = tmp_path / each.file
        assert each.size == path.stat().st_size
        assert each.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        moved = path.rename(path.with_name(f"again{path.suffix}"))
        again = examine(moved)
        assert replace(again, file=each.file, record=each.record) == each


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    for name, message in (
        ("one.txt", "neither a deb nor an rpm"),
        ("one.deb", "no whole deb"),
        ("one.rpm", "no whole rpm"),
    ):
        (tmp_path / name).write_text("not a package")
        with pytest.raises(UserError, match=message):
            examine(tmp_path / name)
    for format_ in ("deb", "rpm"):
        whole = make_package(tmp_path, "two", format_=format_)
        whole.write_bytes(whole.read_bytes()[:300])
        with pytest.raises(UserError, match=f"no whole {format_}"):
            examine(whole)
