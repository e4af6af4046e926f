"""Which implementation of an operation runs: chosen by the caller, or by the device, never by chance."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch

Backend = Literal["torch", "triton"]


def default_backend(device: torch.device) -> Backend:
    """Triton on CUDA devices where it is installed, else plain PyTorch: the same to rounding, in more passes."""
    return "triton" if device.type == "cuda" and find_spec("triton") is not None else "torch"


def takes_triton(backend: Backend | None, device: torch.device) -> bool:
    """Whether Triton's kernels are to run; None asks for `default_backend`.

    Raises ValueError for an unknown backend, ImportError for one that is not installed.
    """
    name = backend or default_backend(device)
    if name not in ("torch", "triton"):
        raise ValueError(f"backend is torch or triton, not {name!r}")
    if name == "triton" and find_spec("triton") is None:
        raise ImportError(
            "backend='triton' was asked for, and triton is not installed: pip install triton, or take backend='torch'"
        )
    return name == "triton"


def implementation(package: str, backend: Backend | None, device: torch.device) -> Any:
    """The module `triton` or `reference` of an operation's package, which have the same functions.

    Raises as `takes_triton` does.
    """
    return import_module(".triton" if takes_triton(backend, device) else ".reference", package)


def node_of(output: torch.Tensor) -> Any:
    """The node of the autograd graph that made a tensor: of an operation of ours, or of what the tensor is a view of.

    To autograd it is the operation's context, with what it saved.
    """
    node: Any = output.grad_fn
    return node if hasattr(node, "operations") else node.next_functions[0][0]
