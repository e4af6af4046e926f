"""Models as Hugging Face publishes them: the sizes in a `config.json`, read without `transformers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamem.errors import ConfigError
from megamem.ir.model import Model

# Model types whose MLP is gated; their `config.json` does not say so.
_GATED = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "deepseek",
    "gemma",
    "phi3",
    "olmo",
    "glm",
    "minimax",
    "ernie",
)
_UNGATED = ("gpt2", "gpt_neox", "gpt_bigcode", "opt", "falcon", "bloom", "starcoder2", "phi")
_NAMES: Mapping[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_query_groups": ("num_key_value_heads",),
    "kv_channels": ("head_dim",),
    "ffn_hidden_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "mtp_num_layers": ("num_nextn_predict_layers",),
}


def model_of_config(content: Mapping[str, Any], name: str, where: str) -> Model:
    """The model that a `config.json` describes. Raises ConfigError with every field that is missing."""
    from megamem.planner.models.presets import make_model

    config = {key: value for key, value in content.items() if value not in (None, "", "null")}
    if isinstance(config.get("text_config"), Mapping):  # multimodal models: the language model is what is trained here
        config = {**config, **config["text_config"]}
    kind = str(config.get("model_type", ""))
    sizes: dict[str, Any] = {"name": name}
    for field, keys in _NAMES.items():
        key = next((key for key in keys if key in config), None)
        if key is not None:
            sizes[field] = config[key]
    if "ffn_hidden_size" not in sizes and "hidden_size" in sizes and kind in ("gpt2", "gpt_bigcode"):
        sizes["ffn_hidden_size"] = 4 * int(sizes["hidden_size"])
    sizes |= _style(config, kind, where)
    if latent := _latent(config):
        sizes["latent"] = latent
        sizes["num_query_groups"] = sizes["num_attention_heads"]
        sizes["kv_channels"] = latent["qk_head_dim"]
    if experts := _experts(config, int(sizes.get("num_layers", 0))):
        sizes["experts"] = experts
        sizes.setdefault("ffn_hidden_size", experts["ffn_hidden_size"])
    return make_model(sizes, where)


def _style(config: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Gates, norms, biases, positions, tied embeddings."""
    gated = kind.startswith(_GATED)
    if not gated and not kind.startswith(_UNGATED):
        known = ", ".join(sorted((*_GATED, *_UNGATED)))
        raise ConfigError(
            f"{where}: model_type {kind!r} is not known (known: {known} ...); give Megatron's flags instead: "
            "megamem plan --from-megatron-args"
        )
    learned = kind.startswith(("gpt2", "gpt_bigcode", "opt"))
    return {
        "swiglu": gated,
        "normalization": "RMSNorm" if "rms_norm_eps" in config else "LayerNorm",
        "add_bias_linear": not gated and _word(config, "mlp_bias", "true"),
        "add_qkv_bias": _word(config, "attention_bias", "true" if kind.startswith("qwen2") else "false"),
        "qk_layernorm": kind.startswith(("qwen3", "olmo2")),
        "position": "learned_absolute" if learned else "rope",
        "share_embeddings": _word(config, "tie_word_embeddings", "true" if learned else "false"),
    }


def _latent(config: Mapping[str, Any]) -> dict[str, Any] | None:
    if "kv_lora_rank" not in config:
        return None
    latent = {
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
    }
    return latent if "q_lora_rank" not in config else {**latent, "q_lora_rank": config["q_lora_rank"]}


def _experts(config: Mapping[str, Any], num_layers: int) -> dict[str, Any] | None:
    keys = ("n_routed_experts", "num_local_experts", "num_experts")
    count = next((int(config[key]) for key in keys if key in config), 0)
    if count < 2:
        return None
    width = int(config.get("moe_intermediate_size", config.get("intermediate_size", 0)))
    shared = int(config.get("shared_expert_intermediate_size", 0)) or int(config.get("n_shared_experts", 0)) * width
    first, step = int(config.get("first_k_dense_replace", 0)), int(config.get("decoder_sparse_step", 1))
    listed = {int(layer) + 1 for layer in config.get("mlp_only_layers", ())}
    dense = [n for n in range(1, num_layers + 1) if n <= first or n % step or n in listed]
    return {
        "num_experts": count,
        "topk": config.get("num_experts_per_tok", 2),
        "ffn_hidden_size": width,
        "shared_ffn_hidden_size": shared,
        "dense_layers": dense,
    }


def _word(config: Mapping[str, Any], key: str, default: str) -> bool:
    return str(config.get(key, default)).strip().lower() == "true"
