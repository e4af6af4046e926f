"""Parcels: groups of tensors that travel to host memory and back together.

The life of a parcel, and what orders each step (C compute, D device-to-host, H host-to-device):

    store   C: ...produce... |ev|                       D waits for ev and for the guards of the slot
            D:                   |copy......|stored|
    retire  C: .......................waits for stored, then the references to the sources are dropped
    fetch   C: allocate |ev|                            H waits for ev and for stored
            H:               |copy......|fetched|
    take    C: .......................waits for fetched, then the tensors are used

`retire` is what gives device memory back: at a planned point (one layer on, as MEMO does with its rounding buffers,
arXiv 2407.12117) and in the order of the compute stream, so the caching allocator hands the same blocks to the same
layers in every step. No step makes the host wait.

Each wait answers to one hazard, and `tests/runtime/test_copy_races.py` shows what breaks without it:

    D waits for C's event in store      copies what is not yet computed
    D waits for the slot's guards       overwrites what the last tenant still sends to the device
    C waits for stored in retire        source memory is reused while it is still being read
    H waits for C's event in fetch      fills memory that earlier kernels are still using
    H waits for stored in fetch         reads host memory that is not yet filled
    C waits for fetched in take         uses memory that is not yet filled

**Forwarding** (SSDTrain, arXiv 2408.10013): a parcel that is wanted back before its sources are dropped gets them back
without a copy. The copy to the host may still be running and cannot be called off. So the courier keeps its own
references to the sources until `retire` has waited for it, and the slot is freed guarded by `stored`: what the copy
still writes there is ordered before the next tenant, whose copy runs on the same stream.

**Lost parcels**: a graph that is freed without a backward pass drops its parcels. Their finalizers run at any
moment, in the middle of another call too, so they only put the parcel's content on a list that the next call works off.
Parcels that only the cyclic garbage collector finds are freed at moments that differ between ranks, and so may fill
arenas differently; where ranks must decide alike, call `drop`.

A courier is used by one thread at a time (the autograd thread may take over while the main thread waits for it).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from megamem.errors import ActivationError
from megamem.runtime.activations.codec import AbstractCodec
from megamem.runtime.activations.host_arena import HostArena, Slot, aligned
from megamem.runtime.activations.streams import AbstractDevice, AbstractEvent

_MOST_PLACES = 64  # slots a manifest, more than a layer has microbatches in flight


@dataclass
class Ledger:
    """What a courier has done; bytes of what is copied, without the rounding of slots."""

    bytes_stored: int = 0
    bytes_fetched: int = 0
    bytes_forwarded: int = 0
    """Wanted back before the sources were dropped; no copy back was needed."""
    num_stored: int = 0
    num_refused: int = 0
    """Parcels that did not fit into the arena."""
    num_live: int = 0
    """Parcels stored and neither taken nor dropped."""
    peak_live: int = 0
    staging_nbytes: int = 0
    """Device memory that the courier holds: sources not retired, and fetched tensors not taken."""
    peak_staging_nbytes: int = 0

    def stage(self, nbytes: int) -> None:
        """Count `nbytes` of device memory as held (negative: given back)."""
        self.staging_nbytes += nbytes
        self.peak_staging_nbytes = max(self.peak_staging_nbytes, self.staging_nbytes)


@final
class Part:
    """One piece of memory that is copied as it is: a shape, a dtype, and their size in bytes."""

    __slots__ = ("dtype", "nbytes", "shape")

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self.nbytes = math.prod(self.shape) * dtype.itemsize


class _Wrap(ABC):
    """How some of a parcel's tensors, those at `positions`, become `parts`, and parts become tensors again."""

    __slots__ = ("parts", "positions")

    def __init__(self, positions: list[int], parts: list[Part]) -> None:
        self.positions, self.parts = positions, parts

    @abstractmethod
    def wrap(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parts, made on `compute`; `tensors` are all of the parcel's."""

    @abstractmethod
    def unwrap(self, parts: list[Tensor]) -> list[Tensor]:
        """The tensors at `positions`, in the shape and dtype that they had."""


@final
class _Strided(_Wrap):
    """One tensor that is not contiguous: an alias in the order of its memory where it is dense, else a copy."""

    __slots__ = ("inverse", "order")

    def __init__(self, position: int, tensor: Tensor) -> None:
        strides = tensor.stride()
        order = tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))
        self.order = order if tensor.permute(order).is_contiguous() else None
        self.inverse = tuple(sorted(range(tensor.dim()), key=order.__getitem__))
        shape = tensor.shape if self.order is None else [tensor.shape[dim] for dim in order]
        super().__init__([position], [Part(shape, tensor.dtype)])

    def wrap(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        tensor = tensors[self.positions[0]].data
        return [tensor.contiguous() if self.order is None else tensor.permute(self.order)]

    def unwrap(self, parts: list[Tensor]) -> list[Tensor]:
        return parts if self.order is None else [parts[0].permute(self.inverse)]


@final
class _Encoded(_Wrap):
    """One tensor in another code, made on the compute stream: neither the copies nor the host see the tensor itself."""

    __slots__ = ("codec", "dtype")

    def __init__(self, position: int, tensor: Tensor, codec: AbstractCodec) -> None:
        self.codec, self.dtype = codec, tensor.dtype
        super().__init__([position], [Part(shape, dtype) for shape, dtype in codec.shapes(tuple(tensor.shape))])

    def wrap(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.codec.encode(tensors[self.positions[0]].data)

    def unwrap(self, parts: list[Tensor]) -> list[Tensor]:
        return [self.codec.decode(parts, self.dtype)]


@final
class Manifest:
    """How a list of tensors lies in a slot: as parts, one behind the other, each aligned.

    Made once for the tensors that a layer stores in every step: shapes do not change, and looking at them again costs
    more than copying a small one.

    codecs:          of each tensor; None: none is encoded.
    nbytes:          of the parts, which is what the copies move.
    slot_nbytes:     the same with the gaps that alignment leaves.
    tensors_nbytes:  of the tensors; more than `nbytes` where some are encoded.
    exposed:         positions of the tensors that the copies read themselves.
    """

    __slots__ = (
        "_num_tensors", "_places", "_plain", "_wraps", "exposed", "nbytes", "parts", "slot_nbytes", "tensors_nbytes",
    )  # fmt: skip

    def __init__(self, tensors: Sequence[Tensor], codecs: Sequence[AbstractCodec | None] | None = None) -> None:
        if not tensors:
            raise ValueError("a parcel holds at least one tensor")
        self._num_tensors = len(tensors)
        self.tensors_nbytes = sum(tensor.nbytes for tensor in tensors)
        self._plain: list[int] = []
        self._wraps: list[_Wrap] = []
        for i, (tensor, codec) in enumerate(zip(tensors, codecs or [None] * len(tensors), strict=True)):
            if codec is not None:
                self._wraps.append(_Encoded(i, tensor, codec))
            elif tensor.is_contiguous():
                self._plain.append(i)
            else:
                self._wraps.append(_Strided(i, tensor))
        encoded = {i for wrap in self._wraps if isinstance(wrap, _Encoded) for i in wrap.positions}
        self.exposed = [i for i in range(len(tensors)) if i not in encoded]
        self.parts = [Part(tensors[i].shape, tensors[i].dtype) for i in self._plain]
        self.parts += [part for wrap in self._wraps for part in wrap.parts]
        self.nbytes = sum(part.nbytes for part in self.parts)
        self.slot_nbytes = sum(aligned(part.nbytes) for part in self.parts)
        self._places: dict[int, list[Tensor]] = {}

    def pack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parts of the parcel, in device memory: aliases of the tensors that are exposed, and copies."""
        # `data`, not `detach()`: half of the cost, and no version counter or `_base` is shared.
        parts = [tensors[i].data for i in self._plain]
        for wrap in self._wraps:
            parts += wrap.wrap(tensors)
        return parts

    def unpack(self, parts: list[Tensor]) -> list[Tensor]:
        """The tensors in their order, with shape and dtype as they were; strides too where a tensor was dense."""
        tensors = parts[:1] * self._num_tensors
        for i, part in zip(self._plain, parts, strict=False):
            tensors[i] = part
        start = len(self._plain)
        for wrap in self._wraps:
            stop = start + len(wrap.parts)
            for i, tensor in zip(wrap.positions, wrap.unwrap(parts[start:stop]), strict=True):
                tensors[i] = tensor
            start = stop
        return tensors

    def spent(self, parts: list[Tensor]) -> list[Tensor]:
        """Of the parts that `unpack` was given, those that no tensor lies in."""
        start, spent = len(self._plain), []
        for wrap in self._wraps:
            stop = start + len(wrap.parts)
            if isinstance(wrap, _Encoded):
                spent += parts[start:stop]
            start = stop
        return spent

    def places(self, slot: Slot) -> list[Tensor]:
        """Where in the slot each part lies. Kept: in the steady state a layer gets the same slots in every step."""
        places = self._places.get(slot.start)
        if places is None:
            places, start = [], 0
            memory = slot.memory
            for part in self.parts:
                places.append(memory[start : start + part.nbytes].view(part.dtype).view(part.shape))
                start += aligned(part.nbytes)
            if len(self._places) == _MOST_PLACES:
                self._places.clear()
            self._places[slot.start] = places
        return places


class _Cargo:
    """What a parcel refers to. Apart from the parcel, so that it outlives a lost one."""

    __slots__ = (
        "buffers", "fetched", "is_open", "is_queued", "is_taken",
        "manifest", "nbytes", "on_retire", "places", "slot", "sources", "stored",
    )  # fmt: skip

    def __init__(
        self, manifest: Manifest, sources: list[Tensor], slot: Slot, places: list[Tensor], stored: AbstractEvent
    ) -> None:
        self.manifest = manifest
        self.nbytes = manifest.nbytes
        self.sources: list[Tensor] | None = sources
        self.slot: Slot | None = slot
        self.places = places  # of the parts in the slot
        self.stored = stored
        self.buffers: list[Tensor] | None = None
        self.fetched: AbstractEvent | None = None
        self.on_retire: Callable[[], None] | None = None
        self.is_open = True
        self.is_queued = True
        self.is_taken = False

    def settle(self) -> None:
        """Run `on_retire`, once."""
        callback, self.on_retire = self.on_retire, None
        if callback is not None:
            callback()


@final
class Parcel:
    """A receipt for stored tensors: hand it to `Courier.take` or `Courier.drop`, once.

    nbytes, tensors_nbytes: what is copied, and what was stored; see `Manifest`.
    """

    __slots__ = ("_cargo", "_lost", "nbytes", "tensors_nbytes")

    def __init__(self, cargo: _Cargo, lost: deque[_Cargo]) -> None:
        self._cargo = cargo
        self._lost = lost
        self.nbytes, self.tensors_nbytes = cargo.nbytes, cargo.manifest.tensors_nbytes

    @property
    def is_open(self) -> bool:
        """Whether it can still be taken."""
        return self._cargo.is_open

    def __del__(self) -> None:
        # Any moment, any thread: nothing but an append.
        if self._cargo.is_open:
            self._lost.append(self._cargo)


class Courier:
    """Stores parcels in an arena and brings them back."""

    def __init__(self, device: AbstractDevice, arena: HostArena) -> None:
        self.device = device
        self.arena = arena
        self.ledger = Ledger()
        # Device memory that copies still touch, oldest first: (event to wait for, tensors, cargo they belong to).
        self._transit: deque[tuple[AbstractEvent, list[Tensor], _Cargo]] = deque()
        self._lost: deque[_Cargo] = deque()

    @property
    def num_in_flight(self) -> int:
        """Parcels whose memory `retire` has yet to give back."""
        return len(self._transit)

    def store(
        self,
        tensors: Sequence[Tensor],
        on_retire: Callable[[], None] | None = None,
        *,
        manifest: Manifest | None = None,
    ) -> Parcel | None:
        """Start to copy tensors of `device` to the host; None, with nothing changed, if they do not fit.

        The tensors must not be changed in place from here on. `on_retire` is where the caller checks that (by their
        version counters): it runs once, right before the references are dropped or the tensors are handed back by
        forwarding, and not at all for a parcel that is dropped. What it raises passes through. `manifest` is that of
        tensors with the same shapes, strides and dtypes, if there is one, and says which of them are encoded.
        """
        self._sweep()
        manifest = manifest or Manifest(tensors)
        slot = self.arena.allocate(manifest.slot_nbytes)
        if slot is None:
            self.ledger.num_refused += 1
            return None
        to_host = self.device.to_host
        try:
            sources = manifest.pack(tensors)
            places = manifest.places(slot)
            to_host.wait(self.device.compute.record())
            for event in slot.guards:
                to_host.wait(event)
            to_host.copy_all(zip(places, sources, strict=True))
            stored = to_host.record()
        except BaseException:
            # Copies already issued run on the stream that the slot's next tenant is written by: no further guard.
            self.arena.free(slot, after=None)
            raise
        slot.guards = ()  # waited for; `stored` stands behind them
        cargo = _Cargo(manifest, sources, slot, places, stored)
        cargo.on_retire = on_retire
        self._transit.append((stored, sources, cargo))
        self.ledger.stage(cargo.nbytes)
        self.ledger.bytes_stored += cargo.nbytes
        self.ledger.num_stored += 1
        self.ledger.num_live += 1
        self.ledger.peak_live = max(self.ledger.peak_live, self.ledger.num_live)
        return Parcel(cargo, self._lost)

    def retire(self, keep_in_flight: int = 1) -> None:
        """Give back the device memory of all but the newest `keep_in_flight` parcels, in stream order.

        To be called at the start of each later layer. `compute` waits for the copies, the host does not.
        """
        self._sweep()
        while len(self._transit) > keep_in_flight:
            event, tensors, cargo = self._transit.popleft()
            self.device.compute.wait(event)
            cargo.is_queued = False
            cargo.sources = None
            if cargo.buffers is None and not cargo.is_taken:  # else: forwarded: to be taken, or no longer ours
                self.ledger.stage(-cargo.nbytes)
            try:
                cargo.settle()
            finally:
                self.device.discard(tensors)
                del tensors

    def fetch(self, parcel: Parcel) -> None:
        """Start to bring a parcel back, ahead of `take`. Again, or on its way already: nothing happens."""
        self._sweep()
        cargo = self._open(parcel)
        if cargo.buffers is not None:
            return
        if cargo.sources is not None:
            self._forward(cargo)
            return
        empty = self.device.empty
        buffers = [empty(part.shape, part.dtype) for part in cargo.manifest.parts]
        to_device = self.device.to_device
        to_device.wait(self.device.compute.record())
        to_device.wait(cargo.stored)
        to_device.copy_all(zip(buffers, cargo.places, strict=True))
        cargo.fetched = to_device.record()
        cargo.buffers = buffers
        self.ledger.stage(cargo.nbytes)
        self.ledger.bytes_fetched += cargo.nbytes

    def take(self, parcel: Parcel) -> list[Tensor]:
        """The tensors, ready for use on `compute`, in the shape and dtype they were stored with.

        Strides too are as before where a tensor was dense; else it comes back contiguous. Never requires grad.
        Raises ActivationError when the parcel was taken or dropped before.
        """
        self.fetch(parcel)
        cargo = parcel._cargo
        buffers = cargo.buffers
        assert buffers is not None
        if cargo.fetched is not None:
            self.device.compute.wait(cargo.fetched)
        self._vacate(cargo)
        cargo.is_open = False
        cargo.buffers = None
        self.ledger.num_live -= 1
        cargo.is_taken = True
        self.ledger.stage(-cargo.nbytes)  # whoever took it holds it now, also while a copy still reads it
        tensors = cargo.manifest.unpack(buffers)
        self.device.discard(cargo.manifest.spent(buffers))
        return tensors

    def drop(self, parcel: Parcel) -> None:
        """Give up a parcel that no backward pass will want. A closed one: nothing happens."""
        self._sweep()
        self._drop(parcel._cargo)

    def flush(self) -> None:
        """Retire everything: at the end of a step, so that nothing is held until the next."""
        self.retire(keep_in_flight=0)

    def _open(self, parcel: Parcel) -> _Cargo:
        cargo = parcel._cargo
        if not cargo.is_open:
            raise ActivationError(
                "a stored activation is asked for a second time, after it was given back or dropped: backward ran "
                "twice through one graph (retain_graph), which swapped activations do not support"
            )
        return cargo

    def _forward(self, cargo: _Cargo) -> None:
        assert cargo.sources is not None
        cargo.settle()
        # Aliases: the courier's own references stay in transit until the copy has been waited for.
        cargo.buffers = [source.data for source in cargo.sources]
        self._vacate(cargo)
        self.ledger.bytes_forwarded += cargo.nbytes

    def _vacate(self, cargo: _Cargo) -> None:
        slot, cargo.slot = cargo.slot, None
        if slot is not None:
            self.arena.free(slot, after=cargo.fetched or cargo.stored)

    def _drop(self, cargo: _Cargo) -> None:
        if not cargo.is_open:
            return
        cargo.is_open = False
        cargo.on_retire = None
        self._vacate(cargo)
        self.ledger.num_live -= 1
        buffers, cargo.buffers = cargo.buffers, None
        if buffers is None or cargo.is_queued:  # queued: `retire` accounts for it
            return
        if cargo.fetched is None:  # forwarded and retired: no copy touches it any more
            self.ledger.stage(-cargo.nbytes)
            self.device.discard(buffers)
        else:  # the copy into it still runs, and `compute` need not stand still for it now
            cargo.is_queued = True
            self._transit.append((cargo.fetched, buffers, cargo))

    def _sweep(self) -> None:
        while self._lost:
            self._drop(self._lost.popleft())
