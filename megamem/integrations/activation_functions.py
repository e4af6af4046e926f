"""Megatron-Core's activation functions of MLPs, as `megamem.kernels.activation` computes them.

An MLP calls a fused function for each kind of activation if `bias_activation_fusion` is on, and those are patched.
Where it is off, the MLP runs one operation after the other, each of which saves what it needs, and there is nothing to
patch: so it is on while the layer runs (`as_if_fused`). What is computed is then still what the model asked for: the
exact GELU where the fused function has an approximation, the clamp where it has none.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from megamem.integrations import compat
from megamem.kernels.activation import Activation

_FUSED: Mapping[str, Activation] = {
    "bias_swiglu_impl": Activation(function="silu"),
    "weighted_bias_swiglu_impl": Activation(function="silu"),
    "bias_geglu_impl": Activation(function="gelu_tanh"),
    "bias_gelu_impl": Activation(function="gelu_tanh", gated=False),
    "weighted_bias_quick_geglu_impl": Activation(function="quick_gelu"),
}
"""What the fused functions compute, by name."""


@dataclass(frozen=True, slots=True)
class ActivationCall:
    """One call of an activation function: its operands, and which function of them."""

    input: Tensor
    bias: Tensor | None
    weights: Tensor | None
    activation: Activation

    @property
    def halves(self) -> tuple[int, ...]:
        """The input's shape with its halves apart, as it is coded."""
        *tokens, width = self.input.shape
        return (*tokens, self.activation.halves, width // self.activation.halves)


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """What the arguments of a fused function are called, in its order; SwiGLU has a clamp as its last since 0.20."""
    names = tuple(inspect.signature(function).parameters)
    return names if "input" in names else ("input", "bias")  # `apply` of an autograd function has no names


def read_call(
    name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], unfused: Any | None
) -> ActivationCall:
    """A call of the fused `function` of this name; `unfused`: the configuration of an MLP that would not call it."""
    activation = _FUSED[name]
    given: dict[str, Any] = {**dict(zip(_parameters(function), args, strict=False)), **kwargs}
    clamp, offset = given.get("clamp_value"), given.get("linear_offset")
    if unfused is not None:
        if activation.function == "gelu_tanh":
            activation = replace(activation, function="gelu")
        if activation.gated:
            clamp = getattr(unfused, "activation_func_clamp_value", None)
            offset = getattr(unfused, "glu_linear_offset", 0.0)
    if activation.gated:
        activation = replace(activation, clamp=clamp, offset=offset or 0.0)
    source, weights = given["input"], given.get("weights")
    # The fused functions take the weights of [s, b, f] inputs as [s b, 1].
    weights = None if weights is None else weights.reshape(*source.shape[:-1], 1)
    return ActivationCall(source, given.get("bias"), weights, activation)


@contextmanager
def as_if_fused(configs: Iterable[Any]) -> Iterator[None]:
    """While the block runs, MLPs of these configurations, for which it is off, call fused activation functions."""
    changed = [config for config in configs if not config.bias_activation_fusion]
    for config in changed:
        config.bias_activation_fusion = True
    try:
        yield
    finally:
        for config in changed:
            config.bias_activation_fusion = False


def two_bit_problems(layer: Any) -> Iterator[str]:
    """Why two bits of the input of a layer's activation function do not make its gradient."""
    config = layer.config
    if config.activation_func is not functional.gelu or config.gated_linear_unit:
        yield (
            "two bits stand for the slope of GELU, and of no other function; with a gate they save nothing, because "
            "the other half's gradient needs the whole input. Take mlp"
        )


def activation_problems(layer: Any) -> Iterator[str]:
    """Why the MLPs of a layer would not call a fused activation function, even if they were told to."""
    config = layer.config
    function, gated = config.activation_func, config.gated_linear_unit
    if getattr(config, "use_te_activation_func", False):
        yield "use_te_activation_func computes activation functions in Transformer Engine; switch it off"
        return
    is_moe = compat.is_moe_layer(layer)
    fused = {functional.silu: gated, functional.gelu: not is_moe and (gated or config.add_bias_linear)}
    if not fused.get(function, is_moe and gated and compat.is_quick_gelu(function)):
        kind = f"{getattr(function, '__name__', function)} with{'' if gated else 'out'} a gate"
        yield (
            f"{kind}{' in experts' * is_moe} has no fused function in Megatron-Core, which are SwiGLU, GeGLU, GELU "
            "with a bias and, in experts, SwiGLU and quick GeGLU; another activation function, or fp8 off"
        )
