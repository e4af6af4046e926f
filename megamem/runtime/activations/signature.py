"""What a layer saves, learned by looking: once a layer, in the first step.

Which saved tensor can be rebuilt, from what, and which of its dimensions counts tokens is not written down anywhere.
Shapes alone mislead (a batch of 4 flattened looks like 4 tensor-parallel ranks gathered), so we try: after the layer's
first forward its call is replayed on a few tokens, attention answered from what it returned, and every tensor that the
replay saves is compared with the tokens of what was really saved. What comes back equal is *replayable*; the rest
(log-sum-exp, routing maps, an expert's tensors) is only ever stored whole. The comparison is at the same time the
check that a replay is faithful: a layer whose replay differs is refused before the first gradient is computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from megamem.errors import UnsupportedError
from megamem.ir.activation import BASE, SAVED
from megamem.runtime.activations.capture import Capture, Handle
from megamem.runtime.activations.geometry import Geometry, Region, TokenAxis, region_of, token_axes
from megamem.runtime.activations.layer import AbstractLayer, Args, Kwargs, tensors_of
from megamem.runtime.activations.replay import PackKey, Replay

_PROBE_TOKENS = 16

# A GEMM on a few tokens may take another kernel than on many, so equality is up to rounding; candidates that are
# really wrong differ by their whole magnitude. What the layer makes of its input is no more exact than the input, in
# whatever type it is; an 8-bit code may be the next one besides.
_TOLERANCE = {
    torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2,
    torch.float8_e4m3fn: 0.1, torch.float8_e5m2: 0.2, torch.int8: 5e-2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """One way to get an entry from a replay: the tensor packed under `pack`, or input `index` of the part `part`."""

    geometry: Geometry  # how the tensor lies on the entry's compact memory
    axis: TokenAxis | None  # None: the same whatever the tokens
    pack: PackKey | None = None
    part: str = ""
    index: int = 0


@dataclass(slots=True)
class EntrySpec:
    """One distinct piece of memory that the layer saves."""

    name: str  # a key for `LayerRule.fate_of`: a name of ir.activation.TENSORS or a module path
    packs: list[int]  # positions in the capture's list; the first one stands for all
    numel: int
    dtype: torch.dtype
    sources: list[Source] = field(default_factory=list)
    dims: tuple[tuple[int, int], ...] = ()  # of its region

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(slots=True)
class PackSpec:
    """What the n-th call of the pack hook is expected to bring."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    entry: int  # -1: kept as it is
    geometry: Geometry | None
    is_contiguous: bool


@dataclass(slots=True)
class AnchorSpec:
    """A module output that can be answered from the store."""

    path: str
    axis: TokenAxis


@dataclass(frozen=True, slots=True)
class Weave:
    """Entries that fill one stretch of memory between them, as query, key and value fill what their linear layer made.

    Stored together they are one contiguous copy, where each of them alone would have to be gathered first.
    """

    members: tuple[tuple[int, int], ...]  # (entry, where it begins, in elements), the first one at 0
    numel: int


@dataclass(slots=True)
class Signature:
    """Everything learned about one layer for one shape of its input."""

    packs: list[PackSpec]
    entries: list[EntrySpec]
    # (call of the pack hook, another, bytes from the one's memory to the other's): the same memory, or a weave's
    distances: list[tuple[int, int, int]] = field(default_factory=list)
    weaves: list[Weave] = field(default_factory=list)
    anchors: dict[str, AnchorSpec] = field(default_factory=dict)
    attention: TokenAxis | None = None
    whole_only: str | None = None  # why a part of the tokens cannot be replayed
    recipes: dict[tuple[str, bool, bool], Any] = field(default_factory=dict)  # what was made of it, by situation
    too_short: bool = False  # so few tokens that a part of them tells nothing of the rest
    dtype: torch.dtype = torch.float32  # of the layer's input
    _expected: Any = None

    def matches(self, handles: list[Handle]) -> bool:
        """Whether a later forward saved the same tensors in the same order, aliased in the same way.

        What is kept as it is may be another tensor each time.
        """
        if len(handles) != len(self.packs):
            return False
        if self._expected is None:
            watched = [i for i, pack in enumerate(self.packs) if pack.entry >= 0]
            packs = [self.packs[i] for i in watched]
            self._expected = watched, [p.shape for p in packs], [p.strides for p in packs], [p.dtype for p in packs]
        watched, shapes, strides, dtypes = self._expected
        all_tensors: list[Any] = [handle.tensor for handle in handles]
        tensors = [all_tensors[i] for i in watched]
        return (
            [tensor.shape for tensor in tensors] == shapes
            and [tensor.stride() for tensor in tensors] == strides
            and [tensor.dtype for tensor in tensors] == dtypes
            and all(
                all_tensors[other].data_ptr() - all_tensors[one].data_ptr() == nbytes
                for one, other, nbytes in self.distances
            )
        )


