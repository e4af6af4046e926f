"""Stages without layers, which a `--pipeline-model-parallel-layout` may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from megamem.ir.job import Job, Layout
from megamem.ir.model import Model
from megamem.planner.fractions.linear import solve
from megamem.planner.fractions.problem import Limits, Problem
from megamem.planner.joint.split import possible_chunks
from megamem.planner.memory.parameters import stage_parameters


def job_of(split: tuple[int, ...], **more: Any) -> Job:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 8}
    model = Model(**sizes, num_layers=4, ffn_hidden_size=64, vocab_size=64, normalization="RMSNorm", **more)
    return Job(model=model, layout=Layout(pipeline=len(split), split=split), seq_length=16)


@pytest.mark.parametrize("split", [(4, 0), (0, 4), (2, 0, 2, 0)])
def test_a_split_that_was_asked_for_keeps_its_chunks(split: tuple[int, ...]) -> None:
    assert possible_chunks(job_of(split)) == [1]


def test_the_final_norm_is_where_megatron_has_it() -> None:
    """Behind the last layer with multi-token prediction, else before the output layer."""
    last = stage_parameters(job_of((4, 0), share_embeddings=False), 1).total
    assert last == 128 * 32 + 32  # the vocabulary is padded to 128 words
    split, whole = (
        [stage_parameters(job_of(s, share_embeddings=False, mtp_num_layers=1), n).total for n in (0, 1)]
        for s in ((4, 0), (3, 1))
    )
    layer = whole[1] - split[1] - 32
    assert split[0] - whole[0] == layer + 32


def test_a_rank_without_layers_has_nothing_to_share_out() -> None:
    limits = Limits(device=1.0, host=1.0, to_host=1.0, from_host=1.0)
    assert solve(Problem(groups=(), limits=limits, moments=())).seconds == 0.0
