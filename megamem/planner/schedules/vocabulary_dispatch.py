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
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from megamem.ir.schedule import TOKENS_AHEAD, Action, Barriers, Kind, Placement
from megamem.ir.workload import PipelineCosts, VocabularyCost
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


class _Step(NamedTuple):
    """A kind of pass of one chunk on one rank.

    arrivals:  of its input, by microbatch
    turn:      whether S and T take their turn before it
    more:      seconds of the W in a BW
    """

    arrivals: list[float]
    turn: bool
    stage: int
    seconds: float
    take: float
    give: float
    more: float = 0.0


class _Rank:
    """A rank on its way through its list. `num_...` of vocabulary passes have begun, in the order of microbatches."""

    __slots__ = (
        "clock", "done", "held", "left", "num_ib", "num_if", "num_s", "num_t", "order", "owed", "parts", "peak",
        "position", "start", "steps",
    )  # fmt: skip

    def __init__(self, order: Sequence[Action], steps: Mapping[tuple[Kind, int], _Step], left: float) -> None:
        self.order, self.steps = order, steps
        self.left = left  # seconds of all that is still to be run
        self.done: list[Action] = []
        self.owed: deque[Action] = deque()  # W that float
        self.parts: dict[tuple[object, ...], int] = {}  # of a W, that have run
        self.position = 0
        self.num_if = self.num_s = self.num_t = self.num_ib = 0
        self.clock, self.start = 0.0, -1.0
        self.held = self.peak = 0.0


