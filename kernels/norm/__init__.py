"""RMSNorm and LayerNorm that save their input in 8 bits, or as it is, and never their output.

    from megamem.kernels.norm import normalise, rebuilder

    output = normalise(input, weight, eps=1e-5, format=BlockFormat())                       # RMSNorm
    output = normalise(input, weight, bias, eps=1e-5, centred=True)                         # LayerNorm

`reference` is the definition, in plain PyTorch, `triton` the kernels, `autograd` the differentiable whole. With a
format the forward pass is exact, and so are the statistics; the backward pass works on the decoded input.

`rebuilder` has the output made again, from what was saved, for a linear layer that does not keep it; see
`megamem.runtime.discard`.
"""

from __future__ import annotations

import torch

from ..backends import Backend, takes_triton
from ..block_codec import BlockFormat, check_values
from .autograd import NormFunction, rebuilder

__all__ = ["MAX_WIDTH", "normalise", "rebuilder"]

MAX_WIDTH = 16384
"""The widest row that the Triton kernels take: what the registers of one block hold."""


def normalise(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    centred: bool = False,
    format: BlockFormat | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Input [..., D] normalised over its last dimension, in its dtype; differentiable once.

    * `input`: bf16, fp16 or fp32, strided in any way; there may be no tokens.
    * `weight`, `bias`: [D], in any floating-point dtype. Where the parameter is zero-centred, pass it plus 1.
    * `centred`: subtract the mean of each row first (LayerNorm); without, RMSNorm.
    * `format`: what the input is saved in for the backward pass; None: as it is.
    * `backend`: "torch" or "triton"; None: Triton on CUDA.

    Computes in fp32 and rounds once. An infinity or a NaN in a row makes its output NaN, as in PyTorch.

    Raises TypeError for other dtypes, ValueError for shapes that do not belong together and for rows of more than
    16384 elements with Triton, ImportError for an absent backend.
    """
    check_values(input)
    width = input.shape[-1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and (parameter.shape != (width,) or not parameter.is_floating_point()):
            raise ValueError(f"{name} is [{width}], as the input is {list(input.shape)}; not {list(parameter.shape)}")
    if width > MAX_WIDTH and takes_triton(backend, input.device):
        raise ValueError(f"a row has {width} elements; at most {MAX_WIDTH} with Triton, or take backend='torch'")
    output_TD: torch.Tensor = NormFunction.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, eps, centred, format, backend
    )
    return output_TD.view(input.shape)
