"""Transformer Engine's compiled kernels under the adapter: weight gradients apart, saved tensors moved; on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'megamem[train]'")
te = pytest.importorskip("transformer_engine.pytorch", reason="pip install 'megamem[te]'")

from megamem.integrations import transformer_engine as adapter  # noqa: E402
from megamem.integrations.transformer_engine import DelayedLinears  # noqa: E402
from megamem.runtime.pipeline.weights import WeightQueue  # noqa: E402

pytestmark = pytest.mark.gpu

TOKENS, HIDDEN, OUT = 512, 1024, 2048


def recipe(name: str) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the context of a forward pass; skips where the GPU has no kernels for it."""
    from transformer_engine.common import recipe as recipes

    if name == "bf16":
        return nullcontext
    made = {
        "tensorwise": recipes.Float8CurrentScaling,
        "delayed": recipes.DelayedScaling,
        "blockwise": recipes.Float8BlockScaling,
        "mxfp8": recipes.MXFP8BlockScaling,
    }[name]()
    check = {"blockwise": "is_fp8_block_scaling_available", "mxfp8": "is_mxfp8_available"}.get(name, "is_fp8_available")
    if not getattr(te, check)():
        pytest.skip(f"this GPU has no {name} FP8")
    return lambda: te.fp8_autocast(enabled=True, fp8_recipe=made)


def module(kind: str, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    made = {
        "Linear": lambda: te.Linear(HIDDEN, OUT, params_dtype=torch.bfloat16, device="cuda"),
        "LayerNormLinear": lambda: te.LayerNormLinear(HIDDEN, OUT, params_dtype=torch.bfloat16, device="cuda"),
        "GroupedLinear": lambda: te.GroupedLinear(2, HIDDEN, OUT, params_dtype=torch.bfloat16, device="cuda"),
    }
    return made[kind]()


def steps(linear: Any, context: Callable[[], AbstractContextManager[Any]], split: bool) -> dict[str, Any]:
    """Two microbatches, forward and backward, W at the end or not; the gradients."""
    queue = WeightQueue()
    delayed = DelayedLinears(queue)
    if split:
        assert delayed.learn([linear]) > 0
    generator = torch.Generator("cuda").manual_seed(2)
    grouped = [[TOKENS // 2, TOKENS // 2]] if hasattr(linear, "num_gemms") else []
    for microbatch in range(2):
        x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda", generator=generator).requires_grad_()
        for forward in (True, False):
            if split:
                queue.collect(0, microbatch)
            with delayed.hiding(0, microbatch, forward=forward):
                if forward:
                    with context():
                        y = linear(x, *grouped)
                else:
                    y.float().square().mean().backward()
            queue.stop()
    if split:
        weights = [p for key, p in linear.named_parameters() if key.startswith("weight")]
        assert all(weight.grad is None for weight in weights)
        for microbatch in range(2):
            queue.run(0, microbatch)
    delayed.close()
    return {name: parameter.grad.clone() for name, parameter in linear.named_parameters()}


@pytest.mark.parametrize("kind", ["Linear", "LayerNormLinear", "GroupedLinear"])
@pytest.mark.parametrize("name", ["bf16", "tensorwise", "delayed", "blockwise", "mxfp8"])
def test_weight_gradients_apart_are_bitwise_the_same(kind: str, name: str) -> None:
    whole = steps(module(kind), recipe(name), split=False)
    apart = steps(module(kind), recipe(name), split=True)
    for key, gradient in whole.items():
        assert torch.equal(gradient, apart[key]), key


@pytest.fixture
def saved() -> Iterator[list[Any]]:
    """What is saved meanwhile."""
    found: list[Any] = []

    def pack(tensor: Any) -> Any:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize("name", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_quantised_copies_of_weights_are_known(saved: list[Any], name: str) -> None:
    linear = module("LayerNormLinear")
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    with recipe(name)():
        linear(x, is_first_microbatch=True)
    storages = {buffer.untyped_storage().data_ptr() for buffer in adapter.weight_buffers(linear)}
    codes = [tensor for tensor in saved if tensor.dtype == torch.uint8 and OUT in tensor.shape]
    assert codes
    assert all(tensor.untyped_storage().data_ptr() in storages for tensor in codes)


@pytest.mark.parametrize("name", ["tensorwise", "mxfp8", "blockwise"])
def test_quantised_activations_are_taken_apart_and_put_together(name: str) -> None:
    recipe(name)  # or skip
    extension: Any = __import__("transformer_engine_torch")
    kind = getattr(te, "DType", extension.DType).kFloat8E4M3
    quantizer = {
        "tensorwise": lambda: te.Float8CurrentScalingQuantizer(kind, device="cuda"),
        "mxfp8": lambda: te.MXFP8Quantizer(kind),
        "blockwise": lambda: te.Float8BlockQuantizer(kind, rowwise=True, columnwise=True),
    }[name]()
    tensor = quantizer(torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda"))
    before = tensor.dequantize()
    apart = adapter.take_apart(tensor)
    assert apart is not None
    parts, put_together = apart
    again = put_together([None if part is None else part.cpu().cuda() for part in parts])
    assert torch.equal(again.dequantize(), before)
    assert torch.equal(tensor.dequantize(), before)  # the one in use is untouched
