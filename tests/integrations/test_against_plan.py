"""What a plan predicted, beside what was measured."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from megamem.ir.job import Job, Layout
from megamem.ir.model import Model
from megamem.ir.plan import MadeFor, Plan, Prediction, RankMemory, Utilization

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron


def planned(hardware: str = "h100", **kinds: int) -> Plan:
    heads = {"num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 8}
    model = Model(num_layers=2, hidden_size=32, ffn_hidden_size=64, vocab_size=64, **heads)
    memory = (RankMemory(rank=0), RankMemory(rank=1, kinds={"context": 100, **kinds}))
    used = Utilization(mfu=0.5, formula="", model_flops=1.0, peak_flops_per_gpu=1.0)
    return Plan(
        made_for=MadeFor(
            job=Job(model=model, layout=Layout(pipeline=2), seq_length=16), megamem="1", hardware=hardware
        ),
        predicted=Prediction(
            step_seconds=2.0, utilization=used, tokens_per_second_per_gpu=1.0, time={}, memory=memory, hardware=hardware
        ),
    )


def watched(plan: Plan, monkeypatch: pytest.MonkeyPatch, starts: list[float]) -> Any:
    from megamem.integrations import against_plan

    clock = itertools.chain(starts)
    monkeypatch.setattr(against_plan.time, "perf_counter", lambda: next(clock))
    watch = against_plan.AgainstPlan(plan, rank=1)
    for _ in starts:
        watch.begin_step()
    return watch


def test_steps_are_timed_from_start_to_start_after_those_that_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watched(planned("profile.json", kept=4000), monkeypatch, [0.0, 50.0, 60.0, 62.0, 65.0, 67.5])
    report = watch.report(4100)
    assert (report.num_steps, report.step_seconds) == (3, 2.5)
    rows = dict(report.rows())
    assert rows["a step"] == "2.000 s and 2.500 s (+25.0%)"
    assert rows["activations, most"] == "0.0 MiB and 0.0 MiB (+2.5%)"


def test_what_is_not_the_same_thing_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watched(planned(kept=3000, weight_gradients=1000), monkeypatch, [0.0, 1.0])
    report = watch.report(4000)
    assert report.step_seconds is None and report.activation_nbytes is None and report.device_nbytes is None
    assert report.predicted_device_nbytes == 4000  # without the context, which PyTorch does not count
    assert report.rows() == [("plan: predicted and measured", "median of 0 steps; planned for h100, ran on a CPU")]
