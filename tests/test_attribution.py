"""Who kept a vCPU waiting: told from a host's trace, and never guessed."""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.measure import attribution
from pipeline.measure.attribution import Trace, TraceFormError, parse
from pipeline.measure.problems import MeasureError
from pipeline.measure.record import sha256, write_json

RECORDED = Path(__file__).parent / "attribution"

#: Ticks of the pretended TSC in a microsecond, and the guest's TSC less the host's.
MHZ, OFFSET = 1000, -7_000_000_000
TID, OTHER = 627, 900
#: The latency that is looked up ends here, host TSC; it took 1000 µs, and its window 1100.
AT = 50_000_000
BEGIN = AT - 1100 * MHZ

VCPU = f"CPU 1/KVM-{TID}"
EXIT = "kvm_exit: vcpu 1 reason {} rip 0xffffffffa5038edf info1 0x1 info2 0x0 intr_info 0x0 error_code 0x0"
ENTRY = "kvm_entry: vcpu 1, rip 0xffffffffa5038ee1"


def us(before: float) -> int:
    """So many microseconds before the end of the latency."""
    return AT - round(before * MHZ)


def line(tsc: int, task: str, text: str, cpu: int = 2) -> str:
    return f"{task:>23} [{cpu:03}] d..2. {tsc}: {text}\n"


def switch(
    tsc: int, old: str, new: str, state: str = "S", prio: int = 120, cpu: int = 2, old_prio: int = 120
) -> str:
    """A switch from one `comm-pid` to another; `prio` is the new one's."""
    old_prio = 98 if old == VCPU else old_prio
    (old_comm, _, old_pid), (new_comm, _, new_pid) = old.rpartition("-"), new.rpartition("-")
    text = (
        f"sched_switch: prev_comm={old_comm} prev_pid={old_pid} prev_prio={old_prio} prev_state={state} ==> "
        f"next_comm={new_comm} next_pid={new_pid} next_prio={prio}"
    )
    return line(tsc, old, text, cpu)


def waking(tsc: int, cpu: int = 2, target: int = 2) -> str:
    text = f"sched_waking: comm=CPU 1/KVM pid={TID} prio=98 target_cpu={target:03}"
    return line(tsc, "<idle>-0", text, cpu)


def trace(*lines: str) -> str:
    """A trace as the kernel writes it, around these lines; times before and after are covered."""
    begin = line(1000, VCPU, ENTRY)
    body = begin + "".join(lines)
    count = sum(not each.startswith(("#", "CPU:")) for each in body.splitlines())
    return f"# tracer: nop\n#\n# entries-in-buffer/entries-written: {count}/{count}   #P:4\n#\n{body}"


def buffer(**lost: int) -> dict[str, int]:
    return {"entries": 9, "overrun": 0, "commit_overrun": 0, "dropped_events": 0, **lost}


def machine(name: str = "g", **changed: Any) -> dict[str, Any]:
    vcpu = {"vcpu": 1, "tid": TID, "tsc_offset": OFFSET, "tsc_scaled": False, **changed}
    return {"pid": 600, "name": name, "vcpus": [vcpu]}


def host(**changed: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "boot_id": "b",
        "cpus": [2],
        "from_tsc": 500,
        "to_tsc": AT + 5000,
        "tsc_khz": MHZ * 1000,
        "tsc_error": 0.001,
        "buffers": {"2": buffer()},
        "trace_sha256": "",
        "virtual_machines": [machine()],
        **changed,
    }


def guest(**changed: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "place": "guest-g",
        "limit_us": 200,
        "exceeded": True,
        "cpu": 1,
        "tsc": AT + OFFSET,
        "latency_us": 1000,
        **changed,
    }


def told(
    *lines: str, facts: dict[str, Any] | None = None, answer: dict[str, Any] | None = None
) -> dict[str, Any]:
    return attribution.attribute(facts or host(), parse(trace(*lines)), answer or guest())


