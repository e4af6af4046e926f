"""Patches of `megatron.core.pipeline_parallel.schedules`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from megamem.patches.registry import Patch

if TYPE_CHECKING:
    from megamem.runtime.session import AbstractSession


def _bounded(session: AbstractSession, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def forward_backward(*args: Any, **kwargs: Any) -> Any:
        return session.run_step(original, args, kwargs)

    return forward_backward


PATCHES = tuple(
    Patch(
        target=f"megatron.core.pipeline_parallel.schedules:{name}",
        build=_bounded,
        why="A pipeline schedule runs in place of Megatron's own, and megamem must know where a step ends; "
        "get_forward_backward_func looks these names up at every call, so all trainers come through them.",
        supports="megatron-core>=0.15.3,<0.20",
        remove_when="Megatron-Core takes a schedule from outside, and calls a hook at the end of a step.",
        where_loaded=tuple(f"megatron.bridge.training.{trainer}:{name}" for trainer in trainers),
    )
    for name, trainers in (
        ("forward_backward_no_pipelining", ()),
        ("forward_backward_pipelining_without_interleaving", ("train", "train_megatron_mimo")),  # Bridge 0.6
        ("forward_backward_pipelining_with_interleaving", ()),
    )
)
