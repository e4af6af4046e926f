"""The optimum of a small case, or how far from it a schedule may be, by OR-tools CP-SAT. An optional extra: `solver`.

Every F, B and W is an interval; those of a rank do not overlap; inputs come before what needs them, with the latency of
the hop. Memory is a cumulative resource per rank: `take - kept` from the start of F to the end of B, `kept` to the end
of W. Microbatches are alike, so on every stage they run in order, which loses no schedule and is what gradients need to
be bitwise equal. This is the ILP of arXiv 2401.10241 (appendix G) for whole schedules instead of pairs of passes, with
memory and any placement.

Time is rounded down to a grid, so the bound holds; memory likewise. Sizes beyond about p = 4 with 8 microbatches prove
little in reasonable time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megamem.errors import MissingPackage, ScheduleError
from megamem.ir.schedule import Schedule, Shape
from megamem.planner.schedules.checker import check_schedule
from megamem.planner.schedules.family import Request
from megamem.planner.schedules.search.problem import Problem, Steps, make_problem
from megamem.planner.schedules.simulator import price, simulate

if TYPE_CHECKING:
    from megamem.planner.schedules.simulator import Simulation

_GRID = 100_000  # of the period
_MEMORY_GRID = 1_000_000  # of the limit
_KINDS = ("F", "B", "W")

_Key = tuple[str, int, int]  # kind, stage, microbatch


@dataclass(frozen=True, kw_only=True)
class ExactResult:
    """What the solver found for one placement.

    schedule, makespan:  the best found, priced by the simulator
    bound:      no schedule of this placement within the limit has a shorter makespan
    optimal:    whether the two are equal, up to the grid of time
    """

    schedule: Schedule
    makespan: float
    bound: float
    optimal: bool


def solve(request: Request, start: Schedule, *, effort: float = 30.0) -> ExactResult:
    """The fastest schedule of the placement of `start`, which has to fit the request and is where the solver begins.

    effort: the solver's deterministic time, about seconds of one core

    Raises MissingPackage without OR-tools, ScheduleError where `start` does not fit the request.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as fault:
        raise MissingPackage('an exact schedule needs OR-tools; pip install "megamem[solver]"') from fault
    check_schedule(start, costs=request.workload, memory_limit=request.memory_limit)
    shape: Shape = start.placement.shape
    problem = make_problem(request, shape, start.placement.num_chunks)
    simulation = simulate(start, request.workload)
    scale = _GRID / problem.period
    model: Any = cp_model.CpModel()
    ends = _build(model, problem, scale, math.ceil(simulation.makespan * scale) + 1)
    for key, end in _ends(problem, simulation).items():
        model.add_hint(ends[key], math.floor(end * scale))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1  # several race each other
    solver.parameters.max_deterministic_time = effort
    status = solver.solve(model)
    bound = solver.best_objective_bound / scale
    best, makespan = start, simulation.makespan
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = _schedule(problem, {key: solver.value(end) for key, end in ends.items()})
        try:
            check_schedule(found, costs=request.workload, memory_limit=request.memory_limit)
            if (found_makespan := price(found, request.workload).makespan) < makespan:
                best, makespan = found, found_makespan
        except ScheduleError:
            pass  # it used what rounding left over; the bound holds all the same
    slack = problem.num_steps / problem.num_ranks / scale  # what rounding down can hide
    return ExactResult(schedule=best, makespan=makespan, bound=bound, optimal=makespan <= bound + slack)


def _ticks(problem: Problem, key: _Key, scale: float) -> int:
    kind, stage, _ = key
    seconds = {"F": problem.forward, "B": problem.backward, "W": problem.weight}[kind][stage]
    return math.floor(seconds * scale * (1 + 1e-12))


def _build(model: Any, problem: Problem, scale: float, horizon: int) -> dict[_Key, Any]:
    """Variables and constraints; the end of every step."""
    stages, count = range(problem.num_stages), range(problem.num_microbatches)
    ends: dict[_Key, Any] = {}
    intervals: dict[_Key, Any] = {}
    for key in ((kind, stage, batch) for kind in _KINDS for stage in stages for batch in count):
        ticks = _ticks(problem, key, scale)
        ends[key] = model.new_int_var(ticks, horizon, "")
        intervals[key] = model.new_fixed_size_interval_var(ends[key] - ticks, ticks, "")
    for (kind, stage, batch), end in ends.items():
        ticks = _ticks(problem, (kind, stage, batch), scale)
        for source, delay in _sources(problem, kind, stage):
            model.add(end - ticks >= ends[(*source, batch)] + math.floor(delay * scale))
        if batch:
            model.add(end - ticks >= ends[kind, stage, batch - 1])
    for rank in range(problem.num_ranks):
        own = problem.stages_of(rank)
        model.add_no_overlap([interval for (_, stage, _), interval in intervals.items() if stage in own])
        if math.isfinite(problem.limit):
            _add_memory(model, problem, own, ends, scale)
    makespan = model.new_int_var(0, horizon, "")
    model.add_max_equality(makespan, [ends["W", stage, batch] for stage in stages for batch in count])
    model.minimize(makespan)
    return ends


def _sources(problem: Problem, kind: str, stage: int) -> list[tuple[tuple[str, int], float]]:
    """What a step waits for, and the latency."""
    if kind == "W":
        return [(("B", stage), 0.0)]
    if kind == "F":
        return [(("F", stage - 1), problem.hop[stage - 1])] if stage else []
    if stage + 1 == problem.num_stages:
        return [(("F", stage), 0.0)]
    return [(("B", stage + 1), problem.hop[stage])]


def _add_memory(model: Any, problem: Problem, own: list[int], ends: dict[_Key, Any], scale: float) -> None:
    held, sizes = [], []
    for stage in own:
        ticks = _ticks(problem, ("F", stage, 0), scale)
        for batch in range(problem.num_microbatches):
            begin = ends["F", stage, batch] - ticks
            for kind, size in (("B", problem.take[stage] - problem.kept[stage]), ("W", problem.kept[stage])):
                units = math.floor(size / problem.limit * _MEMORY_GRID)
                if units:
                    end = ends[kind, stage, batch]
                    length = model.new_int_var(0, 10**12, "")
                    held.append(model.new_interval_var(begin, length, end, ""))
                    sizes.append(units)
    model.add_cumulative(held, sizes, _MEMORY_GRID)


def _ends(problem: Problem, simulation: Simulation) -> dict[_Key, float]:
    """When every whole F, B and W of a simulated schedule ends; BW and divided W are left out."""
    placement = problem.placement
    ends: dict[_Key, float] = {}
    for rank, action, _, end in simulation.timeline():
        if action.kind in _KINDS and action.parts == 1:
            ends[action.kind, placement.stage(rank, action.chunk), action.microbatch] = end
    return ends


def _schedule(problem: Problem, ends: dict[_Key, int]) -> Schedule:
    """The steps in the order in which the solver runs them."""
    steps: Steps = [[] for _ in range(problem.num_ranks)]
    for (kind, stage, batch), _ in sorted(ends.items(), key=lambda item: (item[1], _KINDS.index(item[0][0]))):
        steps[problem.ranks[stage]].append((kind, stage, batch, 0))
    return problem.schedule("exact", steps)
