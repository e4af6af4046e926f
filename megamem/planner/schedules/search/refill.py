"""A complete order of F and B is kept, and its W are placed anew, whole or in pieces.

Ranks run their lists strictly in order. A W waits in the queue of its rank until there is a gap before the next F or B
of at least `fit` times its length, until the next F needs its memory, or until more than `backlog` of them wait.
Pieces (the linear layers of a chunk) fill gaps that a whole W does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from megamem.planner.schedules.search.problem import Outcome, Problem, Steps


def refill(problem: Problem, merged: Steps, backlog: Sequence[int], fit: float = 1.0, parts: int = 1) -> Outcome | None:
    """Place W into `merged`, lists of F and B. None where the order does not fit the memory, or waits for ever."""
    return _Refill(problem, merged, backlog, fit, parts).run()


class _Refill:
    """One run; a rank goes on until it has to wait for another, which wakes it."""

    def __init__(self, problem: Problem, merged: Steps, backlog: Sequence[int], fit: float, parts: int) -> None:
        self.problem, self.merged, self.fit, self.parts = problem, merged, fit, parts
        self.backlog = [count * parts for count in backlog]
        stages, count, ranks = problem.num_stages, problem.num_microbatches, problem.num_ranks
        self.inputs: list[list[float]] = [[0.0 if stage == 0 else -1.0] * count for stage in range(stages)]
        self.gradients: list[list[float]] = [[-1.0] * count for _ in range(stages)]
        self.clock, self.held, self.position = [0.0] * ranks, [0.0] * ranks, [0] * ranks
        self.waiting: list[deque[tuple[int, int, int]]] = [deque() for _ in range(ranks)]
        self.steps: Steps = [[] for _ in range(ranks)]
        self.w_time = [seconds / parts for seconds in problem.weight]

    def run(self) -> Outcome | None:
        """All steps, or None."""
        awake = list(range(self.problem.num_ranks))
        while awake:
            rank = awake.pop()
            woken = self._advance(rank)
            if woken is None:
                return None
            awake += [other for other in woken if other not in awake and other != rank]
        for rank, order in enumerate(self.merged):
            if self.position[rank] < len(order):
                return None
            self.clock[rank] = self._run_weights(rank, self.clock[rank], len(self.waiting[rank]))
        return Outcome(max(self.clock), self.steps)

    def _run_weights(self, rank: int, clock: float, count: int) -> float:
        """Run `count` pieces of W on `rank`; its new time."""
        problem, queue, steps = self.problem, self.waiting[rank], self.steps[rank]
        for _ in range(count):
            stage, batch, part = queue.popleft()
            clock += self.w_time[stage]
            steps.append(("W", stage, batch, part))
            if part == self.parts - 1:
                self.held[rank] -= problem.kept[stage]
        return clock

    def _advance(self, rank: int) -> set[int] | None:
        """Run `rank` until it has to wait; the ranks that it gave something to. None where its memory is too small."""
        problem, order, queue, steps = self.problem, self.merged[rank], self.waiting[rank], self.steps[rank]
        take, kept, hop, ranks, w_time = problem.take, problem.kept, problem.hop, problem.ranks, self.w_time
        backlog, fit, hair, last = self.backlog[rank], self.fit, 1e-9 * problem.period, problem.num_stages - 1
        clock, position, woken = self.clock[rank], self.position[rank], set[int]()
        while position < len(order):
            step = kind, stage, batch, _ = order[position]
            ready = self.inputs[stage][batch] if kind == "F" else self.gradients[stage][batch]
            if ready < 0:
                break
            if kind == "F":
                while self.held[rank] + take[stage] > problem.limit:
                    if not queue:
                        return None
                    clock = self._run_weights(rank, clock, 1)
            while queue and (ready - clock >= fit * w_time[queue[0][0]] - hair or len(queue) > backlog):
                clock = self._run_weights(rank, clock, 1)
            if ready > clock:
                clock = ready
            if kind == "F":
                clock += problem.forward[stage]
                self.held[rank] += take[stage]
                rows, other, delay = self.inputs, stage + 1, hop[stage]
                if stage == last:
                    rows, other = self.gradients, stage
            else:
                clock += problem.backward[stage]
                self.held[rank] -= take[stage] - kept[stage]
                queue.extend((stage, batch, part) for part in range(self.parts))
                rows, other, delay = self.gradients, stage - 1, hop[stage - 1]
            steps.append(step)
            if other >= 0:
                rows[other][batch] = clock + delay
                woken.add(ranks[other])
            position += 1
        self.clock[rank], self.position[rank] = clock, position
        return woken
