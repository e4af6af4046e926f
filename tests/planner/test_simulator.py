"""The simulator against a naive replay, closed forms, and the published records."""

import json
import random
import time
from pathlib import Path

import pytest
from random_schedules import (
    naive_peaks,
    naive_times,
    one_f_one_b,
    random_costs,
    random_schedule,
    runs_to_its_end,
    schedule_of,
)

from megamem.errors import ScheduleError
from megamem.ir.schedule import Action, Placement, Schedule
from megamem.ir.workload import PipelineCosts, StageCost, Uniform
from megamem.planner.schedules.passes import add_communication
from megamem.planner.schedules.simulator import price, simulate

RECORDS = Path(__file__).parents[2].parent / "shared" / "data" / "schedules.json"


def of(*texts: str, microbatches: int, chunks: int = 1, shape: str = "round-robin") -> Schedule:
    """A schedule from the text of its ranks."""
    lists = [tuple(map(Action.parse, text.split())) for text in texts]
    return schedule_of(lists, microbatches, chunks=chunks, shape=shape)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lookahead", [None, 0, 2])
def test_times_and_peaks_are_those_of_a_naive_replay(seed: int, lookahead: int | None) -> None:
    schedule = random_schedule(seed)
    costs = random_costs(schedule.placement, seed)
    if lookahead is not None:
        schedule = add_communication(schedule, lookahead)
    simulation = simulate(schedule, costs)
    naive = naive_times(schedule, costs)
    for row, expected in zip(simulation.times, naive, strict=True):
        assert [pytest.approx(span) for span in expected] == list(row)
    assert simulation.peak_activation == pytest.approx(naive_peaks(schedule, costs))
    assert simulation.makespan == pytest.approx(max(end for row in naive for _, end in row))
    assert price(schedule, costs) == (simulation.makespan, simulation.stage_span, simulation.peak_activation)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (1, 5), (4, 8), (4, 2), (8, 24)])
@pytest.mark.parametrize("costs", [(1, 1, 1), (3, 4, 2), (0.1, 0.2, 0.3)])
def test_1f1b_has_its_closed_form(ranks: int, microbatches: int, costs: tuple[float, float, float]) -> None:
    """Makespan (m + p - 1)(F + B + W), peak p - i microbatches on rank i (arXiv 2401.10241, table 1)."""
    forward, backward, weight = costs
    workload = Uniform(forward=forward, backward=backward, weight=weight)
    simulation = simulate(one_f_one_b(ranks, microbatches), workload)
    total = sum(costs)
    assert simulation.makespan == pytest.approx((microbatches + ranks - 1) * total)
    assert simulation.bubble_rate == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
    assert simulation.peak_activation == tuple(min(ranks - rank, microbatches) for rank in range(ranks))


def test_the_published_1f1b_records() -> None:
    if not RECORDS.exists():
        pytest.skip("shared/data/schedules.json is not beside this checkout")
    records = [r for r in json.loads(RECORDS.read_text())["records"] if r["schedule"] == "1F1B"]
    assert len(records) >= 30
    for record in records:
        forward, backward, weight, comm = record["cost_values"]
        workload = Uniform(forward=forward, backward=backward, weight=weight, comm=comm)
        simulation = simulate(one_f_one_b(record["p"], record["m"]), workload)
        assert simulation.makespan == pytest.approx(record["makespan"], rel=1e-9)
        assert simulation.stage_span == pytest.approx(record["stage_span"], rel=1e-9)
        assert max(simulation.peak_activation) == record["peak_mem_MB"]


def test_stage_span_leaves_out_the_wait_for_the_first_input() -> None:
    schedule = of("0F0 0B0 0W0", "0F0 0B0 0W0", microbatches=1)
    first = StageCost(forward=2, backward=3, weight=0)
    second = StageCost(forward=2, backward=3, weight=5)
    simulation = simulate(schedule, PipelineCosts(stages=(first, second), comm=1))
    assert simulation.times == (((0, 2), (9, 12), (12, 12)), ((3, 5), (5, 8), (8, 13)))
    assert (simulation.makespan, simulation.stage_span) == (13, 12)
    assert simulation.bubble_rate == pytest.approx(1 - 15 / 26)
    assert simulation.stage_bubble_rate == pytest.approx(1 - 15 / 24)


