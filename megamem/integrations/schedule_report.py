"""What a schedule promised and what it did: a table for the log, and a trace with both side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megamem.integrations.megatron_schedule import MegatronSchedule
from megamem.ir.schedule import TimedAction
from megamem.planner.schedules.plan import PlannedSchedule
from megamem.planner.schedules.simulator import simulate
from megamem.profiler.trace import costs_of_trace
from megamem.report.perfetto import chrome_trace

RECORDED_STEP = 3  # the first ones warm up


@dataclass(frozen=True, kw_only=True)
class ScheduleReport:
    """The schedule of the training steps. Times and memory are predictions, in the units of the costs given.

    unsplit: weight matrices whose gradient was computed in B although the schedule has W apart
    """

    name: str
    asked_for: str
    layout: str = "no step has run"
    bubble_rate: float | None = None
    stage_bubble_rate: float | None = None
    peak_activation: tuple[float, ...] = ()
    unsplit: tuple[str, ...] = ()

    @classmethod
    def of(cls, schedule: MegatronSchedule) -> ScheduleReport:
        """The report of what runs this rank's steps."""
        asked_for, planned = schedule.options.name, schedule.planned
        if planned is None:
            return cls(name=asked_for, asked_for=asked_for)
        placement, simulation = planned.schedule.placement, planned.simulation
        group = "" if planned.schedule.group is None else f", groups of {planned.schedule.group}"
        return cls(
            name=planned.schedule.name,
            asked_for=asked_for,
            layout=f"{placement.num_ranks} ranks x {placement.num_chunks} chunks ({placement.shape}), "
            f"{planned.schedule.num_microbatches} microbatches{group}",
            bubble_rate=simulation.bubble_rate,
            stage_bubble_rate=simulation.stage_bubble_rate,
            peak_activation=simulation.peak_activation,
            unsplit=tuple(schedule.unsplit()),
        )

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much), ready to print."""
        chosen = "" if self.asked_for == self.name else f" (chosen for {self.asked_for})"
        rows = [("schedule", f"{self.name}{chosen}"), ("pipeline", self.layout)]
        if self.bubble_rate is not None:
            rows.append(("bubble, predicted", f"{100 * self.bubble_rate:.1f} %"))
            peaks = ", ".join(f"{peak:.4g}" for peak in self.peak_activation)
            rows.append(("activations by rank, predicted peak", peaks))
        if self.unsplit:
            rows.append(("weight gradients computed in B", "; ".join(self.unsplit)))
        return rows


class TraceWriter:
    """Records one training step and writes it beside the simulator's prediction from the same measured costs.

    FILE.json holds measured and predicted actions of every pipeline rank, as a Chrome trace; FILE.costs.json the
    measured costs, for `schedule.costs` and `megamem simulate --costs`.
    """

    def __init__(self, path: str) -> None:
        self._path, self._steps = Path(path), 0

    def after_step(self, schedule: MegatronSchedule) -> None:
        """A training step has ended, on every rank of the pipeline. The pipeline of global rank 0 writes its trace."""
        self._steps += 1
        if self._steps != RECORDED_STEP:
            return
        trace, planned, schedule.records = schedule.trace, schedule.planned, False
        group = parallel_state.get_pipeline_model_parallel_group()
        if trace is None or planned is None or 0 not in dist.get_process_group_ranks(group):
            return
        timeline = trace.gather(group)
        if group.rank() == 0:
            write_trace(self._path, timeline, planned)


def write_trace(path: Path, timeline: Sequence[TimedAction], planned: PlannedSchedule) -> None:
    """Write FILE.json and FILE.costs.json (see `TraceWriter`). `timeline` is in seconds."""
    costs = costs_of_trace(timeline, planned.schedule.placement, planned.costs)
    simulation = simulate(planned.schedule, costs)
    predicted = json.loads(chrome_trace(simulation.timeline(), microseconds=1e6, title="predicted"))
    for event in predicted["traceEvents"]:
        event["pid"] += planned.schedule.placement.num_ranks
    content: dict[str, Any] = json.loads(chrome_trace(timeline, microseconds=1e6, title="measured"))
    content["traceEvents"] += predicted["traceEvents"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    path.with_suffix(".costs.json").write_text(json.dumps(costs.to_dict(), indent=1), encoding="utf-8")
