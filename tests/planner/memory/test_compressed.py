"""`activations.compress` in plans: what a step with codes holds and copies is what is predicted, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megamem.config import load_config
from megamem.ir.job import Job
from megamem.planner.activations import plan_activations
from megamem.planner.joint.decide import options_of
from megamem.planner.memory.activations import ActivationMemory
from megamem.planner.schedules.families import build_schedule
from megamem.planner.schedules.family import Request
from megamem.testing.jobs import job_of_case

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]

# Hidden states are rows of multiples of 128: others have a scale more than the planner counts.
SIZES: Fields = {"hidden": 128, "heads": 4, "sequence": 32, "vocab": 128, "layers": 4}
MODELS: dict[str, Fields] = {
    "gpt": {**SIZES, "ffn": 256, "activation": "gelu", "norm": "LayerNorm", "bias": True},
    "llama": {**SIZES, "kv_groups": 2, "ffn": 384, "activation": "swiglu", "norm": "RMSNorm", "bias": False, "pp": 2},
    "llama, sequence": {
        **SIZES, "ffn": 256, "activation": "swiglu", "norm": "RMSNorm", "bias": False, "tp": 2, "sp": True,
    },
}  # fmt: skip
CODED: Fields = {"compress": "fp8", "keep_last_layers": 0}
CONFIGS: dict[str, Fields] = {
    "memo": {"activations": {"policy": "memo", **CODED}},
    "memo, half": {"activations": {"policy": "memo", "swap_fraction": 0.5, **CODED}},
    "ordered": {"activations": {"policy": "ordered", "swap_fraction": 0.25, **CODED}},
    "residual": {"activations": {"policy": "memo", "swap_fraction": 0.5, "residual_every": 2, **CODED}},
    "table": {
        "activations": {
            "policy": "memo",
            **CODED,
            "table": [
                {"layers": "1-2", "attention_output": "swap/fp8", "layer_input": "swap/fp8", "saved": "swap/fp8"},
                {"layers": "3", "mlp.linear_fc2": "swap/none", "projection": "0.5/fp8", "saved": 0.25},
            ],
        }
    },
    "tiles": {"activations": {"policy": "memo", **CODED}, "mlp": {"tiles": 2}},
    "codes already": {"activations": {"policy": "memo", **CODED}, "fp8": {"saved_activations": "mlp"}},
}


def _case(fields: Fields) -> Any:
    import torch

    from megamem.testing.models import GptCase

    return GptCase(**fields, dtype=torch.bfloat16)


def _job(fields: Fields) -> Job:
    return replace(job_of_case(_case(fields), num_microbatches=4), bf16=True)


def steps(fields: Fields) -> dict[str, tuple[int, int]]:
    """Of this rank, under every configuration: the peak of a meter, and the bytes that a step copies out."""
    import megamem
    from megamem.testing.models import build_gpt, init_parallel, train_steps

    case = _case(fields)
    init_parallel(case)
    found = {}
    for name, config in CONFIGS.items():
        with megamem.enable(config) as handle:
            meter, chunks = handle.meter(), build_gpt(case)
            train_steps(chunks, case, num_microbatches=4, steps=2)
            assert handle.engine is not None
            first = handle.engine.stats.link_nbytes
            train_steps(chunks, case, num_microbatches=4, steps=1)
            found[name] = meter.peak_bytes, handle.engine.stats.link_nbytes - first
    return found


@pytest.mark.parametrize("model", MODELS)
def test_a_step_holds_and_copies_what_is_predicted(dist: Dist, model: str) -> None:
    fields = MODELS[model]
    ranks, width = fields.get("tp", 1) * fields.get("pp", 1), fields.get("tp", 1)
    measured = dist(ranks)(steps, fields)[::width]
    (job,) = dist(1)(_job, fields)
    schedule = build_schedule("1f1b", Request(num_ranks=fields.get("pp", 1), num_microbatches=4))
    predicted = {}
    for name, config in CONFIGS.items():
        loaded = load_config(config)
        plan = plan_activations(loaded.activations, 4, loaded.fp8)
        books = ActivationMemory(job, plan, options_of(loaded)).books(schedule)
        predicted[name] = [(book.metered, book.to_host) for book in books]
    assert predicted == {name: [rank[name] for rank in measured] for name in CONFIGS}
