"""The codec as Triton kernels, and the device functions with which other kernels code and decode what they hold.

Memory traffic is all they do. A program takes some groups, one a row of its tile; the maximum of a group stays within
it, so there is no second pass. The bits are those of `reference`, on every device: conversions to 8 bits are those of
the hardware from sm_89 on (`cvt.rn.satfinite`), integer arithmetic before (`soft`), and no two operations are fused.

Registered as `megamem::quantise` and `megamem::dequantise`, with fake implementations.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,unused-ignore"

from typing import get_args

import torch
import triton
import triton.language as tl

from .format import LARGEST, LEAST_SCALE, BlockFormat, Element, Quantised

_TILE = 8192  # elements a program holds at a time
# Of every launch. A fused multiply-add rounds once where the definition rounds twice.
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}

_LEAST_SCALE = tl.constexpr(LEAST_SCALE)
_E4M3_LARGEST, _E5M2_LARGEST, _INT8_LARGEST = (tl.constexpr(LARGEST[element]) for element in get_args(Element))


@triton.jit
def largest_code(element: tl.constexpr):
    """The largest value of a code."""
    if element == "e4m3":
        return _E4M3_LARGEST
    elif element == "e5m2":
        return _E5M2_LARGEST
    else:
        return _INT8_LARGEST


@triton.jit
def group_scales(values, element: tl.constexpr, power_of_two: tl.constexpr):
    """Of fp32 values [groups, elements]: the scales [groups], NaN for groups that are not finite; and which are."""
    # As integers, the magnitudes of floating-point numbers keep their order, with infinity and NaN on top.
    bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    is_finite = bits < 0x7F800000
    scales = tl.maximum(bits.to(tl.float32, bitcast=True) * (1.0 / largest_code(element)), _LEAST_SCALE)
    if power_of_two:
        scales = ((scales.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(is_finite, scales, float("nan")), is_finite


@triton.jit
def _soft_float8(clamped, mantissa: tl.constexpr, bias: tl.constexpr):
    """The bits of a float8 with that many mantissa bits, rounded to nearest even; for GPUs without the conversion."""
    cut: tl.constexpr = 23 - mantissa
    least: tl.constexpr = 2.0 ** (1 - bias)  # normal number
    bits = clamped.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + ((1 << (cut - 1)) - 1) + ((magnitude >> cut) & 1)) >> cut) - ((127 - bias) << mantissa)
    # Adding 1.5 * 2^23 units leaves the number of units in the low bits, rounded.
    units = tl.abs(clamped) + 12582912.0 * least * 2.0**-mantissa
    subnormal = units.to(tl.int32, bitcast=True) & 0xFF
    return (sign | tl.where(tl.abs(clamped) < least, subnormal, normal)).to(tl.uint8)


@triton.jit
def encode(scaled, element: tl.constexpr, soft: tl.constexpr):
    """Codes (uint8) of finite fp32 values, nearest even, at most the largest code in magnitude."""
    largest = largest_code(element)
    clamped = tl.minimum(tl.maximum(scaled, -largest), largest)
    if element == "int8":
        rounded = (clamped + 12582912.0) - 12582912.0  # 1.5 * 2^23: no fraction is left
        return rounded.to(tl.int32).to(tl.uint8)
    elif element == "e4m3":
        if soft:
            return _soft_float8(clamped, 3, 7)
        else:
            return clamped.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif soft:
        return _soft_float8(clamped, 2, 15)
    else:
        return clamped.to(tl.float8e5).to(tl.uint8, bitcast=True)


@triton.jit
def decode(codes, element: tl.constexpr, soft: tl.constexpr):
    """The fp32 values of codes (uint8), before their scale."""
    if element == "int8":
        return codes.to(tl.int8, bitcast=True).to(tl.float32)
    elif element == "e5m2":  # the upper half of an fp16
        return (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif soft:
        # An fp16 with the exponent 8 too low, which also holds for subnormal numbers; but it has no NaN there.
        half = ((codes.to(tl.uint16) & 0x80) << 8) | ((codes.to(tl.uint16) & 0x7F) << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((codes & 0x7F) == 0x7F, float("nan"), value)
    else:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def encode_groups(values, element: tl.constexpr, power_of_two: tl.constexpr, soft: tl.constexpr):
    """Codes and scales of fp32 values [groups, elements]; elements beyond the end of a group must be 0."""
    scales, is_finite = group_scales(values, element, power_of_two)
    scaled = tl.where(is_finite[:, None], values * tl.div_rn(1.0, scales)[:, None], 0.0)
    return encode(scaled, element, soft), scales


@triton.jit
def tile_of_columns(first, width, group: tl.constexpr, padded: tl.constexpr, block: tl.constexpr):
    """`block` groups from group `first` on: their indices, the columns [block, padded], and which are there."""
    index = first + tl.arange(0, block)
    lane = tl.arange(0, padded)[None, :]
    column = index[:, None] * group + lane
    is_inside = column < width
    if padded != group:
        is_inside &= lane < group
    return index, column, is_inside


@triton.jit
def tile_of_groups(
    num_groups, groups_per_row, width, group: tl.constexpr, padded: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """This program's groups [block] of all rows, their rows [block, 1], columns [block, padded]; which are there."""
    index = tl.program_id(0) * block + tl.arange(0, block)
    row = (index // groups_per_row).to(tl.int64)[:, None]
    lane = tl.arange(0, padded)[None, :]
    column = (index % groups_per_row)[:, None] * group + lane
    is_inside = (index < num_groups)[:, None] & (column < width)
    if padded != group:
        is_inside &= lane < group
    return index, row, column, is_inside


@triton.jit
def quantise_kernel(
    values, codes, scales, num_groups, groups_per_row, width, stride, group: tl.constexpr, padded: tl.constexpr,
    block: tl.constexpr, element: tl.constexpr, power_of_two: tl.constexpr, soft: tl.constexpr,
):  # fmt: skip
    """`block` groups a program; `padded` is `group` rounded up to a power of two, `stride` that of the values' rows."""
    index, row, column, is_inside = tile_of_groups(num_groups, groups_per_row, width, group, padded, block)
    value = tl.load(values + row * stride + column, mask=is_inside, other=0.0).to(tl.float32)
    code, scale = encode_groups(value, element, power_of_two, soft)
    tl.store(codes + row * width + column, code, mask=is_inside)
    tl.store(scales + index, scale, mask=index < num_groups)


@triton.jit
def dequantise_kernel(
    codes, scales, values, num_groups, groups_per_row, width, group: tl.constexpr, padded: tl.constexpr,
    block: tl.constexpr, element: tl.constexpr, soft: tl.constexpr,
):  # fmt: skip
    """As `quantise_kernel`, the other way."""
    index, row, column, is_inside = tile_of_groups(num_groups, groups_per_row, width, group, padded, block)
    scale = tl.load(scales + index, mask=index < num_groups, other=0.0)
    value = decode(tl.load(codes + row * width + column, mask=is_inside, other=0), element, soft) * scale[:, None]
    tl.store(values + row * width + column, value.to(values.dtype.element_ty), mask=is_inside)


def needs_soft(device: torch.device) -> bool:
    """Whether this device lacks conversions from and to E4M3: GPUs before sm_89."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)


@torch.library.custom_op("megamem::quantise", mutates_args=())
def _quantise_operator(
    values_RD: torch.Tensor, element: str, group: int, power_of_two: bool, soft: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    codes_RD, scales_RG = _allocate_quantised(values_RD, group)
    num_rows, groups_per_row = scales_RG.shape
    padded, block = tile_of(group)
    if scales_RG.numel():
        quantise_kernel[(triton.cdiv(scales_RG.numel(), block),)](
            values_RD, codes_RD, scales_RG, num_rows * groups_per_row, groups_per_row, values_RD.shape[1],
            values_RD.stride(0), group=group, padded=padded, block=block, element=element, power_of_two=power_of_two,
            soft=soft, **LAUNCH,
        )  # fmt: skip
    return codes_RD, scales_RG


@_quantise_operator.register_fake
def _quantise_fake(
    values_RD: torch.Tensor, element: str, group: int, power_of_two: bool, soft: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    del element, power_of_two, soft
    return _allocate_quantised(values_RD, group)


def _allocate_quantised(values_RD: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, width = values_RD.shape
    codes_RD = values_RD.new_empty(num_rows, width, dtype=torch.uint8)
    return codes_RD, values_RD.new_empty(num_rows, -(-width // group), dtype=torch.float32)


@torch.library.custom_op("megamem::dequantise", mutates_args=())
def _dequantise_operator(
    codes_RD: torch.Tensor, scales_RG: torch.Tensor, element: str, group: int, dtype: torch.dtype, soft: bool
) -> torch.Tensor:
    values_RD = torch.empty_like(codes_RD, dtype=dtype)
    groups_per_row = scales_RG.shape[1]
    padded, block = tile_of(group)
    if scales_RG.numel():
        dequantise_kernel[(triton.cdiv(scales_RG.numel(), block),)](
            codes_RD, scales_RG, values_RD, scales_RG.numel(), groups_per_row, codes_RD.shape[1], group=group,
            padded=padded, block=block, element=element, soft=soft, **LAUNCH,
        )  # fmt: skip
    return values_RD


@_dequantise_operator.register_fake
def _dequantise_fake(
    codes_RD: torch.Tensor, scales_RG: torch.Tensor, element: str, group: int, dtype: torch.dtype, soft: bool
) -> torch.Tensor:
    del scales_RG, element, group, soft
    return torch.empty_like(codes_RD, dtype=dtype)


def tile_of(group: int) -> tuple[int, int]:
    """The width of a program's tile for groups of this size, and how many groups it holds."""
    padded = 1 << (group - 1).bit_length()
    return padded, max(1, _TILE // padded)


def quantise(values: torch.Tensor, format: BlockFormat) -> Quantised:
    """As `reference.quantise_reference`."""
    rows_RD = as_rows(values)
    soft = needs_soft(values.device)
    codes_RD, scales_RG = _quantise_operator(rows_RD, format.element, format.group, format.power_of_two, soft)
    groups = format.num_groups(values.shape[-1])
    return Quantised(codes_RD.view(values.shape), scales_RG.view(*values.shape[:-1], groups))


def dequantise(quantised: Quantised, format: BlockFormat, dtype: torch.dtype) -> torch.Tensor:
    """As `reference.dequantise_reference`."""
    codes_RD, scales_RG = (as_rows(part.contiguous()) for part in quantised)
    soft = needs_soft(codes_RD.device)
    values_RD: torch.Tensor = _dequantise_operator(codes_RD, scales_RG, format.element, format.group, dtype, soft)
    return values_RD.view(quantised.codes.shape)


def as_rows(values: torch.Tensor) -> torch.Tensor:
    """[..., D] as [rows, D] with unit stride along D: a view where possible; without elements, no rows."""
    if not values.numel():
        return values.new_empty(0, values.shape[-1])
    rows_RD = values.reshape(-1, values.shape[-1])
    return rows_RD if rows_RD.stride(1) == 1 else rows_RD.contiguous()
