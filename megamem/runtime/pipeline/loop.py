"""The loop that runs a schedule on one rank: its actions in order, each by one small function.

It knows no schedule. A table says what a kind of action does; what a stage computes is behind `AbstractStages`, what
travels is behind `Mailbox`. Only an action that computes waits, and only for the message it needs; posting does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from megamem.errors import PipelineError, UnsupportedError
from megamem.ir.schedule import VOCABULARY, Action, Direction, Kind
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
    def around(self, action: Action) -> AbstractContextManager[None]:
        """What surrounds an IF, S, T or IB: its weights are those of chunk 0."""

    @abstractmethod
    def release(self, output: Tensor) -> None:
        """The output has been handed on, and only its graph is needed from now on."""


class AbstractVocabulary(ABC):
    """The embeddings, where all ranks share them: the neighbours of the first and of the last stage.

    In direction F the first stage takes the embedding of its tokens, and the last one gives its hidden state; in
    direction B the last one takes the gradient of that, and the first one gives the gradient of the embedding.
    """

    @abstractmethod
    def expect(self, action: Action) -> None:
        """The next compute action but one: post the receives of what it will wait for."""

    @abstractmethod
    def receive(self, action: Action) -> None:
        """Wait for what an IF, S, T or IB needs."""

    @abstractmethod
    def run(self, action: Action) -> None:
        """Run an IF, S, T or IB, for which everything is there."""

    @abstractmethod
    def take(self, direction: Direction, microbatch: int) -> Tensor:
        """What the stage at the beginning of a direction works on, waiting for it."""

    @abstractmethod
    def give(self, direction: Direction, microbatch: int, tensor: Tensor) -> None:
        """What the stage at the end of a direction has made."""

    @abstractmethod
    def finish(self) -> None:
        """The last action has run: wait for what is under way."""

    @abstractmethod
    def clear(self) -> None:
        """Forget the step, which has failed."""


class Saved(NamedTuple):
    """What F keeps for B."""

    received: Tensor | None
    output: Tensor


class Loop:
    """One step on one rank.

    vocabulary: where all ranks share the embeddings, which are part of the end stages otherwise
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
        vocabulary: AbstractVocabulary | None = None,
        keeps: bool = True,
        trace: Trace | None = None,
    ) -> None:
        self._stages, self._mailbox, self._notice = stages, mailbox, notice
        self._vocabulary, self._keeps, self._trace = vocabulary, keeps, trace
        self._outgoing: dict[tuple[str, int, int], Tensor] = {}
        self.saved: dict[tuple[int, int], Saved] = {}
        self.current: Action | None = None
        self.observe: Callable[[Action], None] | None = None  # called after every action, for accounting in tests

    def run(self, actions: Sequence[Action]) -> None:
        """Run the actions in order. Raises PipelineError when another rank has failed."""
        table = self._table()
        ahead = iter([action for action in actions if action.is_compute])
        self._expect(next(ahead, None))
        for action in actions:
            self.current = action
            if self._notice.found is not None:
                raise PipelineError(self._notice.found)
            if action.is_compute:
                self._expect(next(ahead, None))
            table[action.kind](action)
            if self.observe is not None:
                self.observe(action)
        self._mailbox.finish()
        if self._vocabulary is not None:
            self._vocabulary.finish()

    def abandon(self) -> None:
        """Forget what the step has made so far, after a failure: activations, and messages under way."""
        self.saved.clear()
        self._outgoing.clear()
        self._mailbox.clear()
        if self._vocabulary is not None:
            self._vocabulary.clear()

    def _expect(self, action: Action | None) -> None:
        if self._vocabulary is not None and action is not None:
            self._vocabulary.expect(action)

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
            **dict.fromkeys(VOCABULARY, self._share),
        }

    def _forward(self, action: Action) -> None:
        _, chunk, microbatch, *_ = action
        received = self._take("F", chunk, microbatch)
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
        elif self._vocabulary is not None:
            self._vocabulary.give("F", microbatch, output)
            if self._keeps:
                self._stages.release(output)

    def _backward(self, action: Action) -> None:
        _, chunk, microbatch, *_ = action
        gradient = self._take("B", chunk, microbatch)
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
        elif self._vocabulary is not None and result is not None:
            self._vocabulary.give("B", microbatch, result)

    def _take(self, direction: Direction, chunk: int, microbatch: int) -> Tensor | None:
        if self._vocabulary is not None and self._mailbox.begins(direction, chunk):
            return self._vocabulary.take(direction, microbatch)
        return self._mailbox.take(direction, chunk, microbatch)

    def _share(self, action: Action) -> None:
        if self._vocabulary is None:
            raise UnsupportedError(f"{action} is for ranks that share the embeddings, which these do not")
        self._vocabulary.receive(action)
        if self._trace is not None:
            self._trace.begin(action)
        with self._stages.around(action):
            self._vocabulary.run(action)
        if self._trace is not None:
            self._trace.end()

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
