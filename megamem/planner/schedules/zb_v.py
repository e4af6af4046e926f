"""ZB-V (arXiv 2401.10241, section 6): zero bubble on a V placement, at the memory of 1F1B.

Each rank holds two chunks, and the second runs back through the ranks, so the first backward pass of a microbatch
starts on the rank where its forward pass began. Rank r of p (from 0):

1. Warm-up: 2(p-r)-1 forwards of chunk 0, then r times a forward of chunk 1 and one of chunk 0.
2. p-r times F and B of chunk 1.
3. F and B of chunk 0, F and B of chunk 1, in turn, while there are microbatches.
4. What is left of B, chunk 0 and chunk 1 in turn.

W follows where there is time (`weight_placement.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from megamem.errors import InfeasibleError
from megamem.ir.schedule import Action, Kind, Schedule
from megamem.planner.schedules.family import Family, Request
from megamem.planner.schedules.weight_placement import PATIENCE, best_of, place_weights


def closed_form(num_ranks: int, rank: int, microbatches: int) -> Iterator[Action]:
    """F and B of one rank, for any number of microbatches; a short step is a longer one with the rest left out."""
    length = max(microbatches, 2 * num_ranks - 1)
    passes: list[tuple[Kind, int]] = [("F", 0)] * (2 * (num_ranks - rank) - 1)
    passes += [("F", 1), ("F", 0)] * rank
    passes += [("F", 1), ("B", 1)] * (num_ranks - rank)
    started = 2 * num_ranks - 1 - rank
    passes += [("F", 0), ("B", 0), ("F", 1), ("B", 1)] * (length - started)
    passes += [("B", 0), ("F", 1), ("B", 1)] * (started - num_ranks)
    passes += [("B", 0), ("B", 1)] * rank
    passes += [("B", 0)] * (num_ranks - rank)
    counts: dict[tuple[Kind, int], int] = {}
    for kind, chunk in passes:
        microbatch = counts.get((kind, chunk), 0)
        counts[kind, chunk] = microbatch + 1
        if microbatch < microbatches:
            yield Action(kind, chunk, microbatch)


def build(request: Request) -> Schedule:
    """The best order found within p times a rank's activations of one microbatch, or the request's limit.

    Raises InfeasibleError where the limit is too low.
    """
    ranks, microbatches = request.num_ranks, request.num_microbatches
    placement = request.placement(FAMILY.shape)
    costs = request.costs(placement)
    shares = [sum(costs.stages[placement.stage(rank, chunk)].activation for chunk in (0, 1)) for rank in range(ranks)]
    caps = [ranks * share if request.memory_limit is None else request.memory_limit for share in shares]
    orders = [tuple(closed_form(ranks, rank, microbatches)) for rank in range(ranks)]
    best = best_of(place_weights(orders, placement, costs, caps, patience) for patience in PATIENCE)
    if best is None:
        raise InfeasibleError(
            f"{FAMILY.name}: the memory limit is {request.memory_limit:g}, and {ranks} ranks with activations of "
            f"{max(shares):g} a microbatch need {ranks * max(shares):g}; nearest: {ranks * max(shares):g}"
        )
    return Schedule(name=FAMILY.name, placement=placement, num_microbatches=microbatches, ranks=best.ranks)


FAMILY = Family(
    name="zb-v",
    shape="v",
    build=build,
    summary="zero bubble on a V placement, at the memory of 1F1B or within a limit (arXiv 2401.10241, 6)",
    min_chunks=2,
    max_chunks=2,
    uses_costs=True,
    uses_limit=True,
)
