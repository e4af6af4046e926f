"""Tiny real GPT models of Megatron-Core for tests, equal in value whatever the parallel layout.

    case = GptCase(pp=2, activation="swiglu")
    init_parallel(case)
    chunks = build_gpt(case)
    losses, gradients = train_steps(chunks, case, num_microbatches=4, steps=2)

Every parameter is filled from a generator seeded by its *global* name (layer and expert numbers counted over the
whole model): the full tensor is drawn and this rank keeps its tensor-parallel shard. So PP 1 and PP 2, or TP 1 and TP
2, train the same model, and the gradient dictionaries of two layouts have comparable keys. What remains different
between layouts is rounding, and dropout masks.
"""

import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from megamem.integrations.local_spec import FlashAttention, last_layer_stage, local_layer_spec
from megamem.integrations.vocabulary_shards import shards_of

SpecMaker = Callable[[TransformerConfig, int | None], Any]


@dataclass(frozen=True, kw_only=True)
class GptCase:
    """Sizes and parallel layout of a test model; the names are Megatron's where it has short ones."""

    layers: int = 2
    hidden: int = 32
    heads: int = 4
    kv_groups: int | None = None  # GQA: groups of query heads that share key and value
    ffn: int | None = None
    vocab: int = 64
    sequence: int = 16
    microbatch: int = 2

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1  # attention stays within a rank's part of the sequence: no other model, but two runs of one are equal
    ep: int = 1
    sp: bool = False

    experts: int | None = None
    topk: int = 2

    activation: Literal["gelu", "swiglu"] = "gelu"
    norm: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    bias: bool = True
    position: Literal["rope", "learned_absolute", "none"] = "rope"
    qk_layernorm: bool = False
    tied: bool = False
    dropout: float = 0.0
    flash_attention: bool = True  # of our local spec; False takes Megatron's own attention with its s x s scores
    stock_norms: bool = False  # PyTorch's, as in Megatron's own local spec; they refuse sequence parallelism
    transformer_engine: bool = (
        False  # its linear layers and norms around our attention (see testing.transformer_engine)
    )
    dtype: torch.dtype = torch.float32
    ddp: bool = True  # Megatron's DDP, which also finalises gradients; without it gradients stay local to the rank
    distributed_optimizer: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)  # further fields of TransformerConfig


def init_parallel(case: GptCase, *, seed: int = 1234) -> None:
    """Make Megatron's groups and seed its random number generators. The process group must be there."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def build_config(case: GptCase, **overrides: Any) -> TransformerConfig:
    """The model's TransformerConfig, with every fused or CUDA-only path off."""
    bf16 = case.dtype is torch.bfloat16
    fields: dict[str, Any] = {
        "num_layers": case.layers,
        "hidden_size": case.hidden,
        "num_attention_heads": case.heads,
        "num_query_groups": case.kv_groups or case.heads,
        "ffn_hidden_size": case.ffn or 2 * case.hidden,
        "tensor_model_parallel_size": case.tp,
        "pipeline_model_parallel_size": case.pp,
        "virtual_pipeline_model_parallel_size": case.vpp,
        "context_parallel_size": case.cp,
        "expert_model_parallel_size": case.ep,
        "sequence_parallel": case.sp,
        "gated_linear_unit": case.activation == "swiglu",
        "activation_func": F.silu if case.activation == "swiglu" else F.gelu,
        "normalization": case.norm,
        "add_bias_linear": case.bias,
        "qk_layernorm": case.qk_layernorm,
        "hidden_dropout": case.dropout,
        "attention_dropout": case.dropout,
        "bf16": bf16,
        "params_dtype": case.dtype,
        "pipeline_dtype": case.dtype,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
    }
    if case.experts is not None:
        fields |= {
            "num_moe_experts": case.experts,
            "moe_router_topk": case.topk,
            "moe_token_dispatcher_type": "alltoall",
            "moe_aux_loss_coeff": 1e-2,
        }
    if case.vpp is not None:
        # Without the overlap Megatron's interleaved schedule trains on wrong gradients, silently; batched p2p
        # excludes it.
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return TransformerConfig(**(fields | dict(case.config) | overrides))


def build_gpt(
    case: GptCase,
    *,
    spec: SpecMaker | None = None,
    building: Callable[[int], AbstractContextManager[None]] | None = None,
    config_overrides: Mapping[str, Any] | None = None,
) -> list[torch.nn.Module]:
    """This rank's model chunks, initialised and wrapped as a trainer would.

    spec: makes the layer spec from the configuration and vp_stage
    building: entered with a chunk's number while its specs are made, as `Handle.building`
    """
    config = build_config(case, **(config_overrides or {}))
    chunks: list[torch.nn.Module] = []
    for stage in range(case.vpp or 1):
        vp_stage = stage if case.vpp else None
        if vp_stage is not None:
            parallel_state.set_virtual_pipeline_model_parallel_rank(vp_stage)
        with building(stage) if building else nullcontext():
            layers = (spec or _layer_spec(case))(config, vp_stage)
            prediction = _mtp_spec(case, config, layers, vp_stage) if config.mtp_num_layers else None
        model = GPTModel(
            config,
            layers,
            vocab_size=case.vocab,
            max_sequence_length=case.sequence,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=case.vpp is None, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=case.vpp is None, vp_stage=vp_stage),
            share_embeddings_and_output_weights=case.tied,
            position_embedding_type=case.position,
            mtp_block_spec=prediction,
            vp_stage=vp_stage,
        )
        _fill(model)
        model.model_type = "encoder_or_decoder"  # read by releases whose ModelType enum has no other member left
        chunks.append(Float16Module(config, model) if case.dtype is torch.bfloat16 else model)
    if case.ddp:
        chunks = [_wrap(chunk, config, case) for chunk in chunks]
    return chunks


