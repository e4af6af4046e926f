"""Patches of `megatron.core.pipeline_parallel.schedules`."""

from megamem.patches.registry import Patch

PATCHES: tuple[Patch, ...] = ()
