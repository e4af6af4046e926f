"""Sizes of models and layouts, and what Megatron-Core would not run."""

import re
from typing import Any

import pytest

from megamem.ir.job import Job, Layout
from megamem.ir.model import Experts, LatentAttention, Model
from megamem.ir.record import RecordError, from_plain, to_plain

SIZES: dict[str, Any] = {
    "num_layers": 12,
    "hidden_size": 96,
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "kv_channels": 8,
    "ffn_hidden_size": 256,
    "vocab_size": 1000,
}
EXPERTS = Experts(num_experts=8, topk=2, ffn_hidden_size=32, dense_layers=(1, 2))


def job(layout: Layout, model: Model | None = None, **changed: Any) -> Job:
    sizes: dict[str, Any] = {"seq_length": 64, "global_batch_size": 8, "spec": "local"}
    return Job(model=model or Model(**SIZES), layout=layout, **{**sizes, **changed})


def test_widths_of_attention() -> None:
    model = Model(**SIZES)
    assert (model.query_width, model.kv_width, model.value_width) == (96, 32, 96)
    latent = LatentAttention(kv_lora_rank=64, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=12)
    model = Model(**{**SIZES, "latent": latent})
    assert (model.query_width, model.kv_width, model.value_width) == (288, 288, 144)


def test_layers_with_experts() -> None:
    model = Model(**{**SIZES, "experts": EXPERTS})
    assert [model.is_moe(number) for number in (1, 2, 3, 12, 13)] == [False, False, True, True, True]


def test_a_layout_counts_its_ranks() -> None:
    layout = Layout(tensor=4, context=2, pipeline=3, data=2, expert=4, expert_tensor=1, sequence_parallel=True)
    assert layout.world_size == 48 and layout.sequence_shards == 8
    assert layout.experts_tensor == 1 and layout.expert_data == 4
    assert layout.text() == "TP 4 x CP 2 x PP 3 x EP 4 x DP 2"
    assert Layout().text() == "DP 1"
    assert job(Layout(data=2)).num_microbatches == 4


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"num_query_groups": 5}, "num_query_groups 5 does not divide 12 attention heads"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"normalization": "GroupNorm"}, "none of LayerNorm, RMSNorm"),
        ({"position": "alibi"}, "none of rope"),
        ({"experts": Experts(num_experts=2, topk=1, ffn_hidden_size=8, dense_layers=(13,))}, "dense layer 13 of 12"),
    ],
)
def test_a_model_that_cannot_be_is_refused(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Model(**{**SIZES, **wrong})


@pytest.mark.parametrize(
    ("layout", "changed", "reason"),
    [
        (Layout(tensor=8), {}, "does not divide 12 attention heads; use 6"),
        (Layout(tensor=6), {}, "neither divides nor is divided by 4 query groups; use 4"),
        (Layout(pipeline=5), {}, "by 5 pipeline ranks x 1 chunks; use --pipeline-model-parallel-size 4"),
        (Layout(pipeline=2, chunks=4), {}, "use --num-virtual-stages-per-pipeline-rank 3"),
        (Layout(sequence_parallel=True), {}, "no effect without tensor parallelism"),
        (Layout(context=2), {}, "needs --transformer-impl transformer_engine"),
        (Layout(expert=2, data=2), {}, "needs a model with experts"),
        (Layout(data=3), {}, "--global-batch-size 8 is not a multiple of --micro-batch-size 1 x 3 .* use 9"),
        (Layout(tensor=2, sequence_parallel=True), {"seq_length": 63}, "not divisible by 2 .* use 64"),
        (Layout(context=2), {"seq_length": 62, "spec": "transformer_engine"}, "two chunks each.* use 64"),
    ],
)  # fmt: skip
def test_what_megatron_would_not_run_names_the_flag_and_a_way_out(
    layout: Layout, changed: dict[str, Any], reason: str
) -> None:
    (problem,) = job(layout, **changed).problems()
    assert re.search(reason, problem), problem


def test_experts_are_divided_evenly_over_the_ranks_of_a_stage() -> None:
    model = Model(**{**SIZES, "experts": EXPERTS})
    assert job(Layout(expert=4, data=4), model).problems() == []
    (problem,) = job(Layout(expert=3, data=3), model, global_batch_size=9).problems()
    assert "does not divide 8 experts; use 2" in problem
    (problem,) = job(Layout(expert=8, data=4), model).problems()
    assert "does not divide the 4 ranks of a pipeline stage; use 4" in problem
    (problem,) = job(Layout(tensor=2, data=2), model).problems()
    assert "need --sequence-parallel" in problem


def test_records_read_back_and_leave_defaults_out() -> None:
    whole = job(Layout(tensor=2), Model(**{**SIZES, "experts": EXPERTS}))
    plain = to_plain(whole)
    assert plain["layout"] == {"tensor": 2} and "latent" not in plain["model"]
    assert from_plain(Job, plain) == whole


def test_a_record_reports_every_fault_with_its_place() -> None:
    content = {
        "model": {**SIZES, "swiglu": "maybe", "experts": {"topk": 1}},
        "layout": {"data": 0},
        "seq_length": "64.5",
    }
    with pytest.raises(RecordError) as caught:
        from_plain(Job, content)
    assert {place for place, _ in caught.value.problems} == {
        "model.experts.num_experts",
        "model.experts.ffn_hidden_size",
        "model.swiglu",
        "layout",
        "seq_length",
    }
