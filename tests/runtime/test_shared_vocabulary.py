"""Vocabulary parallelism against stock Megatron-Core on the same ranks: losses, every gradient, parameters.

fp32: relative errors below 3e-6. The sum over the vocabulary and that over the shards come in another order, which
moves a result by a few units of 6e-8, the rounding of fp32. bf16: both round every product to 3 digits, and the two
are compared with 3e-2. Parameters after two steps of Adam: its update of a number is as large for a gradient of nearly
zero, which is mostly rounding, as for any other; they are compared with 1e-4 and, in bf16, 6e-2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megamem.testing.trials import LLAMA as MODERN

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]

ALLOWED = {"gradients": {"float32": 3e-6, "bfloat16": 3e-2}, "parameters": {"float32": 1e-4, "bfloat16": 6e-2}}
GPT: Fields = {"layers": 2, "hidden": 16, "pp": 2}
LLAMA: Fields = {**MODERN, "layers": 4, "hidden": 16, "pp": 2}
TWO_CHUNKS: Fields = {**LLAMA, "vpp": 2}
PER_TOKEN: Fields = {"config": {"calculate_per_token_loss": True}}
OVERLAP: Fields = {"overlap_grad_reduce": True, "overlap_param_gather": True}
ADAM: Fields = {"adam": True, "steps": 3, "ddp": OVERLAP}


def scaled(loss: Any) -> Any:
    """As optimizers of fp16 scale it."""
    return loss * 1024


# ranks, fields of the model, fields of the case, schedule
CASES: dict[str, tuple[int, Fields, Fields, str | None]] = {
    "1f1b": (2, GPT, {"evaluate": 3}, None),
    "without DDP": (2, {**GPT, "ddp": False}, {}, "1f1b"),
    "zb-h1, tied, loss per token": (2, {**GPT, "tied": True, **PER_TOKEN}, {"per_token": True}, "zb-h1"),
    "tokens counted": (2, {**GPT, "config": {"deallocate_pipeline_outputs": True}}, {"per_token": True}, "1f1b"),
    "positions, dropout": (2, {**GPT, "position": "learned_absolute", "dropout": 0.1}, {}, "1f1b"),
    "bf16": (2, {**LLAMA, "layers": 2, "dtype": "bfloat16"}, {}, "zb-h2"),
    "loss scaled": (2, {**GPT, "config": {"grad_scale_func": scaled}}, {}, "1f1b"),
    "experts, with a loss of their own": (2, {**LLAMA, "layers": 2, "experts": 4}, {}, "zb-h1"),
    "one microbatch": (2, GPT, {"num_microbatches": 1}, "1f1b"),
    "interleaved": (2, TWO_CHUNKS, {"evaluate": 2}, None),
    "gis, tied": (2, {**TWO_CHUNKS, "tied": True}, {}, "gis"),
    "v-half": (2, TWO_CHUNKS, {"evaluate": 2}, "v-half"),
    "zb-v, tied": (2, {**TWO_CHUNKS, "tied": True}, {}, "zb-v"),
    "pp4, odd vocabulary": (4, {**LLAMA, "pp": 4, "vocab": 67}, {"num_microbatches": 6}, "1f1b"),
    "pp4, gis-h": (4, {**TWO_CHUNKS, "layers": 8, "pp": 4}, {"num_microbatches": 8}, "gis-h"),
    "pp4, v-half, tied": (4, {**TWO_CHUNKS, "layers": 8, "pp": 4, "tied": True}, {"num_microbatches": 8}, "v-half"),
    "tp2 sp": (4, {**LLAMA, "tp": 2, "sp": True}, {"evaluate": 1}, "1f1b"),
    "tp2 sp, positions, odd shards": (
        4,
        {**GPT, "tp": 2, "sp": True, "position": "learned_absolute", "vocab": 70},
        {},
        "1f1b",
    ),
    "tp2, tied": (4, {**LLAMA, "tp": 2, "tied": True}, {}, "zb-h1"),
    "dp2, distributed optimizer, tied": (
        4,
        {**GPT, "tied": True, "distributed_optimizer": True, "dtype": "bfloat16"},
        ADAM,
        "1f1b",
    ),
    "dp2, distributed optimizer, two chunks": (4, {**TWO_CHUNKS, "distributed_optimizer": True}, ADAM, "gis"),
    "dp2, overlapped": (4, GPT, {"ddp": {"overlap_grad_reduce": True}}, "zb-h1"),
    "cp2, two chunks": (4, {**TWO_CHUNKS, "cp": 2}, {"evaluate": 2, "adam": True}, "gis"),
    "cp2, tied, loss per token": (4, {**GPT, "cp": 2, "tied": True, **PER_TOKEN}, {"per_token": True}, "1f1b"),
    "eight ranks": (8, {**LLAMA, "tp": 2, "sp": True, "pp": 4}, {}, "1f1b"),
}
SWAPPED: Fields = {"activations": {"policy": "memo", "keep_last_layers": 0}}


def far_from_stock(
    fields: Fields, options: Fields, schedule: str | None, sections: Fields | None = None, keep_logits: bool = False
) -> dict[str, dict[str, float]]:
    """By number of barriers: what is further from stock than it may be, with its error over what is allowed."""
    import torch

    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.pipeline import PipelineCase, train_pipeline

    dtype = fields.get("dtype", "float32")
    gpt = GptCase(**{**fields, "dtype": getattr(torch, dtype)})
    case = PipelineCase(gpt=gpt, **options)
    init_parallel(gpt)
    stock = _numbers(case, train_pipeline(case))
    section = None if schedule is None else {"name": schedule}
    found = {}
    for barriers in (2, 1):
        config = {
            "vocabulary": {"parallel": True, "barriers": barriers, "loss_chunk": 5, "keep_logits": keep_logits},
            **(sections or {}),
        }
        reports: list[Any] = []
        ours = train_pipeline(
            case, section, config=config, inspect=lambda handle, to=reports: to.append(handle.report())
        )
        report = reports[0].vocabulary
        assert report.barriers == barriers and 0 < report.words < report.vocab_size == gpt.vocab
        assert report.num_microbatches == case.steps * (case.num_microbatches + case.evaluate)
        found[str(barriers)] = _far(_numbers(case, ours), stock, dtype, gpt.distributed_optimizer)
    return found


def _numbers(case: Any, outcome: Any) -> dict[str, Any]:
    """What must be equal, by name, over all ranks. A distributed optimizer has final gradients in its own part only."""
    import torch
    import torch.distributed as torch_dist

    from megamem.testing.pipeline import whole_model

    everybody: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(everybody, outcome.losses)
    made = [results for results in everybody if results]
    numbers = {f"loss {rank}.{index}": one["loss"] for rank, row in enumerate(made) for index, one in enumerate(row)}
    assert numbers and all(torch.isfinite(loss).all() for loss in numbers.values())
    numbers |= whole_model(outcome.parameters if case.gpt.distributed_optimizer else outcome.gradients)
    return numbers


def _far(ours: dict[str, Any], stock: dict[str, Any], dtype: str, are_parameters: bool) -> dict[str, float]:
    from megamem.testing.parity import relative_error

    assert ours.keys() == stock.keys() and len(ours) > 10
    found = {}
    for name, value in stock.items():
        kind = "parameters" if are_parameters and not name.startswith("loss") else "gradients"
        error = relative_error(ours[name], value) / ALLOWED[kind][dtype]
        if not error < 1:
            found[name] = error
    return found


@pytest.mark.parametrize("name", CASES)
def test_equal_to_stock_within_rounding(dist: Dist, name: str) -> None:
    num_ranks, *arguments = CASES[name]
    assert dist(num_ranks)(far_from_stock, *arguments) == [{"2": {}, "1": {}}] * num_ranks


def test_with_activations_swapped_and_logits_kept(dist: Dist) -> None:
    assert dist(2)(far_from_stock, TWO_CHUNKS, {}, "gis", SWAPPED, True) == [{"2": {}, "1": {}}] * 2
