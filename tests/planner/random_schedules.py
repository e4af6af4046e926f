"""Random valid schedules, and the definitions once more in their most naive form: what the tests compare with."""

import random
from collections.abc import Iterator

from megamem.ir.schedule import Action, Placement, Schedule
from megamem.ir.workload import PipelineCosts, StageCost


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """1F1B from its definition: p-1-i forwards, then one forward and one backward in turn, then the rest."""
    lists = []
    for rank in range(ranks):
        warmup = min(ranks - 1 - rank, microbatches)
        actions = [Action("F", 0, m) for m in range(warmup)]
        for m in range(microbatches - warmup):
            actions += [Action("F", 0, warmup + m), Action("BW", 0, m)]
        actions += [Action("BW", 0, m) for m in range(microbatches - warmup, microbatches)]
        lists.append(tuple(actions))
    return schedule_of(lists, microbatches, name="1f1b")


def schedule_of(
    lists: list[tuple[Action, ...]],
    microbatches: int,
    *,
    name: str = "test",
    shape: str = "round-robin",
    chunks: int = 1,
) -> Schedule:
    """A schedule of these lists."""
    placement = Placement(shape=shape, num_ranks=len(lists), num_chunks=chunks)  # type: ignore[arg-type]
    return Schedule(name=name, placement=placement, num_microbatches=microbatches, ranks=tuple(lists))


def random_schedule(seed: int) -> Schedule:
    """A valid schedule: actions appended one by one, each only when all that it needs is in some list already."""
    rng = random.Random(seed)
    shape, ranks, chunks = rng.choice(["round-robin", "v"]), rng.randint(1, 5), rng.randint(1, 3)
    placement = Placement(shape=shape, num_ranks=ranks, num_chunks=chunks)  # type: ignore[arg-type]
    microbatches = rng.randint(1, 6)
    lists: list[list[Action]] = [[] for _ in range(ranks)]
    open_work = [Action("F", c, m) for c in range(chunks) for m in range(microbatches)]
    waiting = [set(open_work) for _ in range(ranks)]
    happened: set[tuple[str, int, int]] = set()
    while any(waiting):
        rank = rng.choice([rank for rank in range(ranks) if waiting[rank]])
        ready = [a for a in sorted(waiting[rank]) if all(need in happened for need in needs(placement, rank, a))]
        if not ready:
            continue
        action = rng.choice(ready)
        waiting[rank].remove(action)
        lists[rank].append(action)
        stage = placement.stage(rank, action.chunk)
        if action.kind == "F":
            happened.add(("F", stage, action.microbatch))
            waiting[rank].add(action._replace(kind=rng.choice(["B", "BW"])))
        elif action.kind in ("B", "BW"):
            happened.add(("B", stage, action.microbatch))
            if action.kind == "B":
                parts = rng.choice([1, 1, 2, 3])
                waiting[rank] |= {Action("W", action.chunk, action.microbatch, part, parts) for part in range(parts)}
    return Schedule(
        name=f"random {seed}",
        placement=placement,
        num_microbatches=microbatches,
        ranks=tuple(tuple(actions) for actions in lists),
    )


def random_costs(placement: Placement, seed: int) -> PipelineCosts:
    """Unequal stages with a latency between ranks."""
    rng = random.Random(seed)
    stages = []
    for _ in range(placement.num_stages):
        forward, backward, weight, activation = (rng.uniform(0.5, 3) for _ in range(4))
        kept = activation * rng.random()
        cost = StageCost(
            forward=forward,
            backward=backward,
            weight=weight,
            activation=activation,
            weight_grad=kept,
            offload=rng.random(),
        )
        stages.append(cost)
    return PipelineCosts(stages=tuple(stages), comm=rng.choice([0.0, 0.3, 2.0]))


def needs(placement: Placement, rank: int, action: Action) -> Iterator[tuple[str, int, int]]:
    """What a compute action needs to have happened: F or B of (stage, microbatch)."""
    stage, microbatch = placement.stage(rank, action.chunk), action.microbatch
    if action.kind == "F" and stage > 0:
        yield "F", stage - 1, microbatch
    if action.kind in ("B", "BW"):
        yield "F", stage, microbatch
        if stage + 1 < placement.num_stages:
            yield "B", stage + 1, microbatch
    if action.kind == "W":
        yield "B", stage, microbatch


