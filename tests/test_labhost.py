"""The lab's host: what is installed on it, by which words, and a verdict that fails closed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline import aptindex, drivers, installgate, labboard, labhost, labinstall
from pipeline.gate import Answer, MalformedError
from pipeline.installgate import Entry, Expectations, default, entries, judge, record
from pipeline.project import Project

ROOT = Path(__file__).resolve().parent.parent
#: What real hosts answered: one that installed, one whose repository had a changed package, one with another key.
RECORDED = Path(__file__).resolve().parent / "labhost"

Told = dict[str, tuple[int, str]]


@cache
def read(name: str) -> dict[str, Any]:
    """A recording: `told`, and what was expected of the host."""
    found: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text())
    return found


def told(name: str = "installed") -> Told:
    """What a host answered."""
    return {key: (status, text) for key, (status, text) in read(name)["told"].items()}


PLAN = msgspec.convert(read("installed")["expected"], Expectations)
DEBIAN = told()["release"][1].strip()


def sent(answers: Told) -> bytes:
    """The bytes that come over the port."""
    body = "".join(
        f"{name} {status} {base64.b64encode(text.encode()).decode()}\n"
        for name, (status, text) in answers.items()
    ).encode()
    return body + f"end {hashlib.sha256(body).hexdigest()}\n".encode()


def failed(answers: Told, plan: Expectations = PLAN) -> dict[str, str]:
    """What is wrong with a host that answers so, by finding."""
    return {finding.name: finding.got for finding in judge(sent(answers), plan) if not finding.ok}


def changed(name: str, old: str, new: str) -> Told:
    """The answers of the host that installed, with a change in one."""
    status, text = told()[name]
    assert old in text
    return told() | {name: (status, text.replace(old, new))}


# The verdict -------------------------------------------------------------------------------------


def test_a_host_that_installed_is_fine() -> None:
    findings = judge(sent(told()), PLAN)
    assert [finding for finding in findings if not finding.ok] == []
    assert len({finding.name for finding in findings}) == len(findings) == 24


def test_a_changed_package_is_refused_in_apts_words() -> None:
    wrong = failed(told("tampered"), msgspec.convert(read("tampered")["expected"], Expectations))
    assert "Hash Sum mismatch" in wrong["apt-get install"]
    assert "not installed" in wrong["asked packages"]
    # what apt had accepted before is no finding
    assert not {"repository added", "apt-get update", "entry of Debian's kernel"} & set(wrong)


def test_another_key_is_refused_in_apts_words() -> None:
    wrong = failed(told("wrong-key"), msgspec.convert(read("wrong-key")["expected"], Expectations))
    assert re.search("Missing key|NO_PUBKEY", wrong["apt-get update"])
    assert {"apt-get install", "asked packages", "default entry", "fallback entry"} <= set(wrong)


@pytest.mark.parametrize("name", sorted(told()))
def test_each_answer_counts(name: str) -> None:
    """No answer may be missing; and only what `find` says of missing files may be empty or fail."""
    missing = {key: value for key, value in told().items() if key != name}
    assert failed(missing)
    if name not in ("sources_before",):
        assert failed(told() | {name: (1, told()[name][1])})
    quiet = {"failed", "verify", "network", "sources", "update", "install", "menu_before", "menu_check"}
    if name not in quiet | {"environment", "trim", "clean", "sources_before"}:
        assert failed(told() | {name: (0, "")})


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_answers_that_are_cut_short_are_refused_as_a_whole(cut: int) -> None:
    findings = judge(sent(told())[:cut], PLAN)
    assert [finding.name for finding in findings] == ["answers"]
    assert not findings[0].ok
    assert record(sent(told())[:cut]) == {"entries": [], "environment_offset": None}


@pytest.mark.parametrize(
    ("name", "old", "new", "finding"),
    [
        ("running", "running", "degraded", "host running"),
        ("version", "Debian", "Else", "host version"),
        ("release", DEBIAN, PLAN.release, "host release"),
        ("meant", PLAN.release, DEBIAN, "kernel that is meant"),
        ("packages", "ii  virt-rt-host-", "iU  virt-rt-host-", "all packages"),
        ("packages", "ii  virt-rt-host-", "iU  virt-rt-host-", "asked packages"),
        ("packages", "virt-rt-guest-rt-guest 0", "virt-rt-guest-rt-guest 1", "asked packages"),
        ("boot", f"initrd.img-{PLAN.release}", "gone", "default entry"),
        ("boot", f"vmlinuz-{PLAN.release}", "gone", "fallback entry"),
        ("boot", f"vmlinuz-{DEBIAN}", "gone", "entry of Debian's kernel"),
        ("menu", "nohz_full=1-3", "nohz_full=1-2", "default entry"),
        ("menu", 'set default="0"', 'set default="1"', "default entry"),
        ("menu", "virt-rt-host-", "other-host-", "default entry"),
        ("menu", "virt-rt-plain-", "other-plain-", "fallback entry"),
        ("environment_block", "0", "none", "environment block"),
    ],
)
def test_each_thing_that_can_be_wrong_is_found(name: str, old: str, new: str, finding: str) -> None:
    assert finding in failed(changed(name, old, new))


@pytest.mark.parametrize("setting", installgate.LAX)
@pytest.mark.parametrize("value", ["1", "true", "yes", "allow"])
def test_an_apt_that_would_take_anything_is_refused(setting: str, value: str) -> None:
    status, text = told()["apt_settings"]
    text = re.sub(rf'^{setting} ".*";\n', "", text, flags=re.MULTILINE) + f'{setting} "{value}";\n'
    assert failed(told() | {"apt_settings": (status, text)}) == {"signatures": setting}


def test_a_source_beside_ours_is_refused() -> None:
    found = told() | {
        "sources_before": (1, "/etc/apt/sources.list.d/debian.sources\nfind: no sources.list\n")
    }
    assert failed(found) == {"sources before": "/etc/apt/sources.list.d/debian.sources"}


def test_what_dpkg_finds_and_what_failed_is_said() -> None:
    assert failed(told() | {"verify": (0, "??5?????? /usr/bin/jq\n")}) == {
        "dpkg --verify": "exit status 0: ??5?????? /usr/bin/jq"
    }
    assert "x.service" in failed(told() | {"failed": (0, "x.service loaded failed\n")})["host failed units"]
    assert "next_entry=a" in failed(told() | {"environment": (0, "next_entry=a\n")})["nothing chosen"]


def test_nothing_asked_for_is_not_all_installed() -> None:
    assert "asked packages" in failed(told(), replace(PLAN, packages={}))


def test_a_fallback_with_isolation_is_none() -> None:
    status, text = told()["menu"]
    menu = re.sub(r"^(\t+linux\t.*)$", r"\1 nohz_full=1-3", text, flags=re.MULTILINE)
    assert "fallback entry" in failed(told() | {"menu": (status, menu)})


def test_a_default_entry_that_starts_another_kernel_is_found() -> None:
    status, text = told()["menu"]
    menu = text.replace(f"/boot/vmlinuz-{PLAN.release}", f"/boot/vmlinuz-{DEBIAN}", 1)
    assert set(failed(told() | {"menu": (status, menu)})) == {"default entry"}
    without = re.sub(r"^\tinitrd\t.*\n", "", text, count=1, flags=re.MULTILINE)
    assert set(failed(told() | {"menu": (status, without)})) == {"default entry"}


def test_apt_is_quoted_by_its_errors() -> None:
    said = Answer(100, "Reading...\nErr:1 http://a InRelease\n  The signature\nW: x\nE: y\nlast\n")
    assert installgate.words_of(said) == "exit status 100: Err:1 http://a InRelease; W: x; E: y"
    assert installgate.words_of(Answer(1, "one\ntwo\n")) == "exit status 1: two"
    assert installgate.words_of(Answer(1, "")) == "exit status 1: nothing said"


# The boot menu -----------------------------------------------------------------------------------


def test_the_menu_of_a_real_host() -> None:
    menu = told()["menu"][1]
    first = default(menu)
    assert first.title.endswith(", for real-time guests")
    assert (first.kernel, first.initrd) == (
        f"/boot/vmlinuz-{PLAN.release}",
        f"/boot/initrd.img-{PLAN.release}",
    )
    found = entries(menu)
    assert found[0] == first
    assert {entry.release for entry in found} == {PLAN.release, DEBIAN}
    plain = installgate.plain(found, PLAN)
    assert "without CPU isolation" in plain[0].title
    assert plain[0].id.startswith("virt-rt-plain-virt-rt-host-")
    # what is in a submenu is named by both ids
    assert any(entry.id.count(">") == 1 for entry in found)


def test_a_menu_in_few_words() -> None:
    menu = (
        "function f {\n  true\n}\n"
        "submenu 'Don'\\''t' $menuentry_id_option 's' {\n"
        "\tmenuentry 'A' --class x $menuentry_id_option 'a' {\n\t\tlinux\t/boot/vmlinuz-1 ro  x=1\n\t}\n}\n"
        "menuentry 'Settings' $menuentry_id_option 'uefi' {\n\tfwsetup\n}\n"
    )
    assert entries(menu) == [Entry("A", "s>a", "/boot/vmlinuz-1", ("ro", "x=1"), "")]
    with pytest.raises(MalformedError, match="first entry does not start a kernel"):
        default(f'set default="0"\n{menu}')


@pytest.mark.parametrize(
    ("menu", "why"),
    [
        ("", "no entry that starts a kernel"),
        ("menuentry 'A' {\n\tlinux /boot/vmlinuz-1\n", "cut short"),
        ("}\n", "an end without a beginning"),
        ("submenu 'A' {\n}\n", "not a menu entry"),
        ("menuentry A {\n}\n", "not a menu entry"),
    ],
)
def test_what_is_no_menu_is_refused(menu: str, why: str) -> None:
    with pytest.raises(MalformedError, match=why):
        entries(menu)


@pytest.mark.parametrize("line", ["", 'set default="${next_entry}"', 'set default="0"\nset default="saved"'])
def test_a_menu_that_starts_something_else_by_itself_is_refused(line: str) -> None:
    menu = f"{line}\nmenuentry 'A' {{\n\tlinux /boot/vmlinuz-1\n}}\n"
    with pytest.raises(MalformedError, match="not entry 0"):
        default(menu)


def test_what_the_stack_proof_is_told() -> None:
    said = record(sent(told()))
    assert said["environment_offset"] > 0
    assert said["environment_offset"] % 512 == 0
    first = said["entries"][0]
    assert first["release"] == PLAN.release
    assert set(PLAN.parameters) <= set(first["parameters"])


# What is asked of apt ----------------------------------------------------------------------------

INDEX = "Package: a\nVersion: 1\nDescription: x\n Package: z\n\nPackage: b\nVersion: 2+g1\n"


def test_versions_are_the_indexes() -> None:
    assert labinstall.asked_for(INDEX, ["b", "a"]) == {"b": "2+g1", "a": "1"}


@pytest.mark.parametrize(
    ("index", "names", "why"),
    [
        (INDEX, ["a", "z"], "no package z; it has a, b"),
        (INDEX, [], "no package that is asked for"),
        ("", ["a"], "no package a; it has none"),
        (f"{INDEX}\nPackage: a\nVersion: 3\n", ["a"], "two versions of a"),
    ],
)
def test_what_the_repository_does_not_have_is_named(index: str, names: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        labinstall.asked_for(index, names)


def test_the_sources_file_is_the_one_that_is_published(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    (repository / "apt/dists/testing").mkdir(parents=True)
    key = "-----BEGIN-----\n\nabc\n-----END-----\n"
    (repository / "key.asc").write_text(key)
    (repository / "apt/dists/testing/Release").write_text("release")
    channel, address = labinstall.site(repository, tmp_path / "site")
    recipe = msgspec.structs.replace(Project(ROOT).release.repository, url="http://10.0.2.2:8080")
    assert channel == "testing"
    with labinstall.serving(tmp_path / "site", port=0) as (port, asked):
        assert address == "http://10.0.2.2:8080/virt-rt-testing.sources"
        here = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(f"{here}/virt-rt-testing.sources") as answer:  # noqa: S310
            assert answer.read() == aptindex.source(recipe, "testing", key.encode())
        with urllib.request.urlopen(f"{here}/apt/dists/testing/Release") as answer:  # noqa: S310
            assert answer.read() == b"release"
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{here}/apt/none")  # noqa: S310
    assert asked == [
        "200 /virt-rt-testing.sources",
        "200 /apt/dists/testing/Release",
        "404 /apt/none",
    ]


def test_a_repository_has_one_channel(tmp_path: Path) -> None:
    (tmp_path / "repo/apt/dists").mkdir(parents=True)
    with pytest.raises(ValueError, match="not one channel but none"):
        labinstall.site(tmp_path / "repo", tmp_path / "site")


def test_the_step_without_inputs_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("IN", "OUT", "WORK"):
        monkeypatch.setattr(labinstall, name, tmp_path)
    monkeypatch.setenv("PLATFORM", "qemu-q35")
    assert labinstall.main() == 2
    assert "expected.json" in capsys.readouterr().err
    assert not (tmp_path / "disk.qcow2").exists()


# The board ---------------------------------------------------------------------------------------


def a_host(directory: Path) -> labboard.Host:
    """A host with real tools, on a disk of 1 MiB that has a GRUB environment at 4096."""
    if shutil.which("qemu-img") is None or shutil.which("qemu-io") is None:
        pytest.skip("qemu-img and qemu-io are not installed")
    (directory / "qemu/bin").mkdir(parents=True)
    for program in ("qemu-img", "qemu-io"):
        (directory / "qemu/bin" / program).symlink_to(str(shutil.which(program)))
    (directory / "qemu/share/qemu").mkdir(parents=True)
    (directory / "qemu/share/qemu/OVMF_VARS_4M.fd").write_bytes(b"variables")
    raw = bytearray(1 << 20)
    raw[4096 : 4096 + 1024] = b"# GRUB Environment Block\n".ljust(1024, b"#")
    raw[8192:8200] = b"neighbor"
    (directory / "raw").write_bytes(raw)
    convert = ["qemu-img", "convert", "-O", "qcow2", str(directory / "raw"), str(directory / "disk.qcow2")]
    subprocess.run(convert, check=True)
    (directory / "work").mkdir()
    return labboard.Host(directory / "qemu", directory / "disk.qcow2", directory / "work")


def raw_of(disk: Path) -> bytes:
    """A disk's content."""
    target = disk.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(disk), str(target)], check=True)
    return target.read_bytes()


