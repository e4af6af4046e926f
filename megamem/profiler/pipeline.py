"""What a pipeline stage costs, measured: times of F, B and W, and the bytes that autograd holds in between.

    measure(stage, repetitions=10)     -> StageCost, in milliseconds and bytes
    workload(first, middle, last, n)   -> Workload, of a model with n layers

A stage is anything with `forward`, `backward` and `weight` (`MeasuredStage`); which trainer's modules are behind it is
for `megamem.integrations`. The activation is counted by its storages, each once, as autograd's saved-tensor hooks see
them: the same number on every device and for every allocator. Times are medians; on CUDA between events, with the
device idle before each pass, so that a pass's launches count only where they are slower than its kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from megamem.ir.workload import StageCost, Workload

WARM_UP = 2


class MeasuredStage(Protocol):
    """One pipeline stage with a microbatch of its own."""

    def forward(self) -> Tensor:
        """Run the forward pass of a microbatch; its output."""

    def backward(self, output: Tensor) -> None:
        """Compute the gradient of the stage's input, and leave those of the weights to `weight`."""

    def weight(self) -> None:
        """Compute the gradients of the weights."""

    def parameters(self) -> Iterable[Tensor]:
        """What is there anyway, and is no activation."""

    def waiting(self) -> list[Tensor]:
        """What is kept between `backward` and `weight`."""


def measure(
    stage: MeasuredStage, *, repetitions: int = 10, progress: Callable[[int], None] = lambda done: None
) -> StageCost:
    """Time and weigh a stage: milliseconds and bytes of one microbatch. `progress` hears of every repetition."""
    device = next(iter(stage.parameters())).device
    times: list[tuple[float, float, float]] = []
    for repetition in range(WARM_UP + repetitions):
        forward, output = _timed(stage.forward, device)
        backward, _ = _timed(partial(stage.backward, output), device)
        del output
        weight, _ = _timed(stage.weight, device)
        times.append((forward, backward, weight))
        progress(repetition + 1)
    medians = [statistics.median(column) for column in zip(*times[WARM_UP:], strict=True)]
    activation, weight_grad = _weigh(stage)
    return StageCost(
        forward=medians[0],
        backward=medians[1],
        weight=medians[2],
        activation=float(activation),
        weight_grad=float(min(weight_grad, activation)),
    )


def workload(first: StageCost, middle: StageCost, last: StageCost, num_layers: int, comm: float = 0.0) -> Workload:
    """A model from three stages of one layer each: with the embedding, the layer alone, with output layer and loss."""
    return Workload(layers=(middle,) * num_layers, first=_beyond(first, middle), last=_beyond(last, middle), comm=comm)


def _beyond(whole: StageCost, part: StageCost) -> StageCost:
    """What `whole` costs more than `part`; differences below the noise of the measurement are nothing."""
    rest = {
        name: max(0.0, getattr(whole, name) - getattr(part, name))
        for name in ("forward", "backward", "weight", "activation", "weight_grad")
    }
    return StageCost(**{**rest, "weight_grad": min(rest["weight_grad"], rest["activation"])})


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Milliseconds and result of a call."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = call()
        return 1e3 * (time.perf_counter() - start), result
    torch.cuda.synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    result = call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), result


def _weigh(stage: MeasuredStage) -> tuple[int, int]:
    """Bytes held after the forward pass, and of these between `backward` and `weight`."""
    own = {tensor.untyped_storage().data_ptr() for tensor in stage.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = stage.forward()
    stage.backward(output)
    kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in stage.waiting()}
    stage.weight()
    return sum(saved.values()), sum(kept.values())
