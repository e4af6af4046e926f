"""Patches of `megatron.bridge.models.gpt_provider`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from megamem.patches.registry import Patch

if TYPE_CHECKING:
    from megamem.runtime.session import AbstractPlacement


def _built_as_stage(placement: AbstractPlacement, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def provide(*args: Any, **kwargs: Any) -> Any:
        return placement.run_building(original, *args, **kwargs)

    return provide


PLACEMENT_PATCHES = (
    Patch(
        target="megatron.bridge.models.gpt_provider:GPTModelProvider.provide",
        build=_built_as_stage,
        why="Layer specs with experts are made by the provider, which asks parallel_state for the stage of a chunk; in "
        "a V the second chunk of a rank is another stage.",
        supports="megatron-bridge>=0.3.1,<0.8",
        remove_when="Megatron-Core asks one replaceable function which stage a chunk of a rank is.",
    ),
)
"""For another placement of the chunks."""
