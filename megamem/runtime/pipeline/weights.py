"""The weight gradients that B leaves behind, until W computes them (arXiv 2401.10241, section 2).

B puts one task per linear layer on the queue, in the order in which the backward pass comes to the layers; W takes
those of its chunk and microbatch, all at once or in parts. A task computes one gradient and nothing else.

**The door.** The gradient enters its parameter the way autograd's own do: a task is run by an autograd node whose only
output edge is the parameter's `AccumulateGrad`. So it is accumulated by the same code (and stolen, not copied, where it
is the first), every hook on the parameter runs, once per microbatch and on the same thread, and Megatron's DDP, with
its main_grad and its overlapped reduction, need not know. That also makes the sums bitwise those of an unsplit
backward pass, as long as W comes in the order of microbatches.

A parameter that is used several times in a chunk has several tasks; their gradients are added up in the order of the
backward pass, as autograd does, and go through the door together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Gradient = Callable[[], Tensor | None]
"""Computes a weight gradient; None where it was added to the parameter's own accumulator already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightTask:
    """A weight gradient to compute: for which parameter, how, and what is kept for it meanwhile."""

    parameter: Parameter
    gradient: Gradient
    kept: tuple[Tensor, ...]


class WeightQueue:
    """The tasks of all chunks and microbatches of a rank.

    `collect` opens the list of a chunk and microbatch while its F and its B run; a linear layer puts its task there.
    """

    def __init__(self) -> None:
        self._tasks: dict[tuple[int, int], list[WeightTask]] = {}
        self._sizes: dict[tuple[int, int], int] = {}  # tasks at the first part, which the parts divide
        self.current: list[WeightTask] | None = None
        self.split: set[int] = set()  # id of every parameter that ever had a task

    def collect(self, chunk: int, microbatch: int) -> None:
        """Linear layers that run from now on keep their weight gradients for W of this microbatch."""
        self.current = self._tasks.setdefault((chunk, microbatch), [])

    def stop(self) -> None:
        """Linear layers that run from now on compute all gradients at once, as autograd does."""
        self.current = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While the block runs, as after `stop`."""
        before, self.current = self.current, None
        try:
            yield
        finally:
            self.current = before

    def put(self, tasks: list[WeightTask], task: WeightTask) -> None:
        """Add a task to the list that was current when the layer ran forward."""
        tasks.append(task)
        self.split.add(id(task.parameter))

    def run(self, chunk: int, microbatch: int, part: int = 0, parts: int = 1) -> None:
        """Compute the weight gradients of a microbatch, or one of `parts` of them, layer by layer."""
        key = chunk, microbatch
        if part == 0:
            collected = self._tasks.get(key, [])
            self._tasks[key] = _grouped(collected)
            self._sizes[key] = len(self._tasks[key])
            collected.clear()  # layers still refer to it, and so would keep what the tasks keep
        size = self._sizes[key]
        count = size * (part + 1) // parts - size * part // parts
        now, self._tasks[key] = self._tasks[key][:count], self._tasks[key][count:]
        if part == parts - 1:
            del self._tasks[key], self._sizes[key]
        run_tasks(now)

    def clear(self) -> None:
        """Forget everything that a step left behind that failed."""
        for tasks in self._tasks.values():
            tasks.clear()
        self._tasks.clear()
        self._sizes.clear()
        self.current = None

    @property
    def waiting(self) -> list[tuple[int, int]]:
        """Chunks and microbatches whose weight gradients are not, or not all, computed yet."""
        return [key for key, tasks in self._tasks.items() if tasks]

    @property
    def held(self) -> list[Tensor]:
        """What is kept for the tasks, for accounting."""
        return [tensor for tasks in self._tasks.values() for task in tasks for tensor in task.kept]


def run_tasks(tasks: list[WeightTask]) -> None:
    """Run tasks in order, each followed by its parameter's accumulation; empties the list."""
    # One call of the engine for all. It runs the node made last first, and accumulates before it goes on.
    roots = [_Door.apply(task.parameter, task.gradient) for task in reversed(tasks)]  # type: ignore[no-untyped-call]
    tasks.clear()
    if roots:
        torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])


def _grouped(tasks: Iterable[WeightTask]) -> list[WeightTask]:
    """One task per parameter, in the order in which the backward pass first came to each."""
    by_parameter: dict[int, list[WeightTask]] = {}
    for task in tasks:
        by_parameter.setdefault(id(task.parameter), []).append(task)
    return [group[0] if len(group) == 1 else _sum(group) for group in by_parameter.values()]


def _sum(group: list[WeightTask]) -> WeightTask:
    def gradient() -> Tensor | None:
        total: Tensor | None = None
        for task in group:
            one = task.gradient()
            total = one if total is None else total if one is None else total + one
        return total

    kept = tuple(tensor for task in group for tensor in task.kept)
    return WeightTask(parameter=group[0].parameter, gradient=gradient, kept=kept)


class _Door(torch.autograd.Function):
    """A scalar whose backward pass computes a weight gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, gradient: Gradient) -> Tensor:
        ctx.gradient = gradient
        return parameter.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Any) -> tuple[Tensor | None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient(), None
