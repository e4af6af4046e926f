"""Is this a solution? Written from the definition alone; no solver's code is used. O(n log n).

A solution of a problem gives every buffer an offset that is not negative, such that no byte belongs to two buffers at
one instant: for buffers i and j whose lifetimes [lower, upper) intersect, [offset, offset + size) do not. With a
capacity, every buffer also ends within it.

One sweep over births and deaths keeps the live buffers by offset. As long as no two of them overlap, a new one can only
overlap the nearest live one below it or the nearest above.
"""

from __future__ import annotations

from megamem.errors import AllocationError
from megamem.ir.allocation import Buffer, Solution

_BITS = 512


def check(solution: Solution, *, capacity: int | None = None) -> None:
    """Raise AllocationError, naming the buffers, unless the solution is valid (and within `capacity` bytes)."""
    fault = find_fault(solution, capacity=capacity)
    if fault is not None:
        raise AllocationError(f"not a solution: {fault}")


def find_fault(solution: Solution, *, capacity: int | None = None) -> str | None:
    """What is wrong, in one sentence; None for a valid solution."""
    buffers, offsets = solution.problem.buffers, solution.offsets
    for offset, buffer in solution:
        if offset < 0:
            return f"buffer {buffer.id!r} has the negative offset {offset}"
        if capacity is not None and offset + buffer.size > capacity:
            return f"buffer {buffer.id!r} ends at {offset + buffer.size}, beyond the capacity of {capacity} bytes"
    by_offset = sorted(range(len(buffers)), key=offsets.__getitem__)
    rank = [0] * len(buffers)
    for position, index in enumerate(by_offset):
        rank[index] = position
    # Deaths come before births at one instant: lifetimes are half-open.
    events = [(buffer.upper, 0, index) for index, buffer in enumerate(buffers)]
    events += [(buffer.lower, 1, index) for index, buffer in enumerate(buffers)]
    live = OrderedRanks(len(buffers))
    for instant, is_birth, index in sorted(events):
        if not is_birth:
            live.remove(rank[index])
            continue
        below, above = live.below(rank[index]), live.above(rank[index])
        live.add(rank[index])
        for lower, upper in ((below, rank[index]), (rank[index], above)):
            if lower is None or upper is None:
                continue
            one, other = by_offset[lower], by_offset[upper]
            if offsets[one] + buffers[one].size > offsets[other]:
                return _overlap(instant, (buffers[one], offsets[one]), (buffers[other], offsets[other]))
    return None


def _overlap(instant: int, *pair: tuple[Buffer, int]) -> str:
    parts = [
        f"buffer {buffer.id!r} (live in [{buffer.lower}, {buffer.upper})) lies in bytes "
        f"[{offset}, {offset + buffer.size})"
        for buffer, offset in pair
    ]
    return f"at instant {instant} {' and '.join(parts)}, which overlap"


class OrderedRanks:
    """A set of numbers below `size` with its neighbours of a number: a tree of bit sets, 512 children to a node."""

    def __init__(self, size: int) -> None:
        self._levels: list[list[int]] = []
        while True:
            size = -(-size // _BITS)
            self._levels.append([0] * max(size, 1))
            if size <= 1:
                break

    def add(self, number: int) -> None:
        """Put a number into the set."""
        for words in self._levels:
            number, bit = divmod(number, _BITS)
            words[number] |= 1 << bit

    def remove(self, number: int) -> None:
        """Take a number out of the set."""
        for words in self._levels:
            number, bit = divmod(number, _BITS)
            words[number] &= ~(1 << bit)
            if words[number]:
                return

    def below(self, number: int) -> int | None:
        """The greatest number of the set below `number`."""
        for level, words in enumerate(self._levels):
            number, bit = divmod(number, _BITS)
            rest = words[number] & ((1 << bit) - 1)
            if rest:
                number = number * _BITS + rest.bit_length() - 1
                for lower in reversed(self._levels[:level]):
                    number = number * _BITS + lower[number].bit_length() - 1
                return number
        return None

    def above(self, number: int) -> int | None:
        """The least number of the set above `number`."""
        for level, words in enumerate(self._levels):
            number, bit = divmod(number, _BITS)
            rest = words[number] >> (bit + 1) << (bit + 1)
            if rest:
                number = number * _BITS + _lowest_bit(rest)
                for lower in reversed(self._levels[:level]):
                    number = number * _BITS + _lowest_bit(lower[number])
                return number
        return None


def _lowest_bit(word: int) -> int:
    return (word & -word).bit_length() - 1
