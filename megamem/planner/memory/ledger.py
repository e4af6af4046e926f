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

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megamem.ir.activation import BASE, EXPERTS, Fate, LayerRule
from megamem.ir.schedule import Action
from megamem.ir.tiles import spans
from megamem.planner.memory.inventory import Anchor, Saved, storage_bytes

_ATTENTION = "self_attention.core_attention"


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """One layer of one microbatch.

    kept:       stays in device memory until the backward pass
    base, rest: travel to host memory, in one parcel or in two (`base` apart where the next layer may ask for it)
    experts:    of the experts, in a parcel of their own
    tiles:      of an MLP in tiles, in a parcel for each, in order
    back:       what was away, once it is all back for the backward pass
    routed:     of the experts, where they stay; a meter does not count it
    again:      of the experts, where they are recomputed: there in the backward pass alone; not counted either
    weight_gradients:  what W still needs after B
    stores_input:      False where the input is rebuilt from the layer before
    begins:     its input is no layer's output: a layer of multi-token prediction
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
    clones = base = rest = back = 0
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
        nbytes = tensor.nbytes * stored // tokens
        if fate.tier == "hbm":
            clones += nbytes
        elif base_apart and tensor.name in BASE:
            base += nbytes
        else:
            rest += nbytes
    for tensor in tensors:
        if tensor.on_demand and stores_input and (misses or base_apart):
            stays = rule.fates[tensor.name].tier == "hbm" or input_is_held
            clones, base, rest = (
                clones + tensor.nbytes * stays,
                base + tensor.nbytes * (base_apart and not stays),
                rest + tensor.nbytes * (not base_apart and not stays),
            )
    in_tiles, tiles = _tiles(tensors, rule, tokens, num_tiles)
    for anchor in anchors if misses else ():
        if num_tiles and anchor.name == "fc1":
            continue  # no replay looks into the MLP
        fate = rule.fates[anchor.name]
        nbytes = anchor.nbytes * max(0, fate.num_tokens(tokens) - first) // tokens
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
    )


def _tiles(tensors: Sequence[Saved], rule: LayerRule, tokens: int, num_tiles: int) -> tuple[int, tuple[int, ...]]:
    """What tiles of the MLP keep in device memory, and the parcels that they send to host memory.

    The same numbers have two names in a rule; the larger share counts (`runtime.activations.shelf`).
    """
    nbytes = sum(tensor.nbytes for tensor in tensors if tensor.tiled)
    if not nbytes:
        return 0, ()
    fate = fate_of_tiles(rule)
    stored = fate.num_tokens(tokens)
    if fate.tier == "hbm":
        return nbytes * stored // tokens, ()
    cuts = [(start, stop) for start, stop in spans(tokens, num_tiles, stored) if stop <= stored]
    return 0, tuple(nbytes * (stop - start) // tokens for start, stop in cuts)


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
    return rule.fates["attention_output"] if tensor.name == _ATTENTION or not fate.fraction else fate


@dataclass(slots=True)
class _Cargo:
    """A parcel: in transit while its sources are not let go of; `buffers` once it is on its way back."""

    nbytes: int
    has_sources: bool = True
    has_buffers: bool = False
    is_taken: bool = False


@dataclass(slots=True)
class _Run:
    """One layer in one microbatch, between its forward and its backward pass.

    segment:  layers that follow on each other have the same (`runtime.activations.order`)
    """

    layer: LayerBytes
    previous: _Run | None
    base: _Cargo | None = None
    rest: _Cargo | None = None
    experts: _Cargo | None = None
    tiles: list[_Cargo] = field(default_factory=list)
    kept: int = 0
    segment: int = 0
    has_begun: bool = False

    @property
    def has_parcels(self) -> bool:
        """Whether there is something to fetch."""
        return self.base is not None or self.rest is not None or self.experts is not None or bool(self.tiles)

    @property
    def parcels(self) -> list[_Cargo]:
        """Those that are fetched first: of an MLP in tiles the last one's."""
        return [cargo for cargo in (self.base, self.rest, *self.tiles[-1:]) if cargo is not None]


