"""Connections between pipeline ranks: one two-member communicator per direction, sender and receiver.

A transfer waits for nothing but what was posted before it on its own communicator, so two channels can never block one
another, whatever order the ranks post in. That is more than one communicator for the pipeline gives: NCCL runs what is
posted on a communicator in order, so a receive that is posted early would hold up the next send (the class of
deadlock of pytorch issues 172668 and 178815).

The communicators are made from the default store by the two ranks they belong to, without `new_group`: that one is a
collective of all ranks of the job, or, with `use_local_synchronization`, derives the communicator's name from how many
groups the process has, which differs between the first pipeline rank and the second.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import distributed_c10d

from megamem.ir.schedule import Channel, Placement

TIMEOUT = datetime.timedelta(minutes=30)  # as torch's own for gloo, where the pipeline's group does not say another


class Links:
    """The communicators of one pipeline rank; they stay open from step to step.

    ranks:     global ranks of the pipeline, by pipeline rank
    rank:      this one's pipeline rank
    device:    where the tensors are that will be sent: NCCL for CUDA, else gloo
    store:     in which the ranks find each other; a part of the job's that nobody else writes to
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        device: torch.device,
        store: distributed_c10d.Store,
        timeout: datetime.timedelta = TIMEOUT,
    ) -> None:
        self.ranks, self.rank, self.device = tuple(ranks), rank, device
        self._store, self._timeout = store, timeout
        self._open: dict[Channel, Any] = {}

    def open(self, placement: Placement, epoch: int) -> None:
        """Connect this rank with the neighbours it has in `placement`; both sides must call it with equal arguments.

        `epoch` tells the communicators of one life of the pipeline from those that a failure has closed.
        """
        # In one global order, so that no two ranks wait for each other to come to a common channel.
        for channel in sorted(channels_of(placement), key=lambda c: (min(c[1:]), max(c[1:]), c)):
            if self.rank in channel[1:] and channel not in self._open:
                self._open[channel] = self._connect(channel, epoch)

    def send(self, channel: Channel, tensor: torch.Tensor) -> Any:
        """Post a send; the handle of the transfer."""
        return self._open[channel].send([tensor], int(channel.destination > channel.source), 0)

    def receive(self, channel: Channel, tensor: torch.Tensor) -> Any:
        """Post a receive into `tensor`; the handle of the transfer."""
        return self._open[channel].recv([tensor], int(channel.source > channel.destination), 0)

    def close(self) -> None:
        """Drop the connections, whatever is under way on them: a peer that waits for one gets an error.

        gloo closes its sockets with the last reference; NCCL's communicators are aborted.
        """
        links, self._open = self._open, {}
        for link in links.values():
            if self.device.type == "cuda":
                link.abort()

    def _connect(self, channel: Channel, epoch: int) -> Any:
        pair = sorted(channel[1:])
        name = f"links/{epoch}/{channel.direction}/{self.ranks[channel.source]}-{self.ranks[channel.destination]}"
        ranks = [self.ranks[rank] for rank in pair]
        return connect(ranks, pair.index(self.rank), self.device, self._store, name, self._timeout)


def connect(
    ranks: Sequence[int],
    rank: int,
    device: torch.device,
    store: distributed_c10d.Store,
    name: str,
    timeout: datetime.timedelta = TIMEOUT,
) -> Any:
    """A communicator of `ranks` (global), of which this process is number `rank`: NCCL for CUDA, else gloo.

    All of them call it, with the same `name`, which nobody has used in this store before.
    """
    store = distributed_c10d.PrefixStore(name, store)
    if device.type != "cuda":
        return distributed_c10d.ProcessGroupGloo(store, rank, len(ranks), timeout=timeout)
    options = distributed_c10d.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    options.global_ranks_in_group = [*ranks]
    options.group_name = distributed_c10d.GroupName(name)
    return distributed_c10d.ProcessGroupNCCL(store, rank, len(ranks), options)


def channels_of(placement: Placement) -> set[Channel]:
    """Every channel that the messages between neighbouring stages use."""
    channels = set()
    for stage in range(placement.num_stages - 1):
        here, there = placement.rank_of(stage), placement.rank_of(stage + 1)
        if here != there:
            channels |= {Channel("F", here, there), Channel("B", there, here)}
    return channels
