"""Patches of `megatron.core.models.common.language_module.language_module`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from megamem.patches.registry import Patch

if TYPE_CHECKING:
    from megamem.runtime.session import AbstractLoss, AbstractPlacement

_MODULE = "megatron.core.models.common.language_module.language_module"
_SUPPORTS = "megatron-core>=0.15.3,<0.20"


def _admitted(placement: AbstractPlacement, original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it is one
        original(self, *args, **kwargs)
        placement.on_language_model(self)

    return __init__


def _announced(placement: AbstractPlacement, original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def setup_embeddings_and_output_layer(self: Any) -> None:
        original(self)
        placement.on_embeddings(self)

    return setup_embeddings_and_output_layer


def _without_logits(loss: AbstractLoss, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def compute_language_model_loss(self: Any, labels: Any, logits: Any) -> Any:
        return loss.compute(self, original, labels, logits)

    return compute_language_model_loss


PATCHES = (
    Patch(
        target=f"{_MODULE}:LanguageModule.__init__",
        build=_admitted,
        why="A model that megamem cannot place must be refused when it is built, not trained with its layers in "
        "a wrong order.",
        supports=_SUPPORTS,
        remove_when="every language model of Megatron-Core takes its stage from one replaceable function.",
    ),
    Patch(
        target=f"{_MODULE}:LanguageModule.setup_embeddings_and_output_layer",
        build=_announced,
        why="Tied weights start equal by an all-reduce between the first and the last rank; in a V both copies are on "
        "the first.",
        supports=_SUPPORTS,
        remove_when="Megatron-Core copies tied weights within a rank that holds the first and the last stage.",
    ),
)
"""For another placement of the chunks."""

LOSS_PATCHES = (
    Patch(
        target=f"{_MODULE}:LanguageModule.compute_language_model_loss",
        build=_without_logits,
        why="A loss whose logits were not made is computed from hidden states and weight, chunk by chunk.",
        supports=_SUPPORTS,
        remove_when="Megatron-Core's models hand hidden states, output layer and labels to one replaceable function.",
    ),
)
"""For losses without logits."""
