"""A portfolio of greedy orders, which stops at the lower bound; then the worst orders' offenders are moved up.

Placing buffers one after the other into the lowest gap that holds them is good when the order is: by size, with birth
as tie-break, it comes within 0.4 % of the lower bound on every Megatron trace that was tried, where "longest first" as
the tie-break is 10 % off. No single order is best for all, so several are tried. Greedy by size is that of arXiv
2001.03288. Long-lived buffers first, by birth, makes a stack of what the backward pass frees in the opposite order. The
fullest section's buffers before all others leave no hole in that section.

What is left of the time goes into squeaky-wheel optimisation (Joslin and Clements, JAIR 10, 1999): buffers that end
above the target move forward in the best order, and it is tried again.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Container, Iterator, Sequence
from typing import ClassVar

from megamem.planner.allocation.solver import Solver, Task
from megamem.planner.allocation.sweep import Sweep

_LONG_LIVED = (0.1, 0.02, 0.05, 0.2, 0.5)  # shares of the horizon
_WHEEL_TURNS_WITHOUT_GAIN = 60
_SEED = 20240717


def orders(sweep: Sweep) -> Iterator[tuple[str, list[int]]]:
    """The portfolio, best first: a name, and the buffers in the order in which they are placed."""
    first, last, size = sweep.first, sweep.last, sweep.size
    everyone = range(len(sweep))
    yield "size/birth", sorted(everyone, key=lambda i: (-size[i], first[i]))
    for share in _LONG_LIVED:
        long = share * sweep.num_sections
        yield (
            f"long-lived/{share:g}",
            sorted(everyone, key=lambda i: _in_stack(sweep, i, long)),
        )
    fullest = set(sweep.members(sweep.live.index(sweep.max_live))) if len(sweep) else set()
    for share in _LONG_LIVED[1:3]:
        long = share * sweep.num_sections
        yield (
            f"fullest-section, long-lived/{share:g}",
            sorted(everyone, key=lambda i: _in_stack(sweep, i, long, fullest)),
        )
    yield "size-class/birth", sorted(everyone, key=lambda i: (-size[i].bit_length(), first[i]))
    yield "size-class/death", sorted(everyone, key=lambda i: (-size[i].bit_length(), -last[i]))
    yield "area", sorted(everyone, key=lambda i: -size[i] * (last[i] - first[i]))
    yield "duration", sorted(everyone, key=lambda i: (first[i] - last[i], -size[i]))
    totals = fullest_met(sweep)
    yield "section-total", sorted(everyone, key=lambda i: (-totals[i], -size[i]))
    yield "size/duration", sorted(everyone, key=lambda i: (-size[i], first[i] - last[i]))
    yield "birth", sorted(everyone, key=first.__getitem__)


def _in_stack(sweep: Sweep, i: int, long: float, first_of_all: Container[int] = ()) -> tuple[int, int, int]:
    """Sort key: `first_of_all`, its long-lived buffers first, then what lives for more than `long` sections, all by
    birth; then the rest by size."""
    birth = sweep.first[i]
    if i in first_of_all:
        return 0, int(sweep.last[i] - birth <= _LONG_LIVED[0] * sweep.num_sections), birth
    return (1, birth, 0) if sweep.last[i] - birth > long else (2, -sweep.size[i], birth)


def fullest_met(sweep: Sweep) -> list[int]:
    """Per buffer, the units live in the fullest section of its life: a sparse table of range maxima, O(n log n)."""
    table = [array("q", sweep.live)]
    while (half := 1 << (len(table) - 1)) * 2 <= sweep.num_sections:
        row = table[-1]
        table.append(array("q", map(max, row, row[half:])))
    fullest = []
    for first, last in zip(sweep.first, sweep.last, strict=True):
        row = table[level := (last - first).bit_length() - 1]
        fullest.append(max(row[first], row[last - (1 << level)]))
    return fullest


class GreedySolver(Solver):
    """First fit in many orders. No proof, unless the lower bound is met."""

    name: ClassVar[str] = "greedy"
    summary: ClassVar[str] = "first fit in a portfolio of orders, stops at the lower bound"

    def improve(self, task: Task) -> None:
        best = try_portfolio(task)
        if not task.is_done:
            turn_wheel(task, best)


def place_first(task: Task) -> None:
    """Offer the placement of the order that is best in general, unless the task is stopped meanwhile."""
    name, order = next(orders(task.sweep))
    task.doing = f"first fit by {name}"
    offsets = task.core.first_fit(task.sweep, order, watch=lambda: task.watch() and task.budget.is_stopped)
    if offsets is not None:
        task.offer(offsets, f"greedy ({task.doing})")
        task.first_peak = task.sweep.peak(offsets)


def try_portfolio(task: Task) -> list[int]:
    """Offer every order's placement until the task is done. Returns the order that was best."""
    lowest, best = None, list(range(len(task.sweep)))
    for best_fit in (False, True):
        for name, order in orders(task.sweep):
            if task.is_done:
                return best
            if lowest is None and task.first_peak is not None:
                lowest, best = task.first_peak, order  # it was placed already
                continue
            task.doing = f"{'best' if best_fit else 'first'} fit by {name}"
            offsets = task.core.first_fit(task.sweep, order, best_fit=best_fit, watch=task.watch)
            if offsets is None:
                return best
            task.offer(offsets, f"greedy ({task.doing})")
            peak = task.sweep.peak(offsets)
            if lowest is None or peak < lowest:
                lowest, best = peak, order
    return best


def turn_wheel(task: Task, order: Sequence[int], *, turns_without_gain: int = _WHEEL_TURNS_WITHOUT_GAIN) -> None:
    """Move what ends above the target forward, and place again, until that has long gained nothing."""
    sweep, rng = task.sweep, random.Random(_SEED)
    size = sweep.size
    priority = {i: float(rank) for rank, i in enumerate(order)}
    best, best_peak, idle = dict(priority), sweep.peak(task.offsets), 0
    while not task.is_done and idle < turns_without_gain:
        task.doing = f"squeaky wheel, {idle} turns without gain"
        offsets = task.core.first_fit(sweep, sorted(priority, key=priority.__getitem__), watch=task.watch)
        if offsets is None:
            return
        peak = sweep.peak(offsets)
        idle = 0 if task.offer(offsets, "greedy (squeaky wheel)") else idle + 1
        if peak <= best_peak:
            best, best_peak = dict(priority), peak
        elif idle % 10 == 9:
            priority = dict(best)
        for i, offset in enumerate(offsets):
            if offset + size[i] > task.target:
                priority[i] *= rng.uniform(0.3, 0.9)