class _Line:
    """Vocabulary passes of one kind, in their order: when what each needs arrives, the same on all ranks.

    posted:  by microbatch, ranks that have posted their part of the collective after it, and when the last one did
    """

    def __init__(self, kind: Kind, microbatches: Sequence[int]) -> None:
        self.actions = [Action(kind, 0, microbatch) for microbatch in microbatches]
        self.place = {microbatch: place for place, microbatch in enumerate(microbatches)}
        self.arrivals = [_NEVER] * (len(microbatches) + 1)
        self.posted = [(0, 0.0)] * len(microbatches)

    def post(self, microbatch: int, end: float) -> tuple[int, float]:
        """One rank's part."""
        count, last = self.posted[microbatch]
        found = self.posted[microbatch] = (count + 1, max(last, end))
        return found


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
        self.rank_of = [placement.rank_of(stage) for stage in range(placement.num_stages)]
        share = costs.vocabulary or VocabularyCost()
        self.kept, self.collective, self.barriers = share.kept, share.collective, barriers
        self.seconds_if, self.seconds_s, self.seconds_t, self.seconds_ib = (
            share.seconds(kind, barriers) for kind in ("IF", "S", "T", "IB")
        )
        self.last = placement.num_stages - 1
        end_rank, end_chunk = placement.rank_of(self.last), placement.chunk_of(self.last)
        outputs = [a.microbatch for a in orders[end_rank] if a.kind == "F" and a.chunk == end_chunk]
        first = [a for a in orders[placement.rank_of(0)] if a.chunk == 0]
        inputs = [a.microbatch for a in first if a.kind == "F"]
        gradients = [a.microbatch for a in first if a.kind in ("B", "BW")]
        self.line_if, self.line_ib = _Line("IF", inputs), _Line("IB", gradients)
        self.line_s, self.line_t = _Line("S", outputs), _Line("T", outputs)
        self.count = len(inputs)
        self.input = [[_NEVER] * self.count for _ in range(placement.num_stages)]  # of F of a stage
        self.gradient = [[_NEVER] * self.count for _ in range(placement.num_stages)]  # of its B
        self.ranks = [self._rank(index, order) for index, order in enumerate(orders)]
        self.embedded = iter(inputs)
        for place, _ in enumerate(itertools.islice(self.embedded, TOKENS_AHEAD)):
            self.line_if.arrivals[place] = 0.0
        self.wakes = [(0.0, rank) for rank in range(placement.num_ranks)]

    def _rank(self, index: int, order: Sequence[Action]) -> _Rank:
        steps: dict[tuple[Kind, int], _Step] = {}
        now, before = [0.0] * self.count, self.rules.before
        left = self.count * (self.seconds_if + self.seconds_s + self.seconds_t + self.seconds_ib)
        for chunk in range(self.placement.num_chunks):
            stage = self.placement.stage(index, chunk)
            cost, there, back = self.costs.stages[stage], self.input[stage], self.gradient[stage]
            freed = cost.activation - cost.weight_grad
            steps["F", chunk] = _Step(there, "F" in before, stage, cost.forward, cost.activation, 0.0)
            steps["B", chunk] = _Step(back, "B" in before, stage, cost.backward, 0.0, freed)
            steps["W", chunk] = _Step(now, "W" in before, stage, cost.weight, 0.0, cost.weight_grad)
            steps["BW", chunk] = _Step(back, "BW" in before, stage, cost.backward, 0.0, cost.activation, cost.weight)
            left += self.count * cost.total
        return _Rank(order, steps, left)

    def run(self, bound: float = math.inf) -> Timed | None:
        """The complete lists, and what they take; None where they wait for each other.

        bound: None as well where they take longer than this, or more memory than the cap
        """
        wakes, ranks, is_bound, bound = self.wakes, self.ranks, bound < math.inf, bound * ROUNDING
        while wakes:
            now, index = heapq.heappop(wakes)
            rank = ranks[index]
            if rank.clock <= now and (action := self._choose(rank, now)) is not None:
                self._start(rank, index, action, now)
                if is_bound and (rank.clock + rank.left > bound or rank.peak > self.cap):
                    return None
        count = self.count
        for rank in ranks:
            is_through = rank.num_if == rank.num_s == rank.num_t == rank.num_ib == count
            if rank.position < len(rank.order) or not is_through:
                return None
        return Timed(
            tuple(tuple(rank.done) for rank in ranks),
            max(rank.clock for rank in ranks),
            max(rank.clock - max(rank.start, 0.0) for rank in ranks),
            tuple(rank.peak for rank in ranks),
        )

    def _choose(self, rank: _Rank, now: float) -> Action | None:
        """What the rank runs now; None where nothing is there."""
        if self.line_if.arrivals[rank.num_if] <= now:
            return self.line_if.actions[rank.num_if]
        if self.line_ib.arrivals[rank.num_ib] <= now:
            return self.line_ib.actions[rank.num_ib]
        has_s, has_t = self.line_s.arrivals[rank.num_s] <= now, self.line_t.arrivals[rank.num_t] <= now
        arrives, turn = _NEVER, True
        if rank.position < len(rank.order):
            head = rank.order[rank.position]
            arrivals, turn, _, _, taken, _, _ = rank.steps[head[:2]]  # kind and chunk
            arrives = arrivals[head[2]]
        if (has_s or has_t) and (turn or arrives > now):
            if has_s and not (has_t and rank.held + self.kept > self.cap):
                return self.line_s.actions[rank.num_s]
            if has_t and (has_s or self.barriers == 2 or rank.num_s - rank.num_t > self.rules.lag):
                return self.line_t.actions[rank.num_t]
        if arrives <= now:
            if head[0] == "F" and (rank.owed or has_t) and rank.held + taken > self.cap:
                return rank.owed.popleft() if rank.owed else self.line_t.actions[rank.num_t]
            rank.position += 1
            return head
        if has_t and _fits(self.seconds_t, arrives - now):
            return self.line_t.actions[rank.num_t]
        if rank.owed and _fits(rank.steps[rank.owed[0][:2]].seconds, arrives - now):
            return rank.owed.popleft()
        return None

    def _start(self, rank: _Rank, index: int, action: Action, now: float) -> None:
        """Run the action, and tell those who wait for it when its result arrives."""
        kind, chunk, microbatch, _, parts = action
        if (step := rank.steps.get((kind, chunk))) is None:
            seconds, take, give = self._start_vocabulary(rank, kind, microbatch, now)
            end = now + seconds
        else:
            _, _, stage, seconds, take, give, more = step
            end = now + seconds + more
            if kind == "F":
                self._send_forward(index, stage, microbatch, end, now)
            elif kind == "W":
                if parts > 1:
                    end = now + seconds / parts
                    rank.parts[action[:3]] = done = rank.parts.get(action[:3], 0) + 1
                    give = give if done == parts else 0.0
            else:
                self._send_backward(index, stage, microbatch, end)
                if kind == "B" and self.rules.floats:
                    rank.owed.append(Action("W", chunk, microbatch))
        if rank.start < 0:
            rank.start = now
        rank.held += take
        if rank.held > rank.peak:
            rank.peak = rank.held
        rank.held -= give
        rank.left -= end - now
        rank.done.append(action)
        rank.clock = end
        heapq.heappush(self.wakes, (end, index))

    def _start_vocabulary(self, rank: _Rank, kind: Kind, microbatch: int, now: float) -> tuple[float, float, float]:
        """Its seconds, and the memory that it takes and gives. One rank's part of the collective after it is posted."""
        if kind == "S":
            rank.num_s += 1
            count, last = self.line_s.post(microbatch, now + self.seconds_s)
            if count == len(self.ranks):
                self._arrive_everywhere(self.line_t, microbatch, last + self.collective)
                if self.barriers == 1:
                    self._arrive(self.gradient, self.last, microbatch, last + self.collective)
            return self.seconds_s, self.kept, 0.0
        if kind == "T":
            rank.num_t += 1
            count, last = self.line_t.post(microbatch, now + self.seconds_t)
            if count == len(self.ranks) and self.barriers == 2:
                self._arrive(self.gradient, self.last, microbatch, last + self.collective)
            return self.seconds_t, 0.0, self.kept
        if kind == "IF":
            rank.num_if += 1
            count, last = self.line_if.post(microbatch, now + self.seconds_if)
            if count == len(self.ranks):
                self._arrive(self.input, 0, microbatch, last + self.collective)
            return self.seconds_if, 0.0, 0.0
        rank.num_ib += 1
        return self.seconds_ib, 0.0, 0.0

    def _send_forward(self, index: int, stage: int, microbatch: int, end: float, now: float) -> None:
        if stage == 0:
            following = next(self.embedded, None)
            if following is not None:
                self._arrive_everywhere(self.line_if, following, now)
        if stage == self.last:
            self._arrive_everywhere(self.line_s, microbatch, end + self.collective)
            return
        hop = self.costs.comm if self.rank_of[stage + 1] != index else 0.0
        self._arrive(self.input, stage + 1, microbatch, end + hop)

    def _send_backward(self, index: int, stage: int, microbatch: int, end: float) -> None:
        if stage == 0:
            self._arrive_everywhere(self.line_ib, microbatch, end + self.collective)
            return
        hop = self.costs.comm if self.rank_of[stage - 1] != index else 0.0
        self._arrive(self.gradient, stage - 1, microbatch, end + hop)

    def _arrive(self, inputs: list[list[float]], stage: int, microbatch: int, time: float) -> None:
        """At one stage."""
        inputs[stage][microbatch] = time
        rank = self.rank_of[stage]
        if self.ranks[rank].clock <= time:  # or it looks for itself when it is free
            heapq.heappush(self.wakes, (time, rank))

    def _arrive_everywhere(self, line: _Line, microbatch: int, time: float) -> None:
        line.arrivals[line.place[microbatch]] = time
        for index, rank in enumerate(self.ranks):
            if rank.clock <= time:  # or it looks for itself when it is free
                heapq.heappush(self.wakes, (time, index))


def _fits(seconds: float, wait: float) -> bool:
    return wait >= _PATIENCE * seconds / ROUNDING
