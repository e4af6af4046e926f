"""A device whose copies run at the worst moment that the recorded waits allow.

Copies that are ordered too loosely work on nearly every run of a real device, and corrupt gradients on the others.
Here they fail at once and with the same seed again. Two means, independent of each other:

* **Worst-time execution, by value.** Tensors live on the processor. Python is the compute stream: what it
  does is done at once. Copies wait in queues; `policy` says when they run:
      latest    only when `compute.wait` forces an event that stands behind them, and nothing besides what it needs
      earliest  as soon as their own waits allow
      random    anything between, by `seed`
  Memory whose contents nobody may rely on is full of 0xFF bytes, NaN in every float format: device memory that is
  not yet filled, device memory that was discarded and is referenced by nobody else, host memory whose tenant has
  left and whose last readers are done.
* **Happens-before, by clocks.** Eager computation cannot show a copy that runs *before* what it should wait for. So
  each stream carries a vector clock, each event a copy of it, and each byte range of memory the clocks of its last
  accesses. Two accesses, one of them a write, that no chain of events orders raise `RaceError` when the second is
  issued, whether or not the contents would have suffered. (`detect=False` leaves only the first means.)

A test says what the model does to memory with `kernel(reads=..., writes=...)`. Device tensors that were never
mentioned count as written by `compute` just now; a change under a copy that has not run yet is found by contents.

What this cannot see: reads by `compute` that no test mentions (they show by value only), and anything about time.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal, final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megamem.errors import MegamemError
from megamem.runtime.activations.streams import AbstractDevice, AbstractEvent, AbstractStream, map_pages

Policy = Literal["random", "earliest", "latest"]
NAMES = ("compute", "to_host", "to_device")
COMPUTE, TO_HOST, TO_DEVICE = range(3)
POISON = 0xFF


class RaceError(MegamemError, AssertionError):
    """Two uses of the same memory are not ordered, or memory is used that holds nothing."""


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte of its storage that a tensor takes, and one past the last."""
    item = tensor.element_size()
    start = int(tensor.storage_offset()) * item
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * item


def _place(tensor: Tensor) -> tuple[int, int, int]:
    """Which storage, and which bytes of it."""
    return (tensor.untyped_storage()._cdata, *_span(tensor))


def _poison(tensor: Tensor) -> None:
    start, stop = _span(tensor)
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    whole[start:stop].fill_(POISON)


def _poison_storage(tensor: Tensor) -> None:
    torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(POISON)


class _Access:
    """Bytes `start` to `stop` of a region were read or written by stream `by` at `number` of its own clock."""

    __slots__ = ("by", "is_write", "number", "start", "stop")

    def __init__(self, start: int, stop: int, by: int, number: int, is_write: bool) -> None:
        self.start = start
        self.stop = stop
        self.by = by
        self.number = number
        self.is_write = is_write


class _Region:
    """One storage: who touched which bytes last. Writes never overlap each other."""

    __slots__ = ("accesses", "is_mentioned", "key")

    def __init__(self, key: StorageWeakRef) -> None:
        self.key = key  # keeps the storage's address from being used again
        self.accesses: list[_Access] = []
        self.is_mentioned = False

    def access(self, new: _Access, clock: Sequence[int], detect: bool, what: str) -> None:
        """Note an access; raises RaceError when an earlier one is not ordered before `clock`."""
        rest = []
        for old in self.accesses:
            if old.stop <= new.start or old.start >= new.stop or not (new.is_write or old.is_write):
                rest.append(old)
                continue
            if detect and clock[old.by] < old.number:
                verb, earlier = ("write", "reads"), ("read", "writes")
                raise RaceError(
                    f"{what}: {NAMES[new.by]} {verb[0] if new.is_write else earlier[0]}s bytes {new.start}:{new.stop}, "
                    f"and nothing orders that behind {NAMES[old.by]}, which {earlier[1] if old.is_write else verb[1]} "
                    f"{old.start}:{old.stop}"
                )
            if not new.is_write:
                rest.append(old)
                continue
            if old.start < new.start:
                rest.append(_Access(old.start, new.start, old.by, old.number, old.is_write))
            if old.stop > new.stop:
                rest.append(_Access(new.stop, old.stop, old.by, old.number, old.is_write))
        rest.append(new)
        self.accesses = rest

    def filled(self, start: int, stop: int) -> bool:
        """Whether every byte was written by the present tenant."""
        writes = (old for old in self.accesses if old.is_write)
        return stop - start == sum(max(min(old.stop, stop) - max(old.start, start), 0) for old in writes)

    def forget_contents(self, start: int, stop: int) -> None:
        """A new tenant: what was written still has to be waited for, but no longer counts as contents."""
        for old in self.accesses:
            if old.is_write and old.start < stop and start < old.stop:
                old.is_write = False


