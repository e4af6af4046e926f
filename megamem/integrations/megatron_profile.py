"""`megamem profile`: the costs of a GPT's layers, embedding and output layer, measured on the device at hand.

Three pipeline stages of a real GPTModel are built and timed, each with one transformer layer: the first with the
embedding, one with nothing else, the last with output layer and loss. What the outer two cost more than the middle one
is what embedding and output layer cost. The costs of any placement of any number of such layers follow
(`megamem.ir.workload.Workload`), and `megamem simulate --costs` prices schedules with them.

Weight gradients are computed apart from input gradients by the same code as in a run (`megatron_linear`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import Module

from megamem.integrations.local_spec import local_layer_spec
from megamem.integrations.megatron_linear import SplitLinears
from megamem.ir.workload import StageCost, Workload
from megamem.patches import GROUPS
from megamem.patches.registry import apply
from megamem.profiler.pipeline import measure, workload
from megamem.runtime.pipeline.weights import WeightQueue
from megamem.runtime.session import AbstractSession


@dataclass(frozen=True, kw_only=True)
class GptShape:
    """Sizes of a GPT, named as Megatron names them; `num_query_groups` None for as many as heads."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None
    seq_length: int
    micro_batch_size: int
    vocab_size: int
    swiglu: bool
    normalization: str
    disable_bias_linear: bool
    bf16: bool
    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False


def shape_of(arguments: argparse.Namespace) -> GptShape:
    """The shape that the flags of `megamem profile` name."""
    values = {item.name: getattr(arguments, item.name) for item in fields(GptShape)}
    if values["ffn_hidden_size"] is None:
        values["ffn_hidden_size"] = 4 * arguments.hidden_size
    return GptShape(**values)


def profile_gpt(
    shape: GptShape,
    *,
    repetitions: int,
    link_gb_per_s: float | None = None,
    progress: Callable[[str, int], None] = lambda what, done: None,
) -> Workload:
    """Costs of the model's layers in milliseconds and bytes, per tensor-parallel rank.

    Megatron's parallel groups must be there, without pipeline parallelism. `link_gb_per_s` is the bandwidth between
    neighbouring pipeline ranks, from which the latency of a hop follows; None leaves it at 0.
    `progress` hears what is measured, and how many repetitions are done.
    """
    config = gpt_config(shape)
    costs: list[StageCost] = []
    for name, ends in (("first stage", (True, False)), ("layer", (False, False)), ("last stage", (False, True))):
        stage = _GptStage(shape, config, *ends)
        with apply(patch.bound(stage) for patch in GROUPS["schedule"]):
            costs.append(measure(stage, repetitions=repetitions, progress=partial(progress, name)))
        del stage
    first, middle, last = costs
    message = shape.seq_length * shape.micro_batch_size * shape.hidden_size * (2 if shape.bf16 else 4)
    if shape.sequence_parallel:
        message //= shape.tensor_model_parallel_size
    comm = 0.0 if link_gb_per_s is None else 1e3 * message / (link_gb_per_s * 1e9)
    return workload(first, middle, last, shape.num_layers, comm)


def gpt_config(shape: GptShape) -> TransformerConfig:
    """Megatron's configuration of one layer, with the fused paths that need a GPU off."""
    dtype = torch.bfloat16 if shape.bf16 else torch.float32
    return TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups or shape.num_attention_heads,
        normalization=shape.normalization,
        gated_linear_unit=shape.swiglu,
        activation_func=torch.nn.functional.silu if shape.swiglu else torch.nn.functional.gelu,
        add_bias_linear=not shape.disable_bias_linear,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=shape.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=shape.tensor_model_parallel_size,
        sequence_parallel=shape.sequence_parallel,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


class _GptStage(AbstractSession):
    """A GPTModel with one layer as one stage of a pipeline, and the session that splits its backward pass."""

    def __init__(self, shape: GptShape, config: TransformerConfig, is_first: bool, is_last: bool) -> None:
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        self._model = GPTModel(
            config,
            local_layer_spec(config),
            vocab_size=-(-shape.vocab_size // 128) * 128,
            max_sequence_length=shape.seq_length,
            pre_process=is_first,
            post_process=is_last,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )
        if torch.cuda.is_available():
            self._model.cuda()
        self._model.to(config.params_dtype)
        self._queue = WeightQueue()
        self._linears = SplitLinears(self._queue)
        self._linears.learn([self._model])
        device = next(self._model.parameters()).device
        size = (shape.micro_batch_size, shape.seq_length)
        self._tokens = torch.randint(shape.vocab_size, size, device=device)
        self._positions = torch.arange(shape.seq_length, device=device).expand(size)
        length = shape.seq_length // (shape.tensor_model_parallel_size if shape.sequence_parallel else 1)
        hidden = (length, shape.micro_batch_size, shape.hidden_size)
        self._input = None if is_first else torch.randn(hidden, device=device, dtype=config.params_dtype)
        self._labels = self._tokens if is_last else None

    def forward(self) -> Tensor:
        """A microbatch through the stage; the last one's output is the loss."""
        if self._input is not None:
            self._model.set_input_tensor(self._input.detach().requires_grad_())
        self._queue.collect(0, 0)
        output: Tensor = self._model(self._tokens, self._positions, None, labels=self._labels)
        self._queue.stop()
        return output.float().mean() if self._labels is not None else output

    def backward(self, output: Tensor) -> None:
        """B."""
        torch.autograd.backward(output, torch.ones_like(output))

    def weight(self) -> None:
        """W; gradients add up from repetition to repetition, as they do from microbatch to microbatch."""
        self._queue.run(0, 0)

    def parameters(self) -> Iterable[Tensor]:
        """The stage's weights."""
        return list(self._model.parameters())

    def waiting(self) -> list[Tensor]:
        """Inputs and output gradients of the linear layers."""
        return self._queue.held

    def run_linear(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Every linear layer comes through here."""
        return self._linears.run(function, arguments)

    def on_layer_built(self, layer: Module) -> None:
        """Nothing."""

    def run_layer(
        self, layer: Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As without megamem."""
        return forward(layer, *args, **kwargs)

    def run_step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As without megamem."""
        return step(*args, **kwargs)
