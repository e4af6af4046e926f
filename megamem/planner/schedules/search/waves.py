"""Orders of F and B with the structure of group interleaving, for both placements and any costs.

A wave lets microbatches enter in groups and gives every F and every B a time at which it would run if nothing were in
its way; a rank takes them in the order of those times. For microbatch j of the group that enters at G, on stage s of S:

    F   G + j * spacing + s * rise
    B   G + j * spacing + (S - 1 - s) * fall

With round-robin placement and `ranks * rise >= size * spacing` that is Megatron-Core's table, a group through chunk 0,
then through chunk 1 ..., and GIS(g) of PipeOffload (arXiv 2503.01328, section 4); groups of one are its uniform repeat;
on a V placement it is a building block of arXiv 2405.15362 (section 3) for any number of chunks. Groups may have
different sizes: two sizes in turn lie between two members of the family, in memory and in time.
"""

from __future__ import annotations

from typing import NamedTuple

from megamem.planner.schedules.search.problem import Problem, Queue


class Wave(NamedTuple):
    """A structure; `spacing`, `rise` and `fall` are shares of the period of one chunk (its F + B + W).

    sizes:    microbatches per group, together all of them
    stretch:  a group of n enters n * stretch periods before the next
    """

    sizes: tuple[int, ...]
    spacing: float
    rise: float
    fall: float
    stretch: float = 1.0


def even_groups(size: int, total: int) -> tuple[int, ...]:
    """`total` microbatches in as few groups of at most `size` as there can be, as equal as they can be.

    A last group that is much smaller than the others would leave the ranks waiting for its chunks.
    """
    groups = -(-total // size)
    least, larger = divmod(total, groups)
    return (least + 1,) * larger + (least,) * (groups - larger)


def turns(first: int, second: int, total: int) -> tuple[int, ...]:
    """`total` microbatches in groups of two sizes in turn."""
    sizes: list[int] = []
    while (left := total - sum(sizes)) > 0:
        sizes.append(min(left, (first, second)[len(sizes) % 2]))
    return tuple(sizes)


def wave_queues(problem: Problem, wave: Wave) -> tuple[list[Queue], list[Queue]]:
    """The order of F and the order of B of every rank."""
    beat = problem.period / problem.placement.num_chunks
    spacing, rise, fall = wave.spacing * beat, wave.rise * beat, wave.fall * beat
    hair = 1e-6 * beat  # equal times that were summed differently are equal
    last = problem.num_stages - 1
    forward: list[list[tuple[int, int, int]]] = [[] for _ in range(problem.num_ranks)]
    backward: list[list[tuple[int, int, int]]] = [[] for _ in range(problem.num_ranks)]
    enter, batch = 0.0, 0
    for size in wave.sizes:
        for position in range(size):
            start = enter + position * spacing
            for stage, rank in enumerate(problem.ranks):
                forward[rank].append((round((start + stage * rise) / hair), batch, stage))
                backward[rank].append((round((start + (last - stage) * fall) / hair), batch, stage))
            batch += 1
        enter += size * problem.period * wave.stretch
    return _queues(forward), _queues(backward)


def _queues(keyed: list[list[tuple[int, int, int]]]) -> list[Queue]:
    return [[(stage, batch) for _, batch, stage in sorted(keys)] for keys in keyed]
