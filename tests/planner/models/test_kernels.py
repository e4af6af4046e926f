"""Kernels and Megatron's own recomputation, read from its flags and from Megatron-Bridge's configurations."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest

from megamem.ir.job import Job
from megamem.ir.kernels import Kernels
from megamem.planner.costs.work import score_traffic
from megamem.planner.models import flags_of, job_of_flags
from megamem.planner.models.bridge import job_of_content
from megamem.planner.models.flags import job_of_arguments

SIZES = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 256 --vocab-size 128 --bf16"
LOCAL = Kernels(attention="unfused", mask=True)
CASES: dict[str, Kernels] = {
    "": Kernels(),
    "--attention-backend unfused": Kernels(attention="unfused", softmax_fp32=True),
    "--transformer-impl local": LOCAL,
    "--transformer-impl local --no-masked-softmax-fusion": replace(LOCAL, fused_softmax=False),
    "--transformer-impl local --attention-softmax-in-fp32": replace(LOCAL, softmax_fp32=True),
    "--transformer-impl local --no-create-attention-mask-in-dataloader": replace(LOCAL, mask=False),
    "--swiglu --no-bias-swiglu-fusion": Kernels(fused_activation=False),
    "--position-embedding-type rope --no-rope-fusion": Kernels(fused_rope=False),
}


@pytest.mark.parametrize("flags", CASES)
def test_flags_say_which_kernels_run(flags: str) -> None:
    job = job_of_flags(f"{SIZES} {flags}")
    assert job.kernels == CASES[flags]
    assert job_of_flags([*flags_of(job), "--vocab-size", "128"]).kernels == job.kernels


def test_flags_say_what_megatron_recomputes() -> None:
    selective = job_of_flags(f"{SIZES} --recompute-activations")
    assert selective.recomputes_attention
    other = job_of_flags(f"{SIZES} --recompute-granularity selective --recompute-modules mlp layernorm")
    assert other.recompute_modules == ("mlp", "layernorm") and not other.recomputes_attention
    line = "--recompute-granularity full --recompute-method block --recompute-num-layers 3"
    full = job_of_flags(f"{SIZES} {line}")
    assert (full.recompute, full.recompute_method, full.recompute_num_layers) == ("full", "block", 3)


SOURCE: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 256}


def test_what_megatrons_parser_made_says_the_same() -> None:
    words = {**SOURCE, "vocab_size": 128, "bf16": True, "transformer_impl": "local", "recompute_modules": ["core_attn"]}
    job = job_of_arguments(Namespace(**words, masked_softmax_fusion=False, apply_rope_fusion=False, world_size=1))
    assert job.kernels == replace(LOCAL, fused_softmax=False, fused_rope=False)


def test_a_bridge_configuration_says_the_same() -> None:
    model = {**SOURCE, "vocab_size": 128, "transformer_impl": "local", "masked_softmax_fusion": False, "bf16": True}
    model |= {"attention_softmax_in_fp32": True, "recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    job = job_of_content({"model": model, "dataset": {"create_attention_mask": False}}, "x.yaml")
    assert job.kernels == Kernels(attention="unfused", fused_softmax=False, softmax_fp32=True)
    assert job.recompute_modules == ("mlp",)


def test_the_softmax_kernel_takes_only_some_shapes() -> None:
    def job(**changed: Any) -> Job:
        return replace(job_of_flags(f"{SIZES} --transformer-impl local --attention-softmax-in-fp32"), **changed)

    assert job().fuses_softmax and job().softmax_itemsize == 2
    for changed in ({"seq_length": 258}, {"seq_length": 8192}, {"seq_length": 128}, {"bf16": False}):
        assert not job(**changed).fuses_softmax and job(**changed).softmax_itemsize == 4


def test_scores_go_through_memory_kernel_by_kernel() -> None:
    """4 heads x 256 x 256 scores in bf16: the product and softmax, dropout, the product with the values."""
    fused = score_traffic(job_of_flags(f"{SIZES} --transformer-impl local"))
    pairs = 4 * 256 * 256
    assert fused[0] == pairs * (2 + 4 + (2 + 2 + 1) + 2)
    assert score_traffic(job_of_flags(f"{SIZES} --transformer-impl local --no-masked-softmax-fusion")) > fused
    assert score_traffic(job_of_flags(SIZES)) == (0.0, 0.0)


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="attention 'ring' is none of flash, unfused"):
        Kernels(attention="ring")
