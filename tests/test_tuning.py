"""The host tuning as a person meets it: what is set and why, what each file does, and how it goes away again."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline import archive, recipes, settings, tuning
from pipeline.cpuplan import HostPlan, affinity_mask
from pipeline.errors import UserError
from pipeline.executor import Executor
from pipeline.graph import Graph
from pipeline.placement import host_plan
from pipeline.project import Project
from pipeline.settings import Table, host_command_line
from pipeline.store import Store
from pipeline.topology import cpulist

ROOT = Path(__file__).resolve().parent.parent
RECIPES = recipes.load(ROOT)
TABLE = settings.load(ROOT)
PLATFORMS = tuple(RECIPES.platforms)
TEMPLATES = ROOT / tuning.TEMPLATES
#: Files that name CPUs, and how, as `spellings` has it; no other file does.
NAME_CPUS = {
    "etc/default/grub.d/50-virt-rt.cfg": {"isolated", "housekeeping"},
    "usr/lib/tuned/profiles/virt-rt/tuned.conf": {"isolated", "housekeeping"},
    "usr/libexec/virt-rt/bootloader-bls": {"isolated", "housekeeping"},
    "usr/libexec/virt-rt/irq-affinity": {"isolated one by one", "housekeeping"},
    "usr/libexec/virt-rt/settings": {"mask"},
    "usr/share/virt-rt/plan.json": {"isolated", "housekeeping", "mask"},
}
UNITS = ("virt-rt-hugepages.service", "virt-rt-irq-affinity.service", "virt-rt-settings.service")


def document(platform: str, plan: HostPlan | None = None, choices: Sequence[str] = ()) -> dict[str, Any]:
    """The plan of a shipped platform for tools, or of another plan on it."""
    return tuning.plan_json(
        platform,
        RECIPES.platforms[platform],
        plan or RECIPES.plans[platform],
        RECIPES.guests_of(platform),
        TABLE,
        choices,
    )


def build(root: Path, made: dict[str, Any]) -> Path:
    """The tree of a plan, with a check tool that says nothing."""
    templates = {
        path.relative_to(TEMPLATES).as_posix().removesuffix(".j2"): (
            path.read_text(),
            bool(path.stat().st_mode & 0o100),
        )
        for path in TEMPLATES.rglob("*.j2")
    }
    tuning.write(root, made, templates, b'#!/bin/sh\necho checked "$@"\n')
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The tuning of Canoe Pass, which has everything: two sockets and huge pages."""
    return build(tmp_path / "tree", document("canoe-pass"))


def files(root: Path) -> dict[str, str]:
    """Every file by path, with its text; a link with where it leads."""
    return {
        path.relative_to(root).as_posix(): f"-> {path.readlink()}" if path.is_symlink() else path.read_text()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def run(*command: str | Path, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a generated script; commands in the directory `path` come before the machine's own."""
    search = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
    environment = {"PATH": search, "LC_ALL": "C"} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


# The table ------------------------------------------------------------------------------------------


def all_settings() -> list[tuple[str, settings.Setting]]:
    kinds = [TABLE.settings, *(choice.settings for choice in TABLE.choices.values())]
    return [(f"{kind}.{name}", s) for each in kinds for kind in each for name, s in each[kind].items()]


def test_every_setting_says_why_and_where_that_is_written() -> None:
    found = all_settings()
    assert len(found) > 30
    assert [name for name, s in found if len(s.reason.split()) < 3 or len(s.source) < 5] == []


def test_what_trades_safety_is_off_unless_asked() -> None:
    """No platform that ships chooses anything, and nothing of a choice is set without it."""
    assert {name: p.choices for name, p in RECIPES.platforms.items() if p.choices} == {}
    plain = settings.resolve(RECIPES.plans["canoe-pass"], TABLE, (), "amd64")
    have = {(kind, s.name, s.value) for kind, each in plain.items() for s in each}
    assert ("sysctl", "kernel.sched_rt_runtime_us", "950000") in have
    for choice in TABLE.choices:
        asked = settings.resolve(RECIPES.plans["canoe-pass"], TABLE, [choice], "amd64")
        added = {(kind, s.name, s.value) for kind, each in asked.items() for s in each} - have
        assert added, choice
    text = json.dumps(document("canoe-pass"))
    assert not re.search(r"mitigations|nx_huge_pages|idle=poll|fair_server|ignore_ce", text)


def test_a_choice_replaces_what_it_names(tmp_path: Path) -> None:
    """Throttling is one setting before Linux 6.12 and another since: both are switched off."""
    root = build(tmp_path, document("qemu-q35", choices=["rt-throttling-off"]))
    found = files(root)
    lines = found["usr/lib/sysctl.d/90-virt-rt.conf"].splitlines()
    assert [line for line in lines if "rt_runtime" in line] == ["kernel.sched_rt_runtime_us = -1"]
    for cpu in (1, 2, 3):
        assert f"/fair_server/cpu{cpu}/runtime 0" in found["usr/libexec/virt-rt/settings"]
    assert "cpu0/runtime" not in found["usr/libexec/virt-rt/settings"]
    (choice,) = json.loads(found["usr/share/virt-rt/plan.json"])["choices"]
    assert choice["name"] == "rt-throttling-off"
    assert "hang" in choice["trade"]


@pytest.mark.parametrize(
    ("choice", "parameter"), [("mitigations-off", "mitigations=off"), ("idle-poll", "idle=poll")]
)
def test_a_choice_may_add_a_parameter(choice: str, parameter: str) -> None:
    assert parameter in [
        name for name, _ in host_command_line(RECIPES.plans["qemu-q35"], TABLE, [choice], "amd64")
    ]


def test_a_host_without_high_resolution_timers_says_so_to_its_kernel_and_to_people(tmp_path: Path) -> None:
    with_timers = RECIPES.platforms["qemu-q35"]
    without = msgspec.structs.replace(with_timers, high_resolution_timers=False)
    assert settings.chosen(ROOT, "qemu-q35", with_timers, TABLE) == ()
    choices = settings.chosen(ROOT, "qemu-q35", without, TABLE)
    assert choices == ("high-resolution-timers-off",)
    named = msgspec.structs.replace(without, choices=choices)
    assert settings.chosen(ROOT, "qemu-q35", named, TABLE) == choices
    plan = RECIPES.plans["qemu-q35"]
    assert "highres=off" not in dict(host_command_line(plan, TABLE, (), "amd64"))
    assert "device" in dict(host_command_line(plan, TABLE, choices, "amd64"))["highres=off"]
    found = files(build(tmp_path, document("qemu-q35", choices=choices)))
    assert " highres=off" in found["etc/default/grub.d/50-virt-rt.cfg"]
    (told,) = json.loads(found["usr/share/virt-rt/plan.json"])["choices"]
    assert "cyclictest measures nothing" in told["trade"]
    lacking = Table(settings=TABLE.settings, choices={})
    with pytest.raises(
        UserError, match="high_resolution_timers: there is no choice high-resolution-timers-off"
    ):
        settings.chosen(ROOT, "qemu-q35", without, lacking)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The recipes, to be broken."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("*.lock"))
    return tmp_path


def edit(path: Path, old: str, new: str) -> int:
    """Replace text once; the line (from 1) where the replacement's last line stands."""
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))
    return text[: text.index(old)].count("\n") + new.count("\n") + 1


