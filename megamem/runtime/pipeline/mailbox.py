"""The messages of one step: posted by SEND and RECV actions, taken by the compute actions that need them.

Posting never waits. A receive is posted into a buffer of its own when the schedule says so, which is what bounds the
buffers (`megamem.planner.schedules.passes.receive_buffers`). Between two chunks on the same rank (the turning point of
a V placement) there is no message: the output is handed over, detached.

**Shapes.** With a fixed shape a message is one transfer. Where it varies (`Format.shape` is None), a header of
`_DIMENSIONS` integers goes first on the same channel, and the receive of the data can only be posted when the header
is here. The channel being first in, first out, nothing behind it can be posted before; so the mailbox keeps the
channel's receives in order and posts as far as it can whenever one is needed.

**What a send keeps alive.** The tensor, until the transfer has ended. An activation has certainly arrived when the
gradient of it comes back. gloo cannot say earlier whether a transfer has ended; NCCL can, and is asked at each post.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from megamem.errors import ScheduleError, UnsupportedError
from megamem.ir.schedule import Channel, Direction, Placement

Way = Literal["nowhere", "here", "away"]

_DIMENSIONS = 4  # in a header: the sizes of a tensor, padded with -1


class Key(NamedTuple):
    """A message as the stage that receives it calls it."""

    direction: Direction
    chunk: int
    microbatch: int


@dataclass(frozen=True, kw_only=True)
class Format:
    """What the messages of one direction look like; `shape` None where every microbatch has its own."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device


class Transport(Protocol):
    """What carries messages: `links.Links`."""

    def send(self, channel: Channel, tensor: Tensor) -> Any:
        """Post a send; the handle of the transfer."""

    def receive(self, channel: Channel, tensor: Tensor) -> Any:
        """Post a receive into `tensor`; the handle of the transfer."""


@dataclass(slots=True)
class _Receive:
    """A receive: its data under way (`transfer`), or before that, where shapes vary, its header."""

    key: Key
    tensor: Tensor | None = None
    transfer: Any = None
    header: Tensor | None = None
    header_transfer: Any = None


