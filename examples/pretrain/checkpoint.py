"""Distributed checkpoints: save, exact resume, and writing while training goes on.

    FOLDER/latest_checkpointed_iteration.txt     20
    FOLDER/iter_0000020/                         torch_dist shards, and common.pt with counters and model shape

The layout is Megatron-LM's. The tracker file is written only when every rank has finished writing.
"""

from __future__ import annotations

import argparse
import inspect
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from pretrain.model import Training

_TRACKER = "latest_checkpointed_iteration.txt"

# What has to be the same for the tensors of a checkpoint to fit; the rest may change from run to run.
_SHAPE = (
    "num_layers",
    "mtp_num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_heads",
    "normalization",
    "qk_layernorm",
    "swiglu",
    "disable_bias_linear",
    "position_embedding_type",
    "untie_embeddings_and_output_weights",
    "num_experts",
    "vocab_size",
)
# And what random numbers belong to: with another layout the run goes on, from new seeds.
_LAYOUT = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)


def unwrap(chunk: Any) -> Any:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _metadata() -> dict[str, Any]:
    """How optimizer state is laid out: by model parameter, so that it can be read with another parallel layout."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _rng_state(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
    torch.cuda.set_rng_state(state["cuda"])
    torch.set_rng_state(state["torch"])


def _adams(optimizer: Any) -> list[tuple[Any, Any]]:
    """Megatron's optimizers that are built on PyTorch's Adam, each with its Adam."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [
        (part, part.optimizer) for part in parts if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)
    ]


def _load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load, minding the `step` that PyTorch's Adam has for every parameter, and apex's and TE's do not.

    Megatron's distributed optimizer looks for it among the loaded tensors, where it never is, because it travels in
    the parameter groups; then it makes all parameters share one, which every parameter's update would advance.
    """
    for part, _ in _adams(optimizer):
        if hasattr(part, "_set_main_param_and_optimizer_states"):
            part._set_main_param_and_optimizer_states = partial(_set_keeping_step, part)
    optimizer.load_state_dict(state)
    for part, adam in _adams(optimizer):
        vars(part).pop("_set_main_param_and_optimizer_states", None)
        for entry in adam.state.values():
            entry["step"] = entry["step"].clone()


def _allocate(optimizer: Any) -> None:
    """Give PyTorch's Adam its state: Megatron names what to load by what is there."""
    for _, adam in _adams(optimizer):
        for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
            if not adam.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def _set_keeping_step(part: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    group, order = part.model_param_group_index_map[model_param]
    step = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]["step"]
    type(part)._set_main_param_and_optimizer_states(part, model_param, {"step": step, **tensors})


def chunk_names(training: Training) -> list[str]:
    """What the model chunks of this rank are called in a checkpoint's state."""
    count = len(training.chunks)
    return ["model"] if count == 1 else [f"model{index}" for index in range(count)]


def model_state(training: Training) -> dict[str, Any]:
    """The sharded weights of this rank, by the names of its chunks."""
    metadata = _metadata()
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata)
        for name, chunk in zip(chunk_names(training), training.chunks, strict=True)
    }


def _state(args: argparse.Namespace, training: Training, *, is_loading: bool, with_rng: bool) -> dict[str, Any]:
    """The sharded state of a run; the same function names what to save and what to load."""
    metadata = _metadata()
    state = model_state(training)
    state["optimizer"] = training.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    if not is_loading:
        state["scheduler"] = training.scheduler.state_dict()
        state["iteration"] = training.iteration
        state["consumed"] = training.consumed
        state["shape"] = {name: getattr(args, name) for name in _SHAPE}
        state["layout"] = {name: getattr(args, name) for name in _LAYOUT}
    if with_rng:
        rng = None if is_loading else _rng_state(args)
        state["rng"] = ShardedObject("rng", rng, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)
    return state


class Checkpoints:
    """Saves to `--save`, loads from `--load`; knows about the writes that are still under way."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._queue: Any = AsyncCallsQueue() if args.async_save else None
        self._saved_at: int | None = None

    def save(self, training: Training) -> None:
        """Save this iteration, unless it is saved already. Returns before the disk is done with `--async-save`."""
        if self._saved_at == training.iteration:
            return
        self._saved_at = training.iteration
        self.finish(blocking=True)  # one write at a time: they share the disk and the staging memory
        folder = self._args.save / f"iter_{training.iteration:07d}"
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        # Later versions of Megatron write asynchronously through another package by default.
        names = inspect.signature(dist_checkpointing.save).parameters
        options = {"async_strategy": "mcore"} if self._queue is not None and "async_strategy" in names else {}
        request = dist_checkpointing.save(
            _state(self._args, training, is_loading=False, with_rng=True),
            str(folder),
            async_sharded_save=self._queue is not None,
            **options,
        )
        iteration = training.iteration
        if request is None:
            self._record(iteration)
        else:
            request.add_finalize_fn(lambda: self._record(iteration))
            self._queue.schedule_async_request(request)

    def _record(self, iteration: int) -> None:
        if dist.get_rank() == 0:
            part = self._args.save / f"{_TRACKER}.part"
            part.write_text(f"{iteration}\n", encoding="utf-8")
            part.rename(self._args.save / _TRACKER)

    def finish(self, *, blocking: bool) -> None:
        """Record the asynchronous writes that have ended; all of them if `blocking`. Every rank must call it."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=blocking)

    def close(self) -> None:
        """Wait for the last write."""
        if self._queue is not None:
            self.finish(blocking=True)
            self._queue.close()

    def load(self, training: Training) -> str:
        """Put the latest checkpoint of `--load` into `training`; says what it did."""
        folder = latest(self._args.load)
        if folder is None:
            return f"no checkpoint in {self._args.load} yet: starting from scratch"
        common = dist_checkpointing.load_common_state_dict(str(folder))
        self._check(folder, common)
        same_layout = common["layout"] == {name: getattr(self._args, name) for name in _LAYOUT}
        _allocate(training.optimizer)
        state = _state(self._args, training, is_loading=True, with_rng=same_layout)
        loaded = dist_checkpointing.load(state, str(folder))
        for name, chunk in zip(chunk_names(training), training.chunks, strict=True):
            unwrap(chunk).load_state_dict(loaded[name])
        _load_optimizer(training.optimizer, loaded["optimizer"])
        training.scheduler.load_state_dict(loaded["scheduler"])
        training.iteration, training.consumed = loaded["iteration"], loaded["consumed"]
        if same_layout:
            _set_rng_state(loaded["rng"])
        self._saved_at = training.iteration if self._args.save == self._args.load else None
        note = "" if same_layout else " (another parallel layout: random numbers start anew)"
        return f"resumed from iteration {training.iteration} of {folder}{note}"

    def _check(self, folder: Path, common: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, naming what differs."""
        if "shape" not in common:
            raise SystemExit(f"pretrain_gpt.py: error: {folder} was not written by this script")
        differing = [
            f"--{name.replace('_', '-')} {common['shape'].get(name)} there, {getattr(self._args, name)} here"
            for name in _SHAPE
            if common["shape"].get(name) != getattr(self._args, name)
        ]
        if differing:
            text = f"pretrain_gpt.py: error: {folder} holds another model: {'; '.join(differing)}"
            raise SystemExit(text if dist.get_rank() == 0 else 2)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, if there is one."""
    tracker = folder / _TRACKER
    if not tracker.is_file():
        return None
    return folder / f"iter_{int(tracker.read_text(encoding='utf-8')):07d}"
