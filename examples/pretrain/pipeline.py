"""How many model chunks a pipeline rank holds: what the schedule wants, settled before Megatron makes its groups.

Nothing here imports torch: mistakes answer before a process group is there.
"""

from __future__ import annotations

import argparse

from megamem.config import Config
from megamem.errors import MegamemError
from megamem.planner.schedules.plan import default_schedule, plan_schedule


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
            num_layers=args.num_layers,
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
