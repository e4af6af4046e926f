"""The loss in parts that a pipeline schedule can run as actions of their own. No part communicates.

    shard_statistics       S   hidden, weight shard, labels -> statistics_NT of this shard (12 to 24 bytes a token)
    combine_statistics         statistics of all shards -> those of the whole vocabulary; associative, in rank order
    token_outputs              whole statistics -> loss, log-probability, entropy, arg-max
    gradient_coefficients      whole statistics, upstream gradients -> coefficients_MT (12 to 20 bytes a token)
    shard_gradient         T   hidden, weight shard, coefficients -> partial input gradient, weight gradient

This is the split of vocabulary parallelism (Yeung et al., arXiv 2411.05288, algorithm 1: S, the barrier, T), with one
difference: the softmax is not kept from S to T. T multiplies each chunk of the weight anew, one GEMM more, and 4 bytes
times tokens times vocabulary less; where half of that memory is there, the logits can be kept (`empty_logits`). The
gradient of a token with respect to its logits l is, for every loss here,

    exp(l - m) (softmax + entropy (l - m)) + label [v is the label] + uniform

with four numbers of the token, the coefficients, into which upstream gradient, z-loss, smoothing, 1 / sum exp(l - m)
and whether the token counts at all are folded; so the row operation that does it knows of none of them.

`one_barrier.py` has the S pass that computes the input gradient too, before the shards have met.

With scalars of a token only, everything here is elementwise in T but the two passes, which go over the vocabulary in
chunks: GEMM into one buffer, row operation in place, GEMMs out of it. Peak memory beside the results is that buffer.

    T tokens, D hidden size, K rows of this rank's weight, C rows of one chunk, R shards, N statistics, M coefficients
    (LossOptions.rows, LossOptions.coefficients); 'row' counts in the shard, 'word' in the whole vocabulary
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..backends import Backend
from .backends import row_operations
from .gemm import has_mixed_matmul, matmul_into
from .options import LossOptions, TokenOutputs
from .rows import empty_statistics

_CHUNK_NBYTES = 96 << 20  # of the chunk's buffers; with the fp32 input gradient of 8192 x 4096 it makes 0.22 GiB
_LEAST_COLUMNS = 2048  # below it, adding to the fp32 input gradient costs more time than the GEMM that it belongs to
_ALIGNMENT = 128  # of a chunk's width in elements, for the GEMM


def chunk_columns(num_tokens: int, num_rows: int, element_nbytes: int) -> int:
    """How many weight rows a chunk takes: 96 MiB of logits, but at least 2048, and always less than a quarter of all.

    `element_nbytes` counts every buffer of the chunk. The chunks are of equal width where alignment lets them.
    """
    width = max(_CHUNK_NBYTES // (max(num_tokens, 1) * element_nbytes), _LEAST_COLUMNS)
    width = max(1, min(width, (num_rows - 1) // 4))
    for alignment in (_ALIGNMENT, 8):
        if width >= alignment:
            most = width // alignment * alignment
            even = -(-num_rows // -(-num_rows // most))
            return -(-even // alignment) * alignment
    return width


def shard_statistics(
    hidden_TD: torch.Tensor,
    weight_KD: torch.Tensor,
    labels_T: torch.Tensor,
    options: LossOptions,
    *,
    first_word: int = 0,
    logits_TK: torch.Tensor | None = None,
    backend: Backend | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Statistics_NT, fp32, of the logits of one shard, whose row 0 is the word `first_word`. One GEMM over the shard.

    `logits_TK` (`empty_logits`) takes the logits, for `shard_gradient`; `chunk` is the number of weight rows at a time
    (None: `chunk_columns`). Not differentiable; issues no collective.
    """
    operations = row_operations(backend, hidden_TD.device)
    statistics_NT = empty_statistics(len(labels_T), options, hidden_TD.device)
    num_valid = options.num_valid(first_word, len(weight_KD))
    with torch.no_grad(), without_autocast(hidden_TD.device):
        parts = chunks(hidden_TD, weight_KD, num_valid, options, chunk, for_gradient=False, kept_TK=logits_TK)
        for rows, logits_TC, _ in parts:
            matmul_into(logits_TC, *operands_for(hidden_TD, weight_KD[rows].T, logits_TC), accumulate=False)
            operations.add_statistics_(logits_TC, labels_T, statistics_NT, options, first_word + rows.start)
    return statistics_NT


