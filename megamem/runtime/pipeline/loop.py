"""The loop that runs a schedule on one rank: its actions in order, each by one small function.

It knows no schedule. A table says what a kind of action does; what a stage computes is behind `AbstractStages`, what
travels is behind `Mailbox`. Only an action that computes waits, and only for the message it needs; posting does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megamem.errors import PipelineError, UnsupportedError
from megamem.ir.schedule import COMMUNICATION, Action, Kind
from megamem.runtime.pipeline.failure import FailureNotice
from megamem.runtime.pipeline.mailbox import Mailbox
from megamem.runtime.pipeline.trace import Trace


class AbstractStages(ABC):
    """The chunks of the model on this rank."""

    @abstractmethod
    def forward(self, action: Action, received: Tensor | None) -> Tensor:
        """Run a chunk forward on what the stage before made, None on the first stage."""

    @abstractmethod
    def backward(
        self, action: Action, received: Tensor | None, output: Tensor, gradient: Tensor | None
    ) -> Tensor | None:
        """Run a chunk backward (B or BW): the gradient of `received`. `gradient` is None on the last stage."""

    @abstractmethod
    def weight(self, action: Action) -> None:
        """Compute the weight gradients, or the part of them, that W stands for."""

    @abstractmethod
    def reload(self, action: Action) -> None:
        """Begin to bring back what the forward pass of a chunk and microbatch sent to host memory."""

    @abstractmethod
    def release(self, output: Tensor) -> None:
        """The output has been handed on, and only its graph is needed from now on."""


class Saved(NamedTuple):
    """What F keeps for B."""

    received: Tensor | None
    output: Tensor


class Loop:
    """One step on one rank.

    keeps:     whether backward passes follow, for which F must keep its input and output
    notice:    where failures of other ranks are seen
    trace:     where times are recorded, or None
    """

    def __init__(
        self,
        stages: AbstractStages,
        mailbox: Mailbox,
        notice: FailureNotice,
        *,
        keeps: bool = True,
        trace: Trace | None = None,
    ) -> None:
        self._stages, self._mailbox, self._notice = stages, mailbox, notice
        self._keeps, self._trace = keeps, trace
        self._outgoing: dict[tuple[str, int, int], Tensor] = {}
        self.saved: dict[tuple[int, int], Saved] = {}
        self.current: Action | None = None
        self.observe: Callable[[Action], None] | None = None  # called after every action, for accounting in tests

    def run(self, actions: Sequence[Action]) -> None:
        """Run the actions in order. Raises PipelineError when another rank has failed."""
        table = self._table()
        check_kinds(actions)
        for action in actions:
            self.current = action
            if self._notice.found is not None:
                raise PipelineError(self._notice.found)
            table[action.kind](action)
            if self.observe is not None:
                self.observe(action)
        self._mailbox.finish()

    def abandon(self) -> None:
        """Forget what the step has made so far, after a failure: activations, and messages under way."""
        self.saved.clear()
        self._outgoing.clear()
        self._mailbox.clear()

    def _table(self) -> dict[Kind, Callable[[Action], None]]:
        return {
            "F": self._forward,
            "B": self._backward,
            "BW": self._backward,
            "W": self._weight,
            "SEND_F": self._send_activation,
            "SEND_B": self._send_gradient,
            "RECV_F": self._post_activation,
            "RECV_B": self._post_gradient,
            "OFFLOAD": self._nothing,  # layer by layer, it began while F ran
            "RELOAD": self._stages.reload,
        }

    def _forward(self, action: Action) -> None:
        _, chunk, microbatch, *_ = action
        received = self._mailbox.take("F", chunk, microbatch)
        if received is not None and self._keeps:
            received.requires_grad_()
        if self._trace is not None:
            self._trace.begin(action)
        output = self._stages.forward(action, received)
        if self._trace is not None:
            self._trace.end()
        if self._keeps:
            self.saved[chunk, microbatch] = Saved(received, output)
        way = self._mailbox.way("F", chunk)
        if way == "away":
            self._outgoing["F", chunk, microbatch] = output
        elif way == "here":
            self._mailbox.hand_over("F", chunk, microbatch, output)
            if self._keeps:
                self._stages.release(output)

    def _backward(self, action: Action) -> None:
        _, chunk, microbatch, *_ = action
        gradient = self._mailbox.take("B", chunk, microbatch)
        if self._trace is not None:
            self._trace.begin(action)
        received, output = self.saved.pop((chunk, microbatch))
        result = self._stages.backward(action, received, output, gradient)
        if self._trace is not None:
            self._trace.end()
        if result is None and received is not None:
            result = torch.zeros_like(received)  # the stage's output does not depend on it; the stage before waits
        way = self._mailbox.way("B", chunk)
        if way == "away" and result is not None:
            self._outgoing["B", chunk, microbatch] = result
        elif way == "here":
            self._mailbox.hand_over("B", chunk, microbatch, result)

    def _weight(self, action: Action) -> None:
        if self._trace is not None:
            self._trace.begin(action)
        self._stages.weight(action)
        if self._trace is not None:
            self._trace.end()

    def _send_activation(self, action: Action) -> None:
        output = self._outgoing.pop(("F", action.chunk, action.microbatch))
        self._mailbox.send("F", action.chunk, action.microbatch, output)
        if self._keeps:
            self._stages.release(output)

    def _send_gradient(self, action: Action) -> None:
        gradient = self._outgoing.pop(("B", action.chunk, action.microbatch))
        self._mailbox.send("B", action.chunk, action.microbatch, gradient)

    def _nothing(self, action: Action) -> None:
        pass

    def _post_activation(self, action: Action) -> None:
        self._mailbox.post("F", action.chunk, action.microbatch)

    def _post_gradient(self, action: Action) -> None:
        self._mailbox.post("B", action.chunk, action.microbatch)


_RUNS: frozenset[Kind] = COMMUNICATION | frozenset({"F", "B", "BW", "W", "OFFLOAD", "RELOAD"})


def check_kinds(actions: Iterable[Action]) -> None:
    """Refuse kinds of actions that the loop does not run: UnsupportedError that lists them."""
    unknown = sorted({action.kind for action in actions} - _RUNS)
    if unknown:
        raise UnsupportedError(
            f"the runtime runs {', '.join(sorted(_RUNS))}, not {', '.join(unknown)}; choose a schedule without"
        )
