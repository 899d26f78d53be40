"""The guest's CPU plan: every way to name a set of CPUs means the same set."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cpuplan import GuestPlan, PlanError, affinity_mask, cpulist, guest_plan

CPUS = st.sets(st.integers(0, 300))
PLANS = st.tuples(st.integers(1, 8), st.integers(1, 60)).map(lambda n: guest_plan(sum(n), n[0]))


def expand(text: str) -> set[int]:
    """Independent reader of the kernel's list format."""
    found: set[int] = set()
    for part in text.split(",") if text else []:
        first, *last = (int(number) for number in part.split("-"))
        found |= {first} | set(range(first, last[0] + 1) if last else ())
    return found


@given(CPUS)
def test_list_and_mask_name_the_same_cpus(cpus: set[int]) -> None:
    assert expand(cpulist(cpus)) == cpus
    assert {bit for bit in range(301) if affinity_mask(cpus) >> bit & 1} == cpus
    assert affinity_mask(cpus) < 1 << 301


@given(CPUS)
def test_list_is_the_shortest(cpus: set[int]) -> None:
    """Ascending, and no two parts that could be one."""
    ends = [[int(number) for number in part.split("-")] for part in cpulist(cpus).split(",") if part]
    assert all(later[0] > earlier[-1] + 1 for earlier, later in itertools.pairwise(ends))
    assert all(len(end) == 1 or end[0] < end[1] for end in ends)


@pytest.mark.parametrize(("cpus", "text"), [((), ""), ((1,), "1"), ((1, 2, 3), "1-3"), ((3, 0, 2), "0,2-3")])
def test_list_as_the_kernel_writes_it(cpus: tuple[int, ...], text: str) -> None:
    assert cpulist(cpus) == text


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
    assert expand(options["isolcpus"].removeprefix("domain,managed_irq,")) == set(plan.isolated)
    assert expand(options["nohz_full"]) == expand(options["rcu_nocbs"]) == set(plan.isolated)
    assert expand(options["irqaffinity"]) == set(plan.housekeeping)


def test_command_line_as_it_reads() -> None:
    line = guest_plan(4, 1).command_line("PARTLABEL=x", "ttyS0", extra=["quiet"])
    assert line == (
        "root=PARTLABEL=x rw console=ttyS0 isolcpus=domain,managed_irq,1-3 nohz_full=1-3 rcu_nocbs=1-3 "
        "rcu_nocb_poll irqaffinity=0 quiet"
    )


@pytest.mark.parametrize(
    ("vcpus", "housekeeping", "said"),
    [
        (2, 0, "housekeeping_vcpus = 0"),
        (2, -1, "no vCPU is left for the guest"),
        (1, 1, "vcpus = 1"),
        (2, 3, "no vCPU is left"),
    ],
)
def test_refuses_an_empty_side(vcpus: int, housekeeping: int, said: str) -> None:
    with pytest.raises(PlanError, match=said) as refusal:
        guest_plan(vcpus, housekeeping)
    assert "or more" in refusal.value.hint


@pytest.mark.parametrize("name", [cpulist, affinity_mask])
def test_refuses_negative_numbers(name: object) -> None:
    assert callable(name)
    with pytest.raises(PlanError, match="CPU -1"):
        name([-1])
