"""Switching megamem on and off around real Megatron-Core models: exact undo, refusals, company to get on with."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from megamem.testing.trials import HALF, RECOMPUTE, RESIDUAL, SWAP, error_of, start_case

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]
ORDERED: Fields = {"policy": "ordered", "keep_last_layers": 0}
EXACT: dict[str, Fields] = {"swap": SWAP, "recompute": RECOMPUTE, "ordered": ORDERED, "residual": RESIDUAL}
BITWISE: dict[str, list[str]] = {name: [] for name in EXACT}


def _differences(case: Any, configs: dict[str, Fields], **options: Any) -> dict[str, list[str]]:
    """By configuration, what is not bitwise as in stock Megatron."""
    from megamem.testing.parity import train

    stock = train(case, **options)
    return {name: train(case, config, **options).differences(stock) for name, config in configs.items()}


# -- on and off --------------------------------------------------------------------------------------------------------


def _bindings() -> list[Any]:
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.transformer_layer import TransformerLayer

    names = sorted(name for name in vars(schedules) if name.startswith("forward_backward"))
    return [dict(vars(TransformerLayer)), *(vars(schedules)[name] for name in names)]


def _attributes(chunk: Any) -> set[tuple[str, str]]:
    return {(path, name) for path, module in chunk.named_modules() for name in vars(module)}


def on_and_off() -> dict[str, Any]:
    import megamem
    from megamem.testing.models import build_gpt, train_steps
    from megamem.testing.parity import train

    case = start_case()
    before, stock = _bindings(), train(case)
    found: dict[str, Any] = {}
    with megamem.enable({"activations": SWAP}) as handle:
        found["patched"] = _bindings() != before
        found["twice"] = error_of(lambda: megamem.enable({"activations": SWAP}))
        chunks = build_gpt(case)
        attributes = _attributes(chunks[0])
        train_steps(chunks, case, num_microbatches=2)
        left = _attributes(chunks[0]) - attributes
        found["left in the model"] = sorted(left - {(path, "current_microbatch") for path, _ in left})  # Megatron's own
        last = weakref.ref(chunks[0].module.decoder.layers[0])
        del chunks
        gc.collect()
        found["model is freed"] = last() is None
        engine = handle.engine
    handle.disable()
    found["restored"] = _bindings() == before
    found["as before"] = train(case).differences(stock)
    found["again"] = train(case, SWAP).differences(stock)
    found["engine"] = engine is not None and engine.stats.num_runs
    with megamem.enable({"activations": {"policy": "off"}}) as idle:
        found["off"] = _bindings() == before and idle.engine is None
    return found


def test_switching_on_and_off_restores_megatron_exactly(dist: Dist) -> None:
    (found,) = dist(1)(on_and_off)
    assert found["patched"] and found["restored"] and found["off"]
    assert found["as before"] == found["again"] == []
    assert found["engine"] == 4
    assert "already patched" in found["twice"]
    assert found["left in the model"] == []


def test_a_model_is_freed_while_megamem_stays_on(dist: Dist) -> None:
    (found,) = dist(1)(on_and_off)
    assert found["model is freed"]


def too_early() -> str:
    import megamem

    return error_of(lambda: megamem.enable({"activations": SWAP}))


def test_enable_before_initialize_model_parallel_is_refused(dist: Dist) -> None:
    (error,) = dist(1)(too_early)
    assert error.startswith("ConfigError: call megamem.enable after") and "initialize_model_parallel" in error


def too_much_host_memory() -> str:
    import megamem

    start_case()
    return error_of(lambda: megamem.enable({"activations": {**SWAP, "host_memory": "900TiB"}}))


def test_more_host_memory_than_the_machine_has_is_refused(dist: Dist) -> None:
    (error,) = dist(1)(too_much_host_memory)
    assert error.startswith("ConfigError: activations.host_memory: 900TiB is more than the")


# -- settings that do not go together ----------------------------------------------------------------------------------

CONFLICTS: dict[str, tuple[Fields, Fields, str]] = {  # TransformerConfig attributes, options, part of the message
    "cuda graphs": ({"cuda_graph_impl": "local"}, SWAP, "set cuda_graph_impl to none"),
    "old cuda graphs": ({"enable_cuda_graph": True}, SWAP, "CUDA graphs"),
    "fine-grained offload": ({"fine_grained_activation_offloading": True}, SWAP, "switch fine_grained_activation_offl"),
    "cpu_offloading": ({"cpu_offloading": True}, SWAP, "Megatron's cpu_offloading"),
    "full recompute": ({"recompute_granularity": "full"}, SWAP, "recompute_granularity full runs every layer twice"),
    "a2a overlap": ({"overlap_moe_expert_parallel_comm": True}, SWAP, "on its own schedule"),
    "hyper-connections": ({"enable_mhc_connections": True}, SWAP, "with a forward pass of their own"),
    "dropout": ({"attention_dropout": 0.1}, HALF, "cannot be combined with dropout 0.1"),
    "fp8": ({"fp8": "hybrid"}, RECOMPUTE, "FP8 and FP4 tensors are swapped whole"),
    "fp4": ({"fp4": "e2m1"}, HALF, "FP8 and FP4 tensors are swapped whole"),
    "several": (
        {"cpu_offloading": True, "recompute_granularity": "full"},
        SWAP,
        "switch it off; recompute_granularity",
    ),
}


def conflicts() -> dict[str, Any]:
    """Set each on the configuration of a real layer: several cannot be built without a GPU or Transformer Engine."""
    from megamem.config import load_config
    from megamem.integrations.layer_check import check_layer
    from megamem.testing.models import build_gpt

    (chunk,) = build_gpt(start_case(ddp=False))
    layer = chunk.decoder.layers[0]
    found = {}
    for name, (attributes, options, _) in CONFLICTS.items():
        config = load_config({"activations": options})
        check_layer(layer, config)
        with pytest.MonkeyPatch.context() as patch:
            for attribute, value in attributes.items():
                patch.setattr(layer.config, attribute, value, raising=False)
            found[name] = error_of(lambda config=config: check_layer(layer, config))  # type: ignore[misc]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "cross_attention", layer.self_attention)
        found["cross attention"] = error_of(lambda: check_layer(layer, load_config({"activations": SWAP})))
    return found


def test_settings_that_do_not_go_with_megamem_are_refused_by_name(dist: Dist) -> None:
    (found,) = dist(1)(conflicts)
    assert "cross attention are not supported" in found.pop("cross attention")
    for name, (_, options, message) in CONFLICTS.items():
        assert found[name].startswith(f"UnsupportedError: activations.policy: {options['policy']}: "), name
        assert message in found[name], name


def conflict_at_construction(config: Fields, options: Fields, fields: Fields) -> list[str]:
    import megamem
    from megamem.testing.models import build_gpt, train_steps

    case = start_case(config=config, **fields)
    with megamem.enable({"activations": options}):
        built = error_of(lambda: build_gpt(case))
    chunks = build_gpt(case)  # the model first, megamem afterwards: then the first step refuses
    with megamem.enable({"activations": options}):
        return [built, error_of(lambda: train_steps(chunks, case, num_microbatches=1))]


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize(("config", "options", "fields"), [(FULL, SWAP, {}), ({}, HALF, {"dropout": 0.1})])
def test_a_conflict_is_refused_when_the_model_is_built_or_else_in_its_first_step(
    dist: Dist, config: Fields, options: Fields, fields: Fields
) -> None:
    for error in dist(1)(conflict_at_construction, config, options, fields)[0]:
        assert error.startswith("UnsupportedError: activations.policy: memo:")


# -- live or not -------------------------------------------------------------------------------------------------------


def _goes_around(chunks: list[Any]) -> None:
    """Layers with a forward of their own, as an inference engine or a compiler leaves them."""
    for layer in chunks[0].module.decoder.layers:
        layer.forward = type(layer).forward.__wrapped__.__get__(layer)


def not_live(fields: Fields, options: Fields, around: bool) -> str:
    from megamem.testing.parity import train

    case = start_case(**fields)
    return error_of(lambda: train(case, options, prepare=_goes_around if around else None))


def test_a_step_in_which_no_layer_goes_through_megamem_stops_the_run(dist: Dist) -> None:
    (error,) = dist(1)(not_live, {}, SWAP, True)
    assert error.startswith(
        "NotLiveError: activations.policy is memo, a step has run, and no TransformerLayer of any rank"
    )


def test_a_pipeline_stage_that_keeps_all_of_its_layers_is_live(dist: Dist) -> None:
    fields, options = {"layers": 4, "pp": 2}, {"policy": "memo", "keep_last_layers": 2}
    assert dist(2)(not_live, fields, options, False) == ["", ""]
    assert dist(2)(not_live, fields, {**options, "keep_last_layers": 4}, False) == ["", ""]


# -- in company --------------------------------------------------------------------------------------------------------


def experts() -> dict[str, Any]:
    import megamem
    from megamem.testing.models import build_gpt

    case = start_case(experts=4)
    options = {name: {**SWAP, "experts": name} for name in ("keep", "swap", "recompute")}
    found: dict[str, Any] = _differences(case, options)
    with megamem.enable({"activations": options["recompute"]}) as handle:
        (chunk,) = build_gpt(case)
        layers = [layer.mlp for layer in chunk.module.decoder.layers]
        found["on"] = [layer.moe_layer_recompute for layer in layers]
    found["off"] = [layer.moe_layer_recompute for layer in layers]
    handle.disable()
    return found


def test_experts_are_kept_swapped_or_recomputed_bitwise_and_megatrons_flag_is_put_back(dist: Dist) -> None:
    (found,) = dist(1)(experts)
    assert found["keep"] == found["swap"] == found["recompute"] == []
    assert found["on"] == [True, True] and found["off"] == [False, False]


def selective(modules: list[str]) -> dict[str, Any]:
    case = start_case(layers=3, config={"recompute_granularity": "selective", "recompute_modules": modules})
    return _differences(case, EXACT)


@pytest.mark.parametrize("modules", [["core_attn"], ["mlp"], ["core_attn", "mlp"]], ids=" and ".join)
def test_megatrons_own_recomputation_of_other_modules_is_bitwise(dist: Dist, modules: list[str]) -> None:
    assert dist(1)(selective, modules) == [BITWISE]


def _frozen(what: str) -> Callable[[list[Any]], None]:
    def prepare(chunks: list[Any]) -> None:
        from megamem.testing.models import global_names

        for name, parameter in global_names(chunks[0]):
            parameter.requires_grad_(not name.startswith(what))

    return prepare


def frozen(what: str) -> dict[str, Any]:
    return _differences(start_case(layers=3, ddp=False), EXACT, prepare=_frozen(what))


@pytest.mark.parametrize(
    "what",
    ["embedding", "decoder.layers.1.", "decoder.layers.1.mlp.linear_fc1", "decoder.layers.1.self_attention", "decoder"],
)
def test_frozen_parameters_are_bitwise(dist: Dist, what: str) -> None:
    assert dist(1)(frozen, what) == [BITWISE]


def nothing_below_trains() -> dict[str, Any]:
    def prepare(chunks: list[Any]) -> None:
        for part in ("embedding", "decoder.layers.0.", "decoder.layers.1."):
            for name, parameter in chunks[0].named_parameters():
                if name.startswith(part):
                    parameter.requires_grad_(False)

    return _differences(start_case(layers=3, ddp=False), EXACT, prepare=prepare)


def test_layers_below_everything_that_trains_are_bitwise(dist: Dist) -> None:
    assert dist(1)(nothing_below_trains) == [BITWISE]


def overlapped() -> dict[str, Any]:
    from dataclasses import replace

    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from megamem.testing.models import build_gpt, build_optimizer

    case = start_case(layers=3, distributed_optimizer=True)

    def build() -> list[Any]:
        (model,) = build_gpt(replace(case, ddp=False))
        options = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            use_distributed_optimizer=True,
            bucket_size=2000,  # many buckets, so that gathers run while layers do
        )
        chunk = DistributedDataParallel(config=model.config, ddp_config=options, module=model)
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.no_sync_func = chunk.no_sync
        return [chunk]

    return _differences(case, EXACT, build=build, steps=3, make_optimizer=lambda chunks: build_optimizer(chunks, case))


def test_overlapped_gradient_reduction_and_parameter_gathering_are_bitwise(dist: Dist) -> None:
    assert dist(2)(overlapped) == [BITWISE] * 2


def evaluated(fields: Fields, grad: bool, configs: dict[str, Fields]) -> dict[str, Any]:
    """Train, evaluate, train: `forward_only`, under `no_grad` as Megatron's trainer does it, or without."""
    import torch

    import megamem
    from megamem.testing.models import build_gpt, train_steps
    from megamem.testing.parity import seed_everything

    case = start_case(layers=4, **fields)

    def run(config: Fields) -> tuple[Any, ...]:
        seed_everything()
        with megamem.enable({"activations": config}) as handle:
            chunks = build_gpt(case)
            first, _ = train_steps(chunks, case, num_microbatches=4)
            with torch.set_grad_enabled(grad):
                between, _ = train_steps(chunks, case, num_microbatches=4, forward_only=True)
            last, gradients = train_steps(chunks, case, num_microbatches=4)
            engine = handle.engine
            in_use = 0 if engine is None else engine.courier.arena.in_use + engine.stats.retained.now
            return [*first, *between, *last], gradients, in_use

    losses, gradients, _ = run({"policy": "off"})
    found: dict[str, Any] = {}
    for name, config in configs.items():
        new_losses, new_gradients, in_use = run(config)
        same = losses == new_losses and all(torch.equal(new_gradients[key], gradients[key]) for key in gradients)
        found[name] = (same, in_use)
    return found


