"""`megamem profile`: a training script, a model's layers, a machine or the allocations of a step, measured."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamem.errors import ConfigError, MissingPackage
from megamem.profile_script import add_script_flags, profile_script, write_json

if TYPE_CHECKING:
    from megamem.ir.allocation_trace import AllocationTrace

EXAMPLES = """examples:
  torchrun --nproc-per-node 8 -m megamem profile --output profile.json --script pretrain_gpt.py <its arguments>
  megamem profile --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 \\
      --num-query-groups 8 --swiglu --disable-bias-linear --normalization RMSNorm --seq-length 8192 \\
      --vocab-size 128256 --bf16 --link-gb-per-s 40 --output costs.json
  torchrun --nproc-per-node 8 -m megamem profile ... --tensor-model-parallel-size 8 --sequence-parallel
  megamem profile --hardware --output profile.json      rates of this machine, for megamem plan --gpu profile.json
  megamem profile ... --allocations step.trace && megamem solve step.trace
  megamem simulate --schedule auto --stages 8 --microbatches 64 --costs costs.json --memory-limit 40GiB

The script runs as under megamem run: Megatron-LM's pretrain_gpt.py from an unmodified checkout, a Megatron-Bridge
script, your own; with --megamem flags among its arguments, megamem is on while it is measured. It is stopped in its
training loop; nothing is saved. In a costs file times are in milliseconds, memory in bytes, both per microbatch and
tensor-parallel rank; layers are Megatron-Core's local ones with PyTorch's attention. Without a GPU the processor is
measured.
"""


def add_profile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "profile",
        help="measure a training script, a model's layers, or this machine",
        description="With --script: run a training script for some steps, and write the job, its step times and memory "
        "on every rank, and the rates of the machine, for megamem plan --from-profile. Else: build three pipeline "
        "stages of a Megatron-Core GPT on this device, measure forward pass, input gradient and weight gradient of "
        "each and the bytes held in between, and write a costs file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_argument_group("the model, named as Megatron names it")
    model.add_argument("--num-layers", type=int)
    model.add_argument("--hidden-size", type=int)
    model.add_argument("--num-attention-heads", type=int)
    model.add_argument("--ffn-hidden-size", type=int, help="default: 4 h")
    model.add_argument("--num-query-groups", type=int, help="default: as many as heads")
    model.add_argument("--seq-length", type=int)
    model.add_argument("--micro-batch-size", type=int, default=1)
    model.add_argument("--vocab-size", type=int)
    model.add_argument("--swiglu", action="store_true")
    model.add_argument("--normalization", choices=("LayerNorm", "RMSNorm"), default="LayerNorm")
    model.add_argument("--disable-bias-linear", action="store_true")
    model.add_argument("--bf16", action="store_true", help="default: fp32")
    model.add_argument("--tensor-model-parallel-size", type=int, default=1, help="start as many ranks with torchrun")
    model.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--link-gb-per-s", type=float, help="bandwidth between pipeline ranks (default: endless)")
    parser.add_argument("--repetitions", type=int, default=10, help="default: 10, after 2 to warm up")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the costs file to write")
    parser.add_argument(
        "--hardware",
        action="store_true",
        help="measure this machine instead: products and attention at the shapes above, links, pinning, disk",
    )
    _add_allocations(parser)
    add_script_flags(parser)
    parser.set_defaults(run=run_profile)


def _add_allocations(parser: argparse.ArgumentParser) -> None:
    allocations = parser.add_argument_group("allocations: trace malloc and free of one iteration, instead of times")
    allocations.add_argument(
        "--allocations",
        type=Path,
        metavar="FILE",
        help="the trace to write; in .csv and .csv.gz MiniMalloc's columns, without layers and streams",
    )
    allocations.add_argument(
        "--allocations-from",
        choices=("fake", "step"),
        default="fake",
        help="fake tensors, for a model and ranks of any size (default), or a real step on the processor",
    )
    allocations.add_argument(
        "--snapshot",
        type=Path,
        metavar="FILE.pickle",
        help="take them from a CUDA memory snapshot of PyTorch instead; needs no model",
    )
    allocations.add_argument(
        "--snapshot-step", type=int, metavar="N", help="the marked step to take; default: the last whole one, else all"
    )
    allocations.add_argument("--snapshot-device", type=int, default=0, metavar="N", help="default: 0")
    allocations.add_argument("--num-microbatches", type=int, default=1, help="of the iteration; default: 1")
    allocations.add_argument("--recompute-granularity", choices=("full",), help="default: no recomputation")
    allocations.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="default: 1")
    allocations.add_argument("--pipeline-rank", type=int, default=0, help="whose requests are traced; default: 0")
    allocations.add_argument("--num-experts", type=int, help="in every layer; for --allocations-from step")
    allocations.add_argument("--moe-router-topk", type=int, default=2, help="default: 2")
    allocations.add_argument(
        "--trace-layers",
        type=int,
        metavar="N",
        help="trace N layers of each model chunk, at least 6, and replicate one of them; default: all",
    )
    allocations.add_argument(
        "--megamem", type=Path, metavar="FILE.yaml", help="what is on in the step: schedule, activations, vocabulary"
    )


def run_profile(arguments: argparse.Namespace) -> int:
    """Measure and write; rank 0 does the talking."""
    if arguments.script is not None:
        return profile_script(arguments)
    if arguments.hardware:
        return _measure_hardware(arguments)
    if arguments.snapshot is not None:
        return _read_snapshot(arguments)
    _check(arguments)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module="megatron")  # about absent packages that are not needed
    try:
        if arguments.allocations:
            return _trace_allocations(arguments)
        from megamem.integrations.profile_run import profile_here
    except ModuleNotFoundError as fault:
        if (fault.name or "").partition(".")[0] not in ("torch", "megatron"):
            raise
        raise MissingPackage(f'megamem profile needs {fault.name}; pip install "megamem[train]"') from fault
    import torch

    from megamem.testing.cpu import cpu_rig

    is_main = os.environ.get("RANK", "0") == "0"

    def progress(what: str, done: int) -> None:
        if is_main and sys.stderr.isatty():
            print(f"\r{what}: {done} of {arguments.repetitions + 2}   ", end="", file=sys.stderr, flush=True)

    with contextlib.nullcontext() if torch.cuda.is_available() else cpu_rig():
        workload = profile_here(arguments, progress)
    if is_main:
        if sys.stderr.isatty():
            print(file=sys.stderr)
        content = workload.to_dict()
        write_json(arguments.output, content)
        print(_table(content))
    return 0


def _measure_hardware(arguments: argparse.Namespace) -> int:
    """Measure the machine; every process does, so that shared links show, and the first one writes."""
    if arguments.output is None or not arguments.output.resolve().parent.is_dir():
        raise ConfigError("--hardware needs --output FILE.json, in a folder that is there")
    try:
        from megamem.integrations.hardware_run import measure_here
    except ModuleNotFoundError as fault:
        if (fault.name or "").partition(".")[0] not in ("torch", "megatron"):
            raise
        raise MissingPackage(f'megamem profile needs {fault.name}; pip install "megamem[train]"') from fault
    content = measure_here(arguments)
    if content is not None:
        write_json(arguments.output, content)
        print(_rates_table(content))
    return 0


def _rates_table(content: dict[str, Any]) -> str:
    lines = [f"{content['device']}, {content['ranks']} process(es) at once"]
    for name, entry in content["hardware"].items():
        values = [value for key, value in entry.items() if key != "source"]
        lines.append(f"{name:<22}{values[-1]:>14.4g}   {entry['source']}")
    return "\n".join(lines)


def _trace_allocations(arguments: argparse.Namespace) -> int:
    from megamem.config import Config, load_config
    from megamem.integrations.allocation_run import ITERATIONS, groups_of, job_of, trace_gpt
    from megamem.testing.cpu import cpu_rig

    job = job_of(arguments, load_config(arguments.megamem) if arguments.megamem else Config())
    is_terminal, shown = sys.stderr.isatty(), 0.0

    def progress(iteration: int, phase: str) -> None:
        nonlocal shown
        if is_terminal and phase and (now := time.monotonic()) - shown > 0.2:
            shown = now
            print(f"\r\x1b[Kiteration {iteration + 1} of {ITERATIONS[job.source]}: {phase}", end="", file=sys.stderr)

    try:
        with groups_of(job), cpu_rig():
            trace = trace_gpt(job, progress)
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return _written(arguments.allocations, trace)


def _read_snapshot(arguments: argparse.Namespace) -> int:
    from megamem.profiler.cuda_snapshot import read_snapshot

    if arguments.allocations is None:
        raise ConfigError("--snapshot needs --allocations FILE, the trace to write")
    trace = read_snapshot(arguments.snapshot, device=arguments.snapshot_device, step=arguments.snapshot_step)
    return _written(arguments.allocations, trace)


def _written(path: Path, trace: AllocationTrace) -> int:
    from megamem.ir.allocation_trace import write_trace

    write_trace(path, trace)
    persistent = (
        f"{trace.persistent / 2**20:.1f} MiB of persistent tensors" if trace.persistent else "what is persistent"
    )
    print(f"{len(trace)} requests, at most {trace.peak_live() / 2**20:.1f} MiB live beside {persistent}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Everything that is wrong with the flags, before torch is loaded."""
    needed = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size")
    if missing := [f"--{name.replace('_', '-')}: needed" for name in needed if getattr(arguments, name) is None]:
        raise ConfigError(missing)
    heads, tp = arguments.num_attention_heads, arguments.tensor_model_parallel_size
    names = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size", "vocab_size")
    counts = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "num_microbatches", "moe_router_topk")
    positive = (*names, *counts, "repetitions")
    problems = [f"--{name.replace('_', '-')} must be at least 1" for name in positive if getattr(arguments, name) < 1]
    if not problems:
        if arguments.hidden_size % heads:
            problems.append(f"--hidden-size {arguments.hidden_size} is not divisible by {heads} attention heads")
        if heads % (arguments.num_query_groups or heads):
            problems.append(f"{heads} attention heads are not divisible by {arguments.num_query_groups} query groups")
        if heads % tp or arguments.seq_length % tp:
            problems.append(f"attention heads and sequence length must be divisible by tensor parallel {tp}")
        if not arguments.allocations and int(os.environ.get("WORLD_SIZE", "1")) != tp:
            problems.append(f"start {tp} ranks with torchrun: {os.environ.get('WORLD_SIZE', '1')} are there")
    if arguments.link_gb_per_s is not None and not arguments.link_gb_per_s > 0:
        problems.append("--link-gb-per-s must be above 0")
    if (arguments.output is None) == (arguments.allocations is None):
        problems.append("give either --output, the costs file to write, or --allocations, the trace")
    for flag, path in (("--output", arguments.output), ("--allocations", arguments.allocations)):
        if path is not None and not path.resolve().parent.is_dir():
            problems.append(f"{flag} {path}: there is no folder {path.parent}")
    if problems:
        raise ConfigError(problems)


def _table(content: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("", "F ms", "B ms", "W ms", "held after F", "held after B")]
    parts = (("layer", content["layers"][0]), ("embedding", content["first"]), ("output layer, loss", content["last"]))
    for name, cost in parts:
        times = [f"{cost[key]:.3f}" for key in ("forward", "backward", "weight")]
        rows.append((name, *times, *(f"{cost[key] / 2**20:.1f} MiB" for key in ("activation", "weight_grad"))))
    return "\n".join(f"{row[0]:<20}" + "".join(f"{cell:>14}" for cell in row[1:]) for row in rows)
