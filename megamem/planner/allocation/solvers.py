"""The solvers by name, for the command and the configuration."""

from __future__ import annotations

import difflib

from megamem.errors import ConfigError
from megamem.planner.allocation.auto import AutoSolver
from megamem.planner.allocation.bilevel import BilevelSolver
from megamem.planner.allocation.exact import ExactSolver
from megamem.planner.allocation.greedy import GreedySolver
from megamem.planner.allocation.mip import MipSolver
from megamem.planner.allocation.solver import Solver

SOLVERS: dict[str, type[Solver]] = {
    kind.name: kind for kind in (AutoSolver, GreedySolver, BilevelSolver, ExactSolver, MipSolver)
}


def make_solver(name: str) -> Solver:
    """The solver of that name. Raises ConfigError, with the nearest name, when there is none."""
    if name in SOLVERS:
        return SOLVERS[name]()
    near = difflib.get_close_matches(name, SOLVERS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"no solver is called {name!r}; {hint}there are {', '.join(SOLVERS)}")
