"""Passes over schedules: pure functions from a schedule to a schedule. None of them changes the order of computation.

    strip_communication   without sends and receives
    add_communication     a send after every action that makes a message, a receive before every action that needs one
    receive_buffers       how many received, or awaited, messages each rank must have room for
    forward_only          the forward passes only, for an evaluation
    merge_backward        B and the W that follows it at once become a BW, one call of autograd

**Messages.** A rank sends through channels: one per direction (F or B), sender and receiver, first in, first out. The
i-th send on a channel meets the i-th receive, and a transfer ends when both are posted and all before it on the channel
have ended. Posting does not wait; the action that needs the message does. Nothing can block then as long as both sides
post the messages of a channel in the same order, which is the order in which the sender makes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from megamem.errors import ScheduleError
from megamem.ir.schedule import COMMUNICATION, Action, Channel, Direction, Kind, Placement, Schedule

_SEND: dict[Direction, Kind] = {"F": "SEND_F", "B": "SEND_B"}
_RECV: dict[Direction, Kind] = {"F": "RECV_F", "B": "RECV_B"}


class _Message(NamedTuple):
    """What the stage that receives it calls a message."""

    channel: Channel
    chunk: int  # of the receiver
    microbatch: int


def strip_communication(schedule: Schedule) -> Schedule:
    """Without sends and receives."""
    return schedule.with_ranks([a for a in actions if a.kind not in COMMUNICATION] for actions in schedule.ranks)


def forward_only(schedule: Schedule) -> Schedule:
    """The forward passes only, without communication: nothing is kept for a backward pass.

    S is one of them, for it makes the loss, and so is IF.
    """
    kinds = ("F", "IF", "S")
    return schedule.with_ranks([action for action in actions if action.kind in kinds] for actions in schedule.ranks)


def merge_backward(schedule: Schedule) -> Schedule:
    """BW for every B whose whole W, in one piece or in all its parts, follows at once."""
    return schedule.with_ranks(_merged(actions) for actions in schedule.ranks)


def _merged(actions: tuple[Action, ...]) -> Iterator[Action]:
    position = 0
    while position < len(actions):
        action = actions[position]
        position += 1
        if action.kind == "B":
            follows = position
            while follows < len(actions) and actions[follows][:3] == ("W", action.chunk, action.microbatch):
                follows += 1
            if follows > position and follows - position == actions[position].parts:
                action, position = Action("BW", action.chunk, action.microbatch), follows
        yield action


def add_communication(schedule: Schedule, lookahead: int = 1) -> Schedule:
    """Add sends and receives, after removing those that are there.

    A send stands right after the action that makes the message. A receive is posted at the latest before the
    `lookahead`-th compute action ahead of the one that needs the message (0: immediately before that one), and no later
    than any message that leaves the sender after it on the same channel. Raises ScheduleError when an action needs a
    message that no rank makes, or a message is made that no action needs.
    """
    if lookahead < 0:
        raise ScheduleError(f"lookahead is {lookahead}; a receive cannot be posted after the action that needs it")
    bare = strip_communication(schedule)
    sent: dict[Channel, list[_Message]] = {}
    for rank, action in bare:
        if (message := _made(bare.placement, rank, action)) is not None:
            sent.setdefault(message.channel, []).append(message)
    posts = [_receives(bare, rank, sent, lookahead) for rank in range(bare.placement.num_ranks)]
    return bare.with_ranks(_woven(bare, rank, receives) for rank, receives in enumerate(posts))


def _made(placement: Placement, rank: int, action: Action) -> _Message | None:
    """The message that `action` makes for another rank."""
    if action.kind not in ("F", "B", "BW"):
        return None
    direction: Direction = "F" if action.kind == "F" else "B"
    target = placement.stage(rank, action.chunk) + (1 if direction == "F" else -1)
    return _message(placement, direction, rank, target, action.microbatch, placement.chunk_of(target))


def _needed(placement: Placement, rank: int, action: Action) -> _Message | None:
    """The message from another rank that `action` needs."""
    if action.kind not in ("F", "B", "BW"):
        return None
    direction: Direction = "F" if action.kind == "F" else "B"
    source = placement.stage(rank, action.chunk) - (1 if direction == "F" else -1)
    message = _message(placement, direction, rank, source, action.microbatch, action.chunk)
    if message is None:
        return None
    _, here, there = message.channel
    return message._replace(channel=Channel(direction, there, here))


def _message(
    placement: Placement, direction: Direction, rank: int, stage: int, microbatch: int, chunk: int
) -> _Message | None:
    """A message from `rank` to `stage`, unless there is no such stage or it is on the same rank."""
    if not 0 <= stage < placement.num_stages or placement.rank_of(stage) == rank:
        return None
    return _Message(Channel(direction, rank, placement.rank_of(stage)), chunk, microbatch)


def _receives(
    schedule: Schedule, rank: int, sent: dict[Channel, list[_Message]], lookahead: int
) -> dict[int, list[Action]]:
    """The receives of `rank`: index of a compute action -> what is posted before it."""
    compute = [action for action in schedule.ranks[rank] if action.is_compute]
    needed: dict[Channel, dict[_Message, int]] = {}
    for index, action in enumerate(compute):
        if (message := _needed(schedule.placement, rank, action)) is not None:
            needed.setdefault(message.channel, {})[message] = index
    posts: dict[int, list[Action]] = {}
    incoming = {channel: messages for channel, messages in sent.items() if channel.destination == rank}
    for channel in sorted({*needed, *incoming}):
        messages, wanted = incoming.get(channel, []), needed.get(channel, {})
        if Counter(messages) != Counter(wanted.keys()):
            odd = min(set(messages) ^ set(wanted), default=messages[0])
            raise ScheduleError(
                f"{schedule.name}: on the {channel.direction} channel from rank {channel.source} to rank {rank}, the "
                f"message for {odd.chunk}{channel.direction}{odd.microbatch} is made {messages.count(odd)} times and "
                f"needed {int(odd in wanted)} times"
            )
        latest = len(compute)
        placed: list[tuple[int, Action]] = []
        for message in reversed(messages):
            latest = min(latest, max(0, wanted[message] - lookahead))
            placed.append((latest, Action(_RECV[channel.direction], message.chunk, message.microbatch)))
        for index, receive in reversed(placed):
            posts.setdefault(index, []).append(receive)
    return posts


def _woven(schedule: Schedule, rank: int, receives: dict[int, list[Action]]) -> Iterator[Action]:
    index = 0
    for action in schedule.ranks[rank]:
        if action.is_compute:
            yield from receives.get(index, ())
            index += 1
        yield action
        if (message := _made(schedule.placement, rank, action)) is not None:
            yield Action(_SEND[message.channel.direction], action.chunk, action.microbatch)


def receive_buffers(schedule: Schedule) -> tuple[dict[Channel, int], ...]:
    """Per rank and incoming channel, the most messages that are posted and not yet consumed at any moment.

    A message counts from its receive to the end of the action that needs it. Raises ScheduleError for an action whose
    receive is not posted before it.
    """
    return tuple(_buffers(schedule, rank) for rank in range(schedule.placement.num_ranks))


def _buffers(schedule: Schedule, rank: int) -> dict[Channel, int]:
    posted: dict[Channel, int] = {}
    most: dict[Channel, int] = {}
    awaited: set[_Message] = set()
    for action in schedule.ranks[rank]:
        if action.kind in ("RECV_F", "RECV_B"):
            kind: Kind = "F" if action.kind == "RECV_F" else "B"
            message = _needed(schedule.placement, rank, action._replace(kind=kind))
            if message is not None:
                awaited.add(message)
                posted[message.channel] = posted.get(message.channel, 0) + 1
                most[message.channel] = max(most.get(message.channel, 0), posted[message.channel])
        elif (message := _needed(schedule.placement, rank, action)) is not None:
            if message not in awaited:
                raise ScheduleError(f"{schedule.name}: rank {rank} runs {action} before the receive of its message")
            awaited.remove(message)
            posted[message.channel] -= 1
    return most
