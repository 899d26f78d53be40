"""Plans drawn, the commands that draw them, and the pages that show them."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings

from pipeline import planpicture, planview, platformdoc, recipes
from pipeline import settings as host_settings
from pipeline.cpuplan import ADVICE, RULES, GuestRequest, HostPlan, PlanError
from pipeline.errors import UserError
from pipeline.placement import host_plan
from pipeline.topology import Node, Topology
from tests.machines import hosts

ROOT = Path(__file__).resolve().parent.parent
ASKED = recipes.load(ROOT)
CANOE = ASKED.plans["canoe-pass"]
SVG = "{http://www.w3.org/2000/svg}"


def drawn(plan: HostPlan, width: int = planview.PLAIN_WIDTH) -> str:
    return planview.text(planview.draw(plan, "a plan", width=width))


def marked(picture: str) -> dict[int, str]:
    """The mark of each CPU, read off the boxes."""
    found: dict[int, str] = {}
    for box in re.findall(r"│([^│\n]*)│", picture):
        for number, mark in re.findall(r"(\d+) (H|-|\.|[A-Z]+\d+)(?=[ \]])", f"{box} "):
            assert int(number) not in found
            found[int(number)] = mark
    return found


# Text --------------------------------------------------------------------------------------------------


def test_a_plan_as_it_reads() -> None:
    assert (
        drawn(CANOE)
        == """\
a plan

socket 0                        socket 1
┌ node 0: 32768 MiB ─────────┐  ┌ node 1: 32768 MiB ─────────┐
│  0 H    1 -    2 -    3 -  │  │  8 H    9 A0  10 A1  11 A2 │
│  4 -    5 -    6 -    7 -  │  │ 12 A3  13 -   14 -   15 -  │
└────────────────────────────┘  └────────────────────────────┘

H  housekeeping  0,8
-  isolated      1-7,9-15, free 1-7,13-15

A  canoe-guest
   vCPU 0            CPU 9      its housekeeping
   vCPU 1-3          CPU 10-12  real-time, SCHED_FIFO 1
   emulator and I/O  CPU 8      all its other threads
   memory            node 1     4096 MiB in 4 huge pages of 1G

