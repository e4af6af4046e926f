"""The flags of the training script, named as Megatron-LM names them, and everything that contradicts everything else.

Nothing here imports torch, so `--help` and mistakes answer before a process group, or even PyTorch, is loaded.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import megamem.config
from megamem.config import Config
from megamem.deciding import undecided
from megamem.errors import ConfigError, MegamemError
from megamem.host import resolve_host_memory
from megamem.ir.pipeline_split import normal_split
from megamem.planner.hardware import load_hardware, row_of_device
from megamem.planner.joint.decide import decide
from megamem.planner.models.flags import job_of_arguments
from pretrain.pipeline import divide_layers, plan_pipeline, split_problems

BYTE_VOCABULARY = 257  # 256 bytes and the end of a document


def build_parser() -> argparse.ArgumentParser:
    """All flags, in groups."""
    parser = argparse.ArgumentParser(
        prog="pretrain_gpt.py",
        description="Pretrain a GPT on Megatron-Core, with or without megamem, on GPUs or on CPUs.",
        allow_abbrev=False,
    )
    _add_model(parser)
    _add_parallelism(parser)
    _add_training(parser)
    _add_data(parser)
    _add_checkpointing(parser)
    _add_reporting(parser)
    megamem.config.add_arguments(parser)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--num-layers", type=int, default=4)
    group.add_argument("--hidden-size", type=int, default=256)
    group.add_argument("--ffn-hidden-size", type=int, help="default: 4 h, or 8/3 h with --swiglu")
    group.add_argument("--num-attention-heads", type=int, default=8)
    group.add_argument("--group-query-attention", action="store_true")
    group.add_argument("--num-query-groups", type=int, help="key-value heads, with --group-query-attention")
    group.add_argument("--seq-length", type=int, default=512)
    group.add_argument("--swiglu", action="store_true", help="gated SiLU instead of GELU")
    group.add_argument("--normalization", choices=("LayerNorm", "RMSNorm"), default="LayerNorm")
    group.add_argument("--qk-layernorm", action="store_true")
    group.add_argument("--disable-bias-linear", action="store_true")
    group.add_argument("--position-embedding-type", choices=("learned_absolute", "rope", "none"), default="rope")
    group.add_argument("--rotary-base", type=int, default=10000)
    group.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    group.add_argument("--attention-dropout", type=float, default=0.0)
    group.add_argument("--hidden-dropout", type=float, default=0.0)
    group.add_argument("--init-method-std", type=float, default=0.02)
    group.add_argument("--num-experts", type=int, help="make the MLPs mixtures of this many experts")
    group.add_argument("--moe-router-topk", type=int, default=2)
    group.add_argument("--moe-layer-freq", type=int, default=1, help="every n-th layer is an MoE layer")
    group.add_argument("--moe-aux-loss-coeff", type=float, default=0.01)
    group.add_argument("--moe-token-dispatcher-type", choices=("allgather", "alltoall"))
    group.add_argument("--mtp-num-layers", type=int, metavar="N", help="predict N more tokens behind the next one")
    group.add_argument("--mtp-loss-scaling-factor", type=float, default=0.1, help="weight of their mean loss")
    group.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="local")
    group.add_argument("--bf16", action="store_true", help="default: fp32")
    group.add_argument("--recompute-granularity", choices=("full", "selective"), help="Megatron's own recomputation")
    group.add_argument("--recompute-method", choices=("uniform", "block"), default="uniform")
    group.add_argument("--recompute-num-layers", type=int, default=1)
    group.add_argument("--recompute-modules", nargs="+", default=["core_attn"])


def _add_parallelism(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parallelism")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1)
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    group.add_argument("--num-layers-per-virtual-pipeline-stage", type=int, help="interleaved pipeline schedule")
    group.add_argument("--num-virtual-stages-per-pipeline-rank", type=int, help="the same, said the other way")
    group.add_argument("--decoder-first-pipeline-num-layers", type=int, help="of the first pipeline rank")
    group.add_argument("--decoder-last-pipeline-num-layers", type=int, help="of the last pipeline rank")
    group.add_argument("--pipeline-model-parallel-layout", metavar="LAYOUT", help="layers of each stage: Et*3|t*4|t*2L")
    group.add_argument("--no-overlap-p2p-communication", action="store_true")
    group.add_argument("--sequence-parallel", action="store_true")
    group.add_argument("--context-parallel-size", type=int, default=1)
    group.add_argument("--expert-model-parallel-size", type=int, default=1)
    group.add_argument("--use-distributed-optimizer", action="store_true")
    group.add_argument("--overlap-grad-reduce", action="store_true")
    group.add_argument("--overlap-param-gather", action="store_true")
    group.add_argument("--distributed-timeout-minutes", type=float, default=10, help="when a peer is given up")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: GPUs if there are any")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--micro-batch-size", type=int, default=1)
    group.add_argument("--global-batch-size", type=int, help="default: one microbatch per data-parallel rank")
    group.add_argument("--train-iters", type=int, default=100)
    group.add_argument("--lr", type=float, default=1e-3)
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument(
        "--lr-decay-style", choices=("constant", "linear", "cosine", "inverse-square-root"), default="cosine"
    )
    group.add_argument("--lr-decay-iters", type=int, help="default: --train-iters")
    group.add_argument("--lr-warmup-iters", type=int, default=0)
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--clip-grad", type=float, default=1.0)
    group.add_argument("--adam-beta1", type=float, default=0.9)
    group.add_argument("--adam-beta2", type=float, default=0.95)
    group.add_argument("--seed", type=int, default=1234)
    group.add_argument("--eval-interval", type=int, help="evaluate every so many iterations; default: only at the end")
    group.add_argument("--eval-iters", type=int, default=0, help="global batches per evaluation; 0: no evaluation")


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data (one of the first two)")
    group.add_argument("--data-text", type=Path, metavar="FOLDER", help="train on the text files under a folder")
    group.add_argument("--data-path", metavar="PREFIX", help="a Megatron indexed dataset: PREFIX.bin and PREFIX.idx")
    group.add_argument("--data-cache-path", type=Path, default=Path(".cache/data"))
    group.add_argument("--split", default="95,5", help="weights of training and validation documents")
    group.add_argument(
        "--vocab-size", type=int, default=BYTE_VOCABULARY, help="of --data-path; 257 is bytes and an end"
    )
    group.add_argument("--make-vocab-size-divisible-by", type=int, default=128)


def _add_checkpointing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--save", type=Path, metavar="FOLDER", help="save at the end, and when interrupted")
    group.add_argument("--load", type=Path, metavar="FOLDER", help="resume; start afresh if there is no checkpoint yet")
    group.add_argument("--save-interval", type=int, help="also save every so many iterations")
    group.add_argument("--async-save", action="store_true", help="train on while the checkpoint is written")


def _add_reporting(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reporting")
    group.add_argument("--log-interval", type=int, default=1, help="iterations per printed line, off a terminal")
    group.add_argument("--tensorboard-dir", type=Path)
    group.add_argument("--log-json", type=Path, metavar="FILE", help="one JSON record per iteration and a summary")
    group.add_argument("--peak-tflops", type=float, help="per device, for MFU; known for common GPUs in bf16")
    group.add_argument("--compare", action="store_true", help="train twice, first without megamem, and compare")
    group.add_argument("--compare-tolerance", type=float, default=1e-5, help="relative, of every iteration's loss")


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """The checked flags and megamem's configuration. Exits with a line per mistake."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    problems: list[str] = []
    config = Config()
    try:
        config = megamem.config.config_from_args(args)
    except ConfigError as error:
        problems += error.problems
    _complete(args)
    problems += [*_shape_problems(args), *_parallel_problems(args), *_pipeline_problems(args, config)]
    problems += [*_batch_problems(args), *_file_problems(args), *_compare_problems(args, config)]
    if not problems:
        problems += plan_pipeline(args, config)
    if not problems:
        config = _decided(args, config, problems)
    if not problems:
        problems += _plan_problems(args, config)
    if problems:
        # All ranks see the same flags; one of them says so.
        text = "\n".join(f"pretrain_gpt.py: error: {problem}" for problem in problems)
        raise SystemExit(text if os.environ.get("RANK", "0") == "0" else 2)
    return args, config


