"""Train the same small GPT with and without megamem, from the same seeds, and compare number by number.

case = GptCase(layers=3)
init_parallel(case)
stock, ours = train(case), train(case, {"policy": "memo", "keep_last_layers": 0})
assert ours.differences(stock) == []
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.nn import Module

from megamem.integrations import compat
from megamem.integrations.megatron_core import enable
from megamem.runtime.activations.engine import ActivationEngine
from megamem.runtime.activations.streams import AbstractDevice
from megamem.testing.models import GptCase, build_gpt, train_steps

SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Outcome of a few steps on this rank; `engine` and `report` are None without megamem."""

    losses: list[float]
    gradients: dict[str, Tensor]
    engine: ActivationEngine | None
    random_state: Any
    report: Any = None

    def differences(self, other: "Trained") -> list[str]:
        """What is not bitwise equal: names of gradients with their relative error, `losses`, `random state`."""
        found = ["losses"] if self.losses != other.losses else []
        for name in sorted(self.gradients.keys() | other.gradients.keys()):
            one, two = self.gradients.get(name), other.gradients.get(name)
            if one is None or two is None or not torch.equal(one, two):
                found.append(f"{name}: {relative_error(one, two):.1e}")
        if not _equal(self.random_state, other.random_state):
            found.append("random state")
        return found


def relative_error(one: Tensor | None, other: Tensor | None) -> float:
    """Norm of the difference by that of `other`; infinite where one is missing."""
    if one is None or other is None:
        return float("inf")
    return float((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-300))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return all(_equal(a, b) for a, b in zip(one, other, strict=True))


def seed_everything() -> None:
    """The same random state for each run of a comparison."""
    tensor_parallel.model_parallel_cuda_manual_seed(SEED)
    torch.manual_seed(SEED)


def train(
    case: GptCase,
    activations: Mapping[str, object] | None = None,
    *,
    device: AbstractDevice | None = None,
    num_microbatches: int = 2,
    steps: int = 2,
    prepare: Callable[[list[Module]], None] | None = None,
    build: Callable[[], list[Module]] | None = None,
    make_optimizer: Callable[[list[Module]], Any] | None = None,
    sections: Mapping[str, Mapping[str, object]] = {},
    **options: Any,
) -> Trained:
    """Build the model and train it; `activations` is the configuration section, `sections` are further ones, without
    any of which it is stock Megatron.

    `prepare(chunks)` may change the model before the first step; `build` and `make_optimizer(chunks)` make them
    in another way; `options` go to `train_steps`.
    """
    seed_everything()
    with contextlib.ExitStack() as stack:
        handle = None
        if activations is not None or sections:
            config = {**sections, "activations": dict(activations or {})}
            handle = stack.enter_context(enable(config, device=device))
        chunks = build_gpt(case) if build is None else build()
        if prepare is not None:
            prepare(chunks)
        if make_optimizer is not None:
            options["optimizer"] = make_optimizer(chunks)
        losses, gradients = train_steps(chunks, case, num_microbatches=num_microbatches, steps=steps, **options)
        return Trained(
            losses=losses,
            gradients=gradients,
            engine=None if handle is None else handle.engine,
            random_state=compat.random_state(),
            report=None if handle is None else handle.report(),
        )
