"""A plan in a configuration file: it reads back, and is refused where it was made for something else."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megamem import ConfigError, __version__, load_config
from megamem.config import Config
from megamem.ir.job import Job, Layout
from megamem.ir.model import Experts, Model
from megamem.ir.plan import (
    MEMORY_KINDS,
    Decision,
    MadeFor,
    Plan,
    Prediction,
    RankMemory,
    Span,
    Utilization,
    digest,
    parse_spans,
    timeline_text,
)

MODEL = Model(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    ffn_hidden_size=64,
    vocab_size=100,
    experts=Experts(num_experts=4, topk=2, ffn_hidden_size=16, dense_layers=(1,)),
    name="tiny",
)
JOB = Job(model=MODEL, layout=Layout(tensor=2, sequence_parallel=True, pipeline=2), seq_length=64)
MEMORY = RankMemory(rank=0, kinds={"weights": 100, "kept": 20, "at_work": 4}, timeline="0:0 0.5:24")
PREDICTED = Prediction(
    step_seconds=1.25,
    utilization=Utilization(mfu=0.5, formula="6 N tokens", model_flops=1e18, peak_flops_per_gpu=1e15),
    memory=(MEMORY,),
    decisions=(Decision(subject="qkv", fate="swap", layers="1-4", reason="hidden"),),
    pipeline=("F0@0-0.5 BW0@0.5-1.25",),
)


def plan_for(config: Config, **changed: Any) -> Plan:
    made_for: dict[str, Any] = {"job": JOB, "megamem": __version__, "settings": digest(config.settings())}
    return Plan(made_for=MadeFor(**{**made_for, **changed}), predicted=PREDICTED)


def planned(**changed: Any) -> Config:
    config = load_config({"activations": {"policy": "recompute"}})
    return Config(activations=config.activations, plan=plan_for(config, **changed))


def test_a_plan_reads_back_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    path = tmp_path / "plan.yaml"
    path.write_text(planned().to_yaml(), encoding="utf-8")
    loaded = load_config(path)
    assert loaded == planned() == load_config(planned()) == load_config(yaml.safe_load(path.read_text()))
    assert loaded.plan is not None and loaded.enabled == ("activations",)


def test_predictions_are_of_the_settings_they_were_made_for() -> None:
    config = planned()
    assert config.plan is not None and config.plan.predicts(config.settings())
    edited = load_config(config, {"activations.verify": "false"})
    assert edited.plan is not None and not edited.plan.predicts(edited.settings())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"megamem": "0.0.1"}, "made_for.megamem: the plan is of megamem 0.0.1"),
        ({"megatron_core": "0.1.9"}, "made_for.megatron_core: the plan is for Megatron-Core 0.1,"),
    ],
)
def test_a_plan_of_other_versions_is_refused_at_load(changed: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(planned(**changed))


def test_a_plan_for_another_number_of_ranks_is_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="world_size is 8, the plan is for 4; make the plan again"):
        load_config(planned())


def test_a_plan_for_another_layout_or_model_says_where_it_differs() -> None:
    made_for = plan_for(Config()).made_for
    assert made_for.layout_problems({"tensor": 2, "pipeline": 2, "world_size": 4}) == []
    assert len(made_for.layout_problems({"tensor": 1, "pipeline": 4})) == 2
    assert made_for.model_problems({"hidden_size": 32, "experts.topk": 2}) == []
    (problem,) = made_for.model_problems({"hidden_size": 64, "experts.topk": 2})
    assert "hidden_size is 64, the plan is for 32" in problem


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"predicted": {"step_seconds": 1}}, "stands alone"),
        ({"made_for": {}}, "made_for.job: missing"),
        ({"made_for": {"job": {"model": {"num_layers": "x"}}}}, "made_for.job.model.num_layers: 'x' is no int"),
        ({"made_for": {"jobs": 1}}, "made_for.jobs: unknown key; valid: job, megamem"),
    ],
)
def test_a_broken_plan_is_refused_with_the_place(part: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(part)


def test_memory_kinds_add_up_and_curves_read_back() -> None:
    assert MEMORY.peak == 124 and set(MEMORY.kinds) <= set(MEMORY_KINDS)
    assert PREDICTED.activation_peak(0) == 24 and PREDICTED.peak_memory == 124
    assert MEMORY.curve() == [(0.0, 0), (0.5, 24)]
    assert timeline_text([(0, 0.0), (0.25, 0.0), (0.5, 24.0)]) == MEMORY.timeline


def test_actions_in_time_read_back() -> None:
    spans = [
        Span(kind="F", microbatch=3, chunk=1, start=0, end=0.5),
        Span(kind="BW", microbatch=0, chunk=0, start=2, end=3),
    ]
    assert parse_spans(" ".join(map(str, spans))) == spans
    with pytest.raises(ValueError, match="'F@1-2' is no action"):
        parse_spans("F@1-2")
