"""`megamem profile --allocations`: the malloc and free requests of one iteration of a Megatron-Core GPT.

A whole GPTModel runs Megatron's own schedule. With fake tensors (`FakeTensorMode`, and process groups that send
nothing) it needs neither the memory nor the devices, so that any size and tensor-parallel width can be traced on a
laptop; for real it is the step on the CPU, as the CPU's allocator sees it.

Gradients are added up in an fp32 `main_grad` per weight, as Megatron's DDP does, and the optimizer is the plainest: one
update in place. The states of another one are persistent; its temporaries are not in the trace.
Not seen by fake tensors: workspaces of cuBLAS, cuDNN and NCCL, and what kernels allocate inside.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megamem.errors import ConfigError
from megamem.integrations.local_spec import local_layer_spec
from megamem.integrations.megatron_profile import GptShape, gpt_config, shape_of
from megamem.ir.allocation_trace import AllocationTrace
from megamem.profiler.allocation import AllocatorRecorder, LayerPhases, StorageRecorder

Source = Literal["fake", "step"]
SpecMaker = Callable[[TransformerConfig], Any]
ITERATIONS = 3  # the first one is not like the others


@contextlib.contextmanager
def allocation_groups(tensor_parallel_size: int, source: Source) -> Iterator[None]:
    """Megatron's groups of one process: for a step alone, with fake tensors as one of many ranks that are not there.

    Enter it before the CPU rig, which would make gloo of the fake groups. Raises ConfigError for a step on more than
    one rank.
    """
    if source == "step" and tensor_parallel_size > 1:
        raise ConfigError(f"a real step is traced on one rank, not {tensor_parallel_size}; trace fake tensors instead")
    if source == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=tensor_parallel_size, store=FakeStore())
    else:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_parallel_size, create_gloo_process_groups=False
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def trace_here(arguments: argparse.Namespace) -> AllocationTrace:
    """The trace that the flags of `megamem profile --allocations` ask for."""
    return trace_gpt(
        shape_of(arguments),
        source=arguments.allocations_from,
        num_microbatches=arguments.num_microbatches,
        recompute=arguments.recompute_granularity == "full",
    )


def trace_gpt(
    shape: GptShape,
    *,
    source: Source = "fake",
    num_microbatches: int = 1,
    recompute: bool = False,
    spec: SpecMaker = local_layer_spec,
) -> AllocationTrace:
    """The requests of a steady iteration on this rank; weights, their gradients and the batch are persistent.

    `recompute` is Megatron's full recomputation, layer by layer. Runs within `allocation_groups`, and the CPU rig.
    """
    config = gpt_config(shape)
    config.num_layers = shape.num_layers
    if recompute:
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    with contextlib.ExitStack() as stack:
        if source == "fake":
            config.perform_initialization = False
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_without_random_states())
        step = _Step(shape, config, num_microbatches, spec)
        phases = LayerPhases(list(step.model.decoder.layers))
        stack.callback(phases.remove)
        recorder: StorageRecorder | AllocatorRecorder
        recorder = StorageRecorder(phases, step.persistent()) if source == "fake" else AllocatorRecorder(phases)
        with recorder:
            for _ in range(ITERATIONS):
                recorder.start_iteration()
                step.run()
            recorder.stop()
        return recorder.trace()


@contextlib.contextmanager
def _without_random_states() -> Iterator[None]:
    """Megatron's tracker reads the generator's state as numbers, which fake tensors have not."""
    original = CudaRNGStatesTracker.fork
    CudaRNGStatesTracker.fork = lambda self, *args, **kwargs: contextlib.nullcontext()
    try:
        yield
    finally:
        CudaRNGStatesTracker.fork = original


class _Step:
    """A model with its batch, and what is done to it in an iteration."""

    def __init__(self, shape: GptShape, config: TransformerConfig, num_microbatches: int, spec: SpecMaker) -> None:
        self._shape = shape
        self._num_microbatches = num_microbatches
        padding = 128 * shape.tensor_model_parallel_size  # as Megatron pads
        # The weights have their type from the start: a module of fake tensors cannot be converted.
        torch.set_default_dtype(config.params_dtype)
        try:
            self.model = GPTModel(
                config,
                spec(config),
                vocab_size=-(-shape.vocab_size // padding) * padding,
                max_sequence_length=shape.seq_length,
                share_embeddings_and_output_weights=False,
                position_embedding_type="rope",
            )
        finally:
            torch.set_default_dtype(torch.float32)
        for parameter in self.model.parameters():
            parameter.main_grad = torch.zeros(parameter.shape, dtype=torch.float32)
            parameter.register_post_accumulate_grad_hook(_add_up)
        size = (shape.micro_batch_size, shape.seq_length)
        self._tokens = torch.zeros(size, dtype=torch.long)
        self._positions = torch.arange(shape.seq_length).expand(size)

    def persistent(self) -> list[Tensor]:
        """What is there before an iteration and after it."""
        weights = list(self.model.parameters())
        return [
            *weights,
            *(weight.main_grad for weight in weights),
            *self.model.buffers(),
            self._tokens,
            self._positions,
        ]

    def run(self) -> None:
        """One iteration by Megatron's schedule, and the update of the weights."""
        get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=None,
            model=[self.model],
            num_microbatches=self._num_microbatches,
            seq_length=self._shape.seq_length,
            micro_batch_size=self._shape.micro_batch_size,
            decoder_seq_length=self._shape.seq_length,
            forward_only=False,
        )
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.add_(weight.main_grad.to(weight.dtype), alpha=-1e-3)
                weight.main_grad.zero_()

    def _forward(self, _data: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        output = model(self._tokens, self._positions, None, labels=self._tokens)
        return output, _loss


def _loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return output.float().mean(), {"loss": output.float().mean().detach()}


def _add_up(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None