def named(event: dict[str, Any]) -> dict[tuple[str, str], int]:
    return {(each["kind"], each["name"]): each["us"] for each in event["culprits"]}


HOG = (
    line(us(1050), VCPU, EXIT.format("interrupt")),
    switch(us(1040), VCPU, f"hog-{OTHER}", state="R+", prio=49),
    switch(us(40), f"hog-{OTHER}", VCPU, prio=98, old_prio=49),
    line(us(30), VCPU, ENTRY),
)


# Who it was -------------------------------------------------------------------------------------


def test_a_thread_that_takes_the_cpu_is_named_with_priority_and_pid() -> None:
    event = told(*HOG)
    assert (
        event["verdict"]
        == "CPU 2 was taken from vCPU 1 for 1.0 ms by thread hog (real-time priority 50, pid 900)"
    )
    assert event["culprits"][0] == {
        "kind": "thread",
        "name": "hog",
        "detail": "real-time priority 50, pid 900",
        "us": 1000,
        "share": 0.909,
    }
    assert (event["cpu"], event["vcpu"], event["at_tsc"], event["window_us"]) == (2, 1, AT, [-1100, 0])
    assert named(event)["kvm exit", "interrupt"] == 20
    assert event["in_guest_us"] == 80


def test_a_thread_that_had_the_cpu_already_is_named() -> None:
    event = told(
        line(us(9000), VCPU, EXIT.format("interrupt")),
        switch(us(8990), VCPU, f"my - odd-{OTHER}", state="R", prio=-1),
        switch(us(40), f"my - odd-{OTHER}", VCPU, prio=98, old_prio=-1),
    )
    assert event["verdict"].endswith("by thread my - odd (deadline, pid 900)")
    assert named(event)["thread", "my - odd"] == 1060


def test_a_thread_that_was_hastened_while_it_ran_has_the_priority_that_it_ended_with() -> None:
    event = told(HOG[0], HOG[1].replace("next_prio=49", "next_prio=120"), *HOG[2:])
    assert event["culprits"][0]["detail"] == "real-time priority 50, pid 900"


def test_the_thread_of_an_interrupt_is_named_as_the_interrupt_with_its_whole_name() -> None:
    event = told(
        line(us(1050), VCPU, EXIT.format("interrupt")),
        line(us(1045), VCPU, "irq_handler_entry: irq=32 name=virtio0-req.2"),
        line(us(1040), VCPU, "irq_handler_exit: irq=32 ret=handled"),
        switch(us(1030), VCPU, f"irq/32-virtio0--{OTHER}", state="R", prio=49),
        switch(us(40), f"irq/32-virtio0--{OTHER}", VCPU, prio=98),
        line(us(30), VCPU, ENTRY),
    )
    assert (
        event["verdict"]
        == "CPU 2 was taken from vCPU 1 for 995 µs by interrupt virtio0-req.2 (irq 32, 2 times)"
    )
    assert ("thread", "irq/32-virtio0-") not in named(event)


def test_an_interrupt_without_a_hard_handler_in_the_trace_has_the_name_of_its_thread() -> None:
    event = told(
        switch(us(1030), VCPU, f"irq/9-acpi-{OTHER}", state="R", prio=49),
        switch(us(40), f"irq/9-acpi-{OTHER}", VCPU, prio=98),
    )
    assert ("interrupt", "acpi") in named(event)


