"""`megamem profile --script`: a few steps of the user's own training script, timed and weighed, for `megamem plan`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamem.errors import ConfigError, MegamemError
from megamem.host import rank_of
from megamem.ir.script_profile import ScriptProfile
from megamem.run import prepare, rig, run_behind

_LONGEST = 1 << 15  # tokens at which attention is measured: its rate no longer changes beyond
_MIB = float(1 << 20)


def add_script_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to those of `megamem profile`."""
    script = parser.add_argument_group("your own training script, instead of a model named here")
    script.add_argument(
        "--script",
        nargs=argparse.REMAINDER,
        metavar="SCRIPT ARGUMENT",
        help="run it, measure some steps, stop it, and write what megamem plan --from-profile reads; comes last",
    )
    script.add_argument("--steps", type=int, default=2, help="steps that count, after one to warm up; default: 2")
    script.add_argument("--cpu", action="store_true", help="on CPU ranks, as megamem run --cpu")
    script.add_argument("--no-hardware", action="store_true", help="leave out the rates of the machine, which follow")


def profile_script(options: argparse.Namespace) -> int:
    """Run the script, write the profile and print a table. Raises MegamemError with what is wrong, on one rank."""
    is_main = rank_of(os.environ) in (None, 0)
    try:
        script, arguments, request = _checked(options)
        with rig(options.cpu):
            from megamem.integrations.script_profile import ProfileDoor, Watch, enough_steps, stopped_when_enough

            watch = Watch(options.steps, _progress(is_main))
            with stopped_when_enough():
                run_behind(ProfileDoor(request, watch), script, arguments)
            profile = enough_steps(watch, str(script), options.steps)
            content = _measured_machine(options, profile) if not options.no_hardware else None
    except MegamemError:
        if is_main:
            raise
        return 2  # all ranks see the same; one of them says so
    if is_main:
        write_json(options.output, {**(content or _machine(options)), **profile.to_dict()})
        print(
            f"\n{text_of_profile(profile)}\nwritten to {options.output}; megamem plan --from-profile {options.output}"
        )
    return 0


def _checked(options: argparse.Namespace) -> tuple[Path, list[str], Any]:
    """The script, what it gets, and what is asked of megamem. Raises ConfigError."""
    problems = []
    if not options.script:
        problems.append("--script: name the script, and behind it what it gets")
    if options.output is None:
        problems.append("--script needs --output FILE.json, the profile to write, before it")
    elif not options.output.resolve().parent.is_dir():
        problems.append(f"--output {options.output}: there is no folder {options.output.parent}")
    if options.steps < 1:
        problems.append(f"--steps {options.steps}: at least 1 is needed")
    others = {"--allocations": options.allocations, "--snapshot": options.snapshot, "--num-layers": options.num_layers}
    problems += [
        f"{flag} is about something else than --script; leave it out, or put it behind the script if it is the script's"
        for flag, value in others.items()
        if value is not None
    ]
    if problems:
        raise ConfigError(problems)
    script = Path(options.script[0])
    request, arguments = prepare(script, options.script[1:], "profile")
    return script, arguments, request


def _progress(is_main: bool) -> Callable[[str], None]:
    if not (is_main and sys.stderr.isatty()):
        return lambda text: None
    return lambda text: print(f"megamem profile: {text}", file=sys.stderr, flush=True)


def _measured_machine(options: argparse.Namespace, profile: ScriptProfile) -> dict[str, Any] | None:
    """The rates of the machine at the job's shapes, once the script has let go of its memory."""
    import gc

    import torch

    from megamem.integrations.hardware_run import measure_here

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model, layout = profile.job.model, profile.job.layout
    shapes = {
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
        "seq_length": min(profile.job.seq_length, _LONGEST),
        "tensor_model_parallel_size": layout.tensor,
    }
    return measure_here(argparse.Namespace(**{**vars(options), **shapes}))


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    """What is said of a machine whose rates were not asked for."""
    import torch

    on_gpu = torch.cuda.is_available() and not options.cpu
    name = torch.cuda.get_device_name() if on_gpu else "processor"
    return {"device": name, "ranks": int(os.environ.get("WORLD_SIZE", "1"))}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write beside the file and rename: never half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def text_of_profile(profile: ScriptProfile) -> str:
    """What was measured, a line for each place in the pipeline."""
    job, count = profile.job, len(profile.measured[0].step_seconds)
    on = f", with megamem: {profile.settings}" if profile.settings else ""
    lines = [
        f"{job.model.num_layers} layers, {job.seq_length} tokens, {job.layout.text()}, {job.num_microbatches} "
        f"microbatches of {job.micro_batch_size}{on}",
        f"a step: {profile.step_seconds:.4g} s, the median of {count}",
        f"{'pipeline rank':<16}{'activations, most':>20}{'device memory, most':>22}{'a layer, forward':>20}"
        f"{'it keeps':>14}",
    ]
    for place in range(job.layout.pipeline):
        found = [one for one in profile.measured if one.pipeline_rank == place]
        memory = profile.most("device_memory", place)
        layers = [one for one in found if one.layers]
        lines.append(
            f"{place:<16}{profile.most('activations', place) / _MIB:>16,.1f} MiB"
            + (f"{memory / _MIB:>18,.1f} MiB" if memory else f"{'':>22}")
            + (
                f"{1e3 * layers[0].layer_seconds:>17,.2f} ms{layers[0].layer_bytes / _MIB:>10,.1f} MiB"
                if layers
                else ""
            )
        )
    return "\n".join(lines)
