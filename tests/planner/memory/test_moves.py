"""What actions do to a ledger, worked out once for all that see the same of it, against the ledger itself."""

import random
from dataclasses import replace

import pytest

from megamem.ir.workload import Uniform
from megamem.planner.memory.ledger import LayerBytes, Ledger
from megamem.planner.memory.moves import Moves
from megamem.planner.schedules.families import FAMILIES, build_schedule
from megamem.planner.schedules.family import Request

_NAMES = ("1f1b", "interleaved", "gis", "gis-h", "zb-h1", "zb-h2", "v-half", "po-h", "po-f")


def _layer(draw: random.Random, kind: str) -> LayerBytes:
    def nbytes(share: float = 0.7) -> int:
        return draw.randrange(1, 1000) if draw.random() < share else 0

    own = LayerBytes(kept=nbytes(), weight_gradients=nbytes(), routed=nbytes(0.3))
    if kind == "kept":
        return own
    if kind == "recomputed":
        return replace(own, back=nbytes(1), again=nbytes(0.3))
    return replace(
        own,
        base=nbytes(),
        rest=nbytes(),
        experts=nbytes(0.4),
        tiles=tuple(nbytes() for _ in range(draw.randrange(4))),
        back=nbytes(),
        again=nbytes(0.2),
        stores_input=draw.random() < 0.7,
    )


def _chunk(draw: random.Random, layers: list[LayerBytes]) -> list[LayerBytes]:
    """Some of the layers, or none; sometimes with layers of multi-token prediction behind them."""
    chunk = [draw.choice(layers) for _ in range(draw.randrange(5))]
    more = draw.randrange(1, 3) if draw.random() < 0.2 else 0
    return [*chunk, *(replace(draw.choice(layers), begins=True) for _ in range(more))]


@pytest.mark.parametrize("seed", range(60))
def test_books_are_those_of_the_ledger(seed):
    draw = random.Random(seed)
    name = draw.choice(_NAMES)
    family, ranks = FAMILIES[name], draw.randrange(2, 6)
    chunks = max(family.min_chunks, min(draw.randrange(1, 4), family.max_chunks or 3))
    request = Request(
        num_ranks=ranks,
        num_microbatches=ranks * draw.randrange(1, 5),
        num_chunks=chunks,
        workload=Uniform(offload=0.5),
    )
    schedule = build_schedule(name, request)
    kinds = draw.choice([["kept"], ["recomputed"], ["swapped"], ["kept", "recomputed", "swapped"]])
    layers = [_layer(draw, draw.choice(kinds)) for _ in range(draw.randrange(1, 4))]
    stages = [_chunk(draw, layers) for _ in range(ranks * chunks)]
    if draw.random() < 0.5:
        stages = stages[:1] * len(stages)
    base_apart = draw.random() < 0.3
    moves = Moves(base_apart=base_apart)
    for rank, actions in enumerate(schedule.ranks):
        mine = [stages[schedule.placement.stage(rank, chunk)] for chunk in range(chunks)]
        spared = [[replace(layer, base=0, rest=0, experts=0, tiles=()) for layer in chunk] for chunk in mine]
        ends = [draw.randrange(50) for _ in mine]
        whole = Ledger(mine, spared if family.offloads else None, ends, base_apart=base_apart).run(actions)
        assert moves.book(mine, spared if family.offloads else None, ends, actions) == whole


def test_a_steady_state_is_worked_out_once():
    """However many microbatches, the ledger goes through as few of them."""
    layers = [LayerBytes(kept=1, rest=8, back=9, weight_gradients=2)] * 3
    counts = []
    for microbatches in (16, 64):
        schedule = build_schedule("1f1b", Request(num_ranks=4, num_microbatches=microbatches))
        moves = Moves(base_apart=False)
        for actions in schedule.ranks:
            moves.book([layers], None, [0], actions)
        counts.append(moves.worked_out)
    assert counts[0] == counts[1] < 16
