"""Device memory that a rank's layers hold for their backward passes, action by action: the engine's own bookkeeping.

`megamem.runtime.activations` counts what it keeps, what waits for a copy to end, and what has come back
(`ActivationEngine.held_bytes`); here the same events are gone through without tensors, so that a plan says what a run
will measure. The rules that decide the moments, each with its place in the runtime:

    a layer's forward    lets go of the sources of all parcels but the newest, then stores its own   (engine.forward)
    a backward begins    asks for the next layer's parcel, then lets go of sources                   (engine.on_begin)
    it is back           holds everything that was away, until autograd frees it                     (engine.on_back)
    fetching too early   a parcel whose sources are still there comes back without a copy            (Courier.fetch)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from megamem.ir.activation import BASE, EXPERTS, Fate, LayerRule
from megamem.ir.schedule import Action
from megamem.ir.tiles import spans
from megamem.planner.memory.inventory import Anchor, Saved, storage_bytes
from megamem.planner.memory.parcels import Cargo, Courier

_ATTENTION = "self_attention.core_attention"


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """One layer of one microbatch.

    kept:       stays in device memory until the backward pass
    base, rest: travel to host memory, in one parcel or in two (`base` apart where the next layer may ask for it); what
                is compressed on the way counts as its codes, here and in `tiles`
    experts:    of the experts, in a parcel of their own
    tiles:      of an MLP in tiles, in a parcel for each, in order
    back:       what was away, once it is all back for the backward pass
    routed:     of the experts, where they stay; a meter does not count it
    again:      of experts, or of what Megatron's selective recomputation names, where a checkpoint inside the layer
                makes it again: there in the backward pass alone; not counted either
    weight_gradients:  what W still needs after B
    stores_input:      False where the input is rebuilt from the layer before
    begins:     its input is no layer's output: a layer of multi-token prediction
    packed:     read and written to compress what travels, and again when it is back
    """

    kept: int
    base: int = 0
    rest: int = 0
    experts: int = 0
    tiles: tuple[int, ...] = ()
    back: int = 0
    routed: int = 0
    again: int = 0
    weight_gradients: int = 0
    stores_input: bool = True
    begins: bool = False
    packed: int = 0

    @property
    def host(self) -> int:
        """Bytes in host memory while the layer waits."""
        return self.base + self.rest + self.experts + sum(self.tiles)


def untouched_bytes(tensors: Iterable[Saved]) -> LayerBytes:
    """A layer left to autograd: everything stays. Experts are in `kept`: whoever counts storages finds them there."""
    return LayerBytes(kept=storage_bytes(tensors))


def layer_bytes(
    tensors: Sequence[Saved],
    anchors: Iterable[Anchor],
    rule: LayerRule,
    *,
    tokens: int,
    input_is_held: bool = False,
    base_apart: bool = False,
    stores_input: bool = True,
    num_tiles: int = 0,
) -> LayerBytes:
    """What becomes of a layer's tensors under a rule (`runtime.activations.recipe` is what this has to agree with).

    tokens:         of the sequence on this rank, dimension 0 of the layer's input; fractions are of these
    input_is_held:  the layer's input is a receive buffer of the pipeline, which stays whatever the rule says
    base_apart:     some layer of the model rebuilds its input from the layer before
    num_tiles:      in which the MLP runs
    """
    if rule.untouched:
        return untouched_bytes(tensors)
    kept: list[Saved] = []
    clones = base = rest = back = packed = 0
    misses = False
    first = tokens  # the first token that is replayed, and so the first of which anchors are stored
    for tensor in (one for one in tensors if not (one.routed or one.tiled or one.on_demand)):
        fate = _fate(tensor, rule)
        if tensor.name == "layer_input" and not stores_input:
            back += tensor.nbytes
            continue
        held = tensor.name == "layer_input" and input_is_held
        stored = tokens if not tensor.rebuilt else fate.num_tokens(tokens)
        if stored == tokens and (fate.tier == "hbm" or held):
            kept.append(tensor)
            continue
        misses = misses or stored < tokens
        first = min(first, stored)
        back += tensor.nbytes
        nbytes, touched = _stored(tensor, fate, stored, tokens)
        packed += touched
        if fate.tier == "hbm":
            clones += nbytes
        elif base_apart and tensor.name in BASE:
            base += nbytes
        else:
            rest += nbytes
    for tensor in tensors:
        if tensor.on_demand and stores_input and (misses or base_apart):
            stays = rule.fates[tensor.name].tier == "hbm" or input_is_held
            nbytes, touched = (tensor.nbytes, 0) if stays else _stored(tensor, rule.fates[tensor.name], tokens, tokens)
            packed += touched
            clones, base, rest = (
                clones + nbytes * stays,
                base + nbytes * (base_apart and not stays),
                rest + nbytes * (not base_apart and not stays),
            )
    in_tiles, tiles, of_tiles = _tiles(tensors, rule, tokens, num_tiles)
    for anchor in anchors if misses else ():
        if num_tiles and anchor.name == "fc1":
            continue  # no replay looks into the MLP
        fate = rule.fates[anchor.name]
        nbytes, touched = _stored(anchor, fate, max(0, fate.num_tokens(tokens) - first), tokens)
        packed += touched
        clones, rest = (clones + nbytes, rest) if fate.tier == "hbm" else (clones, rest + nbytes)
    experts = sum(tensor.nbytes for tensor in tensors if tensor.routed)
    goes = rule.fates[EXPERTS].tier == "host" and rule.fates[EXPERTS].fraction > 0
    return LayerBytes(
        kept=storage_bytes(kept) + clones + in_tiles,
        base=base,
        rest=rest,
        tiles=tiles,
        experts=experts if goes else 0,
        back=back + (experts if goes else 0),
        routed=0 if goes else storage_bytes(tensor for tensor in tensors if tensor.routed),
        stores_input=stores_input,
        packed=packed + of_tiles,
    )


def _stored(tensor: Saved | Anchor, fate: Fate, stored: int, tokens: int) -> tuple[int, int]:
    """Of `stored` tokens the bytes as they are stored, and those that a codec reads and writes for it."""
    nbytes = tensor.nbytes * stored // tokens
    if fate.codec != "fp8" or not tensor.coded:
        return nbytes, 0
    codes = tensor.coded * stored // tokens
    return codes, nbytes + codes


def _tiles(tensors: Sequence[Saved], rule: LayerRule, tokens: int, num_tiles: int) -> tuple[int, tuple[int, ...], int]:
    """What tiles of the MLP keep in device memory, the parcels that they send to host memory, and what is packed.

    The same numbers have two names in a rule; the larger share counts (`runtime.activations.shelf`).
    """
    nbytes = sum(tensor.nbytes for tensor in tensors if tensor.tiled)
    if not nbytes:
        return 0, (), 0
    fate = fate_of_tiles(rule)
    stored = fate.num_tokens(tokens)
    if fate.tier == "hbm":
        return nbytes * stored // tokens, (), 0
    is_coded = fate.codec == "fp8"
    sent = sum(tensor.coded for tensor in tensors if tensor.tiled) if is_coded else nbytes
    cuts = [(start, stop) for start, stop in spans(tokens, num_tiles, stored) if stop <= stored]
    parcels = tuple(sent * (stop - start) // tokens for start, stop in cuts)
    return 0, parcels, (nbytes * stored // tokens + sum(parcels)) if is_coded else 0


def fate_of_tiles(rule: LayerRule) -> Fate:
    """What becomes of the output of fc1 of an MLP in tiles, under a rule that touches the layer."""
    return max((rule.fates["fc1"], rule.fate_of("mlp")), key=lambda fate: (fate.fraction, fate.tier == "hbm"))


def _fate(tensor: Saved, rule: LayerRule) -> Fate:
    """The tensor's fate; what cannot be rebuilt goes where attention's output goes."""
    if tensor.name in BASE:
        return rule.fates[tensor.name]
    fate = rule.fate_of(tensor.name)
    if tensor.rebuilt:
        return fate
    is_scratch = tensor.name == _ATTENTION or not fate.fraction
    return replace(rule.fates["attention_output"], codec=None) if is_scratch else fate


@dataclass(slots=True)
class _Run:
    """One layer in one microbatch, between its forward and its backward pass.

    segment:  layers that follow on each other have the same (`runtime.activations.order`)
    """

    layer: LayerBytes
    previous: _Run | None
    base: Cargo | None = None
    rest: Cargo | None = None
    experts: Cargo | None = None
    tiles: list[Cargo] = field(default_factory=list)
    kept: int = 0
    segment: int = 0
    has_begun: bool = False

    @property
    def has_parcels(self) -> bool:
        """Whether there is something to fetch."""
        return self.base is not None or self.rest is not None or self.experts is not None or bool(self.tiles)

    @property
    def all_parcels(self) -> list[Cargo]:
        """What is to be fetched."""
        return [cargo for cargo in (*self.tiles, self.base, self.rest, self.experts) if cargo is not None]

    @property
    def parcels(self) -> list[Cargo]:
        """Those that are fetched first: of an MLP in tiles the last one's."""
        return [cargo for cargo in (self.base, self.rest, *self.tiles[-1:]) if cargo is not None]


