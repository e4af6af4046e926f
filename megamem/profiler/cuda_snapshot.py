"""Allocation traces from PyTorch's CUDA memory snapshots.

    torch.cuda.memory._record_memory_history("all", context=None, max_entries=10**6)
    ...                                            # some steps
    torch.cuda.memory._dump_snapshot("steps.pickle")

    trace = read_snapshot("steps.pickle", step=3)

A snapshot holds, per device, the events `alloc`, `free_requested` and `free_completed` with address, size as asked
for, stream and time. A buffer that a second stream used is completed later than it was requested (`record_stream`); it
is live until then, and `is_shared`.

Which step and phase an allocation is of, a program says with `torch.cuda.memory._set_memory_metadata(label(...))`, from
PyTorch 2.10 on. Without that the whole snapshot is one trace; `begin_us` and `end_us` cut it by time.

The file is a pickle; it is read by an unpickler that makes plain containers, strings and numbers and calls nothing.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megamem.errors import AllocationError
from megamem.ir.allocation_trace import AllocationTrace, Phase, Request

_LABEL = re.compile(r"megamem step (\d+): ?(.*)")


def label(step: int, phase: str) -> str:
    """What to give to `torch.cuda.memory._set_memory_metadata` when a phase of a step begins."""
    return f"megamem step {step}: {phase}"


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise AllocationError(f"the file names {module}.{name}, which no memory snapshot does; it was not loaded")


def read_snapshot(path: str | Path, **options: Any) -> AllocationTrace:
    """`trace_of_snapshot` of a file. Raises AllocationError, naming the file, also where it cannot be read."""
    snapshot = load_snapshot(path)
    try:
        return trace_of_snapshot(snapshot, **options)
    except (KeyError, TypeError, AttributeError) as fault:
        raise AllocationError(f"{path}: no memory snapshot of PyTorch ({type(fault).__name__}: {fault})") from fault
    except AllocationError as fault:
        raise AllocationError(f"{path}: {fault}") from None


def load_snapshot(path: str | Path) -> dict[str, Any]:
    """The content of a snapshot file. Raises AllocationError, naming the file, where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            content = _PlainUnpickler(file).load()
    except AllocationError as fault:
        raise AllocationError(f"{path}: {fault}") from None
    except Exception as fault:  # an unpickler may raise anything on a malformed file
        raise AllocationError(f"{path}: no memory snapshot of PyTorch ({type(fault).__name__}: {fault})") from fault
    if not isinstance(content, dict) or not isinstance(content.get("device_traces"), list):
        raise AllocationError(f"{path}: no memory snapshot of PyTorch; it has no device_traces")
    return content


def curves_of_snapshot(snapshot: Mapping[str, Any]) -> dict[int, list[tuple[float, int]]]:
    """Per device with events, (seconds, bytes allocated from then on), as sizes were asked for.

    Where steps are marked (`label`), of the last step that another follows, else of the whole recording; the first
    point is at 0 and holds what was there before.
    """
    curves = {}
    for device, trace in enumerate(snapshot["device_traces"]):
        events = [event for event in trace if event["action"] in ("alloc", "free_completed")]
        if not events:
            continue
        held = _held_before(snapshot, device, events)
        begin, end = _window(events, None, None, None)
        held += sum(_change(event) for event in events[:begin])
        start = events[begin].get("time_us", 0)
        curve = [(0.0, held)]
        for event in events[begin:end]:
            held += _change(event)
            curve.append(((event.get("time_us", start) - start) / 1e6, held))
        curves[device] = curve
    return curves


def _change(event: Mapping[str, Any]) -> int:
    return int(event["size"]) if event["action"] == "alloc" else -int(event["size"])


def _held_before(snapshot: Mapping[str, Any], device: int, events: Sequence[Mapping[str, Any]]) -> int:
    """What was allocated before the first event: what is at the end, less the changes."""
    held = 0
    for segment in snapshot.get("segments", []):
        if segment.get("device", 0) == device:
            active = [block for block in segment["blocks"] if block["state"].startswith("active")]
            held += sum(int(block.get("requested_size", block["size"])) for block in active)
    return held - sum(_change(event) for event in events)


