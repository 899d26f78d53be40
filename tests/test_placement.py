"""Plans of hosts: over any machine and any guests a plan is refused by a known rule, or keeps every rule.

What the rules mean is written here a second time, on the plain lists, without the code that places.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pipeline.cpuplan import ADVICE, HUGEPAGES, RULES, GuestRequest, HostPlan, PlanError
from pipeline.placement import host_plan
from pipeline.topology import Node, PciDevice, Topology
from tests.machines import expand, hosts, topologies

Host = tuple[Topology, dict[str, GuestRequest], str | None]


def check(plan: HostPlan, topology: Topology, guests: Mapping[str, GuestRequest], asked: str | None) -> None:
    """Every rule, from the machine's and the guests' own words."""
    sockets = [set(expand(text)) for text in topology.sockets]
    nodes = {node.id: set(expand(node.cpus)) for node in topology.nodes}
    every = set().union(*sockets)
    cores = [set(expand(text)) for text in topology.cores]
    cores += [{cpu} for cpu in every - set().union(*cores)]
    quiet = set(plan.housekeeping)
    # host
    assert quiet | set(plan.isolated) == every and not quiet & set(plan.isolated)
    assert plan.isolated and 0 in quiet
    assert all(quiet & socket for socket in sockets)
    assert all(core <= quiet or not core & quiet for core in cores)
    if asked is not None:
        assert quiet == set(expand(asked))
    # guests
    assert set(plan.guests) == set(guests)
    for name, request in guests.items():
        guest = plan.guests[name]
        assert len(guest.pins) == len(set(guest.pins)) == request.vcpus
        assert set(guest.pins) <= set(plan.isolated)
        assert sum(bool(set(guest.pins) & socket) for socket in sockets) == 1
        assert set(guest.pins) <= nodes[guest.node]
        assert len(guest.split.housekeeping) == request.housekeeping_vcpus >= 1
        assert len(guest.split.isolated) == request.vcpus - request.housekeeping_vcpus >= 1
        assert guest.emulator and set(guest.emulator) <= quiet
        home = next(socket for socket in sockets if set(guest.pins) <= socket)
        if request.emulator_cpus is None:
            assert set(guest.emulator) == quiet & home
        else:
            assert list(guest.emulator) == sorted(expand(request.emulator_cpus))
        if request.pins is not None:
            assert list(guest.pins) == expand(request.pins)
        page_kib = HUGEPAGES[request.hugepages]
        assert guest.hugepages * page_kib == (request.memory_mib * 1024 if page_kib else 0)
    for one, other in itertools.combinations(plan.guests.values(), 2):
        assert not set(one.pins) & set(other.pins)
        assert not any(core & set(one.pins) and core & set(other.pins) for core in cores)
    for node in topology.nodes:
        asked_of = sum(
            guests[name].memory_mib for name, guest in plan.guests.items() if guest.node == node.id
        )
        assert not asked_of or asked_of + 512 <= node.memory_mib
    # what is said about it
    far = {
        (name, "device-node")
        for name, request in guests.items()
        for address in request.devices.values()
        for device in topology.devices
        if device.address == address and device.node is not None and device.node != plan.guests[name].node
    }
    assert {(w.subject, w.advice) for w in plan.warnings if w.advice == "device-node"} == far
    shared = {
        name
        for name, guest in plan.guests.items()
        for core in cores
        for vcpu in guest.split.isolated
        if guest.pins[vcpu] in core and len(core & set(guest.pins)) > 1
    }
    assert {w.subject for w in plan.warnings if w.advice == "core-shared"} == shared


@given(hosts())
@settings(max_examples=400, deadline=None)
def test_a_plan_is_refused_or_keeps_every_rule(host: Host) -> None:
    topology, guests, asked = host
    try:
        plan = host_plan(topology, guests, asked)
    except PlanError as refusal:
        event(f"refused: {refusal.rule}")
        assert refusal.rule in RULES
        assert refusal.message.startswith(f"{refusal.rule}: ")
        assert refusal.hint
        assert refusal.subject in {"platform", *guests}
        return
    event("planned")
    check(plan, topology, guests, asked)


@given(hosts())
@settings(max_examples=400, deadline=None)
def test_what_a_refusal_says_to_write_ends_it(host: Host) -> None:
    """Doing what is said, again and again, is never told the same twice in a row, and comes to an end."""
    topology, guests, asked = host
    guests = dict(guests)
    for _ in range(40):
        try:
            plan = host_plan(topology, guests, asked)
        except PlanError as refusal:
            before = (refusal.rule, refusal.subject)
            if not refusal.alternative:
                return
            assert refusal.hint == f"write {refusal.alternative}"
            written = tomllib.loads(refusal.alternative)
            if refusal.subject == "platform":
                asked = written["housekeeping_cpus"]
            else:
                guests[refusal.subject] = replace(guests[refusal.subject], **written)
            try:
                host_plan(topology, guests, asked)
            except PlanError as after:
                assert (after.rule, after.subject) != before
        else:
            check(plan, topology, guests, asked)
            return
    pytest.fail("the advice goes round in circles")


@given(topologies(), st.integers(2, 4))
@settings(max_examples=200, deadline=None)
def test_a_guest_that_fits_on_some_node_is_placed(topology: Topology, vcpus: int) -> None:
    """One guest without wishes is refused only where no socket's part of a node has the CPUs, or the memory."""
    request = GuestRequest(vcpus=vcpus, housekeeping_vcpus=1, memory_mib=256)
    quiet = {
        cpu
        for text in topology.sockets
        for cpu in next(
            (expand(core) for core in topology.cores if min(expand(text)) in expand(core)),
            [min(expand(text))],
        )
    }
    fits = any(
        len(set(expand(node.cpus)) & set(expand(socket)) - quiet) >= vcpus and node.memory_mib >= 256 + 512
        for node in topology.nodes
        for socket in topology.sockets
    )
    try:
        host_plan(topology, {"a": request})
    except PlanError as refusal:
        assert not fits
        assert refusal.rule in ("isolated-enough", "memory-fits")
    else:
        assert fits


