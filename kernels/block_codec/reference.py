"""The definition of the codec in plain PyTorch, and what runs on CPU tensors. Every device gives the same bits.

For each group of values v, with L the largest code:

    scale = max(max |v| * (1 / L), 2^-126), rounded up to a power of two where the format says so
    code  = the code nearest to v * (1 / scale), ties to even, at most L in magnitude
    value = code * scale

in fp32, each operation rounded to nearest. 1 / L is a constant and multiplied with, because PyTorch divides by a number
in other ways on other devices. A group with an infinity or a NaN has scale NaN and codes 0: all of it comes back NaN.

    D width of a row, G groups in a row, E elements of a group
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .format import CODE_DTYPES, LARGEST, LEAST_SCALE, BlockFormat, Quantised


def quantise_reference(values: torch.Tensor, format: BlockFormat) -> Quantised:
    """Codes and scales of values [..., D]."""
    width = values.shape[-1]
    grouped_GE = _grouped(values.float(), format)
    largest_G1 = grouped_GE.abs().amax(-1, keepdim=True) if width else grouped_GE.new_empty(*values.shape[:-1], 0, 1)
    is_finite_G1 = largest_G1.isfinite()
    scale_G1 = (largest_G1 * (1.0 / LARGEST[format.element])).clamp_min(LEAST_SCALE)
    if format.power_of_two:
        scale_G1 = ((scale_G1.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    scaled_GE = torch.where(is_finite_G1, grouped_GE * scale_G1.reciprocal(), 0.0)
    codes = _encode(scaled_GE, format).flatten(-2)[..., :width].contiguous()
    return Quantised(codes, torch.where(is_finite_G1, scale_G1, float("nan")).squeeze(-1))


def dequantise_reference(quantised: Quantised, format: BlockFormat, dtype: torch.dtype) -> torch.Tensor:
    """The values [..., D] in `dtype`."""
    codes, scales = quantised
    coded = codes.view(CODE_DTYPES[format.element]).float()
    scaled_GE = _grouped(coded, format) * scales.unsqueeze(-1)
    return scaled_GE.flatten(-2)[..., : codes.shape[-1]].to(dtype).contiguous()


def _grouped(values: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """[..., D] as [..., G, E], the last group filled up with zeros."""
    width = values.shape[-1]
    num_groups = format.num_groups(width)
    padded = F.pad(values, (0, num_groups * format.group - width))
    return padded.view(*values.shape[:-1], num_groups, format.group)


def _encode(scaled: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    largest = LARGEST[format.element]
    clamped = scaled.clamp(-largest, largest)  # conversions to float8 saturate on some devices only
    if format.element == "int8":
        clamped = clamped.round()
    return clamped.to(CODE_DTYPES[format.element]).view(torch.uint8)