def trace_of_snapshot(
    snapshot: Mapping[str, Any],
    *,
    device: int = 0,
    step: int | None = None,
    begin_us: int | None = None,
    end_us: int | None = None,
) -> AllocationTrace:
    """The requests of one step: of `step`, or else of the last one that another follows, where steps are marked.

    Raises AllocationError when there are no events on the device, or no such step.
    """
    traces = snapshot.get("device_traces") or []
    if not 0 <= device < len(traces) or not traces[device]:
        raise AllocationError(
            f"no events on device {device}; call torch.cuda.memory._record_memory_history('all') before the steps"
        )
    events = [event for event in traces[device] if event["action"] in ("alloc", "free_requested", "free_completed")]
    begin, end = _window(events, step, begin_us, end_us)
    return _trace(events, begin, end)


def _window(
    events: Sequence[Mapping[str, Any]], step: int | None, begin_us: int | None, end_us: int | None
) -> tuple[int, int]:
    """Positions of the first event of the step and of the first after it."""
    if begin_us is not None or end_us is not None:
        if step is not None:
            raise AllocationError("a step and times are both given; name one of them")
        inside = [
            at
            for at, event in enumerate(events)
            if (begin_us is None or event["time_us"] >= begin_us) and (end_us is None or event["time_us"] < end_us)
        ]
        if not inside:
            raise AllocationError(f"no events between {begin_us} and {end_us} microseconds")
        return inside[0], inside[-1] + 1
    first: dict[int, int] = {}
    for at, event in enumerate(events):
        found = _LABEL.fullmatch(str(event.get("user_metadata") or ""))
        if found and event["action"] == "alloc":
            first.setdefault(int(found[1]), at)
    if not first and step is None:
        return 0, len(events)
    wanted = sorted(first)[-2 if len(first) > 1 else -1] if step is None else step
    if wanted not in first:
        marked = ", ".join(map(str, sorted(first))) or "no step at all"
        raise AllocationError(f"step {wanted} is not marked in the snapshot; {marked} is")
    after = [at for at in first.values() if at > first[wanted]]
    return first[wanted], min(after, default=len(events))


def _trace(events: Sequence[Mapping[str, Any]], begin: int, end: int) -> AllocationTrace:
    """Each `free_requested` belongs to the `free_completed` of its address; the latter is the free."""
    births: dict[int, tuple[int | None, int, int]] = {}  # by address: event, size, stream
    requested: dict[int, int] = {}
    requests: list[Request] = []
    phases: list[Phase] = []
    count = 0
    for at, event in enumerate(events[:end]):
        action, address = event["action"], event["addr"]
        is_inside = at >= begin
        if action == "alloc":
            births[address] = (count if is_inside else None, event["size"], event.get("stream", 0))
            if is_inside:
                _enter(phases, event, count)
        elif action == "free_requested":
            requested[address] = at
            continue  # the memory is still in use
        else:
            birth, size, stream = births.pop(address, (None, event["size"], event.get("stream", 0)))
            is_shared = at - requested.pop(address, at - 1) > 1
            if is_inside:
                requests.append(Request(size=size, birth=birth, death=count, stream=stream, is_shared=is_shared))
        count += is_inside
    requests += [
        Request(size=size, birth=birth, death=None, stream=stream, is_shared=False)
        for birth, size, stream in births.values()
        if birth is not None
    ]
    held = sum(size for birth, size, _ in births.values() if birth is None)
    requests.sort(key=lambda request: (-1 if request.birth is None else request.birth, request.death or 0))
    streams = {number: index for index, number in enumerate(sorted({request.stream for request in requests}))}
    return AllocationTrace(
        requests=tuple(
            Request(size=r.size, birth=r.birth, death=r.death, stream=streams[r.stream], is_shared=r.is_shared)
            for r in requests
        ),
        phases=tuple(phases),
        num_events=count,
        persistent=held,
        source="CUDA memory snapshot",
    )


def _enter(phases: list[Phase], event: Mapping[str, Any], count: int) -> None:
    found = _LABEL.fullmatch(str(event.get("user_metadata") or ""))
    name = found[2] if found else ""
    if not phases or phases[-1].label != name:
        phases.append(Phase(begin=count, label=name))