@pytest.mark.parametrize(
    ("entry", "leave", "name", "detail"),
    [
        (
            "irq_handler_entry: irq=24 name=eth0",
            "irq_handler_exit: irq=24 ret=handled",
            "eth0",
            "irq 24, once",
        ),
        ("local_timer_entry: vector=236", "local_timer_exit: vector=236", "local timer", "once"),
        (
            "softirq_entry: vec=1 [action=TIMER]",
            "softirq_exit: vec=1 [action=TIMER]",
            "softirq TIMER",
            "once",
        ),
    ],
)
def test_a_handler_is_named_and_not_the_exit_in_which_it_ran(
    entry: str, leave: str, name: str, detail: str
) -> None:
    event = told(
        line(us(1050), VCPU, EXIT.format("interrupt")),
        line(us(1040), VCPU, entry),
        line(us(40), VCPU, leave),
        line(us(30), VCPU, ENTRY),
    )
    assert event["culprits"][0] == {
        "kind": "interrupt",
        "name": name,
        "detail": detail,
        "us": 1000,
        "share": 0.909,
    }
    assert named(event)["kvm exit", "interrupt"] == 20


def test_an_interrupt_within_another_has_its_own_time() -> None:
    event = told(
        line(us(1000), VCPU, EXIT.format("interrupt")),
        line(us(1000), VCPU, "irq_handler_entry: irq=24 name=eth0"),
        line(us(600), VCPU, "local_timer_entry: vector=236"),
        line(us(500), VCPU, "local_timer_exit: vector=236"),
        line(us(0), VCPU, "irq_handler_exit: irq=24 ret=handled"),
    )
    assert named(event) == {("interrupt", "eth0"): 900, ("interrupt", "local timer"): 100}


def test_the_handler_that_was_at_work_when_the_trace_began_is_named() -> None:
    text = trace(line(us(10), VCPU, "irq_handler_exit: irq=24 ret=handled")).replace(
        line(1000, VCPU, ENTRY), ""
    )
    text = text.replace("written: 2/2", "written: 1/1")
    event = attribution.attribute(host(), parse(text), guest())
    assert named(event) == {("interrupt", "irq 24"): 1090}


def test_an_exit_that_kvm_takes_long_for_is_named_by_its_reason() -> None:
    event = told(line(us(1000), VCPU, EXIT.format("npf")), line(us(100), VCPU, ENTRY))
    assert event["verdict"] == "vCPU 1 was out of guest mode for 900 µs for the KVM exit npf (once)"


def test_a_vcpu_that_sleeps_in_the_host_is_said_to_sleep() -> None:
    event = told(
        line(us(1090), VCPU, EXIT.format("io")),
        switch(us(1080), VCPU, "swapper/2-0", state="D"),
        waking(us(90)),
        switch(us(80), "swapper/2-0", VCPU, prio=98),
        line(us(70), VCPU, ENTRY),
    )
    assert event["verdict"] == (
        "vCPU 1 was out of guest mode for 1.0 ms for the KVM exit io (once, asleep for 1.0 ms)"
    )


def test_a_thread_is_blamed_only_from_the_moment_when_the_vcpu_wants_to_run() -> None:
    event = told(
        line(us(9090), VCPU, EXIT.format("hlt")),
        switch(us(9080), VCPU, f"hog-{OTHER}", state="S", prio=49),
        waking(us(700)),
        switch(us(100), f"hog-{OTHER}", VCPU, prio=98),
        line(us(90), VCPU, ENTRY),
    )
    assert named(event) == {("thread", "hog"): 600, ("kvm exit", "hlt"): 410}


def test_several_causes_are_told_when_none_has_half_of_the_time() -> None:
    event = told(
        line(us(1100), VCPU, EXIT.format("interrupt")),
        switch(us(1000), VCPU, "one-1", state="R"),
        switch(us(600), "one-1", "two-2", state="S"),
        switch(us(300), "two-2", VCPU),
        line(us(300), VCPU, ENTRY),
    )
    assert event["verdict"] == (
        "CPU 2 was taken from vCPU 1 for 400 µs by thread one (nice 0, pid 1), less than half of the time; "
        "then two 300 µs, interrupt 100 µs"
    )
    assert [each["share"] for each in event["culprits"]] == [0.364, 0.273, 0.091]


