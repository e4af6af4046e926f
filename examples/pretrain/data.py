"""Microbatches of a Megatron `GPTDataset`, as a pure function of how many samples were consumed.

There is no loader state to save: step n reads samples `n * global_batch .. (n + 1) * global_batch`, and Megatron's
seeded shuffle says which text they are. Resuming at step n therefore reads what an unbroken run would read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from pretrain.corpus import END_OF_DOCUMENT, build_corpus

Batch = dict[str, torch.Tensor]


class _Vocabulary:
    """What `GPTDataset` asks of a tokenizer when the text is tokenised already."""

    def __init__(self, size: int) -> None:
        self.vocab_size = size
        self.eod = END_OF_DOCUMENT if size > END_OF_DOCUMENT else size - 1
        self.unique_identifiers = {"class": "byte-level", "vocab_size": size}


def build_datasets(args: argparse.Namespace) -> tuple[Any, Any]:
    """The training and the validation dataset (None without evaluation); rank 0 writes what the others then read."""
    prefix = args.data_path
    if prefix is None:
        if dist.get_rank() == 0:
            build_corpus(args.data_text, args.data_cache_path)
        dist.barrier()
        prefix = build_corpus(args.data_text, args.data_cache_path)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=([prefix], None),
        split=args.split,
        path_to_cache=str(args.data_cache_path / "index"),
        tokenizer=_Vocabulary(args.vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    _check_split(prefix, config)
    sizes = [args.train_iters * args.global_batch_size, args.eval_iters * args.global_batch_size, 0]
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    if args.eval_iters and valid is None:
        raise SystemExit("pretrain_gpt.py: error: the corpus is too small for a validation split; change --split")
    return train, valid


def _check_split(prefix: str, config: GPTDatasetConfig) -> None:
    """Refuse a corpus that leaves a part without documents: Megatron would look for samples in it for ever."""
    count = GPTDataset.numel_low_level_dataset(GPTDataset.build_low_level_dataset(prefix, config))
    for part, bounds in zip(("training", "validation", "testing"), config.split_matrix, strict=True):
        if bounds is not None and round(bounds[0] * count) == round(bounds[1] * count):
            raise SystemExit(
                f"pretrain_gpt.py: error: the corpus has {count} documents, and --split {config.split} leaves none for "
                f"{part}; give it more documents, or change --split (1,0 for training alone)"
            )


def microbatches(dataset: Any, args: argparse.Namespace, consumed: int) -> Iterator[Batch]:
    """This rank's microbatches of the step that starts after `consumed` samples, without end."""
    rank = parallel_state.get_data_parallel_rank()
    first = consumed + rank * args.micro_batch_size
    while True:
        samples = [dataset[index] for index in range(first, first + args.micro_batch_size)]
        batch = {
            name: torch.stack([sample[name] for sample in samples])
            for name in ("tokens", "labels", "loss_mask", "position_ids")
        }
        if not args.on_cpu:
            batch = {name: tensor.pin_memory().cuda(non_blocking=True) for name, tensor in batch.items()}
        yield _on_this_context_rank(args, batch)
        first += args.micro_batch_size * args.data_parallel_size


def _on_this_context_rank(args: argparse.Namespace, batch: Batch) -> Batch:
    if args.context_parallel_size == 1:
        return batch
    from megatron.core.utils import get_batch_on_this_cp_rank

    sliced: Batch = get_batch_on_this_cp_rank(batch)
    return sliced
