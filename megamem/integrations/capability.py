"""What a section of the configuration becomes once it is switched on: one object, which `Session` walks through.

A capability says what it patches, whether the model goes with it, and what it did. The two that share the inside of
layers and steps with each other, `activations` and `schedule`, are held by `Session` itself; each other one is a class
in a file of its own here, and a line in `megatron_core.CAPABILITIES`.

`agree` is how ranks decide together: whatever stops one rank before or after a step must stop all of them, or the
others wait in a collective for ever.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch
from torch.nn import Module

from megamem.errors import NotLiveError, UnsupportedError
from megamem.patches.registry import Patch


class CapabilityReport(Protocol):
    """What a capability did on this rank."""

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much), ready to print."""
        ...


class Capability(ABC):
    """One section of the configuration, switched on in one process.

    In the order in which a run calls them: `patches`, `expected`, `build_model`, `on_layer_built`, `problems`, `adopt`,
    then for each step `begin_step`, `run_step` and `end_step` (or `abandon_step`), after the first training step
    `is_live`, at any time `report`, at the end `close`. A method that a capability does not need is left as it is here.
    """

    SECTION: ClassVar[str]  # of the configuration; `patches.GROUPS` has what bounds its steps by the same name
    OPTION: ClassVar[str]  # the option that switches it on, as errors name it
    BUILDS: ClassVar[bool] = False  # whether models are to be built by `build_model`
    NOT_LIVE: ClassVar[str]  # what is likely wrong when it took no part in the first step, and how to go on without

    @abstractmethod
    def patches(self) -> Sequence[Patch]:
        """What it replaces in the trainer, bound and ready to apply; the session brings the bounds of steps."""

    def expected(self) -> str:
        """What to expect of it, in bytes or time, as far as that is known when it is switched on."""
        return ""

    def build_model(self, model: Module, values: dict[str, Any], construct: Callable[[], None]) -> None:
        """A GPTModel is to be constructed: `construct` does it, with `values` for arguments. Only where `BUILDS`."""
        del model, values
        construct()

    def on_layer_built(self, layer: Module) -> None:  # noqa: B027 - most need none
        """A transformer layer was constructed. Raises UnsupportedError where it does not go with the capability."""

    def around_layer(self, layer: Module, *, is_replay: bool) -> AbstractContextManager[None] | None:
        """What surrounds a transformer layer while it runs forward, and while it is replayed; None: nothing.

        Called only where the patches of layers are among the capability's group.
        """
        del layer, is_replay
        return None

    def problems(self, chunks: Sequence[Module]) -> list[str]:
        """Before the first step: why the model chunks of this rank do not go with it; empty where they do."""
        del chunks
        return []

    def adopt(self, chunks: Sequence[Module]) -> None:  # noqa: B027
        """Before the first step, when no rank has found a problem."""

    def begin_step(self, arguments: Mapping[str, Any], *, trains: bool) -> None:  # noqa: B027
        """A step is about to begin; `arguments` are what the trainer gave Megatron's forward-backward function."""

    def run_step(self, step: Callable[[], Any], *, trains: bool) -> Any:
        """Run one forward-backward step over all microbatches; `trains` is false in evaluation."""
        del trains
        return step()

    def end_step(self) -> None:  # noqa: B027
        """A training step is over."""

    def abandon_step(self) -> None:  # noqa: B027
        """A step has failed; what it left behind is not needed any more."""

    @abstractmethod
    def is_live(self) -> bool | None:
        """After the first training step: whether it took part on this rank. None: there was nothing to do here."""

    @abstractmethod
    def report(self) -> CapabilityReport:
        """What it did so far."""

    def close(self) -> None:  # noqa: B027
        """Take back what it put on models, weights and the process. To be called between steps."""


def agree(numbers: Sequence[int], group: Any = None) -> list[int]:
    """The least of each number over the ranks of a group; None stands for all ranks of the job."""
    on_gpu = torch.distributed.get_backend(group) == "nccl"
    values = torch.tensor(numbers, dtype=torch.int64, device="cuda" if on_gpu else "cpu")
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MIN, group=group)
    return [int(value) for value in values.tolist()]


def refuse_together(capabilities: Sequence[Capability], chunks: Sequence[Module]) -> None:
    """UnsupportedError on every rank if the model chunks of any rank do not go with one of the capabilities."""
    found = [item.problems(chunks) for item in capabilities]
    anywhere = agree([-len(problems) for problems in found])
    elsewhere = ["the model of another rank does not go with it; the error there says why"]
    texts = [
        f"{item.OPTION}: " + "; ".join(problems or elsewhere)
        for item, problems, count in zip(capabilities, found, anywhere, strict=True)
        if count
    ]
    if texts:
        raise UnsupportedError("\n".join(texts))


def require_live(states: Sequence[tuple[bool | None, str]]) -> None:
    """NotLiveError on every rank if, of one of these (state, message), any rank's is False, or no rank's is True."""
    codes = [{False: 0, None: 1, True: 2}[state] for state, _ in states]
    agreed = agree([*codes, *(-code for code in codes)])
    least, most = agreed[: len(codes)], [-number for number in agreed[len(codes) :]]
    dead = [text for (_, text), low, high in zip(states, least, most, strict=True) if low == 0 or high < 2]
    if dead:
        raise NotLiveError("\n".join(dead))
