"""The definition of the fused activations in plain PyTorch, and what runs on CPU tensors. In fp32, rounded once.

The input of the function is the tensor itself and a bias, or both in 8 bits (`Quantised`, the bias added before).

    T tokens, H halves of the input (gate and up, or one), F width of a half and of the output
"""

from __future__ import annotations

import torch

from ..block_codec import BlockFormat, Element, Quantised, dequantise_reference, quantise_reference
from .spec import Activation

# Megatron-Core's constants: sqrt(2 / pi), and that times 3 times 0.044715. Then 1 / sqrt(2), 1 / sqrt(2 pi).
ROOT, CUBIC = 0.79788456, 0.1070322243
HALF_ROOT, DENSITY = 0.7071067811865476, 0.3989422804014327

INSIDE: dict[Element, float] = {"e4m3": 15 / 16, "e5m2": 7 / 8, "int8": 15 / 16}
"""Which part of the clamp a value that is not cut off is coded as at most; of int8 enough where no gate is below -8."""

Source = torch.Tensor | Quantised
"""The input [T, H, F] of the activation, as it came or in 8 bits."""


def forward(
    input_THF: torch.Tensor,
    bias_HF: torch.Tensor | None,
    weights_T1: torch.Tensor | None,
    activation: Activation,
    format: BlockFormat | None,
) -> tuple[torch.Tensor, Quantised | None]:
    """The output [T, F] in the input's dtype and, with a format, input plus bias in 8 bits."""
    wide_THF = _wide(input_THF, bias_HF, None)
    output_TF = _output(wide_THF, weights_T1, activation).to(input_THF.dtype)
    return output_TF, None if format is None else quantise_reference(
        _on_their_side(wide_THF, activation, format), format
    )


def rebuild_(
    output_TF: torch.Tensor,
    source: Source,
    bias_HF: torch.Tensor | None,
    weights_T1: torch.Tensor | None,
    activation: Activation,
    format: BlockFormat | None,
) -> None:
    """Write the output once more, from what was saved."""
    output_TF.copy_(_output(_wide(source, bias_HF, format), weights_T1, activation))


def backward(
    gradient_TF: torch.Tensor,
    source: Source,
    bias_HF: torch.Tensor | None,
    weights_T1: torch.Tensor | None,
    activation: Activation,
    format: BlockFormat | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of the input [T, H, F], in the dtype of `gradient_TF`, and of the weights [T, 1], in fp32."""
    wide_THF = _wide(source, bias_HF, format)
    gate_TF, factor_TF = _halves(wide_THF, activation)
    share_TF = _share(gate_TF, activation)
    value_TF = gate_TF * share_TF
    slope_TF = share_TF + gate_TF * _share_slope(gate_TF, share_TF, activation)
    upstream_TF = gradient_TF.float()
    weights_gradient_T1 = None
    if weights_T1 is not None:
        unweighted_TF = value_TF if factor_TF is None else value_TF * factor_TF
        weights_gradient_T1 = (unweighted_TF * upstream_TF).sum(-1, keepdim=True)
        upstream_TF = upstream_TF * weights_T1.float()
    if factor_TF is None:
        return (upstream_TF * slope_TF).unsqueeze(1).to(gradient_TF.dtype), weights_gradient_T1
    input_gradient_THF = torch.stack([upstream_TF * slope_TF * factor_TF, upstream_TF * value_TF], 1)
    if activation.clamp is not None:
        is_cut_THF = wide_THF > activation.clamp
        is_cut_THF[:, 1] |= wide_THF[:, 1] < -activation.clamp
        input_gradient_THF.masked_fill_(is_cut_THF, 0.0)
    return input_gradient_THF.to(gradient_TF.dtype), weights_gradient_T1


def _wide(source: Source, bias_HF: torch.Tensor | None, format: BlockFormat | None) -> torch.Tensor:
    """Input plus bias [T, H, F] in fp32."""
    if isinstance(source, Quantised):
        assert format is not None
        return dequantise_reference(source, format, torch.float32)
    return source.float() if bias_HF is None else source.float() + bias_HF.float()


def _output(wide_THF: torch.Tensor, weights_T1: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    gate_TF, factor_TF = _halves(wide_THF, activation)
    output_TF = gate_TF * _share(gate_TF, activation)
    if factor_TF is not None:
        output_TF *= factor_TF
    return output_TF if weights_T1 is None else output_TF * weights_T1.float()


def _halves(wide_THF: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gate, and what the function of it is multiplied with."""
    if not activation.gated:
        return wide_THF.squeeze(1), None
    gate_TF, up_TF = wide_THF.unbind(1)
    if activation.clamp is not None:
        gate_TF, up_TF = gate_TF.clamp(max=activation.clamp), up_TF.clamp(-activation.clamp, activation.clamp)
    return gate_TF, up_TF + activation.offset


def _on_their_side(wide_THF: torch.Tensor, activation: Activation, format: BlockFormat) -> torch.Tensor:
    """What is coded in place of the input, so that decoding takes nothing across the clamp, where gradients jump to 0.

    What is cut off may have any value beyond the clamp, and gets 5/4 of it. What is not keeps a distance of the largest
    relative error of a code.
    """
    if activation.clamp is None:
        return wide_THF
    beyond, inside = 1.25 * activation.clamp, INSIDE[format.element] * activation.clamp
    gate_TF, up_TF = wide_THF.unbind(1)
    gate_TF = torch.where(gate_TF > activation.clamp, beyond, gate_TF.clamp(max=inside))
    is_cut_TF = up_TF.abs() > activation.clamp
    up_TF = torch.where(is_cut_TF, beyond * up_TF.sign(), up_TF.clamp(-inside, inside))
    return torch.stack([gate_TF, up_TF], 1)


def _share(gate_TF: torch.Tensor, activation: Activation) -> torch.Tensor:
    """What part of x the function lets through, between 0 and 1."""
    if activation.function == "silu":
        return gate_TF.sigmoid()
    if activation.function == "quick_gelu":
        return (1.702 * gate_TF).sigmoid()
    if activation.function == "gelu":
        return 0.5 * (1.0 + torch.erf(HALF_ROOT * gate_TF))
    return (2.0 * ROOT * gate_TF * (1.0 + 0.044715 * gate_TF * gate_TF)).sigmoid()


def _share_slope(gate_TF: torch.Tensor, share_TF: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Its derivative."""
    if activation.function == "gelu":
        return DENSITY * torch.exp(-0.5 * gate_TF * gate_TF)
    spread_TF = share_TF * (1.0 - share_TF)
    if activation.function == "silu":
        return spread_TF
    if activation.function == "quick_gelu":
        return 1.702 * spread_TF
    return 2.0 * spread_TF * (ROOT + CUBIC * gate_TF * gate_TF)
