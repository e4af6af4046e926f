"""The section fp8 against stock Megatron-Core on the same ranks: losses and every gradient, alone and with the others.

`rebuild` computes what stock computes, from the same numbers: relative errors below 3e-6, a few roundings of fp32. With
8 bits the losses are that exact too, and gradients carry the error of the codec. The largest, 4.2 %, is that of fc2's
weight, whose input is made again from two coded numbers, each off by 2.6 %; with coded norms 5.2 %, of a norm's weight.
A router's gradient is a difference of experts: 6 %. No dimension here is large enough for errors to average out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megamem.testing.trials import HALF, RECOMPUTE, RESIDUAL, SWAP, error_of, mutated, start_case

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]

FP32 = 3e-6
CODED = {"rebuild": FP32, "mlp": 6e-2, "all": 8e-2}
ENDS = ("rebuild", "all")  # mlp is between them
SMALL: Fields = {"layers": 2, "config": {"bias_activation_fusion": True}}
PLAIN: Fields = {"layers": 2}  # activation functions that Megatron does not fuse
OFFSET: Fields = {"config": {"glu_linear_offset": 0.5}}
CLAMP: Fields = {"activation_func_clamp_value": 0.3}  # of SwiGLU in experts; in fused functions too since 0.20
GELU: Fields = {"activation": "gelu", "norm": "LayerNorm", "bias": True}
MOE: Fields = {"experts": 4, "config": {"bias_activation_fusion": True, "moe_shared_expert_intermediate_size": 64}}
CENTRED: Fields = {"config": {"bias_activation_fusion": True, "layernorm_zero_centered_gamma": True}}


def fp8(mode: str, **options: Any) -> Fields:
    return {"fp8": {"saved_activations": mode, **options}}


def compared(fields: Fields, sections: Fields) -> tuple[float, dict[str, float], str]:
    """The largest relative error of a loss, the gradients' errors, and the report."""
    from megamem.testing.parity import relative_error, train

    case = start_case(**fields)
    stock = train(case, steps=1)
    ours = train(case, sections=sections, steps=1)
    losses = [abs(one - other) / abs(other) for one, other in zip(ours.losses, stock.losses, strict=True)]
    assert ours.gradients.keys() == stock.gradients.keys()
    errors = {name: relative_error(ours.gradients[name], stock.gradients[name]) for name in stock.gradients}
    return max(losses, default=0.0), errors, str(ours.report)


@pytest.mark.parametrize("mode", list(CODED))
@pytest.mark.parametrize(
    ("ranks", "fields"),
    [
        (1, SMALL),
        (1, {**SMALL, **GELU}),
        (1, {**SMALL, **CENTRED}),
        (2, {**SMALL, "tp": 2}),
        (2, {**SMALL, **GELU, "tp": 2, "sp": True}),
        (1, {**SMALL, **MOE}),
        (2, {**SMALL, **MOE, "ep": 2}),
        (2, {**SMALL, "pp": 2}),
        (1, PLAIN),
        (1, {**PLAIN, **GELU}),
        (1, {**PLAIN, **OFFSET}),
        (1, {**PLAIN, "experts": 4, "config": CLAMP}),
        (1, {**SMALL, **MOE, "config": {**MOE["config"], **CLAMP}}),
        (1, {**PLAIN, "experts": 4}),
    ],
    ids=[
        *("llama", "gelu", "zero-centred", "tp2", "gelu tp2 sp", "moe", "moe ep2", "pp2"),
        *("not fused", "gelu not fused", "offset", "clamped", "clamped fused", "moe not fused"),
    ],
)
def test_losses_and_gradients_are_stocks(dist: Dist, mode: str, ranks: int, fields: Fields) -> None:
    for loss, errors, report in dist(ranks)(compared, fields, fp8(mode)):
        assert loss < FP32
        assert {name: error for name, error in errors.items() if not error < CODED[mode]} == {}
        assert mode == "rebuild" or max(errors.values()) > 1e-3, "nothing was coded"
        assert "outputs given back, per step" in report


