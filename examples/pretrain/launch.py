"""From a bare process to a rank of a Megatron job: device, process group, parallel groups, seeds."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
from collections.abc import Iterator
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist


def uses_cpu(args: argparse.Namespace) -> bool:
    """Whether this run is on CPUs: asked for, or because there is nothing else."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("pretrain_gpt.py: error: --device cuda, but PyTorch sees no GPU")
    return args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available())


@contextlib.contextmanager
def job(args: argparse.Namespace) -> Iterator[None]:
    """The process group and Megatron's parallel groups, and on CPUs the rig that stands in for CUDA."""
    args.on_cpu = uses_cpu(args)
    # Megatron asks for it where tensor parallelism overlaps communication on GPUs before Blackwell.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with contextlib.ExitStack() as stack:
        if args.on_cpu:
            from megamem.testing.cpu import cpu_rig

            stack.enter_context(cpu_rig())
        else:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if not dist.is_initialized():  # a launcher of its own may have made it
            _init_process_group(args)
        stack.callback(dist.destroy_process_group)
        _init_parallel_groups(args)
        yield


def _init_process_group(args: argparse.Namespace) -> None:
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    backend = "gloo" if args.on_cpu else "nccl"
    if "RANK" in os.environ:  # under torchrun
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _init_parallel_groups(args: argparse.Namespace) -> None:
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_stages,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    # Megatron's own trainers say so too; megamem's `auto` schedule asks.
    init_num_microbatches_calculator(
        dist.get_rank(), None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
    )


def set_virtual_stages(args: argparse.Namespace) -> None:
    """Tell Megatron how many chunks a pipeline rank of the next run has."""
    from megatron.core import parallel_state

    parallel_state.set_virtual_pipeline_model_parallel_world_size(args.virtual_stages)
    parallel_state.set_virtual_pipeline_model_parallel_rank(None if args.virtual_stages is None else 0)


def set_seeds(args: argparse.Namespace) -> None:
    """Seed everything, as Megatron does: pipeline stages differ, and the tensor-parallel ranks of dropout differ."""
    from megatron.core import parallel_state, tensor_parallel

    seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
