"""The static allocator at work: record some steps, have them planned, serve the steps that follow from the arena.

    allocator = StaticAllocator(front_end, make_plan, profile_steps=2, min_size=1 << 20)
    for ...:
        allocator.begin_step("train, 4 microbatches")      what follows, up to the next call, is one step of this kind
        ...

Each kind of step goes its own way: the first one is not like the others (optimizer states, communicators), so it only
warms up; `profile_steps` are recorded, while the native allocator serves them; then `make_plan` is asked, and from then
on the arena serves. A step that departs from the plan loses nothing but the arena's service: what does not match goes
to the native allocator and is counted. Where a kind keeps departing from its plan, it is recorded again, still being
served, and planned anew; each time it takes longer until that is tried once more.

The core (`megamem/native/src/arena.h`) matches and serves; this decides between steps, and never while one runs.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megamem.errors import MegamemError
from megamem.ir.arena import ArenaPlan, Freed, StepRequests
from megamem.native.arena import ArenaCounters, Event
from megamem.runtime.arena_front_ends import FrontEnd
from megamem.runtime.arena_snapshot import snapshot_of

_LOG = logging.getLogger("megamem")

Planner = Callable[[str, Sequence[StepRequests]], ArenaPlan]

MAX_EVENTS = 1 << 22  # of one step; 160 MiB while it is recorded
ENOUGH_SERVED = 0.95  # of the bytes that the plan has for the arena; a step below that departs from the plan
PATIENCE = 3  # steps in a row that depart from the plan before it is made anew; doubled each time
_MAX_DOUBLINGS = 8


@dataclass(kw_only=True)
class _Kind:
    """How far one kind of step is. `recorded` holds the events of each step while it is being recorded."""

    number: int
    num_steps: int = 0
    plan: ArenaPlan | None = None
    recorded: list[list[Event]] | None = None
    num_departures: int = 0  # in a row
    num_plans: int = 0
    is_given_up: bool = False

    @property
    def patience(self) -> int:
        return PATIENCE << min(max(self.num_plans - 1, 0), _MAX_DOUBLINGS)


@dataclass(frozen=True, kw_only=True)
class KindReport:
    """One kind of step: how many there were, how often it was planned, and its plan."""

    key: str
    num_steps: int
    num_plans: int
    plan: ArenaPlan | None


@dataclass(frozen=True, kw_only=True)
class ArenaReport:
    """What the static allocator did so far, on this rank. Bytes."""

    front_end: str
    kinds: tuple[KindReport, ...]
    counters: ArenaCounters

    @property
    def planned_peak(self) -> int:
        """Bytes of the arena that the largest plan needs."""
        return max((kind.plan.peak for kind in self.kinds if kind.plan is not None), default=0)

    @property
    def num_requests(self) -> int:
        """Requests while a plan was served, whoever served them."""
        return sum(self.counters.requests.values())

    @property
    def requested_nbytes(self) -> int:
        """Their bytes."""
        return sum(self.counters.nbytes.values())

    @property
    def served_share(self) -> float:
        """The share of the requests that the arena served; 0 before there were any."""
        return self.counters.requests["served"] / max(self.num_requests, 1)

    @property
    def served_bytes_share(self) -> float:
        """The same by bytes."""
        return self.counters.nbytes["served"] / max(self.requested_nbytes, 1)

    @property
    def num_fallbacks(self) -> int:
        """Requests that the plan did not foresee: they came out of order, or their place was still taken."""
        return self.counters.requests["missed"] + self.counters.requests["conflict"]

    @property
    def fallback_nbytes(self) -> int:
        """Their bytes."""
        return self.counters.nbytes["missed"] + self.counters.nbytes["conflict"]


@dataclass(kw_only=True)
class StaticAllocator:
    """Records, has planned, and serves. One of them in a process; `close` undoes everything.

    make_plan:      decides between steps where each request lies; may take its time, all ranks wait
    profile_steps:  steps of a kind to record before it is planned, at least 1
    min_size:       smaller requests are left to the native allocator, in bytes
    plans:          by kind, from an earlier run; served from the first step of the kind on
    poison:         keep what is free of the arena filled with NaN, to find reads of memory that nobody wrote to
    """

    front_end: FrontEnd
    make_plan: Planner
    profile_steps: int
    min_size: int
    plans: Mapping[str, ArenaPlan] = field(default_factory=dict)
    poison: bool = False
    history: deque[Event] | None = field(default=None, init=False)
    _kinds: dict[str, _Kind] = field(default_factory=dict, init=False)
    _current: _Kind | None = field(default=None, init=False)
    _before: ArenaCounters = field(init=False)
    _start: ArenaCounters = field(init=False)
    _num_events: int = field(default=0, init=False)
    _has_warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._start = self._before = self.front_end.core.counters()
        if self.poison:
            self.front_end.core.poison(True)

    def begin_step(self, key: str) -> None:
        """A step of kind `key` begins, and the one before is over."""
        self.end_step()
        core = self.front_end.core
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = self._new_kind(key)
        self._decide(key, kind)
        kind.num_steps += 1
        self._current, self._before = kind, core.counters()
        is_watched = kind.recorded is not None or self.history is not None
        core.watch(max_events=MAX_EVENTS if is_watched else None)
        if not core.begin(None if kind.plan is None else kind.number, self.front_end.stream()):
            self._warn_of_no_room(kind)

    def end_step(self) -> None:
        """The step is over, with what came after it; the native allocator serves until the next one begins."""
        core, kind = self.front_end.core, self._current
        core.end()
        if kind is None:
            return
        self._current = None
        after = core.counters()
        is_watched = kind.recorded is not None or self.history is not None
        events = core.events() if is_watched else []
        core.watch(max_events=None)
        self._num_events += len(events)
        if self.history is not None:
            self.history.extend(events)
        if kind.recorded is not None:
            if after.num_dropped > self._before.num_dropped:
                _LOG.warning("megamem: a step of more than %d mallocs and frees cannot be planned", MAX_EVENTS)
                kind.recorded, kind.is_given_up = None, True
            else:
                kind.recorded.append(events)
        if kind.plan is not None:
            served = after.nbytes["served"] - self._before.nbytes["served"]
            departs = served < ENOUGH_SERVED * kind.plan.planned_nbytes
            kind.num_departures = kind.num_departures + 1 if departs else 0

    def abandon_step(self) -> None:
        """The step has failed. Nothing of it is used, and the native allocator serves until the next one begins."""
        if self._current is not None and self._current.recorded is not None:
            self._current.recorded = []
        self._current = None
        self.front_end.core.end()
        self.front_end.core.watch(max_events=None)

    @property
    def has_seen_requests(self) -> bool:
        """Whether any malloc has come by: a front end that is not asked serves nobody."""
        core = self.front_end.core
        num_steps = sum(kind.num_steps for kind in self._kinds.values())  # each is an event
        return self._num_events + core.num_events > num_steps or core.counters().requests != self._start.requests

    def report(self) -> ArenaReport:
        """What was done so far."""
        now = self.front_end.core.counters()
        return ArenaReport(
            front_end=self.front_end.name,
            kinds=tuple(
                KindReport(key=key, num_steps=kind.num_steps, num_plans=kind.num_plans, plan=kind.plan)
                for key, kind in self._kinds.items()
            ),
            counters=now.since(self._start),
        )

    def record_history(self, max_events: int | None = 1 << 20) -> None:
        """Keep the last `max_events` mallocs and frees for `snapshot`; None ends it. Takes effect at the next step."""
        self.history = None if max_events is None else deque(maxlen=max_events)

    def snapshot(self) -> dict[str, Any]:
        """The arena now, and the history, in the form of PyTorch's memory snapshots (see `arena_snapshot`)."""
        core = self.front_end.core
        return snapshot_of(core, [*(self.history or ()), *(core.events() if self.history is not None else ())])

    def close(self) -> None:
        """Serve no more; the arena's memory is given back with its last block."""
        self.end_step()
        if self.poison:
            self.front_end.core.poison(False)
        self.front_end.core.reset()
        self.front_end.uninstall()

    def _new_kind(self, key: str) -> _Kind:
        kind = _Kind(number=len(self._kinds))
        plan = self.plans.get(key)
        if plan is not None and plan.min_size == self.min_size:
            self._adopt(kind, plan)
        else:
            kind.recorded = []
        return kind

    def _decide(self, key: str, kind: _Kind) -> None:
        """Plan, if enough was recorded; record, if the plan is not kept to."""
        if kind.recorded is not None:
            warm_up = 1 if kind.plan is None else 0
            if len(kind.recorded) < self.profile_steps + warm_up:
                return
            steps = read_steps(kind.recorded[warm_up:], self.min_size)
            kind.recorded = None
            try:
                self._adopt(kind, self.make_plan(key, steps))
            except MegamemError as fault:
                _LOG.warning("megamem: steps of kind %r are left to the native allocator: %s", key, fault)
                kind.is_given_up = True
        elif kind.num_departures >= kind.patience and not kind.is_given_up:
            _LOG.info("megamem: steps of kind %r depart from their plan; they are planned anew", key)
            kind.recorded = []

    def _adopt(self, kind: _Kind, plan: ArenaPlan) -> None:
        self.front_end.core.load(kind.number, plan.sizes, plan.offsets, min_size=plan.min_size)
        kind.plan = plan
        kind.num_plans += 1
        kind.num_departures = 0

    def _warn_of_no_room(self, kind: _Kind) -> None:
        if not self._has_warned and kind.plan is not None:
            self._has_warned = True
            _LOG.warning(
                "megamem: there are no %.2f GiB for the arena, so the native allocator serves; something else holds "
                "memory that was free while the steps were recorded",
                kind.plan.peak / 2**30,
            )


