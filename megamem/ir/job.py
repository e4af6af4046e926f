"""A training job in numbers: a model, how it is laid out over ranks, and what one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from megamem.ir.kernels import Kernels
from megamem.ir.model import Model
from megamem.ir.pipeline_split import Split, balanced_split, layout_text

SPECS = ("transformer_engine", "local")
RECOMPUTATIONS = ("none", "selective", "full")
RECOMPUTE_METHODS = ("uniform", "block")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How ranks share the work. world size = tensor x context x pipeline x data.

    chunks:         model chunks per pipeline rank (Megatron's virtual pipeline size)
    split:          layers of each of the pipeline x chunks stages, in the order of the model; empty: evenly
    expert:         ranks, out of context x data (x tensor / expert_tensor), that share the experts
    expert_tensor:  tensor parallelism inside the experts; 0: as elsewhere, which is Megatron's default
    distributed_optimizer:  optimizer states, and fp32 weights, are divided over the data-parallel ranks
    """

    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1
    pipeline: int = 1
    chunks: int = 1
    expert: int = 1
    expert_tensor: int = 0
    data: int = 1
    distributed_optimizer: bool = True
    split: Split = ()

    FLAGS: ClassVar[dict[str, str]] = {
        "tensor": "--tensor-model-parallel-size",
        "context": "--context-parallel-size",
        "pipeline": "--pipeline-model-parallel-size",
        "chunks": "--num-virtual-stages-per-pipeline-rank",
        "expert": "--expert-model-parallel-size",
        "expert_tensor": "--expert-tensor-parallel-size",
    }

    def __post_init__(self) -> None:
        for name in ("tensor", "context", "pipeline", "chunks", "expert", "data"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.split and len(self.split) != self.num_stages:
            raise ValueError(f"a split of {len(self.split)} stages for {self.pipeline} ranks x {self.chunks} chunks")

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return self.pipeline * self.chunks

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def experts_tensor(self) -> int:
        """Tensor parallelism inside the experts."""
        return self.expert_tensor or self.tensor

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts: what the optimizer states of experts are divided over."""
        return max(1, self.world_size // (self.pipeline * self.expert * self.experts_tensor))

    @property
    def sequence_shards(self) -> int:
        """Parts into which the tokens between two layers are divided: context, and tensor where it is by sequence."""
        return self.context * (self.tensor if self.sequence_parallel else 1)

    def text(self) -> str:
        """`TP 8 x PP 4 x DP 2`, leaving out what is 1."""
        parts = [("TP", self.tensor), ("CP", self.context), ("PP", self.pipeline), ("EP", self.expert)]
        words = [f"{name} {size}" for name, size in parts if size > 1]
        if self.chunks > 1:
            words.append(f"{self.chunks} chunks")
        if self.split:
            words.append("uneven stages")
        return " x ".join([*words, f"DP {self.data}"] if self.data > 1 or not words else words)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and how much of it in one step.

    seq_length:        tokens of one sequence, over all context-parallel ranks
    micro_batch_size:  sequences of one microbatch on one data-parallel rank
    bf16:              weights and activations in bf16, gradients and optimizer states in fp32; else everything in fp32
    spec:              the layers: Transformer Engine's, or Megatron-Core's local ones
    kernels:           what computes them
    recompute:         Megatron's own recomputation, which megamem's activation policies take the place of
    recompute_modules: what `selective` recomputes, by Megatron's names
    recompute_method:  of `full`: `uniform`, all layers, `recompute_num_layers` from one stored input; or `block`, the
                       first `recompute_num_layers` of each stage, each from its own
    overlap:           gradients are reduced and weights gathered beside backward and forward passes
    """

    model: Model
    layout: Layout
    seq_length: int
    micro_batch_size: int = 1
    global_batch_size: int = 1
    bf16: bool = True
    spec: str = "transformer_engine"
    kernels: Kernels = field(default_factory=Kernels)
    recompute: str = "none"
    recompute_modules: tuple[str, ...] = ("core_attn",)
    recompute_method: str = "uniform"
    recompute_num_layers: int = 1
    overlap: bool = True

    def __post_init__(self) -> None:
        for name in ("seq_length", "micro_batch_size", "global_batch_size", "recompute_num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.spec not in SPECS:
            raise ValueError(f"spec {self.spec!r} is none of {', '.join(SPECS)}")
        if self.recompute not in RECOMPUTATIONS:
            raise ValueError(f"recompute {self.recompute!r} is none of {', '.join(RECOMPUTATIONS)}")
        if self.recompute_method not in RECOMPUTE_METHODS:
            raise ValueError(f"recompute_method {self.recompute_method!r} is none of {', '.join(RECOMPUTE_METHODS)}")

    @property
    def num_microbatches(self) -> int:
        """Microbatches that one pipeline works off in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.layout.data)

    @property
    def itemsize(self) -> int:
        """Bytes of an element of weights and activations."""
        return 2 if self.bf16 else 4

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch between two layers on one rank: s * b over the ranks that divide the sequence."""
        return self.seq_length * self.micro_batch_size // self.layout.sequence_shards

    @property
    def fuses_softmax(self) -> bool:
        """Whether unfused attention's softmax kernel takes the job's scores.

        The conditions for causal attention are those of Megatron-Core's `FusedScaleMaskSoftmax.is_kernel_available`.
        """
        matrices = self.model.num_attention_heads // self.layout.tensor * self.micro_batch_size
        block = 8 if self.seq_length <= 128 else 4  # matrices that a block of the kernel works on
        return (
            self.kernels.fused_softmax
            and self.bf16
            and 16 < self.seq_length <= 4096
            and self.seq_length % 4 == 0
            and matrices % block == 0
        )

    @property
    def softmax_itemsize(self) -> int:
        """Bytes of a probability as unfused attention's softmax gives it."""
        return 4 if self.kernels.softmax_fp32 and not self.fuses_softmax else self.itemsize

    @property
    def recomputes_attention(self) -> bool:
        """Whether Megatron recomputes core attention alone, so that it keeps its inputs and no scores."""
        return self.recompute == "selective" and "core_attn" in self.recompute_modules

    def problems(self) -> list[str]:
        """What Megatron-Core would not run: the flag, the reason and a setting that works, one sentence each."""
        return [*_model_problems(self), *_expert_problems(self), *_batch_problems(self)]


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`; the smaller of two."""
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    return min(divisors, key=lambda size: (abs(size - wanted), size))


def _model_problems(job: Job) -> list[str]:
    model, layout = job.model, job.layout
    problems = []
    if model.num_attention_heads % layout.tensor:
        problems.append(
            f"--tensor-model-parallel-size {layout.tensor} does not divide {model.num_attention_heads} attention "
            f"heads; use {nearest_divisor(model.num_attention_heads, layout.tensor)}"
        )
    elif model.latent is None and model.num_query_groups % layout.tensor and layout.tensor % model.num_query_groups:
        problems.append(
            f"--tensor-model-parallel-size {layout.tensor} neither divides nor is divided by "
            f"{model.num_query_groups} query groups; use {nearest_divisor(model.num_query_groups, layout.tensor)}"
        )
    if layout.split and sum(layout.split) != model.num_layers:
        problems.append(
            f"--pipeline-model-parallel-layout {layout_text(layout.split, model.mtp_num_layers)} has "
            f"{sum(layout.split)} layers, the model {model.num_layers}"
        )
    elif not layout.split and model.num_layers % layout.num_stages:
        fitting = nearest_divisor(model.num_layers // layout.pipeline or 1, layout.chunks)
        remedy = (
            f"use --num-virtual-stages-per-pipeline-rank {fitting}"
            if model.num_layers % layout.pipeline == 0
            else f"use --pipeline-model-parallel-size {nearest_divisor(model.num_layers, layout.pipeline)}"
        )
        if model.num_layers > layout.num_stages:
            split = balanced_split([1.0] * model.num_layers, layout.num_stages, 1.0 + model.mtp_num_layers)
            words = layout_text(split, model.mtp_num_layers)
            remedy += f", or --pipeline-model-parallel-layout '{words}' instead of virtual stages"
        problems.append(
            f"{model.num_layers} layers cannot be divided by {layout.pipeline} pipeline ranks x {layout.chunks} "
            f"chunks; {remedy}"
        )
    if layout.sequence_parallel and layout.tensor == 1:
        problems.append("--sequence-parallel has no effect without tensor parallelism; leave it out")
    if job.spec == "local" and layout.context > 1:
        problems.append(
            f"--context-parallel-size {layout.context} needs --transformer-impl transformer_engine: the local "
            "layers' attention sees its own rank's tokens only"
        )
    return problems


def _expert_problems(job: Job) -> list[str]:
    experts, layout = job.model.experts, job.layout
    if experts is None:
        if layout.expert > 1:
            return [f"--expert-model-parallel-size {layout.expert} needs a model with experts; use 1"]
        return []
    problems = []
    if experts.num_experts % layout.expert:
        problems.append(
            f"--expert-model-parallel-size {layout.expert} does not divide {experts.num_experts} experts; use "
            f"{nearest_divisor(experts.num_experts, layout.expert)}"
        )
    ranks = layout.world_size // layout.pipeline
    if ranks % (layout.expert * layout.experts_tensor):
        problems.append(
            f"--expert-model-parallel-size {layout.expert} x expert tensor parallel {layout.experts_tensor} does not "
            f"divide the {ranks} ranks of a pipeline stage; use {nearest_divisor(ranks, layout.expert)}"
        )
    if layout.tensor > 1 and not layout.sequence_parallel:
        problems.append("experts with tensor parallelism need --sequence-parallel; add it")
    return problems


def _batch_problems(job: Job) -> list[str]:
    layout, problems = job.layout, []
    unit = job.micro_batch_size * layout.data
    if job.global_batch_size % unit:
        problems.append(
            f"--global-batch-size {job.global_batch_size} is not a multiple of --micro-batch-size "
            f"{job.micro_batch_size} x {layout.data} data-parallel ranks; use "
            f"{max(1, round(job.global_batch_size / unit)) * unit}"
        )
    # Ring attention balances causal work by giving every rank one chunk from the front and one from the back.
    parts = layout.sequence_shards * (2 if layout.context > 1 else 1)
    if job.seq_length % parts:
        problems.append(
            f"--seq-length {job.seq_length} is not divisible by {parts} (context x tensor parallel shards"
            f"{', two chunks each' if layout.context > 1 else ''}); use {-(-job.seq_length // parts) * parts}"
        )
    return problems
