"""An independent count of live tensor memory, to hold the activation engine's own accounting against.

    with LiveStorages() as live:
        loss = model(x).sum()
        saved = live.live_bytes()      # what the forward pass left behind
        loss.backward()
    live.peak_bytes

It knows nothing of activations: it sees every operator's outputs (a `TorchDispatchMode`, so below autograd and inside
backward), registers each *storage* that an operator brings into being, once, and drops it when the storage dies.
Views and in-place results add nothing. A storage that existed before, or that an operator merely got as an input, is
not counted.

What it cannot see: memory that an operator allocates and frees inside itself, and storages made without an operator
(unpickling).
"""

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamem.testing._undo import Ledger

# `torch.tensor(data)` fills its storage without an operator and shows it here first, as this operator's input.
_BIRTHS_BY_INPUT = ("aten::lift_fresh", "aten::lift")


@dataclass(frozen=True, kw_only=True)
class LiveStorage:
    """A live storage, and the operator and shape it was born with: enough to find the line of code that keeps it."""

    nbytes: int
    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(kw_only=True)
class _Entry:
    storage: weakref.ref[torch.UntypedStorage]
    nbytes: int
    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided)


class LargestStorage(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most elements of any tensor that an operator of this thread returned in a storage of its own, and which."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements, self.where = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for leaf in _tensors(result):
            elements = leaf.untyped_storage().nbytes() // leaf.element_size()
            if elements > self.elements and leaf.untyped_storage()._cdata not in given:
                self.elements, self.where = elements, f"{func} {tuple(leaf.shape)}"
        return result


class LiveStorages:
    """Counts the storages born while the context is open; those keep being followed after it closes."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._live = 0
        self._entries: dict[int, _Entry] = {}
        self._ignored: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._ledger = Ledger()
        self._mode = _Watch(self)

    def live_bytes(self) -> int:
        """Bytes of the storages that are alive now."""
        return self._live

    def storages(self) -> list[LiveStorage]:
        """The storages that are alive now, largest first."""
        entries = sorted(self._entries.values(), key=lambda entry: -entry.nbytes)
        return [LiveStorage(nbytes=e.nbytes, operator=e.operator, shape=e.shape, dtype=e.dtype) for e in entries]

    def reset_peak(self) -> None:
        """Start the peak anew from what is alive."""
        self.peak_bytes = self._live

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave these storages out, now and later: parameters, gradients, an engine's host buffers."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            self._forget(key)
            self._ignored[key] = weakref.ref(storage, functools.partial(self._stop_ignoring, key))

    def _stop_ignoring(self, key: int, _reference: Any) -> None:
        self._ignored.pop(key, None)  # it died, and its address may be given to another storage

    def __enter__(self) -> Self:
        self._ledger.set(torch.UntypedStorage, "resize_", self._following_resize(torch.UntypedStorage.resize_))
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, value, trace)  # type: ignore[no-untyped-call]
        self._ledger.undo()

    def observe(self, operator: str, inputs: Any, outputs: Any) -> None:
        """Take in one operator call."""
        given = {tensor.untyped_storage()._cdata for tensor in _tensors(inputs)}
        for tensor in _tensors(outputs):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._entries:
                self._set_size(key, storage.nbytes())
            elif key not in self._ignored and (key not in given or operator in _BIRTHS_BY_INPUT):
                self._register(key, storage, operator, tensor)

    def _register(self, key: int, storage: torch.UntypedStorage, operator: str, tensor: torch.Tensor) -> None:
        reference = weakref.ref(storage, lambda _ref: self._forget(key))
        shape = tuple(tensor.shape)
        self._entries[key] = _Entry(storage=reference, nbytes=0, operator=operator, shape=shape, dtype=tensor.dtype)
        self._set_size(key, storage.nbytes())

    def _set_size(self, key: int, nbytes: int) -> None:
        entry = self._entries[key]
        self._live += nbytes - entry.nbytes
        entry.nbytes = nbytes
        self.peak_bytes = max(self.peak_bytes, self._live)

    def _forget(self, key: int) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._live -= entry.nbytes

    def _following_resize(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """`storage.resize_(0)`, the usual way to free under a live tensor, is no operator."""

        def resize(storage: torch.UntypedStorage, *args: Any, **kwargs: Any) -> Any:
            result = real(storage, *args, **kwargs)
            if storage._cdata in self._entries:
                self._set_size(storage._cdata, storage.nbytes())
            return result

        return resize


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, live: LiveStorages) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self._storages.observe(func._schema.name, (args, kwargs), outputs)
        return outputs
