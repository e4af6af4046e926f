"""Interleaved 1F1B (arXiv 2104.04473), in exactly Megatron-Core's order.

Microbatches go through the chunks in groups: all of a group through chunk 0, then all of it through chunk 1, and so on
(`get_schedule_table`; the group is `microbatch_group_size_per_vp_stage`). Backward passes take the same table with the
chunks counted from the end. Rank i of p runs 2(p-1-i) + (v-1)g forwards, then pairs F, BW, then the remaining BW
(`get_pp_rank_microbatches`).

The group is p where none is asked for, as in Megatron-Core; where that would leave a last group which Megatron-Core
refuses (one with fewer than p microbatches), it is the smallest that does not.

With g = p and m a multiple of it the bubble is (p-1)(F+B+W)/v, and rank 0 holds up to vp+p-1 chunk activations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from megamem.errors import InfeasibleError
from megamem.ir.schedule import Action, Schedule
from megamem.planner.schedules.family import Family, Request

Pass = tuple[int, int]
"""A chunk and a microbatch."""


def group_sizes(num_microbatches: int, group: int) -> list[int]:
    """Groups of `group` microbatches, the last with what they leave."""
    whole, rest = divmod(num_microbatches, group)
    return [group] * whole + [rest] * bool(rest)


def pass_table(sizes: Sequence[int], num_chunks: int) -> list[Pass]:
    """The forward passes of every rank in order, as (chunk, microbatch), for groups of these sizes.

    Backward passes come in the same order with chunk v-1-c for c.
    """
    bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    return [
        (chunk, microbatch) for first, end in bounds for chunk in range(num_chunks) for microbatch in range(first, end)
    ]


def one_forward_one_backward(table: Sequence[Pass], num_chunks: int, ahead: int) -> Iterator[Action]:
    """`ahead` forwards of the table, then F and BW in turn, then the remaining BW."""
    ahead = min(ahead, len(table))
    for index in range(len(table) + ahead):
        if index < len(table):
            chunk, microbatch = table[index]
            yield Action("F", chunk, microbatch)
        if index >= ahead:
            chunk, microbatch = table[index - ahead]
            yield Action("BW", num_chunks - 1 - chunk, microbatch)


def build(request: Request) -> Schedule:
    """Megatron-Core's order. Raises InfeasibleError for a group that Megatron-Core refuses too."""
    ranks, chunks, microbatches = request.num_ranks, request.num_chunks, request.num_microbatches
    group = _fitting_group(ranks, ranks, microbatches) if request.group is None else request.group
    _check_group(group, ranks, microbatches)
    table = pass_table(group_sizes(microbatches, group), chunks)
    return Schedule(
        name=FAMILY.name,
        placement=request.placement(FAMILY.shape),
        num_microbatches=microbatches,
        ranks=tuple(
            tuple(one_forward_one_backward(table, chunks, 2 * (ranks - 1 - rank) + (chunks - 1) * group))
            for rank in range(ranks)
        ),
        group=group,
    )


def _check_group(group: int, ranks: int, microbatches: int) -> None:
    """Refuse what `forward_backward_pipelining_with_interleaving` refuses, but for fewer microbatches than a group."""
    if group < ranks:
        raise InfeasibleError(
            f"interleaved on {ranks} ranks needs groups of at least {ranks} microbatches, not {group}; nearest: group "
            f"{_fitting_group(ranks, ranks, microbatches)} (gis works with smaller groups)"
        )
    last = microbatches % group
    if microbatches > group and 0 < last < ranks:
        raise InfeasibleError(
            f"interleaved: {microbatches} microbatches in groups of {group} leave a last group of {last}, fewer than "
            f"the {ranks} ranks; nearest: group {_fitting_group(group, ranks, microbatches)}, or "
            f"{microbatches - last} microbatches"
        )


def _fitting_group(group: int, ranks: int, microbatches: int) -> int:
    """The smallest group, from `group` on, whose last group is whole or has a microbatch for every rank."""
    if microbatches <= group:
        return group
    return next(size for size in range(group, microbatches + 1) if not 0 < microbatches % size < ranks)


FAMILY = Family(
    name="interleaved",
    shape="round-robin",
    build=build,
    summary="interleaved 1F1B, Megatron-Core's order with chunks (arXiv 2104.04473)",
    min_chunks=2,
    max_chunks=None,
    uses_group=True,
)
