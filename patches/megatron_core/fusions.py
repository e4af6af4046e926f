"""Patches of `megatron.core.fusions`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from megamem.patches.registry import Patch

if TYPE_CHECKING:
    from megamem.runtime.session import AbstractActivations


def _elsewhere(name: str) -> Callable[..., Any]:
    def build(activations: AbstractActivations, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def activation(*args: Any, **kwargs: Any) -> Any:
            return activations.run_activation(name, original, args, kwargs)

        return activation

    return build


def _patch(module: str, name: str, *users: str) -> Patch:
    return Patch(
        target=f"megatron.core.fusions.{module}:{name}",
        build=_elsewhere(name),
        why="Activation functions save their input in 16 bits, or in FP8 without a scale, and have no seam for another "
        "way to save it.",
        supports="megatron-core>=0.15.3,<0.20",
        remove_when="MLPSubmodules.activation_func takes bias and probabilities, for every kind of MLP.",
        also=tuple(f"megatron.core.transformer.{user}:{name}" for user in users),
    )


PATCHES = (
    _patch("fused_bias_swiglu", "bias_swiglu_impl", "mlp", "moe.shared_experts"),
    _patch("fused_bias_swiglu", "weighted_bias_swiglu_impl", "mlp", "moe.experts"),
    _patch("fused_bias_geglu", "bias_geglu_impl", "mlp", "moe.shared_experts"),
    _patch("fused_bias_geglu", "weighted_bias_quick_geglu_impl", "mlp", "moe.experts"),
    _patch("fused_bias_gelu", "bias_gelu_impl", "mlp", "moe.shared_experts"),
)
