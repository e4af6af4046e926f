"""PO-F: PipeOffload with all chunks in host memory (arXiv 2503.01328; `pipe_offload.py`).

What remains is a few chunks of one microbatch, whatever the number of ranks, if the copies are quick enough
(`StageCost.offload`): both ways must fit into the time of the microbatch's F, B and W.
"""

from __future__ import annotations

from megamem.ir.schedule import Schedule
from megamem.planner.schedules.family import Family, Request
from megamem.planner.schedules.pipe_offload import with_offload


def build(request: Request) -> Schedule:
    """The uniform repeat with all chunks offloaded."""
    return with_offload(request, FAMILY.name, request.num_chunks)


FAMILY = Family(
    name="po-f",
    shape="round-robin",
    build=build,
    summary="PipeOffload, all chunks in host memory between F and B (arXiv 2503.01328)",
    min_chunks=2,
    max_chunks=None,
    uses_costs=True,
    offloads=True,
)
