"""What PyTorch's native CUDA caching allocator would reserve for the same requests: the baseline of every plan.

The rules (c10/cuda/CUDACachingAllocator.cpp), per stream:

* sizes are rounded up to 512 bytes; requests of at most 1 MiB have a pool of their own
* a free block of the pool that fits best is taken: the smallest that is large enough, at equal size the lowest
* else a segment is reserved: 2 MiB for the small pool, 20 MiB for requests below 10 MiB, else the size rounded up to
  2 MiB
* a block is split when 512 bytes (small pool) or more than 1 MiB (large pool) remain
* freed blocks merge with free neighbours of their segment; segments are kept
* with `max_split_size`, larger blocks are neither split nor given to smaller requests, and given to larger ones only
  where less than 20 MiB are left over
* under a limit, unused segments are given back before it is an error ("retry")

With `expandable_segments` there is one segment per stream and pool that grows at its end, by 2 MiB or 20 MiB, and
blocks of it are always split from 512 bytes on. Pages in its middle are given back only under a limit, which is not
simulated here: expandable segments with a limit are refused.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from megamem.errors import AllocationError
from megamem.ir.allocation import Problem
from megamem.ir.allocation_trace import AllocationTrace

_MIB = 1 << 20
_MIN_BLOCK = 512
_SMALL_SIZE = 1 * _MIB
_SMALL_SEGMENT = 2 * _MIB
_LARGE_SEGMENT = 20 * _MIB
_MIN_LARGE = 10 * _MIB
_ROUND_LARGE = 2 * _MIB


@dataclass(kw_only=True, slots=True)
class _Block:
    address: int
    size: int
    pool: _Pool
    previous: _Block | None = None
    next: _Block | None = None
    is_free: bool = False


@dataclass(kw_only=True)
class _Pool:
    is_small: bool
    free: list[tuple[int, int]] = field(default_factory=list)  # (size, address), sorted: the first that fits fits best
    blocks: dict[int, _Block] = field(default_factory=dict)  # the free ones by address
    last: _Block | None = None  # of the expandable segment


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Bytes at their highest, each by itself, and how often the device was asked.

    allocated: of blocks in use, rounding included      reserved: of segments
    segments: reservations, with expandable segments also growths      retries: times that segments were given back
    """

    allocated: int
    reserved: int
    segments: int
    retries: int


