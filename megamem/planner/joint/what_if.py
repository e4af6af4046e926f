"""The cells under the report's sliders: a job planned anew, in its layout, for other sequences and host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from megamem.errors import InfeasibleError
from megamem.ir.job import Job
from megamem.ir.what_if import Cell, WhatIf
from megamem.planner.hardware import Hardware
from megamem.planner.joint.explain import config_of, schedule_text, throughput, utilization
from megamem.planner.joint.layout import Wishes, in_full, plan_layout

_LENGTHS = (1 / 4, 1 / 2, 1, 2, 4)  # of the plan's
_MEMORIES = (0, 1 / 2, 1, 2)


def what_if(
    job: Job,
    hardware: Hardware,
    wishes: Wishes,
    *,
    lengths: Sequence[int] = (),
    memories: Sequence[int] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> WhatIf:
    """What the planner says of `job` at these sequence lengths and bytes of host memory per rank.

    The layout stays, but for the chunks where `job.layout` leaves them open; the global batch stays what it is in
    sequences. The job's own length and `wishes.host` are among the cells. Without lengths: a quarter of the job's to
    four times; without memories: none to twice as much.
    """
    host = round(wishes.host)
    lengths = sorted({*(lengths or [round(job.seq_length * share) for share in _LENGTHS]), job.seq_length} - {0})
    memories = sorted({*(memories or [round(host * share) for share in _MEMORIES]), host})
    cells = []
    for length in lengths:
        row = []
        for nbytes in memories:
            progress(f"what if: {length} tokens, {nbytes / 2**30:.0f} GiB of host memory")
            row.append(_cell(replace(job, seq_length=length), hardware, replace(wishes, host=float(nbytes))))
        cells.append(row)
    return WhatIf(
        seq_lengths=lengths,
        host_memories=memories,
        cells=cells,
        at=(lengths.index(job.seq_length), memories.index(host)),
    )


def _cell(job: Job, hardware: Hardware, wishes: Wishes) -> Cell:
    if problems := job.problems():
        return Cell(fits=False, choice=problems[0])
    try:
        planned = in_full(plan_layout(job, hardware, wishes))
    except InfeasibleError as fault:
        return Cell(fits=False, choice=str(fault))
    best, model = planned.best, planned.model
    priced, switched_on = best.priced, config_of(best).enabled
    schedule = schedule_text(best.frame.name, best.frame.schedule.placement.num_chunks)
    parts = [schedule] * (job.layout.pipeline > 1) + [name for name in switched_on if name != "schedule"]
    return Cell(
        fits=True,
        step_seconds=priced.step_seconds,
        peak_memory=priced.peak,
        host_memory=priced.host,
        tokens_per_second_per_gpu=throughput(model, priced.step_seconds),
        mfu=utilization(model, priced.step_seconds).mfu,
        choice=f"With {', '.join(parts)}." if parts else "Nothing is switched on.",
    )
