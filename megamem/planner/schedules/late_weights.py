"""W later than right after its B, where memory has room for it: the step that turns GIS into its zero-bubble form.

The published orders of GIS run each W right after its B (arXiv 2503.01328). The peak is that of rank 0; rank i holds i
chunk activations less. With that room, rank i can let W lag i passes behind, as ZB-H1 does (arXiv 2401.10241, section
2.1), which takes up to (p-1) W/v off the bubble at the same peak; this is also the order of torch's
ScheduleInterleavedZeroBubble. With real costs more can be had by putting W where a rank waits.

`with_late_weights` tries the order as it is, with the lag, and with W placed by simulated waits (`weight_placement`),
and keeps the quickest within the limit. F and B stay as they are, and W in the order of B within its chunk.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

from megamem.errors import InfeasibleError
from megamem.ir.schedule import Action, Schedule
from megamem.ir.workload import PipelineCosts
from megamem.planner.schedules.family import at_least
from megamem.planner.schedules.weight_placement import PATIENCE, best_of, place_weights


def peak_activation(schedule: Schedule, costs: PipelineCosts) -> float:
    """The most activation memory that any rank holds, for a schedule that can run, without copies to the host."""
    timed = place_weights(schedule.ranks, schedule.placement, costs)
    assert timed is not None, f"{schedule.name} waits for ever"
    return max(timed.peaks)


def with_late_weights(schedule: Schedule, costs: PipelineCosts, memory_limit: float) -> Schedule:
    """The schedule with its W where the makespan is least, and no rank above the limit.

    Raises InfeasibleError, with the least limit that works, where the schedule as it is exceeds it.
    """
    placement = schedule.placement
    caps = [memory_limit] * placement.num_ranks
    bare = [[action for action in actions if action.kind != "W"] for actions in schedule.ranks]
    lagging = [tuple(_lag(actions, rank)) for rank, actions in enumerate(schedule.ranks)]
    tried = itertools.chain(
        (place_weights(orders, placement, costs, caps) for orders in (schedule.ranks, lagging)),
        (place_weights(bare, placement, costs, caps, patience) for patience in PATIENCE),
    )
    best = best_of(timed for timed in tried if timed is not None)
    if best is None:
        least, chunks = at_least(peak_activation(schedule, costs)), placement.num_chunks
        group = "" if schedule.group is None else f" in groups of {schedule.group}"
        raise InfeasibleError(
            f"{schedule.name}: {placement.num_ranks} ranks with {chunks} chunks each hold activations of up to {least} "
            f"with {schedule.num_microbatches} microbatches{group}, and the memory limit is {memory_limit:g}; nearest: "
            f"{least}"
        )
    return schedule.with_ranks(best.ranks)


def _lag(actions: Sequence[Action], passes: int) -> Iterator[Action]:
    """Each W behind so many more B."""
    owed: deque[Action] = deque()
    for action in actions:
        if action.kind != "W":
            yield action
            continue
        owed.append(action)
        if len(owed) > passes:
            yield owed.popleft()
    yield from owed