def test_another_entry_is_chosen_on_the_disk_that_is_written(tmp_path: Path) -> None:
    host = a_host(tmp_path)
    host.lay_over()
    given = host.disk.read_bytes()
    host.choose("sub>plain", 4096)
    was, now = (tmp_path / "raw").read_bytes(), raw_of(host.written)
    assert now[4096 : 4096 + 1024] == b"# GRUB Environment Block\nnext_entry=sub>plain\n".ljust(1024, b"#")
    assert now[:4096] == was[:4096]
    assert now[4096 + 1024 :] == was[4096 + 1024 :]
    assert host.disk.read_bytes() == given
    host.flatten(tmp_path / "flat.qcow2")
    assert raw_of(tmp_path / "flat.qcow2") == now


@pytest.mark.parametrize("offset", [8192, 1 << 30])
def test_nothing_is_written_where_no_environment_is(tmp_path: Path, offset: int) -> None:
    host = a_host(tmp_path)
    host.lay_over()
    with pytest.raises((ValueError, subprocess.CalledProcessError)):
        host.choose("plain", offset)
    assert raw_of(host.written) == (tmp_path / "raw").read_bytes()


def test_an_entry_whose_id_does_not_fit_is_refused(tmp_path: Path) -> None:
    host = a_host(tmp_path)
    host.lay_over()
    with pytest.raises(ValueError, match="1024 characters"):
        host.choose("x" * 1024, 4096)