def test_a_vcpu_that_moves_is_followed_to_the_cpu_where_it_waits() -> None:
    event = told(
        switch(us(5000), "other-3", "third-4", cpu=3),
        line(us(1100), VCPU, EXIT.format("io")),
        switch(us(1100), VCPU, "swapper/2-0", state="S"),
        waking(us(1000), target=3),
        switch(us(100), "third-4", VCPU, cpu=3),
        line(us(90), VCPU, ENTRY, cpu=3),
        facts=host(cpus=[2, 3], buffers={"2": buffer(), "3": buffer()}),
    )
    assert named(event) == {("thread", "third"): 900, ("kvm exit", "io"): 110}
    assert event["cpu"] == 3


def test_a_guest_that_ran_is_told_to_look_at_itself() -> None:
    event = told(line(us(400), VCPU, EXIT.format("msr")), line(us(390), VCPU, ENTRY))
    assert event["verdict"] == (
        "vCPU 1 was in guest mode for 99% of the time: what made it late is not on the host's CPU 2, look in the guest"
    )
    assert event["culprits"] == []


# Not told ---------------------------------------------------------------------------------------

UNTOLD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no guest of that name": (host(virtual_machines=[machine("h")]), {}, "0 guests g ran .*running: h"),
    "no guest at all": (host(virtual_machines=[]), {}, "0 guests g ran .*running: none"),
    "two of that name": (host(virtual_machines=[machine(), machine()]), {}, "2 guests g ran"),
    "no such vCPU": (host(), {"cpu": 4}, "did not find the thread and the TSC offset of vCPU 4 of g"),
    "no offset": (host(virtual_machines=[machine(tsc_offset=None)]), {}, "TSC offset of vCPU 1"),
    "scaled": (host(virtual_machines=[machine(tsc_scaled=True)]), {}, "another speed"),
    "another offset": (host(virtual_machines=[machine(tsc_offset=0)]), {}, "began before the host's trace"),
    "before": (host(from_tsc=BEGIN + 1), {}, "began before"),
    "after": (host(to_tsc=AT - 1), {}, "ended after"),
    "frequency": (host(tsc_error=0.06), {}, "frequency"),
    "no frequency": (host(tsc_khz=0), {}, "frequency"),
    "another thread": (
        host(virtual_machines=[machine(tid=628)]),
        {},
        r"thread of vCPU 1 \(628\) is not in .* 2$",
    ),
    "commit overrun": (host(buffers={"2": buffer(commit_overrun=1)}), {}, "1 events of CPU 2 were lost"),
    "dropped": (host(buffers={"2": buffer(dropped_events=3)}), {}, "3 events of CPU 2 were lost"),
}


@pytest.mark.parametrize("case", UNTOLD)
def test_what_cannot_be_told_is_said_instead_of_a_cause(case: str) -> None:
    facts, answer, reason = UNTOLD[case]
    event = told(*HOG, facts=facts, answer=guest(**answer))
    assert event["culprits"] == []
    assert event["verdict"].startswith("not told: ")
    assert re.search(reason, event["verdict"])
    assert told(*HOG)["culprits"]  # the same without what is wrong


def test_a_buffer_that_overran_is_no_matter_as_long_as_the_latency_is_in_it() -> None:
    facts = host(buffers={"2": buffer(overrun=12)})
    assert told(*HOG, facts=facts)["culprits"]
    late = trace(*HOG).replace(line(1000, VCPU, ENTRY), line(BEGIN + 1, VCPU, ENTRY))
    event = attribution.attribute(facts, parse(late), guest())
    assert (
        event["verdict"]
        == "not told: the trace of CPU 2 begins too late: 12 earlier events did not fit in its buffer"
    )


@pytest.mark.parametrize(("place", "spoiled"), [(0, False), (1, True), (2, True), (4, True), (5, False)])
def test_a_gap_within_the_latency_spoils_it_and_no_other_gap(place: int, spoiled: bool) -> None:
    lines = [line(2000, VCPU, ENTRY), *HOG, line(AT + 10, VCPU, ENTRY), line(AT + 20, VCPU, ENTRY)]
    lines.insert(place if place < 5 else 6, "CPU:2 [LOST 5 EVENTS]\n")
    assert told(*lines)["verdict"].startswith("not told: events of CPU 2 were lost") == spoiled


