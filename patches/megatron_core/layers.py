"""Patches of `megatron.core.tensor_parallel.layers`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megamem.patches.registry import Patch

if TYPE_CHECKING:
    from megamem.runtime.session import AbstractSession


def _through_session(session: AbstractSession, original: Any) -> Any:
    class Linear(original):  # type: ignore[misc]
        @classmethod
        def apply(cls, *args: Any) -> Any:
            return session.run_linear(original, args)

    return Linear


PATCHES = (
    Patch(
        target="megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication",
        build=_through_session,
        why="A linear layer's weight gradient must be computable apart from its input gradient, without Transformer "
        "Engine too (Megatron-Core's own switch for that, delay_wgrad_compute, does nothing here); and its backward "
        "pass must see the weight itself, which saved-tensor hooks do not give back.",
        supports="megatron-core>=0.15.3,<0.20",
        remove_when="ColumnParallelLinear.backward_dw and RowParallelLinear.backward_dw compute the weight gradient, "
        "and the function keeps its weight on its context.",
        source_sha=frozenset({"01c4d297ea57", "a2f6825a10f3", "992a389e92bb", "9ffc0bd1a944"}),
    ),
)
