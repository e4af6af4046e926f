"""Models by name, from a config.json, from Megatron's flags and from a Bridge configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megamem.errors import ConfigError
from megamem.planner.models import flags_of, job_of_flags, job_of_yaml, load_model
from megamem.planner.models.flags import dense_layers

LLAMA3_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "max_position_embeddings": 8192,
}
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_nextn_predict_layers": 1,
    "vocab_size": 129280,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}


def written(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"), [("llama3-8b", LLAMA3_8B), ("qwen3-30b-a3b", QWEN3_30B), ("deepseek-v3", DEEPSEEK_V3)]
)
def test_a_published_config_is_the_preset(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    sizes = load_model(written(tmp_path, content)).sizes()
    expected = load_model(name).sizes()
    sizes["max_position_embeddings"] = expected["max_position_embeddings"]
    assert sizes == expected


def test_an_old_config_has_biases_learned_positions_and_tied_embeddings(tmp_path: Path) -> None:
    model = load_model(written(tmp_path, GPT2))
    assert (model.ffn_hidden_size, model.position, model.max_position_embeddings) == (3072, "learned_absolute", 1024)
    assert model.share_embeddings and model.add_bias_linear and not model.swiglu
    assert model.normalization == "LayerNorm" and model.num_query_groups == 12
    assert load_model(str(tmp_path)).hidden_size == 768  # a folder, as it is downloaded


def test_what_a_config_lacks_is_named(tmp_path: Path) -> None:
    content = {key: value for key, value in LLAMA3_8B.items() if key not in ("vocab_size", "num_hidden_layers")}
    with pytest.raises(ConfigError) as caught:
        load_model(written(tmp_path, content))
    assert [problem.split(": ")[1] for problem in caught.value.problems] == ["num_layers", "vocab_size"]
    with pytest.raises(ConfigError, match="model_type 'mamba2' is not known"):
        load_model(written(tmp_path, {**LLAMA3_8B, "model_type": "mamba2"}))


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'llama3-8b'"):
        load_model("llama-3-8b")


LINE = """
torchrun --nproc_per_node 8 --nnodes=2 pretrain_gpt.py --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
  --num-attention-heads 32 --group-query-attention --num-query-groups 8 --seq-length 8192 --vocab-size 128256 --swiglu
  --max-position-embeddings 8192 --position-embedding-type rope --normalization RMSNorm --disable-bias-linear --bf16
  --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 1
  --global-batch-size 64 --tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 2
  --num-layers-per-virtual-pipeline-stage 4 --use-distributed-optimizer --lr 1e-4 --data-path /data/x
