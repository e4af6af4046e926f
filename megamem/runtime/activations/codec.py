"""Tensors in fewer bytes on their way to host memory: what is done on the compute stream before and after the copies.

FP8 activations are near lossless where an activation is only multiplied with a gradient, once, in a sum over all tokens
(COAT, arXiv 2410.19313): the input of a linear layer, and what the activation function of the MLP is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from megamem.ir.activation import Codec
from megamem.kernels.block_codec import DTYPES, BlockFormat, dequantise, quantise


class AbstractCodec(ABC):
    """Takes a tensor apart into tensors of fewer bytes, and makes it again."""

    @abstractmethod
    def shapes(self, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part of a tensor of this shape."""

    @abstractmethod
    def encode(self, tensor: Tensor) -> list[Tensor]:
        """The parts, contiguous."""

    @abstractmethod
    def decode(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The tensor again, contiguous."""


@final
class Fp8Codec(AbstractCodec):
    """E4M3 with a scale for 128 elements of the last dimension: 8.25 bits an element (`kernels/block_codec`)."""

    _FORMAT = BlockFormat()

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [(shape, torch.uint8), ((*shape[:-1], self._FORMAT.num_groups(shape[-1])), torch.float32)]

    def encode(self, tensor: Tensor) -> list[Tensor]:
        return list(quantise(tensor, self._FORMAT))

    def decode(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        codes, scales = parts
        return dequantise((codes, scales), self._FORMAT, dtype)


def codec_for(codec: Codec | None, dtype: torch.dtype) -> AbstractCodec | None:
    """What carries out a fate's codec for tensors of this dtype; None: they are left as they are."""
    return Fp8Codec() if codec == "fp8" and dtype in DTYPES else None
