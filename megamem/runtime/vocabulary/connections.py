"""What carries the collectives of vocabulary passes, and what a hidden state travels in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, final

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from megamem.runtime.pipeline.lanes import Communicator, Lane, Pending, make_lane
from megamem.runtime.vocabulary.layout import Layout

_ALIGNMENT: Final = 256  # bytes, of a hidden state in its letter: for the GEMMs that read it there


@final
class Connections:
    """A lane and a communicator for each kind of collective; with one barrier, one for the tensor-parallel group too.

    ranks, rank:     global ranks of the pipeline, and which of them this one is
    tensor_ranks, tensor_rank:   the same of the tensor-parallel group
    failure:         which other rank has failed, None if none has
    """

    KINDS: Final = ("tokens", "embedding", "hidden", "statistics", "gradient", "embedding_gradient")

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        tensor_ranks: Sequence[int],
        tensor_rank: int,
        device: torch.device,
        store: distributed_c10d.Store,
        epoch: int,
        failure: Callable[[], str | None],
    ) -> None:
        self._lanes: dict[str, Lane] = {}
        self._groups: dict[str, Communicator] = {}
        for kind in self.KINDS:
            name = f"vocabulary/{epoch}/{kind}/{ranks[0]}"
            self._groups[kind] = Communicator(ranks, rank, device, store, name)
            self._lanes[kind] = make_lane(kind, device, failure)
        name = f"vocabulary/{epoch}/tensor/{tensor_ranks[0]}"
        self._groups["tensor"] = Communicator(tensor_ranks, tensor_rank, device, store, name)

    def group(self, kind: str) -> Communicator:
        """The communicator of a kind of collective, to be used on its lane."""
        return self._groups[kind]

    def lane(self, kind: str) -> Lane:
        """What runs collectives of this kind."""
        return self._lanes[kind]

    def broadcast(self, kind: str, tensor: Tensor, source: int) -> Pending[Tensor]:
        """Post a broadcast of `tensor` from pipeline rank `source`."""

        def run() -> Tensor:
            self._groups[kind].broadcast(tensor, source)
            return tensor

        return self._lanes[kind].post(run)

    def reduce(self, kind: str, tensor: Tensor, target: int) -> Pending[Tensor]:
        """Post a sum of `tensor` over the pipeline ranks, for rank `target`."""

        def run() -> Tensor:
            self._groups[kind].reduce(tensor, target)
            return tensor

        return self._lanes[kind].post(run)

    def finish(self) -> None:
        """Wait for everything that was posted."""
        for lane in self._lanes.values():
            lane.finish()

    def close(self) -> None:
        """Drop the communicators, whatever is under way."""
        for lane in self._lanes.values():
            lane.close()
        for group in self._groups.values():
            group.abort()
        self._lanes.clear()
        self._groups.clear()


class Letter(NamedTuple):
    """A hidden state with what its tokens need, in one buffer: one broadcast."""

    buffer: Tensor
    labels: Tensor  # [T], int32
    gradient: Tensor  # [T], fp32
    hidden: Tensor  # as `Layout.hidden`

    @classmethod
    def blank(cls, layout: Layout) -> Letter:
        tokens = layout.tokens[0] * layout.tokens[1]
        start = -(-8 * tokens // _ALIGNMENT) * _ALIGNMENT
        size = torch.Size(layout.hidden).numel() * layout.dtype.itemsize
        buffer = torch.empty(start + size, dtype=torch.uint8, device=layout.device)
        return cls(
            buffer,
            buffer[: 4 * tokens].view(torch.int32),
            buffer[4 * tokens : 8 * tokens].view(torch.float32),
            buffer[start:].view(layout.dtype).view(layout.hidden),
        )
