"""Where W goes: lists of F and B are run with the request's costs, and W put into them on the way.

A W may run at any time after its B. `place_weights` replays the lists eagerly, as ranks will, and starts the oldest W
of a rank

* where the next F would exceed the rank's memory,
* where the rank waits for a message: if the wait is at least `patience` times as long as the W. With 1 a W never
  delays anything; with less it may, and ends sooner itself; with more than 1 it keeps some distance.

What is left comes at the end. Within a chunk W keeps the order of B, so that gradients accumulate as in 1F1B.

Lists that hold W or BW already are only timed. This timing serves the choice between orders while a schedule is being
made; it shares nothing with the simulator, which prices the result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from megamem.ir.schedule import Action, Kind, Placement
from megamem.ir.workload import PipelineCosts

Orders = Sequence[Sequence[Action]]

ROUNDING = 1 + 1e-9
"""Sums of shares of a limit may exceed it by this."""

PATIENCE = (1.0, 0.75, 0.5, 0.25, 1e-9)
"""What is tried: how long a wait must be for a W to start in it, as a share of the W."""


class Timed(NamedTuple):
    """Complete lists of actions, and what they take: times and peaks of memory, in the units of the costs."""

    ranks: tuple[tuple[Action, ...], ...]
    makespan: float
    stage_span: float
    peaks: tuple[float, ...]


class _Step(NamedTuple):
    """A kind of action of one chunk on one rank."""

    source: int  # row of the times of what it waits for; -1 for nothing but its own rank
    latency: float
    seconds: float
    target: int  # row that takes its end; -1 for W
    take: float
    give: float


class _Rank:
    """A rank on its way through its list."""

    def __init__(self, order: Sequence[Action], steps: dict[tuple[Kind, int], _Step], cap: float) -> None:
        self.order, self.steps, self.cap = order, steps, cap * ROUNDING
        self.listed = any(action.kind == "W" for action in order)
        self.done: list[Action] = []
        self.owed: deque[Action] = deque()
        self.position, self.clock, self.start = 0, 0.0, -1.0
        self.held = self.peak = 0.0

    def weight(self) -> None:
        """Run the oldest W."""
        action = self.owed.popleft()
        step = self.steps["W", action.chunk]
        self.clock += step.seconds
        self.held -= step.give
        self.done.append(action)


def place_weights(
    orders: Orders,
    placement: Placement,
    costs: PipelineCosts,
    caps: Sequence[float] | None = None,
    patience: float = 1.0,
) -> Timed | None:
    """The lists with W in them, timed; None where a cap cannot be kept or the lists wait for each other.

    orders: per rank F and B in the order in which they run, or complete lists
    caps:   memory per rank, in the unit of the costs; None for none
    """
    size = max((action.microbatch for order in orders for action in order), default=0) + 1
    stages = placement.num_stages
    ends = [[-1.0] * size for _ in range(2 * stages)]  # of F by stage, then of B by stage
    ranks = [
        _Rank(order, _steps(placement, costs, rank), caps[rank] if caps is not None else float("inf"))
        for rank, order in enumerate(orders)
    ]
    sleepers: dict[tuple[int, int], int] = {}
    runnable = deque(range(len(ranks)))
    while runnable:
        index = runnable.popleft()
        for key in _run(ranks[index], ends, patience, sleepers, index):
            if (sleeper := sleepers.pop(key, None)) is not None:
                runnable.append(sleeper)
    if any(rank.position < len(rank.order) for rank in ranks):
        return None
    for rank in ranks:
        while rank.owed:
            rank.weight()
    return Timed(
        tuple(tuple(rank.done) for rank in ranks),
        max(rank.clock for rank in ranks),
        max(rank.clock - rank.start for rank in ranks),
        tuple(rank.peak for rank in ranks),
    )


def _run(
    rank: _Rank,
    ends: list[list[float]],
    patience: float,
    sleepers: dict[tuple[int, int], int],
    index: int,
) -> list[tuple[int, int]]:
    """Run the rank until it waits for something that is not there yet; what it has finished meanwhile."""
    finished = []
    order, steps, owed = rank.order, rank.steps, rank.owed
    while rank.position < len(order):
        action = order[rank.position]
        kind, chunk, microbatch = action[:3]
        source, latency, seconds, target, take, give = steps[kind, chunk]
        arrival = 0.0
        if source >= 0:
            arrival = ends[source][microbatch]
            if arrival < 0:
                sleepers[source, microbatch] = index
                break
            arrival += latency
        if take:
            while owed and rank.held + take > rank.cap:
                rank.weight()
            if rank.held + take > rank.cap:
                break
        while owed and arrival > rank.clock:
            if arrival - rank.clock < patience * steps["W", owed[0].chunk].seconds / ROUNDING:
                break
            rank.weight()
        start = max(arrival, rank.clock)
        if rank.start < 0:
            rank.start = start
        rank.clock = start + seconds
        rank.held += take
        rank.peak = max(rank.peak, rank.held)
        rank.held -= give
        if target >= 0:
            ends[target][microbatch] = rank.clock
            finished.append((target, microbatch))
        if kind == "B" and not rank.listed:
            owed.append(Action("W", chunk, microbatch))
        rank.done.append(action)
        rank.position += 1
    return finished


def _steps(placement: Placement, costs: PipelineCosts, rank: int) -> dict[tuple[Kind, int], _Step]:
    """What each kind of action of each chunk of a rank waits for, takes and gives."""
    steps: dict[tuple[Kind, int], _Step] = {}
    count = placement.num_stages
    for chunk in range(placement.num_chunks):
        stage = placement.stage(rank, chunk)
        cost = costs.stages[stage]

        def hop(other: int) -> float:
            return 0.0 if placement.rank_of(other) == rank else costs.comm

        before, after = (stage - 1, hop(stage - 1)) if stage else (-1, 0.0), (stage, 0.0)
        if stage + 1 < count:
            after = (count + stage + 1, hop(stage + 1))
        freed = cost.activation - cost.weight_grad
        steps["F", chunk] = _Step(*before, cost.forward, stage, cost.activation, 0.0)
        steps["B", chunk] = _Step(*after, cost.backward, count + stage, 0.0, freed)
        steps["W", chunk] = _Step(-1, 0.0, cost.weight, -1, 0.0, cost.weight_grad)
        steps["BW", chunk] = _Step(*after, cost.backward + cost.weight, count + stage, 0.0, cost.activation)
    return steps


def with_weights(
    orders: Orders, placement: Placement, costs: PipelineCosts, caps: Sequence[float], *, quick: bool = False
) -> list[Timed]:
    """Complete orders as they are, and with W placed by the costs in several ways, as far as the caps allow.

    quick: in fewer ways
    """
    without = [[action for action in order if action.kind != "W"] for order in orders]
    tried = [place_weights(orders, placement, costs, caps)]
    for patience in PATIENCE[::2] if quick else PATIENCE:
        tried.append(place_weights(without, placement, costs, caps, patience))
    return [timed for timed in tried if timed is not None]


def best_of(candidates: Iterable[Timed]) -> Timed | None:
    """The candidate with the least makespan, then stage span; the first of equals, None of none."""
    return min(candidates, key=lambda timed: (_rounded(timed.makespan), _rounded(timed.stage_span)), default=None)


def no_worse(timed: Timed, other: Timed) -> bool:
    """Whether neither makespan nor stage span is longer."""
    return timed.makespan <= other.makespan * ROUNDING and timed.stage_span <= other.stage_span * ROUNDING


def _rounded(seconds: float) -> float:
    """Nine digits, so that sums in another order are equal."""
    return float(f"{seconds:.9g}")
