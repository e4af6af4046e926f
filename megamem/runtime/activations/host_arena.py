"""One block of host memory for all swapped activations, and the slots in it.

Why one block: torch's pinned allocator rounds each request up to a power of two and keeps it, which wastes up to half
of the host memory, and pinning on the hot path takes a driver lock that stops every stream. So the block is reserved
once, at first use, and divided here.

Slots are given by first fit, in multiples of 512 bytes (the alignment of the device allocator, so that both ends of
a copy are aligned), and free neighbours are joined. The choice depends on the sequence of calls alone, never on time
or on which copies happen to be over: tensor-parallel ranks that make the same calls get the same answers, and so take
the same decision between swap and recomputation.

A slot may be handed on while the copies of its last tenant still run. It then carries *guards*: the events that
the first write of the next tenant must wait for. torch keeps no account of this memory, so the guards are the only
protection (the hazard of reusing a pinned buffer by address, as found in public offloading code).

        free block [guards: H2D #7]      +  free neighbour [guards: H2D #5, D2H #9]
     => free block [guards: H2D #7, D2H #9]     the later event of a stream stands for the earlier ones
     => slot [both] + remaining free block [both]
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from typing import final

from torch import Tensor

from megamem.errors import ActivationError
from megamem.runtime.activations.streams import AbstractDevice, AbstractEvent

ALIGNMENT = 512
"""Slots start at, and take up, a multiple of this many bytes."""

Guards = tuple[AbstractEvent, ...]

_log = logging.getLogger("megamem")


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to what a slot takes; never 0, so that every slot has a place of its own."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


def merge_guards(left: Guards, right: Guards) -> Guards:
    """The events to wait for instead of all of both: the last one of each stream."""
    if not right:
        return left
    if not left:
        return right
    last = {id(event.stream): event for event in left}
    for event in right:
        other = last.get(id(event.stream))
        if other is None or other.number < event.number:
            last[id(event.stream)] = event
    return tuple(last.values())


@final
class Slot:
    """A tenant's piece of the arena: bytes `start` to `start + nbytes`, to be written only after `guards`."""

    __slots__ = ("_block", "guards", "nbytes", "start")

    def __init__(self, start: int, nbytes: int, guards: Guards, block: Tensor) -> None:
        self.start = start
        self.nbytes = nbytes
        self.guards = guards
        self._block = block

    @property
    def memory(self) -> Tensor:
        """The bytes, as uint8."""
        return self._block[self.start : self.start + self.nbytes]

    def __repr__(self) -> str:
        return f"Slot(start={self.start}, nbytes={self.nbytes}, guards={len(self.guards)})"


