"""Megatron-LM's own flags: read from a user's launch line, and written for a job that was planned.

Only what memory and time depend on is read; a launch line's other flags are passed over. Defaults are Megatron-LM's.
"""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Sequence
from typing import Any, NoReturn

from megamem.errors import ConfigError
from megamem.ir.job import Job, Layout
from megamem.ir.kernels import Kernels
from megamem.ir.model import Model
from megamem.ir.pipeline_split import Split, ends_split, layout_text, normal_split, padded_split, parse_layout

_NUMBERS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("seq_length", "max_position_embeddings", "vocab_size", "micro_batch_size", "global_batch_size"),
    *("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_shared_expert_intermediate_size"),
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "mtp_num_layers"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank", "recompute_num_layers"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
)
_SWITCHES = (
    *("group_query_attention", "swiglu", "disable_bias_linear", "add_qkv_bias", "qk_layernorm", "bf16", "fp16"),
    *("untie_embeddings_and_output_weights", "multi_latent_attention", "sequence_parallel"),
    *("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather", "recompute_activations"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    *("attention_softmax_in_fp32", "apply_query_key_layer_scaling", "no_masked_softmax_fusion", "no_rope_fusion"),
    *("no_bias_swiglu_fusion", "no_create_attention_mask_in_dataloader"),
)
# Switches that turn off what Megatron's parser keeps under another name.
_TURNED = {
    "disable_bias_linear": ("add_bias_linear",),
    "no_masked_softmax_fusion": ("masked_softmax_fusion",),
    "no_rope_fusion": ("apply_rope_fusion",),
    "no_bias_swiglu_fusion": ("bias_swiglu_fusion", "bias_activation_fusion"),
    "no_create_attention_mask_in_dataloader": ("create_attention_mask_in_dataloader", "create_attention_mask"),
}
_WORDS = (
    *("normalization", "position_embedding_type", "hidden_dropout", "attention_dropout", "moe_layer_freq"),
    *("transformer_impl", "recompute_granularity", "recompute_method", "attention_backend"),
    "pipeline_model_parallel_layout",
)
# Fields of Megatron's TransformerConfig that its flags have another name for.
_FIELDS = {
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
}
_CHUNKS = "--num-virtual-stages-per-pipeline-rank"
_LAUNCHER = re.compile(r"--(?P<name>nnodes|nproc[-_]per[-_]node)[= ](?P<count>\d+)")


def job_of_flags(line: str | Sequence[str], world_size: int | None = None) -> Job:
    """The job that a launch line of Megatron-LM starts. `world_size`: ranks, where the line has no torchrun in it.

    Raises ConfigError with every flag that is missing or wrong.
    """
    words = shlex.split(line) if isinstance(line, str) else list(line)
    found = {re.sub(r"[-_]", "", m["name"]): int(m["count"]) for m in _LAUNCHER.finditer(" ".join(words))}
    if "nprocpernode" in found:
        world_size = found["nprocpernode"] * found.get("nnodes", 1)
    args, _ = _parser().parse_known_args(words)
    needed = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size")
    if missing := [f"--{name.replace('_', '-')}" for name in needed if getattr(args, name) is None]:
        raise ConfigError([f"{flag}: needed, and not among the flags" for flag in missing])
    try:
        layout = _layout(args, world_size)
        return Job(
            model=_model(args),
            layout=layout,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size or 1,
            global_batch_size=args.global_batch_size or (args.micro_batch_size or 1) * layout.data,
            bf16=args.bf16 or args.fp16,
            spec=args.transformer_impl if args.transformer_impl == "local" else "transformer_engine",
            kernels=_kernels(args),
            overlap=args.overlap_grad_reduce,
            recompute="selective" if args.recompute_activations else args.recompute_granularity or "none",
            recompute_modules=tuple(args.recompute_modules),
            recompute_method=args.recompute_method or "uniform",
            recompute_num_layers=args.recompute_num_layers or 1,
        )
    except ValueError as fault:
        raise ConfigError(f"--from-megatron-args: {fault}") from None


def job_of_arguments(args: argparse.Namespace, world_size: int | None = None) -> Job:
    """The job of what Megatron-LM's parser has made of its flags, whatever release's. Raises ConfigError."""
    given = vars(args) | {flag: value for field, flag in _FIELDS.items() if (value := getattr(args, field, None))}
    words: list[str] = []
    for name in (*_NUMBERS, *_WORDS):
        if (value := given.get(name)) is not None:  # an enumeration by its name
            words += [f"--{name.replace('_', '-')}", str(getattr(value, "name", value)).replace(" ", "")]
    switches = {name: bool(given.get(name)) for name in _SWITCHES}
    for switch, names in _TURNED.items():
        switches[switch] = any(given.get(name) is False for name in names)
    if given.get("recompute_modules"):
        words += ["--recompute-modules", *given["recompute_modules"]]
    words += [f"--{name.replace('_', '-')}" for name, is_on in switches.items() if is_on]
    if given.get("pipeline_model_parallel_layout") is not None:
        words = _without(_without(words, "--num-layers-per-virtual-pipeline-stage"), _CHUNKS)
    elif chunks := given.get("virtual_pipeline_model_parallel_size"):
        words = _without(words, "--num-layers-per-virtual-pipeline-stage")
        words = [*_without(words, _CHUNKS), _CHUNKS, str(chunks)]
    if given.get("vocab_size") is None and given.get("padded_vocab_size") is not None:
        words += ["--vocab-size", str(given["padded_vocab_size"])]  # of a tokenizer
    return job_of_flags(words, given.get("world_size") or world_size)


def _without(words: Sequence[str], flag: str) -> list[str]:
    """The words without a flag and its value."""
    place = words.index(flag) if flag in words else len(words)
    return [*words[:place], *words[place + 2 :]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"--from-megatron-args: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(allow_abbrev=False, add_help=False)
    for name in _NUMBERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in _SWITCHES:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    parser.add_argument("--normalization", default="LayerNorm")
    parser.add_argument("--position-embedding-type", default="learned_absolute")
    parser.add_argument("--hidden-dropout", type=float, default=0.1)
    parser.add_argument("--attention-dropout", type=float, default=0.1)
    parser.add_argument("--moe-layer-freq", default="1")
    parser.add_argument("--transformer-impl", default="transformer_engine")
    parser.add_argument("--recompute-granularity")
    parser.add_argument("--pipeline-model-parallel-layout")
    parser.add_argument("--recompute-method")
    parser.add_argument("--recompute-modules", nargs="*", default=["core_attn"])
    parser.add_argument("--attention-backend", default="auto")
    return parser


def _kernels(args: argparse.Namespace) -> Kernels:
    """On a GPU. Megatron-Core's local attention is always unfused, Transformer Engine's where it is told to be."""
    is_local = args.transformer_impl == "local"
    is_fp32 = args.attention_softmax_in_fp32 or args.apply_query_key_layer_scaling
    return Kernels(
        attention="unfused" if is_local or args.attention_backend == "unfused" else "flash",
        fused_softmax=not (is_local and args.no_masked_softmax_fusion),
        softmax_fp32=is_fp32 if is_local else args.attention_backend == "unfused",
        mask=is_local and not args.no_create_attention_mask_in_dataloader,
        fused_activation=not args.no_bias_swiglu_fusion,
        fused_rope=not args.no_rope_fusion,
    )


def _model(args: argparse.Namespace) -> Model:
    from megamem.planner.models.presets import make_model

    heads, hidden = args.num_attention_heads, args.hidden_size
    sizes: dict[str, Any] = {
        "num_layers": args.num_layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": (args.num_query_groups or 1) if args.group_query_attention else heads,
        "ffn_hidden_size": args.ffn_hidden_size or (int(4 * hidden * 2 / 3) // 64 * 64 if args.swiglu else 4 * hidden),
        "vocab_size": args.vocab_size,
        "swiglu": args.swiglu,
        "normalization": args.normalization,
        "add_bias_linear": not args.disable_bias_linear,
        "add_qkv_bias": args.add_qkv_bias,
        "qk_layernorm": args.qk_layernorm,
        "position": {"learned_absolute": "learned_absolute", "none": "none"}.get(args.position_embedding_type, "rope"),
        "max_position_embeddings": args.max_position_embeddings or args.seq_length,
        "share_embeddings": not args.untie_embeddings_and_output_weights,
        "hidden_dropout": args.hidden_dropout,
        "attention_dropout": args.attention_dropout,
        "mtp_num_layers": args.mtp_num_layers or 0,
    }
    if args.kv_channels:
        sizes["kv_channels"] = args.kv_channels
    if args.multi_latent_attention:
        sizes["num_query_groups"] = heads
        sizes["latent"] = {
            "kv_lora_rank": args.kv_lora_rank or 32,
            "qk_head_dim": args.qk_head_dim or 128,
            "qk_pos_emb_head_dim": args.qk_pos_emb_head_dim or 64,
            "v_head_dim": args.v_head_dim or 128,
            **({"q_lora_rank": args.q_lora_rank} if args.q_lora_rank else {}),
        }
    if args.num_experts:
        sizes["experts"] = {
            "num_experts": args.num_experts,
            "topk": args.moe_router_topk or 2,
            "ffn_hidden_size": args.moe_ffn_hidden_size or sizes["ffn_hidden_size"],
            "shared_ffn_hidden_size": args.moe_shared_expert_intermediate_size or 0,
            "dense_layers": dense_layers(args.moe_layer_freq, args.num_layers),
        }
    return make_model(sizes, "--from-megatron-args")


def dense_layers(pattern: object, num_layers: int) -> list[int]:
    """The numbers of the layers without experts, from Megatron's `moe_layer_freq`: every n-th, or a list of 0 and 1."""
    text = str(pattern).strip()
    if not re.fullmatch(r"[\[\]()0-9*+, ]+", text):
        raise ConfigError(f"--moe-layer-freq {pattern}: neither a number nor a list such as [0]*3+[1]*58")
    value = _evaluate(ast.parse(text, mode="eval").body)
    flags = [int(index % value == 0) for index in range(num_layers)] if isinstance(value, int) else list(value)
    if len(flags) != num_layers:
        raise ConfigError(f"--moe-layer-freq {pattern}: {len(flags)} entries for {num_layers} layers")
    return [number for number, flag in enumerate(flags, start=1) if not flag]


def _evaluate(node: ast.expr) -> Any:
    """Numbers, lists, sums and products of them: the little language of `moe_layer_freq`."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_evaluate(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _evaluate(node.left), _evaluate(node.right)
        return left + right if isinstance(node.op, ast.Add) else left * right
    raise ConfigError("--moe-layer-freq: neither a number nor a list such as [0]*3+[1]*58")


def _layout(args: argparse.Namespace, world_size: int | None) -> Layout:
    tensor, pipeline = args.tensor_model_parallel_size or 1, args.pipeline_model_parallel_size or 1
    context, chunks = args.context_parallel_size or 1, args.num_virtual_stages_per_pipeline_rank or 1
    if args.num_layers_per_virtual_pipeline_stage:
        chunks = args.num_layers // pipeline // args.num_layers_per_virtual_pipeline_stage
    split = split_of_flags(args, pipeline, max(1, chunks))
    if args.pipeline_model_parallel_layout:
        chunks, over = divmod(len(split), pipeline)
        if over:
            raise ConfigError(
                f"--pipeline-model-parallel-layout has {len(split)} stages, which {pipeline} pipeline ranks cannot "
                f"share; make it {pipeline * max(1, round(len(split) / pipeline))}"
            )
    unit = tensor * pipeline * context
    if world_size is not None and world_size % unit:
        raise ConfigError(
            f"{world_size} ranks cannot hold tensor {tensor} x pipeline {pipeline} x context {context} = {unit}; "
            f"use {max(1, round(world_size / unit)) * unit} ranks"
        )
    return Layout(
        tensor=tensor,
        sequence_parallel=args.sequence_parallel and tensor > 1,
        context=context,
        pipeline=pipeline,
        chunks=max(1, chunks),
        expert=args.expert_model_parallel_size or 1,
        expert_tensor=args.expert_tensor_parallel_size or 0,
        data=1 if world_size is None else world_size // unit,
        distributed_optimizer=args.use_distributed_optimizer,
        split=normal_split(split),
    )


def split_of_flags(args: argparse.Namespace, pipeline: int, chunks: int) -> Split:
    """Layers of every stage by Megatron-LM's arguments, those that are there; empty where none says anything of them.

    Raises ValueError where the layers do not divide so.
    """
    first, last = (getattr(args, f"decoder_{end}_pipeline_num_layers", None) for end in ("first", "last"))
    embedding, loss = (
        bool(getattr(args, f"account_for_{end}_in_pipeline_split", False)) for end in ("embedding", "loss")
    )
    if layout := getattr(args, "pipeline_model_parallel_layout", None):
        return parse_layout(layout)
    if first is not None or last is not None:
        return ends_split(args.num_layers, pipeline, chunks, first=first, last=last)
    if embedding or loss:
        return padded_split(args.num_layers, pipeline, chunks, embedding=embedding, loss=loss)
    return ()


def flags_of(job: Job) -> list[str]:
    """The flags of Megatron-LM that start this job; those at Megatron's default are left out."""
    model, layout = job.model, job.layout
    values: list[tuple[str, object]] = [
        ("--num-layers", model.num_layers),
        ("--hidden-size", model.hidden_size),
        ("--ffn-hidden-size", model.ffn_hidden_size),
        ("--num-attention-heads", model.num_attention_heads),
        ("--seq-length", job.seq_length),
        ("--micro-batch-size", job.micro_batch_size),
        ("--global-batch-size", job.global_batch_size),
        ("--normalization", model.normalization),
        ("--position-embedding-type", model.position),
        ("--hidden-dropout", model.hidden_dropout),
        ("--attention-dropout", model.attention_dropout),
        ("--transformer-impl", job.spec),
    ]
    if model.latent is None and model.num_query_groups != model.num_attention_heads:
        values += [("--group-query-attention", True), ("--num-query-groups", model.num_query_groups)]
    if model.position == "learned_absolute":
        values.append(("--max-position-embeddings", max(job.seq_length, model.max_position_embeddings)))
    if model.kv_channels * model.num_attention_heads != model.hidden_size:
        values.append(("--kv-channels", model.kv_channels))
    values += [
        ("--swiglu", model.swiglu),
        ("--disable-bias-linear", not model.add_bias_linear),
        ("--add-qkv-bias", model.add_qkv_bias),
        ("--qk-layernorm", model.qk_layernorm),
        ("--untie-embeddings-and-output-weights", not model.share_embeddings),
        ("--bf16", job.bf16),
        ("--sequence-parallel", layout.sequence_parallel),
        ("--use-distributed-optimizer", layout.distributed_optimizer),
        ("--overlap-grad-reduce", job.overlap),
        ("--overlap-param-gather", job.overlap and layout.distributed_optimizer),
        *_sizes(job),
        *_special(model),
        *_of_kernels(job),
        *_of_recomputation(job),
    ]
    return [
        word
        for flag, value in values
        for word in ([flag] if value is True else [flag, str(value)])
        if value is not False
    ]


def _sizes(job: Job) -> list[tuple[str, object]]:
    """Flags of the layout's sizes. A layout of stages says how many chunks there are, and Megatron wants it once."""
    layout = job.layout
    values: list[tuple[str, object]] = [
        (flag, getattr(layout, name))
        for name, flag in Layout.FLAGS.items()
        if getattr(layout, name) > 1 and not (layout.split and name == "chunks")
    ]
    if layout.split:
        values.append(("--pipeline-model-parallel-layout", layout_text(layout.split, job.model.mtp_num_layers)))
    return values


def _of_recomputation(job: Job) -> list[tuple[str, object]]:
    """Megatron's own. Which modules are run again is said where they are not the default."""
    if job.recompute == "none":
        return []
    values: list[tuple[str, object]] = [("--recompute-granularity", job.recompute)]
    if job.recompute == "full":
        values.append(("--recompute-method", job.recompute_method))
        values.append(("--recompute-num-layers", job.recompute_num_layers))
    elif job.recompute_modules != ("core_attn",):
        values += [
            ("--recompute-modules", job.recompute_modules[0]),
            *((word, True) for word in job.recompute_modules[1:]),
        ]
    return values


def _of_kernels(job: Job) -> list[tuple[str, object]]:
    kernels, is_local = job.kernels, job.spec == "local"
    is_unfused = is_local and kernels.is_unfused
    return [
        ("--attention-backend", "unfused" if kernels.is_unfused and not is_local else False),
        ("--no-masked-softmax-fusion", is_unfused and not kernels.fused_softmax),
        ("--attention-softmax-in-fp32", is_unfused and kernels.softmax_fp32),
        ("--no-create-attention-mask-in-dataloader", is_unfused and not kernels.mask),
        ("--no-bias-swiglu-fusion", job.model.swiglu and not kernels.fused_activation),
        ("--no-rope-fusion", job.model.position == "rope" and not kernels.fused_rope),
    ]


def _special(model: Model) -> list[tuple[str, object]]:
    """Flags of experts, latent attention and multi-token prediction."""
    values: list[tuple[str, object]] = []
    if model.experts is not None:
        experts, dense = model.experts, set(model.experts.dense_layers)
        values += [("--num-experts", experts.num_experts), ("--moe-router-topk", experts.topk)]
        if experts.ffn_hidden_size != model.ffn_hidden_size:
            values.append(("--moe-ffn-hidden-size", experts.ffn_hidden_size))
        if experts.shared_ffn_hidden_size:
            values.append(("--moe-shared-expert-intermediate-size", experts.shared_ffn_hidden_size))
        if dense:
            pattern = [int(number not in dense) for number in range(1, model.num_layers + 1)]
            values.append(("--moe-layer-freq", str(pattern).replace(" ", "")))
    if model.latent is not None:
        values.append(("--multi-latent-attention", True))
        values += [
            (f"--{name.replace('_', '-')}", size) for name, size in vars(model.latent).items() if size is not None
        ]
    if model.mtp_num_layers:
        values.append(("--mtp-num-layers", model.mtp_num_layers))
    return values
