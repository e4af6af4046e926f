"""PipeOffload: a uniform repeat whose activations go to host memory between F and B (arXiv 2503.01328).

    po-h    the lower half of the chunks is offloaded, `po_h.py`
    po-f    all chunks, `po_f.py`

**The base.** A block holds F, B and W of one microbatch on every chunk of every rank, in slots of equal length, and is
repeated every 3v slots. With k = ceil(p/2) a chunk follows the one before by 3k slots. Rank i runs F one slot after
rank i-1; the first B follows the turn at the last stage, two slots per rank back; W follows its B. Where v and k have a
common divisor d, chunks are put off by another block of 3 slots every v/d chunks, so that no two actions of a rank
share a slot. What the slots leave is an order; it is run without waiting for the slots. A chunk's share of the memory
is then proportional to the time from its F to its B, which is longest for chunk 0: offloading a few of the chunks saves
more than their number.

**The copies.** F to B is timed with the real costs. From the lowest chunk up, each copy out takes the first free time
of its copy stream after F, each copy back the last free time of the other stream that ends before B. So no B is late.
A pair whose F and B are less than three times the two copies apart stays on the device, and so does one that finds no
room: with slow copies the schedule keeps more, and is still right. A copy begins when the action before it has ended,
so a copy back begins up to one action earlier than planned.

The authors run one copy stream with alternating directions, for GPUs that share a link; here there is one for each
direction.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence

from megamem.ir.schedule import Action, Placement, Schedule
from megamem.ir.workload import StageCost
from megamem.planner.schedules.family import Request
from megamem.planner.schedules.timing import run_times

_LEAST_GAP = 3.0
"""A pair is worth copying if F and B are this many round trips apart."""

Spans = list[tuple[float, float]]


def uniform_repeat(placement: Placement, microbatches: int) -> list[list[Action]]:
    """The base order: per rank the F, B and W of all microbatches, by slot."""
    return [
        _rank_order(placement.num_ranks, placement.num_chunks, rank, microbatches)
        for rank in range(placement.num_ranks)
    ]


def _rank_order(ranks: int, chunks: int, rank: int, microbatches: int) -> list[Action]:
    apart = (ranks + 1) // 2
    run = chunks // math.gcd(chunks, apart)
    slots: list[tuple[int, Action]] = []
    for index in range(chunks):
        put_off = 3 * (apart * index + index // run)
        last = 3 * (apart * (chunks - 1) + (chunks - 1) // run)
        forward = put_off + rank
        backward = last + rank + 1 + 3 * (ranks - 1 - rank) + put_off
        for microbatch in range(microbatches):
            begin = 3 * chunks * microbatch
            slots.append((begin + forward, Action("F", index, microbatch)))
            slots.append((begin + backward, Action("B", chunks - 1 - index, microbatch)))
            slots.append((begin + backward + 1, Action("W", chunks - 1 - index, microbatch)))
    return [action for _, action in sorted(slots, key=lambda slot: slot[0])]


def with_offload(request: Request, name: str, chunks: int) -> Schedule:
    """The uniform repeat with the lowest `chunks` chunks of every rank offloaded, as far as the copies fit."""
    placement = request.placement("round-robin")
    costs = request.costs(placement)
    orders = uniform_repeat(placement, request.num_microbatches)
    times = run_times(placement, orders, costs)
    ranks = []
    for rank, order in enumerate(orders):
        stages = [costs.stages[placement.stage(rank, chunk)] for chunk in range(placement.num_chunks)]
        ranks.append(tuple(_add_copies(order, times[rank], stages, chunks)))
    return Schedule(name=name, placement=placement, num_microbatches=request.num_microbatches, ranks=tuple(ranks))


def _add_copies(order: Sequence[Action], times: Spans, costs: Sequence[StageCost], chunks: int) -> Iterator[Action]:
    """The order with a copy out after F and a copy back before B, at the end of the action before its planned start."""
    ends = [end for _, end in times]
    at = {action: index for index, action in enumerate(order)}
    copies: dict[int, list[tuple[float, float, Action]]] = defaultdict(list)
    for out, back, action in _plan_copies(at, times, costs, chunks):
        copy, seconds = (action.chunk, action.microbatch), costs[action.chunk].offload
        copies[max(at[action], bisect_right(ends, out) - 1)].append((out, seconds, Action("OFFLOAD", *copy)))
        copies[min(at[Action("B", *copy)], bisect_right(ends, back)) - 1].append(
            (back, seconds, Action("RELOAD", *copy))
        )
    for index, action in enumerate(order):
        yield action
        yield from (copy for _, _, copy in sorted(copies[index]))


def _plan_copies(
    at: dict[Action, int], times: Spans, costs: Sequence[StageCost], chunks: int
) -> Iterator[tuple[float, float, Action]]:
    """Start of the copy out and of the copy back for each F whose activation leaves the device."""
    outward, backward = _CopyStream(), _CopyStream()
    forwards = sorted(action for action in at if action.kind == "F" and action.chunk < chunks)
    for action in forwards:
        seconds = costs[action.chunk].offload
        begin, end = times[at[action]][1], times[at[Action("B", action.chunk, action.microbatch)]][0]
        if end - begin <= 2 * _LEAST_GAP * seconds:
            continue
        out, back = outward.first(begin, seconds), backward.last(end, seconds)
        if back < out + seconds:
            continue
        outward.take(out, seconds)
        backward.take(back, seconds)
        yield out, back, action


class _CopyStream:
    """The times at which one direction is busy."""

    def __init__(self) -> None:
        self._busy: Spans = []

    def first(self, begin: float, seconds: float) -> float:
        """The first start, from `begin` on, of that much free time."""
        index = bisect_right(self._busy, (begin, math.inf))
        if index and self._busy[index - 1][1] > begin:
            begin = self._busy[index - 1][1]
        while index < len(self._busy) and self._busy[index][0] < begin + seconds:
            begin = self._busy[index][1]
            index += 1
        return begin

    def last(self, end: float, seconds: float) -> float:
        """The last start of that much free time which is over at `end`."""
        index = bisect_right(self._busy, (end, -math.inf))
        while index and self._busy[index - 1][1] > end - seconds:
            end = min(end, self._busy[index - 1][0])
            index -= 1
        return end - seconds

    def take(self, start: float, seconds: float) -> None:
        """Occupy it; a copy that takes no time too, because no other may be under way then."""
        insort(self._busy, (start, start + seconds))