def survey(
    capture: Capture, fixed: list[Handle], hidden: Tensor, args: Args, kwargs: Kwargs
) -> tuple[Signature, dict[int, Region]]:
    """Group the calls of the pack hook by the memory they cover, and name the groups.

    What the layer was given besides its input (an attention mask) stays where it is: it is the trainer's, and all
    layers hold the same. Returns the signature, without sources yet, and each entry's region.
    """
    layer = capture.layer
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(args, kwargs)}
    parameters = layer.parameter_storages() | (given - {hidden.untyped_storage().data_ptr()})
    attention_output = capture.output(layer.attention)
    names: dict[Region | None, str] = {}
    if attention_output is not None and not layer.must_stay(attention_output):
        names[region_of(attention_output)] = "attention_output"
    names[region_of(hidden)] = "layer_input"
    by_region: dict[Region, int] = {}
    signature = Signature(packs=[], entries=[], dtype=hidden.dtype)
    for position, handle in enumerate(fixed):
        tensor = handle.tensor
        assert tensor is not None
        region = None if layer.must_stay(tensor) else own_region(tensor, parameters)
        spec = PackSpec(tensor.shape, tensor.stride(), tensor.dtype, -1, None, tensor.is_contiguous())
        if region is not None:
            index = by_region.get(region)
            if index is None:
                index = by_region[region] = len(signature.entries)
                name = names.get(region) or layer.saver(handle.path) or SAVED
                signature.entries.append(EntrySpec(name, [], region.numel, region.dtype, dims=region.dims))
            packs = signature.entries[index].packs
            packs.append(position)
            if len(packs) > 1:
                signature.distances.append((packs[0], position, 0))
            spec.entry, spec.geometry = index, Geometry.of(tensor, region)
        signature.packs.append(spec)
    regions = {index: region for region, index in by_region.items()}
    _find_weaves(signature, regions)
    return signature, regions


def _find_weaves(signature: Signature, regions: dict[int, Region]) -> None:
    """Entries of one storage whose rows, side by side, fill its rows."""
    groups: dict[tuple[int, torch.dtype, tuple[int, int]], list[int]] = {}
    for index, region in regions.items():
        if len(region.dims) == 2 and region.dims[1][1] == 1 and signature.entries[index].name not in BASE:
            groups.setdefault((region.storage, region.dtype, region.dims[0]), []).append(index)
    for (_, dtype, (rows, stride)), group in groups.items():
        group.sort(key=lambda index: regions[index].offset)
        start = stop = regions[group[0]].offset
        for index in group:
            if regions[index].offset != stop:
                break
            stop += regions[index].dims[1][0]
        if stop - start != stride:
            continue
        members = tuple((index, regions[index].offset - start) for index in group)
        signature.weaves.append(Weave(members, rows * stride))
        first = signature.entries[group[0]].packs[0]
        for index, skip in members[1:]:
            signature.distances.append((first, signature.entries[index].packs[0], skip * dtype.itemsize))


def own_region(tensor: Tensor, parameters: frozenset[int]) -> Region | None:
    """The region of a tensor that may be moved; None for parameters, for storage that the trainer emptied, for views
    that cannot be compacted, and for single numbers, which are not worth a copy."""
    storage = tensor.untyped_storage()
    if tensor.numel() <= 1 or storage.nbytes() == 0 or storage.data_ptr() in parameters:
        return None
    return region_of(tensor)


