"""`mlp.tiles` in real Megatron-Core models: gradients, data parallelism, schedules, the activation engine, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from megamem.errors import ConfigError

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]
SWAP: Fields = {"policy": "memo", "keep_last_layers": 0}
LLAMA: Fields = {"layers": 3, "kv_groups": 2, "activation": "swiglu", "norm": "RMSNorm", "bias": False}
GPT: Fields = {"layers": 3, "position": "learned_absolute", "tied": True}

POLICIES: dict[str, Fields | None] = {
    "off": None,
    "swap": SWAP,
    "last layer kept": {**SWAP, "keep_last_layers": 1},
    "recompute": {"policy": "recompute"},
    "half": {**SWAP, "swap_fraction": 0.5},
    "ordered, a third": {"policy": "ordered", "swap_fraction": 0.34, "keep_last_layers": 0},
    "sparse residuals": {**SWAP, "swap_fraction": 0.0, "residual_every": 2},
    "table": {**SWAP, "table": [{"layers": "1-2", "saved": "recompute", "fc1": "0.5@hbm", "mlp.linear_fc1": "keep"}]},
    "little room": {**SWAP, "host_memory": "40KiB"},
}
BITWISE = ("off", "swap", "recompute")  # with one tile
FEW = (*BITWISE, "half")
WHOLE = (*BITWISE, "last layer kept", "sparse residuals")  # token fractions that dropout allows
CASES: dict[str, tuple[int, Fields]] = {
    "gpt": (1, GPT),
    "llama": (1, LLAMA),
    "dropout": (1, {**GPT, "dropout": 0.1}),
    "bf16": (1, {**LLAMA, "dtype": "bfloat16"}),
    "without DDP": (1, {**GPT, "ddp": False}),
    "tp2": (2, {**GPT, "tp": 2}),
    "tp2 sp": (2, {**LLAMA, "tp": 2, "sp": True}),
    "tp2 sp pp2": (4, {**LLAMA, "layers": 4, "tp": 2, "sp": True, "pp": 2}),
}


def compare(fields: Fields, policies: dict[str, Fields | None]) -> dict[str, Any]:
    """Per policy and number of tiles: the worst error of a gradient, what differs at all, and what was moved."""
    import torch

    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import relative_error, train

    case = GptCase(**{**fields, "dtype": getattr(torch, fields.get("dtype", "float32"))})
    init_parallel(case)
    stock = train(case)
    found: dict[str, Any] = {}
    for name, policy in policies.items():
        for tiles in (1, 3) if name in BITWISE else (3,):
            ours = train(case, policy, sections={"mlp": {"tiles": tiles}})
            engine = ours.engine
            found[f"{name}, {tiles}"] = {
                "differences": ours.differences(stock),
                "error": max(
                    (relative_error(ours.gradients[key], right) for key, right in stock.gradients.items()), default=0.0
                ),
                "losses": [abs(one - two) for one, two in zip(ours.losses, stock.losses, strict=True)],
                "calls": ours.report.mlp.num_calls,
                "swapped": 0 if engine is None else engine.stats.swapped_nbytes,
                "recomputed": 0 if engine is None else engine.stats.recomputed_nbytes,
                "left": 0 if engine is None else engine.courier.ledger.num_live + engine.stats.retained.now,
            }
    return found


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_stock_megatron(dist: Dist, name: str) -> None:
    nranks, fields = CASES[name]
    names = WHOLE if "dropout" in fields else POLICIES if nranks == 1 else FEW
    policies = {key: POLICIES[key] for key in names}
    tolerance = 2e-2 if "dtype" in fields else 2e-6  # roundings of sums over other numbers of rows
    for rank, found in enumerate(dist(nranks)(compare, fields, policies, timeout=240)):
        for run, outcome in found.items():
            where = f"{name}, rank {rank}, {run}: {outcome}"
            policy, tiles = run.rsplit(", ", 1)
            if tiles == "1":
                assert outcome["differences"] == [], where
            assert outcome["error"] <= tolerance and all(loss <= tolerance for loss in outcome["losses"]), where
            assert outcome["calls"] > 0 and outcome["left"] == 0, where
            if policy in ("swap", "half"):
                assert outcome["swapped"] > 0, where
        assert found["recompute, 3"]["recomputed"] > found["swap, 3"]["recomputed"] > 0  # activation functions only
        assert found["swap, 3"]["swapped"] == found["swap, 1"]["swapped"]


DDP: dict[str, tuple[int, Fields, Fields]] = {
    "accumulated": (1, LLAMA, {}),
    "overlapped": (2, GPT, {"ddp": {"overlap_grad_reduce": True}}),
    "distributed optimizer": (
        2,
        {**LLAMA, "dtype": "bfloat16", "distributed_optimizer": True},
        {"ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True}, "adam": True, "steps": 3},
    ),
    "gradients in bf16": (2, {**LLAMA, "dtype": "bfloat16"}, {"ddp": {"grad_reduce_in_fp32": False}}),
}


def train_tiled(fields: Fields, options: Fields, tiles: tuple[int, ...], fused: bool, schedule: Fields) -> Any:
    """By number of tiles: the worst error of a gradient, and what differs at all."""
    import torch
    from megatron.core.tensor_parallel import layers

    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import relative_error
    from megamem.testing.pipeline import PipelineCase, train_pipeline

    class FusedOnCpu:
        @staticmethod
        def wgrad_gemm_accum_fp32(source: Any, grad_output: Any, main_grad: Any) -> None:
            main_grad.add_(grad_output.float().t().matmul(source.float()))

        wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32

    config = {"gradient_accumulation_fusion": fused, **fields.get("config", {})}
    gpt = GptCase(**{**fields, "dtype": getattr(torch, fields.get("dtype", "float32")), "config": config})
    case = PipelineCase(gpt=gpt, **options)
    init_parallel(gpt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "fused_weight_gradient_mlp_cuda", FusedOnCpu, raising=False)
        patch.setattr(layers, "_grad_accum_fusion_available", True)
        stock = train_pipeline(case)
        found: dict[Any, Any] = {}
        for count in tiles:
            sections = {"mlp": {"tiles": count}, **schedule}
            ours = train_pipeline(case, sections.pop("schedule", None), config=sections)
            errors = {key: relative_error(ours.gradients[key], right) for key, right in stock.gradients.items()}
            found[count] = {"differences": ours.differences(stock), "error": max(errors.values())}
    return found


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", DDP)
def test_data_parallelism(dist: Dist, name: str, fused: bool) -> None:
    nranks, fields, options = DDP[name]
    for found in dist(nranks)(train_tiled, fields, options, (1, 4), fused, {}):
        assert found[1]["differences"] == []
        # In bf16 the losses of the later steps differ too, by what rounding made of the first update.
        assert found[4]["error"] < (6e-2 if "dtype" in fields else 2e-6)


@pytest.mark.parametrize("tiles", ["off", 1])
def test_swapped_layers_that_add_to_main_grad_themselves(dist: Dist, tiles: Any) -> None:
    """Saved-tensor hooks give a linear layer another tensor than its weight, and DDP would wait for it in vain."""
    options = {"ddp": {"overlap_grad_reduce": True}}
    for found in dist(2)(train_tiled, GPT, options, (tiles,), True, {"activations": SWAP}):
        assert found[tiles]["differences"] == []


SCHEDULES: dict[str, tuple[int, Fields, Fields, Fields]] = {
    "1f1b": (2, {**LLAMA, "layers": 4, "pp": 2}, {}, {"schedule": {"name": "1f1b"}}),
    "zb-h1": (2, {**GPT, "layers": 4, "pp": 2}, {}, {"schedule": {"name": "zb-h1"}, "activations": SWAP}),
    "gis-h": (2, {**LLAMA, "layers": 8, "pp": 2, "vpp": 2}, {}, {"schedule": {"name": "gis-h"}}),
    "po-f": (2, {**LLAMA, "layers": 8, "pp": 2, "vpp": 2}, {"steps": 3}, {"schedule": {"name": "po-f"}}),
    "interleaved": (
        2,
        {**LLAMA, "layers": 8, "pp": 2, "vpp": 2},
        {"evaluate": 2},
        {"schedule": {"name": "interleaved"}, "activations": {"policy": "recompute"}},
    ),
    "zb-h1, overlapped": (
        4,
        {**GPT, "layers": 4, "pp": 2},
        {"ddp": {"overlap_grad_reduce": True}, "steps": 3},
        {"schedule": {"name": "zb-h1"}},
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(dist: Dist, name: str) -> None:
    nranks, fields, options, sections = SCHEDULES[name]
    for found in dist(nranks)(train_tiled, fields, options, (1, 4), False, sections, timeout=120):
        assert found[1]["differences"] == []
        assert found[4]["error"] < 2e-6


def unsplit() -> dict[str, Any]:
    """Which weight gradients a schedule that splits them found computed in B."""
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.pipeline import PipelineCase, train_pipeline

    case = PipelineCase(gpt=GptCase(**{**LLAMA, "layers": 4, "pp": 2}))
    init_parallel(case.gpt)
    found: dict[str, Any] = {}
    sections = {"mlp": {"tiles": 2}}
    train_pipeline(case, {"name": "zb-h1"}, config=sections, inspect=lambda handle: found.update(rows=handle.report()))
    return {"text": str(found["rows"])}


def test_the_report_says_which_weight_gradients_are_not_split(dist: Dist) -> None:
    for found in dist(2)(unsplit):
        assert "mlp.linear_fc1.weight" in found["text"] and "mlp.linear_fc2.weight" in found["text"]
        assert "linear_qkv.weight" not in found["text"]


def at_the_worst_time(policies: dict[str, Fields]) -> dict[str, Any]:
    """Gradients while every copy runs when the waits allow it, and freed memory is NaN, against copies done at once."""
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import train
    from megamem.testing.streams import SimulatedDevice

    case = GptCase(**{**LLAMA, "sequence": 8, "hidden": 16, "heads": 2})
    init_parallel(case)
    found: dict[str, Any] = {}
    for name, policy in policies.items():
        sections = {"mlp": {"tiles": 3}}
        expected = train(case, policy, sections=sections)
        for seed, order in enumerate(("latest", "random", "earliest", "random")):
            device = SimulatedDevice(seed, order)  # type: ignore[arg-type]
            ours = train(case, policy, sections=sections, device=device)
            device.drain()
            device.check_quiescent()
            found[f"{name}, {order}, {seed}"] = ours.differences(expected)
    return found


def test_gradients_do_not_depend_on_when_tiles_are_copied(dist: Dist) -> None:
    memory = {"host_memory": "4MiB"}  # the simulator writes to all of it
    policies: dict[str, Fields] = {
        "swap": {**SWAP, **memory},
        "half, fp8": {**SWAP, **memory, "swap_fraction": 0.5, "compress": "fp8"},
        "little room": {**SWAP, "host_memory": "20KiB"},
    }
    (found,) = dist(1)(at_the_worst_time, policies, timeout=120)
    assert not any(found.values()), found


def compressed() -> dict[str, Any]:
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import relative_error, train

    case = GptCase(**LLAMA)
    init_parallel(case)
    stock = train(case)
    found = {}
    for tiles in ("off", 3):
        ours = train(case, {**SWAP, "compress": "fp8"}, sections={"mlp": {"tiles": tiles}})
        assert ours.engine is not None
        errors = {key: relative_error(ours.gradients[key], right) for key, right in stock.gradients.items()}
        found[tiles] = max(errors.values()), ours.engine.stats.link_nbytes / ours.engine.stats.swapped_nbytes
    return found


def test_tiles_are_compressed_as_the_rest_is(dist: Dist) -> None:
    (found,) = dist(1)(compressed)
    for error, ratio in found.values():
        assert 0 < error < 0.1 and ratio < 0.75


def with_experts() -> dict[str, Any]:
    """One dense layer among layers of experts: only its MLP runs in tiles."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import train

    case = GptCase(**{**LLAMA, "layers": 3, "experts": 4, "config": {"moe_layer_freq": [0, 1, 1]}})
    init_parallel(case)
    stock = train(case)
    found: dict[str, Any] = {"experts": 0}

    def count(chunks: list[Any]) -> None:
        found["experts"] = sum(isinstance(module, MoELayer) for chunk in chunks for module in chunk.modules())

    for name, policy in (("off", None), ("swap", {**SWAP, "experts": "swap"})):
        ours = train(case, policy, sections={"mlp": {"tiles": 1}}, prepare=count)
        found[name] = ours.differences(stock)
        found["calls"] = ours.report.mlp.num_calls
    return found


