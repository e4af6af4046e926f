"""Stacks of real Megatron-Core `TransformerLayer`s to measure, on one rank, on a GPU or under the CPU rig.

Shapes: `memo` is the layer of MEMO (arXiv 2407.12117): GPT, LayerNorm, multi-head attention, ungated GELU of 4h, bias,
learned positions; `llama` is Llama 3's: RMSNorm, grouped queries, SwiGLU of 3.5h, rotary positions, no bias.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megamem.testing.cpu import CpuRig, cpu_rig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer's sizes as this rank holds them. `shards` > 1: the share of one rank of that tensor-parallel group."""

    kind: Literal["memo", "llama"]
    hidden: int
    heads: int
    kv_groups: int
    head_dim: int
    ffn: int
    shards: int = 1

    @property
    def q(self) -> int:
        """Width of the queries."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys; of the values too."""
        return self.kv_groups * self.head_dim

    def forward_flops(self, tokens: int) -> float:
        """Model FLOPs of this rank's forward pass over a sequence of `tokens`; causal attention counts half."""
        gates = 3 if self.kind == "llama" else 2
        gemm = 2 * self.hidden * (self.q + 2 * self.kv) + 2 * self.q * self.hidden + 2 * gates * self.hidden * self.ffn
        return float(tokens) * gemm + self.attention_flops(tokens)

    def attention_flops(self, tokens: int) -> float:
        """Of that, causal attention: two products of half of [tokens, tokens], q wide."""
        return 2.0 * tokens * tokens * self.q

    def build_config(self, layers: int, dtype: torch.dtype, *, fused: bool = False, on_gpu: bool = False) -> Any:
        """Megatron's configuration of this layer, without dropout; `fused`: its compiled activation functions."""
        from megatron.core.transformer import TransformerConfig

        is_llama = self.kind == "llama"
        return TransformerConfig(
            num_layers=layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_query_groups=self.kv_groups,
            kv_channels=self.head_dim,
            ffn_hidden_size=self.ffn,
            gated_linear_unit=is_llama,
            activation_func=F.silu if is_llama else F.gelu,
            normalization="RMSNorm" if is_llama else "LayerNorm",
            add_bias_linear=not is_llama,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_cpu_initialization=not on_gpu,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            bias_activation_fusion=fused,
            bias_dropout_fusion=False,
        )


@contextlib.contextmanager
def single_rank(device: str) -> Iterator[CpuRig]:
    """Megatron's groups and random states for one process; under the CPU rig, which is handed out, unless on cuda.

    Stop the rig before anything is timed, once the layers are built: it looks at every call of a torch function, ten
    microseconds each, and layers that live on the CPU do not need it to run.
    """
    from megatron.core import parallel_state, tensor_parallel

    with contextlib.ExitStack() as stack:
        rig = cpu_rig()
        if device != "cuda":
            stack.enter_context(rig)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        stack.callback(torch.distributed.destroy_process_group)
        parallel_state.initialize_model_parallel()
        stack.callback(parallel_state.destroy_model_parallel)
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        torch.manual_seed(1234)
        yield rig


class LayerStack:
    """`layers` equal layers one behind the other, without embedding and loss: activations are what is measured."""

    def __init__(
        self, shape: Shape, layers: int, dtype: torch.dtype, *, fused: bool = False, on_gpu: bool = False
    ) -> None:
        from megatron.core.transformer.spec_utils import build_module

        from megamem.integrations.local_spec import local_layer_spec

        self.shape, self.dtype = shape, dtype
        self.config = shape.build_config(layers, dtype, fused=fused, on_gpu=on_gpu)
        specs = local_layer_spec(self.config, pp_rank=0).layer_specs
        if shape.shards > 1:
            from shard import as_shard

            specs = [as_shard(spec, shape.shards) for spec in specs]
        self.layers: list[Any] = [
            build_module(spec, config=self.config, layer_number=number) for number, spec in enumerate(specs, start=1)
        ]
        if on_gpu:
            for layer in self.layers:
                layer.cuda()
        if shape.shards > 1:
            # What the layers of a rank of such a group would say; the engine reads the order of gathered tokens off it.
            self.config.tensor_model_parallel_size, self.config.sequence_parallel = shape.shards, True
        self._rotary: Any = None
        if shape.kind == "llama":
            from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

            self._rotary = RotaryEmbedding(
                shape.head_dim, rotary_percent=1.0, rotary_base=500000, use_cpu_initialization=not on_gpu
            )
        self._angles: dict[int, Tensor] = {}

    def parameters(self) -> list[torch.nn.Parameter]:
        """All parameters, layer by layer."""
        return [parameter for layer in self.layers for parameter in layer.parameters()]

    def clear_gradients(self) -> None:
        """Drop the gradients of the parameters."""
        for parameter in self.parameters():
            parameter.grad = None

    def leaf(self, tokens: int) -> Tensor:
        """An input [tokens of this rank, 1, h]; the same for everyone."""
        return self._random(tokens, seed=1).requires_grad_()

    def output_gradient(self, tokens: int) -> Tensor:
        """The gradient that the backward pass starts from."""
        return self._random(tokens, seed=2) / tokens**0.5

    def _random(self, tokens: int, seed: int) -> Tensor:
        device = next(iter(self.layers[0].parameters())).device
        generator = torch.Generator(device=device).manual_seed(seed)
        size = (tokens // self.shape.shards, 1, self.shape.hidden)
        return torch.randn(size, device=device, dtype=self.dtype, generator=generator)

    def kwargs(self, tokens: int) -> dict[str, Any]:
        """What a layer is called with besides its input."""
        if self._rotary is None:
            return {"attention_mask": None}
        if tokens not in self._angles:
            self._angles = {tokens: self._rotary(tokens)}
        return {"attention_mask": None, "rotary_pos_emb": self._angles[tokens]}

    def call(self, index: int, hidden: Tensor, tokens: int) -> Tensor:
        """Run one layer."""
        result = self.layers[index](hidden_states=hidden, **self.kwargs(tokens))
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output


def release(device: str) -> None:
    """Give cached device memory back, so that the next contender starts from nothing."""
    import gc

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
