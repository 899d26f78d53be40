"""What a user types, for real: the whole graph of the stand-in project, its engine and its store."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.engine import LABEL, PROJECT, Engine
from tests import standin
from tests.standin import Standin
from tests.tiny import tiny_rootfs

pytestmark = pytest.mark.engine

PRODUCTS = {
    "kernel:qemu-q35:guest",
    "kernel:qemu-q35:host",
    "qemu:qemu-q35",
    "image:rt-guest",
    "launch:rt-guest",
    "libvirt:rt-guest",
    "tuning:qemu-q35",
    "boot:qemu-q35",
    "labhost:qemu-q35",
    "stack:qemu-q35",
    "lab:qemu-q35",
    "driver:qemu-q35:irqlat-guest",
    "driver:qemu-q35:irqlat-host",
    "package:qemu-q35:driver-irqlat-guest",
    "package:qemu-q35:driver-irqlat-host",
    "package:qemu-q35:guest-kernel",
    "package:qemu-q35:guest-rt-guest",
    "package:qemu-q35:host",
    "package:qemu-q35:image-rt-guest",
    "package:qemu-q35:kernel-headers-guest",
    "package:qemu-q35:kernel-headers-host",
    "package:qemu-q35:kernel-image-guest",
    "package:qemu-q35:kernel-image-host",
    "package:qemu-q35:launch-rt-guest",
    "package:qemu-q35:qemu",
    "package:qemu-q35:tools",
    "package:qemu-q35:tuning",
    "lint:qemu-q35",
    "repo:qemu-q35",
    "release:qemu-q35",
}
RUNS = {"run:rt-guest", "ssh:rt-guest", "gdb:rt-guest"}
CURRENT = f"everything is current ({len(PRODUCTS)} tasks)\n"
GUEST_CONFIG = "kernel-configs/qemu-q35/guest-config"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Standin:
    """A stand-in project of which nothing but the builders is made."""
    directory = tmp_path_factory.mktemp("standin")
    (directory / "rootfs").mkdir()
    return standin.make(directory, tiny_rootfs(directory / "rootfs"))


@pytest.fixture
def project(template: Standin, tmp_path: Path) -> Iterator[Standin]:
    """A fresh copy with a cache of its own, and nothing left behind at the end."""
    shutil.copytree(template.cache, tmp_path / "cache")
    yield Standin(template.clone(tmp_path / "checkout").root, tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []


@pytest.fixture(scope="module")
def finished_template(template: Standin, tmp_path_factory: pytest.TempPathFactory) -> Standin:
    """A stand-in project of which everything is made: once, since it takes a container for every step."""
    directory = tmp_path_factory.mktemp("finished")
    shutil.copytree(template.cache, directory / "cache")
    made = Standin(template.clone(directory / "checkout").root, directory / "cache")
    done = made.doit()
    assert done.status == 0, done
    return made


@pytest.fixture
def built(finished_template: Standin, tmp_path: Path) -> Iterator[Standin]:
    """A project of which everything is made, with a cache of its own, and nothing left behind at the end."""
    shutil.copytree(finished_template.cache, tmp_path / "cache", symlinks=True)
    shutil.copytree(finished_template.root, tmp_path / "checkout", symlinks=True)
    yield Standin(tmp_path / "checkout", tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []


def left_behind(cache: Path) -> list[str]:
    """Stage directories in the cache, and containers whose step ran in one."""
    stages = [str(path) for path in (cache / "virt-rt" / "runs").glob("[!.]*")]
    handles = Engine().client.containers.list(
        all=True, ignore_removed=True, filters={"label": f"{LABEL}.project={PROJECT}"}
    )
    mounted = [m["Source"] for handle in handles for m in handle.attrs["Mounts"]]
    return stages + [source for source in mounted if source.startswith(str(cache))]


def started(out: str) -> set[str]:
    """Tasks whose steps ran."""
    return set(re.findall(r"^\[(\S+)\] started", out, re.MULTILINE))


def finished(out: str) -> set[str]:
    """Tasks that were built."""
    return set(re.findall(r"^\[(\S+)\] built", out, re.MULTILINE))


# The ordinary days ----------------------------------------------------------------------------


def test_everything_is_built_once_and_then_current(project: Standin) -> None:
    assert set(project.plan().values()) == {"build", "current", "not needed"}
    first = project.doit()
    assert first.status == 0, first
    assert finished(first.out) >= PRODUCTS
    second = project.doit()
    assert second.out == CURRENT
    assert (second.status, second.err) == (0, "")
    manifest = json.loads((project.root / "artifacts/qemu-q35/kernel/guest/manifest.json").read_text())
    assert manifest["action"] == "kernel:qemu-q35:guest"
    assert "bzImage" in manifest["files"]
    report = json.loads((project.root / "artifacts/qemu-q35/lab/report.json").read_text())
    levels = {level["name"]: level["verdict"] for level in report["levels"]}
    proven = dict.fromkeys(("structure", "boot", "stack"), "passed")
    assert levels == proven | {"latency": "not proven"}, report["levels"]
    assert {place["name"] for place in report["places"]} == {"host", "guest-rt-guest"}
    assert (report["evidence"], len(report["series"]), len(report["events"])) == ("emulated", 4, 1)


def test_lost_artifacts_are_restored_without_building(built: Standin) -> None:
    shutil.rmtree(built.root / "artifacts")
    assert {built.plan()[name] for name in PRODUCTS} == {"local"}
    done = built.doit()
    assert done.status == 0
    assert started(done.out) == set()
    assert f"done: 0 built, {len(PRODUCTS)} from the store" in done.out
    script = built.root / "artifacts/qemu-q35/launch/rt-guest/kvmqemu.sh"
    assert os.access(script, os.X_OK)


def test_a_second_checkout_with_the_same_cache_builds_nothing(built: Standin, tmp_path: Path) -> None:
    done = built.clone(tmp_path / "second").doit()
    assert done.status == 0
    assert started(done.out) == set()


def test_one_line_of_the_guests_config_touches_only_the_guest(built: Standin) -> None:
    built.append(GUEST_CONFIG, "CONFIG_EXTRA=y\n")
    states = built.plan()
    stale = {name for name, state in states.items() if state == "build"}
    packages = (
        "driver-irqlat-guest",
        "guest-kernel",
        "guest-rt-guest",
        "image-rt-guest",
        "kernel-headers-guest",
        "kernel-image-guest",
    )
    of_all = {f"{kind}:qemu-q35" for kind in ("boot", "labhost", "stack", "lab", "lint", "repo", "release")}
    packed = {f"package:qemu-q35:{what}" for what in packages}
    assert (
        stale == {"kernel:qemu-q35:guest", "driver:qemu-q35:irqlat-guest", "image:rt-guest"} | of_all | packed
    )
    why = built.doit("why", "boot:qemu-q35")
    assert why.status == 0
    assert why.out == f"kernel:qemu-q35:guest: {GUEST_CONFIG} changed\n    +CONFIG_EXTRA=y\n"
    assert started(built.doit().out) == stale
    assert built.doit("why", "boot:qemu-q35").out == "boot:qemu-q35: nothing changed since the last result\n"


def test_undoing_a_change_finds_the_earlier_results(built: Standin) -> None:
    built.append(GUEST_CONFIG, "CONFIG_EXTRA=y\n")
    assert built.doit().status == 0
    built.edit(GUEST_CONFIG, "CONFIG_EXTRA=y\n", "")
    done = built.doit()
    assert started(done.out) == set()
    assert done.status == 0


def test_doits_own_database_decides_nothing(built: Standin) -> None:
    for path in built.root.glob("**/.doit*"):
        path.unlink()
    assert "everything is current" in built.doit().out


def test_one_product_brings_what_it_needs_and_no_more(project: Standin) -> None:
    done = project.doit("kernel:qemu-q35:guest")
    assert done.status == 0
    assert finished(done.out) == {"source:linux-rt", "kernel:qemu-q35:guest"}


def test_a_group_is_a_task(project: Standin) -> None:
    done = project.doit("kernel")
    assert done.status == 0
    kernels = {
        f"kernel:{name}:{role}"
        for name in ("canoe-pass", "qemu-q35", "qemu-virt-arm64")
        for role in ("guest", "host")
    }
    variant = {name.replace("canoe-pass", "canoe-pass-single-socket") for name in kernels} - kernels
    # what a variant shares with its base is built once, under either name
    built = {name.replace("-single-socket", "") for name in finished(done.out)}
    assert built == {"source:linux-rt", *kernels}
    assert len(finished(done.out)) == len(built)
    laid_out = {path.parent for path in project.root.glob("artifacts/*/kernel/*/*Image")}
    assert len(laid_out) == len(kernels | variant)


# Reading commands -----------------------------------------------------------------------------


def test_list_names_the_products_the_machines_to_measure_and_the_guests_to_run(project: Standin) -> None:
    done = project.doit("list")
    lines = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    of_others = {name for name in lines if "canoe" in name or "arm64" in name}
    assert lines.keys() - of_others == {*PRODUCTS, "platform:qemu-q35", "measure:qemu-q35", *RUNS}
    expected = {
        name.replace("qemu-q35", platform).replace("rt-guest", guest)
        for name in PRODUCTS - {"labhost:qemu-q35", "stack:qemu-q35"}
        | {"platform:qemu-q35", "measure:qemu-q35", *RUNS}
        for platform, guest in (
            ("canoe-pass", "canoe-guest"),
            ("canoe-pass-single-socket", "canoe-single-guest"),
            ("qemu-virt-arm64", "rt-guest-arm64"),
        )
        if "irqlat" not in name
    }
    assert of_others == expected
    assert lines["run:rt-guest"].startswith("boot rt-guest from the current artifacts")
    assert lines["measure:canoe-pass"] == "measure a real machine of canoe-pass over ssh: TARGET=user@host"
    everything = json.loads(project.doit("list", "--all", "--json").out)
    assert {"source:linux-rt", "builder:kernel"} <= {row["task"] for row in everything}


def test_plan_tells_times_once_they_are_known(built: Standin) -> None:
    built.append(GUEST_CONFIG, "CONFIG_EXTRA=y\n")
    rows = {row["task"]: row for row in json.loads(built.doit("plan", "--json").out)}
    assert rows["kernel:qemu-q35:guest"]["expected_seconds"] > 0
    assert re.search(r"^16 to build, about \d+ s of work$", built.doit("plan").out, re.MULTILINE)


def test_log_shows_a_steps_output_also_in_another_checkout(built: Standin, tmp_path: Path) -> None:
    done = built.doit("log", "kernel:qemu-q35:guest")
    assert "CC      file30.o" in done.out
    assert built.clone(tmp_path / "second").doit("log", "kernel:qemu-q35:guest").out == done.out
    assert project_error(built.doit("log", "builder:kernel")) == "builder:kernel has no log yet"


def project_error(done: standin.Done) -> str:
    """The one line that says what is wrong, of a command that ended with status 2."""
    assert done.status == 2, done
    lines = [line for line in (done.out + done.err).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done
    return lines[0].removeprefix("error: ")


def test_shell_opens_the_steps_container(built: Standin) -> None:
    done = built.doit(
        "shell", "kernel:qemu-q35:guest", "/bin/bash", "-c", "cat /build/in/source/main.c; echo $ROLE"
    )
    assert (done.status, done.out) == (0, "int linux;\nguest\n")
    assert "runs on the host" in project_error(built.doit("shell", "launch:rt-guest"))


def test_reproduce_compares_two_runs(built: Standin) -> None:
    done = built.doit("reproduce", "kernel:qemu-q35:guest")
    assert done.status == 0
    assert "bzImage: identical" in done.out
    step = "recipes/steps/kernel.sh"
    built.append(step, "date +%s%N >>/build/out/config\n")
    done = built.doit("reproduce", "kernel:qemu-q35:guest")
    assert done.status == 1
    assert re.search(r"^config: \w{64} became \w{64}$", done.out, re.MULTILINE)


# Bad input ------------------------------------------------------------------------------------


GUEST = "recipes/guests/rt-guest.toml"
BAD_INPUT = [
    (GUEST, "vcpus = 2", "vcpu = 2", rf"{GUEST}:3: unknown key vcpu$"),
    (GUEST, "vcpus = 2", 'vcpus = "2"', rf"{GUEST}:3: vcpus: expected `int`, got `str`$"),
    (GUEST, "vcpus = 2", "vcpus = ", rf"{GUEST}: not TOML: .*line 3"),
    (GUEST, "disk_mib = ", "disk_mib = -", rf"{GUEST}:\d+: image.disk_mib: expected `int` >= 128"),
    (GUEST, '"qemu-q35"', '"q53"', rf"{GUEST}:2: there is no platform q53$"),
    (GUEST, "ing_vcpus = 1", "ing_vcpus = 2", rf"{GUEST}:4: .*no vCPU is left to isolate"),
    (
        "recipes/builders/kernel.toml",
        '"gcc"',
        '"gcc", "added-one"',
        "recipes/builders/kernel.toml and recipes/packages.lock differ: added-one",
    ),
    (
        "recipes/platforms/qemu-q35.toml",
        "common/rt.config",
        "common/rtt.config",
        "there is no kernel-configs/common/rtt.config",
    ),
    ("recipes/sources.lock", '"schema":1', '"schema":', "recipes/sources.lock is not JSON"),
    ("recipes/packages.lock", '"sha256":"', '"sha256":"x', "recipes/packages.lock: builder/image"),
]


@pytest.mark.parametrize(("path", "old", "new", "message"), BAD_INPUT)
def test_bad_input_is_one_line_that_names_the_place(
    project: Standin, path: str, old: str, new: str, message: str
) -> None:
    before = (project.root / path).read_text()
    (project.root / path).write_text(before.replace(old, new, 1))
    assert re.search(message, project_error(project.doit("plan")))
    assert re.search(message, project_error(project.doit()))
    (project.root / path).write_text(before)
    assert project.doit("plan").status == 0


def test_a_lock_that_was_tampered_with_is_found_out(project: Standin) -> None:
    lock = project.root / "recipes/sources.lock"
    data = json.loads(lock.read_text())
    text, tree = lock.read_text(), data["sources"][0]["tree"]
    lock.write_text(text.replace(tree, "0" * 40))
    assert "is tree 0000" in project_error(project.doit("source:linux-rt"))
    lock.write_text(text)
    assert project.doit("source:linux-rt").status == 0


def test_a_source_that_does_not_answer_is_named(project: Standin, tmp_path: Path) -> None:
    lock = project.root / "recipes/sources.lock"
    text = lock.read_text()
    url = json.loads(text)["sources"][0]["location"]
    shutil.rmtree(project.cache / "virt-rt" / "git", ignore_errors=True)
    lock.write_text(text.replace(url, str(tmp_path / "nowhere")))
    assert "source linux-rt v6.12.1-rt1 cannot be fetched" in project_error(project.doit("source:linux-rt"))
    lock.write_text(text)
    assert project.doit("source:linux-rt").status == 0


def test_a_package_that_has_left_the_archive_stops_doit_with_the_command(
    project: Standin, tmp_path: Path
) -> None:
    lock = json.loads((project.root / "recipes/packages.lock").read_text())
    package = next(s for s in lock["sets"] if s["name"] == "guest/rt-guest")["packages"][0]
    digest = package["sha256"]
    (project.cache / "virt-rt/cas/sha256" / digest[:2] / digest).unlink()
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    done = project.doit("rootfs:rt-guest", VIRT_RT_MIRROR=str(mirror))
    assert f"{package['path']}, locked for guest/rt-guest, has left the archive" in project_error(done)
    assert "run: doit lock -u guest/rt-guest\n" in done.out
    file = mirror / "debian" / package["path"]
    file.parent.mkdir(parents=True)
    file.write_text(f"guest/rt-guest {package['name']}")
    assert project.doit("rootfs:rt-guest", VIRT_RT_MIRROR=str(mirror)).status == 0


def test_a_patch_that_does_not_apply_names_file_and_hunk(project: Standin) -> None:
    directory = project.root / "recipes/patches/linux-rt"
    directory.mkdir(parents=True)
    patch = directory / "0001-change-main.patch"
    patch.write_text("--- a/main.c\n+++ b/main.c\n@@ -1 +1 @@\n-int other;\n+int better;\n")
    message = project_error(project.doit("source:linux-rt"))
    assert "0001-change-main.patch" in message
    assert "main.c" in message
    patch.write_text("--- a/main.c\n+++ b/main.c\n@@ -1 +1 @@\n-int linux;\n+int better;\n")
    assert project.doit("kernel:qemu-q35:guest").status == 0
    image = project.root / "artifacts/qemu-q35/kernel/guest/bzImage"
    assert image.read_text().startswith("int better;\n")


def test_a_step_that_fails_shows_its_last_lines_log_and_the_way_in(project: Standin) -> None:
    project.append(GUEST_CONFIG, "BROKEN\n")
    done = project.doit("kernel:qemu-q35:guest")
    assert done.status == 1
    assert "  | error: BROKEN does not compile\nerror: kernel:qemu-q35:guest ended with 1\n" in done.out
    assert "doit shell kernel:qemu-q35:guest" in done.out
    assert (project.root / "artifacts/log/kernel:qemu-q35:guest.log").read_text().endswith("compile\n")
    assert "Traceback" not in done.out + done.err
    project.edit(GUEST_CONFIG, "BROKEN\n", "")
    assert project.doit("kernel:qemu-q35:guest").status == 0


def test_what_a_failed_step_made_is_kept_beside_its_log(project: Standin) -> None:
    project.append("recipes/steps/lab-boot.sh", "exit 1\n")
    done = project.doit()
    assert done.status == 1
    kept = project.root / "artifacts/log/boot:qemu-q35.failed"
    assert f"what it left: {kept}\n" in done.out
    assert (kept / "console-rt-guest-outside.log").read_text() == "booted\n"
    assert (
        "[platform:qemu-q35] not tried, since boot:qemu-q35 lab:qemu-q35 release:qemu-q35 failed\n"
        in project.doit("-c").out
    )


def test_a_step_that_refuses_its_input_ends_with_two(project: Standin) -> None:
    project.append(GUEST_CONFIG, "REFUSED\n")
    done = project.doit("kernel:qemu-q35:guest")
    assert project_error(done) == "kernel:qemu-q35:guest ended with 2"
    assert "  | error: REFUSED is not to be had" in done.out


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["run", "kernel:nowhere:guest"], ["plan", "x"], ["--nonsense"], ["why"]]
)
def test_words_that_mean_nothing_end_with_two(project: Standin, arguments: list[str]) -> None:
    done = project.doit(*arguments)
    assert done.status == 2, done
    assert "Traceback" not in done.out + done.err


def test_a_measurement_is_no_step(project: Standin) -> None:
    for words in (["plan", "measure:qemu-q35"], ["why", "measure"]):
        assert project_error(project.doit(*words)) == f"{words[1]} is no step: it measures a machine"


def test_an_engine_that_does_not_run_is_one_line(project: Standin, tmp_path: Path) -> None:
    done = project.doit("kernel:qemu-q35:guest", DOCKER_HOST=f"unix://{tmp_path}/none")
    assert "the container engine does not answer" in project_error(done)
    assert project.doit("kernel:qemu-q35:guest").status == 0


def test_an_engine_is_not_needed_when_everything_is_known(built: Standin, tmp_path: Path) -> None:
    shutil.rmtree(built.root / "artifacts")
    assert built.doit(DOCKER_HOST=f"unix://{tmp_path}/none").status == 0


def test_a_corrupted_blob_is_made_again(built: Standin) -> None:
    manifest = json.loads((built.root / "artifacts/qemu-q35/qemu/manifest.json").read_text())
    digest = manifest["outputs"]["bin"]
    blob = built.cache / "virt-rt/cas/sha256" / digest[:2] / digest
    blob.chmod(0o644)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    shutil.rmtree(built.root / "artifacts")
    done = built.doit()
    assert done.status == 0
    assert finished(done.out) == {"qemu:qemu-q35"}


def test_an_artifact_edited_by_hand_is_restored_and_the_edit_kept(built: Standin) -> None:
    script = built.root / "artifacts/qemu-q35/launch/rt-guest/kvmqemu.sh"
    script.write_text("my own version")
    done = built.doit("verify-artifacts")
    assert (done.status, done.out.splitlines()[0]) == (
        2,
        "launch:rt-guest: artifacts/qemu-q35/launch/rt-guest/kvmqemu.sh: edited",
    )
    assert "kvmqemu.sh: edited" in built.doit("why", "launch:rt-guest").out
    done = built.doit()
    assert done.status == 0
    kept = re.search(
        r"^note: launch:rt-guest was edited by hand; your version is now (.*)$", done.out, re.MULTILINE
    )
    assert kept
    assert Path(kept[1]).read_text() == "my own version"
    assert script.read_text().startswith("#!/usr/bin/env bash")
    assert built.doit("verify-artifacts").status == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_line_and_nothing_is_lost(project: Standin, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    used = sum(path.stat().st_size for path in project.cache.rglob("*") if path.is_file())
    size = used + (3 << 20)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        shutil.copytree(project.cache, small / "cache")
        tight = Standin(project.root, small / "cache")
        tight.edit(
            "recipes/steps/kernel.sh", "mkdir -p", "head -c 8000000 /dev/zero >/build/out/big\nmkdir -p"
        )
        assert "is full" in project_error(tight.doit("kernel:qemu-q35:guest"))
        assert left_behind(small / "cache") == []
        tight.edit("recipes/steps/kernel.sh", "head -c 8000000 /dev/zero >/build/out/big\n", "")
        assert tight.doit("kernel:qemu-q35:guest").status == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


# Interruptions --------------------------------------------------------------------------------


def wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    """Read the process's output until a line has that text."""
    assert process.stdout
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"ended without {text!r}: {seen}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_soon_and_clean(project: Standin, number: signal.Signals) -> None:
    project.edit("recipes/steps/kernel.sh", "for n in {1..30}", "for n in {1..3000}")
    process = project.start("kernel:qemu-q35:guest")
    wait_for_line(process, "[kernel:qemu-q35:guest] started")
    time.sleep(1.5 if number is signal.SIGINT else 0.2)
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert time.monotonic() - began < 20
    assert "interrupted" in out
    assert "Traceback" not in out + err
    assert left_behind(project.cache) == []
    project.edit("recipes/steps/kernel.sh", "for n in {1..3000}", "for n in {1..30}")
    assert project.doit("kernel:qemu-q35:guest").status == 0