huge pages  4 of 1G on node 1
"""
    )


def test_the_command_line_and_what_is_to_be_said_come_last() -> None:
    lines = planview.draw(CANOE, "t", ["a=1", "b=2", "c" * 30], ["warning: this"], width=40)
    assert planview.text(lines).endswith(f"host command line\n  a=1 b=2 {'c' * 30}\n\nwarning: this\n")
    narrow = planview.draw(CANOE, "t", ["a=1", "b=2", "c" * 30], width=20)
    assert planview.text(narrow).endswith(f"host command line\n  a=1 b=2\n  {'c' * 30}\n")


def test_the_siblings_of_a_guests_core_are_not_free() -> None:
    smt = Topology(
        description="two cores of two CPUs",
        sockets=("0-5",),
        cores=("0,3", "1,4", "2,5"),
        nodes=(Node(id=0, cpus="0-5", memory_mib=4096), Node(id=1, memory_mib=100)),
    )
    text = drawn(host_plan(smt, {"g": GuestRequest(vcpus=2, housekeeping_vcpus=1, memory_mib=512)}))
    assert "│ [0 H  3 H ]  [1 A0 4 . ]  [2 A1 5 . ] │" in text
    assert "-  isolated      1-2,4-5, free none\n.  kept idle     4-5: a guest has the core\n" in text
    assert "512 MiB, no huge pages" in text
    assert "node 1: 100 MiB, no CPUs" in text


@given(hosts())
@settings(max_examples=60, deadline=None)
def test_every_cpu_is_drawn_once_with_its_owner(
    host: tuple[Topology, dict[str, GuestRequest], str | None],
) -> None:
    try:
        plan = host_plan(*host)
    except PlanError:
        return
    found = marked(drawn(plan))
    letters = planview.letters(plan)
    assert set(found) == set(plan.topology.cpus)
    for cpu, mark in found.items():
        owner = plan.owner(cpu)
        guest, _, vcpu = owner.partition(":")
        expected = (
            {"H"} if owner == "housekeeping" else {"-", "."} if owner == "idle" else {letters[guest] + vcpu}
        )
        assert mark in expected


@pytest.mark.parametrize("width", [20, 64, 80, 100, 200])
def test_boxes_keep_to_the_width(width: int) -> None:
    for plan in (*ASKED.plans.values(), on("canoe-pass", "epyc-8ccx")):
        boxes = [line for line in drawn(plan, width).splitlines() if line[:1] in ("┌", "│", "└")]
        least = max(len(line) for line in drawn(plan, 1).splitlines() if line[:1] in ("┌", "│", "└"))
        assert max(map(len, boxes)) <= max(width, least)
        assert len(marked(drawn(plan, width))) == len(plan.topology.cpus)


def on(platform: str, topology: str) -> HostPlan:
    """The plan of a platform elsewhere."""
    from pipeline.plancommands import plan_on

    return plan_on(ROOT, ASKED, platform, topology)[0]


def test_letters_are_for_guests_and_h_is_for_housekeeping() -> None:
    names = [f"g{n:02}" for n in range(40)]
    plan = dataclasses.replace(CANOE, guests=dict.fromkeys(names, CANOE.guests["canoe-guest"]))
    letters = list(planview.letters(plan).values())
    assert letters[:9] == ["A", "B", "C", "D", "E", "F", "G", "I", "J"]
    assert len(set(letters)) == 40 and "H" not in letters


# Picture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", sorted(ASKED.topologies))
def test_a_picture_has_every_cpu_and_is_whole_in_itself(topology: str) -> None:
    plan = ASKED.plans[topology] if topology in ASKED.plans else on("canoe-pass", topology)
    picture = planpicture.svg(plan, "A & <B>")
    assert picture == planpicture.svg(plan, "A & <B>")
    tree = ElementTree.fromstring(picture)  # noqa: S314  # our own
    assert tree.findtext(f"{SVG}title") == "A & <B>"
    labels = [label for label in tree.iter(f"{SVG}text")]
    numbers = [int(label.text or "") for label in labels if label.get("class") == "cpu"]
    assert sorted(numbers) == list(plan.topology.cpus)
    marks = [label.text for label in labels if label.get("class") == "mark"]
    assert dict(zip(numbers, marks, strict=True)) == marked(drawn(plan))
    width, height = (int(tree.get(key, "")) for key in ("width", "height"))
    for shape in (*tree.iter(f"{SVG}rect"), *labels):
        assert 0 <= int(shape.get("x", "0")) + int(shape.get("width", "0")) <= width
        assert 0 <= int(shape.get("y", "0")) + int(shape.get("height", "0")) <= height
    assert "href" not in picture and "url(" not in picture and "@import" not in picture


def test_a_picture_has_colours_for_light_and_for_dark() -> None:
    style = planpicture.svg(CANOE, "t").partition("<style>\n")[2].partition("</style>")[0]
    light, dark = style.split("@media (prefers-color-scheme: dark) {\n")
    tinted = re.compile(r"^(\.?\w+) \{ ((?:fill|stroke): (?:#|none).*); \}$", re.MULTILINE)
    colours = [dict(tinted.findall(part)) for part in (light, dark)]
    assert set(colours[0]) == set(colours[1])
    assert {".page", "text", ".idle", ".housekeeping", ".guest0", ".realtime"} <= set(colours[0])
    assert all(colours[0][name] != colours[1][name] for name in colours[0])


# Commands ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


@dataclasses.dataclass(frozen=True)
class Checkout:
    """A copy of what the commands read; nothing in it can be built."""

    root: Path

    def environment(self, **more: str) -> dict[str, str]:
        kept = {"PATH": os.environ["PATH"], "HOME": str(self.root), "PYTHONPATH": str(self.root)}
        return (
            kept
            | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8", "TERM": "xterm-256color"}
            | more
        )

    def doit(self, *arguments: str, **more: str) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "doit", *arguments],
            cwd=self.root, env=self.environment(**more), capture_output=True, text=True, check=False,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    def on_a_terminal(self, *arguments: str, **more: str) -> str:
        """What a terminal of 80 columns gets to see."""
        outer, inner = pty.openpty()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "doit", *arguments],
                cwd=self.root, env=self.environment(COLUMNS="80", **more), stdout=inner, stdin=inner,
            )  # fmt: skip
            os.close(inner)
            shown = b""
            while True:
                try:
                    piece = os.read(outer, 65536)
                except OSError:  # the other side is closed
                    break
                if not piece:
                    break
                shown += piece
            assert process.wait() == 0
        finally:
            os.close(outer)
        return shown.decode().replace("\r\n", "\n")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root = tmp_path / "checkout"
    for name in ("pipeline", "recipes", "kernel-configs", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "elements"))
    for name in ("dodo.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, root)
    return Checkout(root)


def test_cpuplan_is_plain_where_nobody_sees_colour(checkout: Checkout) -> None:
    done = checkout.doit("cpuplan", "canoe-pass")
    assert (done.status, done.err) == (0, "")
    assert "\x1b" not in done.out
    assert "isolcpus=managed_irq,domain,1-7,9-15 " in done.out
    assert "irqaffinity=0,8\n" in done.out
    assert marked(done.out) == marked(drawn(CANOE))


def test_cpuplan_is_coloured_on_a_terminal_unless_asked_not_to(checkout: Checkout) -> None:
    shown = checkout.on_a_terminal("cpuplan", "canoe-pass")
    assert "\x1b[36m 9 A0\x1b[0m" in shown, "the guest's colour"
    assert "\x1b[33m" in shown, "housekeeping's"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert marked(plain) == marked(drawn(CANOE))
    assert not re.search(
        r"\x1b\[[0-9;]*3[0-9]m", checkout.on_a_terminal("cpuplan", "canoe-pass", NO_COLOR="1")
    )


def test_cpuplan_without_unicode_draws_with_what_there_is(checkout: Checkout) -> None:
    done = checkout.doit("cpuplan", "qemu-q35", PYTHONIOENCODING="ascii")
    assert done.status == 0
    assert "+ node 0: 4096 MiB " in done.out and "| 0 H   1 A0" in done.out


def test_cpuplan_json_is_the_plan_for_tools(checkout: Checkout) -> None:
    done = checkout.doit("cpuplan", "canoe-pass", "--json")
    document = json.loads(done.out)
    assert (document["schema"], document["platform"], document["topology"]) == (1, "canoe-pass", "canoe-pass")
    assert document["isolated"] == [*range(1, 8), *range(9, 16)]
    assert document["guests"]["canoe-guest"]["emulator"] == [8]
    assert {"parameter", "reason"} == set(document["command_line"][0])
    assert document["bios"][0]["setting"] == "Intel Hyper-Threading Technology"


def test_cpuplan_svg_is_the_picture(checkout: Checkout) -> None:
    done = checkout.doit("cpuplan", "--svg", "canoe-pass")
    assert done.status == 0
    title = f"canoe-pass on canoe-pass: {CANOE.topology.description}"
    assert done.out == planpicture.svg(CANOE, title)


@pytest.mark.parametrize("platform", sorted(ASKED.platforms))
@pytest.mark.parametrize("topology", ["xeon-2s-smt", "epyc-8ccx", "four-core", "canoe-pass-single-socket"])
def test_every_platform_can_be_tried_on_the_recorded_machines(platform: str, topology: str) -> None:
    plan = on(platform, topology)
    assert plan.topology == ASKED.topologies[topology]
    assert set(plan.guests) == set(ASKED.guests_of(platform))


def test_another_topology_leaves_out_what_was_written_for_the_own_one(checkout: Checkout) -> None:
    done = checkout.doit("cpuplan", "canoe-pass", "--topology", "canoe-pass-single-socket")
    assert done.status == 0
    assert "isolcpus=managed_irq,domain,1-7 nohz=on nohz_full=1-7 rcu_nocbs=1-7 irqaffinity=0 " in done.out
    assert done.out.endswith("note: recipes/guests/canoe-guest.toml: pins left out: for canoe-pass only\n")
    recipe = checkout.root / "recipes/guests/canoe-guest.toml"
    recipe.write_text(recipe.read_text() + '\n[[devices]]\nkind = "pci"\naddress = "0000:01:00.0"\n')
    done = checkout.doit("cpuplan", "canoe-pass", "--topology", "four-core", "--json")
    document = json.loads(done.out)
    assert done.err == "note: recipes/guests/canoe-guest.toml: pins, devices left out: for canoe-pass only\n"
    assert document["devices"] == {"canoe-guest": []}
    assert document["topology"] == "four-core"
    assert [warning["advice"] for warning in document["warnings"]] == ["core-shared"]


def test_warnings_name_the_line(checkout: Checkout) -> None:
    recipe = checkout.root / "recipes/guests/canoe-guest.toml"
    recipe.write_text(recipe.read_text() + '\n[[devices]]\nkind = "pci"\naddress = "0000:01:00.0"\n')
    line = recipe.read_text().count("\n") - 2
    warning = f"recipes/guests/canoe-guest.toml:{line}: device-known: the topology does not tell the node of"
    assert f"\nwarning: {warning}" in checkout.doit("cpuplan", "canoe-pass").out
    for arguments in (("tuning:canoe-pass",), ("launch:canoe-guest", "tuning:canoe-pass")):
        assert checkout.doit("plan", *arguments).out.count(f"note: {warning}") == 1
    assert "note: " not in checkout.doit("plan", "tuning:qemu-q35").out
    assert json.loads(checkout.doit("plan", "--json", "tuning:canoe-pass").out)


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        ((), "error: doit cpuplan takes one PLATFORM", "doit cpuplan PLATFORM"),
        (("canoe-pass", "more"), "error: doit cpuplan takes one PLATFORM", "doit cpuplan PLATFORM"),
        (
            ("x",),
            "error: there is no platform x",
            "write one of: canoe-pass, canoe-pass-single-socket, qemu-q35",
        ),
        (
            ("canoe-pass", "--topology", "x"),
            "error: there is no topology x",
            "write one of: canoe-pass",
        ),
        (
            ("canoe-pass", "--json", "--svg"),
            "error: --json, --svg and --doc exclude each other",
            "doit cpuplan",
        ),
        (
            ("canoe-pass", "--doc", "--topology", "four-core"),
            "error: a page shows the platform's own topology",
            "doit",
        ),
    ],
)
def test_cpuplan_refuses_what_it_cannot_do(
    checkout: Checkout, arguments: tuple[str, ...], said: str, hint: str
) -> None:
    done = checkout.doit("cpuplan", *arguments)
    assert done.status == 2
    lines = (done.out + done.err).splitlines()
    assert lines[0].startswith(said) and lines[1].startswith(f"  {hint}")


def test_a_broken_rule_ends_every_command_with_status_2(checkout: Checkout) -> None:
    recipe = checkout.root / "recipes/guests/canoe-guest.toml"
    recipe.write_text(recipe.read_text().replace('"9-12"', '"8-11"'))
    done = checkout.doit("cpuplan", "qemu-q35")
    assert done.status == 2
    assert (done.out + done.err).splitlines() == [
        "error: recipes/guests/canoe-guest.toml:7: vcpu-on-isolated: pins = '8-11': CPU 8 keeps house",
        '  write pins = "1-4"',
    ]


def test_topology_is_written_by_the_shell_into_the_recipes(checkout: Checkout) -> None:
    """The shell makes the file first, empty; other recipes may be broken, too."""
    command = f"{sys.executable} -m doit topology >recipes/topologies/this.toml"
    subprocess.run(command, shell=True, cwd=checkout.root, env=checkout.environment(), check=True)
    topology = recipes.load(checkout.root).topologies["this"]
    assert len(topology.cpus) == os.cpu_count()
    written = (checkout.root / "recipes/topologies/this.toml").read_text()
    assert not re.search("^note", written, re.MULTILINE)


def test_topology_tells_remarks_beside_what_it_writes(checkout: Checkout, tmp_path: Path) -> None:
    from tests.test_machine import tree

    machine = tree(tmp_path / "machine", memory=False)
    refused = checkout.doit("topology", "--sysroot", str(machine))
    assert (refused.status, "[[nodes]]" in refused.out) == (2, False)
    done = checkout.doit("topology", "--sysroot", str(machine), "--memory", "2048", "--description", "mine")
    assert done.status == 0
    assert done.err.startswith("note: The memory of node 0-1,3 was not recorded: 2048 MiB")
    assert tomllib.loads(done.out)["description"] == "mine"
    assert done.out.startswith("# The memory of node 0-1,3 was not recorded")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("mine",), "error: doit topology takes no mine"),
        (("--sysroot", "/nowhere"), "error: there is no directory /nowhere"),
        (("--memory", "-1"), "error: --memory -1 is no memory"),
        (("--memory", "much"), "error: "),
    ],
)
def test_topology_refuses_what_it_cannot_do(
    checkout: Checkout, arguments: tuple[str, ...], said: str
) -> None:
    done = checkout.doit("topology", *arguments)
    assert done.status == 2
    assert (done.out + done.err).startswith(said)


# Pages -------------------------------------------------------------------------------------------------


def generated(platform: str, root: Path = ROOT) -> dict[Path, str]:
    """The pages of a platform as they should be."""
    recipe, plan, table = ASKED.platforms[platform], ASKED.plans[platform], host_settings.load(ROOT)
    choices = host_settings.chosen(ROOT, platform, recipe, table)
    command_line = host_settings.host_command_line(plan, table, choices, recipe.arch)
    return platformdoc.pages(root, platform, recipe, plan, command_line)


@pytest.mark.parametrize("platform", sorted(ASKED.platforms))
def test_the_generated_parts_of_a_platforms_page_are_fresh(platform: str) -> None:
    for path, content in generated(platform).items():
        assert path.read_text() == content, f"stale: write it with `doit cpuplan {platform} --doc`"


def test_the_page_of_canoe_pass_has_all_that_is_generated() -> None:
    page = (ROOT / "docs/platforms/canoe-pass.md").read_text()
    parts = re.findall(r"<!-- generated: (.+) -->", page)
    assert sorted(parts) == ["bios", "command-line", "limits", "plan"]
    assert page.count("<!-- end -->") == len(parts)
    assert "| host | 20 us | 2 us |\n| guest | 60 us | 25 us |" in page
    assert "canoe-pass.svg" in page
    assert "isolcpus=managed_irq,domain,1-7,9-15 " in page


def test_doc_writes_what_is_stale_and_nothing_else(checkout: Checkout) -> None:
    assert checkout.doit("cpuplan", "canoe-pass", "--doc") == Done(0, "", "")
    recipe = checkout.root / "recipes/platforms/canoe-pass.toml"
    recipe.write_text(recipe.read_text().replace("host_max_us = 20", "host_max_us = 21"))
    assert checkout.doit("cpuplan", "canoe-pass", "--doc").out == "wrote docs/platforms/canoe-pass.md\n"
    assert "| host | 21 us |" in (checkout.root / "docs/platforms/canoe-pass.md").read_text()


def test_a_part_that_nothing_generates_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "docs/platforms/canoe-pass.md"
    with pytest.raises(UserError, match="there is no docs/platforms/canoe-pass.md"):
        generated("canoe-pass", tmp_path)
    page.parent.mkdir(parents=True)
    whole = "".join(f"<!-- generated: {part} -->\n<!-- end -->\n" for part in ("plan", "command-line"))
    page.write_text(whole + "<!-- generated: weather -->\nold\n<!-- end -->\n")
    with pytest.raises(UserError, match="nothing generates weather"):
        generated("canoe-pass", tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("by hand\n", "has no part plan"),
        (
            "<!-- generated: plan -->\nno end\n<!-- generated: bios -->\n<!-- end -->\n",
            "a generated part has no end",
        ),
        ("<!-- end -->\n", "a generated part has no end, or an end no part"),
    ],
)
def test_a_page_that_would_lose_text_is_refused(tmp_path: Path, text: str, said: str) -> None:
    page = tmp_path / "docs/platforms/canoe-pass.md"
    page.parent.mkdir(parents=True)
    page.write_text(text)
    with pytest.raises(UserError, match=said):
        generated("canoe-pass", tmp_path)


def test_the_rules_are_listed_as_they_are() -> None:
    page = (ROOT / "docs/cpu-plan.md").read_text()
    rows = dict(
        re.findall(r"^\| `([\w-]+)` \| ([^|]+) \|$", page.partition("## A guest's recipe")[0], re.MULTILINE)
    )
    assert rows == RULES | ADVICE


def test_every_key_of_a_guests_hardware_is_described() -> None:
    page = (ROOT / "docs/cpu-plan.md").read_text()
    kinds = (recipes.UserNetwork, recipes.TapNetwork, recipes.Disk, recipes.Function, recipes.VirtualFunction)
    keys = {key for kind in (recipes.Guest, *kinds) for key in kind.__struct_fields__}
    elsewhere = {"extends", "description", "platform", "image", "cmdline"}
    assert [key for key in sorted(keys - elsewhere) if f"`{key}`" not in page] == []
