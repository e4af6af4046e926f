"""The activation engine: keep, swap or recompute what every transformer layer saves, token range by token range.

Source: MEMO (arXiv 2407.12117) swaps layer input and attention output of every layer, one fraction of the tokens of all
other saved tensors, and rebuilds the rest before the layer's backward pass. We deviate in four ways: each tensor has a
fraction of its own, outputs of element-wise operations are rebuilt from stored GEMM outputs, the input of a layer may
be rebuilt from the layer before (`residual_every`), and what can be rebuilt is learned from the layer itself instead
of being written down for GPT.

One engine serves all layers of all model chunks of a rank. It is told of a layer's call by its integration and holds no
reference to the model. The order in which backward passes come is learned from the steps (`order.py`), so that the next
layer's activations are on their way while this one's backward pass computes, across microbatches and chunks too.

Known weakness: the forward hooks that other code has on submodules run again in each replay, on a part of the tokens.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from megamem.errors import UnsupportedError
from megamem.ir.activation import EXPERTS, ActivationPlan, Fate, LayerRule
from megamem.runtime.activations.capture import Capture, Entry, Handle
from megamem.runtime.activations.geometry import Geometry, Region, compact
from megamem.runtime.activations.host_arena import HostArena
from megamem.runtime.activations.layer import AbstractLayer, Args, Kwargs
from megamem.runtime.activations.meter import ActivationMeter
from megamem.runtime.activations.order import BackwardOrder
from megamem.runtime.activations.parcels import Courier
from megamem.runtime.activations.recipe import Room, Situation, make_recipe
from megamem.runtime.activations.run import LayerRun
from megamem.runtime.activations.shelf import Manifests, TileShelf, fate_of_tiles
from megamem.runtime.activations.signature import Signature, check_replayable, learn, own_region, survey
from megamem.runtime.activations.stats import ActivationStats
from megamem.runtime.activations.streams import AbstractDevice

_LOG = logging.getLogger("megamem")
_ROOMS: tuple[Room, ...] = ("all", "base", "none")
_SPARED = LayerRule(untouched=True)

Shape = tuple[torch.Size, torch.dtype, bool]
"""What a layer's signature depends on: its input's shape and dtype, and whether it requires grad."""


class _Known:
    """What is known of one layer."""

    __slots__ = ("answered", "signatures", "tile_manifests", "untouched_nbytes")

    def __init__(self, layer: AbstractLayer, rule: LayerRule) -> None:
        self.signatures: dict[Shape, Signature] = {}
        self.tile_manifests: Manifests = {}
        self.untouched_nbytes: dict[Shape, int] = {}
        # The parts whose results, or whose input, a run has to know once the layer is learned.
        paths = [layer.attention, layer.experts]
        if not rule.untouched:
            paths += [path for name, path in layer.anchors.items() if rule.fates[name].fraction > 0]
        self.answered = frozenset(path for path in paths if path is not None)


class ActivationEngine:
    """Carries out an activation plan on one rank.

    device:        where activations live, and its copy queues.
    host_nbytes:   host memory for swapped activations, reserved when first needed.
    verify:        refuse layers whose replay does not reproduce what they saved (see `signature.py`).
    """

    def __init__(self, plan: ActivationPlan, device: AbstractDevice, host_nbytes: int, *, verify: bool = True) -> None:
        self.plan, self.device, self.verify = plan, device, verify
        rules = [rule for rule in plan.rules if not rule.untouched]
        self.base_apart = any(not rule.store_input for rule in rules)
        # Experts' tensors change size with the routing, differently on every rank. They get host memory of their own,
        # so that ranks of a tensor-parallel group never disagree on what fits, and so on what they replay together.
        swaps_experts = any(_goes_to_host(rule.fates[EXPERTS]) for rule in rules)
        shares = 2 if swaps_experts else 1
        self.courier = Courier(device, HostArena(device, host_nbytes // shares))
        self.expert_courier = Courier(device, HostArena(device, host_nbytes // shares)) if swaps_experts else None
        self.stats = ActivationStats()
        self.order = BackwardOrder()
        # By the layer, not by its number: multi-token prediction counts its layers anew. Weakly: models come and go.
        self._known: weakref.WeakKeyDictionary[AbstractLayer, _Known] = weakref.WeakKeyDictionary()
        self._last: tuple[weakref.ref[Tensor], weakref.ref[LayerRun]] | None = None
        self._running: LayerRun | None = None  # the layer whose forward pass is being captured
        self.mark: Hashable | None = None  # layers that run forward from now on are fetched together (fetch_marked)
        self._marked: dict[Hashable, list[weakref.ref[LayerRun]]] = {}
        self._has_warned_of_room = False
        self._is_storing_over = False  # the second layer's backward pass since the last forward has started

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(
        self, layer: AbstractLayer, call: Callable[..., Any], args: Args, kwargs: Kwargs, *, spare: bool = False
    ) -> Any:
        """Run a layer's forward (`call`) so that its activations go where the plan says, or stay if told to `spare` it.

        Raises UnsupportedError where the layer cannot do what the plan asks for.
        """
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        rule = _SPARED if spare else self.plan.rule(layer.number)
        self._retire()
        self._is_storing_over = False
        hidden = layer.hidden(args, kwargs)
        known = self._known.get(layer)
        if known is None:
            known = self._known[layer] = _Known(layer, rule)
        run = LayerRun(self, layer, call, args, kwargs, self._previous(hidden))
        if self.mark is not None:
            self._marked.setdefault(self.mark, []).append(weakref.ref(run))
        if rule.untouched:
            result = self._untouched(run, known, call, args, kwargs, hidden)
        else:
            _refuse_outer_hooks(layer)
            result = self._captured(run, known, rule, call, args, kwargs, hidden)
        self._link(run, layer.output(result))
        self._sample(0)
        return result

    def _untouched(
        self, run: LayerRun, known: _Known, call: Callable[..., Any], args: Args, kwargs: Kwargs, hidden: Tensor
    ) -> Any:
        """A layer that the plan leaves alone: plain autograd, but what it saves is counted when it is first seen."""
        shape = hidden.shape, hidden.dtype, hidden.requires_grad
        self.stats.num_untouched += 1
        nbytes = known.untouched_nbytes.get(shape)
        if nbytes is None:
            meter = ActivationMeter()
            result = meter.run(run.layer.parameter_storages(), call, args, kwargs)
            nbytes = known.untouched_nbytes[shape] = meter.retained.now
        else:
            result = call(*args, **kwargs)
        run.kept_nbytes = nbytes
        self.stats.untouched_nbytes += nbytes
        self.stats.retained.add(nbytes)
        return result

    def _captured(
        self,
        run: LayerRun,
        known: _Known,
        rule: LayerRule,
        call: Callable[..., Any],
        args: Args,
        kwargs: Kwargs,
        hidden: Tensor,
    ) -> Any:
        layer = run.layer
        shape = hidden.shape, hidden.dtype, hidden.requires_grad
        signature = known.signatures.get(shape)
        capture = Capture(layer, None if signature is None else known.answered)
        self._running = run
        try:
            result = capture.run(call, args, kwargs)
        finally:
            self._running = None
        handles, routed = capture.split()
        if signature is None:
            signature = self._learn(capture, handles, hidden, args, kwargs, call, rule)
            known.signatures[shape] = signature
        self.stats.num_runs += 1
        if signature.matches(handles):
            self._seal(run, rule, capture, handles, signature, hidden)
            self._seal_experts(run, rule, routed)
        else:
            del known.signatures[shape]
            self._leave_alone(layer, capture.handles)
        capture.forget()
        if run.shelf is not None:
            run.kept_nbytes += run.shelf.kept_nbytes
        self.stats.kept_nbytes += run.kept_nbytes
        self.stats.retained.add(run.kept_nbytes)
        return result

    def _learn(
        self,
        capture: Capture,
        handles: list[Handle],
        hidden: Tensor,
        args: Args,
        kwargs: Kwargs,
        call: Callable[..., Any],
        rule: LayerRule,
    ) -> Signature:
        """Find out what the layer saves; refuse it if the rule wants more than can be replayed."""
        needs_replay = rule.recomputes or self.base_apart
        if not capture.layer.can_replay:
            return survey(capture, handles, hidden, args, kwargs)[0]
        try:
            signature = learn(capture, handles, hidden, args, kwargs, call)
        except UnsupportedError:
            raise
        except Exception as error:
            if needs_replay:
                raise UnsupportedError(
                    f"layer {capture.layer.number} cannot be replayed on a part of its tokens "
                    f"({type(error).__name__}: {error}); use activations.policy: memo with swap_fraction: 1"
                ) from error
            _LOG.info("layer %d can be swapped but not replayed: %s", capture.layer.number, error)
            return survey(capture, handles, hidden, args, kwargs)[0]
        if needs_replay and self.verify:
            check_replayable(signature, capture.layer)
        return signature

    def _seal(
        self,
        run: LayerRun,
        rule: LayerRule,
        capture: Capture,
        handles: list[Handle],
        signature: Signature,
        hidden: Tensor,
    ) -> None:
        """Store what the rule stores; where host memory is full, recompute what can be and keep the rest."""
        store_input = rule.store_input or not _can_rebuild(run.previous)
        keep_base = self.base_apart and run.layer.experts is None
        for room in _ROOMS:
            kind = room, store_input, hidden.is_leaf
            recipe = signature.recipes.get(kind)
            if recipe is None:
                situation = Situation(run.tokens, room, store_input, input_is_held=hidden.is_leaf, keep_base=keep_base)
                recipe = signature.recipes[kind] = make_recipe(signature, rule, run.layer, situation)
            if run.seal(capture, handles, signature, recipe, hidden):
                break
            self.stats.num_without_room += 1
            self._warn_of_room(run.layer.number, room)
        for parcel, _ in run.parcels:
            self.stats.add_swapped(parcel)

    def _seal_experts(self, run: LayerRun, rule: LayerRule, routed: list[Handle]) -> None:
        """Experts' tensors: left where they are, or sent away whole."""
        if not routed:
            return
        for handle in routed:
            handle.keep()
        if self.expert_courier is None or not _goes_to_host(rule.fates[EXPERTS]):
            return
        parameters = run.layer.parameter_storages()
        groups: dict[Region, list[Handle]] = {}
        for handle in routed:
            assert handle.tensor is not None
            region = None if run.layer.must_stay(handle.tensor) else own_region(handle.tensor, parameters)
            if region is not None:
                groups.setdefault(region, []).append(handle)
        if not groups:
            return
        tensors = [compact(handles[0].tensor.detach(), region.dims) for region, handles in groups.items()]  # type: ignore[union-attr]
        run.expert_parcel = self.expert_courier.store(
            tensors, run.version_check(tensors, ["a tensor of the experts"] * len(tensors))
        )
        if run.expert_parcel is None:
            self.stats.num_without_room += 1
            self._warn_of_room(run.layer.number, "experts")
            return
        for region, handles in groups.items():
            entry = Entry()
            run.expert_entries.append(entry)
            for handle in handles:
                assert handle.tensor is not None
                handle.send_away(run, entry, Geometry.of(handle.tensor, region))
        self.stats.add_swapped(run.expert_parcel)

    def _leave_alone(self, layer: AbstractLayer, handles: list[Handle]) -> None:
        """The layer saved other tensors than when it was learned: they are kept this time, and it is learned anew."""
        for handle in handles:
            handle.keep()
        self.stats.num_unplanned += 1
        if self.stats.num_unplanned == 1:
            _LOG.warning(
                "layer %d saves other tensors than before; they are kept in device memory this once", layer.number
            )

    def _warn_of_room(self, number: int, room: str) -> None:
        if not self._has_warned_of_room:
            self._has_warned_of_room = True
            _LOG.warning(
                "host memory for activations is full at layer %d: what does not fit is recomputed or stays in device "
                "memory (activations.host_memory is %d MiB; %s)",
                number,
                self.courier.arena.capacity >> 20,
                room,
            )

    def shelf(self, path: str) -> TileShelf | None:
        """Where the module at `path`, which runs in tiles, stores what they keep; None if no layer is being captured:
        the plan leaves it alone."""
        run = self._running
        if run is None:
            return None
        rule, number = self.plan.rule(run.layer.number), run.layer.number
        manifests = self._known[run.layer].tile_manifests
        run.shelf = TileShelf(
            self, fate_of_tiles(rule, path), manifests, lambda: self._warn_of_room(number, "tiles of the MLP")
        )
        return run.shelf

    # -- order -----------------------------------------------------------------------------------------------------

    def _previous(self, hidden: Tensor) -> LayerRun | None:
        """The run whose output is this layer's input: known by the tensor itself, whoever passes it on."""
        if self._last is None:
            return None
        output, run = self._last[0](), self._last[1]()
        return run if output is hidden else None

    def _link(self, run: LayerRun, output: Tensor) -> None:
        self._last = (weakref.ref(output), weakref.ref(run))
        self.order.on_forward(run, run.previous)
        if output.grad_fn is not None:
            output.grad_fn.register_prehook(run.begin)

    def fetch_marked(self, mark: Hashable) -> None:
        """Start to bring back what the layers that ran under `mark` have in host memory, the last one first."""
        for reference in reversed(self._marked.pop(mark, [])):
            if (run := reference()) is not None:
                run.fetch()

    def on_begin(self, run: LayerRun) -> None:
        """A layer's backward pass starts: fetch what the next one needs, and let go of what has been copied."""
        for later in self.order.next_after(run):
            later.fetch()
        self._sample(0)
        # Nothing is stored in a backward pass, so nothing would push the last copies out. They have had a whole layer's
        # backward pass when the second one starts.
        self._retire(everything=self._is_storing_over)
        self._is_storing_over = True
        if not run.is_away:  # nothing was sent away: autograd frees it as it goes on
            self.on_gone(run)

    def on_back(self, run: LayerRun, nbytes: int) -> None:
        """A layer has everything back, `nbytes` of it; autograd frees it as its backward pass goes on."""
        self._sample(nbytes)
        self.on_gone(run)

    def on_gone(self, run: LayerRun) -> None:
        """What the layer kept is no longer held for later."""
        self.stats.retained.add(-run.kept_nbytes)
        run.kept_nbytes = 0

    def _sample(self, back_nbytes: int) -> None:
        self.stats.peak_held_nbytes = max(self.stats.peak_held_nbytes, self.held_bytes + back_nbytes)

    @property
    def held_bytes(self) -> int:
        """Device memory held for backward passes that have not begun, staging buffers included, in bytes."""
        held = self.stats.retained.now + self.courier.ledger.staging_nbytes
        return held if self.expert_courier is None else held + self.expert_courier.ledger.staging_nbytes

    @property
    def peak_bytes(self) -> int:
        """The most device memory held for backward passes at any time, in bytes."""
        return self.stats.peak_held_nbytes

    def _retire(self, *, everything: bool = False) -> None:
        """Let go of the sources of all layers but the newest, whose copies run while the next layer computes."""
        parcels_of_a_layer = 2 if self.base_apart else 1
        self.courier.retire(keep_in_flight=0 if everything else parcels_of_a_layer)
        if self.expert_courier is not None:
            self.expert_courier.retire(keep_in_flight=0 if everything else 1)

    def end_step(self) -> None:
        """A training step is over: give back the last staging buffers, and start the order of backward passes anew."""
        self.courier.flush()
        if self.expert_courier is not None:
            self.expert_courier.flush()
        self.order.end_step()
        self._marked.clear()
        self.mark = self._last = None
        self.stats.num_steps += 1

    def abandon_step(self) -> None:
        """A step was broken off by an exception: what is still under way belongs to graphs that will be dropped."""
        self.order.end_step()
        self._marked.clear()
        self.mark = self._last = None

    @property
    def is_live(self) -> bool:
        """Whether any layer has gone through the engine."""
        return self.stats.num_runs + self.stats.num_untouched > 0


def _goes_to_host(fate: Fate) -> bool:
    return fate.tier == "host" and fate.fraction > 0


def _can_rebuild(previous: LayerRun | None) -> bool:
    """Whether a layer's output can be made again from what is stored of it."""
    return (
        previous is not None
        and previous.recipe is not None
        and previous.recipe.needs_base
        and previous.layer.experts is None
    )


def _refuse_outer_hooks(layer: AbstractLayer) -> None:
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise UnsupportedError(
            f"layer {layer.number} runs inside somebody else's saved-tensor hooks (save_on_cpu, non-reentrant "
            "checkpointing, Megatron's fine-grained offload). Only the innermost pair of hooks sees a tensor, so the "
            "two cannot be combined: switch one off"
        )
