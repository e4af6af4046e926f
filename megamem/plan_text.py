"""A plan as text: what to run, what it takes, why, and what else there was."""

from __future__ import annotations

from collections.abc import Sequence

from megamem.config import Config
from megamem.ir.plan import MEMORY_KINDS, Plan, Prediction

_GIB = float(1 << 30)


def text_of_plan(config: Config, *, top: int = 8) -> str:
    """The tables of a plan, with `top` alternatives."""
    plan = config.plan
    assert plan is not None and plan.predicted is not None
    predicted = plan.predicted
    parts = [_head(plan, predicted, config), _time(predicted), _memory(predicted), _reasons(predicted)]
    return "\n\n".join([*parts, _others(predicted, top)])


def _head(plan: Plan, predicted: Prediction, config: Config) -> str:
    job = plan.made_for.job
    lines = [
        f"{job.model.name or 'model'}, {job.seq_length} tokens, on {job.layout.world_size} x {plan.made_for.hardware}",
        f"  layout       {job.layout.text()}, {job.num_microbatches} microbatches of {job.micro_batch_size}",
        f"  switched on  {', '.join(config.enabled) or 'nothing: it fits as it is'}",
        f"  step         {predicted.step_seconds:.4g} s, {predicted.tokens_per_second_per_gpu:,.0f} tokens/s per GPU, "
        f"MFU {predicted.utilization.mfu:.1%}",
        f"  memory       {predicted.peak_memory / _GIB:.1f} GiB on the fullest rank of "
        f"{max(rank.limit for rank in predicted.memory) / _GIB:.1f}, "
        f"{max(rank.host for rank in predicted.memory) / _GIB:.1f} GiB of host memory",
    ]
    traffic = predicted.traffic
    if traffic.to_host:
        lines.append(
            f"  link         {traffic.to_host / 1e9:.1f} GB out and {traffic.from_host / 1e9:.1f} GB back a step, "
            f"{traffic.link_seconds:.3g} s of copying, {traffic.exposed_seconds:.2g} s of it waited for"
        )
    return "\n".join(lines)


def _time(predicted: Prediction) -> str:
    rows = [
        (kind.replace("_", " "), f"{seconds:.4g}", f"{seconds / predicted.step_seconds:.1%}")
        for kind, seconds in sorted(predicted.time.items(), key=lambda item: -item[1])
    ]
    return _table(("time of a step", "s", ""), rows)


def _memory(predicted: Prediction) -> str:
    kinds = [kind for kind in MEMORY_KINDS if any(rank.kinds.get(kind) for rank in predicted.memory)]
    shown = predicted.memory if len(predicted.memory) <= 8 else (*predicted.memory[:3], *predicted.memory[-3:])
    header = ("GiB at the peak", *(f"rank {rank.rank}" for rank in shown))
    rows = [(kind.replace("_", " "), *(f"{rank.kinds.get(kind, 0) / _GIB:.2f}" for rank in shown)) for kind in kinds]
    rows.append(("together", *(f"{rank.peak / _GIB:.2f}" for rank in shown)))
    return _table(header, rows)


def _reasons(predicted: Prediction) -> str:
    rows = []
    for one in predicted.decisions:
        where = f"{one.subject} in {one.layers}" if one.layers else one.subject
        fate = one.fate if one.fraction == 1.0 else f"{one.fate} {one.fraction:.1%}"
        size = f"{one.nbytes / 2**20:,.0f} MiB" if one.nbytes else ""
        rows.append((where, fate, size, one.reason))
    return _table(("what", "fate", "bytes", "why"), rows, left=4)


def _others(predicted: Prediction, top: int) -> str:
    rows = [
        (
            one.name,
            f"{one.step_seconds:.4g} s" if one.step_seconds else "-",
            f"{one.peak_memory / _GIB:.1f} GiB" if one.peak_memory else "-",
            one.verdict,
        )
        for one in predicted.alternatives[:top]
    ]
    return _table(("what else there was", "step", "memory", ""), rows, left=4)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns side by side; those behind the first `left` ones to the right, unless all are."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def row(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column == 0 or left > 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([row(lines[0]), *(f"{row(line)}" for line in lines[1:])])