def combine_statistics(statistics_RNT: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """Statistics_NT of the union of R shards in the order given. Every rank that has the same gets the same bits."""
    shard_RT = dict(zip(options.rows, statistics_RNT.unbind(1), strict=True))
    with torch.no_grad():
        # The first of several maxima, so that arg-max is the lowest word.
        maximum_T, position_T = shard_RT["maximum"].max(0)
        shift_RT = shard_RT["maximum"] - maximum_T
        factor_RT = shift_RT.exp()
        combined = {
            "maximum": maximum_T,
            "sum": (shard_RT["sum"] * factor_RT).sum(0),
            "label": shard_RT["label"].sum(0),
        }
        if "total" in shard_RT:
            combined["total"] = shard_RT["total"].sum(0)
        if "weighted" in shard_RT:
            combined["weighted"] = ((shard_RT["weighted"] + shard_RT["sum"] * shift_RT) * factor_RT).sum(0)
        if "arg_max" in shard_RT:
            combined["arg_max"] = shard_RT["arg_max"].gather(0, position_T.unsqueeze(0)).squeeze(0)
        return torch.stack([combined[name] for name in options.rows])


def token_outputs(statistics_NT: torch.Tensor, labels_T: torch.Tensor, options: LossOptions) -> TokenOutputs:
    """The outputs [T] from the statistics of the whole vocabulary; not differentiable.

    A token whose label is neither a word nor `ignore_index` has NaN for loss, log-probability and entropy.
    """
    statistic_T = dict(zip(options.rows, statistics_NT.unbind(), strict=True))
    smoothing = options.label_smoothing
    with torch.no_grad():
        # Differences of logits first: their logarithm of the sum is small, and so is its rounding.
        maximum_T, log_sum_T = statistic_T["maximum"], statistic_T["sum"].log()
        log_probability_T = (statistic_T["label"] - maximum_T) - log_sum_T
        loss_T = (smoothing - 1.0) * log_probability_T
        if smoothing:
            loss_T += smoothing * (log_sum_T + (maximum_T - statistic_T["total"] / options.vocab_size))
        if options.z_loss:
            loss_T += options.z_loss * (maximum_T + log_sum_T).square()
        entropy_T = arg_max_T = None
        if "weighted" in statistic_T:
            entropy_T = _counted(log_sum_T - statistic_T["weighted"] / statistic_T["sum"], labels_T, options)
        if "arg_max" in statistic_T:
            arg_max_T = statistic_T["arg_max"].long()
        return TokenOutputs(
            loss=_counted(loss_T, labels_T, options),
            log_probability=_counted(log_probability_T, labels_T, options),
            entropy=entropy_T,
            arg_max=arg_max_T,
        )


def gradient_coefficients(
    statistics_NT: torch.Tensor,
    labels_T: torch.Tensor,
    options: LossOptions,
    *,
    loss_gradient_T: torch.Tensor | None,
    log_probability_gradient_T: torch.Tensor | None = None,
    entropy_gradient_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Coefficients_MT, fp32, from the statistics of the whole vocabulary and the outputs' gradients (None: zero).

    Ignored tokens get zeros, tokens with a label outside the vocabulary NaN.
    """
    statistic_T = dict(zip(options.rows, statistics_NT.unbind(), strict=True))
    with torch.no_grad():
        zero_T = torch.zeros_like(statistic_T["sum"])
        loss_T = zero_T if loss_gradient_T is None else loss_gradient_T.float()
        log_probability_T = zero_T if log_probability_gradient_T is None else log_probability_gradient_T.float()
        entropy_T = zero_T if entropy_gradient_T is None else entropy_gradient_T.float()

        softmax_T = loss_T - log_probability_T
        if options.z_loss:
            log_normaliser_T = statistic_T["maximum"] + statistic_T["sum"].log()
            softmax_T = softmax_T + 2.0 * options.z_loss * log_normaliser_T * loss_T
        if options.entropy:
            softmax_T = softmax_T + entropy_T * (statistic_T["weighted"] / statistic_T["sum"])
        found = {
            "softmax": softmax_T / statistic_T["sum"],
            "label": log_probability_T - (1.0 - options.label_smoothing) * loss_T,
            "uniform": loss_T * (-options.label_smoothing / options.vocab_size),
            "entropy": -entropy_T / statistic_T["sum"],
        }
        counted = [_counted(found[name], labels_T, options) for name in options.coefficients if name != "maximum"]
        return torch.stack([statistic_T["maximum"], *counted])


def shard_gradient(
    hidden_TD: torch.Tensor,
    weight_KD: torch.Tensor,
    labels_T: torch.Tensor,
    coefficients_MT: torch.Tensor,
    options: LossOptions,
    *,
    first_word: int = 0,
    logits_TK: torch.Tensor | None = None,
    needs_input_gradient: bool = True,
    weight_gradient_KD: torch.Tensor | None = None,
    accumulate: bool = False,
    backend: Backend | None = None,
    chunk: int | None = None,
) -> torch.Tensor | None:
    """This shard's part of the input gradient [T, D] in fp32 (None unless needed), to be summed over the shards.

    The weight gradient is written to `weight_gradient_KD`, or with `accumulate` added to it, unless that is None.
    Padding rows are written as zeros, or left as they are. One GEMM for the logits and one for each gradient; issues
    no collective. `logits_TK` holds the logits where the forward pass has kept them, and is overwritten: no GEMM then.
    """
    operations = row_operations(backend, hidden_TD.device)
    num_valid = options.num_valid(first_word, len(weight_KD))
    input_gradient_TD = None
    if needs_input_gradient:
        new = torch.empty if num_valid else torch.zeros  # the first chunk writes, the others add
        input_gradient_TD = new(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
    with torch.no_grad(), without_autocast(hidden_TD.device):
        if weight_gradient_KD is not None and not accumulate:
            weight_gradient_KD[num_valid:].zero_()
        parts = chunks(hidden_TD, weight_KD, num_valid, options, chunk, for_gradient=True, kept_TK=logits_TK)
        for rows, logits_TC, gradient_TC in parts:
            weight_CD = weight_KD[rows]
            if logits_TK is None:
                matmul_into(logits_TC, *operands_for(hidden_TD, weight_CD.T, logits_TC), accumulate=False)
            first = first_word + rows.start
            operations.replace_by_gradient_(logits_TC, labels_T, coefficients_MT, gradient_TC, options, first)
            if input_gradient_TD is not None:
                matmul_into(input_gradient_TD, gradient_TC, weight_CD, accumulate=rows.start > 0)
            if weight_gradient_KD is not None:
                matmul_into(weight_gradient_KD[rows], gradient_TC.T, hidden_TD, accumulate=accumulate)
    return input_gradient_TD


def empty_logits(hidden_TD: torch.Tensor, weight_KD: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """Room for all logits [T, K] of a shard, for those who keep them from S to T: one GEMM of four less."""
    columns = -(-len(weight_KD) // _ALIGNMENT) * _ALIGNMENT  # rows stay aligned, as in a chunk's buffer
    dtype = torch.float32 if options.fp32_logits else hidden_TD.dtype
    return torch.empty(len(hidden_TD), columns, dtype=dtype, device=hidden_TD.device)[:, : len(weight_KD)]


def chunks(
    hidden_TD: torch.Tensor,
    weight_KD: torch.Tensor,
    num_valid: int,
    options: LossOptions,
    chunk: int | None,
    *,
    for_gradient: bool,
    kept_TK: torch.Tensor | None = None,
    overwrites: bool = True,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """The rows of each chunk, the buffer for its logits and that for their gradient: one object, if dtypes allow.

    The logits lie in `kept_TK` where that is given; they may be overwritten by their gradient if `overwrites`.
    """
    dtype = torch.float32 if options.fp32_logits else hidden_TD.dtype
    dtypes = [dtype] if kept_TK is None else []
    if for_gradient and (dtype != hidden_TD.dtype or not overwrites):
        dtypes.append(hidden_TD.dtype)
    num_tokens = len(hidden_TD)
    width = chunk or chunk_columns(num_tokens, len(weight_KD), sum(each.itemsize for each in dtypes or [dtype]))
    buffers = [torch.empty(num_tokens, min(width, num_valid), dtype=each, device=hidden_TD.device) for each in dtypes]
    for start in range(0, num_valid, width):
        rows = slice(start, min(start + width, num_valid))
        # Narrow the buffer, so that rows stay aligned where the last chunk's width is odd.
        narrowed = [buffer[:, : rows.stop - start] for buffer in buffers]
        if kept_TK is not None:
            narrowed.insert(0, kept_TK[:, rows])
        yield rows, narrowed[0], narrowed[-1]


def operands_for(
    hidden_TD: torch.Tensor, weight_DC: torch.Tensor, logits_TC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Widened where the logits are to be fp32 and no GEMM of this device does that itself: rounded logits cannot."""
    if logits_TC.dtype == hidden_TD.dtype or has_mixed_matmul(hidden_TD.device):
        return hidden_TD, weight_DC
    return hidden_TD.float(), weight_DC.float()


def _counted(values_T: torch.Tensor, labels_T: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """The values, but 0 for ignored tokens and NaN for labels outside the vocabulary."""
    is_word_T = (labels_T >= 0) & (labels_T < options.vocab_size)
    counted_T = torch.where(is_word_T, values_T, float("nan"))
    return counted_T if options.ignore_index is None else torch.where(labels_T == options.ignore_index, 0.0, counted_T)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Autocast would turn fp32 operands into 16 bits behind `out=`; the operands' own dtype is what is asked for."""
    if device.type in ("cpu", "cuda"):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