def with_ramps() -> tuple[float, dict[str, float], float]:
    """ReGELU2 beside stock Megatron whose GELU has the gradient of the ramps: loss, gradients, and what it is off."""
    import torch
    from megatron.core.transformer import mlp
    from torch.nn import functional

    from megamem.kernels.regelu2 import THRESHOLDS
    from megamem.kernels.regelu2.reference import WEIGHTS
    from megamem.testing.parity import relative_error, train

    def ramps(input: Any, bias: Any) -> Any:
        """Megatron's GELU, the slope of another function."""
        with torch.no_grad():
            exact = functional.gelu(input + bias, approximate="tanh")
        x = input + bias
        other = sum(a * (x - c).relu() for a, c in zip(WEIGHTS, THRESHOLDS, strict=True))
        return other + (exact - other).detach()

    case = start_case(**{**SMALL, **GELU})
    stock = train(case, steps=1)
    ours = train(case, sections=fp8("regelu2"), steps=1)
    with mutated(mlp, "bias_gelu_impl", ramps):
        expected = train(case, steps=1)
    errors = {name: relative_error(ours.gradients[name], expected.gradients[name]) for name in expected.gradients}
    off = max(relative_error(ours.gradients[name], stock.gradients[name]) for name in stock.gradients)
    return abs(ours.losses[0] - stock.losses[0]) / stock.losses[0], errors, off


def test_regelu2_has_the_gradient_of_the_ramps(dist: Dist) -> None:
    """Which is not GELU's, while the loss is stock's."""
    ((loss, errors, off),) = dist(1)(with_ramps)
    assert loss < FP32 and max(errors.values()) < 1e-5
    assert 0.1 < off < 2.0


