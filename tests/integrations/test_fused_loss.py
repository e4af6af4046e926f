"""Losses and every gradient of models trained without logits, against stock Megatron-Core on the same ranks.

fp32: relative errors below 3e-6. The two sum the same numbers in another order, which moves a result by a few units of
6e-8, the rounding of fp32, in the loss's gradient, and all other gradients inherit that.

bf16: both round every product to 3 digits, so one is no measure for the other. An fp32 run of the same values, rounded
to bf16 nowhere, is: no gradient may be further from it than 1.2 times as far as stock is, or a rounding of 4e-3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megamem.testing.trials import error_of, start_case

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]

FP32 = 3e-6
FUSED: Fields = {"vocabulary": {"fused_loss": True}}
SMALL: Fields = {"layers": 1, "hidden": 16, "vocab": 72}
TWO: Fields = {**SMALL, "layers": 2, "pp": 2}
V: Fields = {**SMALL, "layers": 4, "pp": 2, "vpp": 2}
PER_TOKEN: Fields = {"config": {"calculate_per_token_loss": True}}
OVERLAP: Fields = {"overlap_grad_reduce": True, "overlap_param_gather": True}

# ranks, fields of the model, fields of the case, schedule, chunk
CASES: dict[str, tuple[int, Fields, Fields, str | None, int | str]] = {
    "untied": (1, SMALL, {"evaluate": 1}, None, "auto"),
    "tied": (1, {**SMALL, "tied": True}, {}, None, "auto"),
    "chunks of 7": (1, SMALL, {}, None, 7),
    "without DDP, tied": (1, {**SMALL, "ddp": False, "tied": True}, {}, None, "auto"),
    "loss per token, masked": (1, {**SMALL, **PER_TOKEN}, {"per_token": True}, None, "auto"),
    "optimizer": (1, SMALL, {"adam": True, "steps": 3}, None, "auto"),
    "main_grad in bf16": (1, {**SMALL, "dtype": "bfloat16"}, {"ddp": {"grad_reduce_in_fp32": False}}, None, "auto"),
    "bf16": (1, {**SMALL, "dtype": "bfloat16"}, {}, None, "auto"),
    "dp2, overlapped": (
        2,
        {**SMALL, "distributed_optimizer": True},
        {"ddp": OVERLAP, "adam": True, "evaluate": 1},
        None,
        "auto",
    ),
    "tp2": (2, {**SMALL, "tp": 2}, {}, None, "auto"),
    "tp2 sp, tied": (2, {**SMALL, "tp": 2, "sp": True, "tied": True}, {"evaluate": 1}, None, "auto"),
    "tp2 sp, bf16, per token": (
        2,
        {**SMALL, "tp": 2, "sp": True, "dtype": "bfloat16", **PER_TOKEN},
        {"per_token": True},
        None,
        "auto",
    ),
    "pp2, Megatron's schedule": (2, TWO, {"evaluate": 1}, None, "auto"),
    "pp2, zb-h1, tied, overlapped": (
        2,
        {**TWO, "tied": True},
        {"ddp": {"overlap_grad_reduce": True}, "evaluate": 1},
        "zb-h1",
        "auto",
    ),
    "pp2, zb-h1, bf16, optimizer": (2, {**TWO, "dtype": "bfloat16"}, {"adam": True}, "zb-h1", "auto"),
    "pp2, v-half": (2, V, {"evaluate": 2}, "v-half", "auto"),
    "pp2, v-half, tied, per token": (2, {**V, "tied": True, **PER_TOKEN}, {"per_token": True}, "v-half", "auto"),
    "tp2 sp pp2, zb-h1, tied": (4, {**TWO, "tp": 2, "sp": True, "tied": True}, {}, "zb-h1", "auto"),
    "tp2 sp pp2, v-half, bf16": (4, {**V, "tp": 2, "sp": True, "dtype": "bfloat16"}, {}, "v-half", "auto"),
}


@contextlib.contextmanager
def _fresh(fields: Fields) -> Iterator[Any]:
    """A `GptCase` with Megatron's groups made for it; several in one call."""
    import torch
    from megatron.core import parallel_state

    from megamem.testing.models import GptCase, init_parallel

    case = GptCase(**{**fields, "dtype": getattr(torch, fields.get("dtype", "float32"))})
    init_parallel(case)
    yield case
    parallel_state.destroy_model_parallel()


def _together(outcome: Any) -> tuple[list[float], dict[str, Any]]:
    """Loss values and gradients of all ranks, for schedules that hold the layers elsewhere."""
    import torch
    import torch.distributed as torch_dist

    everybody: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(everybody, outcome)
    losses = [torch.cat([result["loss"].view(-1) for result in one.losses]) for one in everybody if one.losses]
    placed: dict[str, list[Any]] = {}
    for one in everybody:
        for name, gradient in one.gradients.items():
            found = placed.setdefault(name, [])
            if not any(torch.equal(gradient, other) for other in found):  # copies: replicated, or tied
                found.append(gradient)
    return [float(value) for values in losses for value in values], {name: torch.cat(g) for name, g in placed.items()}


