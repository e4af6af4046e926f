"""What no schedule can undercut, to see how far a found one may be from the best there is.

**Makespan.** A rank can do nothing before its first input is there, and nothing but F before its first gradient is
back; within the memory limit these are at most `limit` worth of F. After its last F the same holds the other way round:
what is left to do there is at most what the memory holds, while the chain of that microbatch still has to run to its
end. The rest of the time may be spent on work; so the bound of a rank is its work and those two times of idleness.

**Memory.** One microbatch alone holds all its chunks before its first B: no schedule needs less, and one microbatch at
a time needs no more. For a steady state without idle time, Little's law: a rank holds its stages' lifespans divided by
the period, and no lifespan is shorter than the chain from its F to its B.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from megamem.planner.schedules.search.problem import Problem


class Bounds(NamedTuple):
    """Of one placement.

    makespan:       no schedule within the memory limit is faster
    steady_memory:  no schedule without idle time in its steady state holds less on its fullest rank
    memory:         no schedule at all holds less; one that runs one microbatch at a time reaches it
    """

    makespan: float
    steady_memory: float
    memory: float


def bounds(problem: Problem) -> Bounds:
    """The bounds of a placement, from its costs and its limit."""
    ranks = range(problem.num_ranks)
    return Bounds(
        makespan=max(max(_rank_makespan(problem, rank) for rank in ranks), _chain(problem)),
        steady_memory=max(_steady_memory(problem, rank) for rank in ranks),
        memory=max(sum(problem.take[stage] for stage in problem.stages_of(rank)) for rank in ranks),
    )


def _chain(problem: Problem) -> float:
    """One microbatch there and back, and its last W."""
    return sum(problem.forward) + sum(problem.backward) + 2 * sum(problem.hop) + problem.weight[0]


def _until_back(problem: Problem, stage: int) -> float:
    """From the end of F of `stage` to the start of its B: up the stages above, and down."""
    above = range(stage + 1, problem.num_stages)
    return sum(problem.forward[s] + problem.backward[s] for s in above) + 2 * sum(problem.hop[stage:])


def _rank_makespan(problem: Problem, rank: int) -> float:
    stages, count = problem.stages_of(rank), problem.num_microbatches
    forward, backward, weight = problem.forward, problem.backward, problem.weight
    work = count * sum(forward[stage] + backward[stage] + weight[stage] for stage in stages)
    first, last = stages[0], stages[-1]
    arrival = sum(forward[:first]) + sum(problem.hop[:first])
    # The first B of the rank is that of its last stage.
    first_b = sum(forward[: last + 1]) + sum(problem.hop[:last]) + _until_back(problem, last)
    early = min(
        _most_work(problem, [(problem.take[s], forward[s]) for s in stages]),
        count * sum(map(forward.__getitem__, stages)),
    )
    before = max(arrival, first_b - early)
    # After the last F of the rank its microbatch has at least this way to go, and `pending` is all there is to do.
    rest = _until_back(problem, last) + sum(backward[: last + 1]) + sum(problem.hop[:last])
    pending = [(problem.take[s], backward[s] + weight[s]) for s in stages] + [
        (problem.kept[s], weight[s]) for s in stages
    ]
    after = max(0.0, rest - _most_work(problem, pending))
    if count * sum(problem.take[stage] for stage in stages) <= problem.limit:
        return work + max(before, after)  # all F may come before the first B: the two times may be one
    return work + before + after


def _most_work(problem: Problem, items: list[tuple[float, float]]) -> float:
    """The most time that items of (memory, time) can be worth within the limit."""
    if math.isinf(problem.limit) or any(size <= 0 < seconds for size, seconds in items):
        return math.inf
    return max((problem.limit * seconds / size for size, seconds in items if size > 0), default=0.0)


def _steady_memory(problem: Problem, rank: int) -> float:
    total = 0.0
    for stage in problem.stages_of(rank):
        lifespan = problem.forward[stage] + _until_back(problem, stage) + problem.backward[stage]
        total += problem.take[stage] * lifespan + problem.kept[stage] * problem.weight[stage]
    return total / problem.period
