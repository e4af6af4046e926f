"""ReGELU2 as one differentiable operation, which saves two bits of each element and nothing else."""

from __future__ import annotations

from typing import Any

import torch

from ..backends import Backend, implementation
from .reference import Approximation


class ReGelu2Function(torch.autograd.Function):
    """input [T, F], bias [F] or None -> GELU [T, F]."""

    @staticmethod
    def forward(
        ctx: Any,
        input_TF: torch.Tensor,
        bias_F: torch.Tensor | None,
        approximate: Approximation,
        backend: Backend | None,
    ) -> torch.Tensor:
        """The output; saves two bits of each element."""
        operations = implementation(__package__, backend, input_TF.device)
        output_TF: torch.Tensor
        output_TF, bits_TQ = operations.forward(input_TF, bias_F, approximate)
        ctx.operations, ctx.bias_dtype = operations, None if bias_F is None else bias_F.dtype
        ctx.save_for_backward(bits_TQ)
        return output_TF

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, gradient_TF: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of input and bias."""
        (bits_TQ,) = ctx.saved_tensors
        input_gradient_TF = ctx.operations.backward(gradient_TF.contiguous(), bits_TQ)
        bias_gradient_F = input_gradient_TF.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return input_gradient_TF, bias_gradient_F, None, None
