"""Pretrain a GPT on Megatron-Core: the whole of a training job, readable top to bottom.

    python examples/pretrain_gpt.py --data-text FOLDER                                     one rank, GPU or CPU
    torchrun --nproc-per-node 4 examples/pretrain_gpt.py --data-path PREFIX \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel \
        --megamem-activations-policy memo --compare

Three lines are megamem's: `enable`, before the model is built, `building`, around what is built for a model chunk, and
`report`, at the end (see `_run`). Without a `--megamem*` flag the job is stock Megatron-Core. `--compare` runs both and
shows the difference.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from pretrain.arguments import parse

import megamem
from megamem.config import Config
from megamem.errors import MegamemError


def _run(
    args: argparse.Namespace,
    name: str,
    config: Config,
    datasets: tuple[Any, Any],
    prepare: Callable[[Any], None] = lambda training: None,
) -> Any:
    """One training run from the seeds on; returns its history. `prepare` may change what is built."""
    import torch.distributed as dist
    from pretrain.launch import set_seeds, set_virtual_stages
    from pretrain.loop import train
    from pretrain.model import build_training
    from pretrain.pipeline import for_run
    from pretrain.report import Reporter

    args = for_run(args, config)
    reporter = Reporter(args, name, is_main=dist.get_rank() == 0)
    set_virtual_stages(args)
    set_seeds(args)
    with contextlib.ExitStack() as stack:
        stack.callback(reporter.close)
        is_asked = config.enabled or config.plan is not None  # a plan may have found nothing to do: it says so
        handle = stack.enter_context(megamem.enable(config)) if is_asked else None
        meter = handle.meter() if handle is not None and config.enabled else stack.enter_context(_stock_meter(args))
        training = build_training(args) if handle is None else build_training(args, handle.building)
        prepare(training)
        history = train(args, training, datasets, reporter, meter)
        if handle is not None:
            reporter.say(f"\n{handle.report()}")
    return history


def _stock_meter(args: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """Counts activations in a stock run: to compare with, and on CPUs, which have no memory statistics, always."""
    if not (args.compare or args.on_cpu):
        return contextlib.nullcontext()
    from megamem.integrations.metering import measured_activations

    return measured_activations()


def _free() -> None:
    """Give the first run's memory back before the second begins."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _quieten() -> None:
    """Silence what Megatron says of absent packages, and PyTorch of names that Megatron still uses."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module="megatron")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def main() -> int:
    """Parse and launch; the exit status."""
    args, config = parse()
    _quieten()
    from pretrain.launch import job

    try:
        with job(args):
            return _train(args, config)
    except MegamemError as error:
        raise SystemExit(f"pretrain_gpt.py: error: {error}") from error


def _train(args: argparse.Namespace, config: Config) -> int:
    """Train once, or twice to compare; the exit status: 1 if the losses differ, 130 if interrupted."""
    import torch.distributed as dist
    from pretrain.data import build_datasets
    from pretrain.report import comparison
    from pretrain.weights import same_weights

    datasets = build_datasets(args)
    if not args.compare:
        history = _run(args, "megamem" if config.enabled else "stock", config, datasets)
        return 130 if history.interrupted else 0
    with same_weights(args, config) as weights:
        stock = _run(args, "stock", Config(), datasets, weights.save)
        if stock.interrupted:
            return 130
        _free()
        ours = _run(args, "megamem", config, datasets, weights.load)
    text, agree = comparison(stock, ours, args.compare_tolerance)
    if dist.get_rank() == 0:
        print(text, flush=True)
    return 130 if ours.interrupted else int(not agree)


if __name__ == "__main__":
    sys.exit(main())
