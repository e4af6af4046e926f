"""A dense simplex method for the small linear programmes of one rank, where scipy is not installed.

    minimise c x   such that   A x <= b,   x >= 0

Two phases on one tableau: first the sum of the rows' artificial variables, then the objective. The entering column is
the one with the steepest slope (Dantzig); after many pivots without progress the first one (Bland), which cannot cycle.
Some dozens of variables and rows take milliseconds; HiGHS, where it is there, finds the same optimum.
"""

from __future__ import annotations

from collections.abc import Sequence

_EPSILON = 1e-9
_PATIENCE = 200  # pivots before Bland's rule takes over
_MOST = 20_000


class Infeasible(Exception):  # noqa: N818 - what the programme is
    """No x satisfies the rows."""


def minimise(objective: Sequence[float], rows: Sequence[Sequence[float]], bounds: Sequence[float]) -> list[float]:
    """The x of least objective. Raises Infeasible; ValueError where the objective has no lower bound."""
    tableau = _Tableau(len(objective), rows, bounds)
    if tableau.has_artificial:
        if tableau.optimise(tableau.phase_one()) > 1e-7:
            raise Infeasible
        tableau.drop_artificial()
    tableau.optimise([*objective, *[0.0] * (tableau.width - len(objective))])
    return tableau.values(len(objective))


class _Tableau:
    def __init__(self, variables: int, rows: Sequence[Sequence[float]], bounds: Sequence[float]) -> None:
        count = len(rows)
        negative = [index for index, bound in enumerate(bounds) if bound < 0]
        self.first_artificial = variables + count
        self.width = variables + count + len(negative)
        self.rows: list[list[float]] = []
        self.basis: list[int] = []
        for index, (row, bound) in enumerate(zip(rows, bounds, strict=True)):
            sign = -1.0 if bound < 0 else 1.0
            line = [sign * value for value in row] + [0.0] * (self.width - variables) + [sign * bound]
            line[variables + index] = sign
            if bound < 0:
                place = self.first_artificial + negative.index(index)
                line[place] = 1.0
                self.basis.append(place)
            else:
                self.basis.append(variables + index)
            self.rows.append(line)
        self.has_artificial = bool(negative)

    def phase_one(self) -> list[float]:
        """The sum of the artificial variables."""
        return [float(place >= self.first_artificial) for place in range(self.width)]

    def optimise(self, objective: Sequence[float]) -> float:
        """Pivot until no column improves the objective; its value."""
        slopes = [*objective, 0.0]
        for row, place in zip(self.rows, self.basis, strict=True):
            _subtract(slopes, list(enumerate(row)), slopes[place])
        for pivots in range(_MOST):
            entering = self._entering(slopes, bland=pivots > _PATIENCE)
            if entering is None:
                return -slopes[-1]
            self._pivot(self._leaving(entering), entering, slopes)
        raise ValueError("the simplex method does not end")

    def _entering(self, slopes: list[float], *, bland: bool) -> int | None:
        if bland:
            return next((place for place in range(self.width) if slopes[place] < -_EPSILON), None)
        place = min(range(self.width), key=slopes.__getitem__)
        return place if slopes[place] < -_EPSILON else None

    def _leaving(self, entering: int) -> int:
        best, chosen = float("inf"), -1
        for index, row in enumerate(self.rows):
            if row[entering] > _EPSILON:
                ratio = row[-1] / row[entering]
                if ratio < best - 1e-12 or (ratio < best + 1e-12 and self.basis[index] < self.basis[chosen]):
                    best, chosen = ratio, index
        if chosen < 0:
            raise ValueError("the objective has no lower bound")
        return chosen

    def _pivot(self, index: int, entering: int, slopes: list[float]) -> None:
        scale = self.rows[index][entering]
        pivot = self.rows[index] = [value / scale for value in self.rows[index]]
        sparse = [(place, value) for place, value in enumerate(pivot) if value]
        for other, row in enumerate(self.rows):
            if other != index and row[entering]:
                _subtract(row, sparse, row[entering])
        _subtract(slopes, sparse, slopes[entering])
        self.basis[index] = entering

    def drop_artificial(self) -> None:
        """Take the artificial variables, all zero now, out of the basis and of the tableau."""
        for index, place in enumerate(self.basis):
            if place >= self.first_artificial:
                row = self.rows[index]
                entering = max(range(self.first_artificial), key=lambda column: abs(row[column]))
                self._pivot(index, entering, [0.0] * (self.width + 1))
        self.rows = [[*row[: self.first_artificial], row[-1]] for row in self.rows]
        self.width = self.first_artificial

    def values(self, variables: int) -> list[float]:
        """The first variables at the basis."""
        found = [0.0] * self.width
        for row, place in zip(self.rows, self.basis, strict=True):
            found[place] = row[-1]
        return found[:variables]


def _subtract(target: list[float], source: Sequence[tuple[int, float]], factor: float) -> None:
    """target -= factor * source, in place; of the source the places that are not 0."""
    if factor:
        for place, value in source:
            target[place] -= factor * value
