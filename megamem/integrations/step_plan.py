"""A schedule ready to run on one rank: with its messages, and what a rank must know of its own part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megamem.ir.schedule import Action, Schedule
from megamem.planner.schedules.passes import add_communication
from megamem.planner.schedules.plan import PlannedSchedule

_LAYERS = ("B", "W", "BW")


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What a rank does in a step.

    planned:        None for a forward-only order
    split:          chunks and microbatches whose backward pass is B and W
    offloaded:      chunks and microbatches that wait in host memory between F and B
    inputs:         microbatches in the order in which the first stage takes them
    first:          the first F of every chunk
    last:           the actions after which a parameter of this rank has all its gradients, or some of which have
    last_gradient:  the action after which a chunk has all its gradients, with the chunk
    """

    schedule: Schedule
    planned: PlannedSchedule | None
    actions: tuple[Action, ...]
    split: frozenset[tuple[int, int]]
    offloaded: frozenset[tuple[int, int]]
    inputs: tuple[int, ...]
    first: frozenset[Action]
    last: frozenset[Action]
    last_gradient: dict[Action, int]

    @classmethod
    def of(cls, schedule: Schedule, planned: PlannedSchedule | None, rank: int, *, is_tied: bool = False) -> StepPlan:
        """The plan of pipeline rank `rank`. is_tied: T and IB make gradients of the same weight."""
        actions = add_communication(schedule).ranks[rank]
        first: dict[int, Action] = {}
        for action in actions:
            if action.kind == "F":
                first.setdefault(action.chunk, action)
        inputs = [a.microbatch for a in schedule.ranks[schedule.placement.rank_of(0)] if a[:2] == ("F", 0)]
        return cls(
            schedule=schedule,
            planned=planned,
            actions=actions,
            split=frozenset((a.chunk, a.microbatch) for a in actions if a.kind == "B"),
            offloaded=frozenset((a.chunk, a.microbatch) for a in actions if a.kind == "OFFLOAD"),
            inputs=tuple(inputs),
            first=frozenset(first.values()),
            last=frozenset([*_last_of_layers(actions), *_last_of_vocabulary(actions, is_tied)]),
            last_gradient={
                action: chunk
                for chunk, action in {a.chunk: a for a in actions if a.kind in (*_LAYERS, "T", "IB")}.items()
            },
        )


def _last_of_layers(actions: Sequence[Action]) -> Iterator[Action]:
    """The passes of every chunk's last microbatch."""
    final = {action.chunk: action.microbatch for action in actions if action.kind in _LAYERS}
    for action in actions:
        if action.kind in _LAYERS and action.microbatch == final[action.chunk]:
            yield action


def _last_of_vocabulary(actions: Sequence[Action], is_tied: bool) -> Iterator[Action]:
    """The last pass for each of the two weights of the vocabulary, or for the one."""
    for kinds in [("T", "IB")] if is_tied else [("T",), ("IB",)]:
        yield from [action for action in actions if action.kind in kinds][-1:]
