"""`megamem profile --script`: steps of a script that knows nothing of it, timed and weighed; then it is stopped.

The script runs as under `megamem run`. When Megatron's groups are there hooks are put around its steps and layers,
which change no number; where the script, or a `--megamem` flag, switches megamem on, that is what is measured.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist
from torch.nn import Module

from megamem.errors import ConfigError
from megamem.flags import Request
from megamem.integrations.door import Door
from megamem.ir.script_profile import MeasuredRank, ScriptProfile
from megamem.patches import GROUPS
from megamem.patches.registry import apply
from megamem.runtime.activations.meter import ActivationMeter
from megamem.runtime.session import AbstractSession

if TYPE_CHECKING:
    from megamem.integrations.megatron_core import Handle
    from megamem.integrations.metering import Meter
    from megamem.ir.job import Job
    from megamem.patches.registry import Applied

WARM_UP = 1


class Enough(SystemExit):
    """All that is asked for has been measured; raised out of the script's training loop, on every rank alike."""


@contextlib.contextmanager
def stopped_when_enough() -> Iterator[None]:
    """Ends with the block where `Enough` is raised in it. Megatron-Bridge logs that as a failed run, since 0.6."""
    log = logging.getLogger("megatron.bridge.training.pretrain")
    log.addFilter(_is_failure)
    try:
        with contextlib.suppress(Enough):
            yield
    finally:
        log.removeFilter(_is_failure)


def _is_failure(logged: logging.LogRecord) -> bool:
    return not (logged.exc_info and isinstance(logged.exc_info[1], Enough))


@final
class Watch:
    """Watches the training steps of this rank; from the start of step `WARM_UP` on, `steps` of them count."""

    def __init__(self, steps: int, progress: Callable[[str], None]) -> None:
        self._steps, self._progress = steps, progress
        self.meter: Meter | None = None
        self.profile: ScriptProfile | None = None
        self.settings = ""
        self._job: Job | None = None
        self._begun: list[float] = []
        self._layers: list[tuple[Callable[[], float], int]] = []
        self._layer_names: set[int] = set()

    @property
    def num_begun(self) -> int:
        """Training steps that have begun."""
        return len(self._begun)

    def begin_step(self, arguments: Mapping[str, Any]) -> None:
        """A training step begins. Raises `Enough` when the last of those that count has ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._begun.append(time.perf_counter())
        if self._job is None:
            from megamem.integrations.live_job import job_of_step

            self._job = job_of_step(arguments)
        done = len(self._begun) - 1
        self._progress(f"step {done + 1} of {WARM_UP + self._steps}")
        if done <= WARM_UP:
            self._layers.clear()
            if isinstance(self.meter, ActivationMeter):  # evaluation may have held more
                self.meter.retained.forget_peak()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        if done == WARM_UP + self._steps:
            self.profile = self._gathered(self._job)
            raise Enough(0)

    def run_layer(self, layer: Module, run: Callable[[], Any], now_bytes: Callable[[], int]) -> Any:
        """Run a layer's forward pass, and keep its time and what it has saved."""
        if not torch.is_grad_enabled():
            return run()
        before, seconds = now_bytes(), _stopwatch()
        result = run()
        self._layers.append((seconds(), now_bytes() - before))
        self._layer_names.add(id(layer))
        return result

    def _gathered(self, job: Job) -> ScriptProfile:
        from megatron.core import parallel_state

        times = [after - before for before, after in zip(self._begun, self._begun[1:], strict=False)][WARM_UP:]
        seconds = [read() for read, _ in self._layers]
        mine = MeasuredRank(
            rank=dist.get_rank(),
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            step_seconds=tuple(times),
            activations=0 if self.meter is None else self.meter.peak_bytes,
            device_memory=torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
            layers=len(self._layer_names),
            layer_seconds=statistics.median(seconds) if seconds else 0.0,
            layer_bytes=int(statistics.median(nbytes for _, nbytes in self._layers)) if seconds else 0,
        )
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        return ScriptProfile(job=job, measured=tuple(ranks), settings=self.settings)


def _stopwatch() -> Callable[[], Callable[[], float]]:
    """Started now; the result stops it, and what that returns gives the seconds, later and without a wait."""
    if not torch.cuda.is_available():
        start = time.perf_counter()

        def stop_host() -> Callable[[], float]:
            taken = time.perf_counter() - start
            return lambda: taken

        return stop_host
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()

    def stop() -> Callable[[], float]:
        end.record()

        def seconds() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

        return seconds

    return stop


@final
class ProfileDoor(Door):
    """The door of a script that is profiled. It gives way to what the script itself does with megamem."""

    def __init__(self, request: Request, watch: Watch) -> None:
        super().__init__(request)
        self.watch = watch
        self._stock: Applied | None = None
        self._adopted: Handle | None = None

    def on_groups(self) -> None:
        super().on_groups()
        if self._adopted is None and self._stock is None:  # nothing is on: what is switched on comes by `adopt`
            self._watch_stock()

    def known_meter(self) -> Meter | None:
        return self.watch.meter

    def make_way(self) -> None:
        """megamem is about to patch what this watches stock Megatron-Core with."""
        if self._stock is not None:
            self._stock.revert()
            self._stock = None

    def adopt(self, handle: Handle) -> None:
        """megamem is on, whoever has switched it on: watch its steps."""
        self.make_way()
        self._adopted = handle
        if not handle.watch(self.watch.begin_step):
            self._watch_stock()
            return
        self.watch.meter = handle.meter()
        self.watch.settings = json.dumps({name: getattr(handle.config, name).given() for name in handle.config.enabled})

    def close(self) -> None:
        """As of any script, and no word about nothing having been on: nothing had to be."""
        self._switch_off()
        self.abandon()

    def abandon(self) -> None:
        self.make_way()
        if self._adopted is not None:
            self._adopted.disable()
            self._adopted = None
        super().abandon()

    def _watch_stock(self) -> None:
        from megamem.integrations.metering import METER_PATCHES, MeterSession  # loads Megatron: not before the script

        self.watch.meter = meter = ActivationMeter()
        session = _StockSession(self.watch, MeterSession(meter), meter)
        patches = dict.fromkeys((*METER_PATCHES, *GROUPS["activations"]))
        self._stock = apply(patch.bound(session) for patch in patches)


@final
class _StockSession(AbstractSession):
    """Counts and times stock Megatron-Core, and changes nothing; `inner` does what a layer and a linear layer do."""

    def __init__(self, watch: Watch, inner: AbstractSession, meter: ActivationMeter) -> None:
        self._watch, self._inner, self._meter = watch, inner, meter

    def on_layer_built(self, layer: Module) -> None:
        pass

    def run_layer(
        self, layer: Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        run = partial(self._inner.run_layer, layer, forward, args, kwargs)
        return self._watch.run_layer(layer, run, lambda: self._meter.now_bytes)

    def run_linear(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        return self._inner.run_linear(function, arguments)

    def run_step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs.get("forward_only", False):
            self._watch.begin_step(inspect.signature(step).bind(*args, **kwargs).arguments)
        return step(*args, **kwargs)


def enough_steps(watch: Watch, script: str, steps: int) -> ScriptProfile:
    """What was measured. Raises ConfigError where the script has ended, or never begun, before that."""
    if watch.profile is not None:
        return watch.profile
    needed = WARM_UP + steps + 1
    raise ConfigError(
        f"profile: {script} has ended after {watch.num_begun} training steps through Megatron-Core's "
        f"forward-backward function, and {needed} are needed: {WARM_UP} to warm up, {steps} that are measured, and the "
        "start of another; raise its number of iterations"
    )
