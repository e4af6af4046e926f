"""Why a capacity cannot be met: an irreducible set of buffers that do not fit, found by deletion.

Buffers are left out, in halves, quarters and so on down to single ones, as long as an exhaustive search of few nodes
still proves that the rest does not fit. What remains is small enough to be read; with more nodes it could be smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

from megamem.planner.allocation.core import Core, Watch, never
from megamem.planner.allocation.sweep import Sweep

_MAX_NODES = 20_000


def infeasible_subset(
    core: Core, sweep: Sweep, indices: Sequence[int], capacity: int, *, watch: Watch = never
) -> list[int]:
    """Of the buffers `indices`, which do not fit into `capacity` units, some that do not fit either, in order."""
    current = list(indices)
    chunk = max(len(current) // 2, 1)
    while True:
        start = 0
        while start < len(current) and not watch():
            rest = current[:start] + current[start + chunk :]
            if rest and _is_infeasible(core, sweep.subset(rest), capacity, watch):
                current = rest
            else:
                start += chunk
        if chunk == 1 or watch():
            return current
        chunk //= 2


def _is_infeasible(core: Core, sweep: Sweep, capacity: int, watch: Watch) -> bool:
    preorder = sorted(range(len(sweep)), key=lambda i: (sweep.first[i] - sweep.last[i], -sweep.size[i]))
    return core.search(sweep, capacity, preorder, max_nodes=_MAX_NODES, watch=watch).status == "none"