def test_experts_are_left_alone(dist: Dist) -> None:
    (found,) = dist(1)(with_experts)
    assert found["experts"] == 2 and found["off"] == found["swap"] == []
    assert found["calls"] == 2 * 2 + 1  # two steps of two microbatches, and the one layer's learning


def errors_of(cases: dict[str, Fields]) -> dict[str, str]:
    """What is said to each configuration of a model; empty where it trains."""
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import train
    from megamem.testing.trials import error_of

    case = GptCase(**{**LLAMA, "layers": 2})
    init_parallel(case)
    found = {}
    for name, fields in cases.items():
        one = dataclasses.replace(case, **fields)
        sections = {"mlp": {"tiles": 2}, **({"fp8": {"saved_activations": "mlp"}} if name == "saved in fp8" else {})}
        found[name] = error_of(lambda one=one, sections=sections: train(one, sections=sections))  # type: ignore[misc]
    return found


def test_what_does_not_go_with_tiles_is_refused_before_the_first_step(dist: Dist) -> None:
    cases: dict[str, Fields] = {
        "fine": {},
        "fp8": {"config": {"fp8": "hybrid"}},
        "experts": {"experts": 4},
        "saved in fp8": {},
    }
    (found,) = dist(1)(errors_of, cases)
    assert found["fine"] == ""
    assert "mlp.tiles" in found["fp8"] and "FP8" in found["fp8"]
    assert "no dense MLP" in found["experts"]
    assert "mlp.tiles" in found["saved in fp8"] and "fp8.saved_activations" in found["saved in fp8"]