def test_firmware_starts_the_disk_and_no_kernel_is_given(tmp_path: Path) -> None:
    host = labboard.Host(tmp_path / "qemu", tmp_path / "disk.qcow2", tmp_path / "work")
    arguments = host.arguments()
    assert "-kernel" not in arguments
    assert not any(str(host.disk) in argument for argument in arguments)
    assert any("pflash" in argument and "OVMF_CODE_4M.fd" in argument for argument in arguments)
    assert any(f"file={host.written}" in argument for argument in arguments)


def test_a_disk_that_is_not_there_is_named(tmp_path: Path) -> None:
    host = labboard.Host(tmp_path / "qemu", tmp_path / "disk.qcow2", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"disk\.qcow2"):
        host.lay_over()


# The action --------------------------------------------------------------------------------------


def test_the_host_and_all_that_the_repository_has_for_it_are_installed() -> None:
    project = Project(ROOT)
    built = drivers.builds(drivers.load(ROOT, project.recipes.platforms), "qemu-q35")
    assert {build.role for build in built} == {"host", "guest"}
    assert labhost.packages_of("qemu-q35", ["rt-guest"], built, {"package:qemu-q35:tools"}) == (
        "virt-rt-host-qemu-q35",
        "virt-rt-guest-rt-guest",
        "virt-rt-tools-qemu-q35",
        "virt-rt-driver-irqlat-{release}",
    )
    assert labhost.packages_of("p", ["g", "h"], (), set()) == (
        "virt-rt-host-p",
        "virt-rt-guest-g",
        "virt-rt-guest-h",
    )


