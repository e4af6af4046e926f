"""ZB-H1 (arXiv 2401.10241, section 2.1): 1F1B with W put off, at the memory of 1F1B.

Rank i of p runs p-1-i forwards ahead, as 1F1B does, then F and B in turn. The weight gradients lag i microbatches
behind, so that B goes down the pipeline at once and W fills what was the bubble. Bubble (p-1)(F+B-W); rank i holds
(p-i) M_B + i M_W, at most p M_B.
"""

from __future__ import annotations

from collections.abc import Iterator

from megamem.ir.schedule import Action, Schedule
from megamem.planner.schedules.family import Family, Request


def lagging_weights(ahead: int, lag: int, microbatches: int) -> Iterator[Action]:
    """`ahead` forwards, then F and B in turn, each B followed by the W of `lag` microbatches before; the rest of W."""
    ahead = min(ahead, microbatches)
    for microbatch in range(microbatches + ahead):
        if microbatch < microbatches:
            yield Action("F", 0, microbatch)
        if microbatch >= ahead:
            yield Action("B", 0, microbatch - ahead)
            if microbatch >= ahead + lag:
                yield Action("W", 0, microbatch - ahead - lag)
    for microbatch in range(max(0, microbatches - lag), microbatches):
        yield Action("W", 0, microbatch)


def build(request: Request) -> Schedule:
    """The handcrafted order, for any number of ranks and microbatches."""
    ranks, microbatches = request.num_ranks, request.num_microbatches
    return Schedule(
        name=FAMILY.name,
        placement=request.placement(FAMILY.shape),
        num_microbatches=microbatches,
        ranks=tuple(tuple(lagging_weights(ranks - 1 - rank, rank, microbatches)) for rank in range(ranks)),
    )


FAMILY = Family(
    name="zb-h1",
    shape="round-robin",
    build=build,
    summary="zero bubble H1: 1F1B with W put off, same memory (arXiv 2401.10241, 2.1)",
)
