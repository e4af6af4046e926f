"""What a norm module computes, read off the module: those that Megatron-Core's layer specs are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from megamem.integrations.local_spec import Norm
from megamem.kernels.block_codec import BlockFormat
from megamem.kernels.norm import normalise

# By their names: Transformer Engine and Apex need not be installed.
_RMS = ("RMSNorm",)
_LAYER = ("LayerNorm", "FusedLayerNorm")


@dataclass(frozen=True, slots=True)
class NormSettings:
    """How a norm is computed; its parameters stay with the module.

    centred:        LayerNorm, which subtracts the mean; RMSNorm does not
    zero_centred:   the weight is stored less 1
    """

    eps: float
    centred: bool
    zero_centred: bool

    def run(self, module: Any, hidden: Tensor, format: BlockFormat | None) -> Tensor:
        """What the module returns, computed so that only its input is saved, in this format (None: as it is)."""
        weight = module.weight + 1 if self.zero_centred else module.weight
        bias = getattr(module, "bias", None)
        return normalise(hidden, weight, bias, eps=self.eps, centred=self.centred, format=format)


def read_norm(module: Module) -> NormSettings | None:
    """The settings of PyTorch's, Apex's, Transformer Engine's or megamem's own norm; None for any other module.

    Not of one whose class is derived from them, which may compute something else.
    """
    known: Any = module
    if isinstance(module, Norm):
        return NormSettings(eps=known.eps, centred=known.bias is not None, zero_centred=known.zero_centered)
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    if name not in (*_RMS, *_LAYER) or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    eps = known.eps if known.eps is not None else torch.finfo(weight.dtype).eps
    return NormSettings(
        eps=eps, centred=name in _LAYER, zero_centred=bool(getattr(module, "zero_centered_gamma", False))
    )
