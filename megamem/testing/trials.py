"""Small words that many tests of behaviour share: the usual configurations, a case made ready, a fault put in.

Needs torch and Megatron-Core only where a function is called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

SWAP: dict[str, Any] = {"policy": "memo", "keep_last_layers": 0}
HALF: dict[str, Any] = {**SWAP, "swap_fraction": 0.5}
RECOMPUTE: dict[str, Any] = {"policy": "recompute"}
RESIDUAL: dict[str, Any] = {**RECOMPUTE, "residual_every": 2}
"""Settings of the `activations` section that tests use again and again."""

LLAMA: dict[str, Any] = {"activation": "swiglu", "norm": "RMSNorm", "bias": False, "kv_groups": 2}
"""Fields of a `GptCase` with the layers of today's models."""


def start_case(**fields: Any) -> Any:
    """A `GptCase` like LLAMA with these fields, its parallel groups made. On every rank."""
    from megamem.testing.models import GptCase, init_parallel

    case = GptCase(**{**LLAMA, **fields})
    init_parallel(case)
    return case


def mutated(owner: Any, name: str, value: Any) -> AbstractContextManager[Any]:
    """`owner.name` replaced while the block runs: a guard taken out, to see that its absence shows."""
    return mock.patch.object(owner, name, value)


def undeprecated() -> AbstractContextManager[Any]:
    """Where stderr is looked at: GPTModel does not say, as since 0.19, that HybridModel is to be used instead."""
    return mutated(logging.getLogger("megatron.core.models.gpt.gpt_model"), "disabled", True)


def error_of(call: Callable[[], object]) -> str:
    """Class and text of what `call` raises, or nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
