"""The best within the time: greedy orders, then exact search where the problem is small enough, else more of the same.

On traces of real training the greedy portfolio meets the lower bound, or nearly, and that is the end. What is left is
searched exactly, part by part; a part too large for that is planned on two levels, and then the order of its buffers is
improved until that gains nothing, or the time is over.
"""

from __future__ import annotations

from typing import ClassVar

from megamem.planner.allocation import greedy
from megamem.planner.allocation.bilevel import BilevelSolver
from megamem.planner.allocation.exact import MAX_BUFFERS, Part, worst_part
from megamem.planner.allocation.solver import Solver, Task

_TURNS = 400  # of the wheel without a gain
_SMALL = 600  # buffers of a part that the exact search usually settles at once


class AutoSolver(Solver):
    """Best in general; what the command uses."""

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "greedy, then exact or bi-level as the size allows: the best within the time"

    def improve(self, task: Task) -> None:
        order = greedy.try_portfolio(task)
        is_large = len(worst_part(task)) > MAX_BUFFERS
        if is_large and not task.is_done:
            BilevelSolver(goes_on=False).improve(task)
        if not task.is_done and len(worst_part(task)) > _SMALL:
            greedy.turn_wheel(task, order, turns_without_gain=_TURNS if is_large else 30)
        while not task.is_done and len(part := worst_part(task)) <= MAX_BUFFERS:
            Part(task, part).improve()
        if not task.is_done:
            greedy.turn_wheel(task, order, turns_without_gain=_TURNS)
