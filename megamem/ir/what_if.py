"""What else would be planned: the same job at other sequence lengths and with other amounts of host memory.

The page's sliders step through these cells. Every one was planned by the planner itself, so the page computes nothing:
what it shows is what `megamem plan` would say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A plan at one sequence length with one amount of host memory per rank.

    fits:          whether there is one; without, the numbers say nothing, and `choice` what is short
    step_seconds:  of a step; the global batch stays what it is, in sequences
    peak_memory, host_memory:  bytes, of the rank that needs most
    tokens_per_second_per_gpu:  throughput
    mfu:           model FLOPs utilization, 0..1
    choice:        what is chosen, in a few words
    """

    fits: bool
    step_seconds: float = 0.0
    peak_memory: int = 0
    host_memory: int = 0
    tokens_per_second_per_gpu: float = 0.0
    mfu: float = 0.0
    choice: str = ""


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """A grid of cells: `cells[i][j]` is that of `seq_lengths[i]` tokens and `host_memories[j]` bytes per rank.

    `at` is the place of the plan itself.
    """

    seq_lengths: Sequence[int]
    host_memories: Sequence[int]
    cells: Sequence[Sequence[Cell]]
    at: tuple[int, int]

    def __post_init__(self) -> None:
        shape = (len(self.seq_lengths), len(self.host_memories))
        if any(len(row) != shape[1] for row in self.cells) or len(self.cells) != shape[0]:
            raise ValueError(f"cells are not {shape[0]} x {shape[1]}")
        if not (0 <= self.at[0] < shape[0] and 0 <= self.at[1] < shape[1]):
            raise ValueError(f"{self.at} is outside the {shape[0]} x {shape[1]} cells")