def _complete(args: argparse.Namespace) -> None:
    """Fill in what follows from other flags, as Megatron does."""
    if args.ffn_hidden_size is None:
        wide = 4 * args.hidden_size
        args.ffn_hidden_size = (wide * 2 // 3 + 63) // 64 * 64 if args.swiglu else wide
    args.model_parallel = (
        args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    )
    args.data_parallel_size = max(1, args.world_size // max(1, args.model_parallel))
    if args.global_batch_size is None:
        args.global_batch_size = args.micro_batch_size * args.data_parallel_size
    args.num_microbatches = args.global_batch_size // max(1, args.micro_batch_size * args.data_parallel_size)
    layers = args.num_layers // max(1, args.pipeline_model_parallel_size)
    args.virtual_stages = None
    if args.num_virtual_stages_per_pipeline_rank is not None:
        args.virtual_stages = args.num_virtual_stages_per_pipeline_rank
    elif args.num_layers_per_virtual_pipeline_stage is not None:
        args.virtual_stages = layers // max(1, args.num_layers_per_virtual_pipeline_stage)
    divide_layers(args)
    if args.virtual_stages == 1:
        args.virtual_stages = None
    if not args.group_query_attention:
        args.kv_heads = args.num_attention_heads
    else:
        args.kv_heads = args.num_query_groups or 1
    unit = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    args.padded_vocab_size = -(-args.vocab_size // max(1, unit)) * unit
    if args.lr_decay_iters is None:
        args.lr_decay_iters = args.train_iters


def _shape_problems(args: argparse.Namespace) -> list[str]:
    heads, tp = args.num_attention_heads, args.tensor_model_parallel_size
    numbers = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size", "train_iters")
    small = [
        name
        for name in (*numbers, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        if vars(args)[name] < 1
    ]
    if small:
        return [f"--{name.replace('_', '-')} must be at least 1" for name in small]
    problems = []
    if args.mtp_num_layers is not None and args.mtp_num_layers < 1:
        problems.append(f"--mtp-num-layers {args.mtp_num_layers}: leave it out for none")
    if args.hidden_size % heads:
        problems.append(f"--hidden-size {args.hidden_size} is not divisible by --num-attention-heads {heads}")
    if heads % tp:
        problems.append(f"--num-attention-heads {heads} is not divisible by --tensor-model-parallel-size {tp}")
    if args.ffn_hidden_size % tp:
        problems.append(
            f"--ffn-hidden-size {args.ffn_hidden_size} is not divisible by --tensor-model-parallel-size {tp}"
        )
    if args.num_query_groups is not None and not args.group_query_attention:
        problems.append("--num-query-groups needs --group-query-attention")
    if heads % args.kv_heads:
        problems.append(f"--num-attention-heads {heads} is not divisible by --num-query-groups {args.kv_heads}")
    if args.kv_heads % tp:
        problems.append(f"--num-query-groups {args.kv_heads} is not divisible by --tensor-model-parallel-size {tp}")
    if args.num_experts is None and args.expert_model_parallel_size > 1:
        problems.append("--expert-model-parallel-size needs --num-experts")
    if args.num_experts is not None and args.num_experts % args.expert_model_parallel_size:
        problems.append(
            f"--num-experts {args.num_experts} is not divisible by "
            f"--expert-model-parallel-size {args.expert_model_parallel_size}"
        )
    if args.num_experts is not None and not args.disable_bias_linear and args.transformer_impl == "local":
        problems.append("--num-experts needs --disable-bias-linear: Megatron's local experts add theirs in place")
    if args.num_experts is not None and args.moe_router_topk > args.num_experts:
        problems.append(f"--moe-router-topk {args.moe_router_topk} is more than --num-experts {args.num_experts}")
    return problems


def _parallel_problems(args: argparse.Namespace) -> list[str]:
    tp, cp, world = args.tensor_model_parallel_size, args.context_parallel_size, args.world_size
    problems = []
    if world % args.model_parallel:
        problems.append(
            f"{world} ranks cannot hold tensor {tp} x pipeline {args.pipeline_model_parallel_size} x context {cp} "
            f"= {args.model_parallel} of them; start a multiple of {args.model_parallel} with torchrun"
        )
    if args.data_parallel_size * cp % args.expert_model_parallel_size:
        problems.append(
            f"--expert-model-parallel-size {args.expert_model_parallel_size} does not divide the "
            f"{args.data_parallel_size * cp} data-parallel ranks"
        )
    if args.sequence_parallel and tp == 1:
        problems.append("--sequence-parallel needs --tensor-model-parallel-size of 2 or more")
    if args.sequence_parallel and args.seq_length % (tp * cp):
        problems.append(f"--seq-length {args.seq_length} is not divisible by tensor x context parallel {tp * cp}")
    if args.num_experts is not None and tp > 1 and not args.sequence_parallel:
        problems.append("--num-experts with tensor parallelism needs --sequence-parallel")
    if cp > 1 and args.transformer_impl != "transformer_engine":
        problems.append("--context-parallel-size above 1 needs --transformer-impl transformer_engine")
    if args.overlap_param_gather and not (args.use_distributed_optimizer and args.overlap_grad_reduce):
        problems.append("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")
    return problems


def _pipeline_problems(args: argparse.Namespace, config: Config) -> list[str]:
    pp, stages = args.pipeline_model_parallel_size, args.virtual_stages or 1
    problems = []
    uses_stock_schedule = args.compare or not config.schedule.is_on
    if args.num_layers_per_virtual_pipeline_stage and args.num_virtual_stages_per_pipeline_rank:
        problems.append(
            "give one of --num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank"
        )
    per_stage = args.num_layers_per_virtual_pipeline_stage
    if args.has_split:
        problems += split_problems(args)
    elif args.num_layers % (pp * stages):
        problems.append(
            f"--num-layers {args.num_layers} is not divisible by the {pp} pipeline stages x {stages} virtual stages"
        )
    elif per_stage and args.num_layers // pp % per_stage:
        problems.append(
            f"{args.num_layers // pp} layers a pipeline rank are not divisible by virtual stages of {per_stage}"
        )
    if args.mtp_num_layers and pp > 1 and not args.untie_embeddings_and_output_weights and (args.save or args.compare):
        problems.append(
            "Megatron-Core cannot save tied embeddings with --mtp-num-layers in a pipeline; add "
            "--untie-embeddings-and-output-weights"
        )
    if stages > 1 and pp == 1:
        problems.append("virtual pipeline stages need --pipeline-model-parallel-size of 2 or more")
    if uses_stock_schedule and stages > 1 and pp == 2 and args.no_overlap_p2p_communication:
        problems.append(
            "two pipeline ranks with virtual stages need overlapped point-to-point communication, because both "
            "directions join the same two ranks; drop --no-overlap-p2p-communication"
        )
    if uses_stock_schedule and stages > 1 and args.num_microbatches % pp:
        problems.append(
            f"{args.num_microbatches} microbatches are not divisible by the {pp} interleaved pipeline ranks"
        )
    return problems


def _decided(args: argparse.Namespace, config: Config, problems: list[str]) -> Config:
    """The configuration with nothing left to megamem's planner; why it cannot be, to `problems`."""
    if not undecided(config):
        return config
    job = replace(job_of_arguments(args, args.world_size), micro_batch_size=args.micro_batch_size)
    stages = args.virtual_stages or 1
    job = replace(job, layout=replace(job.layout, chunks=stages), global_batch_size=args.global_batch_size)
    try:
        config = decide(config, job, load_hardware(_gpu(config)), _host_memory())
    except MegamemError as error:
        problems += str(error).splitlines()
        return config
    if config.vocabulary.parallel:
        problems += plan_pipeline(args, config)
    return config


def _gpu(config: Config) -> str:
    """The hardware to plan for. Raises ConfigError where it is not known."""
    if config.planner.hardware != "auto":
        return config.planner.hardware
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    if (row := row_of_device(name)) is not None:
        return row
    raise ConfigError(
        f"--megamem-planner-hardware: {name} is not in the table of GPUs; give the name of one (megamem plan --list), "
        "or measure: megamem profile --hardware --output profile.json --num-layers ..."
    )


def _host_memory() -> float:
    return float(resolve_host_memory("auto", int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _plan_problems(args: argparse.Namespace, config: Config) -> list[str]:
    """Why the plan that --megamem names, if it is one, was made for another job."""
    if config.plan is None:
        return []
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "swiglu", "normalization")
    found = {name: vars(args)[name] for name in sizes} | {"num_query_groups": args.kv_heads}
    if args.num_experts is None:
        found["ffn_hidden_size"] = args.ffn_hidden_size
    layout = {
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "context": args.context_parallel_size,
        "expert": args.expert_model_parallel_size,
        "chunks": args.virtual_stages or 1,
    }
    made_for = config.plan.made_for
    problems = [*made_for.layout_problems(layout), *made_for.model_problems(found)]
    return problems or made_for.split_problems(normal_split(args.stage_layers))


def _batch_problems(args: argparse.Namespace) -> list[str]:
    unit = args.micro_batch_size * args.data_parallel_size
    problems = []
    if args.global_batch_size % unit or args.global_batch_size < unit:
        problems.append(
            f"--global-batch-size {args.global_batch_size} is not a multiple of --micro-batch-size "
            f"{args.micro_batch_size} x {args.data_parallel_size} data-parallel ranks"
        )
    if args.eval_interval is not None and args.eval_iters < 1:
        problems.append("--eval-interval needs --eval-iters of 1 or more")
    if not args.lr_warmup_iters < max(1, args.lr_decay_iters):
        problems.append(f"--lr-warmup-iters {args.lr_warmup_iters} leaves no iterations to decay in")
    return problems


def _file_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    if (args.data_text is None) == (args.data_path is None):
        problems.append(
            "give one of --data-text FOLDER and --data-path PREFIX; examples/prepare_data.py makes one and prints it"
        )
    if args.data_text is not None and not args.data_text.is_dir():
        problems.append(f"--data-text {args.data_text}: no such folder")
    for end in (".bin", ".idx") if args.data_path is not None else ():
        if not Path(f"{args.data_path}{end}").is_file():
            problems.append(f"--data-path {args.data_path}: there is no {args.data_path}{end}")
    if args.async_save and args.save is None:
        problems.append("--async-save needs --save FOLDER")
    if args.save_interval is not None and args.save is None:
        problems.append("--save-interval needs --save FOLDER")
    return problems


def _compare_problems(args: argparse.Namespace, config: Config) -> list[str]:
    if not args.compare:
        return []
    problems = []
    if not config.enabled:
        problems.append(
            "--compare needs something to compare: --megamem FILE.yaml, --megamem-activations-policy memo or "
            "--megamem-schedule-name gis-h"
        )
    if args.save is not None or args.load is not None:
        problems.append("--compare trains twice from the beginning and cannot --save or --load")
    return problems
