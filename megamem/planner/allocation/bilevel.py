"""MEMO's bi-level planning (arXiv 2407.12117, section 4.2), refined by flat passes.

Level 1 solves each distinct pass of a layer alone. Level 2 places one block per pass, as large as the pass's peak and
live from its first birth to its last death, and the buffers outside of passes. A buffer's offset is that of its block
plus that within the pass.

A block holds its peak for its whole life, which costs up to 9 % of the peak under full recomputation (measured on
Megatron traces). So the result is refined: first fit by rising offset, which lowers buffers and raises none, then first
fit with whole passes in the order of their blocks, then by size. Where a gap is left the flat greedy solver goes on
from there: where a pipeline's chunks and an engine that swaps interleave, that is most of it. The best is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from megamem.ir.allocation import Buffer, Problem
from megamem.planner.allocation import greedy
from megamem.planner.allocation.budget import Budget
from megamem.planner.allocation.exact import ExactSolver
from megamem.planner.allocation.passes import Pass, find_passes
from megamem.planner.allocation.solver import Outcome, Solver, Task

_LEVEL_ONE_SECONDS = 2.0  # per distinct pass, which is a problem of some dozens of buffers
_EXACT_BUFFERS = 400
_TURNS = 400  # of the flat solver's wheel without a gain


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """Level 1's passes with their solutions, and level 2's problem: one block per pass, then the other buffers."""

    passes: tuple[Pass, ...]
    programs: tuple[Outcome, ...]  # one per pass; equal programs share one
    others: tuple[int, ...]
    blocks: Problem
    num_programs: int

    def compose(self, offsets: Sequence[int]) -> list[int]:
        """Offsets of the problem's buffers from those of level 2, all in bytes."""
        whole = [0] * (len(self.others) + sum(len(part.indices) for part in self.passes))
        for part, outcome, base in zip(self.passes, self.programs, offsets, strict=False):
            for index, offset in zip(part.indices, outcome.solution.offsets, strict=True):
                whole[index] = base + offset
        for index, offset in zip(self.others, offsets[len(self.passes) :], strict=True):
            whole[index] = offset
        return whole


class BilevelSolver(Solver):
    """`level_one` solves the passes; by default greedily and, where that misses the lower bound, exactly.

    goes_on: with the flat greedy solver, where a gap is left
    """

    name: ClassVar[str] = "bilevel"
    summary: ClassVar[str] = "MEMO: each layer pass once, one block per pass, refined by flat passes"

    def __init__(self, level_one: Solver | None = None, *, goes_on: bool = True) -> None:
        self.level_one, self.goes_on = level_one, goes_on

    def improve(self, task: Task) -> None:
        parts = decompose(task, self.level_one)
        task.doing = f"level 2, {len(parts.blocks)} blocks"
        upper = Task(parts.blocks, budget=task.budget, core=task.core)
        greedy.place_first(upper)
        greedy.try_portfolio(upper)
        unit = task.sweep.unit
        bases = [offset * upper.sweep.unit for offset in upper.offsets]
        whole = [offset // unit for offset in parts.compose(bases)]
        task.offer(whole, f"bi-level ({len(parts.passes)} passes, {parts.num_programs} distinct)")
        self._refine(task, parts, bases, whole)

    def _refine(self, task: Task, parts: Decomposition, bases: Sequence[int], whole: Sequence[int]) -> None:
        """Flat first fit: by offset, by block, and by size; then every order that the flat greedy solver has."""
        sweep = task.sweep
        block = list(whole)
        for part, base in zip(parts.passes, bases, strict=False):
            for index in part.indices:
                block[index] = base // sweep.unit
        everyone = range(len(sweep))
        for name, order in (
            ("offset", sorted(everyone, key=lambda i: (whole[i], sweep.first[i]))),
            ("block", sorted(everyone, key=lambda i: (block[i], -sweep.size[i], sweep.first[i]))),
            ("size/birth", sorted(everyone, key=lambda i: (-sweep.size[i], sweep.first[i]))),
        ):
            if task.is_done:
                return
            task.doing = f"refining by {name}"
            task.offer(task.core.first_fit(sweep, order, watch=task.watch), f"bi-level (refined by {name})")
        if self.goes_on and not task.is_done:
            greedy.turn_wheel(task, greedy.try_portfolio(task), turns_without_gain=_TURNS)


def decompose(task: Task, level_one: Solver | None = None) -> Decomposition:
    """Find the passes of a task's problem, solve each distinct one, and make the problem of level 2."""
    problem = task.problem
    task.doing = "looking for the passes of layers"
    passes = find_passes(problem)
    solved: dict[tuple[tuple[int, int, int], ...], Outcome] = {}
    programs, blocks = [], []
    for number, part in enumerate(passes):
        program = part.program(problem)
        if program not in solved:
            task.doing = f"level 1, pass {len(solved) + 1} of {len(program)} buffers"
            task.tell()
            solved[program] = _solve_pass(task, part, level_one)
        programs.append(solved[program])
        blocks.append(
            Buffer(
                id=f"pass {number}",
                lower=problem.buffers[part.indices[0]].lower,
                upper=max(problem.buffers[i].upper for i in part.indices),
                size=solved[program].peak,
            )
        )
    inside = {index for part in passes for index in part.indices}
    others = tuple(index for index in range(len(problem)) if index not in inside)
    return Decomposition(
        passes=tuple(passes), programs=tuple(programs), others=others, num_programs=len(solved),
        blocks=Problem(buffers=(*blocks, *(_renamed(problem.buffers[index]) for index in others))),
    )  # fmt: skip


def _renamed(buffer: Buffer) -> Buffer:
    return Buffer(id=f"buffer {buffer.id}", lower=buffer.lower, upper=buffer.upper, size=buffer.size)


def _solve_pass(task: Task, part: Pass, level_one: Solver | None) -> Outcome:
    remaining = task.budget.remaining
    budget = Budget(_LEVEL_ONE_SECONDS if remaining is None else min(_LEVEL_ONE_SECONDS, remaining))
    if level_one is None:
        level_one = ExactSolver() if len(part.indices) <= _EXACT_BUFFERS else greedy.GreedySolver()
    return level_one.solve(task.problem.subset(part.indices), budget=budget, core=task.core)
