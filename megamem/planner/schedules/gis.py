"""GIS: interleaved 1F1B with the backward pass split, at the memory of 1F1B or less (arXiv 2503.01328, section 4).

    gis       groups of g microbatches, ceil(p/2) <= g <= p; p where none is asked for
    gis-h     g = ceil(p/2), in `gis_h.py`

The passes come in the order of interleaved 1F1B (see `interleaved.py`), with two differences: every BW is a B and a W
right after it, so that the gradient travels on before W runs; and so rank i of p needs only p-1-i + (v-1)g forwards
ahead, where interleaved 1F1B needs 2(p-1-i) + (v-1)g. Rank 0 holds at most (v-1)g + p chunk activations: v p, as much
as 1F1B, for g = p; about (v+1)/2v of that for g = ceil(p/2). With equal costs the bubble is (p-1)(F+B) in costs of a
chunk, and (p-g)(v-1) forwards and backwards more.

The last group holds what the others leave. When rank 0 begins a chunk of it, the last rank must have got through the
chunk before without waiting for rank 0: the passes in between are p-1-r ranks' worth on one side and g on the other,
which gives r + g >= p-1 for a last group of r; ceil(p/2) follows the same way from r = g, with one to spare for the
steady state to run without waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megamem.errors import InfeasibleError
from megamem.ir.schedule import Action, Schedule
from megamem.planner.schedules.family import Family, Request
from megamem.planner.schedules.interleaved import Pass, pass_table


def smallest_group(num_ranks: int) -> int:
    """The least microbatches in a group: half the ranks, rounded up."""
    return (num_ranks + 1) // 2


def one_forward_one_split(table: Sequence[Pass], num_chunks: int, ahead: int) -> Iterator[Action]:
    """`ahead` forwards of the table, then a forward and a backward in turn, each backward a B and its W."""
    ahead = min(ahead, len(table))
    for index in range(len(table) + ahead):
        if index < len(table):
            chunk, microbatch = table[index]
            yield Action("F", chunk, microbatch)
        if index >= ahead:
            chunk, microbatch = table[index - ahead]
            yield Action("B", num_chunks - 1 - chunk, microbatch)
            yield Action("W", num_chunks - 1 - chunk, microbatch)


def group_interleaved(request: Request, name: str, group: int) -> Schedule:
    """The schedule with groups of `group` microbatches, which must fit (see `_last_group_runs`)."""
    ranks, chunks, microbatches = request.num_ranks, request.num_chunks, request.num_microbatches
    table = pass_table(microbatches, chunks, group)
    return Schedule(
        name=name,
        placement=request.placement(FAMILY.shape),
        num_microbatches=microbatches,
        ranks=tuple(
            tuple(one_forward_one_split(table, chunks, ranks - 1 - rank + (chunks - 1) * group))
            for rank in range(ranks)
        ),
        group=group,
    )


def fitting_group(request: Request, least: int) -> int:
    """The smallest group, from `least` on, whose last group runs."""
    return next(group for group in range(least, request.num_ranks + 1) if _last_group_runs(request, group))


def _last_group_runs(request: Request, group: int) -> bool:
    """Whether the last group is whole, alone, or big enough not to wait for itself; so with g = p always."""
    last = request.num_microbatches % group
    alone = request.num_microbatches <= group
    single_pass = (request.num_chunks - 1) * last < 2  # forwards of the last group that follow one of its own
    return not last or alone or single_pass or last + group >= request.num_ranks - 1


def build(request: Request) -> Schedule:
    """The schedule for `request.group`, or for g = p. Raises InfeasibleError for a group that would wait for ever."""
    ranks, group = request.num_ranks, request.num_ranks if request.group is None else request.group
    least = smallest_group(ranks)
    if not least <= group <= ranks:
        raise InfeasibleError(
            f"gis on {ranks} ranks works with groups of {least} (half the ranks, rounded up) to {ranks}, not {group}; "
            f"nearest: group {fitting_group(request, least) if group < least else ranks}"
        )
    if not _last_group_runs(request, group):
        microbatches, last = request.num_microbatches, request.num_microbatches % group
        raise InfeasibleError(
            f"gis on {ranks} ranks: {microbatches} microbatches in groups of {group} leave a last group of {last}, and "
            f"{last} + {group} is less than {ranks} - 1; nearest: group {fitting_group(request, group)}, or "
            f"{microbatches - last} microbatches"
        )
    return group_interleaved(request, FAMILY.name, group)


FAMILY = Family(
    name="gis",
    shape="round-robin",
    build=build,
    summary="interleaved 1F1B with split backward, at the memory of 1F1B or less by group (arXiv 2503.01328, 4)",
    min_chunks=2,
    max_chunks=None,
    uses_group=True,
)
