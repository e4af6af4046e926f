"""What patched code of a trainer calls: the one object between a trainer's functions and megamem's runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch.nn import Module


class AbstractSession(ABC):
    """One switch-on of megamem in one process. Integrations implement it, patches call it."""

    @abstractmethod
    def on_layer_built(self, layer: Module) -> None:
        """A transformer layer has been constructed. Raises UnsupportedError where it does not go with the plan."""

    @abstractmethod
    def run_layer(
        self, layer: Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a transformer layer's `forward`."""

    @abstractmethod
    def run_step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one forward-backward step over all microbatches."""
