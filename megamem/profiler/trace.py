"""From the measured times of a step's actions to what each stage costs, so that schedules are priced as they ran."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import replace

from megamem.ir.schedule import Kind, Placement, TimedAction
from megamem.ir.workload import PipelineCosts, StageCost, VocabularyCost


def costs_of_trace(timeline: Iterable[TimedAction], placement: Placement, like: PipelineCosts) -> PipelineCosts:
    """The stages' costs in the unit of the times: medians over the microbatches, of the parts of a W their sum.

    Memory is taken from `like`, the costs of the plan. The latency of a hop, which actions do not show, is 0.
    A stage whose backward passes ran whole (BW) counts them as B. S and T of a vocabulary that all ranks share are
    taken as they ran, with what their number of barriers puts into either; the figures are for this number only.
    """
    timeline = list(timeline)
    seen: dict[tuple[int, Kind], dict[int, float]] = {}
    for rank, action, start, end in timeline:
        key = placement.stage(rank, action.chunk), action.kind
        per_microbatch = seen.setdefault(key, {})
        per_microbatch[action.microbatch] = per_microbatch.get(action.microbatch, 0.0) + end - start

    def median(stage: int, kind: Kind) -> float:
        return statistics.median(seen.get((stage, kind), {0: 0.0}).values())

    stages: list[StageCost] = [
        replace(
            known,
            forward=median(stage, "F"),
            backward=median(stage, "B") or median(stage, "BW"),
            weight=median(stage, "W"),
        )
        for stage, known in enumerate(like.stages)
    ]
    shared = None
    if like.vocabulary is not None:
        times = {kind: _median(timeline, kind) for kind in ("S", "T", "IF", "IB")}
        shared = VocabularyCost(
            logits=times["S"],
            weight_grad=times["T"],
            recompute=0.0,
            embed=times["IF"],
            embed_grad=times["IB"],
            kept=like.vocabulary.kept,
        )
    return PipelineCosts(stages=tuple(stages), vocabulary=shared)


def _median(timeline: Iterable[TimedAction], kind: str) -> float:
    """Of all ranks and microbatches."""
    return statistics.median([end - start for _, action, start, end in timeline if action.kind == kind] or [0.0])
