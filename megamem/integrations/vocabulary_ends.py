"""The two ends of the pipeline in one step, where all ranks share the embeddings: tokens come in, losses go out.

Trainers know neither IF nor S. They have a `forward_step_func`, which gets a batch and calls the model with it; the
first stage's has tokens, the last stage's labels, and those of other stages often nothing. So

* **tokens** are got by calling that function of the first stage early, while the model only notes what it is called
  with; F of the first stage calls the model with what was noted. The function runs once for every microbatch, as ever.
* **labels** are seen when the model of the last stage would compute its loss. It returns losses of zero in their place,
  of which the trainer's loss function makes what it makes of losses; the gradient of that with respect to the losses is
  what T needs, whatever mask, number of tokens and loss scale are in it. When the losses are there the loss function
  runs again, for what it reports.

That is right for loss functions that are weighted sums of the tokens' losses, as all of Megatron's are: the gradient
does not depend on the losses then. In the first training step this is looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import Module

from megamem.errors import UnsupportedError
from megamem.integrations.placement import VPlacement, inner_model
from megamem.integrations.step_call import StepCall
from megamem.integrations.vocabulary import signature
from megamem.runtime.vocabulary.layout import AbstractEnds


class _Noted(NamedTuple):
    """What a model was called with, and the loss function that came with it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss_function: Any


class _Waiting(NamedTuple):
    """A microbatch of the last stage between F and its losses."""

    labels: Tensor
    gradient: Tensor | None
    loss_function: Any


@final
class VocabularyEnds(AbstractEnds):
    """The ends of one step.

    placement:  None for Megatron's own
    results:    by microbatch, what the loss function reports; filled here
    shape:      [b, s] of a microbatch's tokens
    checks:     whether to find out if the loss function is a weighted sum
    """

    def __init__(
        self,
        call: StepCall,
        config: Any,
        placement: VPlacement | None,
        shape: tuple[int, int],
        *,
        checks: bool,
    ) -> None:
        self._call, self._config, self._placement, self._shape = call, config, placement, shape
        self._checks = checks and not call.forward_only
        self._noted: dict[int, _Noted] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._caught: tuple[Tensor, Tensor, Tensor] | None = None
        self.results: dict[int, list[Any]] = {}

    # -- the first stage -----------------------------------------------------------------------------------------------

    def tokens(self, microbatch: int) -> Tensor:
        call, chunk = self._call, self._call.chunks[0]
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        output = torch.empty(0)

        def note(*args: Any, **kwargs: Any) -> Tensor:
            seen.append((args, kwargs))
            return output

        with _replaced(chunk, note), self._as_stage(0):
            returned, loss_function = call.forward_step_func(call.iterators[0], chunk)
        if len(seen) != 1 or returned is not output:
            raise UnsupportedError(
                "vocabulary.parallel: forward_step_func must call the model once and return what the model returns"
            )
        self._noted[microbatch] = _Noted(*seen[0], loss_function)
        model = inner_model(chunk)
        given = signature(type(model).forward).bind(model, *seen[0][0], **seen[0][1]).arguments
        tokens: Tensor | None = given.get("input_ids")
        if tokens is None or given.get("decoder_input") is not None:
            raise UnsupportedError("vocabulary.parallel: the model is called with embeddings; give it input_ids")
        if tuple(tokens.shape) != self._shape:
            raise UnsupportedError(
                f"vocabulary.parallel: tokens of a microbatch are {list(tokens.shape)}, and micro_batch_size and "
                f"seq_length say {list(self._shape)}; all must be of one shape"
            )
        return tokens

    def replay(self, microbatch: int, embedding: Tensor | None) -> Callable[..., Any]:
        """In place of `forward_step_func` on the first stage: call the model as was noted, on this embedding."""
        noted = self._noted.pop(microbatch)

        def forward_step_func(iterator: Any, model: Any) -> tuple[Any, Any]:
            front = inner_model(model).embedding.word_embeddings
            front.arrived = embedding
            output = model(*noted.args, **noted.kwargs)
            if front.arrived is not None:
                raise UnsupportedError("vocabulary.parallel: the model has not used its word embeddings")
            return output, noted.loss_function

        return forward_step_func

    # -- the last stage ------------------------------------------------------------------------------------------------

    def catch(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The model of the last stage would compute losses [b, s] of `labels`: zeros for them."""
        losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        losses.requires_grad_(torch.is_grad_enabled() and not self._call.forward_only)
        self._caught = hidden, labels, losses
        return losses

    def watch(self, microbatch: int, forward_step_func: Callable[..., Any]) -> Callable[..., Any]:
        """`forward_step_func` of the last stage, whose loss function is remembered."""

        def watched(iterator: Any, model: Any) -> tuple[Any, Any]:
            output, loss_function = forward_step_func(iterator, model)
            if self._caught is None or output is not self._caught[2]:
                raise UnsupportedError(
                    "vocabulary.parallel: forward_step_func must call the model with labels, and return the losses as "
                    "the model returns them"
                )
            self._waiting[microbatch] = _Waiting(self._caught[1], None, loss_function)
            return output, loss_function

        return watched

    def hidden(self, microbatch: int, output: Any) -> Tensor:
        """What F of the last stage has made, given what Megatron makes of losses of zero."""
        assert self._caught is not None
        hidden, _, losses = self._caught
        self._caught = None
        if losses.requires_grad:
            scale = self._config.grad_scale_func
            total = output if scale is None else scale(output)
            (gradient,) = torch.autograd.grad(total, losses, allow_unused=True)
            if gradient is not None:
                self._waiting[microbatch] = self._waiting[microbatch]._replace(gradient=gradient)
        return hidden

    def labels(self, microbatch: int) -> tuple[Tensor, Tensor | None]:
        waiting = self._waiting[microbatch]
        return waiting.labels, waiting.gradient

    def losses(self, microbatch: int, losses: Tensor) -> None:
        function = self._waiting.pop(microbatch).loss_function
        if function is None:
            self.results[microbatch] = [losses]
            return
        if self._call.collect_non_loss_data:
            self.results[microbatch] = [function(losses, non_loss_data=True)]
            return
        if self._checks:
            self._checks = False
            _check_weighted_sum(function, losses)
        with torch.no_grad():
            self.results[microbatch] = [function(losses)[-1]]

    def _as_stage(self, chunk: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._placement is None else self._placement.as_stage(chunk)


@contextlib.contextmanager
def _replaced(module: Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While the block runs, calls of `module` come to `forward`."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before


def _check_weighted_sum(function: Callable[..., Any], losses: Tensor) -> None:
    """Raise UnsupportedError unless the gradient of a loss function is the same at these losses and at zero."""
    gradients = []
    with torch.enable_grad():
        for values in (torch.zeros_like(losses), losses):
            leaf = values.detach().clone().requires_grad_()
            gradients.append(torch.autograd.grad(function(leaf)[0], leaf, allow_unused=True)[0])
    if any(one is None for one in gradients) or not torch.equal(*gradients):
        raise UnsupportedError(
            "vocabulary.parallel: the gradient of the loss function depends on the losses, and is needed before they "
            "are there: it must be a sum of the tokens' losses with fixed weights (a mask, 1 / number of tokens)"
        )
