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
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megamem.errors import ActivationError
from megamem.runtime.activations.capture import Capture, Entry, Handle
from megamem.runtime.activations.codec import codec_for
from megamem.runtime.activations.geometry import Geometry, compact, region_of
from megamem.runtime.activations.layer import AbstractLayer, Args, Kwargs, with_first_tensor
from megamem.runtime.activations.parcels import Manifest, Parcel
from megamem.runtime.activations.recipe import AnchorPlan, Load, PiecePlan, Recipe, Segment
from megamem.runtime.activations.replay import Replay
from megamem.runtime.activations.shelf import TileShelf
from megamem.runtime.activations.signature import Signature, Source

if TYPE_CHECKING:
    from megamem.runtime.activations.engine import ActivationEngine


_NOTHING = torch.empty(0)  # where a result's activation was; a view of it, even of no tokens, would hold it all


class LayerRun:
    """The activations of one layer in one forward pass.

    Handles hold the run and their entries, the run holds the entries until they are filled, and nothing refers back to
    a handle: a graph that is dropped takes all of them with it at once. Left to the cyclic collector they would go at
    moments that differ between ranks, which must store alike.
    """

    __slots__ = (
        "__weakref__", "anchors", "answers", "args", "base", "base_geometries", "call", "check_base", "engine",
        "entries", "expert_entries", "expert_parcel", "has_begun", "is_back", "kept_nbytes", "kwargs", "layer",
        "parcels", "previous", "random_states", "recipe", "requires_grad", "resident", "segment", "shelf",
        "signature", "tokens",
    )  # fmt: skip

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
        self.tokens, self.requires_grad = hidden.shape[0], hidden.requires_grad
        self.signature: Signature | None = None
        self.recipe: Recipe | None = None
        self.random_states: list[Any] = []
        self.entries: list[Entry] = []
        self.expert_entries: list[Entry] = []
        self.parcels: list[tuple[Parcel, Load]] = []
        self.expert_parcel: Parcel | None = None
        self.check_base: Callable[[], None] | None = None
        self.resident: list[tuple[Tensor, PiecePlan]] = []  # slices that lie in device memory
        self.base: dict[str, Tensor] = {}  # layer input [s, b, h] and attention output, while in device memory
        self.base_geometries: dict[str, Geometry] = {}  # how they lie on their compact memory
        self.anchors: dict[str, Tensor] = {}  # path -> stored tokens, blocked
        self.answers: dict[str, tuple[Any, bool]] = {}  # path -> (result without its activation, requires_grad)
        self.has_begun = self.is_back = False
        self.kept_nbytes = 0
        self.segment = 0  # see `BackwardOrder`
        self.shelf: TileShelf | None = None  # of an MLP that runs in tiles

    @property
    def is_away(self) -> bool:
        """Whether anything has to come back before the layer's backward pass."""
        return bool(self.entries or self.expert_entries)

    @property
    def has_parcels(self) -> bool:
        """Whether something of it is in host memory, or was when nothing of it was back."""
        mine = bool(self.parcels) or self.expert_parcel is not None
        return mine or (self.shelf is not None and self.shelf.has_parcels)

    @property
    def away_nbytes(self) -> int:
        """Bytes that come back before the layer's backward pass."""
        assert self.recipe is not None
        return self.recipe.away_nbytes + (self.expert_parcel.nbytes if self.expert_parcel is not None else 0)

    def __del__(self) -> None:
        if self.kept_nbytes:  # the graph was dropped without a backward pass
            self.engine.on_gone(self)

    # -- forward ---------------------------------------------------------------------------------------------------

    def seal(
        self, capture: Capture, handles: list[Handle], signature: Signature, recipe: Recipe, hidden: Tensor
    ) -> bool:
        """Send away what the recipe sends away. False, with nothing changed, if host memory has no room for it."""
        loads = [(load, self._cut(load, capture, handles, recipe, hidden)) for load in recipe.loads]
        for load, tensors in loads:
            if load.tier == "host" and not self._store(load, tensors):
                for parcel, _ in self.parcels:
                    self.engine.courier.drop(parcel)
                self.parcels = []
                return False
        self.signature, self.recipe, self.random_states = signature, recipe, capture.random_states
        for load, tensors in loads:
            if load.tier == "hbm":  # a slice would hold all of the memory it is a slice of
                clones = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
                self.resident = list(zip(clones, load.pieces, strict=True))
                self.kept_nbytes += sum(clone.nbytes for clone in clones)
        if recipe.needs_base:
            self._keep_base(capture, recipe, hidden)
        self._let_go(handles, signature, recipe)
        return True

    def _cut(self, load: Load, capture: Capture, handles: list[Handle], recipe: Recipe, hidden: Tensor) -> list[Tensor]:
        """The tensors of a load, cut to the tokens that are stored."""
        tensors = []
        for piece in load.pieces:
            if piece.shares:
                tensors.append(piece.collect(handles))
                continue
            if piece.position >= 0:
                tensor = handles[piece.position].tensor
            elif piece.kind == "layer_input":
                tensor = hidden
            else:
                path = recipe.anchors[piece.index].path if piece.kind == "anchor" else self.layer.attention
                tensor = capture.output(path)
            assert tensor is not None
            tensors.append(piece.cut(tensor))
        return tensors

    def _store(self, load: Load, tensors: list[Tensor]) -> bool:
        if load.manifest is None:
            codecs = [codec_for(piece.codec, tensor.dtype) for piece, tensor in zip(load.pieces, tensors, strict=True)]
            load.manifest = Manifest(tensors, codecs)
        exposed, names = load.manifest.exposed, load.names
        check = self.version_check([tensors[i] for i in exposed], [names[i] for i in exposed])
        parcel = self.engine.courier.store(tensors, check, manifest=load.manifest)
        if parcel is not None:
            self.parcels.append((parcel, load))
        return parcel is not None

    def version_check(self, tensors: list[Tensor], names: list[str]) -> Callable[[], None]:
        """To run when the copies are done with: whoever wrote to a tensor meanwhile raced with its copy."""
        versions = [tensor._version for tensor in tensors]
        number = self.layer.number

        def check() -> None:
            for tensor, version, name in zip(tensors, versions, names, strict=True):
                if tensor._version != version:
                    raise ActivationError(
                        f"layer {number}: {name} ({tensor.numel()} elements) was changed in place, and its backward "
                        "pass needs it; clone it before the in-place operation"
                    )

        return check

    def _let_go(self, handles: list[Handle], signature: Signature, recipe: Recipe) -> None:
        """Tell every handle where its tensor will come from."""
        if recipe.away_nbytes:
            self.entries = [Entry() for _ in recipe.entries]
        for handle, (target, geometry) in zip(handles, recipe.targets, strict=True):
            if target < 0:
                handle.keep()
            else:
                handle.send_away(self, self.entries[target], geometry)
        if recipe.kept_nbytes < 0:
            storages = {
                storage.data_ptr(): storage.nbytes()
                for handle, spec in zip(handles, signature.packs, strict=True)
                if handle.tensor is not None and spec.entry >= 0 and (storage := handle.tensor.untyped_storage())
            }
            for tensor in self.base.values():  # autograd may have saved none of it
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            recipe.kept_nbytes = sum(storages.values())
        self.kept_nbytes += recipe.kept_nbytes

    def _keep_base(self, capture: Capture, recipe: Recipe, hidden: Tensor) -> None:
        """Hold what replays need and what stays in device memory anyway, and what they answer with."""
        attention = capture.output(self.layer.attention)
        if recipe.input_tier == "hbm" and recipe.store_input:
            self.base["layer_input"] = hidden.detach()
        if recipe.attention_tier == "hbm" and attention is not None:
            self.base["attention_output"] = attention.detach()
        self.check_base = self.version_check(list(self.base.values()), list(self.base))
        for name, tensor in (("layer_input", hidden), ("attention_output", attention)):
            if tensor is not None and (region := region_of(tensor)) is not None:
                self.base_geometries[name] = Geometry.of(tensor, region)
        for path in (self.layer.attention, *(anchor.path for anchor in recipe.anchors)):
            output = capture.output(path)
            if path is not None and output is not None:
                frame = with_first_tensor(capture.io[path].result, _NOTHING)
                self.answers[path] = (frame, output.requires_grad)

    # -- backward --------------------------------------------------------------------------------------------------

    def begin(self, *_: object) -> None:
        """The layer's backward pass is about to start: a good moment to ask for what the next one will need."""
        if not self.has_begun:
            self.has_begun = True
            self.engine.on_begin(self)

    def fetch(self) -> None:
        """Start to bring back what is in host memory, and what the layer's input will be rebuilt from."""
        for parcel, _ in self.parcels:
            self.engine.courier.fetch(parcel)
        if self.shelf is not None:
            self.shelf.fetch()
        if self.expert_parcel is not None and self.engine.expert_courier is not None:
            self.engine.expert_courier.fetch(self.expert_parcel)
        run: LayerRun | None = self
        while run is not None and run.recipe is not None and not run.recipe.store_input:
            run = run.previous
            for parcel, load in run.parcels if run is not None else ():
                if load.is_base:
                    self.engine.courier.fetch(parcel)

    def materialize(self) -> None:
        """Bring back everything: take the parcels, rebuild the input, replay the missing tokens."""
        assert not self.is_back
        self.begin()
        recipe, back_nbytes = self.recipe, self.away_nbytes
        assert recipe is not None
        self._take(base_only=False)
        self._take_experts()
        for tensor, piece in self.resident:
            self._put(tensor, piece)
        self.resident = []
        if not recipe.store_input:
            self._fill_input(recipe)
        for segment in recipe.segments:
            self._replay(segment)
        self.is_back = True
        self.engine.on_back(self, back_nbytes)
        self._forget()

    def _forget(self) -> None:
        """Everything is with the handles now, and the graph may outlive its activations."""
        self.entries, self.expert_entries, self.anchors, self.base = [], [], {}, {}
        self.args, self.kwargs, self.random_states, self.previous, self.check_base = (), {}, [], None, None

    def _take(self, *, base_only: bool) -> None:
        left = []
        for parcel, load in self.parcels:
            if base_only and not load.is_base:
                left.append((parcel, load))
                continue
            for tensor, piece in zip(self.engine.courier.take(parcel), load.pieces, strict=True):
                self._put(tensor, piece)
        self.parcels = left

    def _take_experts(self) -> None:
        if self.expert_parcel is not None and self.engine.expert_courier is not None:
            tensors = self.engine.expert_courier.take(self.expert_parcel)
            for entry, tensor in zip(self.expert_entries, tensors, strict=True):
                entry.memory = tensor
            self.expert_parcel = None

    def _put(self, tensor: Tensor, piece: PiecePlan) -> None:
        """Put a stored piece where it is asked for."""
        recipe = self.recipe
        assert recipe is not None
        if piece.kind == "anchor":
            self.anchors[recipe.anchors[piece.index].path] = tensor
        elif piece.kind != "entry":
            self.base[piece.kind] = tensor
        else:
            plan = recipe.entries[piece.index]
            if not plan.whole:
                assert plan.source is not None
                self._write(piece.index, plan.source, tensor, 0, plan.tokens)
                return
            if piece.shares:
                for share in piece.shares:
                    self.entries[share.entry].memory = tensor
                return
            self.entries[piece.index].memory = tensor
            if plan.name in self.base_geometries:
                self.base[plan.name] = self.base_geometries[plan.name].view(tensor)

    def _write(self, index: int, source: Source, values: Tensor, start: int, stop: int) -> None:
        """Put tokens [start, stop) of an entry into its memory; `values` in the blocked form of the source's axis."""
        assert self.signature is not None
        entry, spec = self.entries[index], self.signature.entries[index]
        if entry.memory is None:
            entry.memory = self.engine.device.empty((spec.numel,), spec.dtype)
        full = source.geometry.view(entry.memory)
        (full if source.axis is None else source.axis.range(full, start, stop)).copy_(values)

    def _deliver(self, index: int, source: Source, tensor: Tensor, segment: Segment) -> None:
        """Put what a replay brought into the entry's memory, or make it that memory where it is all of it."""
        entry = self.entries[index]
        if entry.memory is None and (source.axis is None or segment.stop - segment.start == self.tokens):
            region = region_of(tensor)
            if region is not None and Geometry.of(tensor, region) == source.geometry:
                entry.memory = compact(tensor, region.dims)
                self.engine.stats.recomputed_nbytes += tensor.nbytes
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
        if self.check_base is not None:  # the base is read here, and may not be among what autograd saved and we check
            self.check_base()
        answers = {}
        assert self.signature is not None
        if self.layer.attention is not None:
            assert self.signature.attention is not None
            frame, requires_grad = self.answers[self.layer.attention]
            stored = self.signature.attention.take(self.base["attention_output"], start, stop)
            answers[self.layer.attention] = Replay.answer(frame, stored, requires_grad)
        for anchor in anchors:
            frame, requires_grad = self.answers[anchor.path]
            axis, held = anchor.axis, self.anchors[anchor.path]
            part = held.narrow(axis.dim + 1, (start - anchor.start) * axis.inner, (stop - start) * axis.inner)
            answers[anchor.path] = Replay.answer(frame, part.flatten(axis.dim, axis.dim + 1), requires_grad)
        return answers

    # -- sparse residuals ------------------------------------------------------------------------------------------

    def _input(self) -> Tensor:
        """The layer's input [s, b, h]: as stored, or rebuilt from the layer before."""
        hidden = self.base.get("layer_input")
        if hidden is None:
            if self.previous is None or self.previous.is_back:
                raise ActivationError(
                    f"layer {self.layer.number}: its input was to be rebuilt from the layer before, whose backward "
                    "pass is already over; set activations.residual_every: 1"
                )
            hidden = self.base["layer_input"] = self.previous._output()
        return hidden

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
                self.entries[plan.index].memory = compact(hidden, region.dims)
