"""The forward-only order: every forward pass once, in an order that can run, without idling where there is work."""

import itertools

import pytest

from megamem.ir.schedule import SHAPES, Placement
from megamem.planner.schedules.forward_order import forward_order


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("ranks", "chunks"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 1), (4, 4)])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 8])
def test_every_forward_pass_runs_once_and_after_its_predecessor(
    shape: str, ranks: int, chunks: int, microbatches: int
) -> None:
    placement = Placement(shape=shape, num_ranks=ranks, num_chunks=chunks)  # type: ignore[arg-type]
    schedule = forward_order(placement, microbatches)
    expected = sorted(itertools.product(range(chunks), range(microbatches)))
    assert all(sorted((a.chunk, a.microbatch) for a in actions) == expected for actions in schedule.ranks)
    assert {action.kind for _, action in schedule} == {"F"}

    # Run the lists in order, each rank on its own, until nothing moves.
    done: set[tuple[int, int]] = set()
    queues = [list(actions) for actions in schedule.ranks]
    moved = True
    while moved:
        moved = False
        for rank, queue in enumerate(queues):
            while queue:
                stage, microbatch = placement.stage(rank, queue[0].chunk), queue[0].microbatch
                if stage and (stage - 1, microbatch) not in done:
                    break
                done.add((stage, microbatch))
                queue.pop(0)
                moved = True
    assert not any(queues)


def test_no_rank_idles_once_it_has_begun_on_a_plain_pipeline() -> None:
    schedule = forward_order(Placement(shape="round-robin", num_ranks=4, num_chunks=1), 6)
    assert all([action.microbatch for action in actions] == list(range(6)) for actions in schedule.ranks)
