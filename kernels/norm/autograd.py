"""The norm as one differentiable operation, and its output made again from what it saved.

What is saved are the input, as it is or in 8 bits, weight and bias, and one or two fp32 numbers for each token. As in
`activation.autograd`, codes go through autograd, so whatever moves saved tensors moves them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..backends import Backend, implementation, node_of
from ..block_codec import BlockFormat, from_saved, to_saved


class NormFunction(torch.autograd.Function):
    """input [..., D], weight [D], bias [D] or None -> output [T, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight_D: torch.Tensor,
        bias_D: torch.Tensor | None,
        eps: float,
        centred: bool,
        format: BlockFormat | None,
        backend: Backend | None,
    ) -> torch.Tensor:
        """Output, statistics, and codes if there is a format."""
        operations = implementation(__package__, backend, input.device)
        input_TD = _rows(input)
        output_TD: torch.Tensor
        output_TD, mean_T, rstd_T, quantised = operations.forward(input_TD, weight_D, bias_D, eps, centred, format)
        ctx.format, ctx.operations, ctx.shape = format, operations, input.shape
        # The input itself, not its rows: of one that is part of a larger tensor (queries of qkv) those are a copy.
        source: tuple[torch.Tensor, torch.Tensor | None] = (input, None)
        if quantised is not None:
            assert format is not None
            source = to_saved(quantised, format)
        ctx.save_for_backward(*source, mean_T, rstd_T, weight_D, bias_D)
        return output_TD

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, gradient_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        source, mean_T, rstd_T, weight_D, bias_D = _saved(ctx)
        input_gradient_TD, weight_gradient_D, bias_gradient_D = ctx.operations.backward(
            gradient_TD.contiguous(), source, mean_T, rstd_T, weight_D, bias_D, ctx.format
        )
        return input_gradient_TD.view(ctx.shape), weight_gradient_D, bias_gradient_D, None, None, None, None


def rebuilder(output: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """What writes `output`, which `normalise` has made and which requires grad, to a tensor like it once more.

    It holds what was saved, and not the output.
    """
    return partial(_rebuild, node_of(output))


def _rebuild(node: Any, output: torch.Tensor) -> None:
    if not output.numel():
        return
    with torch.no_grad():
        source, *rest = _saved(node)
        node.operations.rebuild_(output.view(-1, output.shape[-1]), source, *rest, node.format)


def _saved(ctx: Any) -> tuple[Any, ...]:
    """The rows of the input as it was saved, mean, rstd, weight and bias."""
    source, scales, *rest = ctx.saved_tensors
    return _rows(source) if scales is None else from_saved(source, scales), *rest


def _rows(input: torch.Tensor) -> torch.Tensor:
    """The input as [T, D], with neighbours in memory beside each other."""
    if not input.numel():
        return input.reshape(0, input.shape[-1])
    rows_TD = input.reshape(-1, input.shape[-1])
    return rows_TD if rows_TD.stride(-1) == 1 else rows_TD.contiguous()