def twice() -> dict[str, str]:
    """Two backward passes through one graph."""
    import megamem
    from megamem.testing.models import GptCase, batches, build_gpt, init_parallel
    from megamem.testing.trials import error_of

    case = GptCase(**{**LLAMA, "layers": 2})
    init_parallel(case)
    found = {}
    for name, policy in {"off": {}, "swap": SWAP}.items():
        with megamem.enable({"mlp": {"tiles": 2}, "activations": policy}):
            [chunk] = build_gpt(case)
            [batch] = batches(case, 1)
            logits = chunk(batch.tokens, batch.positions, batch.mask)
            logits.sum().backward(retain_graph=True)
            found[name] = error_of(logits.sum().backward)
    return found


def test_a_second_backward_pass_is_refused(dist: Dist) -> None:
    (found,) = dist(1)(twice)
    assert all("retain_graph" in text for text in found.values()), found


def counts() -> dict[str, int]:
    """Tiles that `auto` makes, by the shape of the input."""
    import torch

    from megamem.integrations.tiled_mlp import num_tiles
    from megamem.testing.models import GptCase, build_gpt, init_parallel, unwrap

    found = {}
    for tp, sp in ((1, False), (2, False), (2, True)):
        case = GptCase(**{**LLAMA, "layers": 1, "ffn": 96, "tp": tp, "sp": sp})
        init_parallel(case)
        [chunk] = build_gpt(case)
        mlp = unwrap(chunk).decoder.layers[0].mlp
        for tokens in (16, 4096, 40960):
            shape = tokens // (tp if sp else 1), 1, case.hidden
            found[f"{tp} {sp} {tokens}"] = num_tiles(mlp, torch.empty(shape, device="meta"))
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return found


def test_auto_makes_a_tile_as_large_as_the_input(dist: Dist) -> None:
    """ffn is 3 h, twice that with the gate; gathered input and output count for all ranks' tokens."""
    (found, _) = dist(2)(counts)
    assert [found[f"1 False {tokens}"] for tokens in (16, 4096, 40960)] == [1, 4, 6]
    assert [found[f"2 False {tokens}"] for tokens in (16, 4096, 40960)] == [1, 3, 3]
    assert [found[f"2 True {tokens}"] for tokens in (16, 4096, 40960)] == [1, 4, 6]


@pytest.mark.parametrize("value", ["0", "-1", "some", "1.5", "true"])
def test_a_number_of_tiles_that_cannot_be_is_refused(value: str) -> None:
    from megamem.config import load_config

    with pytest.raises(ConfigError, match=r"mlp\.tiles"):
        load_config({"mlp": {"tiles": value}})
    assert not load_config({"mlp": {"tiles": "off"}}).mlp.is_on
    assert load_config({"mlp": {"tiles": "auto"}}).mlp.is_on
