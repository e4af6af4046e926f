"""The formats of the codec: what a code is, which elements share a scale, and how the scale is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Element = Literal["e4m3", "e5m2", "int8"]

LARGEST: dict[Element, float] = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}
"""The largest value of a code."""

CODE_DTYPES: dict[Element, torch.dtype] = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}
"""The type whose bits a code has."""

LEAST_SCALE = 2.0**-126
"""The least normal fp32 number: scales are no smaller, so that their inverse is a number."""

MAX_GROUP = 4096  # elements that a program of the Triton kernels holds of one group


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """How values become 8-bit codes.

    element:        e4m3: 4 exponent and 3 mantissa bits, relative error 2.6 %, whatever the spread within a group;
                    int8: 255 equal steps, less error where the values of a group are of one size, more where a few are
                    large; e5m2: 5 exponent and 2 mantissa bits, twice the error of e4m3
    group:          consecutive elements of the last dimension that share a scale; the last group may be shorter. With
                    the size of an attention head as `group`, [..., heads x head size] has a scale for each head, as in
                    Mesa (arXiv 2111.11124, section 3.2)
    power_of_two:   round scales up to a power of two, so that scaling is exact; about 10 % more error
    """

    element: Element = "e4m3"
    group: int = 128
    power_of_two: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a format that does not exist."""
        if self.element not in LARGEST:
            raise ValueError(f"element is one of {', '.join(LARGEST)}, not {self.element!r}")
        if not 1 <= self.group <= MAX_GROUP:
            raise ValueError(f"group is 1 to {MAX_GROUP} elements, not {self.group}")

    def num_groups(self, width: int) -> int:
        """The scales of a row of `width` elements."""
        return -(-width // self.group)

    def nbytes(self, shape: torch.Size | tuple[int, ...]) -> int:
        """What the codes and scales of values of this shape take in memory."""
        *rows, width = shape
        count = 1
        for size in rows:
            count *= size
        return count * (width + 4 * self.num_groups(width))


class Quantised(NamedTuple):
    """Values in 8 bits.

    codes:   [..., D], uint8: the bits of float8_e4m3fn, float8_e5m2 or int8
    scales:  [..., groups], fp32; a value is its code times the scale of its group
    """

    codes: torch.Tensor
    scales: torch.Tensor
