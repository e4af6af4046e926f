"""The arena of the static allocator, as the compiled core has it (`src/megamem.h`), for Python. No torch in it.

    core = ArenaCore.on_host()                    or of a front end's library and handle
    core.load(0, sizes, offsets)
    core.begin(0, stream)                         a step: from now on plan 0 is served
    address = core.malloc(size, stream)           None where the native allocator is to serve
    core.free(address)

Front ends call the core from C++; what Python calls between steps is `load`, `begin`, `end` and the counters.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from megamem.errors import AllocationError, NativeError
from megamem.native import load

FATES = ("served", "unplanned", "missed", "conflict", "small", "elsewhere")
"""What can become of a request while a plan is served; the core's header says what each means."""
Fate = Literal["served", "unplanned", "missed", "conflict", "small", "elsewhere"]

_TOTALS = (
    *("live_nbytes", "peak_nbytes", "capacity", "num_losses", "num_deferred", "num_stained", "num_unknown"),
    *("num_dropped", "num_retired"),
)
_OK, _BAD_PLAN = 0, 1


@dataclass(frozen=True, kw_only=True)
class ArenaCounters:
    """What the arena did so far, and what it holds.

    requests, nbytes:  by fate (see FATES), while plans were served
    live_nbytes:       bytes of the arena that are handed out now
    peak_nbytes:       the most there were
    capacity:          bytes that are reserved; 0 while nothing is
    num_losses:        how often the sequence of requests departed from the plan
    num_deferred:      blocks whose free had to wait for a second stream
    num_stained:       blocks that were written to while they were free; only with poison
    num_unknown:       frees inside the arena of what was no block
    num_dropped:       events for which the log had no room
    num_retired:       former arenas that are kept because a block in them is live
    """

    requests: dict[Fate, int]
    nbytes: dict[Fate, int]
    live_nbytes: int
    peak_nbytes: int
    capacity: int
    num_losses: int
    num_deferred: int
    num_stained: int
    num_unknown: int
    num_dropped: int
    num_retired: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> ArenaCounters:
        """From the core's array."""
        n = len(FATES)
        return cls(
            requests=dict(zip(FATES, numbers[:n], strict=True)),  # type: ignore[arg-type]
            nbytes=dict(zip(FATES, numbers[n : 2 * n], strict=True)),  # type: ignore[arg-type]
            **dict(zip(_TOTALS, numbers[2 * n :], strict=True)),
        )

    def since(self, before: ArenaCounters) -> ArenaCounters:
        """What was counted since then; live_nbytes, peak_nbytes, capacity and num_retired as they are now."""
        counted = ("num_losses", "num_deferred", "num_stained", "num_unknown", "num_dropped")
        return replace(
            self,
            requests={fate: count - before.requests[fate] for fate, count in self.requests.items()},
            nbytes={fate: count - before.nbytes[fate] for fate, count in self.nbytes.items()},
            **{name: getattr(self, name) - getattr(before, name) for name in counted},
        )


class Event(NamedTuple):
    """One line of the log. `kind`: malloc, free, use (of `address` by a second `stream`), step."""

    kind: str
    address: int
    size: int
    stream: int
    time_ns: int


_KINDS = ("malloc", "free", "use", "step")


