"""Patches of `megatron.core.transformer.mlp`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from megamem.patches.registry import Patch

if TYPE_CHECKING:
    from megamem.runtime.session import AbstractTiles


def _in_tiles(tiles: AbstractTiles, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return tiles.run_mlp(self, original, args, kwargs)

    return forward


PATCHES = (
    Patch(
        target="megatron.core.transformer.mlp:MLP.forward",
        build=_in_tiles,
        why="The MLP must run one tile of its tokens at a time, and keep between the passes what a policy says.",
        supports="megatron-core>=0.15.3,<0.20",
        remove_when="Megatron-Core's chunked MLP takes a place to store the output of linear_fc1.",
    ),
)
