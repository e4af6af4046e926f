"""Refuse a plan that was made for another job: ranks laid out in another way, another model.

Versions, and the number of ranks that a launcher names, are checked when the file is read (`megamem.planfile`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.utils import get_model_config

from megamem.errors import ConfigError
from megamem.integrations.stage_layers import split_of
from megamem.ir.plan import Plan


def check_layout(plan: Plan, parallel_state: Any) -> None:
    """Raise ConfigError where Megatron's groups are not those of the plan; every rank finds the same."""
    found = {
        "world_size": torch.distributed.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "chunks": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context": parallel_state.get_context_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
    }
    if problems := plan.made_for.layout_problems(found):
        raise ConfigError(problems)


def check_model(plan: Plan, chunks: Sequence[Any]) -> None:
    """Raise ConfigError where the model has not the sizes of the plan's; every rank finds the same."""
    config = get_model_config(chunks[0])
    problems = plan.made_for.model_problems(model_sizes(config))
    if problems := problems or plan.made_for.split_problems(split_of(config)):
        raise ConfigError(problems)


def model_sizes(config: Any) -> dict[str, object]:
    """What Megatron's TransformerConfig says of a model, by the names of `ir.model.Model.sizes`."""
    sizes: dict[str, object] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups or config.num_attention_heads,
        "swiglu": config.gated_linear_unit,
        "normalization": config.normalization,
        "add_bias_linear": config.add_bias_linear,
    }
    if config.num_moe_experts is None:
        sizes["ffn_hidden_size"] = config.ffn_hidden_size
    else:
        sizes["experts.num_experts"] = config.num_moe_experts
        sizes["experts.topk"] = config.moe_router_topk
        sizes["experts.ffn_hidden_size"] = config.moe_ffn_hidden_size or config.ffn_hidden_size
    return sizes
