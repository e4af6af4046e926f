"""Which patches each capability needs: records only. Importing this changes nothing and needs no torch, no Megatron.

`integrations` hands a group to `registry.apply` when its capability is enabled, and nobody else does.
"""

from collections.abc import Mapping

from megamem.patches.megatron_core import schedules, transformer_layer
from megamem.patches.registry import Patch

GROUPS: Mapping[str, tuple[Patch, ...]] = {
    "activations": (*transformer_layer.PATCHES, *schedules.PATCHES),
}
"""The patches of each capability, by the name of its section in the configuration."""
