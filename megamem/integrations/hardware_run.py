"""`megamem profile --hardware`: this machine's rates, measured by one process per device, all at the same time."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from megamem.host import host_memory
from megamem.planner.hardware import plain_row, row_of_device
from megamem.profiler.hardware import Probe, Sizes, context_bytes, profile_content

_GPU = {"hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 14336, "seq_length": 16384}
_CPU = {"hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 512, "seq_length": 512}
_UNKNOWN = "h100"  # the row for what one machine cannot show, where the device has none of its own
_COLLECTIVE = 64 << 20


def measure_here(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The profile, on the first process; None on the others. Raises ConfigError for sizes that cannot be."""
    on_gpu = torch.cuda.is_available()
    ranks, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    is_there = dist.is_available() and dist.is_initialized()  # behind a script that has made its groups
    if ranks > 1 and not is_there:
        # A script before may have had groups, and ended them: their addresses are still in the launcher's store.
        store, rank, size = next(iter(dist.rendezvous("env://")))  # type: ignore[attr-defined]
        store = dist.PrefixStore("megamem profile", store)  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size)
    try:
        probe = Probe(
            device, _sizes(arguments, on_gpu), barrier=dist.barrier if ranks > 1 else _nothing, progress=_show
        )
        measured = probe.measure()
        if ranks > 1:
            measured |= _collectives(probe, ranks)
        measured["context"] = {"value": context_bytes(device), "source": "measured"}
        measured["node"] = {"value": torch.cuda.device_count() if on_gpu else ranks, "source": "measured"}
    finally:
        if ranks > 1 and not is_there:
            dist.destroy_process_group()
    if int(os.environ.get("RANK", "0")) != 0:
        return None
    name = torch.cuda.get_device_name(device) if on_gpu else "processor"
    fallback = plain_row(row_of_device(name) or _UNKNOWN)
    if not on_gpu:
        measured["peak_flops"] = measured["gemm"]
    if sys.stderr.isatty():
        print(file=sys.stderr)
    where = f"{name}, {time.strftime('%Y-%m-%d', time.gmtime())}"
    return profile_content(measured, fallback, device=where, ranks=ranks, memory=host_memory().total_nbytes)


def _sizes(arguments: argparse.Namespace, on_gpu: bool) -> Sizes:
    """Shapes of the flags, of one tensor-parallel rank; usual ones where they are not given."""
    given = {name: getattr(arguments, name) or value for name, value in (_GPU if on_gpu else _CPU).items()}
    tensor = arguments.tensor_model_parallel_size
    return Sizes(
        hidden=given["hidden_size"],
        ffn=max(1, given["ffn_hidden_size"] // tensor),
        heads=max(1, given["num_attention_heads"] // tensor),
        head_dim=given["hidden_size"] // given["num_attention_heads"],
        seq_length=given["seq_length"],
        nbytes=(256 if on_gpu else 8) << 20,
        repetitions=arguments.repetitions,
    )


def _collectives(probe: Probe, ranks: int) -> dict[str, dict[str, Any]]:
    """Bus bandwidth of an all-gather over the processes, and the latency of a small one."""
    size = _COLLECTIVE if probe.device.type == "cuda" else _COLLECTIVE >> 6
    part = torch.empty(size // ranks, dtype=torch.uint8, device=probe.device)
    whole = torch.empty(part.numel() * ranks, dtype=torch.uint8, device=probe.device)
    small = torch.zeros(1, device=probe.device)
    seconds = probe.seconds(lambda: dist.all_gather_into_tensor(whole, part))
    moved = whole.numel() * (ranks - 1) / ranks
    return {
        "nvlink": {"value": moved / seconds, "source": "measured"},
        "latency": {"value": probe.seconds(lambda: dist.all_reduce(small)), "source": "measured"},
    }


def _nothing() -> None:
    pass


def _show(what: str) -> None:
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print(f"\r\x1b[Kmeasuring {what}", end="", file=sys.stderr, flush=True)
