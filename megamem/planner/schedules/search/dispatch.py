"""From orders to a schedule: when a rank is free, does it run its next F, its next B, a W, or wait?

`dispatch` takes two queues per rank, the order of its F and the order of its B, and merges them in time by a `Rule`.
The queues hold the structure (groups of microbatches, or a modulo schedule); the rule adapts it to costs, latencies and
memory. That is why a group may be smaller than half the ranks here, where a fixed alternation of F and B would wait for
ever (arXiv 2503.01328, section 4: group interleaving).

W is the filler (arXiv 2401.10241, section 2): it runs where the rank would wait at least as long as it takes, where the
next F needs its memory, and where more W wait than the rule allows. The last is worth most: a rank that begins its
backward passes late may leave W behind, so that the ranks before it get their B sooner, and make them up in the
cool-down while those ranks finish.

`refill` keeps a complete order of F and B and places the W anew, in pieces if wanted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from megamem.planner.schedules.search.problem import Outcome, Problem, Queue, Steps


class Rule(NamedTuple):
    """How a rank chooses.

    patience:   F does not start when B is known to come within this share of the F's time, unless it is F's turn
    alternate:  after a B it is F's turn: F is preferred where both are ready; otherwise B always is
    backlog:    per rank, how many W may wait
    caps:       per rank, the memory it may use; at most the limit
    """

    patience: float
    alternate: bool
    backlog: tuple[int, ...]
    caps: tuple[float, ...]


class _Row(NamedTuple):
    """What running F or B of a stage does."""

    seconds: float
    change: float  # of the memory held
    target: list[float] | None  # by microbatch: when its result arrives there
    neighbour: int  # the rank that the result is for
    hop: float


class _Board:
    """When the input of every F and the gradient of every B are there, and what each step changes."""

    def __init__(self, problem: Problem) -> None:
        stages, count, ranks = problem.num_stages, problem.num_microbatches, problem.ranks
        self.inputs = [[0.0 if stage == 0 else math.inf] * count for stage in range(stages)]
        self.gradients = [[math.inf] * count for _ in range(stages)]
        self.forward: list[_Row] = []
        self.backward: list[_Row] = []
        for stage in range(stages):
            # The last stage turns around: its own B waits for its F.
            above = stage + 1 if stage + 1 < stages else stage
            up = self.inputs[above] if above > stage else self.gradients[stage]
            take, kept = problem.take[stage], problem.kept[stage]
            self.forward.append(_Row(problem.forward[stage], take, up, ranks[above], problem.hop[stage]))
            down = self.gradients[stage - 1] if stage else None
            self.backward.append(
                _Row(problem.backward[stage], kept - take, down, ranks[stage - 1], problem.hop[stage - 1])
            )


def dispatch(problem: Problem, forward: Sequence[Queue], backward: Sequence[Queue], rule: Rule) -> Outcome | None:
    """Merge the queues in time. None where the orders wait for each other within the memory there is."""
    board, everyone = _Board(problem), range(problem.num_ranks)
    inputs, gradients, f_rows, b_rows = board.inputs, board.gradients, board.forward, board.backward
    f_time, w_time, take, kept = problem.forward, problem.weight, problem.take, problem.kept
    patience, alternate, backlog = rule.patience, rule.alternate, rule.backlog
    caps, hair, never = [min(cap, problem.limit) for cap in rule.caps], 1e-9 * problem.period, math.inf
    later_f, later_b = [iter(queue) for queue in forward], [iter(queue) for queue in backward]
    next_f, next_b = [next(queue, None) for queue in later_f], [next(queue, None) for queue in later_b]
    held, free, f_turn = [0.0 for _ in everyone], [0.0 for _ in everyone], [True for _ in everyone]
    waiting: list[deque[tuple[int, int]]] = [deque() for _ in everyone]
    steps: Steps = [[] for _ in everyone]
    looks = [(0.0, rank) for rank in everyone]
    while looks:
        now, rank = heappop(looks)
        if now < free[rank]:
            continue  # it was given something to do since
        soon, f_at, b_at, idle_w, blocked = now + hair, never, never, waiting[rank], False
        if (b_head := next_b[rank]) is not None:
            b_at = gradients[b_head[0]][b_head[1]]
        if (f_head := next_f[rank]) is not None:
            f_stage, f_batch = f_head
            f_at = inputs[f_stage][f_batch]
            if held[rank] + take[f_stage] > caps[rank]:
                blocked, f_at = f_at <= soon, never
        turn = alternate and f_turn[rank]
        if len(idle_w) > backlog[rank]:
            kind = "W"
        elif b_at <= soon and not (turn and f_at <= soon):
            kind = "B"
        elif f_at <= soon and (turn or b_at <= soon or b_at >= now + patience * f_time[f_stage] - hair):
            kind = "F"
        elif idle_w and (blocked or (f_at if f_at < b_at else b_at) - now >= w_time[idle_w[0][0]] - hair):
            kind = "W"
        else:
            wake = b_at if f_at <= soon or b_at < f_at else f_at
            if wake < never:
                heappush(looks, (wake, rank))
            continue
        if kind == "W":
            stage, batch = idle_w.popleft()
            seconds, change, target = w_time[stage], -kept[stage], None
        elif kind == "F":
            stage, batch = f_head  # type: ignore[misc]
            next_f[rank] = next(later_f[rank], None)
            f_turn[rank] = False
            seconds, change, target, neighbour, hop = f_rows[stage]
        else:
            stage, batch = b_head  # type: ignore[misc]
            next_b[rank] = next(later_b[rank], None)
            f_turn[rank] = True
            idle_w.append((stage, batch))
            seconds, change, target, neighbour, hop = b_rows[stage]
        free[rank] = end = now + seconds
        held[rank] += change
        if target is not None:
            target[batch] = at = end + hop
            heappush(looks, (at if at > free[neighbour] else free[neighbour], neighbour))
        steps[rank].append((kind, stage, batch, 0))
        heappush(looks, (end, rank))
    return Outcome(max(free), steps) if sum(map(len, steps)) == problem.num_steps else None
