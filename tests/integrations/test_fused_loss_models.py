"""The fused loss beside other uses of the output layer, and in models that have more than one loss, or no GPTModel.

Tolerance as in test_fused_loss.py: 3e-6, a few roundings of fp32.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from megamem.testing.trials import start_case

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]

FP32 = 3e-6
FUSED: Fields = {"vocabulary": {"fused_loss": True}}
SMALL: Fields = {"layers": 1, "hidden": 16, "vocab": 72}


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


def heads_of_multi_token_prediction(tied: bool, ddp: bool, tp: int) -> tuple[dict[str, float], int]:
    """A model with two further heads, each with a loss over the same output weight, and what is logged of them."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    from megamem.integrations.local_spec import local_layer_spec
    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import batches, build_config
    from megamem.testing.parity import relative_error
    from megamem.testing.pipeline import gradients_of

    options = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.1}
    case = start_case(**{**SMALL, "vocab": 16, "tied": tied, "tp": tp, "config": options})

    def train() -> dict[str, Any]:
        MTPLossLoggingHelper.tracker.clear()
        config = build_config(case)
        spec = local_layer_spec(config, flash_attention=True, vp_stage=None)
        heads = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
        torch.manual_seed(1)
        chunk: Any = GPTModel(
            config,
            spec,
            vocab_size=case.vocab,
            max_sequence_length=case.sequence,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope",
            mtp_block_spec=heads,
        )
        if ddp:
            ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
            chunk = DistributedDataParallel(config=config, ddp_config=ddp_config, module=chunk)
        losses = []
        for batch in batches(case, 2):
            loss = chunk(batch.tokens, batch.positions, batch.mask, labels=batch.labels)
            loss.mean().backward()
            losses.append(loss.detach())
        logged = {name: value for name, value in MTPLossLoggingHelper.tracker.items() if torch.is_tensor(value)}
        assert logged and all(value.any() for value in logged.values())
        return {**gradients_of([chunk]), **logged, "losses": torch.stack(losses)}

    stock = train()
    with enable(FUSED) as handle:
        ours = train()
        assert handle.loss is not None
        count = handle.loss.num_losses
    errors = {name: relative_error(ours[name], stock[name]) for name in stock}
    return {name: error for name, error in errors.items() if not error < FP32}, count


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("ddp", "tp"), [(False, 1), (True, 1), (True, 2)], ids=["bare", "ddp", "ddp, tp2"])
def test_heads_of_multi_token_prediction_make_no_logits_either(dist: Dist, tied: bool, ddp: bool, tp: int) -> None:
    assert dist(tp)(heads_of_multi_token_prediction, tied, ddp, tp) == [({}, 6)] * tp


def hybrid_model(tied: bool, tp: int) -> tuple[dict[str, float], int, bool]:
    """HybridModel, before 0.18 MambaModel, of an attention and an MLP layer: those that need no Transformer Engine."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from megamem.integrations.local_spec import local_layer_spec
    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import build_config
    from megamem.testing.parity import relative_error, seed_everything
    from megamem.testing.pipeline import PipelineCase, run_step

    try:
        from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ImportError:
        from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel
        from megatron.core.ssm.mamba_block import MambaStack as HybridStack
        from megatron.core.ssm.mamba_block import MambaStackSubmodules as HybridStackSubmodules

    case = start_case(**{**SMALL, "layers": 2, "tied": tied, "tp": tp})
    names = inspect.signature(HybridModel.__init__).parameters
    pattern = "hybrid_layer_pattern" if "hybrid_layer_pattern" in names else "hybrid_override_pattern"

    def build() -> Any:
        config = build_config(case)
        parts = local_layer_spec(config, flash_attention=True, vp_stage=None).layer_specs[0].submodules
        attention = ("input_layernorm", "self_attention", "self_attn_bda")
        mlp = ("pre_mlp_layernorm", "mlp", "mlp_bda")
        layers = [
            ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(**{part: getattr(parts, part) for part in wanted}),
            )
            for wanted in (attention, mlp)
        ]
        submodules = HybridStackSubmodules(attention_layer=layers[0], mlp_layer=layers[1])
        seed_everything()
        with mock.patch.object(sys.modules[HybridStack.__module__], "TENorm", WrappedTorchNorm):
            model = HybridModel(
                config,
                ModuleSpec(module=HybridStack, submodules=submodules),
                case.vocab,
                case.sequence,
                share_embeddings_and_output_weights=tied,
                **{pattern: "*-"},
            )
        model.model_type = "encoder_or_decoder"
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        return DistributedDataParallel(config=config, ddp_config=ddp_config, module=model)

    def train(chunk: Any) -> dict[str, Any]:
        losses = run_step(PipelineCase(gpt=case), [chunk], 2, seed=0)
        found = {name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()}
        return {**found, "losses": torch.stack([loss["loss"] for loss in losses])}

    stock = train(build())
    with enable(FUSED) as handle:
        chunk = build()
        ours = train(chunk)
        assert handle.loss is not None
        count = handle.loss.num_losses
    errors = {name: relative_error(ours[name], stock[name]) for name in stock}
    return {name: error for name, error in errors.items() if not error < FP32}, count, "forward" in vars(chunk.module)


@pytest.mark.parametrize(("tied", "tp"), [(False, 1), (True, 2)], ids=["untied", "tied, tp2"])
def test_hybrid_models_make_no_logits_either(dist: Dist, tied: bool, tp: int) -> None:
    assert dist(tp)(hybrid_model, tied, tp) == [({}, 2, False)] * tp
