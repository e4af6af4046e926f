"""Vocabulary parallelism in a schedule of any family: S, T, IF and IB between its passes (arXiv 2411.05288).

Between F and B of a microbatch on the last stage lie S of all ranks, and with two barriers T. In a schedule made
without them B follows F at once, and every microbatch would wait. So first there must be more in flight: the paper
inserts one or two intervals into the building block, and rank 0 holds one or two microbatches more (section 5.1). Here

1. **delay**: every B, with what follows it, moves behind so many more F of its rank (`delayed`). With v chunks these
   are F of chunks, a v-th of a microbatch each, and one or two of them are often enough. Orders on V placements rarely
   survive that, because their chunks meet at the turning points; those made of building blocks are built with a longer
   block instead (`Request.delay`).
2. **insert**: the delayed lists are run with the real costs, and each rank takes vocabulary passes on the way, by one
   of a few rules (`vocabulary_dispatch`).

Several delays are run, then several rules with the best of them. What is quickest within the memory limit is taken, and
of what is as quick (within 0.1 %) what needs least memory. Without a limit the memory is at most that of the paper: one
microbatch more than the family's for each barrier, and what S leaves for T for the microbatches between the two.

F, B and W stay in the order of the family; but where every W is apart from its B, it may run where a rank waits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from megamem.errors import InfeasibleError
from megamem.ir.schedule import Action, Kind, Placement, Schedule
from megamem.ir.workload import HasCosts, PipelineCosts
from megamem.planner.schedules.family import Family, Request, at_least
from megamem.planner.schedules.late_weights import peak_activation
from megamem.planner.schedules.vocabulary_dispatch import Dispatch, Rules
from megamem.planner.schedules.weight_placement import ROUNDING, Timed

_CLOSE: Final = 1.001
"""Times that differ by less are equal, and memory decides."""

_ANY: frozenset[Kind] = frozenset({"F", "B", "BW", "W"})
_FORWARD: frozenset[Kind] = frozenset({"F"})
_BACKWARD: frozenset[Kind] = frozenset({"B", "BW"})


@dataclass(frozen=True, kw_only=True)
class Layers:
    """A workload without its embeddings: what a schedule is made for before vocabulary passes come into it."""

    workload: HasCosts

    def costs(self, placement: Placement, *, sharded: bool = False) -> PipelineCosts:
        """The costs of the stages, without `first` and `last`."""
        whole = self.workload.costs(placement, sharded=True)
        return whole if sharded else replace(whole, vocabulary=None)


class _Candidate(NamedTuple):
    """A base and its lists with vocabulary passes."""

    base: Schedule
    timed: Timed

    @property
    def peak(self) -> float:
        return max(self.timed.peaks)


def build_with_vocabulary(family: Family, request: Request) -> Schedule:
    """The family's schedule with vocabulary passes for `request.vocabulary` barriers.

    Raises InfeasibleError for a memory limit that is too low, and for families that place copies by time.
    """
    if family.offloads:
        raise _with_copies(family.name)
    bases = list(_bases(family, request))
    narrow = _narrow_bases(family, request) if family.uses_limit and request.memory_limit is not None else ()
    return insert_vocabulary(bases, request, narrow=narrow)


def _with_copies(name: str) -> InfeasibleError:
    return InfeasibleError(
        f"{name} places copies to the host by time, before there are vocabulary passes; nearest: gis-h with vocabulary "
        "parallelism, or this one without"
    )


def layers_only(request: Request) -> Request:
    """The request for a schedule that `insert_vocabulary` is to complete: without embeddings, barriers and limit."""
    return replace(request, vocabulary=None, workload=Layers(workload=request.workload), memory_limit=None)


def insert_vocabulary(bases: Iterable[Schedule], request: Request, *, narrow: Iterable[Schedule] = ()) -> Schedule:
    """The best of schedules of F, B, W and BW, the first of which sets the memory, with vocabulary passes.

    narrow: further ones, made for the memory limit

    Raises InfeasibleError, with the least limit that works, where none is within `request.memory_limit`, and for
    schedules with copies to the host.
    """
    bases = list(bases)
    if any(action.kind == "OFFLOAD" for _, action in bases[0]):
        raise _with_copies(bases[0].name)
    plain = [_Base(base, request) for base in bases]
    runs = [*plain, *(_Base(base, request) for base in narrow)]
    limit = request.memory_limit
    allowed = runs[0].usual_limit() if limit is None else limit
    ranks = request.num_ranks
    lags = (0, ranks) if request.vocabulary == 1 else (0,)
    found: list[_Candidate] = []
    for run in runs:
        for lag in lags:
            found += run.inserted(Rules(_ANY, lag), allowed, _bound(found, allowed))
    # With T as soon as it may run, whatever the limit: what is lean enough for one limit is so for all above it.
    lean = [each for run in plain if limit is not None for each in run.inserted(Rules(_ANY), 0.0)]
    found += lean
    chosen = _best(found, allowed)
    refined = next(run for run in runs if run.schedule is chosen.base)
    floats = (False, True) if refined.may_float else (False,)
    rules = [Rules(before, lag, each) for before in (_ANY, _FORWARD, _BACKWARD) for lag in lags for each in floats]
    for rule in (rule for rule in rules[len(lags) :] if rule.floats or rule.before != _ANY):
        found += refined.inserted(rule, allowed, _bound(found, allowed))
    chosen = _best(found, allowed)
    if limit is not None and chosen.peak > limit * ROUNDING:
        base, least = chosen.base, at_least(min(each.peak for each in lean))
        raise InfeasibleError(
            f"{base.name} with vocabulary parallelism: {ranks} ranks with {base.placement.num_chunks} chunks each hold "
            f"activations of up to {least} with {base.num_microbatches} microbatches and {request.vocabulary} "
            f"barrier(s), and the memory limit is {limit:g}; nearest: {least}"
        )
    return replace(chosen.base, ranks=chosen.timed.ranks, barriers=request.vocabulary)


def delays(request: Request) -> list[int]:
    """How many F of chunks to delay B by; the last is the paper's."""
    chunks, barriers = request.num_chunks, request.vocabulary or 1
    return [count for count in sorted({0, 1, 2, chunks, barriers * chunks}) if count <= barriers * chunks]