@pytest.mark.parametrize("fields", [{}, {"pp": 2}], ids=["one rank", "pp2"])
def test_evaluation_between_steps_changes_nothing(dist: Dist, fields: Fields) -> None:
    for found in dist(fields.get("pp", 1))(evaluated, fields, False, EXACT):
        assert found == dict.fromkeys(EXACT, (True, 0))


def test_evaluation_that_forgets_no_grad_changes_nothing_and_holds_nothing(dist: Dist) -> None:
    configs = {name: EXACT[name] for name in ("swap", "recompute")}
    (found,) = dist(1)(evaluated, {}, True, configs)
    assert found == dict.fromkeys(configs, (True, 0))


def killed() -> str:
    import torch

    from megamem.testing.parity import train

    case = start_case(layers=4, pp=2)

    def prepare(chunks: list[Any]) -> None:
        if torch.distributed.get_rank() == 1:
            calls: list[int] = []

            def hook(*_: Any) -> None:
                calls.append(0)
                if len(calls) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)

            chunks[0].module.decoder.layers[0].register_forward_hook(hook)

    return error_of(lambda: train(case, SWAP, num_microbatches=4, prepare=prepare))


def test_when_a_rank_is_killed_in_a_step_the_others_end_with_an_error(dist: Dist) -> None:
    from megamem.testing.dist import RankError, run_ranks

    with pytest.raises(RankError) as caught:
        run_ranks(killed, 2, timeout=30)
    assert any(failure.rank == 1 and "SIGKILL" in failure.reason for failure in caught.value.failures)
    assert all("did not finish" not in failure.reason for failure in caught.value.failures)
