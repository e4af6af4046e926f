"""Multi-token prediction (DeepSeek-V3's extra layer behind the last) under schedules and activation policies: the last
stage has a layer more, a copy of the embedding and a second loss. Losses and every gradient are stock Megatron's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]
SIZES: Fields = {"hidden": 32, "heads": 4, "sequence": 32, "vocab": 64, "kv_groups": 2, "ffn": 96, "layers": 4}
LLAMA: Fields = {"activation": "swiglu", "norm": "RMSNorm", "bias": False}
MODEL: Fields = {**SIZES, **LLAMA, "config": {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1}}
CONFIGS: dict[str, Fields] = {
    "zb-h1": {"schedule": {"name": "zb-h1"}},
    "1f1b, memo": {"schedule": {"name": "1f1b"}, "activations": {"policy": "memo", "keep_last_layers": 0}},
    "recompute": {"activations": {"policy": "recompute", "residual_every": 2}},
    "zb-h1, fused": {"schedule": {"name": "zb-h1"}, "vocabulary": {"fused_loss": True}},
}
CHUNKED: dict[str, Fields] = {
    "gis": {"schedule": {"name": "gis"}},
    "gis-h, ordered": {
        "schedule": {"name": "gis-h"},
        "activations": {"policy": "ordered", "swap_fraction": 0.5, "keep_last_layers": 0},
    },
}


def train_all(fields: Fields, configs: dict[str, Fields]) -> dict[str, Any]:
    """Losses of two steps, the second loss as Megatron logs it, and this rank's last gradients by name."""
    import torch
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    import megamem
    from megamem.testing.models import GptCase, build_gpt, global_names, init_parallel, train_steps

    case = GptCase(**fields)
    init_parallel(case)

    def train() -> dict[str, Any]:
        MTPLossLoggingHelper.tracker.clear()
        chunks = build_gpt(case)
        losses, _ = train_steps(chunks, case, num_microbatches=4, steps=2)
        named = (pair for chunk in chunks for pair in global_names(chunk))
        found: dict[str, Any] = {name: one.main_grad.clone() for name, one in named}  # type: ignore[attr-defined]
        logged = {name: one for name, one in MTPLossLoggingHelper.tracker.items() if torch.is_tensor(one)}
        return {**found, **{f"logged {name}": one.clone() for name, one in logged.items()}, "losses": losses}

    results = {"stock": train()}
    for name, config in configs.items():
        with megamem.enable(config):
            results[name] = train()
    return results


@pytest.mark.parametrize(("chunked", "tied"), [(False, True), (True, False)])
def test_losses_and_gradients_are_those_of_stock(dist: Dist, chunked: bool, tied: bool) -> None:
    import torch

    configs = CHUNKED if chunked else CONFIGS
    ranks = dist(2)(train_all, {**MODEL, "pp": 2, "tied": tied, **({"vpp": 2} if chunked else {})}, configs)
    assert any("logged" in name for rank in ranks for name in rank["stock"])
    for rank in ranks:
        stock = rank.pop("stock")
        for name, found in rank.items():
            assert found.keys() == stock.keys(), name
            rounded = "fused" in name  # sums over the vocabulary in chunks: another order
            assert found.pop("losses") == pytest.approx(stock["losses"], rel=1e-6 if rounded else 0), name
            for key, value in found.items():
                if rounded:
                    torch.testing.assert_close(value, stock[key], rtol=2e-5, atol=2e-6, msg=f"{name}: {key}")
                else:
                    assert torch.equal(value, stock[key]), f"{name}: {key}"
