"""The search over waves and rules, modulo schedules and placements of W, within a budget of steps.

Budget    how much may be evaluated; counted in steps, so that a result does not depend on the machine's speed
sweep     a grid of waves and rules
climb     changes to one wave and its rule, kept where they are no worse
polish    the W of any schedule placed anew, with its order of F and B kept, or merged anew
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from megamem.planner.schedules.search import modulo
from megamem.planner.schedules.search.dispatch import Rule, dispatch
from megamem.planner.schedules.search.problem import Outcome, Problem, Queue, Steps
from megamem.planner.schedules.search.refill import refill
from megamem.planner.schedules.search.waves import Wave, even_groups, turns, wave_queues

_EVEN = (1.0, 0.5, 0.5)
_TABLE = (1.0, 1.0, 1.0)
_HOPS = ((0.5, 0.34, 0.66), (0.9, 0.45, 0.55))
"""Spacing, rise and fall that are tried. With rise + fall = 1, F and B of a chunk alternate on every rank alike; with
`_TABLE` a group of up to `ranks` goes through one chunk before the next, as in Megatron-Core's table."""

_BACKLOGS = ((0.0, 4.0), (0.5, 4.0), (1.0, 2.0), (0.0, 0.0), (0.0, 1e6))
"""W that may wait on rank r: first * r + second."""

_FITS = (1.0, 0.5, 0.05)


class Budget:
    """Steps that may still be evaluated; reports what share is gone. A deadline ends it early."""

    def __init__(self, steps: float, report: Callable[[float], None], deadline: float | None = None) -> None:
        self.total = self.left = steps
        self.report, self.deadline, self.tenths = report, deadline, 0

    @property
    def spent(self) -> bool:
        """Whether no more should be evaluated."""
        return self.left <= 0 or (self.deadline is not None and time.monotonic() > self.deadline)

    def part(self, parts: int) -> Callable[[float], bool]:
        """One of `parts` equal parts of what is left: a function that counts steps and says whether to go on."""
        end = self.left * (1 - 1 / parts)

        def go_on(steps: float) -> bool:
            self.spend(steps)
            return self.left > end and not self.spent

        return go_on

    def spend(self, steps: float) -> None:
        """Count an evaluation."""
        self.left -= steps
        tenths = min(10, int(10 * (1 - self.left / self.total)))
        if tenths > self.tenths:
            self.tenths = tenths
            self.report(tenths / 10)


class Trial(NamedTuple):
    """A wave with a rule, and what came of it."""

    outcome: Outcome
    wave: Wave
    rule: Rule


