"""Where a rank is, what it holds of the embeddings, and the trainer on the other side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megamem.ir.vocabulary import VocabShard


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where this rank is, and what travels.

    num_ranks, rank:     of the pipeline
    first, last:         the pipeline ranks of the first and of the last stage
    tensor_group:        the tensor-parallel group
    sequence_parallel:   hidden states are parts along the sequence, one on each rank of `tensor_group`
    scatters_embedding:  the same for what IF makes
    tokens:              shape [B, S] of a microbatch
    hidden:              shape [S, B, D] of a hidden state; with `sequence_parallel` of a part
    """

    num_ranks: int
    rank: int
    first: int
    last: int
    tensor_group: Any
    sequence_parallel: bool
    scatters_embedding: bool
    tokens: tuple[int, int]
    hidden: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def embedding(self) -> tuple[int, ...]:
        """Shape of what IF makes: [S, B, D] or a part of it, else [B, S, D]."""
        batch, length = self.tokens
        share = self.tensor_group.size()
        return (
            (length // share, batch, self.hidden[-1])
            if self.scatters_embedding
            else (batch, length, self.hidden[-1])
        )  # fmt: skip

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first stage."""
        return self.rank == self.first

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage."""
        return self.rank == self.last


class AbstractShards(ABC):
    """This rank's rows of the weights [K, D] of input embedding and output layer, which may be one and the same."""

    words: VocabShard

    @abstractmethod
    def input_weight(self) -> Parameter:
        """The rows of the input embedding, ready for use."""

    @abstractmethod
    def output_weight(self) -> Parameter:
        """The rows of the output layer, ready for use."""


class AbstractEnds(ABC):
    """What the trainer gives at the first stage and wants at the last."""

    @abstractmethod
    def tokens(self, microbatch: int) -> Tensor:
        """On the rank of the first stage, once for each microbatch in the order of F: its tokens [B, S], int64."""

    @abstractmethod
    def labels(self, microbatch: int) -> tuple[Tensor, Tensor | None]:
        """On the rank of the last stage, after F: labels [B, S], int64; gradient [B, S] of the loss, fp32, None in an
        evaluation."""

    @abstractmethod
    def losses(self, microbatch: int, losses: Tensor) -> None:
        """On the rank of the last stage: the losses [B, S] of the tokens are there."""
