"""A request for one placement as plain tuples by stage, for loops that run millions of times; and back to a schedule.

Inside the search an action is a `Step` (kind, stage, microbatch, part), the stage instead of rank and chunk, and a
schedule is one list of steps per rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from megamem.errors import ScheduleError
from megamem.ir.schedule import Action, Placement, Schedule, Shape
from megamem.planner.schedules.family import Request

Step = tuple[str, int, int, int]  # F, B or W; stage; microbatch; part of the W
Steps = list[list[Step]]
Queue = list[tuple[int, int]]  # stage and microbatch, in the order in which a rank takes them


class Outcome(NamedTuple):
    """Complete lists of steps and the time they take."""

    makespan: float
    steps: Steps


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be scheduled. Tuples have one entry per stage; times and memory are in the units of the costs.

    ranks:    the rank that holds each stage
    forward, backward, weight:  time of F, B and W
    take:     memory taken when F starts
    kept:     what of it is still held between the end of B and the end of W
    hop:      latency from each stage to the next, 0 inside a rank
    limit:    memory no rank may exceed; infinite for none
    period:   the work of one microbatch on the busiest rank: no steady state is faster than one microbatch per period
    """

    placement: Placement
    num_microbatches: int
    ranks: tuple[int, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    take: tuple[float, ...]
    kept: tuple[float, ...]
    hop: tuple[float, ...]
    limit: float
    period: float

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""
        return self.placement.num_ranks

    @property
    def num_stages(self) -> int:
        """Ranks times chunks."""
        return len(self.ranks)

    @property
    def num_steps(self) -> int:
        """F, B and W of every stage and microbatch: what one evaluation costs."""
        return 3 * self.num_stages * self.num_microbatches

    def stages_of(self, rank: int) -> list[int]:
        """The stages on `rank`, in order."""
        return [self.placement.stage(rank, chunk) for chunk in range(self.placement.num_chunks)]

    def schedule(self, name: str, steps: Steps, parts: int = 1) -> Schedule:
        """Steps as a schedule. `parts`: pieces in which the W were placed; those that stayed together are joined."""
        chunk_of = self.placement.chunk_of
        return Schedule(
            name=name,
            placement=self.placement,
            num_microbatches=self.num_microbatches,
            ranks=tuple(tuple(_join(order, chunk_of, parts)) for order in steps),
        )


def make_problem(request: Request, shape: Shape, num_chunks: int) -> Problem:
    """The request on one placement. Raises ScheduleError where its costs cannot be had for this number of chunks."""
    placement = request.with_chunks(num_chunks).placement(shape)
    costs = request.workload.costs(placement)
    stages, ranks = costs.stages, tuple(placement.rank_of(stage) for stage in range(placement.num_stages))
    work = [0.0] * placement.num_ranks
    for rank, stage in zip(ranks, stages, strict=True):
        work[rank] += stage.total
    if not max(work) > 0:
        raise ScheduleError("all costs are zero: any schedule is as good as any other")
    limit = math.inf if request.memory_limit is None else request.memory_limit
    return Problem(
        placement=placement,
        num_microbatches=request.num_microbatches,
        ranks=ranks,
        forward=tuple(stage.forward for stage in stages),
        backward=tuple(stage.backward for stage in stages),
        weight=tuple(stage.weight for stage in stages),
        take=tuple(stage.activation for stage in stages),
        kept=tuple(stage.weight_grad for stage in stages),
        hop=(*(0.0 if here == there else costs.comm for here, there in pairwise(ranks)), 0.0),
        limit=limit * (1 + 1e-9),  # sums of shares of a limit may miss it by rounding
        period=max(work),
    )


def merged_order(problem: Problem, schedule: Schedule) -> Steps:
    """F and B of a schedule of any family as they alternate on each rank, without W; a BW counts as its B."""
    return [
        [
            ("F" if action.kind == "F" else "B", problem.placement.stage(rank, action.chunk), action.microbatch, 0)
            for action in actions
            if action.kind in ("F", "B", "BW")
        ]
        for rank, actions in enumerate(schedule.ranks)
    ]


def _join(order: Sequence[Step], chunk_of: Callable[[int], int], parts: int) -> list[Action]:
    actions: list[Action] = []
    position = 0
    while position < len(order):
        kind, stage, microbatch, part = order[position]
        chunk = chunk_of(stage)
        together = [(kind, stage, microbatch, number) for number in range(parts)]
        if kind != "W" or parts == 1 or order[position : position + parts] == together:
            actions.append(Action(kind, chunk, microbatch))  # type: ignore[arg-type]
            position += 1 if kind != "W" else parts
        else:
            actions.append(Action("W", chunk, microbatch, part, parts))
            position += 1
    return actions
