"""Predicted against measured: what a plan said of a step, beside the steps that ran.

Steps are timed from the start of one to the start of the next, so data, optimizer and logging are part of them, as in a
trainer's own log. The first steps, in which layers are learned and memory is recorded, do not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megamem.integrations.report import mib
from megamem.ir.plan import Plan, RankMemory

_LEARNING_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """Predicted and measured on one rank; None is what was not measured.

    step_seconds:      median of the steps from the start of one to the next, `num_steps` of them
    device_nbytes:     the most that PyTorch's allocator had from the device, against the plan without the CUDA context
    activation_nbytes: the most that layers held for backward passes, where the engine counts all that is predicted
    """

    hardware: str
    device: str
    num_steps: int
    predicted_seconds: float
    step_seconds: float | None
    predicted_device_nbytes: int
    device_nbytes: int | None
    predicted_activation_nbytes: int | None
    activation_nbytes: int | None

    def rows(self) -> list[tuple[str, str]]:
        """(what, predicted and measured), ready to print. What another kind of GPU was predicted is not compared."""
        is_other = not self.hardware.endswith(".json") and self.hardware.lower() not in self.device.lower()
        note = f"; planned for {self.hardware}, ran on {self.device}" if is_other else ""
        rows = [("plan: predicted and measured", f"median of {self.num_steps} steps{note}")]
        if self.step_seconds is not None and not is_other:
            rows.append(("a step", _pair(self.predicted_seconds, self.step_seconds, lambda value: f"{value:,.3f} s")))
        if self.device_nbytes is not None:
            rows.append(("device memory, most", _pair(self.predicted_device_nbytes, self.device_nbytes, _mib)))
        if self.predicted_activation_nbytes is not None and self.activation_nbytes is not None:
            pair = _pair(self.predicted_activation_nbytes, self.activation_nbytes, _mib)
            rows.append(("activations, most", pair))
        return rows


class AgainstPlan:
    """Watches the training steps of one rank.

    rank:  of the plan's memory, the pipeline rank
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        assert plan.predicted is not None
        self._plan, self._rank = plan, rank
        self._begun: list[float] = []

    def begin_step(self) -> None:
        """A training step begins."""
        self._begun.append(time.perf_counter())

    def report(self, activation_nbytes: int | None) -> PlanReport:
        """What was predicted and measured so far; `activation_nbytes` as the activation engine counts it."""
        predicted = self._plan.predicted
        assert predicted is not None
        memory = next((one for one in predicted.memory if one.rank == self._rank), RankMemory(rank=self._rank))
        times = [after - before for before, after in zip(self._begun, self._begun[1:], strict=False)][_LEARNING_STEPS:]
        on_gpu = torch.cuda.is_available()
        # The engine does not count what weight gradients wait with.
        counts_all = activation_nbytes is not None and not memory.kinds.get("weight_gradients")
        return PlanReport(
            hardware=self._plan.made_for.hardware,
            device=torch.cuda.get_device_name() if on_gpu else "a CPU",
            num_steps=len(times),
            predicted_seconds=predicted.step_seconds,
            step_seconds=statistics.median(times) if times else None,
            predicted_device_nbytes=memory.peak - memory.kinds.get("context", 0),
            device_nbytes=torch.cuda.max_memory_reserved() if on_gpu else None,
            predicted_activation_nbytes=predicted.activation_peak(self._rank) if counts_all else None,
            activation_nbytes=activation_nbytes if counts_all else None,
        )


def _mib(nbytes: float) -> str:
    return mib(round(nbytes))


def _pair(predicted: float, measured: float, text: Callable[[float], str]) -> str:
    off = f" ({measured / predicted - 1:+.1%})" if predicted else ""
    return f"{text(predicted)} and {text(measured)}{off}"
