"""The table that says what is on, who asked for it, and what to expect of it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamem import __version__
from megamem.config import Activations, Config, Scheduling, Vocabulary
from megamem.ir.job import Job, Layout
from megamem.ir.model import Model
from megamem.ir.plan import Decision, MadeFor, Plan, Prediction, RankMemory, Utilization, digest
from megamem.testing.trials import start_case

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]


def printed(config: Any, pp: int = 1, vpp: int | None = None) -> list[str]:
    """What `enable` prints on this rank, line by line, without repeated spaces."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    import megamem

    start_case(pp=pp, vpp=vpp)
    init_num_microbatches_calculator(0, None, 4, 1, 1)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        megamem.enable(config).disable()
    return [" ".join(line.split()) for line in output.getvalue().splitlines()]


def test_rank_0_says_what_is_on(dist: Dist) -> None:
    config = Config(schedule=Scheduling(name="po-h"), vocabulary=Vocabulary(fused_loss=True, loss_chunk=4096))
    first, second = dist(2)(printed, config, 2, 2)
    assert second == []
    assert first[0].startswith(f"megamem {__version__} is on, with megatron-core ")
    assert first[0].endswith("on 2 ranks (pipeline 2)")
    assert first[1] == "capability setting why expected"
    activations, kept, schedule, vocabulary, chunk = first[2:]
    assert activations.startswith("activations policy: memo schedule.name: po-h up to ")
    assert kept == "keep_last_layers: 0 schedule.name: po-h"
    assert schedule.startswith("schedule name: po-h megamem.enable bubble ") and schedule.endswith("(simulated)")
    assert vocabulary == "vocabulary fused_loss: true megamem.enable logits of 4096 words at a time"
    assert chunk == "loss_chunk: 4096 megamem.enable"


def test_a_file_is_named(dist: Dist, tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("megamem: {activations: {policy: recompute}}\n")
    (lines,) = dist(1)(printed, str(file))
    assert lines[2].startswith(f"activations policy: recompute {file} ")


def planned() -> Config:
    """A plan with one reason, and its predictions."""
    config = Config(activations=Activations(policy="recompute"))
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 8}
    model = Model(**sizes, ffn_hidden_size=64, vocab_size=64, swiglu=False)
    made_for = MadeFor(
        job=Job(model=model, layout=Layout(), seq_length=16), megamem=__version__, settings=digest(config.settings())
    )
    predicted = Prediction(
        step_seconds=1.5,
        utilization=Utilization(mfu=0.4, formula="", model_flops=1.0, peak_flops_per_gpu=1.0),
        memory=(RankMemory(rank=0, kinds={"weights": 3 << 20, "kept": 1 << 20}),),
        decisions=(Decision(subject="activations.policy", fate="recompute", reason="the host has no memory to spare"),),
    )
    return replace(config, plan=Plan(made_for=made_for, predicted=predicted))


def test_a_plan_gives_its_reasons_and_predictions(dist: Dist) -> None:
    (lines,) = dist(1)(printed, planned())
    assert lines[2].startswith("activations policy: recompute the host has no memory to spare up to ")
    assert lines[3] == "The plan predicts 4.0 MiB on the fullest rank and 1,500 ms a step."


def test_an_edited_plan_predicts_nothing(dist: Dist) -> None:
    edited = replace(planned(), activations=Activations(policy="recompute", residual_every=2))
    (lines,) = dist(1)(printed, edited)
    assert lines[-1].startswith("The settings are not those that were planned")
