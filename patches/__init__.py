"""Which patches each capability needs: records only. Importing this changes nothing and needs no torch, no Megatron.

`integrations` hands a group to `registry.apply` when its capability is enabled, and nobody else does.
"""

from collections.abc import Mapping

from megamem.patches.megatron_core import (
    finalize_model_grads,
    gpt_model,
    language_module,
    layers,
    schedules,
    transformer_layer,
)
from megamem.patches.registry import Patch

GROUPS: Mapping[str, tuple[Patch, ...]] = {
    "activations": (*transformer_layer.PATCHES, *schedules.PATCHES),
    "activations.layers": transformer_layer.PATCHES,
    "schedule": (*schedules.PATCHES, *layers.PATCHES),
    "vocabulary": schedules.PATCHES,
    "allocator": schedules.PATCHES,
    "vocabulary.loss": (*gpt_model.LOSS_PATCHES, *language_module.LOSS_PATCHES),
    "schedule.v-placement": (*gpt_model.PATCHES, *language_module.PATCHES, *finalize_model_grads.PATCHES),
}
"""The patches of each capability, by the name of its section in the configuration; behind a dot, a part of it that is
applied where it is needed."""
