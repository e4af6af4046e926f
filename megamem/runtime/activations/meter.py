"""Counting what layers hold between forward and backward, with nothing changed: the stock side of every comparison."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megamem.runtime.activations.stats import Retained


class _Held:
    """A saved tensor, left where it is; tells the meter when autograd lets go of it."""

    __slots__ = ("__weakref__", "key", "meter", "tensor")

    def __init__(self, meter: ActivationMeter, tensor: Tensor, key: int) -> None:
        self.meter, self.tensor, self.key = meter, tensor, key

    def __del__(self) -> None:
        self.meter.release(self.key)


class ActivationMeter:
    """Bytes of device memory held by what layers saved: each storage once, however many views of it were saved.

    A whole storage counts, because that is what a saved view keeps from being freed; as large as it is when the layer
    has returned, for a trainer may give back the memory under a tensor that was saved.
    """

    def __init__(self) -> None:
        self.retained = Retained()
        self._holders: dict[int, list[int]] = {}  # storage -> [number of holders, bytes]

    @property
    def now_bytes(self) -> int:
        """Held now."""
        return self.retained.now

    @property
    def peak_bytes(self) -> int:
        """The most that was held at once."""
        return self.retained.peak

    def run(
        self, parameters: frozenset[int], call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a layer and count what it saves; `parameters` are the addresses of storages that do not count."""

        seen: list[weakref.ref[_Held]] = []

        def pack(tensor: Tensor) -> _Held | Tensor:
            storage = tensor.untyped_storage()
            if not tensor.is_leaf:  # an operator must not hold itself by its output
                tensor = tensor.detach()
            if storage.nbytes() == 0 or storage.data_ptr() in parameters:
                return tensor
            held = self._hold(tensor, storage)
            seen.append(weakref.ref(held))
            return held

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            result = call(*args, **kwargs)
        for reference in seen:
            if (held := reference()) is not None:
                self._resize(held)
        return result

    def hold_given(self, tensors: Iterable[Tensor]) -> None:
        """Count what a layer was given while it lives: a checkpoint around the layer keeps it, which no hook sees."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            holder = self._holders.setdefault(storage._cdata, [0, 0])
            holder[0] += 1
            self.retained.add(storage.nbytes() - holder[1])
            holder[1] = storage.nbytes()
            weakref.finalize(tensor, self.release, storage._cdata).atexit = False

    def _hold(self, tensor: Tensor, storage: torch.UntypedStorage) -> _Held:
        key = storage._cdata  # not its address, which another storage has when this one is emptied
        holder = self._holders.setdefault(key, [0, 0])  # its bytes count when the layer has returned
        holder[0] += 1
        return _Held(self, tensor, key)

    def _resize(self, held: _Held) -> None:
        holder, nbytes = self._holders[held.key], held.tensor.untyped_storage().nbytes()
        self.retained.add(nbytes - holder[1])
        holder[1] = nbytes

    def release(self, key: int) -> None:
        """One holder of a storage is gone."""
        holder = self._holders[key]
        holder[0] -= 1
        if holder[0] == 0:
            del self._holders[key]
            self.retained.add(-holder[1])


def _unpack(held: _Held | Tensor) -> Tensor:
    return held if isinstance(held, Tensor) else held.tensor
