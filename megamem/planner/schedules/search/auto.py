"""The schedule `auto`: every family, chunk count and placement priced under a memory limit, and the best ones improved.

    search(request) -> SearchResult

1. Every family that can serve the request is built and priced (`families.FAMILIES`).
2. For every placement and number of chunks a grid of waves (`waves`: group interleaving with any group sizes, on both
   placements) is merged in time by rules (`dispatch`), and the best are changed at random where that helps (`improve`).
3. Modulo schedules of the steady state (`modulo`) are unrolled, with a warm-up and a cool-down.
4. The W of the best of all of these are placed anew, in pieces if wanted (`refill`).

The search itself counts time by its own loops; every figure that it reports is the simulator's, and every schedule it
returns has passed the checker, with gradients accumulated in the order of 1F1B. Nothing depends on the machine's speed
unless `time_limit` is given: work is bounded in steps that are evaluated, and random changes have a fixed seed.

Sources: facts and limits of the families are in their own modules; bounds in `bounds`; what optimal is for small cases
in `exact`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from megamem.errors import InfeasibleError, ScheduleError
from megamem.ir.schedule import SHAPES, Placement, Schedule, Shape
from megamem.ir.workload import PipelineCosts
from megamem.planner.schedules.checker import accumulates_in_order, check_schedule
from megamem.planner.schedules.families import FAMILIES
from megamem.planner.schedules.family import Family, Objective, Request
from megamem.planner.schedules.search import improve
from megamem.planner.schedules.search.bounds import Bounds, bounds
from megamem.planner.schedules.search.improve import Budget, Trial
from megamem.planner.schedules.search.problem import Outcome, Problem, make_problem, merged_order
from megamem.planner.schedules.search.waves import even_groups
from megamem.planner.schedules.simulator import Simulation, price, simulate

SEARCHED = "searched"
CHUNK_COUNTS = (1, 2, 3, 4, 6, 8)
EFFORT = 8_000_000
"""Steps (F, B or W of one stage and microbatch) that a search evaluates: about 10 seconds of one processor core."""

_MOST_TRIES = 4000  # where steps are few, tries are bounded instead
_SHARES = {"sweep": 0.4, "modulo": 0.2, "climb": 0.3, "polish": 0.1}
Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A schedule that was priced.

    name:       the family, or "searched"
    placement, group:  what it was built with
    makespan, stage_span, peak:  from the simulator; the peak is that of the fullest rank
    fits:       whether the peak is within the request's memory limit
    schedule:   kept for those on the Pareto front
    """

    name: str
    placement: Placement
    group: int | None
    makespan: float
    stage_span: float
    peak: float
    fits: bool
    schedule: Schedule | None

    def figure(self, objective: Objective) -> float:
        """What is to be small."""
        return self.makespan if objective == "makespan" else self.stage_span


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What `search` found.

    schedule, simulation:  the best one within the limit
    origin:      the family that it comes from, or "searched"
    candidates:  all that were priced, the best first; also those above the limit, to show what more memory would give
    front:       the candidates that no other beats in both peak and makespan, by rising peak
    bounds:      of the best one's placement; how far from the best there is it may be
    evaluated:   steps that were evaluated
    """

    schedule: Schedule
    simulation: Simulation
    origin: str
    candidates: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    bounds: Bounds
    evaluated: int


def search(
    request: Request,
    *,
    objective: Objective = "makespan",
    families: Sequence[str] | None = None,
    chunk_counts: Sequence[int] | None = None,
    placements: Sequence[Shape] = SHAPES,
    weight_parts: int = 1,
    effort: int = EFFORT,
    time_limit: float | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """The fastest schedule for `request` within its memory limit.

    `request.num_chunks` is not looked at. Where the model is built already, name its one placement and chunk count.

    objective:     "makespan" (with a synchronous optimizer step), or "stage_span" (the papers' figure, without). It
                   decides between candidates; the search that makes them looks at the makespan
    families:      names to consider; None means all; () only searched ones
    chunk_counts:  chunks per rank to consider, CHUNK_COUNTS unless given; those that do not divide the workload's
                   layers are left out
    placements:    placements to consider
    weight_parts:  pieces into which a W may be divided, by linear layer; 1 leaves them whole
    effort:        steps to evaluate
    time_limit:    seconds after which the search ends with what it has; results then depend on the machine
    progress:      called with the name of a phase and the share of it that is done

    Raises InfeasibleError, with the lowest memory that any schedule needs, where the limit is below it, and when no
    chunk count fits the workload.
    """
    report = progress or (lambda phase, share: None)
    problems = _problems(request, CHUNK_COUNTS if chunk_counts is None else chunk_counts, placements)
    run = _Run(request, objective, report, None if time_limit is None else time.monotonic() + time_limit)
    run.build_families(FAMILIES if families is None else families, problems)
    within = _reachable(problems)
    if not within and not any(each.fits for each in run.candidates):
        raise _too_small(request, problems)
    if within:
        run.search(within, effort, weight_parts)
    return run.result()


def _problems(request: Request, chunk_counts: Sequence[int], placements: Sequence[Shape]) -> list[Problem]:
    """One per placement and chunk count that the workload can have."""
    problems, faults = [], list[str]()
    for chunks in dict.fromkeys(chunk_counts):
        for shape in dict.fromkeys(placements):
            if shape == "v" and chunks % 2:
                faults.append(f"a V has an even number of chunks, not {chunks}")  # it begins and ends on rank 0
                continue
            try:
                problems.append(make_problem(request, shape, chunks))
            except ScheduleError as fault:
                faults.append(str(fault))
    if not problems:
        raise InfeasibleError("no number of chunks fits the workload: " + "; ".join(dict.fromkeys(faults)))
    return problems


def _reachable(problems: list[Problem]) -> list[Problem]:
    """The problems whose limit is not below what one microbatch needs."""
    return [problem for problem in problems if bounds(problem).memory <= problem.limit]


def _too_small(request: Request, problems: list[Problem]) -> InfeasibleError:
    """Why nothing fits the memory limit, and the least that can be had."""
    least, problem = min(((bounds(problem).memory, problem) for problem in problems), key=lambda item: item[0])
    chunks = problem.placement.num_chunks
    return InfeasibleError(
        f"memory limit {request.memory_limit:g}: before its first B a rank holds all chunks of one microbatch, "
        f"{least:g} with {chunks} {'chunk' if chunks == 1 else 'chunks'} per rank ({problem.placement.shape}); no "
        f"schedule without offloading needs less; nearest: memory limit {least:g}"
    )


class _Run:
    """One search: what was priced so far."""

    def __init__(self, request: Request, objective: Objective, report: Progress, deadline: float | None) -> None:
        self.request, self.objective, self.report, self.deadline = request, objective, report, deadline
        self.limit = float("inf") if request.memory_limit is None else request.memory_limit * (1 + 1e-9)
        self.candidates: list[Candidate] = []
        self.evaluated = 0

    def add(self, schedule: Schedule, name: str) -> None:
        """Price a schedule with the simulator."""
        makespan, stage_span, peaks = price(schedule, self.request.workload)
        self.candidates.append(
            Candidate(
                name=name,
                placement=schedule.placement,
                group=schedule.group,
                makespan=makespan,
                stage_span=stage_span,
                peak=max(peaks),
                fits=max(peaks) <= self.limit,
                schedule=schedule,
            )
        )

    def build_families(self, names: Iterable[str], problems: list[Problem]) -> None:
        """Every family with every chunk count that it can have, and a few groups; other groups are waves."""
        settings = [
            (FAMILIES[name], problem.placement, group)
            for name in names
            for problem in problems
            if FAMILIES[name].shape == problem.placement.shape
            # Copies that take no time would make offloading a gift.
            if not FAMILIES[name].offloads or all(stage.offload > 0 for stage in _costs(self.request, problem).stages)
            for group in _groups(FAMILIES[name], problem)
        ]
        for number, (family, placement, group) in enumerate(settings):
            wanted = replace(self.request, num_chunks=placement.num_chunks, group=group)
            try:
                family.check(wanted)
                self.add(family.build(wanted), family.name)
            except InfeasibleError:
                continue
            finally:
                self.report("families", (number + 1) / len(settings))

    def budget(self, phase: str, effort: float, problems: int = 1) -> Budget:
        """A share of the effort."""
        return Budget(effort * _SHARES[phase] / problems, lambda share: self.report(phase, share), self.deadline)

    def search(self, problems: list[Problem], effort: int, parts: int) -> None:
        """Sweep all problems, improve the best, and price what came of it."""
        budgets: list[Budget] = []
        trials = self._sweep(problems, effort, budgets)
        found = [(problem, trial.outcome) for problem, trial in trials]
        found += self._steady_states(problems, effort, budgets)
        found += self._climb(trials, effort, budgets)
        found += self._families_merged(problems, effort, budgets)
        found.sort(key=lambda item: item[1].makespan)
        budgets.append(budget := self.budget("polish", effort))
        for number, (problem, outcome) in enumerate(found):
            self.add(problem.schedule(SEARCHED, outcome.steps), SEARCHED)
            if number < 8 and not budget.spent:
                for pieces in {1, parts}:
                    better = improve.polish(problem, outcome.steps, budget, pieces)
                    if better is not None and better.makespan < outcome.makespan:
                        self.add(problem.schedule(SEARCHED, better.steps, pieces), SEARCHED)
        self.evaluated = round(sum(each.total - each.left for each in budgets))

    def _sweep(self, problems: list[Problem], effort: int, budgets: list[Budget]) -> list[tuple[Problem, Trial]]:
        """The beginning of every problem's grid, and more of it for the four best."""
        budgets.append(budget := self.budget("sweep", effort))
        grids = [improve.grid(problem) for problem in problems]
        first = int(max(12, min(60, budget.total / 3 / sum(problem.num_steps for problem in problems))))
        found = []
        for number, problem in enumerate(problems):
            found.append((problem, number, improve.sweep(problem, budget, grids[number][:first])))
        found = sorted((each for each in found if each[2]), key=lambda each: each[2][0].outcome.makespan)
        for place, (problem, number, trials) in enumerate(found[:4]):
            share = budget.left / (4 - place) / problem.num_steps
            more = grids[number][first : first + int(max(0, min(_MOST_TRIES / 8, share)))]
            found[place] = (problem, number, trials + improve.sweep(problem, budget, more))
        return sorted(
            (
                (problem, trial)
                for problem, _, trials in found
                for trial in sorted(trials, key=lambda trial: trial.outcome.makespan)[:3]
            ),
            key=lambda item: item[1].outcome.makespan,
        )

    def _steady_states(
        self, problems: list[Problem], effort: int, budgets: list[Budget]
    ) -> list[tuple[Problem, Outcome]]:
        """Modulo schedules where they promise most: few steps first."""
        chosen = sorted(problems, key=lambda problem: problem.num_steps)[:6]
        found = []
        for problem in chosen:
            budgets.append(budget := self.budget("modulo", effort, len(chosen)))
            outcomes = improve.steady_states(problem, budget, _MOST_TRIES // 40)
            found += [(problem, outcome) for outcome in outcomes[:2]]
        return found

    def _climb(
        self, trials: list[tuple[Problem, Trial]], effort: int, budgets: list[Budget]
    ) -> list[tuple[Problem, Outcome]]:
        """The six best get a short climb, and the two best of those a long one."""
        budgets.append(budget := self.budget("climb", effort))
        rounds = ((6, 0.5), (2, 0.5))
        for number, (survivors, share) in enumerate(rounds):
            climbed = []
            for problem, trial in trials[:survivors]:
                tries = min(_MOST_TRIES * share, budget.total * share / problem.num_steps) / survivors
                climbed.append((problem, improve.climb(problem, trial, budget, int(tries), seed=number)))
            trials = sorted(climbed, key=lambda item: item[1].outcome.makespan)
        return [(problem, trial.outcome) for problem, trial in trials]

    def _families_merged(
        self, problems: list[Problem], effort: int, budgets: list[Budget]
    ) -> list[tuple[Problem, Outcome]]:
        """The best families' orders, with W placed anew and merged anew."""
        by_placement = {problem.placement: problem for problem in problems}
        budgets.append(budget := self.budget("polish", effort))
        found = []
        for candidate in sorted(self.candidates, key=lambda each: each.makespan)[:16]:
            problem = by_placement.get(candidate.placement)
            if problem is None or candidate.schedule is None or FAMILIES[candidate.name].offloads or budget.spent:
                continue
            merged = merged_order(problem, candidate.schedule)
            for outcome in (improve.polish(problem, merged, budget), improve.merge_anew(problem, merged, budget)):
                if outcome is not None:
                    found.append((problem, outcome))
        return found

    def result(self) -> SearchResult:
        """The best of what was priced, checked."""
        ordered = sorted(self.candidates, key=lambda each: (not each.fits, each.figure(self.objective), each.peak))
        best = next(each for each in ordered if each.fits and accumulates_in_order(_schedule_of(each)))
        schedule = _schedule_of(best)
        check_schedule(schedule, costs=self.request.workload, memory_limit=self.request.memory_limit)
        front = _front(ordered)
        return SearchResult(
            schedule=schedule,
            simulation=simulate(schedule, self.request.workload),
            origin=best.name,
            candidates=tuple(each if each in front else _without_schedule(each) for each in ordered),
            front=front,
            bounds=bounds(make_problem(self.request, schedule.placement.shape, schedule.placement.num_chunks)),
            evaluated=self.evaluated,
        )


def _costs(request: Request, problem: Problem) -> PipelineCosts:
    return request.workload.costs(problem.placement)


def _groups(family: Family, problem: Problem) -> list[int | None]:
    """The family's own group, and the two largest that fit the memory and divide the microbatches evenly."""
    if not family.uses_group:
        return [None]
    ranks, chunks = problem.num_ranks, problem.placement.num_chunks
    room = problem.limit / max(problem.take) if max(problem.take) else math.inf
    sizes = {even_groups(size, problem.num_microbatches)[0] for size in range((ranks + 1) // 2, ranks + 1)}
    fitting = [size for size in sizes if 2 * size >= ranks and size * (chunks - 1) + ranks <= room * (1 + 1e-6)]
    return [None, *sorted(fitting, reverse=True)[:2]]


def _schedule_of(candidate: Candidate) -> Schedule:
    assert candidate.schedule is not None  # dropped only from results
    return candidate.schedule


def _without_schedule(candidate: Candidate) -> Candidate:
    return replace(candidate, schedule=None)


def _front(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other beats in peak and makespan both."""
    front: list[Candidate] = []
    for each in sorted(candidates, key=lambda each: (each.peak, each.makespan)):
        if not front or each.makespan < front[-1].makespan * (1 - 1e-9):
            front.append(each)
    return tuple(front)
