"""Patches of `megatron.core.parallel_state`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from megamem.patches.registry import Patch

if TYPE_CHECKING:
    from megamem.runtime.door import AbstractDoor

_SUPPORTS = "megatron-core>=0.15.3,<0.20"


def _announced(door: AbstractDoor, original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        door.on_groups()

    return initialize_model_parallel


def _taken_back(door: AbstractDoor, original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def destroy_model_parallel(*args: Any, **kwargs: Any) -> None:
        door.on_groups_gone()
        original(*args, **kwargs)

    return destroy_model_parallel


DOOR_PATCHES = (
    Patch(
        target="megatron.core.parallel_state:initialize_model_parallel",
        build=_announced,
        why="A script that does not know of megamem never says when its groups are there and its model is not built "
        "yet; every trainer calls this function at that moment.",
        supports=_SUPPORTS,
        remove_when="Megatron-Core calls hooks when its groups have been made.",
    ),
    Patch(
        target="megatron.core.parallel_state:destroy_model_parallel",
        build=_taken_back,
        why="What megamem holds of the process groups has to be given back before they are destroyed.",
        supports=_SUPPORTS,
        remove_when="Megatron-Core calls hooks before its groups are destroyed.",
        where_loaded=("megatron.training.training:destroy_model_parallel",),  # which Bridge 0.6 imports
    ),
)
"""For scripts that do not know of megamem."""