def test_a_killed_run_costs_only_what_had_not_finished(project: Standin) -> None:
    """kill -9 at several moments of one build; what had finished is never done again."""
    project.edit("recipes/steps/kernel.sh", "${SLEEP:-0}", "0.05")
    moments = random.Random(1).sample(
        ["source:linux-rt", "rootfs:rt-guest", "kernel:qemu-q35:host", "image:rt-guest"], 4
    )
    done_before: set[str] = set()
    for moment in moments:
        process = project.start()
        seen = ""
        assert process.stdout
        for line in process.stdout:
            seen += line
            if f"[{moment}] started" in line:
                break
        process.kill()
        rest, _ = process.communicate(timeout=60)
        seen += rest
        assert started(seen) & done_before == set(), f"done again: {started(seen) & done_before}"
        done_before |= finished(seen)
    done = project.doit()
    assert done.status == 0, done
    assert started(done.out) & done_before == set()
    assert project.doit().out == CURRENT


def test_two_runs_at_once_in_one_checkout(project: Standin) -> None:
    project.edit("recipes/steps/kernel.sh", "${SLEEP:-0}", "0.05")
    both = [project.start(), project.start()]
    outs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    built = [finished(out) for out, _ in outs]
    assert built[0] & built[1] == set()
    assert project.doit().out == CURRENT


