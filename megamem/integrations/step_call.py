"""What a trainer gives a forward-backward function of Megatron-Core, whatever the release."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch.nn import Module

from megamem.errors import UnsupportedError
from megamem.integrations import compat
from megamem.integrations.placement import physical_group


@dataclass(frozen=True, kw_only=True)
class StepCall:
    """The arguments of a forward-backward function that matter here."""

    step: Callable[..., Any]  # the function itself
    forward_step_func: Callable[..., Any]
    iterators: list[Any]
    chunks: list[Module]
    num_microbatches: int
    forward_only: bool
    collect_non_loss_data: bool
    first_val_step: bool | None
    adjust_shapes: Callable[..., Any] | None
    sizes: dict[str, Any]  # seq_length, micro_batch_size, decoder_seq_length
    group: Any  # the pipeline's
    groups: Any  # ProcessGroupCollection
    force_all_reduce: bool

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(parameter.device for chunk in self.chunks for parameter in chunk.parameters())

    @classmethod
    def of(cls, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepCall:
        bound = inspect.signature(step).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        chunks = given["model"] if isinstance(given["model"], list) else [given["model"]]
        iterators = given["data_iterator"]
        communicator, groups = given.get("p2p_communicator"), given.get("pg_collection")  # 0.15 has not all of them
        return cls(
            step=step,
            forward_step_func=given["forward_step_func"],
            iterators=iterators if isinstance(iterators, list) else [iterators] * len(chunks),
            chunks=chunks,
            num_microbatches=given["num_microbatches"],
            forward_only=given["forward_only"],
            collect_non_loss_data=given["collect_non_loss_data"],
            first_val_step=given["first_val_step"],
            adjust_shapes=given["adjust_tensor_shapes_fn"],
            sizes={name: given[name] for name in ("seq_length", "micro_batch_size", "decoder_seq_length")},
            group=_pipeline_group(communicator, groups),
            groups=compat.default_groups() if groups is None else groups,
            force_all_reduce=bool(given.get("force_all_reduce")),
        )


def _pipeline_group(communicator: Any, groups: Any) -> Any:
    """The pipeline's group, from what the caller of a forward-backward function gave it."""
    if communicator is None:
        given = getattr(groups, "pp", None)
        return parallel_state.get_pipeline_model_parallel_group() if given is None else physical_group(given)
    if not hasattr(communicator, "pp_group"):
        raise UnsupportedError(
            f"{type(communicator).__name__} connects several modules with pipelines of their own; schedules are for one"
        )
    return physical_group(communicator.pp_group)
