"""1F1B (arXiv 2006.09503): few forward passes ahead, then one forward and one backward pass in turn.

Rank i of p runs p-1-i forwards, pairs F, BW until the forwards are used up, and the remaining BW. It is the order of
Megatron-Core's `forward_backward_pipelining_without_interleaving`. Bubble (p-1)(F+B+W); rank i holds at most
min(p-i, m) microbatches.
"""

from __future__ import annotations

from collections.abc import Iterator

from megamem.ir.schedule import Action, Schedule
from megamem.planner.schedules.family import Family, Request


def build(request: Request) -> Schedule:
    """The order of Megatron-Core, for any number of ranks and microbatches."""
    ranks, microbatches = request.num_ranks, request.num_microbatches
    return Schedule(
        name=FAMILY.name,
        placement=request.placement(FAMILY.shape),
        num_microbatches=microbatches,
        ranks=tuple(tuple(_order(ranks - 1 - rank, microbatches)) for rank in range(ranks)),
    )


def _order(ahead: int, microbatches: int) -> Iterator[Action]:
    ahead = min(ahead, microbatches)
    for microbatch in range(microbatches + ahead):
        if microbatch < microbatches:
            yield Action("F", 0, microbatch)
        if microbatch >= ahead:
            yield Action("BW", 0, microbatch - ahead)


FAMILY = Family(
    name="1f1b",
    shape="round-robin",
    build=build,
    summary="1F1B, Megatron-Core's order without chunks (arXiv 2006.09503)",
)
