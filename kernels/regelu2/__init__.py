"""GELU that saves two bits of each input: the forward pass is exact, the backward pass takes one of four slopes.

    from megamem.kernels.regelu2 import regelu2

    output = regelu2(input, bias=bias)         # GELU; 2 bits an element are saved instead of 16

ReGELU2 of LowMemoryBP (arXiv 2406.16282). **Experimental**: the gradient is not GELU's but that of the sum of three
ramps closest to GELU, and its error has a direction. `reference` is the definition, in plain PyTorch, `triton` the
kernels, `autograd` the differentiable whole.

How wrong is it? Of GELU's own gradient, for inputs of standard deviation 1, 36 % (relative, of norms; with the input in
8 bits 2 %); 20 % at 3 and 96 % at 0.1, where GELU's slope is 1/2 and the four slopes are -0.05, 1.05, 0 and 1. The mean
over all elements is right to 0.02 % at 1, so biases see less of it.

When does it save anything? An MLP of f = 4 h keeps, of a token, in bytes (s: saved, a: the activation's output, which
fc2 needs for the gradient of its weight):

                                   input of GELU       output a         together
    stock                          2 f = 8 h           2 f = 8 h        16 h
    ReGELU2                        f / 4 = 1 h         2 f = 8 h         9 h
    output made again (`rebuild`)  2 f = 8 h           -                 8 h
    that, in 8 bits (`mlp`)        1.03 f = 4.1 h      -                 4.1 h
    fc2 frozen: stock              8 h                 -                 8 h
    fc2 frozen: in 8 bits          4.1 h               -                 4.1 h
    fc2 frozen: ReGELU2            1 h                 -                 1 h

From two bits the output cannot be made again. So where fc2 is trained, `megamem.kernels.activation` keeps less and is
exact or nearly so; ReGELU2 is for fine-tuning with frozen linear layers, which is also all that it was published for.

What the same paper has besides is not here, because in Megatron-Core it saves nothing:

* ReSiLU2, the same for SwiGLU. d(silu(g) u) = silu'(g) u dg + silu(g) du. Fused, what is saved are g and u, 2 f
  numbers, and silu is made again. Two bits in the place of g would do for silu'(g), but du needs silu(g), all of it:
  g, or silu(g) in its place, must be kept, and 16 + 16 bits become 16 + 16 + 2. The paper saves where silu and the
  product are operations of their own, which keep g, silu(g) and u. With `mlp` the two are in 8 bits, and the error is
  that of 8 bits.
* MS-LayerNorm and MS-RMSNorm: keep the output y of a norm, which the linear layer behind it saves anyway, and not its
  input x: dx = rstd (dy - y mean(dy y)). That is 2 h of 4 h bytes a token. So does Megatron-Core's own
  `--recompute-modules layernorm`, and `rebuild` here, from the other side: keep x, drop y and make it again, with no
  error and with the norm's weight where it is (MS-norms need it merged into the linear layer, or division by it, which
  fails near 0). In a pre-norm layer x is the residual stream, which is at hand anyway, and in 8 bits (`all`) 1.03 h
  stay. All that an MS-norm would spare is making y again: reading and writing h numbers, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from ..backends import Backend
from ..block_codec import check_values
from .autograd import ReGelu2Function
from .reference import SLOPES, THRESHOLDS, Approximation, quarter

__all__ = ["SLOPES", "THRESHOLDS", "Approximation", "regelu2", "saved_nbytes"]


def regelu2(
    input: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    approximate: Approximation = "none",
    backend: Backend | None = None,
) -> torch.Tensor:
    """GELU of `input` [..., F] plus `bias` [F], in the input's dtype; differentiable once, approximately.

    * `input`: bf16, fp16 or fp32; strided in any way, and there may be no tokens.
    * `approximate`: "none" or "tanh", of the forward pass, as in `torch.nn.functional.gelu`.

    Saves ceil(F / 4) bytes a token, and neither input nor output. Computes in fp32 and rounds once. An infinity or a
    NaN in the input reaches the output (minus infinity as NaN, which 0 times it is). Two bits cannot tell it from other
    numbers: the gradient there is the upstream gradient times a slope, of a NaN 1, and NaN only if the upstream is.

    Raises TypeError for other dtypes, ValueError for a bias of another shape, another approximation or a tensor without
    dimensions, ImportError for an absent backend.
    """
    check_values(input)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is none or tanh, not {approximate!r}")
    width = input.shape[-1]
    if bias is not None and (bias.shape != (width,) or not bias.is_floating_point()):
        raise ValueError(f"bias is [{width}], as the input is {list(input.shape)}; not {list(bias.shape)}")
    if input.stride(-1) != 1:
        input = input.contiguous()
    num_tokens = input.shape[:-1].numel()
    bias_F = None if bias is None else bias.contiguous()
    output_TF: torch.Tensor = ReGelu2Function.apply(  # type: ignore[no-untyped-call]
        input.reshape(num_tokens, width), bias_F, approximate, backend
    )
    return output_TF.view(input.shape)


def saved_nbytes(shape: Sequence[int]) -> int:
    """Bytes that are saved of an input of this shape."""
    *tokens, width = shape
    return prod(tokens) * quarter(width)
