"""Exact canonical search, in the class of MiniMalloc (Moffitt, "MiniMalloc: A Lightweight Memory Allocator for
Hardware-Accelerated Machine Learning", ASPLOS 2023): finds a placement within a capacity or proves that there is none.

The search itself is `core.search`. Around it: parts that share no section are solved alone; every part is tried with
several orders of its buffers in turn, with a number of nodes that grows from round to round; and without a capacity the
least one is looked for, by trying the lower bound first and then what lies between it and the best so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from megamem.errors import UnsupportedError
from megamem.ir.allocation import Problem
from megamem.planner.allocation import greedy
from megamem.planner.allocation.core import SearchResult
from megamem.planner.allocation.explain import infeasible_subset
from megamem.planner.allocation.solver import Bound, Solver, Task
from megamem.planner.allocation.sweep import Sweep

MAX_BUFFERS = 3000  # of a part: a node of the search costs time in proportion, and a deep search memory by the square
_FIRST_NODES = 1 << 11
_GROWTH = 2
# W: duration, A: duration x size, L: number of sections, S: size, R: root of duration x size; T in front: those in the
# fullest section first. W, A and T are MiniMalloc's.
PREORDERS = ("WA", "TAW", "TWA", "TLS", "TRA")


class ExactSolver(Solver):
    """Proves what it finds, given the time."""

    name: ClassVar[str] = "exact"
    summary: ClassVar[str] = "canonical depth-first search in the class of MiniMalloc; proves optimality"

    def improve(self, task: Task) -> None:
        greedy.try_portfolio(task)
        while not task.is_done:
            part = worst_part(task)
            if len(part) > MAX_BUFFERS:
                raise UnsupportedError(
                    f"{len(part)} buffers hang together in time; the exact search takes {MAX_BUFFERS} at most. Use the "
                    "solver auto or greedy."
                )
            Part(task, part).improve()


def worst_part(task: Task) -> list[int]:
    """The buffers of the component that has the highest peak."""
    sweep, offsets = task.sweep, task.offsets
    return max(sweep.components(), key=lambda part: max(offsets[i] + sweep.size[i] for i in part))


@dataclass(frozen=True, kw_only=True)
class Preorder:
    """What `core.search` takes: an order of the buffers, and whether those in fuller sections go before it."""

    order: list[int]
    fullest_first: bool


def preorders(problem: Problem, sweep: Sweep, indices: Sequence[int]) -> list[Preorder]:
    """Orders of the buffers of `sweep`, those of `problem` with these indices: large first, by several keys."""
    buffers = [problem.buffers[index] for index in indices]
    keys: dict[str, Sequence[int]] = {
        "W": [buffer.upper - buffer.lower for buffer in buffers],
        "A": [(buffer.upper - buffer.lower) * buffer.size for buffer in buffers],
        "L": [last - first for first, last in zip(sweep.first, sweep.last, strict=True)],
        "S": sweep.size,
        "R": [(buffer.upper - buffer.lower) * buffer.size**2 for buffer in buffers],
    }
    everyone = range(len(sweep))
    return [
        Preorder(
            order=sorted(everyone, key=lambda i: tuple(-keys[key][i] for key in name.removeprefix("T"))),
            fullest_first=name.startswith("T"),
        )
        for name in PREORDERS
    ]


class Part:
    """One component of a task: buffers that share no section with the others."""

    def __init__(self, task: Task, indices: Sequence[int]) -> None:
        self.task, self.indices = task, indices
        self.sweep = task.sweep.subset(indices)
        self.preorders = preorders(task.problem, self.sweep, indices)
        self.lower_bound = self.sweep.max_live
        self.peak = self.sweep.peak([task.offsets[i] for i in indices])

    def improve(self) -> None:
        """Until this part is no longer the one that the peak depends on, or the task is done."""
        nodes = _FIRST_NODES
        while not self.task.budget.is_over:
            for capacity in self._capacities():
                result = self.search(capacity, nodes)
                if result.status == "none":
                    self._prove_above(capacity)
                if result.status != "limit":
                    break
            if self.peak <= max(self.task.target, self.lower_bound):
                return
            nodes *= _GROWTH

    def _capacities(self) -> Iterator[int]:
        """What to try in one round: the target, and without a capacity what lies between it and the best peak."""
        capacity = max(self.task.target, self.lower_bound)
        yield capacity
        while self.task.capacity is None and self.peak - capacity > 1:
            capacity = (capacity + self.peak) // 2
            yield capacity

    def search(self, capacity: int, max_nodes: int) -> SearchResult:
        """Try every order with so many nodes; the first that finds or proves something is the answer."""
        result = SearchResult(status="limit", nodes=0)
        for number, preorder in enumerate(self.preorders):
            unit = self.task.sweep.unit
            self.task.doing = f"exact search at {capacity * unit} bytes, order {number + 1}, {max_nodes} nodes"
            result = self.task.core.search(
                self.sweep,
                capacity,
                preorder.order,
                fullest_first=preorder.fullest_first,
                max_nodes=max_nodes,
                watch=self.task.watch,
            )
            if result.status == "limit":
                continue
            if result.offsets is not None:
                self._offer(result.offsets)
            break
        return result

    def _offer(self, offsets: Sequence[int]) -> None:
        self.peak = self.sweep.peak(offsets)
        whole = list(self.task.offsets)
        for i, offset in zip(self.indices, offsets, strict=True):
            whole[i] = offset
        if not self.task.offer(whole, "exact"):
            self.task.offsets = whole  # another part is as high: the peak stays, but this part is settled

    def _prove_above(self, capacity: int) -> None:
        self.lower_bound = capacity + 1
        task, unit, proof = self.task, self.task.sweep.unit, list(self.indices)
        if task.capacity is not None:  # this ends the work: say it with few buffers
            task.doing = "looking for the buffers that do not fit"
            proof = infeasible_subset(task.core, task.sweep, proof, capacity, watch=task.watch)
        task.raise_bound(
            Bound(
                nbytes=(capacity + 1) * unit,
                reason=f"sizes are multiples of {unit}, and an exhaustive search over {len(proof)} buffers finds no "
                f"placement in {capacity * unit} bytes",
                buffers=tuple(proof),
            )
        )
