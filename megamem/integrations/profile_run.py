"""A process of its own for `megamem profile`: groups and device made, the model measured, everything ended."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megamem.integrations.megatron_profile import profile_gpt, shape_of
from megamem.ir.workload import Workload


def profile_here(arguments: argparse.Namespace, progress: Callable[[str, int], None]) -> Workload:
    """The costs that the flags of `megamem profile` ask for; on every tensor-parallel rank."""
    with _groups(arguments.tensor_model_parallel_size):
        return profile_gpt(
            shape_of(arguments),
            repetitions=arguments.repetitions,
            link_gb_per_s=arguments.link_gb_per_s,
            progress=progress,
        )


@contextlib.contextmanager
def _groups(tensor_parallel: int) -> Iterator[None]:
    """The default process group and Megatron's, where they are not there already."""
    if parallel_state.model_parallel_is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
