"""Layers of pipeline stages that do not divide evenly, in Megatron's words and balanced."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest

from megamem.ir.job import Job, Layout
from megamem.ir.model import Model
from megamem.ir.pipeline_split import (
    balanced_split,
    dealt_split,
    ends_split,
    layout_text,
    normal_split,
    padded_split,
    parse_layout,
)
from megamem.ir.plan import MadeFor
from megamem.ir.record import from_plain, to_plain

LAYOUTS = {
    "Et*3|(t*4|)*2t*2L": (3, 4, 4, 2),
    "Ettt|tt,tt|tttt|tt,mL": (3, 4, 4, 2),
    "E|(tt|)*2L": (0, 2, 2, 0),
    "[['embedding', 'decoder'], ['decoder', 'decoder', 'mtp', 'loss']]": (1, 2),
}


@pytest.mark.parametrize("text", LAYOUTS)
def test_a_layout_is_read_as_megatron_reads_it(text: str) -> None:
    assert parse_layout(text) == LAYOUTS[text]


@pytest.mark.megatron
@pytest.mark.parametrize("text", [*LAYOUTS][:3])
def test_megatron_reads_the_same(text: str) -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    stages = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert tuple(stage.count(LayerType.decoder) for stage in stages) == LAYOUTS[text]


def test_what_is_written_reads_back() -> None:
    rng = random.Random(1)
    for _ in range(200):
        split = tuple(rng.choice((0, 1, 2, 2, 13)) for _ in range(rng.randint(1, 12)))
        mtp = rng.randint(0, 2)
        text = layout_text(split, mtp)
        assert parse_layout(text) == split, text
    assert layout_text((3, 4, 4, 2), 1) == "Et*3|(t*4|)*2t*2mL"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Et|x|tL", "'x' is none of E, t, m, L"),
        ("t|tL", "the embedding .* in turn"),
        ("Et|t", "in turn"),
        ("Etm|tL", "in turn"),
        ("Et|tm|L", "outside the last stage is not planned for"),
        ("Et*999999|tL", "more than 100000 layers"),
        ("[['embedding', 'encoder']]", "no list of lists of embedding, decoder, mtp, loss"),
        ("[[", "no list of lists"),
    ],
)
def test_a_wrong_layout_is_refused_with_its_fault(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_layout(text)


def test_the_balanced_split_is_the_best_there_is() -> None:
    rng = random.Random(2)
    for _ in range(300):
        costs = [rng.choice((1.0, 1.0, 2.0, 0.3)) for _ in range(rng.randint(2, 9))]
        stages, last = rng.randint(1, len(costs)), rng.choice((0.0, 1.0, 4.0))

        def slowest(split: Any, costs: list[float] = costs, last: float = last) -> float:
            ends = [0, *itertools.accumulate(split)]
            sums = [sum(costs[start:end]) for start, end in itertools.pairwise(ends)]
            sums[-1] += last
            return max(sums)

        found = balanced_split(costs, stages, last) or (len(costs) // stages,) * stages
        cuts = itertools.combinations(range(1, len(costs) + (last > 0)), stages - 1)
        every = [[b - a for a, b in itertools.pairwise((0, *cut, len(costs)))] for cut in cuts]
        assert sum(found) == len(costs) and min(found[:-1], default=1) >= 1 and found[-1] >= (not last)
        assert slowest(found) <= min(map(slowest, every)) * (1 + 1e-6)
    assert balanced_split([1.0] * 61, 16, 2.5) == (*[4] * 15, 1)
    assert balanced_split([1.0] * 61, 16, 4.5) == (1, 1, 1, 3, *[5] * 11, 0)
    with pytest.raises(ValueError, match="3 layers are too few for 4 stages"):
        balanced_split([1.0] * 3, 4)


def test_layers_are_dealt_to_ranks_before_stages() -> None:
    ring, v = [0, 1, 2, 3, 4] * 2, [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    for ranks, last in itertools.product((ring, v), (0.0, 0.5, 2.0)):
        split = dealt_split(32, ranks, last)
        spent = [sum(count for count, owner in zip(split, ranks, strict=True) if owner == rank) for rank in range(5)]
        spent[ranks[-1]] += last
        assert sum(split) == 32 and max(spent) <= -(-(32 + last) // 5) + 0.5
        assert max(split) - min(split[:-1]) <= 1  # the last stage may have less
    assert dealt_split(61, [*range(16)] * 2, 0.5)[:3] == (1, 1, 2)
    with pytest.raises(ValueError, match="3 layers are too few for 4 stages"):
        dealt_split(3, [0, 1, 0, 1])


def test_megatrons_other_options_give_the_same_splits() -> None:
    assert ends_split(61, 16, first=3, last=2) == (3, *[4] * 14, 2)
    assert ends_split(10, 2, 2, last=4) == (3, 2, 3, 2)
    assert ends_split(8, 2, first=4, last=4) == ()
    assert padded_split(30, 4, 2, embedding=True, loss=True) == (3, *[4] * 6, 3)
    assert normal_split([2, 2]) == () and normal_split([2, 1]) == (2, 1)
    with pytest.raises(ValueError, match="4 of 61 layers cannot be divided by the other 3 pipeline ranks"):
        ends_split(61, 5, first=50, last=7)
    with pytest.raises(ValueError, match="takes a stage without layers from pipeline_model_parallel_layout only"):
        ends_split(4, 2, last=0)
    with pytest.raises(ValueError, match="3 layers of a pipeline rank cannot be divided by 2 chunks"):
        ends_split(7, 2, 2, last=3)
    with pytest.raises(ValueError, match="cannot be divided by 4 stages"):
        padded_split(30, 4, embedding=True, loss=False)


FIELDS: dict[str, Any] = {
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "pipeline_model_parallel_layout": None,
}


@pytest.mark.megatron
@pytest.mark.parametrize(
    ("num_layers", "pipeline", "chunks", "given"),
    [
        (61, 16, 1, {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 2}),
        (10, 2, 2, {"num_layers_in_last_pipeline_stage": 4}),
        (30, 4, 2, {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}),
        (31, 4, 1, {"account_for_loss_in_pipeline_split": True}),
        (13, 2, 2, {"pipeline_model_parallel_layout": "Et*3|(t*4|)*2t*2L"}),
        (12, 4, 1, {}),
    ],
)
def test_a_live_configuration_is_divided_as_megatron_divides_it(
    num_layers: int, pipeline: int, chunks: int, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    from megamem.integrations.stage_layers import split_of

    values = {**FIELDS, **given, "num_layers": num_layers, "pipeline_model_parallel_size": pipeline}
    values["virtual_pipeline_model_parallel_size"] = chunks if chunks > 1 else None
    if layout := values["pipeline_model_parallel_layout"]:
        values["pipeline_model_parallel_layout"] = PipelineParallelLayerLayout(layout, pipeline)
    config: Any = SimpleNamespace(**values)
    found = split_of(config) or (num_layers // (pipeline * chunks),) * (pipeline * chunks)
    monkeypatch.setattr(parallel_state, "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", chunks if chunks > 1 else None)
    expected = []
    for chunk, rank in itertools.product(range(chunks), range(pipeline)):
        monkeypatch.setattr(parallel_state, "_MPU_PIPELINE_MODEL_PARALLEL_RANK", rank)
        expected.append(get_num_layers_to_build(config, vp_stage=chunk if chunks > 1 else None, pp_rank=rank))
    assert found == tuple(expected)


def a_job(**layout: Any) -> Job:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 8}
    model = Model(**sizes, num_layers=5, ffn_hidden_size=64, vocab_size=64)
    return Job(model=model, layout=Layout(**layout), seq_length=16)


def test_a_job_with_a_split_is_checked_written_and_compared() -> None:
    job = a_job(pipeline=2, split=(3, 2))
    assert job.problems() == [] and from_plain(Job, to_plain(job)) == job
    assert job.layout.text() == "PP 2 x uneven stages"
    (problem,) = a_job(pipeline=2, split=(3, 1)).problems()
    assert problem == "--pipeline-model-parallel-layout Et*3|tL has 4 layers, the model 5"
    with pytest.raises(ValueError, match="a split of 2 stages for 2 ranks x 2 chunks"):
        Layout(pipeline=2, chunks=2, split=(3, 2))
    (problem,) = a_job(pipeline=2).problems()
    assert problem.endswith("or --pipeline-model-parallel-layout 'Et*3|t*2L' instead of virtual stages")
    made_for = MadeFor(job=job, megamem="0")
    assert made_for.split_problems((3, 2)) == []
    (problem,) = made_for.split_problems(())
    assert "divided evenly, in the plan Et*3|t*2L" in problem