def rules(problem: Problem) -> list[Rule]:
    """The rules to begin with, the most successful first."""
    ranks, limit = problem.num_ranks, problem.limit
    slope, none, caps = tuple(4 + rank // 2 for rank in range(ranks)), (0,) * ranks, (limit,) * ranks
    kinds = ((0.0, True, slope), (0.0, True, none), (1.0, False, none), (1.0, False, slope), (0.0, False, slope))
    return [Rule(patience, alternate, backlog, caps) for patience, alternate, backlog in kinds]


def waves(problem: Problem) -> Iterator[Wave]:
    """The waves to begin with, the most successful first; the last one always fits a memory that fits anything."""
    count, ranks, chunks = problem.num_microbatches, problem.num_ranks, problem.placement.num_chunks
    most = min(count, ranks)
    room = problem.limit / max(problem.take) if max(problem.take) else float("inf")
    full = (room - ranks) / (chunks - 1) if chunks > 1 else room  # rank 0 holds size * (chunks - 1) + ranks
    middle = int(min(most, max(1, full)))
    sizes = dict.fromkeys([middle, middle + 1, most, (ranks + 1) // 2, middle - 1, middle - 2, 1, 2, *range(1, most)])
    single = Wave(even_groups(1, count), 1.0, 0.5, 0.5)
    groups = list(dict.fromkeys(even_groups(size, count) for size in sizes if 1 <= size <= most))
    table = problem.placement.shape == "round-robin"
    for number, sizes_now in enumerate(groups[:16]):
        yield Wave(sizes_now, *(_TABLE if table and 2 * sizes_now[0] > ranks else _EVEN))
        if number < 3:
            yield Wave(sizes_now, *_HOPS[0])
    for number, hop in enumerate((_TABLE, _EVEN, *_HOPS)):
        for sizes_now in groups[:5]:
            yield Wave(sizes_now, *hop)
        if number < 3 and middle > 1:
            yield Wave(turns(middle, middle - 1, count), *hop)
            yield Wave(turns(middle + 1, middle, count), *hop)
    yield from (single._replace(stretch=stretch) for stretch in (1.5, 2.0, 3.0))
    yield one_at_a_time(problem)


def one_at_a_time(problem: Problem) -> Wave:
    """Every microbatch through all stages and back before the next one: the least memory there is."""
    return Wave(even_groups(1, problem.num_microbatches), 0.0, 0.5, 0.5, 2.0 * problem.num_stages)


def grid(problem: Problem) -> list[tuple[Wave, Rule]]:
    """Waves with rules, the most promising first, after one that always fits."""
    numbered = [
        (6 * second + first, first, wave, rule)
        for first, wave in enumerate(waves(problem))
        for second, rule in enumerate(rules(problem))
    ]
    ordered = [(wave, rule) for _, _, wave, rule in sorted(numbered, key=lambda item: item[:2])]
    return list(dict.fromkeys([(one_at_a_time(problem), rules(problem)[0]), *ordered]))


def sweep(problem: Problem, budget: Budget, tries: list[tuple[Wave, Rule]]) -> list[Trial]:
    """Some of the grid; what can run, fastest first."""
    trials, seen = [], dict[Wave, tuple[list[Queue], list[Queue]]]()
    for number, (wave, rule) in enumerate(tries):
        if number and budget.spent:
            break
        if wave not in seen:
            seen[wave] = wave_queues(problem, wave)
        outcome = dispatch(problem, *seen[wave], rule)
        budget.spend(problem.num_steps)
        if outcome is not None:
            trials.append(Trial(outcome, wave, rule))
    return sorted(trials, key=lambda trial: trial.outcome.makespan)


def climb(problem: Problem, trial: Trial, budget: Budget, tries: int, seed: int) -> Trial:
    """Random changes to the wave and the rule, kept where the makespan is no worse."""
    random, best, tried = Random(seed), trial, set[tuple[Wave, Rule]]()
    for _ in range(tries):
        wave, rule = _changed(problem, best.wave, best.rule, random)
        if budget.spent:
            break
        if (wave, rule) in tried:
            continue
        tried.add((wave, rule))
        outcome = dispatch(problem, *wave_queues(problem, wave), rule)
        budget.spend(problem.num_steps)
        if outcome is not None and outcome.makespan <= best.outcome.makespan:
            best = Trial(outcome, wave, rule)
    return best


def _changed(problem: Problem, wave: Wave, rule: Rule, random: Random) -> tuple[Wave, Rule]:
    """One thing changed."""
    choice = random.randrange(10)
    if choice < 4:
        return wave._replace(sizes=_regrouped(wave.sizes, random)), rule
    if choice == 4:
        first = random.randrange(1, problem.num_ranks + 2)
        second = max(1, first + random.choice((-2, -1, 0, 1, 2)))
        return wave._replace(sizes=turns(first, second, problem.num_microbatches)), rule
    if choice == 5:
        rise = random.choice((0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7))
        spacing = random.choice((wave.spacing, 0.5, 0.75, 0.9, 1.0, 1.1))
        return wave._replace(spacing=spacing, rise=rise, fall=random.choice((1 - rise, rise, wave.fall))), rule
    if choice == 6:
        alternate = rule.alternate != (random.random() < 0.5)
        return wave, rule._replace(patience=random.choice((0.0, 0.25, 0.5, 0.75, 1.0)), alternate=alternate)
    if choice == 7:
        return wave, rule._replace(caps=_fewer(problem, rule.caps, random))
    return wave, rule._replace(backlog=_other_backlog(rule.backlog, random))


def _regrouped(sizes: tuple[int, ...], random: Random) -> tuple[int, ...]:
    """A microbatch moved from one group to another, mostly its neighbour; now and then a group split or two joined."""
    groups, dice = list(sizes), random.random()
    index = random.randrange(len(groups))
    if dice < 0.15 and groups[index] > 1:
        first = random.randrange(1, groups[index])
        groups[index : index + 1] = [first, groups[index] - first]
    elif dice < 0.3 and len(groups) > 1:
        index = min(index, len(groups) - 2)
        groups[index : index + 2] = [groups[index] + groups[index + 1]]
    else:
        other = min(len(groups) - 1, index + 1) if dice < 0.7 else random.randrange(len(groups))
        groups[index] -= 1
        groups[other] += 1
    return tuple(size for size in groups if size)


def _fewer(problem: Problem, caps: tuple[float, ...], random: Random) -> tuple[float, ...]:
    """Another cap for one rank, or caps that fall with the rank."""
    unit = problem.take[0]
    if random.random() < 0.5:
        slope = random.choice((0.0, 0.5, 1.0)) * unit
        return tuple(problem.limit - slope * rank for rank in range(len(caps)))
    rank = random.randrange(len(caps))
    cap = min(problem.limit, caps[rank] + random.choice((-2, -1, 1, 2)) * unit)
    return (*caps[:rank], cap, *caps[rank + 1 :])


def _other_backlog(backlog: tuple[int, ...], random: Random) -> tuple[int, ...]:
    """One more or less on one rank, or a new straight line."""
    if random.random() < 0.6:
        rank = random.randrange(len(backlog))
        count = max(0, backlog[rank] + random.choice((-4, -2, -1, 1, 2, 4)))
        return (*backlog[:rank], count, *backlog[rank + 1 :])
    base, slope = random.choice((0, 1, 2, 4, 8)), random.choice((-0.5, 0.0, 0.25, 0.5, 1.0))
    return tuple(max(0, int(base + slope * rank)) for rank in range(len(backlog)))


def polish(
    problem: Problem, steps: Steps, budget: Budget, parts: int = 1, fits: Sequence[float] = _FITS
) -> Outcome | None:
    """Place the W of a schedule anew, its order of F and B kept; None where no way fits the memory."""
    merged = [[step for step in order if step[0] != "W"] for order in steps]
    outcomes = []
    for slope, base in _BACKLOGS:
        for fit in fits:
            backlog = [int(base + slope * rank) for rank in range(problem.num_ranks)]
            outcomes.append(refill(problem, merged, backlog, fit, parts))
            budget.spend(problem.num_steps)
    return _fastest(outcomes)


def merge_anew(problem: Problem, steps: Steps, budget: Budget) -> Outcome | None:
    """Each rank's order of F and its order of B kept, but merged in time by the rules."""
    forward, backward = (
        [[(stage, batch) for kind, stage, batch, _ in order if kind == wanted] for order in steps] for wanted in "FB"
    )
    outcomes = []
    for rule in rules(problem):
        outcomes.append(dispatch(problem, forward, backward, rule))
        budget.spend(problem.num_steps)
    return _fastest(outcomes)


def steady_states(problem: Problem, budget: Budget, tries: int) -> list[Outcome]:
    """Modulo schedules that fit the memory, from real and from rounded costs, unrolled and polished; fastest first."""

    def price(unrolled: Outcome) -> Outcome | None:
        merged = [[step for step in order if step[0] != "W"] for order in unrolled.steps]
        backlogs = [[base] * problem.num_ranks for base in (0, 4, 10**6)]
        return _fastest(refill(problem, merged, backlog) for backlog in backlogs)

    found = []
    slots = [problem, *(modulo.rounded(problem, shape) for shape in modulo.SHAPES)]
    for number, slot in enumerate(slots):
        best = modulo.climb(problem, slot, price, budget.part(len(slots) - number), tries, seed=number)
        if best is not None:
            found.append(best)
    return sorted(found, key=lambda outcome: outcome.makespan)


def _fastest(outcomes: Iterable[Outcome | None]) -> Outcome | None:
    return min((outcome for outcome in outcomes if outcome), key=lambda outcome: outcome.makespan, default=None)
