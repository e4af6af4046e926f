"""Watching a layer's forward: which tensors it saves, and what goes in and out of its parts.

The pack hook runs some twenty times a layer on the hot path, so it only takes notes; everything else is done once,
when the layer has returned. Until then autograd would hold the same tensors, so taking notes costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from megamem.errors import ActivationError
from megamem.runtime.activations.geometry import Geometry
from megamem.runtime.activations.layer import AbstractLayer, Args, Kwargs, PutTogether, first_tensor, tensors_of

_current_task = torch._C._current_graph_task_id
_unpack = methodcaller("unpack")
_PLAIN = frozenset((Tensor, Parameter))


class Source(Protocol):
    """What brings back the tensors that were sent away."""

    def materialize(self) -> None:
        """Fill every entry that was sent away; called once, for the first that is missed."""


class Entry:
    """One distinct piece of memory that was saved. Refers to nobody, so that no cycle keeps a dropped graph alive."""

    __slots__ = ("memory",)

    def __init__(self) -> None:
        self.memory: Tensor | None = None  # compact; None while it is away


class Handle:
    """What autograd holds instead of a saved tensor: the tensor itself, until it is told where it will come from."""

    __slots__ = ("entry", "geometry", "path", "source", "task", "tensor", "version")

    def __init__(self, tensor: Tensor, path: str) -> None:
        self.tensor: Tensor | None = tensor
        self.version = tensor._version
        self.path = path  # the innermost watched part that was running; "" for the layer itself
        self.source: Source | None = None
        self.task = -1

    def keep(self) -> None:
        """Hold the tensor itself, but not the operator that made it.

        torch hands an operator's own output to the pack hook with its graph: the operator would hold itself, through
        C++, where no garbage collector looks. Leaves stay what they are: Megatron reads `main_grad` from the parameter
        that comes back.
        """
        if self.tensor is not None and not self.tensor.is_leaf:
            self.tensor = self.tensor.detach()  # shares the version counter

    def send_away(self, source: Source, entry: Entry, geometry: Geometry | None) -> None:
        """Let go of the tensor, which `source` will bring back in `entry`; `geometry` is how it lies there, None: as it
        comes. Raises ActivationError if it was written to."""
        if self.tensor is None or self.tensor._version != self.version:
            self.check_version()
        self.source, self.entry, self.geometry, self.tensor = source, entry, geometry, None

    def check_version(self) -> None:
        """Raise ActivationError where the tensor was changed in place; torch's own check is off while hooks are on."""
        assert self.tensor is not None
        if self.tensor._version != self.version:
            raise ActivationError(
                f"a tensor of shape {list(self.tensor.shape)} that {self.path or 'a layer'} saved for its backward "
                "pass was changed in place afterwards; clone it before the in-place operation"
            )

    def unpack(self) -> Tensor:
        """Give the tensor back. Raises ActivationError where that would not be faithful."""
        if self.source is None:
            tensor = self.tensor
            if tensor is None or tensor._version != self.version:
                self.check_version()
            assert tensor is not None
            return tensor
        task = _current_task()
        if self.task != task:
            if self.task != -1:
                raise ActivationError(
                    "backward runs a second time through a layer whose activations megamem swapped or recomputed "
                    "(retain_graph=True): they are given back once only. Run one backward pass per forward pass, "
                    "or set activations.policy: off"
                )
            self.task = task
        entry, geometry = self.entry, self.geometry
        if entry.memory is None:
            self.source.materialize()
        memory = entry.memory
        assert memory is not None
        return memory if geometry is None else geometry.view(memory)


class Composite:
    """What autograd holds instead of a tensor that only stands for others: a handle for each of these."""

    __slots__ = ("handles", "put_together")

    def __init__(self, handles: list[Handle | None], put_together: PutTogether) -> None:
        self.handles, self.put_together = handles, put_together

    def unpack(self) -> Tensor:
        """Give the tensor back, made of its parts."""
        return self.put_together([None if handle is None else handle.unpack() for handle in self.handles])


@dataclass(slots=True)
class PartIO:
    """What went in and out of a part in one call."""

    inputs: list[Tensor]
    result: Any = None


class Capture:
    """The notes of one forward pass of one layer.

    While a layer is being learned everything is noted of all its parts. Later only the results of those in `answered`,
    whose output a replay may need, and the input of the experts; the other parts run unwatched.
    """

    def __init__(self, layer: AbstractLayer, answered: frozenset[str] | None) -> None:
        self.layer = layer
        self.handles: list[Handle] = []
        self.io: dict[str, PartIO] = {}
        self.random_states: list[Any] = []  # at the start, and behind attention
        self._answered = answered
        self._stack = [""]

    def run(self, call: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """Call the layer and take notes."""
        layer = self.layer
        watched = layer.parts.keys() if self._answered is None else self._answered
        if layer.has_dropout:
            self.random_states.append(layer.random_state())
        with layer.watched(self._on_call, watched), torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            return call(*args, **kwargs)

    def _pack(self, tensor: Tensor) -> Handle | Composite:
        if type(tensor) not in _PLAIN and (apart := self.layer.take_apart(tensor)) is not None:
            parts, put_together = apart
            return Composite([None if part is None else self._note(part) for part in parts], put_together)
        return self._note(tensor)

    def _note(self, tensor: Tensor) -> Handle:
        handle = Handle(tensor, self._stack[-1])
        self.handles.append(handle)
        return handle

    def _on_call(self, path: str, original: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        self._stack.append(path)
        try:
            result = original(*args, **kwargs)
        finally:
            self._stack.pop()
        if self._answered is None or path == self.layer.experts:
            self.io[path] = PartIO(tensors_of(args, kwargs), result)
        else:
            self.io[path] = PartIO([], result)
        if self.random_states and path == self.layer.attention:
            self.random_states.append(self.layer.random_state())
        return result

    def output(self, path: str | None) -> Tensor | None:
        """The activation that a part returned, if it ran."""
        io = self.io.get(path) if path is not None else None
        return first_tensor(io.result) if io is not None else None

    def forget(self) -> None:
        """Drop the notes. Needed: the graph holds the pack hook, and so this object, until it is freed itself."""
        self.handles, self.io, self.random_states = [], {}, []

    def split(self) -> tuple[list[Handle], list[Handle]]:
        """The saved tensors that are the same in every step, and those of the experts, whose shapes follow the routing.

        The experts' input is of the first kind: it is an ordinary token-wise tensor that only they happen to save.
        """
        experts = self.layer.experts
        if experts is None:
            return self.handles, []
        inputs = {(t.data_ptr(), t.numel()) for t in self.io[experts].inputs} if experts in self.io else set()
        fixed: list[Handle] = []
        routed: list[Handle] = []
        for handle in self.handles:
            tensor = handle.tensor
            assert tensor is not None
            inside = handle.path == experts or handle.path.startswith(experts + ".")
            is_input = inside and (tensor.data_ptr(), tensor.numel()) in inputs
            (routed if inside and not is_input else fixed).append(handle)
        return fixed, routed
