"""Books of whole steps: what an action does to a ledger is worked out once for all actions that see the same of it.

An action adds to sums, whatever they are. Besides its own layers it sees only

* which parcels of its microbatch are on their way back,
* the parcels in transit, oldest first: their bytes, and whether they are on their way back already,
* for a backward pass: the microbatch whose backward pass is next, and which of its parcels are on their way back,
* whether a backward pass came before.

In the steady state of a pipeline these are the same for each microbatch, on all ranks with the same layers. So a step
of thousands of layers' passes is some dozens of them (`Ledger.do`, the definition) and a sum per action. All are
integers: nothing is rounded, and the book is the ledger's own to the byte (a test compares them).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from megamem.ir.schedule import Action, Kind
from megamem.planner.memory.ledger import Book, LayerBytes, Ledger, Moment
from megamem.planner.memory.parcels import Cargo, Courier

_Key = tuple[int, int]  # chunk and microbatch
_Numbers = tuple[int, ...]  # of parcels, as `Ledger.parcels_of` has them

_OWN: _Key = (0, 0)
_NEXT: _Key = (1, 0)
_GONE: _Key = (-1, -1)  # the microbatch of a parcel whose backward pass is over; its number: whether it came back
_LOWEST = -(1 << 62)  # below any number of bytes


class _InTransit(NamedTuple):
    """A parcel whose sources are still there."""

    key: _Key
    number: int
    nbytes: int


class _Seen(NamedTuple):
    """What an action sees. In `transit` and `experts`: a parcel of its own, of the next, or of others."""

    kind: Kind
    program: int
    is_storing_over: bool
    transit: tuple[tuple[str, int], ...]
    experts: tuple[tuple[str, int], ...]
    fetched: _Numbers = ()
    following: int = -1
    following_fetched: _Numbers = ()


class _Move(NamedTuple):
    """What it does to the sums: differences to what they were. `most` and `metered` are those of `Ledger`.

    retired, stored:  parcels that left transit, and that came into it, with their bytes; of layers, then of experts
    fetched:          of its microbatch (RELOAD) or of the next (B), those that are on their way back now
    settled:          of its microbatch after B, those that came back
    """

    kept: int
    routed: int
    waiting: int
    staging: int
    host: int
    to_host: int
    returned: int
    most: Moment
    metered: int
    is_storing_over: bool
    retired: tuple[int, ...]
    stored: tuple[tuple[tuple[int, int], ...], ...]
    fetched: _Numbers
    settled: frozenset[int]


class Moves:
    """The actions of one job's layers. `base_apart` as in `Ledger`."""

    def __init__(self, *, base_apart: bool) -> None:
        self._base_apart = base_apart
        self._programs: dict[tuple[tuple[LayerBytes, ...], int], int] = {}
        self._known: dict[_Seen, _Move] = {}

    def book(
        self,
        chunks: Sequence[Sequence[LayerBytes]],
        spared: Sequence[Sequence[LayerBytes]] | None,
        ends: Sequence[int],
        actions: Sequence[Action],
    ) -> Book:
        """The book of one rank; arguments as those of `Ledger`."""
        usual = [self._program(layers, end) for layers, end in zip(chunks, ends, strict=True)]
        others = usual if spared is None else [self._program(*pair) for pair in zip(spared, ends, strict=True)]
        whole = [sum(layer.weight_gradients for layer in chunk) + end for chunk, end in zip(chunks, ends, strict=True)]
        backwards = [(a.chunk, a.microbatch) for a in actions if a.kind in ("B", "BW") and chunks[a.chunk]]
        following = dict(pairwise(backwards))
        return _Rank(usual, others, whole, following, self._move).run(actions)

    @property
    def worked_out(self) -> int:
        """How many actions the ledger has gone through."""
        return len(self._known)

    def _program(self, layers: Sequence[LayerBytes], end: int) -> int:
        """The number of these layers with this end."""
        return self._programs.setdefault((tuple(layers), end), len(self._programs))

    def _move(self, seen: _Seen) -> _Move:
        if seen not in self._known:
            self._known[seen] = self._worked_out(seen)
        return self._known[seen]

    def _worked_out(self, seen: _Seen) -> _Move:
        """By a ledger that has nothing in it but what the action sees."""
        programs = list(self._programs)
        (layers, end), (next_layers, _) = programs[seen.program], programs[seen.following]
        ledger = Ledger((layers, next_layers), ends=(end, 0), base_apart=self._base_apart)
        mine = [] if seen.kind == "F" else ledger.recall(_OWN, seen.fetched)
        following = [] if seen.following < 0 else ledger.recall(_NEXT, seen.following_fetched)
        ledger.expected = [(0, 0, segment) for segment in range(sum(layer.begins for layer in layers[1:]), -1, -1)]
        if seen.following >= 0:
            ledger.expected.append((*_NEXT, sum(layer.begins for layer in next_layers[1:])))
        ledger.is_storing_over, ledger.metered = seen.is_storing_over, _LOWEST
        before = [
            _put_in_transit(courier, found, mine, following)
            for courier, found in ((ledger.courier, seen.transit), (ledger.expert_courier, seen.experts))
        ]
        ledger.do(Action(seen.kind, *_OWN))
        couriers = ledger.courier, ledger.expert_courier
        if seen.kind == "F":
            mine = ledger.parcels_of(_OWN)
        number = {id(cargo): index for index, cargo in enumerate(mine)}
        left = [{id(cargo) for cargo in courier.transit} for courier in couriers]
        is_new = seen.kind == "F"
        returning = following if seen.kind in ("B", "BW") else mine
        return _Move(
            kept=ledger.retained + ledger.routed,
            routed=ledger.routed,
            waiting=ledger.waiting,
            staging=sum(courier.staging for courier in couriers),
            host=ledger.host,
            to_host=ledger.book.to_host,
            returned=sum(courier.returned for courier in couriers),
            most=ledger.most if ledger.most_total >= ledger.held() else ledger.now(),
            metered=ledger.metered,
            is_storing_over=ledger.is_storing_over,
            retired=tuple(
                sum(id(cargo) not in there for cargo in old) for old, there in zip(before, left, strict=True)
            ),
            stored=tuple(
                tuple((number[id(cargo)], cargo.nbytes) for cargo in courier.transit if is_new and id(cargo) in number)
                for courier in couriers
            ),
            fetched=tuple(index for index, cargo in enumerate(returning) if cargo.has_buffers),
            settled=frozenset(index for index, cargo in enumerate(mine) if cargo.has_buffers or cargo.is_taken),
        )