class CachingAllocator:
    """The allocator; `limit` is the memory of the device in bytes."""

    def __init__(
        self, *, limit: int | None = None, max_split_size: int | None = None, expandable_segments: bool = False
    ) -> None:
        if expandable_segments and (limit is not None or max_split_size is not None):
            raise AllocationError("expandable segments are simulated without limit and max_split_size; leave them out")
        self._limit = limit
        self._max_split = max_split_size
        self._is_expandable = expandable_segments
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._used: dict[int, _Block] = {}
        self._next_address = 0
        self._allocated = self._reserved = self._most_allocated = self._most_reserved = 0
        self._segments = self._retries = 0

    @property
    def peaks(self) -> Peaks:
        """So far."""
        return Peaks(
            allocated=self._most_allocated,
            reserved=self._most_reserved,
            segments=self._segments,
            retries=self._retries,
        )

    def malloc(self, name: int, size: int, stream: int = 0) -> int:
        """The address of a new block for a request that `free` will call `name`.

        Raises AllocationError when the limit does not hold it, or the name is in use.
        """
        if name in self._used or size <= 0:
            raise AllocationError(f"request {name} of {size} bytes is live already, or has no bytes")
        size = -(-size // _MIN_BLOCK) * _MIN_BLOCK
        is_small = size <= _SMALL_SIZE
        pool = self._pools.setdefault((stream, is_small), _Pool(is_small=is_small))
        block = self._best_fit(pool, size) or (self._grow if self._is_expandable else self._reserve)(pool, size)
        self._split(block, size)
        self._used[name] = block
        self._allocated += block.size
        self._most_allocated = max(self._most_allocated, self._allocated)
        return block.address

    def free(self, name: int) -> None:
        """Give a request's block back to its pool. Raises AllocationError when there is no such request."""
        block = self._used.pop(name, None)
        if block is None:
            raise AllocationError(f"request {name} is freed, but not live")
        self._allocated -= block.size
        for neighbour in (block.next, block.previous):
            if neighbour is not None and neighbour.is_free:
                self._take(neighbour)
                low, high = (block, neighbour) if neighbour is block.next else (neighbour, block)
                low.size += high.size
                self._unlink(high, low)
                block = low
        self._give(block)

    def _best_fit(self, pool: _Pool, size: int) -> _Block | None:
        at = bisect_left(pool.free, (size, -1))
        if at == len(pool.free):
            return None
        found, address = pool.free[at]
        if self._max_split is not None:
            if size < self._max_split <= found:
                return None
            if size >= self._max_split and found >= size + _LARGE_SEGMENT:
                return None
        block = pool.blocks[address]
        self._take(block)
        return block

    def _reserve(self, pool: _Pool, size: int) -> _Block:
        """A new segment, as one block."""
        if pool.is_small:
            segment = _SMALL_SEGMENT
        else:
            segment = _LARGE_SEGMENT if size < _MIN_LARGE else -(-size // _ROUND_LARGE) * _ROUND_LARGE
        if self._limit is not None and self._reserved + segment > self._limit:
            self._retries += 1
            self._release()
            if self._reserved + segment > self._limit:
                raise AllocationError(
                    f"out of memory: {segment} bytes are wanted, {self._reserved} of {self._limit} are reserved, "
                    f"of which {self._allocated} are in use"
                )
        self._count(segment)
        block = _Block(address=self._next_address, size=segment, pool=pool)
        self._next_address += segment
        return block

    def _grow(self, pool: _Pool, size: int) -> _Block:
        """The pool's expandable segment made so long that `size` bytes fit at its end; the block there."""
        last = pool.last
        if last is None or not last.is_free:
            base = last.address + last.size if last is not None else len(self._pools) << 50
            block = _Block(address=base, size=0, pool=pool, previous=last)
            if last is not None:
                last.next = block
            pool.last = block
        else:
            block = last
            self._take(block)
        page = _SMALL_SEGMENT if pool.is_small else _LARGE_SEGMENT
        growth = -(-(size - block.size) // page) * page
        self._count(growth)
        block.size += growth
        return block

    def _count(self, nbytes: int) -> None:
        self._reserved += nbytes
        self._segments += 1
        self._most_reserved = max(self._most_reserved, self._reserved)

    def _split(self, block: _Block, size: int) -> None:
        rest = block.size - size
        if block.pool.is_small or self._is_expandable:
            is_split = rest >= _MIN_BLOCK
        else:
            is_split = rest > _SMALL_SIZE and (self._max_split is None or size < self._max_split)
        if not is_split:
            return
        other = _Block(address=block.address + size, size=rest, pool=block.pool, previous=block, next=block.next)
        if block.next is not None:
            block.next.previous = other
        block.next, block.size = other, size
        if block.pool.last is block:
            block.pool.last = other
        self._give(other)

    def _release(self) -> None:
        """Give back every segment of which nothing is in use."""
        for pool in self._pools.values():
            for block in [block for block in pool.blocks.values() if block.previous is None and block.next is None]:
                self._take(block)
                self._reserved -= block.size

    def _unlink(self, high: _Block, low: _Block) -> None:
        low.next = high.next
        if high.next is not None:
            high.next.previous = low
        if low.pool.last is high:
            low.pool.last = low

    @staticmethod
    def _take(block: _Block) -> None:
        free = block.pool.free
        del free[bisect_left(free, (block.size, block.address))]
        del block.pool.blocks[block.address]
        block.is_free = False

    @staticmethod
    def _give(block: _Block) -> None:
        insort(block.pool.free, (block.size, block.address))
        block.pool.blocks[block.address] = block
        block.is_free = True


def simulate(
    requests: AllocationTrace | Problem,
    *,
    persistent: Iterable[int] = (),
    iterations: int = 2,
    limit: int | None = None,
    max_split_size: int | None = None,
    expandable_segments: bool = False,
) -> Peaks:
    """Peaks over some iterations, one after the other; buffers of `persistent` sizes are there from the start.

    The second iteration finds the segments that the first has left. What outlives an iteration is freed at its end.
    Raises AllocationError when it does not fit into `limit`.
    """
    allocator = CachingAllocator(
        limit=limit, max_split_size=max_split_size, expandable_segments=expandable_segments
    )  # fmt: skip
    for number, size in enumerate(persistent):
        allocator.malloc(-1 - number, size)
    if isinstance(requests, AllocationTrace):
        events = list(requests.events())
        wanted = [(request.size, request.stream) for request in requests.requests]
    else:
        events = [(is_malloc, index) for _, is_malloc, index in _in_order(requests)]
        wanted = [(buffer.size, 0) for buffer in requests.buffers]
    for _ in range(iterations):
        live: set[int] = set()
        for is_malloc, index in events:
            if is_malloc:
                allocator.malloc(index, *wanted[index])
                live.add(index)
            else:
                allocator.free(index)
                live.remove(index)
        for index in sorted(live):
            allocator.free(index)
    return allocator.peaks


def _in_order(problem: Problem) -> list[tuple[int, bool, int]]:
    """Births and deaths; deaths first at one instant, because lifetimes are half-open."""
    births = [(buffer.lower, True, index) for index, buffer in enumerate(problem.buffers)]
    deaths = [(buffer.upper, False, index) for index, buffer in enumerate(problem.buffers)]
    return sorted(births + deaths)