class _AttentionWithinPart(FlashAttention):
    """Sees the tokens of one context-parallel rank only."""

    @staticmethod
    def _check(config: TransformerConfig) -> None:
        """Context parallelism is what this is for."""


def _layer_spec(case: GptCase) -> SpecMaker:
    def make(config: TransformerConfig, vp_stage: int | None) -> Any:
        if not case.transformer_engine:
            block = local_layer_spec(config, flash_attention=case.flash_attention, vp_stage=vp_stage)
            if case.stock_norms:
                _put_stock_norms(block, config)
            for layer in block.layer_specs if case.cp > 1 else ():
                layer.submodules.self_attention.submodules.core_attention = _AttentionWithinPart
            return block
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        made = get_gpt_layer_with_transformer_engine_spec(
            case.experts, moe_grouped_gemm=case.experts is not None, qk_layernorm=case.qk_layernorm
        )
        made.submodules.self_attention.submodules.core_attention = FlashAttention
        return made

    return make


def _mtp_spec(case: GptCase, config: TransformerConfig, layers: Any, vp_stage: int | None) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    if not getattr(layers, "layer_specs", True):  # a last stage without layers
        rank, chunk = last_layer_stage(config)
        layers = local_layer_spec(config, vp_stage=chunk, pp_rank=rank)
    return get_gpt_mtp_block_spec(config, layers, case.transformer_engine, vp_stage=vp_stage)


def _put_stock_norms(block: Any, config: TransformerConfig) -> None:
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = WrappedTorchNorm
        if config.qk_layernorm:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = WrappedTorchNorm
    block.layer_norm = WrappedTorchNorm


def _wrap(chunk: torch.nn.Module, config: TransformerConfig, case: GptCase) -> torch.nn.Module:
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=case.distributed_optimizer
    )
    config.finalize_model_grads_func = finalize_model_grads
    wrapped: torch.nn.Module = DistributedDataParallel(config=config, ddp_config=ddp_config, module=chunk)
    return wrapped


def unwrap(chunk: torch.nn.Module) -> Any:
    """The GPTModel inside Megatron's wrappers."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def global_names(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with the layer and expert numbers of the whole model, so that names agree between layouts.

    A shard of a vocabulary that all ranks share has the name of the whole weight, and `[start:stop]`, its rows.
    """
    model = unwrap(chunk)
    shards = shards_of(model)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
        if "local_experts" in parts:
            at = parts.index("local_experts") + 1
            local = model.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
            parts[at] = str(int(parts[at]) + local * parallel_state.get_expert_model_parallel_rank())
        # With multi-token prediction a last stage has the embedding itself, and an output weight that nothing uses.
        is_tied = model.share_embeddings_and_output_weights and not getattr(model, "mtp_process", False)
        if is_tied and parts == ["output_layer", "weight"]:
            parts = ["embedding", "word_embeddings", "weight"]
        if parts[0] == "vocabulary" and shards is not None:
            whole = "output_layer.weight" if parts[1] == "output_layer" else "embedding.word_embeddings.weight"
            parts = [f"{whole}[{shards.words.start}:{shards.words.stop}]"]
        yield ".".join(parts), parameter


@torch.no_grad()
def _fill(model: Any) -> None:
    for name, parameter in global_names(model):
        if rows := re.fullmatch(r"(.*)\[(\d+):(\d+)\]", name):
            full = (model.vocab_size, parameter.shape[1])
            parameter.copy_(_shard(rows[1], full, 0, 0, 1, halves=1)[int(rows[2]) : int(rows[3])])
            continue
        if ".experts." in name:
            rank, size = (
                parallel_state.get_expert_tensor_parallel_rank(),
                parallel_state.get_expert_tensor_parallel_world_size(),
            )
        else:
            rank = parallel_state.get_tensor_model_parallel_rank()
            size = parallel_state.get_tensor_model_parallel_world_size()
        sharded = getattr(parameter, "tensor_model_parallel", False)
        dim = parameter.partition_dim if sharded else 0  # type: ignore[attr-defined]
        rank, size = (rank, size) if sharded else (0, 1)
        gated = model.config.gated_linear_unit and ".linear_fc1." in name
        parameter.copy_(_shard(name, parameter.shape, dim, rank, size, halves=2 if gated else 1))


