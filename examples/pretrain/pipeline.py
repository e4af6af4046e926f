"""How many model chunks a pipeline rank holds: what the schedule wants, settled before Megatron makes its groups.

Nothing here imports torch: mistakes answer before a process group is there.
"""

from __future__ import annotations

import argparse

from megamem.config import Config
from megamem.errors import MegamemError
from megamem.planner.models.flags import split_of_flags
from megamem.planner.schedules.plan import default_schedule, plan_schedule

SPLITS = (
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    "pipeline_model_parallel_layout",
)
"""Flags that give pipeline stages layers of their own number."""


def divide_layers(args: argparse.Namespace) -> None:
    """Set `args.has_split`, `args.stage_layers` to the layers of each stage, and the chunks that a layout asks for."""
    args.has_split, args.stage_layers, args.split_fault = any(vars(args)[name] is not None for name in SPLITS), (), ""
    if not args.has_split:
        return
    ranks = max(1, args.pipeline_model_parallel_size)
    try:
        args.stage_layers = split_of_flags(args, ranks, args.virtual_stages or 1)
    except ValueError as fault:
        args.split_fault = str(fault)
    if args.pipeline_model_parallel_layout is not None:
        args.virtual_stages = max(1, len(args.stage_layers) // ranks)


def split_problems(args: argparse.Namespace) -> list[str]:
    """Why the layers cannot be divided as asked."""
    ranks = args.pipeline_model_parallel_size
    if args.split_fault:
        name = next(name for name in SPLITS if vars(args)[name] is not None)
        return [f"--{name.replace('_', '-')}: {args.split_fault}"]
    problems = []
    if args.pipeline_model_parallel_layout is not None:
        stages = len(args.stage_layers)
        others = (*SPLITS[:2], "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
        given = [f"--{name.replace('_', '-')}" for name in others if vars(args)[name] is not None]
        if given:
            problems.append(f"--pipeline-model-parallel-layout says it all; leave {', '.join(given)} out")
        if stages % ranks:
            problems.append(
                f"--pipeline-model-parallel-layout has {stages} stages, which {ranks} pipeline ranks cannot share"
            )
    if args.stage_layers and sum(args.stage_layers) != args.num_layers:
        problems.append(
            f"--pipeline-model-parallel-layout has {sum(args.stage_layers)} layers, --num-layers is {args.num_layers}"
        )
    return problems


def plan_pipeline(args: argparse.Namespace, config: Config) -> list[str]:
    """Set `args.virtual_stages` to what megamem's schedule needs; what is in the way, as messages.

    `args.stock_virtual_stages` stays what the flags of Megatron say, for the stock run of a comparison.
    """
    args.stock_virtual_stages = args.virtual_stages
    ranks = args.pipeline_model_parallel_size
    if ranks == 1 and config.schedule.is_on:
        return [f"--megamem-schedule-name {config.schedule.name} needs --pipeline-model-parallel-size of 2 or more"]
    if ranks == 1 or not (config.schedule.is_on or config.vocabulary.parallel is True):
        return []
    options = config.schedule if config.schedule.is_on else default_schedule(args.virtual_stages)
    try:
        planned = plan_schedule(
            options,
            num_ranks=ranks,
            num_microbatches=args.num_microbatches,
            num_chunks=args.virtual_stages,
            num_layers=None if args.has_split else args.num_layers,
            vocabulary=config.vocabulary.barriers if config.vocabulary.parallel is True else None,
            keeps_logits=config.vocabulary.keep_logits,
        )
    except MegamemError as error:
        return f"--megamem-schedule-name {options.name}: {error}".splitlines()
    chunks = planned.schedule.placement.num_chunks
    args.virtual_stages = chunks if chunks > 1 else None
    return []


def for_run(args: argparse.Namespace, config: Config) -> argparse.Namespace:
    """The flags of one run: without megamem's schedule the model has the chunks that Megatron's flags ask for."""
    stages = args.virtual_stages if config.schedule.is_on else args.stock_virtual_stages
    return argparse.Namespace(**{**vars(args), "virtual_stages": stages})