# Plans as they read ------------------------------------------------------------------------------------


def machine(
    sockets: int = 2, cores: int = 8, memory_mib: int = 32768, devices: tuple[PciDevice, ...] = ()
) -> Topology:
    """Sockets without SMT, a node each."""
    lists = [f"{n * cores}-{n * cores + cores - 1}" for n in range(sockets)]
    nodes = tuple(Node(id=n, cpus=text, memory_mib=memory_mib) for n, text in enumerate(lists))
    return Topology(description="a machine", sockets=tuple(lists), nodes=nodes, devices=devices)


def guest(vcpus: int = 2, memory_mib: int = 1024, **wishes: object) -> GuestRequest:
    """A guest with one housekeeping vCPU."""
    return replace(GuestRequest(vcpus=vcpus, housekeeping_vcpus=1, memory_mib=memory_mib), **wishes)  # type: ignore[arg-type]


def test_the_first_core_of_each_socket_keeps_house() -> None:
    plan = host_plan(machine(), {"a": guest()})
    assert (plan.housekeeping, plan.isolated) == ((0, 8), (*range(1, 8), *range(9, 16)))
    assert plan.guests["a"].pins == (1, 2)
    assert plan.guests["a"].emulator == (0,)


def test_guests_fill_a_socket_before_the_next_and_named_cpus_are_left_to_who_names_them() -> None:
    plan = host_plan(machine(), {"a": guest(3), "b": guest(5), "c": guest(4, pins="9-12")})
    assert {name: placed.pins for name, placed in plan.guests.items()} == {
        "a": (13, 14, 15),
        "b": (1, 2, 3, 4, 5),
        "c": (9, 10, 11, 12),
    }
    assert [plan.owner(cpu) for cpu in (0, 1, 9, 6)] == ["housekeeping", "b:0", "c:0", "idle"]


def test_a_guest_goes_to_the_node_of_its_device() -> None:
    card = PciDevice(address="0000:81:00.0", node=1, description="card")
    wish = {("devices", "0"): "0000:81:00.0"}
    plan = host_plan(machine(devices=(card,)), {"a": guest(devices=wish)})
    assert plan.guests["a"].node == 1
    assert plan.warnings == ()


