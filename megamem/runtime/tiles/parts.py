"""What a module that runs in tiles is made of: itself, a store for what its tiles keep, sums of gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import Module, Parameter


class AbstractTiled(ABC):
    """A module to run in tiles: a linear layer, something element-wise in tokens, and another linear layer."""

    first: Module
    last: Module

    @abstractmethod
    def __call__(self, tokens: Tensor) -> Any:
        """The module's own forward pass on some tokens [s, b, h]: the output, or a tuple that begins with it."""

    @abstractmethod
    def running(self) -> AbstractContextManager[None]:
        """Entered around every call, which may be broken off in the middle."""

    @abstractmethod
    def parameters(self) -> Sequence[Parameter]:
        """All parameters of the module."""


class AbstractTileStore(ABC):
    """Where what a tile keeps is, between the passes of one call of a module."""

    @abstractmethod
    def stored_tokens(self, tokens: int) -> int:
        """How many of the module's tokens, from the first one on, are to be stored; the others are made again."""

    @abstractmethod
    def put(self, tile: int, tensors: Sequence[Tensor]) -> bool:
        """Store what `tile` keeps. Called once for each, in order; False where there is no room."""

    @abstractmethod
    def take(self, tile: int) -> list[Tensor]:
        """What was stored, once; tiles are taken last one first."""

    def on_recomputed(self, nbytes: int) -> None:  # noqa: B027 - most need none
        """So many bytes were dropped and made again."""


class _Keep(torch.autograd.Function):
    """Saves tensors through autograd, so that whoever counts or moves what is saved sees these too."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("no gradient goes this way")


@final
class ResidentTiles(AbstractTileStore):
    """Device memory."""

    def __init__(self) -> None:
        self._nodes: dict[int, Any] = {}

    def stored_tokens(self, tokens: int) -> int:
        return tokens

    def put(self, tile: int, tensors: Sequence[Tensor]) -> bool:
        anchor = torch.empty(0, requires_grad=True)
        with torch.enable_grad():
            kept: Tensor = _Keep.apply(anchor, *(tensor.detach() for tensor in tensors))  # type: ignore[no-untyped-call]
        self._nodes[tile] = kept.grad_fn
        return True

    def take(self, tile: int) -> list[Tensor]:
        return list(self._nodes.pop(tile).saved_tensors)


class GradientSum:
    """Adds up the gradients of parameters over the tiles: in fp32, rounded once at the end."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)

    def begin_tile(self) -> None:
        """A tile's backward pass is about to run."""

    def add(self, index: int, gradient: Tensor) -> None:
        """A tile's gradient of parameter `index`."""
        known = self._sums[index]
        if known is None:
            self._sums[index] = gradient.float() if gradient.dtype.itemsize < 4 else gradient
        else:
            self._sums[index] = known.add_(gradient)

    def result(self, index: int) -> Tensor | None:
        """What autograd is given for the parameter."""
        total, self._sums[index] = self._sums[index], None
        return None if total is None else total.to(self.parameters[index].dtype)
