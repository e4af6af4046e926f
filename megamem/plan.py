"""`megamem plan`: which settings train this model on these GPUs, how fast, in how much memory, and why."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamem.errors import ConfigError, InfeasibleError
from megamem.options import Bytes, Invalid
from megamem.plan_profile import load_script_profile, machine_of, text_as_it_ran
from megamem.plan_ways import ways_out

if TYPE_CHECKING:
    from megamem.config import Config
    from megamem.ir.job import Job
    from megamem.ir.what_if import WhatIf
    from megamem.planner.hardware import Hardware
    from megamem.planner.joint.layout import Wishes
    from megamem.planner.joint.search import Fixed

_EXAMPLES = """examples:
  megamem plan --model config.json --gpus 8 --gpu h100 --seq-length 256k -o plan.yaml
  megamem plan --model llama3-70b --gpus 64 --gpu h200 --seq-length 128k --global-batch-size 64 --top 5
  megamem plan --model qwen3-30b-a3b --gpus 16 --gpu gb200 --seq-length 32k --expert-model-parallel-size 8
  megamem plan --model gpt-7b --gpus 8 --gpu a800 --max-seq           how long can a sequence be?
  megamem plan --model llama3-70b --gpu h100 --seq-length 32k --min-gpus
  megamem plan --from-megatron-args "$(cat launch.sh)" --gpu h100     what would megamem do for this job?
  megamem plan --from-yaml run.yaml --gpus 16 --gpu profile.json      a Megatron-Bridge configuration, measured GPUs
  megamem plan --from-profile profile.json -o plan.yaml               the same, for a job that was measured
  torchrun --nproc-per-node 8 pretrain_gpt.py $(megamem plan --read plan.yaml --flags) --megamem plan.yaml ...