def test_a_choice_that_does_not_exist_is_refused_with_its_line(checkout: Path) -> None:
    line = edit(checkout / "recipes/platforms/canoe-pass.toml", "choices = []", 'choices = [\n "x"')
    edit(checkout / "recipes/platforms/canoe-pass.toml", ' "x"', ' "x",\n]')
    with pytest.raises(UserError) as caught:
        settings.chosen(
            checkout, "canoe-pass", recipes.load(checkout).platforms["canoe-pass"], settings.load(checkout)
        )
    assert caught.value.message == f"recipes/platforms/canoe-pass.toml:{line}: there is no choice x"
    assert all(name in caught.value.hint for name in TABLE.choices)
    with pytest.raises(UserError, match="there is no choice x"):
        host_command_line(RECIPES.plans["canoe-pass"], TABLE, ["x"], "amd64")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('[command_line.nohz]\nvalue = "on"', "[command_line.nohz]\nvalue = 1", "expected `str | null`"),
        ('[command_line.nohz]\nvalue = "on"', '[command_line.nohz]\nvalue = "o n"', "matching regex"),
        ('[command_line.nohz]\nvalue = "on"', '[command_line.nohz]\nsetto = "on"', "unknown field `setto`"),
        ('value = "{housekeeping}"\nreason', 'value = "{rest}"\nreason', "there is no {rest} to put in"),
        ('[sysctl."vm.stat_interval"]\nvalue = "10"\n', '[sysctl."vm.stat_interval"]\n', "it has no value"),
        ('[sysctl."vm.stat_interval"]', '[sysctl."stat interval"]', "no name of this kind"),
        ('[masked_services."ksm.service"]', '[masked_services."ksm.service"]\nvalue = "x"', "no value"),
        ('[files."/sys/kernel/mm/ksm/run"]', '[files."/etc/passwd"]', "no name of this kind"),
        ('\nabsent = "the kernel merges no pages"', '\nwitness = "/sys"', "there is no absent beside it"),
        ('trade = "a guest can stop', 'trades = "a guest can stop', "unknown field `trades`"),
    ],
)
def test_a_mistake_in_the_table_is_refused_with_its_line(
    checkout: Path, old: str, new: str, message: str
) -> None:
    path = checkout / settings.RECIPE
    last = edit(path, old, new)
    with pytest.raises(UserError) as caught:
        settings.load(checkout)
    assert message in caught.value.message
    found = re.match(r"recipes/tuning\.toml:(\d+): ", caught.value.message)
    assert found
    # The key where it is written, else the table that lacks it.
    assert last - new.count("\n") - 1 <= int(found[1]) <= last


def test_a_setting_without_a_reason_is_refused(checkout: Path) -> None:
    path = checkout / settings.RECIPE
    text = path.read_text()
    start = text.index("reason = ")
    path.write_text(text[:start] + text[text.index("\n", start) + 1 :])
    with pytest.raises(UserError, match=r"tuning.toml:\d+: .*missing required field `reason`"):
        settings.load(checkout)


# What is said of CPUs -------------------------------------------------------------------------------


def parameters(plan: HostPlan) -> list[str]:
    return [name for name, _ in host_command_line(plan, TABLE, (), "amd64")]


def on(topology: str, platform: str, **changes: Any) -> HostPlan:
    """The guests of a platform on another topology; `changes` are for each guest's recipe."""
    guests = {
        name: msgspec.structs.replace(guest, **changes).request()
        for name, guest in RECIPES.guests_of(platform).items()
    }
    return host_plan(RECIPES.topologies[topology], guests)


def test_canoe_pass_is_isolated_as_its_howto_says() -> None:
    found = parameters(RECIPES.plans["canoe-pass"])
    assert "isolcpus=managed_irq,domain,1-7,9-15" in found
    assert "irqaffinity=0,8" in found
    single = parameters(on("canoe-pass-single-socket", "canoe-pass", pins=None))
    assert "isolcpus=managed_irq,domain,1-7" in single
    assert "isolcpus=managed_irq,domain,1-3" in parameters(RECIPES.plans["qemu-q35"])


def test_large_pages_are_taken_at_boot_by_node() -> None:
    """The size comes before the count, which is per node; smaller pages are taken by a unit."""
    found = parameters(RECIPES.plans["canoe-pass"])
    assert found[-2:] == ["hugepagesz=1G", "hugepages=1:4"]
    small = on("canoe-pass", "canoe-pass", hugepages="2M", pins=None)
    assert [name for name in parameters(small) if name.startswith("hugepage")] == []
    two = {(0, 1 << 20): 2, (1, 1 << 20): 4, (1, 2048): 512}
    made = settings._boot_pages(two)
    assert [(name, value) for name, value, _ in made] == [("hugepagesz", "1G"), ("hugepages", "0:2,1:4")]


def spellings(plan: HostPlan) -> dict[str, str]:
    """Every way in which a file may name the plan's CPUs."""
    return {
        "isolated": cpulist(plan.isolated),
        "isolated one by one": " ".join(map(str, plan.isolated)),
        "housekeeping": cpulist(plan.housekeeping),
        "mask": affinity_mask(plan.housekeeping),
    }


def named(text: str, plan: HostPlan) -> set[str]:
    """In which ways a text names the plan's CPUs."""
    return {
        how
        for how, word in spellings(plan).items()
        if re.search(rf"(?<![\w.,-]){re.escape(word)}(?![\w.,-])", text.replace("managed_irq,domain,", ""))
    }


Moved = tuple[dict[str, str], HostPlan, dict[str, str], HostPlan]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Moved:
    """The files and the plan before and after two more CPUs keep house."""
    before = RECIPES.plans["canoe-pass"]
    requests = {name: guest.request() for name, guest in RECIPES.guests_of("canoe-pass").items()}
    after = host_plan(RECIPES.topologies["canoe-pass"], requests, "0-1,8,15")
    trees = tmp_path_factory.mktemp("moved")
    return (
        files(build(trees / "before", document("canoe-pass", before))),
        before,
        files(build(trees / "after", document("canoe-pass", after))),
        after,
    )


@pytest.mark.parametrize("place", NAME_CPUS)
def test_a_file_that_names_cpus_names_the_plans(place: str, moved: Moved) -> None:
    before, old, after, new = moved
    assert named(before[place], old) == named(after[place], new) == NAME_CPUS[place]
    assert named(after[place], old) == set()


def test_no_other_file_names_a_cpu(moved: Moved) -> None:
    before, old, after, _ = moved
    assert {place for place in before if before[place] != after[place]} == set(NAME_CPUS)
    assert {place for place, text in before.items() if named(text, old)} == set(NAME_CPUS)


def test_huge_pages_follow_their_guest(tmp_path: Path) -> None:
    other = on("canoe-pass", "canoe-pass", pins="1-4")
    found = files(build(tmp_path, document("canoe-pass", other)))
    assert "\nwant 0 1048576 4\n" in found["usr/libexec/virt-rt/hugepages"]
    assert "hugepages=0:4" in found["etc/default/grub.d/50-virt-rt.cfg"]


def test_without_huge_pages_there_is_no_unit_for_them(tmp_path: Path) -> None:
    plan = on("canoe-pass", "canoe-pass", hugepages="none")
    found = files(build(tmp_path, document("canoe-pass", plan)))
    assert [place for place in found if "hugepages" in place] == []
    assert "hugepages" not in found["usr/sbin/virt-rt-tuning"]


# The files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_setting_is_in_its_file_with_its_reason(platform: str, tmp_path: Path) -> None:
    made = document(platform, choices=list(TABLE.choices))
    found = files(build(tmp_path, made))

    def follows(place: str, reason: str, line: str) -> bool:
        before, _, _ = found[place].partition(f"\n{line}")
        return reason in before and line in found[place]

    for item in made["command_line"]:
        text = found["etc/default/grub.d/50-virt-rt.cfg"]
        assert f"\n# {item['parameter']}\n#   {item['reason']}\n" in text
    for item in made["module_parameters"]:
        line = f"options {item['module']} {item['name']}={item['value']}\n"
        assert follows("usr/lib/modprobe.d/virt-rt.conf", item["reason"], line)
    for item in made["sysctl"]:
        line = f"{'-' if 'absent' in item else ''}{item['name']} = {item['value']}\n"
        assert follows("usr/lib/sysctl.d/90-virt-rt.conf", item["reason"], line)
    for item in made["files"]:
        line = f"set_value {item['path']} {item['value']}"
        assert follows("usr/libexec/virt-rt/settings", item["reason"], line)
    for item in made["masked_services"]:
        assert found[f"etc/systemd/system/{item['unit']}"] == "-> /dev/null"


@pytest.mark.parametrize("platform", PLATFORMS)
def test_generated_shell_is_clean(platform: str, tmp_path: Path) -> None:
    root = build(tmp_path, document(platform, choices=list(TABLE.choices)))
    scripts = [path for path in root.rglob("*") if path.is_file() and path.read_bytes()[:5] == b"#!/bi"]
    assert len(scripts) >= 6
    scripts = [path for path in scripts if path.name != "virt-rt-check"]
    assert [path for path in scripts if not path.stat().st_mode & stat.S_IXUSR] == []
    for linter in (["shellcheck"], ["shfmt", "-i", "2", "-ci", "-d"]):
        if shutil.which(linter[0]) is None:
            pytest.skip(f"{linter[0]} is not installed")
        done = run(*linter, *scripts)
        assert done.returncode == 0, done.stdout + done.stderr


