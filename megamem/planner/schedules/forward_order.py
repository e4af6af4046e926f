"""The order of a forward-only step (evaluation): F actions alone, for any placement and any number of microbatches.

Made by running the pipeline: whenever a rank is free it takes, of the microbatches that have arrived, the one that is
furthest through the model, else starts the next. So no rank idles while it has work, and the order, being one in which
the pipeline did run, cannot deadlock. Training schedules are no help here: their order waits for backward passes, and
many need more microbatches than an evaluation has.
"""

from __future__ import annotations

import heapq

from megamem.ir.schedule import Action, Placement, Schedule


def forward_order(placement: Placement, num_microbatches: int, *, vocabulary: bool = False) -> Schedule:
    """The schedule of a forward-only step; every stage takes one unit of time, messages none.

    vocabulary: with IF and S on every rank, where all ranks share the embeddings; they take no time
    """
    last = placement.num_stages - 1
    ready: list[list[tuple[int, int]]] = [[] for _ in range(placement.num_ranks)]  # heaps of (-stage, microbatch)
    ready[placement.rank_of(0)] = [(0, microbatch) for microbatch in range(num_microbatches)]
    ranks: list[list[Action]] = [[] for _ in range(placement.num_ranks)]
    everyone = range(placement.num_ranks) if vocabulary else ()
    remaining = placement.num_stages * num_microbatches
    while remaining:
        done = []
        entering = ready[placement.rank_of(0)]
        if entering and entering[0][0] == 0:  # F of the first stage is next there
            for rank in everyone:
                ranks[rank].append(Action("IF", 0, entering[0][1]))
        for rank, waiting in enumerate(ready):
            if waiting:
                stage, microbatch = heapq.heappop(waiting)
                ranks[rank].append(Action("F", placement.chunk_of(-stage), microbatch))
                done.append((-stage, microbatch))
        for stage, microbatch in done:
            if stage == last:
                for rank in everyone:
                    ranks[rank].append(Action("S", 0, microbatch))
            else:
                heapq.heappush(ready[placement.rank_of(stage + 1)], (-stage - 1, microbatch))
        remaining -= len(done)
    return Schedule(
        name="forward-only",
        placement=placement,
        num_microbatches=num_microbatches,
        ranks=tuple(map(tuple, ranks)),
    )
