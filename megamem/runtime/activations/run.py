"""One forward pass of one layer, from the moment it returns until its backward pass has everything back.

    forward                    between                      backward
    capture -> seal            handles hold entries,        first unpack -> materialize:
      entries stored or         parcels hold host slots       take the parcels, replay what is missing,
      dropped                                                 hand each entry its memory

State lives in the run, and the run lives as long as the graph's handles: any number of microbatches may be in flight,
in any order, and a graph that is dropped without a backward pass takes its run and its host slots with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megamem.errors import ActivationError
from megamem.runtime.activations.capture import Capture, Packed
from megamem.runtime.activations.geometry import Geometry, compact, region_of
from megamem.runtime.activations.layer import AbstractLayer, Args, Kwargs, with_first_tensor
from megamem.runtime.activations.parcels import Parcel
from megamem.runtime.activations.recipe import AnchorPlan, Recipe, Segment
from megamem.runtime.activations.replay import Replay
from megamem.runtime.activations.signature import Signature, Source

if TYPE_CHECKING:
    from megamem.runtime.activations.engine import ActivationEngine


class Entry:
    """One distinct piece of memory that was saved, while it is away."""

    __slots__ = ("flat", "run")

    def __init__(self, run: LayerRun) -> None:
        self.run: LayerRun | None = run
        self.flat: Tensor | None = None  # compact and 1-D, once it is back

    def get(self, geometry: Geometry) -> Tensor:
        """The memory under one of its shapes; brings the whole layer back at the first call."""
        if self.flat is None:
            assert self.run is not None
            self.run.materialize()
        assert self.flat is not None
        return geometry.view(self.flat)


@dataclass(slots=True)
class Piece:
    """One stored tensor: (part of) an entry, an anchor's output, or one of the base."""

    kind: str  # "entry", "anchor", "input", "attention"
    index: int
    tensor: Tensor | None  # here while it lies in device memory
    tokens: int  # how many it holds; all of them: the compact memory as it is


@dataclass(slots=True)
class Shipment:
    """Pieces that travel in one parcel."""

    parcel: Parcel
    pieces: list[Piece]
    is_base: bool


