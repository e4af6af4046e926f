"""The job that a process trains, read off what Megatron-Core has when a step begins, whatever the trainer."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch.nn import Module

from megamem.integrations.local_spec import TORCH_FUSES_RMS_NORM
from megamem.integrations.stage_layers import split_of
from megamem.ir.job import Job
from megamem.planner.models.flags import job_of_arguments

# What GPTModel keeps beside its configuration, by the name of Megatron-LM's argument.
_OF_MODEL = {
    "vocab_size": "vocab_size",
    "position_embedding_type": "position_embedding_type",
    "max_position_embeddings": "max_sequence_length",
}
_PLAIN = (int, float, str, list)


def job_of_step(arguments: Mapping[str, Any]) -> Job:
    """The job of a step: `arguments` are those of Megatron's forward-backward function.

    The vocabulary is that of the model, with Megatron's padding. Raises ConfigError where the model is none that the
    planner knows.
    """
    model = arguments["model"]
    chunks: list[Module] = list(model) if isinstance(model, list) else [model]
    config = get_model_config(chunks[0])
    known = Namespace(**{name: value for name, value in vars(config).items() if isinstance(value, _PLAIN)})
    known.num_experts = config.num_moe_experts
    known.swiglu = config.gated_linear_unit
    known.group_query_attention = config.num_query_groups not in (None, config.num_attention_heads)
    for argument, attribute in _OF_MODEL.items():
        setattr(known, argument, _attribute(chunks, attribute))
    known.untie_embeddings_and_output_weights = not _attribute(chunks, "share_embeddings_and_output_weights")
    known.transformer_impl = "transformer_engine" if _has_te_layers(chunks) else "local"
    known.attention_backend = getattr(getattr(config, "attention_backend", None), "name", None)
    known.bf16 = config.params_dtype in (torch.bfloat16, torch.float16) or config.bf16 or config.fp16
    _take_layout(known)
    known.seq_length, known.micro_batch_size = arguments["seq_length"], arguments["micro_batch_size"]
    replicas = parallel_state.get_data_parallel_world_size()
    known.global_batch_size = arguments["num_microbatches"] * known.micro_batch_size * replicas
    wrapper = getattr(chunks[0], "ddp_config", None)
    known.use_distributed_optimizer = getattr(wrapper, "use_distributed_optimizer", False)
    known.overlap_grad_reduce = getattr(wrapper, "overlap_grad_reduce", False)
    job = job_of_arguments(known)
    return _with_kernels(replace(job, layout=replace(job.layout, split=split_of(config))), chunks)


def on_device(job: Job, device: str) -> Job:
    """The job on `cuda` or on `cpu`, whose kernels keep other tensors."""
    return replace(job, kernels=replace(job.kernels, device=device))


def _with_kernels(job: Job, chunks: Iterable[Module]) -> Job:
    """What the modules show of the kernels, which no configuration says."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    parameter = next((parameter for module in modules for parameter in module.parameters(recurse=False)), None)
    device = "cuda" if parameter is not None and parameter.is_cuda else "cpu"
    torch_norms = any(type(module) is torch.nn.RMSNorm for module in modules)
    is_composed = torch_norms and (device == "cpu" or not TORCH_FUSES_RMS_NORM)
    found = replace(job.kernels, device=device, norm="composed" if is_composed else "fused")
    if job.spec == "local":
        keeps_scores = any(type(module).__name__ == "DotProductAttention" for module in modules)
        found = replace(found, attention="unfused" if keeps_scores else "flash")
    return replace(job, kernels=found)


def _take_layout(known: Namespace) -> None:
    known.tensor_model_parallel_size = parallel_state.get_tensor_model_parallel_world_size()
    known.pipeline_model_parallel_size = parallel_state.get_pipeline_model_parallel_world_size()
    known.context_parallel_size = parallel_state.get_context_parallel_world_size()
    known.expert_model_parallel_size = parallel_state.get_expert_model_parallel_world_size()
    if known.num_experts:
        known.expert_tensor_parallel_size = parallel_state.get_expert_tensor_parallel_world_size()
    known.virtual_pipeline_model_parallel_size = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    known.world_size = torch.distributed.get_world_size()


def _attribute(chunks: Iterable[Module], name: str) -> Any:
    """Of the first chunk that has it; None where none has."""
    for chunk in chunks:
        try:
            return get_attr_wrapped_model(chunk, name)
        except RuntimeError:
            continue
    return None


def _has_te_layers(chunks: Iterable[Module]) -> bool:
    parts = ("transformer_engine", "megatron.core.extensions.transformer_engine")
    return any(type(module).__module__.startswith(parts) for chunk in chunks for module in chunk.modules())
