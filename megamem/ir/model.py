"""The sizes of a GPT: what a plan is made from, and what it is checked against before it is run.

Names are Megatron-Core's (`TransformerConfig`, `GPTModel`), so a message can name the flag to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NORMALIZATIONS = ("LayerNorm", "RMSNorm")
POSITIONS = ("rope", "learned_absolute", "none")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Mixture of experts. `dense_layers` are the numbers (from 1) of the layers that have an ordinary MLP instead.

    shared_ffn_hidden_size: of the expert that every token goes through; 0: there is none
    """

    num_experts: int
    topk: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int = 0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _at_least_one(self, "num_experts", "topk", "ffn_hidden_size")
        if self.topk > self.num_experts:
            raise ValueError(f"topk {self.topk} of {self.num_experts} experts: at most all of them")


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, 2.1). `q_lora_rank` None: queries are not compressed.

    A head's query and key are qk_head_dim + qk_pos_emb_head_dim wide, its value v_head_dim.
    """

    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A GPT.

    ffn_hidden_size:   of the dense MLPs; with swiglu of the gate, and of the other half
    num_query_groups:  key-value heads
    kv_channels:       width of a head
    vocab_size:        entries of the vocabulary before it is padded
    share_embeddings:  the output layer has the weights of the input embedding
    mtp_num_layers:    multi-token prediction: layers behind the last one that predict further tokens
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    vocab_size: int
    num_query_groups: int
    kv_channels: int
    swiglu: bool = False
    normalization: str = "LayerNorm"
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    position: str = "rope"
    max_position_embeddings: int = 0
    share_embeddings: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    experts: Experts | None = None
    latent: LatentAttention | None = None
    mtp_num_layers: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "num_query_groups", "kv_channels")
        _at_least_one(self, *sizes, *(() if self.experts else ("ffn_hidden_size",)))
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_query_groups {self.num_query_groups} does not divide {self.num_attention_heads} attention heads"
            )
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization {self.normalization!r} is none of {', '.join(NORMALIZATIONS)}")
        if self.position not in POSITIONS:
            raise ValueError(f"position {self.position!r} is none of {', '.join(POSITIONS)}")
        for number in self.experts.dense_layers if self.experts else ():
            if not 1 <= number <= self.num_layers:
                raise ValueError(f"dense layer {number} of {self.num_layers} layers: they are numbered from 1")

    @property
    def query_width(self) -> int:
        """All heads' queries, in elements per token; keys of latent attention are as wide."""
        head = self.kv_channels if self.latent is None else self.latent.qk_head_dim + self.latent.qk_pos_emb_head_dim
        return self.num_attention_heads * head

    @property
    def kv_width(self) -> int:
        """All key heads, in elements per token."""
        return self.num_query_groups * self.kv_channels if self.latent is None else self.query_width

    @property
    def value_width(self) -> int:
        """All heads' values as attention returns them, in elements per token."""
        head = self.kv_channels if self.latent is None else self.latent.v_head_dim
        return self.num_attention_heads * head

    def is_moe(self, number: int) -> bool:
        """Whether layer `number`, from 1, has experts. Layers of multi-token prediction are as the last one."""
        return self.experts is not None and min(number, self.num_layers) not in self.experts.dense_layers

    def sizes(self) -> dict[str, object]:
        """Every field but the name, those of `experts` and `latent` as `experts.topk`: what makes it this model."""
        flat: dict[str, object] = {}
        for name, value in vars(self).items():
            if isinstance(value, (Experts, LatentAttention)):
                flat |= {f"{name}.{inner}": part for inner, part in vars(value).items()}
            elif name != "name":
                flat[name] = value
        return flat


def differences(planned: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Where two mappings of sizes differ, of the keys that both have; one sentence each."""
    return [
        f"{key} is {found[key]}, the plan is for {planned[key]}"
        for key in planned
        if key in found and found[key] != planned[key]
    ]


def _at_least_one(record: Any, *names: str) -> None:
    for name in names:
        if getattr(record, name) < 1:
            raise ValueError(f"{name} is {getattr(record, name)}; at least 1 is needed")
