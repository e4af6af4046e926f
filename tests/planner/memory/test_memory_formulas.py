"""Activation memory against published formulas: arXiv 2205.05198 (Megatron), and MEMO's table of a layer's tensors."""

from __future__ import annotations

from typing import Any

import pytest

from megamem.ir.job import Job, Layout
from megamem.ir.kernels import Kernels
from megamem.ir.model import Model
from megamem.planner.memory.inventory import saved_tensors, storage_bytes
from megamem.planner.models import load_model

UNFUSED = Kernels(attention="unfused")
S, B, H, A = 2048, 4, 1536, 16
GPT = Model(
    num_layers=8,
    hidden_size=H,
    num_attention_heads=A,
    num_query_groups=A,
    kv_channels=H // A,
    ffn_hidden_size=4 * H,
    vocab_size=51200,
    position="learned_absolute",
    hidden_dropout=0.1,
    attention_dropout=0.1,
)


def layer_bytes(layout: Layout, *, without: tuple[str, ...] = (), **changed: Any) -> int:
    """What one layer saves, without norms' statistics, which the paper leaves out, and without the tensors named."""
    job = Job(model=GPT, layout=layout, seq_length=S, micro_batch_size=B, kernels=UNFUSED, **changed)
    tensors = saved_tensors(job, 1)
    return storage_bytes(
        one
        for one in tensors
        if "statistics" not in one.storage.name and not any(word in one.storage.name for word in without)
    )


@pytest.mark.parametrize("t", [1, 2, 8])
def test_megatrons_formulas_of_a_layer_exactly(t: int) -> None:
    """Equations 1, 2 and 4, and table 2: s b h (34 + 5 a s / h) and its parallel forms."""
    sbh, scores = S * B * H, 5 * A * S * S * B
    tensor = layer_bytes(Layout(tensor=t))
    assert tensor == 10 * sbh + (24 * sbh + scores) // t
    if t == 1:
        assert tensor == 34 * sbh + scores
        return
    sequence = layer_bytes(Layout(tensor=t, sequence_parallel=True))
    assert sequence == (34 * sbh + scores) // t
    selective = layer_bytes(Layout(tensor=t, sequence_parallel=True), without=("scores",))
    assert selective == 34 * sbh // t


def test_the_papers_example_needs_the_memory_that_it_says() -> None:
    """Section 4.1: for GPT-3 (a = 96, s = 2048, h = 12288) 5 a s / h is 80, attention 70 % of the activations."""
    model = load_model("gpt3-175b")
    assert 5 * model.num_attention_heads * 2048 / model.hidden_size == 80
    assert pytest.approx(0.70, abs=0.005) == 80 / (34 + 80)


def units(name: str, **changed: Any) -> float:
    """What a Transformer Engine layer saves in units of s b h elements; statistics and log-sum-exp left out."""
    model = load_model(name)
    job = Job(model=model, layout=Layout(), seq_length=4096, **changed)
    covered = sum(
        one.nbytes
        for one in saved_tensors(job, 1)
        if "statistics" not in one.storage.name and one.storage.name != "lse"
    )
    return covered / (2 * 4096 * model.hidden_size)


def test_memos_layer_saves_sixteen_units() -> None:
    """arXiv 2407.12117, table 1; for Llama 17 (3 norms and residuals, 2.5 of attention, 3.5 x 3 of the MLP ...)."""
    assert units("gpt-7b") == 16
    assert units("llama3-8b") == 17
    assert units("llama3-70b") == 16.75
    assert units("llama2-7b") == pytest.approx(16.06, abs=0.01)


def test_memos_model_of_a_million_tokens_saves_four_tebibytes() -> None:
    """arXiv 2407.12117, section 1: 4096 GB for the 7B model at 1M tokens."""
    job = Job(model=load_model("gpt-7b"), layout=Layout(), seq_length=1 << 20)
    own = [one for one in saved_tensors(job, 1) if "statistics" not in one.storage.name and one.storage.name != "lse"]
    assert 32 * sum(one.nbytes for one in own) == 4096 << 30