def test_vcpus_get_cores_of_their_own_and_one_cache_where_there_are_enough() -> None:
    smt = Topology(
        description="eight cores in two caches",
        sockets=("0-15",),
        cores=tuple(f"{n},{n + 8}" for n in range(8)),
        caches=("0-3,8-11", "4-7,12-15"),
        nodes=(Node(id=0, cpus="0-15", memory_mib=8192),),
    )
    plan = host_plan(smt, {"a": guest(4), "b": guest(3)})
    assert plan.guests["a"].pins == (4, 5, 6, 7)
    assert plan.guests["b"].pins == (1, 2, 3)
    assert plan.warnings == ()
    shared = host_plan(smt, {"a": guest(8)})
    assert [w.advice for w in shared.warnings] == ["core-shared"]
    assert shared.warnings[0].keys == ("vcpus",)


def test_a_node_across_sockets_does_not_lead_a_guest_across_them() -> None:
    flat = Topology(
        description="two sockets, one node",
        sockets=("0-3", "4-7"),
        nodes=(Node(id=0, cpus="0-7", memory_mib=8192),),
    )
    assert host_plan(flat, {"a": guest(3), "b": guest(3)}).guests["b"].pins == (5, 6, 7)
    with pytest.raises(PlanError, match="vcpus = 4: at most 3 isolated CPUs are free"):
        host_plan(flat, {"a": guest(4)})


CARD = PciDevice(address="0000:01:00.0", node=0, description="card")
WARNED = {
    "device-node": guest(pins="9,10", devices={("devices", "0"): "0000:01:00.0"}),
    "device-known": guest(devices={("devices", "1"): "0000:02:00.0"}),
    "emulator-near": guest(pins="9,10", emulator_cpus="0"),
}


@pytest.mark.parametrize("advice", WARNED)
def test_what_will_be_regretted_is_said(advice: str) -> None:
    plan = host_plan(machine(devices=(CARD,)), {"a": WARNED[advice]})
    assert [w.advice for w in plan.warnings] == [advice]
    assert plan.warnings[0].hint
    assert plan.to_json()["warnings"][0]["subject"] == "a"


def test_every_advice_is_shown_here() -> None:
    assert {*WARNED, "core-shared"} == set(ADVICE)


def test_one_node_needs_no_words_about_devices() -> None:
    plan = host_plan(machine(1), {"a": guest(devices={("devices", "0"): "0000:02:00.0"})})
    assert plan.warnings == ()


def test_pins_that_collide_are_answered_with_some_that_nobody_names() -> None:
    asked = {"a": guest(3, pins="9-11"), "b": guest(3, pins="11-13"), "c": guest(3, pins="1-3")}
    with pytest.raises(PlanError) as refusal:
        host_plan(machine(), asked)
    assert refusal.value.message == "one-guest-per-cpu: pins = '11-13': CPU 11 is guest a's"
    assert refusal.value.alternative == 'pins = "4-6"'


def test_fewer_vcpus_are_offered_only_where_that_helps() -> None:
    with pytest.raises(PlanError) as refusal:
        host_plan(machine(), {"a": guest(9), "b": guest(7), "c": guest(7)})
    assert "at most 7 isolated CPUs are free on one socket" in refusal.value.message
    assert refusal.value.alternatives
    tight = machine(1, 3)
    with pytest.raises(PlanError) as hopeless:
        host_plan(tight, {"a": guest(2), "b": guest(2)})
    assert hopeless.value.alternatives == ()
    assert hopeless.value.hint == "put it on another platform, or give other guests fewer vCPUs"


def test_a_plan_for_tools_names_policy_and_pages() -> None:
    plan = host_plan(
        machine(),
        {"a": guest(3, 2048, hugepages="1G", pins="9-11"), "b": guest(2, hugepages="2M", pins="1,2")},
    )
    document = plan.to_json()
    assert document["hugepages"] == [
        {"node": 0, "size_kib": 2048, "count": 512},
        {"node": 1, "size_kib": 1048576, "count": 2},
    ]
    assert document["guests"]["a"]["vcpus"] == [
        {"vcpu": 0, "cpu": 9, "policy": "other", "priority": 0},
        {"vcpu": 1, "cpu": 10, "policy": "fifo", "priority": 1},
        {"vcpu": 2, "cpu": 11, "policy": "fifo", "priority": 1},
    ]
    assert document["sockets"] == [list(range(8)), list(range(8, 16))]
