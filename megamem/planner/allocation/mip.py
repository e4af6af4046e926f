"""MEMO's mixed-integer program (arXiv 2407.12117, section 4.2), by HiGHS through scipy. For the programs of layers.

    min M   s.t.   A_i + S_i <= M                              for every buffer i
                   A_i + S_i <= A_j + z_ij * C                 for every pair that is live together
                   A_j + S_j <= A_i + (1 - z_ij) * C
                   A_i >= 0,  z_ij in {0, 1}                   z_ij = 0: i lies below j

C is the best peak known. The solver works in floating point: its placement is taken as an order, which first fit then
turns into integers, no higher; its bound is rounded up to whole units only after a tolerance is taken off.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from megamem.errors import MissingPackage, UnsupportedError
from megamem.planner.allocation import greedy
from megamem.planner.allocation.solver import Bound, Solver, Task
from megamem.planner.allocation.sweep import Sweep

MAX_PAIRS = 20_000
_TOLERANCE = 1e-6  # relative, of HiGHS's bounds


class MipSolver(Solver):
    """Needs scipy. It cannot be stopped while HiGHS works, other than by the time limit."""

    name: ClassVar[str] = "mip"
    summary: ClassVar[str] = "MEMO's mixed-integer program by HiGHS (needs scipy); for small problems"

    def improve(self, task: Task) -> None:
        try:
            from scipy import optimize, sparse
        except ImportError as fault:
            raise MissingPackage("the solver mip needs scipy: pip install 'megamem[solve]'") from fault
        greedy.try_portfolio(task)
        if task.is_done:
            return
        pairs = conflicts(task.sweep, MAX_PAIRS)
        task.doing = f"MIP of {len(task.sweep)} buffers and {len(pairs)} pairs"
        task.tell()
        matrix, lower = _constraints(task, pairs, sparse)
        n = len(task.sweep)
        columns = n + 1 + len(pairs)
        options: dict[str, Any] = {"mip_rel_gap": 0.0}
        if (remaining := task.budget.remaining) is not None:
            options["time_limit"] = max(remaining, 0.01)
        result = optimize.milp(
            [0.0] * n + [1.0] + [0.0] * len(pairs),
            constraints=optimize.LinearConstraint(matrix, lower, [math.inf] * len(lower)),
            integrality=[0] * (n + 1) + [1] * len(pairs),
            bounds=optimize.Bounds([0.0] * columns, [float(task.peak)] * (n + 1) + [1.0] * len(pairs)),
            options=options,
        )
        if result.x is not None:
            order = sorted(range(n), key=lambda i: (result.x[i], task.sweep.first[i]))
            task.offer(task.core.first_fit(task.sweep, order), "mip")
        if result.mip_dual_bound is not None and math.isfinite(result.mip_dual_bound):
            _take_bound(task, result.mip_dual_bound)


def conflicts(sweep: Sweep, limit: int) -> list[tuple[int, int]]:
    """Pairs of buffers that share a section. Raises UnsupportedError where there are more than `limit`."""
    everyone = sorted(range(len(sweep)), key=lambda i: sweep.first[i])
    pairs: list[tuple[int, int]] = []
    live: list[int] = []
    for i in everyone:
        live = [j for j in live if sweep.last[j] > sweep.first[i]]
        pairs += [(j, i) for j in live]
        live.append(i)
        if len(pairs) > limit:
            raise UnsupportedError(
                f"more than {limit} pairs of the {len(sweep)} buffers are live together, which is too much for the "
                "MIP; use the solver auto, or bilevel, which splits the problem"
            )
    return pairs


def _constraints(task: Task, pairs: list[tuple[int, int]], sparse: Any) -> tuple[Any, list[float]]:
    """Rows `matrix @ x >= lower` over the columns A_0 .. A_n-1, M, z."""
    n, size, capacity = len(task.sweep), task.sweep.size, float(task.peak)
    rows: list[list[tuple[int, float]]] = [[(n, 1.0), (i, -1.0)] for i in range(n)]
    lower = [float(size[i]) for i in range(n)]
    for z, (i, j) in enumerate(pairs, n + 1):
        rows += [[(j, 1.0), (i, -1.0), (z, capacity)], [(i, 1.0), (j, -1.0), (z, -capacity)]]
        lower += [float(size[i]), float(size[j]) - capacity]
    data = [value for row in rows for _, value in row]
    indices = [column for row in rows for column, _ in row]
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    return sparse.csr_array((data, indices, starts), shape=(len(rows), n + 1 + len(pairs))), lower


def _take_bound(task: Task, dual_bound: float) -> None:
    units = math.ceil(dual_bound * (1 - _TOLERANCE) - _TOLERANCE)
    task.raise_bound(
        Bound(
            nbytes=min(units, task.peak) * task.sweep.unit,
            reason="the dual bound of the mixed-integer program, in floating point",
            buffers=tuple(range(len(task.sweep))),
        )
    )
