"""From some steps of one kind to a plan for all that follow.

What a step asks for is the same every time; when it gives it back is nearly so. Three steps of a Megatron GPT on a CPU
have the same sizes in the same order, and 0.2 to 0.3 % of their buffers are freed a little earlier or later. So:

* **the union of lifetimes**: a buffer is live until the latest of its ends in the recorded steps
* **circular lifetimes**: a buffer that outlives its step is in its place while the next one runs, until it is freed
  there. It is planned as live from the first request to the last (Imanishi and Xu, ISMM 2024, place such buffers more
  closely; they are few and small in training). Where the next one of its kind comes before that, there are two of
  them at a time, which no one place can hold: those are left to the native allocator
* **what varies is left out**: a request whose size changes from step to step (experts of an MoE), that does not come in
  every step, that a second stream uses or that nobody frees is the native allocator's. It stays in the sequence, so
  that the others keep their numbers
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from megamem.errors import AllocationError
from megamem.ir.allocation import Buffer, Problem
from megamem.ir.arena import ALIGNMENT, NATIVE, OPTIONAL, ArenaPlan, StepRequests
from megamem.native.arena import align
from megamem.planner.allocation.budget import Budget
from megamem.planner.allocation.solver import Outcome, Progress, Solver

GOOD_ENOUGH = 1e-3
"""A plan within this share of the lower bound is not worth a longer search while all ranks wait."""


@dataclass(frozen=True, kw_only=True)
class Union:
    """What the recorded steps have in common. Request i has sizes[i] bytes (0: they differ), and is live while
    requests lifetimes[i][0], ..., lifetimes[i][1] - 1 are made; None where the arena cannot serve it. `optional` are
    those that did not always come.
    """

    sizes: tuple[int, ...]
    lifetimes: tuple[tuple[int, int] | None, ...]
    optional: frozenset[int]

    def problem(self) -> Problem:
        """The requests for the arena, sizes rounded up to its alignment; the id of each is its number."""
        return Problem(
            buffers=tuple(
                Buffer(id=str(i), lower=life[0], upper=life[1], size=-(-size // ALIGNMENT) * ALIGNMENT)
                for i, (size, life) in enumerate(zip(self.sizes, self.lifetimes, strict=True))
                if life is not None
            )
        )


def union_of(steps: Sequence[StepRequests]) -> Union:
    """What successive steps of one kind have in common, in the order of the last one.

    Raises AllocationError without a step, NativeError where the core that compares them cannot be built.
    """
    if not steps:
        raise AllocationError("no step was recorded")
    last = steps[-1]
    places = [_Places(last.sizes, step.sizes) for step in steps]
    lifetimes: list[tuple[int, int] | None] = []
    sizes, optional = list(last.sizes), set()
    for request in range(len(last)):
        found = [(number, at) for number, place in enumerate(places) if (at := place.request(request)) is not None]
        varies = any(steps[number].sizes[at] != sizes[request] for number, at in found)
        if varies:
            sizes[request] = 0
        if len(found) < len(steps):
            optional.add(request)
        elif not varies and not any(at in steps[number].shared for number, at in found):
            lifetimes.append(_lifetime(request, found, steps, places))
            continue
        lifetimes.append(None)
    return Union(sizes=tuple(sizes), lifetimes=tuple(lifetimes), optional=frozenset(optional))


class _Places:
    """Which request of the reference each request of a step is."""

    def __init__(self, reference: Sequence[int], sizes: Sequence[int]) -> None:
        self._end = len(reference)
        index = range(self._end) if list(reference) == list(sizes) else align(reference, sizes)
        matches = [(at, place) for at, place in enumerate(index) if place >= 0]
        self._at, self._place = [at for at, _ in matches], [place for _, place in matches]
        self._by_place = {place: at for at, place in matches}

    def request(self, place: int) -> int | None:
        """The number in this step of a request of the reference."""
        return self._by_place.get(place)

    def after(self, position: int) -> int:
        """The first request of the reference that comes when `position` requests of this step have come."""
        found = bisect.bisect_left(self._at, position)
        return self._place[found] if found < len(self._place) else self._end


def _lifetime(
    request: int, found: Sequence[tuple[int, int]], steps: Sequence[StepRequests], places: Sequence[_Places]
) -> tuple[int, int] | None:
    """The union of the request's lifetimes; None where it cannot have one place in every step."""
    whole = (0, len(steps[-1]))
    upper, is_circular, num_known = request + 1, False, 0
    for number, at in found:
        end = steps[number].ends[at]
        if end is None and number == len(steps) - 1:
            is_circular = True  # its end was not waited for
            continue
        if end is None or end.steps > 1:
            return None
        num_known += 1
        if end.steps == 0:
            upper = max(upper, places[number].after(end.position))
        elif number + 1 < len(steps) and places[number + 1].after(end.position) > request:
            return None  # the next one comes while this is live
        else:
            is_circular = True
    if num_known == 0:
        return None
    return whole if is_circular else (request, upper)


def plan_steps(
    key: str, steps: Sequence[StepRequests], *, min_size: int, solver: Solver, time_limit: float | None = None
) -> ArenaPlan:
    """A plan for steps of kind `key`, made of some successive ones; within `time_limit` seconds.

    Raises AllocationError without a step, NativeError where the core cannot be built.
    """
    union = union_of(steps)
    outcome = _solve(union.problem(), solver, time_limit)
    offsets = [OPTIONAL if i in union.optional else NATIVE for i in range(len(union.sizes))]
    for offset, buffer in outcome.solution:
        offsets[int(buffer.id)] = offset
    return ArenaPlan(
        key=key,
        sizes=union.sizes,
        offsets=tuple(offsets),
        min_size=min_size,
        lower_bound=outcome.lower_bound,
        solver=outcome.solver,
    )


def _solve(problem: Problem, solver: Solver, time_limit: float | None) -> Outcome:
    """The best of the time, or the first that is good enough."""
    budget = Budget(time_limit)

    def stop_early(progress: Progress) -> None:
        if progress.peak <= (1 + GOOD_ENOUGH) * progress.lower_bound:
            budget.stop()

    return solver.solve(problem, budget=budget, on_progress=stop_early)
