"""The exact optimum of the linear programme (`problem.py`): by HiGHS through scipy, or by our own simplex method."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

from megamem.errors import InfeasibleError, MissingPackage
from megamem.ir.activation import BASE, SAVED
from megamem.planner.fractions.problem import Group, Problem, Shares, Solution, cost, whole_bytes

_KEPT, _SWAPPED = "kept", "swapped"
_Row = dict[tuple[int, str, str], float]
_FEW_GROUPS, _FEW_ROWS = 2, 64  # more, and the tensors of one group can stand in for those of another
_MOST_ROWS = 256  # beyond, HiGHS is faster, its loading included


@cache
def is_available() -> bool:
    """Whether scipy is installed."""
    return find_spec("scipy") is not None


def solve(problem: Problem, solver: str = "auto") -> Solution:
    """The shares that cost the least time. Raises InfeasibleError where no shares fit, MissingPackage without scipy.

    solver:  `highs`; `simplex`, which needs nothing, and is faster on all but large problems than loading the other;
             `auto`: by size, and where there are likely to be many optima `highs`
    """
    if not problem.groups:  # a rank without layers has nothing to share out
        return Solution(shares=(), seconds=0.0, method="none")
    programme = _Programme(problem)
    if solver == "auto":
        is_large = len(programme.rows) > _MOST_ROWS or (len(problem.groups) > _FEW_GROUPS and not _is_settled(problem))
        solver = "highs" if is_large and is_available() else "simplex"
    values = programme.by_simplex() if solver == "simplex" else programme.by_highs()
    if values is None:
        raise InfeasibleError(explain(problem))
    shares = programme.shares(values)
    return Solution(shares=shares, seconds=cost(problem, shares), method=solver)


def least_seconds(problem: Problem) -> float:
    """What the shares of least time cost, whichever they are. Raises InfeasibleError as `solve` does."""
    return solve(problem, "simplex" if num_rows(problem) <= _MOST_ROWS else "auto").seconds


def has_many_optima(problem: Problem) -> bool:
    """Whether there are likely to be several, of which another solver may find another."""
    return num_rows(problem) > _FEW_ROWS and not _is_settled(problem)


def num_rows(problem: Problem) -> int:
    """How many rows its programme has."""
    own = sum(2 + len(group.nbytes) + sum(name in BASE for name in group.nbytes) for group in problem.groups)
    return own + len(problem.moments) * (1 + 2 * len(problem.groups))


def _is_settled(problem: Problem) -> bool:
    """Whether each tensor can go to one tier only."""
    return all(name in group.tiers for group in problem.groups for name in group.nbytes)


def explain(problem: Problem) -> str:
    """Why nothing fits: the least that has to be stored, and what there is."""
    least = min(
        sum(
            count * group.layers * (group.held + sum(group.nbytes.get(name, 0.0) for name in BASE))
            for count, group in zip(moment, problem.groups, strict=True)
        )
        for moment in problem.moments
    )
    work = max(whole_bytes(group) for group in problem.groups)
    limits = problem.limits
    return (
        f"inputs and attention outputs of layers need {least / 2**30:.1f} GiB, the layer at work {work / 2**30:.1f} "
        f"GiB; there are {max(0.0, limits.device) / 2**30:.1f} GiB of device and {limits.host / 2**30:.1f} GiB of host "
        "memory"
    )


class _Programme:
    """The rows of the linear programme. All variables are shares, but the waits, which are seconds."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.names: list[tuple[int, str, str]] = []  # group, tensor or `wait`, tier or direction
        for number, group in enumerate(problem.groups):
            for name in group.nbytes:
                self.names += [(number, name, tier) for tier in (_KEPT, _SWAPPED) if group.allows(name, tier)]
            self.names += [(number, "wait", "out"), (number, "wait", "in")]
        self.index = {name: place for place, name in enumerate(self.names)}
        self.rows: list[list[float]] = []
        self.bounds: list[float] = []
        self.objective = [0.0] * len(self.names)
        for number, group in enumerate(problem.groups):
            self._add_group(number, group)
        for moment in problem.moments:
            self._add_moment(moment)

    def _row(self, values: _Row) -> list[float]:
        row = [0.0] * len(self.names)
        for name, value in values.items():
            if name in self.index:
                row[self.index[name]] += value
        return row

    def _at_most(self, values: _Row, bound: float) -> None:
        """A row, divided by its largest coefficient: bytes and seconds stand side by side."""
        scale = max([abs(value) for value in values.values()] or [1.0]) or 1.0
        self.rows.append([value / scale for value in self._row(values)])
        self.bounds.append(bound / scale)

    def _recomputed(self, number: int, group: Group) -> tuple[_Row, float]:
        """Recomputation of one layer as (coefficients, constant)."""
        values: _Row = {}
        for tier in (_KEPT, _SWAPPED):
            for name in group.anchors:
                values[number, name, tier] = -group.seconds[name]
            if SAVED in group.nbytes:
                values[number, SAVED, tier] = -group.replay
        return values, group.replay

    def _add_group(self, number: int, group: Group) -> None:
        self._chain(number, group)
        recomputed, constant = self._recomputed(number, group)
        for key, value in recomputed.items():
            if key in self.index:
                self.objective[self.index[key]] += group.layers * value
        limits = self.problem.limits
        cover = group.cover(limits.lag)
        for name, seconds in group.coding.items():
            if (key := (number, name, _SWAPPED)) in self.index:
                self.objective[self.index[key]] += group.layers * seconds
        copied: _Row = {(number, name, _SWAPPED): group.away(name) for name in group.nbytes}
        out = {key: nbytes / limits.to_host for key, nbytes in copied.items()}
        self._at_most({**out, (number, "wait", "out"): -1.0}, cover * group.forward - group.moved / limits.to_host)
        back = {key: nbytes / limits.from_host for key, nbytes in copied.items()}
        for key, value in recomputed.items():
            back[key] = back.get(key, 0.0) - cover * value
        covered = cover * (group.backward + constant) - group.moved / limits.from_host
        self._at_most({**back, (number, "wait", "in"): -1.0}, covered)
        for direction in ("out", "in"):
            self.objective[self.index[number, "wait", direction]] += group.layers

    def _chain(self, number: int, group: Group) -> None:
        """Shares of a tensor add up to one at most, those of the base to one; an anchor's come behind `saved`."""
        saved: _Row = dict.fromkeys(((number, SAVED, _KEPT), (number, SAVED, _SWAPPED)), 1.0)
        for name in group.nbytes:
            both: _Row = {(number, name, _KEPT): 1.0, (number, name, _SWAPPED): 1.0}
            if name in BASE:
                self._at_most(dict.fromkeys(both, -1.0), -1.0)
            elif name != SAVED and SAVED in group.nbytes:
                both = {**both, **saved}
            self._at_most(both, 1.0)

    def _add_moment(self, moment: tuple[float, ...]) -> None:
        groups = self.problem.groups
        kept: _Row = {}
        swapped: _Row = {}
        held = moved = 0.0
        for number, (count, group) in enumerate(zip(moment, groups, strict=True)):
            held += count * group.layers * group.held
            moved += count * group.layers * group.moved
            for name in group.nbytes:
                kept[number, name, _KEPT] = count * group.layers * group.resident(name)
                swapped[number, name, _SWAPPED] = count * group.layers * group.away(name)
        limits = self.problem.limits
        self._at_most(swapped, limits.host - moved)
        for number, group in enumerate(groups):
            staged = {(number, name, _SWAPPED): group.staged(name) for name in group.nbytes}
            in_flight = {name: (1 + limits.lag) * nbytes for name, nbytes in staged.items()}
            self._at_most({**kept, **in_flight}, limits.device - held - (1 + limits.lag) * group.moved)
            at_work = {**kept, **staged}
            for name in group.nbytes:
                at_work[number, name, _KEPT] -= group.resident(name) - group.beside.get(name, 0.0)
            self._at_most(at_work, limits.device - held - group.moved - whole_bytes(group) + group.held)

    def by_simplex(self) -> Sequence[float] | None:
        """The optimum; None where there is none."""
        from megamem.planner.fractions.simplex import Infeasible, minimise

        scale = max(map(abs, self.objective)) or 1.0
        try:
            return minimise([value / scale for value in self.objective], self.rows, self.bounds)
        except Infeasible:
            return None

    def by_highs(self) -> Sequence[float] | None:
        """The same by HiGHS."""
        try:
            from scipy.optimize import linprog
        except ImportError as fault:
            raise MissingPackage('the solver highs needs scipy; pip install "megamem[solve]"') from fault
        found = linprog(self.objective, A_ub=self.rows, b_ub=self.bounds, method="highs")
        return None if found.status == 2 else [float(value) for value in found.x]

    def shares(self, values: Sequence[float]) -> tuple[Shares, ...]:
        """The solver's vector as shares; what is within rounding of 0 or 1 is that."""
        found = []
        for number, group in enumerate(self.problem.groups):
            kept, swapped = (
                {
                    name: share
                    for name in group.nbytes
                    if group.allows(name, tier) and (share := _tidy(values[self.index[number, name, tier]])) > 0
                }
                for tier in (_KEPT, _SWAPPED)
            )
            found.append(Shares(kept=kept, swapped=swapped))
        return tuple(found)


def _tidy(share: float) -> float:
    return 0.0 if share < 1e-9 else 1.0 if share > 1 - 1e-9 else share
