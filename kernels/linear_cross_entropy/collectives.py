"""The four collectives of the op, under the names that this release of torch has."""

from __future__ import annotations

import torch
import torch.distributed as dist

# torch 2.13 renamed these two and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_first(part: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The ranks' parts in rank order along the first dimension. One all-gather; with one rank, the part itself."""
    if group is None or group.size() == 1:
        return part
    whole = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    _all_gather(whole, part.contiguous(), group=group)
    return whole


def stack_ranks(part: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The ranks' parts along a new first dimension. One all-gather."""
    return gather_first(part.unsqueeze(0), group)


def scatter_sum_first(whole: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """This rank's part, along the first dimension, of the sum over ranks. One reduce-scatter."""
    if group is None or group.size() == 1:
        return whole
    part = whole.new_empty(whole.shape[0] // group.size(), *whole.shape[1:])
    _reduce_scatter(part, whole, group=group)
    return part


def sum_(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum over ranks, in place. One all-reduce."""
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor
