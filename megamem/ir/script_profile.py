"""What `megamem profile --script` measured of a training job: the job, its settings, its steps on every rank.

In `profile.json` it stands beside the rates of the machine (`hardware`, as `megamem profile --hardware` writes them):

    device, ranks, hardware     `planner.hardware.load_hardware` reads these, whoever measured them
    job, settings, measured     `ScriptProfile`
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megamem.ir.job import Job
from megamem.ir.record import from_plain, to_plain


@dataclass(frozen=True, kw_only=True)
class MeasuredRank:
    """One rank of the job.

    rank:           of the whole job
    pipeline_rank:  its place in the pipeline
    step_seconds:   each step from its start to the start of the next: data, optimizer and logging are part of it
    activations:    bytes of device memory that layers held for backward passes, the most
    device_memory:  bytes that PyTorch's allocator had from the device, the most; 0 where there is no device
    layers:         transformer layers that were measured one by one; 0 where megamem's engine ran them
    layer_seconds:  forward pass of one, the median over layers and microbatches
    layer_bytes:    what one keeps for its backward pass, the median
    """

    rank: int
    pipeline_rank: int = 0
    step_seconds: tuple[float, ...] = ()
    activations: int = 0
    device_memory: int = 0
    layers: int = 0
    layer_seconds: float = 0.0
    layer_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class ScriptProfile:
    """A job as it ran. `settings` are megamem's as far as they were on, a configuration in JSON; empty for none."""

    job: Job
    measured: tuple[MeasuredRank, ...]
    settings: str = ""

    @property
    def step_seconds(self) -> float:
        """Of a step, the median of rank 0's."""
        return statistics.median(self.measured[0].step_seconds)

    def most(self, name: str, pipeline_rank: int | None = None) -> int:
        """The most bytes of `activations` or `device_memory` on any rank, or on those of one place in the pipeline."""
        ranks = [one for one in self.measured if pipeline_rank in (None, one.pipeline_rank)]
        return max((getattr(one, name) for one in ranks), default=0)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        content: dict[str, Any] = to_plain(self)
        return content


def parse_script_profile(content: Mapping[str, Any]) -> ScriptProfile | None:
    """The job in the content of a profile; None where a machine was measured, and no job. Raises RecordError."""
    names = ("job", "measured", "settings")
    if "job" not in content:
        return None
    return from_plain(ScriptProfile, {name: content[name] for name in names if name in content})
