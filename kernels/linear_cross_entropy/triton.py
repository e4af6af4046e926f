"""The two row operations as Triton kernels; `rows.py` has the same two in plain PyTorch.

Memory traffic is all they do: the statistics read a chunk of logits once, the gradient reads and writes it once. One
program owns a row (statistics) or a piece of one (gradient), so there is no lock, no atomic and one order of summation.

Both are registered as custom operators, `megamem::lce_statistics_` and `megamem::lce_gradient_`, with a fake
implementation that does nothing, as both only write to their arguments: `torch.compile`, `FakeTensorMode` and meta
tensors pass through. Their derivative is taken above them, in `autograd.py`.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,unused-ignore"

import torch
import triton
import triton.language as tl

from .options import LossOptions

_WIDEST = 4096  # elements a program holds at a time
# Of every launch. Fused multiply-adds are what the tests allow for; triton 3.10 changes its default.
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _tanh(x):
    # 2 sigmoid(2x) - 1 cancels near 0; there, the first five terms of the series are exact to 5e-8.
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def statistics_kernel(
    logits, labels, statistics, num_columns, num_tokens, stride, first_word, scale, cap,
    has_cap: tl.constexpr, total: tl.constexpr, weighted: tl.constexpr, arg_max: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One row a program. `total`, `weighted` and `arg_max` are their rows of the statistics, or 0 for absent."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * stride
    statistics += token
    label = tl.load(labels + token) - first_word
    m = tl.load(statistics)
    s = tl.load(statistics + num_tokens)
    t = tl.load(statistics + 2 * num_tokens)
    x = tl.load(statistics + total * num_tokens)
    w = tl.load(statistics + weighted * num_tokens)
    a = tl.load(statistics + arg_max * num_tokens)
    for start in range(0, num_columns, block):
        column = start + tl.arange(0, block)
        is_inside = column < num_columns
        value = tl.load(logits + column, mask=is_inside, other=0.0).to(tl.float32) * scale
        if has_cap:
            value = cap * _tanh(value / cap)
        t += tl.sum(tl.where(is_inside & (column == label), value, 0.0), 0)
        if total:
            x += tl.sum(tl.where(is_inside, value, 0.0), 0)
        value = tl.where(is_inside, value, -3.0e38)  # finite, because 0 times infinity is no number
        peak = tl.max(value, 0)
        if arg_max:
            lowest = tl.min(tl.where(value == peak, column, num_columns), 0)
            a = tl.where(peak > m, (first_word + lowest).to(tl.float32), a)
        new = tl.maximum(m, peak)
        shifted = value - new
        power = tl.exp(shifted)
        factor = tl.exp(m - new)
        if weighted:
            w = (w + s * (m - new)) * factor + tl.sum(power * shifted, 0)
        s = s * factor + tl.sum(power, 0)
        m = new
    tl.store(statistics, m)
    tl.store(statistics + num_tokens, s)
    tl.store(statistics + 2 * num_tokens, t)
    if total:
        tl.store(statistics + total * num_tokens, x)
    if weighted:
        tl.store(statistics + weighted * num_tokens, w)
    if arg_max:
        tl.store(statistics + arg_max * num_tokens, a)


@triton.jit
def gradient_kernel(
    logits, labels, coefficients, gradient, num_columns, num_tokens, logits_stride, gradient_stride, first_word,
    scale, cap, has_cap: tl.constexpr, uniform: tl.constexpr, entropy: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One piece of a row a program. `uniform` and `entropy` are their rows of the coefficients, or 0 for absent."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    is_inside = column < num_columns
    value = tl.load(logits + token * logits_stride + column, mask=is_inside, other=0.0).to(tl.float32) * scale
    coefficients += token
    label = tl.load(labels + token) - first_word
    slope = scale
    if has_cap:
        th = _tanh(value / cap)
        value = cap * th
        slope = scale * (1.0 - th * th)
    value -= tl.load(coefficients)
    factor = tl.load(coefficients + num_tokens)
    if entropy:
        factor += tl.load(coefficients + entropy * num_tokens) * value
    result = tl.exp(value) * factor + tl.where(column == label, tl.load(coefficients + 2 * num_tokens), 0.0)
    if uniform:
        result += tl.load(coefficients + uniform * num_tokens)
    result *= slope
    tl.store(gradient + token * gradient_stride + column, result.to(gradient.dtype.element_ty), mask=is_inside)


@torch.library.custom_op("megamem::lce_statistics_", mutates_args=("statistics_NT",))
def _statistics_operator(
    logits_TC: torch.Tensor, labels_T: torch.Tensor, statistics_NT: torch.Tensor, first_word: int, scale: float,
    cap: float, total: int, weighted: int, arg_max: int,
) -> None:  # fmt: skip
    num_tokens, num_columns = logits_TC.shape
    if num_tokens == 0:
        return
    statistics_kernel[(num_tokens,)](
        logits_TC, labels_T, statistics_NT, num_columns, num_tokens, logits_TC.stride(0), first_word, scale, cap,
        has_cap=cap > 0.0, total=total, weighted=weighted, arg_max=arg_max, block=_block(num_columns),
        **LAUNCH,
    )  # fmt: skip


@torch.library.custom_op("megamem::lce_gradient_", mutates_args=("gradient_TC",))
def _gradient_operator(
    gradient_TC: torch.Tensor, logits_TC: torch.Tensor | None, labels_T: torch.Tensor, coefficients_MT: torch.Tensor,
    first_word: int, scale: float, cap: float, uniform: int, entropy: int,
) -> None:  # fmt: skip
    """`logits_TC` None: the logits are in `gradient_TC`."""
    logits_TC = gradient_TC if logits_TC is None else logits_TC
    num_tokens, num_columns = logits_TC.shape
    if num_tokens == 0:
        return
    block = _block(num_columns)
    gradient_kernel[(num_tokens, triton.cdiv(num_columns, block))](
        logits_TC, labels_T, coefficients_MT, gradient_TC, num_columns, num_tokens, logits_TC.stride(0),
        gradient_TC.stride(0), first_word, scale, cap, has_cap=cap > 0.0, uniform=uniform, entropy=entropy,
        block=block, **LAUNCH,
    )  # fmt: skip


@_statistics_operator.register_fake
@_gradient_operator.register_fake
def _nothing_to_allocate(*_arguments: object) -> None:
    """Both operators write in place and return nothing."""


def add_statistics_(
    logits_TC: torch.Tensor, labels_T: torch.Tensor, statistics_NT: torch.Tensor, options: LossOptions, first_word: int
) -> None:
    """As `rows.add_statistics_`."""
    _check_rows(logits_TC)
    _statistics_operator(
        logits_TC, labels_T, statistics_NT, first_word, options.logit_scale, options.softcap or 0.0,
        _row(options.rows, "total"), _row(options.rows, "weighted"), _row(options.rows, "arg_max"),
    )  # fmt: skip


def replace_by_gradient_(
    logits_TC: torch.Tensor,
    labels_T: torch.Tensor,
    coefficients_MT: torch.Tensor,
    gradient_TC: torch.Tensor,
    options: LossOptions,
    first_word: int,
) -> None:
    """As `rows.replace_by_gradient_`."""
    _check_rows(logits_TC)
    # An operator may not have one tensor both as an input and as an output.
    other_TC = None if gradient_TC is logits_TC else logits_TC
    _gradient_operator(
        gradient_TC, other_TC, labels_T, coefficients_MT, first_word, options.logit_scale, options.softcap or 0.0,
        _row(options.coefficients, "uniform"), _row(options.coefficients, "entropy"),
    )  # fmt: skip


def _row(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else 0


def _check_rows(logits_TC: torch.Tensor) -> None:
    if logits_TC.stride(1) != 1:
        raise ValueError(f"the row kernels need unit stride along the vocabulary, not strides {logits_TC.stride()}")


def _block(num_columns: int) -> int:
    return min(_WIDEST, max(16, 1 << (num_columns - 1).bit_length()))
