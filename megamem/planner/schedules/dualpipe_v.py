"""DualPipeV (arXiv 2412.19437, section 3.2, cut in half: DeepSeek's "cut-in-half" of DualPipe), on a V placement.

Forward passes and whole backward passes alternate all through the steady phase, so that the communication of the one
can hide behind the computation of the other in models with expert parallelism. Here they run one after the other, F and
then BW, as torch.distributed.pipelining runs its OVERLAP_F_B; what an overlap would gain is not in the costs. Backward
is split into B and W only at both ends. Rank r of p (from 0) runs, with F0 the forward of chunk 0 and so on:

1. 2(p-r-1) times F0
2. r+1 times F0, F1
3. p-r-1 times B1, W, F1
4. m-2p+r+1 times F0, BW1, F1, BW0
5. p-r-1 times BW1, F1, BW0
6. the backward pass of chunk 1 and of chunk 0, r+1 times: the first half BW, the second half B
7. p-r-1 times W, B0
8. the W that are left

It holds p + 1/2 times its activations of a microbatch. Fewer than 2p microbatches run the order of 2p with the rest
left out.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from megamem.ir.schedule import Action, Kind, Schedule
from megamem.planner.schedules.family import Family, Request

_Pass = tuple[Kind, int]


def _passes(num_ranks: int, rank: int, length: int) -> list[_Pass]:
    """Kind and chunk of the actions of a rank, for `length` >= 2p microbatches; a W is whichever is oldest."""
    after = num_ranks - rank - 1
    warm_up: list[_Pass] = [("F", 0)] * (2 * after)
    warm_up += [("F", 0), ("F", 1)] * (rank + 1)
    warm_up += [("B", 1), ("W", 1), ("F", 1)] * after
    steady: list[_Pass] = [("F", 0), ("BW", 1), ("F", 1), ("BW", 0)] * (length - 2 * num_ranks + rank + 1)
    steady += [("BW", 1), ("F", 1), ("BW", 0)] * after
    cool_down: list[_Pass] = [("BW", 1), ("BW", 0)] * (rank + 1)
    cool_down[rank + 1 :] = [("B", chunk) for _, chunk in cool_down[rank + 1 :]]
    cool_down += [("W", 0), ("B", 0)] * after
    cool_down += [("W", 0)] * (rank + 1)
    return warm_up + steady + cool_down


def _actions(num_ranks: int, rank: int, microbatches: int) -> Iterator[Action]:
    counts: Counter[tuple[str, int]] = Counter()
    owed: deque[Action] = deque()
    for kind, chunk in _passes(num_ranks, rank, max(microbatches, 2 * num_ranks)):
        if kind == "W":
            if owed:
                yield owed.popleft()
            continue
        direction = "F" if kind == "F" else "B"
        microbatch = counts[direction, chunk]
        counts[direction, chunk] += 1
        if microbatch >= microbatches:
            continue
        yield Action(kind, chunk, microbatch)
        if kind == "B":
            owed.append(Action("W", chunk, microbatch))


def build(request: Request) -> Schedule:
    """The order for any number of ranks and microbatches."""
    ranks, microbatches = request.num_ranks, request.num_microbatches
    return Schedule(
        name=FAMILY.name,
        placement=request.placement(FAMILY.shape),
        num_microbatches=microbatches,
        ranks=tuple(tuple(_actions(ranks, rank, microbatches)) for rank in range(ranks)),
    )


FAMILY = Family(
    name="dualpipe-v",
    shape="v",
    build=build,
    summary="DualPipe cut in half: F and BW in turn on a V placement (arXiv 2412.19437, 3.2)",
    min_chunks=2,
    max_chunks=2,
)