class LayerRun:
    """The activations of one layer in one forward pass."""

    def __init__(
        self,
        engine: ActivationEngine,
        layer: AbstractLayer,
        call: Callable[..., Any],
        args: Args,
        kwargs: Kwargs,
        previous: LayerRun | None,
    ) -> None:
        hidden = layer.hidden(args, kwargs)
        self.engine, self.layer, self.call = engine, layer, call
        self.args, self.kwargs = layer.without_hidden(args, kwargs)
        self.previous = previous
        self.tokens = hidden.shape[0]
        self.hidden: Tensor | None = None  # [s, b, h], while it is in device memory
        self.attention: Tensor | None = None
        self.answers: dict[str, tuple[Any, bool]] = {}  # path -> (result without its activation, requires_grad)
        self.random_states: list[Any] = []
        self.signature: Signature | None = None
        self.recipe: Recipe | None = None
        self.entries: dict[int, Entry] = {}
        self.resident: list[Piece] = []
        self.shipments: list[Shipment] = []
        self.expert_entries: list[Entry] = []
        self.expert_shipment: Shipment | None = None
        self.back_experts: list[Entry] = []
        self.anchors_stored: dict[str, Tensor] = {}
        self.geometries: dict[str, Geometry] = {}  # how layer input and attention output lie on their compact memory
        self.requires_grad = hidden.requires_grad
        self.has_begun = self.is_back = False
        self.kept_nbytes = 0

    @property
    def back_nbytes(self) -> int:
        """Bytes that came back, before autograd starts to free them."""
        entries = (*self.entries.values(), *self.back_experts)
        return sum(entry.flat.nbytes for entry in entries if entry.flat is not None)

    def __del__(self) -> None:
        if self.kept_nbytes:  # the graph was dropped without a backward pass
            self.engine.on_gone(self)

    # -- forward ---------------------------------------------------------------------------------------------------

    def seal(self, capture: Capture, fixed: list[Packed], signature: Signature, recipe: Recipe, hidden: Tensor) -> bool:
        """Send away what the recipe sends away. False, with nothing changed, if host memory has no room for it."""
        pieces = self._pieces(capture, fixed, signature, recipe, hidden)
        shipments = self._ship(pieces, recipe)
        if shipments is None:
            return False
        self.signature, self.recipe, self.shipments = signature, recipe, shipments
        self.random_states = capture.random_states
        self._settle_handles(fixed, signature, recipe)
        self._note_answers(capture, recipe)
        for piece in pieces:
            if piece.tensor is not None:
                self.resident.append(piece)
        self._keep_base(capture, recipe, hidden)
        return True

    def _pieces(
        self, capture: Capture, fixed: list[Packed], signature: Signature, recipe: Recipe, hidden: Tensor
    ) -> list[Piece]:
        """What is stored, cut to its tokens: views as far as possible, for nothing may be lost if it does not fit."""
        pieces: list[Piece] = []
        seen = set()
        for plan in recipe.entries:
            seen.add(plan.name)
            spec = signature.entries[plan.index]
            tensor = fixed[spec.packs[0]].tensor.detach()
            if plan.tokens == 0 or (plan.tier == "hbm" and plan.whole):
                continue
            if plan.whole:
                region = region_of(tensor)
                assert region is not None
                pieces.append(Piece("entry", plan.index, compact(tensor, region), self.tokens))
            else:
                assert plan.axis is not None and plan.source is not None
                shaped = self._as_source(tensor, signature, plan.index, plan.source)
                pieces.append(Piece("entry", plan.index, plan.axis.range(shaped, 0, plan.tokens), plan.tokens))
        for index, anchor in enumerate(recipe.anchors):
            output = capture.output(anchor.path)
            assert output is not None
            pieces.append(Piece("anchor", index, anchor.axis.range(output.detach(), 0, anchor.tokens), anchor.tokens))
        if recipe.needs_base and recipe.input_tier == "host" and recipe.store_input and "layer_input" not in seen:
            pieces.append(Piece("input", 0, hidden.detach(), self.tokens))
        if recipe.needs_base and recipe.attention_tier == "host" and "attention_output" not in seen:
            output = capture.output(self.layer.attention)
            assert output is not None
            pieces.append(Piece("attention", 0, output.detach(), self.tokens))
        return pieces

    def _as_source(self, tensor: Tensor, signature: Signature, index: int, source: Source) -> Tensor:
        """The saved tensor in the shape whose axis counts tokens."""
        region = region_of(tensor)
        assert region is not None
        if signature.packs[signature.entries[index].packs[0]].geometry == source.geometry:
            return tensor
        return source.geometry.view(compact(tensor, region))

    def _ship(self, pieces: list[Piece], recipe: Recipe) -> list[Shipment] | None:
        """Hand what goes to the host to the courier, in one parcel, or the base apart where others may ask for it."""
        host_base, host_rest, resident = [], [], []
        for piece in pieces:
            tier, is_base = self._tier_of(piece, recipe)
            if tier == "hbm":
                resident.append(piece)
            elif is_base and self.engine.base_apart:
                host_base.append(piece)
            else:
                host_rest.append(piece)
        shipments: list[Shipment] = []
        for group, is_base in ((host_base, True), (host_rest, False)):
            if not group:
                continue
            tensors = [piece.tensor for piece in group if piece.tensor is not None]
            parcel = self.engine.courier.store(tensors, self.version_check(tensors))
            if parcel is None:
                for shipment in shipments:
                    self.engine.courier.drop(shipment.parcel)
                return None
            shipments.append(Shipment(parcel, group, is_base))
        for shipment in shipments:
            for piece in shipment.pieces:
                piece.tensor = None
        for piece in resident:  # a slice would hold all of the memory it is a slice of
            assert piece.tensor is not None
            piece.tensor = piece.tensor.clone(memory_format=torch.contiguous_format)
            self.kept_nbytes += piece.tensor.nbytes
        return shipments

    def _tier_of(self, piece: Piece, recipe: Recipe) -> tuple[str, bool]:
        if piece.kind == "input":
            return recipe.input_tier, True
        if piece.kind == "attention":
            return recipe.attention_tier, True
        if piece.kind == "anchor":
            return recipe.anchors[piece.index].tier, False
        plan = recipe.entries[piece.index]
        return plan.tier, plan.name in ("layer_input", "attention_output")

    def version_check(self, tensors: list[Tensor]) -> Callable[[], None]:
        """Run when the copies are done with: whoever wrote to a tensor meanwhile raced with its copy."""
        versions = [tensor._version for tensor in tensors]
        number = self.layer.number

        def check() -> None:
            for tensor, version in zip(tensors, versions, strict=True):
                if tensor._version != version:
                    raise ActivationError(
                        f"a tensor of shape {list(tensor.shape)} that layer {number} saved for its backward pass was "
                        "changed in place while it was being swapped out; clone it before the in-place operation"
                    )

        return check

    def _settle_handles(self, fixed: list[Packed], signature: Signature, recipe: Recipe) -> None:
        """Tell every handle where its tensor will come from."""
        stays = {plan.index for plan in recipe.entries if plan.whole and plan.tier == "hbm"}
        self.entries = {plan.index: Entry(self) for plan in recipe.entries if plan.index not in stays}
        storages: dict[int, int] = {}
        for note, spec in zip(fixed, signature.packs, strict=True):
            entry = self.entries.get(spec.entry)
            if entry is None:
                note.handle.keep(note.tensor, note.version)
                if spec.entry in stays:
                    storage = note.tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
            else:
                if note.tensor._version != note.version:
                    raise ActivationError(
                        f"a tensor of shape {list(note.tensor.shape)} that layer {self.layer.number} saved at "
                        f"{note.path or 'its own level'} was changed in place before the layer returned"
                    )
                note.handle.entry, note.handle.geometry = entry, spec.geometry
        self.kept_nbytes += sum(storages.values())

    def _note_answers(self, capture: Capture, recipe: Recipe) -> None:
        """Remember what surrounds the activation in the results of the parts that a replay will answer."""
        paths = [anchor.path for anchor in recipe.anchors]
        if recipe.needs_base and self.layer.attention is not None:
            paths.append(self.layer.attention)
        for path in paths:
            output = capture.output(path)
            assert output is not None
            frame = with_first_tensor(capture.io[path].result, output.new_empty(0))
            self.answers[path] = (frame, output.requires_grad)

    def _keep_base(self, capture: Capture, recipe: Recipe, hidden: Tensor) -> None:
        """Hold what replays need and what stays in device memory anyway."""
        if not recipe.needs_base:
            return
        if recipe.input_tier == "hbm" and recipe.store_input:
            self.hidden = hidden.detach()
        output = capture.output(self.layer.attention)
        if recipe.attention_tier == "hbm" and output is not None:
            self.attention = output.detach()
        for name, tensor in (("layer_input", hidden), ("attention_output", output)):
            if tensor is not None and (region := region_of(tensor)) is not None:
                self.geometries[name] = Geometry.of(tensor, region)

    # -- backward --------------------------------------------------------------------------------------------------

    def begin(self, *_: object) -> None:
        """The layer's backward pass is about to start: a good moment to ask for what the next one will need."""
        if not self.has_begun:
            self.has_begun = True
            self.engine.on_begin(self)

    def fetch(self) -> None:
        """Start to bring back what is in host memory, and what the layer's input will be rebuilt from."""
        for shipment in self.shipments:
            self.engine.courier.fetch(shipment.parcel)
        if self.expert_shipment is not None and self.engine.expert_courier is not None:
            self.engine.expert_courier.fetch(self.expert_shipment.parcel)
        run: LayerRun | None = self
        while run is not None and run.recipe is not None and not run.recipe.store_input and run.hidden is None:
            run = run.previous
            if run is not None:
                run.fetch_base()

    def fetch_base(self) -> None:
        """Start to bring back layer input and attention output alone."""
        for shipment in self.shipments:
            if shipment.is_base:
                self.engine.courier.fetch(shipment.parcel)

    def materialize(self) -> None:
        """Bring back everything: take the parcels, rebuild the input, replay the missing tokens."""
        assert not self.is_back
        self.begin()
        recipe = self.recipe
        assert recipe is not None
        self._take(base_only=False)
        self._take_experts()
        for piece in self.resident:
            self._put(piece)
        self.resident = []
        if recipe.needs_base or not recipe.store_input:
            self._input()
            if not recipe.store_input:
                self._fill_input(recipe)
        for segment in recipe.segments:
            self._replay(segment)
        self.is_back = True
        self.engine.on_back(self)
        self._forget()

    def _forget(self) -> None:
        """Everything is with the handles now."""
        for entry in self.entries.values():
            entry.run = None  # the graph may outlive its activations
        self.entries, self.anchors_stored, self.back_experts = {}, {}, []
        self.attention = self.hidden = self.previous = None
        self.args, self.kwargs, self.random_states = (), {}, []

    def _take(self, *, base_only: bool) -> None:
        left = []
        for shipment in self.shipments:
            if base_only and not shipment.is_base:
                left.append(shipment)
                continue
            for piece, tensor in zip(shipment.pieces, self.engine.courier.take(shipment.parcel), strict=True):
                piece.tensor = tensor
                self._put(piece)
        self.shipments = left

    def _take_experts(self) -> None:
        if self.expert_shipment is not None and self.engine.expert_courier is not None:
            tensors = self.engine.expert_courier.take(self.expert_shipment.parcel)
            for entry, tensor in zip(self.expert_entries, tensors, strict=True):
                entry.flat, entry.run = tensor, None
            self.expert_shipment, self.back_experts, self.expert_entries = None, self.expert_entries, []

    def _put(self, piece: Piece) -> None:
        """Put a stored piece where it is asked for."""
        tensor, recipe = piece.tensor, self.recipe
        assert tensor is not None and recipe is not None and self.signature is not None
        if piece.kind == "input":
            self.hidden = tensor
        elif piece.kind == "attention":
            self.attention = tensor
        elif piece.kind == "anchor":
            self.anchors_stored[recipe.anchors[piece.index].path] = tensor
        else:
            plan = recipe.entries[piece.index]
            if not plan.whole:
                assert plan.source is not None
                self._write(piece.index, plan.source, tensor, 0, plan.tokens)
                return
            self.entries[piece.index].flat = tensor
            if plan.name in self.geometries:
                view = self.geometries[plan.name].view(tensor)
                self.hidden, self.attention = (
                    (view, self.attention) if plan.name == "layer_input" else (self.hidden, view)
                )

    def _write(self, index: int, source: Source, values: Tensor, start: int, stop: int) -> None:
        """Put tokens [start, stop) of an entry into its memory; `values` in the blocked form of the source's axis."""
        assert self.signature is not None
        entry, spec = self.entries[index], self.signature.entries[index]
        if entry.flat is None:
            entry.flat = self.engine.device.empty((spec.numel,), spec.dtype)
        full = source.geometry.view(entry.flat)
        (full if source.axis is None else source.axis.range(full, start, stop)).copy_(values)

    def _deliver(self, index: int, source: Source, tensor: Tensor, segment: Segment) -> None:
        """Put what a replay brought into the entry's memory, or make it that memory where it is all of it."""
        entry = self.entries[index]
        if entry.flat is None and (source.axis is None or segment.stop - segment.start == self.tokens):
            region = region_of(tensor)
            if region is not None and Geometry.of(tensor, region) == source.geometry:
                entry.flat = compact(tensor, region)
                self.engine.stats.recomputed_nbytes += entry.flat.nbytes
                return
        values = tensor if source.axis is None else source.axis.blocked(tensor)
        self._write(index, source, values, segment.start, segment.stop)
        self.engine.stats.recomputed_nbytes += tensor.nbytes

    def _replay(self, segment: Segment) -> None:
        """Rebuild the missing tokens [segment.start, segment.stop) of everything that is not stored that far."""
        wanted = set(segment.wanted)

        def serve(items: list[tuple[int, Source]], tensors: list[Tensor]) -> bool:
            for index, source in items:
                if index in wanted:
                    self._deliver(index, source, tensors[source.index if source.pack is None else 0], segment)
                    wanted.discard(index)
            return not wanted

        replay = Replay(
            self.layer,
            answers=self._answers(segment.start, segment.stop, segment.answered),
            on_pack={
                key: lambda tensor, items=items: serve(items, [tensor])  # type: ignore[misc]
                for key, items in segment.on_pack.items()
            },
            on_input={path: partial(serve, items) for path, items in segment.on_input.items()},
            stop_before=self.layer.experts,
        )
        hidden = self._input()
        replay.run(
            self.call, self.args, self.kwargs, hidden.requires_grad_(self.requires_grad), segment.start, segment.stop,
            self.random_states,
        )  # fmt: skip
        if wanted:
            raise ActivationError(
                f"layer {self.layer.number}: running its forward again on tokens {segment.start}..{segment.stop} did "
                f"not bring back {len(wanted)} of the tensors it saved; it does something else than in its first step"
            )
        self.engine.stats.replayed_tokens += segment.stop - segment.start

    def _answers(self, start: int, stop: int, anchors: tuple[AnchorPlan, ...]) -> dict[str, Any]:
        """What the parts that are not called return for the tokens [start, stop)."""
        answers = {}
        assert self.signature is not None
        if self.layer.attention is not None:
            assert self.attention is not None and self.signature.attention is not None
            frame, requires_grad = self.answers[self.layer.attention]
            stored = self.signature.attention.take(self.attention, start, stop)
            answers[self.layer.attention] = Replay.answer(frame, stored, requires_grad)
        for anchor in anchors:
            frame, requires_grad = self.answers[anchor.path]
            axis, held = anchor.axis, self.anchors_stored[anchor.path]
            part = held.narrow(axis.dim + 1, start * axis.inner, (stop - start) * axis.inner)
            answers[anchor.path] = Replay.answer(frame, part.flatten(axis.dim, axis.dim + 1), requires_grad)
        return answers

    # -- sparse residuals ------------------------------------------------------------------------------------------

    def _input(self) -> Tensor:
        """The layer's input [s, b, h]: as stored, or rebuilt from the layer before."""
        if self.hidden is None:
            if self.previous is None or self.previous.is_back:
                raise ActivationError(
                    f"layer {self.layer.number}: its input was to be rebuilt from the layer before, whose backward "
                    "pass is already over; set activations.residual_every: 1"
                )
            self.hidden = self.previous._output()
        return self.hidden

    def _output(self) -> Tensor:
        """Run the whole layer once more, attention answered from the store: GEMMs and element-wise operations only."""
        self._take(base_only=True)
        replay = Replay(self.layer, answers=self._answers(0, self.tokens, ()))
        result = replay.run(
            self.call, self.args, self.kwargs, self._input(), 0, self.tokens, self.random_states, grad=False
        )
        self.engine.stats.replayed_tokens += self.tokens
        return self.layer.output(result).detach()

    def _fill_input(self, recipe: Recipe) -> None:
        for plan in recipe.entries:
            if plan.name == "layer_input":
                hidden = self._input()
                region = region_of(hidden)
                assert region is not None
                self.entries[plan.index].flat = compact(hidden, region)
