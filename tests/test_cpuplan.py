"""The guest's CPU plan, and the words that plans are made of: every way to name a set of CPUs means the same set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cpuplan import RULES, GuestPlan, PlanError, affinity_mask, guest_plan
from pipeline.topology import TopologyError
from tests.machines import expand

CPUS = st.sets(st.integers(0, 300))
PLANS = st.tuples(st.integers(1, 8), st.integers(1, 60)).map(lambda n: guest_plan(sum(n), n[0]))


@given(CPUS)
def test_a_mask_has_a_bit_for_each_cpu(cpus: set[int]) -> None:
    """Read as the kernel reads it: groups of 32 bits in hexadecimal, the highest first."""
    groups = affinity_mask(cpus).split(",")
    assert all(len(group) == 8 for group in groups[1:]) and len(groups[0]) <= 8
    value = sum(int(group, 16) << 32 * index for index, group in enumerate(reversed(groups)))
    assert {bit for bit in range(352) if value >> bit & 1} == cpus


@pytest.mark.parametrize(
    ("cpus", "text"),
    [((), "0"), ((0,), "1"), ((0, 8), "101"), ((31, 32), "1,80000000"), ((64,), "1,00000000,00000000")],
)
def test_a_mask_as_the_kernel_writes_it(cpus: tuple[int, ...], text: str) -> None:
    assert affinity_mask(cpus) == text


@given(PLANS)
def test_each_vcpu_is_on_one_side(plan: GuestPlan) -> None:
    assert sorted(plan.housekeeping + plan.isolated) == list(
        range(len(plan.housekeeping) + len(plan.isolated))
    )
    assert 0 in plan.housekeeping
    assert plan.isolated


@given(PLANS)
def test_command_line_names_the_plan(plan: GuestPlan) -> None:
    options = dict(option.partition("=")[::2] for option in plan.command_line("PARTLABEL=x", "ttyS0").split())
    assert expand(options["isolcpus"].removeprefix("domain,managed_irq,")) == list(plan.isolated)
    assert expand(options["nohz_full"]) == expand(options["rcu_nocbs"]) == list(plan.isolated)
    assert expand(options["irqaffinity"]) == list(plan.housekeeping)


def test_command_line_as_it_reads() -> None:
    line = guest_plan(4, 1).command_line("PARTLABEL=x", "ttyS0", extra=["quiet"])
    assert line == (
        "root=PARTLABEL=x rw console=ttyS0 isolcpus=domain,managed_irq,1-3 nohz_full=1-3 rcu_nocbs=1-3 "
        "rcu_nocb_poll irqaffinity=0 quiet"
    )


@pytest.mark.parametrize(
    ("vcpus", "housekeeping", "rule", "alternatives"),
    [
        (2, 0, "guest-housekeeping", ("housekeeping_vcpus = 1",)),
        (2, -1, "guest-housekeeping", ("housekeeping_vcpus = 1",)),
        (1, 0, "guest-housekeeping", ()),
        (1, 1, "guest-realtime", ("vcpus = 2",)),
        (2, 3, "guest-realtime", ("housekeeping_vcpus = 1", "vcpus = 4")),
    ],
)
def test_refuses_an_empty_side(
    vcpus: int, housekeeping: int, rule: str, alternatives: tuple[str, ...]
) -> None:
    with pytest.raises(PlanError) as refusal:
        guest_plan(vcpus, housekeeping)
    assert refusal.value.rule == rule
    assert refusal.value.alternatives == alternatives
    assert refusal.value.hint


def test_a_refusal_begins_with_its_rule_and_ends_with_what_to_write() -> None:
    refusal = PlanError("one-node", "it is on two", "move it", alternatives=["pins = 1", "pins = 2"])
    assert (refusal.message, refusal.hint) == ("one-node: it is on two", "write pins = 1")
    assert refusal.exit_status == 2
    refusal.choose([])
    assert (refusal.alternative, refusal.hint) == ("", "move it")


def test_each_rule_is_a_word_and_a_sentence() -> None:
    for rule, sentence in RULES.items():
        assert rule == rule.lower() and " " not in rule
        assert len(sentence.split()) > 4


def test_refuses_negative_numbers() -> None:
    with pytest.raises(TopologyError, match="CPU -1"):
        affinity_mask([-1])
