"""A rank that fails in the middle of a step: every rank ends with its name and action, and the next step works."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]


@contextlib.contextmanager
def failing(rank: int, action: str, how: Callable[[], None]) -> Iterator[None]:
    """On pipeline rank `rank`, call `how` in the middle of the pass that `action` is."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules

    from megamem.ir.schedule import Action

    at = Action.parse(action)
    name = "forward_step" if at.kind == "F" else "backward_step"
    original = getattr(schedules, name)
    count = 0

    @functools.wraps(original)
    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == at.microbatch + 1 and parallel_state.get_pipeline_model_parallel_rank() == rank:
            how()
        return original(*args, **kwargs)

    setattr(schedules, name, fails)
    try:
        yield
    finally:
        setattr(schedules, name, original)


def _raise() -> None:
    raise ValueError("no more tokens")


def fail_then_train(schedule: str, pp: int, rank: int, action: str) -> dict[str, Any]:
    """One step in which a rank fails, then one that does not: the error, how long it took, what is left over."""
    from megamem.errors import PipelineError
    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import seed_everything
    from megamem.testing.pipeline import PipelineCase, build_pipeline, gradients_of, run_step, train_pipeline

    case = PipelineCase(gpt=GptCase(layers=pp, hidden=16, pp=pp), num_microbatches=6, steps=1)
    init_parallel(case.gpt)
    stock = train_pipeline(case)
    seed_everything()
    with enable({"schedule": {"name": schedule}}) as handle:
        assert handle.schedule is not None
        chunks = build_pipeline(case)
        began = time.monotonic()
        with failing(rank, action, _raise), pytest.raises(PipelineError) as caught:
            run_step(case, chunks, case.num_microbatches, seed=0)
        took = time.monotonic() - began
        left = (handle.schedule.queue.waiting, handle.schedule.queue.held)
        for chunk in chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        run_step(case, chunks, case.num_microbatches, seed=0)
        gradients = gradients_of(chunks)
    return {
        "error": str(caught.value),
        "cause": type(caught.value.__cause__).__name__,
        "took": took,
        "left": left,
        "equal": all(gradients[name].equal(gradient) for name, gradient in stock.gradients.items()),
        "threads": [thread.name for thread in threading.enumerate() if "megamem" in thread.name],
    }


@pytest.mark.parametrize(("pp", "rank", "action"), [(2, 0, "0F0"), (2, 1, "0B2"), (4, 2, "0B1"), (4, 0, "0F5")])
def test_every_rank_names_the_failed_one_and_the_next_step_works(dist: Dist, pp: int, rank: int, action: str) -> None:
    found = dist(pp)(fail_then_train, "zb-h1", pp, rank, action)
    for one in found:
        assert one["error"] == f"pipeline rank {rank} (global {rank}) failed in {action}: ValueError: no more tokens"
        assert one["took"] < 10
        assert one["left"] == ([], [])
        assert one["equal"]
        assert one["threads"] == []
    assert found[rank]["cause"] == "ValueError"


def die_in_a_step() -> None:
    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.pipeline import PipelineCase, build_pipeline, run_step

    case = PipelineCase(gpt=GptCase(layers=2, hidden=16, pp=2), num_microbatches=4)
    init_parallel(case.gpt)
    with enable({"schedule": {"name": "1f1b"}}):
        chunks = build_pipeline(case)
        with failing(1, "0B1", lambda: os._exit(7)):
            run_step(case, chunks, case.num_microbatches, seed=0)


def test_the_others_end_when_a_rank_dies_without_a_word(dist: Dist) -> None:
    from megamem.testing.dist import RankError

    with pytest.raises(RankError) as caught:
        dist(2)(die_in_a_step)
    by_rank = {failure.rank: failure for failure in caught.value.failures}
    assert by_rank[1].reason == "exited with status 7"
    assert "PipelineError: pipeline rank 0 (global 0) failed in 0B" in by_rank[0].details
    assert "closed by peer" in by_rank[0].details or "reset by peer" in by_rank[0].details
