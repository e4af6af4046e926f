"""From a rule (fates by name) and a signature (what a layer saves) to numbers: what is stored, what each replay brings.

    tokens     0          n1              n2                 s
    entry A    |---------------- stored --------------------|
    entry B    |-- stored -|.......... replayed .............|
    anchor C   |------- stored ------------|.................|
    replays                |-- segment 1 --|--- segment 2 ---|
                            (C answered)     (C run)

The token axis is cut wherever an entry or an anchor stops being stored. Within a segment everything is either stored or
not, so each segment is one replay with a fixed set of answered modules. With equal fractions there is one segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from megamem.errors import UnsupportedError
from megamem.ir.activation import BASE, Codec, Fate, LayerRule, Tier
from megamem.runtime.activations.capture import Handle
from megamem.runtime.activations.geometry import Geometry, TokenAxis, compact
from megamem.runtime.activations.layer import AbstractLayer
from megamem.runtime.activations.parcels import Manifest
from megamem.runtime.activations.replay import PackKey
from megamem.runtime.activations.signature import EntrySpec, Signature, Source, is_inside

_SMALL = 1 / 32  # of what a layer swaps
_LEAST_WIDTH = 16  # of the last dimension of what is encoded
_VECTOR = 16  # bytes: kernels load this many at once, so what shares a piece begins at multiples of it

Room = Literal["all", "base", "none"]
"""What host memory still has room for: everything that the rule sends there, the base alone, or nothing."""


Target = tuple[int, Geometry | None]
"""Where a saved tensor will come from: its entry (-1: it is kept), and its shape there (None: as it was stored)."""


@dataclass(frozen=True, slots=True)
class EntryPlan:
    """What becomes of one entry: its first `tokens` tokens are stored in `tier`, the rest is replayed."""

    index: int
    name: str
    tokens: int
    whole: bool  # stored with every token, no slicing
    tier: Tier
    axis: TokenAxis | None
    source: Source | None


@dataclass(frozen=True, slots=True)
class AnchorPlan:
    """Which tokens of an anchor's output are stored, [start, tokens), and where. Before `start` nothing is replayed."""

    name: str
    path: str
    start: int
    tokens: int
    tier: Tier
    axis: TokenAxis


@dataclass(slots=True)
class Segment:
    """One replay: tokens [start, stop), the anchors answered, the entries wanted and where they come by."""

    start: int
    stop: int
    answered: tuple[AnchorPlan, ...]
    on_pack: dict[PackKey, list[tuple[int, Source]]] = field(default_factory=dict)
    on_input: dict[str, list[tuple[int, Source]]] = field(default_factory=dict)
    wanted: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Share:
    """One of several entries that are stored as one piece."""

    entry: int
    position: int  # of its first tensor among the calls of the pack hook
    skip: int  # elements of the piece before it


@dataclass(frozen=True, slots=True)
class PiecePlan:
    """One tensor to store: (part of) an entry, several entries, an anchor's output, or one of the base that no entry
    holds."""

    kind: Literal["entry", "anchor", "layer_input", "attention_output"]
    index: int  # of the entry or anchor
    position: int  # of the saved tensor among the calls of the pack hook; -1 for what a module returned
    tokens: int
    axis: TokenAxis | None = None  # None: all of it
    view: Geometry | None = None  # the shape whose `axis` counts tokens, where the saved tensor has another one
    dims: tuple[tuple[int, int], ...] | None = None  # of the region to compact; None: not needed
    shares: tuple[Share, ...] = ()  # entries that lie in the piece together; `index` and `position` are the first one's
    is_woven: bool = False  # they lie so in device memory too
    codec: Codec | None = None
    start: int = 0  # the first token that is stored, of an anchor

    def collect(self, handles: list[Handle]) -> Tensor:
        """The entries that share the piece, in one 1-D tensor: a view where they are woven, else a copy."""
        if self.is_woven:
            return self.cut(handles[self.position].tensor)  # type: ignore[arg-type]
        tensors: list[Any] = [handles[share.position].tensor for share in self.shares]
        return torch.cat(
            [
                tensor.data.view(-1) if tensor.is_contiguous() else tensor.data.as_strided((tensor.numel(),), (1,))
                for tensor in tensors
            ]
        )

    def cut(self, tensor: Tensor) -> Tensor:
        """The tokens to store: a view where possible, for nothing may be lost if there is no room for it."""
        tensor = tensor.detach()
        if self.dims is not None:
            tensor = compact(tensor, self.dims)
        if self.axis is None:
            return tensor
        if self.view is not None:
            tensor = self.view.view(tensor)
        return self.axis.range(tensor, self.start, self.tokens)


