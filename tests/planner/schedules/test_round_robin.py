"""The families on Megatron-Core's own placement are what their papers, and Megatron-Core, define."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megamem.errors import InfeasibleError
from megamem.ir.schedule import Schedule, order_text
from megamem.ir.workload import PipelineCosts, StageCost, Uniform
from megamem.planner.schedules.checker import check_schedule, find_problems
from megamem.planner.schedules.families import build_schedule
from megamem.planner.schedules.family import Request, at_least
from megamem.planner.schedules.gis import group_interleaved
from megamem.planner.schedules.interleaved import group_sizes, pass_table
from megamem.planner.schedules.pipe_offload import uniform_repeat
from megamem.planner.schedules.simulator import simulate

TABLE5: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[3] / "ci" / "bench" / "data" / "zero_bubble_table5.json").read_text(encoding="utf-8")
)["rows"]
LONG_SEQUENCE = Uniform(forward=2.333, backward=3.667, weight=1, comm=0.02)


def build(name: str, ranks: int, microbatches: int, chunks: int = 1, **further: Any) -> Schedule:
    """A schedule by name."""
    request = Request(num_ranks=ranks, num_microbatches=microbatches, num_chunks=chunks, **further)
    return build_schedule(name, request)


def peaks(schedule: Schedule, workload: Uniform | PipelineCosts | None = None) -> tuple[float, ...]:
    """Activation memory of every rank."""
    return simulate(schedule, workload or Uniform()).peak_activation


@pytest.mark.parametrize("row", TABLE5, ids=lambda row: f"{row['model']}-{row['microbatches']}")
def test_bubble_rates_of_table_5_of_the_zero_bubble_paper(row: dict[str, Any]) -> None:
    times = {name: row[name] for name in ("forward", "backward", "weight", "comm")}
    hidden = row["hidden"]
    share = 32 * hidden / (34 * hidden + 5 * row["heads"] * row["sequence"])
    workload = Uniform(**times, weight_grad=share)
    for name in ("1f1b", "zb-h1", "zb-h2", "zb-1p", "zb-2p"):
        schedule = build(name, row["ranks"], row["microbatches"], workload=workload)
        rate = simulate(schedule, workload).stage_bubble_rate
        assert round(rate, 4) == row["bubble_rates"][name], name
    ranks, microbatches, chunks = row["ranks"], row["microbatches"], row["interleaved_chunks"]
    found = simulate(build("interleaved", ranks, microbatches, chunks), workload)
    hop_rounds = (2 * chunks * ranks - 2) * workload.comm
    once = workload.forward + workload.backward + workload.weight
    assert found.makespan == pytest.approx((microbatches + (ranks - 1) / chunks) * once + hop_rounds, rel=2e-3)
    closed = found.makespan - ranks * workload.comm  # the paper's column counts p hops less
    assert 1 - microbatches * once / closed == pytest.approx(row["bubble_rates"]["interleaved"], abs=1e-3)


@pytest.mark.parametrize("ranks", range(2, 17))
def test_peaks(ranks: int) -> None:
    microbatches = 3 * ranks
    for name, each in {
        "1f1b": [ranks - rank for rank in range(ranks)],
        "zb-h1": [ranks] * ranks,
        "zb-h2": [2 * ranks - 1] * ranks,
    }.items():
        assert peaks(build(name, ranks, microbatches)) == pytest.approx(each), name
    assert max(peaks(build("zb-1p", ranks, microbatches))) <= ranks
    assert max(peaks(build("zb-2p", ranks, microbatches))) <= 2 * ranks
    half = (ranks + 1) // 2
    for chunks in (2, 3, 4):
        assert max(peaks(build("interleaved", ranks, microbatches, chunks))) == pytest.approx(
            (chunks * ranks + ranks - 1) / chunks
        )
        assert max(peaks(build("gis", ranks, microbatches, chunks))) == pytest.approx(ranks)
        assert max(peaks(build("gis-h", ranks, microbatches, chunks))) == pytest.approx(
            (half * (chunks - 1) + ranks) / chunks
        )
        for group in range(half, ranks + 1):
            schedule = build("gis", ranks, 4 * group, chunks, group=group)
            assert max(peaks(schedule)) == pytest.approx((group * (chunks - 1) + ranks) / chunks)


def test_zero_bubble_peaks_with_memory_that_b_gives_back() -> None:
    ranks, share = 8, 0.4
    for rank, (one, two) in enumerate(
        zip(
            peaks(build("zb-h1", ranks, 24), Uniform(weight_grad=share)),
            peaks(build("zb-h2", ranks, 24), Uniform(weight_grad=share)),
            strict=True,
        )
    ):
        assert one == pytest.approx(ranks - rank + rank * share)
        assert two == pytest.approx(2 * (ranks - rank) - 1 + 2 * rank * share)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_bubbles_by_the_formulas_of_the_papers(ranks: int) -> None:
    workload, microbatches = Uniform(forward=10, backward=11, weight=4), 4 * ranks
    forward, backward, weight = 10, 11, 4
    for name, chunks, makespan_bubble, span_bubble in (
        ("1f1b", 1, forward + backward + weight, forward + backward + weight),
        ("zb-h1", 1, forward + backward - weight, forward + backward - weight),
        ("zb-h2", 1, forward + backward - weight, forward + backward - 2 * weight),
        ("interleaved", 4, (forward + backward + weight) / 4, (forward + backward + weight) / 4),
        ("gis", 4, (forward + backward) / 4, (forward + backward) / 4),
    ):
        found = simulate(build(name, ranks, microbatches, chunks), workload)
        steady = microbatches * (forward + backward + weight)
        if name != "zb-h2":
            assert found.makespan - steady == pytest.approx((ranks - 1) * makespan_bubble), name
        assert found.stage_span - steady == pytest.approx((ranks - 1) * span_bubble), name


def test_1f1b_is_megatron_cores_order() -> None:
    assert order_text(build("1f1b", 4, 4).ranks[1]) == "0F0 0F1 0F2 0BW0 0F3 0BW1 0BW2 0BW3"
    assert order_text(build("1f1b", 4, 2).ranks[0]) == "0F0 0F1 0BW0 0BW1"
    assert order_text(build("1f1b", 1, 2).ranks[0]) == "0F0 0BW0 0F1 0BW1"


@pytest.mark.megatron
@pytest.mark.parametrize(("ranks", "chunks"), [(2, 2), (3, 2), (4, 3), (8, 2)])
def test_interleaved_is_megatron_cores_order(ranks: int, chunks: int) -> None:
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    for group in (ranks, ranks + 1, 2 * ranks):
        for microbatches in range(group, 3 * group + 1):
            if 0 < microbatches % group < ranks:  # Megatron-Core raises
                with pytest.raises(InfeasibleError, match="nearest: group"):
                    build("interleaved", ranks, microbatches, chunks, group=group)
                continue
            schedule = build("interleaved", ranks, microbatches, chunks, group=group)
            table = get_schedule_table(microbatches, chunks, group)
            assert [(chunk, microbatch) for microbatch, chunk in table] == pass_table(
                group_sizes(microbatches, group), chunks
            )
            for rank in range(ranks):
                pp_group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
                total, _, warmup, remaining = get_pp_rank_microbatches(
                    microbatches, chunks, group,
                    p2p_communicator=SimpleNamespace(pp_group=pp_group, virtual_pipeline_model_parallel_size=chunks),
                )  # fmt: skip
                forwards = [f"{chunk}F{microbatch}" for microbatch, chunk in table]
                backwards = [f"{chunks - 1 - chunk}BW{microbatch}" for microbatch, chunk in table]
                expected = forwards[:warmup]
                for index in range(remaining):
                    expected += [forwards[index + warmup], backwards[index]]
                expected += backwards[remaining:total]
                assert order_text(schedule.ranks[rank]) == " ".join(expected)


def test_interleaved_takes_the_smallest_group_that_megatron_core_accepts() -> None:
    assert build("interleaved", 4, 8, 2).group == 4
    assert build("interleaved", 4, 6, 2).group == 6
    assert build("interleaved", 4, 9, 2).group == 5


@pytest.mark.parametrize("ranks", [3, 6, 7, 8])
@pytest.mark.parametrize("chunks", [2, 3])
def test_gis_divides_microbatches_so_that_nobody_waits_for_ever(ranks: int, chunks: int) -> None:
    """The rule in `gis.py`, which is arithmetic, against runs of the lists."""
    for group in range((ranks + 1) // 2, ranks + 1):
        for microbatches in range(1, 4 * group + 1):
            request = Request(num_ranks=ranks, num_microbatches=microbatches, num_chunks=chunks, group=group)
            plain = group_sizes(microbatches, group)
            stuck = find_problems(group_interleaved(request, "gis", group, plain))
            try:
                schedule = build_schedule("gis", request)
            except InfeasibleError as fault:
                assert stuck, f"{microbatches} in groups of {group}"
                assert "nearest: group" in str(fault)
                continue
            assert not find_problems(schedule)
            assert max(peaks(schedule)) <= (group * (chunks - 1) + ranks) / chunks + 1e-9
            if not stuck:  # then it is Megatron-Core's table
                assert schedule == group_interleaved(request, "gis", group, plain)


@pytest.mark.parametrize("group", [1, 3, 9])
def test_gis_names_the_groups_it_works_with(group: int) -> None:
    with pytest.raises(InfeasibleError, match=r"groups of 4 .* to 8, not"):
        build("gis", 8, 16, 2, group=group)


def test_gis_h_beats_interleaved_in_memory_and_1f1b_in_both() -> None:
    half, full = (simulate(build(name, 8, 24, 4), LONG_SEQUENCE) for name in ("gis-h", "interleaved"))
    plain = simulate(build("1f1b", 8, 24), LONG_SEQUENCE)
    assert max(half.peak_activation) == 5
    assert max(full.peak_activation) > 9
    assert half.makespan < plain.makespan
    assert half.makespan == pytest.approx(
        202.1, abs=0.1
    )  # the figure of an independent simulator; V-Half takes 224.6 at this peak


@pytest.mark.parametrize(
    "workload", [Uniform(), LONG_SEQUENCE, Uniform(forward=11.3, backward=11.2, weight=8.1, comm=0.4)]
)
def test_a_limit_lets_gis_run_w_later_at_the_same_peak(workload: Uniform) -> None:
    ranks, microbatches, chunks = 8, 24, 2
    for name, limit in (("gis", 8.0), ("gis-h", 6.0)):
        published = simulate(build(name, ranks, microbatches, chunks), workload)
        late = build(name, ranks, microbatches, chunks, workload=workload, memory_limit=limit)
        found = simulate(late, workload)
        assert max(found.peak_activation) <= limit == max(published.peak_activation)
        assert found.makespan < published.makespan
        if name == "gis":  # the lag takes (p-1) W/v off, up to what the hops cost
            assert found.makespan <= published.makespan - 0.8 * (ranks - 1) * workload.weight / chunks
    chosen = build("gis", ranks, microbatches, chunks, workload=workload, memory_limit=7.0)
    assert chosen.group == 6  # the largest whose (v-1)g + p chunk activations fit
    with pytest.raises(InfeasibleError, match=r"groups of 4, and the memory limit is 5\.5; nearest: 6"):
        build("gis", ranks, microbatches, chunks, workload=workload, memory_limit=5.5)


def test_zb_2p_uses_what_b_gives_back_and_zb_1p_stays_within_its_limit() -> None:
    workload = Uniform(forward=18.5, backward=18.1, weight=9.3, comm=0.6, weight_grad=0.37)
    two = build("zb-2p", 8, 24, workload=workload)
    assert max(peaks(two)) > 16  # in flight, counted in microbatches
    assert max(peaks(two, workload)) <= 16
    limits = [
        simulate(build("zb-1p", 8, 24, workload=workload, memory_limit=limit), workload) for limit in (2, 4, 8, 12)
    ]
    assert [max(each.peak_activation) <= limit for each, limit in zip(limits, (2, 4, 8, 12), strict=True)] == [True] * 4
    assert [each.makespan for each in limits] == sorted((each.makespan for each in limits), reverse=True)


def test_a_limit_below_one_microbatch_is_refused_with_the_least_that_works() -> None:
    stages = tuple(StageCost(forward=1, backward=1, weight=1, activation=a, weight_grad=a) for a in (1.23456789, 1.0))
    costs = PipelineCosts(stages=stages)
    with pytest.raises(
        InfeasibleError, match=r"takes 1\.23457 on a rank, and the memory limit is 1; nearest: 1\.23457"
    ):
        build("zb-1p", 2, 4, workload=costs, memory_limit=1.0)
    check_schedule(build("zb-1p", 2, 4, workload=costs, memory_limit=1.23457), costs=costs, memory_limit=1.23457)


@pytest.mark.parametrize(
    ("amount", "text"), [(8.0, "8"), (0.0, "0"), (1.2345612, "1.23457"), (123456789.0, "1.23457e+08")]
)
def test_a_lower_bound_is_rounded_up(amount: float, text: str) -> None:
    assert at_least(amount) == text
    assert float(at_least(amount)) >= amount


@pytest.mark.parametrize(("ranks", "chunks"), [(2, 2), (4, 4), (5, 3), (8, 2), (8, 4), (8, 6), (16, 8)])
def test_the_uniform_repeat_has_one_action_a_slot_and_steady_memory(ranks: int, chunks: int) -> None:
    schedule = build("po-f", ranks, 4 * ranks, chunks)
    bare = schedule.with_ranks([a for a in actions if a.is_compute] for actions in schedule.ranks)
    assert [list(actions) for actions in bare.ranks] == uniform_repeat(bare.placement, 4 * ranks)
    if (ranks, chunks) == (8, 4):
        assert max(peaks(bare)) * chunks == pytest.approx(23)  # chunk activations; GIS with g=4 holds 20


def test_offloading_lowers_the_peak_and_delays_nothing() -> None:
    for copy in (0.0, 0.25, 0.5, 1.0, 2.0):
        workload = Uniform(forward=1, backward=1.1, weight=0.7, comm=0.05, offload=copy)
        half, full = (build(name, 8, 32, 4, workload=workload) for name in ("po-h", "po-f"))
        bare = full.with_ranks([a for a in actions if a.is_compute] for actions in full.ranks)
        plain = simulate(bare, workload)
        for schedule in (half, full):
            found = simulate(schedule, workload)
            assert found.makespan == pytest.approx(plain.makespan)
            assert found.peak_activation < plain.peak_activation
        assert max(peaks(half, workload)) <= 9 / 4
        assert max(peaks(full, workload)) <= 6 / 4


def test_copies_that_do_not_fit_stay_on_the_device() -> None:
    def copied(seconds: float) -> int:
        schedule = build("po-f", 8, 32, 4, workload=Uniform(offload=seconds))
        check_schedule(schedule)
        return sum(action.kind == "OFFLOAD" for _, action in schedule)

    counts = [copied(seconds) for seconds in (0.5, 3.0, 6.0, 20.0, 1000.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 900
    assert counts[-1] == 0
