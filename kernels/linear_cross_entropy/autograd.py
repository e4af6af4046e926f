"""The loss as one differentiable operation over a tensor-parallel group.

    forward    sequence parallel: all-gather of the hidden states            1
               S pass over this rank's shard
               all-gather of the statistics, 12 to 24 bytes a token          1
    backward   sequence parallel: all-gather of the hidden states            1
               T pass over this rank's shard
               sum of the input gradient: all-reduce, or reduce-scatter      1

on `group`, none with one rank. What is kept from forward to backward are the hidden states (this rank's part of them),
the labels and the statistics. The input gradient is summed over chunks in fp32 and over ranks in its own dtype, as
Megatron-Core's linear layer does.

    S sequence (this rank's part of it with sequence parallelism), B batch, D hidden size, K weight rows, T = S B tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..backends import Backend
from .collectives import gather_first, scatter_sum_first, stack_ranks, sum_
from .options import LossOptions
from .passes import combine_statistics, gradient_coefficients, shard_gradient, shard_statistics, token_outputs


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where this rank's shard lies and how it is run; the rest of the op's arguments, checked."""

    options: LossOptions
    first_word: int
    group: dist.ProcessGroup | None
    sequence_parallel: bool
    into_main_grad: bool
    backend: Backend | None
    chunk: int | None

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """The group over which the sequence is cut."""
        return self.group if self.sequence_parallel else None


class LinearCrossEntropy(torch.autograd.Function):
    """hidden [S, ..., D], weight [K, D], labels [whole sequence, ...] -> the four of `TokenOutputs`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """S pass, combination and outputs."""
        options = layout.options
        labels_T = labels.reshape(-1)
        statistics_NT = shard_statistics(
            gather_first(hidden, layout.sequence_group).reshape(-1, hidden.shape[-1]), weight, labels_T, options,
            first_word=layout.first_word, backend=layout.backend, chunk=layout.chunk,
        )  # fmt: skip
        statistics_NT = combine_statistics(stack_ranks(statistics_NT, layout.group), options)
        outputs = token_outputs(statistics_NT, labels_T, options)

        ctx.save_for_backward(hidden, weight, labels, statistics_NT)
        ctx.parameter = weight  # saved tensors may come back through hooks, without the attributes that DDP reads
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        shaped = [None if output is None else output.view(labels.shape) for output in outputs]
        if shaped[3] is not None:
            ctx.mark_non_differentiable(shaped[3])
        return tuple(shaped)  # type: ignore[return-value]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Coefficients, T pass, and the sum over ranks."""
        hidden, weight, labels, statistics_NT = ctx.saved_tensors
        layout: Layout = ctx.layout
        labels_T = labels.reshape(-1)
        loss_gradient, log_probability_gradient, entropy_gradient = (
            None if gradient is None else gradient.reshape(-1) for gradient in gradients[:3]
        )
        coefficients_MT = gradient_coefficients(
            statistics_NT, labels_T, layout.options, loss_gradient_T=loss_gradient,
            log_probability_gradient_T=log_probability_gradient, entropy_gradient_T=entropy_gradient,
        )  # fmt: skip
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        into_main_grad = needs_weight and layout.into_main_grad
        weight_gradient = None
        if needs_weight:
            weight_gradient = ctx.parameter.main_grad if into_main_grad else torch.empty_like(weight)
        whole = gather_first(hidden, layout.sequence_group)
        input_gradient_TD = shard_gradient(
            whole.reshape(-1, hidden.shape[-1]), weight, labels_T, coefficients_MT, layout.options,
            first_word=layout.first_word, needs_input_gradient=needs_hidden,
            weight_gradient_KD=weight_gradient, accumulate=into_main_grad,
            backend=layout.backend, chunk=layout.chunk,
        )  # fmt: skip
        input_gradient = None
        if input_gradient_TD is not None:
            input_gradient = input_gradient_TD.to(hidden.dtype).view(whole.shape)
            del input_gradient_TD
            if layout.sequence_parallel:
                input_gradient = scatter_sum_first(input_gradient, layout.group)
            else:
                sum_(input_gradient, layout.group)
        if into_main_grad:
            weight_gradient = mark_added(ctx.parameter)
        return input_gradient, weight_gradient, None, None


def mark_added(parameter: Any) -> torch.Tensor | None:
    """Tell Megatron's data parallelism that `main_grad` has been added to; what autograd is given for the parameter.

    Its hook on the parameter wants a gradient to arrive, and throws it away, unless `zero_out_wgrad` says that another
    use of the weight (a tied embedding) adds to it: then it has to be zero. Megatron-Core's own linear layer allocates
    a gradient as large as the weight for this. A sparse one without entries is zero, may be added to anything, arrives
    like any other, and is no memory.
    """
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    nowhere = torch.empty(1, 0, dtype=torch.int64, device=parameter.device)
    nothing = torch.empty(0, *parameter.shape[1:], dtype=parameter.dtype, device=parameter.device)
    return torch.sparse_coo_tensor(nowhere, nothing, parameter.shape, check_invariants=False, is_coalesced=True)