class Mailbox:
    """Messages of one pipeline rank during one step. `formats` says what those of each direction look like."""

    def __init__(
        self, transport: Transport, placement: Placement, rank: int, formats: Mapping[Direction, Format]
    ) -> None:
        self._transport, self._formats = transport, formats
        self._rank = rank
        self._ends = {
            (direction, chunk, step): _end(placement, rank, direction, chunk, step)
            for direction in formats
            for chunk in range(placement.num_chunks)
            for step in (1, -1)
        }
        self._local: dict[Key, Tensor | None] = {}
        self._receives: dict[Key, _Receive] = {}
        self._without_shape: dict[
            Channel, deque[_Receive]
        ] = {}  # in the channel's order; the first one's header is posted
        self._sends: dict[Key, list[tuple[Any, Tensor]]] = {}

    def way(self, direction: Direction, chunk: int) -> Way:
        """Where what `chunk` makes in `direction` goes."""
        end = self._ends[direction, chunk, 1]
        return "nowhere" if end is None else "here" if end.channel.destination == self._rank else "away"

    def begins(self, direction: Direction, chunk: int) -> bool:
        """Whether `chunk` is the stage with which `direction` begins."""
        return self._ends[direction, chunk, -1] is None

    def hand_over(self, direction: Direction, chunk: int, microbatch: int, tensor: Tensor | None) -> None:
        """Give what `chunk` made to the next stage of `direction`, on this rank."""
        end = self._ends[direction, chunk, 1]
        assert end is not None
        self._local[Key(direction, end.chunk, microbatch)] = None if tensor is None else tensor.detach()

    def send(self, direction: Direction, chunk: int, microbatch: int, tensor: Tensor) -> None:
        """Post the send of what `chunk` made for the next stage of `direction`."""
        end = self._ends[direction, chunk, 1]
        if end is None:
            raise ScheduleError(f"{chunk}SEND_{direction}{microbatch}: there is no stage to send to")
        tensor = tensor.detach().contiguous()
        parts = [tensor] if self._formats[direction].shape is not None else [_header(tensor), tensor]
        self._drop_finished()
        transfers = [(self._transport.send(end.channel, part), part) for part in parts]
        self._sends[Key(direction, end.chunk, microbatch)] = transfers

    def post(self, direction: Direction, chunk: int, microbatch: int) -> None:
        """Post the receive of what `chunk` needs from the stage before it in `direction`."""
        end = self._ends[direction, chunk, -1]
        if end is None:
            raise ScheduleError(f"{chunk}RECV_{direction}{microbatch}: there is no stage to receive from")
        receive = _Receive(Key(direction, chunk, microbatch))
        self._receives[receive.key] = receive
        shape = self._formats[direction].shape
        if shape is not None:
            self._post_data(end.channel, receive, shape)
            return
        line = self._without_shape.setdefault(end.channel, deque())
        line.append(receive)
        if len(line) == 1:
            self._post_header(end.channel, receive)

    def take(self, direction: Direction, chunk: int, microbatch: int) -> Tensor | None:
        """What `chunk` needs of `direction`, waiting for it; None for the stage where the direction begins."""
        end = self._ends[direction, chunk, -1]
        if end is None:
            return None
        key = Key(direction, chunk, microbatch)
        if end.channel.source == self._rank:
            return self._local.pop(key)
        receive = self._receives.pop(key)
        while receive.transfer is None:
            self._post_next(end.channel)
        _wait_for(receive)
        if direction == "B":  # the activation that this is the gradient of has arrived
            self._settle(Key("F", end.chunk, microbatch))
        return receive.tensor

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        for key in list(self._sends):
            self._settle(key)

    def clear(self) -> None:
        """Forget everything, whatever is under way: a connection closes when nothing refers to its transfers."""
        for messages in (self._local, self._receives, self._sends, self._without_shape):
            messages.clear()

    @property
    def held(self) -> list[Tensor]:
        """Buffers of receives that are posted and sends under way, for accounting."""
        received = [receive.tensor for receive in self._receives.values() if receive.tensor is not None]
        return received + [tensor for parts in self._sends.values() for _, tensor in parts]

    def _post_data(self, channel: Channel, receive: _Receive, shape: Sequence[int]) -> None:
        kind = self._formats[channel.direction]
        receive.tensor = torch.empty(shape, dtype=kind.dtype, device=kind.device)
        receive.transfer = self._transport.receive(channel, receive.tensor)

    def _post_header(self, channel: Channel, receive: _Receive) -> None:
        device = self._formats[channel.direction].device
        receive.header = torch.empty(_DIMENSIONS, dtype=torch.int64, device=device)
        receive.header_transfer = self._transport.receive(channel, receive.header)

    def _post_next(self, channel: Channel) -> None:
        """Wait for the header of the first receive in line, and post its data and the header of the second."""
        line = self._without_shape[channel]
        receive = line.popleft()
        assert receive.header is not None
        receive.header_transfer.wait()
        self._post_data(channel, receive, [size for size in receive.header.tolist() if size >= 0])
        if line:
            self._post_header(channel, line[0])

    def _settle(self, key: Key) -> None:
        for transfer, _ in self._sends.pop(key, ()):
            transfer.wait()

    def _drop_finished(self) -> None:
        """Forget the oldest sends as far as they have ended."""
        for key in list(self._sends):
            if not all(transfer.is_completed() for transfer, _ in self._sends[key]):
                return
            del self._sends[key]


def _wait_for(receive: _Receive) -> None:
    transfer, receive.transfer = receive.transfer, None
    try:
        transfer.wait()
    finally:
        del transfer  # else the traceback of an error would hold it, and with it the connection


class _End(NamedTuple):
    channel: Channel
    chunk: int  # on the other rank


def _end(placement: Placement, rank: int, direction: Direction, chunk: int, step: int) -> _End | None:
    """The way to the next stage of a direction (`step` 1), or from the one before (-1), if there is one."""
    stage = placement.stage(rank, chunk) + (step if direction == "F" else -step)
    if not 0 <= stage < placement.num_stages:
        return None
    there = placement.rank_of(stage)
    source, destination = (rank, there) if step == 1 else (there, rank)
    return _End(Channel(direction, source, destination), placement.chunk_of(stage))


def _header(tensor: Tensor) -> Tensor:
    if tensor.dim() > _DIMENSIONS:
        raise UnsupportedError(
            f"a pipeline message has at most {_DIMENSIONS} dimensions, this one {tuple(tensor.shape)}"
        )
    sizes = [*tensor.shape, *[-1] * (_DIMENSIONS - tensor.dim())]
    return torch.tensor(sizes, dtype=torch.int64, device=tensor.device)
