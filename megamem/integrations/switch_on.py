"""What is printed when megamem is switched on: each setting, who asked for it, and what to expect of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError

import torch.distributed as dist
from megatron.core import parallel_state

from megamem import __version__
from megamem.config import Config
from megamem.integrations.capability import Capability
from megamem.integrations.report import mib
from megamem.patches.registry import installed_version
from megamem.planner.schedules.plan import PlannedSchedule

_HEAD = ("capability", "setting", "why", "expected")


def switch_on_table(
    config: Config,
    origins: Mapping[str, str],
    *,
    host_nbytes: int,
    planned: PlannedSchedule | None,
    capabilities: Sequence[Capability],
) -> str:
    """The table; its first line names the versions and the parallel layout.

    `origins` says where `section.option` was asked for. `planned` is the schedule where it is known before the first
    step. What only the model decides is told by the report, later.
    """
    expected = {item.SECTION: item.expected() for item in capabilities}
    if config.activations.is_on:
        expected["activations"] = f"up to {mib(host_nbytes)} of host memory a rank"
    if planned is not None:
        expected["schedule"] = _expected(planned, in_bytes=config.schedule.costs != "none")
    reasons = _reasons(config)
    rows = [_HEAD]
    for name in config.enabled:
        for index, (key, value) in enumerate(getattr(config, name).given().items()):
            first, option = index == 0, f"{name}.{key}"
            why = reasons.get(option) or origins.get(option, "")
            shown = str(value).lower() if isinstance(value, bool) else value
            rows.append((name if first else "", f"{key}: {shown}", why, expected.get(name, "") if first else ""))
    rows += _left_off(config)
    return "\n".join([_headline(), *_aligned(rows), *_predicted(config)])


def _reasons(config: Config) -> dict[str, str]:
    """Why a plan sets an option as it does, by option."""
    predicted = config.plan.predicted if config.plan is not None else None
    if predicted is None:
        return {}
    reasons = {row.subject: row.reason for row in predicted.decisions}
    if "vocabulary" in reasons:
        reasons |= dict.fromkeys(("vocabulary.fused_loss", "vocabulary.parallel"), reasons["vocabulary"])
    return reasons


def _left_off(config: Config) -> list[tuple[str, str, str, str]]:
    """What a plan has weighed and left off, with its reason."""
    reasons = _reasons(config)
    options = {"activations": "activations.policy", "vocabulary": "vocabulary", "allocator": "allocator.mode"}
    return [
        (name, "off", reasons[option], "")
        for name, option in options.items()
        if option in reasons and name not in config.enabled
    ]


def _predicted(config: Config) -> list[str]:
    """What a plan says of the whole step, in a line."""
    plan = config.plan
    if plan is None or plan.predicted is None:
        return []
    if not plan.predicts(config.settings()):
        return ["  The settings are not those that were planned; what the plan predicts does not hold for them."]
    peak, milliseconds = plan.predicted.peak_memory, 1e3 * plan.predicted.step_seconds
    return [f"  The plan predicts {mib(peak)} on the fullest rank and {milliseconds:,.0f} ms a step."]


def _expected(planned: PlannedSchedule, *, in_bytes: bool) -> str:
    """What the simulator says: bytes and milliseconds where costs were given, else activations of a microbatch."""
    simulation = planned.simulation
    peak = max(simulation.peak_activation)
    bubble = f"bubble {100 * simulation.bubble_rate:.1f} %"
    if in_bytes:
        return f"{simulation.makespan:.1f} ms a step, {bubble}, activations {mib(round(peak))} at most (simulated)"
    return f"{bubble}, activations of {peak:.4g} microbatches at most (simulated)"


def _headline() -> str:
    sizes = {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    try:
        core = installed_version("megatron-core")
    except PackageNotFoundError:
        core = "of an unknown version"
    return (
        f"megamem {__version__} is on, with megatron-core {core}, on {dist.get_world_size()} ranks"
        f"{f' ({layout})' if layout else ''}"
    )


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