class ArenaCore:
    """One arena. Its memory is given back with its last block."""

    def __init__(self, library: ctypes.CDLL, handle: int) -> None:
        self._library, self._handle = library, handle

    @classmethod
    def on_host(cls) -> ArenaCore:
        """An arena over host memory that serves no allocator yet; for `malloc` and `free` by hand.

        Raises NativeError where the core cannot be built.
        """
        library = load()
        handle = library.megamem_arena_create_host()
        if handle is None:
            raise NativeError("there is no memory for an arena")
        return cls(library, handle)

    def destroy(self) -> None:
        """Give everything back, live blocks too. Nothing may be called afterwards."""
        self._library.megamem_arena_destroy(self._handle)

    def load(self, plan: int, sizes: Sequence[int], offsets: Sequence[int], *, min_size: int = 0) -> None:
        """Plan number `plan`: request i has sizes[i] bytes and lies at offsets[i], as in an `ArenaPlan`.

        Requests below `min_size` bytes are not part of the sequence. Raises AllocationError for a plan that cannot be.
        """
        if len(sizes) != len(offsets):
            raise AllocationError(f"{len(offsets)} offsets for {len(sizes)} requests; give one to each")
        try:
            columns = [(ctypes.c_int64 * len(sizes))(*column) for column in (sizes, offsets)]
        except TypeError as fault:
            raise AllocationError(f"sizes and offsets must be whole numbers ({fault})") from fault
        if self._library.megamem_arena_load(self._handle, plan, len(sizes), *columns, min_size) != _OK:
            raise AllocationError(
                "the plan cannot be served: sizes must be positive (0 only where the native allocator serves), "
                "offsets multiples of 512 and not negative"
            )

    def begin(self, plan: int | None, stream: int = 0) -> bool:
        """A step begins; serve `plan`, or none. False where there is no memory for the arena: nothing is served.

        Raises AllocationError when there is no plan of this number.
        """
        status = self._library.megamem_arena_begin(self._handle, -1 if plan is None else plan, stream)
        if status == _BAD_PLAN:
            raise AllocationError(f"there is no plan {plan}; load it first")
        return bool(status == _OK)

    def end(self) -> None:
        """Serve nothing until the next step begins."""
        self._library.megamem_arena_end(self._handle)

    def reset(self) -> None:
        """Forget all plans, and give the memory back as soon as no block is live."""
        self._library.megamem_arena_reset(self._handle)

    def shrink(self) -> bool:
        """Give the memory back until the next step begins, if no block is live; whether it did."""
        return bool(self._library.megamem_arena_shrink(self._handle))

    def malloc(self, size: int, stream: int = 0) -> int | None:
        """The address for a request, or None where the native allocator is to serve it."""
        address: int | None = self._library.megamem_arena_malloc(self._handle, size, stream)
        return address

    def free(self, address: int) -> bool:
        """Take a block back. False where the address is none of the arena's."""
        return bool(self._library.megamem_arena_free(self._handle, address))

    def record_use(self, address: int, stream: int) -> bool:
        """A second stream uses a block: it stays taken until that use is over. False where there is no such block."""
        return bool(self._library.megamem_arena_record_use(self._handle, address, stream))

    def note_malloc(self, address: int, size: int, stream: int = 0) -> None:
        """Log a request that the native allocator served."""
        self._library.megamem_arena_note_malloc(self._handle, address, size, stream)

    def note_free(self, address: int) -> None:
        """Log a free that the native allocator served."""
        self._library.megamem_arena_note_free(self._handle, address)

    def watch(self, *, max_events: int | None) -> None:
        """Log every malloc and free from now on, after emptying the log; None ends it."""
        self._library.megamem_arena_watch(self._handle, int(max_events is not None), max_events or 0)

    @property
    def num_events(self) -> int:
        """Lines in the log."""
        return int(self._library.megamem_arena_num_events(self._handle))

    def events(self) -> list[Event]:
        """What the log holds."""
        count = self.num_events
        cells = array("q", bytes(5 * 8 * count))
        count = self._library.megamem_arena_read_events(self._handle, cells.buffer_info()[0], count)
        rows = cells[: 5 * count]
        return [
            Event(_KINDS[kind], address, size, stream, time)
            for kind, address, size, stream, time in zip(*(rows[i::5] for i in range(5)), strict=True)
        ]

    def poison(self, on: bool) -> None:
        """Keep all that is free of the arena filled with 0xFF bytes, which are NaN in every floating-point format."""
        self._library.megamem_arena_poison(self._handle, int(on))

    def counters(self) -> ArenaCounters:
        """A snapshot of the counters."""
        numbers = (ctypes.c_int64 * (2 * len(FATES) + len(_TOTALS)))()
        self._library.megamem_arena_counters(self._handle, numbers)
        return ArenaCounters.of(list(numbers))

    def blocks(self) -> list[tuple[int, int]]:
        """(address, bytes) of the blocks that are live, in order."""
        count, base = 1024, self.base
        while True:
            offsets, sizes = (ctypes.c_int64 * count)(), (ctypes.c_int64 * count)()
            found = self._library.megamem_arena_blocks(self._handle, offsets, sizes, count)
            if found <= count:
                return [(base + offsets[i], sizes[i]) for i in range(found)]
            count = found

    @property
    def base(self) -> int:
        """The address of the arena; 0 while none is reserved."""
        return self._library.megamem_arena_base(self._handle) or 0


def align(reference: Sequence[int], other: Sequence[int]) -> list[int]:
    """Where a sequence of sizes follows another: the place of other[i] in `reference`, rising, or -1.

    The sizes at a place may differ: it is then the same request as far as its neighbours tell.
    Raises NativeError where the core cannot be built.
    """
    index = (ctypes.c_int32 * max(len(other), 1))()
    columns: list[Any] = []
    for sequence in (reference, other):
        columns += [len(sequence), (ctypes.c_int64 * len(sequence))(*sequence)]
    if load().megamem_align(*columns, index) != _OK:
        raise NativeError("there is no memory to compare two steps")
    return index[: len(other)]
