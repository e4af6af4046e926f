"""Experts swapped or recomputed while a schedule computes weight gradients apart: what plans of MoE models ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]
ALL: Fields = {"keep_last_layers": 0}
POLICIES: dict[str, Fields] = {
    "recompute": {"policy": "recompute", "experts": "recompute"},
    "swap": {"policy": "memo", "experts": "swap", **ALL},
    "swap alone": {"policy": "recompute", "experts": "swap"},
    "ordered": {"policy": "ordered", "swap_fraction": 0.5, "experts": "recompute", **ALL},
}


def train_all() -> dict[str, Any]:
    """Losses of two steps, and this rank's last gradients by name."""
    import megamem
    from megamem.testing.models import GptCase, build_gpt, global_names, init_parallel, train_steps

    sizes: Fields = {"hidden": 32, "heads": 4, "sequence": 32, "vocab": 64, "kv_groups": 2, "ffn": 96, "layers": 4}
    case = GptCase(**sizes, activation="swiglu", norm="RMSNorm", bias=False, experts=4, pp=2)
    init_parallel(case)

    def train() -> dict[str, Any]:
        chunks = build_gpt(case)
        losses, _ = train_steps(chunks, case, num_microbatches=4, steps=2)
        named = (pair for chunk in chunks for pair in global_names(chunk))
        found: dict[str, Any] = {name: one.main_grad.clone() for name, one in named}  # type: ignore[attr-defined]
        return {**found, "losses": losses}

    results = {"stock": train()}
    for name, policy in POLICIES.items():
        with megamem.enable({"schedule": {"name": "zb-h1"}, "activations": policy}):
            results[name] = train()
    return results


def test_losses_and_gradients_are_those_of_stock(dist: Dist) -> None:
    import torch

    for rank in dist(2)(train_all):
        stock = rank.pop("stock")
        for name, found in rank.items():
            assert found.keys() == stock.keys() and found.pop("losses") == stock["losses"], name
            assert all(torch.equal(value, stock[key]) for key, value in found.items()), name
