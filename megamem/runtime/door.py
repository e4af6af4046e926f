"""What patched code of a trainer tells megamem before megamem is on: the way in for scripts that do not know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class AbstractDoor(ABC):
    """A script in which megamem is to be switched on. Integrations implement it, patches call it."""

    @abstractmethod
    def on_groups(self) -> None:
        """Megatron's parallel groups are there, and no model is built yet."""

    @abstractmethod
    def on_groups_gone(self) -> None:
        """The trainer is about to destroy its parallel groups."""

    @abstractmethod
    def add_flags(self, parser: Any) -> Any:
        """Add megamem's flags to a trainer's parser, and return the parser."""

    @abstractmethod
    def on_config(self, config: Any) -> bool:
        """Give a trainer's configuration object a section of megamem's; whether it had none before."""
