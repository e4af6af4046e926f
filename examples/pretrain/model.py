"""GPTModel in Megatron's DistributedDataParallel, its optimizer and its learning-rate schedule."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megamem.integrations.local_spec import last_layer_stage, local_layer_spec


@dataclass
class Training:
    """Everything that a step changes."""

    config: TransformerConfig
    chunks: list[Any]  # one DistributedDataParallel per virtual pipeline stage of this rank
    optimizer: Any
    scheduler: OptimizerParamScheduler
    iteration: int = 0
    consumed: int = 0


def transformer_config(args: argparse.Namespace) -> TransformerConfig:
    """Megatron's model configuration from the flags."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    wanted = {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "ffn_hidden_size": args.ffn_hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "num_query_groups": args.kv_heads,
        "normalization": args.normalization,
        "qk_layernorm": args.qk_layernorm,
        "gated_linear_unit": args.swiglu,
        "activation_func": torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        "add_bias_linear": not args.disable_bias_linear,
        "attention_dropout": args.attention_dropout,
        "hidden_dropout": args.hidden_dropout,
        "init_method_std": args.init_method_std,
        "bf16": args.bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "use_cpu_initialization": args.on_cpu,
        **_fusions(args),
        **_parallelism(args),
        **_recompute(args),
        **_experts(args),
        "mtp_num_layers": args.mtp_num_layers,
        "mtp_loss_scaling_factor": args.mtp_loss_scaling_factor,
    }
    return TransformerConfig(**wanted)


def _fusions(args: argparse.Namespace) -> dict[str, Any]:
    """Fused kernels of apex and of torch.compile are off: what runs here has to be the same everywhere."""
    return {
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
    }


def _parallelism(args: argparse.Namespace) -> dict[str, Any]:
    interleaved = args.virtual_stages is not None and not args.no_overlap_p2p_communication
    return {
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": args.virtual_stages,
        "num_layers_in_first_pipeline_stage": args.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": args.decoder_last_pipeline_num_layers,
        "pipeline_model_parallel_layout": args.pipeline_model_parallel_layout,
        "context_parallel_size": args.context_parallel_size,
        "expert_model_parallel_size": args.expert_model_parallel_size,
        "sequence_parallel": args.sequence_parallel,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # Freed at once, an output may be gone before gloo has sent it; NCCL's sends are ordered by the stream.
        "deallocate_pipeline_outputs": not (args.on_cpu and interleaved),
    }


def _recompute(args: argparse.Namespace) -> dict[str, Any]:
    if args.recompute_granularity is None:
        return {}
    if args.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": args.recompute_modules}
    return {
        "recompute_granularity": "full",
        "recompute_method": args.recompute_method,
        "recompute_num_layers": args.recompute_num_layers,
    }


def _experts(args: argparse.Namespace) -> dict[str, Any]:
    if args.num_experts is None:
        return {}
    # gloo has no all-to-all between unequal parts in all the versions of PyTorch that we run on.
    dispatcher = args.moe_token_dispatcher_type or ("allgather" if args.on_cpu else "alltoall")
    return {
        "num_moe_experts": args.num_experts,
        "moe_router_topk": args.moe_router_topk,
        "moe_layer_freq": args.moe_layer_freq,
        "moe_aux_loss_coeff": args.moe_aux_loss_coeff,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_token_dispatcher_type": dispatcher,
        "moe_ffn_hidden_size": args.ffn_hidden_size,
    }


def _layer_spec(
    args: argparse.Namespace, config: TransformerConfig, vp_stage: int | None, pp_rank: int | None = None
) -> Any:
    if args.transformer_impl == "local":
        return local_layer_spec(config, vp_stage=vp_stage, pp_rank=pp_rank)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage, pp_rank=pp_rank)


