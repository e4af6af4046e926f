"""What a layer really leaves behind between forward and backward, counted by two who know nothing of each other.

The engine counts what it decides; `LiveStorages` sees every storage that an operator makes and whether it is alive.
"""

from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Fields = dict[str, Any]
# MEMO's layer: GPT, LayerNorm, MHA, GELU 4h; 16 tensors of [s, b, h] are what it calls skeletal.
MEMO: Fields = {
    "layers": 3,
    "hidden": 64,
    "sequence": 64,
    "ffn": 256,
    "position": "learned_absolute",
    "activation": "gelu",
    "norm": "LayerNorm",
}
LLAMA: Fields = {
    "layers": 3,
    "hidden": 64,
    "sequence": 64,
    "kv_groups": 2,
    "activation": "swiglu",
    "norm": "RMSNorm",
    "bias": False,
}


def retained(fields: Fields, config: dict[str, Any]) -> dict[str, int]:
    """Bytes alive after the forward of all layers, less their output; and what the engine says."""
    import torch

    import megamem
    from megamem.integrations.metering import measured_activations
    from megamem.testing.live import LiveStorages
    from megamem.testing.models import GptCase, build_gpt, init_parallel, unwrap

    case = GptCase(**fields, ddp=False)
    init_parallel(case)
    counted: dict[str, int] = {}
    with megamem.enable({"activations": config}) as handle, measured_or_nothing(config, measured_activations) as meter:
        layers = unwrap(build_gpt(case)[0]).decoder.layers
        rotary = torch.randn(case.sequence, 1, 1, case.hidden // case.heads) if case.position == "rope" else None
        for turn in range(2):  # the first forward also learns
            hidden = torch.randn(case.sequence, case.microbatch, case.hidden, requires_grad=True) * 1.0
            with LiveStorages() as live:
                for layer in layers:
                    hidden, _ = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
                if handle.engine is not None:
                    handle.engine.courier.flush()
                host = 0 if handle.engine is None else handle.engine.courier.arena.capacity
                seen = live.live_bytes() - hidden.untyped_storage().nbytes()
                counted = {"live": seen - (host if any(s.nbytes == host for s in live.storages()) else 0)}
            if meter is not None:
                counted["claimed"] = meter.retained.now
            elif handle.engine is not None:
                counted["claimed"] = handle.engine.stats.retained.now + handle.engine.courier.ledger.staging_nbytes
            hidden.sum().backward()
            assert turn or counted
    tokens = case.sequence * case.microbatch
    return {
        **counted,
        "unit": tokens * case.hidden * 4,
        "log_sum_exp": tokens * case.heads * 4 * case.layers,
        "rotary": 0 if rotary is None else 2 * 2 * rotary.nbytes,
        "layers": case.layers,
    }


def measured_or_nothing(config: dict[str, Any], measured: Any) -> Any:
    """Stock Megatron is counted by the meter, megamem by its engine."""
    from contextlib import nullcontext

    return nullcontext() if config else measured()


FC1_HBM = {"table": [{"layers": "all", "fc1": "0.5@hbm"}]}


@pytest.mark.parametrize("fields", [MEMO, LLAMA], ids=["memo", "llama"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"policy": "recompute"},
        {"policy": "memo", "keep_last_layers": 0},
        {"policy": "memo", "keep_last_layers": 1},
        {"policy": "memo", "swap_fraction": 0.5, "keep_last_layers": 0},
        {"policy": "ordered", "swap_fraction": 0.5, "keep_last_layers": 0} | FC1_HBM,
    ],
    ids=["stock", "recompute", "memo 1", "memo 1, last kept", "memo 0.5", "ordered, hbm"],
)  # fmt: skip
def test_the_engines_count_is_what_is_alive(dist: Any, fields: Fields, config: dict[str, Any]) -> None:
    (count,) = dist(1)(retained, fields, config)
    # Alive but not saved for the layer's backward pass: nothing. Saved but made before the layers: the first input.
    assert abs(count["live"] + count["unit"] * _holds_input(config) - count["claimed"]) <= 0.01 * count["unit"], count


def _holds_input(config: dict[str, Any]) -> int:
    """The first layer's input was made before counting began; who keeps it counts it."""
    return int(config.get("policy") in (None, "recompute"))


def test_recompute_keeps_two_of_sixteen_tensors_and_the_log_sum_exp(dist: Any) -> None:
    (stock,) = dist(1)(retained, MEMO, {})
    (ours,) = dist(1)(retained, MEMO, {"policy": "recompute"})
    assert ours["claimed"] <= stock["claimed"] * 2 / 16 + ours["log_sum_exp"], (ours, stock)
    assert ours["claimed"] == 2 * ours["unit"] * ours["layers"] + ours["log_sum_exp"], ours


def test_swapping_everything_leaves_nothing_in_device_memory(dist: Any) -> None:
    (ours,) = dist(1)(retained, MEMO, {"policy": "memo", "keep_last_layers": 0})
    assert ours["claimed"] == 0, ours
    (ours,) = dist(1)(retained, LLAMA, {"policy": "memo", "keep_last_layers": 0})
    assert ours["claimed"] == 0, ours
