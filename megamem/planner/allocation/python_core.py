"""The inner loops in plain Python: the definition that the compiled ones are checked against, and their stand-in.

Both visit the same nodes in the same order, so answers and node counts are equal. For small problems only: a search
here takes some hundred times as long.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from megamem.planner.allocation.core import Core, SearchResult, Watch, never
from megamem.planner.allocation.sweep import Sweep

_POLL_EVERY = 64
_WINDOWS = 64


class PythonCore(Core):
    """No compiler needed."""

    name: ClassVar[str] = "python"

    def first_fit(
        self, sweep: Sweep, order: Sequence[int], *, best_fit: bool = False, watch: Watch = never
    ) -> Sequence[int] | None:
        offsets = [0] * len(sweep)
        shelves = _Shelves(sweep.num_sections)
        for step, i in enumerate(order):
            if step % _POLL_EVERY == _POLL_EVERY - 1 and watch():
                return None
            first, last, size = sweep.first[i], sweep.last[i], sweep.size[i]
            top, best, smallest = 0, None, None
            for offset, end, other_first, other_last in shelves.touching(first, last):
                if other_first >= last or other_last <= first:
                    continue
                gap = offset - top
                if gap >= size and (smallest is None or gap < smallest):
                    best, smallest = top, gap
                    if not best_fit:
                        break
                top = max(top, end)
            offsets[i] = top if best is None else best
            shelves.put((offsets[i], offsets[i] + size, first, last))
        return offsets

    def search(
        self,
        sweep: Sweep,
        capacity: int,
        preorder: Sequence[int],
        *,
        max_nodes: int,
        fullest_first: bool = False,
        watch: Watch = never,
    ) -> SearchResult:
        if sweep.max_live > capacity:
            return SearchResult(status="none", nodes=0)
        search = _Search(sweep, capacity, preorder, fullest_first, max_nodes, watch)
        try:
            found = search.descend(list(preorder), -1, (0, sweep.num_sections), (0, -1))
        except _Aborted:
            return SearchResult(status="stopped" if search.stopped else "limit", nodes=search.nodes)
        if not found:
            return SearchResult(status="none", nodes=search.nodes)
        return SearchResult(status="found", nodes=search.nodes, offsets=search.offsets)


_Placed = tuple[int, int, int, int]  # offset, end, first, last


class _Shelves:
    """What is placed, by offset: all of it, and once more for each window of sections that it touches."""

    def __init__(self, num_sections: int) -> None:
        self._width = max(num_sections // _WINDOWS, 1)
        self._all: list[_Placed] = []
        self._windows: list[list[_Placed]] = [[] for _ in range(num_sections // self._width + 1)]

    def put(self, item: _Placed) -> None:
        insort(self._all, item)
        for window in range(item[2] // self._width, (item[3] - 1) // self._width + 1):
            insort(self._windows[window], item)

    def touching(self, first: int, last: int) -> list[_Placed]:
        """At least what shares a section with [first, last)."""
        window = first // self._width
        return self._windows[window] if window == (last - 1) // self._width else self._all


class _Aborted(Exception):  # noqa: N818 - not an error
    """Out of nodes, or stopped."""


class _Search:
    """One depth-first search; `canonical_search.cpp` says in words what it does.

    A place is a pair (offset, rank in the preorder); placements go by rising place.
    """

    def __init__(
        self,
        sweep: Sweep,
        capacity: int,
        preorder: Sequence[int],
        fullest_first: bool,
        max_nodes: int,
        watch: Watch,
    ) -> None:
        self.sweep, self.capacity, self.max_nodes, self.watch = sweep, capacity, max_nodes, watch
        self.fullest_first = fullest_first
        self.nodes, self.stopped = 0, False
        self.offsets = [0] * len(sweep)
        self.tie = {i: place for place, i in enumerate(preorder)}
        self.rank = dict(self.tie)
        self.floor = [0] * len(sweep)
        self.unplaced = set(preorder)
        first, last = sweep.first, sweep.last
        self.neighbours = [
            [j for j in range(len(sweep)) if i != j and first[i] < last[j] and first[j] < last[i]]
            for i in range(len(sweep))
        ]
        self.members = [sweep.members(section) for section in range(sweep.num_sections)]

    def waiting(self, section: int) -> int:
        """Size of what is unplaced in a section."""
        return sum(self.sweep.size[i] for i in self.members[section] if i in self.unplaced)

    def descend(self, unplaced: list[int], placed: int, sections: tuple[int, int], current: tuple[int, int]) -> bool:
        """Solve what is left, part by part where no unplaced buffer crosses from one section to the next."""
        first, last = self.sweep.first, self.sweep.last
        left = [j for j in unplaced if j != placed]
        borders = [s for s in range(sections[0] + 1, sections[1]) if not any(first[j] < s < last[j] for j in left)]
        for begin, end in pairwise([sections[0], *borders, sections[1]]):
            part = [j for j in left if first[j] >= begin and last[j] <= end]
            solve = self.solve_fullest_first if self.fullest_first and (placed < 0 or borders) else self.solve
            if part and not solve(part, (begin, end), current):
                return False
        return True

    def solve_fullest_first(self, part: list[int], sections: tuple[int, int], current: tuple[int, int]) -> bool:
        """Solve a part with ranks of its own; all of it lies at the current offset or above."""
        before = {i: self.rank[i] for i in part}
        fullest = {i: max(map(self.waiting, range(self.sweep.first[i], self.sweep.last[i]))) for i in part}
        in_order = sorted(part, key=lambda i: (-fullest[i], self.tie[i]))
        self.rank.update((i, rank) for rank, i in enumerate(in_order))
        found = self.solve(part, sections, (current[0], -1))
        self.rank.update(before)
        return found

    def solve(self, unplaced: list[int], sections: tuple[int, int], current: tuple[int, int]) -> bool:
        """Place all of `unplaced` after `current`."""
        size = self.sweep.size
        lowest_end = min(self.floor[i] + size[i] for i in unplaced)
        places = sorted((self.floor[i], self.rank[i], i) for i in unplaced)
        fullest = max(self.waiting(section) for section in range(*sections))
        for offset, rank, i in places:
            if (offset, rank) <= current:
                continue
            if offset >= lowest_end or offset + fullest > self.capacity:
                return False
            self.count()
            floors = list(self.floor)
            self.unplaced.discard(i)
            fits = self.place(i) and self.has_room(unplaced, sections, (offset, rank))
            found = fits and self.descend(unplaced, i, sections, (offset, rank))
            is_alone = not any(j in self.unplaced for j in self.neighbours[i])
            self.unplaced.add(i)
            self.floor = floors
            if found:
                self.offsets[i] = offset
                return True
            if is_alone:
                return False
        return False

    def count(self) -> None:
        """One node more."""
        self.nodes += 1
        if self.nodes > self.max_nodes:
            raise _Aborted
        if self.nodes % _POLL_EVERY == 0 and self.watch():
            self.stopped = True
            raise _Aborted

    def place(self, i: int) -> bool:
        """Raise the floors of i's neighbours; False where one no longer fits."""
        top = self.floor[i] + self.sweep.size[i]
        for j in self.neighbours[i]:
            if j in self.unplaced and self.floor[j] < top:
                if top + self.sweep.size[j] > self.capacity:
                    return False
                self.floor[j] = top
        return True

    def has_room(self, unplaced: list[int], sections: tuple[int, int], current: tuple[int, int]) -> bool:
        """Whether each section can take what waits for it above the lowest offset that any of it can reach."""
        size, reach = self.sweep.size, {}
        for j in unplaced:
            if j not in self.unplaced:
                continue
            reach[j] = self.floor[j]
            if (self.floor[j], self.rank[j]) <= current:
                ends = [max(self.floor[k], current[0]) + size[k] for k in self.neighbours[j] if k in self.unplaced]
                if not ends or min(ends) + size[j] > self.capacity:
                    return False
                reach[j] = min(ends)
        for section in range(*sections):
            waiting = [j for j in self.members[section] if j in self.unplaced]
            if waiting and min(reach[j] for j in waiting) + self.waiting(section) > self.capacity:
                return False
        return True
