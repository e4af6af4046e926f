"""Predicted memory as a PyTorch memory snapshot, which pytorch.org/memory_viz and `torch.cuda._memory_viz` open.

Every pipeline rank is a device. What does not change over a step is allocated at its start, one block for each kind;
the activations come and go as `RankMemory.timeline` says, each block named after the action that made it; the working
space of layers is there once, at the fullest moment. A measured snapshot can be put beside it, as further devices, so
that both are drawn on one page with one scale of time and bytes.

The step is repeated from 0 microseconds on, with the predicted times. Plain dictionaries, lists, numbers and text.
"""

from __future__ import annotations

import bisect
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megamem.ir.plan import MEMORY_KINDS, Prediction, RankMemory, Span, parse_spans
from megamem.report.charts import ACTIVATION_KINDS, words

Event = dict[str, Any]

_FILE = "megamem plan"
_APART = 1 << 44  # addresses of one rank


def predicted_snapshot(prediction: Prediction) -> dict[str, Any]:
    """The snapshot of all pipeline ranks: `device_traces[i]` is that of rank i.

    The most that is allocated at once is the rank's peak where the timeline has it, else that of the timeline with all
    that does not change.
    """
    traces = []
    segments: list[dict[str, Any]] = []
    for rank in prediction.memory:
        text = prediction.pipeline[rank.rank] if rank.rank < len(prediction.pipeline) else ""
        spans = sorted(parse_spans(text), key=lambda span: span.start)
        recorder = _Recorder(rank.rank)
        recorder.record(rank, spans, prediction.step_seconds)
        traces.append(recorder.events)
        segments += recorder.segments()
    return {
        "segments": segments,
        "device_traces": traces,
        "allocator_settings": {},
        "external_annotations": [],
    }


def beside(predicted: Mapping[str, Any], measured: Sequence[tuple[Mapping[str, Any], int]]) -> dict[str, Any]:
    """All in one snapshot: measured devices (snapshot, device) come behind the predicted ranks, from time 0 on."""
    traces, segments = list(predicted["device_traces"]), list(predicted["segments"])
    for snapshot, device in measured:
        events = snapshot["device_traces"][device]
        start = min((event["time_us"] for event in events if "time_us" in event), default=0)
        segments += [
            {**segment, "device": len(traces)}
            for segment in snapshot.get("segments", [])
            if segment.get("device", 0) == device
        ]
        traces.append([{**event, "time_us": event.get("time_us", start) - start} for event in events])
    return {**predicted, "segments": segments, "device_traces": traces}


def write_snapshot(path: str | Path, snapshot: Mapping[str, Any]) -> None:
    """Write the file; PyTorch's tools read pickles of protocol 2 and later."""
    Path(path).write_bytes(pickle.dumps(dict(snapshot), protocol=4))


class _Recorder:
    """The events of one device."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.events: list[Event] = []
        self._top = self._base = (device + 1) * _APART
        self._held: list[tuple[int, int, str]] = []  # address, size, name of the blocks of activations
        self._live: dict[int, tuple[int, str]] = {}

    def record(self, rank: RankMemory, spans: Sequence[Span], end: float) -> None:
        """Everything that the rank allocates and frees in a step of `end` seconds."""
        for kind in MEMORY_KINDS:
            nbytes = rank.kinds.get(kind, 0)
            if nbytes and kind not in (*ACTIVATION_KINDS, "transients"):
                self._alloc(nbytes, words(kind), 0.0)
        curve = rank.curve() or [(0.0, sum(rank.kinds.get(kind, 0) for kind in ACTIVATION_KINDS))]
        fullest = max(range(len(curve)), key=lambda index: curve[index][1])
        transients = rank.kinds.get("transients", 0)
        for index, (moment, nbytes) in enumerate(curve):
            self._move_to(nbytes, _maker(spans, moment), moment)
            if index == fullest and transients:
                self._free(self._alloc(transients, "working space of a layer", moment), moment)
        while self._held:
            self._free(self._held.pop()[0], end)

    def _move_to(self, nbytes: int, name: str, moment: float) -> None:
        """Have the activations be `nbytes`: one more block, or the last ones gone."""
        now = sum(size for _, size, _ in self._held)
        while now > nbytes:
            address, size, maker = self._held.pop()
            self._free(address, moment)
            now -= size
            if now < nbytes:  # a part of it stays
                name = maker
        if now < nbytes:
            self._held.append((self._alloc(nbytes - now, name, moment), nbytes - now, name))

    def _alloc(self, size: int, name: str, moment: float) -> int:
        address, self._top = self._top, self._top + size
        self._live[address] = (size, name)
        self.events.append(self._event("alloc", address, moment))
        return address

    def _free(self, address: int, moment: float) -> None:
        self.events += [self._event(action, address, moment) for action in ("free_requested", "free_completed")]
        del self._live[address]

    def _event(self, action: str, address: int, moment: float) -> Event:
        size, name = self._live[address]
        return {
            "action": action,
            "addr": address,
            "size": size,
            "stream": 0,
            "time_us": round(moment * 1e6),
            "frames": _frames(name),
        }

    def segments(self) -> Iterator[dict[str, Any]]:
        """What is still allocated when the step is over, as one segment."""
        blocks = [
            {
                "address": address,
                "size": size,
                "requested_size": size,
                "state": "active_allocated",
                "frames": _frames(name),
            }
            for address, (size, name) in self._live.items()
        ]
        total = sum(size for size, _ in self._live.values())
        yield {
            "device": self.device,
            "address": self._base,
            "total_size": total,
            "allocated_size": total,
            "active_size": total,
            "requested_size": total,
            "stream": 0,
            "segment_type": "large",
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": [],
            "blocks": blocks,
        }


def _frames(name: str) -> list[dict[str, Any]]:
    return [{"filename": _FILE, "line": 0, "name": name}]


def _maker(spans: Sequence[Span], moment: float) -> str:
    """The action that runs, or begins, at a moment; `spans` are in order of time."""
    place = bisect.bisect_right(spans, moment, key=lambda span: span.start) - 1
    if place < 0 or spans[place].end <= moment:
        return "activations"
    span = spans[place]
    chunk = f", chunk {span.chunk}" if span.chunk else ""
    return f"{span.kind} of microbatch {span.microbatch}{chunk}"
