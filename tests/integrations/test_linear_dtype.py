"""A linear layer whose outputs have a dtype of their own (`logit_dtype` of Megatron-Core 0.20), split by a schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron


def general_gemm(weight: Any, source: Any, *, out_dtype: Any, layout: str, bias: Any) -> tuple[Any]:
    """What Transformer Engine's GEMM of this name computes, which needs a GPU: a product rounded once."""
    assert layout == "TN"
    output = source.float() @ weight.float().t()
    return ((output if bias is None else output + bias.float()).to(out_dtype),)


def gradients(split: bool) -> list[Any] | None:
    """Of input, weight and bias of one bf16 layer with fp32 outputs; None where Megatron-Core has no such layers."""
    import torch
    from megatron.core.extensions import transformer_engine
    from megatron.core.tensor_parallel import layers

    from megamem.integrations.megatron_linear import SplitLinears
    from megamem.runtime.pipeline.weights import WeightQueue
    from megamem.testing.models import build_config
    from megamem.testing.trials import mutated, start_case

    if "output_dtype" not in inspect.signature(layers.ColumnParallelLinear).parameters:
        return None
    case = start_case(dtype=torch.bfloat16)
    options = {"bias": True, "init_method": torch.nn.init.normal_, "output_dtype": torch.float32}
    torch.manual_seed(1)
    layer = layers.ColumnParallelLinear(16, 24, config=build_config(case), **options)
    source = torch.randn(8, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    queue = WeightQueue()
    linears = SplitLinears(queue)
    linears.learn([layer])
    if split:
        queue.collect(0, 0)
    function = layers.LinearWithGradAccumulationAndAsyncCommunication

    class Patched(function):  # type: ignore[misc, valid-type]
        @classmethod
        def apply(cls, *arguments: Any) -> Any:
            return linears.run(function, arguments)

    with mutated(transformer_engine, "te_general_gemm", general_gemm), mutated(layers, function.__name__, Patched):
        output, _ = layer(source)
    assert output.dtype == torch.float32
    (output * torch.linspace(-1.0, 1.0, output.numel()).reshape(output.shape)).sum().backward()
    if split:
        assert layer.weight.grad is None
        (kept,) = [tensor for tensor in queue.held if tensor.shape == output.shape]
        assert kept.dtype == torch.bfloat16  # half of what came, while it waits
        queue.run(0, 0)
    return [tensor.grad for tensor in (source, layer.weight, layer.bias)]


def test_its_gradients_apart_are_those_of_one_pass(dist: Callable[[int], Callable[..., list[Any]]]) -> None:
    import torch

    (whole,), (split,) = dist(1)(gradients, False), dist(1)(gradients, True)
    if whole is None:
        pytest.skip("Megatron-Core has outputs with a dtype of their own since 0.20")
    for one, other in zip(whole, split, strict=True):
        assert one.dtype == other.dtype == torch.bfloat16 and one.abs().max() > 0 and torch.equal(one, other)
