"""Fused activation functions that save their input in 8 bits, or as it is, and never their output.

    from megamem.kernels.activation import Activation, activate, rebuilder
    from megamem.kernels.block_codec import BlockFormat

    output = activate(input, Activation(function="silu"), format=BlockFormat())     # SwiGLU

`spec` says which functions there are, `reference` is the definition, in plain PyTorch, `triton` the kernels, `autograd`
the differentiable whole. With a format the forward pass is exact and the backward pass works on the decoded input:
SwiGLU's gradient is off by 2.5 % in E4M3, whatever the scale of its input. That is the error of single elements; it has
no direction, so the next sum over tokens averages over it.

`rebuilder` has the output made again, from what was saved. So whoever consumed the output (the second linear layer of
an MLP) need not keep it either: `megamem.runtime.discard` gives its memory back until the backward pass.
"""

from __future__ import annotations

import torch

from ..backends import Backend
from ..block_codec import BlockFormat, check_values
from .autograd import ActivationFunction, rebuilder
from .spec import FUNCTIONS, Activation, Function

__all__ = ["FUNCTIONS", "Activation", "Function", "activate", "rebuilder"]


def activate(
    input: torch.Tensor,
    activation: Activation,
    *,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    format: BlockFormat | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """The activation [..., F] of `input` [..., F] or, with a gate, [..., 2 F], in its dtype; differentiable once.

    * `input`: bf16, fp16 or fp32; gate first, then up. Strided in any way, and there may be no tokens.
    * `bias`: [F] or [2 F], added to the input first.
    * `weights`: [..., 1], one number for each token, which multiplies its output (the router's probabilities in an
      MoE layer); in any floating-point dtype, and differentiable too.
    * `format`: what the input is saved in for the backward pass; None: as it is. Groups lie within a half.
    * `backend`: "torch" or "triton"; None: Triton on CUDA.

    Computes in fp32 and rounds once, so the output may differ from one of several operations in 16 bits by rounding.
    An infinity or a NaN in the input reaches the output as in PyTorch, and with a format makes the gradient of its
    group NaN.

    Raises TypeError for other dtypes, ValueError for shapes that do not belong together, ImportError for an absent
    backend.
    """
    check_values(input)
    width, halves = input.shape[-1] // activation.halves, activation.halves
    if width * halves != input.shape[-1]:
        raise ValueError(f"a gated activation takes an even number of columns, not {input.shape[-1]}")
    if bias is not None and (bias.shape != input.shape[-1:] or not bias.is_floating_point()):
        raise ValueError(f"bias is [{input.shape[-1]}], as the input is {list(input.shape)}; not {list(bias.shape)}")
    if weights is not None and weights.shape != (*input.shape[:-1], 1):
        raise ValueError(f"weights are {[*input.shape[:-1], 1]}, one for each token, not {list(weights.shape)}")
    input_THF = _in_halves(input, halves, width)
    bias_HF = None if bias is None else bias.contiguous().view(halves, width)
    weights_T1 = None if weights is None else weights.reshape(len(input_THF), 1)
    output_TF: torch.Tensor = ActivationFunction.apply(  # type: ignore[no-untyped-call]
        input_THF, bias_HF, weights_T1, activation, format, backend
    )
    return output_TF.view(*input.shape[:-1], width)


def _in_halves(input: torch.Tensor, halves: int, width: int) -> torch.Tensor:
    """[..., H F] as [T, H, F]: a view where possible, and each row in one piece."""
    num_tokens = 1
    for size in input.shape[:-1]:
        num_tokens *= size
    if input.stride(-1) != 1:
        input = input.contiguous()
    return input.reshape(num_tokens, halves, width)
