"""A schedule in time as a Chrome trace, which ui.perfetto.dev and chrome://tracing open.

One process per pipeline rank, with a thread for compute and, where there are copies, one for each direction to and from
host memory; the activation memory is a counter. Predicted and measured times have the same form, so that two files lie
side by side. Format: "Trace Event Format" of the Chromium project: complete events (X), counters (C), instants (i),
metadata (M).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megamem.ir.schedule import COMMUNICATION, Kind, TimedAction

Curve = Sequence[tuple[float, float]]

_THREADS: Mapping[Kind, tuple[int, str]] = {"OFFLOAD": (1, "copies to the host"), "RELOAD": (2, "copies from the host")}
_NAMES: Mapping[Kind, str] = {
    "F": "forward",
    "B": "input gradient",
    "W": "weight gradient",
    "BW": "backward",
    "S": "vocabulary S",
    "T": "vocabulary T",
    "IF": "input embedding",
    "IB": "gradient of the input embedding",
    "OFFLOAD": "offload",
    "RELOAD": "reload",
}


def chrome_trace(
    timeline: Iterable[TimedAction],
    *,
    memory: Mapping[int, Curve] | None = None,
    memory_name: str = "activation memory",
    microseconds: float = 1.0,
    title: str = "megamem",
) -> str:
    """The trace as JSON.

    timeline:      actions with start and end
    memory:        per rank (time, memory from then on), in order of time
    memory_name:   name of the counter, with its unit
    microseconds:  how long one unit of the times is; 1 for times in microseconds
    title:         stands before the rank in the name of every process

    Sends and receives become instants on the compute thread where they are posted.
    """
    actions = sorted(timeline, key=lambda timed: (timed.rank, timed.start))
    events: list[dict[str, Any]] = []
    copying = {(timed.rank, _THREADS[timed.action.kind]) for timed in actions if timed.action.kind in _THREADS}
    for rank in sorted({timed.rank for timed in actions} | set(memory or {})):
        events.append(_metadata("process_name", rank, name=f"{title} rank {rank}"))
        events.append(_metadata("process_sort_index", rank, sort_index=rank))
        events.append(_metadata("thread_name", rank, name="compute"))
    events += (_metadata("thread_name", rank, thread, name=name) for rank, (thread, name) in sorted(copying))
    events += (_event(timed, microseconds) for timed in actions)
    for rank, curve in (memory or {}).items():
        events += (
            {"ph": "C", "name": memory_name, "pid": rank, "ts": time * microseconds, "args": {"held": held}}
            for time, held in curve
        )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _metadata(what: str, rank: int, thread: int = 0, **arguments: object) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": thread, "args": arguments}


def _event(timed: TimedAction, microseconds: float) -> dict[str, Any]:
    rank, action, start, end = timed
    event: dict[str, Any] = {
        "name": str(action),
        "cat": _NAMES.get(action.kind, "communication"),
        "pid": rank,
        "tid": _THREADS[action.kind][0] if action.kind in _THREADS else 0,
        "ts": start * microseconds,
        "args": {"kind": action.kind, "chunk": action.chunk, "microbatch": action.microbatch},
    }
    if action.kind in COMMUNICATION:
        return {**event, "ph": "i", "s": "t"}
    return {**event, "ph": "X", "dur": (end - start) * microseconds}