class _Copy:
    """A copy in a queue: exactly one alias of each side, and what the source held when it was issued."""

    __slots__ = ("before", "dst", "src")

    def __init__(self, dst: Tensor, src: Tensor, before: Tensor | None) -> None:
        self.dst = dst.data  # no `_base`, so that the number of references to a storage can be counted
        self.src = src.data
        self.before = before


class _Wait:
    __slots__ = ("event",)

    def __init__(self, event: SimulatedEvent) -> None:
        self.event = event


@final
class SimulatedEvent(AbstractEvent):
    """A point on a simulated stream, with the vector clock that stood there."""

    __slots__ = ("_number", "_stream", "clock", "passed")

    def __init__(self, stream: SimulatedStream, clock: Sequence[int], passed: bool) -> None:
        self._stream = stream
        self._number = clock[stream.index]
        self.clock = tuple(clock)
        self.passed = passed

    @property
    def stream(self) -> SimulatedStream:
        return self._stream

    @property
    def number(self) -> int:
        return self._number

    def done(self) -> bool:
        self._stream.device.pump()
        if self.passed:  # the host has seen it: whatever it issues from now on comes after
            self._stream.device.observe(self.clock)
        return self.passed


@final
class SimulatedStream(AbstractStream):
    """One queue. That of `compute` is always empty."""

    def __init__(self, device: SimulatedDevice, index: int) -> None:
        self.device = device
        self.index = index
        self.clock = [0, 0, 0]
        self.queue: deque[_Copy | _Wait | SimulatedEvent] = deque()

    def record(self) -> SimulatedEvent:
        self.device.tick()
        if self.index != COMPUTE:
            self.clock[self.index] += 1
        event = SimulatedEvent(self, self.clock, passed=self.index == COMPUTE)
        if self.index != COMPUTE:
            self.queue.append(event)
        self.device.pump()
        return event

    def wait(self, event: AbstractEvent) -> None:
        if not isinstance(event, SimulatedEvent) or event.stream.device is not self.device:
            raise RaceError(f"{NAMES[self.index]} waits for an event of another device: {event}")
        self.join(event.clock)
        if self.index == COMPUTE:
            self.device.force(event)
            self.device.tick()
        else:
            self.queue.append(_Wait(event))
        self.device.pump()

    def copy_all(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        for dst, src in pairs:
            if dst.shape != src.shape or dst.dtype != src.dtype:
                raise RaceError(f"copy of {src.dtype} {list(src.shape)} to {dst.dtype} {list(dst.shape)}")
            self.clock[self.index] += 1
            before = self.device.check_copy(self, dst, src)
            copy = _Copy(dst, src, before)
            if self.index == COMPUTE:
                self.device.execute(copy)
            else:
                self.queue.append(copy)
        self.device.pump()

    def join(self, clock: Sequence[int]) -> None:
        """Everything issued from now on comes after `clock`."""
        self.clock = [max(own, other) for own, other in zip(self.clock, clock, strict=True)]


@final
class SimulatedDevice(AbstractDevice):
    """See the module. `detect=False` leaves races to be found by their effect on values."""

    def __init__(self, seed: int = 0, policy: Policy = "random", detect: bool = True) -> None:
        self._random = random.Random(seed)
        self._policy = policy
        self._detect = detect
        self.streams = tuple(SimulatedStream(self, index) for index in range(3))
        self._regions: dict[int, _Region] = {}
        self._hosts: dict[int, Tensor] = {}
        self._claims: dict[tuple[int, int, int], int] = {}  # (storage, first byte, one past the last) -> size
        self._leaving: list[tuple[SimulatedEvent | None, Tensor]] = []
        self.num_copies = 0

    @property
    def compute(self) -> SimulatedStream:
        return self.streams[COMPUTE]

    @property
    def to_host(self) -> SimulatedStream:
        return self.streams[TO_HOST]

    @property
    def to_device(self) -> SimulatedStream:
        return self.streams[TO_DEVICE]

    @property
    def num_pending(self) -> int:
        """Copies issued and not yet run."""
        return sum(isinstance(item, _Copy) for stream in self.streams for item in stream.queue)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype)
        _poison(tensor)
        self.kernel(writes=[tensor])
        self.pump()
        return tensor

    def kernel(self, reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = ()) -> None:
        """Say that `compute` reads and writes these tensors now. Raises RaceError where that is not ordered."""
        self.tick()
        for tensor in (*reads, *writes):
            self._access(self.compute, tensor, any(tensor is other for other in writes), "kernel")

    def discard(self, tensors: Sequence[Tensor]) -> None:
        self.tick()
        groups: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        for key, group in groups.items():
            if self._num_others(key, group):
                continue
            region = self._regions.pop(key, None)
            for old in region.accesses if region is not None and self._detect else ():
                if self.compute.clock[old.by] < old.number:
                    verb = "writes" if old.is_write else "reads"
                    raise RaceError(
                        f"device memory is given back while {NAMES[old.by]} {verb} it: compute did not wait"
                    )
            _poison_storage(group[0])
        self.pump()

    def host_buffer(self, nbytes: int) -> Tensor:
        memory = map_pages(nbytes)[0]
        memory.fill_(POISON)
        self._hosts[memory.untyped_storage()._cdata] = memory
        self._region(memory).is_mentioned = True
        return memory

    def claim_host(self, block: Tensor, start: int, nbytes: int) -> None:
        memory = block[start : start + nbytes]
        key, start, stop = place = _place(memory)
        for other, first, last in self._claims:
            if other == key and first < stop and start < last:
                raise RaceError(f"host bytes {start}:{stop} have a tenant at {first}:{last} already")
        self._claims[place] = stop - start
        self._leaving = [
            (event, old)
            for event, old in self._leaving
            if _place(old)[0] != key or _span(old)[1] <= start or stop <= _span(old)[0]
        ]
        self._region(memory).forget_contents(start, stop)

    def release_host(self, block: Tensor, start: int, nbytes: int, after: AbstractEvent | None) -> None:
        memory = block[start : start + nbytes]
        assert after is None or isinstance(after, SimulatedEvent)
        if self._claims.pop(_place(memory), None) is None:
            raise RaceError(f"host bytes {_span(memory)} have no tenant that could leave")
        self._leaving.append((after, memory))
        self.pump()

    def stall_ms(self) -> float:
        return 0.0

    def synchronize(self) -> None:
        self.drain()
        for stream in self.streams:
            self.observe(stream.clock)

    def drain(self) -> None:
        """Run every copy that was issued."""
        while any(self._step(stream) for stream in self.streams):
            pass
        self._poison_left()

    def check_quiescent(self) -> None:
        """Raises RaceError when a copy is pending, or a host slot has a tenant still."""
        if any(stream.queue for stream in self.streams):
            raise RaceError(f"{self.num_pending} copies are still pending")
        if self._claims:
            places = sorted((start, stop) for _, start, stop in self._claims)
            raise RaceError(f"host memory was never given back: {places}")

    # What follows is for the streams and events of this module.

    def tick(self) -> None:
        """Python did something: `compute` moves on."""
        self.compute.clock[COMPUTE] += 1

    def observe(self, clock: Sequence[int]) -> None:
        """The host has seen that `clock` is past: all that it issues from now on comes after."""
        for stream in self.streams:
            stream.join(clock)

    def force(self, event: SimulatedEvent) -> None:
        """Run what stands before `event`, and nothing else."""
        queue = event.stream.queue
        while not event.passed:
            if isinstance(head := queue[0], _Wait):
                self.force(head.event)
            self._step(event.stream)

    def pump(self) -> None:
        """Let some copies run, as the policy has it."""
        if self._policy == "earliest":
            self.drain()
        elif self._policy == "random":
            for _ in range(self._random.choice((0, 0, 0, 1, 2, 5))):
                self._step(self.streams[self._random.choice((TO_HOST, TO_DEVICE))])
        self._poison_left()

    def check_copy(self, stream: SimulatedStream, dst: Tensor, src: Tensor) -> Tensor | None:
        """Note the accesses of a copy that is issued now. Returns what a device source holds, else None."""
        host_src, host_dst = self._is_host(src), self._is_host(dst)
        for tensor, is_host in ((src, host_src), (dst, host_dst)):
            key, start, stop = _place(tensor)
            has_tenant = any(other == key and lo <= start and stop <= hi for other, lo, hi in self._claims)
            if self._detect and is_host and not has_tenant:
                raise RaceError(f"{NAMES[stream.index]} copies host bytes {start}:{stop}, which have no tenant")
        if self._detect and host_src and not self._region(src).filled(*_span(src)):
            raise RaceError(f"{NAMES[stream.index]} reads host bytes {_span(src)}, which were never written")
        self._access(stream, src, False, "copy")
        self._access(stream, dst, True, "copy")
        return None if host_src or stream.index == COMPUTE else src.clone()

    def execute(self, copy: _Copy) -> None:
        """Do the copying. Raises RaceError when the source has changed since the copy was issued."""
        if self._detect and copy.before is not None and not torch.equal(_raw(copy.before), _raw(copy.src)):
            raise RaceError("the source of a copy was overwritten or discarded before the copy ran")
        copy.dst.copy_(copy.src)
        self.num_copies += 1

    def _step(self, stream: SimulatedStream) -> bool:
        if not stream.queue:
            return False
        head = stream.queue[0]
        if isinstance(head, _Wait) and not head.event.passed:
            return False
        stream.queue.popleft()
        if isinstance(head, _Copy):
            self.execute(head)
        elif isinstance(head, SimulatedEvent):
            head.passed = True
        return True

    def _poison_left(self) -> None:
        if not self._leaving:
            return
        staying = []
        for event, memory in self._leaving:
            if event is None or event.passed:
                memory.fill_(POISON)
            else:
                staying.append((event, memory))
        self._leaving[:] = staying

    def _is_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._hosts

    def _num_others(self, key: int, group: Sequence[Tensor]) -> int:
        """References to a storage besides the tensors of `group` and the copies of the queues."""
        own = len({id(tensor) for tensor in group}) + 1  # and the storage object of the next line
        storage = group[0].untyped_storage()
        for stream in self.streams:
            for item in stream.queue:
                if isinstance(item, _Copy):
                    own += sum(side.untyped_storage()._cdata == key for side in (item.dst, item.src))
        return int(torch._C._storage_Use_Count(storage._cdata)) - own

    def _region(self, tensor: Tensor) -> _Region:
        storage = tensor.untyped_storage()
        region = self._regions.get(storage._cdata)
        if region is None:
            if len(self._regions) % 64 == 63:
                self._regions = {key: old for key, old in self._regions.items() if not old.key.expired()}  # type: ignore[no-untyped-call]
            region = self._regions[storage._cdata] = _Region(
                StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            )
        return region

    def _access(self, stream: SimulatedStream, tensor: Tensor, is_write: bool, what: str) -> None:
        start, stop = _span(tensor)
        if start == stop:
            return
        region = self._region(tensor)
        if stream.index == COMPUTE:
            region.is_mentioned = True
        elif self._detect and not region.is_mentioned and stream.clock[COMPUTE] < self.compute.clock[COMPUTE]:
            raise RaceError(f"{what}: {NAMES[stream.index]} uses device memory that compute may have written just now")
        region.access(
            _Access(start, stop, stream.index, stream.clock[stream.index], is_write), stream.clock, self._detect, what
        )


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