def _trained(fields: Fields, options: Fields, schedule: str | None, config: Fields) -> Any:
    from megamem.testing.pipeline import PipelineCase, train_pipeline

    with _fresh(fields) as gpt:
        section = None if schedule is None else {"name": schedule}
        reports: list[Any] = []
        outcome = train_pipeline(
            PipelineCase(gpt=gpt, num_microbatches=4, **options),
            section,
            config=config,
            inspect=lambda handle: reports.append(handle.report().vocabulary),
        )
        return (*_together(outcome), reports)


def far_from_stock(fields: Fields, options: Fields, schedule: str | None, chunk: int | str) -> dict[str, float]:
    """What is further from stock Megatron than it may be, with its relative error; and that no logits were made."""
    from megamem.testing.parity import relative_error

    config = {"vocabulary": {"fused_loss": True, "loss_chunk": chunk}}
    losses, gradients, _ = _trained(fields, options, None, {})
    our_losses, our_gradients, reports = _trained(fields, options, schedule, config)
    is_last = bool(reports[0].num_losses)
    assert is_last == bool(reports[0].whole_nbytes) and not reports[0].num_stock
    assert is_last or fields.get("pp", 1) > 1
    assert len(losses) == len(our_losses) >= 8 and gradients.keys() == our_gradients.keys()
    if fields.get("dtype") == "bfloat16":
        exact = _trained({**fields, "dtype": "float32"}, options, None, {})
        errors = {
            name: relative_error(our_gradients[name], exact[1][name]) / max(1.2 * error, 4e-3)
            for name, gradient in gradients.items()
            for error in [relative_error(gradient, exact[1][name])]
        }
        for index, (one, other) in enumerate(zip(our_losses, losses, strict=True)):
            errors[f"loss {index}"] = abs(one - other) / abs(other) / 4e-3
    else:
        errors = {name: relative_error(our_gradients[name], gradients[name]) / FP32 for name in gradients}
        for index, (one, other) in enumerate(zip(our_losses, losses, strict=True)):
            errors[f"loss {index}"] = abs(one - other) / abs(other) / FP32
    return {name: error for name, error in errors.items() if not error < 1}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_stock_within_rounding(dist: Dist, name: str) -> None:
    num_ranks, *arguments = CASES[name]
    assert dist(num_ranks)(far_from_stock, *arguments) == [{}] * num_ranks