def test_a_gap_of_another_cpu_spoils_it_too_for_the_vcpu_may_have_been_woken_from_there() -> None:
    lines = [
        line(2000, "x-1", ENTRY, cpu=3),
        *HOG,
        "CPU:3 [LOST EVENTS]\n",
        line(AT + 10, "x-1", ENTRY, cpu=3),
    ]
    event = told(*lines, facts=host(buffers={"2": buffer(), "3": buffer()}))
    assert event["verdict"] == "not told: events of CPU 3 were lost during the latency"


def test_a_waking_from_a_cpu_without_a_trace_of_its_own_counts() -> None:
    event = told(
        line(us(9090), VCPU, EXIT.format("hlt")),
        switch(us(9080), VCPU, f"hog-{OTHER}", state="S", prio=49),
        waking(us(700), cpu=0),
        switch(us(100), f"hog-{OTHER}", VCPU, prio=98),
        line(us(90), VCPU, ENTRY),
        facts=host(buffers={"0": buffer(), "2": buffer()}),
    )
    assert named(event)["thread", "hog"] == 600


def test_a_cpu_that_only_tells_whom_it_wakes_tells_nothing_of_what_it_runs() -> None:
    event = told(
        waking(us(9000), cpu=3, target=2),
        line(us(1100), VCPU, EXIT.format("io")),
        switch(us(1100), VCPU, "swapper/2-0", state="S"),
        waking(us(1000), cpu=3, target=3),
        facts=host(buffers={"2": buffer(), "3": buffer()}),
    )
    assert event["verdict"] == "not told: for 1.0 ms the trace does not say what vCPU 1 did"


@pytest.mark.parametrize(("when", "told_so"), [(2000, False), (us(500), True), (AT + 100, True)])
def test_an_offset_that_changes_after_the_latency_began_is_not_used(when: int, told_so: bool) -> None:
    write = line(when, VCPU, "kvm_write_tsc_offset: vcpu=1 prev=0 next=1")
    event = told(*sorted([*HOG, write], key=lambda each: int(each.split("] ")[1].split()[1][:-1])))
    assert event["verdict"].startswith("not told: the TSC offset of vCPU 1 was changed") == told_so


def test_a_vcpu_that_waits_on_a_cpu_without_a_trace_is_not_told() -> None:
    event = told(
        line(us(1100), VCPU, EXIT.format("io")),
        switch(us(1100), VCPU, "swapper/2-0", state="S"),
        waking(us(1000), target=3),
        switch(us(900), "swapper/2-0", f"hog-{OTHER}", prio=49),
    )
    assert event["verdict"] == "not told: for 1.0 ms the trace does not say what vCPU 1 did"


def test_what_happened_before_the_first_event_of_the_vcpu_is_not_guessed() -> None:
    text = trace(switch(us(100), f"hog-{OTHER}", VCPU, prio=98)).replace(line(1000, VCPU, ENTRY), "")
    event = attribution.attribute(host(), parse(text.replace("2/2", "1/1")), guest())
    assert event["verdict"].startswith("not told: for 1.1 ms")


# The trace's text -------------------------------------------------------------------------------


