"""Modulo scheduling of the steady state, and its unrolling into a whole step.

In the steady state one microbatch enters per period T (the initiation interval: the work of one microbatch on the
busiest rank), and everything repeats with T. So a schedule is a start time per F and B of one microbatch such that, on
the circle of length T of each rank, no two of them overlap; W fills what is left of the circle. A stage holds its
activations for its lifespan, so a rank holds the sum of its stages' lifespans over T (Little's law): the waits in the
chain F(0) .. F(S-1), B(S-1) .. B(0) are what memory is spent on.

    place     earliest fit of the chain on the circles, with a wish of extra waits
    search    over the waits, for the least makespan after `unroll`, which makes the warm-up and the cool-down

Equal slots leave no splinters on a circle, unequal ones do; so the chain may be placed with rounded costs (`rounded`)
while the orders that come out are priced with the real ones.

Rau, Iterative modulo scheduling (MICRO 1994) is the general method; building blocks (arXiv 2405.15362, section 3) are
the special case in which every rank has the same circle, turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from megamem.planner.schedules.search.problem import Outcome, Problem
from megamem.planner.schedules.search.unroll import Chain, unroll

SHAPES = ((1.0, 1.0, 1.0), (2.0, 2.0, 1.0), (2.0, 3.0, 1.0), (2.0, 4.0, 1.0), (3.0, 4.0, 2.0))
"""F : B : W that fill a circle without splinters."""


def rounded(problem: Problem, shape: tuple[float, float, float]) -> Problem:
    """The problem with equal stages of F : B : W as in `shape`, the same period, and no latency."""
    beat = problem.period / problem.placement.num_chunks / sum(shape)
    stages = problem.num_stages
    forward, backward, weight = (tuple([share * beat] * stages) for share in shape)
    return replace(problem, forward=forward, backward=backward, weight=weight, hop=(0.0,) * stages)


def place(problem: Problem, waits: Sequence[float]) -> Chain | None:
    """Earliest fit of one microbatch on the circles. None where a step no longer fits.

    waits: extra delay before each F in order of stage, then before each B in the order in which they run
    """
    period, ranks, hop = problem.period, problem.ranks, problem.hop
    circles = [_Circle(period) for _ in range(problem.num_ranks)]
    stages, time = problem.num_stages, 0.0
    forward, backward = [0.0] * stages, [0.0] * stages
    for stage in range(stages):
        start = circles[ranks[stage]].put(time + waits[stage], problem.forward[stage])
        if start is None:
            return None
        forward[stage] = start
        time = start + problem.forward[stage] + (hop[stage] if stage + 1 < stages else 0.0)
    for stage in reversed(range(stages)):
        start = circles[ranks[stage]].put(time + waits[2 * stages - 1 - stage], problem.backward[stage])
        if start is None:
            return None
        backward[stage] = start
        time = start + problem.backward[stage] + hop[stage - 1]
    return forward, backward


class _Circle:
    """The free arcs of a rank's period: start within the period, and length."""

    def __init__(self, period: float) -> None:
        self.period, self.hair = period, 1e-9 * period
        self.arcs = [(0.0, period)]

    def put(self, ready: float, seconds: float) -> float | None:
        """Take the first `seconds` that are free from `ready` on; their start."""
        period, hair = self.period, self.hair
        if not self.arcs:
            return None
        if self.arcs[0][1] > period - hair:  # nothing there yet
            self.arcs = [((ready + seconds) % period, period - seconds)]
            return ready
        best, found, phase = math.inf, -1, ready % period
        for index, (start, length) in enumerate(self.arcs):
            if length < seconds - hair:
                continue
            into = (phase - start) % period
            if into > period - hair:
                into = 0.0
            wait = 0.0 if into + seconds <= length + hair else (start - phase) % period
            if wait < best:
                best, found = wait, index
        if found < 0:
            return None
        start, length = self.arcs[found]
        into = (phase + best - start) % period
        if into > period - 1e3 * hair:
            into = 0.0
        rests = ((start, into), ((start + into + seconds) % period, length - into - seconds))
        self.arcs[found : found + 1] = [arc for arc in rests if arc[1] > 1e3 * hair]
        return ready + best


def steady_peak(problem: Problem, chain: Chain) -> float:
    """The most memory any rank holds in the steady state, if W follows its B at once."""
    period, worst = problem.period, 0.0
    for rank in range(problem.num_ranks):
        level, events = 0.0, []
        for stage in problem.stages_of(rank):
            start, size = chain[0][stage], problem.take[stage]
            alive = chain[1][stage] + problem.backward[stage] + problem.weight[stage] - start
            whole, rest = divmod(alive, period)
            level += whole * size
            begin = start % period
            end = (begin + rest) % period
            level += size if end < begin else 0.0
            events += [(begin, size), (end - 1e-7 * period, -size)]
        events.sort()
        worst = max(worst, level)
        for _, change in events:
            level += change
            worst = max(worst, level)
    return worst


def climb(
    problem: Problem,
    slots: Problem,
    price: Callable[[Outcome], Outcome | None],
    go_on: Callable[[float], bool],
    tries: int,
    seed: int = 0,
) -> Outcome | None:
    """Change the waits at random and keep what is no worse. None where no steady state fits the memory.

    slots: the costs with which the chain is placed: those of `problem`, or rounded ones
    price: an unrolled schedule with the costs of `problem`
    go_on: told the steps that were evaluated; says whether there may be more
    tries: how many schedules are unrolled at most; placing alone costs next to nothing
    """
    random, stages = Random(seed), problem.num_stages
    unit = problem.period / problem.placement.num_chunks / 3
    waits, best, found = [0.0] * (2 * stages), (math.inf, math.inf), None
    for number in range(20 * tries):
        trial = _changed(waits, unit, random) if number else waits
        if not go_on(4 * stages):
            break
        chain = place(slots, trial)
        if chain is None:
            continue
        peak, outcome = steady_peak(slots, chain), None
        if peak <= problem.limit and (peak <= best[1] or random.random() < 0.3):
            tries -= 1
            if not go_on(6 * problem.num_steps) or tries < 0:
                break
            if (unrolled := unroll(slots, chain)) is not None:
                outcome = price(unrolled)
        score = (outcome.makespan if outcome else math.inf, peak)
        if score <= best:
            best, waits = score, trial
            found = outcome or found
    return found


def _changed(waits: list[float], unit: float, random: Random) -> list[float]:
    """A few waits set or taken away, and sometimes a third of all taken away."""
    trial = list(waits)
    for _ in range(random.choice((1, 1, 2, 4))):
        index = random.randrange(len(trial))
        gone = trial[index] > 0 and random.random() < 0.5
        trial[index] = 0.0 if gone else unit * random.choice((0.5, 1.0, 1.0, 2.0, 3.0))
    if random.random() < 0.3:
        trial = [0.0 if wait and random.random() < 0.3 else wait for wait in trial]
    return trial
