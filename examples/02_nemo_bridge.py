"""megamem in a NeMo (Megatron-Bridge) script: a `megamem:` section in the configuration, and one line, `attach`.

torchrun --nproc-per-node 2 examples/02_nemo_bridge.py --config-file examples/recipes/nemo_bridge.yaml
torchrun ... examples/02_nemo_bridge.py --config-file ... megamem.schedule.name=off train.train_iters=5

Without GPUs: torchrun --nproc-per-node 2 -m megamem.testing examples/02_nemo_bridge.py ...

Instead of the line, for scripts that you cannot change: torchrun ... -m megamem run SCRIPT --config-file ...
"""

import argparse
import dataclasses

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
from megatron.bridge.training import config
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.tokenizers.config import TokenizerConfig
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

from megamem.integrations import bridge


def recipe(**model: object) -> config.ConfigContainer:
    """A tiny GPT on two pipeline ranks, made-up data; any of Bridge's recipes will do as well."""
    cuda_only = ("gradient_accumulation_fusion", "bias_dropout_fusion", "bias_activation_fusion", "apply_rope_fusion")
    cuda_only += ("masked_softmax_fusion", "cross_entropy_loss_fusion", "persist_layer_norm")
    sizes = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "seq_length": 64}
    parallel = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}
    settings = {
        "vocab_size": 128,
        "transformer_layer_spec": local_layer_spec,
        "transformer_impl": "local",
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **dict.fromkeys(cuda_only, False),
    }
    evaluation = {"eval_iters": 0, "eval_interval": 1000}
    separate = hasattr(config, "ValidationConfig")  # a section of its own since 0.4
    return config.ConfigContainer(
        model=GPTModelProvider(**{**sizes, **parallel, **settings, **model}),
        train=config.TrainingConfig(
            train_iters=3, global_batch_size=8, micro_batch_size=2, **({} if separate else evaluation)
        ),
        **({"validation": config.ValidationConfig(**evaluation)} if separate else {}),
        optimizer=config.OptimizerConfig(optimizer="adam", lr=1e-2, min_lr=1e-3),
        scheduler=config.SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            start_weight_decay=0.01,
            end_weight_decay=0.01,
            weight_decay_incr_style="constant",
            override_opt_param_scheduler=True,
        ),
        ddp=config.DistributedDataParallelConfig(check_for_nan_in_grad=False),
        dataset=_dataset(),
        logger=config.LoggerConfig(log_interval=1),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=127),
        checkpoint=config.CheckpointConfig(),
        dist=config.DistributedInitConfig(disable_jit_fuser=True),
    )


def _dataset() -> config.MockGPTDatasetConfig:
    wanted = {
        "seq_length": 64,
        "random_seed": 1,
        "num_dataset_builder_threads": 1,
        "dataloader_type": "single",
        "num_workers": 0,
        "persistent_workers": False,
        "pin_memory": False,
        **dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), False),
    }
    known = {field.name for field in dataclasses.fields(config.MockGPTDatasetConfig)} | {"seq_length"}
    return config.MockGPTDatasetConfig(**{name: value for name, value in wanted.items() if name in known})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pretrain a tiny GPT with Megatron-Bridge and megamem.")
    parser.add_argument("--config-file", help="YAML over the recipe; its megamem: section too")
    arguments, overrides = parser.parse_known_args()
    cfg = recipe()
    watcher = bridge.attach(cfg)  # before files and overrides are merged; or attach(cfg, "megamem.yaml")
    cfg = process_config_with_overrides(cfg, arguments.config_file, overrides)
    pretrain(cfg, forward_step, callbacks=[watcher])
