"""A schedule in time as text, for a terminal: one line per pipeline rank from left to right."""

from __future__ import annotations

from collections.abc import Sequence

from megamem.ir.schedule import TimedAction


def render_text(timeline: Sequence[TimedAction], columns: int) -> str | None:
    """The compute actions as text of at most `columns` characters per line; None where that is too narrow.

    Where all times are multiples of one step, a cell is a step: F3, B0; the rest of a longer action is dashes. Else a
    character is a slice of time with the kind of the action that fills most of it. A dot is idle time. An undivided
    backward is written as its kind, BW, or as D in the narrow form.
    """
    drawn = [timed for timed in timeline if timed.action.is_compute and timed.end > timed.start]
    if not drawn:
        return None
    ranks, end = 1 + max(timed.rank for timed in drawn), max(timed.end for timed in drawn)
    margin = len(f"rank {ranks - 1} ")
    step = min(timed.end - timed.start for timed in drawn)
    cell = max(len(_label(timed)) for timed in drawn) + 1
    even = all(_is_multiple(time, step) for timed in drawn for time in (timed.start, timed.end))
    if even and round(end / step) * cell + margin <= columns:
        return _exact(drawn, ranks, step, cell, margin)
    if end / step + margin <= columns:
        return _sliced(drawn, ranks, end / (columns - margin), columns - margin, margin)
    return None


def _is_multiple(time: float, step: float) -> bool:
    return abs(time / step - round(time / step)) < 1e-6


def _label(timed: TimedAction) -> str:
    return f"{timed.action.kind}{timed.action.microbatch}"


def _exact(drawn: Sequence[TimedAction], ranks: int, step: float, cell: int, margin: int) -> str:
    length = round(max(timed.end for timed in drawn) / step)
    rows = [["." + " " * (cell - 1)] * length for _ in range(ranks)]
    for timed in drawn:
        first, last = round(timed.start / step), round(timed.end / step)
        label = f"{_label(timed):-<{(last - first) * cell - 1}} " if last - first > 1 else f"{_label(timed):<{cell}}"
        for index in range(first, last):
            rows[timed.rank][index] = label[(index - first) * cell : (index - first + 1) * cell]
    return "\n".join(f"{f'rank {rank}':<{margin}}{''.join(row).rstrip()}" for rank, row in enumerate(rows))


def _sliced(drawn: Sequence[TimedAction], ranks: int, step: float, length: int, margin: int) -> str:
    rows = [["."] * length for _ in range(ranks)]
    for timed in drawn:
        letter = "D" if timed.action.kind == "BW" else timed.action.kind
        for index in range(max(0, round(timed.start / step)), min(length, round(timed.end / step))):
            rows[timed.rank][index] = letter
    return "\n".join(f"{f'rank {rank}':<{margin}}{''.join(row)}" for rank, row in enumerate(rows))
