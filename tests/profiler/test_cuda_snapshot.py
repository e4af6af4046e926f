"""Traces from memory snapshots: synthetic ones in the format that `torch.cuda.memory._snapshot` documents."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from megamem.errors import AllocationError
from megamem.ir.allocation_trace import AllocationTrace, Request, read_trace, write_trace

pytest.importorskip("torch", reason="pip install 'megamem[train]'")  # of the room, not of this module

from megamem.profiler.cuda_snapshot import label, read_snapshot, trace_of_snapshot


class History:
    """Writes events as PyTorch's allocator does; a freed address is given out again."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.metadata = ""

    def _add(self, action: str, addr: int, size: int, stream: int) -> None:
        self.events.append(
            {
                "action": action, "addr": addr, "size": size, "stream": stream, "time_us": 100 * len(self.events),
                "frames": [], "pool_id": (0, 0), "compile_context": "N/A", "user_metadata": self.metadata,
            }
        )  # fmt: skip

    def alloc(self, addr: int, size: int, stream: int = 0) -> None:
        self._add("alloc", addr, size, stream)

    def free(self, addr: int, size: int, stream: int = 0) -> None:
        self._add("free_requested", addr, size, stream)
        self._add("free_completed", addr, size, stream)

    def snapshot(self) -> dict[str, Any]:
        segment = {"action": "segment_alloc", "addr": 0, "size": 2 << 20, "stream": 0, "time_us": 0, "frames": []}
        return {"segments": [], "device_traces": [[], [segment, *self.events]]}


def two_steps() -> History:
    history = History()
    history.alloc(1, 100)
    for step in range(3):
        history.metadata = label(step, "layer 0 forward, microbatch 0")
        history.alloc(2, 1000)
        history.alloc(3, 2000, stream=77)
        history.free(2, 1000)
        history.metadata = label(step, "layer 0 backward, microbatch 0")
        history.alloc(2, 3000)
        history._add("free_requested", 3, 2000, 77)
        history.alloc(4, 10 + step)
        history._add("free_completed", 3, 2000, 77)
        history.free(2, 3000)
        history.free(4, 10 + step)
    return history


def test_the_last_whole_step_is_taken_with_its_phases_and_streams() -> None:
    trace = trace_of_snapshot(two_steps().snapshot(), device=1)
    assert trace.requests == (
        Request(size=1000, birth=0, death=2),
        Request(size=2000, birth=1, death=5, stream=1, is_shared=True),
        Request(size=3000, birth=3, death=6),
        Request(size=11, birth=4, death=7),
    )
    assert trace.persistent == 100
    assert [phase.begin for phase in trace.phases] == [0, 3]
    groups = [buffer.group for buffer in trace.problem().buffers]
    assert groups == ["layer 0 forward, microbatch 0", "", *2 * ["layer 0 backward, microbatch 0"]]
    assert len(trace.problem(stream=0)) == len(trace.problem(shared=False)) == 3
    assert trace_of_snapshot(two_steps().snapshot(), device=1, step=0).requests[3].size == 10


def test_times_cut_where_no_step_is_marked() -> None:
    history = History()
    for addr in range(4):
        history.alloc(addr, 10)
    history.free(0, 10)
    history.free(3, 10)
    whole = trace_of_snapshot(history.snapshot(), device=1)
    assert (len(whole), whole.num_events, whole.persistent) == (4, 6, 0)
    part = trace_of_snapshot(history.snapshot(), device=1, begin_us=200)
    assert [(r.birth, r.death) for r in part.requests] == [(None, 2), (0, None), (1, 3)]
    assert part.persistent == 10


def test_a_file_is_read_and_one_that_would_run_code_is_not(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(two_steps().snapshot()))
    assert len(read_snapshot(path, device=1)) == 4
    with pytest.raises(AllocationError, match="no events on device 0"):
        read_snapshot(path)
    with pytest.raises(AllocationError, match="step 9 is not marked in the snapshot; 0, 1, 2 is"):
        read_snapshot(path, device=1, step=9)
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(AllocationError, match=r"names builtins\.print"):
        read_snapshot(path)
    for content in (b"", b"junk", pickle.dumps([1]), pickle.dumps({"device_traces": [[{"action": "alloc"}]]})):
        path.write_bytes(content)
        with pytest.raises(AllocationError, match=r"snapshot\.pickle"):
            read_snapshot(path)


def test_the_file_form_keeps_everything_and_is_compact(tmp_path: Path) -> None:
    trace = trace_of_snapshot(two_steps().snapshot(), device=1, begin_us=200)
    path = tmp_path / "trace.megamem"
    write_trace(path, trace)
    assert read_trace(path) == trace
    rng = random.Random(0)
    births = [Request(size=rng.choice([512, 1 << 20, 3 << 20]), birth=2 * i, death=2 * i + 1) for i in range(100_000)]
    write_trace(path, AllocationTrace(requests=tuple(births), phases=(), num_events=200_000))
    assert path.stat().st_size < 400_000


def test_malformed_files_are_refused_and_never_crash(tmp_path: Path) -> None:
    import gzip
    import json

    path = tmp_path / "trace.megamem"
    good = trace_of_snapshot(two_steps().snapshot(), device=1).to_bytes()
    content = json.loads(gzip.decompress(good))
    rng = random.Random(1)
    for _ in range(300):
        broken = bytearray(good)
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(broken[: rng.randrange(len(broken) + 1)]))
        with pytest.raises(AllocationError, match=r"trace\.megamem"):
            read_trace(path)
    changes: list[dict[str, Any]] = [
        {"version": 2},
        {"format": "x"},
        {"num_events": 3},
        {"num_events": 1e9},
        {"persistent": -1},
        {"phases": [[9, "a"], [1, "b"]]},
        {"requests": {}},
        {"requests": None},
    ]
    for change in changes:
        path.write_bytes(gzip.compress(json.dumps({**content, **change}).encode()))
        with pytest.raises(AllocationError, match=r"trace\.megamem"):
            read_trace(path)
