"""ZB-1p and ZB-2p: the zero bubble heuristic with real costs and a memory limit (arXiv 2401.10241, section 3.1).

    zb-1p    the limit is p M_B of the rank, the memory of 1F1B
    zb-2p    the limit is 2p M_B, beyond which more memory hardly helps

or `Request.memory_limit`, for every rank, where there is one. F takes M_B, B gives back M_B - M_W, and W the rest, so
that a small M_W lets many more than 2p microbatches be in flight.

1. Warm-up: every rank runs F of microbatch 0; then, from the last rank to the first, as many forwards as memory and the
   time until the first gradient arrives allow, and more than the next rank has.
2. One round per further microbatch: each rank adds a forward, if it is worth it, and every rank runs one B. W is run
   where memory forces it, where it fits into the wait for an input, and where the wait would otherwise make this rank
   the one with the most bubble.
3. What is left of W.

Three choices of detail (`Rules`) are tried in all eight combinations. The least stage span wins, as in the paper; the
makespan decides between equals. The times are those of this construction, in order and without contention.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

from megamem.errors import InfeasibleError
from megamem.ir.schedule import Action, Schedule
from megamem.ir.workload import PipelineCosts, StageCost
from megamem.planner.schedules.family import Family, Request, at_least

_ROUNDING = 1 + 1e-9
"""Sums of shares of a limit may exceed it by this."""


class Rules(NamedTuple):
    """What the heuristic leaves open.

    within:   forwards before the first B end before its gradient arrives; otherwise they begin before
    hurry:    a rank two forwards ahead of the next may leave one out to run B sooner
    greedy:   W starts in every wait, even where the wait would not be the longest
    """

    within: bool
    hurry: bool
    greedy: bool


@dataclass(kw_only=True)
class _Rank:
    """What one rank has run so far, and until when."""

    cost: StageCost
    limit: float
    actions: list[Action] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)
    backwards: list[float] = field(default_factory=list)
    weights: int = 0
    clock: float = 0.0
    held: float = 0.0
    bubble: float = 0.0

    @property
    def span(self) -> float:
        """From the start of the first forward to now."""
        return self.clock - (self.forwards[0] - self.cost.forward)

    @property
    def owed(self) -> int:
        """Microbatches whose W could run."""
        return len(self.backwards) - self.weights

    def fits(self, more: float) -> bool:
        """Whether so much more memory is within the limit."""
        return self.held + more <= self.limit * _ROUNDING

    def forced(self) -> int | None:
        """How many W must run before the next forward fits; None where even all are not enough."""
        more = self.cost.activation
        for count in range(self.owed + 1):
            if self.fits(more - count * self.cost.weight_grad):
                return count
        return None


class _Pipeline:
    """All ranks under construction, by one set of rules."""

    def __init__(self, costs: PipelineCosts, limits: list[float], microbatches: int, rules: Rules) -> None:
        self.ranks = [_Rank(cost=cost, limit=limit) for cost, limit in zip(costs.stages, limits, strict=True)]
        self.comm, self.microbatches, self.rules = costs.comm, microbatches, rules
        self.worst_bubble = 0.0
        self._warm_up()
        for _ in range(1, microbatches):
            self._round()
        for rank in self.ranks:
            while rank.owed:
                self._weight(rank)

    @property
    def stage_span(self) -> float:
        """The longest time from a rank's first action to its last."""
        return max(rank.span for rank in self.ranks)

    @property
    def makespan(self) -> float:
        """When the last rank ends."""
        return max(rank.clock for rank in self.ranks)

    def _run(self, rank: _Rank, arrival: float, seconds: float) -> float:
        start = max(rank.clock, arrival)
        if rank.actions:
            rank.bubble += start - rank.clock
            self.worst_bubble = max(self.worst_bubble, rank.bubble)
        rank.clock = start + seconds
        return rank.clock

    def _input(self, index: int) -> float:
        """When the input of the next forward arrives."""
        return self.ranks[index - 1].forwards[len(self.ranks[index].forwards)] + self.comm if index else 0.0

    def _gradient(self, index: int) -> float:
        """When the output gradient of the next B arrives."""
        if index + 1 == len(self.ranks):
            return 0.0
        return self.ranks[index + 1].backwards[len(self.ranks[index].backwards)] + self.comm

    def _forward(self, index: int) -> None:
        rank = self.ranks[index]
        rank.forwards.append(self._run(rank, self._input(index), rank.cost.forward))
        rank.actions.append(Action("F", 0, len(rank.forwards) - 1))
        rank.held += rank.cost.activation

    def _backward(self, index: int) -> None:
        rank = self.ranks[index]
        rank.backwards.append(self._run(rank, self._gradient(index), rank.cost.backward))
        rank.actions.append(Action("B", 0, len(rank.backwards) - 1))
        rank.held -= rank.cost.activation - rank.cost.weight_grad

    def _weight(self, rank: _Rank) -> None:
        self._run(rank, 0.0, rank.cost.weight)
        rank.actions.append(Action("W", 0, rank.weights))
        rank.weights += 1
        rank.held -= rank.cost.weight_grad

    def _warm_up(self) -> None:
        count = len(self.ranks)
        for index in range(count):
            self._forward(index)
        extra = [0] * count
        last = self.ranks[-1]
        gradient = last.clock + last.cost.backward
        for index in reversed(range(count - 1)):
            rank = self.ranks[index]
            arrival, clock = gradient + self.comm, rank.clock
            while 1 + extra[index] < self.microbatches and rank.fits((1 + extra[index]) * rank.cost.activation):
                if clock + rank.cost.forward > arrival if self.rules.within else clock >= arrival:
                    break
                clock += rank.cost.forward
                extra[index] += 1
            gradient = max(clock, arrival) + rank.cost.backward
        for index in range(1, count):
            extra[index] = min(extra[index], max(0, extra[index - 1] - 1))
        for index in range(count):
            for _ in range(extra[index]):
                self._forward(index)
        for index in reversed(range(count)):
            self._backward(index)

    def _round(self) -> None:
        adds = [self._wants_forward(index) for index in range(len(self.ranks))]
        for index in reversed(range(len(self.ranks) - 1)):
            adds[index] = adds[index] and adds[index + 1]
        for index, rank in enumerate(self.ranks):
            if adds[index]:
                for _ in range(rank.forced() or 0):
                    self._weight(rank)
                self._fill(rank, self._input(index))
                self._forward(index)
        for index, rank in reversed(list(enumerate(self.ranks))):
            self._fill(rank, self._gradient(index))
            if index == 0 and len(rank.forwards) == self.microbatches:
                while rank.owed:
                    self._weight(rank)
            self._backward(index)

    def _wants_forward(self, index: int) -> bool:
        """Whether a rank adds a forward in this round; where it has none in hand for its B, it does."""
        rank = self.ranks[index]
        forced = rank.forced()
        if len(rank.forwards) == self.microbatches or forced is None:
            return False
        if not self.rules.hurry or index + 1 == len(self.ranks):
            return True
        following = self.ranks[index + 1]
        if len(rank.forwards) < len(following.forwards) + 2:
            return True
        gradient = following.clock + following.cost.forward + following.cost.backward + self.comm
        if rank.clock + rank.cost.forward + forced * rank.cost.weight <= gradient:
            return rank.clock < gradient
        return gradient - rank.clock > max(0.0, self.worst_bubble - rank.bubble)

    def _fill(self, rank: _Rank, arrival: float) -> None:
        """Use the wait until `arrival` for W."""
        while rank.owed and rank.clock + rank.cost.weight <= arrival:
            self._weight(rank)
        wait = arrival - rank.clock
        if rank.owed and wait > 0 and (self.rules.greedy or wait > self.worst_bubble - rank.bubble):
            self._weight(rank)


