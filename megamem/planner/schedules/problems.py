"""What is wrong with a schedule, and how a message says it."""

from __future__ import annotations

from typing import NamedTuple

from megamem.ir.schedule import Schedule

_SHOWN = 12  # problems in a message
_AROUND = 4  # actions before and after the first one, in the excerpt


class Problem(NamedTuple):
    """What is wrong, and where: the position in the list of a rank (its length for something missing at the end)."""

    rank: int
    position: int
    text: str


def report(schedule: Schedule, problems: list[Problem]) -> str:
    """The message of an error: the problems, and the lists of actions around the first one."""
    count = len(problems)
    lines = [f"{schedule.name}: {count} problem{'s' * (count > 1)}:"]
    lines += [f"  rank {problem.rank}: {problem.text}" for problem in problems[:_SHOWN]]
    if count > _SHOWN:
        lines.append(f"  ... and {count - _SHOWN} more")
    return "\n".join([*lines, *_excerpt(schedule, problems[0])])


def _excerpt(schedule: Schedule, problem: Problem) -> list[str]:
    """The lists of the rank with the problem and its neighbours, around the place."""
    ranks = range(max(0, problem.rank - 2), min(schedule.placement.num_ranks, problem.rank + 3))
    first = max(0, problem.position - _AROUND)
    longest = max(len(schedule.ranks[rank]) for rank in ranks)
    span = range(first, max(problem.position + 1, min(longest, problem.position + _AROUND + 1)))
    cells = {
        rank: [str(schedule.ranks[rank][i]) if i < len(schedule.ranks[rank]) else "" for i in span] for rank in ranks
    }
    width = max((len(cell) for row in cells.values() for cell in row), default=0)
    lines = [f"actions {span.start} to {span.stop - 1} of ranks {ranks.start} to {ranks.stop - 1}:"]
    for rank, row in cells.items():
        marked = [
            f"[{cell:^{width}}]" if (rank, i) == (problem.rank, problem.position) else f" {cell:^{width}} "
            for i, cell in zip(span, row, strict=True)
        ]
        arrow = "  <-- ERROR HERE" if rank == problem.rank else ""
        lines.append(f"  rank {rank:>2} |" + "".join(marked) + "|" + arrow)
    return lines
