"""`megamem solve`: place the buffers of a program so that its peak is lowest, or fits; with a proof where there is one.

The exit status is 0 for a solution (within the capacity, if one was given), 1 when the time was over before one was
found that fits, and 2 for a mistake or a capacity that is proven to be too small.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamem.errors import ConfigError
from megamem.options import Duration, Invalid

if TYPE_CHECKING:
    from megamem.ir.allocation import Problem
    from megamem.planner.allocation.solver import Outcome, Progress

_AMOUNT = re.compile(r"^(\d+(?:\.\d+)?(?=\s*[KMGT])|\d+)\s*(KiB|MiB|GiB|TiB)?$")
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_EPILOG = """PROBLEM has the columns id,lower,upper,size of MiniMalloc: buffers of `size` bytes, live from `lower` until
before `upper`; it may be compressed (.csv.gz). Or it is a trace by `megamem profile --allocations`, of which the
requests of the main stream are placed, their sizes rounded up to 512 bytes, as the runtime places them. --output writes
the columns with `offset`. Ctrl-C ends the work early, with the best solution so far.

examples:
  megamem solve trace.csv.gz                             the lowest peak that is found in a minute
  megamem solve A.1048576.csv --capacity 1MiB            does it fit? proven either way, given the time
  megamem solve step.trace --output plan.csv --svg plan.svg