def delayed(schedule: Schedule, forwards: int) -> Schedule:
    """Every B, BW and W behind so many more F of its rank, as far as there are any."""
    return schedule.with_ranks(_delayed(actions, forwards) for actions in schedule.ranks)


def _delayed(actions: Sequence[Action], forwards: int) -> Iterator[Action]:
    ahead = [action for action in actions if action.kind == "F"]
    seen = emitted = 0
    for action in actions:
        if action.kind == "F":
            seen += 1
            continue
        yield from ahead[emitted : seen + forwards]
        emitted = max(emitted, min(seen + forwards, len(ahead)))
        yield action
    yield from ahead[emitted:]


def _bases(family: Family, request: Request) -> Iterator[Schedule]:
    """The family's schedules with several delays."""
    plain = layers_only(request)
    if family.delays:
        for periods in range((request.vocabulary or 1) + 1):
            yield family.build(replace(plain, delay=periods))
    else:
        base = family.build(plain)
        for forwards in delays(request):
            yield delayed(base, forwards)


def _narrow_bases(family: Family, request: Request) -> Iterator[Schedule]:
    """The same, each made for the memory limit less what the delay takes."""
    plain = layers_only(request)
    stages = plain.costs(plain.placement(family.shape)).stages
    for forwards in delays(request):
        room = (request.memory_limit or 0.0) - forwards * max(stage.activation for stage in stages)
        with contextlib.suppress(InfeasibleError):
            yield delayed(family.build(replace(plain, memory_limit=max(0.0, room))), forwards)


def _best(found: Sequence[_Candidate], limit: float) -> _Candidate:
    """The leanest of the quickest within the limit; of all where none is."""
    fitting = [each for each in found if each.peak <= limit * ROUNDING]
    if not fitting:
        return min(found, key=lambda each: each.peak)
    quickest = min(each.timed.makespan for each in fitting)
    close = [each for each in fitting if each.timed.makespan <= quickest * _CLOSE]
    return min(close, key=lambda each: (_digits(each.peak), _digits(each.timed.makespan)))


def _bound(found: Sequence[_Candidate], limit: float) -> float:
    """The makespan that one more candidate may have at most, to make a difference to `_best`."""
    return min((each.timed.makespan for each in found if each.peak <= limit * ROUNDING), default=math.inf) * _CLOSE


def _digits(value: float) -> float:
    """Nine of them, so that sums in another order are equal."""
    return float(f"{value:.9g}")


class _Base:
    """A schedule that vocabulary passes are inserted into."""

    def __init__(self, schedule: Schedule, request: Request) -> None:
        self.schedule, self.barriers = schedule, request.vocabulary or 1
        self.costs = request.costs(schedule.placement)
        self.bare = [[action for action in actions if action.kind != "W"] for actions in schedule.ranks]

    @property
    def may_float(self) -> bool:
        """Whether W can leave its place: beside a BW of its chunk it could not keep the order of accumulation."""
        return self.schedule.splits_backward and all(action.kind != "BW" for _, action in self.schedule)

    def usual_limit(self) -> float:
        """The memory of the schedule as it is, and what the paper adds."""
        placement, stages = self.schedule.placement, self.costs.stages
        chunks = range(placement.num_chunks)
        microbatch = max(
            sum(stages[placement.stage(rank, chunk)].activation for chunk in chunks)
            for rank in range(placement.num_ranks)
        )
        kept = self.costs.vocabulary.kept if self.costs.vocabulary is not None else 0.0
        own = peak_activation(self.schedule, self.costs)
        return own + self.barriers * microbatch + (self.barriers + 1) * kept

    def inserted(self, rules: Rules, limit: float, bound: float = math.inf) -> list[_Candidate]:
        """The lists with vocabulary passes by these rules; none where they wait for each other, or exceed `bound`."""
        orders = self.bare if rules.floats else self.schedule.ranks
        run = Dispatch(orders, self.schedule.placement, self.costs, self.barriers, rules, limit)
        timed = run.run(bound)
        return [] if timed is None else [_Candidate(self.schedule, timed)]