def test_a_line_is_read_with_all_its_parts() -> None:
    (event,) = parse(trace().replace(VCPU, "a-b [001] c-77")).events
    assert event == (1000, 2, 77, "a-b [001] c", "kvm_entry", "vcpu 1, rip 0xffffffffa5038ee1")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace(" [002]", " 002", 1), "line 5 is no event"),
        (lambda text: text.replace("1000:", "1000.5:"), "line 5 is no event"),
        (lambda text: text + "half a li", "line 10 is no event: 'half a li'"),
        (lambda text: text[: text.index("\n", 300) + 1], "events of 5: cut short"),
        (lambda text: text.replace("# entries", "# entry"), "header"),
        (lambda text: "", "header"),
        (lambda text: text.replace(": 5/5", ": 6/6"), "5 events of 6"),
        (lambda text: text.replace(" 1000:", f" {AT}:"), "line 6 is earlier"),
    ],
)
def test_a_trace_that_is_not_whole_is_refused(change: Callable[[str], str], reason: str) -> None:
    with pytest.raises(TraceFormError, match=reason):
        parse(change(trace(*HOG)))


@pytest.mark.parametrize(
    "text",
    [
        "sched_switch: prev_comm=a ==> next_comm=b",
        "sched_waking: comm=a",
        "kvm_exit: vcpu 1",
        "irq_handler_entry: irq=x",
        "irq_handler_exit: ret=handled",
        "softirq_entry: vec=1",
    ],
)
def test_an_event_that_is_not_of_its_form_is_refused_by_name(text: str) -> None:
    with pytest.raises(TraceFormError, match=text.split(":")[0]):
        told(line(us(500), VCPU, text), HOG[0].replace(str(us(1050)), str(us(400))))


# Files ------------------------------------------------------------------------------------------


def lay(directory: Path, text: str, answer: dict[str, Any]) -> argparse.Namespace:
    """Files of a host and a guest, and the options of the command about them."""
    directory.mkdir(exist_ok=True)
    (directory / "trace.txt").write_text(text)
    write_json(directory / "host.json", host(trace_sha256=sha256(directory / "trace.txt")))
    write_json(directory / "guest.json", answer)
    return argparse.Namespace(
        host=str(directory), guest=[str(directory / "guest.json")], json=str(directory / "attribution.json")
    )


def test_the_command_writes_all_verdicts_and_prints_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = lay(tmp_path, trace(*HOG), guest())
    assert attribution.run(options) == 0
    written = json.loads((tmp_path / "attribution.json").read_text())
    assert written == {"schema": 1, "events": [told(*HOG)]}
    assert capsys.readouterr().out == f"guest-g vCPU 1, 1.0 ms: {told(*HOG)['verdict']}\n"


