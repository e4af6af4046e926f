"""What is said of a schedule after it ran: the report, the count of activations, the trace with its costs file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamem.ir.schedule import Action, Placement, TimedAction
from megamem.ir.workload import PipelineCosts, parse_costs
from megamem.profiler.trace import costs_of_trace

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]


def test_costs_are_medians_and_the_parts_of_a_w_add_up() -> None:
    placement = Placement(shape="round-robin", num_ranks=2, num_chunks=1)
    rows = [
        *(TimedAction(0, Action("F", 0, number), 0.0, length) for number, length in enumerate((1.0, 2.0, 9.0))),
        TimedAction(0, Action("B", 0, 0), 1.0, 4.0),
        TimedAction(0, Action("W", 0, 0, 0, 2), 4.0, 5.0),
        TimedAction(0, Action("W", 0, 0, 1, 2), 7.0, 7.5),
        TimedAction(1, Action("F", 0, 0), 2.0, 2.5),
        TimedAction(1, Action("BW", 0, 0), 2.5, 4.5),
    ]
    like = PipelineCosts.uniform(placement, activation=8.0, weight_grad=6.0)
    first, last = costs_of_trace(rows, placement, like).stages
    assert (first.forward, first.backward, first.weight) == (2.0, 3.0, 1.5)
    assert (last.forward, last.backward, last.weight) == (0.5, 2.0, 0.0)
    assert (first.activation, first.weight_grad) == (8.0, 6.0)


def run(name: str, steps: int, trace: str) -> dict[str, Any]:
    """A few steps on two pipeline ranks: the report as text and the peak of the count, ours and stock's."""
    from megamem.integrations.megatron_core import enable
    from megamem.integrations.metering import measured_activations
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.pipeline import PipelineCase, train_pipeline

    case = PipelineCase(gpt=GptCase(layers=4, pp=2), steps=steps)
    init_parallel(case.gpt)
    with measured_activations() as stock:
        train_pipeline(case)
    with enable({"schedule": {"name": name, "trace": trace}}) as handle:
        before = str(handle.report())
        meter = handle.meter()
        train_pipeline(case)
        return {"before": before, "report": str(handle.report()), "peak": meter.peak_bytes, "stock": stock.peak_bytes}


def test_1f1b_by_our_loop_holds_what_megatrons_holds(dist: Dist, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "trace.json"
    results = dist(2)(run, "1f1b", 2, str(path))
    for found in results:
        assert "no step has run" in found["before"]
        assert "2 ranks x 1 chunks (round-robin), 4 microbatches" in found["report"]
        assert "weight gradients computed in B" not in found["report"]  # nothing was to be split
        assert found["peak"] == found["stock"] > 0
    assert not path.exists()  # the third step is recorded, and there was none


def test_a_trace_has_what_was_measured_beside_what_was_predicted(dist: Dist, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "trace.json"
    results = dist(2)(run, "zb-h2", 3, str(path))
    assert "VocabParallelEmbedding" in results[0]["report"]
    # Twice the warm-up on the first rank, and on both what W waits for.
    assert results[0]["peak"] > results[0]["stock"]
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"measured rank 0", "measured rank 1", "predicted rank 0", "predicted rank 1"}
    actions = {
        pid: [event["name"] for event in events if event["ph"] == "X" and event["pid"] == pid] for pid in range(4)
    }
    for rank in range(2):
        assert len(actions[rank]) == 3 * 4  # F, B and W of four microbatches
        assert sorted(actions[rank]) == sorted(actions[rank + 2])
    costs = parse_costs(json.loads(path.with_suffix(".costs.json").read_text(encoding="utf-8")))
    assert isinstance(costs, PipelineCosts)
    assert all(stage.forward > 0 and stage.backward > 0 and stage.weight > 0 for stage in costs.stages)