@dataclass(slots=True)
class Load:
    """Pieces that lie in one tier and travel together."""

    tier: Tier
    is_base: bool  # layer input and attention output, apart from the rest
    pieces: list[PiecePlan]
    names: list[str] = field(default_factory=list)  # of the pieces, for messages
    manifest: Manifest | None = None  # that of the first parcel: they are all alike


@dataclass(slots=True)
class Recipe:
    """Everything decided for one layer, one rule and one input shape."""

    entries: list[EntryPlan]
    anchors: list[AnchorPlan]
    segments: list[Segment]
    loads: list[Load]
    targets: list[Target]
    input_tier: Tier
    attention_tier: Tier
    store_input: bool
    needs_base: bool  # whether layer input and attention output are asked for, apart from autograd's own use
    away_nbytes: int  # of the entries that do not stay in device memory
    kept_nbytes: int = -1  # of the storages that stay there; counted when first seen


@dataclass(frozen=True, slots=True)
class Situation:
    """What a recipe depends on besides the rule and the signature."""

    tokens: int
    room: Room = "all"
    store_input: bool = True
    input_is_held: bool = False  # by whoever made it (a pipeline's receive buffer): moving it would free nothing
    keep_base: bool = False  # the next layer may ask for this layer's output (sparse residuals)


def make_recipe(signature: Signature, rule: LayerRule, layer: AbstractLayer, situation: Situation) -> Recipe:
    """Decide what a layer stores. Where host memory has no room, what would have gone there is recomputed where it can
    be and otherwise kept in device memory.

    Raises UnsupportedError where a fraction of the tokens is asked for but only all of them can be replayed.
    """
    return _Maker(signature, rule, layer, situation).make()


