"""The three operations of `reference` as Triton kernels: output, output from what was saved, gradients.

Each reads what it needs once and writes its results once. A program takes some groups of one token, those of the gate
and the same ones of the other half, so that the codes need no second pass. Sums over a token (the gradient of its
weight) are left as one number a program, added up in their order.

Registered as `megamem::activation_` and `megamem::activation_backward_`, which write to their first arguments only.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,unused-ignore"

import torch
import triton
import triton.language as tl

from ..block_codec import BlockFormat, Quantised
from ..block_codec.triton import decode, encode_groups, needs_soft, tile_of_columns
from .reference import CUBIC, DENSITY, HALF_ROOT, INSIDE, ROOT, Source
from .spec import Activation

_TILE = 4096  # elements of a half that a program holds
# Of every launch. Outputs are within rounding of the definition; codes are its bits, and have nothing to fuse.
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}
_PLAIN = BlockFormat()  # how a row is cut where nothing is coded

_TWO_ROOT, _TWO_CUBIC = tl.constexpr(2.0 * ROOT), tl.constexpr(2.0 * CUBIC)
_HALF_ROOT, _DENSITY = tl.constexpr(HALF_ROOT), tl.constexpr(DENSITY)


@triton.jit
def share_and_slope(gate, function: tl.constexpr):
    """What part of x the function lets through, between 0 and 1, and its derivative."""
    if function == "gelu":
        return 0.5 + 0.5 * tl.erf(gate * _HALF_ROOT), tl.exp(gate * gate * -0.5) * _DENSITY
    elif function == "silu":
        share = tl.sigmoid(gate)
        return share, share * (1.0 - share)
    elif function == "quick_gelu":
        share = tl.sigmoid(1.702 * gate)
        return share, share * (1.0 - share) * 1.702
    else:
        square = gate * gate
        share = tl.sigmoid(gate * _TWO_ROOT * (1.0 + square * 0.044715))
        return share, share * (1.0 - share) * (square * _TWO_CUBIC + _TWO_ROOT)


@triton.jit
def load_half(
    source, scales, bias, row, index, column, is_inside, first, half: tl.constexpr, num_groups, width,
    coded: tl.constexpr, has_bias: tl.constexpr, element: tl.constexpr, soft: tl.constexpr, halves: tl.constexpr,
):  # fmt: skip
    """One half of this program's part of the input plus bias, in fp32; `first` is where the row begins."""
    if coded:
        codes = tl.load(source + first + half * width + column, mask=is_inside, other=0)
        position = (row * halves + half) * num_groups + index
        scale = tl.load(scales + position, mask=index < num_groups, other=0.0)
        return decode(codes, element, soft) * scale[:, None]
    else:
        value = tl.load(source + first + half * width + column, mask=is_inside, other=0.0).to(tl.float32)
        if has_bias:
            value += tl.load(bias + half * width + column, mask=is_inside, other=0.0).to(tl.float32)
        return value


@triton.jit
def limit(gate, up, clamp, has_clamp: tl.constexpr):
    """Gate and up within their limits; NaN stays NaN."""
    if has_clamp:
        gate = tl.where(gate > clamp, clamp, gate)
        up = tl.where(up > clamp, clamp, tl.where(up < -clamp, -clamp, up))
    return gate, up


@triton.jit
def on_its_side(value, clamp, inside, both: tl.constexpr, has_clamp: tl.constexpr):
    """What is coded in place of a half, so that decoding takes nothing across the clamp; see `reference`."""
    if has_clamp:
        within = tl.where(value > inside * clamp, inside * clamp, value)
        if both:
            within = tl.where(within < -inside * clamp, -inside * clamp, within)
        coded = tl.where(value > clamp, 1.25 * clamp, within)
        if both:
            coded = tl.where(value < -clamp, -1.25 * clamp, coded)
        return coded
    else:
        return value