@pytest.mark.parametrize("activations", [SWAP, RECOMPUTE], ids=["swap", "recompute"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_the_engine_moves_and_rebuilds_two_bits(dist: Dist, activations: Fields, fused: bool) -> None:
    fields = {"layers": 3, **GELU, "config": {"bias_activation_fusion": fused}, "tp": 2, "sp": True}
    for differences, _, num_unplanned, _ in dist(2)(with_engine, fields, "regelu2", activations):
        assert differences == [] and num_unplanned == 0


def with_engine(fields: Fields, mode: str, activations: Fields) -> tuple[list[str], float, int, int]:
    """What differs from the same without the engine; layers left alone, and those that were replayed."""
    from megamem.testing.parity import relative_error, train

    case = start_case(**fields)
    alone = train(case, sections=fp8(mode))
    both = train(case, activations, sections=fp8(mode))
    assert both.engine is not None
    worst = max(relative_error(both.gradients[name], alone.gradients[name]) for name in alone.gradients)
    return both.differences(alone), worst, both.engine.stats.num_unplanned, both.engine.stats.replayed_tokens


@pytest.mark.parametrize("mode", ENDS)
@pytest.mark.parametrize("activations", [SWAP, RECOMPUTE, RESIDUAL], ids=["swap", "recompute", "residual"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_engine_moves_and_rebuilds_codes_bit_for_bit(
    dist: Dist, mode: str, activations: Fields, ranks: int
) -> None:
    """Where it works on all tokens: what it swaps or rebuilds are the codes of the forward pass."""
    fields = {**SMALL, "layers": 3, **({} if ranks == 1 else {"tp": 2, "sp": True})}
    for differences, _, num_unplanned, replayed in dist(ranks)(with_engine, fields, mode, activations):
        assert differences == [] and num_unplanned == 0
        assert (replayed > 0) == (activations is not SWAP)


@pytest.mark.parametrize("mode", ENDS)
@pytest.mark.parametrize("policy", ["memo", "ordered"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_rebuilds_a_part_of_the_tokens(dist: Dist, mode: str, policy: str, dtype: str) -> None:
    """A matrix product of fewer rows may be rounded elsewhere, and a code be the next one."""
    import torch

    fields = {**SMALL, "dtype": getattr(torch, dtype)}
    ((_, worst, num_unplanned, replayed),) = dist(1)(with_engine, fields, mode, {**HALF, "policy": policy})
    assert worst < {"float32": FP32 if mode == "rebuild" else 3e-3, "bfloat16": 2e-2}[dtype]
    assert num_unplanned == 0 and replayed > 0


@pytest.mark.parametrize("activations", [None, SWAP], ids=["alone", "swap"])
@pytest.mark.parametrize(
    ("schedule", "fields"),
    [("zb-h1", {"pp": 2}), ("v-half", {"pp": 2, "vpp": 2, "layers": 4}), ("po-f", {"pp": 2, "vpp": 2, "layers": 4})],
    ids=["zb-h1", "v-half", "po-f"],
)
def test_with_schedules(dist: Dist, schedule: str, fields: Fields, activations: Fields | None) -> None:
    """Input and weight gradients apart, chunks in a V, activations sent to the host by the schedule itself."""
    for differences in dist(2)(scheduled, {**SMALL, **fields}, schedule, activations):
        assert differences == []


def scheduled(fields: Fields, schedule: str, activations: Fields | None) -> list[str]:
    """What differs from the same schedule on the same ranks without the engine and without coded activations."""
    from megamem.testing.parity import relative_error
    from megamem.testing.pipeline import PipelineCase, train_pipeline

    case = PipelineCase(gpt=start_case(**fields), num_microbatches=4, steps=1, evaluate=1)
    stock = train_pipeline(case, {"name": schedule})
    found = []
    for mode in ENDS:
        config = {**fp8(mode), **({} if activations is None else {"activations": activations})}
        ours = train_pipeline(case, {"name": schedule}, config=config)
        errors = {name: relative_error(ours.gradients[name], stock.gradients[name]) for name in stock.gradients}
        found += [f"{mode} {name}: {error:.1e}" for name, error in errors.items() if not error < CODED[mode]]
        if mode != "rebuild" and not max(errors.values()) > 1e-3:
            found.append(f"{mode}: nothing was coded")
    return found


# -- memory ------------------------------------------------------------------------------------------------------------


def bytes_of_a_layer(modes: tuple[str, ...], freeze: bool, fields: Fields) -> dict[str, int]:
    """What each of four layers holds after a forward pass, by mode; the metre counts storages."""
    import torch

    import megamem
    from megamem.integrations.metering import measured_activations
    from megamem.testing.models import batches, build_gpt

    sizes = {"layers": 4, "hidden": 256, "ffn": 896, "dtype": torch.bfloat16, "ddp": False}
    case = start_case(**{**SMALL, **sizes, **fields})

    def held(meter: Any) -> int:
        (chunk,) = build_gpt(case)
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(not (freeze and "linear_fc2.weight" in name))
        (batch,) = batches(case, 1)
        loss = chunk(batch.tokens, batch.positions, batch.mask, labels=batch.labels).mean()
        found = int(meter.now_bytes)
        loss.backward()
        assert meter.now_bytes == 0
        assert found % case.layers == 0
        return found // case.layers

    with measured_activations() as meter:
        found = {"stock": held(meter)}
    for mode in modes:
        with megamem.enable(fp8(mode)) as handle:
            found[mode] = held(handle.meter())
    return found


def test_bytes_that_a_layer_holds(dist: Dist) -> None:
    """To the byte what each mode leaves out. bf16; 8.25 bits an element."""
    tokens, hidden, ffn, values = 32, 256, 896, 128
    (found,) = dist(1)(bytes_of_a_layer, tuple(CODED), False, {})
    outputs = tokens * 2 * (2 * hidden + ffn)
    beside_values = tokens * 2 * (hidden + 2 * values - values)
    assert found["stock"] - found["rebuild"] == outputs + beside_values
    assert found["rebuild"] - found["mlp"] == tokens * (2 * 2 * ffn - 2 * ffn - 4 * 2 * 7)
    assert found["mlp"] - found["all"] == 2 * tokens * (2 * hidden - hidden - 4 * 2)
    assert found["all"] < 0.5 * found["stock"]


@pytest.mark.parametrize("freeze", [False, True], ids=["trained", "fc2 frozen"])
def test_bytes_with_two_bits(dist: Dist, freeze: bool) -> None:
    """More than with 8 where fc2 is trained, because it keeps its input; less where it is frozen."""
    tokens, ffn = 32, 896
    (found,) = dist(1)(bytes_of_a_layer, ("rebuild", "mlp", "regelu2"), freeze, GELU)
    output, codes = 0 if freeze else tokens * 2 * ffn, tokens * (ffn + 4 * 7)
    bits = tokens * ffn // 4
    assert found["rebuild"] - found["mlp"] == tokens * 2 * ffn - codes
    assert found["regelu2"] - found["mlp"] == output + bits - codes
    assert (found["regelu2"] < found["mlp"]) == freeze


def peaks() -> tuple[dict[str, int], dict[str, int]]:
    """Live bytes after the forward pass, and the most in the backward pass; of 2 and of 6 layers."""
    import torch

    import megamem
    from megamem.testing.live import LiveStorages
    from megamem.testing.models import batches, build_gpt

    case = start_case(**{**SMALL, "layers": 6, "hidden": 128, "ffn": 448, "sequence": 64, "ddp": False})
    kept, peak = {}, {}
    for mode in ("off", *CODED):
        with megamem.enable(fp8(mode)):
            (chunk,) = build_gpt(case)
            (batch,) = batches(case, 1)
            for parameter in chunk.parameters():
                parameter.grad = torch.zeros_like(parameter)
            with LiveStorages() as live:
                loss = chunk(batch.tokens, batch.positions, batch.mask, labels=batch.labels).mean()
                kept[mode] = live.live_bytes()
                live.reset_peak()
                loss.backward()
            peak[mode] = live.peak_bytes - kept[mode]
    return kept, peak


def test_what_was_made_again_is_not_held_longer_than_needed(dist: Dist) -> None:
    """Seen by live storages: the backward pass rises above what is kept by one layer's outputs, not by six layers'."""
    ((kept, peak),) = dist(1)(peaks)
    assert kept["off"] > kept["rebuild"] > kept["mlp"] > kept["all"]
    outputs_of_a_layer = 128 * 4 * (2 * 128 + 448)
    codes_decoded = 128 * 4 * 2 * 448 * 4  # the definition in PyTorch works on fp32 copies
    for mode in CODED:
        assert peak[mode] < peak["off"] + outputs_of_a_layer + codes_decoded


# -- on and off --------------------------------------------------------------------------------------------------------


def on_and_off() -> dict[str, Any]:
    import torch
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.transformer import mlp

    import megamem
    from megamem.testing.models import batches, build_gpt

    case = start_case(**{**PLAIN, "ddp": False})
    before = fused_bias_swiglu.bias_swiglu_impl
    (chunk,) = build_gpt(case)
    (batch,) = batches(case, 1)

    def logits() -> Any:
        return chunk(batch.tokens, batch.positions, batch.mask)

    found: dict[str, Any] = {}
    with megamem.enable(fp8("all")) as handle:
        report = handle.report
        found["patched"] = mlp.bias_swiglu_impl is not before
        config = chunk.decoder.layers[0].config
        fused = config.bias_activation_fusion
        with_gradient = logits()
        saved = report().fp8.input_nbytes
        with torch.no_grad():
            found["same without gradient"] = torch.equal(logits(), with_gradient)
        found["nothing saved without gradient"] = report().fp8.input_nbytes == saved > 0
        loss = with_gradient.square().mean()
        loss.backward(retain_graph=True)
        first = [parameter.grad.clone() for parameter in chunk.parameters()]
        loss.backward()
        found["again through a retained graph"] = all(
            torch.equal(parameter.grad, 2 * gradient)
            for parameter, gradient in zip(chunk.parameters(), first, strict=True)
        )
        found["configured as before"] = config.bias_activation_fusion is fused is False
        found["no attributes"] = not any("forward" in vars(module) for module in chunk.modules())
    found["restored"] = mlp.bias_swiglu_impl is before is fused_bias_swiglu.bias_swiglu_impl
    return found


def test_it_leaves_nothing_behind(dist: Dist) -> None:
    (found,) = dist(1)(on_and_off)
    assert all(found.values()), found


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Fields, str, str]] = {
    "two bits of SwiGLU": ({}, "regelu2", "two bits stand for the slope of GELU, and of no other function"),
    "another function": ({"bias_activation_fusion": False, "gated_linear_unit": False}, "mlp", "silu without a gate"),
    "Megatron's own": ({"activation_func_fp8_input_store": True}, "mlp", "without scales"),
    "full recomputation": (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, "all", "full"
    ),
    "the same recomputed": (
        {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, "rebuild", "run again what is made"
    ),
}  # fmt: skip


def refusal(config: Fields, mode: str) -> str:
    import megamem
    from megamem.testing.models import build_gpt

    case = start_case(config={"bias_activation_fusion": True, **config})
    with megamem.enable(fp8(mode)):
        return error_of(lambda: build_gpt(case))


@pytest.mark.parametrize("case", REFUSED.values(), ids=list(REFUSED))
def test_what_does_not_go_together(dist: Dist, case: tuple[Fields, str, str]) -> None:
    config, mode, words = case
    (found,) = dist(1)(refusal, config, mode)
    assert found.startswith(f"UnsupportedError: fp8.saved_activations: {mode}: ") and words in found


def without_norms(config: Any, vp_stage: int | None) -> Any:
    """Layers without norms of their own, as under Transformer Engine, whose linear layers have them inside."""
    from megatron.core.transformer.identity_op import IdentityOp

    from megamem.integrations.local_spec import local_layer_spec

    block = local_layer_spec(config, vp_stage=vp_stage)
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    return block


def fused_norms() -> tuple[str, int]:
    import megamem
    from megamem.testing.models import build_gpt
    from megamem.testing.parity import train

    case = start_case(**SMALL)
    with megamem.enable(fp8("all")):
        error = error_of(lambda: build_gpt(case, spec=without_norms))
    ours = train(case, sections=fp8("mlp"), build=lambda: build_gpt(case, spec=without_norms))
    return error, ours.report.fp8.num_left


def test_norms_inside_linear_layers_are_left_alone(dist: Dist) -> None:
    ((error, num_left),) = dist(1)(fused_norms)
    assert "no norm of its own" in error and "take mlp" in error
    assert num_left == 4


def other_functions() -> str:
    """A model whose activation functions are computed elsewhere, which no setting tells: nothing is live."""
    from megatron.core.transformer.mlp import MLP

    from megamem.testing.models import build_gpt
    from megamem.testing.parity import train

    case = start_case(**SMALL)

    def build() -> Any:
        chunks = build_gpt(case, spec=without_norms)
        for module in chunks[0].modules():
            if isinstance(module, MLP):
                module.forward = lambda hidden, **_: (hidden, None)  # type: ignore[method-assign]
        return chunks

    return error_of(lambda: train(case, sections=fp8("rebuild"), build=build))


def test_a_run_in_which_nothing_is_live_is_stopped(dist: Dist) -> None:
    (found,) = dist(1)(other_functions)
    assert found.startswith("NotLiveError: fp8.saved_activations is on")