def test_two_checkouts_at_once_share_the_work(project: Standin, tmp_path: Path) -> None:
    project.edit("recipes/steps/kernel.sh", "${SLEEP:-0}", "0.05")
    other = project.clone(tmp_path / "second")
    both = [project.start(), other.start()]
    outs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    built = [finished(out) for out, _ in outs]
    assert built[0] & built[1] == set()
    assert built[0] | built[1] >= PRODUCTS


def test_output_that_nobody_reads_is_no_error(built: Standin) -> None:
    done = subprocess.run(
        f"{sys.executable} -m doit list | head -1", shell=True, cwd=built.root, env=built.environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


# The terminal ---------------------------------------------------------------------------------


def on_a_terminal(project: Standin, *arguments: str, **environment: str) -> str:
    """What a terminal shows while a command runs."""
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "doit", *arguments], cwd=project.root, stdout=follower, stderr=follower,
        env=project.environment | {"TERM": "xterm", "COLUMNS": "100"} | environment,
    )  # fmt: skip
    os.close(follower)
    seen = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(leader)
    assert process.wait() == 0
    return seen.decode()


def test_a_terminal_shows_what_runs_and_how_far_it_is(project: Standin) -> None:
    assert project.doit("kernel:qemu-q35:guest").status == 0
    project.edit("recipes/steps/kernel.sh", "${SLEEP:-0}", "0.1")
    seen = on_a_terminal(project, "kernel:qemu-q35:guest")
    assert "kernel:qemu-q35:guest" in seen
    shares = [int(share) for share in re.findall(r"(\d+) %", seen)]
    assert any(10 < share < 95 for share in shares), seen
    assert "about" in seen
    assert "━" in seen
    assert "done: 1 built, 0 from the store" in seen
