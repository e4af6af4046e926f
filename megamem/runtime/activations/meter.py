"""Counting what layers hold between forward and backward, with nothing changed: the stock side of every comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megamem.runtime.activations.stats import Retained


class _Held:
    """A saved tensor, left where it is; tells the meter when autograd lets go of it."""

    __slots__ = ("meter", "storage", "tensor")

    def __init__(self, meter: ActivationMeter, tensor: Tensor, storage: int) -> None:
        self.meter, self.tensor, self.storage = meter, tensor, storage

    def __del__(self) -> None:
        self.meter.release(self.storage)


class ActivationMeter:
    """Bytes of device memory held by what layers saved: each storage once, however many views of it were saved.

    A whole storage counts, because that is what a saved view keeps from being freed.
    """

    def __init__(self) -> None:
        self.retained = Retained()
        self._holders: dict[int, list[int]] = {}  # storage address -> [number of holders, bytes]

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

        def pack(tensor: Tensor) -> _Held | Tensor:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if not tensor.is_leaf:  # an operator must not hold itself by its output
                tensor = tensor.detach()
            if address in parameters or storage.nbytes() == 0:
                return tensor
            return self._hold(tensor, address, storage.nbytes())

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return call(*args, **kwargs)

    def _hold(self, tensor: Tensor, address: int, nbytes: int) -> _Held:
        holder = self._holders.setdefault(address, [0, nbytes])
        if holder[0] == 0:
            self.retained.add(nbytes)
        holder[0] += 1
        return _Held(self, tensor, address)

    def release(self, address: int) -> None:
        """One holder of a storage is gone."""
        holder = self._holders[address]
        holder[0] -= 1
        if holder[0] == 0:
            del self._holders[address]
            self.retained.add(-holder[1])


def _unpack(held: _Held | Tensor) -> Tensor:
    return held if isinstance(held, Tensor) else held.tensor
