"""Switching megamem on in a process that trains with Megatron-Core: seams first, then patches; undone on request.

    handle = megamem.enable("megamem.yaml")     # after initialize_model_parallel, before the model is built
    ...
    handle.disable()

Nothing happens at import. `enable` applies the patches that the configuration needs; what depends on the model (how
many layers, which dtype, which device) is decided when the first layer is built and when it first runs.
"""

from __future__ import annotations

import inspect
import logging
import os
import secrets
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from megatron.core.utils import get_model_config
from torch.nn import Module

from megamem.config import Activations, Config, load_config
from megamem.errors import ConfigError, MissingPackage, UnsupportedError
from megamem.flags import origins_in
from megamem.host import resolve_host_memory
from megamem.integrations import compat, transformer_engine
from megamem.integrations.against_plan import AgainstPlan
from megamem.integrations.allocator import PlannedMemory
from megamem.integrations.capability import Capability, CapabilityReport, agree, refuse_together, require_live
from megamem.integrations.door import Door
from megamem.integrations.layer_check import check_layer
from megamem.integrations.megatron_layer import MegatronLayer, UnpatchedForward
from megamem.integrations.megatron_linear import run_whole
from megamem.integrations.megatron_schedule import MegatronSchedule, offloads, plan_ahead
from megamem.integrations.metering import METER_PATCHES, EngineMeter, Meter, MeterSession, ScheduleMeter
from megamem.integrations.placement import VPlacement
from megamem.integrations.plan_check import check_layout, check_model
from megamem.integrations.report import ActivationReport, Report
from megamem.integrations.saved_activations import SavedActivations
from megamem.integrations.schedule_report import ScheduleReport, TraceWriter
from megamem.integrations.switch_on import switch_on_table
from megamem.integrations.this_job import KnownJob, decided
from megamem.integrations.tiled_mlp import TiledMlp
from megamem.integrations.vocabulary import FusedLoss
from megamem.integrations.vocabulary_parallel import VocabularyParallel
from megamem.patches import GROUPS, TRAINER_PLACEMENTS
from megamem.patches.registry import Applied, Patch, apply
from megamem.planner.activations import plan_activations
from megamem.planner.schedules.plan import PlannedSchedule, default_schedule
from megamem.runtime.activations.engine import ActivationEngine
from megamem.runtime.activations.meter import ActivationMeter
from megamem.runtime.activations.streams import AbstractDevice, HostDevice
from megamem.runtime.arena import StaticAllocator
from megamem.runtime.session import AbstractBuilder, AbstractSession

_LOG = logging.getLogger("megamem")

CAPABILITIES: Mapping[str, Callable[[Config], Capability]] = {
    "vocabulary": lambda config: _vocabulary(config),
    "mlp": lambda config: TiledMlp(config.mlp, rebuilds=config.fp8.is_on),
    "allocator": lambda config: PlannedMemory(config.allocator),
    "fp8": lambda config: SavedActivations(config.fp8),
}
"""What makes the capability of a section that is switched on; `activations` and `schedule` are the session's own."""


