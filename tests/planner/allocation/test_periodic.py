"""From recorded steps to a plan: unions of lifetimes, circular ones, and what is left to the native allocator."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megamem.errors import AllocationError
from megamem.ir.arena import NATIVE, OPTIONAL, ArenaPlan, Freed, StepRequests
from megamem.planner.allocation.periodic import plan_steps, union_of
from megamem.planner.allocation.solvers import make_solver

End = tuple[int, int] | int | None


def step(sizes: Sequence[int], ends: Sequence[End], shared: Sequence[int] = ()) -> StepRequests:
    """Ends are positions in the same step, or (steps later, position)."""
    freed = [
        None
        if end is None
        else Freed(steps=0, position=end)
        if isinstance(end, int)
        else Freed(steps=end[0], position=end[1])
        for end in ends
    ]
    return StepRequests(sizes=sizes, ends=freed, shared=frozenset(shared))


def lifetimes(*steps: StepRequests) -> tuple[tuple[int, int] | None, ...]:
    return union_of(steps).lifetimes


def plan(*steps: StepRequests) -> ArenaPlan:
    return plan_steps("kind", steps, min_size=0, solver=make_solver("auto"), time_limit=5)


def test_the_union_of_lifetimes() -> None:
    sizes = [1000, 2000, 3000]
    assert lifetimes(step(sizes, [1, 2, 3])) == ((0, 1), (1, 2), (2, 3))
    assert lifetimes(step(sizes, [1, 3, 3]), step(sizes, [2, 2, 3])) == ((0, 2), (1, 3), (2, 3))


def test_a_buffer_that_outlives_its_step_has_its_place_for_the_whole_of_it() -> None:
    sizes = [1000, 2000, 3000]
    crossing = [step(sizes, [1, 2, (1, 0)]), step(sizes, [1, 2, (1, 1)]), step(sizes, [1, 2, None])]
    assert lifetimes(*crossing) == ((0, 1), (1, 2), (0, 3))
    assert lifetimes(step(sizes, [1, 2, 3]), step(sizes, [1, 2, None])) == ((0, 1), (1, 2), (0, 3))


@pytest.mark.parametrize(
    "steps",
    [
        [step([1000], [(1, 1)]), step([1000], [None])],  # the next one comes before it is freed
        [step([1000], [(2, 0)]), step([1000], [(2, 0)]), step([1000], [None])],  # it outlives two steps
        [step([1000], [None]), step([1000], [None])],  # nobody frees it
        [step([1000], [None])],  # no end was seen
        [step([1000], [1], shared=[0]), step([1000], [1])],  # a second stream used it
        [step([1000], [1]), step([1500], [1])],  # its size varies
    ],
)
def test_what_cannot_have_one_place_is_the_native_allocator_s(steps: list[StepRequests]) -> None:
    made = plan(*steps)
    assert made.offsets == (NATIVE,) and made.num_planned == made.peak == made.lower_bound == 0


def test_requests_that_vary_stay_in_the_sequence() -> None:
    sizes = [1000, 2000, 3000, 4000, 5000, 6000]
    ends = [1, 2, 3, 4, 5, 6]
    longer = [*sizes[:3], 777, *sizes[3:]]
    made = plan(step(sizes, ends), step(longer, [1, 2, 3, 4, 5, 6, 7]))
    assert made.sizes == tuple(longer)
    assert [offset >= 0 for offset in made.offsets] == [True, True, True, False, True, True, True]
    assert made.offsets[3] == OPTIONAL
    other = [*sizes[:2], 9999, *sizes[3:]]
    made = plan(step(other, ends), step(sizes, ends))
    assert made.sizes[2] == 0 and made.offsets[2] == NATIVE and made.num_planned == 5


def test_ends_are_counted_in_the_requests_of_the_last_step() -> None:
    """The first step has a request more, so its ends come one later than in the last."""
    first = step([1000, 555, 2000, 3000], [3, 2, 4, 4])
    last = step([1000, 2000, 3000], [1, 3, 3])
    assert lifetimes(first, last) == ((0, 2), (1, 3), (2, 3))


def test_the_plan_is_a_solution_that_is_close_to_its_bound() -> None:
    sizes = [512 * (1 + (11 * i) % 17) for i in range(400)]
    ends = [min(400, i + 1 + (7 * i) % 23) for i in range(400)]
    made = plan(step(sizes, ends), step(sizes, ends))
    assert made.num_planned == 400 and 0 <= made.gap < 0.01
    for i in range(400):
        for j in range(i + 1, min(400, ends[i])):
            low, high = sorted((i, j), key=lambda at: made.offsets[at])
            assert made.offsets[low] + sizes[low] <= made.offsets[high]


def test_nothing_recorded_is_an_error() -> None:
    with pytest.raises(AllocationError, match="no step was recorded"):
        union_of([])
    assert plan(step([], [])).peak == 0
