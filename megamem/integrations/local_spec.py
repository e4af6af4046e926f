"""A layer spec for Megatron's local implementation that runs anywhere: no Transformer Engine, no apex.

Megatron's own local spec cannot train long sequences: its core attention materialises s x s scores and its torch norm
refuses sequence parallelism. Two modules close the gap, and `local_layer_spec` plugs them in:

    FlashAttention   `scaled_dot_product_attention`: no s x s tensor for causal attention, GQA without expanding k and v
    Norm             LayerNorm or RMSNorm that saves its input and one or two numbers a token, sequence parallel or not

What needs more than that (context parallelism, sliding windows, packed sequences ...) is refused by name; the
Transformer Engine spec has it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.nn import Parameter

from megamem.errors import UnsupportedError
from megamem.kernels.norm import normalise

_REMEDY = (
    "use the Transformer Engine layer spec for it (pip install 'megamem[te]', --transformer-impl transformer_engine)"
)

# Megatron's masks say True where attention is forbidden; these types read the mask, the others ignore it.
_MASKED = (AttnMaskType.padding, AttnMaskType.padding_causal, AttnMaskType.arbitrary)
_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


def _refuse(what: str) -> UnsupportedError:
    return UnsupportedError(f"megamem's FlashAttention does not support {what}; {_REMEDY}")


class FlashAttention(MegatronModule):  # type: ignore[misc]  # Megatron is untyped
    """Core attention on `scaled_dot_product_attention`, a drop-in for Megatron's `DotProductAttention`.

    Takes query [s, b, np, d], key and value [s, b, ng, d], and returns [s, b, np * d].

    The output is not copied. The kernels lay their output out like the query, so a query handed over as a
    [b, np, s, d] *view* of [s, b, np, d] yields an output whose [s, b, np * d] view is contiguous, and the output
    that attention saves for its backward pass is one storage with the input that the projection saves (checked by
    a test on the CPU kernel; PyTorch's flash and cuDNN kernels allocate the same way, its memory-efficient kernel
    only for a microbatch of one).

    Attention dropout on a CPU, and GQA in fp32 on a GPU, have no flash kernel: PyTorch then computes the s x s scores.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        # kwargs: cp_comm_type, pg_collection, and what later versions add; attention within one rank needs none.
        super().__init__(config=config)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # apply_query_key_layer_scaling needs nothing: Megatron divides the scores by the layer number and multiplies
        # it back inside the softmax, against fp16 overflow. Here the kernel holds the scores, in fp32.
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self._check(config)

    @staticmethod
    def _check(config: TransformerConfig) -> None:
        if config.context_parallel_size > 1:
            raise _refuse(f"context parallelism (context_parallel_size={config.context_parallel_size})")
        if getattr(config, "window_size", None) is not None:
            raise _refuse(f"window attention (window_size={config.window_size})")
        if getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise _refuse(f"softmax_type={config.softmax_type!r}")
        if getattr(config, "qk_clip", False):
            raise _refuse("qk_clip")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend; see the class for shapes. Arguments are those of `DotProductAttention.forward`."""
        if packed_seq_params is not None:
            raise _refuse("packed sequences")
        if attention_bias is not None:
            raise _refuse("an attention bias")
        unknown = sorted(name for name, given in kwargs.items() if given is not None)
        if unknown:
            raise _refuse(", ".join(unknown))
        kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        mask, is_causal = self._mask(kind, attention_mask, query.size(0), key.size(0), query.device)
        # [s, b, n, d] -> [b, n, s, d], as views: the kernel's output takes over the query's memory order.
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        options: dict[str, Any] = {"attn_mask": mask, "is_causal": is_causal, "scale": self.softmax_scale}
        options["enable_gqa"] = k.size(1) != q.size(1)
        dropout = self.dropout if self.training else 0.0
        if dropout > 0.0 and not self.config.sequence_parallel:
            # As in DotProductAttention: every tensor-parallel rank draws its own numbers.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **options)
        else:
            context = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **options)
        return context.permute(2, 0, 1, 3).flatten(2)  # [s, b, np * d]

    @staticmethod
    def _mask(
        kind: AttnMaskType, mask: Tensor | None, queries: int, keys: int, device: torch.device
    ) -> tuple[Tensor | None, bool]:
        """(attn_mask, is_causal) for `scaled_dot_product_attention`, whose masks say True for *allowed*."""
        if kind in _CAUSAL and queries != keys:
            raise _refuse(f"causal attention of {queries} queries over {keys} keys (inference with a key-value cache)")
        if kind not in _MASKED or mask is None:
            return None, kind in _CAUSAL
        allowed = mask.logical_not()
        if kind is AttnMaskType.padding_causal:
            allowed = allowed & torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
        return allowed, False


TORCH_FUSES_RMS_NORM = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm, as `config.normalization` says, computed in fp32 inside whatever the input's type.

    Its parameters carry `sequence_parallel`, as those of apex's wrapper do, so that Megatron sums their gradients over
    the tensor-parallel group: under sequence parallelism every rank normalises its own tokens only.
    Equal to Megatron's `WrappedTorchNorm` up to rounding (bitwise for LayerNorm).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        # kwargs: persist_layer_norm, zero_centered_gamma, normalization; Megatron's wrappers read the config instead.
        super().__init__()
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise UnsupportedError(f"megamem's Norm is LayerNorm or RMSNorm, not {config.normalization}; {_REMEDY}")
        self.hidden_size = (hidden_size,)
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        fill = torch.zeros if self.zero_centered else torch.ones
        self.weight = Parameter(fill(hidden_size, dtype=config.params_dtype, device=device))
        self.bias: Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.bias is not None:
            return F.layer_norm(x, self.hidden_size, weight, self.bias, self.eps)
        if x.is_cuda and TORCH_FUSES_RMS_NORM:
            return F.rms_norm(x, self.hidden_size, weight, self.eps)
        # Elsewhere PyTorch's is a chain of element-wise operations that saves up to three tensors of x's size, in fp32.
        return normalise(x, weight, eps=self.eps)


def _layer(config: TransformerConfig, num_experts: int | None, flash_attention: bool) -> ModuleSpec:
    """Megatron's local layer with our modules put in; `normalization` is left out because Norm reads the config."""
    spec = get_gpt_layer_local_spec(
        num_experts=num_experts,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        qk_l2_norm=getattr(config, "qk_l2_norm", False),
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    attention = layer.self_attention.submodules
    if flash_attention:
        attention.core_attention = FlashAttention
    if config.qk_layernorm:
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention, name, IdentityOp) not in (None, IdentityOp):
                setattr(attention, name, Norm)
    return spec


