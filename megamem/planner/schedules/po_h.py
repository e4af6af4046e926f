"""PO-H: PipeOffload with the lower half of the chunks in host memory (arXiv 2503.01328; `pipe_offload.py`).

These live longest, so that about a quarter of the memory of 1F1B remains, (v+2)/8v, if the copies are quick enough
(`StageCost.offload`); the further they are from it, the more stays on the device.
"""

from __future__ import annotations

from megamem.ir.schedule import Schedule
from megamem.planner.schedules.family import Family, Request
from megamem.planner.schedules.pipe_offload import with_offload


def build(request: Request) -> Schedule:
    """The uniform repeat with ceil(v/2) chunks offloaded."""
    return with_offload(request, FAMILY.name, (request.num_chunks + 1) // 2)


FAMILY = Family(
    name="po-h",
    shape="round-robin",
    build=build,
    summary="PipeOffload, half of the chunks in host memory between F and B (arXiv 2503.01328)",
    min_chunks=2,
    max_chunks=None,
    uses_costs=True,
    offloads=True,
)