def _prediction_spec(args: argparse.Namespace, config: TransformerConfig, layers: Any, vp_stage: int | None) -> Any:
    """Multi-token prediction, in the last stage; None elsewhere."""
    if args.mtp_num_layers is None:
        return None
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    if not layers.layer_specs:  # Megatron copies the stage's last layer; a stage without layers copies the model's
        rank, chunk = last_layer_stage(config)
        layers = _layer_spec(args, config, chunk, rank)
    return get_gpt_mtp_block_spec(config, layers, args.transformer_impl != "local", vp_stage=vp_stage)


def _build_chunk(args: argparse.Namespace, config: TransformerConfig, stage: int | None) -> Any:
    """The part of the model that belongs to one virtual pipeline stage of this rank.

    Under a V placement megamem corrects `pre_process` and `post_process`, which follow from Megatron's own placement.
    """
    last = (args.virtual_stages or 1) - 1
    layers = _layer_spec(args, config, stage)
    model = GPTModel(
        config,
        layers,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=True) and (stage or 0) == 0,
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=True) and (stage or 0) == last,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        mtp_block_spec=_prediction_spec(args, config, layers, stage),
        vp_stage=stage,
    )
    for parameter in model.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if not args.on_cpu:
        model.cuda(torch.cuda.current_device())
    return Float16Module(config, model) if args.bf16 else model


def _wrap(args: argparse.Namespace, config: TransformerConfig, chunks: list[Any]) -> list[Any]:
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=args.bf16,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        use_distributed_optimizer=args.use_distributed_optimizer,
        check_for_nan_in_grad=True,
        bucket_size=max(40_000_000, 1_000_000 * args.data_parallel_size) if args.overlap_grad_reduce else None,
    )
    # Only the first chunk's gradients wait for the end of the backward pass; the others need no buckets to overlap.
    return [
        DistributedDataParallel(config=config, ddp_config=ddp, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_training(
    args: argparse.Namespace, building: Callable[[int], AbstractContextManager[None]] = lambda chunk: nullcontext()
) -> Training:
    """Model, optimizer and schedule, freshly initialised from the current seeds.

    `building(chunk)` surrounds what is built for a chunk: layer specs too must see where megamem places it.
    """
    config = transformer_config(args)
    stages: list[int | None] = [None] if args.virtual_stages is None else list(range(args.virtual_stages))
    parts = []
    for stage in stages:
        with building(stage or 0):
            parts.append(_build_chunk(args, config, stage))
    chunks = _wrap(args, config, parts)
    optimizer = get_megatron_optimizer(_optimizer_config(args), chunks)
    samples = args.global_batch_size
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters * samples,
        lr_decay_steps=args.lr_decay_iters * samples,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=args.train_iters * samples,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    _connect(args, config, chunks, optimizer)
    return Training(config, chunks, optimizer, scheduler)


def _optimizer_config(args: argparse.Namespace) -> OptimizerConfig:
    wanted = {
        "optimizer": "adam",
        "lr": args.lr,
        "min_lr": args.min_lr,
        "weight_decay": args.weight_decay,
        "clip_grad": args.clip_grad,
        "adam_beta1": args.adam_beta1,
        "adam_beta2": args.adam_beta2,
        "bf16": args.bf16,
        "params_dtype": torch.bfloat16 if args.bf16 else torch.float32,
        "use_distributed_optimizer": args.use_distributed_optimizer,
        "overlap_param_gather": args.overlap_param_gather,
    }
    known = {field.name for field in fields(OptimizerConfig)}
    return OptimizerConfig(**{name: value for name, value in wanted.items() if name in known})


def _connect(args: argparse.Namespace, config: TransformerConfig, chunks: list[Any], optimizer: Any) -> None:
    """Tell Megatron's schedules how to scale the loss and when to reduce gradients."""

    def one_or_all(functions: list[Any]) -> Any:
        return functions[0] if len(functions) == 1 else functions

    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        config.no_sync_func = one_or_all([chunk.no_sync for chunk in chunks])
    if args.overlap_param_gather:
        config.param_sync_func = one_or_all([chunk.start_param_sync for chunk in chunks])
