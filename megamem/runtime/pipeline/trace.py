"""When each action of a step really ran, to be laid beside what the simulator predicts.

Messages are not in it: an action starts when what it needs is here. On CUDA the times are the stream's, from events
that are read after the step; elsewhere the host's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megamem.ir.schedule import Action, TimedAction


@dataclass(slots=True)
class _Mark:
    action: Action
    start: Any
    end: Any = None


class Trace:
    """The times of one step's compute actions on one pipeline rank."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._on_gpu = rank, device.type == "cuda"
        self._began = time.time()
        self._origin = self._now()
        self._marks: list[_Mark] = []

    def begin(self, action: Action) -> None:
        """The action has what it needs, and starts now."""
        self._marks.append(_Mark(action, self._now()))

    def end(self) -> None:
        """The action that began last is done."""
        self._marks[-1].end = self._now()

    def rows(self) -> list[TimedAction]:
        """This rank's actions in order; on CUDA waits for the last of them. Seconds since this rank began the step."""
        if self._on_gpu and self._marks:
            self._marks[-1].end.synchronize()
        return [
            TimedAction(self._rank, mark.action, self._since(mark.start), self._since(mark.end))
            for mark in self._marks
            if mark.end is not None
        ]

    def gather(self, group: dist.ProcessGroup) -> list[TimedAction]:
        """The rows of all ranks of a pipeline, in seconds since the first rank began the step; collective.

        Hosts' clocks are taken to agree, as NTP keeps them.
        """
        everybody: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everybody, (self._began, self.rows()), group=group)
        first = min(began for began, _ in everybody)
        return [
            row._replace(start=row.start + began - first, end=row.end + began - first)
            for began, rows in everybody
            for row in rows
        ]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _since(self, moment: Any) -> float:
        if not self._on_gpu:
            return float(moment - self._origin)
        return float(self._origin.elapsed_time(moment)) / 1e3
