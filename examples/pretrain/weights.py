"""The same initial weights for both runs of a comparison, however each of them places its layers.

Equal seeds give equal weights only where every rank builds the same layers in the same order. A schedule may change
that, and so does vocabulary parallelism; then the second run reads what the first began with, through a distributed
checkpoint, which knows layers by their number in the model, and rows by their place in the vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megamem.config import Config
from pretrain.checkpoint import chunk_names, model_state, unwrap
from pretrain.model import Training


class InitialWeights:
    """Saves and loads the weights of freshly built models; does nothing without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def save(self, training: Training) -> None:
        """Remember what the first run begins with."""
        if self._folder is not None:
            if dist.get_rank() == 0:
                self._folder.mkdir(parents=True)
            dist.barrier()
            dist_checkpointing.save(model_state(training), str(self._folder))

    def load(self, training: Training) -> None:
        """Give the second run the same, also to its optimizer, which may hold copies in fp32."""
        if self._folder is not None:
            loaded = dist_checkpointing.load(model_state(training), str(self._folder))
            for name, chunk in zip(chunk_names(training), training.chunks, strict=True):
                unwrap(chunk).load_state_dict(loaded[name])
            training.optimizer.reload_model_params()


@contextlib.contextmanager
def same_weights(args: argparse.Namespace, config: Config) -> Iterator[InitialWeights]:
    """Initial weights to hand from run to run, where the second may have layers or embeddings on other ranks."""
    elsewhere = config.schedule.is_on or config.vocabulary.parallel
    folder = args.data_cache_path / "initial-weights" if elsewhere else None
    try:
        _remove(folder)
        yield InitialWeights(folder)
    finally:
        _remove(folder)


def _remove(folder: Path | None) -> None:
    if folder is not None and dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
