"""The activation as one differentiable operation, and its output made again from what it saved.

                          saved for the backward pass
    format None           the input, as Megatron-Core's own fused activations do, bias and weights
    a `BlockFormat`       the input plus bias in 8 bits, and weights

Codes are saved through autograd, as tensors of an 8-bit type, so whatever swaps or offloads saved tensors moves them,
and nothing here is a saved-tensor hook, of which only the innermost pair sees a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..backends import Backend, implementation, node_of
from ..block_codec import BlockFormat, from_saved, to_saved
from .spec import Activation


class ActivationFunction(torch.autograd.Function):
    """input [T, H, F], bias [H, F] or None, weights [T, 1] or None -> output [T, F]."""

    @staticmethod
    def forward(
        ctx: Any,
        input_THF: torch.Tensor,
        bias_HF: torch.Tensor | None,
        weights_T1: torch.Tensor | None,
        activation: Activation,
        format: BlockFormat | None,
        backend: Backend | None,
    ) -> torch.Tensor:
        """Output, and codes if there is a format."""
        operations = implementation(__package__, backend, input_THF.device)
        output_TF: torch.Tensor
        output_TF, quantised = operations.forward(input_THF, bias_HF, weights_T1, activation, format)
        ctx.activation, ctx.format, ctx.operations = activation, format, operations
        ctx.bias_dtype = None if bias_HF is None else bias_HF.dtype
        if quantised is None:
            ctx.save_for_backward(input_THF, bias_HF, weights_T1)
        else:
            assert format is not None
            ctx.save_for_backward(*to_saved(quantised, format), weights_T1)
        return output_TF

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, gradient_TF: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of input, bias and weights."""
        source, bias_HF, weights_T1 = _saved(ctx)
        input_gradient_THF, weights_gradient_T1 = ctx.operations.backward(
            gradient_TF.contiguous(), source, bias_HF, weights_T1, ctx.activation, ctx.format
        )
        bias_gradient_HF = input_gradient_THF.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        if weights_gradient_T1 is not None:
            weights_gradient_T1 = weights_gradient_T1.to(weights_T1.dtype)
        return input_gradient_THF, bias_gradient_HF, weights_gradient_T1, None, None, None


def rebuilder(output: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """What writes `output`, which `activate` has made and which requires grad, to a tensor like it once more.

    It holds what was saved, and not the output.
    """
    return partial(_rebuild, node_of(output))


def _rebuild(node: Any, output: torch.Tensor) -> None:
    if not output.numel():
        return
    with torch.no_grad():
        node.operations.rebuild_(output.view(-1, output.shape[-1]), *_saved(node), node.activation, node.format)


def _saved(ctx: Any) -> tuple[Any, ...]:
    """The input as it was saved, bias and weights."""
    if ctx.format is None:
        return tuple(ctx.saved_tensors)
    codes, scales, weights_T1 = ctx.saved_tensors
    return from_saved(codes, scales), None, weights_T1
