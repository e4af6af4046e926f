"""Weights and optimizer state through Megatron's distributed checkpoints, as the example job does it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def _example() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from pretrain import checkpoint

    return checkpoint


def _state(chunks: list[Any], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    from megamem.testing.models import unwrap

    metadata = _example()._metadata()
    state: dict[str, Any] = {
        f"model{index}" if len(chunks) > 1 else "model": unwrap(chunk).sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(chunks)
    }
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def save(chunks: list[Any], optimizer: Any, folder: str) -> None:
    """Write model and optimizer."""
    from megatron.core import dist_checkpointing

    Path(folder).mkdir(exist_ok=True)
    dist_checkpointing.save(_state(chunks, optimizer, is_loading=False), folder)


def load(chunks: list[Any], optimizer: Any, folder: str) -> None:
    """Read model and optimizer into what is spoilt before."""
    import torch
    from megatron.core import dist_checkpointing

    from megamem.testing.models import unwrap

    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.fill_(7)
    _example()._allocate(optimizer)
    state = _state(chunks, optimizer, is_loading=True)
    loaded = dist_checkpointing.load(state, folder)
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{index}" if len(chunks) > 1 else "model"])
    _example()._load_optimizer(optimizer, loaded["optimizer"])
