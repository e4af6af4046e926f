"""What is refused, and when: dtypes and shapes at every call; labels and shards once for every weight.

Shapes and dtypes cost nothing to look at. Labels and the other ranks' shards do: the host has to wait for the device,
and shards for a collective. So these are looked at in the first call for a weight, which is before anything has been
trained, and never again. A label that goes wrong later gives NaN for its token (`passes.token_outputs`), which reaches
the loss and every gradient, so that it cannot be trained on unnoticed.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from .collectives import stack_ranks
from .options import LossOptions

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# weight -> options and first word that it was called with before; forgets with the weight
_seen_weights: MutableMapping[torch.Tensor, set[tuple[LossOptions, int]]] = WeakIdKeyDictionary()


def check_operands(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, sequence_shards: int = 1
) -> None:
    """Raises TypeError for dtypes and ValueError for shapes and devices that the passes do not take."""
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise TypeError(
            f"hidden states are {hidden.dtype} and the weight is {weight.dtype}; both must be the same one of "
            f"{', '.join(str(dtype) for dtype in DTYPES)} (float64: linear_cross_entropy_reference)"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels are int64 or int32, not {labels.dtype}")
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden states are [..., D] and the weight is [rows, D] with the same D; "
            f"they are {list(hidden.shape)} and {list(weight.shape)}"
        )
    whole = [hidden.shape[0] * sequence_shards, *hidden.shape[1:-1]]
    if list(labels.shape) != whole:
        over = f" over {sequence_shards} sequence shards" if sequence_shards > 1 else ""
        raise ValueError(f"hidden states {list(hidden.shape)}{over} need labels {whole}, not {list(labels.shape)}")
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            f"hidden states, weight and labels are on {hidden.device}, {weight.device} and {labels.device}; "
            "they must be on one device"
        )


def check_labels(labels: torch.Tensor, options: LossOptions) -> None:
    """Raises ValueError for a label that is no word and is not to be ignored. Waits for the device."""
    is_wrong = (labels < 0) | (labels >= options.vocab_size)
    if options.ignore_index is not None:
        is_wrong &= labels != options.ignore_index
    places = is_wrong.flatten().nonzero().flatten().tolist()
    if places:
        value = int(labels.flatten()[places[0]])
        raise ValueError(
            f"{len(places)} of {labels.numel()} labels lie outside the vocabulary, the first is {value} at token "
            f"{places[0]}: words are 0 to {options.vocab_size - 1} (vocab_size) and ignore_index is "
            f"{options.ignore_index}; correct vocab_size, or give tokens that do not count the label ignore_index"
        )


def check_shards(
    weight: torch.Tensor, num_tokens: int, first_word: int, vocab_size: int, group: dist.ProcessGroup
) -> None:
    """Raises ValueError, on every rank alike, unless the ranks' shards are the vocabulary in rank order, cut into
    neighbouring pieces, for the same tokens. One all-gather of 40 bytes on `group`; waits for the device.
    """
    mine = [first_word, len(weight), weight.shape[1], num_tokens, vocab_size]
    mine_F = torch.tensor(mine, dtype=torch.int64, device=weight.device)
    shards = stack_ranks(mine_F, group).tolist()
    problems = []
    expected = 0
    for rank, (first, rows, *_) in enumerate(shards):
        if first != expected:
            problems.append(f"rank {rank}'s shard begins at word {first}, not {expected} (first_word)")
        expected = first + rows
    if expected < vocab_size:
        problems.append(f"the shards end at word {expected}, but vocab_size is {vocab_size}")
    for index, name in ((2, "hidden sizes"), (3, "numbers of tokens"), (4, "vocab_size")):
        values = [shard[index] for shard in shards]
        if len(set(values)) > 1:
            problems.append(f"the ranks' {name} differ: {values}")
    if problems:
        table = ", ".join(f"rank {rank}: {shard[0]}..{shard[0] + shard[1]}" for rank, shard in enumerate(shards))
        raise ValueError(f"the output weight's shards do not match: {'; '.join(problems)} ({table})")


def check_once(
    weight: torch.Tensor,
    labels: torch.Tensor,
    options: LossOptions,
    first_word: int,
    group: dist.ProcessGroup | None,
) -> None:
    """`check_shards` and `check_labels` in the first call for this weight with these options; after it, nothing.

    Nothing either where values cannot be read: fake and meta tensors, tracing, and while a CUDA graph is captured.
    """
    if torch.compiler.is_compiling():
        return
    seen = _seen_weights.setdefault(weight, set())
    if (options, first_word) in seen or not _is_readable(labels):
        return
    if group is not None and group.size() > 1:
        check_shards(weight, labels.numel(), first_word, options.vocab_size, group)
    check_labels(labels, options)
    seen.add((options, first_word))


def _is_readable(labels: torch.Tensor) -> bool:
    if labels.is_meta or type(labels) is not torch.Tensor:
        return False
    return not (labels.is_cuda and torch.cuda.is_current_stream_capturing())