def enable(
    config: Config | str | Path | Mapping[str, object],
    *,
    device: AbstractDevice | None = None,
    origins: Mapping[str, str] | None = None,
    job: KnownJob | None = None,
) -> Handle:
    """Switch on what `config` asks for, in this process; every rank calls it, and rank 0 prints what is on.

    `device` replaces the copy queues (a simulator, in tests); by default CUDA's for CUDA tensors, else plain copies.
    `origins` says where each `section.option` was asked for, if not in the file `config`.
    `job` is what is trained, for what `config` leaves to the planner: Megatron-LM's flags, its arguments as parsed, or
    a `megamem.ir.job.Job`; under Megatron-LM itself it is known.
    Raises ConfigError where the configuration is wrong or the machine cannot hold it, MissingPackage without
    Megatron-Core, PatchError where the installed release is not one that megamem knows.
    """
    asked = load_config(config)
    if not _with_offloads(asked).enabled and asked.plan is None:
        return Handle(asked, None, Applied())
    try:
        from megatron.core import parallel_state
    except ImportError as error:
        raise MissingPackage('megamem.enable needs megatron-core; pip install "megamem[train]"') from error
    if not parallel_state.model_parallel_is_initialized():
        raise ConfigError("call megamem.enable after megatron.core.parallel_state.initialize_model_parallel")
    loaded = _with_offloads(decided(asked, job))
    if not loaded.enabled:
        if torch.distributed.get_rank() == 0:
            print(switch_on_table(loaded, {}, host_nbytes=0, planned=None, capabilities=()), flush=True)
        return Handle(loaded, None, Applied())
    if loaded.plan is not None:
        check_layout(loaded.plan, parallel_state)
    loaded = _with_schedule(loaded, parallel_state)
    shared = loaded.vocabulary if _shares_vocabulary(loaded, parallel_state) else None
    planned = plan_ahead(loaded.schedule, shared) if loaded.schedule.is_on else None  # before the first collective
    host_nbytes = _agreed_host_memory(loaded, parallel_state) if loaded.activations.is_on else 0
    session = Session(loaded, host_nbytes, device, planned)
    wanted = dict.fromkeys(patch for name in loaded.enabled for patch in GROUPS[name])  # groups share patches
    patches = [patch.bound(session) for patch in wanted]
    if session.schedule is not None and session.schedule.placement is not None:
        of_models = (*GROUPS["schedule.v-placement"], *_of_loaded_trainers())
        patches += [patch.bound(session.schedule.placement) for patch in of_models]
    if session.builders:
        patches += [patch.bound(session) for patch in GROUPS["schedule.building"]]
    for capability in session.capabilities:
        patches += capability.patches()
    door = Door.current()
    if door is not None:
        door.make_way()
    applied = apply(patches)
    if torch.distributed.get_rank() == 0:
        where = str(config) if isinstance(config, str | Path) else "megamem.enable"
        implied = origins_in(loaded, f"schedule.name: {loaded.schedule.name}")
        implied |= origins_in(Config(schedule=loaded.schedule), "vocabulary.parallel: true")
        print(session.table({**implied, **(origins or origins_in(asked, where))}), flush=True)
    handle = Handle(loaded, session, applied)
    if door is not None:
        door.adopt(handle)
    return handle


def _of_loaded_trainers() -> Iterator[Patch]:
    """What a V placement needs of the trainers that this process has loaded."""
    for patches in TRAINER_PLACEMENTS.values():
        yield from (patch for patch in patches if patch.module in sys.modules)


def _with_offloads(config: Config) -> Config:
    """The configuration with what its schedule's OFFLOAD and RELOAD need: everything swapped, unless it says how."""
    if config.activations.is_on or not (config.schedule.is_on and offloads(config.schedule)):
        return config
    return replace(config, activations=Activations(policy="memo", keep_last_layers=0))


def _with_schedule(config: Config, parallel_state: Any) -> Config:
    """The configuration with a schedule that vocabulary parallelism runs in: Megatron's order, if none is named."""
    if config.schedule.is_on or not _shares_vocabulary(config, parallel_state):
        return config
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return replace(config, schedule=default_schedule(chunks))


def _shares_vocabulary(config: Config, parallel_state: Any) -> bool:
    """Whether the embeddings are to lie on several pipeline ranks."""
    return config.vocabulary.parallel is True and parallel_state.get_pipeline_model_parallel_world_size() > 1


def _vocabulary(config: Config) -> Capability:
    from megatron.core import parallel_state

    options = config.vocabulary
    return VocabularyParallel(options) if _shares_vocabulary(config, parallel_state) else FusedLoss(options)


def _against_plan(config: Config) -> AgainstPlan | None:
    """What compares steps with their plan, where there is one that is about these settings."""
    from megatron.core import parallel_state

    if config.plan is None or not config.plan.predicts(config.settings()):
        return None
    return AgainstPlan(config.plan, parallel_state.get_pipeline_model_parallel_rank())


