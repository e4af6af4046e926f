"""Numbers of parameters, against the published ones and against Megatron's own models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megamem.ir.job import Job, Layout
from megamem.planner.memory.parameters import (
    model_parameters,
    mtp_parameters,
    padded_vocabulary,
    stage_parameters,
    states_of,
    vocabulary_parameters,
)
from megamem.planner.models import load_model
from megamem.testing.jobs import job_of_case

Dist = Callable[[int], Callable[..., list[Any]]]

PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama2-7b": 6_738_415_616,
    "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}
"""The number of parameters that the files of each model hold."""


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_models_have_the_parameters_that_are_published(name: str, count: int) -> None:
    assert model_parameters(load_model(name)) == count


def test_deepseek_v3_has_671_billion_and_the_layer_of_its_prediction() -> None:
    model = load_model("deepseek-v3")
    main = model_parameters(model) - mtp_parameters(model).total
    assert main == pytest.approx(671.03e9, rel=1e-4)
    assert mtp_parameters(model).total == pytest.approx(11.6e9, rel=0.01)


def test_stages_add_up_to_the_model() -> None:
    model = replace(load_model("llama3-8b"), vocab_size=128 * 1000)  # divided evenly, so that nothing is padded
    job = Job(model=model, layout=Layout(pipeline=4, chunks=2), seq_length=8192)
    assert sum(stage_parameters(job, stage).total for stage in range(8)) == model_parameters(model)
    bare = sum(stage_parameters(job, stage, shards_vocabulary=True).total for stage in range(8))
    assert bare + 4 * vocabulary_parameters(job).total == model_parameters(model)


def test_states_are_what_megatron_documents() -> None:
    """bf16: 18 bytes a parameter, and 6 + 12/d with the distributed optimizer (Megatron-Core's documentation)."""
    model = load_model("llama3-8b")
    parameters = stage_parameters(Job(model=model, layout=Layout(), seq_length=8192), 0)
    for data, distributed, nbytes in ((1, False, 18), (4, False, 18), (4, True, 6 + 12 / 4)):
        job = Job(model=model, layout=Layout(data=data, distributed_optimizer=distributed), seq_length=8192)
        states = states_of(job, parameters)
        total = states.weights + states.gradients + states.optimizer
        assert total == pytest.approx(nbytes * parameters.total, rel=1e-6)


def test_states_of_experts_are_divided_by_the_ranks_that_hold_the_same() -> None:
    layout = Layout(tensor=2, sequence_parallel=True, data=8, expert=4, expert_tensor=1)
    job = Job(model=load_model("qwen3-30b-a3b"), layout=layout, seq_length=4096, global_batch_size=8)
    found = stage_parameters(job, 0)
    assert layout.expert_data == 4
    assert states_of(job, found).optimizer == 12 * (found.dense // 8 + found.experts // 4)


def parameters_of_a_rank(fields: dict[str, Any]) -> int:
    from megamem.testing.models import GptCase, build_gpt, init_parallel

    case = GptCase(**fields, ddp=False)
    init_parallel(case)
    return sum(parameter.numel() for chunk in build_gpt(case) for parameter in chunk.parameters())


def job_of_fields(fields: dict[str, Any]) -> Job:
    from megamem.testing.models import GptCase

    return job_of_case(GptCase(**fields))


@pytest.mark.megatron
@pytest.mark.parametrize(
    "fields",
    [
        {"position": "learned_absolute", "tied": True},
        {"activation": "swiglu", "norm": "RMSNorm", "bias": False, "kv_groups": 2, "tp": 2, "qk_layernorm": True},
        {"pp": 2, "vpp": 2, "layers": 4},
        {"experts": 4, "bias": False, "activation": "swiglu", "ep": 2},
        {"experts": 4, "bias": False, "tp": 2, "sp": True},
        {"config": {"mtp_num_layers": 2}},
        {"pp": 2, "config": {"mtp_num_layers": 1}},
        {"pp": 2, "config": {"mtp_num_layers": 1}, "tied": True, "position": "learned_absolute"},
    ],
)
def test_a_rank_holds_what_megatron_gives_it(dist: Dist, fields: dict[str, Any]) -> None:
    (job,) = dist(1)(job_of_fields, {"vocab": 256, **fields})
    found = dist(job.layout.world_size)(parameters_of_a_rank, {"vocab": 256, **fields})
    pipeline, chunks = job.layout.pipeline, job.layout.chunks
    expected = [
        sum(stage_parameters(job, chunk * pipeline + rank).total for chunk in range(chunks)) for rank in range(pipeline)
    ]
    assert found[:: len(found) // pipeline] == expected
    assert padded_vocabulary(job.model, job.layout.tensor) == 256