@triton.jit
def activation_kernel(
    source, scales, bias, weights, output, codes, code_scales, num_groups, width, stride, clamp, inside,
    offset, coded: tl.constexpr, has_bias: tl.constexpr, has_weights: tl.constexpr, stores: tl.constexpr,
    function: tl.constexpr, halves: tl.constexpr, has_clamp: tl.constexpr, group: tl.constexpr, padded: tl.constexpr,
    block: tl.constexpr, element: tl.constexpr, power_of_two: tl.constexpr, soft: tl.constexpr,
):  # fmt: skip
    """The output of `block` groups of one token, from the input or (`coded`) from its codes; `stores` codes too."""
    row = tl.program_id(0).to(tl.int64)
    index, column, is_inside = tile_of_columns(tl.program_id(1) * block, width, group, padded, block)
    first = row * stride
    gate = load_half(
        source, scales, bias, row, index, column, is_inside, first, 0, num_groups, width, coded, has_bias, element,
        soft, halves,
    )  # fmt: skip
    if stores:
        code, scale = encode_groups(on_its_side(gate, clamp, inside, False, has_clamp), element, power_of_two, soft)
        tl.store(codes + row * halves * width + column, code, mask=is_inside)
        tl.store(code_scales + row * halves * num_groups + index, scale, mask=index < num_groups)
    if halves == 2:
        up = load_half(
            source, scales, bias, row, index, column, is_inside, first, 1, num_groups, width, coded, has_bias, element,
            soft, halves,
        )  # fmt: skip
        if stores:
            code, scale = encode_groups(on_its_side(up, clamp, inside, True, has_clamp), element, power_of_two, soft)
            tl.store(codes + (row * 2 + 1) * width + column, code, mask=is_inside)
            tl.store(code_scales + (row * 2 + 1) * num_groups + index, scale, mask=index < num_groups)
        gate, up = limit(gate, up, clamp, has_clamp)
        share, _ = share_and_slope(gate, function)
        result = gate * share * (up + offset)
    else:
        share, _ = share_and_slope(gate, function)
        result = gate * share
    if has_weights:
        result *= tl.load(weights + row).to(tl.float32)
    tl.store(output + row * width + column, result.to(output.dtype.element_ty), mask=is_inside)


@triton.jit
def activation_backward_kernel(
    gradient, source, scales, bias, weights, input_gradient, weights_gradient, num_groups, width, stride, clamp, offset,
    coded: tl.constexpr, has_bias: tl.constexpr, has_weights: tl.constexpr, function: tl.constexpr,
    halves: tl.constexpr, has_clamp: tl.constexpr, group: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
    element: tl.constexpr, soft: tl.constexpr,
):  # fmt: skip
    """The input's gradient of `block` groups of one token, and their share of the gradient of its weight."""
    row = tl.program_id(0).to(tl.int64)
    index, column, is_inside = tile_of_columns(tl.program_id(1) * block, width, group, padded, block)
    first = row * stride
    gate = load_half(
        source, scales, bias, row, index, column, is_inside, first, 0, num_groups, width, coded, has_bias, element,
        soft, halves,
    )  # fmt: skip
    upstream = tl.load(gradient + row * width + column, mask=is_inside, other=0.0).to(tl.float32)
    target = input_gradient + row * halves * width + column
    if halves == 2:
        raw_gate = gate
        raw_up = load_half(
            source, scales, bias, row, index, column, is_inside, first, 1, num_groups, width, coded, has_bias, element,
            soft, halves,
        )  # fmt: skip
        gate, up = limit(raw_gate, raw_up, clamp, has_clamp)
        factor = up + offset
    share, share_slope = share_and_slope(gate, function)
    value = gate * share
    slope = share + gate * share_slope
    if has_weights:
        unweighted = value
        if halves == 2:
            unweighted = value * factor
        part = tl.sum(tl.sum(tl.where(is_inside, unweighted * upstream, 0.0), 1), 0)
        tl.store(weights_gradient + row * tl.num_programs(1) + tl.program_id(1), part)
        upstream *= tl.load(weights + row).to(tl.float32)
    if halves == 2:
        gate_gradient = upstream * slope * factor
        up_gradient = upstream * value
        if has_clamp:
            gate_gradient = tl.where(raw_gate > clamp, 0.0, gate_gradient)
            up_gradient = tl.where((raw_up > clamp) | (raw_up < -clamp), 0.0, up_gradient)
        tl.store(target, gate_gradient.to(input_gradient.dtype.element_ty), mask=is_inside)
        tl.store(target + width, up_gradient.to(input_gradient.dtype.element_ty), mask=is_inside)
    else:
        tl.store(target, (upstream * slope).to(input_gradient.dtype.element_ty), mask=is_inside)


@torch.library.custom_op("megamem::activation_", mutates_args=("output_TF", "codes_THF", "code_scales_THG"))
def _forward_operator(
    output_TF: torch.Tensor, codes_THF: torch.Tensor | None, code_scales_THG: torch.Tensor | None,
    source_THF: torch.Tensor, scales_THG: torch.Tensor | None, bias_HF: torch.Tensor | None,
    weights_T1: torch.Tensor | None, function: str, clamp: float | None, inside: float, offset: float, element: str,
    group: int, power_of_two: bool, soft: bool,
) -> None:  # fmt: skip
    num_tokens, halves, width = source_THF.shape
    if not source_THF.numel():
        return
    num_groups, padded, block = _tile(width, group)
    activation_kernel[(num_tokens, triton.cdiv(num_groups, block))](
        source_THF, scales_THG, bias_HF, weights_T1, output_TF, codes_THF, code_scales_THG, num_groups, width,
        source_THF.stride(0), clamp or 0.0, inside, offset, coded=scales_THG is not None, has_bias=bias_HF is not None,
        has_weights=weights_T1 is not None, stores=codes_THF is not None, function=function, halves=halves,
        has_clamp=clamp is not None, group=group, padded=padded, block=block, element=element,
        power_of_two=power_of_two, soft=soft, **LAUNCH,
    )  # fmt: skip


