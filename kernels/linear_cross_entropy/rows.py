"""The two row operations in plain PyTorch; `triton.py` has the same two as kernels, and tests hold them equal.

They run over blocks of rows, so that what they need beside the chunk of logits stays in the cache (CPU) or small
(elsewhere). Nothing depends on the data, so nothing waits for the device; sums run in a fixed order.

    T tokens, C vocabulary rows of one chunk, N statistics (LossOptions.rows), M coefficients (LossOptions.coefficients)
"""

from collections.abc import Iterator

import torch

from .options import LossOptions

_CPU_BLOCK = 1 << 17  # elements: 512 KiB in fp32
_BLOCK = 1 << 21


def empty_statistics(num_tokens: int, options: LossOptions, device: torch.device) -> torch.Tensor:
    """`statistics_NT` of no logits at all: the neutral element of `add_statistics_` and of `combine_statistics`."""
    statistics_NT = torch.zeros(len(options.rows), num_tokens, dtype=torch.float32, device=device)
    statistics_NT[0].fill_(torch.finfo(torch.float32).min)  # finite, so that 0 * (m - m') is 0 and not NaN
    return statistics_NT


def add_statistics_(
    logits_TC: torch.Tensor, labels_T: torch.Tensor, statistics_NT: torch.Tensor, options: LossOptions, first_word: int
) -> None:
    """Take one chunk, whose column 0 is word `first_word`, into the statistics."""
    for rows in _blocks(logits_TC):
        _add_block(logits_TC[rows], labels_T[rows], statistics_NT[:, rows], options, first_word)


def replace_by_gradient_(
    logits_TC: torch.Tensor,
    labels_T: torch.Tensor,
    coefficients_MT: torch.Tensor,
    gradient_TC: torch.Tensor,
    options: LossOptions,
    first_word: int,
) -> None:
    """The gradient with respect to the GEMM's output, written to `gradient_TC`, which may be `logits_TC` itself.

    Else the logits stay as they are.

    With l the logits after scale and cap: (exp(l - maximum) (softmax + entropy (l - maximum)) + label [word is label]
    + uniform) dl/dz, the names being the coefficients' rows.
    """
    for rows in _blocks(logits_TC):
        _gradient_block(
            logits_TC[rows], labels_T[rows], coefficients_MT[:, rows], gradient_TC[rows], options, first_word
        )


def _blocks(logits_TC: torch.Tensor) -> Iterator[slice]:
    num_tokens, num_words = logits_TC.shape
    step = max(1, (_CPU_BLOCK if logits_TC.device.type == "cpu" else _BLOCK) // max(num_words, 1))
    return (slice(start, start + step) for start in range(0, num_tokens, step))


def _add_block(
    logits_TC: torch.Tensor, labels_T: torch.Tensor, statistics_NT: torch.Tensor, options: LossOptions, first_word: int
) -> None:
    statistic_T = dict(zip(options.rows, statistics_NT.unbind(), strict=True))
    values_TC = _cap_(logits_TC.to(torch.float32, copy=True), options)
    column_T1, is_here_T1 = _columns(labels_T, first_word, values_TC)
    statistic_T["label"] += torch.where(is_here_T1, values_TC.gather(1, column_T1), 0.0).squeeze(1)
    if "total" in statistic_T:
        statistic_T["total"] += values_TC.sum(1)
    old_T = statistic_T["maximum"].clone()
    if "arg_max" in statistic_T:
        peak_T, position_T = values_TC.max(1)  # the first of several; on a CPU several times slower than amax
        word_T = (position_T + first_word).float()
        statistic_T["arg_max"].copy_(torch.where(peak_T > old_T, word_T, statistic_T["arg_max"]))
    else:
        peak_T = values_TC.amax(1)
    new_T = torch.maximum(old_T, peak_T)
    values_TC.sub_(new_T.unsqueeze(1))
    factor_T = torch.exp(old_T - new_T)
    if "weighted" in statistic_T:
        moved_T = (statistic_T["weighted"] + statistic_T["sum"] * (old_T - new_T)) * factor_T
        statistic_T["weighted"].copy_(moved_T + (values_TC.exp() * values_TC).sum(1))
    statistic_T["sum"].mul_(factor_T).add_(values_TC.exp_().sum(1))
    statistic_T["maximum"].copy_(new_T)


def _gradient_block(
    logits_TC: torch.Tensor,
    labels_T: torch.Tensor,
    coefficients_MT: torch.Tensor,
    gradient_TC: torch.Tensor,
    options: LossOptions,
    first_word: int,
) -> None:
    coefficient_T1 = dict(zip(options.coefficients, coefficients_MT.unsqueeze(2).unbind(), strict=True))
    is_in_place = gradient_TC.data_ptr() == logits_TC.data_ptr()
    values_TC = _cap_(logits_TC.to(torch.float32, copy=not is_in_place), options)
    slope_TC = None
    if options.softcap is not None:
        slope_TC = torch.square(values_TC / options.softcap).neg_().add_(1.0)
    values_TC.sub_(coefficient_T1["maximum"])
    factor = coefficient_T1["softmax"]
    if "entropy" in coefficient_T1:
        factor = torch.addcmul(factor, coefficient_T1["entropy"], values_TC)
    values_TC.exp_().mul_(factor)
    column_T1, is_here_T1 = _columns(labels_T, first_word, values_TC)
    at_label_T1 = values_TC.gather(1, column_T1) + torch.where(is_here_T1, coefficient_T1["label"], 0.0)
    values_TC.scatter_(1, column_T1, at_label_T1)  # one place a row: nothing to order
    if "uniform" in coefficient_T1:
        values_TC.add_(coefficient_T1["uniform"])
    if slope_TC is not None:
        values_TC.mul_(slope_TC)
    if options.logit_scale != 1.0:
        values_TC.mul_(options.logit_scale)
    gradient_TC.copy_(values_TC)


def _cap_(values_TC: torch.Tensor, options: LossOptions) -> torch.Tensor:
    if options.logit_scale != 1.0:
        values_TC.mul_(options.logit_scale)
    if options.softcap is not None:
        values_TC.div_(options.softcap).tanh_().mul_(options.softcap)
    return values_TC


def _columns(labels_T: torch.Tensor, first_word: int, values_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The label's column, or some column, and whether it is the label's."""
    column_T1 = (labels_T - first_word).unsqueeze(1)
    is_here_T1 = (column_T1 >= 0) & (column_T1 < values_TC.shape[1])
    return column_T1.clamp(0, values_TC.shape[1] - 1), is_here_T1
