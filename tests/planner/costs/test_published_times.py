"""Times against published runs, with the hardware table's numbers and nothing fitted."""

from __future__ import annotations

import pytest

from megamem.ir.job import Job, Layout
from megamem.planner.activations import plan_activations
from megamem.planner.costs.layer import LayerTime
from megamem.planner.costs.work import model_flops
from megamem.planner.evaluation import Model, Setup
from megamem.planner.fractions.rank import groups_of
from megamem.planner.hardware import load_hardware
from megamem.planner.memory.activations import single_rank_schedule
from megamem.planner.models import load_model
from megamem.sections import Activations

ALST = Job(model=load_model("llama3-8b"), layout=Layout(), seq_length=500_000)
ALST_SECONDS = 16 * 60 + 50
"""arXiv 2506.13996: Llama-8B, 500K tokens, one H100; full recomputation with FlashAttention-2, layer inputs in host
memory, MLP and loss in tiles, weights and optimizer on the CPU."""


def test_alst_reports_548_teraflops_by_its_own_count() -> None:
    """Attention not halved for causality, and recomputation counted: so the model and the length are right."""
    layer = LayerTime(ALST, 1, load_hardware("h100"))
    output = 2.0 * ALST.seq_length * 4096 * 128256
    theirs = 4 * (32 * (layer.work.gemm + 2 * layer.work.attention) + output)
    assert theirs / ALST_SECONDS == pytest.approx(548e12, rel=0.005)
    assert model_flops(ALST) / ALST_SECONDS / 989e12 == pytest.approx(0.221, abs=0.002)


def test_alst_trains_half_a_million_tokens_on_one_gpu_in_1010_seconds() -> None:
    """Within 5 %, without the optimizer, which was on the CPU. Tiles run the MLP once more under recomputation, and the
    copies of layer inputs were not overlapped (deepspeed/runtime/sequence_parallel/ulysses_sp.py)."""
    hardware = load_hardware("h100-flash2")
    setup = Setup(schedule=single_rank_schedule(1), fused_loss=True, recompute_all=True)
    found = Model(ALST, hardware).price(setup)
    layer = LayerTime(ALST, 1, hardware)
    tiles = 32 * (layer.work.gemms["fc1"] + layer.work.gemms["fc2"]) / hardware.gemm
    inputs = 32 * ALST.tokens * 4096 * 2
    copies = inputs / hardware.to_host + inputs / hardware.from_host
    seconds = found.step_seconds - found.time["optimizer"] + tiles + copies
    assert seconds == pytest.approx(ALST_SECONDS, rel=0.05)


def crossover(model: str, gpu: str, nbytes_per_token: int) -> int:
    """The length, in K, from which copying so much takes no longer than a layer computes; one tensor-parallel rank."""
    hardware = load_hardware(gpu)
    for length in range(4, 512):
        job = Job(model=load_model(model), layout=Layout(), seq_length=length * 1024)
        layer = LayerTime(job, 1, hardware)
        computing = layer.work.gemm / hardware.gemm + layer.forward.attention
        if computing >= nbytes_per_token * job.seq_length / hardware.to_host:
            return length
    raise AssertionError("never")


def test_memos_layers_hide_their_copies_from_192k_tokens_on() -> None:
    """arXiv 2407.12117, figure 1b: 7B, all 16 units of a layer, A800s of which two share an uplink."""
    assert crossover("gpt-7b", "a800", 16 * 4096 * 2) == pytest.approx(192, rel=0.03)


def test_the_base_alone_is_free_at_any_length_on_pcie_5() -> None:
    assert crossover("gpt-7b", "h200", 2 * 4096 * 2) <= 8


def test_rates_of_rebuilding_follow_the_contraction_length() -> None:
    """A product with contraction length K rebuilds G / K bytes a second, attention A / s: what density means."""
    hardware = load_hardware("h200")
    job = Job(model=load_model("llama3-8b"), layout=Layout(), seq_length=131072)
    layer = LayerTime(job, 1, hardware)
    (item,) = groups_of(Model(job, hardware), single_rank_schedule(1), 0)
    for name in ("qkv", "fc1"):
        assert item.group.nbytes[name] / layer.anchor(name) == pytest.approx(hardware.gemm / 4096)
    output = item.group.nbytes["layer_input"]  # as large as attention's output
    rate = hardware.attention_forward.at(131072)
    assert output / layer.forward.attention == pytest.approx(rate / 131072, rel=1e-6)


def test_not_running_attention_again_is_worth_a_fifth_of_the_step_at_long_sequences() -> None:
    """Keeping attention's output against full recomputation, Llama-8B from 128K on: 19 to 21 % less time."""
    for length in (128, 256, 512):
        job = Job(model=load_model("llama3-8b"), layout=Layout(), seq_length=length * 1024)
        model, schedule = Model(job, load_hardware("h200")), single_rank_schedule(1)
        full = model.price(Setup(schedule=schedule, recompute_all=True)).step_seconds
        plan = plan_activations(Activations(policy="recompute"), 32)
        ours = model.price(Setup(schedule=schedule, plan=plan)).step_seconds
        assert 1 - ours / full == pytest.approx(0.20, abs=0.025)
