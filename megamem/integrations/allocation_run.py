"""`megamem profile --allocations`: the malloc and free requests of one iteration of a Megatron-Core GPT.

The chunks of one pipeline rank run Megatron's own schedule, or megamem's, with what a `megamem:` configuration switches
on. With fake tensors, and ranks that are not there (`absent_ranks`), that needs neither the memory nor the devices, so
that any size and layout can be traced on a laptop; for real it is the step on the CPU, as the CPU's allocator sees it.
`layers` traces fewer layers and replicates one of them (`megamem.profiler.replication`).

Gradients are added up in an fp32 `main_grad` per weight, as Megatron's DDP does, and the optimizer is the plainest: one
update in place. The states of another one are persistent; its temporaries are not in the trace.
Not seen by fake tensors: workspaces of cuBLAS, cuDNN and NCCL, and what kernels allocate. How many tokens experts
take, without padding, only a real step knows.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megamem.config import Config
from megamem.errors import ConfigError
from megamem.integrations.absent_ranks import absent_machine, absent_ranks, one_rank, tensors_without_values
from megamem.integrations.local_spec import local_layer_spec
from megamem.integrations.megatron_core import Handle, enable
from megamem.integrations.megatron_profile import GptShape, gpt_config, shape_of
from megamem.ir.allocation_trace import AllocationTrace
from megamem.planner.schedules.plan import plan_schedule
from megamem.profiler.allocation import AllocatorRecorder, LayerPhases, StorageRecorder
from megamem.profiler.replication import renumbered, replicate

Source = Literal["fake", "step"]
Progress = Callable[[int, str], None]  # iteration and phase
# The first iteration is not like the others: caches are filled and layers learned. The allocator's scratch settles
# later than the storages.
ITERATIONS = {"fake": 2, "step": 3}
FEWEST_LAYERS = 6  # of a chunk: two at either end, whose neighbours differ, and two equal ones


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is traced: `shape` on pipeline rank `rank` of `pipeline`, with the configuration `config` of megamem.

    `layers` of each chunk are traced, and replicated to all; None traces all of them. `recompute` is Megatron's full
    recomputation, layer by layer; `experts` makes every layer an MoE layer, its tokens to `topk` of them.
    """

    shape: GptShape
    source: Source = "fake"
    num_microbatches: int = 1
    recompute: bool = False
    pipeline: int = 1
    rank: int = 0
    experts: int | None = None
    topk: int = 2
    config: Config = field(default_factory=Config)
    layers: int | None = None

    def check(self) -> None:
        """Raise ConfigError with everything that is wrong, before anything is built."""
        problems = []
        tensor, chunks = self.shape.tensor_model_parallel_size, self.num_chunks
        if self.source == "step" and (tensor > 1 or self.pipeline > 1):
            problems.append(
                f"a real step is traced on one rank, not {tensor * self.pipeline}; trace fake tensors instead"
            )
        if not 0 <= self.rank < self.pipeline:
            problems.append(f"there is no pipeline rank {self.rank} of {self.pipeline}; they count from 0")
        if self.shape.num_layers % (self.pipeline * chunks):
            problems.append(f"{self.shape.num_layers} layers do not divide among {self.pipeline * chunks} stages")
        if self.experts is not None and self.source == "fake":
            problems.append("fake tensors do not know how many tokens an expert takes; trace a real step of it")
        if self.experts is not None and self.topk > self.experts:
            problems.append(f"{self.topk} experts per token, of {self.experts}")
        if self.config.allocator.is_on:
            problems.append("allocator.mode must be off while the requests that it is to serve are traced")
        if self.layers is not None and not FEWEST_LAYERS <= self.layers <= self.layers_per_chunk:
            problems.append(
                f"{self.layers} layers of each chunk cannot stand for its {self.layers_per_chunk}: trace at least "
                f"{FEWEST_LAYERS}, and at most all of them"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def num_chunks(self) -> int:
        """Model chunks of a pipeline rank, as the schedule wants them."""
        if not self.config.schedule.is_on or self.pipeline == 1:
            return 1
        shared = self.config.vocabulary
        planned = plan_schedule(
            self.config.schedule,
            num_ranks=self.pipeline,
            num_microbatches=self.num_microbatches,
            num_chunks=None,
            num_layers=self.shape.num_layers,
            vocabulary=shared.barriers if shared.parallel else None,
            keeps_logits=shared.keep_logits,
        )
        return planned.schedule.placement.num_chunks

    @property
    def layers_per_chunk(self) -> int:
        return self.shape.num_layers // (self.pipeline * self.num_chunks)

    def reduced(self) -> Job:
        """The job that is run: of as many layers as are traced."""
        if self.layers is None:
            return self
        layers = self.layers * self.pipeline * self.num_chunks
        return replace(self, shape=replace(self.shape, num_layers=layers))


def job_of(arguments: argparse.Namespace, config: Config) -> Job:
    """The job that the flags of `megamem profile --allocations` name. Raises ConfigError."""
    job = Job(
        shape=shape_of(arguments),
        source=arguments.allocations_from,
        num_microbatches=arguments.num_microbatches,
        recompute=arguments.recompute_granularity == "full",
        pipeline=arguments.pipeline_model_parallel_size,
        rank=arguments.pipeline_rank,
        experts=arguments.num_experts,
        topk=arguments.moe_router_topk,
        config=config,
        layers=arguments.trace_layers,
    )
    job.check()
    return job


@contextlib.contextmanager
def groups_of(job: Job) -> Iterator[None]:
    """Megatron's groups of the job's rank. Enter it before the CPU rig."""
    if job.source == "step":
        with one_rank():
            yield
        return
    with absent_ranks(
        tensor=job.shape.tensor_model_parallel_size,
        pipeline=job.pipeline,
        pipeline_rank=job.rank,
        chunks=job.num_chunks,
    ):
        yield


def trace_gpt(job: Job, progress: Progress = lambda iteration, phase: None) -> AllocationTrace:
    """The requests of a steady iteration on the job's rank; weights, their gradients and the batch are persistent.

    Runs within `groups_of`, and the CPU rig. Raises AllocationError where the layers that are traced do not stand for
    all of them.
    """
    run = job.reduced()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    is_fake, iteration = run.source == "fake", 0
    with contextlib.ExitStack() as stack:
        if is_fake:
            stack.enter_context(absent_machine())
        handle = stack.enter_context(enable(run.config)) if run.config.enabled else None
        if is_fake:
            stack.enter_context(tensors_without_values())
        step = _Step(run, handle)
        layers = [layer for chunk in step.chunks for layer in chunk.decoder.layers]
        phases = LayerPhases(
            layers,
            [int(layer.layer_number) - 1 for layer in layers],
            others=step.ends(),
            on_enter=lambda label: progress(iteration, label),
        )
        stack.callback(phases.remove)
        recorder: StorageRecorder | AllocatorRecorder
        recorder = StorageRecorder(phases, step.persistent()) if is_fake else AllocatorRecorder(phases)
        with recorder:
            for number in range(ITERATIONS[run.source]):
                iteration = number  # for the progress line
                recorder.start_iteration()
                step.run(phases.enter)
            recorder.stop()
        trace = recorder.trace()
        # With an fp32 gradient per weight.
        weights = sum(weight.numel() * (weight.element_size() + 4) for weight in layers[2 % len(layers)].parameters())
    return trace if job.layers is None else _replicated(trace, job, job.layers, weights)


def _replicated(trace: AllocationTrace, job: Job, traced: int, weights: int) -> AllocationTrace:
    """Each chunk's layers brought to as many as it has, and numbered as in the whole model."""
    copies = job.layers_per_chunk - traced
    numbers = sorted({layer for place in trace.places() if (layer := place.layer) is not None})
    starts = numbers[::traced]
    for start in reversed(starts):  # what is inserted moves higher numbers only
        trace = replicate(trace, layers=(start + 2, start + 3), copies=copies, persistent=weights)
    true = {
        start + (chunk * copies) + layer: start // traced * job.layers_per_chunk + layer
        for chunk, start in enumerate(starts)
        for layer in range(job.layers_per_chunk)
    }
    phases = tuple(replace(phase, label=renumbered(phase.label, true)) for phase in trace.phases)
    return replace(trace, phases=phases)


class _Step:
    """A model with its batch, and what is done to it in an iteration."""

    def __init__(self, job: Job, handle: Handle | None) -> None:
        self._job, self._shape, shape = job, job.shape, job.shape
        config = _config(job)
        padding = 128 * shape.tensor_model_parallel_size  # as Megatron pads
        # The weights have their type from the start: a module of fake tensors cannot be converted.
        torch.set_default_dtype(config.params_dtype)
        try:
            self.chunks = [
                self._build(config, chunk, -(-shape.vocab_size // padding) * padding, handle)
                for chunk in range(job.num_chunks)
            ]
        finally:
            torch.set_default_dtype(torch.float32)
        for parameter in self._parameters():
            parameter.main_grad = torch.zeros(parameter.shape, dtype=torch.float32)
            parameter.register_post_accumulate_grad_hook(_add_up)
        size = (shape.micro_batch_size, shape.seq_length)
        self._tokens = torch.zeros(size, dtype=torch.long)
        if job.source == "step":  # experts are given what the text holds
            self._tokens = torch.randint(shape.vocab_size, size, generator=torch.Generator().manual_seed(1))
        self._positions = torch.arange(shape.seq_length).expand(size)

    def _build(self, config: TransformerConfig, chunk: int, words: int, handle: Handle | None) -> Any:
        """Chunk `chunk` of this rank; where megamem places chunks otherwise than Megatron, it corrects the ends."""
        stage = chunk if self._job.num_chunks > 1 else None
        if stage is not None:
            parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
        with contextlib.nullcontext() if handle is None else handle.building(chunk):
            return GPTModel(
                config,
                local_layer_spec(config, vp_stage=stage),
                vocab_size=words,
                max_sequence_length=self._shape.seq_length,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage),
                share_embeddings_and_output_weights=False,
                position_embedding_type="rope",
                vp_stage=stage,
            )

    def _parameters(self) -> list[Any]:
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def ends(self) -> dict[str, Any]:
        """What this rank has of the model beside layers."""
        found = {}
        for chunk in self.chunks:
            for name, attribute in (("embedding", "embedding"), ("output layer", "output_layer")):
                if isinstance(module := getattr(chunk, attribute, None), torch.nn.Module):
                    found[name] = module
        return found

    def persistent(self) -> list[Tensor]:
        """What is there before an iteration and after it."""
        weights = self._parameters()
        buffers = [buffer for chunk in self.chunks for buffer in chunk.buffers()]
        return [*weights, *(weight.main_grad for weight in weights), *buffers, self._tokens, self._positions]

    def run(self, enter: Callable[[str], None]) -> None:
        """One iteration by the schedule, and the update of the weights."""
        is_one = len(self.chunks) == 1
        get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=None if is_one else [None] * len(self.chunks),
            model=self.chunks,
            num_microbatches=self._job.num_microbatches,
            seq_length=self._shape.seq_length,
            micro_batch_size=self._shape.micro_batch_size,
            decoder_seq_length=self._shape.seq_length,
            forward_only=False,
        )
        enter("optimizer")
        with torch.no_grad():
            for weight in self._parameters():
                weight.add_(weight.main_grad.to(weight.dtype), alpha=-1e-3)
                weight.main_grad.zero_()

    def _forward(self, _data: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        output = model(self._tokens, self._positions, None, labels=self._tokens)
        return output, _loss


def _config(job: Job) -> TransformerConfig:
    config = gpt_config(job.shape)
    changes: dict[str, Any] = {"num_layers": job.shape.num_layers}
    if job.source == "fake":
        changes["perform_initialization"] = False
    if job.recompute:
        changes |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if job.pipeline > 1:
        changes |= {"pipeline_model_parallel_size": job.pipeline, "batch_p2p_comm": True}
        changes |= {"deallocate_pipeline_outputs": True}  # as Megatron-LM has it
    if job.num_chunks > 1:
        changes["virtual_pipeline_model_parallel_size"] = job.num_chunks
    if job.experts is not None:
        changes |= {
            "num_moe_experts": job.experts,
            "moe_router_topk": job.topk,
            "moe_ffn_hidden_size": config.ffn_hidden_size,
        }
        changes |= {"moe_token_dispatcher_type": "alltoall", "moe_aux_loss_coeff": 1e-2}
    return replace(config, **changes)


def _loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return output.float().mean(), {"loss": output.float().mean().detach()}


def _add_up(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None
