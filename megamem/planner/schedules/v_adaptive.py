"""V-Adaptive: the V placement under any memory limit (arXiv 2405.15362, appendix A).

One building block has one memory. Here they are enumerated: on rank 0, F of chunk 0 is in slot 0 and the three other
passes are in any other slots of the period; from rank to rank F of chunk 0 and B of chunk 1 move `k` slots on, F of
chunk 1 and B of chunk 0 one slot back, with one k for the first ranks and a smaller or the same for the rest. Blocks in
which two passes of a rank collide, or that need too much memory, are left out.

With equal costs the bubble depends on the memory alone. Otherwise it is least, as a rule, where the memory is used up
and the first B comes late. The most promising blocks are built in that order, for a short step, and timed with the
request's costs; the best of them are built in full.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

from megamem.errors import InfeasibleError
from megamem.ir.schedule import Placement, Schedule
from megamem.ir.workload import PipelineCosts
from megamem.planner.schedules.building_block import PERIOD, Block, unit_orders
from megamem.planner.schedules.family import Family, Request
from megamem.planner.schedules.weight_placement import ROUNDING, Timed, best_of, place_weights, with_weights

_Row = tuple[int, int, int, int]

TRIAL_ACTIONS: Final = 60_000
"""How many actions are placed in search of the best blocks, and again for the finalists; more only for the first."""

TRIALS: Final = 32
"""How many blocks, at most, are tried in a short step."""

FINALISTS: Final = 3
"""How many blocks, at most, are built for the full number of microbatches."""

SWITCHES: Final = 16
"""How many ranks are tried as the first of the second k."""


def blocks(num_ranks: int) -> Iterator[tuple[int, Block]]:
    """Every block and the chunk activations that its fullest rank holds."""
    step = max(1, num_ranks // SWITCHES)
    for first in itertools.permutations(range(1, PERIOD), 3):
        for fast, slow in itertools.combinations_with_replacement(range(PERIOD - 1, 0, -1), 2):
            for switch in range(1, num_ranks, step) if slow < fast else (num_ranks,):
                rows = _residues((0, *first), num_ranks, fast, slow, switch)
                if rows is not None:
                    block = _unroll(rows)
                    yield max(map(_held, block)), block


def _residues(row: _Row, num_ranks: int, fast: int, slow: int, switch: int) -> list[_Row] | None:
    """The slots modulo the period, from that of rank 0; None where passes collide."""
    rows = [row]
    for rank in range(1, num_ranks):
        down = fast if rank <= switch else slow
        f0, f1, b1, b0 = row
        row = ((f0 + down) % PERIOD, (f1 - 1) % PERIOD, (b1 + down) % PERIOD, (b0 - 1) % PERIOD)
        if len(set(row)) < len(row):
            return None
        rows.append(row)
    return rows


def _unroll(residues: list[_Row]) -> Block:
    """The first slots with these residues in which a microbatch can go down, up, down and up again."""
    starts = [[0] * 4 for _ in residues]
    clock = 0
    for kind in range(4):
        for rank in range(len(residues))[:: -1 if kind % 2 else 1]:
            clock += (residues[rank][kind] - clock) % PERIOD
            starts[rank][kind] = clock
            clock += 1
    return [(f0, f1, b1, b0) for f0, f1, b1, b0 in starts]


def _held(row: _Row) -> int:
    """The most activations that a rank holds at once, with the W of each B in the first slot that is free."""
    f0, f1, b1, b0 = row
    used = {slot % PERIOD for slot in row}
    ends = {}
    for name, start in (("w1", b1), ("w0", b0)):
        ends[name] = next(slot for slot in itertools.count(start + 1) if slot % PERIOD not in used)
        used.add(ends[name] % PERIOD)
    return max(
        (at - f0) // PERIOD - (at - ends["w0"]) // PERIOD + (at - f1) // PERIOD - (at - ends["w1"]) // PERIOD
        for at in (f0, f1)
    )


def _promising(num_ranks: int, most: int) -> list[Block]:
    """The blocks of at most so many activations, best first, without doubles."""
    within: dict[Block, int] = {tuple(block): held for held, block in blocks(num_ranks) if held <= most}
    return sorted(within, key=lambda block: (-within[block], -block[0][2], -block[0][3]))


def search(request: Request, placement: Placement, costs: PipelineCosts, caps: Sequence[float]) -> list[Timed]:
    """The best blocks within a memory per rank, each with W placed in several ways; none where no block is so lean."""
    ranks, microbatches = request.num_ranks, request.num_microbatches
    largest, limit = max(stage.activation for stage in costs.stages), max(caps)
    sure = most = 2 * ranks  # chunk activations that certainly fit, and that may
    if limit < 2 * microbatches * largest:
        exact = all(stage.activation == largest == stage.weight_grad for stage in costs.stages)
        sure = min(most, int(limit / largest * ROUNDING))
        most = min(most, sure if exact else sure + 2)
    short = min(microbatches, 2 * ranks)
    trials = max(FINALISTS, min(TRIALS, TRIAL_ACTIONS // (PERIOD * ranks * short)))
    builds = max(1, min(FINALISTS, TRIAL_ACTIONS // (PERIOD * ranks * microbatches)))
    found: list[tuple[float, Block]] = []
    for block in _promising(ranks, most)[: 3 * trials]:
        best = best_of(with_weights(unit_orders(block, short, sure), placement, costs, caps, quick=True))
        if best is not None:
            found.append((best.makespan, block))
        if len(found) == trials:
            break
    if not found:
        lean = _leanest(request, placement, costs)
        return [lean] if max(lean.peaks) <= limit * ROUNDING else []
    found.sort(key=lambda item: item[0])
    finalists = (unit_orders(block, microbatches, sure) for _, block in found[:builds])
    return [timed for orders in finalists for timed in with_weights(orders, placement, costs, caps)]


def _leanest(request: Request, placement: Placement, costs: PipelineCosts) -> Timed:
    """The schedule with the lowest peak, of the first few blocks that hold the fewest activations."""
    fewest = min(held for held, _ in blocks(request.num_ranks))
    lean = _promising(request.num_ranks, fewest)[:FINALISTS]
    timed = [place_weights(unit_orders(block, request.num_microbatches), placement, costs) for block in lean]
    return min((each for each in timed if each is not None), key=lambda each: max(each.peaks))


def refuse(name: str, request: Request, limit: float) -> InfeasibleError:
    """The error for a limit that is too low, with the lowest that is not."""
    placement = request.placement(FAMILY.shape)
    least = max(_leanest(request, placement, request.costs(placement)).peaks)
    return InfeasibleError(
        f"{name}: the memory limit is {limit:g}, and the leanest schedule on {request.num_ranks} ranks takes "
        f"{least:.9g}; nearest: {least:.9g}"
    )


def build(request: Request) -> Schedule:
    """The best schedule within the request's limit; without one, within the memory of 1F1B.

    Raises InfeasibleError where the limit is below that of the leanest block.
    """
    placement = request.placement(FAMILY.shape)
    costs = request.costs(placement)
    largest = max(stage.activation for stage in costs.stages)
    limit = 2 * request.num_ranks * largest if request.memory_limit is None else request.memory_limit
    best = best_of(search(request, placement, costs, [limit] * request.num_ranks))
    if best is None:
        raise refuse(FAMILY.name, request, limit)
    return Schedule(name=FAMILY.name, placement=placement, num_microbatches=request.num_microbatches, ranks=best.ranks)


FAMILY = Family(
    name="v-adaptive",
    shape="v",
    build=build,
    summary="the best building block on a V placement for a memory limit (arXiv 2405.15362, A)",
    min_chunks=2,
    max_chunks=2,
    uses_costs=True,
    uses_limit=True,
)
