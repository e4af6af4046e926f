"""A job that was measured (`megamem profile --script`) beside what the planner predicts of it as it ran."""

from __future__ import annotations

import json
from pathlib import Path

from megamem.errors import ConfigError, InfeasibleError
from megamem.ir.record import RecordError
from megamem.ir.script_profile import ScriptProfile, parse_script_profile
from megamem.yamlfile import read_mapping

_MIB = float(1 << 20)


def load_script_profile(path: str | Path) -> ScriptProfile:
    """The job in a profile. Raises ConfigError where there is none, or with everything that is wrong in it."""
    try:
        profile = parse_script_profile(read_mapping(Path(path)))
    except RecordError as fault:
        raise ConfigError([f"{path}: {place}: {reason}" for place, reason in fault.problems]) from None
    if profile is None:
        raise ConfigError(
            f"{path}: a machine was measured, and no job; megamem profile --script measures both, or name the job "
            f"otherwise and give --gpu {path}"
        )
    if not profile.measured or not profile.measured[0].step_seconds:
        raise ConfigError(f"{path}: measured: no step; make it again with megamem profile --script")
    return profile


def machine_of(path: str | None) -> str | None:
    """The profile as what `load_hardware` reads. Raises ConfigError where it has no rates."""
    if path is not None and "hardware" not in read_mapping(Path(path)):
        raise ConfigError(f"{path}: the rates of the machine were left out (--no-hardware); name its GPU with --gpu")
    return path


def text_as_it_ran(path: str, gpu: str | None) -> str:
    """Predicted and measured for the job as it ran: how far the plan's figures can be trusted."""
    from megamem.config import Config, load_config
    from megamem.planner.hardware import load_hardware
    from megamem.planner.joint.decide import wishes_of
    from megamem.planner.joint.explain import explain
    from megamem.planner.joint.layout import plan_layout

    profile, hardware = load_script_profile(path), load_hardware(gpu or path)
    config = load_config(json.loads(profile.settings)) if profile.settings else Config()
    wishes = wishes_of(config, hardware)
    try:
        made = explain(plan_layout(profile.job, hardware, wishes), wishes)
    except InfeasibleError as fault:
        return f"as it ran (which the planner does not believe in: {fault}): {profile.step_seconds:.4g} s a step"
    assert made.plan is not None and made.plan.predicted is not None
    predicted = made.plan.predicted
    how = ", ".join(config.enabled) or "without megamem"
    rows = [(f"as it ran, {how}", "predicted", "measured", "")]
    if gpu in (None, path):  # what another GPU would take is not compared
        rows.append(("a step, s", *_pair(predicted.step_seconds, profile.step_seconds, 1.0)))
    for place in range(profile.job.layout.pipeline):
        measured, memory = profile.most("activations", place), predicted.memory[place]
        name = f"activations of rank {place}, MiB"
        rows.append((name, *_pair(predicted.activation_peak(place), measured, _MIB)))
        if reserved := profile.most("device_memory", place):
            allocated = memory.peak - memory.kinds.get("context", 0)
            rows.append((f"device memory of rank {place}, MiB", *_pair(allocated, reserved, _MIB)))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:<{width}}" + "".join(f"{cell:>14}" for cell in row[1:]).rstrip() for row in rows)


def _pair(predicted: float, measured: float, unit: float) -> tuple[str, str, str]:
    off = f"{measured / predicted - 1:+.1%}" if predicted else ""
    return f"{predicted / unit:,.4g}", f"{measured / unit:,.4g}", off
