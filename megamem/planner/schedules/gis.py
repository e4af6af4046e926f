"""GIS: interleaved 1F1B with the backward pass split, at the memory of 1F1B or less (arXiv 2503.01328).

    gis       groups of g microbatches, ceil(p/2) <= g <= p; p where none is asked for
    gis-h     g = ceil(p/2), in `gis_h.py`

The passes come in the order of interleaved 1F1B (see `interleaved.py`), with two differences: every BW is a B and a W
right after it, so that the gradient travels on before W runs; and so rank i of p needs only p-1-i + (v-1)g forwards
ahead, where interleaved 1F1B needs 2(p-1-i) + (v-1)g. Rank 0 holds at most (v-1)g + p chunk activations: v p, as much
as 1F1B, for g = p; about (v+1)/2v of that for g = ceil(p/2). In costs of a chunk the bubble is (p-1)(F+B) for g = p,
and about (p-g)(v-1)(F+B-W) more for smaller groups.

That is the order without a memory limit. With one, W may run later where the limit has room (`late_weights.py`); the
costs matter for that only.

Groups come as in Megatron-Core, the last one with what the others leave. When rank 0 begins a chunk of a group, the
last rank must have got through the chunk before, and for that through backwards of the group before, without waiting
for rank 0. Between the two ranks lie p-1 passes, on either side of them one group; so two groups in a row must have p-1
microbatches together, or both ranks wait for ever. Where the last group is too small, all groups are made nearly equal
instead, none larger than g; this keeps the memory, and costs time where they get smaller than p/2, because rank 0 then
waits in every chunk. What remains too small is refused. Best is a number of microbatches that g divides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from megamem.errors import InfeasibleError
from megamem.ir.schedule import Action, Schedule
from megamem.planner.schedules.family import Family, Request
from megamem.planner.schedules.interleaved import Pass, group_sizes, one_forward_one_backward, pass_table
from megamem.planner.schedules.late_weights import peak_activation, with_late_weights
from megamem.planner.schedules.weight_placement import ROUNDING


def smallest_group(num_ranks: int) -> int:
    """The least microbatches in a group: half the ranks, rounded up."""
    return (num_ranks + 1) // 2


def one_forward_one_split(table: Sequence[Pass], num_chunks: int, ahead: int) -> Iterator[Action]:
    """`ahead` forwards of the table, then a forward and a backward in turn, each backward a B and its W."""
    for action in one_forward_one_backward(table, num_chunks, ahead):
        if action.kind == "F":
            yield action
        else:
            yield action._replace(kind="B")
            yield action._replace(kind="W")


def group_interleaved(request: Request, name: str, group: int, sizes: Sequence[int]) -> Schedule:
    """The schedule with groups of these sizes, none larger than `group`, which says how many forwards run ahead."""
    ranks, chunks = request.num_ranks, request.num_chunks
    table = pass_table(sizes, chunks)
    return Schedule(
        name=name,
        placement=request.placement(FAMILY.shape),
        num_microbatches=request.num_microbatches,
        ranks=tuple(
            tuple(one_forward_one_split(table, chunks, ranks - 1 - rank + (chunks - 1) * group))
            for rank in range(ranks)
        ),
        group=group,
    )


def fitting_sizes(request: Request, group: int) -> list[int] | None:
    """Sizes of groups of at most `group`: Megatron-Core's, or else nearly equal ones; None where neither runs."""
    microbatches, enough = request.num_microbatches, request.num_ranks - 1
    sizes = group_sizes(microbatches, group)
    if len(sizes) == 1 or sizes[-1] + group >= enough or (request.num_chunks - 1) * sizes[-1] < 2:
        return sizes  # with one pass after its first, the last group has nothing to wait for
    count = len(sizes)
    bounds = [index * microbatches // count for index in range(count + 1)]
    sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
    return sizes if min(map(sum, itertools.pairwise(sizes))) >= enough else None


def fitting_group(request: Request, least: int) -> int:
    """The smallest group, from `least` on, that runs; p always does."""
    return next(group for group in range(least, request.num_ranks + 1) if fitting_sizes(request, group) is not None)


def within_limit(schedule: Schedule, request: Request) -> Schedule:
    """The published order, or for a request with a memory limit the quickest with W where the limit has room for it."""
    if request.memory_limit is None:
        return schedule
    return with_late_weights(schedule, request.costs(schedule.placement), request.memory_limit)


def build(request: Request) -> Schedule:
    """The schedule for `request.group`; without one for g = p, or the largest group within the memory limit.

    Raises InfeasibleError for a group that would wait for ever, and for a limit that is too low.
    """
    ranks, limit = request.num_ranks, request.memory_limit
    least = smallest_group(ranks)
    if request.group is not None:
        return within_limit(_in_groups(request, request.group, least), request)
    groups = [group for group in range(ranks, least - 1, -1) if fitting_sizes(request, group) is not None]
    if limit is None:
        return _in_groups(request, groups[0], least)
    for group in groups:
        schedule = _in_groups(request, group, least)
        if peak_activation(schedule, request.costs(schedule.placement)) <= limit * ROUNDING:
            break
    return within_limit(schedule, request)


def _in_groups(request: Request, group: int, least: int) -> Schedule:
    ranks = request.num_ranks
    if not least <= group <= ranks:
        raise InfeasibleError(
            f"gis on {ranks} ranks works with groups of {least} (half the ranks, rounded up) to {ranks}, not {group}; "
            f"nearest: group {fitting_group(request, least) if group < least else ranks}"
        )
    sizes = fitting_sizes(request, group)
    if sizes is None:
        microbatches, last = request.num_microbatches, request.num_microbatches % group
        raise InfeasibleError(
            f"gis on {ranks} ranks: two groups in a row need {ranks - 1} microbatches together, and {microbatches} in "
            f"groups of {group} leave {last} for the last one, too few to make up for; nearest: group "
            f"{fitting_group(request, group)}, or {microbatches - last} microbatches"
        )
    return group_interleaved(request, FAMILY.name, group, sizes)


FAMILY = Family(
    name="gis",
    shape="round-robin",
    build=build,
    summary="interleaved 1F1B with split backward, at the memory of 1F1B or less by group (arXiv 2503.01328)",
    min_chunks=2,
    max_chunks=None,
    uses_group=True,
    uses_costs=True,
    uses_limit=True,
)
