"""Losses and every gradient, on every rank, against stock Megatron-Core.

Pure swap is bitwise by construction: the same numbers come back. Where tokens are recomputed, equality is bitwise as
long as a GEMM on a part of the tokens gives the same rows as on all of them. That holds for the CPU kernels at these
sizes whenever all tokens, or none, are recomputed; for a part of them the stated tolerance is a few roundings of the
dtype.
"""

from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

SWAP = {"policy": "memo", "keep_last_layers": 0}
EXACT: dict[str, dict[str, Any]] = {
    "swap": SWAP,
    "memo, last layers kept": {"policy": "memo", "keep_last_layers": 1},
    "ordered, every anchor": {"policy": "ordered", "keep_last_layers": 0},
    "recompute": {"policy": "recompute"},
    "memo, nothing but the base": {**SWAP, "swap_fraction": 0.0},
    "sparse residuals": {**SWAP, "residual_every": 3},
    "sparse residuals, recompute": {"policy": "recompute", "residual_every": 2},
    "no room on the host": {**SWAP, "host_memory": "4KiB"},
    "little room on the host": {**SWAP, "host_memory": "40KiB"},
}
PARTIAL: dict[str, dict[str, Any]] = {
    "memo, half": {**SWAP, "swap_fraction": 0.5},
    "ordered, a third": {"policy": "ordered", "swap_fraction": 0.34, "keep_last_layers": 0},
    "table": {
        "policy": "ordered",
        "keep_last_layers": 1,
        "table": [
            {"layers": "all", "fc1": "0.25", "qkv": "0.75@hbm", "projection": "keep"},
            {"layers": "2", "saved": "0.5@hbm", "layer_input": "keep", "mlp.linear_fc2": "swap"},
        ],
    },
    "half, sparse residuals": {**SWAP, "swap_fraction": 0.5, "residual_every": 2},
}
MOE = {"experts, swapped whole": {**SWAP, "experts": "swap"}, "experts, recomputed": {**SWAP, "experts": "recompute"}}

Fields = dict[str, Any]
LLAMA: Fields = {"layers": 4, "kv_groups": 2, "activation": "swiglu", "norm": "RMSNorm", "bias": False}
GPT: Fields = {"layers": 4, "position": "learned_absolute", "activation": "gelu", "norm": "LayerNorm", "tied": True}

CASES: dict[str, tuple[int, Fields]] = {
    "gpt": (1, GPT),
    "llama": (1, LLAMA),
    "megatron attention": (1, {**LLAMA, "flash_attention": False}),
    "bf16, qk norm": (1, {**LLAMA, "dtype": "bfloat16", "qk_layernorm": True}),
    "one sequence a batch": (1, {**LLAMA, "microbatch": 1}),
    "tp2 sp": (2, {**LLAMA, "tp": 2, "sp": True}),
    "tp2": (2, {**GPT, "tp": 2}),
    "pp2": (2, {**LLAMA, "pp": 2}),
    "pp2 vpp2": (2, {**GPT, "layers": 8, "pp": 2, "vpp": 2}),
    "moe ep2": (2, {**LLAMA, "experts": 4, "ep": 2}),
    "tp2 sp pp2": (4, {**LLAMA, "tp": 2, "sp": True, "pp": 2}),
}
DROPOUT: dict[str, tuple[int, Fields]] = {
    "gpt": (1, {**GPT, "dropout": 0.1}),
    "megatron attention": (1, {**LLAMA, "dropout": 0.1, "flash_attention": False}),
    "tp2 sp": (2, {**LLAMA, "dropout": 0.1, "tp": 2, "sp": True}),
}


def compare(fields: Fields, configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per configuration: largest difference of a loss, relative norm of the worst gradient, what moved."""
    import torch

    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import relative_error, train

    case = GptCase(**{**fields, "dtype": getattr(torch, fields.get("dtype", "float32"))})
    init_parallel(case)
    steps = {"num_microbatches": 4 if case.pp > 1 else 2, "steps": 2}  # the second one with learned order
    stock = train(case, **steps)
    assert stock.gradients
    outcomes = {}
    for name, config in configs.items():
        ours = train(case, config, **steps)
        assert ours.engine is not None and ours.gradients.keys() == stock.gradients.keys()
        stats = ours.engine.stats
        errors = {key: relative_error(ours.gradients[key], old) for key, old in stock.gradients.items()}
        outcomes[name] = {
            "loss": max((abs(one - other) for one, other in zip(stock.losses, ours.losses, strict=True)), default=0.0),
            "gradient": max(errors.values()),
            "bitwise": ours.differences(stock) == [],
            "worst": max(errors, key=lambda key: errors[key]),
            "swapped": stats.swapped_nbytes,
            "recomputed": stats.recomputed_nbytes,
            "kept": stats.kept_nbytes,
        }
    return outcomes


@pytest.mark.parametrize("name", CASES)
def test_every_policy_trains_as_stock_megatron_does(dist: Any, name: str) -> None:
    nranks, fields = CASES[name]
    exact = {**EXACT, **(MOE if "experts" in fields else {})}
    for rank, outcomes in enumerate(dist(nranks)(compare, fields, {**exact, **PARTIAL}, timeout=240)):
        for config, outcome in outcomes.items():
            where = f"{name}, rank {rank}, {config}: {outcome}"
            if config in exact:
                assert outcome["bitwise"], where
            else:
                tolerance = 2e-2 if "dtype" in fields else 1e-5  # a few roundings in a GEMM's sum
                assert outcome["gradient"] <= tolerance and outcome["loss"] <= tolerance, where
                assert outcome["swapped"] and outcome["recomputed"], where
        assert outcomes["swap"]["swapped"] and not outcomes["swap"]["recomputed"]
        assert outcomes["recompute"]["recomputed"] and not outcomes["recompute"]["swapped"]
        assert outcomes["no room on the host"]["recomputed"]
        assert outcomes["no room on the host"]["swapped"] < outcomes["little room on the host"]["swapped"]


@pytest.mark.parametrize("name", DROPOUT)
def test_recomputation_repeats_the_dropout_masks(dist: Any, name: str) -> None:
    nranks, fields = DROPOUT[name]
    for outcomes in dist(nranks)(compare, fields, EXACT, timeout=240):
        for config, outcome in outcomes.items():
            assert outcome["bitwise"], f"{name}, {config}: {outcome}"
