"""The job that runs in this process, as the planner sees it: from Megatron-LM's own arguments, or as it is told."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from megamem.config import Config
from megamem.deciding import undecided
from megamem.errors import ConfigError, InfeasibleError, MegamemError
from megamem.host import resolve_host_memory
from megamem.integrations.live_job import on_device
from megamem.ir.job import Job
from megamem.planner.hardware import Hardware, load_hardware, row_of_device
from megamem.planner.joint.decide import decide
from megamem.planner.models.flags import job_of_arguments, job_of_flags

KnownJob = Job | Sequence[str] | Namespace


def decided(config: Config, job: KnownJob | None) -> Config:
    """`config` with nothing left to the planner: rank 0 asks it, and every rank gets the same answer.

    job: what is trained: a `Job`, Megatron-LM's flags, or what its parser made of them; None: what Megatron-LM runs

    Raises ConfigError, on every rank, where the job or the GPU is not known or contradicts the configuration, and
    where nothing fits.
    """
    if not undecided(config):
        return config
    answer: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            answer = [_decide(config, job)]
        except MegamemError as fault:
            answer = [fault]
    torch.distributed.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], MegamemError):
        raise answer[0]
    found: Config = answer[0]
    return found


def _decide(config: Config, job: KnownJob | None) -> Config:
    left = ", ".join(undecided(config))
    try:
        return decide(config, _job(job, left), _hardware(config, left), _host())
    except InfeasibleError as fault:
        raise ConfigError(f"{left}: auto: {fault}; megamem plan finds a layout, or the GPUs, that it fits on") from None


def _job(job: KnownJob | None, left: str) -> Job:
    if isinstance(job, Job):
        return job
    known = job if job is not None else _arguments_of_megatron_lm()
    if known is None:
        raise ConfigError(
            f"{left}: auto, and what is to be trained is not known before the model is built; pass it: "
            "megamem.enable(config, job=[... Megatron-LM's flags ...]), or decide beforehand: megamem plan -o plan.yaml"
        )
    ranks = torch.distributed.get_world_size()
    found = job_of_arguments(known, ranks) if isinstance(known, Namespace) else job_of_flags(known, ranks)
    return on_device(found, "cuda" if torch.cuda.is_available() else "cpu")


def _arguments_of_megatron_lm() -> Namespace | None:
    """What Megatron-LM has parsed, where it is what runs."""
    variables = sys.modules.get("megatron.training.global_vars")
    found = getattr(variables, "_GLOBAL_ARGS", None)
    return found if isinstance(found, Namespace) else None


def _hardware(config: Config, left: str) -> Hardware:
    if config.planner.hardware != "auto":
        return load_hardware(config.planner.hardware)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    row = row_of_device(device)
    if row is None:
        raise ConfigError(
            f"{left}: auto, and {device!r} is no GPU of the table; measure it (megamem profile --hardware --output "
            "profile.json) and set planner.hardware to profile.json, or to the name of a GPU (megamem plan --list)"
        )
    return load_hardware(row)


def _host() -> float:
    """Bytes of host memory that one of this machine's ranks may have."""
    return float(resolve_host_memory("auto", int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
