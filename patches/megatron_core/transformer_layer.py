"""Patches of `megatron.core.transformer.transformer_layer`."""

from megamem.patches.registry import Patch

PATCHES: tuple[Patch, ...] = ()