Sizes of the layout that are not given are searched. Models: names (--list), a Hugging Face config.json or the folder
with it. GPUs: names (--list), or what `megamem profile --hardware` wrote. Sequence lengths may end in k (1024).
"""

_LAYOUT = {
    "tensor": "--tensor-model-parallel-size",
    "pipeline": "--pipeline-model-parallel-size",
    "chunks": "--num-virtual-stages-per-pipeline-rank",
    "context": "--context-parallel-size",
    "expert": "--expert-model-parallel-size",
    "micro_batch_size": "--micro-batch-size",
}
_MEMORIES = ("host_memory", "device_memory")
_TOKENS_PER_STEP = 4 << 20  # of the default batch


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    plan = commands.add_parser(
        "plan",
        help="the settings that train a model fastest on given GPUs, and why",
        description="Weigh layout, schedule, output layer, allocator and the fate of every activation under memory and "
        "time; write the result as a configuration that runs unchanged, with what it predicts beside it. Needs neither "
        "a GPU nor PyTorch.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = plan.add_argument_group("the model (one of these)")
    model.add_argument("--model", metavar="NAME|FILE", help="a name, or a Hugging Face config.json")
    model.add_argument("--from-megatron-args", metavar="LINE", help="a launch line of Megatron-LM")
    model.add_argument(
        "--from-yaml", metavar="FILE", help="a Megatron-Bridge configuration, or MODEL_ARGS of Megatron-LM"
    )
    model.add_argument(
        "--from-profile", metavar="FILE", help="a job that megamem profile --script has measured, on the GPUs it ran on"
    )
    model.add_argument("--read", metavar="PLAN.yaml", help="show a plan that was made before")
    model.add_argument("--list", action="store_true", help="list the models and GPUs that have names, and exit")
    job = plan.add_argument_group("the job")
    job.add_argument("--gpus", metavar="N", type=int, help="how many GPUs")
    job.add_argument("--gpu", metavar="NAME|FILE", help="which, or a profile (default: --from-profile's, else h100)")
    job.add_argument("--seq-length", metavar="N", help="tokens of a sequence: 131072, or 128k")
    job.add_argument(
        "--global-batch-size", metavar="N", type=int, help="sequences of a step (default: 4Mi tokens of them)"
    )
    job.add_argument("--transformer-impl", choices=("transformer_engine", "local"), default="transformer_engine")
    job.add_argument("--fp32", action="store_true", help="weights and activations in fp32 (default: bf16)")
    layout = plan.add_argument_group("the layout; what is not given is searched")
    for name, flag in _LAYOUT.items():
        layout.add_argument(flag, metavar="N", type=int, dest=f"fixed_{name}")
    wishes = plan.add_argument_group("settings; what is not given is weighed")
    wishes.add_argument(
        "--schedule", metavar="NAME", default="auto", help="a name of schedule.name; off for Megatron's own"
    )
    wishes.add_argument("--vocabulary", choices=("auto", "off", "fused", "parallel"), default="auto")
    wishes.add_argument("--allocator", choices=("auto", "off", "static"), default="auto")
    wishes.add_argument(
        "--activations",
        choices=("auto", "off", "recompute", "memo", "ordered"),
        default="auto",
        help="memo and ordered with the fraction of MEMO's own rule",
    )
    wishes.add_argument(
        "--device-memory", metavar="SIZE", help="of each GPU, for training (default: all of it but 5 %%)"
    )
    wishes.add_argument("--host-memory", metavar="SIZE", help="pinned memory per GPU (default: half of the machine's)")
    _add_settings(plan)
    inverse = plan.add_argument_group("the inverse questions").add_mutually_exclusive_group()
    inverse.add_argument("--max-seq", action="store_true", help="the longest sequence that fits")
    inverse.add_argument("--min-gpus", action="store_true", help="the fewest GPUs on which it fits")
    output = plan.add_argument_group("output")
    output.add_argument("-o", "--output", metavar="PLAN.yaml", help="write the plan")
    output.add_argument("--html", metavar="FILE", help="write it as a page, too")
    form = output.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the plan as JSON")
    form.add_argument("--flags", action="store_true", help="print the flags of Megatron-LM that go with it")
    output.add_argument("--top", metavar="K", type=int, default=8, help="alternatives to show (default: %(default)s)")
    plan.set_defaults(run=run_plan)


def _add_settings(plan: argparse.ArgumentParser) -> None:
    """A configuration to begin with. Of its flags `--help` shows those that nothing else here asks for."""
    from megamem.config import add_arguments

    before = set(plan._actions)
    add_arguments(plan)
    shown = ("megamem_fp8_", "megamem_mlp_", "megamem_vocabulary_keep_logits")
    for action in plan._actions:
        if action.dest == "megamem":
            action.help = (
                "a configuration to begin with: what it switches on is kept, the rest is weighed; single --megamem "
                "flags, those of --from-megatron-args and a megamem: block in --from-yaml count too"
            )
        elif action not in before and not action.dest.startswith(shown):
            action.help = argparse.SUPPRESS


def given_config(arguments: argparse.Namespace) -> Config:
    """What is asked of megamem itself: by flags, a file, the launch line or the job's own file. Raises ConfigError.

    Of a job that was measured: what changes its numbers (`fp8`, `mlp`); all else is weighed anew.
    """
    import shlex

    from megamem.config import load_config
    from megamem.flags import request_of, split_flags
    from megamem.yamlfile import find_block

    asked = request_of(arguments)
    source: Any = None
    if arguments.from_megatron_args is not None:
        source = split_flags(shlex.split(arguments.from_megatron_args))[0].config
    elif arguments.from_yaml is not None:
        source = find_block(Path(arguments.from_yaml))
    elif arguments.from_profile is not None:
        settings = load_script_profile(arguments.from_profile).settings
        ran = json.loads(settings) if settings else {}
        source = {name: ran[name] for name in ("fp8", "mlp") if name in ran}
    if source is None or not load_config(source).enabled:
        return asked.config
    if asked.file is not None:
        raise ConfigError(f"--megamem {asked.file} beside the settings of the job itself; remove one of them")
    return load_config(source, asked.overrides)


def run_plan(arguments: argparse.Namespace) -> int:
    """Plan and print. Raises MegamemError with everything that is wrong, or with what is short."""
    if arguments.list:
        from megamem.planner.hardware import names as gpus
        from megamem.planner.models import names as models

        print(f"models: {', '.join(models())}\nGPUs: {', '.join(gpus())}")
        return 0
    _check_output(arguments)
    config = _read(arguments.read) if arguments.read else _made(arguments)
    if arguments.output:
        _write(Path(arguments.output), config.to_yaml())
    if arguments.html:
        _page(config, arguments)
    assert config.plan is not None
    if arguments.json:
        print(json.dumps({"megamem": config.to_dict()}, indent=1))
    elif arguments.flags:
        from megamem.planner.models import flags_of

        job = config.plan.made_for.job
        if config.activations.is_on:  # in place of Megatron's own recomputation
            job = replace(job, recompute="none")
        print(" ".join(flags_of(job)))  # unquoted: for $(...) of a shell
    else:
        from megamem.plan_text import text_of_plan

        print(text_of_plan(config, top=arguments.top))
        if arguments.from_profile:
            print(f"\n{text_as_it_ran(arguments.from_profile, arguments.gpu)}")
        if arguments.output:
            print(f"\nwritten to {arguments.output}; run it with --megamem {arguments.output}")
    return 0


def _check_output(arguments: argparse.Namespace) -> None:
    """What is wrong with the call whatever the plan: told before anything is computed."""
    problems = [
        f"{path}: there is no folder {Path(path).parent}"
        for path in (arguments.output, arguments.html)
        if path and not Path(path).resolve().parent.is_dir()
    ]
    if arguments.top < 0:
        problems.append(f"--top {arguments.top}: give 0 or more")
    if arguments.read:
        others = {"--model": "model", "--from-megatron-args": "from_megatron_args", "--from-yaml": "from_yaml"}
        others |= {"--from-profile": "from_profile"}
        others |= {"--gpus": "gpus", "--seq-length": "seq_length", "--max-seq": "max_seq", "--min-gpus": "min_gpus"}
        problems += [
            f"--read shows a plan that was made, and {flag} asks for a new one; give one of them"
            for flag, name in others.items()
            if getattr(arguments, name)
        ]
    if problems:
        raise ConfigError(problems)


def _read(path: str) -> Config:
    from megamem.config import load_config

    config = load_config(path)
    if config.plan is None or config.plan.predicted is None:
        raise ConfigError(f"{path}: no plan; megamem plan -o {path} makes one")
    return config


def _made(arguments: argparse.Namespace) -> Config:
    from megamem.planner.hardware import load_hardware
    from megamem.planner.joint.decide import HOST_SHARE
    from megamem.planner.joint.given import carried

    job, gpus, fixed = job_of(arguments)
    hardware = load_hardware(arguments.gpu or machine_of(arguments.from_profile) or "h100")
    given = given_config(arguments)
    wishes = _wishes(arguments, hardware.host_memory, given)
    if problems := wishes.options.problems(job):
        raise ConfigError(problems)
    try:
        return carried(_best(arguments, job, gpus, fixed, hardware, wishes), given)
    except InfeasibleError as fault:
        ways = ""
        if not (arguments.max_seq or arguments.min_gpus):
            ways = ways_out(
                wishes,
                fixed,
                hardware.host_memory * HOST_SHARE,
                lambda other, free: _best(arguments, job, gpus, free, hardware, other),
            )
        eight = _in_8_bits(arguments, job, gpus, fixed, hardware, wishes)
        raise InfeasibleError(f"{fault}{ways}{eight}") from None


def _in_8_bits(
    arguments: argparse.Namespace, job: Job, gpus: int, fixed: Fixed, hardware: Hardware, wishes: Wishes
) -> str:
    """What is to be said, behind that nothing fits, of saved activations in 8 bits, which no plan chooses unasked."""
    from megamem.planner.layer_options import LayerOptions
    from megamem.sections import LowPrecision

    options = LayerOptions(low_precision=LowPrecision(saved_activations="mlp"))
    if arguments.max_seq or arguments.min_gpus or wishes.options.rebuilds or options.problems(job):
        return ""
    try:
        found = _best(arguments, job, gpus, fixed, hardware, replace(wishes, options=options)).plan
    except InfeasibleError:
        return ""
    assert found is not None and found.predicted is not None
    seconds, layout = found.predicted.step_seconds, found.made_for.job.layout
    return (
        f"; with --megamem-fp8-saved-activations mlp it fits, {seconds:.4g} s a step on {layout.text()} "
        "(gradients carry the error of 8 bits, so it is not chosen unasked)"
    )


def _best(
    arguments: argparse.Namespace, job: Job, gpus: int, fixed: Fixed, hardware: Hardware, wishes: Wishes
) -> Config:
    """The plan that was asked for: of a sequence length, of a number of GPUs, or of the job as it is."""
    from megamem.planner.joint import explain, search, shortage
    from megamem.planner.joint.layout import plan_layout

    progress = _progress()
    if arguments.max_seq:
        length, planned = search.longest_sequence(job, gpus, hardware, wishes, fixed, progress)
        print(f"longest sequence that fits: {length} tokens on {gpus} GPUs", file=sys.stderr)
        return explain.explain(planned, wishes)
    if arguments.min_gpus:
        count, planned = search.fewest_gpus(job, hardware, wishes, fixed, progress)
        print(f"fewest GPUs on which it fits: {count}", file=sys.stderr)
        return explain.explain(planned, wishes)
    if fixed.settles_all:
        jobs = [one for one in search.layouts_of(job, gpus, hardware, fixed) if search.runs_schedule(one, wishes)]
        if len(jobs) == 1:
            try:
                return explain.explain(plan_layout(jobs[0], hardware, wishes, progress), wishes)
            except InfeasibleError as fault:
                raise InfeasibleError(shortage.text_of(jobs[0], hardware, wishes, str(fault))) from None
    found = search.search(job, gpus, hardware, wishes, fixed, progress)
    return explain.explain(found.plans[0], wishes, explain.layouts(found))


def job_of(arguments: argparse.Namespace) -> tuple[Job, int, Fixed]:
    """The job, its number of GPUs, and the sizes of its layout that are settled. Raises ConfigError."""
    from megamem.ir.job import Job, Layout
    from megamem.ir.kernels import Kernels
    from megamem.planner.joint.search import Fixed
    from megamem.planner.models import job_of_flags, job_of_yaml, load_model

    sources = [arguments.model, arguments.from_megatron_args, arguments.from_yaml, arguments.from_profile]
    if sum(source is not None for source in sources) != 1:
        raise ConfigError("give one of --model, --from-megatron-args, --from-yaml, --from-profile and --read")
    sizes = {name: getattr(arguments, f"fixed_{name}") for name in _LAYOUT}
    split: tuple[int, ...] = ()
    length = None if arguments.seq_length is None else tokens(arguments.seq_length)
    problems = _small(arguments) + [
        f"{flag}: leave it out; it is what {question} answers"
        for flag, question, given, asked in (
            ("--seq-length", "--max-seq", length, arguments.max_seq),
            ("--gpus", "--min-gpus", arguments.gpus, arguments.min_gpus),
        )
        if asked and given is not None
    ]
    if arguments.model is not None:
        needed = [("--gpus", arguments.gpus is None and not arguments.min_gpus)]
        needed.append(("--seq-length", length is None and not arguments.max_seq))
        problems += [f"{flag}: needed with --model" for flag, is_missing in needed if is_missing]
        if problems:
            raise ConfigError(problems)
        job = Job(
            model=load_model(arguments.model),
            layout=Layout(),
            seq_length=length or 4096,
            bf16=not arguments.fp32,
            spec=arguments.transformer_impl,
            kernels=Kernels.of_spec(arguments.transformer_impl),
        )
    else:
        if arguments.from_profile is not None:
            job = load_script_profile(arguments.from_profile).job
        elif arguments.from_yaml is not None:
            job = job_of_yaml(arguments.from_yaml, arguments.gpus)
        else:
            job = job_of_flags(arguments.from_megatron_args, arguments.gpus)
        job = job if length is None else replace(job, seq_length=length)
        for name in ("tensor", "pipeline", "context", "expert"):
            sizes[name] = sizes[name] or getattr(job.layout, name)
        sizes["chunks"] = sizes["chunks"] or (job.layout.chunks if job.layout.chunks > 1 else None)
        sizes["micro_batch_size"] = sizes["micro_batch_size"] or job.micro_batch_size
        as_it_is = sizes["pipeline"] == job.layout.pipeline and sizes["chunks"] in (None, job.layout.chunks)
        split = job.layout.split if as_it_is else ()
    if problems:
        raise ConfigError(problems)
    gpus = job.layout.world_size if arguments.gpus is None else arguments.gpus
    batch = arguments.global_batch_size
    if batch is None:
        batch = job.global_batch_size if arguments.model is None else _batch(job.seq_length, gpus)
    return replace(job, global_batch_size=batch), gpus, Fixed(**sizes, split=split)


def _small(arguments: argparse.Namespace) -> list[str]:
    """Numbers that are below one."""
    flags = {
        **{f"fixed_{name}": flag for name, flag in _LAYOUT.items()},
        "gpus": "--gpus",
        "global_batch_size": "--global-batch-size",
    }
    given = {flag: getattr(arguments, name) for name, flag in flags.items()}
    return [f"{flag} {size}: at least 1 is needed" for flag, size in given.items() if size is not None and size < 1]


def _batch(length: int, gpus: int) -> int:
    """Sequences of about four million tokens: a power of two, so that layouts divide it."""
    wanted = max(1, _TOKENS_PER_STEP // length)
    size = 1
    while size * 2 <= max(wanted, gpus // 8):
        size *= 2
    return size


def tokens(text: str) -> int:
    """`131072`, `128k` or `1m` as a number. Raises ConfigError."""
    match = re.fullmatch(r"(\d+)([kKmM]?)", text.strip())
    if match is None or not int(match[1]):
        raise ConfigError(f"--seq-length {text}: give a number of tokens such as 131072 or 128k")
    return int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()]


def _wishes(arguments: argparse.Namespace, machine: int, given: Config) -> Wishes:
    from megamem.options import suggestion
    from megamem.planner.joint.decide import HOST_SHARE
    from megamem.planner.joint.given import wishes_given
    from megamem.planner.joint.layout import Wishes
    from megamem.sections import SCHEDULES, Activations

    if arguments.schedule not in ("auto", "off", *SCHEDULES):
        raise ConfigError(f"--schedule {arguments.schedule}: unknown; {suggestion(arguments.schedule, SCHEDULES)}")
    policies = {
        "recompute": Activations(policy="recompute"),
        "memo": Activations(policy="memo", swap_fraction="auto"),
        "ordered": Activations(policy="ordered", swap_fraction="auto"),
    }
    host, device = (_size(f"--{name.replace('_', '-')}", getattr(arguments, name)) for name in _MEMORIES)
    if host is None and given.activations.host_memory != "auto":
        host = given.activations.host_memory
    if device is None and given.planner.device_memory != "auto":
        device = given.planner.device_memory
    wishes = Wishes(
        schedule=arguments.schedule,
        vocabulary=arguments.vocabulary,
        allocator=arguments.allocator,
        activations=policies.get(arguments.activations, arguments.activations),
        host=float(machine * HOST_SHARE if host is None else host),
        device=device,
    )
    return wishes_given(given, wishes)


def _size(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(Bytes().parse(text))
    except (Invalid, ValueError) as fault:
        raise ConfigError(f"{flag}: {fault}") from None


def _progress() -> Callable[[str], None]:
    """Tells what is being looked at, on a terminal."""
    if not sys.stderr.isatty():
        return lambda text: None

    def show(text: str) -> None:
        print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)

    return show


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _page(config: Config, arguments: argparse.Namespace) -> None:
    import yaml

    from megamem.report.page import PlanReport, render_page

    assert config.plan is not None
    settings: dict[str, Any] = {"megamem": config.settings()}
    text = yaml.safe_dump(settings, sort_keys=False, width=100)
    command = "megamem plan " + (f"--read {arguments.read}" if arguments.read else "")
    report = PlanReport(plan=config.plan, settings=text, command=command.strip(), what_if=_grid(config, arguments))
    _write(Path(arguments.html), render_page(report))


def _grid(config: Config, arguments: argparse.Namespace) -> WhatIf | None:
    """What is planned at other sequence lengths and host memory; None for a plan whose GPUs are not known here.

    Of a plan that is read only what changes the job's numbers is kept (`fp8`, `mlp`).
    """
    from megamem.config import Config
    from megamem.planner.hardware import load_hardware
    from megamem.planner.joint.split import laid_out
    from megamem.planner.joint.what_if import what_if

    assert config.plan is not None
    made_for = config.plan.made_for
    try:
        hardware = load_hardware(made_for.hardware)
    except ConfigError as fault:
        print(f"the page has no what-if: {fault}", file=sys.stderr)
        return None
    job = made_for.job
    given = Config(fp8=config.fp8, mlp=config.mlp) if arguments.read else given_config(arguments)
    if not arguments.read:  # chunks that were not asked for are searched again
        _, _, fixed = job_of(arguments)
        job = job if job.layout.chunks == (fixed.chunks or 1) else laid_out(job, fixed.chunks or 1)
    progress = _progress()
    found = what_if(job, hardware, _wishes(arguments, hardware.host_memory, given), progress=progress)
    progress("")
    return found
