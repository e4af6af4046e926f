"""From the steady state of one microbatch to the steps of all of them, with a warm-up and a cool-down.

Every microbatch runs one period after the one before, and W go into the gaps. Then, in order of time, every step moves
to the earliest gap of its rank in which its input is there and the memory suffices. Nothing moves where the steady
state has no gaps; the warm-up fills with F until the memory is full, and the cool-down closes up.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort

from megamem.planner.schedules.search.problem import Outcome, Problem, Steps

Chain = tuple[list[float], list[float]]  # start of F and of B of microbatch 0, by stage
Timed = tuple[float, str, int, int]  # start, kind, stage, microbatch


class _Gaps:
    """The idle intervals of a rank, in order of time."""

    def __init__(self, hair: float) -> None:
        self.start, self.end, self.hair = [0.0], [math.inf], hair

    def find(self, ready: float, seconds: float, before: float = math.inf) -> tuple[int, float] | None:
        """The first gap with room for `seconds` from `ready` on: its index and the start. Only starts < `before`."""
        start, end, hair = self.start, self.end, self.hair
        for index in range(max(0, bisect_right(start, ready) - 1), len(start)):
            begin = max(start[index], ready)
            if begin >= before - hair:
                return None
            if end[index] - begin >= seconds - hair:
                return index, begin
        return None

    def take(self, index: int, begin: float, end: float) -> None:
        """Cut [begin, end) out of a gap."""
        rests = ((self.start[index], begin), (end, self.end[index]))
        kept = [(left, right) for left, right in rests if right - left > self.hair]
        self.start[index : index + 1] = [left for left, _ in kept]
        self.end[index : index + 1] = [right for _, right in kept]

    def give(self, begin: float, end: float) -> None:
        """Put [begin, end) back, joined with the gaps that it touches."""
        index = bisect_left(self.start, begin)
        if index and abs(self.end[index - 1] - begin) <= 2 * self.hair:
            index -= 1
            self.end[index] = end
        else:
            self.start.insert(index, begin)
            self.end.insert(index, end)
        if index + 1 < len(self.start) and abs(self.start[index + 1] - end) <= 2 * self.hair:
            self.end[index] = self.end[index + 1]
            del self.start[index + 1], self.end[index + 1]


class _Memory:
    """The memory of a rank over time, as changes."""

    def __init__(self) -> None:
        self.changes: list[tuple[float, float]] = []

    def earliest(self, until: float, most: float) -> float:
        """From when on the level stays at `most` up to `until`; infinite where it does not."""
        level, since = 0.0, 0.0
        for time, change in self.changes:
            if time >= until:
                break
            level += change
            if level > most:
                since = math.inf
            elif since == math.inf:
                since = time
        return since

    def fits(self, limit: float) -> bool:
        """Whether the level is never above `limit`."""
        level = 0.0
        for _, change in self.changes:
            level += change
            if level > limit:
                return False
        return True


def unroll(problem: Problem, chain: Chain) -> Outcome | None:
    """The whole step from the steady state. None where its memory is above the limit."""
    seconds = {"F": problem.forward, "B": problem.backward, "W": problem.weight}
    gaps = [_Gaps(1e-7 * problem.period) for _ in range(problem.num_ranks)]
    timed = sorted(_repeat(problem, chain, gaps))
    memory = [_Memory() for _ in range(problem.num_ranks)]
    for start, kind, stage, _ in timed:
        memory[problem.ranks[stage]].changes.append(_change(problem, start, kind, stage))
    for each in memory:
        each.changes.sort()
        if not each.fits(problem.limit):
            return None
    ends: dict[tuple[str, int, int], float] = {}
    moved: list[Timed] = []
    for start, kind, stage, batch in timed:
        length = seconds[kind][stage]
        begin = _pull(problem, (start, kind, stage, batch), _ready(problem, ends, kind, stage, batch), gaps, memory)
        ends[kind, stage, batch] = begin + length
        moved.append((begin, kind, stage, batch))
    steps: Steps = [[] for _ in range(problem.num_ranks)]
    for _, kind, stage, batch in sorted(moved):
        steps[problem.ranks[stage]].append((kind, stage, batch, 0))
    return Outcome(max(ends.values()), steps)


def _repeat(problem: Problem, chain: Chain, gaps: list[_Gaps]) -> list[Timed]:
    """F and B of every microbatch, one period apart, and W in the first gap after B; all taken out of `gaps`."""
    timed: list[Timed] = []
    for kind, starts, seconds in (("F", chain[0], problem.forward), ("B", chain[1], problem.backward)):
        for stage, start in enumerate(starts):
            for batch in range(problem.num_microbatches):
                timed.append((start + batch * problem.period, kind, stage, batch))
                _occupy(gaps[problem.ranks[stage]], timed[-1][0], seconds[stage])
    for start, _, stage, batch in sorted(step for step in timed if step[1] == "B"):
        rank_gaps, length = gaps[problem.ranks[stage]], problem.weight[stage]
        found = rank_gaps.find(start + problem.backward[stage], length)
        assert found is not None  # the last gap has no end
        rank_gaps.take(found[0], found[1], found[1] + length)
        timed.append((found[1], "W", stage, batch))
    return timed


def _occupy(gaps: _Gaps, begin: float, seconds: float) -> None:
    index = max(0, bisect_right(gaps.start, begin + gaps.hair) - 1)
    gaps.take(index, max(begin, gaps.start[index]), begin + seconds)


def _change(problem: Problem, start: float, kind: str, stage: int) -> tuple[float, float]:
    """When and by how much a step changes the memory of its rank."""
    if kind == "F":
        return start, problem.take[stage]
    if kind == "B":
        return start + problem.backward[stage], problem.kept[stage] - problem.take[stage]
    return start + problem.weight[stage], -problem.kept[stage]


def _ready(problem: Problem, ends: dict[tuple[str, int, int], float], kind: str, stage: int, batch: int) -> float:
    """When the input of a step is there."""
    if kind == "W":
        return ends["B", stage, batch]
    if kind == "F":
        return ends["F", stage - 1, batch] + problem.hop[stage - 1] if stage else 0.0
    if stage + 1 == problem.num_stages:
        return ends["F", stage, batch]
    return ends["B", stage + 1, batch] + problem.hop[stage]


def _pull(problem: Problem, step: Timed, ready: float, gaps: list[_Gaps], memory: list[_Memory]) -> float:
    """Move one step to the earliest place there is for it; its start."""
    start, kind, stage, _ = step
    rank = problem.ranks[stage]
    seconds = {"F": problem.forward, "B": problem.backward, "W": problem.weight}[kind][stage]
    if ready >= start - gaps[rank].hair:
        return start
    earliest = ready
    if kind == "F":
        earliest = max(ready, memory[rank].earliest(start, problem.limit - problem.take[stage]))
    gaps[rank].give(start, start + seconds)
    found = gaps[rank].find(earliest, seconds, before=start)
    begin = start if found is None else found[1]
    if found is None:
        _occupy(gaps[rank], start, seconds)
        return start
    gaps[rank].take(found[0], begin, begin + seconds)
    memory[rank].changes.remove(_change(problem, start, kind, stage))
    insort(memory[rank].changes, _change(problem, begin, kind, stage))
    return begin
