"""When each action of an order would run, for generators that place something by time.

The same rules as everywhere (arXiv 2401.10241, section 2): lists strictly in order, each action as soon as its input is
there, `comm` between ranks. It shares nothing with the simulator, so that the simulator can contradict it.
"""

from __future__ import annotations

from collections.abc import Sequence

from megamem.errors import ScheduleError
from megamem.ir.schedule import Action, Placement
from megamem.ir.workload import PipelineCosts

Order = Sequence[Action]


def run_times(placement: Placement, orders: Sequence[Order], costs: PipelineCosts) -> list[list[tuple[float, float]]]:
    """Start and end of every action of orders of F, B, W and BW, per rank. Raises ScheduleError where they wait for
    ever."""
    done: dict[tuple[bool, int, int], float] = {}  # (is a forward, stage, microbatch) -> end
    times: list[list[tuple[float, float]]] = [[] for _ in orders]
    waiting: dict[tuple[bool, int, int], int] = {}
    ready = list(range(len(orders)))
    while ready:
        rank = ready.pop()
        ends = times[rank]
        clock = ends[-1][1] if ends else 0.0
        for kind, chunk, microbatch, _, parts in orders[rank][len(ends) :]:
            stage = placement.stage(rank, chunk)
            cost = costs.stages[stage]
            start = clock
            if kind != "W" and (source := _source(kind == "F", stage, placement.num_stages)) is not None:
                key = (source[0], source[1], microbatch)
                if key not in done:
                    waiting[key] = rank
                    break
                hop = 0.0 if placement.rank_of(source[1]) == rank else costs.comm
                start = max(clock, done[key] + hop)
            seconds = {
                "F": cost.forward,
                "B": cost.backward,
                "W": cost.weight / parts,
                "BW": cost.backward + cost.weight,
            }
            clock = start + seconds[kind]
            ends.append((start, clock))
            if kind != "W":
                key = (kind == "F", stage, microbatch)
                done[key] = clock
                if key in waiting:
                    ready.append(waiting.pop(key))
    stuck = [
        f"rank {rank} at {order[len(times[rank])]}"
        for rank, order in enumerate(orders)
        if len(times[rank]) < len(order)
    ]
    if stuck:
        raise ScheduleError(f"these wait for ever: {', '.join(stuck)}")
    return times


def _source(is_forward: bool, stage: int, num_stages: int) -> tuple[bool, int] | None:
    """What a forward or a backward of a stage waits for; None where there is nothing."""
    if is_forward:
        return (True, stage - 1) if stage else None
    return (False, stage + 1) if stage + 1 < num_stages else (True, stage)
