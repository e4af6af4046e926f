"""A test model as the planner sees it: so that what is planned can be compared with what really happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megamem.ir.job import Job, Layout
from megamem.ir.kernels import Kernels
from megamem.ir.model import Experts, Model
from megamem.ir.pipeline_split import normal_split, parse_layout

if TYPE_CHECKING:
    from megamem.testing.models import GptCase

_LAYOUT = "pipeline_model_parallel_layout"


def job_of_case(case: GptCase, *, num_microbatches: int = 1, data: int = 1) -> Job:
    """The job of a `GptCase` on `data` data-parallel ranks."""
    from torch import bfloat16

    width = case.ffn or 2 * case.hidden
    model = Model(
        num_layers=case.layers,
        hidden_size=case.hidden,
        num_attention_heads=case.heads,
        num_query_groups=case.kv_groups or case.heads,
        kv_channels=case.hidden // case.heads,
        ffn_hidden_size=width,
        vocab_size=case.vocab,
        swiglu=case.activation == "swiglu",
        normalization=case.norm,
        add_bias_linear=case.bias,
        qk_layernorm=case.qk_layernorm,
        position=case.position,
        max_position_embeddings=case.sequence,
        share_embeddings=case.tied,
        hidden_dropout=case.dropout,
        attention_dropout=case.dropout,
        experts=(
            None if case.experts is None else Experts(num_experts=case.experts, topk=case.topk, ffn_hidden_size=width)
        ),
        mtp_num_layers=case.config.get("mtp_num_layers") or 0,
    )
    layout = Layout(
        tensor=case.tp,
        sequence_parallel=case.sp,
        context=case.cp,
        pipeline=case.pp,
        chunks=case.vpp or 1,
        expert=case.ep,
        data=max(data, case.ep // case.cp),
        distributed_optimizer=case.distributed_optimizer,
        split=normal_split(parse_layout(stages) if (stages := case.config.get(_LAYOUT)) else ()),
    )
    return Job(
        model=model,
        layout=layout,
        seq_length=case.sequence,
        micro_batch_size=case.microbatch,
        global_batch_size=case.microbatch * num_microbatches * layout.data,
        bf16=case.dtype is bfloat16,
        spec="local",
        kernels=_kernels(case),
        recompute=case.config.get("recompute_granularity") or "none",
        recompute_modules=tuple(case.config.get("recompute_modules") or ("core_attn",)),
        recompute_method=case.config.get("recompute_method") or "uniform",
        recompute_num_layers=case.config.get("recompute_num_layers") or 1,
    )


def _kernels(case: GptCase) -> Kernels:
    """On a CPU."""
    return Kernels(
        device="cpu",
        attention="flash" if case.flash_attention else "unfused",
        fused_softmax=bool(case.config.get("masked_softmax_fusion", False)),
        mask=not case.flash_attention,
        softmax_fp32=bool(case.config.get("attention_softmax_in_fp32", True)),
        norm="composed" if case.stock_norms and case.norm == "RMSNorm" else "fused",
        fused_activation=bool(case.config.get("bias_activation_fusion", False)),
        fused_rope=False,
    )