def _agreed_host_memory(config: Config, parallel_state: Any) -> int:
    """Bytes of host memory for this rank; the least of its tensor-parallel group, whose ranks must store alike."""
    wanted = resolve_host_memory(config.activations.host_memory, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return agree([wanted], parallel_state.get_tensor_model_parallel_group())[0]


def _agreed_name() -> str:
    """A name that all ranks of the job have in common and that was never used before."""
    return f"{agree([secrets.randbits(62)])[0]:x}"


@final
class Session(AbstractSession, AbstractBuilder):
    """What Megatron's patched functions call."""

    def __init__(
        self, config: Config, host_nbytes: int, device: AbstractDevice | None, planned: PlannedSchedule | None = None
    ) -> None:
        self.config, self.host_nbytes = config, host_nbytes
        self.engine: ActivationEngine | None = None
        self.schedule: MegatronSchedule | None = None
        self.capabilities = [make(config) for name, make in CAPABILITIES.items() if name in config.enabled]
        if config.schedule.is_on:
            shared = next((item for item in self.capabilities if isinstance(item, VocabularyParallel)), None)
            self.schedule = MegatronSchedule.of(config.schedule, planned, _agreed_name(), shared)
        self.tiles = next((item for item in self.capabilities if isinstance(item, TiledMlp)), None)
        if self.tiles is not None and self.schedule is not None:
            self.tiles.queue = self.schedule.queue
            self.schedule.delayed.left_out = self.tiles.modules
        self._trace_writer = TraceWriter(config.schedule.trace) if config.schedule.trace != "none" else None
        self._device = device
        self._layers: weakref.WeakKeyDictionary[Module, MegatronLayer] = weakref.WeakKeyDictionary()
        self._num_built = 0
        self._has_begun = self._has_trained = False
        self._planned = planned
        self.meter: MeterSession | None = None
        self.against_plan = _against_plan(config)
        self.on_step: Callable[[Mapping[str, Any]], None] | None = None
        self.undo: list[Callable[[], None]] = []

    def table(self, origins: Mapping[str, str]) -> str:
        """What is on, who asked for it, and what to expect of it."""
        return switch_on_table(
            self.config,
            origins,
            host_nbytes=self.host_nbytes,
            planned=self._planned,
            capabilities=self.capabilities,
        )

    @property
    def builders(self) -> list[VPlacement | Capability]:
        """What takes part in the construction of models, the innermost first."""
        found: list[VPlacement | Capability] = [item for item in self.capabilities if item.BUILDS]
        if self.schedule is not None and self.schedule.placement is not None:
            found.insert(0, self.schedule.placement)
        return found

    def build_model(
        self, model: Module, construct: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = inspect.signature(construct).bind(model, *args, **kwargs)
        given.apply_defaults()

        def run() -> None:
            construct(*given.args, **given.kwargs)

        for builder in self.builders:
            run = partial(builder.build_model, model, given.arguments, run)
        run()

    def on_layer_built(self, layer: Module) -> None:
        self._num_built += 1
        if self._num_built == 1 and (note := transformer_engine.attention_note(layer.config)) is not None:
            _LOG.warning("megamem: %s", note)
        if self.config.activations.is_on:
            check_layer(layer, self.config)
        for capability in self.capabilities:
            capability.on_layer_built(layer)
        if self.config.activations.experts == "recompute" and compat.is_moe_layer(layer):
            self._checkpoint_experts(layer)

    def run_layer(
        self, layer: Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with self.around_layer(layer):
            if self.config.activations.is_on:
                return self._run_in_engine(layer, UnpatchedForward(forward, layer), args, kwargs)
            if self.meter is not None and torch.is_grad_enabled():
                return self.meter.run_layer(layer, forward, args, kwargs)
            return forward(layer, *args, **kwargs)

    def around_layer(self, layer: Module, *, is_replay: bool = False) -> AbstractContextManager[None]:
        """What the capabilities do while a layer runs, in a step or once more in a replay."""
        found = [item.around_layer(layer, is_replay=is_replay) for item in self.capabilities]
        contexts = [context for context in found if context is not None]
        return contexts[0] if len(contexts) == 1 else _nested(contexts)

    def _run_in_engine(
        self, layer: Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        known = self._layers.get(layer)
        if known is None:
            check_layer(layer, self.config)
            tiled = self.tiles is not None and self.tiles.takes(getattr(layer, "mlp", None))
            known = self._layers[layer] = MegatronLayer(layer, partial(self.around_layer, is_replay=True), tiled=tiled)
        if self.engine is None:
            self.engine = self._build_engine(layer, known.hidden(args, kwargs))
        if self.schedule is None or not self.schedule.offloads:
            return self.engine.forward(known, call, args, kwargs)
        self.engine.mark = leaving = self.schedule.leaving
        return self.engine.forward(known, call, args, kwargs, spare=leaving is None)

    def run_linear(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if self.schedule is None:
            return run_whole(function, arguments)
        return self.schedule.linears.run(function, arguments)

    def run_step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trains = not kwargs.get("forward_only", False)
        arguments = inspect.signature(step).bind(*args, **kwargs).arguments
        if not self._has_begun:
            self._has_begun = True
            self._begin(arguments["model"])
        if trains and self.against_plan is not None:
            self.against_plan.begin_step()
        if trains and self.on_step is not None:
            self.on_step(arguments)
        try:
            for capability in self.capabilities:
                capability.begin_step(arguments, trains=trains)
            result = self._around(step, args, kwargs, trains)()
        except BaseException:
            if self.engine is not None:
                self.engine.abandon_step()
            for capability in self.capabilities:
                capability.abandon_step()
            raise
        if trains:
            self._end_step()
        return result

    def _begin(self, model: Any) -> None:
        """Once, before the first step: UnsupportedError on every rank if the model of any does not go with it."""
        chunks = model if isinstance(model, list) else [model]
        if self.config.plan is not None:
            check_model(self.config.plan, chunks)
        if self.schedule is None and (mixup := compat.message_mixup(get_model_config(chunks[0]))):
            raise UnsupportedError(mixup)
        if self.capabilities:
            refuse_together(self.capabilities, chunks)
        for capability in self.capabilities:
            capability.adopt(chunks)

    def _around(
        self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], trains: bool
    ) -> Callable[[], Any]:
        """The step with what the capabilities do around it, the first one innermost."""
        if self.schedule is None:
            run: Callable[[], Any] = partial(step, *args, **kwargs)
        else:
            run = partial(self.schedule.run, step, args, kwargs)
        for capability in self.capabilities:
            run = partial(capability.run_step, run, trains=trains)
        return run

    def _end_step(self) -> None:
        if self.engine is not None:
            self.engine.end_step()
        if self.schedule is not None and self._trace_writer is not None:
            self._trace_writer.after_step(self.schedule)
        for capability in self.capabilities:
            capability.end_step()
        if not self._has_trained:
            self._has_trained = True
            self.check_live()

    def check_live(self) -> None:
        """Raise NotLiveError on every rank if a capability took no part on any rank, or not on one where it had to."""
        states = [(capability.is_live(), capability.NOT_LIVE) for capability in self.capabilities]
        if self.config.activations.is_on:
            is_live = self.engine is not None and self.engine.is_live
            text = (
                f"activations.policy is {self.config.activations.policy}, a step has run, and no TransformerLayer of "
                "any rank, or of a rank that has some, went through megamem. Is the model made of layers with a "
                "forward of their own, or was megamem disabled? Set activations.policy: off to go on without"
            )
            states.append((is_live or (False if self._num_built else None), text))
        if states:
            require_live(states)

    def _build_engine(self, layer: Any, hidden: torch.Tensor) -> ActivationEngine:
        options = self.config.activations
        plan = plan_activations(options, layer.config.num_layers, self.config.fp8)
        device = self._device or _device_of(hidden)
        engine = ActivationEngine(plan, device, self.host_nbytes, verify=options.verify)
        if self.schedule is not None:
            self.schedule.reload = engine.fetch_marked
        if self.tiles is not None:
            self.tiles.shelf = engine.shelf
        return engine

    def _checkpoint_experts(self, layer: Any) -> None:
        """Megatron's own checkpoint of the MoE layer, as its `--recompute-modules moe` switches it on."""
        experts = layer.mlp
        if not hasattr(experts, "moe_layer_recompute"):
            raise UnsupportedError(f"activations.experts: recompute is not possible with {type(experts).__name__}")
        before = experts.moe_layer_recompute
        experts.moe_layer_recompute = True
        self.undo.append(lambda: setattr(experts, "moe_layer_recompute", before))


class Handle:
    """megamem, switched on. `disable()`, or leaving the `with` block, restores Megatron exactly."""

    def __init__(self, config: Config, session: Session | None, applied: Applied) -> None:
        self.config = config
        self._session, self._applied = session, applied

    def disable(self) -> None:
        """Restore what was patched; to be called between steps. A second call does nothing."""
        self._applied.revert()
        if self._session is not None:
            while self._session.undo:
                self._session.undo.pop()()
            if self._session.schedule is not None:
                self._session.schedule.close()
            for capability in self._session.capabilities:
                capability.close()

    @property
    def engine(self) -> ActivationEngine | None:
        """The activation engine of this rank, once a layer has run."""
        return self._session.engine if self._session is not None else None

    @property
    def schedule(self) -> MegatronSchedule | None:
        """What runs the steps of this rank, where a schedule is asked for."""
        return self._session.schedule if self._session is not None else None

    @property
    def loss(self) -> FusedLoss | None:
        """What computes the losses of this rank, where they are to need no logits."""
        items = () if self._session is None else self._session.capabilities
        return next((item for item in items if isinstance(item, FusedLoss)), None)

    @property
    def allocator(self) -> StaticAllocator | None:
        """What serves the memory of this rank's steps, from the first of them on, where a static plan is asked for."""
        items = () if self._session is None else self._session.capabilities
        return next((item.allocator for item in items if isinstance(item, PlannedMemory)), None)

    def building(self, chunk: int) -> AbstractContextManager[None]:
        """Surround what builds chunk `chunk` of the model: under a V placement Megatron then takes it for its stage."""
        placement = self.schedule.placement if self.schedule is not None else None
        return nullcontext() if placement is None else placement.building(chunk)

    def meter(self) -> Meter:
        """What the layers hold for their backward passes, to compare with `measured_activations`.

        To be asked for before the model runs; without the activation engine it puts hooks around every layer.
        """
        layers: EngineMeter | ActivationMeter = EngineMeter(lambda: self.engine)
        if self._session is None:
            return layers
        if not self.config.activations.is_on:
            layers = ActivationMeter()
            self._session.meter = MeterSession(layers)
            live = {
                patch for name in self.config.enabled for patch in GROUPS[name]
            }  # those bring layers to the session
            applied = apply(patch.bound(self._session.meter) for patch in METER_PATCHES if patch not in live)
            self._session.undo.append(applied.revert)
        if self._session.schedule is None:
            return layers
        meter = ScheduleMeter(layers, self._session.schedule.queue)
        self._session.schedule.observe = meter.observe
        return meter

    def watch(self, begin_step: Callable[[Mapping[str, Any]], None]) -> bool:
        """Call `begin_step` with the arguments of every training step. False where nothing is on that has steps."""
        if self._session is None:
            return False
        self._session.on_step = begin_step
        return True

    def report(self) -> Report:
        """What the capabilities did on this rank so far; prints as a table."""
        parts: dict[str, CapabilityReport] = {}
        if self.config.activations.is_on:
            parts["activations"] = ActivationReport.of(self.config, self.engine)
        if self.schedule is not None:
            parts["schedule"] = ScheduleReport.of(self.schedule)
        for capability in () if self._session is None else self._session.capabilities:
            parts[capability.SECTION] = capability.report()
        if self._session is not None and self._session.against_plan is not None:
            held = None if self.engine is None else self.engine.peak_bytes
            parts["plan"] = self._session.against_plan.report(held)
        return Report(**parts)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.disable()


@contextmanager
def _nested(contexts: Sequence[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _device_of(hidden: torch.Tensor) -> AbstractDevice:
    if hidden.device.type == "cuda":
        from megamem.runtime.activations.streams_cuda import CudaDevice

        return CudaDevice(hidden.device, profile=True)  # two events a wait; the report tells what waits cost
    return HostDevice()
