"""The validator against the definition, pair by pair."""

import random
import time

import pytest
from random_problems import random_problem

from megamem.errors import AllocationError
from megamem.ir.allocation import Buffer, Problem, Solution
from megamem.planner.allocation.validator import OrderedRanks, check, find_fault


def is_valid(solution: Solution) -> bool:
    """The definition, in quadratic time."""
    placed = list(solution)
    return all(offset >= 0 for offset, _ in placed) and all(
        not one.overlaps(other) or at + one.size <= there or there + other.size <= at
        for number, (at, one) in enumerate(placed)
        for there, other in placed[:number]
    )


def test_it_agrees_with_the_definition() -> None:
    rng = random.Random(11)
    valid = 0
    for seed in range(3000):
        problem = random_problem(seed, horizon=6, largest=4)
        offsets = tuple(rng.randrange(-1 if seed % 50 == 0 else 0, 14) for _ in problem.buffers)
        solution = Solution(problem=problem, offsets=offsets)
        valid += is_valid(solution)
        assert (find_fault(solution) is None) == is_valid(solution), solution
    assert 200 < valid < 2800


def test_it_names_what_is_wrong() -> None:
    a, b = Buffer(id="a", lower=0, upper=4, size=10), Buffer(id="b", lower=3, upper=9, size=10)
    problem = Problem(buffers=(a, b))
    check(Solution(problem=problem, offsets=(0, 10)), capacity=20)
    with pytest.raises(AllocationError, match=r"instant 3 buffer 'a' .* bytes \[0, 10\).*'b' .* \[9, 19\)"):
        check(Solution(problem=problem, offsets=(0, 9)))
    with pytest.raises(AllocationError, match="'b' has the negative offset -1"):
        check(Solution(problem=problem, offsets=(0, -1)))
    with pytest.raises(AllocationError, match="'b' ends at 20, beyond the capacity of 19"):
        check(Solution(problem=problem, offsets=(0, 10)), capacity=19)


def test_a_buffer_may_follow_another_at_once() -> None:
    a, b = Buffer(id="a", lower=0, upper=4, size=10), Buffer(id="b", lower=4, upper=9, size=10)
    assert find_fault(Solution(problem=Problem(buffers=(b, a)), offsets=(0, 0))) is None


@pytest.mark.parametrize("size", [1, 2, 511, 512, 513, 300_000])
def test_neighbours_in_a_set_of_ranks(size: int) -> None:
    rng = random.Random(size)
    ranks, model = OrderedRanks(size), set()
    for _ in range(300):
        number = rng.randrange(size)
        if number in model:
            model.discard(number)
            ranks.remove(number)
        else:
            model.add(number)
            ranks.add(number)
        probe = rng.randrange(size)
        assert ranks.below(probe) == max((other for other in model if other < probe), default=None)
        assert ranks.above(probe) == min((other for other in model if other > probe), default=None)


def test_time_grows_little_faster_than_the_problem() -> None:
    """All live at once is the worst case: eight times the buffers take far less than 64 times the time."""

    def seconds(count: int) -> float:
        buffers = tuple(Buffer(id=str(i), lower=i, upper=10**6 + i, size=1) for i in range(count))
        order = list(range(count))
        random.Random(1).shuffle(order)
        solution = Solution(problem=Problem(buffers=buffers), offsets=tuple(order))
        begin = time.process_time()
        check(solution)
        return time.process_time() - begin

    assert min(seconds(40_000) for _ in range(3)) < 40 * min(seconds(5_000) for _ in range(3))
