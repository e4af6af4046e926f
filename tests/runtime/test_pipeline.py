"""Losses and every gradient, on every rank, against stock Megatron-Core's 1F1B and interleaved schedules: bitwise.

A schedule changes when something is computed, not what: every parameter's gradients are accumulated in the order of
microbatches by the same kernels. Dropout is comparable as long as a rank runs its forward passes in the same order,
which holds for all families with one chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]

ONE_CHUNK = ("1f1b", "zb-h1", "zb-h2", "zb-1p", "zb-2p")
TWO_CHUNKS = ("interleaved", "gis", "gis-h")
ZB: tuple[str, ...] = ("zb-h1",)

GPT: Fields = {"layers": 4, "hidden": 16, "position": "learned_absolute", "tied": True}
LLAMA: Fields = {"layers": 4, "hidden": 16, "kv_groups": 2, "activation": "swiglu", "norm": "RMSNorm", "bias": False}
MOE: Fields = {**LLAMA, "experts": 4, "config": {"moe_token_dispatcher_type": "allgather"}}
MEMO: Fields = {"activations": {"policy": "memo", "keep_last_layers": 0}}
RECOMPUTE: Fields = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
VARIABLE: Fields = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
OVERLAP: Fields = {"overlap_grad_reduce": True}
SHARDED: Fields = {"overlap_grad_reduce": True, "overlap_param_gather": True}

# ranks, fields of the model, fields of the case, schedules, other sections
CASES: dict[str, tuple[int, Fields, Fields, tuple[str, ...], Fields]] = {
    "gpt, tied": (2, {**GPT, "pp": 2}, {}, ONE_CHUNK, {}),
    "fewer microbatches than ranks": (2, {**LLAMA, "pp": 2}, {"num_microbatches": 1}, ("1f1b", "zb-h1"), {}),
    "without DDP": (2, {**LLAMA, "pp": 2, "ddp": False}, {}, ("1f1b", "zb-h2"), {}),
    "outputs deallocated": (2, {**LLAMA, "pp": 2, "config": {"deallocate_pipeline_outputs": True}}, {}, ZB, {}),
    "bf16": (2, {**LLAMA, "pp": 2, "dtype": "bfloat16"}, {}, ZB, {}),
    "experts, auxiliary loss": (2, {**MOE, "pp": 2}, {}, ZB, {}),
    "loss per token": (2, {**GPT, "pp": 2, "config": {"calculate_per_token_loss": True}}, {"per_token": True}, ZB, {}),
    "tokens counted": (2, {**LLAMA, "pp": 2}, {"per_token": True}, ZB, {}),
    "variable length": (
        2,
        {**LLAMA, "pp": 2, "config": VARIABLE},
        {"lengths": (16, 5, 9)},
        ("1f1b", "zb-h1"),
        {},
    ),
    "evaluation before training": (2, {**LLAMA, "pp": 2}, {"evaluate": 3}, ZB, {}),
    "dropout": (2, {**GPT, "pp": 2, "dropout": 0.1}, {}, ("1f1b", "zb-h1", "zb-2p"), {}),
    "recomputed by Megatron": (
        2,
        {
            **LLAMA,
            "pp": 2,
            "config": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        },
        {},
        ZB,
        {},
    ),
    "activations swapped": (2, {**LLAMA, "pp": 2}, {"steps": 3}, ("1f1b", "zb-h1"), MEMO),
    "two chunks": (2, {**GPT, "layers": 8, "pp": 2, "vpp": 2}, {}, TWO_CHUNKS, {}),
    "two chunks, evaluation": (2, {**LLAMA, "layers": 8, "pp": 2, "vpp": 2}, {"evaluate": 2}, ("gis",), {}),
    "two chunks, activations swapped": (2, {**LLAMA, "layers": 8, "pp": 2, "vpp": 2}, {"steps": 3}, ("gis",), MEMO),
    "two chunks, variable length": (
        2,
        {**LLAMA, "layers": 8, "pp": 2, "vpp": 2, "config": VARIABLE},
        {"lengths": (16, 5, 9)},
        ("gis",),
        {},
    ),
    "four ranks": (4, {**GPT, "layers": 8, "pp": 4}, {"num_microbatches": 8}, ONE_CHUNK, {}),
    "tp2 sp pp2": (4, {**LLAMA, "tp": 2, "sp": True, "pp": 2}, {}, ("1f1b", "zb-h1"), {}),
    "tp2 sp pp2, two chunks": (4, {**LLAMA, "layers": 8, "tp": 2, "sp": True, "pp": 2, "vpp": 2}, {}, ("gis",), {}),
    "four ranks, two chunks": (4, {**LLAMA, "layers": 8, "pp": 4, "vpp": 2}, {"num_microbatches": 8}, TWO_CHUNKS, {}),
    "tp2 pp2, tied": (4, {**GPT, "tp": 2, "pp": 2}, {}, ZB, {}),
    "dp2 pp2, overlapped": (4, {**GPT, "pp": 2}, {"ddp": OVERLAP, "steps": 3}, ("1f1b", "zb-h1", "zb-2p"), {}),
    "dp2 pp2, distributed optimizer": (
        4,
        {**LLAMA, "pp": 2, "dtype": "bfloat16", "distributed_optimizer": True},
        {"ddp": SHARDED, "adam": True, "steps": 3},
        ZB,
        {},
    ),
    "dp2 pp2 vpp2, distributed optimizer": (
        4,
        {**LLAMA, "layers": 8, "pp": 2, "vpp": 2, "distributed_optimizer": True},
        {"ddp": SHARDED, "adam": True, "steps": 3},
        ("interleaved", "gis"),
        {},
    ),
}


def compare(fields: Fields, options: Fields, names: tuple[str, ...], config: Fields) -> dict[str, Any]:
    """Per schedule: what differs from stock, and how much there was to compare."""
    import torch

    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.pipeline import PipelineCase, train_pipeline

    gpt = GptCase(**{**fields, "dtype": getattr(torch, fields.get("dtype", "float32"))})
    case = PipelineCase(gpt=gpt, **options)
    init_parallel(gpt)
    stock = train_pipeline(case)
    assert stock.gradients
    found: dict[str, Any] = {"losses": len(stock.losses)}
    for name in names:
        found[name] = train_pipeline(case, {"name": name}, config=config).differences(stock)
    return found


@pytest.mark.parametrize("name", CASES)
def test_equal_to_stock(dist: Dist, name: str) -> None:
    num_ranks, fields, options, names, config = CASES[name]
    outcomes = dist(num_ranks)(compare, fields, options, names, config)
    assert max(found.pop("losses") for found in outcomes) > 0
    assert outcomes == [{schedule: [] for schedule in names}] * num_ranks


V: tuple[str, ...] = ("zb-v", "v-half", "v-min", "v-adaptive", "1f1b-v", "dualpipe-v")
V_CASES: dict[str, tuple[int, Fields, Fields, tuple[str, ...], Fields]] = {
    "two ranks": (2, {**LLAMA, "pp": 2}, {"num_microbatches": 4}, V, {}),
    "tied": (2, {**GPT, "pp": 2}, {"num_microbatches": 4}, ("zb-v",), {}),
    "loss per token": (
        2,
        {**GPT, "pp": 2, "config": {"calculate_per_token_loss": True}},
        {"per_token": True, "num_microbatches": 4},
        ("v-half",),
        {},
    ),
    "evaluation, activations swapped": (2, {**LLAMA, "pp": 2}, {"evaluate": 2, "num_microbatches": 4}, ("zb-v",), MEMO),
    "four ranks": (4, {**LLAMA, "pp": 4}, {"num_microbatches": 8}, ("zb-v", "v-half", "dualpipe-v"), {}),
}


def compare_placed(fields: Fields, options: Fields, names: tuple[str, ...], config: Fields) -> dict[str, Any]:
    """As `compare`, for schedules that hold the layers elsewhere: over all ranks together."""
    import torch.distributed as torch_dist

    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.pipeline import Outcome, PipelineCase, train_pipeline

    def together(outcome: Outcome) -> Outcome:
        everybody: list[Any] = [None] * torch_dist.get_world_size()
        torch_dist.all_gather_object(everybody, outcome)
        return Outcome(
            losses=[loss for one in everybody for loss in one.losses],
            gradients={name: gradient for one in everybody for name, gradient in one.gradients.items()},
        )

    gpt = GptCase(**{**fields, "layers": 8, "vpp": 2})
    case = PipelineCase(gpt=gpt, **options)
    init_parallel(gpt)
    stock = together(train_pipeline(case))
    assert stock.losses and stock.gradients
    # Not asked of the stock schedule: with overlapped gloo messages it deallocates what it is still sending.
    gpt = dataclasses.replace(gpt, config={**gpt.config, "deallocate_pipeline_outputs": True})
    case = dataclasses.replace(case, gpt=gpt)
    return {name: together(train_pipeline(case, {"name": name}, config=config)).differences(stock) for name in names}


@pytest.mark.parametrize("name", V_CASES)
def test_v_placement_equal_to_stock(dist: Dist, name: str) -> None:
    num_ranks, fields, options, names, config = V_CASES[name]
    outcomes = dist(num_ranks)(compare_placed, fields, options, names, config)
    assert outcomes == [{schedule: [] for schedule in names}] * num_ranks


def swap_at_the_worst_time(name: str, policy: str) -> list[str]:
    """Activations travel as late as recorded waits allow, and freed memory is poisoned, while W is put off."""
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.pipeline import PipelineCase, train_pipeline
    from megamem.testing.streams import SimulatedDevice

    case = PipelineCase(gpt=GptCase(**{**LLAMA, "layers": 2, "pp": 2}), num_microbatches=3)
    init_parallel(case.gpt)
    config = {"activations": {"policy": policy, "keep_last_layers": 0}}
    ours = train_pipeline(case, {"name": name}, config=config, device=SimulatedDevice(seed=1))
    return ours.differences(train_pipeline(case))


@pytest.mark.parametrize("policy", ["memo", "recompute"])
def test_what_w_keeps_outlives_the_swapped_layer(dist: Dist, policy: str) -> None:
    assert dist(2)(swap_at_the_worst_time, "zb-h2", policy) == [[], []]


class FusedOnCpu:
    """The two functions of Apex's CUDA extension that Megatron calls for gradient accumulation fusion, in PyTorch."""

    @staticmethod
    def wgrad_gemm_accum_fp32(source: Any, grad_output: Any, main_grad: Any) -> None:
        main_grad.add_(grad_output.float().t().matmul(source.float()))

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def compare_fused(fields: Fields, ddp: Fields, names: tuple[str, ...]) -> dict[str, list[str]]:
    """With weight gradients that linear layers add to main_grad themselves."""
    from megatron.core.tensor_parallel import layers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "fused_weight_gradient_mlp_cuda", FusedOnCpu, raising=False)
        patch.setattr(layers, "_grad_accum_fusion_available", True)
        fields = {**fields, "config": {"gradient_accumulation_fusion": True}}
        found = compare(fields, {"ddp": ddp, "steps": 3}, names, {})
    found.pop("losses")
    return found


@pytest.mark.parametrize("ddp", [{}, OVERLAP], ids=["", "overlapped"])
def test_gradient_accumulation_fusion(dist: Dist, ddp: Fields) -> None:
    fields = {**GPT, "pp": 2, "dtype": "bfloat16"}
    assert dist(4)(compare_fused, fields, ddp, ("1f1b", "zb-h1")) == [{"1f1b": [], "zb-h1": []}] * 4


EIGHT: dict[str, tuple[Fields, tuple[str, ...]]] = {
    "one chunk": ({"layers": 16}, ("1f1b", "zb-h1", "zb-2p")),
    "two chunks": ({"layers": 32, "vpp": 2}, TWO_CHUNKS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT)
def test_eight_ranks(dist: Dist, name: str) -> None:
    fields, names = EIGHT[name]
    options = {"num_microbatches": 16, "steps": 1}
    for found in dist(8)(compare, {**LLAMA, **fields, "pp": 8}, options, names, {}, timeout=300):
        assert found.pop("losses") in (0, 16)
        assert found == {schedule: [] for schedule in names}
