"""The parts of the loss for schedules with one barrier, which have the input gradient before the shards have met.

    shard_statistics_and_numerator   S   hidden, weight shard, labels -> statistics_NT, numerator_TD
    combine_statistics, gradient_coefficients    the barrier (`passes`)
    shard_input_gradient                 numerator_TD, coefficients -> this shard's part of the input gradient
    shard_gradient, without the input gradient   T   -> weight gradient (`passes`)

Vocabulary parallelism (Yeung et al., arXiv 2411.05288, algorithm 2) observes that the softmax of the whole vocabulary
is that of a shard times a number of the token, so that the product with the weight can be scaled after the fact. Here
the product is kept without the shard's sum too,

    numerator = sum over v of exp(l_v - m) dl_v/dz_v W_v,     m the shard's maximum

and is rescaled where a later chunk raises m, as attention kernels do with their output: S multiplies the logits once.
It costs an fp32 [T, D] from S to the barrier. The label's row of the weight is added after the barrier, by a gather.

Not offered, because their terms are no multiples of the softmax: a gradient of the entropy, and label smoothing
together with a softcap (its uniform part would need a second product).

    T tokens, D hidden size, K rows of this rank's weight, C rows of one chunk, N statistics, M coefficients
"""

from __future__ import annotations

import dataclasses

import torch

from ..backends import Backend
from .backends import row_operations
from .gemm import matmul_into
from .options import LossOptions
from .passes import chunks, operands_for, without_autocast
from .rows import empty_statistics


def check_one_barrier(options: LossOptions) -> None:
    """Raises ValueError, naming the options, for a loss whose gradient cannot be scaled after the fact."""
    if options.entropy:
        raise ValueError(
            "entropy=True needs the schedule with two barriers: its gradient is no multiple of the softmax"
        )
    if options.label_smoothing and options.softcap is not None:
        raise ValueError(
            f"label_smoothing={options.label_smoothing} together with softcap={options.softcap} needs the schedule "
            "with two barriers; with one, take either without the other"
        )


def shard_statistics_and_numerator(
    hidden_TD: torch.Tensor,
    weight_KD: torch.Tensor,
    labels_T: torch.Tensor,
    options: LossOptions,
    *,
    first_word: int = 0,
    logits_TK: torch.Tensor | None = None,
    backend: Backend | None = None,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`passes.shard_statistics` and the numerator [T, D] in fp32. Two GEMMs over the shard; issues no collective.

    Raises ValueError where `check_one_barrier` does.
    """
    check_one_barrier(options)
    operations = row_operations(backend, hidden_TD.device)
    plain = dataclasses.replace(options, label_smoothing=0.0, arg_max=False)  # three coefficients
    statistics_NT = empty_statistics(len(labels_T), options, hidden_TD.device)
    num_valid = options.num_valid(first_word, len(weight_KD))
    with torch.no_grad(), without_autocast(hidden_TD.device):
        new = torch.empty if num_valid else torch.zeros
        numerator_TD = new(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
        coefficients_MT = torch.zeros(3, len(labels_T), dtype=torch.float32, device=hidden_TD.device)
        maximum_T, softmax_T, _ = coefficients_MT
        softmax_T.fill_(1.0)
        parts = chunks(
            hidden_TD, weight_KD, num_valid, options, chunk,
            for_gradient=True, kept_TK=logits_TK, overwrites=logits_TK is None,
        )  # fmt: skip
        for rows, logits_TC, power_TC in parts:
            first = first_word + rows.start
            matmul_into(logits_TC, *operands_for(hidden_TD, weight_KD[rows].T, logits_TC), accumulate=False)
            operations.add_statistics_(logits_TC, labels_T, statistics_NT, options, first)
            if rows.start:
                numerator_TD.mul_(torch.exp(maximum_T - statistics_NT[0]).unsqueeze(1))
            maximum_T.copy_(statistics_NT[0])
            operations.replace_by_gradient_(logits_TC, labels_T, coefficients_MT, power_TC, plain, first)
            matmul_into(numerator_TD, power_TC, weight_KD[rows], accumulate=rows.start > 0)
    return statistics_NT, numerator_TD


def shard_input_gradient(
    numerator_TD: torch.Tensor,
    statistics_NT: torch.Tensor,
    coefficients_MT: torch.Tensor,
    weight_KD: torch.Tensor,
    labels_T: torch.Tensor,
    options: LossOptions,
    *,
    first_word: int = 0,
) -> torch.Tensor:
    """This shard's part of the input gradient [T, D] in fp32, made of its numerator in place.

    `statistics_NT` are the shard's own, from S; `coefficients_MT` those of the whole vocabulary.
    """
    coefficient_T = dict(zip(options.coefficients, coefficients_MT.unbind(), strict=True))
    num_valid = options.num_valid(first_word, len(weight_KD))
    with torch.no_grad():
        factor_T = coefficient_T["softmax"] * torch.exp(statistics_NT[0] - coefficient_T["maximum"])
        numerator_TD.mul_(factor_T.unsqueeze(1))
        if num_valid == 0:
            return numerator_TD
        row_T = labels_T - first_word
        is_here_T = (row_T >= 0) & (row_T < num_valid)
        slope_T = torch.full_like(factor_T, options.logit_scale)
        if options.softcap is not None:
            slope_T.mul_(1.0 - torch.square(statistics_NT[2] / options.softcap))
        label_T = torch.where(is_here_T, coefficient_T["label"] * slope_T, 0.0)
        label_TD = weight_KD.index_select(0, row_T.clamp(0, num_valid - 1))
        numerator_TD.addcmul_(label_T.unsqueeze(1), label_TD)
        if "uniform" in coefficient_T:
            total_D = options.logit_scale * weight_KD[:num_valid].sum(0, dtype=torch.float32)
            numerator_TD.addcmul_(coefficient_T["uniform"].unsqueeze(1), total_D)
    return numerator_TD
