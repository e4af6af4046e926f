"""What patched code of a trainer calls: the objects between a trainer's functions and megamem's runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
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
    def run_linear(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Run a linear layer's autograd function: what its `apply` would return."""

    @abstractmethod
    def run_step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one forward-backward step over all microbatches."""


class AbstractBuilder(ABC):
    """How models are constructed, if not as the trainer has it."""

    @abstractmethod
    def build_model(
        self, model: Module, construct: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Run a model's constructor, `construct(model, *args, **kwargs)`."""


class AbstractPlacement(ABC):
    """Where the chunks of a model lie in the pipeline, if not where the trainer puts them."""

    @abstractmethod
    def on_language_model(self, model: Module) -> None:
        """A language model's groups are set. Raises UnsupportedError where it is none that can be placed."""

    @abstractmethod
    def run_building(self, build: Callable[..., Any], /, *args: Any, vp_stage: int | None, **kwargs: Any) -> Any:
        """`build(*args, vp_stage=vp_stage, **kwargs)`, where parallel state answers for the stage that chunk
        `vp_stage` of this rank is; None stands for no chunk.
        """

    @abstractmethod
    def on_embeddings(self, model: Module) -> None:
        """A model chunk's embedding and output layer have been constructed and marked."""

    @abstractmethod
    def run_as_stage(
        self, model: Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a method of a model chunk while the trainer's parallel state answers for the chunk's stage."""

    @abstractmethod
    def sum_tied_gradients(self, chunks: Sequence[Module]) -> bool:
        """Sum the gradients of tied embedding and output weights. False where the chunks are not placed by this."""


class AbstractTiles(ABC):
    """How MLPs run, if not on all tokens at once."""

    @abstractmethod
    def run_mlp(
        self, module: Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an MLP's `forward`."""


class AbstractLoss(ABC):
    """How losses of language models are computed, if not from their logits."""

    @abstractmethod
    def run_model(
        self, model: Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the method of a language model that calls its output layer, and returns losses or logits."""

    @abstractmethod
    def compute(self, model: Module, method: Callable[..., Tensor], labels: Tensor, logits: Any) -> Tensor:
        """The losses [b, s] of labels [b, s]; `method` computes them from logits."""


class AbstractActivations(ABC):
    """How activation functions of MLPs are computed, and what they save."""

    @abstractmethod
    def run_activation(
        self, name: str, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """What the trainer's `function` of this name, an activation with what surrounds it, would return."""
