"""Patches of `megatron.training.models.gpt` (Megatron-LM since 0.19)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from megamem.patches.registry import Patch

if TYPE_CHECKING:
    from megamem.runtime.session import AbstractPlacement


def _built_as_stage(placement: AbstractPlacement, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def build_model(*args: Any, **kwargs: Any) -> Any:
        return placement.run_building(original, *args, **kwargs)

    return build_model


PLACEMENT_PATCHES = (
    Patch(
        target="megatron.training.models.gpt:GPTModelBuilder.build_model",
        build=_built_as_stage,
        why="Layer specs with experts are made by the builder, which asks parallel_state for the stage of a chunk; in "
        "a V the second chunk of a rank is another stage.",
        supports="megatron-core>=0.19,<0.20",
        remove_when="Megatron-Core asks one replaceable function which stage a chunk of a rank is.",
    ),
)
"""For another placement of the chunks."""
