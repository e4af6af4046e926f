"""Patches of Megatron-Bridge's `training.config` and `training.utils.omegaconf_utils`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from megamem.patches.registry import Patch

if TYPE_CHECKING:
    from megamem.runtime.door import AbstractDoor

_SUPPORTS = "megatron-bridge>=0.3.1,<0.8"


def _with_section(door: AbstractDoor, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_omegaconf_dict_config(config_container: Any) -> Any:
        door.on_config(config_container)
        return original(config_container)

    return create_omegaconf_dict_config


def _validated_with_section(door: AbstractDoor, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def validate(self: Any) -> Any:
        return self.validate() if door.on_config(self) else original(self)

    return validate


DOOR_PATCHES = (
    Patch(
        target="megatron.bridge.training.utils.omegaconf_utils:create_omegaconf_dict_config",
        build=_with_section,
        why="A section that the container does not have is dropped with a warning when a YAML file is merged; it has "
        "to have one before.",
        supports=_SUPPORTS,
        remove_when="Bridge takes sections of plug-ins from entry points.",
    ),
    Patch(
        target="megatron.bridge.training.config:ConfigContainer.validate",
        build=_validated_with_section,
        why="The settings of a run that was configured in Python only are first seen when pretrain validates them.",
        supports=_SUPPORTS,
        remove_when="Bridge takes sections of plug-ins from entry points.",
    ),
)
"""For scripts that do not know of megamem."""
