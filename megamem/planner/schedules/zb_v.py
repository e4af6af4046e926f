"""ZB-V (arXiv 2401.10241, section 6): zero bubble on a V placement, at the memory of 1F1B.

Each rank holds two chunks, and the second runs back through the ranks, so the first backward pass of a microbatch
starts on the rank where its forward pass began. Rank r of p (from 0):

1. Warm-up: 2(p-r)-1 forwards of chunk 0, then r times a forward of chunk 1 and one of chunk 0.
2. p-r times F and B of chunk 1.
3. F and B of chunk 0, F and B of chunk 1, in turn, while there are microbatches.
4. What is left of B, chunk 0 and chunk 1 in turn.

W follows its B at once, and in the cool-down where B leaves time.

That is the best order for equal costs. For others the search of V-Adaptive and a placement of W by the costs
(`weight_placement.py`) are tried too, and taken where neither makespan nor stage span is worse; with a memory limit
below that of 1F1B they are the only ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megamem.ir.schedule import Action, Kind, Schedule
from megamem.planner.schedules.family import Family, Request
from megamem.planner.schedules.v_adaptive import refuse, search
from megamem.planner.schedules.weight_placement import best_of, no_worse, place_weights, with_weights


def closed_form(num_ranks: int, rank: int, microbatches: int) -> Iterator[Action]:
    """The order of one rank, for any number of microbatches; a short step is a longer one with the rest left out."""
    length = max(microbatches, 2 * num_ranks - 1)
    started = 2 * num_ranks - 1 - rank
    passes: list[tuple[Kind, int]] = [("F", 0)] * (2 * (num_ranks - rank) - 1)
    passes += [("F", 1), ("F", 0)] * rank
    passes += [("F", 1), ("B", 1), ("W", 1)] * (num_ranks - rank)
    passes += [("F", 0), ("B", 0), ("W", 0), ("F", 1), ("B", 1), ("W", 1)] * (length - started)
    passes += [("B", 0), ("W", 0), ("F", 1), ("B", 1), ("W", 1)] * (started - num_ranks)
    passes += [("B", 0), ("B", 1)] * rank
    passes += [("B", 0), ("W", 0)] * (num_ranks - rank)
    passes += [("W", 1), ("W", 0)] * rank
    counts: Counter[tuple[Kind, int]] = Counter()
    for kind, chunk in passes:
        microbatch = counts[kind, chunk]
        counts[kind, chunk] += 1
        if microbatch < microbatches:
            yield Action(kind, chunk, microbatch)


def build(request: Request) -> Schedule:
    """The best schedule found within the request's limit; without one, within 2p times the largest stage's activation.

    Raises InfeasibleError where the limit is too low.
    """
    ranks, microbatches = request.num_ranks, request.num_microbatches
    placement = request.placement(FAMILY.shape)
    costs = request.costs(placement)
    largest = max(stage.activation for stage in costs.stages)
    limit = 2 * ranks * largest if request.memory_limit is None else request.memory_limit
    caps = [limit] * ranks
    orders = [tuple(closed_form(ranks, rank, microbatches)) for rank in range(ranks)]
    published = place_weights(orders, placement, costs, caps)
    candidates = with_weights(orders, placement, costs, caps) + search(request, placement, costs, caps)
    best = best_of(timed for timed in candidates if published is None or no_worse(timed, published))
    if best is None:
        raise refuse(FAMILY.name, request, limit)
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
