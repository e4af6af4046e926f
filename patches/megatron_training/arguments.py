"""Patches of `megatron.training.arguments` (Megatron-LM)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from megamem.patches.registry import Patch

if TYPE_CHECKING:
    from megamem.runtime.door import AbstractDoor


def _with_flags(door: AbstractDoor, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def add_megatron_arguments(parser: Any) -> Any:
        return door.add_flags(original(parser))

    return add_megatron_arguments


DOOR_PATCHES = (
    Patch(
        target="megatron.training.arguments:add_megatron_arguments",
        build=_with_flags,
        why="The flags have to be in the parser that makes Megatron-LM's --help and its dump of arguments; the "
        "extra_args_provider belongs to the script, and has moved between releases.",
        supports="megatron-core>=0.15.3,<0.20",
        remove_when="Megatron-LM takes arguments from entry points.",
    ),
)
"""For scripts that do not know of megamem."""