def moe_layers(config: TransformerConfig) -> list[bool]:
    """For each layer of the model, whether `moe_layer_freq` makes it an MoE layer."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):
        return [index % pattern == 0 for index in range(config.num_layers)]
    if len(pattern) != config.num_layers:
        raise UnsupportedError(f"moe_layer_freq has {len(pattern)} entries for {config.num_layers} layers")
    return [bool(entry) for entry in pattern]


def local_layer_spec(
    config: TransformerConfig,
    *,
    flash_attention: bool = True,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The spec of this pipeline stage's layers and final norm, for GPTModel's `transformer_layer_spec`.

    A block spec rather than a layer spec, because GPTModel takes a layer spec's final norm from apex or torch.
    With interleaved pipeline stages, make one for each chunk and name it with `vp_stage`.
    Megatron's parallel state must be there unless `pp_rank` is given.
    """
    kinds = {
        moe: _layer(config, config.num_moe_experts if moe else None, flash_attention) for moe in set(moe_layers(config))
    }
    layers = [kinds[moe] for moe in moe_layers(config)]
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        numbers = layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank)
        mine = [layers[number] for number in numbers]
    else:
        offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
        mine = layers[offset : offset + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)]
    return TransformerBlockSubmodules(layer_specs=mine, layer_norm=Norm)


def last_layer_stage(config: TransformerConfig) -> tuple[int, int]:
    """`pp_rank` and `vp_stage` of the last stage that has layers, by a pipeline_model_parallel_layout.

    `get_gpt_mtp_block_spec` makes multi-token prediction like the last layer of the spec that it is given: in a last
    stage without layers that has to be this stage's.
    """
    layout = config.pipeline_model_parallel_layout.layout
    stages = [(rank, chunk) for chunk in range(len(layout[0])) for rank in range(len(layout))]
    return next((rank, chunk) for rank, chunk in reversed(stages) if LayerType.decoder in layout[rank][chunk])
