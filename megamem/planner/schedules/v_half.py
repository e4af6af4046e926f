"""V-Half: half the activation memory of 1F1B on a V placement (arXiv 2405.15362, section 3)."""

from __future__ import annotations

from megamem.ir.schedule import Schedule
from megamem.planner.schedules.building_block import Block, build_from_block
from megamem.planner.schedules.family import Family, Request


def block(num_ranks: int) -> Block:
    """Chunk 0 goes down two slots a rank and chunk 1 comes up one; B the same way.

    Where the number of ranks is even, three slots more before B keep the passes of a rank apart modulo the period.
    """
    p, wait = num_ranks, 0 if num_ranks % 2 else 3
    return [
        (2 * rank, 3 * p - rank - 2, 3 * p + wait + 2 * rank - 1, 6 * p + wait - rank - 2) for rank in range(num_ranks)
    ]


def build(request: Request) -> Schedule:
    """The schedule: at most (p+2)//2 activations of a microbatch on a rank of p. Raises InfeasibleError."""
    return build_from_block(request, FAMILY.name, block(request.num_ranks))


FAMILY = Family(
    name="v-half",
    shape="v",
    build=build,
    summary="half the memory of 1F1B on a V placement (arXiv 2405.15362, 3)",
    min_chunks=2,
    max_chunks=2,
    uses_costs=True,
    delays=True,
)
