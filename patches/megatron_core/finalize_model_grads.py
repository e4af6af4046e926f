"""Patches of `megatron.core.distributed.finalize_model_grads`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

from megamem.patches.registry import Patch

if TYPE_CHECKING:
    from megamem.runtime.session import AbstractPlacement


def _within_rank(placement: AbstractPlacement, original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def all_reduce_word_embedding_gradients(model: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        if not placement.sum_tied_gradients(model):
            original(model, *args, **kwargs)

    return all_reduce_word_embedding_gradients


PATCHES = (
    Patch(
        target="megatron.core.distributed.finalize_model_grads:_allreduce_word_embedding_grads",
        build=_within_rank,
        why="Gradients of tied weights are all-reduced between the first and the last rank; in a V both copies are on "
        "the first, and the last would never come.",
        supports="megatron-core>=0.15.3,<0.20",
        remove_when="Megatron-Core sums tied gradients within a rank that holds the first and the last stage.",
        source_sha=frozenset({"d4e8e36bd099", "e08f696038b3"}),
    ),
)
