"""Which activation function, and what surrounds it in an MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Function = Literal["silu", "gelu", "gelu_tanh", "quick_gelu"]

FUNCTIONS: tuple[Function, ...] = ("silu", "gelu", "gelu_tanh", "quick_gelu")


@dataclass(frozen=True, kw_only=True)
class Activation:
    """f(x), or f(gate) (up + offset) with gate and up the two halves of x.

    function:   all of them are x g(x) with a gate g between 0 and 1: silu, sigmoid(x); gelu, the normal distribution
                function (1 + erf(x / sqrt(2))) / 2; gelu_tanh, sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which is
                the same with tanh; quick_gelu, sigmoid(1.702 x)
    gated:      SwiGLU, GeGLU and quick GeGLU have a gate (Shazeer, arXiv 2002.05202)
    clamp:      gate at most, and up within plus and minus, this; None: no limit
    offset:     added to up
    """

    function: Function
    gated: bool = True
    clamp: float | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for an activation that does not exist."""
        if self.function not in FUNCTIONS:
            raise ValueError(f"function is one of {', '.join(FUNCTIONS)}, not {self.function!r}")
        if self.clamp is not None and self.clamp <= 0.0:
            raise ValueError(f"clamp is positive or None, not {self.clamp}")
        if not self.gated and (self.clamp is not None or self.offset):
            raise ValueError("clamp and offset are of the two halves that gated activations have")

    @property
    def halves(self) -> int:
        """In how many parts a row of the input falls."""
        return 2 if self.gated else 1
