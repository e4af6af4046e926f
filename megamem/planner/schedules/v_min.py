"""V-Min: a third of the activation memory of 1F1B on a V placement (arXiv 2405.15362, section 3)."""

from __future__ import annotations

from megamem.ir.schedule import Schedule
from megamem.planner.schedules.building_block import Block, build_from_block
from megamem.planner.schedules.family import Family, Request


def block(num_ranks: int) -> Block:
    """Chunk 0 goes down one slot a rank and chunk 1 comes up one; B the same way.

    Where three divides the number of ranks, two slots more before B keep the passes of a rank apart modulo the period.
    """
    p, wait = num_ranks, 0 if num_ranks % 3 else 2
    return [(rank, 2 * p - rank - 1, 2 * p + wait + rank, 4 * p + wait - rank - 1) for rank in range(num_ranks)]


def build(request: Request) -> Schedule:
    """The schedule: at most (p+4)//3 activations of a microbatch on a rank of p. Raises InfeasibleError."""
    return build_from_block(request, FAMILY.name, block(request.num_ranks))


FAMILY = Family(
    name="v-min",
    shape="v",
    build=build,
    summary="a third of the memory of 1F1B on a V placement (arXiv 2405.15362, 3)",
    min_chunks=2,
    max_chunks=2,
    uses_costs=True,
    delays=True,
)