def test_a_hop_inside_a_rank_is_free() -> None:
    schedule = of("0F0 1F0 1B0 0B0 1W0 0W0", microbatches=1, chunks=2, shape="v")
    assert simulate(schedule, Uniform(comm=100)).makespan == 3


def test_a_fused_backward_sends_its_gradient_at_its_end() -> None:
    split = of("0F0 0B0 0W0", "0F0 0B0 0W0", microbatches=1)
    fused = of("0F0 0BW0", "0F0 0BW0", microbatches=1)
    costs = Uniform(weight=4)
    assert (simulate(split, costs).makespan, simulate(fused, costs).makespan) == (8, 12)


def test_parts_of_a_w_share_its_time_and_the_last_gives_the_memory() -> None:
    schedule = of("0F0 0B0 0W0:1/4 0F1 0W0:0/4 0W0:3/4 0W0:2/4 0B1 0W1", microbatches=2)
    simulation = simulate(schedule, Uniform(weight=2, activation=10, weight_grad=4))
    assert simulation.times[0][2] == (2, 2.5)
    assert simulation.peak_activation == (14,)
    assert simulation.memory_curve(0)[1:5] == [(0, 10), (2, 4), (2.5, 14), (5, 10)]


def test_a_message_waits_for_its_receive_and_for_those_before_it() -> None:
    late = of(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1 0W0 0W1",
        "0RECV_F0 0F0 0B0 0SEND_B0 0RECV_F1 0F1 0B1 0SEND_B1 0W0 0W1",
        microbatches=2,
    )
    early = of(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1 0W0 0W1",
        "0RECV_F0 0RECV_F1 0F0 0B0 0SEND_B0 0F1 0B1 0SEND_B1 0W0 0W1",
        microbatches=2,
    )
    costs = Uniform(comm=0.5)
    assert simulate(early, costs).times[1][5] == (3.5, 4.5)
    assert simulate(late, costs).times[1][5] == (4.0, 5.0)  # posted at 3.5, half a unit of latency


def test_offloaded_memory_is_given_back_after_the_copy_and_taken_before_the_copy_back() -> None:
    schedule = of("0F0 0OFFLOAD0 0F1 0RELOAD0 0B0 0W0 0B1 0W1", microbatches=2)
    quick = simulate(schedule, Uniform(offload=0.5))
    assert quick.times[0][1] == (1, 1.5)
    assert quick.times[0][3] == (2, 2.5)
    assert quick.times[0][4] == (2.5, 3.5)
    assert quick.peak_activation == (2,)
    slow = simulate(schedule, Uniform(offload=3))
    assert slow.times[0][3] == (4, 7)  # the copy back begins when the copy out has ended
    assert slow.makespan == 11
    assert dict(slow.memory_curve(0))[4] == 2


def test_copies_of_one_direction_follow_each_other() -> None:
    schedule = of("0F0 0OFFLOAD0 0F1 0OFFLOAD1 0RELOAD0 0RELOAD1 0B0 0W0 0B1 0W1", microbatches=2)
    times = simulate(schedule, Uniform(offload=2)).times[0]
    assert [times[index] for index in (1, 3, 4, 5)] == [(1, 3), (3, 5), (3, 5), (5, 7)]


@pytest.mark.parametrize("offload", [0.9, 1.0])
def test_offloading_lowers_the_peak_of_a_chain_of_forwards(offload: float) -> None:
    """Also where a copy ends at the very moment in which the next forward but one begins."""
    chain = " ".join(f"0F{m} 0OFFLOAD{m}" for m in range(6))
    back = " ".join(f"0RELOAD{m} 0B{m} 0W{m}" for m in range(6))
    assert simulate(of(f"{chain} {back}", microbatches=6), Uniform(offload=offload)).peak_activation == (2,)


