"""The definition of both norms in plain PyTorch, and what runs on CPU tensors. In fp32, rounded once.

    normal = (x - mean) rstd,   rstd = 1 / sqrt(mean of (x - mean)^2 + eps),   output = normal weight + bias

with mean 0 for RMSNorm. Backward works on the x that was saved, and on mean and rstd, which are exact.

    T tokens, D width; a row's statistics are `mean_T` (None for RMSNorm) and `rstd_T`, in fp32
"""

from __future__ import annotations

import torch

from ..block_codec import BlockFormat, Quantised, dequantise_reference, quantise_reference

Source = torch.Tensor | Quantised
"""The input [T, D] of the norm, as it came or in 8 bits."""


def forward(
    input_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    eps: float,
    centred: bool,
    format: BlockFormat | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, Quantised | None]:
    """Output [T, D] in the input's dtype, mean and rstd of every row and, with a format, the input in 8 bits."""
    wide_TD = input_TD.float()
    mean_T = wide_TD.mean(-1) if centred else None
    shifted_TD = wide_TD if mean_T is None else wide_TD - mean_T.unsqueeze(-1)
    rstd_T = torch.rsqrt(shifted_TD.square().mean(-1).add_(eps))
    output_TD = _affine(shifted_TD * rstd_T.unsqueeze(-1), weight_D, bias_D).to(input_TD.dtype)
    return output_TD, mean_T, rstd_T, None if format is None else quantise_reference(wide_TD, format)


def rebuild_(
    output_TD: torch.Tensor,
    source: Source,
    mean_T: torch.Tensor | None,
    rstd_T: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    format: BlockFormat | None,
) -> None:
    """Write the output once more, from what was saved."""
    output_TD.copy_(_affine(_normal(source, mean_T, rstd_T, format), weight_D, bias_D))


def backward(
    gradient_TD: torch.Tensor,
    source: Source,
    mean_T: torch.Tensor | None,
    rstd_T: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    format: BlockFormat | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of input [T, D], in the dtype of `gradient_TD`, and of weight and bias [D], in theirs.

    With n = normal and g = gradient weight: rstd (g - n mean(g n) - mean(g)), the last term for LayerNorm only.
    """
    wide_TD = gradient_TD.float()
    normal_TD = _normal(source, mean_T, rstd_T, format)
    inner_TD = wide_TD * weight_D.float()
    input_gradient_TD = inner_TD - normal_TD * (inner_TD * normal_TD).mean(-1, keepdim=True)
    if mean_T is not None:
        input_gradient_TD -= inner_TD.mean(-1, keepdim=True)
    input_gradient_TD *= rstd_T.unsqueeze(-1)
    bias_gradient_D = None if bias_D is None else wide_TD.sum(0).to(bias_D.dtype)
    return input_gradient_TD.to(gradient_TD.dtype), (wide_TD * normal_TD).sum(0).to(weight_D.dtype), bias_gradient_D


def _normal(
    source: Source, mean_T: torch.Tensor | None, rstd_T: torch.Tensor, format: BlockFormat | None
) -> torch.Tensor:
    if isinstance(source, Quantised):
        assert format is not None
        wide_TD = dequantise_reference(source, format, torch.float32)
    else:
        wide_TD = source.float()
    shifted_TD = wide_TD if mean_T is None else wide_TD - mean_T.unsqueeze(-1)
    return shifted_TD * rstd_T.unsqueeze(-1)


def _affine(normal_TD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None) -> torch.Tensor:
    output_TD = normal_TD * weight_D.float()
    return output_TD if bias_D is None else output_TD + bias_D.float()
