"""1F1B-V: a V placement with the backward pass in one piece (arXiv 2405.15362, appendix on 1F1B-V).

The building block of V-Min with BW, which takes two slots, in place of B: two thirds of the memory of 1F1B, in a model
whose backward pass cannot be split.
"""

from __future__ import annotations

from megamem.ir.schedule import Schedule
from megamem.planner.schedules.building_block import PERIOD, Block, delayed_block, fused_orders
from megamem.planner.schedules.family import Family, Request


def block(num_ranks: int) -> Block:
    """F goes down and comes up one slot a rank, BW two.

    Three slots more after every third BW and, where three divides the number of ranks, before the first keep the passes
    of a rank apart modulo the period.
    """
    clock = 2 * num_ranks + (0 if num_ranks % 3 else PERIOD // 2)
    pause = -(num_ranks + 2) % 3
    backwards = []
    for count in range(1, 2 * num_ranks + 1):
        backwards.append(clock)
        clock += 2 + (PERIOD // 2 if (count + pause) % 3 == 0 else 0)
    return [
        (rank, 2 * num_ranks - 1 - rank, backwards[rank], backwards[2 * num_ranks - 1 - rank])
        for rank in range(num_ranks)
    ]


def build(request: Request) -> Schedule:
    """The order, for any number of ranks and microbatches."""
    lengthened = delayed_block(block(request.num_ranks), request.delay)
    return Schedule(
        name=FAMILY.name,
        placement=request.placement(FAMILY.shape),
        num_microbatches=request.num_microbatches,
        ranks=tuple(map(tuple, fused_orders(lengthened, request.num_microbatches))),
    )


FAMILY = Family(
    name="1f1b-v",
    shape="v",
    build=build,
    summary="two thirds of the memory of 1F1B on a V placement, without a split backward pass (arXiv 2405.15362)",
    min_chunks=2,
    max_chunks=2,
    delays=True,
)