@pytest.mark.parametrize(
    ("schedule", "wants"),
    [
        (of("0F0 0F1 0B1 0B0 0W0 0W1", "0F0 0B0 0F1 0B1 0W0 0W1", microbatches=2), None),
        (of("0B0 0F0 0W0", microbatches=1), "rank 0 waits at 0B0 for 0F0 of rank 0"),
        (of("0F0 0W0 0B0", microbatches=1), "rank 0 waits at 0W0 for 0B0 of rank 0"),
        (of("0F0 0B0 0F1 0B1", "0F1 0F0 0B0 0B1", microbatches=2), "rank 1 waits at 0F1 for 0F1 of rank 0"),
        (of("0F0 0SEND_F0 0B0", "0F0 0B0 0SEND_B0", microbatches=1), "its receive is not posted"),
        (of("0SEND_F0 0F0", "0RECV_F0 0F0", microbatches=1), "before it has made the message"),
        (of("0F0 0F1 0SEND_F0 0SEND_F1", "0RECV_F1 0RECV_F0 0F0", microbatches=2), "meets the receive for"),
        (of("0S0 0F0 0T0 0BW0", microbatches=1), "rank 0 waits at 0S0 for 0F0 of rank 0"),
        (of("0F0 0S0 0BW0 0T0", "0F0 0T0 0S0 0BW0", microbatches=1), "at 0T0 for S of microbatch 0 on every rank"),
        (of("0OFFLOAD0 0F0", microbatches=1), "before the F of its activation"),
        (of("0F0 0SEND_F0", microbatches=1), "no other rank at its end"),
    ],
)
def test_what_cannot_run_says_who_waits_for_what(schedule: Schedule, wants: str | None) -> None:
    if wants is None:
        assert simulate(schedule, Uniform()).makespan > 0
        return
    with pytest.raises(ScheduleError) as caught:
        simulate(schedule, Uniform())
    assert wants in str(caught.value)


@pytest.mark.parametrize("seed", range(80))
def test_it_stops_exactly_where_a_naive_replay_stops(seed: int) -> None:
    schedule = shuffled(random_schedule(seed), seed)
    if runs_to_its_end(schedule):
        simulate(schedule, Uniform())
    else:
        with pytest.raises(ScheduleError, match="cannot run to its end"):
            simulate(schedule, Uniform())


def shuffled(schedule: Schedule, seed: int) -> Schedule:
    """With two actions of a rank exchanged, which is still valid more often than not."""
    rng = random.Random(seed)
    lists = [list(actions) for actions in schedule.ranks]
    actions = rng.choice(lists)
    first = rng.randrange(len(actions))
    second = min(len(actions) - 1, first + rng.randint(1, 4))
    actions[first], actions[second] = actions[second], actions[first]
    return schedule.with_ranks(lists)


def test_costs_must_fit_the_placement() -> None:
    costs = PipelineCosts(stages=(StageCost(forward=1, backward=1, weight=1),) * 3)
    with pytest.raises(ScheduleError, match="3 stages do not fit 4 ranks"):
        simulate(one_f_one_b(4, 4), costs)


def test_zero_costs_have_no_bubble() -> None:
    simulation = simulate(one_f_one_b(2, 2), Uniform(forward=0, backward=0, weight=0))
    assert (simulation.makespan, simulation.bubble_rate, simulation.stage_bubble_rate) == (0, 0, 0)


def test_unequal_stages_count_with_their_own_memory() -> None:
    placement = Placement(shape="round-robin", num_ranks=2, num_chunks=1)
    light = StageCost(forward=1, backward=1, weight=1, activation=1, weight_grad=1)
    heavy = StageCost(forward=2, backward=2, weight=1, activation=7, weight_grad=1)
    costs = PipelineCosts(stages=(light, heavy)).costs(placement)
    assert simulate(one_f_one_b(2, 4), costs).peak_activation == (2, 7)


def test_it_is_fast_enough_for_a_search() -> None:
    """200 000 actions take a fifth of a second on the machine this was written on; ten times that is a mistake."""
    schedule = one_f_one_b(64, 1600)
    begin = time.process_time()
    price(schedule, Uniform())
    assert time.process_time() - begin < 2.5
