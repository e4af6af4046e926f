"""Linear layer and cross entropy in one, without the logits: [tokens, vocabulary] is never in memory.

    from megamem.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy

    loss = linear_cross_entropy(hidden, weight, labels, LossOptions(vocab_size=128256)).loss

`reference` is the definition, `passes` and `one_barrier` the algorithm and its parts, `rows` and `triton` the two row
operations, `autograd` the differentiable whole with its collectives, `checks` what is refused.

Algorithm. The vocabulary is cut into chunks. Forward multiplies each chunk by the hidden states and keeps running
softmax statistics; backward multiplies it again, turns logits into their gradient in place, and multiplies that into
both gradients. GEMMs are those of the libraries torch uses. One GEMM of four is a recomputation; in exchange, memory
does not grow with the vocabulary, and several fp32 passes over all logits are gone. Cut Cross-Entropy (Wijmans et al.,
arXiv 2411.09009) does the same inside one kernel, with locks and a cut-off for small gradients; this has neither, so
two runs give the same bits.

Known weaknesses. The sum of the input gradient over ranks does not overlap with the weight gradient's GEMMs. Masked
tokens cost as much as others. A second derivative is not offered.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..backends import Backend, default_backend
from .autograd import Layout, LinearCrossEntropy
from .checks import check_labels, check_once, check_operands, check_shards
from .one_barrier import check_one_barrier, shard_input_gradient, shard_statistics_and_numerator
from .options import LossOptions, TokenOutputs
from .passes import (
    chunk_columns,
    combine_statistics,
    empty_logits,
    gradient_coefficients,
    shard_gradient,
    shard_statistics,
    token_outputs,
)
from .reference import linear_cross_entropy_reference
from .rows import empty_statistics

__all__ = [
    "Backend",
    "LossOptions",
    "TokenOutputs",
    "check_labels",
    "check_one_barrier",
    "check_operands",
    "check_shards",
    "chunk_columns",
    "combine_statistics",
    "default_backend",
    "empty_logits",
    "empty_statistics",
    "gradient_coefficients",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "shard_gradient",
    "shard_input_gradient",
    "shard_statistics",
    "shard_statistics_and_numerator",
    "token_outputs",
]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    options: LossOptions,
    *,
    group: dist.ProcessGroup | None = None,
    first_word: int | None = None,
    sequence_parallel: bool = False,
    into_main_grad: bool = False,
    backend: Backend | None = None,
    chunk: int | None = None,
) -> TokenOutputs:
    """Per-token outputs (`TokenOutputs`, fp32, shaped like `labels`) of `hidden @ weight.T`, differentiable.

    * `hidden`: [..., D] in bf16, fp16 or fp32; with `sequence_parallel`, this rank's part along the first dimension.
    * `weight`: [rows, D], same dtype: this rank's rows of the vocabulary, with padding at the end of the last shards.
    * `labels`: [...], int64 or int32, of all tokens, the same on all ranks of `group`.
    * `options`: which loss, and the size of the vocabulary (`LossOptions`).
    * `group`: the ranks over which the vocabulary is cut, in rank order; None: this rank has all of it.
    * `first_word`: the word of weight row 0; None: shards of equal size.
    * `into_main_grad`: add the weight gradient to `weight.main_grad` (fp32, or 16 bits) and set
      `weight.grad_added_to_main_grad`, as Megatron-Core's gradient accumulation fusion does; `weight.grad` is then
      meaningless. Otherwise autograd gets the gradient.
    * `backend`: "torch" or "triton" for the row operations; None: `default_backend`.
    * `chunk`: weight rows at a time; None: `chunk_columns`.

    Computes in the dtype of its operands, also under autocast. Waits for the device in no call but the first for a
    weight, where labels and shards are checked; from then on a label outside the vocabulary gives NaN for its token.

    Raises TypeError and ValueError for operands it does not take, for labels outside the vocabulary and for shards
    that do not match, ImportError for a backend that is not installed.
    """
    num_ranks = 1 if group is None else group.size()
    check_operands(hidden, weight, labels, sequence_shards=num_ranks if sequence_parallel else 1)
    if first_word is None:
        first_word = 0 if group is None else group.rank() * len(weight)
    if num_ranks == 1 and options.vocab_size > len(weight):
        raise ValueError(
            f"vocab_size is {options.vocab_size}, but the weight has {len(weight)} rows; pass the group of the other "
            "shards, or the weight's own size"
        )
    if into_main_grad and weight.requires_grad and getattr(weight, "main_grad", None) is None:
        raise ValueError(
            "into_main_grad=True needs weight.main_grad, which Megatron-Core's DistributedDataParallel makes; "
            "wrap the model first, or pass into_main_grad=False"
        )
    check_once(weight, labels, options, first_word, group)
    layout = Layout(
        options=options, first_word=first_word, group=group, sequence_parallel=sequence_parallel,
        into_main_grad=into_main_grad, backend=backend, chunk=chunk,
    )  # fmt: skip
    return TokenOutputs(*LinearCrossEntropy.apply(hidden, weight, labels, layout))  # type: ignore[no-untyped-call]
