"""What is left to the planner in a job whose layout is what it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megamem.config import load_config
from megamem.errors import ConfigError, InfeasibleError
from megamem.ir.job import Job, Layout
from megamem.planner.hardware import load_hardware
from megamem.planner.joint.decide import decide
from megamem.planner.models import load_model

H100 = load_hardware("h100")
LONG = Job(
    model=load_model("llama3-8b"),
    layout=Layout(tensor=8, sequence_parallel=True),
    seq_length=262144,
    global_batch_size=4,
)
SHORT = replace(LONG, seq_length=4096)
PIPELINE = replace(
    LONG, layout=Layout(tensor=4, sequence_parallel=True, pipeline=4, data=4), seq_length=32768, global_batch_size=64
)


def decided(job: Job, **sections: Any) -> Any:
    return decide(load_config(sections), job, H100)


def test_nothing_is_switched_on_where_everything_fits() -> None:
    found = decided(SHORT, activations={"policy": "auto"}, allocator={"mode": "auto"}, vocabulary={"parallel": "auto"})
    assert found.enabled == ()
    assert found.plan is not None and found.plan.predicts(found.settings())
    reasons = {row.subject: row.reason for row in found.plan.predicted.decisions}
    assert "everything that layers save fits" in reasons["activations.policy"]


def test_activations_are_decided_tensor_by_tensor_and_the_rest_stays() -> None:
    found = decided(LONG, activations={"policy": "auto", "verify": False}, vocabulary={"fused_loss": True})
    assert found.activations.policy == "ordered" and found.activations.table and not found.activations.verify
    assert found.vocabulary.fused_loss is True and not found.allocator.is_on
    memory = found.plan.predicted.memory
    assert all(rank.peak <= rank.limit == H100.for_training for rank in memory)
    assert decide(found, LONG, H100) is found  # nothing is left open
    assert load_config(found.to_dict()).settings() == found.settings()


def test_the_schedule_and_the_chunks_of_the_job_are_kept() -> None:
    found = decided(PIPELINE, activations={"policy": "auto"}, schedule={"name": "zb-h1"})
    assert found.schedule.name == "zb-h1"
    assert found.plan.made_for.job.layout == PIPELINE.layout


def test_memo_takes_the_fraction_of_its_own_rule() -> None:
    few = load_config({"activations": {"policy": "memo", "swap_fraction": "auto", "host_memory": "40GiB"}})
    many = load_config({"activations": {"policy": "memo", "swap_fraction": "auto", "host_memory": "400GiB"}})
    little, much = (decide(one, LONG, H100).activations for one in (few, many))
    assert little.policy == much.policy == "memo"
    assert 0 < little.swap_fraction < much.swap_fraction == 1.0
    base, others = 2 * 2 * 262144 * 4096 / 8, 30 * 262144 * 4096 / 8  # bytes of a layer: 2 units, and 15 of Llama
    assert little.swap_fraction == pytest.approx((40 * 2**30 / 30 - base) / others, rel=0.01)  # (n - 2) layers


@pytest.mark.parametrize(
    ("job", "sections", "message"),
    [
        (LONG, {"activations": {"policy": "auto", "swap_fraction": 0.5}}, "swap_fraction: has no effect with policy"),
        (LONG, {"activations": {"policy": "auto", "table": [{"layers": 1, "fc1": "keep"}]}}, "table: has no effect"),
        (LONG, {"planner": {"hardware": "h200"}}, "planner.hardware: has no effect.* activations.policy"),
        (replace(LONG, recompute="full"), {"activations": {"policy": "auto"}}, "--recompute-granularity full.*remove"),
        (PIPELINE, {"activations": {"policy": "auto"}, "schedule": {"name": "auto"}}, "needs a schedule with a name"),
        (replace(LONG, global_batch_size=3, micro_batch_size=2), {"allocator": {"mode": "auto"}}, "use 4|use 2"),
        (LONG, {"activations": {"policy": "auto"}, "planner": {"device_memory": "8GiB"}}, "8.0 GiB of device memory"),
        (
            replace(LONG, seq_length=8192),
            {"activations": {"policy": "memo", "swap_fraction": "auto", "host_memory": "1MiB"}},
            "not even inputs and attention outputs",
        ),
    ],
)
def test_contradictions_are_told_with_a_way_out(job: Job, sections: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, InfeasibleError), match=message):
        decided(job, **sections)
