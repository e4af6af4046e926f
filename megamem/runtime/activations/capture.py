"""Watching a layer's forward: which tensors it saves, and what goes in and out of its parts.

The pack hook runs some twenty times a layer on the hot path, so it only takes notes; everything else is done once,
when the layer has returned. Until then autograd would hold the same tensors, so taking notes costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megamem.errors import ActivationError
from megamem.runtime.activations.geometry import Geometry
from megamem.runtime.activations.layer import AbstractLayer, Args, Kwargs, first_tensor, tensors_of


class Handle:
    """What autograd holds instead of a saved tensor."""

    __slots__ = ("entry", "geometry", "task", "tensor", "version")

    def __init__(self) -> None:
        self.entry: Any = None  # where the tensor will come from; None while it is simply kept
        self.geometry: Geometry | None = None
        self.tensor: Tensor | None = None
        self.version = 0
        self.task = -1

    def keep(self, tensor: Tensor, version: int) -> None:
        """Hold the tensor itself."""
        self.tensor, self.version = tensor, version

    def unpack(self) -> Tensor:
        """Give the tensor back. Raises ActivationError where that would not be faithful."""
        if self.entry is None:
            assert self.tensor is not None
            # torch's own check of this is off while hooks are installed.
            if self.tensor._version != self.version:
                raise ActivationError(
                    f"a tensor of shape {list(self.tensor.shape)} that autograd saved for the backward pass was "
                    "changed in place afterwards; clone it before the in-place operation"
                )
            return self.tensor
        task = torch._C._current_graph_task_id()
        if self.task not in (-1, task):
            raise ActivationError(
                "backward runs a second time through a layer whose activations megamem swapped or recomputed "
                "(retain_graph=True): they are given back once only. Run one backward pass per forward pass, "
                "or set activations.policy: off"
            )
        self.task = task
        tensor: Tensor = self.entry.get(self.geometry)
        return tensor


@dataclass(slots=True)
class Packed:
    """One call of the pack hook."""

    handle: Handle
    tensor: Tensor
    version: int
    path: str  # the innermost watched part that was running; "" for the layer itself


@dataclass(slots=True)
class PartIO:
    """What went in and out of a part in one call."""

    inputs: list[Tensor]
    result: Any = None


@dataclass
class Capture:
    """The notes of one forward pass of one layer."""

    layer: AbstractLayer
    learning: bool  # note the inputs and outputs of every part, not only of those that will be answered
    packed: list[Packed] = field(default_factory=list)
    io: dict[str, PartIO] = field(default_factory=dict)
    random_states: list[Any] = field(default_factory=list)  # at the start, and behind attention
    _stack: list[str] = field(default_factory=lambda: [""])
    _outputs: frozenset[str] = frozenset()

    def run(self, call: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """Call the layer and take notes."""
        layer = self.layer
        answered = set(layer.anchors.values())
        if layer.attention is not None:
            answered.add(layer.attention)
        self._outputs = frozenset(answered)
        if layer.has_dropout:
            self.random_states.append(layer.random_state())
        with layer.watched(self._on_call), torch.autograd.graph.saved_tensors_hooks(self._pack, Handle.unpack):
            return call(*args, **kwargs)

    def _pack(self, tensor: Tensor) -> Handle:
        handle = Handle()
        self.packed.append(Packed(handle, tensor, tensor._version, self._stack[-1]))
        return handle

    def _on_call(self, path: str, original: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        self._stack.append(path)
        try:
            result = original(*args, **kwargs)
        finally:
            self._stack.pop()
        if self.learning:
            self.io[path] = PartIO(tensors_of(args, kwargs), result)
        elif path in self._outputs:
            self.io[path] = PartIO([], result)
        elif path == self.layer.experts:
            self.io[path] = PartIO(tensors_of(args, kwargs))
        if self.random_states and path == self.layer.attention:
            self.random_states.append(self.layer.random_state())
        return result

    def output(self, path: str | None) -> Tensor | None:
        """The activation that a part returned, if it ran."""
        io = self.io.get(path) if path is not None else None
        return first_tensor(io.result) if io is not None else None

    def forget(self) -> None:
        """Drop the notes. Needed: the graph holds the pack hook, and so this object, until it is freed itself."""
        self.packed, self.io, self.random_states = [], {}, []

    def split(self) -> tuple[list[Packed], list[Packed]]:
        """The calls that are the same in every step, and those of the experts, whose shapes follow the routing.

        The experts' input is of the first kind: it is an ordinary token-wise tensor that only they happen to save.
        """
        experts = self.layer.experts
        if experts is None:
            return self.packed, []
        inputs = {(t.data_ptr(), t.numel()) for t in self.io[experts].inputs} if experts in self.io else set()
        fixed: list[Packed] = []
        routed: list[Packed] = []
        for note in self.packed:
            inside = note.path == experts or note.path.startswith(experts + ".")
            is_input = inside and (note.tensor.data_ptr(), note.tensor.numel()) in inputs
            (routed if inside and not is_input else fixed).append(note)
        return fixed, routed
