"""Vocabulary passes put into given lists of F, B and W while these run: which pass a rank takes whenever it is free.

The lists are run in order of time with the request's costs, as ranks will run them. A rank that becomes free, or to
which something arrives while it is, takes

* IF and IB as soon as they may run: they are short, and others wait for IF;
* S and T as soon as their collectives have come, or only before certain passes of its list (`Rules.before`);
* else the next pass of its list, if its input is there;
* else, while it waits, whatever of S, T, IB and W there is.

With one barrier nobody waits for T, and it may lag behind (`Rules.lag`) to fill what would be idle. With `Rules.floats`
W does so, too: the lists come without W then. IF runs at most `TOKENS_AHEAD` microbatches ahead of F of the first
stage, so that no more of its results lie about (arXiv 2411.05288, section 5.2 and appendix).

S, T, IF and IB come in the order in which the lists feed them, so that all ranks post their collectives in one order. A
rank that waits runs whatever it has, so no list that could run without vocabulary passes is stopped by them.

This timing serves the choice between orders; it shares nothing with the simulator, which prices the result.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from megamem.ir.schedule import TOKENS_AHEAD, Action, Barriers, Kind, Placement
from megamem.ir.workload import PipelineCosts, StageCost, VocabularyCost
from megamem.planner.schedules.weight_placement import ROUNDING, Timed

_PATIENCE: Final = 0.5
"""How long a wait must be for a pass that nobody waits for to start in it, as a share of the pass."""

_NEVER = math.inf


class Rules(NamedTuple):
    """How a rank chooses between what it could run.

    before:  kinds of passes of the list before which S and T take their turn; before others only when the rank waits
    lag:     T that may be outstanding before they take their turn like S; only with one barrier
    floats:  whether W is in no list and fills waits, oldest first
    """

    before: frozenset[Kind]
    lag: int = 0
    floats: bool = False


class _Rank:
    """A rank on its way through its list."""

    def __init__(self, order: Sequence[Action]) -> None:
        self.order = order
        self.done: list[Action] = []
        self.owed: deque[Action] = deque()  # W that float
        self.parts: dict[tuple[object, ...], int] = {}  # of a W, that have run
        self.position = 0
        self.next: dict[Kind, int] = {"IF": 0, "S": 0, "T": 0, "IB": 0}  # place in the order of microbatches
        self.clock, self.start = 0.0, -1.0
        self.held = self.peak = 0.0


class Dispatch:
    """One run of lists with vocabulary passes between them. Times are those of arrival, infinite while unknown."""

    def __init__(
        self,
        orders: Sequence[Sequence[Action]],
        placement: Placement,
        costs: PipelineCosts,
        barriers: Barriers,
        rules: Rules,
        cap: float = math.inf,
    ) -> None:
        """The lists, without vocabulary passes; and the memory at which W and T that wait come before an F."""
        self.placement, self.costs, self.rules, self.cap = placement, costs, rules, cap * ROUNDING
        self.share, self.barriers = costs.vocabulary or VocabularyCost(), barriers
        self.seconds = {kind: self.share.seconds(kind, barriers) for kind in ("IF", "S", "T", "IB")}
        self.ranks = [_Rank(order) for order in orders]
        self.last = placement.num_stages - 1
        end_rank, end_chunk = placement.rank_of(self.last), placement.chunk_of(self.last)
        outputs = [a.microbatch for a in orders[end_rank] if a.kind == "F" and a.chunk == end_chunk]
        first = [a for a in orders[placement.rank_of(0)] if a.chunk == 0]
        inputs = [a.microbatch for a in first if a.kind == "F"]
        gradients = [a.microbatch for a in first if a.kind in ("B", "BW")]
        self.order: dict[Kind, list[int]] = {"IF": inputs, "S": outputs, "T": outputs, "IB": gradients}
        self.count = len(inputs)
        self.input = [[_NEVER] * self.count for _ in range(placement.num_stages)]  # of F of a stage
        self.gradient = [[_NEVER] * self.count for _ in range(placement.num_stages)]  # of its B
        self.arrival = {kind: [_NEVER] * self.count for kind in self.order}  # of what a vocabulary pass needs
        self.embedded = iter(inputs)
        for microbatch in itertools.islice(self.embedded, TOKENS_AHEAD):
            self.arrival["IF"][microbatch] = 0.0
        self.posted: dict[tuple[Kind, int], list[float]] = {}
        self.wakes = [(0.0, rank) for rank in range(placement.num_ranks)]

    def run(self) -> Timed | None:
        """The complete lists, and what they take; None where they wait for each other."""
        wakes, ranks = self.wakes, self.ranks
        while wakes:
            now, index = heapq.heappop(wakes)
            rank = ranks[index]
            if rank.clock <= now and (action := self._choose(rank, index, now)) is not None:
                self._start(rank, index, action, now)
        total = 4 * self.count
        if any(rank.position < len(rank.order) or sum(rank.next.values()) < total for rank in ranks):
            return None
        return Timed(
            tuple(tuple(rank.done) for rank in ranks),
            max(rank.clock for rank in ranks),
            max(rank.clock - max(rank.start, 0.0) for rank in ranks),
            tuple(rank.peak for rank in ranks),
        )

    def _choose(self, rank: _Rank, index: int, now: float) -> Action | None:
        """What the rank runs now; None where nothing is there."""
        for kind in ("IF", "IB"):
            if (action := self._ready(rank, kind, now)) is not None:
                return action
        head = rank.order[rank.position] if rank.position < len(rank.order) else None
        arrives = _NEVER if head is None else self._arrives(index, head)
        statistics = self._ready(rank, "S", now)
        gradient = self._ready(rank, "T", now)
        waits = arrives > now
        if head is None or waits or head.kind in self.rules.before:
            if statistics is not None:
                full = rank.held + self.share.kept > self.cap
                return gradient if full and gradient is not None else statistics
            late = rank.next["S"] - rank.next["T"] > self.rules.lag
            if gradient is not None and (self.barriers == 2 or late):
                return gradient
        if head is not None and not waits:
            if head.kind == "F" and (rank.owed or gradient is not None):
                taken = self.costs.stages[self.placement.stage(index, head.chunk)].activation
                if rank.held + taken > self.cap:
                    return rank.owed.popleft() if rank.owed else gradient
            rank.position += 1
            return head
        if gradient is not None and self._fits(self.seconds["T"], arrives - now):
            return gradient
        if rank.owed and self._fits(self._cost(index, rank.owed[0]).weight, arrives - now):
            return rank.owed.popleft()
        return None

    def _fits(self, seconds: float, wait: float) -> bool:
        return wait >= _PATIENCE * seconds / ROUNDING

    def _ready(self, rank: _Rank, kind: Kind, now: float) -> Action | None:
        """The next pass of this kind, if what it needs is there."""
        place = rank.next[kind]
        if place == self.count:
            return None
        microbatch = self.order[kind][place]
        return Action(kind, 0, microbatch) if self.arrival[kind][microbatch] <= now else None

    def _cost(self, index: int, action: Action) -> StageCost:
        return self.costs.stages[self.placement.stage(index, action.chunk)]

    def _arrives(self, index: int, action: Action) -> float:
        """When the input of a pass of the list is there."""
        if action.kind == "W":
            return 0.0
        stage = self.placement.stage(index, action.chunk)
        return (self.input if action.kind == "F" else self.gradient)[stage][action.microbatch]

    def _start(self, rank: _Rank, index: int, action: Action, now: float) -> None:
        """Run the action, and tell those who wait for it when its result arrives."""
        kind, microbatch = action.kind, action.microbatch
        take = give = 0.0
        if kind in self.seconds:
            end = now + self.seconds[kind]
            rank.next[kind] += 1
            take, give = self.share.kept * (kind == "S"), self.share.kept * (kind == "T")
            self._post(kind, microbatch, end)
        else:
            cost, stage = self._cost(index, action), self.placement.stage(index, action.chunk)
            if kind == "F":
                end, take = now + cost.forward, cost.activation
                self._send_forward(index, stage, microbatch, end, now)
            elif kind == "W":
                end = now + cost.weight / action.parts
                rank.parts[action[:3]] = done = rank.parts.get(action[:3], 0) + 1
                give = cost.weight_grad if done == action.parts else 0.0
            else:
                end = now + cost.backward + (cost.weight if kind == "BW" else 0.0)
                give = cost.activation if kind == "BW" else cost.activation - cost.weight_grad
                self._send_backward(index, stage, microbatch, end)
                if kind == "B" and self.rules.floats:
                    rank.owed.append(Action("W", action.chunk, microbatch))
        if rank.start < 0:
            rank.start = now
        rank.held += take
        rank.peak = max(rank.peak, rank.held)
        rank.held -= give
        rank.done.append(action)
        rank.clock = end
        heapq.heappush(self.wakes, (end, index))

    def _send_forward(self, index: int, stage: int, microbatch: int, end: float, now: float) -> None:
        if stage == 0:
            following = next(self.embedded, None)
            if following is not None:
                self._arrive_everywhere("IF", following, now)
        if stage == self.last:
            self._arrive_everywhere("S", microbatch, end + self.share.collective)
            return
        target = self.placement.rank_of(stage + 1)
        time = end + (self.costs.comm if target != index else 0.0)
        self.input[stage + 1][microbatch] = time
        heapq.heappush(self.wakes, (time, target))

    def _send_backward(self, index: int, stage: int, microbatch: int, end: float) -> None:
        if stage == 0:
            self._arrive_everywhere("IB", microbatch, end + self.share.collective)
            return
        target = self.placement.rank_of(stage - 1)
        time = end + (self.costs.comm if target != index else 0.0)
        self.gradient[stage - 1][microbatch] = time
        heapq.heappush(self.wakes, (time, target))

    def _post(self, kind: Kind, microbatch: int, end: float) -> None:
        """One rank's part of the collective after a vocabulary pass."""
        ends = self.posted.setdefault((kind, microbatch), [])
        ends.append(end)
        if len(ends) < len(self.ranks):
            return
        time = max(self.posted.pop((kind, microbatch))) + self.share.collective
        if kind == "IF":
            self.input[0][microbatch] = time
            heapq.heappush(self.wakes, (time, self.placement.rank_of(0)))
        elif kind == "S":
            self._arrive_everywhere("T", microbatch, time)
        if kind == "ST"[self.barriers - 1]:
            self.gradient[self.last][microbatch] = time
            heapq.heappush(self.wakes, (time, self.placement.rank_of(self.last)))

    def _arrive_everywhere(self, kind: Kind, microbatch: int, time: float) -> None:
        self.arrival[kind][microbatch] = time
        for index in range(len(self.ranks)):
            heapq.heappush(self.wakes, (time, index))
