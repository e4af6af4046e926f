"""Layers to pipeline stages: evenly where they divide, else so that the busiest rank has as little as can be."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from megamem.ir.job import Job
from megamem.ir.pipeline_split import Split, balanced_split, dealt_split
from megamem.ir.schedule import Placement, Shape
from megamem.planner.costs.work import layer_work, output_flops, projection_flops

MOST_CHUNKS = 4
_UNEVEN = 1.3  # a full stage over the average one: beyond, chunks are not weighed


def laid_out(job: Job, chunks: int, shape: Shape = "round-robin") -> Job:
    """The job with so many chunks per rank, placed so; a split of its own stays where it is for as many."""
    layout = job.layout
    if chunks == layout.chunks and (layout.split or job.model.num_layers % layout.num_stages == 0):
        return job
    bare = replace(job, layout=replace(layout, chunks=chunks, split=()))
    return replace(bare, layout=replace(bare.layout, split=_split(bare, shape)))


def _split(job: Job, shape: Shape) -> Split:
    """By the FLOPs of layers and output layer. Empty where the layers divide evenly, or are fewer than the stages."""
    model, stages = job.model, job.layout.num_stages
    if model.num_layers % stages == 0 or model.num_layers < stages:
        return ()
    flops = {
        moe: work.gemm + work.attention
        for moe in (False, True)
        if (number := next((n for n in range(1, model.num_layers + 1) if model.is_moe(n) == moe), 0))
        and (work := layer_work(job, number))
    }
    costs = tuple(flops[model.is_moe(number)] for number in range(1, model.num_layers + 1))
    depths = model.mtp_num_layers
    last = (1 + depths) * output_flops(job) + depths * (costs[-1] + projection_flops(job))
    if job.layout.chunks == 1:
        return _balanced(costs, stages, last)
    placement = Placement(shape=shape, num_ranks=job.layout.pipeline, num_chunks=job.layout.chunks)
    ranks = tuple(placement.rank_of(stage) for stage in range(stages))
    return _dealt(model.num_layers, ranks, last * len(costs) / sum(costs))


_balanced, _dealt = lru_cache(maxsize=4096)(balanced_split), lru_cache(maxsize=4096)(dealt_split)


def is_balanced(job: Job) -> bool:
    """Whether the layers are divided as they would be unasked."""
    bare = replace(job, layout=replace(job.layout, split=()))
    shapes: tuple[Shape, ...] = ("round-robin", "v") if job.layout.chunks == 2 else ("round-robin",)
    return job.layout.split in [_split(bare, shape) for shape in shapes]


def possible_chunks(job: Job) -> list[int]:
    """The numbers of chunks that its layers can be put into: those settled, or all up to `MOST_CHUNKS`.

    A split that is not the one of `laid_out` was asked for, and is for its own number of chunks.

    Layers that divide by the ranks divide by the chunks as well: an uneven split would only be slower. So would one
    whose stages are far from equal: the passes of a schedule wait for the longest.
    """
    layout, layers = job.layout, job.model.num_layers
    if layout.chunks > 1 or (layout.split and not is_balanced(job)):
        return [layout.chunks]
    per_rank, over = divmod(layers, layout.pipeline)
    if not over:
        return [chunks for chunks in range(1, MOST_CHUNKS + 1) if per_rank % chunks == 0]
    counts = [(chunks, layout.pipeline * chunks) for chunks in range(2, MOST_CHUNKS + 1) if chunks <= per_rank]
    return [1, *(chunks for chunks, stages in counts if -(-layers // stages) * stages <= _UNEVEN * layers)]