def test_only_platforms_that_the_lab_emulates_have_a_host() -> None:
    graph = Project(ROOT).graph
    action = graph["labhost:qemu-q35"]
    assert "labhost:canoe-pass" not in {each.name for each in graph}
    assert {"repo:qemu-q35", "lab-disk:amd64", "qemu:qemu-q35"} <= set(action.upstreams)
    said = json.loads(action.files["expected.json"].content)
    assert said["machine"] == ["-smp", "4,sockets=1,cores=4,threads=1", "-m", "4096M"]
    assert "isolcpus=managed_irq,domain,1-3" in said["parameters"]
    assert {"isolcpus", "nohz_full", "rcu_nocbs", "irqaffinity"} == set(said["isolation"])
    assert "virt-rt-driver-irqlat-{release}" in said["packages"]
    assert [output.name for output in action.outputs] == [
        "disk.qcow2",
        "labhost.json",
        "install.log",
        "console.log",
    ]


def test_the_step_has_every_module_that_it_imports() -> None:
    """In the step the modules lie flat beside each other, without the package."""
    shipped = {Path(path).stem for path in labhost.HELPERS if path.endswith(".py")}
    for path in labhost.HELPERS:
        if path.endswith(".py"):
            text = (ROOT / path).read_text()
            wanted = re.findall(r"from pipeline(?:\.measure)?(?:\.(\w+))? import ([\w, ]+)", text)
            for module, names in wanted:
                assert set([module] if module else names.split(", ")) <= shipped


def test_apt_is_told_to_relax_nothing() -> None:
    script = (ROOT / "recipes/lab/virt-rt-install.sh").read_text()
    assert "apt-get update" in script
    assert not re.search(r"--allow|--force|trusted|insecure|Unauthenticated| -o ", script)