def test_systemd_takes_the_units(tree: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    own = Path("/usr/lib/systemd/system")
    for pattern in ("*.target", "*.mount", "*.service", "*.slice", "*.socket"):
        for unit in own.glob(pattern):
            if unit.is_file() and not (tree / "usr/lib/systemd/system" / unit.name).exists():
                shutil.copy(unit, tree / "usr/lib/systemd/system", follow_symlinks=True)
    done = run("systemd-analyze", "verify", "--man=no", f"--root={tree}", *UNITS)
    told = [line for line in done.stderr.splitlines() if "virt-rt" in line]
    assert told == []
    assert done.returncode == 0, done.stderr


def test_sysctl_reads_the_values(tree: Path) -> None:
    if shutil.which("sysctl") is None or "--dry-run" not in run("sysctl", "--help").stdout:
        pytest.skip("there is no sysctl with --dry-run")
    done = run("sysctl", "--dry-run", "--load", tree / "usr/lib/sysctl.d/90-virt-rt.conf")
    wanted = [f"{item['name']} = {item['value']}" for item in document("canoe-pass")["sysctl"]]
    assert done.stdout.splitlines() == wanted, done.stderr


def test_tuned_reads_the_profile(tree: Path) -> None:
    """With tuned's own loader, by both directories in which its versions look."""
    python, package = Path("/usr/bin/python3"), Path("/usr/lib/python3/dist-packages/tuned")
    if not (python.exists() and package.is_dir()):
        pytest.skip("tuned is not installed; its package would start tuning this machine")
    program = """
import json, sys
from tuned.profiles.factory import Factory
from tuned.profiles.loader import Loader
from tuned.profiles.locator import Locator
from tuned.profiles.merger import Merger
from tuned.profiles.variables import Variables
from tuned.utils.global_config import GlobalConfig
profile = Loader(Locator([sys.argv[1]]), Factory(), Merger(), GlobalConfig(), Variables()).load("virt-rt")
print(json.dumps({name: dict(unit.options) for name, unit in profile.units.items()}))
"""
    made = document("canoe-pass")
    for directory in ("usr/lib/tuned", "usr/lib/tuned/profiles"):
        done = run(python, "-W", "ignore", "-c", program, tree / directory)
        assert done.returncode == 0, done.stderr
        units = json.loads(done.stdout.splitlines()[-1])
        line = " ".join(item["parameter"] for item in made["command_line"])
        assert units["bootloader"] == {"cmdline_virt_rt": f"+{line}"}
        assert units["sysctl"] == {item["name"]: item["value"] for item in made["sysctl"]}
        assert units["sysfs"] == {item["path"]: item["value"] for item in made["files"]}


def test_the_plan_for_tools_has_every_part() -> None:
    made = document("canoe-pass", choices=["mitigations-off"])
    assert made["schema"] == 1
    assert (made["platform"], made["topology"]) == ("canoe-pass", "canoe-pass")
    assert RECIPES.plans["canoe-pass"].to_json().items() <= made.items()
    keys = {
        "command_line": {"parameter", "reason"},
        "sysctl": {"name", "value", "reason"},
        "module_parameters": {"module", "name", "value", "reason"},
        "files": {"path", "value", "reason"},
        "masked_services": {"unit", "reason"},
        "choices": {"name", "trade", "reason"},
        "bios": {"setting", "value", "reason"},
    }
    for part, wanted in keys.items():
        assert made[part], part
        assert [item for item in made[part] if set(item) - {"absent", "witness"} != wanted] == []
    assert made["devices"] == {name: [] for name in RECIPES.guests_of("canoe-pass")}
    assert {(i["module"], i["name"]) for i in made["module_parameters"]} >= {("kvm", "halt_poll_ns")}


def test_devices_are_named_for_tools() -> None:
    guest = msgspec.structs.replace(
        RECIPES.guests["rt-guest"],
        devices=(
            recipes.Function(address="0000:03:00.0"),
            recipes.VirtualFunction(physical="0000:04:00.0", number=2),
        ),
    )
    made = tuning.plan_json(
        "qemu-q35", RECIPES.platforms["qemu-q35"], RECIPES.plans["qemu-q35"], {"rt-guest": guest}, TABLE, ()
    )
    expected = [{"address": "0000:03:00.0"}, {"physical": "0000:04:00.0", "number": 2}]
    assert made["devices"] == {"rt-guest": expected}


# What the scripts do --------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """What the scripts look for below /sys and /proc, as it is before."""
    root = tmp_path / "machine"
    for path, text in {
        "sys/devices/virtual/workqueue/cpumask": "ffff",
        "sys/devices/virtual/workqueue/writeback/cpumask": "ffff",
        "proc/irq/default_smp_affinity": "ffff",
        "sys/kernel/mm/ksm/run": "1",
        "sys/devices/system/node/node1/hugepages/hugepages-1048576kB/nr_hugepages": "4",
        "proc/irq/8/smp_affinity_list": "0-15",
        "proc/irq/8/effective_affinity_list": "3",
        "proc/irq/24/smp_affinity_list": "0,8",
        "proc/irq/24/effective_affinity_list": "8",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}\n")
    return root


def test_settings_are_written(tree: Path, machine: Path) -> None:
    done = run(tree / "usr/libexec/virt-rt/settings", ROOT=str(machine))
    assert done.returncode == 0, done.stderr
    for item in document("canoe-pass")["files"]:
        assert (machine / item["path"].lstrip("/")).read_text() == f"{item['value']}\n"


def test_a_setting_that_does_not_take_is_named(tree: Path, machine: Path) -> None:
    path = machine / "sys/devices/virtual/workqueue/cpumask"
    path.unlink()
    path.symlink_to("/dev/null")
    done = run(tree / "usr/libexec/virt-rt/settings", ROOT=str(machine))
    assert done.returncode == 1
    assert done.stderr == "virt-rt: /sys/devices/virtual/workqueue/cpumask: is '', should be '101'\n"
    assert (machine / "sys/kernel/mm/ksm/run").read_text() == "2\n"


def test_a_setting_that_is_not_there_is_fine_only_where_the_table_says_so(
    tmp_path: Path, tree: Path, machine: Path
) -> None:
    (machine / "sys/kernel/mm/ksm/run").unlink()
    done = run(tree / "usr/libexec/virt-rt/settings", ROOT=str(machine))
    assert done.returncode == 0
    assert done.stdout == "/sys/kernel/mm/ksm/run is not there: the kernel merges no pages\n"
    (machine / "proc/irq/default_smp_affinity").unlink()
    done = run(tree / "usr/libexec/virt-rt/settings", ROOT=str(machine))
    assert done.returncode == 1
    assert done.stderr == "virt-rt: /proc/irq/default_smp_affinity: not there\n"


def test_an_unmounted_debugfs_is_not_an_old_kernel(tmp_path: Path, machine: Path) -> None:
    """That the kernel has no such server holds only where the scheduler's directory can be seen."""
    tree = build(tmp_path / "tree", document("canoe-pass", choices=["rt-throttling-off"]))
    done = run(tree / "usr/libexec/virt-rt/settings", ROOT=str(machine))
    assert done.returncode == 1
    assert "fair_server/cpu1/runtime: not there, nor is /sys/kernel/debug/sched\n" in done.stderr
    (machine / "sys/kernel/debug/sched").mkdir(parents=True)
    done = run(tree / "usr/libexec/virt-rt/settings", ROOT=str(machine))
    assert done.returncode == 0
    assert "the kernel is older than 6.12" in done.stdout


@pytest.mark.parametrize(
    ("printed", "plain"), [("00000000,00000101", "101"), ("0101", "101"), ("0", "0"), ("00", "0"), ("2", "2")]
)
def test_masks_are_compared_whatever_their_zeros(tree: Path, printed: str, plain: str) -> None:
    text = (tree / "usr/libexec/virt-rt/settings").read_text()
    function = text[text.index("plain() {") : text.index("\n}\n") + 3]
    assert run("bash", "-c", f"{function}plain {printed}").stdout == plain


def test_large_pages_are_only_asserted(tree: Path, machine: Path) -> None:
    script = tree / "usr/libexec/virt-rt/hugepages"
    pages = machine / "sys/devices/system/node/node1/hugepages/hugepages-1048576kB/nr_hugepages"
    assert run(script, ROOT=str(machine)).returncode == 0
    pages.write_text("3\n")
    done = run(script, ROOT=str(machine))
    assert done.returncode == 1
    assert "node 1 has 3 of 4 huge pages of 1048576 KiB" in done.stderr
    assert "boot with the command line" in done.stderr
    assert pages.read_text() == "3\n"
    pages.unlink()
    assert "node 1 has no huge pages of 1048576 KiB" in run(script, ROOT=str(machine)).stderr


def test_small_pages_are_taken_on_their_node(tmp_path: Path) -> None:
    tree = build(tmp_path / "tree", document("qemu-q35"))
    script = tree / "usr/libexec/virt-rt/hugepages"
    pages = tmp_path / "sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages"
    pages.parent.mkdir(parents=True)
    pages.write_text("0\n")
    assert run(script, ROOT=str(tmp_path)).returncode == 0
    assert pages.read_text() == "512\n"
    pages.write_text("600\n")
    assert run(script, ROOT=str(tmp_path)).returncode == 0
    assert pages.read_text() == "600\n"
    pages.unlink()
    pages.symlink_to("/dev/null")
    done = run(script, ROOT=str(tmp_path))
    assert done.returncode == 1
    assert "of 512 huge pages of 2048 KiB" in done.stderr


def test_interrupts_move_to_the_housekeeping_cpus(tree: Path, machine: Path) -> None:
    done = run(tree / "usr/libexec/virt-rt/irq-affinity", ROOT=str(machine))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 interrupts moved to CPU 0,8\n"
    assert (machine / "proc/irq/8/smp_affinity_list").read_text() == "0,8\n"


def test_an_interrupt_that_does_not_move_is_named(tree: Path, machine: Path) -> None:
    path = machine / "proc/irq/8/smp_affinity_list"
    path.unlink()
    path.symlink_to("/dev/null")
    done = run(tree / "usr/libexec/virt-rt/irq-affinity", ROOT=str(machine))
    assert done.returncode == 1
    assert done.stderr == "virt-rt: interrupt 8 is on CPU 3, should be on 0,8\n"


def test_an_interrupt_that_the_kernel_holds_is_left_and_told(tree: Path, machine: Path) -> None:
    """The kernel refuses with "Operation not permitted", as an immutable file does."""
    path = machine / "proc/irq/8/smp_affinity_list"
    if shutil.which("chattr") is None or run("chattr", "+i", path).returncode:
        pytest.skip("no file can be made immutable here")
    try:
        done = run(tree / "usr/libexec/virt-rt/irq-affinity", ROOT=str(machine))
        assert done.returncode == 0, done.stderr
        assert "interrupt 8 stays on CPU 3: the kernel does not let it be moved\n" in done.stdout
        (machine / "proc/irq/8/effective_affinity_list").write_text("8\n")
        assert "stays" not in run(tree / "usr/libexec/virt-rt/irq-affinity", ROOT=str(machine)).stdout
    finally:
        run("chattr", "-i", path)


# Boot entries, by grub's own tools ------------------------------------------------------------------

PROBE = """\
#!/bin/sh
# Stands in for grub-probe: one partition, whatever the tests run on.
for option; do
  case $option in
    --target=device) echo /dev/vda1 ;;
    --target=fs_uuid) echo 11111111-2222-3333-4444-555555555555 ;;
    --target=partuuid) echo 66666666-7777-8888-9999-000000000000 ;;
    --target=fs) echo ext2 ;;
    --target=partmap) echo gpt ;;
  esac
done
exit 0
"""
#: A menu entry: its title, its id, and what stands inside.
_ENTRY = re.compile(
    r"^\s*menuentry '(.+?)' .*?\$menuentry_id_option '(.+?)' \{\n(.*?)^\s*\}$", re.MULTILINE | re.DOTALL
)


class Grub:
    """A Debian machine's grub: its real grub-mkconfig and 10_linux, over files of the test's own."""

    def __init__(self, root: Path, tree: Path) -> None:
        found = shutil.which("grub-mkconfig", path=f"{os.environ['PATH']}:/usr/sbin")
        linux = Path("/etc/grub.d/10_linux")
        if found is None or not linux.exists() or shutil.which("grub-script-check") is None:
            pytest.skip("grub-mkconfig and grub-script-check are not installed")
        self.root = root
        probe = executable(root / "grub-probe", PROBE)
        text = Path(found).read_text()
        text = re.sub(r'^sysconfdir="/etc"$', f'sysconfdir="{root}/etc"', text, flags=re.MULTILINE)
        text = re.sub(r'^grub_probe="\$.*"$', f'grub_probe="{probe}"', text, flags=re.MULTILINE)
        self.mkconfig = executable(root / "grub-mkconfig", text)
        assert text.count(str(root)) == 2
        text = linux.read_text().replace(" /boot/", f" {root}/boot/").replace(" /vmlinu", " /nowhere/vmlinu")
        executable(root / "etc/grub.d/10_linux", text)
        shutil.copytree(tree / "etc/grub.d", root / "etc/grub.d", dirs_exist_ok=True)
        shutil.copytree(tree / "etc/default", root / "etc/default")
        drop_in = root / "etc/default/grub.d/50-virt-rt.cfg"
        text = (
            drop_in.read_text()
            .replace(" /usr/share/", f" {tree}/usr/share/")
            .replace(" /var/", f" {root}/var/")
        )
        assert text.count(str(root.parent)) == 2
        drop_in.write_text(text)
        first = root / "etc/grub.d/09_virt-rt"
        text = first.read_text().replace(" /usr/share/virt-rt/", f" {tree}/usr/share/virt-rt/")
        assert text.count(str(tree)) == 3
        first.write_text(text)
        self.meant = tree / "usr/share/virt-rt/kernel"
        (root / "boot").mkdir()
        for version in ("6.1.0-30-amd64", "6.12.107-rt-virt-host"):
            self.install(version)
        self.default('GRUB_DISTRIBUTOR=Debian\nGRUB_CMDLINE_LINUX_DEFAULT="quiet splash"\n')

    def install(self, version: str) -> None:
        """Install a kernel."""
        (self.root / f"boot/vmlinuz-{version}").write_text("kernel")
        (self.root / f"boot/initrd.img-{version}").write_text("initrd")

    def default(self, text: str) -> None:
        """Write /etc/default/grub."""
        (self.root / "etc/default/grub").write_text(text)

    def drop_in(self, name: str, text: str) -> None:
        """Write a file of /etc/default/grub.d."""
        (self.root / "etc/default/grub.d" / name).write_text(text)

    def entries(self) -> tuple[list[tuple[str, str, str]], str]:
        """Title, id and kernel's command line of each entry in order, and what was told on the way."""
        config = self.root / "grub.cfg"
        # dash knows no EUID, and grub-mkconfig wants to be root only for the paths that the test replaced.
        done = run(self.mkconfig, "--output", config, EUID="0")
        assert done.returncode == 0, done.stderr
        check = run("grub-script-check", config)
        assert check.returncode == 0, check.stderr
        found = []
        for title, identifier, inside in _ENTRY.findall(config.read_text()):
            (line,) = re.findall(r"^\s*linux\s+\S+ (.*)$", inside, re.MULTILINE)
            found.append((title, identifier, line.strip()))
        return found, done.stderr

    @property
    def text(self) -> str:
        """The configuration that was made last."""
        return (self.root / "grub.cfg").read_text()


@pytest.fixture
def grub(tmp_path: Path, tree: Path) -> Grub:
    return Grub(tmp_path / "grub", tree)


def words(line: str) -> list[str]:
    return line.split()


def plain(entries: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [entry for entry in entries if entry[1].startswith("virt-rt-plain-")]


def test_the_default_entry_is_isolated_and_a_plain_one_follows(grub: Grub) -> None:
    wanted = parameters(RECIPES.plans["canoe-pass"])
    entries, _ = grub.entries()
    title, _, line = entries[0]
    assert title == "Debian GNU/Linux"
    assert words(line)[2:] == ["quiet", "splash", *wanted]
    found = plain(entries)
    assert [entry[0] for entry in found] == [
        "Debian GNU/Linux, without CPU isolation",
        "Debian GNU/Linux, with Linux 6.12.107-rt-virt-host, without CPU isolation",
        "Debian GNU/Linux, with Linux 6.1.0-30-amd64, without CPU isolation",
    ]
    assert all(words(line)[2:] == ["quiet", "splash"] for _, _, line in found)
    assert entries[-3:] == found
    assert "submenu 'Advanced options for Debian GNU/Linux, without CPU isolation'" in grub.text
    assert "'virt-rt-plain-gnulinux-advanced-" in grub.text


def test_titles_and_ids_of_entries_are_their_own(grub: Grub) -> None:
    entries, _ = grub.entries()
    for column in (0, 1):
        values = [entry[column] for entry in entries]
        assert len(set(values)) == len(values)


def test_the_plain_entries_are_what_was_there_before(grub: Grub) -> None:
    found = plain(grub.entries()[0])
    (grub.root / "etc/default/grub.d/50-virt-rt.cfg").unlink()
    before, _ = grub.entries()
    assert plain(before) == []
    old = [words(line) for title, _, line in before if "recovery" not in title]
    assert [words(line) for _, _, line in found] == old


def test_what_others_add_later_is_kept_in_both(grub: Grub) -> None:
    grub.drop_in("60-later.cfg", 'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT panic=30"\n')
    entries, _ = grub.entries()
    assert words(entries[0][2])[-1] == "panic=30"
    assert words(plain(entries)[0][2])[2:] == ["quiet", "splash", "panic=30"]


def test_a_file_that_drops_the_parameters_is_told(grub: Grub) -> None:
    grub.drop_in("60-later.cfg", 'GRUB_CMDLINE_LINUX_DEFAULT="nosplash"\n')
    entries, told = grub.entries()
    assert plain(entries) == []
    assert "GRUB_CMDLINE_LINUX_DEFAULT lacks the real-time parameters" in told


@pytest.mark.parametrize("setting", ["GRUB_DISABLE_SUBMENU=y", "GRUB_SAVEDEFAULT=true\nGRUB_DEFAULT=saved"])
def test_settings_of_grub_are_respected(grub: Grub, setting: str) -> None:
    """What is started once without isolation is not what starts the next time."""
    grub.default(f'GRUB_CMDLINE_LINUX_DEFAULT=quiet\nGRUB_DISTRIBUTOR="Bob\'s Linux"\n{setting}\n')
    entries, _ = grub.entries()
    found = plain(entries)
    assert len(found) == (2 if "SUBMENU" in setting else 3)
    assert all(title.endswith(", without CPU isolation") for title, _, _ in found)
    mine = grub.text[grub.text.index("11_virt-rt-plain ###") :]
    assert "\tsavedefault" not in mine
    assert ("\tsavedefault" in grub.text) == ("SAVEDEFAULT" in setting)


def test_tuned_has_a_plain_entry_too(grub: Grub) -> None:
    """tuned has its parameters in a variable of grub's, and the drop-in is away."""
    (grub.root / "etc/default/grub.d/50-virt-rt.cfg").unlink()
    grub.default('GRUB_CMDLINE_LINUX_DEFAULT="quiet \\$tuned_params"\n')
    entries, _ = grub.entries()
    assert words(entries[0][2])[-2:] == ["quiet", "$tuned_params"]
    assert [words(line)[2:] for _, _, line in plain(entries)] == [["quiet"]] * 3


# Which kernel starts ---------------------------------------------------------------------------------

#: Two builds of a kernel, the older of which sorts higher, and a kernel of the distribution that is newer than both.
OLDER, MEANT = "6.12.107-rt-virt-host-fedcba987654", "6.12.107-rt-virt-host-0123456789ab"
NEWEST = "6.19.10+deb13-amd64"
DEVICE = "/dev/vda1"


@pytest.fixture
def several(grub: Grub) -> Grub:
    """A machine with the kernel that its host package means, and others that sort higher."""
    for version in (OLDER, MEANT, NEWEST):
        grub.install(version)
    grub.meant.write_text(f"{MEANT}\n")
    return grub


def started(grub: Grub) -> list[str]:
    """The release that each entry starts, in the menu's order."""
    return re.findall(r"^\s*linux\s+\S*/vmlinuz-(\S+) ", grub.text, re.MULTILINE)


@pytest.mark.parametrize(
    "setting", ["", "GRUB_DISABLE_SUBMENU=y\n", "GRUB_TOP_LEVEL=/boot/x\n", "GRUB_DEFAULT=0\n"]
)
def test_the_kernel_that_is_meant_starts_whichever_sorts_higher(several: Grub, setting: str) -> None:
    several.default(f'GRUB_DISTRIBUTOR=Debian\nGRUB_CMDLINE_LINUX_DEFAULT="quiet splash"\n{setting}')
    meant = several.meant.read_text()
    several.meant.unlink()
    without, _ = several.entries()
    assert started(several)[0] == NEWEST
    several.meant.write_text(meant)
    entries, told = several.entries()
    assert "virt-rt:" not in told
    assert entries[0][:2] == (
        f"Debian GNU/Linux, with Linux {MEANT}, for real-time guests",
        f"virt-rt-host-{DEVICE}",
    )
    assert words(entries[0][2])[2:] == ["quiet", "splash", *parameters(RECIPES.plans["canoe-pass"])]
    assert started(several)[0] == MEANT
    assert re.search(r"^menuentry '.*virt-rt-host-", several.text, re.MULTILINE), "at top level"
    # the first of those without isolation is of the same kernel; all others are as they were, in their order
    (index,) = [
        index for index, (_, name, _) in enumerate(entries) if name == f"virt-rt-plain-virt-rt-host-{DEVICE}"
    ]
    assert plain(entries)[0] == entries[index]
    assert entries[index][0] == f"{entries[0][0]}, without CPU isolation"
    assert words(entries[index][2])[2:] == ["quiet", "splash"] and started(several)[index] == MEANT
    assert entries[1:index] + entries[index + 1 :] == without
    for column in (0, 1):
        assert len({entry[column] for entry in entries}) == len(entries)


def test_an_upgrade_and_a_rollback_move_the_first_entry(several: Grub) -> None:
    for release in (OLDER, MEANT, OLDER):
        several.meant.write_text(f"{release}\n")
        entries, _ = several.entries()
        assert started(several)[0] == release
        assert entries[0][1] == f"virt-rt-host-{DEVICE}", "what grub saved stays valid"


def test_a_release_is_not_a_pattern(several: Grub) -> None:
    """Nor is it the beginning of another one."""
    several.meant.write_text("6.12.107-rt-virt-host\n")
    several.entries()
    assert started(several)[0] == "6.12.107-rt-virt-host"
    several.meant.write_text("6.12.107.rt.virt.host\n")
    _, told = several.entries()
    assert started(several)[0] == NEWEST and "grub finds no Linux 6.12.107.rt.virt.host" in told


@pytest.mark.parametrize("chosen", [f"gnulinux-{OLDER}-advanced-{DEVICE}", "Windows 11", "saved"])
def test_another_default_is_respected(several: Grub, chosen: str) -> None:
    several.default(f'GRUB_CMDLINE_LINUX_DEFAULT=quiet\nGRUB_DEFAULT="{chosen}"\nGRUB_SAVEDEFAULT=true\n')
    shutil.copy(Path("/etc/grub.d/00_header"), several.root / "etc/grub.d/00_header")
    entries, _ = several.entries()
    assert f'set default="{"${saved_entry}" if chosen == "saved" else chosen}"' in several.text
    assert entries[0][1] == f"virt-rt-host-{DEVICE}"
    mine = several.text.partition("09_virt-rt ###")[2].partition("### END")[0]
    assert "savedefault" in mine


@pytest.mark.parametrize("chosen", ["2", "1>2"])
def test_a_default_that_counts_entries_keeps_its_meaning(several: Grub, chosen: str) -> None:
    several.default(f'GRUB_CMDLINE_LINUX_DEFAULT=quiet\nGRUB_DEFAULT="{chosen}"\n')
    entries, told = several.entries()
    assert started(several)[0] == NEWEST and entries[0][1].startswith("gnulinux-simple-")
    assert f"GRUB_DEFAULT counts entries, so none is put before them for Linux {MEANT}" in told
    assert plain(entries)[0][1] == f"virt-rt-plain-virt-rt-host-{DEVICE}"


def test_a_kernel_that_is_missing_is_told(several: Grub) -> None:
    entries, told = several.entries()
    (several.root / f"boot/vmlinuz-{MEANT}").unlink()
    after, told = several.entries()
    assert told.count(f"virt-rt: grub finds no Linux {MEANT}") == 1
    assert f"install linux-image-{MEANT}" in told
    assert [entry for entry in after if "virt-rt-host" in entry[1]] == []
    assert [entry for entry in after if entry not in entries] == []


def test_without_the_host_package_the_menu_is_grubs(several: Grub) -> None:
    several.meant.unlink()
    _, told = several.entries()
    text = several.text
    assert "no kernel is named in" in told and "which virt-rt-host-canoe-pass brings" in told
    (several.root / "etc/grub.d/09_virt-rt").unlink()
    several.entries()
    assert re.sub(r"\n### BEGIN \S*09_virt-rt ###\n### END \S* ###\n", "", text) == several.text


# Boot entries of rpm systems ------------------------------------------------------------------------

#: grubby(8) as far as it is used, over entries in a JSON file; grubby itself is not in Debian.
GRUBBY = """\
#!/usr/bin/env python3
import json, os, pathlib, sys
state = pathlib.Path(os.environ["GRUBBY_STATE"])
entries = json.loads(state.read_text())
default = pathlib.Path(os.environ["GRUBBY_STATE"] + ".default")
options = dict(part.lstrip("-").partition("=")[::2] for part in sys.argv[1:])
with open(os.environ["GRUBBY_STATE"] + ".calls", "a") as calls:
    print(*sys.argv[1:], file=calls)

def chosen(which):
    if which == "ALL":
        return list(entries)
    if which == "DEFAULT":
        named = [entry for entry in entries if default.exists() and entry["id"] == default.read_text()]
        return (named or entries)[:1]
    if which.isdigit():
        return [entries[int(which)]]
    return [entry for entry in entries if entry["kernel"] == which]

def change(entry, add, remove):
    names = {word.partition("=")[0] for word in add.split() + remove.split()}
    kept = [word for word in entry["args"].split() if word.partition("=")[0] not in names]
    entry["args"] = " ".join(kept + add.split())

if "info" in options:
    for entry in chosen(options["info"]):
        print(f"index={entries.index(entry)}")
        for key in ("kernel", "args", "root", "initrd", "title", "id"):
            print(f'{key}="{entry[key]}"')
elif "update-kernel" in options:
    for entry in chosen(options["update-kernel"]):
        change(entry, options.get("args", ""), options.get("remove-args", ""))
elif "remove-kernel" in options:
    gone = [id(entry) for entry in chosen(options["remove-kernel"])]
    entries = [entry for entry in entries if id(entry) not in gone]
elif "add-kernel" in options:
    assert "copy-default" in options
    new = {"kernel": options["add-kernel"], "initrd": options["initrd"], "title": options["title"]}
    (copied,) = chosen("DEFAULT")
    entries.append(copied | new | {"id": copied["id"] + "~custom"})
elif "set-default-index" in options:
    default.write_text(chosen(options["set-default-index"])[0]["id"])
else:
    sys.exit("unknown: " + " ".join(sys.argv))
state.write_text(json.dumps(entries))
"""


class Grubby:
    """A stand-in for grubby and the boot entries that it knows."""

    def __init__(self, directory: Path) -> None:
        self.path = executable(directory / "bin/grubby", GRUBBY).parent
        self.state = directory / "entries.json"
        self.state.write_text(
            json.dumps(
                [
                    {
                        "kernel": f"/boot/vmlinuz-{version}",
                        "args": "ro quiet $tuned_params",
                        "root": "/dev/vda1",
                        "initrd": f"/boot/initramfs-{version}.img $tuned_initrd",
                        "title": f"Rocky Linux ({version}) 9.6 (Blue Onyx)",
                        "id": f"0123-{version}",
                    }
                    for version in ("6.12.107-rt", "5.14.0-570")
                ]
            )
        )

    @property
    def entries(self) -> list[dict[str, str]]:
        """The entries as they are now."""
        loaded: list[dict[str, str]] = json.loads(self.state.read_text())
        return loaded

    def install(self, version: str) -> None:
        """A kernel's entry becomes the first and the default, as kernel-install has it."""
        new = {
            "kernel": f"/boot/vmlinuz-{version}",
            "args": "ro quiet",
            "root": "/dev/vda1",
            "initrd": f"/boot/initramfs-{version}.img",
            "title": f"Rocky Linux ({version}) 9.6 (Blue Onyx)",
            "id": f"0123-{version}",
        }
        self.state.write_text(json.dumps([new, *self.entries]))
        self.default = new["id"]

    @property
    def default(self) -> str:
        """The id of the entry that starts by itself."""
        named = self.state.with_name(f"{self.state.name}.default")
        return named.read_text() if named.exists() else self.entries[0]["id"]

    @default.setter
    def default(self, name: str) -> None:
        self.state.with_name(f"{self.state.name}.default").write_text(name)

    def run(self, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a script that uses grubby."""
        before = str(self.state.with_name("before"))
        return run(script, *arguments, path=self.path, GRUBBY_STATE=str(self.state), BEFORE=before)


@pytest.fixture
def grubby(tmp_path: Path) -> Grubby:
    return Grubby(tmp_path / "grubby")


def test_rpm_systems_get_the_parameters_and_a_plain_copy(tree: Path, grubby: Grubby) -> None:
    before = grubby.entries
    script = tree / "usr/libexec/virt-rt/bootloader-bls"
    for _ in range(2):  # applied again, it is the same
        done = grubby.run(script, "apply")
        assert done.returncode == 0, done.stderr
        *others, copy = grubby.entries
        assert [entry["title"] for entry in others] == [entry["title"] for entry in before]
        for entry in others:
            wanted = ["ro", "quiet", "$tuned_params", *parameters(RECIPES.plans["canoe-pass"])]
            assert entry["args"].split() == wanted
        assert copy["title"] == before[0]["title"] + ", without CPU isolation"
        assert copy["args"] == "ro quiet"
        assert copy["kernel"] == before[0]["kernel"]
        assert copy["initrd"] == "/boot/initramfs-6.12.107-rt.img"
    assert grubby.run(script, "undo").returncode == 0
    assert grubby.entries == before


def test_values_that_the_plans_replaced_are_in_the_plain_copy_and_come_back(
    tree: Path, grubby: Grubby
) -> None:
    entries = grubby.entries
    for entry in entries:
        entry["args"] = "ro isolcpus=2 intel_iommu=off quiet"
    grubby.state.write_text(json.dumps(entries))
    script = tree / "usr/libexec/virt-rt/bootloader-bls"
    for _ in range(2):
        assert grubby.run(script, "apply").returncode == 0
        assert "intel_iommu=on" in grubby.entries[0]["args"].split()
        assert set(grubby.entries[-1]["args"].split()) == {"ro", "quiet", "isolcpus=2", "intel_iommu=off"}
    assert grubby.run(script, "undo").returncode == 0
    assert [set(entry["args"].split()) for entry in grubby.entries] == [
        set(entry["args"].split()) for entry in entries
    ]


def test_the_plain_copy_is_never_copied(tree: Path, grubby: Grubby) -> None:
    entries = grubby.entries
    entries[0]["title"] += ", without CPU isolation"
    grubby.state.write_text(json.dumps(entries))
    done = grubby.run(tree / "usr/libexec/virt-rt/bootloader-bls", "apply")
    assert done.returncode == 2
    assert "the default entry is the one without CPU isolation" in done.stderr
    assert grubby.entries == entries


@pytest.fixture
def rpm_host(tree: Path, commands: Path, grubby: Grubby) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script of the tree on a machine that has the kernel that is meant, and a newer one as default."""
    for version in (MEANT, NEWEST):
        grubby.install(version)
    (tree / "usr/share/virt-rt/kernel").write_text(f"{MEANT}\n")
    (tree / "boot/loader/entries").mkdir(parents=True)
    executable(commands / "grubby", GRUBBY)

    def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = run(tree / script, *arguments, path=commands, GRUBBY_STATE=str(grubby.state), ROOT=str(tree))
        assert done.returncode == 0, done.stderr
        return done

    return call


BLS = "usr/libexec/virt-rt/bootloader-bls"
PLUGIN = "usr/lib/kernel/install.d/98-virt-rt.install"


@pytest.mark.parametrize("verb", ["apply", "copy"])
def test_rpm_systems_start_the_kernel_that_is_meant(
    grubby: Grubby, rpm_host: Callable[..., subprocess.CompletedProcess[str]], verb: str
) -> None:
    before = grubby.entries
    for _ in range(2):
        assert rpm_host(BLS, verb).stderr == ""
        assert grubby.default == f"0123-{MEANT}"
        copy = grubby.entries[-1]
        assert copy["kernel"] == f"/boot/vmlinuz-{MEANT}" and copy["args"] == "ro quiet"
        # the copy has the same kernel, and may come first
        grubby.state.write_text(json.dumps([copy, *grubby.entries[:-1]]))
    rpm_host(BLS, "undo")
    assert grubby.default == f"0123-{NEWEST}"
    assert grubby.entries == before


def test_another_kernel_does_not_become_the_default(
    tree: Path, grubby: Grubby, rpm_host: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    rpm_host(BLS, "apply")
    grubby.install("6.20.0")
    rpm_host(PLUGIN, "remove", "6.20.0")
    assert grubby.default == "0123-6.20.0"
    rpm_host(PLUGIN, "add", "6.20.0", "/boot/efi/x", "/usr/lib/modules/6.20.0/vmlinuz")
    assert grubby.default == f"0123-{MEANT}"
    (tree / "usr/share/virt-rt/kernel").unlink()
    grubby.default = "0123-6.20.0"
    rpm_host(PLUGIN, "add", "6.20.0")
    assert grubby.default == "0123-6.20.0"
    grubby.path.joinpath("grubby").unlink()
    shutil.rmtree(tree / "boot")
    rpm_host(PLUGIN, "add", "6.20.0")


def test_the_default_that_was_there_comes_back_only_when_it_can(
    tree: Path, grubby: Grubby, rpm_host: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    rpm_host(BLS, "apply")
    kept = tree / "var/lib/virt-rt/bootloader-default"
    assert kept.read_text() == f"0123-{NEWEST}\n"
    grubby.default = "0123-5.14.0-570"  # a person's choice
    rpm_host(BLS, "forget")
    assert grubby.default == "0123-5.14.0-570" and not kept.exists()
    rpm_host(BLS, "default")
    grubby.state.write_text(json.dumps([entry for entry in grubby.entries if "5.14.0" not in entry["id"]]))
    rpm_host(BLS, "forget")
    assert grubby.default == f"0123-{MEANT}" and not kept.exists()


def test_an_entry_that_is_missing_is_told(
    grubby: Grubby, rpm_host: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    grubby.state.write_text(json.dumps([entry for entry in grubby.entries if MEANT not in entry["id"]]))
    assert f"no boot entry starts Linux {MEANT}" in rpm_host(BLS, "apply").stderr
    assert grubby.default == f"0123-{NEWEST}"
    assert grubby.entries[-1]["kernel"] == f"/boot/vmlinuz-{NEWEST}"


def test_an_rpm_installation_in_its_order(
    tree: Path, grubby: Grubby, rpm_host: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The host package notes the default before kernel-install, after the transaction, makes a new one."""
    tool = "usr/sbin/virt-rt-tuning"
    rpm_host(tool, "package-apply")  # of the tuning
    rpm_host(tool, "package-note")
    newer = "6.12.107-rt-virt-host-00000000000a"
    (tree / "usr/share/virt-rt/kernel").write_text(f"{newer}\n")
    grubby.install(newer)
    rpm_host(PLUGIN, "add", newer)
    rpm_host(tool, "package-apply")
    assert grubby.default == f"0123-{newer}"
    assert grubby.entries[-1]["kernel"] == f"/boot/vmlinuz-{newer}"
    assert "isolcpus=" in grubby.entries[0]["args"]
    rpm_host(tool, "package-forget")
    assert grubby.default == f"0123-{NEWEST}"


def test_boot_entries_need_grubby(tree: Path) -> None:
    done = run(tree / "usr/libexec/virt-rt/bootloader-bls", "apply")
    if shutil.which("grubby"):
        pytest.skip("grubby is installed")
    assert done.returncode == 2
    assert "grubby is not installed" in done.stderr
    assert run(tree / "usr/libexec/virt-rt/bootloader-bls").returncode == 2


# Apply and remove -----------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """Commands that write down how they were called; `calls` beside them has it."""
    directory = tmp_path / "bin"
    for name in ("systemctl", "update-grub", "tuned-adm"):
        executable(
            directory / name,
            f'#!/bin/sh\necho {name} "$@" >>"$0/../../calls"\n'.replace("$0/..", str(directory)),
        )
    return directory


def called(commands: Path) -> list[str]:
    return (commands.parent / "calls").read_text().splitlines()


def test_apply_enables_the_units_and_writes_the_entries(tree: Path, commands: Path) -> None:
    done = run(tree / "usr/sbin/virt-rt-tuning", "apply", path=commands, ROOT=str(tree))
    assert done.returncode == 0, done.stderr
    assert called(commands) == [
        "tuned-adm active",
        "systemctl daemon-reload",
        "systemctl enable virt-rt-hugepages.service virt-rt-settings.service virt-rt-irq-affinity.service",
        "update-grub",
    ]


def test_apply_leaves_to_tuned_what_its_profile_has(tree: Path, commands: Path) -> None:
    done = run(tree / "usr/sbin/virt-rt-tuning", "apply", "--tuned", path=commands, ROOT=str(tree))
    assert done.returncode == 0, done.stderr
    assert (tree / "var/lib/virt-rt/tuned").exists()
    assert (tree / "etc/sysctl.d/90-virt-rt.conf").readlink() == Path("/dev/null")
    assert called(commands) == [
        "systemctl daemon-reload",
        "systemctl enable virt-rt-hugepages.service virt-rt-settings.service virt-rt-irq-affinity.service",
        "tuned-adm profile virt-rt",
        "update-grub",
    ]


def test_apply_takes_back_what_tuned_had_taken_over(tree: Path, commands: Path) -> None:
    tool, before = tree / "usr/sbin/virt-rt-tuning", files(tree)
    assert run(tool, "apply", "--tuned", path=commands, ROOT=str(tree)).returncode == 0
    done = run(tool, "apply", path=commands, ROOT=str(tree))
    assert done.returncode == 0, done.stderr
    assert files(tree) == before
    assert called(commands)[-1] == "update-grub"


def test_apply_names_a_file_that_was_not_copied(tree: Path, commands: Path) -> None:
    (tree / "etc/default/grub.d/50-virt-rt.cfg").unlink()
    done = run(tree / "usr/sbin/virt-rt-tuning", "apply", path=commands, ROOT=str(tree))
    assert done.returncode == 2
    assert "/etc/default/grub.d/50-virt-rt.cfg is missing" in done.stderr
    assert called(commands) == ["tuned-adm active"]


def test_apply_waits_for_tuned(tree: Path, commands: Path) -> None:
    executable(commands / "tuned-adm", "#!/bin/sh\necho Current active profile: virt-rt\n")
    done = run(tree / "usr/sbin/virt-rt-tuning", "apply", path=commands, ROOT=str(tree))
    assert done.returncode == 2
    assert "tuned-adm profile balanced" in done.stderr


def test_remove_takes_away_every_file_and_nothing_else(tree: Path, commands: Path) -> None:
    own = tree / "etc/sysctl.d/99-mine.conf"
    own.parent.mkdir()
    own.write_text("vm.swappiness = 1\n")
    done = run(tree / "usr/sbin/virt-rt-tuning", "remove", path=commands, ROOT=str(tree))
    assert done.returncode == 0, done.stderr
    assert list(files(tree)) == ["etc/sysctl.d/99-mine.conf"]
    assert called(commands)[-2:] == ["systemctl daemon-reload", "update-grub"]
    assert not (tree / "usr/libexec/virt-rt").exists()


def test_remove_waits_for_tuned(tree: Path, commands: Path) -> None:
    executable(commands / "tuned-adm", "#!/bin/sh\necho Current active profile: virt-rt\n")
    before = files(tree)
    done = run(tree / "usr/sbin/virt-rt-tuning", "remove", path=commands, ROOT=str(tree))
    assert done.returncode == 2
    assert "tuned-adm profile balanced" in done.stderr
    assert files(tree) == before


def test_rpm_systems_are_applied_and_undone(tree: Path, commands: Path, grubby: Grubby) -> None:
    before = grubby.entries
    (tree / "boot/loader/entries").mkdir(parents=True)
    search = {"GRUBBY_STATE": str(grubby.state), "ROOT": str(tree)}
    executable(commands / "grubby", GRUBBY)
    done = run(tree / "usr/sbin/virt-rt-tuning", "apply", path=commands, **search)
    assert done.returncode == 0, done.stderr
    assert len(grubby.entries) == 3
    done = run(tree / "usr/sbin/virt-rt-tuning", "remove", path=commands, **search)
    assert done.returncode == 0, done.stderr
    assert grubby.entries == before
    assert "update-grub" not in called(commands)


# As a package -----------------------------------------------------------------------------------------


@pytest.fixture
def packaged(tree: Path) -> Path:
    """The tree as its package brings it."""
    (tree / "usr/share/virt-rt/package").write_text("virt-rt-tuning-canoe-pass\n")
    return tree


UNITS_ENABLED = (
    "systemctl enable virt-rt-hugepages.service virt-rt-settings.service virt-rt-irq-affinity.service"
)


def test_a_package_without_a_boot_loader_only_enables_its_units(packaged: Path, commands: Path) -> None:
    done = run(packaged / "usr/sbin/virt-rt-tuning", "package-apply", path=commands, ROOT=str(packaged))
    assert (done.returncode, done.stderr) == (0, "")
    assert "no boot loader here" in done.stdout
    assert [call for call in called(commands) if not call.startswith("tuned-adm")] == [UNITS_ENABLED]


def test_a_package_writes_the_menu_that_there_is(packaged: Path, commands: Path) -> None:
    (packaged / "boot/grub").mkdir(parents=True)
    (packaged / "boot/grub/grub.cfg").write_text("menu\n")
    tool = packaged / "usr/sbin/virt-rt-tuning"
    done = run(tool, "package-apply", path=commands, ROOT=str(packaged))
    assert (done.returncode, done.stderr) == (0, "")
    assert called(commands)[-1] == "update-grub"
    executable(commands / "update-grub", "#!/bin/sh\nexit 1\n")
    done = run(tool, "package-apply", path=commands, ROOT=str(packaged))
    assert done.returncode == 0
    assert "update-grub failed; when that is mended: virt-rt-tuning apply" in done.stderr


def test_a_package_takes_its_boot_entries_back(packaged: Path, commands: Path, grubby: Grubby) -> None:
    before, files_before = grubby.entries, files(packaged)
    (packaged / "boot/loader/entries").mkdir(parents=True)
    search = {"GRUBBY_STATE": str(grubby.state), "ROOT": str(packaged)}
    executable(commands / "grubby", GRUBBY)
    tool = packaged / "usr/sbin/virt-rt-tuning"
    for back in ("package-upgrade", "package-remove"):
        done = run(tool, "package-apply", path=commands, **search)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(grubby.entries) == 3
        done = run(tool, back, path=commands, **search)
        assert (done.returncode, done.stderr) == (0, "")
        assert grubby.entries == before
    assert files(packaged) == files_before
    assert called(commands)[-1] == UNITS_ENABLED.replace("enable", "disable")


def test_a_package_under_tuned_leaves_the_command_line_to_it(
    packaged: Path, commands: Path, grubby: Grubby
) -> None:
    (packaged / "boot/loader/entries").mkdir(parents=True)
    search = {"GRUBBY_STATE": str(grubby.state), "ROOT": str(packaged)}
    executable(commands / "grubby", GRUBBY)
    executable(commands / "tuned-adm", "#!/bin/sh\necho Current active profile: virt-rt\n")
    before = grubby.entries
    tool = packaged / "usr/sbin/virt-rt-tuning"
    for verb in ("package-apply", "package-upgrade"):
        assert run(tool, verb, path=commands, **search).returncode == 0
    assert [entry for entry in grubby.entries if not entry["title"].endswith("isolation")] == before
    done = run(tool, "package-remove", path=commands, **search)
    assert "tuned-adm profile balanced" in done.stderr
    assert grubby.entries == before


def test_files_of_a_package_are_removed_by_its_manager(packaged: Path, commands: Path) -> None:
    before = files(packaged)
    done = run(packaged / "usr/sbin/virt-rt-tuning", "remove", path=commands, ROOT=str(packaged))
    assert done.returncode == 2
    assert "these files are of the package virt-rt-tuning-canoe-pass" in done.stderr
    assert files(packaged) == before


def test_the_menu_has_nothing_of_a_package_that_is_removed_but_not_purged(grub: Grub, tree: Path) -> None:
    (tree / tuning.PLAN_PLACE).unlink()
    found, told = grub.entries()
    assert len(found) == 5 and "virt-rt" not in told
    assert [line for _, _, line in found if "isolcpus" in line] == []


def test_status_is_the_preflight(tree: Path) -> None:
    done = run(tree / "usr/sbin/virt-rt-tuning", "status", ROOT=str(tree))
    assert done.stdout == "checked preflight\n"


@pytest.mark.parametrize("arguments", [[], ["start"], ["apply", "--fast"], ["remove", "--tuned"]])
def test_a_wrong_call_is_refused(tree: Path, arguments: list[str]) -> None:
    done = run(tree / "usr/sbin/virt-rt-tuning", *arguments, ROOT=str(tree))
    assert done.returncode == 2
    assert "usage: virt-rt-tuning" in done.stderr


# The product ----------------------------------------------------------------------------------------


def test_the_action_makes_the_whole_tree(
    tmp_path: Path, store: Store, executor_of: Callable[[Graph], Executor]
) -> None:
    """As doit makes it, through the store: modes and links survive, and the plan is the one above."""
    action = Project(ROOT).graph[tuning.tuning_name("canoe-pass")]
    assert action.place == "canoe-pass/tuning"
    blob, kind = executor_of(Graph([action])).result(action.name).outputs["root"]
    assert kind == "directory"
    archive.unpack(store.path(blob.digest), tmp_path)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    listed = (tmp_path / tuning.LIST_PLACE).read_text().splitlines()
    assert {place.lstrip("/") for place in listed} <= found
    assert json.loads((tmp_path / tuning.PLAN_PLACE).read_text()) == document("canoe-pass")
    assert (tmp_path / "etc/systemd/system/irqbalance.service").readlink() == Path("/dev/null")
    for place in ("etc/grub.d/11_virt-rt-plain", "usr/sbin/virt-rt-tuning", tuning.CHECK_PLACE):
        assert (tmp_path / place).stat().st_mode & 0o111 == 0o111, place
    done = run(tmp_path / tuning.CHECK_PLACE, "--help")
    assert done.returncode == 0, done.stderr
    assert "preflight" in done.stdout
    told = run(tmp_path / tuning.CHECK_PLACE, "preflight", "--plan", tmp_path / tuning.PLAN_PLACE, "--json")
    assert told.returncode in (0, 1), told.stderr
    json.loads(told.stdout)


def test_a_change_of_the_plan_changes_the_key(checkout: Path) -> None:
    def key(root: Path) -> str:
        loaded = recipes.load(root)
        action = tuning.tuning(
            ROOT, "qemu-q35", loaded.platforms["qemu-q35"], loaded.plans["qemu-q35"], {}, settings.load(root)
        )
        return Graph([action]).keys[action.name]

    first = key(checkout)
    assert first == key(ROOT)
    edit(checkout / "recipes/topologies/qemu-q35.toml", 'sockets = ["0-3"]', 'sockets = ["0-7"]')
    edit(checkout / "recipes/topologies/qemu-q35.toml", 'cpus = "0-3"', 'cpus = "0-7"')
    assert key(checkout) != first


def test_a_broken_template_is_named() -> None:
    with pytest.raises(UserError, match="recipes/templates/host/etc/x.j2: UndefinedError"):
        tuning.render("etc/x", "{{ plan.nothing.more }}", document("qemu-q35"))


def test_the_table_is_toml_that_a_person_can_sort() -> None:
    """Every kind of the table is used, and nothing else stands in it."""
    data = tomllib.loads((ROOT / settings.RECIPE).read_text())
    assert set(data) == {*settings._NAMES, "choices"}


def test_the_stand_in_table_may_be_empty(tmp_path: Path) -> None:
    """Without a setting there is nothing but the pages in the command line."""
    assert host_command_line(RECIPES.plans["qemu-q35"], Table(settings={}, choices={}), (), "amd64") == []


# The page -------------------------------------------------------------------------------------------


def test_every_file_and_choice_is_described(tree: Path) -> None:
    page = (ROOT / "docs/host-tuning.md").read_text()
    assert [choice for choice in TABLE.choices if f"\n| `{choice}` | " not in page] == []
    undescribed = [
        place
        for place in files(tree)
        if f"`/{place}`" not in page
        and f"`{Path(place).name}`" not in page
        and not place.startswith(("etc/systemd/system/", "usr/lib/tuned/", "usr/libexec/virt-rt/"))
    ]
    assert undescribed == []
