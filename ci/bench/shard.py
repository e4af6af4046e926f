"""One rank of a tensor-parallel group with sequence parallelism, without the group: the stand-in for MEMO's TP 8.

    rank's residual stream      [s/t, b, h]
    all-gather                  replaced by repeating this rank's tokens t times: [s, b, h], same shape and bytes
    reduce-scatter              replaced by summing the t blocks of tokens: [s/t, b, h], same bytes

Each replacement is the other's exact derivative, so gradients are well defined and parity tests work. As in Megatron's
`LinearWithGradAccumulationAndAsyncCommunication`, a column-parallel layer saves its input *before* gathering and
gathers again in the backward pass: same GEMMs, same saved bytes, same memory traffic on this GPU.

What is absent, and makes every contender here faster than on a real node: the time of NVLink, its waiting for the
slowest rank, and other GPUs' copies on a shared PCIe switch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megamem.integrations import compat


def _gather(shard: Tensor, shards: int) -> Tensor:
    return shard.repeat(shards, *[1] * (shard.dim() - 1))


def _scatter(full: Tensor, shards: int) -> Tensor:
    return full.unflatten(0, (shards, -1)).sum(0)


class _GatheredLinear(torch.autograd.Function):
    """Gather, then multiply; saves the shard and the weight."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, weight: Tensor, shards: int) -> Tensor:
        ctx.save_for_backward(shard, weight)
        ctx.shards = shards
        return torch.matmul(_gather(shard, shards), weight.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        shard, weight = ctx.saved_tensors
        (dy,) = gradients
        full = _gather(shard, ctx.shards)
        dx = _scatter(dy.matmul(weight), ctx.shards)
        dw = dy.flatten(0, -2).t().matmul(full.flatten(0, -2))
        return dx, dw, None


class _ReduceScatter(torch.autograd.Function):
    """Sum over the blocks of tokens; saves nothing."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, shards: int) -> Tensor:
        ctx.shards = shards
        return _scatter(full, shards)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _gather(gradients[0], ctx.shards), None


class ShardColumnLinear(ColumnParallelLinear):  # type: ignore[misc]  # Megatron is untyped
    """Takes [s/t, b, h], returns [s, b, this rank's columns], as under sequence parallelism."""

    shards = 1

    def forward(self, input_: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        """(output, bias); bias is None where it has been added."""
        output = _GatheredLinear.apply(input_, self.weight, self.shards)
        if self.bias is not None and not self.skip_bias_add:
            output = output + self.bias
        return output, self.bias if self.skip_bias_add else None


class ShardRowLinear(RowParallelLinear):  # type: ignore[misc]  # Megatron is untyped
    """Takes [s, b, this rank's rows], returns [s/t, b, h], as under sequence parallelism."""

    shards = 1

    def forward(self, input_: Tensor) -> Any:
        """(output, bias); bias is None where it has been added."""
        output = _ReduceScatter.apply(torch.matmul(input_, self.weight.t()), self.shards)
        if self.bias is not None and not self.skip_bias_add:
            output = output + self.bias
        return output, self.bias if self.skip_bias_add else None


def as_shard(spec: Any, shards: int) -> Any:
    """The same layer with its four linear layers replaced by those of one rank of `shards`."""
    column = type("ShardColumnLinear", (ShardColumnLinear,), {"shards": shards})
    row = type("ShardRowLinear", (ShardRowLinear,), {"shards": shards})
    spec = copy.deepcopy(spec)
    attention, mlp = map(compat.submodules, (spec.submodules.self_attention, spec.submodules.mlp))
    attention.linear_qkv, attention.linear_proj = column, row
    mlp.linear_fc1, mlp.linear_fc2 = column, row
    return spec