def test_a_guest_that_was_never_late_makes_no_event(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = lay(tmp_path, trace(*HOG), {"schema": 1, "place": "guest-g", "limit_us": 7, "exceeded": False})
    assert attribution.run(options) == 0
    assert json.loads((tmp_path / "attribution.json").read_text())["events"] == []
    assert capsys.readouterr().out == "guest-g: no latency exceeded 7 µs\n"


def spoil_json(name: str, **changed: Any) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        content.update(changed)
        write_json(directory / name, {key: value for key, value in content.items() if value is not ...})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda directory: (directory / "host.json").unlink(), "host.json cannot be read"),
        (lambda directory: (directory / "host.json").write_text(""), "host.json is empty"),
        (lambda directory: (directory / "trace.txt").unlink(), "trace.txt cannot be read"),
        (lambda directory: (directory / "trace.txt").write_text("x"), "not the trace"),
        (lambda directory: (directory / "guest.json").write_text('{"schema": 1'), "cut short"),
        (lambda directory: (directory / "guest.json").write_text("[]"), "schema"),
        (spoil_json("host.json", schema=2), "host.json is not of schema 1"),
        (spoil_json("host.json", tsc_khz=...), "tsc_khz is missing"),
        (spoil_json("host.json", buffers=[]), "buffers is missing, or is not of its kind"),
        (spoil_json("guest.json", schema=2), "guest.json is not of schema 1"),
        (spoil_json("guest.json", exceeded=1), "exceeded"),
        (spoil_json("guest.json", tsc=...), "tsc is missing"),
        (spoil_json("guest.json", latency_us="9"), "latency_us"),
        (spoil_json("guest.json", cpu=True), "cpu"),
    ],
)
def test_files_that_are_missing_or_spoiled_are_refused_by_name(
    tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    options = lay(tmp_path, trace(*HOG), guest())
    spoil(tmp_path)
    with pytest.raises(MeasureError, match=reason) as refused:
        attribution.run(options)
    assert refused.value.hint
    assert not (tmp_path / "attribution.json").exists()


def test_a_trace_that_is_cut_short_is_refused_with_its_file(tmp_path: Path) -> None:
    options = lay(tmp_path, trace(*HOG).replace(": 5/5", ": 6/6"), guest())
    with pytest.raises(MeasureError, match=r"trace\.txt: it has 5 events of 6"):
        attribution.run(options)


def test_the_command_line_has_what_it_needs() -> None:
    parser = argparse.ArgumentParser()
    attribution.add_parser(parser.add_subparsers())
    options = parser.parse_args(["attribute", "--host", "h", "--guest", "a", "--guest", "b", "--json", "j"])
    assert (options.run, options.guest) == (attribution.run, ["a", "b"])


# Recorded in the lab's emulated host -------------------------------------------------------------
#
# hog     as `trace stop` and `trace break` left it, cut to the window; limit 300 ms, a hog for 3 s
# serial  the kernel's trace, cut to the window, and of the pairs of the hard handler every twentieth; the facts beside
#         it are written by hand from the same boot. The guest was late by 545 ms, of which the buffer still had 416:
#         the answer says 300


def recorded(name: str, directory: Path) -> argparse.Namespace:
    source = RECORDED / name
    directory.mkdir()
    for file in ("host.json", "guest-break.json"):
        shutil.copy(source / file, directory)
    (directory / "trace.txt").write_bytes(gzip.decompress((source / "trace.txt.gz").read_bytes()))
    return argparse.Namespace(
        host=str(directory),
        guest=[str(directory / "guest-break.json")],
        json=str(directory / "attribution.json"),
    )


@pytest.mark.parametrize(
    ("name", "kind", "culprit", "detail"),
    [("hog", "thread", "hog", "real-time priority 50, pid "), ("serial", "interrupt", "ttyS1", "irq 3, ")],
)
def test_disturbances_of_the_lab_are_named(
    tmp_path: Path, name: str, kind: str, culprit: str, detail: str
) -> None:
    assert attribution.run(recorded(name, tmp_path / name)) == 0
    (event,) = json.loads((tmp_path / name / "attribution.json").read_text())["events"]
    first = event["culprits"][0]
    assert (first["kind"], first["name"], event["cpu"], event["vcpu"]) == (kind, culprit, 2, 1)
    assert first["detail"].startswith(detail)
    assert first["share"] > 0.8
    assert first["us"] >= 0.8 * event["latency_us"] > 0.8 * event["limit_us"]
    assert f"{kind} {culprit} ({detail}" in event["verdict"]


def test_a_recorded_trace_that_has_only_the_end_of_a_latency_does_not_tell(tmp_path: Path) -> None:
    options = recorded("serial", tmp_path / "serial")
    answer = json.loads((tmp_path / "serial/guest-break.json").read_text())
    write_json(tmp_path / "serial/guest-break.json", {**answer, "latency_us": 545084})
    assert attribution.run(options) == 0
    (event,) = json.loads((tmp_path / "serial/attribution.json").read_text())["events"]
    assert event["culprits"] == []
    assert "15924 earlier events did not fit in its buffer" in event["verdict"]


def test_a_recorded_trace_is_read_whole(tmp_path: Path) -> None:
    recorded("hog", tmp_path / "hog")
    text = (tmp_path / "hog/trace.txt").read_text()
    found: Trace = parse(text)
    assert len(found.events) == sum(not each.startswith("#") for each in text.splitlines())
    assert {event.comm for event in found.events} >= {"CPU 1/KVM", "hog", "<idle>"}