class _Learner:
    """Compares one replay of a few tokens with what the layer really saved."""

    def __init__(
        self,
        capture: Capture,
        fixed: list[Handle],
        hidden: Tensor,
        regions: dict[int, Region],
        signature: Signature,
        whole_only: str | None,
    ) -> None:
        self.capture, self.layer, self.fixed, self.hidden = capture, capture.layer, fixed, hidden
        self.regions, self.signature = regions, signature
        self.tokens = hidden.shape[0]
        signature.whole_only = whole_only
        self.start = 0 if whole_only else self.tokens // 2
        self.stop = self.tokens if whole_only else min(self.tokens, self.start + _PROBE_TOKENS)
        self.keys = _keys(fixed)
        self._pairs: list[tuple[str, int, Tensor, Tensor, Region | None]] | None = None

    def learn(self, args: Args, kwargs: Kwargs, call: object) -> None:
        """Fill in sources and anchors. Raises UnsupportedError where the replay does not reproduce the layer."""
        replay = self._replay(args, kwargs, call)
        for index, entry in enumerate(self.signature.entries):
            if entry.name in BASE:
                continue
            entry.sources.extend(self._sources(index, entry, replay))
        for name, path in self.layer.anchors.items():
            axis = self._anchor_axis(path, replay)
            if axis is not None:
                self.signature.anchors[name] = AnchorSpec(path, axis)

    def _replay(self, args: Args, kwargs: Kwargs, call: object) -> Replay:
        layer, capture = self.layer, self.capture
        attention = capture.output(layer.attention)
        answers: dict[str, object] = {}
        if layer.attention is not None and attention is not None:
            axis = attention_axis(attention, self.tokens, layer.token_blocks)
            self.signature.attention = axis
            taken = axis.take(attention.detach(), self.start, self.stop)
            answers[layer.attention] = Replay.answer(capture.io[layer.attention].result, taken, attention.requires_grad)
        replay = Replay(layer, answers=answers, stop_before=layer.experts, collect_all=True)
        replay.run(call, args, kwargs, self.hidden, self.start, self.stop, capture.random_states)
        return replay

    def _sources(self, index: int, entry: EntrySpec, replay: Replay) -> Iterable[Source]:
        """Every way in which the replay brings the entry's tokens, the cheapest (a part's input) last."""
        for position in entry.packs:
            got = replay.packed.get(self.keys[position])
            if got is not None:
                full = self.fixed[position].tensor
                assert full is not None
                source = self._compare(full, got, self.regions[index], pack=self.keys[position])
                if source is not None:
                    yield source
                    break
        for path, number, tensor, got, region in self._inputs(replay):
            if tensor.dtype == entry.dtype and tensor.numel() == entry.numel:
                source = self._input_source(index, tensor, got, path, number, region)
                if source is not None:
                    yield source

    def _inputs(self, replay: Replay) -> list[tuple[str, int, Tensor, Tensor, Region | None]]:
        """(part, which of its inputs, in the forward, in the replay, region) of all inputs that both have."""
        if self._pairs is None:
            self._pairs = [
                (path, number, tensor, got, region_of(tensor))
                for path, io in self.capture.io.items()
                for number, (tensor, got) in enumerate(zip(io.inputs, replay.inputs.get(path, []), strict=False))
            ]
        return self._pairs

    def _input_source(
        self, index: int, tensor: Tensor, got: Tensor, path: str, number: int, region: Region | None
    ) -> Source | None:
        """The entry as input `number` of a part: the same memory, or a copy of it in another order of dimensions."""
        if region is not None and region == self.regions[index]:
            return self._compare(tensor, got, region, part=path, index=number)
        if path != self.layer.attention or region is None:
            return None  # copies are looked for where they are known to happen: in the attention kernel's layout
        position = self.signature.entries[index].packs[0]
        saved = self.fixed[position].tensor
        assert saved is not None
        geometry = self.signature.packs[position].geometry
        assert geometry is not None
        for order in permutations(range(tensor.dim())):
            permuted = tensor.permute(order)
            if permuted.shape == saved.shape and torch.equal(permuted, saved):
                inverse = tuple(order.index(i) for i in range(len(order)))
                found = self._compare(tensor, got, region, part=path, index=number)
                return Source(geometry.permuted(inverse), found.axis, part=path, index=number) if found else None
        return None

    def _compare(
        self, full: Tensor, got: Tensor, region: Region, *, pack: PackKey | None = None, part: str = "", index: int = 0
    ) -> Source | None:
        """A source, if `got` holds the probe's tokens of `full`."""
        geometry = Geometry.of(full, region)
        if full.dtype != got.dtype:
            return None
        if full.shape == got.shape:
            if not self._close(full, got):
                return None
            # A probe of all tokens (dropout) tells nothing of the axis: then only whole replays are allowed.
            return Source(geometry, None, pack, part, index)
        axis = self._axis(full, got)
        return Source(geometry, axis, pack, part, index) if axis else None

    def _axis(self, full: Tensor, got: Tensor) -> TokenAxis | None:
        taken = self.stop - self.start
        axes = token_axes(tuple(full.shape), tuple(got.shape), self.tokens, taken, self.layer.token_blocks)
        return next((axis for axis in axes if self._close(axis.take(full, self.start, self.stop), got)), None)

    def _close(self, one: Tensor, other: Tensor) -> bool:
        tolerance = _TOLERANCE.get(one.dtype)
        if tolerance is None:
            return torch.equal(one, other)
        tolerance = max(tolerance, _TOLERANCE.get(self.hidden.dtype, 0.0))
        one, other = one.detach().float(), other.detach().float()
        scale = one.abs().amax().clamp_min(1e-30)
        return bool(((one - other).abs().amax() <= tolerance * scale) | torch.equal(one, other))

    def _anchor_axis(self, path: str, replay: Replay) -> TokenAxis | None:
        full, got = self.capture.output(path), replay.outputs.get(path)
        if full is None or got is None:
            return None
        if full.shape == got.shape:
            return TokenAxis(0, 1, full.shape[0] // self.tokens)
        return self._axis(full, got)


def learn(capture: Capture, fixed: list[Handle], hidden: Tensor, args: Args, kwargs: Kwargs, call: object) -> Signature:
    """Survey a captured forward and find out, by a replay of a few tokens, what can be rebuilt.

    A layer that numbers its tokens itself (MLA makes its rotary angles inside) fails on a part of them; such a layer
    is replayed on all tokens or not at all.
    """
    is_too_short = hidden.shape[0] <= 2
    why = capture.layer.only_whole(args, kwargs) or ("there are too few tokens to tell" if is_too_short else None)
    signature = Signature([], [])
    for whole_only in [why] if why else [None, "it gives other values on a part of its tokens"]:
        signature, regions = survey(capture, fixed, hidden, args, kwargs)
        signature.too_short = is_too_short
        _Learner(capture, fixed, hidden, regions, signature, whole_only).learn(args, kwargs, call)
        if not lost(signature, capture.layer):
            break
    return signature


def lost(signature: Signature, layer: AbstractLayer) -> list[str]:
    """Token-wise tensors that no replay brings; attention's own and the base are stored whole anyway."""
    return [
        f"{entry.name} {list(signature.packs[entry.packs[0]].shape)}"
        for entry in signature.entries
        if not entry.sources and entry.name not in BASE and not is_inside(entry.name, layer.attention)
    ]


def check_replayable(signature: Signature, layer: AbstractLayer) -> None:
    """Refuse a layer some of whose tensors the replay does not reproduce. Raises UnsupportedError with their places."""
    missing = lost(signature, layer)
    if missing:
        raise UnsupportedError(
            f"layer {layer.number}: running it again does not give back what it saved at {', '.join(missing)}. "
            "A layer that is not token-wise outside attention can be swapped (activations.policy: memo with "
            "swap_fraction: 1) but not recomputed; set activations.verify: false to store these tensors whole instead"
        )


def is_inside(path: str, part: str | None) -> bool:
    """Whether `path` is the part or lies within it."""
    return part is not None and (path == part or path.startswith(part + "."))


def attention_axis(output: Tensor, tokens: int, blocks: int) -> TokenAxis:
    """Core attention returns [tokens of all blocks, b, q]; packed sequences fold the batch into the tokens."""
    return TokenAxis(0, blocks, output.shape[0] // (tokens * blocks))


def _keys(handles: list[Handle]) -> list[PackKey]:
    """Name each call of the pack hook by the part that ran and its ordinal there: the same in every replay."""
    seen: dict[str, int] = {}
    keys = []
    for handle in handles:
        ordinal = seen.get(handle.path, 0)
        seen[handle.path] = ordinal + 1
        keys.append((handle.path, ordinal))
    return keys
