"""Whether the settings of a transformer layer go with the activation options."""

from __future__ import annotations

from typing import Any

from megamem.config import Config
from megamem.errors import UnsupportedError
from megamem.integrations import compat, transformer_engine
from megamem.planner.activations import plan_activations


def check_layer(layer: Any, config: Config) -> None:
    """Refuse a layer whose settings do not go with the activation options: UnsupportedError with every reason."""
    problems = list(_conflicts(layer, layer.config, config))
    if problems:
        raise UnsupportedError(f"activations.policy: {config.activations.policy}: " + "; ".join(problems))


def _conflicts(layer: Any, model: Any, config: Config) -> list[str]:
    options = config.activations
    plan = plan_activations(options, model.num_layers, config.fp8)
    problems = []
    if compat.uses_cuda_graphs(model):
        problems.append("CUDA graphs replay a layer without calling Python; set cuda_graph_impl to none")
    if compat.uses_fine_grained_offload(model):
        problems.append(
            "Megatron's fine-grained activation offloading installs saved-tensor hooks of its own, and only the "
            "innermost pair runs; switch fine_grained_activation_offloading off"
        )
    if getattr(model, "cpu_offloading", False):
        problems.append("Megatron's cpu_offloading does the same with whole layers; switch it off")
    if transformer_engine.is_offloading():
        problems.append("Transformer Engine's get_cpu_offload_context moves what layers save too; leave it out")
    if model.recompute_granularity == "full":
        problems.append(
            "recompute_granularity full runs every layer twice, attention included; use selective, or none "
            "(policy recompute needs as little memory and does not run attention again)"
        )
    if losing := compat.modules_losing_gradients(model):
        problems.append(
            f"recompute_modules {', '.join(losing)} lose gradients under saved-tensor hooks in this Megatron-Core; "
            "use 0.16 or later, or leave them out"
        )
    if getattr(model, "overlap_moe_expert_parallel_comm", False):
        problems.append("overlap_moe_expert_parallel_comm runs the parts of a layer on its own schedule; switch it off")
    if compat.uses_hyper_connections(model):
        problems.append("enable_mhc_connections builds layers with a forward pass of their own; switch it off")
    dropout = max(layer.hidden_dropout, model.attention_dropout)
    if dropout > 0 and any(rule.is_partial for rule in plan.rules):
        problems.append(
            f"a fraction strictly between 0 and 1 cannot be combined with dropout {dropout:g}, which draws its random "
            "numbers for all tokens at once; set the fraction to 0 or 1, or dropout to 0"
        )
    if compat.uses_low_precision(model) and any(rule.recomputes for rule in plan.rules):
        problems.append(
            "FP8 and FP4 tensors are swapped whole, since scales belong to all tokens; use policy memo with "
            "swap_fraction 1"
        )
    if type(layer.cross_attention).__name__ != "IdentityOp":
        problems.append("layers with cross attention are not supported")
    return problems
