"""Patches of `megatron.core.transformer.transformer_layer`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from megamem.patches.registry import Patch

if TYPE_CHECKING:
    from megamem.runtime.session import AbstractSession

_SUPPORTS = "megatron-core>=0.15.3,<0.20"


def _announced(session: AbstractSession, original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it is one
        original(self, *args, **kwargs)
        session.on_layer_built(self)

    return __init__


def _through_engine(session: AbstractSession, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return session.run_layer(self, original, args, kwargs)

    return forward


PATCHES = (
    Patch(
        target="megatron.core.transformer.transformer_layer:TransformerLayer.__init__",
        build=_announced,
        why="Settings that do not go with activation swap must be refused while a model is built, not in a step.",
        supports=_SUPPORTS,
        remove_when="Megatron-Core calls a hook for every layer it builds.",
    ),
    Patch(
        target="megatron.core.transformer.transformer_layer:TransformerLayer.forward",
        build=_through_engine,
        why="Saved-tensor hooks must surround one layer's forward, whichever block or model calls it.",
        supports=_SUPPORTS,
        remove_when="TransformerConfig accepts a context manager to run each layer in.",
    ),
)
