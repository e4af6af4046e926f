"""What a solver is, what it works on, and what comes of it.

    Solver             improves a task until it is done; one file each
    Task               a problem with the best solution and the best lower bound so far
    Outcome            the validated end of it: solution, peak, lower bound, gap, certificate

Any time: a task has a solution from its first moment on (one buffer above the other). Every solver begins with first
fit in one order, for which it has the time whatever the limit (a second for 40,000 requests). Every improvement
replaces the solution, and when the budget is over, or is stopped, the best so far is the outcome.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from megamem.errors import CapacityError
from megamem.ir.allocation import Problem, Solution
from megamem.planner.allocation import validator
from megamem.planner.allocation.budget import Budget
from megamem.planner.allocation.core import Core, best_core
from megamem.planner.allocation.sweep import Sweep

STACKED = "stacked"


@dataclass(frozen=True, kw_only=True)
class Bound:
    """No solution has a peak below `nbytes`, because of what `reason` says of the buffers with these indices."""

    nbytes: int
    reason: str
    buffers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The best solution that was found, validated, and how good it is at the worst. Bytes and seconds.

    `solver` names what found it. `note` says what was missing (a compiler), and is empty otherwise.
    """

    solution: Solution
    bound: Bound
    capacity: int | None
    solver: str
    seconds: float
    note: str = ""

    @property
    def peak(self) -> int:
        return self.solution.peak

    @property
    def lower_bound(self) -> int:
        return self.bound.nbytes

    @property
    def gap(self) -> float:
        """How far the peak is above the lower bound, as a share of the bound."""
        return self.peak / self.lower_bound - 1 if self.lower_bound else 0.0

    @property
    def is_optimal(self) -> bool:
        return self.peak == self.lower_bound

    @property
    def fits(self) -> bool:
        """Whether the solution is within the capacity that was asked for, if one was."""
        return self.capacity is None or self.peak <= self.capacity

    @property
    def certificate(self) -> str | None:
        """Why no peak is lower, in words; None while that is not proven."""
        return f"no peak is below {self.lower_bound} bytes: {self.bound.reason}" if self.is_optimal else None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a task is, for a line on the screen. Bytes and seconds."""

    seconds: float
    peak: int
    lower_bound: int
    doing: str


class Task:
    """One problem being solved. All sizes within are in units of `sweep.unit` bytes.

    `target` is what ends the work: the capacity in units, or the lower bound where the least peak is wanted.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        capacity: int | None = None,
        budget: Budget | None = None,
        core: Core | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.problem, self.capacity, self.budget = problem, capacity, budget or Budget()
        self.core, self.note = (core, "") if core is not None else best_core()
        self.sweep = Sweep.of(problem)
        self._on_progress, self.doing = on_progress, "looking at the problem"
        self.offsets, self.found_by = _stacked(self.sweep), STACKED
        self.first_peak: int | None = None  # of the first greedy order, once it is placed
        self.peak = self.sweep.peak(self.offsets)
        self.bound = _live_bound(problem, self.sweep)

    @property
    def lower_bound(self) -> int:
        """In units."""
        return self.bound.nbytes // self.sweep.unit

    @property
    def target(self) -> int:
        if self.capacity is None:
            return self.lower_bound
        return max(self.capacity // self.sweep.unit, self.lower_bound)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do, or no time to do it in."""
        return self.peak <= self.target or self.budget.is_over

    def watch(self) -> bool:
        """For the core: show progress, and say whether to stop."""
        self.tell()
        return self.budget.is_over

    def tell(self) -> None:
        """Show progress."""
        if self._on_progress is not None:
            unit = self.sweep.unit
            self._on_progress(
                Progress(
                    seconds=self.budget.elapsed, peak=self.peak * unit, lower_bound=self.bound.nbytes, doing=self.doing
                )
            )

    def offer(self, offsets: Sequence[int] | None, found_by: str) -> bool:
        """Take a placement, in units, if it is better than the best so far; whether it was."""
        if offsets is None or (peak := self.sweep.peak(offsets)) >= self.peak:
            return False
        self.offsets, self.peak, self.found_by = list(offsets), peak, found_by
        self.tell()
        return True

    def raise_bound(self, bound: Bound) -> None:
        """Take a bound, if it is better than the best so far. Raises CapacityError when it is beyond the capacity."""
        if bound.nbytes > self.bound.nbytes:
            self.bound = bound
            self.tell()
            self.check_capacity()

    def outcome(self) -> Outcome:
        """The best so far, validated by code that shares nothing with the solvers."""
        unit = self.sweep.unit
        solution = Solution(problem=self.problem, offsets=tuple(offset * unit for offset in self.offsets))
        validator.check(solution)
        return Outcome(
            solution=solution, bound=self.bound, capacity=self.capacity, solver=self.found_by,
            seconds=self.budget.elapsed, note=self.note,
        )  # fmt: skip

    def check_capacity(self) -> None:
        """Raise CapacityError where the bound says that the capacity cannot be met."""
        if self.capacity is not None and self.capacity < self.bound.nbytes:
            raise CapacityError(_too_small(self.problem, self.bound, self.capacity))


class Solver(ABC):
    """Makes a task's solution better."""

    name: ClassVar[str]
    summary: ClassVar[str]  # one line, for --help

    @abstractmethod
    def improve(self, task: Task) -> None:
        """Work until `task.is_done`, or until this solver has nothing more to try. Raises CapacityError when it proves
        that the capacity cannot be met, UnsupportedError or MissingPackage when it cannot work on the problem."""

    def solve(
        self,
        problem: Problem,
        *,
        capacity: int | None = None,
        budget: Budget | None = None,
        core: Core | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Outcome:
        """Solve a problem: fit it into `capacity` bytes or, without one, make its peak as low as it gets.

        `core` is the compiled one, or else its Python twin, unless given. Raises as `improve` does; a CapacityError
        has the best solution as its `outcome`, which does not fit.
        """
        task = Task(problem, capacity=capacity, budget=budget, core=core, on_progress=on_progress)
        try:
            task.check_capacity()
            if task.peak > task.target:
                _first_placement(task)
            if not task.is_done:
                self.improve(task)
        except CapacityError as fault:
            if task.found_by == STACKED:  # the bound alone said no, before anything was tried
                _first_improvement(task)
            fault.outcome = task.outcome()
            raise
        return task.outcome()


def _first_improvement(task: Task) -> None:
    """The portfolio, for a task that has nothing yet."""
    from megamem.planner.allocation.greedy import try_portfolio  # which is made of the classes above

    _first_placement(task)
    try_portfolio(task)


def _first_placement(task: Task) -> None:
    """One greedy order; only a stop ends it, not the time."""
    from megamem.planner.allocation.greedy import place_first

    place_first(task)


def _stacked(sweep: Sweep) -> list[int]:
    """One buffer above the other: no good, but at hand."""
    offsets, top = [], 0
    for size in sweep.size:
        offsets.append(top)
        top += size
    return offsets


def _live_bound(problem: Problem, sweep: Sweep) -> Bound:
    if not len(sweep):
        return Bound(nbytes=0, reason="there are no buffers", buffers=())
    section = sweep.live.index(sweep.max_live)
    members = tuple(sweep.members(section))
    nbytes = sweep.max_live * sweep.unit
    return Bound(
        nbytes=nbytes,
        reason=f"at instant {sweep.instants[section]} {len(members)} buffers are live, which together have them",
        buffers=members,
    )


def _too_small(problem: Problem, bound: Bound, capacity: int) -> str:
    largest = sorted((problem.buffers[i] for i in bound.buffers), key=lambda buffer: -buffer.size)
    names = ", ".join(f"{buffer.id} ({buffer.size})" for buffer in largest[:8])
    more = f", and {len(largest) - 8} more" if len(largest) > 8 else ""
    return (
        f"a capacity of {capacity} bytes is too small by at least {bound.nbytes - capacity}. {bound.nbytes} bytes are "
        f"needed: {bound.reason}. The buffers (bytes) are {names}{more}. Give a capacity of {bound.nbytes} or more, or "
        "shorten the lifetime of one of these."
    )
