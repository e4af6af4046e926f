"""A plan made for another job stops the run: before the model is built where the ranks are laid out in another way,
before the first step where the model is another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megamem import __version__
from megamem.config import Activations, Config
from megamem.ir.job import Job, Layout
from megamem.ir.model import Model
from megamem.ir.plan import MadeFor, Plan
from megamem.testing.trials import error_of, start_case

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 64,
    "vocab_size": 64,
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
}


def planned(layout: Layout, **changed: Any) -> Config:
    job = Job(model=Model(**{**SIZES, **changed}), layout=layout, seq_length=16)
    return Config(
        activations=Activations(policy="recompute"), plan=Plan(made_for=MadeFor(job=job, megamem=__version__))
    )


def plans_on_a_rank() -> dict[str, Any]:
    import megamem
    from megamem.testing.models import build_gpt, train_steps

    case = start_case()
    found: dict[str, Any] = {
        "layout": error_of(lambda: megamem.enable(planned(Layout(chunks=2)))),
        "ranks": error_of(lambda: megamem.enable(planned(Layout(pipeline=2)))),
    }
    for name, config in {"right": planned(Layout()), "model": planned(Layout(), ffn_hidden_size=128)}.items():
        with megamem.enable(config):
            chunks = build_gpt(case)
            found[name] = error_of(lambda chunks=chunks: train_steps(chunks, case, num_microbatches=1))  # type: ignore[misc]
    return found


def test_a_plan_runs_where_it_was_made_for_and_nowhere_else(dist: Dist) -> None:
    (found,) = dist(1)(plans_on_a_rank)
    assert found["right"] == ""
    assert "made_for.layout: chunks is 1, the plan is for 2" in found["layout"]
    assert "world_size is 1, the plan is for 2" in found["ranks"]
    assert "made_for.model: ffn_hidden_size is 64, the plan is for 128; make the plan again" in found["model"]
