"""The definition of ReGELU2 in plain PyTorch, and what runs on CPU tensors. In fp32, rounded once.

GELU is exact. In the backward pass it is taken to be h(x) = a1 relu(x - c1) + a2 relu(x - c2) + a3 relu(x - c3), with
a1 + a2 + a3 = 1 and a1 c1 + a2 c2 + a3 c3 = 0, so that h is 0 far to the left and x far to the right. Its slope has
four values; which one is two bits: how many of the thresholds c1 < c2 < c3 lie below x.

    T tokens, F width, Q = ceil(F / 4) bytes of a token. Byte q holds the elements q, q + Q, q + 2 Q and q + 3 Q, the
    first in its lowest bits: so that kernels read and write whole stretches of memory, and pack without a shuffle.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from ..activation.reference import HALF_ROOT, ROOT

Approximation = Literal["none", "tanh"]
"""Of GELU in the forward pass."""

# Of LowMemoryBP (arXiv 2406.16282), whose authors found them by simulated annealing: the least square of h - GELU,
# integrated over all x, which is 0.0095.
WEIGHTS = (-0.04922261145617846, 1.0979632065417297, -0.048740595085551286)
THRESHOLDS = (-3.1858810036855245, -0.001178821281161997, 3.190832613414926)
SLOPES = (0.0, WEIGHTS[0], WEIGHTS[0] + WEIGHTS[1], 1.0)
"""By the number of thresholds that are below."""


def forward(
    input_TF: torch.Tensor, bias_F: torch.Tensor | None, approximate: Approximation
) -> tuple[torch.Tensor, torch.Tensor]:
    """GELU [T, F] of input plus bias, and the two bits of each element [T, Q]."""
    wide_TF = input_TF.float() if bias_F is None else input_TF.float() + bias_F.float()
    # Not PyTorch's gelu, which makes NaN of an infinity.
    if approximate == "none":
        share_TF = 0.5 * (1.0 + torch.erf(HALF_ROOT * wide_TF))
    else:
        share_TF = (2.0 * ROOT * wide_TF * (1.0 + 0.044715 * wide_TF * wide_TF)).sigmoid()
    output_TF = (wide_TF * share_TF).to(input_TF.dtype)
    levels_TF = torch.zeros(wide_TF.shape, dtype=torch.uint8, device=wide_TF.device)
    for threshold in THRESHOLDS:
        levels_TF += ~(wide_TF <= threshold)  # not >: a NaN lets the upstream gradient through
    num_bytes = quarter(input_TF.shape[-1])
    levels_T4Q = functional.pad(levels_TF, (0, 4 * num_bytes - input_TF.shape[-1])).view(len(wide_TF), 4, num_bytes)
    first, second, third, fourth = levels_T4Q.unbind(1)
    return output_TF, first | second << 2 | third << 4 | fourth << 6


def backward(gradient_TF: torch.Tensor, bits_TQ: torch.Tensor) -> torch.Tensor:
    """The input's gradient [T, F], in the dtype of the upstream gradient."""
    num_tokens, width = gradient_TF.shape
    levels_T4Q = torch.stack([bits_TQ >> shift & 3 for shift in (0, 2, 4, 6)], 1)
    levels_TF = levels_T4Q.view(num_tokens, 4 * bits_TQ.shape[-1])[:, :width]
    slopes = torch.tensor(SLOPES, dtype=torch.float32, device=gradient_TF.device)
    return (gradient_TF.float() * slopes[levels_TF.long()]).to(gradient_TF.dtype)


def quarter(width: int) -> int:
    """Bytes of a row of `width` elements."""
    return -(-width // 4)
