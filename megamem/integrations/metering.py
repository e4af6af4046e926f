"""Counting what layers hold for their backward passes: in stock Megatron-Core, under the engine, and under a schedule.

Under a schedule that computes weight gradients apart, what they need is held too, from B to W: the inputs and output
gradients of the linear layers (arXiv 2401.10241, section 2.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, final

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from torch.nn import Module

from megamem.integrations.megatron_layer import MegatronLayer, UnpatchedForward
from megamem.integrations.megatron_linear import run_whole
from megamem.ir.schedule import Action
from megamem.patches import GROUPS
from megamem.patches.registry import apply
from megamem.runtime.activations.engine import ActivationEngine
from megamem.runtime.activations.layer import tensors_of
from megamem.runtime.activations.meter import ActivationMeter
from megamem.runtime.pipeline.weights import WeightQueue
from megamem.runtime.session import AbstractSession


class Meter(Protocol):
    """What counts."""

    @property
    def peak_bytes(self) -> int:
        """The most device memory held for backward passes at any time so far."""


METER_PATCHES = (*GROUPS["activations.layers"], *GROUPS["activations.linears"])


@final
class MeterSession(AbstractSession):
    """Counts, and changes nothing."""

    def __init__(self, meter: ActivationMeter) -> None:
        self._meter = meter

    def on_layer_built(self, layer: Module) -> None:
        pass

    def run_layer(
        self, layer: Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not torch.is_grad_enabled():
            if is_checkpointing():  # Megatron's full recomputation: the layer saves when it runs again
                self._meter.hold_given(tensors_of(args, kwargs))
            return forward(layer, *args, **kwargs)
        known = MegatronLayer(layer)
        return self._meter.run(known.parameter_storages(), UnpatchedForward(forward, layer), args, kwargs)

    def run_linear(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        return run_whole(function, arguments)

    def run_step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return step(*args, **kwargs)


@contextmanager
def measured_activations() -> Iterator[Meter]:
    """Count, in stock Megatron-Core, what transformer layers hold for their backward passes while the block runs.

    In a script under `megamem run` that has switched something on: what they hold then.
    """
    from megamem.integrations.door import Door

    door = Door.current()
    if door is not None and (known := door.known_meter()) is not None:
        yield known
        return
    meter = ActivationMeter()
    with apply(patch.bound(MeterSession(meter)) for patch in METER_PATCHES):
        yield meter


@final
class EngineMeter:
    """Reads the engine's count, also before there is an engine."""

    def __init__(self, engine: Callable[[], ActivationEngine | None]) -> None:
        self._engine = engine

    @property
    def now_bytes(self) -> int:
        """Held now."""
        engine = self._engine()
        return 0 if engine is None else engine.held_bytes

    @property
    def peak_bytes(self) -> int:
        """The most device memory held for backward passes at any time so far."""
        engine = self._engine()
        return 0 if engine is None else engine.peak_bytes


@final
class ScheduleMeter:
    """Adds what waiting weight gradients hold to another count, after every action of the schedule."""

    def __init__(self, layers: EngineMeter | ActivationMeter, queue: WeightQueue) -> None:
        self._layers, self._queue, self._peak = layers, queue, 0

    def observe(self, action: Action) -> None:
        """An action has ended."""
        kept = {held.untyped_storage().data_ptr(): held.untyped_storage().nbytes() for held in self._queue.held}
        self._peak = max(self._peak, self._layers.now_bytes + sum(kept.values()))

    @property
    def peak_bytes(self) -> int:
        """The most device memory held for backward passes so far."""
        return max(self._peak, self._layers.peak_bytes)
