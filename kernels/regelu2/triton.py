"""The two operations of `reference` as Triton kernels, each in one pass over its operands.

A program takes some bytes of one token's bits, and the four stretches of elements that belong to them.

Registered as `megamem::regelu2_` and `megamem::regelu2_backward_`, which write to their first arguments only.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,unused-ignore"

import torch
import triton
import triton.language as tl

from ..activation.triton import share_and_slope
from .reference import SLOPES, THRESHOLDS, Approximation, quarter

_TILE = 2048  # bytes of bits that a program makes, at most: 8 for each of its threads, so 16 bytes of 16-bit elements
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}

_FIRST, _SECOND, _THIRD = (tl.constexpr(threshold) for threshold in THRESHOLDS)
_LOW, _HIGH = tl.constexpr(SLOPES[1]), tl.constexpr(SLOPES[2])


@triton.jit
def regelu2_kernel(
    source, bias, output, bits, width, quarter, stride, has_bias: tl.constexpr, function: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """The output of four stretches of one token, and their bits."""
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * block + tl.arange(0, block)
    packed = tl.zeros([block], dtype=tl.int32)
    for part in tl.static_range(4):
        column = part * quarter + byte
        is_inside = (byte < quarter) & (column < width)
        value = tl.load(source + row * stride + column, mask=is_inside, other=0.0).to(tl.float32)
        if has_bias:
            value += tl.load(bias + column, mask=is_inside, other=0.0).to(tl.float32)
        share, _ = share_and_slope(value, function)
        tl.store(output + row * width + column, (value * share).to(output.dtype.element_ty), mask=is_inside)
        below = (value <= _FIRST).to(tl.int32) + (value <= _SECOND).to(tl.int32) + (value <= _THIRD).to(tl.int32)
        packed |= tl.where(is_inside, 3 - below, 0) << (2 * part)
    tl.store(bits + row * quarter + byte, packed.to(tl.uint8), mask=byte < quarter)


@triton.jit
def regelu2_backward_kernel(gradient, bits, input_gradient, width, quarter, block: tl.constexpr):
    """The input's gradient of four stretches of one token."""
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * block + tl.arange(0, block)
    packed = tl.load(bits + row * quarter + byte, mask=byte < quarter, other=0).to(tl.int32)
    for part in tl.static_range(4):
        column = part * quarter + byte
        is_inside = (byte < quarter) & (column < width)
        level = (packed >> (2 * part)) & 3
        slope = tl.where(level == 3, 1.0, tl.where(level == 2, _HIGH, tl.where(level == 1, _LOW, 0.0)))
        upstream = tl.load(gradient + row * width + column, mask=is_inside, other=0.0).to(tl.float32)
        result = (upstream * slope).to(input_gradient.dtype.element_ty)
        tl.store(input_gradient + row * width + column, result, mask=is_inside)


@torch.library.custom_op("megamem::regelu2_", mutates_args=("output_TF", "bits_TQ"))
def _forward_operator(
    output_TF: torch.Tensor, bits_TQ: torch.Tensor, input_TF: torch.Tensor, bias_F: torch.Tensor | None, function: str
) -> None:
    if input_TF.numel():
        regelu2_kernel[_grid(bits_TQ)](
            input_TF, bias_F, output_TF, bits_TQ, input_TF.shape[-1], bits_TQ.shape[-1], input_TF.stride(0),
            has_bias=bias_F is not None, function=function, block=_block(bits_TQ), **LAUNCH,
        )  # fmt: skip


@torch.library.custom_op("megamem::regelu2_backward_", mutates_args=("input_gradient_TF",))
def _backward_operator(input_gradient_TF: torch.Tensor, gradient_TF: torch.Tensor, bits_TQ: torch.Tensor) -> None:
    if gradient_TF.numel():
        regelu2_backward_kernel[_grid(bits_TQ)](
            gradient_TF, bits_TQ, input_gradient_TF, gradient_TF.shape[-1], bits_TQ.shape[-1], block=_block(bits_TQ),
            **LAUNCH,
        )  # fmt: skip


@_forward_operator.register_fake
@_backward_operator.register_fake
def _nothing_to_allocate(*_arguments: object) -> None:
    """Both operators write in place and return nothing."""


def forward(
    input_TF: torch.Tensor, bias_F: torch.Tensor | None, approximate: Approximation
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.forward`."""
    num_tokens, width = input_TF.shape
    output_TF = input_TF.new_empty(num_tokens, width)
    bits_TQ = torch.empty(num_tokens, quarter(width), dtype=torch.uint8, device=input_TF.device)
    _forward_operator(output_TF, bits_TQ, input_TF, bias_F, "gelu" if approximate == "none" else "gelu_tanh")
    return output_TF, bits_TQ


def backward(gradient_TF: torch.Tensor, bits_TQ: torch.Tensor) -> torch.Tensor:
    """As `reference.backward`."""
    input_gradient_TF = torch.empty_like(gradient_TF)
    _backward_operator(input_gradient_TF, gradient_TF, bits_TQ)
    return input_gradient_TF


def _block(bits_TQ: torch.Tensor) -> int:
    """Bytes that a program makes: no more than a token has."""
    return min(_TILE, 1 << (bits_TQ.shape[-1] - 1).bit_length())


def _grid(bits_TQ: torch.Tensor) -> tuple[int, int]:
    return len(bits_TQ), triton.cdiv(bits_TQ.shape[-1], _block(bits_TQ))
