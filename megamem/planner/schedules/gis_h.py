"""GIS-H: GIS with groups of half the ranks, at about (v+1)/2v of the memory of 1F1B (arXiv 2503.01328).

Rank 0 holds at most (v-1) ceil(p/2) + p chunk activations. The price is a bubble longer than GIS's by (p/2)(v-1)
forwards, and as many B less W, of a chunk, if ceil(p/2) divides the microbatches. The group is larger where they are
too few to be divided into groups of ceil(p/2) that run (see `gis.py`). The authors' code also enlarges it where a
group's passes take less time than a microbatch takes through all ranks; here it is the memory that is promised, and
`gis` takes any group.
"""

from __future__ import annotations

from megamem.ir.schedule import Schedule
from megamem.planner.schedules.family import Family, Request
from megamem.planner.schedules.gis import fitting_group, fitting_sizes, group_interleaved, smallest_group, within_limit


def build(request: Request) -> Schedule:
    """The schedule with the smallest group that runs. Raises InfeasibleError for a memory limit that is too low."""
    group = fitting_group(request, smallest_group(request.num_ranks))
    schedule = group_interleaved(request, FAMILY.name, group, fitting_sizes(request, group) or [])
    return within_limit(schedule, request)


FAMILY = Family(
    name="gis-h",
    shape="round-robin",
    build=build,
    summary="GIS with groups of half the ranks: about (v+1)/2v of the memory of 1F1B (arXiv 2503.01328)",
    min_chunks=2,
    max_chunks=None,
    uses_costs=True,
    uses_limit=True,
)
