"""What every family of schedules promises, whoever wrote it: the whole suite runs over all of `FAMILIES`."""

from __future__ import annotations

import functools
import itertools
import random
import re

import pytest

from megamem.errors import InfeasibleError
from megamem.ir.schedule import Schedule
from megamem.ir.workload import PipelineCosts, StageCost, Uniform
from megamem.planner.schedules.checker import accumulates_in_order, check_schedule
from megamem.planner.schedules.families import FAMILIES, build_schedule
from megamem.planner.schedules.family import Family, Request
from megamem.planner.schedules.simulator import simulate

RANKS = (1, 2, 4, 7)
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def chunk_choices(family: Family) -> list[int]:
    """The fewest chunks, and two more numbers where a family works with any."""
    least, most = family.min_chunks, family.max_chunks
    return [least] if most == least else [least, least + 1, 4] if most is None else list(range(least, most + 1))


def microbatch_choices(family: Family, ranks: int, chunks: int) -> list[int]:
    """From the fewest to a few full rounds, with numbers that nothing divides."""
    least = family.min_microbatches(Request(num_ranks=ranks, num_microbatches=1, num_chunks=chunks))
    return sorted({least + extra for extra in (0, 1, ranks, 2 * ranks + 1, 3 * ranks)})


def group_choices(family: Family, ranks: int) -> list[int | None]:
    """None, and sizes around half the ranks, all of them, and more."""
    return (
        [None, *sorted({(ranks + 1) // 2, ranks - 1, ranks, ranks + 1, 2 * ranks} - {0})]
        if family.uses_group
        else [None]
    )


@functools.cache
def unequal(ranks: int, chunks: int) -> PipelineCosts:
    """Stages of which no two are alike, the last with a W that costs nothing; memory that B gives back in part."""
    source = random.Random(f"{ranks} x {chunks}")
    stages = []
    for _ in range(ranks * chunks):
        activation = source.uniform(0.5, 2.0)
        stages.append(
            StageCost(
                forward=source.uniform(0.5, 2.0), backward=source.uniform(0.5, 3.0), weight=source.uniform(0.2, 2.0),
                activation=activation, weight_grad=activation * source.uniform(0.2, 1.0),
                offload=source.uniform(0.05, 0.5),
            )
        )  # fmt: skip
    last = stages[-1]
    stages[-1] = StageCost(forward=last.forward, backward=last.backward, weight=0.0)
    return PipelineCosts(stages=tuple(stages), comm=0.1)


def requests(family: Family) -> list[Request]:
    """The grid: ranks, chunks, groups and microbatches; costs take turns."""
    grid: list[Request] = []
    for ranks, chunks in itertools.product(RANKS, chunk_choices(family)):
        for group, microbatches in itertools.product(
            group_choices(family, ranks), microbatch_choices(family, ranks, chunks)
        ):
            workload = (Uniform(), unequal(ranks, chunks), Uniform(forward=7, backward=11, weight=3, comm=0.2))[
                len(grid) % 3
            ]
            grid.append(
                Request(
                    num_ranks=ranks, num_microbatches=microbatches, num_chunks=chunks, group=group, workload=workload
                )
            )  # fmt: skip
    return grid


def nearest(fault: InfeasibleError, request: Request) -> list[Request]:
    """The requests that a message proposes instead."""
    _, found, proposals = str(fault).partition("nearest: ")
    assert found, f"no nearest setting in {fault}"
    changed = []
    for amount, what in re.findall(r"(\d+) (microbatches|chunks)", proposals):
        changed.append(Request(**{**vars(request), f"num_{what}": int(amount)}))
    for amount in re.findall(r"group (\d+)", proposals):
        changed.append(Request(**{**vars(request), "group": int(amount)}))
    assert changed, f"no setting to try in {fault}"
    return changed


def peak(schedule: Schedule, request: Request) -> float:
    """Activation memory of the fullest rank."""
    return max(simulate(schedule, request.workload).peak_activation)


@families
def test_schedules_are_complete_free_of_deadlock_and_in_the_order_of_accumulation(family: Family) -> None:
    built = 0
    for request in requests(family):
        try:
            schedule = build_schedule(family.name, request)
        except InfeasibleError as fault:
            assert request.group is not None, f"{request}: {fault}"
            for other in nearest(fault, request):
                check_schedule(build_schedule(family.name, other))
            continue
        built += 1
        check_schedule(schedule)
        assert accumulates_in_order(schedule), request
        assert schedule.name == family.name
        assert schedule.placement == request.placement(family.shape)
        assert schedule.num_microbatches == request.num_microbatches
        kinds = {action.kind for _, action in schedule}
        assert kinds <= {"F", "B", "W", "BW"} | ({"OFFLOAD", "RELOAD"} if family.offloads else set())
    assert built >= len(RANKS) * len(chunk_choices(family)) * 4


@families
def test_a_request_gives_one_schedule(family: Family) -> None:
    for request in requests(family)[::7]:
        if request.group is None:
            assert build_schedule(family.name, request) == build_schedule(family.name, request)


@families
def test_costs_and_limits_matter_where_the_family_says_so_and_nowhere_else(family: Family) -> None:
    changed = False
    for ranks in (3, 4, 8):
        plain = Request(num_ranks=ranks, num_microbatches=3 * ranks, num_chunks=family.min_chunks)
        first = build_schedule(family.name, plain)
        for workload in (
            unequal(ranks, family.min_chunks),
            Uniform(forward=7, backward=11, weight=3, comm=0.2, weight_grad=0.4, offload=0.5),
            Uniform(forward=3, backward=2, weight=9, comm=1, offload=3),
        ):
            limits = [None, 4.0 * ranks] if family.uses_limit else [None]
            for limit in limits:  # with room for more, costs say what to do with it
                costly = Request(**{**vars(plain), "workload": workload, "memory_limit": limit})
                changed |= build_schedule(family.name, costly).ranks != first.ranks
        if not family.uses_limit:
            assert build_schedule(family.name, Request(**{**vars(plain), "memory_limit": 1.5})) == first
        if changed:
            break
    assert changed == family.uses_costs


@families
def test_a_limit_is_kept_or_refused_with_one_that_can_be_kept(family: Family) -> None:
    if not family.uses_limit:
        pytest.skip("not made to fit a limit")
    for ranks in (1, 2, 5):
        for workload in (Uniform(), Uniform(weight_grad=0.4), unequal(ranks, family.min_chunks)):
            request = Request(
                num_ranks=ranks, num_microbatches=2 * ranks + 1, num_chunks=family.min_chunks, workload=workload
            )
            free = peak(build_schedule(family.name, request), request)
            for share in (2.0, 1.0, 0.8, 0.5, 0.25, 0.1):
                limited = Request(**{**vars(request), "memory_limit": share * free})
                try:
                    schedule = build_schedule(family.name, limited)
                except InfeasibleError as fault:
                    proposed = re.search(r"nearest: ([-+.e\d]+)", str(fault))
                    assert proposed is not None, fault
                    limited = Request(**{**vars(request), "memory_limit": float(proposed[1])})
                    assert limited.memory_limit is not None
                    assert limited.memory_limit > share * free
                    schedule = build_schedule(family.name, limited)
                check_schedule(schedule, costs=workload, memory_limit=limited.memory_limit)


@families
def test_what_a_family_cannot_do_is_refused_with_the_nearest_that_it_can(family: Family) -> None:
    good = Request(
        num_ranks=4, num_chunks=family.min_chunks,
        num_microbatches=family.min_microbatches(
            Request(num_ranks=4, num_chunks=family.min_chunks, num_microbatches=1)
        ) + 8,
    )  # fmt: skip
    bad = []
    if family.min_chunks > 1:
        bad.append({"num_chunks": family.min_chunks - 1})
    if family.max_chunks is not None:
        bad.append({"num_chunks": family.max_chunks + 3})
    if family.min_microbatches(good) > 1:
        bad.append({"num_microbatches": family.min_microbatches(good) - 1})
    if family.uses_group:
        bad.append({"group": 1})
    for change in bad:
        request = Request(**{**vars(good), **change})
        with pytest.raises(InfeasibleError, match=family.name) as caught:
            build_schedule(family.name, request)
        for other in nearest(caught.value, request):
            check_schedule(build_schedule(family.name, other))
    if not family.uses_group:
        with pytest.raises(InfeasibleError, match="no groups"):
            build_schedule(family.name, Request(**{**vars(good), "group": 2}))


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InfeasibleError, match="no schedule; there are 1f1b, interleaved"):
        build_schedule("2f2b", Request(num_ranks=2, num_microbatches=4))


@families
def test_one_rank_runs_without_waiting(family: Family) -> None:
    request = Request(
        num_ranks=1, num_microbatches=5, num_chunks=family.min_chunks, workload=Uniform(forward=2, backward=3, weight=1)
    )
    assert simulate(build_schedule(family.name, request), request.workload).makespan == pytest.approx(5 * 6)