def runs_to_its_end(schedule: Schedule) -> bool:
    """Whether the lists can be run, by trying the head of every list again and again."""
    lists = [list(actions) for actions in schedule.ranks]
    happened: set[tuple[str, int, int]] = set()
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(lists):
            if actions and all(need in happened for need in needs(schedule.placement, rank, actions[0])):
                action = actions.pop(0)
                kind = "F" if action.kind == "F" else "B"
                if action.kind != "W":
                    happened.add((kind, schedule.placement.stage(rank, action.chunk), action.microbatch))
                moved = True
    return not any(lists)


def naive_times(schedule: Schedule, costs: PipelineCosts) -> list[list[tuple[float, float]]]:
    """Start and end of every action, by repeating the definitions from zero until nothing changes any more."""
    placement = schedule.placement
    times = [[(0.0, 0.0)] * len(actions) for actions in schedule.ranks]
    while True:
        before = [list(row) for row in times]
        end = {}
        for rank, action in schedule:
            span = times[rank][schedule.ranks[rank].index(action)]
            if action.kind in ("F", "B", "BW"):
                end["F" if action.kind == "F" else "B", placement.stage(rank, action.chunk), action.microbatch] = span[
                    1
                ]
        arrivals = _arrivals(schedule, costs, times)
        for rank, actions in enumerate(schedule.ranks):
            clock = 0.0
            for position, action in enumerate(actions):
                start = clock
                stage = placement.stage(rank, action.chunk)
                for need in needs(placement, rank, action):
                    hop = placement.rank_of(need[1]) != rank
                    there = arrivals[need[0], stage, need[2]] if hop and arrivals else end[need] + hop * costs.comm
                    start = max(start, there)
                clock = start + _duration(action, costs.stages[stage])
                times[rank][position] = (start, clock)
        if times == before:
            return times


def _duration(action: Action, cost: StageCost) -> float:
    return {
        "F": cost.forward,
        "B": cost.backward,
        "W": cost.weight / action.parts,
        "BW": cost.backward + cost.weight,
    }.get(action.kind, 0.0)


def _arrivals(
    schedule: Schedule, costs: PipelineCosts, times: list[list[tuple[float, float]]]
) -> dict[tuple[str, int, int], float]:
    """When the message for (kind, stage, microbatch) is there: i-th send and i-th receive of a channel make a pair."""
    placement = schedule.placement
    sends: dict[tuple[str, int, int], list[float]] = {}
    receives: dict[tuple[str, int, int], list[tuple[float, tuple[str, int, int]]]] = {}
    for rank, actions in enumerate(schedule.ranks):
        for action, (time, _) in zip(actions, times[rank], strict=True):
            verb, _, kind = action.kind.partition("_")
            up = 1 if kind == "F" else -1
            stage = placement.stage(rank, action.chunk)
            if verb == "SEND":
                sends.setdefault((kind, rank, placement.rank_of(stage + up)), []).append(time)
            elif verb == "RECV":
                channel = (kind, placement.rank_of(stage - up), rank)
                receives.setdefault(channel, []).append((time, (kind, stage, action.microbatch)))
    arrivals = {}
    for channel, pairs in receives.items():
        last = 0.0
        for sent, (received, name) in zip(sends[channel], pairs, strict=True):
            last = arrivals[name] = max(last, max(sent, received) + costs.comm)
    return arrivals


def naive_peaks(schedule: Schedule, costs: PipelineCosts) -> list[float]:
    """Activation memory by the definition, from scratch at every place in the list: what is held, and how much."""
    peaks = []
    for rank, actions in enumerate(schedule.ranks):
        peak = 0.0
        for position in range(len(actions)):
            done, running = actions[:position], actions[position]
            held = 0.0
            for action in (*done, running):
                cost = costs.stages[schedule.placement.stage(rank, action.chunk)]
                key = (action.chunk, action.microbatch)
                if action.kind == "F":
                    after = [a for a in done if (a.chunk, a.microbatch) == key]
                    weights = [a for a in after if a.kind == "W"]
                    if any(a.kind == "BW" for a in after) or (weights and len(weights) == weights[0].parts):
                        continue
                    held += cost.weight_grad if any(a.kind == "B" for a in after) else cost.activation
            peak = max(peak, held)
        peaks.append(peak)
    return peaks
