"""Which patches each capability needs: records only. Importing this changes nothing and needs no torch, no Megatron.

`integrations` hands a group to `registry.apply` when its capability is enabled, and nobody else does.
"""

from collections.abc import Mapping

from megamem.patches.megatron_bridge import config, gpt_provider
from megamem.patches.megatron_core import (
    finalize_model_grads,
    fusions,
    gpt_model,
    language_module,
    layers,
    mlp,
    parallel_state,
    schedules,
    transformer_layer,
)
from megamem.patches.megatron_training import arguments, gpt_builder, training
from megamem.patches.registry import Patch

GROUPS: Mapping[str, tuple[Patch, ...]] = {
    "activations": (*transformer_layer.PATCHES, *schedules.PATCHES, *layers.PATCHES),
    "activations.layers": transformer_layer.PATCHES,
    "activations.linears": layers.PATCHES,
    "schedule": (*schedules.PATCHES, *layers.PATCHES),
    "fp8": (*transformer_layer.PATCHES, *schedules.PATCHES),
    "fp8.activations": fusions.PATCHES,
    "vocabulary": schedules.PATCHES,
    "allocator": schedules.PATCHES,
    "vocabulary.parallel": gpt_model.BUILD_PATCHES,
    "mlp": (*schedules.PATCHES, *layers.PATCHES),
    "mlp.forward": mlp.PATCHES,
    "vocabulary.loss": (*gpt_model.LOSS_PATCHES, *language_module.LOSS_PATCHES),
    "schedule.building": gpt_model.BUILD_PATCHES,
    "schedule.v-placement": (*gpt_model.PATCHES, *language_module.PATCHES, *finalize_model_grads.PATCHES),
}
"""The patches of each capability, by the name of its section in the configuration; behind a dot, a part of it that is
applied where it is needed."""

DOORS: Mapping[str, tuple[Patch, ...]] = {
    "scripts": parallel_state.DOOR_PATCHES,
    "megatron-lm": arguments.DOOR_PATCHES,
    "bridge": config.DOOR_PATCHES,
}
"""The patches by which scripts that do not know of megamem are entered (`megamem run`), by trainer."""

TRAINER_PLACEMENTS: Mapping[str, tuple[Patch, ...]] = {
    "megatron-lm.v-placement": (*training.PLACEMENT_PATCHES, *gpt_builder.PLACEMENT_PATCHES),
    "bridge.v-placement": gpt_provider.PLACEMENT_PATCHES,
}
"""What a V placement needs besides, of trainers that build models and data by themselves; applied where the trainer is
loaded."""

RECORDS: Mapping[str, tuple[Patch, ...]] = {**GROUPS, **DOORS, **TRAINER_PLACEMENTS}
"""All of them."""
