"""Vocabulary-parallel runs on 2, 4 and 8 ranks against the whole model on one rank, with stock Megatron alone.

fp32, relative errors below 5e-6: what test_shared_vocabulary.py allows, and what tensor parallelism adds by summing its
ranks' parts of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megamem.testing.trials import LLAMA

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]

ALLOWED = 5e-6
MODEL: Fields = {**LLAMA, "layers": 4, "hidden": 16, "vocab": 70}

# ranks: layout, schedule, barriers
RUNS: dict[int, tuple[Fields, str, int]] = {
    2: ({"pp": 2, "tied": True}, "zb-h1", 2),
    4: ({"pp": 2, "vpp": 2, "tp": 2, "sp": True}, "v-half", 1),
    8: ({"pp": 4, "tp": 2}, "1f1b", 1),
}


def far_from_one_rank(layout: Fields, schedule: str, barriers: int) -> dict[str, float]:
    """By name: losses and gradients of the whole model that are further from a single rank's than is allowed."""
    import torch
    import torch.distributed as torch_dist
    from megatron.core import parallel_state

    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import relative_error
    from megamem.testing.pipeline import PipelineCase, train_pipeline, whole_model

    gpt = GptCase(**MODEL, **layout)
    init_parallel(gpt)
    config = {"vocabulary": {"parallel": True, "barriers": barriers}}
    ours = train_pipeline(PipelineCase(gpt=gpt, steps=1, evaluate=1), {"name": schedule}, config=config)
    gradients = whole_model(ours.gradients)
    results: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(results, ours.losses)
    losses = next(row for row in results if row)

    parallel_state.destroy_model_parallel()
    alone = GptCase(**MODEL, tied=gpt.tied, ddp=False)  # every rank by itself; the first has the data of the run above
    init_parallel(alone)
    whole = train_pipeline(PipelineCase(gpt=alone, steps=1, evaluate=1))
    if torch_dist.get_rank() != 0:
        return {}
    errors = {
        f"loss {index}": relative_error(one["loss"], other["loss"])
        for index, (one, other) in enumerate(zip(losses, whole.losses, strict=True))
    }
    assert len(errors) == 5 and len(whole.gradients) > 10
    for name, gradient in whole.gradients.items():
        if name in gradients:  # a weight of the vocabulary
            errors[name] = relative_error(gradients.pop(name), gradient)
            continue
        parts = [gradients.pop(f"{name} {rank}") for rank in range(gpt.tp)]
        errors[name] = relative_error(torch.stack(parts), torch.stack(_cut(gradient, name, parts)))
    assert not gradients
    return {name: error for name, error in errors.items() if not error < ALLOWED}


def _cut(whole: Any, name: str, parts: list[Any]) -> list[Any]:
    """The parts of a gradient that the tensor-parallel ranks have; a gated layer is cut half by half."""
    import torch

    differing = [dim for dim, size in enumerate(parts[0].shape) if size != whole.shape[dim]]
    if not differing:
        return [whole] * len(parts)
    halves = whole.chunk(2 if "linear_fc1" in name else 1, differing[0])
    cut = [half.chunk(len(parts), differing[0]) for half in halves]
    return [torch.cat([half[rank] for half in cut], differing[0]) for rank in range(len(parts))]


@pytest.mark.parametrize("num_ranks", RUNS)
def test_equal_to_the_model_on_one_rank(dist: Dist, num_ranks: int) -> None:
    assert dist(num_ranks)(far_from_one_rank, *RUNS[num_ranks]) == [{}] * num_ranks
