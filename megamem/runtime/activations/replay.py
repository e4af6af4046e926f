"""Running a layer's own forward again on some of its tokens, with attention answered from the store.

The replay runs the trainer's code, not a copy of it. Core attention, and every other module whose output is stored,
is not called: its stored output is returned in its place. Every tensor that the layer saves on the way comes by again
in the order in which it was saved the first time. As soon as the last wanted one has come by the replay is broken off,
so the GEMM behind the last saved tensor (the second linear layer of the MLP) is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megamem.runtime.activations.layer import AbstractLayer, Args, Kwargs, first_tensor, tensors_of, with_first_tensor

PackKey = tuple[str, int]  # (path of the part that ran, ordinal of the saved tensor within it)
InputKey = tuple[str, int]  # (path of a part, position among its tensor arguments)


class _Enough(BaseException):
    """Everything wanted has come by. Not an Exception: no handler of the trainer's may swallow it."""


class Replay:
    """One replay of one layer.

    answers:      what the parts that are not called return, by path.
    wanted:       pack keys and input keys -> what to do with the tensor; each is served once, and when an action
                  returns True nothing more is wanted and the replay ends.
    stop_before:  path of a part that is never entered (the experts).
    collect_all:  keep everything that comes by, in `packed`, `inputs` and `outputs` (used for learning).
    """

    def __init__(
        self,
        layer: AbstractLayer,
        *,
        answers: Mapping[str, Any],
        on_pack: Mapping[PackKey, Callable[[Tensor], bool]] | None = None,
        on_input: Mapping[str, Callable[[list[Tensor]], bool]] | None = None,
        stop_before: str | None = None,
        collect_all: bool = False,
    ) -> None:
        self.layer, self.answers = layer, answers
        self.on_pack, self.on_input = on_pack or {}, on_input or {}
        self.stop_before, self.collect_all = stop_before, collect_all
        self.packed: dict[PackKey, Tensor] = {}
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, Tensor] = {}
        self._stack = [""]
        self._ordinals: dict[str, int] = {}
        self._random_states: list[Any] = []

    @staticmethod
    def answer(result: Any, stored: Tensor, requires_grad: bool) -> Any:
        """What a part that is not called returns: `stored` in place of the activation in `result`.

        It requires grad as the original did: autograd saves only what some gradient needs.
        """
        return with_first_tensor(result, stored.detach().requires_grad_(requires_grad))

    def run(
        self,
        call: Any,
        args: Args,
        kwargs: Kwargs,
        hidden: Tensor,
        start: int,
        stop: int,
        random_states: list[Any],
        *,
        grad: bool = True,
    ) -> Any:
        """Replay the tokens [start, stop) of `hidden` [s, b, h]; returns the layer's result if it ran to its end.

        `random_states`, where the layer draws random numbers: the states at its start and behind attention.
        `grad` False where the result is wanted and nothing that the layer saves.
        """
        layer = self.layer
        self._random_states = random_states
        before = layer.random_state() if random_states else None
        part = hidden.detach()[start:stop].requires_grad_(grad and hidden.requires_grad)
        args, kwargs = layer.cut(args, kwargs, part, start, stop)
        try:
            if random_states:
                layer.set_random_state(random_states[0])
            with (
                torch.set_grad_enabled(grad),
                layer.replaying(),
                layer.watched(self._on_call, layer.parts.keys()),
                torch.autograd.graph.saved_tensors_hooks(self._pack, _never),
            ):
                return call(*args, **kwargs)
        except _Enough:
            return None
        finally:
            if random_states:
                layer.set_random_state(before)

    def _pack(self, tensor: Tensor) -> None:
        path = self._stack[-1]
        ordinal = self._ordinals.get(path, 0)
        self._ordinals[path] = ordinal + 1
        key = (path, ordinal)
        if self.collect_all:
            self.packed[key] = tensor.detach()
        action = self.on_pack.get(key)
        if action is not None and action(tensor.detach()):
            raise _Enough

    def _on_call(self, path: str, original: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        if self.collect_all:
            self.inputs[path] = [tensor.detach() for tensor in tensors_of(args, kwargs)]
        action = self.on_input.get(path)
        if action is not None and action([tensor.detach() for tensor in tensors_of(args, kwargs)]):
            raise _Enough
        if path == self.stop_before:
            raise _Enough
        if path in self.answers:
            result = self.answers[path]
            if self._random_states and path == self.layer.attention:
                self.layer.set_random_state(self._random_states[-1])
            return result
        self._stack.append(path)
        try:
            result = original(*args, **kwargs)
        finally:
            self._stack.pop()
        output = first_tensor(result) if self.collect_all else None
        if output is not None:
            self.outputs[path] = output.detach()  # with its graph it would keep itself alive: the graph holds our hooks
        return result


def _never(_: object) -> Tensor:
    raise AssertionError("a replay's graph has no backward pass")