"""


def test_a_launch_line_is_read_and_written() -> None:
    job = job_of_flags(LINE)
    expected = {**load_model("llama3-8b").sizes(), "max_position_embeddings": 8192}
    assert job.model.sizes() == expected
    assert job.layout.text() == "TP 4 x PP 2 x 4 chunks x DP 2" and job.layout.world_size == 16
    assert job.num_microbatches == 32 and job.problems() == []
    again = job_of_flags([*flags_of(job), "--vocab-size", "128256", "--max-position-embeddings", "8192"], 16)
    assert again == job


@pytest.mark.parametrize(
    ("given", "split"),
    [
        ("--decoder-first-pipeline-num-layers 14", (14, 18)),
        ("--pipeline-model-parallel-layout 'Et*8|t*9|(t*5|)*2,t*3|t*2L'", (8, 9, 5, 5, 3, 2)),
        ("--num-virtual-stages-per-pipeline-rank 2 --decoder-last-pipeline-num-layers 12", (10, 6, 10, 6)),
        ("--decoder-last-pipeline-num-layers 16", ()),
    ],
)
def test_uneven_stages_are_read_and_written(given: str, split: tuple[int, ...]) -> None:
    job = job_of_flags(LINE.replace("--num-layers-per-virtual-pipeline-stage 4", given))
    assert job.layout.split == split and job.problems() == []
    words = [*flags_of(job), "--vocab-size", "128256", "--max-position-embeddings", "8192"]
    assert job_of_flags(words, 16) == job
    assert ("--pipeline-model-parallel-layout" in words) == bool(split)
    assert not (split and "--num-virtual-stages-per-pipeline-rank" in words)  # Megatron takes one of them


def test_uneven_stages_of_a_bridge_configuration_are_read(tmp_path: Path) -> None:
    path, model = tmp_path / "run.yaml", {**BRIDGE["model"], "pipeline_model_parallel_size": 2}
    stages = [["embedding", *["decoder"] * 15], ["decoder"] * 9, ["decoder"] * 5, [*["decoder"] * 3, "loss"]]
    for given, split in (
        ({"num_layers_in_first_pipeline_stage": 15}, (15, 17)),
        ({"pipeline_model_parallel_layout": stages, "virtual_pipeline_model_parallel_size": 2}, (15, 9, 5, 3)),
        ({"virtual_pipeline_model_parallel_size": 2}, ()),
    ):
        path.write_text(yaml.safe_dump({**BRIDGE, "model": {**model, **given}}), encoding="utf-8")
        layout = job_of_yaml(path, 8).layout
        assert (layout.split, layout.chunks) == (split, 2 if "virtual_pipeline_model_parallel_size" in given else 1)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "deepseek-v3", "gpt3-175b", "qwen2.5-7b"])
def test_flags_of_a_model_give_the_model_back(name: str) -> None:
    from dataclasses import replace

    job = replace(job_of_flags(LINE), model=load_model(name))
    again = job_of_flags([*flags_of(job), "--vocab-size", str(job.model.vocab_size)], 16)
    ignored = {"max_position_embeddings": 0}
    assert {**again.model.sizes(), **ignored} == {**job.model.sizes(), **ignored}


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--recompute-granularity selective",
        "--recompute-granularity selective --recompute-modules layernorm mlp",
        "--recompute-granularity full --recompute-method block --recompute-num-layers 3",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ],
)
def test_recomputation_is_in_the_flags_as_it_was_given(flags: str) -> None:
    job = job_of_flags(f"{LINE} {flags}")
    words = " ".join(flags_of(job))
    assert words.endswith(flags) and ("recompute" in words) == bool(flags)
    assert job_of_flags(f"{words} --vocab-size 128256", 16).recompute == job.recompute


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--num-layers 4", "--hidden-size: needed"),
        (LINE.replace("--vocab-size 128256", ""), "--vocab-size: needed"),
        (LINE.replace("--num-layers 32", "--num-layers x"), "argument --num-layers: invalid int value"),
        (LINE.replace("--nproc_per_node 8 --nnodes=2", "--nproc_per_node 3"), "3 ranks cannot hold .* use 8 ranks"),
        (f"{LINE} --pipeline-model-parallel-layout Et|x|tL", "'x' is none of E, t, m, L"),
        (f"{LINE} --pipeline-model-parallel-layout Et|t*30|tL", "3 stages, which 2 pipeline ranks cannot .*make it 4"),
        (f"{LINE} --decoder-last-pipeline-num-layers 13", "19 layers of a pipeline rank cannot be divided by 4 chunks"),
    ],
)
def test_a_wrong_launch_line_is_refused(line: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        job_of_flags(line)


def test_patterns_of_expert_layers() -> None:
    assert dense_layers("2", 4) == [2, 4]
    assert dense_layers("([0]*1+[1]*3)", 4) == [1]
    assert dense_layers([0, 1, 1, 1], 4) == [1]
    with pytest.raises(ConfigError, match="3 entries for 4 layers"):
        dense_layers("[1]*3", 4)
    with pytest.raises(ConfigError, match="neither a number nor a list"):
        dense_layers("__import__('os')", 4)


BRIDGE = {
    "_target_": "megatron.bridge.training.config.ConfigContainer",
    "model": {
        "_target_": "megatron.bridge.models.llama.llama_provider.Llama3ModelProvider8B",
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": None,
        "num_moe_experts": None,
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "share_embeddings_and_output_weights": False,
        "position_embedding_type": "rope",
        "vocab_size": 128256,
        "seq_length": 8192,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": True,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "sequence_parallel": True,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    },
    "train": {"micro_batch_size": 1, "global_batch_size": 16},
    "ddp": {"use_distributed_optimizer": True},
    "dataset": {"sequence_length": 16384},
}


def test_a_bridge_configuration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BRIDGE), encoding="utf-8")
    job = job_of_yaml(path, 8)
    expected = {**load_model("llama3-8b").sizes(), "max_position_embeddings": 16384}
    assert job.model.sizes() == expected
    assert (job.seq_length, job.layout.tensor, job.layout.data, job.global_batch_size) == (16384, 2, 4, 16)
    assert job.layout.sequence_parallel and job.layout.distributed_optimizer


def test_a_test_case_of_megatron_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model_config.yaml"
    args = {"--num-layers": 12, "--hidden-size": 512, "--num-attention-heads": 8, "--seq-length": 1024, "--bf16": True}
    path.write_text(yaml.safe_dump({"MODEL_ARGS": {**args, "--vocab-size": 3200}}), encoding="utf-8")
    assert job_of_yaml(path).model.ffn_hidden_size == 2048
    path.write_text("trainer: {}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="neither a Megatron-Bridge configuration"):
        job_of_yaml(path)