"""


def add_solve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line."""
    solve = commands.add_parser(
        "solve",
        help="place the buffers of a memory trace",
        description="Place the buffers of a memory trace in one arena, and say how far from the best that can be.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    solve.add_argument("problem", metavar="PROBLEM", help="the buffers: a CSV file in MiniMalloc's columns, or a trace")
    solve.add_argument(
        "--capacity", metavar="N", help="bytes to fit into (1048576, 40GiB); without it the least is sought"
    )
    solve.add_argument(
        "--solver", default="auto", metavar="NAME", help="auto, greedy, bilevel, exact or mip (default: auto)"
    )
    solve.add_argument("--time-limit", default="60s", metavar="TIME", help="such as 500ms, 60s, 5min (default: 60s)")
    solve.add_argument("--output", metavar="SOLUTION.csv", help="write the buffers with their offsets")
    solve.add_argument("--svg", metavar="FILE", help="draw the blocks over time")
    solve.add_argument("--json", action="store_true", help="print the result as JSON")
    solve.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand. Raises MegamemError for everything that is wrong with the request."""
    from megamem.errors import CapacityError
    from megamem.ir import allocation
    from megamem.planner.allocation.budget import Budget
    from megamem.planner.allocation.solvers import make_solver

    solver = make_solver(arguments.solver)
    seconds, capacity = _seconds(arguments.time_limit), _nbytes(arguments.capacity)
    problem, left_out = _read(Path(arguments.problem))
    budget, line = Budget(seconds), _ProgressLine(seconds)
    refusal = None
    try:
        with budget.until_interrupt():
            outcome = solver.solve(problem, capacity=capacity, budget=budget, on_progress=line.show)
    except CapacityError as fault:
        outcome, refusal = fault.outcome, fault
    finally:
        line.clear()
    if arguments.output:
        allocation.write(arguments.output, outcome.solution)
    if arguments.svg:
        _draw(arguments.svg, arguments.problem, outcome)
    if arguments.json:
        extra = {"left_out": left_out or None, "refusal": str(refusal) if refusal else None}
        print(json.dumps({**record(outcome), **extra}, indent=2))
    elif refusal is None:
        print(_text(outcome, budget.is_stopped) + (f"\nleft out     {left_out}" if left_out else ""))
    if refusal is not None:
        where = f", and is in {arguments.output}" if arguments.output else ""
        raise CapacityError(f"{refusal} The best placement that was found takes {outcome.peak} bytes{where}.")
    return 0 if outcome.fits else 1


def _read(path: Path) -> tuple[Problem, str]:
    """The buffers of a trace or of a CSV file, and what of a trace is left out."""
    from megamem.ir.allocation import read_problem
    from megamem.ir.allocation_trace import is_trace, read_trace

    if not is_trace(path):
        return read_problem(path), ""
    trace = read_trace(path)
    stream = trace.main_stream
    problem = trace.problem(stream=stream, shared=False)
    others = len(trace) - len(problem)
    return problem, f"{others} requests of other streams, or that two streams share" if others else ""


def record(outcome: Outcome) -> dict[str, Any]:
    """What --json prints: bytes, seconds, and `gap` as a share of the lower bound."""
    return {
        "peak": outcome.peak,
        "lower_bound": outcome.lower_bound,
        "gap": outcome.gap,
        "optimal": outcome.is_optimal,
        "seconds": round(outcome.seconds, 6),
        "solver": outcome.solver,
        "buffers": len(outcome.solution.problem),
        "capacity": outcome.capacity,
        "fits": outcome.fits,
        "certificate": outcome.certificate,
        "note": outcome.note or None,
    }


def _text(outcome: Outcome, was_stopped: bool) -> str:
    lines = [
        f"buffers      {len(outcome.solution.problem)}",
        f"peak         {outcome.peak} bytes ({outcome.peak / 2**30:.3f} GiB)",
        f"lower bound  {outcome.lower_bound} bytes",
        f"gap          {outcome.gap:.4%}" + (", optimal" if outcome.is_optimal else ""),
        f"found by     {outcome.solver}",
        f"time         {outcome.seconds:.2f} s" + (", stopped" if was_stopped else ""),
    ]
    if outcome.capacity is not None:
        fits = "fits" if outcome.fits else "nothing that fits was found in the time, nor a proof that nothing does"
        lines.insert(2, f"capacity     {outcome.capacity} bytes: {fits}")
    if outcome.certificate:
        lines.append(f"proof        {outcome.certificate}")
    if outcome.note:
        lines.append(f"note         slower than it could be, without the compiled core: {outcome.note}")
    return "\n".join(lines)


def _draw(path: str, name: str, outcome: Outcome) -> None:
    from megamem.report.allocation_svg import render_svg

    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(render_svg(outcome.solution, title=Path(name).name, lower_bound=outcome.lower_bound))
    except OSError as fault:
        raise ConfigError(f"--svg: {path} cannot be written ({fault.strerror})") from fault


def _seconds(text: str) -> float:
    try:
        return Duration().parse(text)
    except Invalid as invalid:
        raise ConfigError([f"--time-limit: {reason}" for _, reason in invalid.reasons]) from None


def _nbytes(text: str | None) -> int | None:
    """Bytes; a bare number is bytes here, because MiniMalloc's are, and amounts may be small."""
    if text is None:
        return None
    match = _AMOUNT.match(text.strip())
    nbytes = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] else int(match[1]) if match else 0
    if nbytes <= 0:
        raise ConfigError(f"--capacity: {text!r} is no amount of memory; give bytes, or an amount such as 40GiB")
    return nbytes


class _ProgressLine:
    """One line on stderr that is written over, while it is a terminal."""

    def __init__(self, limit: float) -> None:
        self._limit, self._shown, self._is_on = limit, 0.0, sys.stderr.isatty()

    def show(self, progress: Progress) -> None:
        """Show it, at most five times a second."""
        now = time.monotonic()
        if not self._is_on or now - self._shown < 0.2:
            return
        self._shown = now
        gap = progress.peak / progress.lower_bound - 1 if progress.lower_bound else 0.0
        text = (
            f"{progress.seconds:5.1f} of {self._limit:g} s  peak {progress.peak / 2**20:.1f} MiB, "
            f"{gap:.4%} above the bound  {progress.doing}"
        )
        sys.stderr.write(f"\r\x1b[K{text[:118]}")
        sys.stderr.flush()

    def clear(self) -> None:
        """Leave no trace of it."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
