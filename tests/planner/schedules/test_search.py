"""The search for a schedule: better than every family, checked, repeatable, and how far from the best there is."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megamem.errors import InfeasibleError, MissingPackage, ScheduleError
from megamem.ir.schedule import Placement, Schedule
from megamem.ir.workload import PipelineCosts, StageCost, Uniform, Workload
from megamem.planner.schedules.checker import accumulates_in_order, check_schedule
from megamem.planner.schedules.families import FAMILIES, build_schedule
from megamem.planner.schedules.family import Request
from megamem.planner.schedules.search import SearchResult, search
from megamem.planner.schedules.search.bounds import bounds
from megamem.planner.schedules.search.dispatch import Rule, dispatch
from megamem.planner.schedules.search.exact import solve
from megamem.planner.schedules.search.modulo import place, rounded, steady_peak
from megamem.planner.schedules.search.problem import make_problem
from megamem.planner.schedules.search.refill import refill
from megamem.planner.schedules.search.unroll import unroll
from megamem.planner.schedules.search.waves import Wave, even_groups, turns, wave_queues
from megamem.planner.schedules.simulator import price, simulate

RECORDS = Path(__file__).parents[3].parent / "shared" / "data" / "schedules.json"
LONG = Uniform(forward=2.333, backward=3.667, weight=1.0, comm=0.02)
SMALL = 60_000  # steps: a fraction of a second


@functools.cache
def find(
    ranks: int, microbatches: int, limit: float | None, workload: Uniform, chunks: tuple[int, ...] = (2, 4)
) -> SearchResult:
    request = Request(num_ranks=ranks, num_microbatches=microbatches, workload=workload, memory_limit=limit)
    return search(request, chunk_counts=chunks, effort=SMALL)


@pytest.mark.parametrize(
    "workload", [Uniform(), LONG, Uniform(weight_grad=0.4, comm=0.1)], ids=["unit", "long", "kept"]
)
@pytest.mark.parametrize("limit", [1.0, 1.6, 2.5, 4.0, None])
def test_the_result_is_checked_within_the_limit_and_no_candidate_that_fits_is_faster(
    workload: Uniform, limit: float | None
) -> None:
    found = find(4, 8, limit, workload)
    check_schedule(found.schedule, costs=workload, memory_limit=limit)
    assert accumulates_in_order(found.schedule)
    again = simulate(found.schedule, workload)
    assert again.makespan == found.simulation.makespan == found.candidates[0].makespan
    assert all(found.simulation.makespan <= each.makespan for each in found.candidates if each.fits)
    assert found.simulation.makespan >= found.bounds.makespan * (1 - 1e-9)
    assert max(found.simulation.peak_activation) >= found.bounds.memory * (1 - 1e-9)


def test_auto_is_never_slower_than_a_family_at_the_familys_own_peak() -> None:
    request = Request(num_ranks=4, num_microbatches=8, workload=LONG)
    better = 0
    for name, family in FAMILIES.items():
        if family.offloads:
            continue  # it needs a time for copies
        theirs = price(build_schedule(name, request.with_chunks(family.default_chunks)), LONG)
        ours = find(4, 8, max(theirs.peak_activation), LONG).simulation.makespan
        assert ours <= theirs.makespan * (1 + 1e-9), name
        better += ours < theirs.makespan * (1 - 1e-6)
    assert better >= len(FAMILIES) / 2


def test_half_the_memory_of_1f1b_on_megatrons_own_placement_is_faster_than_v_half_and_v_min() -> None:
    """Groups below half the ranks, which wait for ever where F and B strictly alternate."""
    request = Request(num_ranks=8, num_microbatches=16, memory_limit=4.0)
    found = search(request, chunk_counts=(4,), placements=("round-robin",), families=(), effort=400_000)
    v_min = price(build_schedule("v-min", request.with_chunks(2)), request.workload)
    assert max(v_min.peak_activation) == 4.0
    assert found.simulation.makespan < v_min.makespan
    assert max(found.simulation.peak_activation) <= 4.0 < 0.75 * 8


def test_the_same_request_gives_the_same_schedule() -> None:
    request = Request(num_ranks=3, num_microbatches=6, workload=LONG, memory_limit=2.0)
    first, second = (search(request, chunk_counts=(2,), effort=SMALL) for _ in range(2))
    assert first.schedule == second.schedule
    assert first.candidates == second.candidates


def test_the_front_rises_in_memory_and_falls_in_time_and_nothing_beats_it() -> None:
    found = find(4, 8, 2.5, Uniform())
    peaks = [each.peak for each in found.front]
    spans = [each.makespan for each in found.front]
    assert peaks == sorted(peaks) and spans == sorted(spans, reverse=True)
    for each in found.candidates:
        assert any(front.peak <= each.peak and front.makespan <= each.makespan for front in found.front)
    assert all(each.schedule is not None for each in found.front)
    assert any(not each.fits for each in found.front), "what more memory would give"


def test_a_limit_below_one_microbatch_is_refused_with_the_limit_that_can_be_met() -> None:
    with pytest.raises(InfeasibleError, match=r"memory limit 0\.9: .* nearest: memory limit 1$"):
        find(4, 8, 0.9, Uniform())
    assert max(find(4, 8, 1.0, Uniform()).simulation.peak_activation) == 1.0


def test_chunk_counts_that_do_not_divide_the_layers_are_left_out() -> None:
    layer = StageCost(forward=1, backward=1, weight=1)
    twelve = Workload(
        layers=(layer,) * 12, last=StageCost(forward=0.5, backward=0.5, weight=0.5, activation=0.0, weight_grad=0.0)
    )
    request = Request(num_ranks=4, num_microbatches=4, workload=twelve)
    found = search(request, effort=SMALL)
    assert {each.placement.num_chunks for each in found.candidates} == {1, 3}
    with pytest.raises(InfeasibleError, match="12 layers cannot be divided by 4 ranks x 2 chunks"):
        search(request, chunk_counts=(2, 4), effort=SMALL)


def test_a_model_that_is_built_keeps_its_placement_and_chunks() -> None:
    placement = Placement(shape="v", num_ranks=4, num_chunks=2)
    costs = PipelineCosts.uniform(placement)
    request = Request(num_ranks=4, num_microbatches=8, workload=costs)
    found = search(request, placements=("v",), chunk_counts=(2,), effort=SMALL)
    assert found.schedule.placement == placement
    assert {each.placement for each in found.candidates} == {placement}


def test_unequal_stages_are_scheduled_with_their_own_costs() -> None:
    stages = tuple(
        StageCost(forward=1 + stage % 3, backward=2.0, weight=1.5, activation=1 + stage % 2, weight_grad=0.5)
        for stage in range(8)
    )
    request = Request(
        num_ranks=4, num_microbatches=8, workload=PipelineCosts(stages=stages, comm=0.1), memory_limit=18.0
    )
    found = search(request, chunk_counts=(2,), effort=SMALL)
    check_schedule(found.schedule, costs=request.workload, memory_limit=18.0)
    family = price(build_schedule("interleaved", request.with_chunks(2)), request.workload)
    assert found.simulation.makespan < family.makespan


def test_pieces_of_w_fill_gaps_that_whole_ones_do_not() -> None:
    request = Request(num_ranks=4, num_microbatches=8, workload=LONG, memory_limit=3.0)
    whole = search(request, chunk_counts=(2,), effort=SMALL)
    pieces = search(request, chunk_counts=(2,), effort=SMALL, weight_parts=4)
    assert pieces.simulation.makespan <= whole.simulation.makespan
    problem = make_problem(request, "round-robin", 2)
    merged = [
        [step for step in order if step[0] != "W"] for order in _steps(problem, Wave(even_groups(4, 8), 1.0, 0.5, 0.5))
    ]
    divided = refill(problem, merged, [8] * 4, parts=4)
    assert divided is not None
    schedule = problem.schedule("pieces", divided.steps, 4)
    check_schedule(schedule, costs=request.workload, memory_limit=3.0)
    assert any(action.parts == 4 for _, action in schedule) and accumulates_in_order(schedule)
    assert price(schedule, request.workload).makespan == pytest.approx(divided.makespan)


def test_progress_is_told_for_every_phase() -> None:
    told: dict[str, float] = {}
    request = Request(num_ranks=4, num_microbatches=8, memory_limit=3.0)
    search(request, chunk_counts=(2,), effort=SMALL, progress=lambda phase, share: told.update({phase: share}))
    assert {"families", "sweep", "climb", "polish"} <= told.keys()
    assert all(0 < share <= 1 for share in told.values())


def test_a_deadline_ends_the_search_with_what_it_has() -> None:
    request = Request(num_ranks=4, num_microbatches=8, memory_limit=1.2)
    found = search(request, families=(), chunk_counts=(2,), time_limit=0.0)
    check_schedule(found.schedule, costs=request.workload, memory_limit=1.2)


@pytest.mark.parametrize("shape", ["round-robin", "v"])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_the_searchs_own_times_are_the_simulators(shape: str, chunks: int) -> None:
    request = Request(num_ranks=4, num_microbatches=8, workload=LONG, memory_limit=4.0)
    problem = make_problem(request, shape, chunks)  # type: ignore[arg-type]
    forward, backward = wave_queues(problem, Wave(turns(3, 2, 8), 1.0, 0.5, 0.5))
    outcome = dispatch(problem, forward, backward, Rule(0.0, True, (2,) * 4, (4.0,) * 4))
    assert outcome is not None
    simulated = price(problem.schedule("wave", outcome.steps), LONG)
    assert simulated.makespan == pytest.approx(outcome.makespan)
    again = refill(problem, [[step for step in order if step[0] != "W"] for order in outcome.steps], (2,) * 4)
    assert again is not None
    assert price(problem.schedule("refilled", again.steps), LONG).makespan == pytest.approx(again.makespan)
    assert max(simulated.peak_activation) <= 4.0


def test_two_queues_that_wait_for_each_other_are_no_schedule() -> None:
    request = Request(num_ranks=4, num_microbatches=8, memory_limit=1.0)
    problem = make_problem(request, "round-robin", 2)
    forward, backward = wave_queues(problem, Wave(even_groups(4, 8), 1.0, 1.0, 1.0))
    assert dispatch(problem, forward, backward, Rule(0.0, True, (0,) * 4, (1.0,) * 4)) is None
    merged = [
        [*(("F", *entry, 0) for entry in f), *(("B", *entry, 0) for entry in b)]
        for f, b in zip(forward, backward, strict=True)
    ]
    assert refill(problem, merged, (0,) * 4) is None


def test_the_steady_state_on_a_v_reaches_the_bound_of_littles_law_at_unit_cost() -> None:
    """(p + 1) / 3 for p = 8, where V-Min holds 4 (arXiv 2405.15362, section 3)."""
    problem = make_problem(Request(num_ranks=8, num_microbatches=16, memory_limit=4.0), "v", 2)
    chain = place(problem, [0.0] * (2 * problem.num_stages))
    assert chain is not None
    assert bounds(problem).steady_memory == pytest.approx(3.0)
    assert steady_peak(problem, chain) == pytest.approx(3.0)
    outcome = unroll(problem, chain)
    assert outcome is not None
    check_schedule(problem.schedule("unrolled", outcome.steps), memory_limit=4.0)


@pytest.mark.parametrize(
    ("size", "total", "groups"), [(4, 8, (4, 4)), (14, 48, (12,) * 4), (5, 8, (4, 4)), (3, 8, (3, 3, 2)), (9, 4, (4,))]
)
def test_groups_are_even(size: int, total: int, groups: tuple[int, ...]) -> None:
    assert even_groups(size, total) == groups


def test_rounded_costs_keep_the_period() -> None:
    problem = make_problem(Request(num_ranks=4, num_microbatches=8, workload=LONG), "round-robin", 4)
    slots = rounded(problem, (2.0, 4.0, 1.0))
    total = slots.forward[0] + slots.backward[0] + slots.weight[0]
    assert total * 4 == pytest.approx(problem.period)
    assert slots.backward[0] == pytest.approx(2 * slots.forward[0])


@pytest.mark.skipif(not RECORDS.exists(), reason="shared/data/schedules.json is not beside the repository")
@pytest.mark.parametrize("cost", ["unit", "brief_c", "zb14.6B_T9"])
def test_no_record_at_the_same_peak_is_faster(cost: str) -> None:
    records = [
        each
        for each in json.loads(RECORDS.read_text())["records"]
        if (each["p"], each["m"], each["cost"]) == (4, 8, cost)
    ]
    assert len(records) > 20
    forward, backward, weight, comm = records[0]["cost_values"]
    workload = Uniform(forward=forward, backward=backward, weight=weight, comm=comm)
    peaks = sorted({each["peak_mem_MB"] for each in records})
    better = 0
    for peak in peaks:
        fastest = min(each["makespan"] for each in records if each["peak_mem_MB"] <= peak)
        ours = find(4, 8, peak, workload, (1, 2, 4, 6, 8)).simulation.makespan
        assert ours <= fastest * (1 + 1e-6), peak
        better += ours < fastest * (1 - 1e-6)
    assert better >= len(peaks) / 2


def test_an_exact_schedule_needs_or_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools", None)
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    request = Request(num_ranks=2, num_microbatches=2)
    with pytest.raises(MissingPackage, match=r'pip install "megamem\[solver\]"'):
        solve(request, build_schedule("1f1b", request))


@pytest.mark.parametrize(("ranks", "limit", "shape"), [(2, 1.5, "round-robin"), (3, 2.0, "round-robin"), (3, 2.0, "v")])
def test_the_search_is_close_to_the_optimum_of_small_cases(ranks: int, limit: float, shape: str) -> None:
    pytest.importorskip("ortools", reason="OR-tools is not installed (extra: solver)")
    request = Request(num_ranks=ranks, num_microbatches=4, memory_limit=limit)
    found = search(request, chunk_counts=(2,), placements=(shape,), effort=SMALL * 4)  # type: ignore[arg-type]
    exact = solve(request, found.schedule, effort=20.0)
    check_schedule(exact.schedule, memory_limit=limit)
    assert exact.optimal
    assert found.bounds.makespan <= exact.bound * (1 + 1e-3)
    assert exact.makespan <= found.simulation.makespan <= 1.02 * exact.makespan


def test_an_exact_search_refuses_a_start_above_the_limit() -> None:
    pytest.importorskip("ortools", reason="OR-tools is not installed (extra: solver)")
    request = Request(num_ranks=2, num_microbatches=4, memory_limit=1.5)
    with pytest.raises(ScheduleError):
        solve(request, build_schedule("1f1b", Request(num_ranks=2, num_microbatches=4)))


def _steps(problem: object, wave: Wave) -> Sequence[Sequence[tuple[str, int, int, int]]]:
    forward, backward = wave_queues(problem, wave)  # type: ignore[arg-type]
    caps = (problem.limit,) * 4  # type: ignore[attr-defined]
    outcome = dispatch(problem, forward, backward, Rule(0.0, True, (4,) * 4, caps))  # type: ignore[arg-type]
    assert outcome is not None
    return outcome.steps


def test_of_a_familys_schedule_nothing_is_lost(request: pytest.FixtureRequest) -> None:
    made = Request(num_ranks=4, num_microbatches=8)
    problem = make_problem(made, "round-robin", 1)
    schedule: Schedule = build_schedule("zb-h1", made)
    merged = [
        [(a.kind, problem.stages_of(r)[a.chunk], a.microbatch, 0) for a in order if a.kind != "W"]
        for r, order in enumerate(schedule.ranks)
    ]
    outcome = refill(problem, merged, [0] * 4)  # type: ignore[arg-type]
    assert outcome is not None
    check_schedule(problem.schedule("refilled", outcome.steps))
