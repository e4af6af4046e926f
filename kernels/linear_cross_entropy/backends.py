"""Which implementation runs the two row operations: chosen by the caller, or by the device, never by chance."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, Protocol

import torch

from . import rows
from .options import LossOptions

Backend = Literal["torch", "triton"]


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


def default_backend(device: torch.device) -> Backend:
    """Triton on CUDA devices where it is installed, else plain PyTorch: the same to rounding, in more passes."""
    return "triton" if device.type == "cuda" and find_spec("triton") is not None else "torch"


def row_operations(backend: Backend | None, device: torch.device) -> RowOperations:
    """The implementation; None asks for `default_backend`. Raises ValueError for an unknown one, ImportError for an
    absent one."""
    name = backend or default_backend(device)
    if name == "torch":
        return rows
    if name != "triton":
        raise ValueError(f"backend is torch or triton, not {name!r}")
    try:
        from . import triton as kernels
    except ImportError as error:
        raise ImportError(
            "backend='triton' was asked for, and triton is not installed: pip install triton, or take backend='torch'"
        ) from error
    return kernels
