"""The model's chunks of one rank in one step: what the loop calls, in terms of Megatron's `schedules`.

formats    what the messages between stages look like
Stages     forward, backward and weight passes
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, final

import torch
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from megamem.errors import UnsupportedError
from megamem.integrations import compat
from megamem.integrations.gradient_sync import GradientSync
from megamem.integrations.step_call import StepCall
from megamem.integrations.step_plan import StepPlan
from megamem.ir.schedule import Action
from megamem.runtime.pipeline.loop import AbstractStages, Loop
from megamem.runtime.pipeline.mailbox import Format

if TYPE_CHECKING:
    from megamem.integrations.megatron_schedule import MegatronSchedule
    from megamem.integrations.vocabulary_ends import VocabularyEnds


def formats(call: StepCall, config: Any, device: torch.device) -> dict[Any, Format]:
    """What messages look like, from the sizes the trainer gives."""
    shape: tuple[int, ...] | None = None
    shapes: dict[str, tuple[int, ...] | None] = {"F": None, "B": None}
    if not config.variable_seq_lengths:
        (shape,) = schedules.get_tensor_shapes(
            **call.sizes, config=config, tp_group=call.groups.tp, cp_group=call.groups.cp
        )
        shapes = {"F": shape, "B": shape}
        if call.adjust_shapes is not None:
            # What a stage receives, and what it sends and so gets the gradient of.
            received, sent = call.adjust_shapes([shape], [shape])
            if len(received) != 1 or len(sent) != 1:
                raise UnsupportedError(
                    "adjust_tensor_shapes_fn asks for several tensors per message; only one is possible"
                )
            shapes = {"F": tuple(received[0]), "B": tuple(sent[0])}
    return {
        direction: Format(shape=size, dtype=config.pipeline_dtype, device=device) for direction, size in shapes.items()
    }


@final
class Stages(AbstractStages):
    """The chunks of a rank during one step."""

    def __init__(
        self,
        owner: MegatronSchedule,
        call: StepCall,
        config: Any,
        plan: StepPlan,
        device: torch.device,
        ends: VocabularyEnds | None = None,
    ) -> None:
        self._owner, self._queue, self._placement = owner, owner.queue, owner.placement
        self._call, self._config, self._plan = call, config, plan
        place, rank = plan.schedule.placement, call.group.rank()
        self._is_first = [place.stage(rank, chunk) == 0 for chunk in range(place.num_chunks)]
        self._is_last = [place.stage(rank, chunk) == place.num_stages - 1 for chunk in range(place.num_chunks)]
        self._ends = ends
        self._results: dict[int, list[Any]] = {} if ends is None else ends.results
        self._num_tokens = torch.zeros([], dtype=torch.int, device=device)
        self._sync = GradientSync(config, call.chunks, plan.last, plan.last_gradient.keys())
        self._extra = {"model_type": None} if compat.backward_step_takes_model_type() else {}

    def step(self, loop: Loop) -> list[Any]:
        """The whole step: timers, loop, and what trainers expect at its end."""
        call, config = self._call, self._config
        if config.timers is not None:
            config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
        with self._sync.step(call.forward_only):
            loop.run(self._plan.actions)
        loop.current = None
        results = [result for _, made in sorted(self._results.items()) for result in made]
        if self._placement is not None:
            self._placement.hand_over_tokens(self._num_tokens)
            results = self._placement.hand_over_losses(results)
        if config.finalize_model_grads_func is not None and not call.forward_only:
            self._finalize()
        if config.timers is not None:
            config.timers("forward-backward").stop()
        return results

    def _finalize(self) -> None:
        call = self._call
        options: dict[str, Any] = {"pg_collection": call.groups}
        if compat.takes_force_all_reduce(call.step):
            options["force_all_reduce"] = call.force_all_reduce
        tokens = self._num_tokens if self._config.calculate_per_token_loss else None
        self._config.finalize_model_grads_func(call.chunks, tokens, **options)

    def forward(self, action: Action, received: Tensor | None) -> Tensor:
        _, chunk, microbatch, *_ = action
        call, is_last = self._call, self._is_last[chunk]
        is_first = action in self._plan.first
        if is_first:
            self._sync.before_first_forward(chunk)
        made: list[Any] = []
        step_func = call.forward_step_func
        if self._ends is not None and self._is_first[chunk]:
            step_func, received = self._ends.replay(microbatch, received), None  # not the decoder's: it is embedded yet
        elif self._ends is not None and is_last:
            step_func = self._ends.watch(microbatch, step_func)
        with self._in_chunk(action):
            output, num_tokens = schedules.forward_step(
                step_func,
                call.iterators[chunk],
                call.chunks[chunk],
                call.num_microbatches,
                received,
                made,
                self._config,
                call.groups.cp.size(),
                collect_non_loss_data=call.collect_non_loss_data,
                is_first_microbatch=schedules.check_first_val_step(call.first_val_step, call.forward_only, is_first),
                current_microbatch=microbatch,
                vp_stage=chunk if len(call.chunks) > 1 else None,
                is_last_stage=is_last,
            )
        if is_last:
            self._num_tokens += num_tokens
            if self._ends is not None:
                return self._ends.hidden(microbatch, output)
            self._results[microbatch] = made
        return output  # type: ignore[no-any-return]

    def backward(
        self, action: Action, received: Tensor | None, output: Tensor, gradient: Tensor | None
    ) -> Tensor | None:
        with self._sync.around(action), self._in_chunk(action):
            result: Tensor | None = schedules.backward_step(
                input_tensor=received,
                output_tensor=output,
                output_tensor_grad=gradient,
                config=self._config,
                **self._extra,
            )
        return result

    def weight(self, action: Action) -> None:
        with self._sync.around(action):
            self._queue.run(action.chunk, action.microbatch, action.part, action.parts)

    @contextlib.contextmanager
    def around(self, action: Action) -> Iterator[None]:
        if action.kind == "IF":
            self._sync.before_first_forward(0)
            yield
        else:
            with self._sync.around(action):
                yield

    def release(self, output: Tensor) -> None:
        schedules.deallocate_output_tensor(output, self._config.deallocate_pipeline_outputs)

    @contextlib.contextmanager
    def _in_chunk(self, action: Action) -> Iterator[None]:
        """What holds while a chunk runs: where its weight gradients go, and which stage Megatron believes it is."""
        key = action.chunk, action.microbatch
        if action.kind == "F" and key in self._plan.offloaded:
            self._owner.leaving = key
        try:
            with contextlib.ExitStack() as stack:
                if key in self._plan.split:
                    self._queue.collect(*key)
                    stack.enter_context(self._owner.delayed.hiding(*key, forward=action.kind == "F"))
                if self._placement is not None:
                    stack.enter_context(self._placement.as_stage(action.chunk))
                yield
        finally:
            self._queue.stop()
            self._owner.leaving = None

    def reload(self, action: Action) -> None:
        self._owner.reload((action.chunk, action.microbatch))
