"""The arena in the form of PyTorch's memory snapshots, for the viewers of those (pytorch.org/memory_viz,
`torch.cuda._memory_viz`) and for `megamem.profiler.cuda_snapshot`.

The arena is one segment, with the blocks that are live in it. The trace holds the recorded requests of both allocators:
those of the arena have addresses within the segment.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megamem.errors import AllocationError
from megamem.native.arena import ArenaCore, Event


def snapshot_of(core: ArenaCore, events: Iterable[Event]) -> dict[str, Any]:
    """What `torch.cuda.memory._snapshot` would return of the arena, and of `events` as the trace of device 0."""
    return {
        "segments": [_segment(core)] if core.base else [],
        "device_traces": [[*_segment_events(core), *_trace(events)]],
        "allocator_settings": {},
        "external_annotations": [],
    }


def write_snapshot(path: str | Path, snapshot: dict[str, Any]) -> None:
    """Write a snapshot as the viewers read it. Raises AllocationError when the file cannot be written."""
    try:
        Path(path).write_bytes(pickle.dumps(snapshot))
    except OSError as fault:
        raise AllocationError(f"{path}: cannot be written ({fault.strerror or fault})") from fault


def _segment(core: ArenaCore) -> dict[str, Any]:
    capacity, live = core.counters().capacity, core.blocks()
    blocks, end = [], core.base
    for address, size in live:
        if address > end:
            blocks.append(_block(end, address - end, "inactive"))
        blocks.append(_block(address, size, "active_allocated"))
        end = address + size
    if end < core.base + capacity:
        blocks.append(_block(end, core.base + capacity - end, "inactive"))
    held = sum(size for _, size in live)
    return {
        "device": 0,
        "address": core.base,
        "total_size": capacity,
        "allocated_size": held,
        "active_size": held,
        "requested_size": held,
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": blocks,
    }


def _block(address: int, size: int, state: str) -> dict[str, Any]:
    requested = size if state == "active_allocated" else 0
    return {"address": address, "size": size, "requested_size": requested, "state": state, "frames": []}


def _segment_events(core: ArenaCore) -> Iterable[dict[str, Any]]:
    if core.base:
        yield _event("segment_alloc", core.base, core.counters().capacity, 0, 0)


def _trace(events: Iterable[Event]) -> Iterable[dict[str, Any]]:
    live: dict[int, tuple[int, int]] = {}
    for event in events:
        if event.kind == "malloc":
            live[event.address] = event.size, event.stream
            yield _event("alloc", event.address, event.size, event.stream, event.time_ns)
        elif event.kind == "free" and event.address in live:
            size, stream = live.pop(event.address)
            for action in ("free_requested", "free_completed"):
                yield _event(action, event.address, size, stream, event.time_ns)


def _event(action: str, address: int, size: int, stream: int, time_ns: int) -> dict[str, Any]:
    return {
        "action": action,
        "addr": address,
        "size": size,
        "stream": stream,
        "time_us": time_ns // 1000,
        "device": 0,
        "frames": [],
    }
