"""Values in 8 bits: block-scaled E4M3, E5M2 and INT8, a scale for every 128 elements of the last dimension.

    from megamem.kernels.block_codec import BlockFormat, dequantise, quantise

    codes, scales = quantise(values, BlockFormat())                     # 8.25 bits an element
    values = dequantise((codes, scales), BlockFormat(), torch.bfloat16)

`format` says what a code is, `reference` is the definition, in plain PyTorch, `triton` the kernels, whose device
functions other kernels fuse with their own work. Codes and scales are the same bits on every device and backend.

Scales by block, because activations have outliers: one scale for a whole tensor loses what is small beside them, and a
conversion without a scale loses what is larger than 448 or smaller than 2^-9. Blocks lie along the last dimension, so
that a range of tokens can be coded, moved and decoded by itself.
"""

from __future__ import annotations

import torch

from ..backends import Backend, takes_triton
from .format import CODE_DTYPES, BlockFormat, Element, Quantised
from .reference import dequantise_reference, quantise_reference

__all__ = [
    "DTYPES",
    "BlockFormat",
    "Element",
    "Quantised",
    "check_values",
    "dequantise",
    "dequantise_reference",
    "from_saved",
    "quantise",
    "quantise_reference",
    "to_saved",
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantise(values: torch.Tensor, format: BlockFormat, *, backend: Backend | None = None) -> Quantised:
    """Codes [..., D] and scales [..., groups] of values [..., D] in bf16, fp16 or fp32; not differentiable.

    Values may be strided in any way, and there may be none; codes and scales are contiguous. A group that holds an
    infinity or a NaN comes back as NaN, all of it. `backend`: "torch" or "triton"; None: Triton on CUDA.

    Raises TypeError for other dtypes, ValueError for a tensor without dimensions, ImportError for an absent backend.
    """
    check_values(values)
    with torch.no_grad():
        if not takes_triton(backend, values.device):
            return quantise_reference(values, format)
        from . import triton as kernels

        return kernels.quantise(values, format)


def dequantise(
    quantised: Quantised | tuple[torch.Tensor, torch.Tensor],
    format: BlockFormat,
    dtype: torch.dtype,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """The values [..., D] in `dtype` (bf16, fp16 or fp32), contiguous, from codes and scales of the same format.

    Raises TypeError for other dtypes, ValueError where codes and scales are not of one tensor in this format.
    """
    found = Quantised(*quantised)
    _check_quantised(found, format, dtype)
    with torch.no_grad():
        if not takes_triton(backend, found.codes.device):
            return dequantise_reference(found, format, dtype)
        from . import triton as kernels

        return kernels.dequantise(found, format, dtype)


def check_values(values: torch.Tensor) -> None:
    """Raises TypeError and ValueError for values that cannot be quantised."""
    if values.dtype not in DTYPES:
        raise TypeError(f"values are {', '.join(str(dtype) for dtype in DTYPES)}, not {values.dtype}")
    if values.dim() == 0:
        raise ValueError("values have no dimension; groups lie along the last one")


def _check_quantised(quantised: Quantised, format: BlockFormat, dtype: torch.dtype) -> None:
    codes, scales = quantised
    if dtype not in DTYPES:
        raise TypeError(f"values come back in {', '.join(str(known) for known in DTYPES)}, not {dtype}")
    if codes.dtype != torch.uint8 or scales.dtype != torch.float32:
        raise TypeError(f"codes are uint8 and scales float32, not {codes.dtype} and {scales.dtype}")
    if codes.dim() == 0 or scales.shape != (*codes.shape[:-1], format.num_groups(codes.shape[-1])):
        raise ValueError(
            f"codes {list(codes.shape)} and scales {list(scales.shape)} do not belong together: groups of "
            f"{format.group} along the last dimension"
        )
    if codes.device != scales.device:
        raise ValueError(f"codes are on {codes.device} and scales on {scales.device}; they must be on one device")


def to_saved(quantised: Quantised, format: BlockFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as autograd should save them: the codes as numbers of the 8-bit type that they are.

    So whoever compares, prints or checks saved tensors sees values, and not how they are coded.
    """
    return quantised.codes.view(CODE_DTYPES[format.element]), quantised.scales


def from_saved(codes: torch.Tensor, scales: torch.Tensor) -> Quantised:
    """The other way."""
    return Quantised(codes.view(torch.uint8), scales)
