"""Schedules from a building block (arXiv 2405.15362, sections 3 and 4): repeat, place W, squeeze, reorder.

A building block says when one microbatch passes each rank of a V placement with two chunks, in unit passes:

    block[rank] = (F of chunk 0, F of chunk 1, B of chunk 1, B of chunk 0)

Microbatch n starts n periods later; a period has six slots, one for each F, B and W of a rank. How many activations a
rank holds follows from how long each of them lives in the block, whatever the number of microbatches.

1. **Repeat** the block. Slots that are left empty take W, oldest first.
2. **Reorder** warm-up and cool-down: outside of the steady phase (from the first B of chunk 0 on rank 0 to its last F
   of chunk 0) every pass moves to the first empty slot that its inputs and the memory of its rank allow.
3. **Squeeze**: keep the order, start as soon as possible.
4. **Reorder the cool-down once more**, without W, which then fills what is free.

All of this counts in unit passes (`unit_orders`). `build_from_block` runs the order with the request's costs, with W
where unit passes put it and with W placed by the costs, and takes the best of them within the memory of the block.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Final

from megamem.ir.schedule import Action, Kind, Schedule
from megamem.planner.schedules.family import Request
from megamem.planner.schedules.weight_placement import best_of, place_weights, with_weights

Block = Sequence[tuple[int, int, int, int]]
"""Per rank the slots of `PASSES`, all different modulo `PERIOD`."""

PERIOD: Final = 6
"""Slots of a block: F, B and W of two chunks."""

PASSES: Final[tuple[tuple[Kind, int], ...]] = (("F", 0), ("F", 1), ("B", 1), ("B", 0))
"""The passes of a block, in the order in which a microbatch meets them."""

_F0, _F1, _B1, _B0, _W = range(5)
_FORWARDS = (_F0, _F1)
_DOWNWARDS = (_F0, _B1)  # passes whose input comes from the rank before; the others' comes from the rank after

Event = tuple[int, int, int, int]
"""A pass in a table: slot, rank, index in PASSES or _W, microbatch (for W: which of the rank's W)."""


class Table:
    """A step in slots: `starts[rank][index in PASSES, or _W][microbatch]`.

    Where the backward pass is fused, B stands for BW and takes two slots, and there is no W.
    """

    def __init__(self, block: Block, microbatches: int, *, fused: bool = False) -> None:
        """The block once for every microbatch, a period apart, and W in the empty slots."""
        self.starts = [[list(range(slot, slot + PERIOD * microbatches, PERIOD)) for slot in row] for row in block]
        self.fused = fused
        self.lengths = (1, 1, 2, 2) if fused else (1, 1, 1, 1, 1)
        if not fused:
            self.place_weights()

    def place_weights(self) -> None:
        """W into the empty slots of each rank, as soon as there is a B whose W has not run."""
        for rank, rows in enumerate(self.starts):
            taken = {slot for row in rows[:_W] for slot in row}
            weights, slot = [], 0
            for start in sorted(rows[_B1] + rows[_B0]):
                slot = max(slot, start + 1)
                while slot in taken:
                    slot += 1
                weights.append(slot)
                slot += 1
            self.starts[rank] = [*rows[:_W], weights]

    def events(self) -> list[Event]:
        """Every pass, in order of time."""
        return sorted(
            (slot, rank, kind, index)
            for rank, rows in enumerate(self.starts)
            for kind, row in enumerate(rows)
            for index, slot in enumerate(row)
        )

    def after_inputs(self, rank: int, kind: int, index: int) -> int:
        """The first slot in which a pass (no W) has its inputs and its turn among its equals."""
        rows = self.starts[rank]
        length = self.lengths[kind]
        earliest = rows[kind][index - 1] + length if index else 0
        neighbour = rank - 1 if kind in _DOWNWARDS else rank + 1
        if 0 <= neighbour < len(self.starts):
            earliest = max(earliest, self.starts[neighbour][kind][index] + length)
        if kind:
            earliest = max(earliest, rows[kind - 1][index] + self.lengths[kind - 1])
        return earliest

    def held(self, rank: int) -> list[int]:
        """Chunk activations that a rank holds in each slot; in the slot of a W, its own counts no more."""
        rows = self.starts[rank]
        change = [0] * (2 + max(row[-1] for row in rows))
        for kind in _FORWARDS:
            for slot in rows[kind]:
                change[slot] += 1
        for slot in [slot + 1 for row in rows[_B1:] for slot in row] if self.fused else rows[_W]:
            change[slot] -= 1
        level = 0
        for slot, step in enumerate(change):
            level += step
            change[slot] = level
        return change

    def peak(self) -> int:
        """The most chunk activations that any rank holds."""
        return max(max(self.held(rank)) for rank in range(len(self.starts)))

    def squeeze(self) -> None:
        """Keep the order of each rank, and start every pass as soon as possible."""
        clock = [0] * len(self.starts)
        for _, rank, kind, index in self.events():
            slot = clock[rank] if kind == _W else max(clock[rank], self.after_inputs(rank, kind, index))
            self.starts[rank][kind][index] = slot
            clock[rank] = slot + self.lengths[kind]

    def orders(self) -> list[list[Event]]:
        """The events of each rank."""
        orders: list[list[Event]] = [[] for _ in self.starts]
        for event in self.events():
            orders[event[1]].append(event)
        return orders

    def steady(self) -> range:
        """The slots from the first B of chunk 0 on rank 0 to its last F of chunk 0."""
        rows = self.starts[0]
        return range(rows[_B0][0], rows[_F0][-1] + 1)


def reorder(table: Table, steady: range, peak: int) -> None:
    """Every pass outside of the slots `steady` into the first in which it can run within `peak` chunk activations."""
    held = [table.held(rank) for rank in range(len(table.starts))]
    taken: list[set[int]] = [set() for _ in table.starts]
    backwards: list[list[int]] = [[] for _ in table.starts]
    for slot, rank, kind, index in table.events():
        target, length = slot, table.lengths[kind]
        if slot not in steady:
            if kind == _W:
                row = table.starts[rank][_W]
                earliest = 1 + max(backwards[rank][index], row[index - 1] if index else -1)
            else:
                earliest = table.after_inputs(rank, kind, index)
            if kind in _FORWARDS:
                earliest = max(earliest, _room_from(held[rank], slot, peak))
            free = (at for at in range(earliest, slot) if taken[rank].isdisjoint(range(at, at + length)))
            target = next(free, slot)
            table.starts[rank][kind][index] = target
            _move(held[rank], kind, target, slot, table.fused)
        taken[rank].update(range(target, target + length))
        if kind in (_B1, _B0):
            bisect.insort(backwards[rank], target)


def _move(held: list[int], kind: int, target: int, slot: int, fused: bool) -> None:
    """Count the memory of a pass that runs in slot `target` instead of `slot`."""
    if kind in _FORWARDS:
        for between in range(target, slot):
            held[between] += 1
    elif fused or kind == _W:
        for between in range(target + fused, slot + fused):
            held[between] -= 1


def _room_from(held: list[int], slot: int, peak: int) -> int:
    """From which slot on, up to `slot`, one more activation can be held."""
    while slot and held[slot - 1] < peak:
        slot -= 1
    return slot


class _CoolDown:
    """The memory of a rank in the cool-down while W fills what other passes leave."""

    def __init__(self, events: Sequence[Event], begin: int) -> None:
        """`events` without W; those before slot `begin` are fixed."""
        self.begin = begin
        self.passes: dict[int, int] = {}
        self.held = self.owed = 0
        clock = 0
        for slot, _, kind, _ in events:
            if slot >= begin:
                self.passes[slot] = kind
                continue
            self._idle(slot - clock)
            self._run(kind)
            clock = slot + 1
        self._idle(begin - clock)

    def _idle(self, slots: int) -> None:
        done = min(slots, self.owed)
        self.owed -= done
        self.held -= done

    def _run(self, kind: int) -> None:
        if kind in _FORWARDS:
            self.held += 1
        else:
            self.owed += 1

    def peak(self) -> int:
        """The most activations from `begin` on."""
        held, owed, clock, peak = self.held, self.owed, self.begin, 0
        last_forward = max((slot for slot, kind in self.passes.items() if kind in _FORWARDS), default=0)
        for slot in sorted(slot for slot in self.passes if slot <= last_forward):
            done = min(slot - clock, owed)
            held, owed, clock = held - done, owed - done, slot + 1
            if self.passes[slot] in _FORWARDS:
                held += 1
                peak = max(peak, held)
            else:
                owed += 1
        return peak


def _reorder_cool_down(table: Table, peak: int) -> None:
    """Step 4: the passes behind the steady phase once more, as if W took no room; then W again."""
    table.starts = [rows[:_W] for rows in table.starts]
    begin = max(table.starts[0][_B0][0], table.starts[0][_F0][-1]) + 1
    ranks = [_CoolDown(events, begin) for events in table.orders()]
    for slot, rank, kind, index in table.events():
        if slot < begin:
            continue
        passes = ranks[rank].passes
        del passes[slot]
        target = slot
        for free in range(max(begin, table.after_inputs(rank, kind, index)), slot):
            if free in passes:
                continue
            passes[free] = kind
            if ranks[rank].peak() <= peak:
                target = free
                break
            del passes[free]
        passes[target] = kind
        table.starts[rank][kind][index] = target
    table.place_weights()


def unit_orders(block: Block, microbatches: int, peak: int = 0) -> list[list[Action]]:
    """F, B and W of each rank, made in unit passes as the module says.

    No rank holds more chunk activations than `peak` or, where that is more, than the repeated block does.
    """
    table = Table(block, microbatches)
    peak = max(peak, table.peak())
    reorder(table, table.steady(), peak)
    table.squeeze()
    _reorder_cool_down(table, peak)
    return [list(_actions(events)) for events in table.orders()]


def fused_orders(block: Block, microbatches: int) -> list[list[Action]]:
    """F and BW of each rank, where BW takes two slots. Every pass moves: there is no W to keep a steady phase full."""
    table = Table(block, microbatches, fused=True)
    reorder(table, range(0), table.peak())
    names: dict[int, Kind] = {_F0: "F", _F1: "F", _B1: "BW", _B0: "BW"}
    return [[Action(names[kind], PASSES[kind][1], index) for _, _, kind, index in events] for events in table.orders()]


def _actions(events: Sequence[Event]) -> Iterator[Action]:
    """The actions of one rank; W runs in the order of B."""
    owed: list[Action] = []
    done = 0
    for _, _, kind, index in events:
        if kind == _W:
            yield owed[done]
            done += 1
        else:
            name, chunk = PASSES[kind]
            yield Action(name, chunk, index)
            if name == "B":
                owed.append(Action("W", chunk, index))


def delayed_block(block: Block, periods: int) -> Block:
    """So many periods more between the forward and the backward passes."""
    more = PERIOD * periods
    return [(down, up, back + more, end + more) for down, up, back, end in block]


def build_from_block(request: Request, name: str, block: Block) -> Schedule:
    """The schedule of a block, with W placed by the request's costs within the memory that unit passes would take.

    `request.delay` is so many periods more between the forward and the backward passes of the block.
    """
    block = delayed_block(block, request.delay)
    placement = request.placement("v")
    costs = request.costs(placement)
    orders = unit_orders(block, request.num_microbatches)
    unit = place_weights(orders, placement, costs)
    assert unit is not None  # an order of which the times are known can run
    best = best_of(with_weights(orders, placement, costs, [max(unit.peaks)] * len(orders)))
    assert best is not None  # one of them is `unit`
    return Schedule(name=name, placement=placement, num_microbatches=request.num_microbatches, ranks=best.ranks)
