"""ZB-H2 (arXiv 2401.10241, section 2.2): no bubble within a rank, at nearly twice the memory of 1F1B.

Rank i of p runs 2(p-1-i) forwards ahead instead of p-1-i, and its weight gradients lag 2i microbatches behind. Bubble
(p-1)(F+B-2W) as the paper counts it, from a rank's own first action to its own last; with an optimizer step that waits
for all ranks p-1 forwards more. Rank i holds (2(p-i)-1) M_B + 2i M_W, at most (2p-1) M_B.
"""

from __future__ import annotations

from megamem.ir.schedule import Schedule
from megamem.planner.schedules.family import Family, Request
from megamem.planner.schedules.zb_h1 import lagging_weights


def build(request: Request) -> Schedule:
    """The handcrafted order, for any number of ranks and microbatches."""
    ranks, microbatches = request.num_ranks, request.num_microbatches
    return Schedule(
        name=FAMILY.name,
        placement=request.placement(FAMILY.shape),
        num_microbatches=microbatches,
        ranks=tuple(tuple(lagging_weights(2 * (ranks - 1 - rank), 2 * rank, microbatches)) for rank in range(ranks)),
    )


FAMILY = Family(
    name="zb-h2",
    shape="round-robin",
    build=build,
    summary="zero bubble H2: no bubble within a rank, twice the memory (arXiv 2401.10241, 2.2)",
)
