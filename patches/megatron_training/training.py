"""Patches of `megatron.training.training` (Megatron-LM)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from megamem.patches.registry import Patch

if TYPE_CHECKING:
    from megamem.runtime.session import AbstractPlacement

_SUPPORTS = "megatron-core>=0.15.3,<0.20"


def _built_as_stage(placement: AbstractPlacement, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def get_model(model_provider_func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return original(partial(placement.run_building, model_provider_func), *args, **kwargs)

    return get_model


def _read_as_stage(placement: AbstractPlacement, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def build_train_valid_test_data_iterators(provider: Any) -> Any:
        chunk = getattr(provider, "keywords", {}).get("vp_stage")  # a partial, where the pipeline is virtual
        return placement.run_building(lambda vp_stage=None: original(provider), vp_stage=chunk)

    return build_train_valid_test_data_iterators


PLACEMENT_PATCHES = (
    Patch(
        target="megatron.training.training:get_model",
        also=("megatron.training:get_model",),
        build=_built_as_stage,
        why="Layer specs with experts are made by the model provider, which asks parallel_state for the stage of a "
        "chunk; in a V the second chunk of a rank is another stage.",
        supports=_SUPPORTS,
        remove_when="Megatron-Core asks one replaceable function which stage a chunk of a rank is.",
    ),
    Patch(
        target="megatron.training.training:build_train_valid_test_data_iterators",
        build=_read_as_stage,
        why="Which chunks need data is asked of parallel_state, by the stage that the chunk would be in Megatron's "
        "ring.",
        supports=_SUPPORTS,
        remove_when="Megatron-Core asks one replaceable function which stage a chunk of a rank is.",
    ),
)
"""For another placement of the chunks."""