@final
class HostArena:
    """`nbytes` of host memory in one block, reserved at first use and divided into slots.

    The device may reserve less than was asked for (a limit on locked memory, WSL); `shrunk` then says so and the
    log once. Ranks that must decide alike agree on the smallest `reserve()` among them and pass it to `limit`.
    """

    def __init__(self, device: AbstractDevice, nbytes: int) -> None:
        if nbytes < 0:
            raise ValueError(f"an arena holds 0 bytes or more, not {nbytes}")
        self._device = device
        self._asked = nbytes // ALIGNMENT * ALIGNMENT
        self._capacity = self._asked
        self._memory: Tensor | None = None
        self._live: dict[int, Slot] = {}
        self._in_use = 0
        self._peak = 0
        # Free blocks in order of address, as parallel lists: bisecting and scanning lists of integers is fast.
        self._starts: list[int] = []
        self._sizes: list[int] = []
        self._guards: list[Guards] = []

    @property
    def capacity(self) -> int:
        """Bytes; before first use what was asked for, afterwards what there is."""
        return self._capacity

    @property
    def shrunk(self) -> bool:
        """Whether the machine gave less than was asked for."""
        return self._memory is not None and self._memory.numel() < self._asked

    @property
    def in_use(self) -> int:
        """Bytes in slots that are not freed yet."""
        return self._in_use

    @property
    def peak(self) -> int:
        """The most bytes that were ever in use."""
        return self._peak

    @property
    def num_slots(self) -> int:
        """Slots that are not freed yet."""
        return len(self._live)

    @property
    def largest_free(self) -> int:
        """Bytes that the largest slot to be had right now would take."""
        return max(self._sizes, default=0) if self._memory is not None else self._capacity

    def reserve(self) -> int:
        """Take the memory now rather than at the first `allocate`; returns the capacity in bytes."""
        if self._memory is None and self._asked:
            self._memory = self._device.host_buffer(self._asked)
            self._capacity = min(self._memory.numel() // ALIGNMENT * ALIGNMENT, self._asked)
            if self._capacity:
                self._insert(0, 0, self._capacity, ())
            if self.shrunk:
                _log.warning(
                    "host arena: %.2f of %.2f GiB could be reserved; activations that do not fit are recomputed or "
                    "kept. Lower the host budget, or raise the limit on locked memory (ulimit -l)",
                    self._capacity / 2**30,
                    self._asked / 2**30,
                )
        return self._capacity

    def limit(self, nbytes: int) -> None:
        """Use no more than `nbytes` of what was reserved; raises ActivationError while a slot is in use."""
        if self._live:
            raise ActivationError(f"the host arena cannot be limited while {len(self._live)} slots are in use")
        self._capacity = min(self.reserve(), max(nbytes, 0) // ALIGNMENT * ALIGNMENT)
        guards: Guards = ()
        for each in self._guards:
            guards = merge_guards(guards, each)
        self._starts, self._sizes, self._guards = [], [], []
        if self._capacity:
            self._insert(0, 0, self._capacity, guards)

    def allocate(self, nbytes: int) -> Slot | None:
        """A slot of at least `nbytes`, or None when no free block is large enough."""
        if self._memory is None:
            self.reserve()
        need = aligned(nbytes)
        memory = self._memory
        index = next((index for index, size in enumerate(self._sizes) if size >= need), None)
        if index is None or memory is None:
            return None
        size = self._sizes[index]
        start = self._starts[index]
        guards = self._guards[index]
        if guards:
            guards = tuple(event for event in guards if not event.done())
        if size == need:
            del self._starts[index], self._sizes[index], self._guards[index]
        else:
            self._starts[index] = start + need
            self._sizes[index] = size - need
            self._guards[index] = guards
        slot = Slot(start, need, guards, memory)
        self._live[start] = slot
        self._in_use += need
        self._peak = max(self._peak, self._in_use)
        self._device.claim_host(memory, start, need)
        return slot

    def free(self, slot: Slot, after: AbstractEvent | None) -> None:
        """Take a slot back; `after` is the event behind the last copy that touches it, None when there is none.

        The next tenant inherits the slot's own guards too, for its writer may never have come to wait for them.
        Raises ActivationError for a slot that was freed before or that belongs to another arena.
        """
        start = slot.start
        if self._live.get(start) is not slot:
            raise ActivationError(f"{slot} is not in use in this host arena: freed twice, or taken from another arena")
        del self._live[start]
        self._in_use -= slot.nbytes
        assert self._memory is not None
        self._device.release_host(self._memory, start, slot.nbytes, after)
        guards = slot.guards if after is None else merge_guards(slot.guards, (after,))
        index = bisect_left(self._starts, start)
        size = slot.nbytes
        if index < len(self._starts) and start + size == self._starts[index]:
            size += self._sizes[index]
            guards = merge_guards(guards, self._guards[index])
            del self._starts[index], self._sizes[index], self._guards[index]
        if index and self._starts[index - 1] + self._sizes[index - 1] == start:
            self._sizes[index - 1] += size
            self._guards[index - 1] = merge_guards(self._guards[index - 1], guards)
        else:
            self._insert(index, start, size, guards)

    def _insert(self, index: int, start: int, size: int, guards: Guards) -> None:
        self._starts.insert(index, start)
        self._sizes.insert(index, size)
        self._guards.insert(index, guards)
