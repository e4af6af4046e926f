"""Where the passes of a layer repeat in a trace: what the bi-level solver solves once.

A transformer's iteration repeats few programs: the forward and the backward pass of a layer, once per layer and
microbatch (arXiv 2407.12117, section 4.2). `Buffer.group` says which pass a buffer belongs to, where the trace knows.
Where it does not, passes are found: requests in order of birth are a string of sizes, and layers that follow one
another make it repeat with the period of a pass.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megamem.ir.allocation import Buffer, Problem

_GRAM = 8  # requests that must agree for two places to be compared
_PERIODS = 24  # most frequent distances that are looked at
_SHORTEST = 4  # requests in a pass


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Buffers born and dead within one pass of a layer, by birth: indices into the problem."""

    indices: tuple[int, ...]

    def program(self, problem: Problem) -> tuple[tuple[int, int, int], ...]:
        """Lifetimes relative to the first birth, and sizes: equal programs have equal solutions."""
        buffers = [problem.buffers[i] for i in self.indices]
        begin = buffers[0].lower
        return tuple((buffer.lower - begin, buffer.upper - begin, buffer.size) for buffer in buffers)


def find_passes(problem: Problem) -> list[Pass]:
    """Passes by the buffers' groups or, where no buffer has one, by repetition. Those of one buffer are left out."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, buffer in enumerate(problem.buffers):
        if buffer.group:
            groups[buffer.group].append(index)
    found: Iterable[list[int]] = groups.values() if groups else _by_repetition(problem)
    passes = [sorted(indices, key=lambda i: (problem.buffers[i].lower, i)) for indices in found if len(indices) > 1]
    return [Pass(indices=tuple(indices)) for indices in passes]


def _by_repetition(problem: Problem) -> Iterator[list[int]]:
    order = sorted(range(len(problem)), key=lambda i: (problem.buffers[i].lower, i))
    buffers = [problem.buffers[i] for i in order]
    births = [buffer.lower for buffer in buffers]
    deaths = [bisect_left(births, buffer.upper) for buffer in buffers]  # positions, as births are
    sizes = [buffer.size for buffer in buffers]
    taken = [False] * len(buffers)
    for period in _periods(sizes):
        for begin, end in _runs(sizes, period, taken):
            taken[begin:end] = [True] * (end - begin)
            shift = _best_cut(buffers, deaths, begin, end, period)
            for start in range(begin + shift, end - period + 1, period):
                stop = start + period
                yield [order[at] for at in range(start, stop) if deaths[at] <= stop]


def _periods(sizes: Sequence[int]) -> list[int]:
    """The distances at which the string most often repeats, the most frequent first."""
    last: dict[tuple[int, ...], int] = {}
    distances: Counter[int] = Counter()
    for at in range(len(sizes) - _GRAM + 1):
        gram = tuple(sizes[at : at + _GRAM])
        if gram in last and at - last[gram] >= _SHORTEST:
            distances[at - last[gram]] += 1
        last[gram] = at
    return [period for period, count in distances.most_common(_PERIODS) if count >= period]


def _runs(sizes: Sequence[int], period: int, taken: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Stretches [begin, end) of at least two periods in which sizes[i] == sizes[i + period], none of them taken."""
    begin, at = 0, 0
    while at + period <= len(sizes):
        is_equal = at + period < len(sizes) and sizes[at] == sizes[at + period]
        if not is_equal or taken[at] or taken[at + period]:
            if at - begin >= period:
                yield begin, at + period
                at += period - 1  # what was just given away is taken
            begin = at + 1
        at += 1


def _best_cut(buffers: Sequence[Buffer], deaths: Sequence[int], begin: int, end: int, period: int) -> int:
    """How far into the run to cut first, so that the fewest bytes of short-lived buffers live across a cut."""
    crossing = [0] * (2 * period + 1)
    for at in range(begin, end):
        life = deaths[at] - at
        if 1 < life <= period:  # cuts at the positions at + 1 .. deaths[at] - 1 would cross it
            start = (at + 1 - begin) % period
            crossing[start] += buffers[at].size
            crossing[start + life - 1] -= buffers[at].size
    for position in range(1, 2 * period):
        crossing[position] += crossing[position - 1]
    return min(range(period), key=lambda shift: (crossing[shift] + crossing[shift + period], shift))