def largest_allocation(fields: Fields, schedule: str | None, fused: bool) -> tuple[int, str]:
    """The most elements that an operator of two training steps, optimizer included, made; and which one it was."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import build_optimizer
    from megamem.testing.pipeline import PipelineCase, build_pipeline, run_step

    largest = [(0, "")]

    def storages(*trees: Any) -> dict[int, Any]:
        tensors = [leaf for leaf in tree_leaves(trees) if torch.is_tensor(leaf) and leaf.layout is torch.strided]
        return {tensor.untyped_storage()._cdata: tensor for tensor in tensors}

    class Trace(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = storages(args, kwargs)
            result = func(*args, **(kwargs or {}))
            for key, tensor in storages(result).items():
                if key not in given:
                    size = tensor.untyped_storage().nbytes() // tensor.element_size()
                    largest.append((size, f"{func} {tuple(tensor.shape)}"))
            return result

    config = {**(FUSED if fused else {}), **({"schedule": {"name": schedule}} if schedule else {})}
    with _fresh(fields) as gpt, enable(config):
        case = PipelineCase(gpt=gpt)
        chunks = build_pipeline(case)
        optimizer = build_optimizer(chunks, gpt)
        with Trace():
            for step in range(2):
                run_step(case, chunks, 4, seed=step)
                optimizer.step()
    return max(largest)


LONG: Fields = {"layers": 2, "hidden": 8, "heads": 2, "vocab": 1000, "sequence": 64, "microbatch": 4}


@pytest.mark.parametrize(
    ("fields", "schedule"),
    [
        (LONG, None),
        ({**LONG, "dtype": "bfloat16", "tied": True}, None),
        ({**LONG, "tp": 2, "sp": True}, None),
        ({**LONG, "pp": 2, "tied": True}, "zb-h1"),
    ],
    ids=["one rank", "bf16, tied", "tp2 sp", "pp2, zb-h1, tied"],
)
def test_no_allocation_is_a_quarter_of_the_logits(dist: Dist, fields: Fields, schedule: str | None) -> None:
    num_ranks = fields.get("tp", 1) * fields.get("pp", 1)
    logits = 64 * 4 * 1000 // fields.get("tp", 1)
    for size, where in dist(num_ranks)(largest_allocation, fields, schedule, True):
        assert 0 < size < logits / 4, where
    assert max(dist(num_ranks)(largest_allocation, fields, schedule, False))[0] >= logits  # the tracing sees them


def logits_and_loss_in_one_step() -> tuple[bool, dict[str, float], int]:
    """Logits with and without gradient, beside the loss, in every order: are they stock's, and are the gradients?"""
    import torch

    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import Batch, batches, build_gpt
    from megamem.testing.parity import relative_error
    from megamem.testing.pipeline import gradients_of

    case = start_case(**SMALL)

    def gradients(orders: list[str]) -> tuple[Any, dict[str, Any]]:
        (chunk,) = build_gpt(case)
        for order, batch in zip(orders, batches(case, len(orders)), strict=True):
            total = sum(part(chunk, batch) for part in map(parts.__getitem__, order))
            total.backward()  # type: ignore[union-attr]
        with torch.no_grad():
            return chunk(batch.tokens, batch.positions, batch.mask), gradients_of([chunk])

    def loss(chunk: Any, batch: Batch) -> Any:
        return chunk(batch.tokens, batch.positions, batch.mask, labels=batch.labels).mean()

    def penalty(chunk: Any, batch: Batch) -> Any:
        return chunk(batch.tokens, batch.positions, batch.mask).square().mean()

    parts = {"l": loss, "p": penalty}
    errors, same = {}, True
    for orders in (["l", "p"], ["p", "l"], ["lp"], ["pl"]):
        stock_logits, stock = gradients(orders)
        with enable(FUSED) as handle:
            our_logits, ours = gradients(orders)
            answered = handle.report().vocabulary.num_stock  # type: ignore[union-attr]
        same = same and torch.equal(stock_logits, our_logits) and our_logits.shape == (2, 16, 72)
        errors |= {f"{orders} {name}": relative_error(ours[name], stock[name]) for name in stock}
    return same, {name: error for name, error in errors.items() if not error < FP32}, answered


def test_requests_for_logits_are_answered_by_megatron(dist: Dist) -> None:
    assert dist(1)(logits_and_loss_in_one_step) == [(True, {}, 2)]


def with_accumulation_fusion(tied: bool) -> dict[str, float]:
    """gradient_accumulation_fusion, whose CUDA extension does on the CPU what its name says."""
    from megatron.core.tensor_parallel import layers

    def accumulate(source: Any, grad_output: Any, main_grad: Any) -> None:
        main_grad.add_(grad_output.t() @ source)

    extension = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    with (
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", extension, create=True),
    ):
        fields = {**SMALL, "tied": tied, "config": {"gradient_accumulation_fusion": True}}
        return far_from_stock(fields, {}, None, "auto")


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_accumulation_fusion(dist: Dist, tied: bool) -> None:
    assert dist(1)(with_accumulation_fusion, tied) == [{}]


def heads_of_multi_token_prediction(tied: bool, ddp: bool) -> tuple[dict[str, float], int]:
    """A model with two further heads, each with a loss over the same output weight."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    from megamem.integrations.local_spec import local_layer_spec
    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import _wrap, batches, build_config
    from megamem.testing.parity import relative_error
    from megamem.testing.pipeline import gradients_of

    case = start_case(**SMALL, tied=tied, config={"mtp_num_layers": 2})

    def train() -> dict[str, Any]:
        config = build_config(case)
        spec = local_layer_spec(config, flash_attention=True, vp_stage=None)
        heads = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
        torch.manual_seed(1)
        model: Any = GPTModel(
            config,
            spec,
            vocab_size=case.vocab,
            max_sequence_length=case.sequence,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope",
            mtp_block_spec=heads,
        )
        chunk = _wrap(model, config, case) if ddp else model
        losses = []
        for batch in batches(case, 2):
            loss = chunk(batch.tokens, batch.positions, batch.mask, labels=batch.labels)
            loss.mean().backward()
            losses.append(loss.detach())
        return {**gradients_of([chunk]), "losses": torch.stack(losses)}

    stock = train()
    with enable(FUSED) as handle:
        ours = train()
        assert handle.loss is not None
        count = handle.loss.num_losses
    errors = {name: relative_error(ours[name], stock[name]) for name in stock}
    return {name: error for name, error in errors.items() if not error < FP32}, count


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ddp", [False, True])
def test_heads_of_multi_token_prediction_make_no_logits_either(dist: Dist, tied: bool, ddp: bool) -> None:
    assert dist(1)(heads_of_multi_token_prediction, tied, ddp) == [({}, 6)]
