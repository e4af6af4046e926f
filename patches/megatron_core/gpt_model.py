"""Patches of `megatron.core.models.gpt.gpt_model`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from megamem.patches.registry import Patch

if TYPE_CHECKING:
    from megamem.runtime.session import AbstractBuilder, AbstractLoss, AbstractPlacement

_SUPPORTS = "megatron-core>=0.15.3,<0.20"


def _built(builder: AbstractBuilder, original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it is one
        builder.build_model(self, original, args, kwargs)

    return __init__


def _as_stage(placement: AbstractPlacement, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        return placement.run_as_stage(self, original, args, kwargs)

    return sharded_state_dict


def _without_logits(loss: AbstractLoss, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def _postprocess(self: Any, *args: Any, **kwargs: Any) -> Any:
        return loss.run_model(self, original, args, kwargs)

    return _postprocess


BUILD_PATCHES = (
    Patch(
        target="megatron.core.models.gpt.gpt_model:GPTModel.__init__",
        build=_built,
        why="Trainers compute a chunk's stage from the ring of an interleaved pipeline and hand the result to the "
        "constructor; in a V the second chunk of a rank is another stage. And a model whose embeddings all ranks share "
        "must have its shards before DDP makes its buckets.",
        supports=_SUPPORTS,
        remove_when="Megatron-Core asks one replaceable function which stage a chunk of a rank is, and one that makes "
        "the embeddings.",
    ),
)
"""For models that are built in another way."""

PATCHES = (
    Patch(
        target="megatron.core.models.gpt.gpt_model:GPTModel.sharded_state_dict",
        build=_as_stage,
        why="With a pipeline layout, the layer offset in a checkpoint is looked up by the rank in parallel_state.",
        supports=_SUPPORTS,
        remove_when="get_transformer_layer_offset hands its pp_rank to the layout.",
    ),
)
"""For another placement of the chunks."""

LOSS_PATCHES = (
    Patch(
        target="megatron.core.models.gpt.gpt_model:GPTModel._postprocess",
        build=_without_logits,
        why="The output layer must not make logits where only a loss is wanted; output_processor (since 0.18) leaves "
        "out the heads of multi-token prediction and the output layer's hooks, and cannot be set on a model.",
        supports=_SUPPORTS,
        remove_when="Megatron-Core's models hand hidden states, output layer and labels to one replaceable function, "
        "for every head.",
    ),
)
"""For losses without logits."""