@torch.library.custom_op("megamem::activation_backward_", mutates_args=("input_gradient_THF", "weights_gradient_TN"))
def _backward_operator(
    input_gradient_THF: torch.Tensor, weights_gradient_TN: torch.Tensor | None, gradient_TF: torch.Tensor,
    source_THF: torch.Tensor, scales_THG: torch.Tensor | None, bias_HF: torch.Tensor | None,
    weights_T1: torch.Tensor | None, function: str, clamp: float | None, offset: float, element: str, group: int,
    soft: bool,
) -> None:  # fmt: skip
    num_tokens, halves, width = source_THF.shape
    if not source_THF.numel():
        return
    num_groups, padded, block = _tile(width, group)
    activation_backward_kernel[(num_tokens, triton.cdiv(num_groups, block))](
        gradient_TF, source_THF, scales_THG, bias_HF, weights_T1, input_gradient_THF, weights_gradient_TN, num_groups,
        width, source_THF.stride(0), clamp or 0.0, offset, coded=scales_THG is not None, has_bias=bias_HF is not None,
        has_weights=weights_T1 is not None, function=function, halves=halves, has_clamp=clamp is not None, group=group,
        padded=padded, block=block, element=element, soft=soft, **LAUNCH,
    )  # fmt: skip


@_forward_operator.register_fake
@_backward_operator.register_fake
def _nothing_to_allocate(*_arguments: object) -> None:
    """Both operators write in place and return nothing."""


def forward(
    input_THF: torch.Tensor,
    bias_HF: torch.Tensor | None,
    weights_T1: torch.Tensor | None,
    activation: Activation,
    format: BlockFormat | None,
) -> tuple[torch.Tensor, Quantised | None]:
    """As `reference.forward`."""
    output_TF = input_THF.new_empty(len(input_THF), input_THF.shape[-1])
    quantised = None
    if format is not None:
        num_groups = format.num_groups(input_THF.shape[-1])
        quantised = Quantised(
            torch.empty(input_THF.shape, dtype=torch.uint8, device=input_THF.device),
            torch.empty(*input_THF.shape[:-1], num_groups, dtype=torch.float32, device=input_THF.device),
        )
    _run_forward(output_TF, quantised, input_THF, bias_HF, weights_T1, activation, format)
    return output_TF, quantised


def rebuild_(
    output_TF: torch.Tensor,
    source: Source,
    bias_HF: torch.Tensor | None,
    weights_T1: torch.Tensor | None,
    activation: Activation,
    format: BlockFormat | None,
) -> None:
    """As `reference.rebuild_`."""
    _run_forward(output_TF, None, source, bias_HF, weights_T1, activation, format)


def _run_forward(
    output_TF: torch.Tensor,
    quantised: Quantised | None,
    source: Source,
    bias_HF: torch.Tensor | None,
    weights_T1: torch.Tensor | None,
    activation: Activation,
    format: BlockFormat | None,
) -> None:
    codes_THF, code_scales_THG = quantised or (None, None)
    source_THF, scales_THG = source if isinstance(source, Quantised) else (source, None)
    cut = format or _PLAIN
    _forward_operator(
        output_TF, codes_THF, code_scales_THG, source_THF, scales_THG, bias_HF, weights_T1, activation.function,
        activation.clamp, INSIDE[cut.element], activation.offset, cut.element, cut.group, cut.power_of_two,
        needs_soft(output_TF.device),
    )  # fmt: skip


def backward(
    gradient_TF: torch.Tensor,
    source: Source,
    bias_HF: torch.Tensor | None,
    weights_T1: torch.Tensor | None,
    activation: Activation,
    format: BlockFormat | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `reference.backward`."""
    source_THF, scales_THG = source if isinstance(source, Quantised) else (source, None)
    cut = format or _PLAIN
    input_gradient_THF = torch.empty(source_THF.shape, dtype=gradient_TF.dtype, device=gradient_TF.device)
    shares_TN = None
    if weights_T1 is not None:
        num_groups, _, block = _tile(source_THF.shape[-1], cut.group)
        shape = len(source_THF), triton.cdiv(num_groups, block)
        shares_TN = torch.empty(shape, dtype=torch.float32, device=gradient_TF.device)
    _backward_operator(
        input_gradient_THF, shares_TN, gradient_TF, source_THF, scales_THG, bias_HF, weights_T1, activation.function,
        activation.clamp, activation.offset, cut.element, cut.group, needs_soft(gradient_TF.device),
    )  # fmt: skip
    return input_gradient_THF, None if shares_TN is None else shares_TN.sum(-1, keepdim=True)


def _tile(width: int, group: int) -> tuple[int, int, int]:
    """The groups of a half, the width of a tile, and how many groups it holds: no more than there are."""
    num_groups = -(-width // group)
    padded = 1 << (group - 1).bit_length()
    return num_groups, padded, min(max(1, _TILE // padded), 1 << (num_groups - 1).bit_length())