class Moment(NamedTuple):
    """What layers hold at one moment, by kind (`ir.plan.MEMORY_KINDS`)."""

    kept: int = 0
    at_work: int = 0
    staging: int = 0
    weight_gradients: int = 0

    @property
    def total(self) -> int:
        """All of it: what a meter shows, and what experts keep."""
        return self.kept + self.at_work + self.staging + self.weight_gradients


@dataclass(slots=True)
class Book:
    """What became of a rank's actions.

    peak:    the moment of most memory
    metered: what `Handle.meter` shows of it: it looks at waiting weight gradients between two actions only
    host:    the most bytes in host memory
    during:  per action, the moment of it at which most was held
    after:   per action, what was held when it had ended
    to_host, from_host:  bytes that were copied
    """

    peak: Moment = field(default_factory=Moment)
    metered: int = 0
    host: int = 0
    during: list[Moment] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    to_host: int = 0
    from_host: int = 0


class Ledger:
    """Goes through one rank's actions.

    chunks:  the layers of each chunk, in order
    spared:  how they are in microbatches that a schedule does not offload; None where it offloads nothing
    ends:    what W needs of each chunk besides its layers: of the output layer
    base_apart:  some layer of the model rebuilds its input from the layer before
    """

    def __init__(
        self,
        chunks: Sequence[Sequence[LayerBytes]],
        spared: Sequence[Sequence[LayerBytes]] | None = None,
        ends: Sequence[int] = (),
        *,
        base_apart: bool = False,
    ) -> None:
        self._chunks, self._spared = chunks, spared
        self._ends = ends or [0] * len(chunks)
        self.courier, self.expert_courier = Courier(), Courier()
        self._base_apart = base_apart
        self.runs: dict[tuple[int, int], list[_Run]] = {}
        self.expected: list[tuple[int, int, int]] = []
        self.retained = self.routed = self.waiting = self.host = 0
        self.most, self.most_total, self.metered = Moment(), 0, 0
        self.is_storing_over = False
        self.book = Book()

    def run(self, actions: Sequence[Action]) -> Book:
        """The book of a step whose order of backward passes is known from the steps before."""
        ends = [sum(layer.begins for layer in chunk[1:]) for chunk in self._chunks]
        self.expected = [
            (a.chunk, a.microbatch, segment)
            for a in actions
            if a.kind in ("B", "BW") and self._chunks[a.chunk]
            for segment in range(ends[a.chunk], -1, -1)
        ]
        leaving = {(a.chunk, a.microbatch) for a in actions if a.kind == "OFFLOAD"}
        for action in actions:
            self.most, self.most_total = self.now(), self.held()
            self.do(action, leaving)
            total = self.held()
            self.metered = max(self.metered, total - self.routed)
            self.book.during.append(self.most if self.most_total >= total else self.now())
            self.book.after.append(total)
        self.book.peak = max(self.book.during, key=_total, default=Moment())
        self.book.metered = self.metered
        self.book.from_host = self.courier.returned + self.expert_courier.returned
        return self.book

    def do(self, action: Action, leaving: Collection[tuple[int, int]] = ()) -> None:
        """Go through one action; `leaving` are the microbatches, with their chunks, that the schedule offloads."""
        key = action.chunk, action.microbatch
        if action.kind == "F":
            spares = self._spared is not None and key not in leaving
            layers = (self._spared if spares else self._chunks)[action.chunk]  # type: ignore[index]
            self.runs[key] = []
            for layer in layers:
                self._forward(key, layer)
        elif action.kind in ("B", "BW"):
            self._backward(key, splits=action.kind == "B")
        elif action.kind == "W":
            whole = sum(layer.weight_gradients for layer in self._chunks[action.chunk]) + self._ends[action.chunk]
            self.waiting -= whole * (action.part + 1) // action.parts - whole * action.part // action.parts
        elif action.kind == "RELOAD":
            for run in reversed(self.runs.get(key, [])):
                self._fetch(run)

    def recall(self, key: tuple[int, int], fetched: Collection[int] = ()) -> list[Cargo]:
        """Put in a microbatch whose forward pass is long over; its parcels, of which some are on the way back.

        What it holds is not counted.
        """
        twin = Ledger(self._chunks, base_apart=self._base_apart)
        twin.do(Action("F", *key))
        self.runs[key] = twin.runs[key]
        parcels = self.parcels_of(key)
        for number, cargo in enumerate(parcels):
            cargo.has_sources, cargo.has_buffers = False, number in fetched
        return parcels

    def parcels_of(self, key: tuple[int, int]) -> list[Cargo]:
        """All parcels of a microbatch that is in flight, always in the same order."""
        return [cargo for run in self.runs[key] for cargo in run.all_parcels]

    def _forward(self, key: tuple[int, int], layer: LayerBytes) -> None:
        self._retire()
        self.is_storing_over = False
        runs = self.runs[key]
        before = runs[-1] if runs else None
        segment = 0 if before is None else before.segment + layer.begins
        run = _Run(layer, None if layer.begins else before, kept=layer.kept, segment=segment)
        for nbytes in layer.tiles:
            if (cargo := self.courier.store(nbytes)) is not None:
                run.tiles.append(cargo)
            self.courier.retire(1)
        run.base, run.rest = self.courier.store(layer.base), self.courier.store(layer.rest)
        run.experts = self.expert_courier.store(layer.experts)
        self.host += layer.host
        self.book.host = max(self.book.host, self.host)
        self.book.to_host += layer.host
        self.retained += layer.kept
        self.routed += layer.routed
        runs.append(run)
        self._sample()

    def _backward(self, key: tuple[int, int], *, splits: bool) -> None:
        self.waiting += self._ends[key[0]] if splits else 0
        for run in reversed(self.runs[key]):
            if self.expected and self.expected[0] == (*key, run.segment):
                self.expected.pop(0)
            self._begin(run)
            if run.layer.back:
                self._bring_back(run)
            self._take_tiles(run)
            if splits:
                self.waiting += run.layer.weight_gradients
                self._sample()
        del self.runs[key]

    def _begin(self, run: _Run) -> None:
        run.has_begun = True
        later = self._next_after(run)
        if later is not None:
            self._fetch(later)
        self._sample()
        self._retire(everything=self.is_storing_over)
        self.is_storing_over = True
        if not run.layer.back:
            self._sample(again=run.layer.again)
            self._gone(run)

    def _bring_back(self, run: _Run) -> None:
        for cargo in (run.base, run.rest):
            if cargo is not None:
                self.courier.take(cargo)
        if run.experts is not None:
            self.expert_courier.take(run.experts)
        run.base = run.rest = run.experts = None
        self._rebuild_input(run)
        self._sample(at_work=run.layer.back, again=run.layer.again)
        self._gone(run)

    def _take_tiles(self, run: _Run) -> None:
        """The last one first; while one is worked on the one before it is on its way."""
        while run.tiles:
            self.courier.take(run.tiles.pop())
            for cargo in run.tiles[-1:]:
                self.courier.fetch(cargo)

    def _rebuild_input(self, run: _Run) -> None:
        """Sparse residuals: the base of the layers before is brought back ahead of the rest."""
        while not run.layer.stores_input and run.previous is not None:
            run = run.previous
            if run.base is not None:
                self.courier.take(run.base)
                run.base = None

    def _gone(self, run: _Run) -> None:
        self.retained -= run.kept
        self.routed -= run.layer.routed
        self.host -= run.layer.host
        run.kept = 0

    def _next_after(self, run: _Run) -> _Run | None:
        later = run.previous
        while later is not None and not later.has_parcels:
            later = later.previous
        if later is not None or not self.expected:
            return later
        chunk, microbatch, segment = self.expected[0]
        runs = (one for one in reversed(self.runs.get((chunk, microbatch), ())) if one.segment == segment)
        return next((one for one in runs if one.has_parcels and not one.has_begun), None)

    def _fetch(self, run: _Run) -> None:
        for cargo in run.parcels:
            self.courier.fetch(cargo)
        if run.experts is not None:
            self.expert_courier.fetch(run.experts)
        step: _Run | None = run
        while step is not None and not step.layer.stores_input:
            step = step.previous
            if step is not None and step.base is not None:
                self.courier.fetch(step.base)

    def _retire(self, *, everything: bool = False) -> None:
        self.courier.retire(0 if everything else 2 if self._base_apart else 1)
        self.expert_courier.retire(0 if everything else 1)

    @property
    def _staging(self) -> int:
        return self.courier.staging + self.expert_courier.staging

    def held(self) -> int:
        """Bytes that layers hold now."""
        return self.retained + self.routed + self._staging + self.waiting

    def _sample(self, at_work: int = 0, again: int = 0) -> None:
        """Look at what is held, with `at_work` bytes that are back for a backward pass, and `again` made again."""
        total = self.held() + at_work
        self.metered = max(self.metered, total - self.waiting - self.routed)
        if total + again > self.most_total:
            self.most, self.most_total = self.now(at_work + again), total + again

    def now(self, at_work: int = 0) -> Moment:
        """The same by kind, with `at_work` bytes that are back for a backward pass."""
        kept = self.retained + self.routed
        return Moment(kept=kept, at_work=at_work, staging=self._staging, weight_gradients=self.waiting)


def _total(moment: Moment) -> int:
    return moment.total