class _Courier:
    """Sources in transit, the bytes that copies hold, and those that came back by a copy (`parcels.Courier`)."""

    def __init__(self) -> None:
        self.staging = self.returned = 0
        self._transit: deque[_Cargo] = deque()

    def store(self, nbytes: int) -> _Cargo | None:
        if not nbytes:
            return None
        cargo = _Cargo(nbytes)
        self._transit.append(cargo)
        self.staging += nbytes
        return cargo

    def retire(self, keep_in_flight: int) -> None:
        while len(self._transit) > keep_in_flight:
            cargo = self._transit.popleft()
            cargo.has_sources = False
            if not cargo.has_buffers and not cargo.is_taken:
                self.staging -= cargo.nbytes

    def fetch(self, cargo: _Cargo) -> None:
        if cargo.has_buffers or cargo.is_taken:
            return
        cargo.has_buffers = True
        if not cargo.has_sources:
            self.staging += cargo.nbytes
            self.returned += cargo.nbytes

    def take(self, cargo: _Cargo) -> None:
        self.fetch(cargo)
        cargo.has_buffers, cargo.is_taken = False, True
        self.staging -= cargo.nbytes


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
        self._courier, self._expert_courier = _Courier(), _Courier()
        self._base_apart = base_apart
        self._runs: dict[tuple[int, int], list[_Run]] = {}
        self._expected: list[tuple[int, int, int]] = []
        self._retained = self._routed = self._waiting = self._host = 0
        self._most, self._most_total, self._metered = Moment(), 0, 0
        self._is_storing_over = False
        self.book = Book()

    def run(self, actions: Sequence[Action]) -> Book:
        """The book of a step whose order of backward passes is known from the steps before."""
        ends = [sum(layer.begins for layer in chunk) for chunk in self._chunks]
        self._expected = [
            (a.chunk, a.microbatch, segment)
            for a in actions
            if a.kind in ("B", "BW")
            for segment in range(ends[a.chunk], -1, -1)
        ]
        leaving = {(a.chunk, a.microbatch) for a in actions if a.kind == "OFFLOAD"}
        for action in actions:
            self._most, self._most_total = self._now(), self._held()
            self._do(action, leaving)
            total = self._held()
            self._metered = max(self._metered, total - self._routed)
            self.book.during.append(self._most if self._most_total >= total else self._now())
            self.book.after.append(total)
        self.book.peak = max(self.book.during, key=_total, default=Moment())
        self.book.metered = self._metered
        self.book.from_host = self._courier.returned + self._expert_courier.returned
        return self.book

    def _do(self, action: Action, leaving: set[tuple[int, int]]) -> None:
        key = action.chunk, action.microbatch
        if action.kind == "F":
            spares = self._spared is not None and key not in leaving
            layers = (self._spared if spares else self._chunks)[action.chunk]  # type: ignore[index]
            self._runs[key] = []
            for layer in layers:
                self._forward(key, layer)
        elif action.kind in ("B", "BW"):
            self._backward(key, splits=action.kind == "B")
        elif action.kind == "W":
            whole = sum(layer.weight_gradients for layer in self._chunks[action.chunk]) + self._ends[action.chunk]
            self._waiting -= whole * (action.part + 1) // action.parts - whole * action.part // action.parts
        elif action.kind == "RELOAD":
            for run in reversed(self._runs.get(key, [])):
                self._fetch(run)

    def _forward(self, key: tuple[int, int], layer: LayerBytes) -> None:
        self._retire()
        self._is_storing_over = False
        runs = self._runs[key]
        before = runs[-1] if runs else None
        segment = 0 if before is None else before.segment + layer.begins
        run = _Run(layer, None if layer.begins else before, kept=layer.kept, segment=segment)
        for nbytes in layer.tiles:
            if (cargo := self._courier.store(nbytes)) is not None:
                run.tiles.append(cargo)
            self._courier.retire(1)
        run.base, run.rest = self._courier.store(layer.base), self._courier.store(layer.rest)
        run.experts = self._expert_courier.store(layer.experts)
        self._host += layer.host
        self.book.host = max(self.book.host, self._host)
        self.book.to_host += layer.host
        self._retained += layer.kept
        self._routed += layer.routed
        runs.append(run)
        self._sample()

    def _backward(self, key: tuple[int, int], *, splits: bool) -> None:
        self._waiting += self._ends[key[0]] if splits else 0
        for run in reversed(self._runs[key]):
            if self._expected and self._expected[0] == (*key, run.segment):
                self._expected.pop(0)
            self._begin(run)
            if run.layer.back:
                self._bring_back(run)
            self._take_tiles(run)
            if splits:
                self._waiting += run.layer.weight_gradients
                self._sample()
        del self._runs[key]

    def _begin(self, run: _Run) -> None:
        run.has_begun = True
        later = self._next_after(run)
        if later is not None:
            self._fetch(later)
        self._sample()
        self._retire(everything=self._is_storing_over)
        self._is_storing_over = True
        if not run.layer.back:
            self._sample(again=run.layer.again)
            self._gone(run)

    def _bring_back(self, run: _Run) -> None:
        for cargo in (run.base, run.rest):
            if cargo is not None:
                self._courier.take(cargo)
        if run.experts is not None:
            self._expert_courier.take(run.experts)
        run.base = run.rest = run.experts = None
        self._rebuild_input(run)
        self._sample(at_work=run.layer.back, again=run.layer.again)
        self._gone(run)

    def _take_tiles(self, run: _Run) -> None:
        """The last one first; while one is worked on the one before it is on its way."""
        while run.tiles:
            self._courier.take(run.tiles.pop())
            for cargo in run.tiles[-1:]:
                self._courier.fetch(cargo)

    def _rebuild_input(self, run: _Run) -> None:
        """Sparse residuals: the base of the layers before is brought back ahead of the rest."""
        while not run.layer.stores_input and run.previous is not None:
            run = run.previous
            if run.base is not None:
                self._courier.take(run.base)
                run.base = None

    def _gone(self, run: _Run) -> None:
        self._retained -= run.kept
        self._routed -= run.layer.routed
        self._host -= run.layer.host
        run.kept = 0

    def _next_after(self, run: _Run) -> _Run | None:
        later = run.previous
        while later is not None and not later.has_parcels:
            later = later.previous
        if later is not None or not self._expected:
            return later
        chunk, microbatch, segment = self._expected[0]
        runs = (one for one in reversed(self._runs.get((chunk, microbatch), ())) if one.segment == segment)
        return next((one for one in runs if one.has_parcels and not one.has_begun), None)

    def _fetch(self, run: _Run) -> None:
        for cargo in run.parcels:
            self._courier.fetch(cargo)
        if run.experts is not None:
            self._expert_courier.fetch(run.experts)
        step: _Run | None = run
        while step is not None and not step.layer.stores_input:
            step = step.previous
            if step is not None and step.base is not None:
                self._courier.fetch(step.base)

    def _retire(self, *, everything: bool = False) -> None:
        self._courier.retire(0 if everything else 2 if self._base_apart else 1)
        self._expert_courier.retire(0 if everything else 1)

    @property
    def _staging(self) -> int:
        return self._courier.staging + self._expert_courier.staging

    def _held(self) -> int:
        return self._retained + self._routed + self._staging + self._waiting

    def _sample(self, at_work: int = 0, again: int = 0) -> None:
        """Look at what is held, with `at_work` bytes that are back for a backward pass, and `again` made again."""
        total = self._held() + at_work
        self._metered = max(self._metered, total - self._waiting - self._routed)
        if total + again > self._most_total:
            self._most, self._most_total = self._now(at_work + again), total + again

    def _now(self, at_work: int = 0) -> Moment:
        kept = self._retained + self._routed
        return Moment(kept=kept, at_work=at_work, staging=self._staging, weight_gradients=self._waiting)


def _total(moment: Moment) -> int:
    return moment.total
