"""The three operations of `reference` as Triton kernels: output, output from what was saved, gradients.

A program holds a row as a tile of [groups, elements], so that its statistics and the scales of its codes come from one
read. In the backward pass a program walks over some rows and adds up its part of the gradients of weight and bias in
registers; the parts are added up afterwards, in their order. How many parts depends on the number of rows alone, so the
sums are the same on every GPU. Of wide rows the sums take a kernel of their own, which reads everything once more.

Registered as `megamem::norm_`, `megamem::norm_rebuild_` and `megamem::norm_backward_`, which write to their first
arguments only.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,unused-ignore"

import torch
import triton
import triton.language as tl

from ..block_codec import BlockFormat, Quantised
from ..block_codec.triton import decode, encode_groups, needs_soft, tile_of_columns
from .reference import Source

_SUMMED_WIDTH = 8192  # up to which the backward pass has registers for a row and the sums over rows
_SUMS_WIDTH = 2048  # columns of a program that only sums
_MOST_PARTS = 512  # programs of the backward pass: a few for each multiprocessor
LAUNCH = {"enable_fp_fusion": True}  # of every launch, besides the warps, which go with the width
_PLAIN = BlockFormat()  # how a row is cut where nothing is coded


@triton.jit
def load_normal(
    source, scales, mean, rstd, row, stride, num_groups, index, column, is_inside, coded: tl.constexpr,
    centred: tl.constexpr, element: tl.constexpr, soft: tl.constexpr,
):  # fmt: skip
    """These columns of a row of the input, from itself or from its codes, normalised; in fp32."""
    if coded:
        codes = tl.load(source + row * stride + column, mask=is_inside, other=0)
        scale = tl.load(scales + row * num_groups + index, mask=index < num_groups, other=0.0)
        value = decode(codes, element, soft) * scale[:, None]
    else:
        value = tl.load(source + row * stride + column, mask=is_inside, other=0.0).to(tl.float32)
    if centred:
        value = tl.where(is_inside, value - tl.load(mean + row), 0.0)
    return value * tl.load(rstd + row)


@triton.jit
def total(values):
    """The sum of a tile."""
    return tl.sum(tl.sum(values, 1), 0)


@triton.jit
def norm_kernel(
    input, weight, bias, output, mean, rstd, codes, scales, num_groups, width, stride, eps, centred: tl.constexpr,
    has_bias: tl.constexpr, stores: tl.constexpr, group: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
    element: tl.constexpr, power_of_two: tl.constexpr, soft: tl.constexpr,
):  # fmt: skip
    """One row: output, statistics and, if it `stores` them, codes."""
    row = tl.program_id(0).to(tl.int64)
    index, column, is_inside = tile_of_columns(0, width, group, padded, block)
    value = tl.load(input + row * stride + column, mask=is_inside, other=0.0).to(tl.float32)
    if stores:
        code, scale = encode_groups(value, element, power_of_two, soft)
        tl.store(codes + row * width + column, code, mask=is_inside)
        tl.store(scales + row * num_groups + index, scale, mask=index < num_groups)
    if centred:
        average = total(value) / width
        tl.store(mean + row, average)
        value = tl.where(is_inside, value - average, 0.0)
    factor = tl.rsqrt(total(value * value) / width + eps)
    tl.store(rstd + row, factor)
    result = value * factor * tl.load(weight + column, mask=is_inside, other=0.0).to(tl.float32)
    if has_bias:
        result += tl.load(bias + column, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(output + row * width + column, result.to(output.dtype.element_ty), mask=is_inside)


@triton.jit
def norm_rebuild_kernel(
    source, scales, mean, rstd, weight, bias, output, num_groups, width, stride, coded: tl.constexpr,
    centred: tl.constexpr, has_bias: tl.constexpr, group: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
    element: tl.constexpr, soft: tl.constexpr,
):  # fmt: skip
    """One row of the output, from what was saved."""
    row = tl.program_id(0).to(tl.int64)
    index, column, is_inside = tile_of_columns(0, width, group, padded, block)
    normal = load_normal(
        source, scales, mean, rstd, row, stride, num_groups, index, column, is_inside, coded, centred, element, soft,
    )  # fmt: skip
    result = normal * tl.load(weight + column, mask=is_inside, other=0.0).to(tl.float32)
    if has_bias:
        result += tl.load(bias + column, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(output + row * width + column, result.to(output.dtype.element_ty), mask=is_inside)


@triton.jit
def norm_backward_kernel(
    gradient, source, scales, mean, rstd, weight, input_gradient, weight_parts, bias_parts, num_rows, num_groups, width,
    stride, coded: tl.constexpr, centred: tl.constexpr, has_bias: tl.constexpr, sums: tl.constexpr, group: tl.constexpr,
    padded: tl.constexpr, block: tl.constexpr, element: tl.constexpr, soft: tl.constexpr,
):  # fmt: skip
    """Every so-manieth row: the input's gradient and, with `sums`, one part of the gradients of weight and bias."""
    part = tl.program_id(0)
    index, column, is_inside = tile_of_columns(0, width, group, padded, block)
    weight_sum = tl.zeros([block, padded], dtype=tl.float32)
    bias_sum = tl.zeros([block, padded], dtype=tl.float32)
    row = part.to(tl.int64)
    for _ in range(part, num_rows, tl.num_programs(0)):
        normal = load_normal(
            source, scales, mean, rstd, row, stride, num_groups, index, column, is_inside, coded, centred, element,
            soft,
        )  # fmt: skip
        upstream = tl.load(gradient + row * width + column, mask=is_inside, other=0.0).to(tl.float32)
        if sums:
            weight_sum += upstream * normal
            if has_bias:
                bias_sum += upstream
        # Read for every row, from the cache: its registers are needed.
        upstream *= tl.load(weight + column, mask=is_inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        result = upstream - normal * (total(upstream * normal) / width)
        if centred:
            result -= total(upstream) / width
        target = input_gradient + row * width + column
        tl.store(target, (result * tl.load(rstd + row)).to(input_gradient.dtype.element_ty), mask=is_inside)
        row += tl.num_programs(0)
    if sums:
        tl.store(weight_parts + part.to(tl.int64) * width + column, weight_sum, mask=is_inside)
        if has_bias:
            tl.store(bias_parts + part.to(tl.int64) * width + column, bias_sum, mask=is_inside)


@triton.jit
def norm_sums_kernel(
    gradient, source, scales, mean, rstd, weight_parts, bias_parts, num_rows, num_groups, width, stride,
    coded: tl.constexpr, centred: tl.constexpr, has_bias: tl.constexpr, group: tl.constexpr, padded: tl.constexpr,
    block: tl.constexpr, element: tl.constexpr, soft: tl.constexpr,
):  # fmt: skip
    """Of some columns and every so-manieth row: one part of the gradients of weight and bias."""
    part = tl.program_id(0)
    index, column, is_inside = tile_of_columns(tl.program_id(1) * block, width, group, padded, block)
    weight_sum = tl.zeros([block, padded], dtype=tl.float32)
    bias_sum = tl.zeros([block, padded], dtype=tl.float32)
    row = part.to(tl.int64)
    for _ in range(part, num_rows, tl.num_programs(0)):
        normal = load_normal(
            source, scales, mean, rstd, row, stride, num_groups, index, column, is_inside, coded, centred, element,
            soft,
        )  # fmt: skip
        upstream = tl.load(gradient + row * width + column, mask=is_inside, other=0.0).to(tl.float32)
        weight_sum += upstream * normal
        if has_bias:
            bias_sum += upstream
        row += tl.num_programs(0)
    tl.store(weight_parts + part.to(tl.int64) * width + column, weight_sum, mask=is_inside)
    if has_bias:
        tl.store(bias_parts + part.to(tl.int64) * width + column, bias_sum, mask=is_inside)


@torch.library.custom_op("megamem::norm_", mutates_args=("output_TD", "mean_T", "rstd_T", "codes_TD", "scales_TG"))
def _forward_operator(
    output_TD: torch.Tensor, mean_T: torch.Tensor | None, rstd_T: torch.Tensor, codes_TD: torch.Tensor | None,
    scales_TG: torch.Tensor | None, input_TD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None,
    eps: float, element: str, group: int, power_of_two: bool, soft: bool,
) -> None:  # fmt: skip
    if not input_TD.numel():
        return
    num_tokens, width = input_TD.shape
    tile = _tile(width, group)
    norm_kernel[(num_tokens,)](
        input_TD, weight_D, bias_D, output_TD, mean_T, rstd_T, codes_TD, scales_TG, -(-width // group), width,
        input_TD.stride(0), eps, centred=mean_T is not None, has_bias=bias_D is not None, stores=codes_TD is not None,
        element=element, power_of_two=power_of_two, soft=soft, **tile, **LAUNCH,
    )  # fmt: skip


@torch.library.custom_op("megamem::norm_rebuild_", mutates_args=("output_TD",))
def _rebuild_operator(
    output_TD: torch.Tensor, source_TD: torch.Tensor, scales_TG: torch.Tensor | None, mean_T: torch.Tensor | None,
    rstd_T: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None, element: str, group: int, soft: bool,
) -> None:  # fmt: skip
    if not source_TD.numel():
        return
    num_tokens, width = source_TD.shape
    norm_rebuild_kernel[(num_tokens,)](
        source_TD, scales_TG, mean_T, rstd_T, weight_D, bias_D, output_TD, -(-width // group), width,
        source_TD.stride(0), coded=scales_TG is not None, centred=mean_T is not None, has_bias=bias_D is not None,
        element=element, soft=soft, **_tile(width, group), **LAUNCH,
    )  # fmt: skip


@torch.library.custom_op(
    "megamem::norm_backward_", mutates_args=("input_gradient_TD", "weight_parts_PD", "bias_parts_PD")
)
def _backward_operator(
    input_gradient_TD: torch.Tensor, weight_parts_PD: torch.Tensor, bias_parts_PD: torch.Tensor | None,
    gradient_TD: torch.Tensor, source_TD: torch.Tensor, scales_TG: torch.Tensor | None, mean_T: torch.Tensor | None,
    rstd_T: torch.Tensor, weight_D: torch.Tensor, element: str, group: int, soft: bool,
) -> None:  # fmt: skip
    if not source_TD.numel():
        return
    num_tokens, width = source_TD.shape
    num_groups = -(-width // group)
    options = {
        "coded": scales_TG is not None, "centred": mean_T is not None, "has_bias": bias_parts_PD is not None,
        "element": element, "soft": soft, **LAUNCH,
    }  # fmt: skip
    parts, sums = len(weight_parts_PD), width <= _SUMMED_WIDTH
    norm_backward_kernel[(parts if sums else num_tokens,)](
        gradient_TD, source_TD, scales_TG, mean_T, rstd_T, weight_D, input_gradient_TD, weight_parts_PD, bias_parts_PD,
        num_tokens, num_groups, width, source_TD.stride(0), sums=sums, **_tile(width, group), **options,
    )  # fmt: skip
    if not sums:
        tile = _tile(_SUMS_WIDTH, group)
        norm_sums_kernel[(parts, triton.cdiv(num_groups, tile["block"]))](
            gradient_TD, source_TD, scales_TG, mean_T, rstd_T, weight_parts_PD, bias_parts_PD, num_tokens, num_groups,
            width, source_TD.stride(0), **tile, **options,
        )  # fmt: skip


@_forward_operator.register_fake
@_rebuild_operator.register_fake
@_backward_operator.register_fake
def _nothing_to_allocate(*_arguments: object) -> None:
    """The operators write in place and return nothing."""


def forward(
    input_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    eps: float,
    centred: bool,
    format: BlockFormat | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, Quantised | None]:
    """As `reference.forward`."""
    num_tokens, width = input_TD.shape
    cut = format or _PLAIN
    output_TD = input_TD.new_empty(num_tokens, width)
    rstd_T = input_TD.new_empty(num_tokens, dtype=torch.float32)
    mean_T = torch.empty_like(rstd_T) if centred else None
    quantised = None
    if format is not None:
        scales_TG = rstd_T.new_empty(num_tokens, format.num_groups(width))
        quantised = Quantised(torch.empty_like(output_TD, dtype=torch.uint8), scales_TG)
    codes_TD, scales = quantised or (None, None)
    _forward_operator(
        output_TD, mean_T, rstd_T, codes_TD, scales, input_TD, weight_D, bias_D, eps, cut.element, cut.group,
        cut.power_of_two, needs_soft(input_TD.device),
    )  # fmt: skip
    return output_TD, mean_T, rstd_T, quantised


def rebuild_(
    output_TD: torch.Tensor,
    source: Source,
    mean_T: torch.Tensor | None,
    rstd_T: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    format: BlockFormat | None,
) -> None:
    """As `reference.rebuild_`."""
    source_TD, scales_TG = source if isinstance(source, Quantised) else (source, None)
    cut = format or _PLAIN
    _rebuild_operator(
        output_TD, source_TD, scales_TG, mean_T, rstd_T, weight_D, bias_D, cut.element, cut.group,
        needs_soft(output_TD.device),
    )  # fmt: skip


def backward(
    gradient_TD: torch.Tensor,
    source: Source,
    mean_T: torch.Tensor | None,
    rstd_T: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    format: BlockFormat | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `reference.backward`."""
    source_TD, scales_TG = source if isinstance(source, Quantised) else (source, None)
    cut = format or _PLAIN
    num_tokens, width = source_TD.shape
    parts = min(num_tokens, _MOST_PARTS)
    weight_parts_PD = rstd_T.new_empty(parts, width)
    bias_parts_PD = None if bias_D is None else torch.empty_like(weight_parts_PD)
    input_gradient_TD = torch.empty_like(gradient_TD)
    _backward_operator(
        input_gradient_TD, weight_parts_PD, bias_parts_PD, gradient_TD, source_TD, scales_TG, mean_T, rstd_T, weight_D,
        cut.element, cut.group, needs_soft(gradient_TD.device),
    )  # fmt: skip
    bias_gradient_D = None
    if bias_D is not None and bias_parts_PD is not None:
        bias_gradient_D = bias_parts_PD.sum(0).to(bias_D.dtype)
    return input_gradient_TD, weight_parts_PD.sum(0).to(weight_D.dtype), bias_gradient_D


def _tile(width: int, group: int) -> dict[str, int]:
    """How a row lies in a program, and how many warps it takes."""
    num_groups = -(-width // group)
    padded, block = 1 << (group - 1).bit_length(), 1 << (num_groups - 1).bit_length()
    # 16 elements a thread; of the widest rows 64, because a block of 16 warps has too few registers for them.
    num_warps = 8 if padded * block > _SUMMED_WIDTH else max(1, padded * block // 512)
    return {"group": group, "padded": padded, "block": block, "num_warps": num_warps}
