"""The strongest public single-GPU recipe, written anew in plain PyTorch: attention and layer input offloaded.

What axolotl calls `selective_checkpointing: {save: [attention], offload: true}` with hidden-state offloading, and what
MEMO's alpha = 0 comes to. Nothing of megamem is used here, so that it can be compared with.

    forward    run the layer without a graph; copy its input, and what the attention operator returned, to host memory
    backward   start to bring back the layer before (one region ahead); run the layer with a graph, the attention
               operator answered from the copy; run its backward pass

The attention operator is met below autograd, by a dispatch mode: its own backward node then finds the recomputed
q, k, v and the stored output and log-sum-exp, as with PyTorch's selective activation checkpointing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

_ATTENTION = (
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
)
_LEAST_ELEMENTS = 4096  # random seeds and counters stay where they are


class AttentionTape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what attention operators return; with `answers`, returns those instead of running them."""

    def __init__(self, answers: list[Any] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answers = deque(answers) if answers is not None else None
        self.results: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _ATTENTION:
            if self.answers is not None:
                return self.answers.popleft()
            result = func(*args, **(kwargs or {}))
            self.results.append(result)
            return result
        return func(*args, **(kwargs or {}))


class Offloader:
    """Copies tensors to pinned memory and back beside the computation; buffers are kept and reused by size."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.to_host: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.to_device: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.free: dict[tuple[int, torch.dtype], list[tuple[Tensor, Any]]] = {}
        self.in_flight: deque[tuple[list[Tensor], Any]] = deque()
        self.bytes_stored = 0

    def store(self, tensors: list[Tensor]) -> Crate:
        """Start copying; device memory is let go of when the next but one layer has stored."""
        compute = torch.cuda.current_stream()
        while len(self.in_flight) > 1:
            held, done = self.in_flight.popleft()
            compute.wait_event(done)
            del held
        self.to_host.wait_stream(compute)
        buffers = []
        with torch.cuda.stream(self.to_host):
            for tensor in tensors:
                buffer = self._buffer(tensor.numel(), tensor.dtype)
                # In memory order: attention's output is a permuted view of a dense block.
                _dense(buffer, tensor).copy_(tensor, non_blocking=True)
                buffers.append(buffer)
                self.bytes_stored += tensor.nbytes
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(self.to_host)
        self.in_flight.append((tensors, done))
        return Crate(self, [(t.shape, t.stride(), t.dtype) for t in tensors], buffers, done)

    def _buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        waiting = self.free.get((numel, dtype))
        if waiting:
            buffer, read = waiting.pop()
            self.to_host.wait_event(read)
            return buffer
        return torch.empty(numel, dtype=dtype, pin_memory=True)

    def finish(self) -> None:
        """End of a step: nothing is held until the next."""
        compute = torch.cuda.current_stream()
        while self.in_flight:
            _, done = self.in_flight.popleft()
            compute.wait_event(done)


class Crate:
    """Tensors in host memory; `fetch` starts bringing them back, `take` waits for them on the compute stream."""

    def __init__(self, owner: Offloader, layouts: list[Any], buffers: list[Tensor], stored: Any) -> None:
        self.owner, self.layouts, self.buffers, self.stored = owner, layouts, buffers, stored
        self.tensors: list[Tensor] | None = None
        self.fetched: Any = None

    def fetch(self) -> None:
        """Start the copies, once."""
        if self.tensors is not None:
            return
        owner = self.owner
        self.tensors = [
            torch.empty_strided(shape, strides, dtype=dtype, device=owner.device)
            for shape, strides, dtype in self.layouts
        ]
        owner.to_device.wait_stream(torch.cuda.current_stream())
        owner.to_device.wait_event(self.stored)
        with torch.cuda.stream(owner.to_device):
            for tensor, buffer in zip(self.tensors, self.buffers, strict=True):
                tensor.copy_(_dense(buffer, tensor), non_blocking=True)
        self.fetched = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.fetched.record(owner.to_device)

    def take(self) -> list[Tensor]:
        """The tensors; their host memory may be written again once the copies are over."""
        self.fetch()
        assert self.tensors is not None
        torch.cuda.current_stream().wait_event(self.fetched)
        for buffer in self.buffers:
            self.owner.free.setdefault((buffer.numel(), buffer.dtype), []).append((buffer, self.fetched))
        self.buffers = []
        tensors, self.tensors = self.tensors, []
        return tensors


def _dense(buffer: Tensor, like: Tensor) -> Tensor:
    """The flat buffer under the shape and strides of a tensor that is dense in some order of its dimensions."""
    return buffer.as_strided(like.shape, like.stride())


class _Region(torch.autograd.Function):
    """One layer: see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run: Callable[[Tensor], Tensor], recipe: SelectiveOffload) -> Tensor:
        tape = AttentionTape()
        with torch.no_grad(), tape:
            output = run(hidden)
        flat, ctx.structure = tree_flatten(tape.results)
        ctx.run, ctx.recipe = run, recipe
        ctx.away = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.numel() >= _LEAST_ELEMENTS]
        ctx.crate = recipe.offloader.store([hidden.detach(), *(flat[i].detach() for i in ctx.away)])
        for index in ctx.away:
            flat[index] = None
        ctx.flat = flat
        ctx.position = len(recipe.crates)
        recipe.crates.append(ctx.crate)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        recipe = ctx.recipe
        if ctx.position > 0:
            recipe.crates[ctx.position - 1].fetch()
        hidden, *away = ctx.crate.take()
        for index, tensor in zip(ctx.away, away, strict=True):
            ctx.flat[index] = tensor
        answers = tree_unflatten(ctx.flat, ctx.structure)
        hidden = hidden.requires_grad_()
        with torch.enable_grad(), AttentionTape(answers):
            output = ctx.run(hidden)
        del away, answers
        ctx.flat = None
        torch.autograd.backward(output, gradients[0])
        return hidden.grad, None, None


class SelectiveOffload:
    """The recipe for a stack of layers that run one after the other and backward in reverse."""

    def __init__(self, device: torch.device) -> None:
        self.offloader = Offloader(device)
        self.crates: list[Crate] = []

    def layer(self, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Run one layer."""
        output: Tensor = _Region.apply(hidden, run, self)  # type: ignore[no-untyped-call]
        return output

    def end_step(self) -> None:
        """Forget the step."""
        self.offloader.finish()
        self.crates = []