def _shard(name: str, shape: Sequence[int], dim: int, rank: int, size: int, halves: int) -> Tensor:
    """This rank's part of the full tensor. A gated first layer is [gate; up] on every rank, so it is cut half by
    half.
    """
    full = [*shape]
    full[dim] *= size
    values = torch.randn(full, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    values = 1 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.1 * values
    pieces = [half.chunk(size, dim)[rank] for half in values.chunk(halves, dim)]
    return torch.cat(pieces, dim)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One microbatch of synthetic tokens [b, s]; the mask is Megatron's (True: forbidden), None under flash
    attention.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    mask: Tensor | None


def batches(case: GptCase, num_microbatches: int, *, step: int = 0) -> list[Batch]:
    """This data-parallel rank's microbatches of a step, its context-parallel part of them; the same on every call."""
    rank = parallel_state.get_data_parallel_rank()
    part = parallel_state.get_context_parallel_rank() if case.cp > 1 else 0
    own = slice(part * (case.sequence // case.cp), (part + 1) * (case.sequence // case.cp))
    made = []
    for index in range(num_microbatches):
        generator = torch.Generator().manual_seed(1_000_003 * step + 1_009 * rank + index)
        text = torch.randint(0, case.vocab, (case.microbatch, case.sequence + 1), generator=generator)
        positions = torch.arange(case.sequence).expand(case.microbatch, -1)
        tokens, labels = (values[:, own].contiguous() for values in (text[:, :-1], text[:, 1:]))
        mask = None if case.flash_attention else _causal_mask(case)
        made.append(Batch(tokens=tokens, labels=labels, positions=positions[:, own], mask=mask))
    return made


def _causal_mask(case: GptCase) -> Tensor:
    """As Megatron-LM's data loader makes it, one for each sequence: [b, 1, s, s]."""
    mask = torch.ones(case.sequence, case.sequence).tril().logical_not()
    return mask.expand(case.microbatch, 1, -1, -1).contiguous()


def _loader(made: list[Batch]) -> Iterator[Batch]:
    """Each once, kept by nobody afterwards."""
    while made:
        yield made.pop(0)


def forward_step(data: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """As in `pretrain_gpt.py`: the chunk's output, and the function that makes the loss of it."""
    batch = next(data)
    output = model(batch.tokens, batch.positions, batch.mask, labels=batch.labels)

    def loss(per_token: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean = per_token.float().mean()
        return mean, {"loss": mean.detach().clone()}

    return output, loss


def build_optimizer(chunks: list[torch.nn.Module], case: GptCase, *, lr: float = 1e-2, clip_grad: float = 1.0) -> Any:
    """Megatron's Adam, distributed if the case says so."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        weight_decay=0.01,
        bf16=case.dtype is torch.bfloat16,
        params_dtype=case.dtype,
        use_distributed_optimizer=case.distributed_optimizer,
        clip_grad=clip_grad,
    )
    return get_megatron_optimizer(config, chunks)


def train_steps(
    chunks: list[torch.nn.Module],
    case: GptCase,
    *,
    num_microbatches: int,
    steps: int = 1,
    optimizer: Any = None,
    lr: float = 0.1,
    schedule: Callable[..., Any] | None = None,
    forward_only: bool = False,
) -> tuple[list[float], dict[str, Tensor]]:
    """Train on fixed synthetic tokens with Megatron's schedule (or the one given).

    Returns the loss of every microbatch in order (empty unless this rank has the output layer) and the last step's
    gradients by global name. `optimizer=None` is plain SGD, which keeps two layouts comparable; under the distributed
    optimizer pass `build_optimizer(...)`, and note that each rank's gradients are final only in its own shard.
    """
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(steps):
        for chunk in chunks:
            if case.ddp:
                chunk.zero_grad_buffer()  # type: ignore[operator]
            chunk.zero_grad(set_to_none=True)
        if optimizer is not None:
            optimizer.zero_grad()
        data = [_loader(batches(case, num_microbatches, step=step)) for _ in chunks]
        results = (schedule or get_forward_backward_func())(
            forward_step_func=forward_step,
            data_iterator=data if len(chunks) > 1 else data[0],
            model=chunks,
            num_microbatches=num_microbatches,
            seq_length=case.sequence,
            micro_batch_size=case.microbatch,
            decoder_seq_length=case.sequence,
            forward_only=forward_only,
        )
        losses += [float(result["loss"]) for result in results]
        if forward_only:
            continue
        gradients = {
            name: g.clone() for chunk in chunks for name, p in global_names(chunk) if (g := _gradient(p)) is not None
        }
        if optimizer is not None:
            optimizer.step()
        else:
            _sgd(chunks, lr)
    return losses, gradients


def _gradient(parameter: torch.nn.Parameter) -> Tensor | None:
    """DDP accumulates in `main_grad`; a bare model in `grad`."""
    main_grad: Tensor | None = getattr(parameter, "main_grad", None)
    return parameter.grad if main_grad is None else main_grad


@torch.no_grad()
def _sgd(chunks: list[torch.nn.Module], lr: float) -> None:
    for chunk in chunks:
        for parameter in chunk.parameters():
            gradient = _gradient(parameter)
            if gradient is not None:
                parameter.sub_(gradient.to(parameter.dtype), alpha=lr)