class _Maker:
    def __init__(self, signature: Signature, rule: LayerRule, layer: AbstractLayer, situation: Situation) -> None:
        self.signature, self.rule, self.layer, self.situation = signature, rule, layer, situation
        self.tokens, self.room = situation.tokens, situation.room

    def make(self) -> Recipe:
        entries = [self._entry(index, spec) for index, spec in enumerate(self.signature.entries)]
        first = min(
            (plan.tokens for plan in entries if not plan.whole and plan.source is not None), default=self.tokens
        )
        anchors = [plan for name in self._usable_anchors() if (plan := self._anchor(name, first)) is not None]
        segments = self._segments(entries, anchors)
        stays = {plan.index for plan in entries if plan.whole and plan.tier == "hbm"}
        shared = [*self._weaves(entries), *self._bundles(entries)]
        recipe = Recipe(
            entries=entries,
            anchors=anchors if segments else [],
            segments=segments,
            loads=[],
            targets=self._targets(entries, stays, shared),
            input_tier=self._base_tier("layer_input"),
            attention_tier=self._base_tier("attention_output"),
            store_input=self.situation.store_input,
            needs_base=bool(segments) or self.situation.keep_base,
            away_nbytes=sum(spec.nbytes for i, spec in enumerate(self.signature.entries) if i not in stays),
        )
        recipe.loads = self._loads(recipe, shared)
        return recipe

    def _weaves(self, entries: list[EntryPlan]) -> Iterator[PiecePlan]:
        """Weaves that are swapped whole, and alike: stored as they lie."""
        specs = self.signature.entries
        for weave in self.signature.weaves:
            is_swapped = all(entries[index].whole and entries[index].tier == "host" for index, _ in weave.members)
            codecs = {self._codec(specs[index]) for index, _ in weave.members}
            if is_swapped and len(codecs) == 1:
                shares = tuple(Share(index, specs[index].packs[0], skip) for index, skip in weave.members)
                first = shares[0]
                yield PiecePlan(
                    "entry", first.entry, first.position, self.tokens, dims=((weave.numel, 1),), codec=codecs.pop(),
                    shares=shares, is_woven=True,
                )  # fmt: skip

    def _bundles(self, entries: list[EntryPlan]) -> Iterator[PiecePlan]:
        """What is small (norm statistics, log-sum-exp, rotary tables) and swapped whole, put together by dtype: a copy
        costs its launch. They stay in memory until the last of them is freed, so they are `_SMALL` of it in all."""
        specs = self.signature.entries
        away = [plan.index for plan in entries if plan.whole and plan.tier == "host"]
        room = _SMALL * sum(specs[index].nbytes for index in away)
        small: dict[torch.dtype, list[int]] = {}
        for index in sorted(away, key=lambda index: specs[index].nbytes):
            spec = specs[index]
            room -= spec.nbytes
            if room < 0:
                break
            if (
                spec.name not in BASE
                and self._codec(spec) != "fp8"
                and spec.dims == ((spec.numel, 1),)
                and spec.nbytes % _VECTOR == 0
            ):
                small.setdefault(spec.dtype, []).append(index)
        for members in small.values():
            if len(members) > 1:
                skips = accumulate((specs[index].numel for index in members), initial=0)
                shares = tuple(
                    Share(index, specs[index].packs[0], skip) for index, skip in zip(members, skips, strict=False)
                )
                yield PiecePlan("entry", members[0], shares[0].position, self.tokens, shares=shares)

    def _targets(self, entries: list[EntryPlan], stays: set[int], shared: list[PiecePlan]) -> list[Target]:
        whole = {plan.index for plan in entries if plan.whole}
        shares = {share.entry: (share, piece.is_woven) for piece in shared for share in piece.shares}
        targets: list[Target] = []
        for pack in self.signature.packs:
            if pack.entry < 0 or pack.entry in stays:
                targets.append((-1, None))
                continue
            if pack.entry in shares:
                share, is_woven = shares[pack.entry]
                assert pack.geometry is not None
                strides = pack.strides if is_woven else pack.geometry.strides
                targets.append((pack.entry, Geometry(tuple(pack.shape), strides, share.skip)))
                continue
            stored = self.signature.packs[self.signature.entries[pack.entry].packs[0]]
            comes_as_stored = pack.entry in whole and self._is_dense(pack.entry) and pack.geometry == stored.geometry
            targets.append((pack.entry, None if comes_as_stored else pack.geometry))
        return targets

    def _is_dense(self, index: int) -> bool:
        """Whether the entry's first tensor has no gaps and lies in memory as its shape says."""
        return self.signature.packs[self.signature.entries[index].packs[0]].is_contiguous

    def _loads(self, recipe: Recipe, shared: list[PiecePlan]) -> list[Load]:
        """What is stored where. The base travels apart where the next layer may ask for it alone."""
        host_base, host_rest, resident = Load("host", True, []), Load("host", False, []), Load("hbm", False, [])
        host_rest.pieces += shared
        done = {share.entry for piece in shared for share in piece.shares}
        for plan in recipe.entries:
            if plan.tokens == 0 or (plan.whole and plan.tier == "hbm") or plan.index in done:
                continue
            piece = self._piece(plan)
            apart = plan.name in BASE and self.situation.keep_base
            (resident if plan.tier == "hbm" else host_base if apart else host_rest).pieces.append(piece)
        for index, anchor in enumerate(recipe.anchors):
            codec = self.rule.fates[anchor.name].codec
            piece = PiecePlan("anchor", index, -1, anchor.tokens, anchor.axis, codec=codec, start=anchor.start)
            (resident if anchor.tier == "hbm" else host_rest).pieces.append(piece)
        self._add_base(recipe, host_base if self.situation.keep_base else host_rest)
        loads = [load for load in (host_base, host_rest, resident) if load.pieces]
        for load in loads:
            load.names = [_name(piece, recipe) for piece in load.pieces]
        return loads

    def _piece(self, plan: EntryPlan) -> PiecePlan:
        spec = self.signature.entries[plan.index]
        position = spec.packs[0]
        codec = self._codec(spec)
        if plan.whole:
            dims = None if self._is_dense(plan.index) else spec.dims
            return PiecePlan("entry", plan.index, position, plan.tokens, dims=dims, codec=codec)
        assert plan.source is not None
        if plan.source.geometry == self.signature.packs[position].geometry:
            return PiecePlan("entry", plan.index, position, plan.tokens, plan.axis, codec=codec)
        geometry = plan.source.geometry
        return PiecePlan("entry", plan.index, position, plan.tokens, plan.axis, geometry, spec.dims, codec=codec)

    def _codec(self, spec: EntrySpec) -> Codec | None:
        """How the entry travels to host memory. As it is: statistics, with a number or two for each token; what is in
        another format than activations are, such as codes and scales; and what experts are given, which decides whom a
        token is sent to."""
        shape = self.signature.packs[spec.packs[0]].shape
        is_little = spec.name not in BASE and (len(shape) < 2 or shape[-1] < _LEAST_WIDTH)
        if is_little or spec.dtype is not self.signature.dtype or is_inside(spec.name, self.layer.experts):
            return None
        return self._fate(spec).codec

    def _add_base(self, recipe: Recipe, load: Load) -> None:
        """The base is wanted by replays even where autograd saves none of it."""
        saved = {plan.name for plan in recipe.entries}
        if not recipe.needs_base:
            return
        fates = self.rule.fates
        if recipe.input_tier == "host" and recipe.store_input and "layer_input" not in saved:
            load.pieces.append(PiecePlan("layer_input", 0, -1, self.tokens, codec=fates["layer_input"].codec))
        if recipe.attention_tier == "host" and "attention_output" not in saved and self.layer.attention is not None:
            codec = fates["attention_output"].codec
            load.pieces.append(PiecePlan("attention_output", 0, -1, self.tokens, codec=codec))

    def _base_tier(self, name: str) -> Tier:
        if self.room == "none" or (name == "layer_input" and self.situation.input_is_held):
            return "hbm"
        return self.rule.fates[name].tier

    def _tier(self, fate: Fate) -> Tier:
        return fate.tier if self.room == "all" else "hbm"

    def _stored(self, fate: Fate) -> int:
        """How many tokens of something with this fate are stored."""
        if fate.tier == "host" and self.room != "all":
            return 0
        if fate.is_partial and self.signature.too_short:
            return self.tokens
        if fate.is_partial and self.signature.whole_only:
            raise UnsupportedError(
                f"layer {self.layer.number}: a fraction of {fate.fraction:g} is not possible, use 0 or 1: "
                f"{self.signature.whole_only}"
            )
        return fate.num_tokens(self.tokens)

    def _usable_anchors(self) -> list[str]:
        """Anchors that can be left out of a replay: nothing is saved inside them that only running them brings."""
        usable = []
        for name, anchor in self.signature.anchors.items():
            inside = [
                entry
                for entry in self.signature.entries
                if entry.sources
                and all(source.pack is not None and is_inside(source.pack[0], anchor.path) for source in entry.sources)
            ]
            if not inside:
                usable.append(name)
        return usable

    def _anchor(self, name: str, first: int) -> AnchorPlan | None:
        """The anchor's plan; `first` is the first token that is replayed, and so the first that asks for anchors."""
        spec, fate = self.signature.anchors[name], self.rule.fates[name]
        stored = self._stored(fate)
        return AnchorPlan(name, spec.path, first, stored, self._tier(fate), spec.axis) if stored > first else None

    def _entry(self, index: int, spec: EntrySpec) -> EntryPlan:
        if spec.name == "layer_input" and not self.situation.store_input:
            return EntryPlan(index, spec.name, 0, False, "hbm", None, None)
        if spec.name in BASE:
            return EntryPlan(index, spec.name, self.tokens, True, self._base_tier(spec.name), None, None)
        fate = self._fate(spec)
        if not spec.sources:  # cannot be rebuilt, so it goes with the base
            tier = fate.tier if fate.fraction else self.rule.fates["attention_output"].tier
            return EntryPlan(index, spec.name, self.tokens, True, tier if self.room != "none" else "hbm", None, None)
        stored = self._stored(fate)
        source = spec.sources[0]
        if source.axis is None and stored < self.tokens:
            stored = 0
        return EntryPlan(index, spec.name, stored, stored == self.tokens, self._tier(fate), source.axis, source)

    def _fate(self, spec: EntrySpec) -> Fate:
        """Attention's own scratch (log-sum-exp) goes where its output goes: it cannot be rebuilt without attention."""
        if not spec.sources and is_inside(spec.name, self.layer.attention):
            return replace(self.rule.fates["attention_output"], codec=None)
        return self.rule.fate_of(spec.name)

    def _segments(self, entries: list[EntryPlan], anchors: list[AnchorPlan]) -> list[Segment]:
        missing = [entry for entry in entries if not entry.whole and entry.source is not None]
        if not missing:
            return []
        first = min(entry.tokens for entry in missing)
        cuts = {entry.tokens for entry in missing} | {anchor.tokens for anchor in anchors} | {self.tokens}
        if self.signature.whole_only:
            cuts = {self.tokens}
        stops = sorted(cut for cut in cuts if cut > first)
        segments = []
        for start, stop in zip([first, *stops[:-1]], stops, strict=True):
            wanted = [entry for entry in missing if entry.tokens <= start]
            answered = tuple(anchor for anchor in anchors if anchor.tokens >= stop)
            segments.append(self._segment(start, stop, answered, wanted, first))
        return segments

    def _segment(
        self, start: int, stop: int, answered: tuple[AnchorPlan, ...], wanted: list[EntryPlan], first: int
    ) -> Segment:
        segment = Segment(start, stop, answered)
        skipped = [anchor.path for anchor in answered]
        for plan in wanted:
            sources = self.signature.entries[plan.index].sources
            if all(source.axis is None for source in sources) and start != first and not self.signature.whole_only:
                continue  # the same whatever the tokens: the first replay brings it
            segment.wanted.add(plan.index)
            for source in sources:
                if source.pack is None:
                    segment.on_input.setdefault(source.part, []).append((plan.index, source))
                elif not any(is_inside(source.pack[0], path) for path in skipped):
                    segment.on_pack.setdefault(source.pack, []).append((plan.index, source))
        return segment


def _name(piece: PiecePlan, recipe: Recipe) -> str:
    """What a user would call the piece: as in the options, or by the module."""
    if piece.kind == "anchor":
        return f"the output of {recipe.anchors[piece.index].path}"
    name = recipe.entries[piece.index].name if piece.kind == "entry" else piece.kind
    return name if name in BASE else f"a tensor that {name} saved"