def _build(request: Request, name: str, shares: int) -> Schedule:
    """The best of the eight; `shares` times M_B is the limit where the request has none."""
    placement = request.placement("round-robin")
    costs = request.costs(placement)
    needed = max(cost.activation for cost in costs.stages)
    if request.memory_limit is not None and request.memory_limit * _ROUNDING < needed:
        raise InfeasibleError(
            f"{name}: one microbatch takes {needed:g} on a rank, and the memory limit is {request.memory_limit:g}; "
            f"nearest: {at_least(needed)}"
        )
    limits = [
        shares * cost.activation if request.memory_limit is None else request.memory_limit for cost in costs.stages
    ]
    candidates = (
        _Pipeline(costs, limits, request.num_microbatches, Rules(*choice))
        for choice in itertools.product((True, False), repeat=len(Rules._fields))
    )
    best = min(candidates, key=lambda pipeline: (pipeline.stage_span, pipeline.makespan))
    return Schedule(
        name=name,
        placement=placement,
        num_microbatches=request.num_microbatches,
        ranks=tuple(tuple(rank.actions) for rank in best.ranks),
    )


def build_1p(request: Request) -> Schedule:
    """The heuristic within p M_B, or the request's limit. Raises InfeasibleError below one microbatch."""
    return _build(request, ZB_1P.name, request.num_ranks)


def build_2p(request: Request) -> Schedule:
    """The heuristic within 2p M_B, or the request's limit. Raises InfeasibleError below one microbatch."""
    return _build(request, ZB_2P.name, 2 * request.num_ranks)


ZB_1P = Family(
    name="zb-1p",
    shape="round-robin",
    build=build_1p,
    summary="zero bubble heuristic with the memory of 1F1B, or within a limit (arXiv 2401.10241, 3.1)",
    uses_costs=True,
    uses_limit=True,
)
ZB_2P = Family(
    name="zb-2p",
    shape="round-robin",
    build=build_2p,
    summary="zero bubble heuristic with twice the memory of 1F1B, or within a limit (arXiv 2401.10241, 3.1)",
    uses_costs=True,
    uses_limit=True,
)
