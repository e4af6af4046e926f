"""The two row operations, and which implementation of them runs."""

from __future__ import annotations

from typing import Protocol

import torch

from ..backends import Backend, takes_triton
from . import rows
from .options import LossOptions


class RowOperations(Protocol):
    """What `rows` and `triton` both have; see `rows` for what they mean."""

    def add_statistics_(
        self,
        logits_TC: torch.Tensor,
        labels_T: torch.Tensor,
        statistics_NT: torch.Tensor,
        options: LossOptions,
        first_word: int,
    ) -> None: ...

    def replace_by_gradient_(
        self,
        logits_TC: torch.Tensor,
        labels_T: torch.Tensor,
        coefficients_MT: torch.Tensor,
        gradient_TC: torch.Tensor,
        options: LossOptions,
        first_word: int,
    ) -> None: ...


def row_operations(backend: Backend | None, device: torch.device) -> RowOperations:
    """The implementation; None asks for the device's default. Raises as `takes_triton` does."""
    if not takes_triton(backend, device):
        return rows
    from . import triton as kernels

    return kernels
