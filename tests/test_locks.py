"""The lock files: what is written is read back, and what was edited into nonsense is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import locks
from pipeline.errors import UserError
from pipeline.versions import highest, order

HEX = "0123456789abcdef"
FILE = locks.LockedFile(archive="debian", path="pool/main/l/linux/linux_6.dsc", sha256="a" * 64, size=1)
PINNED = locks.SourceLock(
    name="linux-rt",
    origin="debian",
    location="trixie",
    ref="6-1",
    commit="b" * 40,
    tree="c" * 40,
    series="plain",
    files=(FILE,),
)
OPEN = locks.SourceLock(name="rt-tests", reason="nobody answers")
PACKAGE = locks.LockedPackage(
    name="gcc",
    version="1:2~3+b1",
    arch="amd64",
    archive="debian",
    path="pool/main/g/gcc.deb",
    sha256="d" * 64,
    size=3,
)
SET = locks.PackageSet(
    name="builder/kernel", arch="amd64", suite="trixie", request=("gcc",), packages=(PACKAGE,)
)
SOURCES = locks.SourcesLock(sources=(PINNED, OPEN))
PACKAGES = locks.PackagesLock(sets=(SET,))

names = st.from_regex(r"\A[a-z0-9][a-z0-9.-]{0,20}\Z")
digests = st.text(HEX, min_size=64, max_size=64)
packages = st.builds(
    locks.LockedPackage,
    name=names,
    version=st.from_regex(r"\A[0-9][A-Za-z0-9+.:~-]{0,10}\Z"),
    arch=st.sampled_from(["amd64", "all"]),
    archive=st.sampled_from(["debian", "debian-security"]),
    path=st.from_regex(r"\Apool/[a-z0-9+~_-]{1,20}\.deb\Z"),
    sha256=digests,
    size=st.integers(1, 2**40),
)


@given(st.lists(packages, unique_by=lambda package: package.name, max_size=5))
def test_a_package_lock_reads_back_as_it_was_written(tmp_path_factory: Any, made: list[Any]) -> None:
    request = tuple(package.name for package in made[:2])
    entry = locks.PackageSet(
        name="guest/x", arch="amd64", suite="trixie", request=request, packages=tuple(made)
    )
    path = tmp_path_factory.mktemp("lock") / "packages.lock"
    locks.dump_packages(locks.PackagesLock(sets=(entry,)), path)
    assert locks.load_packages(path).sets == (entry,)


def test_a_source_lock_reads_back_and_gives_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "sources.lock"
    locks.dump_sources(SOURCES, path)
    assert locks.load_sources(path) == SOURCES
    assert path.read_bytes() == locks.encode_sources(SOURCES)
    assert [child.name for child in tmp_path.iterdir()] == ["sources.lock"]


def test_there_is_a_line_for_each_source_and_each_package() -> None:
    assert len(locks.encode_sources(SOURCES).splitlines()) == 2 + len(SOURCES.sources)
    assert len(locks.encode_packages(PACKAGES).splitlines()) == 2 + 2 + len(SET.packages)
    json.loads(locks.encode_packages(PACKAGES))


def test_an_absent_lock_is_empty(tmp_path: Path) -> None:
    assert locks.load_sources(tmp_path / "none") == locks.SourcesLock()
    assert locks.load_packages(tmp_path / "none") == locks.PackagesLock()


def test_replacing_one_entry_leaves_the_others_as_they_are() -> None:
    moved = locks.PackageSet(name="builder/qemu", arch="amd64", suite="sid", request=(), packages=())
    before = locks.encode_packages(PACKAGES).splitlines()
    after = locks.encode_packages(PACKAGES.replace([moved])).splitlines()
    assert before[1:3] == after[1:3]
    assert [entry.name for entry in PACKAGES.replace([moved]).sets] == ["builder/kernel", "builder/qemu"]


def test_an_open_entry_says_why_and_how_to_close_it() -> None:
    with pytest.raises(UserError, match="rt-tests is not pinned: nobody answers") as caught:
        SOURCES.get("rt-tests")
    assert "doit lock -u rt-tests" in caught.value.hint


def test_an_absent_entry_names_the_command_that_makes_it() -> None:
    with pytest.raises(UserError, match="no entry for x") as caught:
        SOURCES.get("x")
    assert "doit lock -u x" in caught.value.hint
    with pytest.raises(UserError, match="no set builder/kernel for arm64"):
        PACKAGES.get("builder/kernel", "arm64")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha256": "d" * 63}, "builder/kernel, gcc, sha256"),
        ({"sha256": "D" * 64}, "builder/kernel, gcc, sha256"),
        ({"sha256": "d" * 64 + "\n"}, "builder/kernel, gcc, sha256"),
        ({"path": "/etc/passwd"}, "builder/kernel, gcc, path"),
        ({"path": "pool/../../etc/passwd"}, "builder/kernel, gcc, path"),
        ({"path": ".."}, "builder/kernel, gcc, path"),
        ({"path": "pool/./x"}, "builder/kernel, gcc, path"),
        ({"name": "--option"}, "builder/kernel, --option, name"),
        ({"size": 0}, "builder/kernel, gcc, size"),
        ({"size": "3"}, "builder/kernel, gcc, size"),
        ({"archive": "ubuntu"}, "builder/kernel, gcc, archive"),
        ({"colour": "red"}, "unknown field `colour`"),
        ({"arch": "arm64"}, "package gcc is not for amd64"),
        ({"name": "clang"}, "requested but not locked: gcc"),
    ],
)
def test_an_impossible_package_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    data = json.loads(locks.encode_packages(PACKAGES))
    data["sets"][0]["packages"][0] |= change
    path = tmp_path / "packages.lock"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError) as caught:
        locks.load_packages(path)
    assert said in caught.value.message
    assert str(path) in caught.value.message
    assert "builder/kernel" in caught.value.message
    assert "doit lock" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tree": "c" * 39}, "linux-rt, tree"),
        ({"tree": ""}, "needs origin, location, ref, commit and tree"),
        ({"commit": ""}, "an open entry pins nothing"),
        ({"files": []}, "files and series belong to Debian origins"),
        ({"ref": "--upload-pack=x"}, "must not begin with '-'"),
        ({"reason": "x"}, "no reason for being open"),
        ({"origin": "svn"}, "linux-rt, origin"),
    ],
)
def test_an_impossible_source_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    data = json.loads(locks.encode_sources(SOURCES))
    data["sources"][0] |= change
    path = tmp_path / "sources.lock"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError) as caught:
        locks.load_sources(path)
    assert said in caught.value.message
    assert "linux-rt" in caught.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema":2}', "\x00", '{"sets":[1]}', '{"sets":{"a":1}}'])
def test_a_broken_file_is_refused_with_the_remedy(text: str, tmp_path: Path) -> None:
    path = tmp_path / "packages.lock"
    path.write_text(text)
    with pytest.raises(UserError, match=r"packages\.lock") as caught:
        locks.load_packages(path)
    assert "doit lock" in caught.value.hint


def test_an_entry_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "packages.lock"
    path.write_bytes(locks.encode_packages(locks.PackagesLock(sets=(SET, SET))))
    with pytest.raises(UserError, match=r"builder/kernel .* locked twice"):
        locks.load_packages(path)


def test_the_committed_locks_are_what_would_be_written() -> None:
    sources, packages = locks.SOURCES_LOCK, locks.PACKAGES_LOCK
    assert sources.read_bytes() == locks.encode_sources(locks.load_sources(sources))
    assert packages.read_bytes() == locks.encode_packages(locks.load_packages(packages))


def test_the_highest_release_is_the_one_of_the_howto() -> None:
    ranked = ["release/3.2.12-rt22-kvm", "release/3.2.12-rt9-kvm", "release/3.2.4-rt30-kvm"]
    while ranked:
        assert highest("release/*-kvm", [*reversed(ranked), "release/9.9-xen", "9.9-kvm"]) == ranked.pop(0)
    assert highest("release/*-kvm", ["main"]) is None


@pytest.mark.parametrize(
    ("pattern", "names", "wanted"),
    [
        ("v10.*", ["v10.0.2", "v10.0.13", "v10.1.0-rc4"], "v10.0.13"),
        ("v10.*-rc*", ["v10.0.2", "v10.1.0-rc4", "v10.1.0-rc10"], "v10.1.0-rc10"),
        ("v*", ["v6.12", "v6.12-rc7"], "v6.12"),
        ("v*", ["v6.12.1-rt1", "v6.12-rt9"], "v6.12.1-rt1"),
        ("v2.8", ["v2.8", "v2.80"], "v2.8"),
        ("v*", ["v1-arch2", "v1-arch10"], "v1-arch10"),
    ],
)
def test_the_order_is_that_of_releases(pattern: str, names: list[str], wanted: str) -> None:
    assert highest(pattern, names) == wanted
    assert highest(pattern, reversed(names)) == wanted


def test_excluded_refs_do_not_count() -> None:
    found = highest("v6.12.*-rt*", ["v6.12.8-rt8", "v6.12.8-rt8-rebase"], ["*-rebase"])
    assert found == "v6.12.8-rt8"


numbers = st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))


@given(st.sets(numbers, min_size=1, max_size=8))
def test_numbers_are_compared_as_numbers(versions: set[tuple[int, int, int, int]]) -> None:
    refs = {f"release/{a}.{b}.{c}-rt{d}-kvm": (a, b, c, d) for a, b, c, d in versions}
    found = highest("release/*-kvm", refs)
    assert found is not None
    assert refs[found] == max(versions)


@given(st.lists(st.text("01289.-abrct", max_size=12), min_size=2, max_size=6))
def test_the_choice_does_not_depend_on_the_order_of_the_refs(refs: list[str]) -> None:
    assert highest("*", refs) == highest("*", sorted(refs, reverse=True))
    assert len({order(ref) for ref in refs}) == len(set(refs))
