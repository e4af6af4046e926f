"""Configurations of Megatron-Bridge (`ConfigContainer.to_yaml`), and the MODEL_ARGS of Megatron-LM's own test cases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamem.errors import ConfigError
from megamem.ir.job import Job
from megamem.planner.models.flags import job_of_flags
from megamem.yamlfile import read_mapping

# Fields of Bridge's model providers (which are Megatron's TransformerConfig) that are flags by another name.
_RENAMED = {
    "num_moe_experts": "num_experts",
    "moe_ffn_hidden_size": "moe_ffn_hidden_size",
    "gated_linear_unit": "swiglu",
    "seq_length": "seq_length",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    "virtual_pipeline_model_parallel_size": "num_virtual_stages_per_pipeline_rank",
}
_INVERTED = {
    "add_bias_linear": "disable_bias_linear",
    "share_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
    "masked_softmax_fusion": "no_masked_softmax_fusion",
    "bias_activation_fusion": "no_bias_swiglu_fusion",
    "apply_rope_fusion": "no_rope_fusion",
}
_TRAIN = ("micro_batch_size", "global_batch_size")
_ABSENT = ("", "null", "none", "false", "~")


def job_of_yaml(path: str | Path, world_size: int | None = None) -> Job:
    """The job that a Bridge configuration or a Megatron-LM test case describes. Raises ConfigError."""
    return job_of_content(read_mapping(Path(path)), str(path), world_size)


def job_of_content(content: Mapping[str, Any], where: str, world_size: int | None = None) -> Job:
    """The job that the content of such a file describes, or of `ConfigContainer.to_dict`. Raises ConfigError."""
    if arguments := _part(content, "MODEL_ARGS"):
        return job_of_flags(_words(arguments), world_size)
    model = _part(content, "model")
    if not model:
        raise ConfigError(f"{where}: neither a Megatron-Bridge configuration (no model:) nor MODEL_ARGS of Megatron-LM")
    flags: dict[str, Any] = {f"--{_RENAMED.get(key, key).replace('_', '-')}": value for key, value in model.items()}
    for key, flag in _INVERTED.items():
        if key in model:
            flags[f"--{flag.replace('_', '-')}"] = "true" if _is_absent(model[key]) else "false"
    train, dataset = _part(content, "train"), _part(content, "dataset")
    if "create_attention_mask" in dataset and _is_absent(dataset["create_attention_mask"]):
        flags["--no-create-attention-mask-in-dataloader"] = "true"
    flags["--attention-backend"] = getattr(model.get("attention_backend"), "name", model.get("attention_backend"))
    flags |= {f"--{key.replace('_', '-')}": train[key] for key in _TRAIN if key in train}
    length = dataset.get("sequence_length", dataset.get("seq_length"))
    if not _is_absent(length):
        flags["--seq-length"] = length
    groups = flags.get("--num-query-groups")
    flags["--group-query-attention"] = "false" if _is_absent(groups) else "true"
    flags["--use-distributed-optimizer"] = _part(content, "ddp").get("use_distributed_optimizer", "false")
    try:
        return job_of_flags(_words(flags), world_size)
    except ConfigError as fault:
        raise ConfigError([f"{where}: {problem}" for problem in fault.problems]) from None


def _part(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping inside the file; an empty one where it is absent."""
    part = content.get(name)
    return part if isinstance(part, Mapping) else {}


def _words(flags: Mapping[str, Any]) -> list[str]:
    """As on a command line: switches that are on stand alone, what is absent or off is left out."""
    words: list[str] = []
    for flag, value in flags.items():
        if _is_absent(value) or isinstance(value, Mapping):
            continue
        text = str(value).strip()
        if flag == "--recompute-modules":
            words += [flag, *re.findall(r"\w+", text)]
            continue
        words += [flag] if text.lower() == "true" else [flag, text.replace(" ", "")]
    return words


def _is_absent(value: object) -> bool:
    return value is None or str(value).strip().lower() in _ABSENT
