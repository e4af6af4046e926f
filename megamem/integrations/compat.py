"""The one module that knows how Megatron-Core releases differ. Detected by looking, not by version number."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def uses_cuda_graphs(config: Any) -> bool:
    """Whether layers run inside CUDA graphs, which replay without calling Python.

    0.15 has `enable_cuda_graph`, `external_cuda_graph` and beside them `cuda_graph_impl`, which replaced them.
    """
    implementation = getattr(config, "cuda_graph_impl", None)
    return (
        bool(getattr(config, "enable_cuda_graph", False))
        or bool(getattr(config, "external_cuda_graph", False))
        or implementation not in (None, "none")
    )


def uses_fine_grained_offload(config: Any) -> bool:
    """Whether Megatron's own module-level offload is on (since 0.16)."""
    return bool(getattr(config, "fine_grained_activation_offloading", False))


def uses_low_precision(config: Any) -> bool:
    """Whether layers compute in FP8 or FP4 (FP4 since 0.15)."""
    return bool(getattr(config, "fp8", None)) or bool(getattr(config, "fp4", None))


def uses_hyper_connections(config: Any) -> bool:
    """Whether layers carry several residual streams (mHC, since 0.20), in a forward pass of their own class."""
    return bool(getattr(config, "enable_mhc_connections", False))


def is_moe_layer(layer: Any) -> bool:
    """Whether a layer's MLP routes its tokens to experts. `layer.is_moe_layer` says so since 0.16 only."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    return isinstance(getattr(layer, "mlp", None), MoELayer)


def is_quick_gelu(function: Any) -> bool:
    """Whether an activation function is Megatron's quick GELU, of which there is a second one since 0.18."""
    from megatron.core.fusions import fused_bias_geglu

    return function is fused_bias_geglu.quick_gelu or getattr(function, "__name__", "") == "quick_gelu"


def submodules(spec: Any) -> Any:
    """What a module is built of, from its spec. Since 0.18 that of an MLP is a `functools.partial` of its builder."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def modules_losing_gradients(config: Any) -> list[str]:
    """The `recompute_modules` whose input gets no gradient where any saved-tensor hooks are at work; none since 0.16.

    Megatron discards the output of these modules. Until 0.15 the backward pass then looked for the gradient on what
    `ctx.saved_tensors` returns, which under hooks is another tensor at each call: the gradient is lost without a word.
    """
    if config.recompute_granularity != "selective":
        return []
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutputFunction

    if "saved_tensors" not in CheckpointWithoutOutputFunction.backward.__code__.co_names:
        return []
    return sorted({"layernorm", "mla_up_proj", "moe_act"} & set(config.recompute_modules or ()))


def message_mixup(config: Any) -> str:
    """Why Megatron's own schedule would train on wrong gradients, without a word; empty where it would not.

    With two ranks and several chunks, both neighbours of a rank are the same rank; sends and receives that are posted
    together are told apart by their order alone, and that is not the same on both sides (Megatron-LM #750, #1450).
    Megatron-LM's own argument checks refuse it; TransformerConfig and Megatron-Bridge do not.
    """
    chunks = config.virtual_pipeline_model_parallel_size or 1
    if config.pipeline_model_parallel_size != 2 or chunks < 2 or config.overlap_p2p_comm:
        return ""
    return (
        f"pipeline_model_parallel_size 2 with {chunks} chunks a rank and overlap_p2p_comm off: Megatron's own schedule "
        "mixes up the messages of the two ranks, and trains on wrong gradients; set overlap_p2p_comm to true and "
        "batch_p2p_comm to false, or let megamem run the steps (schedule.name: interleaved is the same order)"
    )


def in_inference_mode() -> bool:
    """Whether an inference engine uses the model: a flag of the process since 0.18."""
    from megatron.core.inference import utils

    mode = getattr(utils, "InferenceMode", None)
    return mode is not None and bool(mode.is_active())


def mtp_counts_acceptance() -> bool:
    """Whether multi-token prediction looks for the arg-max of its heads' logits while it trains; since 0.19."""
    from megatron.core.transformer import multi_token_prediction

    return hasattr(multi_token_prediction, "_compute_mtp_acceptance_counts")


def gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """Where Megatron accumulates a parameter's gradient: in `main_grad` under its DDP, else in `grad`."""
    found: torch.Tensor | None = parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad
    return found


def pipeline_rank_override() -> int | None:
    """What `parallel_state.set_pipeline_model_parallel_rank` has set, which has no getter; None where nothing has."""
    from megatron.core import parallel_state

    override: int | None = parallel_state._MPU_PIPELINE_MODEL_PARALLEL_RANK
    return override


def nvtx_messages() -> list[str]:
    """Megatron's stack of open NVTX ranges, which an interrupted call leaves unbalanced; empty where there is none."""
    from megatron.core import utils

    messages: list[str] = getattr(utils, "_nvtx_range_messages", [])
    return messages


@contextmanager
def balanced_ranges() -> Iterator[None]:
    """Around a call that may be broken off: closes the NVTX ranges of Megatron's that it leaves open."""
    messages = nvtx_messages()
    depth = len(messages)
    try:
        yield
    finally:
        while len(messages) > depth:
            messages.pop()
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


def random_state() -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """CPU, GPU and tensor-parallel random states; no host synchronisation: they live on the host."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return torch.get_rng_state(), torch.cuda.get_rng_state(), get_cuda_rng_tracker().get_states()


def set_random_state(state: tuple[torch.Tensor, torch.Tensor, dict[str, Any]]) -> None:
    """Put a state from `random_state` back."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state(state[1])
    get_cuda_rng_tracker().set_states(state[2])


def backward_step_takes_model_type() -> bool:
    """Whether `backward_step` has a `model_type`, which it does not use; until 0.16."""
    from megatron.core.pipeline_parallel import schedules

    return "model_type" in inspect.signature(schedules.backward_step).parameters


def takes_force_all_reduce(step: Any) -> bool:
    """Whether forward-backward functions know `force_all_reduce` and pass it to the one that finalises; since 0.16."""
    return "force_all_reduce" in inspect.signature(step).parameters


def default_groups() -> Any:
    """The process groups that a forward-backward function uses when its caller names none."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.process_groups_config import ProcessGroupCollection

    if hasattr(schedules, "_build_default_pg_collection"):  # since 0.19
        return schedules._build_default_pg_collection()
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    if hasattr(groups, "tp_dp_cp") or "tp_dp_cp" in getattr(type(groups), "__annotations__", {}):  # since 0.18
        groups.tp_dp_cp = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return groups


def num_microbatches() -> int | None:
    """The microbatches of a step, where the trainer has told Megatron, as Megatron's own trainers do at their start."""
    from megatron.core import num_microbatches_calculator

    if num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is None:
        return None
    number: int = num_microbatches_calculator.get_num_microbatches()
    return number