def read_steps(recorded: Sequence[Sequence[Event]], min_size: int) -> list[StepRequests]:
    """Successive steps of one kind from their events, of which each step's begin with its `step` event.

    Only requests on the step's stream and of at least `min_size` bytes count.
    """
    steps: list[StepRequests] = []
    live: dict[int, tuple[int, int]] = {}  # by address: step, request
    made: list[tuple[list[int], list[Freed | None], set[int]]] = []
    for number, events in enumerate(recorded):
        sizes: list[int] = []
        ends: list[Freed | None] = []
        made.append((sizes, ends, set()))
        stream = next((event.stream for event in events if event.kind == "step"), 0)
        for event in events:
            if event.kind == "malloc":
                live.pop(event.address, None)  # its free was not seen
                if event.stream == stream and event.size >= min_size:
                    live[event.address] = number, len(sizes)
                    sizes.append(event.size)
                    ends.append(None)
            elif event.kind == "free" and event.address in live:
                step, request = live.pop(event.address)
                made[step][1][request] = Freed(steps=number - step, position=len(sizes))
            elif event.kind == "use" and event.address in live:
                step, request = live[event.address]
                made[step][2].add(request)
    steps.extend(StepRequests(sizes=sizes, ends=ends, shared=frozenset(shared)) for sizes, ends, shared in made)
    return steps
