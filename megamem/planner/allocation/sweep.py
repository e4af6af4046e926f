"""A problem in dense form: time cut into sections, sizes in multiples of their greatest common divisor.

A *section* is a maximal set of buffers that are all live at one instant. Sweeping over births and deaths, one ends with
the first death after a birth; what lies between is contained in a neighbour and restricts nothing. So buffer i lives in
the sections first[i] .. last[i] - 1, two buffers conflict exactly when they share a section, and the most bytes that
are live in any section are a lower bound of every solution's peak.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd

from megamem.ir.allocation import Problem


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Per buffer its sections [first, last) and its size in units of `unit` bytes; per section an instant in it."""

    unit: int
    first: array[int]
    last: array[int]
    size: array[int]
    instants: array[int]

    @classmethod
    def of(cls, problem: Problem) -> Sweep:
        """O(n log n) for n buffers."""
        buffers = problem.buffers
        unit = gcd(*(buffer.size for buffer in buffers)) or 1
        # Deaths before births at one instant: lifetimes are half-open.
        events = sorted(
            [(buffer.lower, 1, index) for index, buffer in enumerate(buffers)]
            + [(buffer.upper, 0, index) for index, buffer in enumerate(buffers)]
        )
        first, last = array("i", bytes(4 * len(buffers))), array("i", bytes(4 * len(buffers)))
        instants = array("q")
        born, pending = 0, False
        for instant, is_birth, index in events:
            if is_birth:
                born, first[index] = instant, len(instants)
                pending = True
            else:
                if pending:
                    instants.append(born)
                    pending = False
                last[index] = len(instants)
        return cls(
            unit=unit, first=first, last=last, size=array("q", [buffer.size // unit for buffer in buffers]),
            instants=instants,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.size)

    @property
    def num_sections(self) -> int:
        return len(self.instants)

    @cached_property
    def live(self) -> list[int]:
        """Units that are live in each section."""
        changes = [0] * (self.num_sections + 1)
        for first, last, size in zip(self.first, self.last, self.size, strict=True):
            changes[first] += size
            changes[last] -= size
        total, live = 0, []
        for change in changes[:-1]:
            total += change
            live.append(total)
        return live

    @cached_property
    def max_live(self) -> int:
        """Units of the fullest section: no solution has a lower peak."""
        return max(self.live, default=0)

    def members(self, section: int) -> list[int]:
        """The buffers that are live in a section."""
        return [i for i in range(len(self)) if self.first[i] <= section < self.last[i]]

    def components(self) -> list[list[int]]:
        """The buffers, split where no buffer crosses from one section to the next: parts that can be solved alone."""
        parts: list[list[int]] = []
        reach = -1
        for i in sorted(range(len(self)), key=lambda i: self.first[i]):
            if self.first[i] >= reach:
                parts.append([])
            parts[-1].append(i)
            reach = max(reach, self.last[i])
        return parts

    def subset(self, indices: Sequence[int]) -> Sweep:
        """The same for some of the buffers; the unit stays, sections become fewer."""
        starts = {self.first[i] for i in indices}
        # Of the sections between two births only the first can be maximal, so births number the new ones.
        rank, instants = array("i", bytes(4 * (self.num_sections + 1))), array("q")
        for section in range(self.num_sections):
            rank[section] = len(instants)
            if section in starts:
                instants.append(self.instants[section])
        rank[self.num_sections] = len(instants)
        return Sweep(
            unit=self.unit,
            first=array("i", [rank[self.first[i]] for i in indices]),
            last=array("i", [rank[self.last[i]] for i in indices]),
            size=array("q", [self.size[i] for i in indices]),
            instants=instants,
        )

    def peak(self, offsets: Sequence[int]) -> int:
        """Units that a placement needs."""
        return max((offset + size for offset, size in zip(offsets, self.size, strict=True)), default=0)
