"""Time of what Megatron's `--recompute-modules` names: in a step, and per module."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megamem.ir.job import Job, Layout
from megamem.planner.costs.layer import LayerTime
from megamem.planner.evaluation import Model, Setup
from megamem.planner.hardware import load_hardware
from megamem.planner.memory.activations import single_rank_schedule
from megamem.planner.models import load_model

H100 = load_hardware("h100")


def job_of(model: str, *modules: str) -> Job:
    job = Job(model=load_model(model), layout=Layout(tensor=8, sequence_parallel=True), seq_length=8192, bf16=True)
    return replace(job, recompute="selective", recompute_modules=modules) if modules else job


def recomputed(job: Job) -> float:
    priced = Model(job, H100).price(Setup(schedule=single_rank_schedule(1)))
    return priced.time.get("recompute", 0.0)


def test_a_dense_mlp_is_its_two_products_and_more() -> None:
    job = job_of("llama3-8b", "mlp")
    work = LayerTime(job, 1, H100).work
    products = (work.gemms["fc1"] + work.gemms["fc2"]) / H100.gemm
    assert 1.0 < recomputed(job) / (32 * products) < 2.0  # collectives and the activation function besides
    both = recomputed(job_of("llama3-8b", "mlp", "core_attn"))
    assert both == pytest.approx(recomputed(job) + recomputed(job_of("llama3-8b", "core_attn")))
    assert recomputed(job_of("llama3-8b", "moe")) == recomputed(job_of("llama3-8b")) == 0.0


def test_of_experts_all_is_more_than_the_shared_ones() -> None:
    times = {name: recomputed(job_of("deepseek-v3", name)) for name in ("moe", "shared_experts", "mlp")}
    assert times["moe"] > times["shared_experts"] > times["mlp"] > 0.0  # three of 61 layers have a dense MLP
