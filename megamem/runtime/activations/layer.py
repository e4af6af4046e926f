"""What the engine must know of a transformer layer, and how it takes part in the layer's calls.

The engine knows no trainer. An integration hands it an `AbstractLayer` for each layer: which submodules there are,
which of them is attention, how the layer's call is cut to a range of tokens. Submodules are watched by giving each
instance a `forward` of its own *while the layer runs* and taking it away again afterwards, so that nothing of megamem
stays in the model: it can be copied, pickled and saved as if we were not there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
PutTogether = Callable[[list[Tensor | None]], Tensor]
PartCall = Callable[[str, Callable[..., Any], Args, Kwargs], Any]


class AbstractLayer(ABC):
    """One layer of one model chunk, as an integration describes it."""

    @property
    @abstractmethod
    def number(self) -> int:
        """Megatron's global, 1-based layer number."""

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, Module]:
        """The submodules to watch, by dotted path; a parent comes before its children."""

    @property
    @abstractmethod
    def attention(self) -> str | None:
        """Path of core attention, whose output is answered from the store; None where there is none."""

    @property
    @abstractmethod
    def anchors(self) -> Mapping[str, str]:
        """Anchor name (`qkv`, `projection`, `fc1`) -> path of the module whose output it is."""

    @property
    @abstractmethod
    def experts(self) -> str | None:
        """Path of the expert part of an MoE layer: never replayed."""

    def saver(self, path: str) -> str:
        """By which path a plan knows what the part at `path` saves, where a part does its submodules' work itself."""
        return path

    @property
    @abstractmethod
    def token_blocks(self) -> int:
        """How many ranks' tokens stand one behind the other in a gathered tensor: the TP size under SP, else 1."""

    @property
    @abstractmethod
    def has_dropout(self) -> bool:
        """Whether a call now would draw random numbers outside the expert part."""

    @property
    @abstractmethod
    def can_replay(self) -> bool:
        """Whether running the layer a second time leaves no trace; where it does not, tensors are only ever swapped."""

    @abstractmethod
    def only_whole(self, args: Args, kwargs: Kwargs) -> str | None:
        """Why a call with these arguments can be replayed on all tokens only; None where it can be cut."""

    def must_stay(self, tensor: Tensor) -> bool:
        """Whether a tensor that the layer saves must not be moved, whatever the plan says. Asked when it is learned."""
        del tensor
        return False

    def take_apart(self, tensor: Tensor) -> tuple[list[Tensor | None], PutTogether] | None:
        """For a tensor subclass that only stands for other tensors: these, and what makes it of them again."""
        del tensor
        return None

    @abstractmethod
    def parameter_storages(self) -> frozenset[int]:
        """Addresses of the storages that hold the layer's parameters and buffers (they are never swapped)."""

    @abstractmethod
    def hidden(self, args: Args, kwargs: Kwargs) -> Tensor:
        """The layer's input [s, b, h] among the arguments of its call."""

    @abstractmethod
    def without_hidden(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The arguments with the input taken out, so that they can be held without holding it."""

    @abstractmethod
    def cut(self, args: Args, kwargs: Kwargs, hidden: Tensor, start: int, stop: int) -> tuple[Args, Kwargs]:
        """The arguments (with or without input) of the same call on `hidden`, which holds the tokens [start, stop)."""

    @abstractmethod
    def output(self, result: Any) -> Tensor:
        """The hidden states among what the layer returned."""

    @abstractmethod
    def random_state(self) -> Any:
        """Every random state that the layer draws from."""

    @abstractmethod
    def set_random_state(self, state: Any) -> None:
        """Put a state from `random_state` back."""

    @abstractmethod
    def replaying(self) -> AbstractContextManager[None]:
        """Entered around every replay: undoes what an interrupted call leaves behind in the trainer."""

    def watched(self, on_call: PartCall, paths: Collection[str]) -> AbstractContextManager[None]:
        """While the block runs, calls of the parts in `paths` become `on_call(path, original, args, kwargs)`."""
        parts = self.parts
        return watching({path: parts[path] for path in paths}, on_call)


@contextmanager
def watching(modules: Mapping[str, Module], on_call: PartCall) -> Iterator[None]:
    """While the block runs, calls of the modules become `on_call(path, original, args, kwargs)`, by their paths."""
    before: list[tuple[dict[str, Any], Any]] = []
    try:
        for path, module in modules.items():
            attributes = module.__dict__
            own = attributes.get("forward")
            before.append((attributes, own))
            attributes["forward"] = _Watched(path, own if own is not None else module.forward, on_call)
        yield
    finally:
        for attributes, own in before:
            if own is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = own


class _Watched:
    """Stands for a part's `forward` while the layer runs."""

    __slots__ = ("on_call", "original", "path")

    def __init__(self, path: str, original: Callable[..., Any], on_call: PartCall) -> None:
        self.path, self.original, self.on_call = path, original, on_call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.on_call(self.path, self.original, args, kwargs)


def first_tensor(result: Any) -> Tensor | None:
    """The activation that a module returned: the result itself, or the first of a (tensor, bias) tuple."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, tuple) and result and isinstance(result[0], Tensor):
        return result[0]
    return None


def with_first_tensor(result: Any, tensor: Tensor) -> Any:
    """`result` with the activation replaced."""
    return tensor if isinstance(result, Tensor) else (tensor, *result[1:])


def tensors_of(args: Args, kwargs: Kwargs) -> list[Tensor]:
    """The tensors among a call's arguments, in order."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
