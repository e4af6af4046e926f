"""Vocabulary passes in schedules: checked, priced, inserted into every family, against a naive replay."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from megamem.cli import main
from megamem.config import Scheduling
from megamem.errors import InfeasibleError, ScheduleError
from megamem.ir.schedule import TOKENS_AHEAD, Action, Barriers, Placement, Schedule, Shape, parse_schedule
from megamem.ir.workload import PipelineCosts, StageCost, Uniform, VocabularyCost
from megamem.planner.schedules.checker import accumulates_in_order, check_schedule, find_problems
from megamem.planner.schedules.families import FAMILIES, build_schedule
from megamem.planner.schedules.family import Family, Request
from megamem.planner.schedules.forward_order import forward_order
from megamem.planner.schedules.passes import add_communication, forward_only
from megamem.planner.schedules.plan import plan_schedule
from megamem.planner.schedules.simulator import simulate
from megamem.planner.schedules.vocabulary_dispatch import Dispatch, Rules
from megamem.planner.schedules.vocabulary_passes import delayed
from megamem.planner.schedules.weight_placement import Timed

OUTPUT = StageCost(forward=1.5, backward=1.5, weight=1.5, activation=0.0, weight_grad=0.0)
INPUT = StageCost(forward=0.05, backward=0.0, weight=0.1, activation=0.0, weight_grad=0.0)
NOTHING = StageCost(forward=0.0, backward=0.0, weight=0.0, activation=0.0, weight_grad=0.0)
MODEL = Uniform(forward=1.0, backward=1.2, weight=0.9, comm=0.02, first=INPUT, last=OUTPUT, collective=0.05, kept=0.01)
SPLIT = "0IF0 0F0 0S0 0T0 0B0 0W0 0IB0"


def of(*texts: str, barriers: Barriers | None = 2, microbatches: int = 1) -> Schedule:
    """A schedule with one chunk from the text of its ranks."""
    placement = Placement(shape="round-robin", num_ranks=len(texts), num_chunks=1)
    ranks = tuple(tuple(map(Action.parse, text.split())) for text in texts)
    return Schedule(name="test", placement=placement, num_microbatches=microbatches, ranks=ranks, barriers=barriers)


def faults(schedule: Schedule) -> list[str]:
    return [f"{problem.rank}: {problem.text}" for problem in find_problems(schedule)]


def requests(family: Family, barriers: Barriers) -> list[Request]:
    """Ranks, chunks and microbatches of all sorts, the fewest among them."""
    found = []
    for ranks, chunks in itertools.product((1, 2, 3, 4), sorted({family.min_chunks, family.max_chunks or 3})):
        least = family.min_microbatches(Request(num_ranks=ranks, num_microbatches=1, num_chunks=chunks))
        for microbatches in sorted({least, least + 1, 2 * ranks + least}):
            found.append(
                Request(
                    num_ranks=ranks, num_microbatches=microbatches, num_chunks=chunks, workload=MODEL,
                    vocabulary=barriers,
                )
            )  # fmt: skip
    return found


def naive_ends(schedule: Schedule, costs: PipelineCosts) -> list[list[float]]:
    """The end of every action, by repeating the definitions from zero until nothing changes any more."""
    placement, share, barriers = schedule.placement, costs.vocabulary, schedule.barriers or 1
    assert share is not None
    last, times = placement.num_stages - 1, [[0.0] * len(actions) for actions in schedule.ranks]
    while True:
        before = [list(row) for row in times]
        end: dict[tuple[str, int, int], float] = {}
        for rank, actions in enumerate(schedule.ranks):
            for action, time in zip(actions, times[rank], strict=True):
                vocabulary = action.kind in ("IF", "S", "T", "IB")
                place = 0 if vocabulary else placement.stage(rank, action.chunk)
                kind = "B" if action.kind == "BW" else action.kind
                end[kind, place, action.microbatch] = max(time, end.get((kind, place, action.microbatch), 0.0))
        for rank, actions in enumerate(schedule.ranks):
            clock = 0.0
            for position, action in enumerate(actions):
                m, stage = action.microbatch, placement.stage(rank, action.chunk)
                cost = costs.stages[stage]
                hop = [
                    0.0 if 0 <= s <= last and placement.rank_of(s) == rank else costs.comm
                    for s in (stage - 1, stage + 1)
                ]
                need = {
                    "IF": 0.0,
                    "S": end["F", last, m] + share.collective,
                    "T": end["S", 0, m] + share.collective,
                    "IB": end["B", 0, m] + share.collective,
                    "F": end["F", stage - 1, m] + hop[0] if stage else end["IF", 0, m] + share.collective,
                    "W": 0.0,
                }
                if stage < last:
                    need["B"] = end["B", stage + 1, m] + hop[1]
                else:
                    need["B"] = end["T" if barriers == 2 else "S", 0, m] + share.collective
                need["BW"] = need["B"]
                seconds = {"F": cost.forward, "B": cost.backward, "W": cost.weight, "BW": cost.backward + cost.weight}
                own = seconds[action.kind] if action.kind in seconds else share.seconds(action.kind, barriers)
                clock = max(clock, need[action.kind]) + own
                times[rank][position] = clock
        if times == before:
            return times


@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if not f.offloads], ids=lambda family: family.name)
def test_every_family_takes_vocabulary_passes(family: Family, barriers: Barriers) -> None:
    for request in requests(family, barriers):
        schedule = build_schedule(family.name, request)
        check_schedule(schedule)
        check_schedule(add_communication(schedule))
        assert accumulates_in_order(schedule)
        assert (schedule.name, schedule.barriers) == (family.name, barriers)
        assert parse_schedule(schedule.to_text()) == schedule
        for actions in schedule.ranks:
            embedded = [action.kind for action in actions if action.kind == "IF" or action[:2] == ("F", 0)]
            counts = list(itertools.accumulate(1 if kind == "IF" else -1 for kind in embedded))
            if actions is schedule.ranks[0]:
                assert max(counts) <= TOKENS_AHEAD


@pytest.mark.parametrize("seed", range(40))
def test_the_simulator_is_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    barriers: Barriers = rng.choice([1, 2])  # type: ignore[assignment]
    name, ranks = rng.choice(["1f1b", "interleaved", "gis", "zb-h1", "v-half", "zb-v"]), rng.randint(1, 4)
    chunks = FAMILIES[name].min_chunks
    stages = tuple(
        StageCost(forward=rng.uniform(0.5, 2), backward=rng.uniform(0.5, 2), weight=rng.uniform(0.1, 2))
        for _ in range(ranks * chunks)
    )
    share = VocabularyCost(
        logits=rng.random(), input_grad=rng.random(), weight_grad=rng.random(), embed=rng.random() / 5,
        embed_grad=rng.random() / 5, collective=rng.choice([0.0, 0.2]), kept=rng.random(),
    )  # fmt: skip
    costs = PipelineCosts(stages=stages, comm=rng.choice([0.0, 0.1]), vocabulary=share)
    request = Request(
        num_ranks=ranks, num_microbatches=6, num_chunks=chunks, workload=costs, vocabulary=barriers
    )  # fmt: skip
    schedule = build_schedule(name, request)
    simulation = simulate(schedule, costs)
    for spans, ends in zip(simulation.times, naive_ends(schedule, costs), strict=True):
        assert [end for _, end in spans] == pytest.approx(ends)
    for rank, peak in enumerate(simulation.peak_activation):
        curve = simulation.memory_curve(rank)
        assert max(held for _, held in curve) == pytest.approx(peak)
        assert curve[-1][1] == pytest.approx(0, abs=1e-9)
        check_schedule(schedule, costs=costs, memory_limit=max(simulation.peak_activation))
    with pytest.raises(InfeasibleError, match="memory limit"):
        check_schedule(schedule, costs=costs, memory_limit=0.99 * max(simulation.peak_activation))


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "gis", "v-half"])
def test_the_times_by_which_passes_are_placed_are_the_simulators(name: str) -> None:
    chunks = FAMILIES[name].min_chunks
    plain = build_schedule(name, Request(num_ranks=4, num_microbatches=9, num_chunks=chunks, workload=MODEL))
    costs = MODEL.costs(plain.placement, sharded=True)
    for barriers, before in itertools.product((1, 2), (frozenset({"F"}), frozenset({"F", "B", "BW", "W"}))):
        timed = Dispatch(plain.ranks, plain.placement, costs, barriers, Rules(before)).run()  # type: ignore[arg-type]
        assert timed is not None  # no list is stopped by vocabulary passes
        simulation = simulate(replace(plain, ranks=timed.ranks, barriers=barriers), MODEL)  # type: ignore[arg-type]
        # IF waits for its turn there, so that few embeddings lie about; nothing waits for that when ranks run.
        assert simulation.makespan <= timed.makespan * (1 + 1e-9)
        assert timed.makespan == pytest.approx(simulation.makespan, rel=0.01)
        assert timed.peaks == pytest.approx(simulation.peak_activation)


@pytest.mark.parametrize(
    ("schedule", "wants"),
    [
        (of(SPLIT, SPLIT), []),
        (of(SPLIT.replace("0T0 ", ""), SPLIT), ["0: T of microbatch 0 is missing"]),
        (of(SPLIT.replace("0IB0", ""), SPLIT), ["0: IB of microbatch 0 is missing"]),
        (of(SPLIT.replace("0S0 0T0", "0T0 0S0"), SPLIT), ["0: T of microbatch 0 is before its S"]),
        (of("0F0 0S0 0B0 0T0 0W0", "0F0 0S0 0B0 0W0 0T0", barriers=1), []),
        (
            of("0F0 0S0 0T0 0B0 0W0", "0F0 0S0 0B0 0W0 0T0"),
            ["0: deadlock: 0B0 waits for 0B0 of rank 1", "1: deadlock: 0B0 waits for T of microbatch 0 on every rank"],
        ),
        (
            of("0F0 0IF0 0BW0 0IB0"),
            ["0: deadlock: 0F0 waits for IF of microbatch 0 on every rank"],
        ),
        (of("0IF0 0F0 0IB0 0BW0"), ["0: deadlock: 0IB0 waits for 0B0 of rank 0"]),
        (
            of("0F0 0F1 0S0 0S1 0BW0 0BW1 0T0 0T1", "0F0 0F1 0S1 0S0 0BW0 0BW1 0T0 0T1", barriers=1, microbatches=2),
            ["1: S is not in the order in which 0F is on rank 1: microbatch 1 where 0 is next"],
        ),
        (
            of("0F0 0F1 0S0 0S1 0T1 0T0 0BW0 0BW1", "0F0 0F1 0S0 0S1 0T0 0T1 0BW0 0BW1", microbatches=2),
            ["1: T is not in the order in which it is on rank 0: microbatch 0 where 1 is next"],
        ),
        (of("0F0 0F1 0S0 0S1 0BW0 0BW1 0T1 0T0", barriers=1, microbatches=2), []),  # nobody waits for T
    ],
)
def test_what_is_wrong_is_named(schedule: Schedule, wants: list[str]) -> None:
    assert faults(schedule) == wants


def test_a_pass_of_the_vocabulary_belongs_to_no_chunk() -> None:
    placement = Placement(shape="v", num_ranks=1, num_chunks=2)
    actions = tuple(map(Action.parse, ["0F0", "1F0", "1S0", "1BW0", "0BW0", "0T0"]))
    schedule = Schedule(name="test", placement=placement, num_microbatches=1, ranks=(actions,), barriers=1)
    assert faults(schedule) == ["0: 1S0: the chunk of an S is 0, for it belongs to none"]


def test_files_from_before_the_line_have_one_barrier() -> None:
    text = of("0F0 0S0 0BW0 0T0", barriers=1).to_text()
    assert "barriers: 1\n" in text
    old = parse_schedule(text.replace("barriers: 1\n", ""))
    check_schedule(old)
    assert simulate(old, MODEL).makespan == simulate(parse_schedule(text), MODEL).makespan
    with pytest.raises(ScheduleError, match="1 or 2 barriers, not 3"):
        parse_schedule(text.replace("barriers: 1", "barriers: 3"))


@pytest.mark.parametrize("seed", range(30))
def test_an_exchange_is_refused_exactly_when_it_breaks_the_order_or_cannot_run(seed: int) -> None:
    rng = random.Random(seed)
    request = Request(num_ranks=3, num_microbatches=4, workload=MODEL, vocabulary=rng.choice([1, 2]))  # type: ignore[arg-type]
    schedule = build_schedule("1f1b", request)
    lists = [list(actions) for actions in schedule.ranks]
    actions = rng.choice(lists)
    first = rng.randrange(len(actions) - 1)
    actions[first], actions[first + 1] = actions[first + 1], actions[first]
    changed = schedule.with_ranks(lists)
    try:
        simulate(changed, MODEL)
        runs = True
    except ScheduleError:
        runs = False
    sequences = {
        kind: {tuple(a.microbatch for a in each if a.kind == kind) for each in lists} for kind in ("S", "T", "IF", "IB")
    }
    bound = {"S", "IF", "IB", *(["T"] if schedule.barriers == 2 else [])}
    sequences["S"].add(tuple(a.microbatch for a in lists[2] if a.kind == "F"))  # that feed the collectives
    sequences["IB"].add(tuple(a.microbatch for a in lists[0] if a.kind == "BW"))
    ordered = all(len(sequences[kind]) == 1 for kind in bound)
    assert (not find_problems(changed)) == (runs and ordered and _is_sound(changed))


def _is_sound(schedule: Schedule) -> bool:
    """What a list must hold by itself: T after S, B after F."""
    for actions in schedule.ranks:
        place = {action: position for position, action in enumerate(actions)}
        for action in actions:
            before = {"T": "S", "BW": "F"}.get(action.kind)
            if before is not None and place[action._replace(kind=before)] > place[action]:  # type: ignore[arg-type]
                return False
    return True


@pytest.mark.parametrize(("barriers", "more"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_1f1b_needs_the_published_memory_and_v_half_no_more(ranks: int, barriers: Barriers, more: int) -> None:
    """2411.05288, section 5.1: p+1 and p+2 microbatches."""
    for name, least in (("1f1b", ranks), ("v-half", (ranks + 2) // 2)):
        chunks = FAMILIES[name].min_chunks
        workload = replace(MODEL, kept=0.0)
        request = Request(
            num_ranks=ranks, num_microbatches=4 * ranks, num_chunks=chunks, workload=workload, vocabulary=barriers
        )  # fmt: skip
        peak = max(simulate(build_schedule(name, request), workload).peak_activation)
        assert peak <= least + more + 1e-9


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "gis", "gis-h", "v-half"])
@pytest.mark.parametrize("barriers", [1, 2])
def test_the_bubble_is_no_longer_than_without_an_output_layer(name: str, barriers: Barriers) -> None:
    """What is idle in the steady state would show as idle time per microbatch."""
    chunks = FAMILIES[name].min_chunks
    request = Request(num_ranks=4, num_microbatches=48, num_chunks=chunks, workload=MODEL, vocabulary=barriers)
    layers = replace(MODEL, first=NOTHING, last=NOTHING)
    bare = replace(request, vocabulary=None, workload=layers)
    schedule = build_schedule(name, request)
    shared, without = simulate(schedule, MODEL), simulate(build_schedule(name, bare), layers)
    assert shared.bubble_rate <= without.bubble_rate + 0.01
    baseline = simulate(build_schedule(name, replace(request, vocabulary=None)), MODEL)
    assert shared.makespan < 0.65 * baseline.makespan


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if not f.offloads], ids=lambda family: family.name)
def test_a_memory_limit_is_kept_and_the_nearest_one_named(family: Family) -> None:
    least_microbatches = family.min_microbatches(
        Request(num_ranks=4, num_microbatches=1, num_chunks=family.min_chunks)
    )  # fmt: skip
    request = Request(
        num_ranks=4, num_microbatches=max(9, least_microbatches), num_chunks=family.min_chunks, workload=MODEL,
        vocabulary=2,
    )  # fmt: skip
    with pytest.raises(InfeasibleError, match="nearest: ") as caught:
        build_schedule(family.name, replace(request, memory_limit=0.5))
    least = float(str(caught.value).rpartition("nearest: ")[2])
    for limit in (least, least * 1.1, least + 2):
        schedule = build_schedule(family.name, replace(request, memory_limit=limit))
        check_schedule(schedule, costs=MODEL, memory_limit=limit)


def test_more_memory_is_never_slower() -> None:
    request = Request(num_ranks=4, num_microbatches=12, num_chunks=2, workload=MODEL, vocabulary=1)
    times = [
        simulate(build_schedule("gis-h", replace(request, memory_limit=limit)), MODEL).makespan for limit in (4.2, 5, 8)
    ]
    assert times[0] >= times[1] / 1.01 >= times[2] / 1.02


def test_families_that_place_copies_by_time_are_refused() -> None:
    request = Request(num_ranks=4, num_microbatches=8, num_chunks=2, workload=MODEL, vocabulary=1)
    with pytest.raises(InfeasibleError, match="nearest: gis-h"):
        build_schedule("po-h", request)


def test_delayed_lists_keep_their_actions() -> None:
    schedule = build_schedule("gis", Request(num_ranks=4, num_microbatches=8, num_chunks=2))
    later = delayed(schedule, 3)
    for before, after in zip(schedule.ranks, later.ranks, strict=True):
        assert [a for a in before if a.kind == "F"] == [a for a in after if a.kind == "F"]
        assert [a for a in before if a.kind != "F"] == [a for a in after if a.kind != "F"]
    check_schedule(later)
    assert delayed(schedule, 0) == schedule


def test_an_evaluation_keeps_what_makes_the_loss() -> None:
    schedule = build_schedule("1f1b", Request(num_ranks=2, num_microbatches=3, workload=MODEL, vocabulary=2))
    assert {action.kind for _, action in forward_only(schedule)} == {"IF", "F", "S"}


@pytest.mark.parametrize("shape", ["round-robin", "v"])
@pytest.mark.parametrize(("ranks", "chunks", "microbatches"), [(1, 1, 2), (2, 2, 3), (4, 1, 1), (3, 2, 7)])
def test_a_forward_only_step_embeds_first_and_ends_with_the_loss(
    shape: Shape, ranks: int, chunks: int, microbatches: int
) -> None:
    placement = Placement(shape=shape, num_ranks=ranks, num_chunks=chunks)
    plain, shared = (forward_order(placement, microbatches, vocabulary=each) for each in (False, True))
    for before, after in zip(plain.ranks, shared.ranks, strict=True):
        assert [action for action in after if action.kind == "F"] == list(before)
        for kind in ("IF", "S"):
            assert [a.microbatch for a in after if a.kind == kind] == list(range(microbatches))
    assert simulate(shared, MODEL).makespan > 0  # it runs to its end


def test_a_plan_has_the_passes_that_the_run_wants(tmp_path: Path) -> None:
    def plan(name: str, vocabulary: Barriers | None, **options: str) -> Schedule:
        wanted = Scheduling(name=name, **options)
        return plan_schedule(wanted, num_ranks=2, num_microbatches=6, vocabulary=vocabulary).schedule

    assert plan("1f1b", 2).barriers == 2
    assert plan("1f1b", None).barriers is None
    with pytest.raises(InfeasibleError, match="nearest: schedule gis"):
        plan("auto", 1)
    path = tmp_path / "mine.txt"
    path.write_text(plan("1f1b", None).to_text(), encoding="utf-8")
    assert plan("file", 1, file=str(path)).barriers == 1
    assert plan("file", None, file=str(path)).barriers is None
    path.write_text(plan("1f1b", 2).to_text(), encoding="utf-8")
    assert plan("file", 2, file=str(path)).barriers == 2
    for other in (1, None):
        with pytest.raises(InfeasibleError, match="has 2 barrier"):
            plan("file", other, file=str(path))


def test_simulate_prices_a_schedule_with_and_without_vocabulary_parallelism(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = "simulate --schedule gis --stages 4 --microbatches 16 --output-layer 1.5 --json".split()  # noqa: SIM905
    figures = []
    for flags in ([], ["--vocabulary", "1"], ["--vocabulary", "2", "--svg", str(tmp_path / "x.svg")]):
        assert main([*command, *flags]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    baseline, one, two = figures
    assert "barriers" not in baseline
    assert [one["barriers"], two["barriers"]] == [1, 2]
    assert max(one["makespan"], two["makespan"]) < 0.7 * baseline["makespan"]
    assert one["costs"]["vocabulary"]["logits"] == 0.375
    assert "S vocabulary" in (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert main([*command[:2], "auto", *command[3:], "--vocabulary", "1"]) != 0
    assert "name a --schedule" in capsys.readouterr().err


def test_a_rank_cannot_run_ahead_of_the_tokens_that_the_first_stage_sends() -> None:
    """Every IF of rank 1 at its beginning: the sixth waits for tokens of rank 0, which waits for rank 1's first B."""
    schedule = build_schedule("1f1b", Request(num_ranks=2, num_microbatches=8, vocabulary=1))
    eager = sorted(schedule.ranks[1], key=lambda action: action.kind != "IF")
    problems = find_problems(schedule.with_ranks([schedule.ranks[0], eager]))
    assert find_problems(schedule) == []
    waits = next(problem for problem in problems if problem.rank == 1)
    assert "waits for tokens that rank 0 sends as it comes to 0IF" in waits.text
    assert problems and all(problem.text.startswith("deadlock: ") for problem in problems)


@pytest.mark.parametrize("name", ["1f1b", "gis", "v-half"])
def test_an_order_that_takes_longer_than_the_bound_is_given_up(name):
    """And none that is as quick as the bound."""
    request = Request(num_ranks=4, num_microbatches=8, num_chunks=FAMILIES[name].min_chunks)
    base = build_schedule(name, request)
    costs = MODEL.costs(base.placement, sharded=True)

    def run(bound: float) -> Timed | None:
        return Dispatch(base.ranks, base.placement, costs, 1, Rules(frozenset({"F", "B", "BW", "W"}))).run(bound)

    whole = run(math.inf)
    assert whole is not None
    assert run(whole.makespan) == whole
    assert run(0.999 * whole.makespan) is None