def _put_in_transit(
    courier: Courier, found: Sequence[tuple[str, int]], mine: Sequence[Cargo], following: Sequence[Cargo]
) -> list[Cargo]:
    """The parcels that an action sees in transit, in the courier's hands."""
    cargos = []
    for whose, value in found:
        if whose in ("own", "next"):
            cargo = (mine if whose == "own" else following)[value]
            cargo.has_sources = True
        else:
            cargo = Cargo(value, has_buffers=whose == "returning")
        cargos.append(cargo)
    courier.transit = deque(cargos)
    return cargos


class _Rank:
    """One rank on its way through its actions."""

    def __init__(
        self,
        usual: Sequence[int],
        spared: Sequence[int],
        whole: Sequence[int],
        following: Mapping[_Key, _Key],
        move: Callable[[_Seen], _Move],
    ) -> None:
        """Programs of its chunks, and where a schedule does not offload them; what W needs of each chunk; what is next
        after each backward pass."""
        self.usual, self.spared, self.whole, self.following, self.move = usual, spared, whole, following, move
        self.leaving: Collection[_Key] = ()
        self.programs: dict[_Key, int] = {}  # of what is in flight
        self.fetched: dict[_Key, _Numbers] = {}
        self.transit: tuple[list[_InTransit], list[_InTransit]] = [], []
        self.is_storing_over = False

    def run(self, actions: Sequence[Action]) -> Book:
        """As `Ledger.run`."""
        self.leaving = {(a.chunk, a.microbatch) for a in actions if a.kind == "OFFLOAD"}
        book = Book()
        kept = routed = staging = waiting = host = metered = 0
        for kind, chunk, microbatch, part, parts in actions:
            move = None
            if kind in ("F", "B", "BW", "RELOAD"):
                move = self._moved(kind, (chunk, microbatch))
            if move is None:
                book.during.append(Moment(kept, 0, staging, waiting))
                if kind == "W":
                    waiting -= self.whole[chunk] * (part + 1) // parts - self.whole[chunk] * part // parts
            else:
                more = move.most
                book.during.append(
                    Moment(kept + more.kept, more.at_work, staging + more.staging, waiting + more.weight_gradients)
                )
                metered = max(metered, kept - routed + staging + move.metered)
                kept, routed, host = kept + move.kept, routed + move.routed, host + move.host
                staging, waiting = staging + move.staging, waiting + move.waiting
                book.host = max(book.host, host)
                book.to_host += move.to_host
                book.from_host += move.returned
            total = kept + staging + waiting
            metered = max(metered, total - routed)
            book.after.append(total)
        book.peak = max(book.during, key=sum, default=Moment())
        book.metered = metered
        return book

    def _moved(self, kind: Kind, key: _Key) -> _Move | None:
        """What the action does to the sums; what it does to parcels is done here."""
        following = _GONE
        if kind == "F":
            self.programs[key] = (self.usual if key in self.leaving else self.spared)[key[0]]
        elif key not in self.programs:
            return None  # nothing to reload
        elif kind != "RELOAD":
            following = self.following.get(key, _GONE)
        move = self.move(
            _Seen(
                kind,
                self.programs[key],
                self.is_storing_over,
                self._view(self.transit[0], key, following),
                self._view(self.transit[1], key, following),
                self.fetched.get(key, ()),
                self.programs.get(following, -1),
                self.fetched.get(following, ()),
            )
        )
        self.is_storing_over = move.is_storing_over
        for parcels, count, stored in zip(self.transit, move.retired, move.stored, strict=True):
            del parcels[:count]
            parcels += [_InTransit(key, *one) for one in stored]
        if kind == "RELOAD":
            self.fetched[key] = move.fetched
        elif kind != "F":
            self._end(key, move.settled)
            if move.fetched:
                self.fetched[following] = move.fetched
        return move

    def _view(self, parcels: Sequence[_InTransit], own: _Key, following: _Key) -> tuple[tuple[str, int], ...]:
        """Parcels in transit as an action sees them."""
        found = []
        for key, number, nbytes in parcels:
            if key == _GONE:
                found.append(("returning" if number else "other", nbytes))
            elif key in (own, following):
                found.append(("own" if key == own else "next", number))
            else:
                found.append(("returning" if number in self.fetched.get(key, ()) else "other", nbytes))
        return tuple(found)

    def _end(self, key: _Key, settled: Collection[int]) -> None:
        """After a microbatch's backward pass."""
        for parcels in self.transit:
            for place, (other, number, nbytes) in enumerate(parcels):
                if other == key:
                    parcels[place] = _InTransit(_GONE, int(number in settled), nbytes)
        del self.programs[key]
        self.fetched.pop(key, None)
